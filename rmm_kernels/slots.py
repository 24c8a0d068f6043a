"""Adapters of a layer as an engine holds them: buffers of fixed capacity at fixed addresses, coefficients in slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .merge import MergedModule
from .ops import _checks, lora_expand_, lora_forward_, lora_shrink, reconstruct


@dataclass(frozen=True)
class Limits:
    """What the buffers hold at most, and what they are made of."""

    tasks: int
    rank: int
    components: int
    dtype: torch.dtype
    device: torch.device
    mixed_ranks: bool


@dataclass(frozen=True)
class TensorParallel:
    """Which part of every layer this process holds.

    A factor is sharded along its positions, as the weight beside it is. "column": the outputs are split, lora_b's positions
    with them, and lora_a is whole; the results are bitwise those of one process. "row": the inputs are split, lora_a's
    positions with them; every process adds its own part of B A x to its own part of y, which the layer's all-reduce then
    sums. Neither needs a collective of its own.
    """

    rank: int
    """of this process"""
    size: int
    """number of processes"""
    plan: Mapping[str, str]
    """"column" or "row" by the end of a module's path, such as "q_proj"; modules that no entry fits are whole everywhere"""

    def __post_init__(self) -> None:
        _checks.within("size", self.size, 1, 1 << 20, "processes")
        _checks.within("rank", self.rank, 0, self.size - 1, "processes of the group")
        for key, way in self.plan.items():
            if way not in ("column", "row"):
                raise ValueError(f'plan[{key!r}] is {way!r}; allowed are "column" and "row"')

    def positions(self, module: str, out: int, wide: int) -> tuple[slice, slice]:
        """(outputs, inputs) of `module` that this process holds.

        Raises:
            ValueError: they can't be split evenly.
        """
        way = next((way for key, way in self.plan.items() if module == key or module.endswith(f".{key}")), None)
        split = {"column": out, "row": wide}.get(way or "", 0)
        if split % self.size:
            raise ValueError(f"module {module}: {split} positions can't be split over {self.size} processes evenly")
        mine = slice(self.rank * split // self.size, (self.rank + 1) * split // self.size)
        return (mine if way == "column" else slice(0, out)), (mine if way == "row" else slice(0, wide))


@dataclass(frozen=True)
class Row:
    """What a task's slot holds in one slice."""

    coeff_a: Tensor  # [p, in]
    coeff_b: Tensor  # [p, out]
    scaling: float
    rank: int


class Slice:
    """One adapted projection: buffers of fixed capacity, and what of them is in use.

    Buffers: basis_a [max_components+1, max_rank, in], coeff_a [max_tasks, max_components, in], basis_b as [max_components+1,
    max_rank, out] (`out` innermost), coeff_b [max_tasks, max_components, out], scaling [max_tasks] (0: no such task, or it
    lacks this module), kept [max_tasks, max_rank] (1 up to the task's own rank). Their addresses never change.
    """

    def __init__(self, module: str, columns: slice, outputs: slice, inputs: slice, limits: Limits) -> None:
        self.module = module
        self.columns = columns
        """of the layer's y"""
        self.outputs, self.inputs = outputs, inputs
        wide, out = inputs.stop - inputs.start, outputs.stop - outputs.start
        n, r, p = limits.tasks, limits.rank, limits.components

        def zeros(*size: int, dtype: torch.dtype = limits.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=limits.device)

        self.buffers = {
            "basis_a": zeros(p + 1, r, wide),
            "coeff_a": zeros(n, p, wide),
            "basis_b": zeros(p + 1, r, out),
            "coeff_b": zeros(n, p, out),
            "scaling": zeros(n, dtype=reference.accumulator(limits.dtype)),
            "kept": zeros(n, r, dtype=reference.accumulator(limits.dtype)),
        }
        self.mixed_ranks = limits.mixed_ranks
        self.use(0, 0)

    def use(self, components: int, rank: int) -> None:
        """Look at so many components and ranks of the buffers."""
        self.components, self.rank = components, rank
        self.basis_a = self.buffers["basis_a"][: components + 1, :rank]
        self.coeff_a = self.buffers["coeff_a"][:, :components]
        self.basis_b = self.buffers["basis_b"][: components + 1, :rank].mT
        self.coeff_b = self.buffers["coeff_b"][:, :components]
        self.scaling = self.buffers["scaling"]

    def load(self, module: MergedModule) -> None:
        """Its basis, and no task."""
        for buffer in self.buffers.values():
            buffer.zero_()
        self.use(module.components, module.rank)
        self.basis_a.copy_(module.basis_a[:, :, self.inputs])
        self.basis_b.copy_(module.basis_b[:, self.outputs])

    def write(self, slot: int, row: Row | None) -> None:
        """Put a task's row into `slot`; None for a task that lacks the module, and for no task."""
        if row is None:
            self.scaling[slot] = 0.0
            return
        self.coeff_a[slot].copy_(row.coeff_a)
        self.coeff_b[slot].copy_(row.coeff_b)
        self.buffers["kept"][slot] = (torch.arange(self.buffers["kept"].shape[1]) < row.rank).to(self.scaling.dtype)
        self.scaling[slot] = row.scaling

    def forward_(self, y: Tensor, x: Tensor, task_ids: Tensor, scale: float | Tensor | None) -> None:
        """y [T, out] += scale · scaling B A x, row by row; see `Layer.forward_`."""
        if not self.mixed_ranks and not isinstance(scale, Tensor):
            scaling = self.scaling if scale is None else self.scaling * scale
            lora_forward_(y, x, self.basis_a, self.coeff_a, self.basis_b, self.coeff_b, task_ids, scaling)
            return
        u = lora_shrink(x, self.basis_a, self.coeff_a, task_ids)  # [T, r]
        if self.mixed_ranks:
            kept = self.buffers["kept"][:, : self.rank]
            u *= kept[task_ids.clamp(0, kept.shape[0] - 1)]
        if scale is not None:
            u *= scale[:, None] if isinstance(scale, Tensor) else scale
        lora_expand_(y, u, self.basis_b, self.coeff_b, task_ids, self.scaling)

    def restored(self, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(lora_a [L, r, in], lora_b [L, out, r]) of the tasks in `slots`, the scaling in lora_b, zero beyond a task's rank."""
        chosen = torch.tensor(slots, dtype=torch.int64, device=self.scaling.device)
        kept = self.buffers["kept"][chosen, : self.rank]  # [L, r]
        lora_a = reconstruct(self.basis_a.mT, self.coeff_a, chosen).mT * kept[:, :, None]
        lora_b = reconstruct(self.basis_b, self.coeff_b, chosen) * (kept * self.scaling[chosen, None])[:, None]
        return lora_a.to(self.basis_a.dtype), lora_b.to(self.basis_b.dtype)


class Layer:
    """A layer of the engine's own model: one slice, or several side by side that share x."""

    def __init__(self, name: str, slices: Sequence[Slice], width: int, wide: int) -> None:
        self.name = name
        self.slices = tuple(slices)
        self.width = width
        """of y: outputs of this process"""
        self.wide = wide
        """of x: inputs of this process"""

    def forward_(self, y: Tensor, x: Tensor, task_ids: Tensor | None, scale: float | Tensor | None = None) -> Tensor:
        """Add every token's own update to y, all slices in one call.

        Args:
            y: [T, width], of the buffers' dtype, any strides; written in place. Rows of −1 keep every bit.
            x: [T, wide], y's dtype.
            task_ids: [T], int32 or int64, from `Engine.ids`; None where no row has a task, and then nothing runs. The id of a
                free slot changes nothing.
            scale: beside each task's own scaling: a factor for all; or one for each token, [T], of the accumulator's dtype.

        Returns:
            y.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices that do not fit together; before anything is written.
            RuntimeError: an id is out of range (CPU; on a GPU such a row is treated as −1, see `Engine.check`).
        """
        if task_ids is None:
            return y
        if y.ndim != 2 or y.shape[1] != self.width:
            parts = " + ".join(f"{part.module} {part.columns.stop - part.columns.start}" for part in self.slices)
            raise ValueError(f"y has shape {list(y.shape)}; layer {self.name} has [T, {self.width}], with {parts} adapted")
        if isinstance(scale, Tensor):
            if scale.shape != task_ids.shape:
                raise ValueError(f"scale has shape {list(scale.shape)}; it must be [{len(task_ids)}], one for each token")
            _checks.accumulated("scale", scale, "y", y)
        for part in self.slices:
            part.forward_(y[:, part.columns], x, task_ids, scale)
        return y
