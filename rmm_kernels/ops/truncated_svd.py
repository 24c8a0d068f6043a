"""Truncated SVD of a batch of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library, reference
from ..triton_ops import _limits
from . import _checks, _large_svd

# Where a kernel that gives every matrix one lane beats one LAPACK call per matrix: measured at 16 × 64 × 64 (even) and below.
_FEWEST = 16
_LARGEST = 64


def truncated_svd(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets of every matrix, as `torch.linalg.svd` orders them.

    Batches of at least 16 matrices up to 64 on their shorter side go to this package's kernel, one-sided Jacobi with a matrix
    in every SIMD lane (Triton's takes a tile of up to 16384 values; CUDA's up to 128, a block each). Beyond 128, in fp32, fp16
    and bf16, a block Krylov method takes over where the rank is small (at most a quarter of the shorter side, less 8), else the
    Gram matrix and eigh in fp64; what either returns is checked (orthonormality and residuals to 5e-6, energy), and a matrix
    that fails goes on to the next method, in the end to torch.linalg.svd. That waits for a GPU to finish. All others go to
    torch.linalg.svd at once.

    Signs are deterministic: the component of largest magnitude of every left singular vector is positive, the lowest index
    on ties. A matrix that holds NaN or Inf gives NaN and leaves its neighbours alone: NaN in its S is the info flag.

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
    _checks.gpu_dtype("truncated_svd", "x", x)
    if min(x.shape[1:]) > _large_svd.SHORTEST and x.dtype != torch.float64:
        return torch.ops.rmm_kernels.large_svd(x, rank, True)
    backend = _library.runs_on("truncated_svd", x)
    largest = _large_svd.SHORTEST if backend == "cuda" else _LARGEST
    too_large = backend == "triton" and not _limits.truncated_svd_fits(*x.shape[1:])
    if x.shape[0] < _FEWEST or min(x.shape[1:]) > largest or too_large:
        return torch.ops.rmm_kernels.truncated_svd.reference(x, rank)
    return torch.ops.rmm_kernels.truncated_svd(x, rank)


def _fake(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, m, k = x.shape
    s = x.new_empty(batch, rank, dtype=reference.accumulator(x.dtype))
    return x.new_empty(batch, m, rank), s, x.new_empty(batch, rank, k)


_library.register("truncated_svd", reference=reference.truncated_svd, fake=_fake)
