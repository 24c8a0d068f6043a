"""Second half of the mixed-task LoRA forward: rank to outputs, added in place."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library, reference
from . import _checks


def lora_expand_(y: Tensor, u: Tensor, basis_b: Tensor, coeff_b: Tensor, task_ids: Tensor, scaling: Tensor) -> Tensor:
    """y_t += scaling_i Σ_k coeff_b[i, k] ⊙ (basis_b[k] u_t), i = task_ids[t], the coefficient of the mean being 1.

    Args:
        y: [T, out], fp32, fp16, bf16 or fp64, any strides (a slice of a fused projection, say); written in place. Rows
            whose id is −1 keep every bit.
        u: [T, r], fp32 (fp64 where y is fp64), any strides.
        basis_b: [p+1, out, r], y's dtype, any strides. Fastest with `out` innermost.
        coeff_b: [n, p, out], y's dtype.
        task_ids: [T], int32 or int64, −1 to n − 1.
        scaling: [n], fp32 (fp64 where y is fp64).

    Returns:
        y.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
        RuntimeError: an id is out of range, before anything is written (CPU; on a GPU such a row is treated as −1).
    """
    check(y, basis_b, coeff_b, task_ids, scaling)
    _checks.tensor("u", u, "T r")
    _checks.accumulated("u", u, "y", y)
    _checks.size("u", u, 0, y.shape[0], "y")
    _checks.size("u", u, 1, basis_b.shape[2], "basis_b")
    torch.ops.rmm_kernels.lora_expand_(y, u, basis_b, coeff_b, task_ids, scaling)
    return y


def check(y: Tensor, basis_b: Tensor, coeff_b: Tensor, task_ids: Tensor, scaling: Tensor) -> None:
    _checks.tensor("y", y, "T out")
    _checks.gpu_dtype("lora_expand_", "y", y)
    _checks.output(y)
    _checks.shared_basis("b", basis_b, coeff_b)
    _checks.same("basis_b", basis_b, "y", y)
    _checks.size("basis_b", basis_b, 1, y.shape[1], "y")
    _checks.ids(task_ids, y.shape[0], "y", y)
    _checks.tensor("scaling", scaling, "n")
    _checks.accumulated("scaling", scaling, "y", y)
    _checks.size("scaling", scaling, 0, coeff_b.shape[0], "coeff_b")


def _fake(y: Tensor, u: Tensor, basis_b: Tensor, coeff_b: Tensor, task_ids: Tensor, scaling: Tensor) -> None:
    return None


_library.register("lora_expand_", reference=reference.lora_expand_, fake=_fake)
