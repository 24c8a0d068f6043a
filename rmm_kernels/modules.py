"""Mixed-task LoRA inside a model: linear layers that add every row's own task, straight from basis and coefficients.

For example, three samples of two tasks and of the base model in one forward:

    with attach(model, merged) as attachment, attachment.tasks(["news", None, "tweets"]):
        output = model(**batch)

After the block the model is exactly what it was.
"""

from __future__ import annotations

import operator
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .merge import MergedAdapters, MergedModule
from .ops import _checks, lora_forward, lora_forward_

BASE = "__base__"
"""The task name, as in PEFT, that stands for the base model alone."""

Task = str | int | None
"""One task: its name, its index in `MergedAdapters.tasks`, or None, −1 or "__base__" for the base model alone."""


Rows = tuple[tuple[int, Tensor], ...]
"""For each rank that a module's tasks have: the rank, and for every row of x the row of the module's coefficients [T], −1 where
its task is not of that rank."""


class MultiTaskLoRALinear(nn.Module):
    """A linear layer and, on top of it, row by row, the low-rank update of that row's task.

    y_t = base_layer(x_t) + scaling_i B_i A_i x_t, i the task of row t, where A_i and B_i are read from the shared basis and
    never built. Rows of the base model alone, and of a task that lacks this module, keep every bit of base_layer's result.
    Where the tasks' ranks differ, each takes the leading columns of its own rank, as `MergedAdapters.restore` does.

    Buffers: basis_a [p+1, r, in], coeff_a [n, p, in], basis_b [p+1, out, r] and coeff_b [n, p, out] in one dtype; scaling [n],
    always fp32 (fp64 beside fp64), as the ops ask, whatever `.to(dtype)` says; row_of_task [distinct ranks, n_tasks] or
    None. They share memory with `module` where dtype, device and layout allow and are never written to: they are constants,
    without gradients. They are not in `state_dict`, because merged adapters have a file of their own; what base_layer has there
    stands under `base_layer.`, as in PEFT.
    """

    basis_a: Tensor
    coeff_a: Tensor
    basis_b: Tensor
    coeff_b: Tensor
    scaling: Tensor
    row_of_task: Tensor | None

    def __init__(
        self,
        base_layer: nn.Linear,
        module: MergedModule,
        n_tasks: int,
        *,
        dtype: torch.dtype | None = None,
        attachment: str | None = None,
    ) -> None:
        """Wrap `base_layer`, which stays as it is.

        Args:
            base_layer: becomes the attribute `base_layer`.
            module: one of `MergedAdapters.modules`.
            n_tasks: `len(MergedAdapters.tasks)`; `module` may lack some of them.
            dtype: of basis and coefficients, and so of x; by default that of base_layer's weight.
            attachment: the key of the `Attachment` whose tasks a forward without task_ids follows.

        Raises:
            ValueError: base_layer is of another shape than `module`, or not on a real device; `module` has more than n_tasks.
            TypeError: base_layer is not an nn.Linear, or `dtype` is not fp32, fp16, bf16 or fp64.
        """
        super().__init__()
        _check_fit(base_layer, module, n_tasks)
        dtype = _buffer_dtype(base_layer, dtype)
        device = base_layer.weight.device
        self.base_layer = base_layer
        self.n_tasks = n_tasks
        self.attachment = attachment

        def constant(name: str, value: Tensor, dtype: torch.dtype = dtype) -> None:
            self.register_buffer(name, value.detach().to(device=device, dtype=dtype), persistent=False)

        constant("basis_a", module.basis_a)
        constant("coeff_a", module.coeff_a)
        # The expand walks along `out`, in whole vectors only where `out` is innermost: hence the view of a contiguous
        # [p+1, r, out]. Turned once here, not in every forward.
        constant("basis_b", module.basis_b.mT.contiguous().mT)
        constant("coeff_b", module.coeff_b)
        constant("scaling", module.scaling, reference.accumulator(dtype))

        self.ranks = tuple(sorted(set(module.ranks)))
        rows = [[-1] * n_tasks for _ in self.ranks]
        for row, (task, rank) in enumerate(zip(module.tasks, module.ranks, strict=True)):
            rows[self.ranks.index(rank)][task] = row
        # Layers of one row key turn task ids into rows in the same way. A string keeps its hash, however many tasks there are.
        self.row_key = repr((self.ranks, rows))
        table = None if rows == [list(range(n_tasks))] else torch.tensor(rows, device=device)  # None: the id is the row
        self.register_buffer("row_of_task", table, persistent=False)

    def forward(self, x: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """base_layer(x), and every row's low-rank update added.

        Args:
            x: [..., in], of the buffers' dtype; under autocast, of any that base_layer takes.
            task_ids: int32 or int64, −1 (base model alone) to n_tasks − 1: [T], one per row of the flattened x; or of the shape
                of x's leading axes, or of the first of them, [batch] for x [batch, seq, in]. None: those of `Attachment.tasks`.

        Returns:
            [..., out].

        Raises:
            TypeError: x is not of the buffers' dtype, or task_ids hold no indices.
            ValueError: task_ids do not fit x.
            RuntimeError: no task_ids and no `Attachment.tasks` block around; an id is out of range (CPU; on a GPU such a row is
                treated as −1).
        """
        y: Tensor = self.base_layer(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(y.dtype)  # as base_layer has just done for itself
        if x.dtype != self.basis_a.dtype:
            came, kept = _checks._names((x.dtype,)), _checks._names((self.basis_a.dtype,))
            raise TypeError(
                f"x is {came}, basis and coefficients are {kept}; pass x in {kept} or attach(..., dtype=torch.{came})"
            )
        rows = self._rows(x, task_ids)
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])  # [T, in], [T, out]
        add = lora_forward_ if self._may_write(y, x) else lora_forward
        for rank, rows_of_rank in rows:
            basis_a, basis_b = self.basis_a[:, :rank], self.basis_b[..., :rank]
            flat_y = add(flat_y, flat_x, basis_a, self.coeff_a, basis_b, self.coeff_b, rows_of_rank, self.scaling)
        return flat_y.view(y.shape)

    def _may_write(self, y: Tensor, x: Tensor) -> bool:
        """Whether the update may go into y itself: autograd has no use for the old y, and nobody else can hold it."""
        if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad):
            return False
        return type(self.base_layer) is nn.Linear and not self.base_layer._forward_hooks and y.is_contiguous()

    def _rows(self, x: Tensor, task_ids: Tensor | None) -> Rows:
        """`rows_of` the ids for x, given or those of the attachment."""
        shape = x.shape[:-1]
        if task_ids is not None:
            _check_ids(task_ids, "task_ids")
            return self.rows_of(task_ids if task_ids.shape == (shape.numel(),) else _per_row(task_ids, shape))
        if self.attachment is None:
            raise RuntimeError("forward(x) of a layer that belongs to no attachment; it needs forward(x, task_ids)")
        if torch.compiler.is_compiling():
            return self.rows_of(torch.ops.rmm_kernels.current_task_ids(self.attachment, shape, x.device))
        return _selection(self.attachment).rows(self, shape, x.device)

    def rows_of(self, task_ids: Tensor) -> Rows:
        """task_ids [T] as rows of this module's coefficients, rank by rank.

        Raises:
            RuntimeError: an id is out of range (CPU, and not while compiling: then the op finds it).
        """
        if self.row_of_task is None:
            return ((self.ranks[0], task_ids),)
        if not torch.compiler.is_compiling():
            reference.check_ids(task_ids, self.n_tasks, -1)
        known = (task_ids >= 0) & (task_ids < self.n_tasks)
        rows = self.row_of_task[:, task_ids.clamp(0, self.n_tasks - 1)]  # [distinct ranks, T]
        return tuple(zip(self.ranks, torch.where(known, rows, task_ids), strict=True))

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """base_layer's: some models look at the weights of their layers."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def extra_repr(self) -> str:
        tasks, components, _ = self.coeff_a.shape
        return f"tasks={tasks} of {self.n_tasks}, components={components}, ranks={self.ranks}, dtype={self.basis_a.dtype}"

    def _apply(self, fn: Any, recurse: bool = True) -> MultiTaskLoRALinear:
        scaling = self.scaling
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scaling = scaling.to(self.scaling.device, reference.accumulator(self.basis_a.dtype))
        return self


class _Selection:
    """The ids that one `Attachment.tasks` block set, and what its layers make of them, made once for all that want the same."""

    _LIMIT = 64  # results kept: a forward wants two or three, a long block of changing shapes ever more

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self._kept: dict[Any, Rows] = {}

    def rows(self, layer: MultiTaskLoRALinear, shape: torch.Size, device: torch.device) -> Rows:
        """What `layer.rows_of` says of the ids, for x [*shape, in] on `device`; on a CPU without the ranks that have no row."""
        key = (layer.row_key, shape, device)
        rows = self._kept.get(key)
        if rows is None:
            with torch.inference_mode(False):  # another forward of this block may save them for its gradient
                rows = layer.rows_of(_per_row(self.ids.to(device), shape))
            if device.type == "cpu":  # elsewhere looking would be a sync
                rows = tuple((rank, row_ids) for rank, row_ids in rows if bool((row_ids >= 0).any()))
            if len(self._kept) >= self._LIMIT:
                self._kept.clear()
            self._kept[key] = rows
        return rows


# By attachment, because blocks of different models nest. A context variable, so that threads and asyncio tasks each have
# their own. Under a key and not under the attachment itself, so that layers can be copied and pickled.
_selections: ContextVar[Mapping[str, _Selection]] = ContextVar("rmm_kernels.tasks", default=MappingProxyType({}))


def _selection(attachment: str) -> _Selection:
    selection = _selections.get().get(attachment)
    if selection is None:
        raise RuntimeError(
            "no tasks are set for this attached model; run it inside `with attachment.tasks(...)`, with tasks(None) for the "
            "base model alone"
        )
    return selection


@torch.library.custom_op(
    "rmm_kernels::current_task_ids",
    mutates_args=(),
    schema="(str attachment, SymInt[] shape, Device device) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def _current_task_ids(attachment: str, shape: list[int], device: torch.device) -> Tensor:
    """The ids that `Attachment.tasks` set, one per row of x [*shape, in], looked up when a compiled graph runs.

    An op, since the compiler can't look into a context variable, and must not take the ids of the first run for constants.
    """
    return _per_row(_selection(attachment).ids.to(device), torch.Size(shape)).clone()


@_current_task_ids.register_fake
def _(attachment: str, shape: list[int], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=device).flatten()


def _per_row(ids: Tensor, shape: torch.Size) -> Tensor:
    """One id per row [T] of x [*shape, in], from one for all, one for each entry of x's first axes, or one per packed token."""
    if ids.shape == shape[: ids.ndim]:
        return ids.reshape(ids.shape + (1,) * (len(shape) - ids.ndim)).expand(shape).reshape(-1)
    packed = len(shape) == 1 or (ids.ndim == 1 and shape[0] == 1)  # x is [T, in] or [1, T, in]
    if packed and ids.numel() == shape.numel():
        return ids.reshape(-1)
    raise ValueError(
        f"task ids of shape {list(ids.shape)} do not fit an input of shape {[*shape, 'in']}; allowed are one for all, one per "
        f"sample {list(shape[:1])} or one per token {list(shape)}"
    )


class Attachment:
    """A model with merged adapters in it; made by `attach`. As a context manager it detaches at the end.

    Attributes:
        model, merged: as given to `attach`. What `merged` carries for a task beside LoRA factors, its classification head
            for one, is not applied: use it on the model's output.
        layers: the `MultiTaskLoRALinear` that are in the model, by module name.
    """

    def __init__(self, model: nn.Module, merged: MergedAdapters, key: str, layers: Mapping[str, MultiTaskLoRALinear]) -> None:
        self.model = model
        self.merged = merged
        self.layers = layers
        self._key = key
        self._indices = {name: index for index, name in enumerate(merged.tasks)} | {BASE: -1}
        self._attached = True

    @contextmanager
    def tasks(self, tasks: Task | Iterable[Task] | Tensor) -> Iterator[None]:
        """Inside this block the model's forward passes run these tasks.

        Outside of any block a forward raises, because a batch that silently ran the base model would pass for a result. Blocks
        nest, the innermost counts; every thread and asyncio task has its own, so two may run one model at once. What gradient
        checkpointing recomputes in backward needs the block, too. A compiled model looks the tasks up when it runs: other
        tasks compile nothing anew. Enter the block outside of the compiled function.

        Args:
            tasks: one `Task` for all samples; or one for each sample; or an int32 or int64 tensor of indices (−1: base model
                alone), [batch] or, one for each token, [batch, seq]. An input of packed tokens, [T, in] or [1, T, in], takes
                one for each token. Read on entry: a tensor may change afterwards.

        Raises:
            ValueError: an unknown name, or an index out of range (not looked for in a tensor on a GPU, which would need a host
                sync: such a row counts as −1). From the forward: as many tasks as do not fit the input.
            TypeError: a task is neither a name, an index nor None.
            RuntimeError: the attachment is detached.
        """
        if not self._attached:
            raise RuntimeError("tasks() of an attachment that is detached; attach again")
        with torch.inference_mode(False):  # a forward with gradients may save them, though the block be entered without
            selection = _Selection(self._ids(tasks))
        token = _selections.set({**_selections.get(), self._key: selection})
        try:
            yield
        finally:
            _selections.reset(token)

    def detach(self) -> None:
        """Put back the very nn.Linear objects that `attach` replaced. Does nothing the second time.

        Raises:
            RuntimeError: one of the layers has been replaced since; then nothing is changed.
        """
        if not self._attached:
            return
        for name, layer in self.layers.items():
            if self.model.get_submodule(name) is not layer:
                raise RuntimeError(
                    f"module {name} is no longer the layer that attach put there; put that back before you detach"
                )
        for name, layer in self.layers.items():
            _replace(self.model, name, layer.base_layer)
        self._attached = False

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _ids(self, tasks: Task | Iterable[Task] | Tensor) -> Tensor:
        """`tasks` as indices, int64: [] for one task, [batch] for a sequence, a tensor in its own shape."""
        if isinstance(tasks, Tensor):
            _check_ids(tasks, "tasks")
            if tasks.device.type == "cpu" and tasks.numel():
                self._index(int(tasks.min()))
                self._index(int(tasks.max()))
            return tasks.to(torch.int64, copy=True)
        if isinstance(tasks, Iterable) and not isinstance(tasks, str):
            return torch.tensor([self._index(task) for task in tasks], dtype=torch.int64)
        return torch.tensor(self._index(tasks))

    def _index(self, task: Task) -> int:
        if task is None:
            return -1
        if isinstance(task, str):
            if task not in self._indices:
                raise ValueError(f"unknown task {task!r}; allowed are {', '.join(self._indices)}")
            return self._indices[task]
        if isinstance(task, bool) or not hasattr(task, "__index__"):
            raise TypeError(f"a task must be a name, an index or None (base model alone), got {type(task).__name__}")
        index = operator.index(task)
        if not -1 <= index < len(self.merged.tasks):
            raise ValueError(f"task {index} is out of range; allowed are -1 (base model alone) to {len(self.merged.tasks) - 1}")
        return index


def attach(model: nn.Module, merged: MergedAdapters, *, dtype: torch.dtype | None = None) -> Attachment:
    """Put a `MultiTaskLoRALinear` around every linear layer that `merged` has adapters for.

    For any model that calls its nn.Linear modules, as transformers' do. Modules are found by the names in `merged.modules`,
    which are those of the model that the adapters were trained on; whether the weights are that model's can't be seen.

    Args:
        model: changed in place, until the attachment is detached.
        merged: its tasks may be mixed freely in a batch.
        dtype: of basis and coefficients; by default, layer by layer, that of the weight. Under `torch.autocast` it must be
            autocast's, and for quantised weights the one the model computes in.

    Raises:
        ValueError: the model lacks a module of `merged` or has it in another shape; the model is attached already; a task has
            more than its factors do, such as DoRA (`TaskParts.beyond_factors`).
        TypeError: a module is not an nn.Linear, or a dtype not fp32, fp16, bf16 or fp64.
        Each names the module or the task, and the model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, present in model.named_modules():
        if isinstance(present, MultiTaskLoRALinear):
            raise ValueError(f"model is attached already: module {name} is a MultiTaskLoRALinear; detach it first")
    if BASE in merged.tasks:
        raise ValueError(f"a task of merged is called {BASE!r}, which stands for the base model alone; give it another name")
    for task in merged.tasks:
        if beyond := merged.parts[task].beyond_factors:
            raise ValueError(
                f"task {task!r} has {', '.join(beyond)}; attach runs scaling · lora_B @ lora_A alone and would lose that: "
                "restore the task and load it with PEFT"
            )
    key = uuid.uuid4().hex
    layers: dict[str, MultiTaskLoRALinear] = {}
    names: dict[nn.Module, str] = {}
    for name, module in merged.modules.items():
        base_layer = _submodule(model, name)
        try:
            layers[name] = MultiTaskLoRALinear(base_layer, module, len(merged.tasks), dtype=dtype, attachment=key)
        except (ValueError, TypeError) as error:
            raise type(error)(f"module {name}: {error}") from None
        if base_layer in names:
            raise ValueError(f"module {name}: is the same object as {names[base_layer]}; it can take the adapters of one only")
        names[base_layer] = name
    for name, layer in layers.items():
        _replace(model, name, layer)
    return Attachment(model, merged, key, MappingProxyType(layers))


def _submodule(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        inside = next((path for path, _ in model.named_modules() if path.endswith(f".{name}")), None)
        hint = "" if inside is None else f"; it has {inside}: attach to its submodule {inside.removesuffix(f'.{name}')}"
        raise ValueError(f"module {name}: not in {type(model).__name__}{hint}") from None


def _check_fit(base_layer: nn.Module, module: MergedModule, n_tasks: int) -> None:
    if not isinstance(base_layer, nn.Linear):
        kind = type(base_layer)
        raise TypeError(f"base_layer is a {kind.__module__}.{kind.__qualname__}; it must be a torch.nn.Linear")
    came = (base_layer.out_features, base_layer.in_features)
    if came != module.shape:
        raise ValueError(f"base_layer has (out, in) = {came}; the adapters are for {module.shape}")
    if base_layer.weight.is_meta:
        raise ValueError("base_layer is on the meta device, not loaded or offloaded; load it to the device it computes on")
    if n_tasks <= max(module.tasks):
        raise ValueError(f"n_tasks is {n_tasks}, but the module is adapted for task {max(module.tasks)}; it must be more")


def _buffer_dtype(base_layer: nn.Linear, dtype: torch.dtype | None) -> torch.dtype:
    asked = base_layer.weight.dtype if dtype is None else dtype
    if asked not in _checks.FLOATS:
        what = "base_layer's weight, where no dtype is given," if dtype is None else "dtype"
        raise TypeError(f"{what} must be one of {_checks._names(_checks.FLOATS)}, got {_checks._names((asked,))}")
    return asked


def _check_ids(ids: Tensor, name: str) -> None:
    if ids.dtype not in _checks.IDS:
        raise TypeError(f"{name} must be one of {_checks._names(_checks.IDS)}, got {_checks._names((ids.dtype,))}")


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
