"""Reversible Model Merging's basis and coefficients, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library, reference
from ..triton_ops import _limits
from . import _checks


def compress(x: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, leading principal directions and coefficients of every position's n task vectors (arXiv 2510.14163).

    At each position s, with X = x[:, s].T [r, n] and μ its mean column, U [r, p] are the leading left singular vectors of
    X − μ and C = Uᵀ(X − μ); then x[i, s] ≈ basis[0, s] + Σ_k coeff[i, k, s] · basis[k + 1, s], exactly (up to rounding) from
    p = min(r, n − 1) on.

    Hard inputs: U is orthonormal at any rank of X, completed deterministically where X − μ has less than p (σ_j ≤ 1e-6 σ_1;
    1e-14 in fp64), with coefficients 0 there. A position whose vectors are all equal gets U = I[:, :p]. A position that holds
    NaN or Inf gives NaN in all it returns and leaves the others bit for bit alone: NaN in its energy (with one task, in its
    mean) is the info flag, which no finite position has and which costs no synchronisation. In each component the entry of
    largest magnitude is positive, the lowest index on ties. Results depend neither on the place in the batch nor on the number
    of threads.

    On a GPU, CUDA's kernels take min(r, n − 1) up to 256 and any n, if 16 tasks' vectors fit a block's shared memory (r up to
    2000 or so); Triton's min(r, n − 1) up to 64 and sizes whose product (r or p by r, each rounded up to a power of two) is up
    to 16384, where beside 514 tasks or more one rank and two count as four. What is larger goes to torch.linalg.svd.

    Args:
        x: [n, S, r], fp32, fp16, bf16 or fp64, any strides; n ≥ 1. Sums are kept in fp32 (fp64 for fp64).
        components: p, 0 to r.

    Returns:
        basis [p+1, S, r], x's dtype, in x's memory layout: positions innermost where they are in x.
        coeff [n, p, S], x's dtype.
        energy [S, K], K = min(r, n − 1): squared singular values, falling, in units of x squared; fp32 (fp64 for fp64), so
        that it overflows to Inf beyond 1.8e19 in fp32 inputs.

    Raises:
        ValueError, TypeError: x has another rank or dtype or no task, or `components` is out of range.
    """
    _checks.tensor("x", x, "n S r")
    if x.shape[0] == 0:
        raise ValueError("x holds no task; n must be at least 1")
    _checks.within("components", components, 0, x.shape[2], "up to r")
    _checks.gpu_dtype("compress", "x", x)
    if _library.runs_on("compress", x) == "triton" and not _limits.compress_fits(x.shape[0], x.shape[2], components):
        return torch.ops.rmm_kernels.compress.reference(x, components)
    return torch.ops.rmm_kernels.compress(x, components)


def _fake(x: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    n, positions, r = x.shape
    coeff = x.new_empty(n, components, positions)
    energy = x.new_empty(positions, min(r, n - 1), dtype=reference.accumulator(x.dtype))
    return reference.like_layout(x, components + 1), coeff, energy


_library.register("compress", reference=reference.compress, fake=_fake)
