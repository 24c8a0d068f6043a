"""Singular triplets out of a subspace, and the guards on what an iteration found.

Vectors are rows, so that every product is one of row-major matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The most that ‖UᵀU − I‖, ‖VᵀV − I‖ may be, and ‖A v − σ u‖ / σ₁ of any triplet where those are asked for.
_ORTHONORMAL = 5e-6
_RESIDUAL = 5e-6

_ROUNDING = 3e-7  # of the squares of norms in fp32: what looks like an error of ‖A‖² may be none

EXCESS = 7e-7
"""The most that ‖A − U S Vᵀ‖ may exceed the least possible, in units of ‖A‖, as estimated: 1e-6 with the estimate's error."""


@dataclass(frozen=True)
class Triplets:
    """Of b matrices."""

    u: Tensor  # [b, rank, m]
    s: Tensor  # [b, rank], fp64
    v: Tensor  # [b, rank, d]

    def __getitem__(self, rows: Tensor) -> Triplets:
        return Triplets(self.u[rows], self.s[rows], self.v[rows])


def triplets(u: Tensor, image: Tensor) -> Triplets:
    """Of the best approximation within the rows u [b, rank, m], orthonormal; image is u A [b, rank, d]."""
    v, lower = orthonormalise(image)
    usable = lower.isfinite().all(2).all(1)
    turn, s, back = torch.linalg.svd(torch.where(usable[:, None, None], lower, 0.0))
    s = torch.where(usable[:, None], s, torch.nan)
    return Triplets(turn.mT.to(u.dtype) @ u, s, back.to(v.dtype) @ v)


def passed(a: Tensor, found: Triplets, size: Tensor, beyond: Tensor, residuals: bool) -> tuple[Tensor, Tensor]:
    """Whether U S V approximates matrices a [b, m, d] as it should, by its own residuals [b]; how far off it is [b].

    Args:
        size: ‖A‖² [b].
        beyond: the square of a singular value behind the last of those sought, as far as is known [b].
        residuals: also hold every triplet to ‖A v − σ u‖ ≤ 5e-6 σ₁.
    """
    off = residual(a, found)
    lost = excess(found.s.square(), found.s * off, size, beyond)
    good = orthonormal(found) & (lost <= EXCESS * size.sqrt())
    return good & (off.amax(1) <= _RESIDUAL * found.s[:, 0]) if residuals else good, lost


def residual(a: Tensor, found: Triplets) -> Tensor:
    """‖A v − σ u‖ [b, rank], fp64. ‖Aᵀu − σ v‖ is rounding: that is how v was made."""
    difference = times(found.v.to(a.dtype), a.mT) - found.u.to(a.dtype) * found.s[..., None].to(a.dtype)
    return torch.linalg.vector_norm(difference, dim=2).double()


def converged(a: Tensor, found: Triplets) -> Tensor:
    """[b]: ‖A v − σ u‖ ≤ 5e-6 σ₁ for every triplet."""
    return residual(a, found).amax(1) <= _RESIDUAL * found.s[:, 0]


def excess(energies: Tensor, off: Tensor, size: Tensor, beyond: Tensor) -> Tensor:
    """How much ‖A − U S Vᵀ‖ exceeds the least possible [b], from Ritz values `energies` [b, rank] of AAᵀ, in fp64.

    A Ritz value θ with residual ‖AAᵀu − θu‖ = `off` [b, rank] is below its eigenvalue by about off² / (θ − `beyond`), and by no
    more than off (Parlett, The Symmetric Eigenvalue Problem, 11.7). Near convergence the estimate was within a third of the
    truth on slow, steep and clustered spectra and on random matrices, and half of it on an outlier beside a flat rest.
    """
    gap = (energies - beyond[:, None]).clamp(min=1e-300)
    return above_least(torch.minimum(off, off.square() / gap).sum(1), size, energies.sum(1))


def above_least(lost: Tensor, size: Tensor, captured: Tensor) -> Tensor:
    """‖A − U S Vᵀ‖ less the least possible, where U captures so much of `size` = ‖A‖², and the best as much as `lost` more."""
    wrong = torch.maximum(size * (1 - _ROUNDING) - captured, lost)
    return wrong.sqrt() - (wrong - lost).sqrt()


def orthonormal(found: Triplets) -> Tensor:
    """[b]; False for NaN."""

    def deviation(basis: Tensor) -> Tensor:
        wide = basis.double()
        one = torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device)
        return torch.linalg.matrix_norm(wide @ wide.mT - one)

    return (deviation(found.u) <= _ORTHONORMAL) & (deviation(found.v) <= _ORTHONORMAL)


def orthonormalise(w: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, L) of rows, w = L Q: shifted CholeskyQR with the Gram matrix in fp64, then once more (arXiv 1809.11085).

    Rows that depend on the others come out wrong, or NaN, and the guard on orthonormality sees it.
    """
    work = w.double()
    first = cholesky(work, shift=True)
    work = inverse(first) @ work  # a product takes less time than the solve
    second = cholesky(work, shift=False)
    return (inverse(second) @ work).to(w.dtype), first @ second


def times(rows: Tensor, a: Tensor) -> Tensor:
    """rows [b, k, m] times a [b, m, d], k much less than m and d.

    Several threads share a product by the rows of its first factor, of which there had better be many.
    """
    return rows @ a if torch.get_num_threads() == 1 else (a.mT @ rows.mT).mT


def cholesky(w: Tensor, shift: bool) -> Tensor:
    """L [b, k, k], lower, with LLᵀ = wwᵀ, or a little more."""
    gram = w @ w.mT
    if shift:
        diagonal = gram.diagonal(dim1=1, dim2=2)
        k, m = w.shape[1:]
        diagonal += 11 * (m * k + k * (k + 1)) * torch.finfo(w.dtype).eps / 2 * diagonal.sum(1, keepdim=True)
    return torch.linalg.cholesky_ex(gram).L


def inverse(lower: Tensor) -> Tensor:
    """Of lower triangular matrices [b, k, k]."""
    one = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, one, upper=False)


def ritz_values(gram: Tensor, size: Tensor) -> Tensor:
    """Eigenvalues of gram [b, w, w], falling [b, w], in fp64; as `ritz` finds them, in a third of the time."""
    usable = _usable(gram, size)
    values = torch.linalg.eigvalsh(torch.where(usable, gram, 0.0))
    return torch.where(usable[..., 0], values.flip(1).double(), torch.nan)


def ritz(gram: Tensor, rank: int, size: Tensor) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues of gram [b, w, w], falling [b, rank], in fp64, and vectors as rows [b, rank, w].

    NaN for a matrix that is not finite, or whose trace is beyond `size` [b], the trace of AAᵀ: then it is none of AAᵀ in an
    orthonormal basis. LAPACK might refuse it, and its neighbours with it.
    """
    usable = _usable(gram, size)
    values, vectors = torch.linalg.eigh(torch.where(usable, gram, 0.0))
    values = torch.where(usable[..., 0], values[:, -rank:].flip(1).double(), torch.nan)
    return values, torch.where(usable, vectors[..., -rank:].flip(-1).mT, torch.nan)


def _usable(gram: Tensor, size: Tensor) -> Tensor:
    """[b, 1, 1]. What is not finite is so on the diagonal, too: it comes of rows that are not."""
    return (gram.diagonal(dim1=1, dim2=2).sum(1) <= 2 * size)[:, None, None]
