"""Leading singular triplets of large matrices: block Krylov, then Gram and eigh, then LAPACK, by guards on the result.

Plain torch: its time is spent in large matrix products, which are torch's. It is an op of its own, so that the guards, which
read values, do not break a compiled graph; on a GPU they wait for the device.

The block Lanczos process of Golub and Underwood: K = [Q, (AAᵀ)Q, …, (AAᵀ)^q Q] from a seeded random block a little wider than
the rank, orthonormalised step by step, and Rayleigh–Ritz on it (Musco and Musco, arXiv 1504.05477).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _library, reference

# Beyond this short side one of the methods here beats LAPACK's SVD. fp64 keeps LAPACK's accuracy.
SHORTEST = 128

# The most that ‖UᵀU − I‖, ‖VᵀV − I‖ may be, and ‖A v − σ u‖ / σ₁ of any triplet where those are asked for.
_ORTHONORMAL = 5e-6
_RESIDUAL = 5e-6

# The most that ‖A − U S Vᵀ‖ may be expected to fall by further steps, in units of ‖A‖; and the ratios of what two
# successive steps gain that this expectation counts on: rounding gives any.
_EXCESS = 1e-6
_FASTEST, _SLOWEST = 0.05, 0.99

_EXTRA = 8  # columns of a block beyond the rank
_CHECKS = (5, 8, 11, 16)  # powers q of AAᵀ at which the guards are asked
_SEED = 0

# Norms of rows between which squares and their sums are far from the ends of fp32.
_SAFE = (2.0**-30, 2.0**30)


def large_svd(x: Tensor, rank: int, residuals: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `truncated_svd`, for any x, meant for fp32, fp16 and bf16 with both sides above `SHORTEST`.

    Args:
        x: [B, m, k].
        rank: 0 to min(m, k).
        residuals: hold every triplet to ‖A v − σ u‖ ≤ 5e-6 σ₁. Otherwise ‖A − U S Vᵀ‖ alone is held to within 1e-6 ‖A‖ of the
            least possible, which is reached earlier where σ falls slowly: what a low-rank approximation needs.
    """
    if 0 in (*x.shape, rank) or x.dtype == torch.float64:
        return reference.truncated_svd(x, rank)
    work, exponent, finite, size = _scaled(x.float())
    tall = work.shape[1] > work.shape[2]
    if tall:
        work = work.mT
    left, right = work.new_empty(len(work), rank, work.shape[1]), work.new_empty(len(work), rank, work.shape[2])
    values = work.new_empty(len(work), rank, dtype=torch.float64)
    for rows, found in _methods(work, size, rank, residuals):
        left[rows], values[rows], right[rows] = found.u.float(), found.s, found.v.float()
    u, v = (right.mT, left) if tall else (left.mT, right)

    sign = reference.positive_peak(u.to(x.dtype))
    u, vh = torch.where(finite, u * sign, torch.nan), torch.where(finite, v * sign.mT, torch.nan)
    s = torch.where(finite[:, 0], reference.power_of_two(values, exponent[:, 0]), torch.nan)
    return u.to(x.dtype).contiguous(), s.float(), vh.to(x.dtype).contiguous()


def _scaled(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x [B, m, k] times 2^−exponent, exponent, finite, ‖x‖² as scaled [B]), the middle two [B, 1, 1].

    x itself where no matrix needs it: scaling by a power of two changes no digit. A matrix with NaN or Inf becomes zeros.
    """
    rows = torch.linalg.vector_norm(x, dim=2)  # in fp32, of which the sum of squares then averages the rounding
    largest = rows.amax(1)[:, None, None]
    low, high = _SAFE
    if bool(((largest > low) & (largest < high)).all()):
        return x, torch.zeros_like(largest, dtype=torch.int32), largest.isfinite(), rows.double().square().sum(1)
    largest = torch.linalg.vector_norm(x, math.inf, (1, 2), keepdim=True)
    finite = largest.isfinite()
    exponent = torch.frexp(torch.where(finite, largest, 1.0)).exponent
    x = torch.where(finite, reference.power_of_two(x, -exponent), 0.0)
    return x, exponent, finite, torch.linalg.vector_norm(x, dim=2).double().square().sum(1)


@dataclass(frozen=True)
class _Found:
    """Triplets of b matrices, vectors as rows."""

    u: Tensor  # [b, rank, m]
    s: Tensor  # [b, rank], fp64
    v: Tensor  # [b, rank, d]

    def __getitem__(self, rows: Tensor) -> _Found:
        return _Found(self.u[rows], self.s[rows], self.v[rows])


def _methods(a: Tensor, size: Tensor, rank: int, residuals: bool) -> Iterator[tuple[Tensor, _Found]]:
    """(which matrices of a [B, m, d], m ≤ d; their triplets), from the fastest method whose result passes."""
    left = torch.arange(len(a), device=a.device)
    for done, found in _block_krylov(a, size, rank, residuals):
        yield left[done], found
        left = left[~done]
    if len(left):
        found = _gram_eigh(a[left], rank)
        passed = _orthonormal(found) & _converged(a[left], found)
        yield left[passed], found[passed]
        left = left[~passed]
    if len(left):
        u, s, vh = torch.linalg.svd(a[left].double(), full_matrices=False)
        yield left, _Found(u[..., :rank].mT, s[:, :rank], vh[:, :rank])


def _block_krylov(a: Tensor, size: Tensor, rank: int, residuals: bool) -> Iterator[tuple[Tensor, _Found]]:
    """At every check, (which of the matrices that are left have passed, their triplets); those that never do are left."""
    width = math.ceil((rank + _EXTRA) / _EXTRA) * _EXTRA
    batch, m, d = a.shape
    checks = [power for power in _CHECKS if width * (power + 1) <= m]
    if not checks:
        return
    start = torch.randn(width, d, generator=torch.Generator().manual_seed(_SEED)).to(a.device)
    q, _ = _orthonormalise(start @ a.mT)
    space = a.new_empty(batch, width * (checks[-1] + 1), m)  # Qᵀ
    image = a.new_empty(batch, width * (checks[-1] + 1), d)  # QᵀA
    space[:, :width], image[:, :width] = q, q @ a
    gram = a.new_empty(batch, 0, 0, dtype=torch.float64)
    for power in range(1, checks[-1] + 1):
        known, wide = width * power, width * (power + 1)
        q = _next_block(image[:, known - width : known] @ a.mT, space[:, :known])
        space[:, known:wide], image[:, known:wide] = q, q @ a
        if power not in checks:
            continue
        gram = _extended(gram, image[:, :wide].double())
        energies, ritz = torch.linalg.eigh(gram)
        ritz = ritz[..., -rank:].flip(-1).mT  # [b, rank, wide]
        found = _triplets(ritz.float() @ space[:, :wide], ritz.float() @ image[:, :wide])
        passed = _orthonormal(found) & (_excess(gram, energies, ritz, size, width) <= _EXCESS * size.sqrt())
        if residuals:
            passed &= _converged(a, found)
        yield passed, found[passed]
        if bool(passed.all()):
            return
        if bool(passed.any()):
            rest = ~passed
            a, size, gram, space, image = a[rest], size[rest], gram[rest], space[rest], image[rest]


def _next_block(w: Tensor, basis: Tensor) -> Tensor:
    """Rows w [b, k, m] made orthonormal, and orthogonal to the rows of `basis`: Gram–Schmidt and CholeskyQR, twice.

    The first pass is off by rounding times the condition of w; after it w is well conditioned.
    """
    for shift in (True, False):
        w = w - (w @ basis.mT) @ basis
        lower = _cholesky(w.double(), shift)
        one = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device)
        w = torch.linalg.solve_triangular(lower, one, upper=False).to(w.dtype) @ w
    return w


def _orthonormalise(w: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, L) of rows, w = L Q: shifted CholeskyQR with the Gram matrix in fp64, then once more (arXiv 1809.11085).

    Rows that depend on the others come out wrong, or NaN, and the guard on orthonormality sees it.
    """
    work = w.double()
    first = _cholesky(work, shift=True)
    work = torch.linalg.solve_triangular(first, work, upper=False)
    second = _cholesky(work, shift=False)
    work = torch.linalg.solve_triangular(second, work, upper=False)
    return work.to(w.dtype), first @ second


def _cholesky(w: Tensor, shift: bool) -> Tensor:
    """L [b, k, k], lower, with LLᵀ = wwᵀ, or a little more."""
    gram = w @ w.mT
    if shift:
        diagonal = gram.diagonal(dim1=1, dim2=2)
        k, m = w.shape[1:]
        diagonal += 11 * (m * k + k * (k + 1)) * torch.finfo(w.dtype).eps / 2 * diagonal.sum(1, keepdim=True)
    return torch.linalg.cholesky_ex(gram).L


def _extended(gram: Tensor, z: Tensor) -> Tensor:
    """zzᵀ [b, w, w], of which the leading block is `gram`."""
    known, wide = gram.shape[1], z.shape[1]
    whole = gram.new_empty(len(gram), wide, wide)
    whole[:, :known, :known] = gram
    step = math.ceil((wide - known) / 3)
    for begin in range(known, wide, step):  # so that little is computed twice, for the sake of symmetry
        new = z[:, : begin + step] @ z[:, begin : begin + step].mT
        whole[:, : begin + step, begin : begin + step] = new
        whole[:, begin : begin + step, :begin] = new[:, :begin].mT
    return whole


def _excess(gram: Tensor, energies: Tensor, ritz: Tensor, size: Tensor, width: int) -> Tensor:
    """How much further steps may be expected to lower ‖A − U S Vᵀ‖ [b]: gains fall at least geometrically.

    What the last two steps gained is bounded by what the Ritz vectors capture without their blocks, which is off by as
    little as the gain itself: they are stationary.
    """
    rank = ritz.shape[1]
    captured = [energies[:, -rank:].sum(1)]
    for steps in (1, 2):
        part, inner = ritz[..., : -width * steps], gram[:, : -width * steps, : -width * steps]
        weights = torch.linalg.solve_ex(part @ part.mT, part @ inner @ part.mT).result
        captured.append(torch.minimum(weights.diagonal(dim1=1, dim2=2).sum(1), captured[0]))
    last, before, first = ((size - energy).clamp(min=0).sqrt() for energy in captured)
    ratio = ((before - last) / (first - before).clamp(min=1e-300)).clamp(_FASTEST, _SLOWEST)
    return (before - last) * ratio / (1 - ratio)


def _triplets(u: Tensor, image: Tensor) -> _Found:
    """Of the best approximation within the rows u [b, rank, m], orthonormal; image is u A [b, rank, d]."""
    v, lower = _orthonormalise(image)
    usable = lower.isfinite().all(2).all(1)
    turn, s, back = torch.linalg.svd(torch.where(usable[:, None, None], lower, 0.0))
    s = torch.where(usable[:, None], s, torch.nan)
    return _Found(turn.mT.to(u.dtype) @ u, s, back.to(v.dtype) @ v)


def _gram_eigh(a: Tensor, rank: int) -> _Found:
    wide = a.double()
    _, vectors = torch.linalg.eigh(wide @ wide.mT)
    u = vectors[..., -rank:].flip(-1).mT
    return _triplets(u, u @ wide)


def _orthonormal(found: _Found) -> Tensor:
    """[b]; False for NaN."""

    def deviation(basis: Tensor) -> Tensor:
        wide = basis.double()
        one = torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device)
        return torch.linalg.matrix_norm(wide @ wide.mT - one)

    return (deviation(found.u) <= _ORTHONORMAL) & (deviation(found.v) <= _ORTHONORMAL)


def _converged(a: Tensor, found: _Found) -> Tensor:
    """[b]: ‖A v − σ u‖ ≤ 5e-6 σ₁ for every triplet. ‖Aᵀu − σ v‖ is rounding: that is how v was made."""
    difference = found.v.to(a.dtype) @ a.mT - found.u.to(a.dtype) * found.s[..., None].to(a.dtype)
    return difference.norm(dim=2).amax(1) <= _RESIDUAL * found.s[:, 0]


def _fake(x: Tensor, rank: int, residuals: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, m, k = x.shape
    s = x.new_empty(batch, rank, dtype=reference.accumulator(x.dtype))
    return x.new_empty(batch, m, rank), s, x.new_empty(batch, rank, k)


_library.register_composite(
    "large_svd", "(Tensor x, int rank, bool residuals) -> (Tensor, Tensor, Tensor)", large_svd, fake=_fake
)
