"""What an inference engine calls: tasks in slots of buffers that never move, and a forward for each layer of its own model.

    engine = Engine(merged, max_tasks=64, fused={"qkv_proj": {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}})
    ids = engine.ids(["news", None, "law"])                     # once for a batch: one id per token, −1 for the base model
    with engine.lease("news", "law"):                           # while requests of these tasks run
        engine.layers["model.layers.0.self_attn.qkv_proj"].forward_(y, x, ids)   # y [T, 6144] += every token's own update

Tasks come and go by `add`, `replace` and `remove`, which write rows of coefficients in place: no other task moves, no address
and no shape changes, so a captured graph stays right. A batch without adapters skips the op: pass None for the ids.
"""

from __future__ import annotations

import heapq
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from . import reference
from .adapters import Adapter, load_adapter
from .merge import MergedAdapters, MergedModule
from .ops import _checks, project, reconstruct
from .slots import Layer, Limits, Row, Slice, TensorParallel


class Engine:
    """Merged adapters in buffers of fixed capacity.

    Thread safety: `add`, `replace`, `remove` and `load` may run in one thread while others run forwards. They exclude each
    other, and never write what a task in use reads: `lease` says which tasks are, and changing one of those is refused.
    Forwards take no lock.

    Attributes:
        layers: `Layer` by name, those alone that have adapters. A layer that is not there has nothing to add.
        errors: by task, how far its ΔW is from the adapter's own, relative (Frobenius) over its modules.
    """

    def __init__(
        self,
        merged: MergedAdapters,
        max_tasks: int,
        *,
        max_rank: int | None = None,
        max_components: int | None = None,
        tasks: Iterable[str] | None = None,
        fused: Mapping[str, Mapping[str, int]] | None = None,
        parallel: TensorParallel | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        mixed_ranks: bool | None = None,
    ) -> None:
        """Allocate every buffer, and load `merged`.

        Args:
            merged: its basis is every task's, those added later included.
            max_tasks: number of slots.
            max_rank, max_components: capacity for another `load`; by default what `merged` needs.
            tasks: those of `merged` to load; by default all.
            fused: the parts of fused layers and their whole widths, in the order they lie in y, by the last word of the
                path: {"gate_up_proj": {"gate_proj": 11008, "up_proj": 11008}}. A part without adapters is left alone.
            parallel: this process' part of a tensor-parallel model; widths in `fused` are the whole ones.
            dtype: of the buffers, and so of x and y; by default `merged`'s.
            mixed_ranks: whether tasks may have lower ranks than the module; by default whether those of `merged` do. Then a
                forward is two ops instead of one.

        Raises:
            ValueError: a capacity is exceeded, parts of a fused layer do not fit, or `tasks` has one twice or an unknown one.
        """
        found = max(module.rank for module in merged.modules.values())
        mixed = any(min(module.ranks) < module.rank for module in merged.modules.values())
        limits = Limits(
            max_tasks,
            found if max_rank is None else max_rank,
            max(module.components for module in merged.modules.values()) if max_components is None else max_components,
            merged.dtype if dtype is None else dtype,
            torch.device(device),
            mixed if mixed_ranks is None else mixed_ranks,
        )
        _checks.within("max_tasks", max_tasks, 1, 2**31 - 1, "slots")
        self.limits = limits
        self.parallel = parallel
        self._fused = {name: dict(parts) for name, parts in (fused or {}).items()}
        self._lock = threading.Lock()
        self._slots: dict[str, int] = {}
        self._leases: Counter[str] = Counter()
        self._free = list(range(max_tasks))
        self.errors: dict[str, float] = {}
        self.bad_ids = torch.zeros((), dtype=torch.bool, device=limits.device)
        """Whether `check` has met an id that is out of range or a free slot's; on a GPU reading it is a host sync."""
        self._check_capacity(merged)
        self.layers: Mapping[str, Layer] = MappingProxyType(self._make_layers(merged))
        self._slices = {part.module: part for layer in self.layers.values() for part in layer.slices}
        self._load(merged, tasks)

    # ---- layers

    def _make_layers(self, merged: MergedAdapters) -> dict[str, Layer]:
        owners: dict[str, tuple[str, dict[str, int]]] = {}  # the fused layer of a module, and that layer's parts
        for name in merged.modules:
            parent, _, child = name.rpartition(".")
            for fused, parts in self._fused.items():
                if child in parts:
                    owners[name] = (f"{parent}.{fused}".lstrip("."), parts)
        layers: dict[str, Layer] = {}
        for name, module in merged.modules.items():
            out, wide = module.shape
            if name not in owners:
                outputs, inputs = self._positions(name, out, wide)
                width = outputs.stop - outputs.start
                part = Slice(name, slice(0, width), outputs, inputs, self.limits)
                layers[name] = Layer(name, [part], width, inputs.stop - inputs.start)
            elif owners[name][0] not in layers:
                layers[owners[name][0]] = self._make_fused(merged, *owners[name], name.rpartition(".")[0])
        return layers

    def _make_fused(self, merged: MergedAdapters, fused: str, parts: Mapping[str, int], parent: str) -> Layer:
        slices: list[Slice] = []
        begin, widths = 0, set()
        for child, width in parts.items():
            name = f"{parent}.{child}".lstrip(".")
            module = merged.modules.get(name)
            if module is not None and module.shape[0] != width:
                raise ValueError(
                    f"layer {fused}: {name} is {width} wide in `fused`, but its adapters have {module.shape[0]} outputs"
                )
            outputs, inputs = self._positions(name, width, 0 if module is None else module.shape[1])
            end = begin + outputs.stop - outputs.start
            if module is not None:
                slices.append(Slice(name, slice(begin, end), outputs, inputs, self.limits))
                widths.add(inputs.stop - inputs.start)
            begin = end
        if len(widths) > 1:
            raise ValueError(f"layer {fused}: its parts have different numbers of inputs, {sorted(widths)}; they must share x")
        return Layer(fused, slices, begin, widths.pop())

    def _positions(self, module: str, out: int, wide: int) -> tuple[slice, slice]:
        if self.parallel is None:
            return slice(0, out), slice(0, wide)
        return self.parallel.positions(module, out, wide)

    def _check_capacity(self, merged: MergedAdapters) -> None:
        for name, module in merged.modules.items():
            for what, came, most in (
                ("rank", module.rank, self.limits.rank),
                ("components", module.components, self.limits.components),
            ):
                if came > most:
                    raise ValueError(f"module {name} has {what} {came}; the buffers hold {most}, as max_{what} says")
            if not self.limits.mixed_ranks and min(module.ranks) < module.rank:
                raise ValueError(f"module {name} has tasks of ranks below {module.rank}; make the engine with mixed_ranks=True")
        for task in merged.tasks:
            if beyond := merged.parts[task].beyond_factors:
                raise ValueError(f"task {task!r} has {', '.join(beyond)}, which a forward from basis and coefficients lacks")

    # ---- tasks

    @property
    def tasks(self) -> dict[str, int]:
        """Slot by task."""
        return dict(self._slots)

    def load(self, merged: MergedAdapters, tasks: Iterable[str] | None = None) -> None:
        """Replace basis and tasks by those of another merge of the same modules, in the same buffers.

        A module's components and rank may be others than before, within the capacity; they are shapes, so graphs captured
        before must be captured anew where they differ.

        Raises:
            ValueError: capacity is exceeded, its modules are not this engine's, or `tasks` has one twice or an unknown one.
            RuntimeError: tasks are in use.
            Buffers are unchanged then.
        """
        with self._lock:
            self._check_free(*self._slots)
            self._check_capacity(merged)
            if set(merged.modules) != set(self._slices):
                odd = sorted(set(merged.modules) ^ set(self._slices))[0]
                raise ValueError(f"module {odd} is on one side alone; load takes a merge of this engine's own modules")
            for name, part in self._slices.items():
                out, wide = merged.modules[name].shape
                if self._positions(name, out, wide) != (part.outputs, part.inputs):
                    raise ValueError(f"module {name} is [{out}, {wide}] in merged, not the shape of this engine's buffers")
            self._load(merged, tasks)

    def _load(self, merged: MergedAdapters, tasks: Iterable[str] | None) -> None:
        names = list(merged.tasks if tasks is None else tasks)
        for name in names:
            if name not in merged.tasks:
                raise ValueError(f"unknown task {name!r}; merged has {', '.join(merged.tasks)}")
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"task {twice[0]!r} is given twice; a task has one slot")
        if len(names) > self.limits.tasks:
            raise ValueError(f"merged has {len(names)} tasks to load; the buffers hold {self.limits.tasks}, as max_tasks says")
        for name, part in self._slices.items():
            module = merged.modules[name]
            part.load(module)
            for slot, task in enumerate(names):
                index = merged.tasks.index(task)
                if index in module.tasks:
                    row = module.tasks.index(index)
                    part.write(slot, self._row(part, module, row))
        self._base_model = merged.base_model
        self._slots = {name: slot for slot, name in enumerate(names)}
        self._free = list(range(len(names), self.limits.tasks))
        self.errors = {name: merged.task_error(name) for name in names}

    @staticmethod
    def _row(part: Slice, module: MergedModule, row: int) -> Row:
        coeff_a, coeff_b = module.coeff_a[row, :, part.inputs], module.coeff_b[row, :, part.outputs]
        return Row(coeff_a, coeff_b, float(module.scaling[row]), module.ranks[row])

    def add(self, name: str, adapter: str | Path | Adapter) -> int:
        """Project an adapter on the shared basis, into a free slot.

        What the basis does not hold is lost: see `errors[name]`.

        Args:
            name: of the task.
            adapter: a PEFT directory, or an adapter already opened.

        Returns:
            The slot: the task's id.

        Raises:
            ValueError: the name is taken, every slot is; the adapter is for another base model, has a module that the basis
                lacks, other widths, a rank beyond the basis, NaN or Inf, or more than factors (DoRA). Buffers are unchanged
                then.
        """
        opened = adapter if isinstance(adapter, Adapter) else load_adapter(adapter, name)
        with self._lock:
            if name in self._slots:
                raise ValueError(
                    f"there is a task {name!r} already, in slot {self._slots[name]}; replace it, or remove it first"
                )
            if not self._free:
                raise ValueError(f"all {self.limits.tasks} slots are taken, as max_tasks says; remove a task first")
            rows, error = self._project(opened)
            slot = heapq.heappop(self._free)
            self._write(slot, rows)
            self._slots[name], self.errors[name] = slot, error
            return slot

    def replace(self, name: str, adapter: str | Path | Adapter) -> int:
        """As `add`, into the slot that the task has.

        Raises:
            ValueError: as `add`, or there is no such task.
            RuntimeError: the task is in use.
            Buffers are unchanged then.
        """
        opened = adapter if isinstance(adapter, Adapter) else load_adapter(adapter, name)
        with self._lock:
            slot = self._slot(name)
            self._check_free(name)
            rows, error = self._project(opened)
            self._write(slot, rows)
            self.errors[name] = error
            return slot

    def remove(self, name: str) -> None:
        """Free the task's slot. Its id then changes nothing, until another task takes the slot.

        Raises:
            ValueError: there is no such task.
            RuntimeError: it is in use.
        """
        with self._lock:
            slot = self._slot(name)
            self._check_free(name)
            self._write(slot, dict.fromkeys(self._slices))
            del self._slots[name], self.errors[name]
            heapq.heappush(self._free, slot)

    @contextmanager
    def lease(self, *names: str) -> Iterator[list[int]]:
        """Inside this block the tasks are in use: they keep their slots, and what is in them. Gives the slots.

        Raises:
            ValueError: there is no such task.
        """
        with self._lock:
            slots = [self._slot(name) for name in names]
            self._leases.update(names)
        try:
            yield slots
        finally:
            with self._lock:
                self._leases.subtract(names)
                self._leases = +self._leases

    def _write(self, slot: int, rows: Mapping[str, Row | None]) -> None:
        for name, part in self._slices.items():
            part.write(slot, rows[name])

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            raise ValueError(f"unknown task {name!r}; there are {', '.join(self._slots) or 'none'}")
        return self._slots[name]

    def _check_free(self, *names: str) -> None:
        for name in names:
            if self._leases[name]:
                raise RuntimeError(f"task {name!r} is in use ({self._leases[name]} leases); wait until they end")

    def _project(self, adapter: Adapter) -> tuple[dict[str, Row | None], float]:
        """A row for every slice, and the error."""
        if adapter.beyond_factors:
            raise ValueError(f"adapter {adapter.name!r} has {', '.join(adapter.beyond_factors)}, which the forward lacks")
        if None not in (adapter.base_model, self._base_model) and adapter.base_model != self._base_model:
            raise ValueError(f"adapter {adapter.name!r} is for {adapter.base_model!r}, the basis for {self._base_model!r}")
        for name in adapter.modules:
            if name not in self._slices:
                raise ValueError(f"adapter {adapter.name!r} has module {name}, which the basis lacks")
        rows: dict[str, Row | None] = {}
        lost = whole = 0.0
        for name, part in self._slices.items():
            rows[name] = None
            if name not in adapter:
                continue
            out, wide = adapter.shape(name)
            if self._positions(name, out, wide) != (part.outputs, part.inputs):
                raise ValueError(f"adapter {adapter.name!r}: module {name} is [{out}, {wide}], not what the buffers are for")
            rank = adapter.rank(name)
            if rank > part.rank:
                raise ValueError(f"adapter {adapter.name!r}: module {name} has rank {rank}; the basis has {part.rank}")
            if rank < part.rank and not part.mixed_ranks:
                raise ValueError(
                    f"adapter {adapter.name!r}: module {name} has rank {rank}, the basis {part.rank}; "
                    "make the engine with mixed_ranks=True"
                )
            factors, scaling = adapter.factors(name), adapter.scaling(name)

            def padded(factor: Tensor, positions: slice, like: Tensor, rank: int = rank) -> Tensor:
                """[1, S, r] of factor [S, its rank]"""
                x = like.new_zeros(1, positions.stop - positions.start, like.shape[2])
                x[0, :, :rank] = factor[positions].to(like)
                return x

            basis_a = part.basis_a.mT  # [p+1, in, r]
            a, b = padded(factors.lora_a.mT, part.inputs, basis_a), padded(factors.lora_b, part.outputs, part.basis_b)
            coeff_a, coeff_b = project(a, basis_a), project(b, part.basis_b)
            if not bool(coeff_a.isfinite().all() & coeff_b.isfinite().all()):
                raise ValueError(f"adapter {adapter.name!r}: module {name} holds NaN or Inf, or overflows {part.basis_a.dtype}")
            rows[name] = Row(coeff_a[0], coeff_b[0], scaling, rank)
            only = torch.zeros(1, dtype=torch.int64, device=a.device)
            a_hat, b_hat = (
                reconstruct(basis, coeff, only)[0, :, :rank].double()
                for basis, coeff in ((basis_a, coeff_a), (part.basis_b, coeff_b))
            )
            a, b = a[0, :, :rank].double(), b[0, :, :rank].double()
            lost += scaling**2 * _square(torch.cat([b, -b_hat], 1), torch.cat([a, a_hat], 1))
            whole += scaling**2 * _square(b, a)
        return rows, (lost / whole) ** 0.5 if whole else 0.0

    # ---- ids

    def ids(self, tasks: Iterable[str | None], dtype: torch.dtype = torch.int32) -> Tensor | None:
        """One id per token for `tasks`, None in it standing for the base model; None where no token has a task.

        Raises:
            ValueError: there is no such task.
        """
        slots = [-1 if name is None else self._slot(name) for name in tasks]
        if all(slot < 0 for slot in slots):
            return None
        return torch.tensor(slots, dtype=dtype, device=self.limits.device)

    def check(self, task_ids: Tensor) -> None:
        """Look at ids that did not come from `ids`, once for a batch: one that is out of range or a free slot's sets `bad_ids`.

        Raises:
            ValueError: there is one (CPU). On a GPU, where looking would be a host sync, its row is a no-op.
        """
        taken = torch.zeros(self.limits.tasks, dtype=torch.bool)
        taken[list(self._slots.values())] = True
        n = self.limits.tasks
        known = (task_ids >= -1) & (task_ids < n)
        free = ~taken.to(task_ids.device, non_blocking=True)[task_ids.clamp(0, n - 1).long()] & (task_ids >= 0)
        bad = ~known | free
        self.bad_ids.logical_or_(bad.any())
        if task_ids.device.type == "cpu" and bool(bad.any()):
            worst = int(task_ids[bad][0])
            what = "the id of a free slot" if 0 <= worst < n else f"out of range; allowed are -1 to {n - 1}"
            raise ValueError(f"task_ids holds {worst}, {what}")

    # ---- memory and warm-up

    @property
    def buffer_bytes(self) -> dict[str, int]:
        """Bytes of the buffers: "shared", whatever the number of tasks, and "task", for each slot."""
        sizes = {"shared": 0, "task": 0}
        for part in self._slices.values():
            for name, buffer in part.buffers.items():
                sizes["shared" if name.startswith("basis") else "task"] += buffer.nbytes
        sizes["task"] //= self.limits.tasks
        return sizes

    def workspace_bytes(self, tokens: int) -> int:
        """The most a forward of `tokens` takes from the device's allocator: u [T, r].

        The CPU kernels' scratch comes on top, less than (p + 7) r · 2.2 KiB + 256 KiB a thread.
        """
        item = reference.accumulator(self.limits.dtype).itemsize
        return max(tokens * part.rank * item for part in self._slices.values())

    def warm_up(self, tokens: Iterable[int]) -> None:
        """Run every layer once for each number of tokens, with ids of the base model and of slot 0, on zeros: what is built or
        compiled at a first call is so now, and the allocator has what later calls need."""
        for count in tokens:
            ids = torch.full((count,), -1, dtype=torch.int32, device=self.limits.device)
            ids[: (count + 1) // 2] = 0
            for layer in self.layers.values():
                y, x = (
                    torch.zeros(count, width, dtype=self.limits.dtype, device=self.limits.device)
                    for width in (layer.width, layer.wide)
                )
                layer.forward_(y, x, ids)

    # ---- export

    def to_vllm(self, tasks: Sequence[str], max_rank: int | None = None) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
        """Restored factors in vLLM's stacked layout: for each layer (lora_a, lora_b), a tensor for each adapted slice.

        lora_a [L, max_rank, K] and lora_b [L, N, max_rank], L the tasks in the order given, zero beyond a task's rank; lora_b
        holds the scaling, as vLLM's does.

        Raises:
            ValueError: there is no such task, or `max_rank` is less than a rank.
        """
        slots = [self._slot(name) for name in tasks]
        stacked = {}
        for name, layer in self.layers.items():
            pairs = [self._padded(part, slots, max_rank) for part in layer.slices]
            stacked[name] = ([a for a, _ in pairs], [b for _, b in pairs])
        return stacked

    def to_sglang(self, tasks: Sequence[str], max_rank: int | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Restored factors in SGLang's slots: for each layer (A [L, slices · max_rank, K], B [L, N, max_rank]).

        The slices' lora_a lie one after another along the rank, their lora_b one after another along N, all of the layer's
        outputs: those without adapters are zero. The scaling is in B, so SGLang's own is 1.

        Raises:
            ValueError: as `to_vllm`.
        """
        slots = [self._slot(name) for name in tasks]
        packed = {}
        for name, layer in self.layers.items():
            pairs = [self._padded(part, slots, max_rank) for part in layer.slices]
            b = pairs[0][1].new_zeros(len(slots), layer.width, pairs[0][1].shape[2])
            for part, (_, lora_b) in zip(layer.slices, pairs, strict=True):
                b[:, part.columns] = lora_b
            packed[name] = (torch.cat([a for a, _ in pairs], 1), b)
        return packed

    def _padded(self, part: Slice, slots: Sequence[int], max_rank: int | None) -> tuple[Tensor, Tensor]:
        rank = self.limits.rank if max_rank is None else max_rank
        if rank < part.rank:
            raise ValueError(f"max_rank is {rank}; module {part.module} has rank {part.rank}")
        a, b = part.restored(slots)
        more = rank - part.rank
        return torch.nn.functional.pad(a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more))


def _square(b: Tensor, a: Tensor) -> float:
    """‖b aᵀ‖² (Frobenius) of b [out, r] and a [in, r], without forming it."""
    return max(0.0, float(((b.mT @ b) * (a.mT @ a)).sum()))
