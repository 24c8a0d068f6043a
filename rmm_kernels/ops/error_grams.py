"""What a basis and coefficients lose of the factors they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library, reference
from . import _checks


def error_grams(x: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    """eᵀe, eᵀx̂ and x̂ᵀx̂ of every task, summed over positions, where x̂ is what `reconstruct` makes of it and e = x − x̂.

    From those of both factors of a LoRA module follow ‖ΔW − ΔŴ‖ and ‖ΔW‖ without ΔW: B A − B̂ Â = E_B A + B̂ E_A. Neither e nor
    x̂ is written to memory.

    Args:
        x: [n, S, r], fp32, fp16, bf16 or fp64, any strides: the factors as they were.
        basis: [p+1, S, r], of a dtype of its own, to which x̂ is rounded; basis[0] is the mean.
        coeff: [n, p, S], basis's dtype: of the same n tasks.

    Returns:
        [3, n, r, r], fp64. Where x and basis are not fp64, products and short sums are of fp32, so that squares of weights
        beyond its range, 1e-38 to 3e38, are lost.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
    """
    _checks.tensor("x", x, "n S r")
    _checks.tensor("basis", basis, "p+1 S r")
    _checks.tensor("coeff", coeff, "n p S")
    _checks.same("basis", basis, "x", x, dtype=False)
    _checks.same("coeff", coeff, "basis", basis)
    _checks.components("basis", basis, "coeff", coeff)
    for axis in (1, 2):
        _checks.size("basis", basis, axis, x.shape[axis], "x")
    _checks.size("coeff", coeff, 0, x.shape[0], "x")
    _checks.size("coeff", coeff, 2, x.shape[1], "x")
    if (x.dtype == torch.float64) != (basis.dtype == torch.float64):
        return torch.ops.rmm_kernels.error_grams.reference(x, basis, coeff)
    return torch.ops.rmm_kernels.error_grams(x, basis, coeff)


def _fake(x: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    n, _, r = x.shape
    return x.new_empty(3, n, r, r, dtype=torch.float64)


_library.register("error_grams", reference=reference.error_grams, fake=_fake)
