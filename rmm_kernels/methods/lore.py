"""LoRE-Merging (arXiv 2502.10749): one model from several, each taken as a shared part plus a low-rank part of its own.

    min over θ0, δ_i of  Σ_i ‖θ0 + δ_i − θ_i‖² + penalty(δ_i),    θ* = θ0 + λ · merge(δ_i)

by turns: θ0 ← mean(θ_i − δ_i), δ_i ← singular values of θ_i − θ0 shrunk. Each turn solves its part exactly, so that the
objective never rises. `fixed` is the published algorithm: every σ less μ, the prox of 2μ‖δ‖_*. `squared` is the prox of
μ‖δ‖_*², which the paper states: σ less τ = μ Σσ̂.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .._files import check_target, new_directory
from ..adapters import Adapter, LoraFactors, load_adapters, save_adapter
from ..checkpoints import Checkpoint, CheckpointError, check_alike, write_checkpoint
from ..ops.gram import gram
from ..ops.truncated_svd import has_kernel_for, truncated_svd
from ..storage import dtype_name
from .pt_svd import lora_config, low_rank

Prox = Literal["squared", "fixed"]
Finish = Literal["average", "ties"]

_MORE = 8  # triplets than survived the last turn are asked for
_NEGLIGIBLE = 1e-6  # singular values of a merged adapter below this fraction of the largest are dropped


@dataclass(frozen=True)
class Settings:
    """How LoRE is run."""

    mu: float = 0.01
    prox: Prox = "fixed"
    iterations: int = 20
    scale: float = 1.0
    """λ"""
    finish: Finish = "average"
    density: float = 0.2
    """share of the entries of largest magnitude that TIES keeps of each δ_i"""
    tolerance: float = 1e-6
    """stop where the objective falls by less than this fraction of itself; 0 runs all iterations"""

    def __post_init__(self) -> None:
        if not self.mu >= 0 or not math.isfinite(self.mu):
            raise ValueError(f"mu is {self.mu}; it must be finite and at least 0")
        if self.prox not in ("squared", "fixed"):
            raise ValueError(f"prox is {self.prox!r}; allowed are 'squared' and 'fixed'")
        if self.finish not in ("average", "ties"):
            raise ValueError(f"finish is {self.finish!r}; allowed are 'average' and 'ties'")
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations!r}; it must be an integer of at least 1")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale}; it must be finite")
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}; it must be above 0 and at most 1")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance is {self.tolerance}; it must be at least 0")


def decompose(theta: Tensor, settings: Settings) -> tuple[Tensor, Tensor, list[float]]:
    """θ0 [m, k], δ [n, m, k] and the objective after every iteration, of matrices theta [n, m, k]; in fp64."""
    theta = theta.double()
    delta = torch.zeros_like(theta)
    shared = theta.mean(0)
    objective: list[float] = []
    short = rank = min(theta.shape[1:])
    for _ in range(settings.iterations):
        shared = (theta - delta).mean(0)
        delta, penalty, survived = _shrink(theta - shared, settings, rank)
        rank = min(short, survived + _MORE)
        objective.append(float((shared + delta - theta).square().sum()) + penalty)
        if settings.tolerance and len(objective) > 1 and objective[-2] - objective[-1] <= settings.tolerance * objective[-2]:
            break
    return shared, delta, objective


def _shrink(x: Tensor, settings: Settings, rank: int) -> tuple[Tensor, float, int]:
    """The prox of matrices x [n, m, k] in fp64, its penalty, and how many σ survive it at most.

    D(x) = U diag(σ − τ)₊ Vᵀ by `truncated_svd`, of `rank` triplets unless more survive. Where that op has no kernel for the
    size, by Q diag(1 − τ/σ)₊ Qᵀ x through the Gram matrix of the short side, which takes less time than LAPACK's SVD. The
    squares cost half the digits of σ below 1e-8 σ₁; fp64 has them to spare where τ is as small as the published 0.01.
    """
    short = min(x.shape[1:])
    if has_kernel_for(x):
        u, sigma, vh = truncated_svd(x, rank)
        kept, penalty = _survivors(sigma, settings)
        most = int((kept > 0).sum(1).max())
        if most == rank < short:
            return _shrink(x, settings, short)
        return (u * kept[:, None]) @ vh, penalty, most
    tall = x.shape[1] > x.shape[2]
    values, q = torch.linalg.eigh(gram(x if tall else x.mT))
    sigma = values.clamp(min=0).sqrt()  # [n, short], rising
    kept, penalty = _survivors(sigma, settings)
    factor = torch.where(kept > 0, kept / sigma.clamp(min=torch.finfo(sigma.dtype).tiny), 0.0)
    damp = (q * factor[:, None]) @ q.mT
    return x @ damp if tall else damp @ x, penalty, short


def _survivors(sigma: Tensor, settings: Settings) -> tuple[Tensor, float]:
    """(σ − τ)₊ [n, k] and the penalty on what is left."""
    kept = (sigma - threshold(sigma, settings)[:, None]).clamp(min=0)
    nuclear = kept.sum(1)
    penalty = settings.mu * nuclear.square() if settings.prox == "squared" else 2 * settings.mu * nuclear
    return kept, float(penalty.sum())


def threshold(sigma: Tensor, settings: Settings) -> Tensor:
    """τ [n] of singular values sigma [n, k], in any order.

    With `squared`, the j largest survive for the largest j at which σ_j > τ_j = μ (σ_1 + … + σ_j) / (1 + j μ).
    """
    if settings.prox == "fixed":
        return torch.full_like(sigma[:, 0], settings.mu)
    falling = sigma.sort(1, descending=True).values
    count = torch.arange(1, sigma.shape[1] + 1, dtype=sigma.dtype, device=sigma.device)
    candidates = settings.mu * falling.cumsum(1) / (1 + settings.mu * count)
    alive = (falling > candidates).sum(1, keepdim=True).clamp(min=1)  # σ_j > τ_j holds up to some j and for none beyond
    return candidates.gather(1, alive - 1)[:, 0]


def ties(delta: Tensor, density: float) -> Tensor:
    """TIES (arXiv 2306.01708) of delta [n, …]: keep the largest entries, elect signs by sum, average those that agree."""
    flat = delta.flatten(1)
    count = max(1, round(density * flat.shape[1]))
    kept = torch.zeros_like(flat).scatter(1, flat.abs().topk(count, 1).indices, 1.0) * flat
    agree = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
    return ((kept * agree).sum(0) / agree.sum(0).clamp(min=1)).view(delta.shape[1:])


@dataclass(frozen=True)
class Merged:
    """What `lore` of adapters found: one adapter."""

    factors: dict[str, LoraFactors]
    config: dict[str, Any]
    objective: list[float]
    """after every iteration, over all modules; those that stopped early count with their last value"""

    def save(self, directory: str | Path) -> None:
        """Write a directory that `peft.PeftModel.from_pretrained` loads; all of it or nothing."""
        save_adapter(directory, self.config, self.factors)


def lore_adapters(
    adapters: Sequence[str | Path | Adapter],
    settings: Settings | None = None,
    *,
    names: Sequence[str] | None = None,
    rank: int | None = None,
) -> Merged:
    """Merge LoRA adapters into one. The base weights cancel out.

    All iterates lie in the spans of the stacked factors, so that everything runs on cores of at most nr × nr, from thin QRs;
    dense ΔW is formed by the TIES finish alone, which works on entries, a module at a time. Heads (`modules_to_save`) belong to
    the tasks and are left out. A module that some adapters lack counts as zero there.

    Args:
        adapters: at least two PEFT directories, or adapters already opened, for one base model.
        rank: the most the merged adapter may have; as many as it needs unless given, up to the sum of the ranks.

    Raises:
        AdapterError: an adapter can't be read.
        ValueError: fewer than two adapters; they hold NaN or Inf; base models, or a module's shapes or dtypes differ; an
            adapter does more than its factors do, such as DoRA (`Adapter.beyond_factors`); `rank` is out of range; what is
            merged overflows its dtype.
    """
    settings = settings or Settings()
    opened = load_adapters(adapters, names)
    if len(opened) < 2:
        raise ValueError(f"adapters holds {len(opened)}; at least 2 are needed")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is {rank!r}; it must be an integer of at least 1")
    bases = {adapter.base_model for adapter in opened if adapter.base_model is not None}
    if len(bases) > 1:
        raise ValueError(f"the adapters are for different base models: {', '.join(sorted(bases))}")
    for adapter in opened:
        if adapter.beyond_factors:
            raise ValueError(f"adapter {adapter.name!r} has {', '.join(adapter.beyond_factors)}, which LoRE can't merge")
    factors: dict[str, LoraFactors] = {}
    traces = []
    for module in sorted({module for adapter in opened for module in adapter.modules}):
        factors[module], trace = _merge_module(opened, module, settings, rank)
        traces.append(trace)
    config = lora_config({name: f.lora_a.shape[0] for name, f in factors.items()}, next(iter(bases), None))
    return Merged(factors, config, _total(traces))


def _merge_module(
    adapters: Sequence[Adapter], module: str, settings: Settings, rank: int | None
) -> tuple[LoraFactors, list[float]]:
    present = [adapter for adapter in adapters if module in adapter]
    shape, dtype = present[0].shape(module), present[0].dtype(module)
    for adapter in present:
        for what, first, other in (
            ("shape [out, in]", list(shape), list(adapter.shape(module))),
            ("dtype", dtype_name(dtype), dtype_name(adapter.dtype(module))),
        ):
            if first != other:
                raise ValueError(
                    f"adapters {present[0].name!r} and {adapter.name!r} disagree about the {what} of module {module!r}: "
                    f"{first} and {other}"
                )
        if rank is not None and rank > min(shape):
            raise ValueError(f"rank is {rank}; module {module!r} is {list(shape)}, so that at most {min(shape)} is allowed")
    given = [adapter.factors(module) for adapter in present]
    for adapter, f in zip(present, given, strict=True):
        if not (bool(f.lora_a.isfinite().all()) and bool(f.lora_b.isfinite().all())):
            raise ValueError(f"task {adapter.name!r}: module {module!r} holds NaN or Inf")
    q_b, r_b = torch.linalg.qr(torch.cat([f.scaling * f.lora_b.double() for f in given], 1))  # [out, c], [c, Σr]
    q_a, r_a = torch.linalg.qr(torch.cat([f.lora_a.double() for f in given]).mT)
    cores = torch.zeros(len(adapters), len(r_b), len(r_a), dtype=torch.float64)
    begin, rows = 0, [index for index, adapter in enumerate(adapters) if module in adapter]
    for row, f in zip(rows, given, strict=True):
        block = slice(begin, begin := begin + len(f.lora_a))
        cores[row] = r_b[:, block] @ r_a[:, block].mT
    shared, delta, objective = decompose(cores, settings)
    if settings.finish == "average":
        u, s, vh = torch.linalg.svd(shared + settings.scale * delta.mean(0))
        u, vh = q_b @ u, vh @ q_a.mT
    else:
        whole = ties((q_b @ delta @ q_a.mT).float(), settings.density)
        whole = (q_b @ shared @ q_a.mT).float() + settings.scale * whole
        most = min(rank or begin, *shape)
        u, s, vh = (part[0].double() for part in low_rank(whole[None], most))
    kept = max(1, int((s > _NEGLIGIBLE * s[0]).sum()))
    kept = min(kept, rank or kept)
    root = s[:kept].sqrt()
    a = _fits((root[:, None] * vh[:kept]).to(dtype), f"lora_a of module {module!r}")
    b = _fits((u[:, :kept] * root).to(dtype), f"lora_b of module {module!r}")
    return LoraFactors(a, b, 1.0), objective


def _fits(merged: Tensor, name: str) -> Tensor:
    if not bool(merged.isfinite().all()):
        raise ValueError(f"{name} as merged overflows {dtype_name(merged.dtype)}")
    return merged


def _total(traces: list[list[float]]) -> list[float]:
    longest = max(map(len, traces))
    return [math.fsum(trace[min(i, len(trace) - 1)] for trace in traces) for i in range(longest)]


def lore_checkpoints(checkpoints: Sequence[str | Path], directory: str | Path, settings: Settings | None = None) -> list[float]:
    """Merge model checkpoints with the same tensors into one, written to `directory`; all of it or nothing.

    Matrices go through LoRE one by one; other floating-point tensors (biases, norms, convolutions) are averaged; integer and
    boolean ones must be equal and are copied. No more than one matrix of every checkpoint and one shard of output are held.
    The first checkpoint's JSON and text files are copied, if it is a directory.

    Returns:
        The objective after every iteration, over all matrices.

    Raises:
        CheckpointError: a checkpoint can't be read or a shard is missing; names, shapes or dtypes differ, or integer tensors
            do; a tensor holds NaN or Inf, or there is none.
        ValueError: fewer than two checkpoints; a merged tensor overflows its dtype.
        OSError: the directory exists and is not empty, or can't be written.
    """
    settings = settings or Settings()
    check_target(directory)
    if len(checkpoints) < 2:
        raise ValueError(f"checkpoints holds {len(checkpoints)}; at least 2 are needed")
    opened = [Checkpoint(path) for path in checkpoints]
    check_alike(opened)
    if not opened[0]:
        raise CheckpointError(f"checkpoint {opened[0].path} holds no tensor")
    traces: list[list[float]] = []
    with new_directory(directory) as staging:
        write_checkpoint(staging, _merged_tensors(opened, settings, traces))
        if opened[0].path.is_dir():
            for file in sorted(opened[0].path.iterdir()):
                if file.is_file() and file.suffix in (".json", ".txt") and not file.name.endswith(".index.json"):
                    (staging / file.name).write_bytes(file.read_bytes())
    return _total(traces) if traces else []


def _merged_tensors(opened: list[Checkpoint], settings: Settings, traces: list[list[float]]) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(opened[0]):
        tensors = [checkpoint.finite(name) for checkpoint in opened]
        first = tensors[0]
        if not first.dtype.is_floating_point:
            for checkpoint, tensor in zip(opened, tensors, strict=True):
                if not torch.equal(tensor, first):
                    integers = f"{name} ({dtype_name(first.dtype)})"
                    raise CheckpointError(f"{integers} differs between {opened[0].path} and {checkpoint.path}")
            yield name, first
        elif first.ndim != 2 or min(first.shape) < 2:
            yield name, _fits(torch.stack([tensor.double() for tensor in tensors]).mean(0).to(first.dtype), name)
        else:
            shared, delta, objective = decompose(torch.stack(tensors), settings)
            traces.append(objective)
            own = delta.mean(0) if settings.finish == "average" else ties(delta, settings.density)
            yield name, _fits((shared + settings.scale * own).to(first.dtype), name)
