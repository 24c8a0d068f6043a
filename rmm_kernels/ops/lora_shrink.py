"""First half of the mixed-task LoRA forward: tokens to rank."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library, reference
from . import _checks


def lora_shrink(x: Tensor, basis_a: Tensor, coeff_a: Tensor, task_ids: Tensor) -> Tensor:
    """u_t = Σ_k basis_a[k] (coeff_a[i, k] ⊙ x_t), i = task_ids[t], the coefficient of the mean basis_a[0] being 1.

    Args:
        x: [T, in], fp32, fp16, bf16 or fp64, any strides.
        basis_a: [p+1, r, in], x's dtype, any strides. Fastest with `in` innermost, as PEFT keeps lora_A.
        coeff_a: [n, p, in], x's dtype.
        task_ids: [T], int32 or int64, −1 to n − 1; a row of −1 gives a zero row.

    Returns:
        u [T, r], fp32 (fp64 for fp64).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
        RuntimeError: an id is out of range (CPU; on a GPU such a row is treated as −1).
    """
    check(x, basis_a, coeff_a, task_ids)
    return torch.ops.rmm_kernels.lora_shrink(x, basis_a, coeff_a, task_ids)


def check(x: Tensor, basis_a: Tensor, coeff_a: Tensor, task_ids: Tensor) -> None:
    _checks.tensor("x", x, "T in")
    _checks.gpu_dtype("lora_shrink", "x", x)
    _checks.shared_basis("a", basis_a, coeff_a)
    _checks.same("basis_a", basis_a, "x", x)
    _checks.size("basis_a", basis_a, 2, x.shape[1], "x")
    _checks.ids(task_ids, x.shape[0], "x", x)


def _fake(x: Tensor, basis_a: Tensor, coeff_a: Tensor, task_ids: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], basis_a.shape[1], dtype=reference.accumulator(x.dtype))


_library.register("lora_shrink", reference=reference.lora_shrink, fake=_fake)
