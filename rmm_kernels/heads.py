"""Classification heads of many tasks, each row of a batch through its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .merge import MergedAdapters
from .selection import check_ids


class TaskHeads(nn.Module):
    """A linear head for each task, of as many classes as that task has."""

    def __init__(self, heads: Mapping[str, nn.Linear]) -> None:
        """`heads` by task, in the order of their indices."""
        super().__init__()
        self.tasks = tuple(heads)
        self.heads = nn.ModuleList(heads.values())

    @classmethod
    def from_merged(cls, merged: MergedAdapters, file: str = "head.safetensors") -> TaskHeads:
        """The heads that the adapters of `merged` brought along: of PEFT's modules_to_save, or in a file beside them.

        Args:
            merged: every task has either one linear layer ("<path>.weight", perhaps "<path>.bias") among its extras, or `file`.
            file: holds "weight" [classes, d] and perhaps "bias" [classes].

        Raises:
            ValueError: a task has no head, or several linear layers among its extras.
        """
        return cls({task: _linear(_tensors(merged, task, file)) for task in merged.tasks})

    def forward(self, x: Tensor, tasks: Iterable[str | int] | Tensor) -> list[Tensor]:
        """Logits of every row by its task's head.

        Args:
            x: [B, d].
            tasks: a name or an index for each row.

        Returns:
            B tensors [classes of that row's task].

        Raises:
            ValueError: an unknown name or index, or not one for each row.
        """
        ids = self._ids(tasks)
        if len(ids) != len(x):
            raise ValueError(f"tasks holds {len(ids)} tasks for {len(x)} rows; give one for each")
        logits: list[Tensor] = [x] * len(x)
        for task in sorted(set(ids)):
            rows = [row for row, of in enumerate(ids) if of == task]
            for row, value in zip(rows, self.heads[task](x[rows]), strict=True):
                logits[row] = value
        return logits

    def _ids(self, tasks: Iterable[str | int] | Tensor) -> list[int]:
        if isinstance(tasks, Tensor):
            check_ids(tasks, "tasks")
            tasks = tasks.tolist()
        ids = []
        for task in tasks:
            if isinstance(task, str) and task not in self.tasks:
                raise ValueError(f"unknown task {task!r}; allowed are {', '.join(self.tasks)}")
            index = self.tasks.index(task) if isinstance(task, str) else int(task)
            if not 0 <= index < len(self.tasks):
                raise ValueError(f"task {index} is out of range; allowed are 0 to {len(self.tasks) - 1}")
            ids.append(index)
        return ids


def _tensors(merged: MergedAdapters, task: str, file: str) -> dict[str, Tensor]:
    """ "weight" and perhaps "bias" of a task's head."""
    parts = merged.parts[task]
    weights = [key for key in parts.extras if key.endswith(".weight") and parts.extras[key].ndim == 2]
    if len(weights) > 1:
        raise ValueError(f"task {task!r} brought several linear layers ({', '.join(weights)}); give TaskHeads the heads")
    if weights:
        bias = weights[0].removesuffix("weight") + "bias"
        found = {"weight": parts.extras[weights[0]]}
        return {**found, "bias": parts.extras[bias]} if bias in parts.extras else found
    if file not in parts.files:
        raise ValueError(f"task {task!r} brought no head: no linear layer in modules_to_save, and no {file}")
    return load_file(parts.files[file])


def _linear(tensors: Mapping[str, Tensor]) -> nn.Linear:
    classes, width = tensors["weight"].shape
    head = nn.utils.skip_init(nn.Linear, width, classes, bias="bias" in tensors, dtype=tensors["weight"].dtype)
    head.load_state_dict({key: torch.as_tensor(tensors[key]) for key in ("weight", "bias") if key in tensors})
    return head.requires_grad_(False)
