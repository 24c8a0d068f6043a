"""Leading singular triplets of large matrices: by iterations, then Gram and eigh, then LAPACK, by guards on the result.

Plain torch: its time is spent in large matrix products, which are torch's. It is an op of its own, so that the guards, which
read values, do not break a compiled graph; on a GPU they wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .. import _library, reference
from . import _triplets
from ._filtered import filtered
from ._krylov import block_krylov
from ._triplets import Triplets

Iterate = Callable[[Tensor, Tensor, int], Iterator[tuple[Tensor, Triplets]]]

# Beyond this short side one of the methods here beats LAPACK's SVD. fp64 keeps LAPACK's accuracy.
SHORTEST = 128

# Bytes of Gram matrices, by the short side, of those that a CPU iterates on together: what is read again and again stays in its
# caches, and small matrices share the calls.
_TOGETHER = 1 << 22

# Norms of rows between which squares and their sums are far from the ends of fp32.
_SAFE = (2.0**-30, 2.0**30)


def large_svd(x: Tensor, rank: int, residuals: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `truncated_svd`, for any x, meant for fp32, fp16 and bf16 with both sides above `SHORTEST`.

    Args:
        x: [B, m, k].
        rank: 0 to min(m, k).
        residuals: hold every triplet to ‖A v − σ u‖ ≤ 5e-6 σ₁. Otherwise ‖A − U S Vᵀ‖ alone is held to within 1e-6 ‖A‖ of the
            least possible, which is reached earlier where σ falls slowly: what a low-rank approximation needs. (Twice that
            where one σ is a thousand times an almost flat rest, of which the estimate falls short.) How far beyond that a
            matrix gets may then depend on the others of its batch.
    """
    if 0 in (*x.shape, rank) or x.dtype == torch.float64:
        return reference.truncated_svd(x, rank)
    work, exponent, finite, size = _scaled(x.float())
    tall = work.shape[1] > work.shape[2]
    if tall:
        work = work.mT
    left, right = work.new_empty(len(work), rank, work.shape[1]), work.new_empty(len(work), rank, work.shape[2])
    values = work.new_empty(len(work), rank, dtype=torch.float64)
    step = max(1, _TOGETHER // (4 * work.shape[1] ** 2)) if work.device.type == "cpu" else len(work)
    for begin in range(0, len(work), step):
        part = slice(begin, begin + step)
        for rows, found in _methods(work[part], size[part], rank, residuals):
            left[begin + rows], values[begin + rows], right[begin + rows] = found.u.float(), found.s, found.v.float()
    if not bool(finite.all()):
        left[~finite[:, 0, 0]], right[~finite[:, 0, 0]], values[~finite[:, 0, 0]] = torch.nan, torch.nan, torch.nan
    sign = reference.positive_peak((right if tall else left).mT.to(x.dtype)).mT
    u, v = (right, left) if tall else (left, right)
    s = reference.power_of_two(values, exponent[:, 0])
    return u.mul_(sign).mT.to(x.dtype).contiguous(), s.float(), v.mul_(sign).to(x.dtype)


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


def _methods(a: Tensor, size: Tensor, rank: int, residuals: bool) -> Iterator[tuple[Tensor, Triplets]]:
    """(which matrices of a [B, m, d], m ≤ d; their triplets), from the fastest method whose result passes."""
    left = torch.arange(len(a), device=a.device)
    rest = a, size  # of the matrices that are left
    krylov, exact = (partial(block_krylov, residuals=strictly) for strictly in (False, True))
    methods: list[Iterate] = [exact] if residuals else [filtered, krylov, exact]
    for iterate in methods:
        for good, found in iterate(*rest, rank):
            yield left[good], found
            left = left[~good]
        if len(left) == 0:
            return
        if len(left) < len(rest[0]):
            rest = a[left], size[left]
    found = _gram_eigh(*rest, rank)
    good = _triplets.orthonormal(found) & _triplets.converged(rest[0], found)
    yield left[good], found[good]
    left = left[~good]
    if len(left):
        u, s, vh = torch.linalg.svd(a[left].double(), full_matrices=False)
        yield left, Triplets(u[..., :rank].mT, s[:, :rank], vh[:, :rank])


def _gram_eigh(a: Tensor, size: Tensor, rank: int) -> Triplets:
    wide = a.double()
    _, vectors = _triplets.ritz(wide @ wide.mT, rank, size)
    return _triplets.triplets(vectors, vectors @ wide)


def _fake(x: Tensor, rank: int, residuals: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, m, k = x.shape
    s = x.new_empty(batch, rank, dtype=reference.accumulator(x.dtype))
    return x.new_empty(batch, m, rank), s, x.new_empty(batch, rank, k)


_library.register_composite(
    "large_svd", "(Tensor x, int rank, bool residuals) -> (Tensor, Tensor, Tensor)", large_svd, fake=_fake
)
