"""PT-SVD: LoRA adapters from full fine-tunes, by a truncated SVD of every layer's change after training."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import LoraFactors, save_adapter
from ..checkpoints import Checkpoint, CheckpointError, check_alike
from ..delta import finite
from ..storage import DTYPES, dtype_name

# Matrices that are looked up rather than multiplied: LoRA factors of a linear layer do not fit them.
_LOOKED_UP = re.compile(r"(^|[._])(embed\w*|\w*_embeddings?|embeddings|wte|wpe|shared|relative_attention_bias)([._]|$)")

_BATCH_BYTES = 1 << 28  # of deltas in fp32 decomposed together


@dataclass(frozen=True)
class ExtractedModule:
    """One linear layer."""

    factors: LoraFactors
    """lora_b = U√S [out, r], lora_a = √S Vᵀ [r, in], scaling 1; r ≥ 1"""
    squares: tuple[float, float]
    """(‖ΔW − lora_b lora_a‖², ‖ΔW‖²), of the factors as stored"""

    @property
    def rank(self) -> int:
        return self.factors.lora_a.shape[0]

    @property
    def bytes(self) -> int:
        return self.factors.lora_a.nbytes + self.factors.lora_b.nbytes

    @property
    def error(self) -> float:
        """Relative Frobenius error of ΔW."""
        return math.sqrt(self.squares[0] / self.squares[1])


@dataclass(frozen=True)
class Extracted:
    """What `extract` found."""

    modules: dict[str, ExtractedModule]
    """by path; layers that did not change, or got no rank of a budget, are not here"""
    config: dict[str, Any]
    """adapter_config.json"""
    lost: dict[str, float]
    """‖change‖ of every tensor that changed and is not in the adapter: biases, norms, embeddings, layers without a rank"""
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return sum(module.bytes for module in self.modules.values())

    @property
    def error(self) -> float:
        """Relative Frobenius error over all layers of `modules`."""
        wrong, total = (math.fsum(module.squares[i] for module in self.modules.values()) for i in (0, 1))
        return math.sqrt(wrong / total)

    def save(self, directory: str | Path) -> None:
        """Write a directory that `peft.PeftModel.from_pretrained` loads; all of it or nothing.

        Raises:
            OSError: the directory exists and is not empty, or can't be written.
        """
        save_adapter(directory, self.config, {name: module.factors for name, module in self.modules.items()})

    def report(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "dtype": dtype_name(self.dtype),
            "bytes": self.bytes,
            "error": finite(self.error),
            "by_module": {
                name: {
                    "shape": [module.factors.lora_b.shape[0], module.factors.lora_a.shape[1]],
                    "rank": module.rank,
                    "bytes": module.bytes,
                    "error": module.error,
                }
                for name, module in self.modules.items()
            },
            "lost": self.lost,
        }


def extract(
    base: str | Path,
    finetuned: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_bytes: int | None = None,
    include: str | None = None,
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
) -> Extracted:
    """Low-rank adapters of finetuned − base, the best possible of every layer's ΔW [out, in].

    Give exactly one of `rank`, `energy` and `max_bytes`. Besides the result, no more than 256 MB of deltas (one layer at least)
    are held at a time. Changes of other tensors than linear layers' weights can't be in a LoRA adapter: `Extracted.lost` tells
    their size; integer and boolean tensors must be equal.

    Args:
        base, finetuned: safetensors files, or directories with model.safetensors or its sharded form, with the same tensors.
        rank: of every layer.
        energy: each layer gets the least rank that captures this share of ‖ΔW‖², above 0 and at most 1.
        max_bytes: of all factors together. Ranks go to the singular values that lower the total error most for a byte; a layer
            may get none.
        include: a regular expression that a module's path must contain. Unless given, every matrix whose name ends in .weight
            and does not look like an embedding.
        dtype: of the factors: float32, float16 or bfloat16; the checkpoints' own unless given.
        base_model: what the config is to call the base model; `base` unless given.

    Raises:
        CheckpointError: a checkpoint can't be read, a shard is missing, a tensor holds NaN or Inf; names, shapes or dtypes
            differ, or integer tensors do; no layer changed, or one's change overflows float32.
        ValueError: an argument is out of range.
    """
    one, two = Checkpoint(base), Checkpoint(finetuned)
    check_alike([one, two])
    _check(rank, energy, max_bytes, dtype)
    modules = _modules(one, include)
    if rank is not None:
        for name in modules:
            if rank > min(one.shapes[f"{name}.weight"]):
                raise ValueError(
                    f"rank is {rank}; module {name!r} is {list(one.shapes[f'{name}.weight'])}, so that at most "
                    f"{min(one.shapes[f'{name}.weight'])} is allowed (min(out, in))"
                )
    stored = dtype or _own_dtype(one, modules)
    lost = _other_changes(one, two, modules)
    ranks = None if rank is not None else _ranks(one, two, modules, energy, max_bytes, stored.itemsize)
    found: dict[str, ExtractedModule] = {}
    for names, deltas in _batches(one, two, modules):
        chosen = [rank if rank is not None else ranks[name] if ranks is not None else 0 for name in names]
        for name, delta, module in zip(names, deltas, _decompose(deltas, chosen, stored), strict=True):
            if module is not None:
                found[name] = module
            elif bool(delta.any()):
                lost[f"{name}.weight"] = float(delta.norm())
    if not found:
        raise CheckpointError(f"{finetuned} and {base} do not differ in any linear layer that was asked for")
    config = lora_config({name: found[name].rank for name in sorted(found)}, base_model or str(base))
    return Extracted({name: found[name] for name in sorted(found)}, config, lost, stored)


def _check(rank: int | None, energy: float | None, max_bytes: int | None, dtype: torch.dtype | None) -> None:
    if sum(value is not None for value in (rank, energy, max_bytes)) != 1:
        raise ValueError(f"give exactly one of rank, energy and max_bytes, got {rank!r}, {energy!r}, {max_bytes!r}")
    for name, count in (("rank", rank), ("max_bytes", max_bytes)):
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ValueError(f"{name} is {count!r}; it must be an integer of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy is {energy!r}; it must be above 0 and at most 1")
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype}; allowed are {', '.join(DTYPES)}")


def _modules(checkpoint: Checkpoint, include: str | None) -> list[str]:
    try:
        wanted = re.compile(include) if include is not None else None
    except re.error as error:
        raise ValueError(f"include is {include!r}, not a regular expression: {error}") from error
    found = []
    for key, shape in checkpoint.shapes.items():
        name = key.removesuffix(".weight")
        if name == key or len(shape) != 2 or 0 in shape or not checkpoint.dtypes[key].is_floating_point:
            continue
        if wanted.search(name) if wanted else not _LOOKED_UP.search(name):
            found.append(name)
    if not found:
        raise CheckpointError(f"checkpoint {checkpoint.path} has no linear layer that was asked for")
    return sorted(found)


def _own_dtype(checkpoint: Checkpoint, modules: list[str]) -> torch.dtype:
    own = checkpoint.dtypes[f"{modules[0]}.weight"]
    return own if own in DTYPES.values() else torch.float32


def _other_changes(one: Checkpoint, two: Checkpoint, modules: list[str]) -> dict[str, float]:
    """‖change‖ of the tensors that changed and are not the weights of `modules`."""
    weights = {f"{name}.weight" for name in modules}
    lost = {}
    for name in sorted(set(one) - weights):
        before, after = one.finite(name), two.finite(name)
        if torch.equal(before, after):
            continue
        if not before.dtype.is_floating_point:
            raise CheckpointError(f"{name} ({dtype_name(before.dtype)}) differs between {one.path} and {two.path}")
        lost[name] = float((after.double() - before.double()).norm())
    return lost


def _batches(one: Checkpoint, two: Checkpoint, modules: list[str]) -> Iterator[tuple[list[str], Tensor]]:
    """(names, their ΔW [B, out, in] in fp32) of layers of equal shape."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name in modules:
        by_shape.setdefault(one.shapes[f"{name}.weight"], []).append(name)
    for shape, names in by_shape.items():
        step = max(1, _BATCH_BYTES // (4 * math.prod(shape)))
        for begin in range(0, len(names), step):
            chunk = names[begin : begin + step]
            yield chunk, torch.stack([_delta(one, two, f"{name}.weight") for name in chunk])


def _delta(one: Checkpoint, two: Checkpoint, name: str) -> Tensor:
    wide = torch.promote_types(one.dtypes[name], torch.float32)
    delta = (two.finite(name).to(wide) - one.finite(name).to(wide)).float()
    if not bool(delta.isfinite().all()):
        raise CheckpointError(f"{name}: the difference between {one.path} and {two.path} overflows float32")
    return delta


def _decompose(deltas: Tensor, ranks: list[int], dtype: torch.dtype) -> Iterator[ExtractedModule | None]:
    """Of each ΔW [out, in]; None where its rank is 0 or ΔW is."""
    most = max(ranks)
    u, s, vh = low_rank(deltas, most)
    for delta, rank, u_i, s_i, vh_i in zip(deltas, ranks, u, s, vh, strict=True):
        if rank == 0 or not bool(delta.any()):
            yield None
            continue
        root = s_i[:rank].sqrt()
        b, a = (u_i[:, :rank] * root).to(dtype), (root[:, None] * vh_i[:rank]).to(dtype)
        if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
            raise ValueError(f"the factors overflow {dtype_name(dtype)}; choose another dtype")
        wrong = float((delta - b.float() @ a.float()).double().square().sum())
        yield ExtractedModule(LoraFactors(a.clone(), b.clone(), 1.0), (wrong, float(delta.double().square().sum())))


def low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [B, m, rank], S, Vh of matrices x [B, m, k] in fp32, ‖x − U S Vh‖ within 1e-6 ‖x‖ of the least possible.

    Single vectors where σ falls slowly may be less exact than `truncated_svd` makes them, which takes longer.
    """
    u, s, vh = torch.ops.rmm_kernels.large_svd(x, rank, False)
    return u, s, vh


def _ranks(
    one: Checkpoint, two: Checkpoint, modules: list[str], energy: float | None, max_bytes: int | None, itemsize: int
) -> dict[str, int]:
    """The rank of every module."""
    spectra: dict[str, Tensor] = {}  # squared singular values, falling
    costs: dict[str, int] = {}  # bytes of one rank
    for names, deltas in _batches(one, two, modules):
        for name, delta in zip(names, deltas, strict=True):
            wide = delta.double()
            gram = wide @ wide.mT if wide.shape[0] <= wide.shape[1] else wide.mT @ wide
            spectra[name] = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
            costs[name] = itemsize * sum(delta.shape)
    if energy is not None:
        return {name: _rank_of_energy(values, energy) for name, values in spectra.items()}
    gains = sorted(
        ((float(value) / costs[name], name) for name, values in spectra.items() for value in values if value > 0), reverse=True
    )
    ranks, left = dict.fromkeys(modules, 0), max_bytes or 0
    closed: set[str] = set()  # what a layer's next rank does not get, its later ones, worth less, must not
    for _, name in gains:
        if name not in closed and costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
        else:
            closed.add(name)
    if not any(ranks.values()) and gains:
        raise ValueError(f"max_bytes is {max_bytes}; the smallest adapter, one layer of rank 1, takes {min(costs.values())}")
    return ranks


def _rank_of_energy(values: Tensor, energy: float) -> int:
    total = float(values.sum())
    if total == 0:
        return 0
    reached = values.cumsum(0) >= energy * total * (1 - 1e-12)
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else len(values)


def lora_config(ranks: Mapping[str, int], base_model: str | None) -> dict[str, Any]:
    """adapter_config.json of modules with these ranks. scaling is 1: lora_alpha is the rank, for each module.

    Patterns match ends of paths, so that longer paths go first.
    """
    most = max(ranks.values())
    other = {re.escape(name): ranks[name] for name in sorted(ranks, key=len, reverse=True) if ranks[name] != most}
    exact = {**other, **{re.escape(name): most for name in ranks if ranks[name] == most}} if other else {}
    pattern = {name: exact[name] for name in sorted(exact, key=len, reverse=True)}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
    }
