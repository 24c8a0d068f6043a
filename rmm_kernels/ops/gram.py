"""Batched Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library, reference
from . import _checks


def gram(x: Tensor, center: bool = False) -> Tensor:
    """Gram matrices xᵀx of a batch.

    Args:
        x: [B, m, k], fp32, fp16, bf16 or fp64, any strides.
        center: first subtract the mean column (over k) from every column, as RMM centres over tasks.

    Returns:
        [B, k, k], symmetric, fp32 (fp64 for fp64 input): sums are kept in that dtype and not rounded further.

    Raises:
        ValueError, TypeError: x has another rank or dtype.
    """
    _checks.tensor("x", x, "B m k")
    return torch.ops.rmm_kernels.gram(x, center)


def _fake(x: Tensor, center: bool = False) -> Tensor:
    batch, _, k = x.shape
    return x.new_empty(batch, k, k, dtype=reference.accumulator(x.dtype))


_library.register("gram", reference=reference.gram, fake=_fake)
