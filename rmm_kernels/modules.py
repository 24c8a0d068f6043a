"""Mixed-task LoRA inside a model: linear layers that add every row's own task, straight from basis and coefficients.

For example, three samples of two tasks and of the base model in one forward:

    with attach(model, merged) as attachment, attachment.tasks(["news", None, "tweets"]):
        output = model(**batch)

or, as with PEFT, `model(**batch, adapter_names=["news", "__base__", "tweets"])`, in `model.generate` too.
After the block the model is exactly what it was.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .heads import HeadsLinear, heads_in
from .merge import MergedAdapters, MergedModule
from .ops import _checks, lora_forward, lora_forward_
from .selection import BASE, Forward, Names, Rows, Task, check_ids, ids_of, per_row, selection_of


def features(layer: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a torch.nn.Linear or a transformers Conv1D; None for anything else."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if _is_conv1d(layer):
        weight: Any = layer.weight  # [in, out], the transpose of a Linear's
        return weight.shape[1], weight.shape[0]
    return None


def _is_conv1d(layer: nn.Module) -> bool:
    known = sys.modules.get("transformers.pytorch_utils")  # where it was not imported, the layer is not one
    return known is not None and isinstance(layer, known.Conv1D)


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
        base_layer: nn.Module,
        module: MergedModule,
        n_tasks: int,
        *,
        dtype: torch.dtype | None = None,
        attachment: str | None = None,
    ) -> None:
        """Wrap `base_layer`, which stays as it is.

        Args:
            base_layer: an nn.Linear or a transformers Conv1D; becomes the attribute `base_layer`.
            module: one of `MergedAdapters.modules`.
            n_tasks: `len(MergedAdapters.tasks)`; `module` may lack some of them.
            dtype: of basis and coefficients, and so of x; by default that of base_layer's weight.
            attachment: the key of the `Attachment` whose tasks a forward without task_ids follows.

        Raises:
            ValueError: base_layer is of another shape than `module`, or not on a real device; `module` has more than n_tasks.
            TypeError: base_layer is neither an nn.Linear nor a Conv1D, or `dtype` is not fp32, fp16, bf16 or fp64.
        """
        super().__init__()
        self.out_features, self.in_features = _check_fit(base_layer, module, n_tasks)
        weight: Any = base_layer.weight
        dtype = _buffer_dtype(weight, dtype)
        device = weight.device
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
        known = type(self.base_layer) is nn.Linear or _is_conv1d(self.base_layer)
        return known and not self.base_layer._forward_hooks and y.is_contiguous()

    def _rows(self, x: Tensor, task_ids: Tensor | None) -> Rows:
        """`rows_of` the ids for x, given or those of the attachment."""
        shape = x.shape[:-1]
        if task_ids is not None:
            check_ids(task_ids, "task_ids")
            return self.rows_of(task_ids if task_ids.shape == (shape.numel(),) else per_row(task_ids, shape))
        if self.attachment is None:
            raise RuntimeError("forward(x) of a layer that belongs to no attachment; it needs forward(x, task_ids)")
        if torch.compiler.is_compiling():
            return self.rows_of(ids_of(self.attachment, shape, x.device))
        return selection_of(self.attachment).rows(self, shape, x.device)

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
    def weight(self) -> Any:
        """base_layer's: some models look at the weights of their layers."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    def extra_repr(self) -> str:
        tasks, components, _ = self.coeff_a.shape
        return f"tasks={tasks} of {self.n_tasks}, components={components}, ranks={self.ranks}, dtype={self.basis_a.dtype}"

    def _apply(self, fn: Any, recurse: bool = True) -> MultiTaskLoRALinear:
        scaling = self.scaling
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scaling = scaling.to(self.scaling.device, reference.accumulator(self.basis_a.dtype))
        return self


class Attachment:
    """A model with merged adapters in it; made by `attach`. As a context manager it detaches at the end.

    Attributes:
        model, merged: as given to `attach`. Of what `merged` carries for a task beside LoRA factors, linear heads that the
            model has too are applied, the rest is not; heads in files of their own are for `TaskHeads`.
        layers: the `MultiTaskLoRALinear` that are in the model, by module name.
        heads: the `HeadsLinear`, by module name.
    """

    def __init__(
        self,
        model: nn.Module,
        merged: MergedAdapters,
        key: str,
        layers: Mapping[str, MultiTaskLoRALinear],
        heads: Mapping[str, HeadsLinear],
    ) -> None:
        self.model = model
        self.merged = merged
        self.layers = layers
        self.heads = heads
        self._names = Names(key, {name: index for index, name in enumerate(merged.tasks)} | {BASE: -1})
        self._forward = model.__dict__.get("forward")  # hardly ever there; put back in the end
        model.forward = Forward(model, self._names)
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
        with self._names.block(tasks):
            yield

    def detach(self) -> None:
        """Put back the very nn.Linear objects that `attach` replaced. Does nothing the second time.

        Raises:
            RuntimeError: one of the layers has been replaced since; then nothing is changed.
        """
        if not self._attached:
            return
        placed: dict[str, MultiTaskLoRALinear | HeadsLinear] = {**self.layers, **self.heads}
        for name, layer in placed.items():
            if self.model.get_submodule(name) is not layer:
                raise RuntimeError(
                    f"module {name} is no longer the layer that attach put there; put that back before you detach"
                )
        for name, layer in placed.items():
            _replace(self.model, name, layer.base_layer)
        if isinstance(self.model.__dict__.get("forward"), Forward):
            del self.model.forward
            if self._forward is not None:
                self.model.forward = self._forward
        self._attached = False

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


def attach(model: nn.Module, merged: MergedAdapters, *, dtype: torch.dtype | None = None) -> Attachment:
    """Put a `MultiTaskLoRALinear` around every linear layer that `merged` has adapters for.

    For any model that calls its nn.Linear and Conv1D modules, as transformers' do. Modules are found by the names in
    `merged.modules`, which are those of the model that the adapters were trained on; whether the weights are that model's
    can't be seen. Linear heads that tasks trained along (PEFT's modules_to_save) take the place of the model's own, each row
    through its task's: `HeadsLinear`.

    The model's own forward then also takes `adapter_names`, one name for each sample as PEFT's mixed batch does, or `task_ids`,
    what `Attachment.tasks` takes: a forward with one of them is a forward inside that block. Both pass through
    `model.generate`, which with several beams or sequences for each prompt repeats tensors alone: give it task_ids then.

    Args:
        model: changed in place, until the attachment is detached.
        merged: its tasks may be mixed freely in a batch.
        dtype: of basis and coefficients; by default, layer by layer, that of the weight. Under `torch.autocast` it must be
            autocast's, and for quantised weights the one the model computes in.

    Raises:
        ValueError: the model lacks a module of `merged` or has it in another shape; the model is attached already; a task has
            more than its factors do, such as DoRA (`TaskParts.beyond_factors`).
        TypeError: a module is neither an nn.Linear nor a Conv1D, or a dtype not fp32, fp16, bf16 or fp64.
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
    heads = {name: head for name, head in heads_in(model, merged, key).items() if name not in layers}
    placed: dict[str, nn.Module] = {**layers, **heads}
    for name, layer in placed.items():
        _replace(model, name, layer)
    return Attachment(model, merged, key, MappingProxyType(layers), MappingProxyType(heads))


def _submodule(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        inside = next((path for path, _ in model.named_modules() if path.endswith(f".{name}")), None)
        hint = "" if inside is None else f"; it has {inside}: attach to its submodule {inside.removesuffix(f'.{name}')}"
        raise ValueError(f"module {name}: not in {type(model).__name__}{hint}") from None


def _check_fit(base_layer: nn.Module, module: MergedModule, n_tasks: int) -> tuple[int, int]:
    """(out, in) of base_layer, if `module` is for it."""
    came = features(base_layer)
    if came is None:
        kind = type(base_layer)
        raise TypeError(
            f"base_layer is a {kind.__module__}.{kind.__qualname__}; it must be a torch.nn.Linear or a transformers Conv1D"
        )
    if came != module.shape:
        raise ValueError(f"base_layer has (out, in) = {came}; the adapters are for {module.shape}")
    weight: Any = base_layer.weight
    if weight.is_meta:
        raise ValueError("base_layer is on the meta device, not loaded or offloaded; load it to the device it computes on")
    if n_tasks <= max(module.tasks):
        raise ValueError(f"n_tasks is {n_tasks}, but the module is adapted for task {max(module.tasks)}; it must be more")
    return came


def _buffer_dtype(weight: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    asked = weight.dtype if dtype is None else dtype
    if asked not in _checks.FLOATS:
        what = "base_layer's weight, where no dtype is given," if dtype is None else "dtype"
        raise TypeError(f"{what} must be one of {_checks._names(_checks.FLOATS)}, got {_checks._names((asked,))}")
    return asked


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
