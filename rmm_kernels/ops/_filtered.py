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

from ._triplets import EXCESS, Triplets, cholesky, excess, extended_gram, passed, ritz, triplets

LONGEST = 640
"""the short side up to which the Gram matrix pays"""

_ROUNDS = 5
_SEED = 0
_GAIN = (2e4, 3e2)  # of the last vector sought over what is damped: in the first round, and in later ones
_LARGEST = 1e12  # the most the leading vector may gain: what rounding leaves of it in the others gains as much
_DEGREES = (2, 10)


def filtered(a: Tensor, size: Tensor, rank: int) -> Iterator[tuple[Tensor, Triplets]]:
    """Of matrices a [B, m, d], m ≤ d, with squares `size` [B] of their norms.

    Yields after every round (which of the matrices that are left have passed, their triplets); those that never do are left.
    """
    width = 8 * math.ceil((rank + max(16, rank // 2)) / 8)
    batch, m, _ = a.shape
    if m > LONGEST or 3 * width > m:
        return
    gram = extended_gram(a.new_empty(batch, 0, 0), a)
    x = _orthonormal(torch.randn(width, m, generator=torch.Generator().manual_seed(_SEED)).to(a.device) @ gram)
    for turn in range(_ROUNDS):
        w = x @ gram
        energies, vectors = ritz((x @ w.mT).double(), width)
        x, w = vectors.float() @ x, vectors.float() @ w
        off = torch.linalg.vector_norm(w[:, :rank] - energies[:, :rank, None].float() * x[:, :rank], dim=2).double()
        close = excess(energies[:, :rank], off, size, energies[:, -1]) <= EXCESS * size.sqrt()
        if bool(close.any()):
            every = bool(close.all())
            chosen = slice(None) if every else close  # a slice copies nothing
            found = triplets(x[chosen, :rank], x[chosen, :rank] @ a[chosen])
            good = passed(a[chosen], found, size[chosen], energies[chosen, -1])
            yield close.masked_scatter(close, good), found[good]
            if every:  # what a guard refused, no further round would mend
                return
            a, size, gram, x, w, energies = (part[~close] for part in (a, size, gram, x, w, energies))
        x = _orthonormal(_filter(gram, x, w, energies, rank, _GAIN[min(turn, 1)]))


def _orthonormal(w: Tensor) -> Tensor:
    """Rows of the same span, by CholeskyQR in fp64: one pass, since w, of fp32, is conditioned well enough or not at all."""
    wide = w.double()
    return torch.linalg.solve_triangular(cholesky(wide, shift=False), wide, upper=False).to(w.dtype)


def _filter(gram: Tensor, x: Tensor, w: Tensor, energies: Tensor, rank: int, gain: float) -> Tensor:
    """Rows T(gram) x [b, width, m], of length 1, for the Chebyshev polynomial T on [0, the last of `energies`]; w is x gram."""
    half = (energies[:, -1:] / 2).clamp(min=1e-7 * energies[:, :1]).clamp(min=1e-300)

    def steepness(energy: Tensor) -> Tensor:  # log of an eigenvalue's gain by one degree
        return torch.acosh((energy / half - 1).clamp(min=1 + 1e-6)).nan_to_num(1.0)

    wanted = math.acosh(gain) / float(steepness(energies[:, rank - 1 : rank]).amin())
    allowed = math.acosh(_LARGEST) / float(steepness(energies[:, :1]).amax())
    low, high = _DEGREES
    degree = max(low, min(high, math.ceil(wanted), int(allowed)))
    centre = half[..., None].float()
    before, now = x, w / centre - x
    for _ in range(degree - 1):
        before, now = now, (now @ gram).mul_(2 / centre).sub_(now, alpha=2).sub_(before)
    return now / torch.linalg.vector_norm(now, dim=2, keepdim=True)
