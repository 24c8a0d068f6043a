"""OSRM (arXiv 2505.22934): LoRA initialised where the other tasks' inputs have least energy, so that merged tasks disturb
each other least.

Ten lines, for a transformers model and one iterable of batches for each task:

    model = transformers.AutoModel.from_pretrained(name)
    found = osrm(model, {"news": news_batches, "law": law_batches}, ["query", "value"], rank=8)
    for task in found.tasks:
        found.save(task, f"osrm/{task}")
        tuned = peft.PeftModel.from_pretrained(model, f"osrm/{task}", is_trainable=True)
        train(tuned, task)
        tuned.save_pretrained(f"tuned/{task}")
        model = tuned.unload()
    merged = rmm_kernels.merge([f"tuned/{task}" for task in found.tasks], components=1)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import reference
from ..adapters import LoraFactors, save_adapter
from ..ops.gram import gram

Variant = Literal["covariance", "mean"]


@dataclass
class Covariance:
    """Sums over the vectors h that a layer was given: memory does not depend on their number."""

    second: Tensor
    """Σ h hᵀ [in, in], fp64"""
    first: Tensor
    """Σ h [in], fp64"""
    count: int = 0

    def add(self, h: Tensor) -> None:
        """h [T, in], any float dtype. fp64 throughout: the least eigenvalues are what matters, and they may be tiny."""
        self.second += gram(h[None].double())[0]
        self.first += h.sum(0, dtype=torch.float64)
        self.count += len(h)


@contextmanager
def covariances(modules: Mapping[str, nn.Linear]) -> Iterator[tuple[dict[str, Covariance], dict[str, Tensor | None]]]:
    """Record the inputs of linear layers, given by name, while their model runs.

    Yields ({module: Covariance}, {"mask": None}); set "mask" to a boolean [B, L] to leave padded positions out.
    """
    found: dict[str, Covariance] = {}
    state: dict[str, Tensor | None] = {"mask": None}
    handles = []
    for name, layer in modules.items():
        wide = layer.in_features
        zeros = torch.zeros(wide + 1, wide, dtype=torch.float64, device=layer.weight.device)
        found[name] = Covariance(zeros[:wide], zeros[wide])

        def hook(layer: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], name: str = name) -> None:
            h, mask = (args[0] if args else named["input"]).detach(), state["mask"]
            found[name].add(h[mask] if mask is not None and mask.shape == h.shape[:-1] else h.reshape(-1, h.shape[-1]))

        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield found, state
    finally:
        for handle in handles:
            handle.remove()


def least_energy(second: Tensor, rank: int) -> Tensor:
    """The `rank` orthonormal directions h is smallest in, [rank, in] fp64, least first.

    Eigenvectors of `second` [in, in], symmetric, to its smallest eigenvalues; of each the entry of largest magnitude is
    positive, the lowest index on ties.
    """
    _, vectors = torch.linalg.eigh(second.double())
    vectors = vectors[:, :rank]
    return (vectors * reference.positive_peak(vectors[None])[0]).mT.contiguous()


@dataclass(frozen=True)
class Osrm:
    """An initial lora_a for every task and module."""

    lora_a: dict[str, dict[str, Tensor]]
    """by task, then module: [r, in] fp32, orthonormal rows"""
    energy: dict[str, dict[str, tuple[float, float]]]
    """by task, then module: the share of the other tasks' input energy E‖h‖² within the chosen subspace, and within a random
    one of the same rank (seeded)"""
    out_features: dict[str, int]
    """of every module"""
    config: dict[str, Any]
    """adapter_config.json"""

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.lora_a)

    def save(self, task: str, directory: str | Path) -> None:
        """Write a PEFT adapter to train from, its lora_b zero; all of it or nothing.

        Raises:
            KeyError: there is no such task.
            OSError: the directory exists and is not empty, or can't be written.
        """
        if task not in self.lora_a:
            raise KeyError(f"there is no task {task!r}; the tasks are {', '.join(self.tasks)}")
        scaling = self.config["lora_alpha"] / self.config["r"]
        factors = {
            name: LoraFactors(a, torch.zeros(self.out_features[name], len(a)), scaling) for name, a in self.lora_a[task].items()
        }
        save_adapter(directory, self.config, factors)

    def report(self) -> dict[str, Any]:
        """Mean energy shares of every task over modules, as plain values for JSON."""
        return {
            task: {
                "chosen": sum(chosen for chosen, _ in energies.values()) / len(energies),
                "random": sum(random for _, random in energies.values()) / len(energies),
            }
            for task, energies in self.energy.items()
        }


def osrm(
    model: nn.Module,
    batches: Mapping[str, Iterable[Mapping[str, Tensor]]],
    target_modules: Sequence[str],
    rank: int = 8,
    alpha: float = 16,
    *,
    variant: Variant = "covariance",
    base_model: str | None = None,
) -> Osrm:
    """Where each task's LoRA is to start, from samples of all tasks.

    Every task's samples run through `model` once; of each layer's inputs only sums are kept, in fp64, on the layer's device.

    Args:
        model: called as `model(**batch)`, in the mode it is in: put it into eval mode first.
        batches: by task, at least two; each batch the model's arguments, with samples along the first dimension of its tensors.
            Where it has `attention_mask` [B, L], positions with 0 do not count, nor do samples that have no other. Every task
            needs `rank` samples at least: fewer say too little of where its inputs lie.
        target_modules: as in PEFT: a linear layer is adapted if its path is one of them or ends in a dot and one of them. Each
            must match one at least.
        rank: of the adapters, at most each layer's in_features. The authors' code uses rank 8, alpha 16, query and value, and
            100 samples a task.
        alpha: lora_alpha, finite and above 0; the scaling is alpha / rank.
        variant: "covariance" as in the paper, or "mean" as in the authors' code: the energy of the other tasks' mean vectors
            alone, whose null space leaves the choice open; the eigenvectors decide it.
        base_model: what the config is to call the base model; model.name_or_path unless given.

    Raises:
        ValueError: fewer than two tasks; a target matches no linear layer; `rank`, `alpha` or `variant` is out of range; a
            batch is no mapping; a task has no sample or fewer than `rank` of them, or a layer was given fewer vectors than
            that, or NaN or Inf.
    """
    modules = _linear_layers(model, target_modules)
    _check(modules, batches, rank, alpha, variant)
    collected = {task: _collect(model, task, given, modules, rank) for task, given in batches.items()}
    lora_a: dict[str, dict[str, Tensor]] = {}
    energy: dict[str, dict[str, tuple[float, float]]] = {}
    for task in collected:
        others = [found for other, found in collected.items() if other != task]
        lora_a[task], energy[task] = {}, {}
        for index, name in enumerate(modules):
            count = sum(found[name].count for found in others)
            covariance = torch.stack([found[name].second for found in others]).sum(0) / count
            if variant == "covariance":
                a = least_energy(covariance, rank)
            else:
                means = torch.stack([found[name].first / found[name].count for found in others])
                a = least_energy(means.mT @ means, rank)
            generator = torch.Generator().manual_seed(index)
            random = torch.linalg.qr(torch.randn(a.shape[1], rank, generator=generator, dtype=torch.float64)).Q.mT
            energy[task][name] = (_share(covariance, a), _share(covariance, random.to(a.device)))
            lora_a[task][name] = a.float().cpu()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model or getattr(model, "name_or_path", None),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": False,
        "task_type": None,
    }
    return Osrm(lora_a, energy, {name: int(layer.out_features) for name, layer in modules.items()}, config)


def _linear_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    if isinstance(targets, str) or not targets:
        raise ValueError(f"target_modules is {targets!r}; it must be a sequence of names, one at least")
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    wanted: set[str] = set()
    for target in targets:
        matching = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matching:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(
                f"target_modules is {list(targets)}; no linear layer of the model matches {target!r}; "
                f"{f'their paths end in {ends}' if ends else 'it has none'}"
            )
        wanted.update(matching)
    return {name: layer for name, layer in linear.items() if name in wanted}


def _check(modules: Mapping[str, nn.Linear], batches: Mapping[str, object], rank: int, alpha: float, variant: Variant) -> None:
    if not isinstance(batches, Mapping):
        raise ValueError(f"batches is a {type(batches).__name__}; it must be a mapping of every task to its batches")
    if len(batches) < 2:
        raise ValueError(f"batches holds {len(batches)} tasks; at least 2 are needed, since a task starts from the others")
    if variant not in ("covariance", "mean"):
        raise ValueError(f"variant is {variant!r}; allowed are 'covariance' and 'mean'")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank is {rank!r}; it must be an integer of at least 1")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha!r}; it must be a finite number above 0")
    for name, layer in modules.items():
        if rank > layer.in_features:
            raise ValueError(f"rank is {rank}; module {name!r} has {layer.in_features} inputs, so that no more is allowed")


def _collect(
    model: nn.Module, task: str, batches: Iterable[Mapping[str, Tensor]], modules: Mapping[str, nn.Linear], rank: int
) -> dict[str, Covariance]:
    samples = 0
    with covariances(modules) as (found, state), torch.no_grad():
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise ValueError(f"task {task!r}: a batch is a {type(batch).__name__}; it must map the model's arguments")
            mask = batch.get("attention_mask")
            state["mask"] = None if mask is None else mask.bool()
            samples += _samples(batch, state["mask"])
            model(**batch)
    if samples < rank:
        raise ValueError(f"task {task!r} has {samples or 'no'} samples; at least {rank} are needed, as many as rank")
    for name, covariance in found.items():
        if covariance.count < rank:
            raise ValueError(
                f"task {task!r}: module {name!r} was given {covariance.count or 'no'} vectors by {samples} samples; at least "
                f"{rank} are needed, as many as rank"
            )
        if not bool(covariance.second.isfinite().all()):
            raise ValueError(f"task {task!r}: the input of module {name!r} holds NaN or Inf, or overflows")
    return found


def _samples(batch: Mapping[str, Tensor], mask: Tensor | None) -> int:
    """Those with a position that counts."""
    if mask is not None:
        return int(mask.flatten(1).any(1).sum())
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 0)


def _share(covariance: Tensor, directions: Tensor) -> float:
    total = covariance.trace()
    return float(((directions @ covariance) * directions).sum() / total) if total > 0 else 0.0
