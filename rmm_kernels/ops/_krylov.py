"""Block Krylov: the leading triplets of matrices of which only a few products with blocks are affordable.

The block Lanczos process of Golub and Underwood: K = [Q, (AAᵀ)Q, …, (AAᵀ)^q Q] from a seeded random block a little wider than
the rank, orthonormalised step by step, and Rayleigh–Ritz on it (Musco and Musco, arXiv 1504.05477).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ._triplets import EXCESS, Triplets, cholesky, converged, excess, orthonormal, orthonormalise, ritz, triplets

_EXTRA = 8  # columns of a block beyond the rank
_CHECKS = (3, 5, 6, 8, 11, 16)  # powers q of AAᵀ at which the guards are asked
_SEED = 0


def block_krylov(a: Tensor, size: Tensor, rank: int, residuals: bool) -> Iterator[tuple[Tensor, Triplets]]:
    """Of matrices a [B, m, d], m ≤ d, with squares `size` [B] of their norms.

    Yields at every check (which of the matrices that are left have passed, their triplets); those that never do are left.
    """
    width = math.ceil((rank + _EXTRA) / _EXTRA) * _EXTRA
    batch, m, d = a.shape
    checks = [power for power in _CHECKS if width * (power + 1) <= m]
    if not checks:
        return
    start = torch.randn(width, d, generator=torch.Generator().manual_seed(_SEED)).to(a.device)
    q, _ = orthonormalise(start @ a.mT)
    most = width * (checks[-1] + 1)
    space, image = a.new_empty(batch, most, m), a.new_empty(batch, most, d)  # Qᵀ, QᵀA
    gram = a.new_empty(batch, most, most, dtype=torch.float64 if residuals else a.dtype)  # QᵀAAᵀQ
    for power in range(checks[-1] + 1):
        known, wide = width * power, width * (power + 1)
        space[:, known:wide], image[:, known:wide] = q, q @ a
        w = image[:, known:wide] @ a.mT
        products = w @ space[:, :wide].mT
        w -= products @ space[:, :wide]  # the part of AAᵀQ that Q lacks
        if residuals:  # single triplets of small σ need more digits than w has
            products = image[:, known:wide].double() @ image[:, :wide].double().mT
        gram[:, known:wide, :wide], gram[:, :wide, known:wide] = products, products.mT
        if power in checks:
            energies, vectors = ritz(gram[:, :wide, :wide], 2 * width)  # what leads beyond a block is in the space, too
            turn, sought = vectors[:, :rank].to(a.dtype), energies[:, :rank]
            off = torch.linalg.vector_norm(turn[..., known:] @ w, dim=2).double()  # ‖AAᵀu − θu‖
            good = excess(sought, off, size, energies[:, -1]) <= EXCESS * size.sqrt()
            if bool(good.any()):
                found = triplets(turn @ space[:, :wide], turn @ image[:, :wide])
                good &= orthonormal(found)
                if residuals:
                    good &= converged(a, found)
                yield good, found[good]
                if bool(good.all()):
                    return
                if bool(good.any()):
                    a, size, gram, space, image, w = (part[~good] for part in (a, size, gram, space, image, w))
        if power < checks[-1]:
            q = _next_block(w, space[:, :wide])


def _next_block(w: Tensor, basis: Tensor) -> Tensor:
    """Rows w [b, k, m], from which their parts along the rows of `basis` were taken, made orthonormal, also to `basis`.

    CholeskyQR, then Gram–Schmidt and CholeskyQR again: the first pass is off by rounding times the condition of w.
    """
    w = _orthonormal(w, shift=True)
    return _orthonormal(w - (w @ basis.mT) @ basis, shift=False)


def _orthonormal(w: Tensor, shift: bool) -> Tensor:
    lower = cholesky(w.double(), shift)
    one = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, one, upper=False).to(w.dtype) @ w
