"""The mixed-task LoRA forward, straight from basis and coefficients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library, reference
from . import _checks, lora_expand, lora_shrink


def lora_forward_(
    y: Tensor,
    x: Tensor,
    basis_a: Tensor,
    coeff_a: Tensor,
    basis_b: Tensor,
    coeff_b: Tensor,
    task_ids: Tensor,
    scaling: Tensor,
) -> Tensor:
    """y_t += scaling_i · B_i (A_i x_t) for tokens of many tasks at once, i = task_ids[t]: shrink and expand in one op.

    Args:
        y: [T, out], fp32, fp16, bf16 or fp64, any strides; written in place. Rows whose id is −1 keep every bit.
        x: [T, in], y's dtype, any strides.
        basis_a, coeff_a: [p+1, r, in] and [n, p, in], y's dtype; component 0 is the mean, with coefficient 1.
        basis_b, coeff_b: [q+1, out, r] and [n, q, out], y's dtype.
        task_ids: [T], int32 or int64, −1 to n − 1.
        scaling: [n], fp32 (fp64 where y is fp64).

    Returns:
        y.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
        RuntimeError: an id is out of range, before anything is written (CPU; on a GPU such a row is treated as −1).
    """
    _check(y, x, basis_a, coeff_a, basis_b, coeff_b, task_ids, scaling)
    torch.ops.rmm_kernels.lora_forward_(y, x, basis_a, coeff_a, basis_b, coeff_b, task_ids, scaling)
    return y


def lora_forward(
    y: Tensor,
    x: Tensor,
    basis_a: Tensor,
    coeff_a: Tensor,
    basis_b: Tensor,
    coeff_b: Tensor,
    task_ids: Tensor,
    scaling: Tensor,
) -> Tensor:
    """As `lora_forward_`, but returns a new tensor and leaves y alone; with gradients for x and y.

    Basis, coefficients and scaling are constants here: one that requires a gradient is refused.
    """
    _check(y, x, basis_a, coeff_a, basis_b, coeff_b, task_ids, scaling)
    constants = {"basis_a": basis_a, "coeff_a": coeff_a, "basis_b": basis_b, "coeff_b": coeff_b, "scaling": scaling}
    if torch.is_grad_enabled():
        for name, value in constants.items():
            if value.requires_grad:
                raise ValueError(f"{name} requires a gradient; lora_forward has gradients for x and y only")
    return torch.ops.rmm_kernels.lora_forward(y, x, basis_a, coeff_a, basis_b, coeff_b, task_ids, scaling)


def _check(
    y: Tensor,
    x: Tensor,
    basis_a: Tensor,
    coeff_a: Tensor,
    basis_b: Tensor,
    coeff_b: Tensor,
    task_ids: Tensor,
    scaling: Tensor,
) -> None:
    if not torch.compiler.is_compiling() and _fit(y, x, basis_a, coeff_a, basis_b, coeff_b, task_ids, scaling):
        return
    lora_shrink.check(x, basis_a, coeff_a, task_ids)
    lora_expand.check(y, basis_b, coeff_b, task_ids, scaling)
    _checks.same("x", x, "y", y)
    _checks.size("x", x, 0, y.shape[0], "y")
    _checks.size("coeff_a", coeff_a, 0, coeff_b.shape[0], "coeff_b")
    _checks.size("basis_a", basis_a, 1, basis_b.shape[2], "basis_b")


def _fit(
    y: Tensor,
    x: Tensor,
    basis_a: Tensor,
    coeff_a: Tensor,
    basis_b: Tensor,
    coeff_b: Tensor,
    task_ids: Tensor,
    scaling: Tensor,
) -> bool:
    """Whether everything is as it should be, at a third of what finding out what is not costs: for one token, that shows."""
    try:
        tokens, out = y.shape
        n, q, _ = coeff_b.shape
        p, r, wide = basis_a.shape
        dtype, device = y.dtype, y.device
        return (
            x.shape == (tokens, wide)
            and coeff_a.shape == (n, p - 1, wide)
            and basis_b.shape == (q + 1, out, r)
            and coeff_b.shape == (n, q, out)
            and task_ids.shape == (tokens,)
            and scaling.shape == (n,)
            and dtype in _checks.FLOATS
            and dtype != torch.float64  # which not every device takes
            and dtype == x.dtype == basis_a.dtype == coeff_a.dtype == basis_b.dtype == coeff_b.dtype
            and scaling.dtype == reference.accumulator(dtype)
            and task_ids.dtype in _checks.IDS
            and device == x.device == basis_a.device == coeff_a.device == basis_b.device == coeff_b.device
            and device == task_ids.device == scaling.device
            and 0 not in y.stride()
        )
    except (AttributeError, TypeError, ValueError):  # not tensors, or of other numbers of axes
        return False


def _fake_(y: Tensor, x: Tensor, *rest: Tensor) -> None:
    return None


def _fake(y: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx_t = A_iᵀ B_iᵀ scaling_i dy_t: the same two ops on the transposed factors."""
    basis_a, coeff_a, basis_b, coeff_b, task_ids, scaling = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[1]:
        u = torch.ops.rmm_kernels.lora_shrink(grad, basis_b.mT, coeff_b, task_ids)
        grad_x = grad.new_zeros(grad.shape[0], basis_a.shape[2])
        torch.ops.rmm_kernels.lora_expand_(grad_x, u, basis_a.mT, coeff_a, task_ids, scaling)
    return (grad if ctx.needs_input_grad[0] else None, grad_x, None, None, None, None, None, None)


_library.register("lora_forward_", reference=reference.lora_forward_, fake=_fake_)
_library.register(
    "lora_forward", reference=reference.lora_forward, fake=_fake, backward=_backward, setup_context=_setup_context
)
