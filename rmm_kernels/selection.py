"""Which tasks a forward runs: set around it by a block, per thread and asyncio task, and looked up by every attached layer."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .ops import _checks

if TYPE_CHECKING:
    from .modules import MultiTaskLoRALinear

BASE = "__base__"
"""The task name, as in PEFT, that stands for the base model alone."""

Task = str | int | None
"""One task: its name, its index in `MergedAdapters.tasks`, or None, −1 or "__base__" for the base model alone."""

Rows = tuple[tuple[int, Tensor], ...]
"""For each rank that a module's tasks have: the rank, and for every row of x the row of the module's coefficients [T], −1 where
its task is not of that rank."""


class Selection:
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
                rows = layer.rows_of(per_row(self.ids.to(device), shape))
            if device.type == "cpu":  # elsewhere looking would be a sync
                rows = tuple((rank, row_ids) for rank, row_ids in rows if bool((row_ids >= 0).any()))
            if len(self._kept) >= self._LIMIT:
                self._kept.clear()
            self._kept[key] = rows
        return rows


# By attachment, because blocks of different models nest. A context variable, so that threads and asyncio tasks each have
# their own. Under a key and not under the attachment itself, so that layers can be copied and pickled.
_selections: ContextVar[Mapping[str, Selection]] = ContextVar("rmm_kernels.tasks", default=MappingProxyType({}))


def selection_of(attachment: str) -> Selection:
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
    return per_row(selection_of(attachment).ids.to(device), torch.Size(shape)).clone()


@_current_task_ids.register_fake
def _(attachment: str, shape: list[int], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=device).flatten()


def ids_of(attachment: str, shape: torch.Size, device: torch.device) -> Tensor:
    """The ids that `Attachment.tasks` set, one per row of x [*shape, in], in a compiled graph looked up when it runs."""
    if torch.compiler.is_compiling():
        return torch.ops.rmm_kernels.current_task_ids(attachment, shape, device)
    return per_row(selection_of(attachment).ids.to(device), shape)


def per_row(ids: Tensor, shape: torch.Size) -> Tensor:
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


class Names:
    """An attachment's key and its tasks' names, without the model: copies of the model share it."""

    def __init__(self, key: str, indices: Mapping[str, int]) -> None:
        self.key = key
        self.indices = indices
        self.n_tasks = len(indices) - 1

    @contextmanager
    def block(self, tasks: Task | Iterable[Task] | Tensor) -> Iterator[None]:
        """See `Attachment.tasks`."""
        with torch.inference_mode(False):  # a forward with gradients may save them, though the block be entered without
            selection = Selection(self._ids(tasks))
        token = _selections.set({**_selections.get(), self.key: selection})
        try:
            yield
        finally:
            _selections.reset(token)

    def _ids(self, tasks: Task | Iterable[Task] | Tensor) -> Tensor:
        """`tasks` as indices, int64: [] for one task, [batch] for a sequence, a tensor in its own shape."""
        if isinstance(tasks, Tensor):
            check_ids(tasks, "tasks")
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
            if task not in self.indices:
                raise ValueError(f"unknown task {task!r}; allowed are {', '.join(self.indices)}")
            return self.indices[task]
        if isinstance(task, bool) or not hasattr(task, "__index__"):
            raise TypeError(f"a task must be a name, an index or None (base model alone), got {type(task).__name__}")
        index = operator.index(task)
        if not -1 <= index < self.n_tasks:
            raise ValueError(f"task {index} is out of range; allowed are -1 (base model alone) to {self.n_tasks - 1}")
        return index


class Forward:
    """The forward of an attached model: its own, which also takes `adapter_names` or `task_ids`."""

    def __init__(self, model: nn.Module, names: Names) -> None:
        self.model = model
        self.names = names
        self.own = model.__dict__.get("forward")

    @property
    def _run(self) -> Any:
        return type(self.model).forward.__get__(self.model) if self.own is None else self.own

    def __call__(self, *args: Any, adapter_names: Any = None, task_ids: Any = None, **kwargs: Any) -> Any:
        own = self._run
        if adapter_names is None and task_ids is None:
            return own(*args, **kwargs)
        if adapter_names is not None and task_ids is not None:
            raise ValueError("adapter_names and task_ids are both given; give one")
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "adapter_names or task_ids inside a compiled function would be constants of it; enter attachment.tasks(...) "
                "around the call of the compiled model instead"
            )
        with self.names.block(task_ids if adapter_names is None else adapter_names):
            return own(*args, **kwargs)

    @property
    def __code__(self) -> Any:
        """torch.export names the file of a model's forward."""
        return self._run.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's own and the two arguments: generate() looks at it for what it may pass on."""
        own = inspect.signature(self._run)
        found = dict(own.parameters)
        keyword = inspect.Parameter.KEYWORD_ONLY
        for name in ("adapter_names", "task_ids"):
            found[name] = inspect.Parameter(name, keyword, default=None)
        return own.replace(parameters=sorted(found.values(), key=lambda parameter: parameter.kind))


def check_ids(ids: Tensor, name: str) -> None:
    if ids.dtype not in _checks.IDS:
        raise TypeError(f"{name} must be one of {_checks._names(_checks.IDS)}, got {_checks._names((ids.dtype,))}")
