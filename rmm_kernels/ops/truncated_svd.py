"""Truncated SVD of a batch of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library, reference
from . import _checks


def truncated_svd(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets of every matrix, as `torch.linalg.svd` orders them.

    One-sided Jacobi in the precision of x (fp32 for fp16 and bf16). Signs are deterministic: the component of largest
    magnitude of every left singular vector is positive, the lowest index on ties. A matrix that holds NaN or Inf gives NaN
    and leaves its neighbours alone.

    Args:
        x: [B, m, k], fp32, fp16, bf16 or fp64, any strides.
        rank: 0 to min(m, k).

    Returns:
        U [B, m, rank] and Vh [B, rank, k] in x's dtype, S [B, rank] falling, fp32 (fp64 for fp64 input).

    Raises:
        ValueError, TypeError: x has another rank or dtype, or `rank` is out of range.
    """
    _checks.tensor("x", x, "B m k")
    _checks.within("rank", rank, 0, min(x.shape[1:]), "up to min(m, k)")
    return torch.ops.rmm_kernels.truncated_svd(x, rank)


def _fake(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, m, k = x.shape
    s = x.new_empty(batch, rank, dtype=reference.accumulator(x.dtype))
    return x.new_empty(batch, m, rank), s, x.new_empty(batch, rank, k)


_library.register("truncated_svd", reference=reference.truncated_svd, fake=_fake)
