"""Block Krylov: the leading triplets of matrices of which only a few products with blocks are affordable.

The block Lanczos process of Golub and Underwood: K = [Q, (AAᵀ)Q, …, (AAᵀ)^q Q] from a seeded random block about as wide as the
rank, orthonormalised step by step, and Rayleigh–Ritz on it (Musco and Musco, arXiv 1504.05477).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import _triplets
from ._triplets import Triplets, cholesky, inverse, ritz, ritz_values, times, triplets

_ROWS = 8  # a block's come in such groups
_EXTRA = 1 / 8  # of the rank a block has more rows, about
_LEAST = 3  # powers q of AAᵀ that must fit
_LOOKS = (0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 16, 23, 32)  # powers at which it may end
_PASSES = 3  # of Gram–Schmidt, at most
_SEED = 0


def block_krylov(a: Tensor, size: Tensor, rank: int, residuals: bool) -> Iterator[tuple[Tensor, Triplets]]:
    """Of matrices a [B, m, d], m ≤ d, with squares `size` [B] of their norms.

    A block has no fewer rows than are sought: of a multiple σ it finds no more vectors than it has rows.

    Yields at every check (which of the matrices that are left have passed, their triplets); those that never do are left.
    """
    batch, m, d = a.shape
    width = _ROWS * max(math.ceil(rank / _ROWS), round((1 + _EXTRA) * rank / _ROWS))
    last = min(_LOOKS[-1], m // width - 1)
    if last < _LEAST:
        return
    start = torch.randn(width, d, generator=torch.Generator().manual_seed(_SEED)).to(a.device)
    q = _orthonormal(_orthonormal(times(start.expand(batch, width, d), a.mT), shift=True))
    space: list[Tensor] = []  # Q's blocks [b, width, m]
    image: list[Tensor] = []  # QA's [b, width, d]
    exact = torch.float64 if residuals else a.dtype  # single triplets of small σ need more digits
    gram = a.new_empty(batch, 0, 0, dtype=exact)  # QAAᵀQᵀ
    captured: list[Tensor] = []  # by the leading vectors, of ‖A‖² [b], at the last looks
    before = torch.full_like(size, math.inf)
    for power in range(last + 1):
        space.append(q)
        image.append(times(q, a))
        # AAᵀ takes a block no further than the next one: with those before the last two, its image's products are rounding.
        near = torch.cat(image if residuals else image[-2:], 1)
        products = image[-1].to(exact) @ near.to(exact).mT
        gram = torch.nn.functional.pad(gram, (0, width, 0, width))
        gram[:, -width:, -near.shape[1] :], gram[:, -near.shape[1] :, -width:] = products, products.mT
        if power in _LOOKS or power == last:
            captured = [*captured[-2:], ritz_values(gram, size)[:, :rank].sum(1)]
            if power == last or bool(_settled(captured, size).any()):
                energies, vectors = ritz(gram, 2 * width, size)  # what leads beyond a block is there, too
                turn = _orthonormal(vectors[:, :rank].double()).to(a.dtype)  # eigh in fp32 leaves them off by 1e-5
                found = triplets(turn @ torch.cat(space, 1), turn @ torch.cat(image, 1))
                good, lost = _triplets.passed(a, found, size, energies[:, -1], residuals)
                yield good, found[good]
                left = ~good
                if not bool((left & (residuals | (lost < before / 2))).any()):  # what no longer falls is for another method
                    return
                before = lost
                if not bool(left.all()):
                    a, size, gram, before = (part[left] for part in (a, size, gram, before))
                    space, image, captured = ([part[left] for part in parts] for parts in (space, image, captured))
        if power < last:
            basis = torch.cat(space, 1)
            known = gram[:, -width:, -2 * width :].to(a.dtype) @ basis[:, -2 * width :]
            q = _next_block(times(image[-1], a.mT).sub_(known), basis)


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

    CholeskyQR, then Gram–Schmidt and CholeskyQR until they take little: a pass is off by rounding times the condition of w, in
    which what AAᵀ leaves of an exhausted block is rounding to begin with.
    """
    w = _orthonormal(w, shift=True)
    for _ in range(_PASSES):
        w = w - (w @ basis.mT) @ basis
        lower = cholesky(w.double(), shift=False)
        w = inverse(lower).to(w.dtype) @ w
        if bool((lower.diagonal(dim1=1, dim2=2) > 0.5).all()):
            break
    return w


def _orthonormal(w: Tensor, shift: bool = False) -> Tensor:
    return inverse(cholesky(w.double(), shift)).to(w.dtype) @ w
