"""How far restored factors are from the originals, judged by ΔW = scaling · lora_b @ lora_a and without forming it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .ops.error_grams import error_grams
from .ops.reconstruct import reconstruct

# Squared norms of a factor whose products, and whose differences near rounding error squared, fp32 still holds. Others
# are taken in fp64.
_SAFE = (1e-16, 1e30)


def restored_grams(x: Tensor, basis: Tensor, coeff: Tensor, rows: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """`error_grams` of a factor and what `basis` [p+1, S, r] and `coeff` [m, p, S] restore of it for tasks `rows`.

    Args:
        x: [n, S, r]: the originals of those n tasks, zero beyond the true rank of each, as `ranks` [n] gives it: what is
            restored there is not counted.

    Returns:
        [3, n, r, r], fp64: (x − x̂)ᵀ(x − x̂), (x − x̂)ᵀx̂ and x̂ᵀx̂ of every task, summed over positions.
    """
    chosen = coeff if list(rows) == list(range(len(coeff))) else coeff[torch.tensor(rows)]
    if (x.dtype == torch.float64) == (basis.dtype == torch.float64):
        found = _cut(error_grams(x, basis, chosen), ranks)
        if _safe(found):
            return found
    copy = reconstruct(basis, chosen, torch.arange(len(chosen)))
    return _cut(_of_copies(x.double(), copy.double()), ranks)


def grams(x: Tensor, copy: Tensor) -> Tensor:
    """The same of x [n, S, r] and any copies of its factors [n, S, r]."""
    found = _of_copies(x, copy)
    return found if _safe(found) else _of_copies(x.double(), copy.double())


def _of_copies(x: Tensor, copy: Tensor) -> Tensor:
    """`error_grams` where every task has a basis of its own: a mean, the copy, and no components."""
    n, positions, r = x.shape
    none = copy.new_empty(1, 0, positions)
    found = torch.zeros(3, n, r, r, dtype=torch.float64)
    for task in range(n):
        found[:, task] = error_grams(x[task : task + 1], copy[task : task + 1], none)[:, 0]
    return found


def _cut(grams: Tensor, ranks: Sequence[int]) -> Tensor:
    """0 in all that belongs to ranks that a task does not have."""
    r = grams.shape[2]
    if min(ranks) == r:
        return grams
    within = torch.arange(r) < torch.tensor(ranks)[:, None]
    return torch.where(within[:, :, None] & within[:, None], grams, 0.0)


def _safe(grams: Tensor) -> bool:
    low, high = _SAFE
    return all(low < norm < high for norm in np.einsum("nii->n", grams[2].numpy()).tolist())  # no NaN is


def squares(a: Tensor, b: Tensor, scaling: Sequence[float]) -> list[tuple[float, float]]:
    """(‖ΔW − ΔŴ‖², ‖ΔW‖²) (Frobenius) of n tasks.

    With D = B − B̂ and E = A − Â, ΔW − ΔŴ = D A + B̂ E: every term holds a difference, so that an error near rounding is
    found as precisely as a large one, where ‖ΔW‖² − 2⟨ΔW, ΔŴ⟩ + ‖ΔŴ‖² would lose half the digits.

    Args:
        a: `grams` of lora_a, its input columns being the positions: E Eᵀ, E Âᵀ, Â Âᵀ.
        b: `grams` of lora_b, its output rows being the positions: Dᵀ D, Dᵀ B̂, B̂ᵀ B̂.
        scaling: of each task.
    """
    ee, ea_hat, aa_hat = a.numpy()  # so small that torch would spend its time on calling
    dd, db_hat, bb_hat = b.numpy()
    with np.errstate(invalid="ignore", over="ignore"):  # Inf and NaN are for the caller to find
        ea = ee + ea_hat  # E Aᵀ
        aa = ea + ea_hat.swapaxes(1, 2) + aa_hat
        bb = dd + db_hat + db_hat.swapaxes(1, 2) + bb_hat
        error = (dd * aa + 2 * db_hat * ea.swapaxes(1, 2) + bb_hat * ee).sum((1, 2)).tolist()
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
