"""How far restored factors are from the originals, judged by ΔW = scaling · lora_b @ lora_a and without forming it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .ops.reconstruct import reconstruct

# Values of x and of its restored copy looked at together: enough for one matrix product, few enough for a core's cache.
_CHUNK = 1 << 17

# Squared norms of a factor whose products, and whose differences near rounding error squared, fp32 still holds. Others
# are taken in fp64.
_SAFE = (1e-16, 1e30)


def grams(x: Tensor, restored: Callable[[slice], Tensor]) -> Tensor:
    """Compare a factor with its restored copy x̂, a block of positions at a time.

    Args:
        x: [n, S, r], any strides.
        restored: gives x̂ at a slice of positions, [n, s, r].

    Returns:
        [3, n, r, r], fp64: (x − x̂)ᵀ(x − x̂), (x − x̂)ᵀx̂ and x̂ᵀx̂ of every task, summed over positions.
    """
    fp32 = _grams(x, restored, torch.float32)
    low, high = _SAFE
    if all(low < norm < high for norm in fp32[2].diagonal(dim1=1, dim2=2).sum(1).tolist()):  # no NaN is
        return fp32
    return _grams(x, restored, torch.float64)


def _grams(x: Tensor, restored: Callable[[slice], Tensor], dtype: torch.dtype) -> Tensor:
    n, positions, rank = x.shape
    dtype = torch.promote_types(x.dtype, dtype)
    step = max(_CHUNK // (n * rank), 64)
    total = torch.zeros(3, n, rank, rank, dtype=torch.float64)
    for begin in range(0, positions, step):
        block = slice(begin, begin + step)
        copy = restored(block).to(dtype)
        difference = x[:, block].to(dtype) - copy
        total += torch.stack([difference.mT @ difference, difference.mT @ copy, copy.mT @ copy])
    return total


def restored_grams(x: Tensor, basis: Tensor, coeff: Tensor, rows: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """`grams` of a factor and what `reconstruct` makes of `basis` [p+1, S, r] and `coeff` [m, p, S] for tasks `rows`.

    Args:
        x: [n, S, r]: the originals of those n tasks, zero beyond the true rank of each, as `ranks` [n] gives it.
    """
    ids = torch.tensor(rows)
    beyond = None  # [n, 1, r]
    if min(ranks) < x.shape[2]:
        beyond = torch.arange(x.shape[2]) >= torch.tensor(ranks)[:, None, None]

    def restored(block: slice) -> Tensor:
        copy = reconstruct(basis[:, block], coeff[:, :, block], ids)
        return copy if beyond is None else copy.masked_fill_(beyond, 0)

    return grams(x, restored)


def squares(a: Tensor, b: Tensor, scaling: Sequence[float]) -> list[tuple[float, float]]:
    """(‖ΔW − ΔŴ‖², ‖ΔW‖²) (Frobenius) of n tasks.

    With D = B − B̂ and E = A − Â, ΔW − ΔŴ = D A + B̂ E: every term holds a difference, so that an error near rounding is
    found as precisely as a large one, where ‖ΔW‖² − 2⟨ΔW, ΔŴ⟩ + ‖ΔŴ‖² would lose half the digits.

    Args:
        a: `grams` of lora_a, its input columns being the positions: E Eᵀ, E Âᵀ, Â Âᵀ.
        b: `grams` of lora_b, its output rows being the positions: Dᵀ D, Dᵀ B̂, B̂ᵀ B̂.
        scaling: of each task.
    """
    ee, ea_hat, aa_hat = a.unbind()
    ea = ee + ea_hat  # E Aᵀ
    aa = ea + ea_hat.mT + aa_hat
    bb = b[0] + b[1] + b[1].mT + b[2]
    error = (b * torch.stack([aa, 2 * ea.mT, ee])).sum((0, 2, 3)).tolist()
    norm = (aa * bb).sum((1, 2)).tolist()
    return [(max(e, 0.0) * s * s, m * s * s) for e, m, s in zip(error, norm, scaling, strict=True)]


def relative(pairs: Iterable[tuple[float, float]]) -> float:
    """‖ΔW − ΔŴ‖ / ‖ΔW‖ over all of `pairs` of squares; 0 where both are 0, infinite where only ‖ΔW‖ is."""
    listed = list(pairs)
    error, norm = math.fsum(error for error, _ in listed), math.fsum(norm for _, norm in listed)
    if norm > 0:
        return math.sqrt(error / norm)
    return 0.0 if error == 0 else math.inf


def finite(error: float) -> float | None:
    """For JSON, which has no infinity."""
    return error if math.isfinite(error) else None
