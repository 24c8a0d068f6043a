"""Truncated SVD of a batch of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library, reference
from ..triton_ops import _limits
from . import _checks, _large_svd

# Where the CPU kernel, which gives every matrix one lane, beats one LAPACK call per matrix, at rank a quarter of the shorter
# side and at all of it: measured at 1 to 16 matrices of 8 × 8 to 512 × 128. So small, whatever their number:
_SMALL = 32
# so many, up to _large_svd.SHORTEST:
_SEVERAL = 4

# Where GPU kernels are meant to: not measured.
_FEWEST_ON_GPU = 16
_LARGEST_IN_TRITON = 64


def truncated_svd(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets of every matrix, as `torch.linalg.svd` orders them.

    On the CPU matrices up to 32 on their shorter side, and at least 4 up to 128, go to this package's kernel, a matrix in every
    SIMD lane; on GPUs at least 16, up to 128 (CUDA, a block each from 65 on) or 64 and a tile of 16384 values (Triton). Beyond
    128, in fp32, fp16 and bf16, a block Krylov method takes over where the rank is small (a quarter of the side, less 8), else
    the Gram matrix and eigh in fp64; what either returns is checked (orthonormality and residuals to 5e-6, energy), and a
    matrix that fails goes on to the next method, in the end to torch.linalg.svd. That waits for a GPU to finish. All others go
    to torch.linalg.svd at once.

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
    if has_kernel_for(x):
        return torch.ops.rmm_kernels.truncated_svd(x, rank)
    return torch.ops.rmm_kernels.truncated_svd.reference(x, rank)


def has_kernel_for(x: Tensor) -> bool:
    """Whether `truncated_svd` gives x [B, m, k] to a kernel of this package."""
    batch, m, k = x.shape
    short = min(m, k)
    backend = _library.runs_on("truncated_svd", x)
    if backend == "triton":
        return batch >= _FEWEST_ON_GPU and short <= _LARGEST_IN_TRITON and _limits.truncated_svd_fits(m, k)
    if backend == "cuda":
        return batch >= _FEWEST_ON_GPU and short <= _large_svd.SHORTEST
    return backend == "cpu" and (short <= _SMALL or (batch >= _SEVERAL and short <= _large_svd.SHORTEST))


def _fake(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, m, k = x.shape
    s = x.new_empty(batch, rank, dtype=reference.accumulator(x.dtype))
    return x.new_empty(batch, m, rank), s, x.new_empty(batch, rank, k)


_library.register("truncated_svd", reference=reference.truncated_svd, fake=_fake)
