"""Classification heads of many tasks, each row of a batch through its own: beside a model, or in its place there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .adapters import PREFIX
from .merge import MergedAdapters
from .selection import check_ids, ids_of


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


class HeadsLinear(nn.Module):
    """A model's linear head and, for each task that trained one of its own (PEFT's modules_to_save), that task's instead.

    Rows of the base model alone, and of a task without a head of its own, take base_layer's. Heads may differ in their number
    of classes: logits are as wide as the widest, −inf where a row's head has no such class, so that argmax and softmax are
    the head's own. Every row goes through all heads in one product, of which it keeps its own: no look at the ids on the host,
    and for heads of a few classes cheaper than sorting rows.

    Buffers, not in `state_dict` as those of `MultiTaskLoRALinear`: weight [n · classes, d], bias [n · classes].
    """

    weight_of_tasks: Tensor
    bias_of_tasks: Tensor
    has_head: Tensor

    def __init__(self, base_layer: nn.Linear, heads: Sequence[Mapping[str, Tensor] | None], attachment: str) -> None:
        """`heads`, one for each task or None: "weight" [its classes, d] and perhaps "bias" [its classes].

        Raises:
            ValueError: a head is of another width than base_layer.
        """
        super().__init__()
        self.base_layer = base_layer
        self.attachment = attachment
        d = base_layer.in_features
        found = [head["weight"].shape for head in heads if head is not None]
        if odd := [list(shape) for shape in found if len(shape) != 2 or shape[1] != d]:
            raise ValueError(f"a head is {odd[0]}; base_layer takes {d} features")
        self.out_features = max([base_layer.out_features, *(shape[0] for shape in found)])
        like = base_layer.weight.detach()
        weight = like.new_zeros(len(heads), self.out_features, d)
        bias = like.new_full((len(heads), self.out_features), -torch.inf)
        for task, head in enumerate(heads):
            if head is not None:
                classes = len(head["weight"])
                weight[task, :classes] = head["weight"].to(like)
                bias[task, :classes] = head["bias"].to(like) if "bias" in head else 0.0
        self.register_buffer("weight_of_tasks", weight.flatten(0, 1), persistent=False)
        self.register_buffer("bias_of_tasks", bias.flatten(), persistent=False)
        has_head = torch.tensor([head is not None for head in heads], device=like.device)
        self.register_buffer("has_head", has_head, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., classes] of x [..., d]."""
        ids = ids_of(self.attachment, x.shape[:-1], x.device)  # [T]
        n = len(self.has_head)
        task = ids.clamp(0, n - 1).long()
        own = (ids >= 0) & (ids < n) & self.has_head[task]
        y = self.base_layer(x).flatten(0, -2)  # [T, base_layer's classes]
        y = nn.functional.pad(y, (0, self.out_features - y.shape[1]), value=-torch.inf)
        every = nn.functional.linear(x.flatten(0, -2), self.weight_of_tasks, self.bias_of_tasks)
        every = every.unflatten(-1, (n, self.out_features))  # [T, n, classes]
        chosen = every.gather(1, task[:, None, None].expand(-1, 1, self.out_features))[:, 0]
        return torch.where(own[:, None], chosen.to(y.dtype), y).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"heads={int(self.has_head.sum())} of {len(self.has_head)} tasks, classes={self.out_features}"


def heads_in(model: nn.Module, merged: MergedAdapters, attachment: str) -> dict[str, HeadsLinear]:
    """A `HeadsLinear` for every nn.Linear of `model` that tasks of `merged` brought their own of, by module name.

    Raises:
        ValueError: a head is of another width than the model's.
    """
    names = {key for parts in merged.parts.values() for key in parts.extras if key.endswith(".weight")}
    layers = {}
    for key in sorted(names):
        name = key.removeprefix(PREFIX).removesuffix(".weight")
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            continue  # the model is without: it may be the encoder of a classifier
        if type(layer) is nn.Linear:
            bias = key.removesuffix("weight") + "bias"
            found = [
                {part: extras[whole] for part, whole in (("weight", key), ("bias", bias)) if whole in extras} or None
                for extras in (merged.parts[task].extras for task in merged.tasks)
            ]
            try:
                layers[name] = HeadsLinear(layer, found, attachment)
            except ValueError as error:
                raise ValueError(f"module {name}: {error}") from None
    return layers


def _tensors(merged: MergedAdapters, task: str, file: str) -> dict[str, Tensor]:
    """ "weight" and perhaps "bias" of a task's head."""
    from safetensors.torch import load_file

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
