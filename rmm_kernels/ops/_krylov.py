"""Block Krylov: the leading triplets of matrices of which only a few products with blocks are affordable.

The block Lanczos process of Golub and Underwood: K = [Q, (AAᵀ)Q, …, (AAᵀ)^q Q] from a seeded random block a little wider than
the rank, orthonormalised step by step, and Rayleigh–Ritz on it (Musco and Musco, arXiv 1504.05477).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import _triplets
from ._triplets import Triplets, cholesky, inverse, orthonormalise, ritz, ritz_values, triplets

_EXTRA = 8  # columns of a block beyond the rank
_NARROWEST = 32  # a product with a narrower block takes hardly less time
_ROOM = 7  # blocks that must fit for them to be wider than they need be
_LEAST = 3  # powers q of AAᵀ that must fit
_LOOKS = (0, 1, 2, 3, 4, 5, 6, 8, 11, 16)  # powers at which it may end
_SEED = 0


def block_krylov(a: Tensor, size: Tensor, rank: int, residuals: bool) -> Iterator[tuple[Tensor, Triplets]]:
    """Of matrices a [B, m, d], m ≤ d, with squares `size` [B] of their norms.

    Yields at every check (which of the matrices that are left have passed, their triplets); those that never do are left.
    """
    batch, m, d = a.shape
    width = math.ceil((rank + _EXTRA) / _EXTRA) * _EXTRA
    if width < _NARROWEST <= m // _ROOM:
        width = _NARROWEST
    last = min(_LOOKS[-1], m // width - 1)
    if last < _LEAST:
        return
    start = torch.randn(width, d, generator=torch.Generator().manual_seed(_SEED)).to(a.device)
    q, _ = orthonormalise(start @ a.mT)
    most = width * (last + 1)
    space, image = a.new_empty(batch, most, m), a.new_empty(batch, most, d)  # Qᵀ, QᵀA
    exact = torch.float64 if residuals else a.dtype  # single triplets of small σ need more digits
    gram = a.new_empty(batch, most, most, dtype=exact)  # QᵀAAᵀQ
    captured: list[Tensor] = []  # by the leading vectors, of ‖A‖² [b], at the last looks
    before = torch.full_like(size, math.inf)
    for power in range(last + 1):
        known, wide = width * power, width * (power + 1)
        space[:, known:wide] = q
        torch.bmm(q, a, out=image[:, known:wide])
        products = image[:, known:wide].to(exact) @ image[:, :wide].to(exact).mT
        gram[:, known:wide, :wide], gram[:, :wide, known:wide] = products, products.mT
        if power in _LOOKS or power == last:
            captured = [*captured[-2:], ritz_values(gram[:, :wide, :wide], size)[:, :rank].sum(1)]
            if power == last or bool(_settled(captured, size).any()):
                energies, vectors = ritz(gram[:, :wide, :wide], 2 * width, size)  # what leads beyond a block is there, too
                turn = _orthonormal(vectors[:, :rank].double()).to(a.dtype)  # eigh in fp32 leaves them off by 1e-5
                found = triplets(turn @ space[:, :wide], turn @ image[:, :wide])
                good, lost = _triplets.passed(a, found, size, energies[:, -1], residuals)
                yield good, found[good]
                left = ~good
                if not bool((left & (residuals | (lost < before / 2))).any()):  # what no longer falls is for another method
                    return
                before = lost
                if not bool(left.all()):
                    a, size, gram, space, image, before = (part[left] for part in (a, size, gram, space, image, before))
                    captured = [part[left] for part in captured]
        if power < last:
            basis = space[:, :wide]
            w = image[:, known:wide] @ a.mT
            q = _next_block(w.sub_(gram[:, known:wide, :wide].to(a.dtype) @ basis), basis)


def _settled(captured: list[Tensor], size: Tensor) -> Tensor:
    """Whether the guards are worth asking, [b]: what is captured hardly grows any more, or won't by Aitken's Δ²."""
    if len(captured) < 3:
        return torch.zeros_like(size, dtype=torch.bool)
    first, second, third = captured
    gained = (third - second).clamp(min=0)
    lost = gained * (gained / (second - first - gained).clamp(min=1e-300)).clamp(max=1)
    return (gained <= 1e-6 * third) | (_triplets.above_least(lost, size, third) <= 3 * _triplets.EXCESS * size.sqrt())


def _next_block(w: Tensor, basis: Tensor) -> Tensor:
    """Rows w [b, k, m], from which their parts along the rows of `basis` were taken, made orthonormal, also to `basis`.

    CholeskyQR, then Gram–Schmidt and CholeskyQR again: the first pass is off by rounding times the condition of w.
    """
    w = _orthonormal(w, shift=True)
    return _orthonormal(w - (w @ basis.mT) @ basis)


def _orthonormal(w: Tensor, shift: bool = False) -> Tensor:
    return inverse(cholesky(w.double(), shift)).to(w.dtype) @ w
