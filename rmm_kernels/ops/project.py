"""Coefficients of tasks on an existing basis."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library, reference
from . import _checks


def project(x: Tensor, basis: Tensor) -> Tensor:
    """Coefficients c = Uᵀ (x − μ) of tasks, new ones too, on the basis that `compress` made (arXiv 2510.14163).

    Args:
        x: [n, S, r], fp32, fp16, bf16 or fp64, any strides: one r-vector per task and position.
        basis: [p+1, S, r], x's dtype; basis[0] is the mean μ, basis[1:] the orthonormal components U.

    Returns:
        coeff [n, p, S], x's dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
    """
    _checks.tensor("x", x, "n S r")
    _checks.tensor("basis", basis, "p+1 S r")
    _checks.same("basis", basis, "x", x)
    _checks.size("basis", basis, 1, x.shape[1], "x")
    _checks.size("basis", basis, 2, x.shape[2], "x")
    if basis.shape[0] == 0:
        raise ValueError("basis holds no component; basis[0] must be the mean")
    _checks.gpu_dtype("project", "x", x)
    return torch.ops.rmm_kernels.project(x, basis)


def _fake(x: Tensor, basis: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], basis.shape[0] - 1, x.shape[1])


_library.register("project", reference=reference.project, fake=_fake)
