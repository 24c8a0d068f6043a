"""Batched Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library, reference
from . import _checks

# Up to here a group's sums, k² vectors, stay in a core's second-level cache; and lanes are filled.
_FEWEST = 16
_LARGEST = 64


def gram(x: Tensor, center: bool = False) -> Tensor:
    """Gram matrices xᵀx of a batch.

    Batches of at least 16 matrices of up to 64 columns go to this package's kernel, a matrix in every SIMD lane; few or larger
    ones to torch.matmul.

    Args:
        x: [B, m, k], fp32, fp16, bf16 or fp64, any strides.
        center: first subtract the mean column (over k) from every column, as RMM centres over tasks.

    Returns:
        [B, k, k], symmetric, fp32 (fp64 for fp64 input): sums are kept in that dtype and not rounded further.

    Raises:
        ValueError, TypeError: x has another rank or dtype.
    """
    _checks.tensor("x", x, "B m k")
    _checks.gpu_dtype("gram", "x", x)
    if x.shape[0] < _FEWEST or x.shape[2] > _LARGEST:
        return torch.ops.rmm_kernels.gram.reference(x, center)
    return torch.ops.rmm_kernels.gram(x, center)


def _fake(x: Tensor, center: bool = False) -> Tensor:
    batch, _, k = x.shape
    return x.new_empty(batch, k, k, dtype=reference.accumulator(x.dtype))


_library.register("gram", reference=reference.gram, fake=_fake)
