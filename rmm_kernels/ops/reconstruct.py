"""Factors of chosen tasks from basis and coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library, reference
from . import _checks


def reconstruct(basis: Tensor, coeff: Tensor, task_ids: Tensor) -> Tensor:
    """x̂_i = μ + Σ_k c_{i,k} ⊙ U_k for the tasks in `task_ids` (arXiv 2510.14163).

    Args:
        basis: [p+1, S, r], fp32, fp16, bf16 or fp64, any strides; basis[0] is the mean.
        coeff: [n, p, S], basis's dtype.
        task_ids: [a], int32 or int64, each 0 to n − 1; repeats are allowed.

    Returns:
        [a, S, r], basis's dtype, in its memory layout. Sums are kept in fp32 (fp64 for fp64) and rounded once.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
        RuntimeError: an id is out of range (CPU; on a GPU, where looking for it would need a host sync, that task comes out as
            NaN).
    """
    _checks.tensor("basis", basis, "p+1 S r")
    _checks.tensor("coeff", coeff, "n p S")
    _checks.same("coeff", coeff, "basis", basis)
    _checks.components("basis", basis, "coeff", coeff)
    _checks.size("coeff", coeff, 2, basis.shape[1], "basis")
    _checks.tensor("task_ids", task_ids, "a", _checks.IDS)
    _checks.same("task_ids", task_ids, "basis", basis, dtype=False)
    _checks.gpu_dtype("reconstruct", "basis", basis)
    return torch.ops.rmm_kernels.reconstruct(basis, coeff, task_ids)


def _fake(basis: Tensor, coeff: Tensor, task_ids: Tensor) -> Tensor:
    return reference.like_layout(basis, task_ids.shape[0])


_library.register("reconstruct", reference=reference.reconstruct, fake=_fake)
