"""Filtered subspace iteration on the Gram matrix: the leading triplets of matrices with a short side of a few hundred.

Such a matrix's Gram matrix costs no more than a block Krylov method's products with the matrix itself, and products with it are
cheap, so that the block stays as narrow as it began and Rayleigh–Ritz small: each round multiplies it by a Chebyshev
polynomial that damps what lies below the block (Zhou and Saad, SIAM J. Matrix Anal. Appl. 29, 2007). In fp32: what a Gram
matrix loses is more than an approximation may be off by only if σ falls steeply, and the guards, which look at the matrix, see
it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ._triplets import EXCESS, Triplets, cholesky, excess, inverse, passed, ritz, triplets

LONGEST = 640
"""the short side up to which the Gram matrix pays"""

_STRIP = 64  # rows of the Gram matrix computed together
_ROUNDS = 5
_SEED = 0
_GAIN = 5e4  # of the last vector sought over what is damped, in the first round, which knows both too roughly
_MARGIN = 4  # in later ones, by how much more than the excess asks for
_LARGEST = 1e13  # the most the leading vector may gain: what rounding leaves of it in the others gains as much
_MOST = 10  # the highest degree


def filtered(a: Tensor, size: Tensor, rank: int) -> Iterator[tuple[Tensor, Triplets]]:
    """Of matrices a [B, m, d], m ≤ d, with squares `size` [B] of their norms.

    Yields once, if at all: (which of the matrices have passed, their triplets). All go through every round: to copy those that
    are left costs more than the few products that the others would be spared.
    """
    width = 8 * math.ceil((rank + max(16, rank // 2)) / 8)
    m = a.shape[1]
    if m > LONGEST or 3 * width > m:
        return
    gram = _gram(a)
    x = _orthonormal(torch.randn(width, m, generator=torch.Generator().manual_seed(_SEED)).to(a.device) @ gram)
    before = torch.full_like(size, math.inf)
    for turn in range(_ROUNDS):
        w = x @ gram
        energies, vectors = ritz((x @ w.mT).double(), width, size)
        x, w = vectors.float() @ x, vectors.float() @ w
        off = torch.linalg.vector_norm(w[:, :rank] - energies[:, :rank, None].float() * x[:, :rank], dim=2).double()
        lost = excess(energies[:, :rank], off, size, energies[:, -1]) / (EXCESS * size.sqrt())
        close, falling = lost <= 1, lost < before / 2
        if turn == _ROUNDS - 1 or not bool((falling & ~close).any()):  # what no longer falls is for another method
            break
        gain = _MARGIN * math.sqrt(float(lost[falling].amax())) if turn else _GAIN
        x, before = _orthonormal(_filter(gram, x, w, energies, rank, gain)), lost
    chosen = slice(None) if bool(close.all()) else close  # a slice copies nothing
    found = triplets(x[chosen, :rank], x[chosen, :rank] @ a[chosen])
    good, _ = passed(a[chosen], found, size[chosen], energies[chosen, -1], False)
    yield close.masked_scatter(close, good), found[good]


def _gram(a: Tensor) -> Tensor:
    """aaᵀ [B, m, m], in strips, so that little is computed twice for symmetry's sake."""
    gram = a.new_empty(len(a), a.shape[1], a.shape[1])
    for begin in range(0, a.shape[1], _STRIP):
        end = begin + _STRIP
        torch.bmm(a[:, begin:end], a[:, :end].mT, out=gram[:, begin:end, :end])
        gram[:, :begin, begin:end] = gram[:, begin:end, :begin].mT
    return gram


def _orthonormal(w: Tensor) -> Tensor:
    """Rows of the same span, by CholeskyQR in fp64: one pass, since w, of fp32, is conditioned well enough or not at all."""
    wide = w.double()
    return (inverse(cholesky(wide, shift=False)) @ wide).to(w.dtype)  # a product takes less time than the solve


def _filter(gram: Tensor, x: Tensor, w: Tensor, energies: Tensor, rank: int, gain: float) -> Tensor:
    """Rows T(gram) x [b, width, m] for the Chebyshev polynomial T on [0, the last of `energies`]; w is x gram."""
    half = (energies[:, -1:] / 2).clamp(min=1e-7 * energies[:, :1]).clamp(min=1e-300)

    def steepness(energy: Tensor) -> Tensor:  # log of an eigenvalue's gain by one degree
        return torch.acosh((energy / half - 1).clamp(min=1 + 1e-6)).nan_to_num(1.0)

    wanted = math.acosh(gain) / float(steepness(energies[:, rank - 1 : rank]).amin())
    allowed = math.acosh(_LARGEST) / float(steepness(energies[:, :1]).amax())
    degree = max(1, min(_MOST, math.ceil(wanted), int(allowed)))
    centre = half[..., None].float()
    before, now = x, w / centre - x
    for _ in range(degree - 1):
        before, now = now, (now @ gram).mul_(2 / centre).sub_(now, alpha=2).sub_(before)
    return now
