"""reconstruct: a block of positions and of asked-for tasks per program; the basis is read once per block.

Numerics: fp32 fused multiply-adds in the order of the components, rounded once, no tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ._launch import launch, require, require_floats, vector_width

# Values of the result that a program holds: 64 a thread of four warps.
_TILE = 8192
_MOST_POSITIONS = 64


def reconstruct(basis: Tensor, coeff: Tensor, task_ids: Tensor) -> Tensor:
    fits = basis.ndim == 3 and coeff.ndim == 3 and task_ids.ndim == 1 and task_ids.dtype in (torch.int32, torch.int64)
    fits = fits and basis.shape[0] == coeff.shape[1] + 1 and basis.shape[1] == coeff.shape[2]
    require(fits, "basis [p+1, S, r], coeff [n, p, S], task_ids [a] of int32 or int64")
    require_floats(basis, coeff)
    require(task_ids.device == basis.device, "task_ids on the device of basis")
    _, positions, r = basis.shape
    out = reference.like_layout(basis, len(task_ids))
    if out.numel() == 0:
        return out
    ranks = triton.next_power_of_2(r)
    block = max(1, min(_MOST_POSITIONS, _TILE // ranks, triton.next_power_of_2(positions)))
    tasks = max(1, min(_TILE // (ranks * block), triton.next_power_of_2(len(task_ids))))
    vector = vector_width(basis)
    launch(
        _reconstruct,
        (triton.cdiv(positions, block) * triton.cdiv(len(task_ids), tasks),),
        basis,
        coeff,
        task_ids,
        out,
        len(task_ids),
        coeff.shape[0],
        coeff.shape[1],
        positions,
        r // vector,
        *(stride // vector for stride in basis.stride()[:2]),
        basis.stride(2),
        *coeff.stride(),
        task_ids.stride(0),
        *(stride // vector for stride in out.stride()[:2]),
        out.stride(2),
        TASKS=tasks,
        R=ranks,
        S=block,
        VECTOR=vector,
        num_warps=max(1, min(4, tasks * ranks * block // 1024)),
    )
    return out


@triton.jit(
    do_not_specialize=[
        "count",
        "n",
        "components",
        "positions",
        "r",
        "basis_component",
        "basis_position",
        "basis_rank",
        "coeff_task",
        "coeff_component",
        "coeff_position",
        "ids_step",
        "out_task",
        "out_position",
        "out_rank",
    ]
)
def _reconstruct(
    basis,
    coeff,
    task_ids,
    out,
    count,
    n,
    components,
    positions,
    r,  # like the strides of basis and out but those of ranks in units of VECTOR
    basis_component,
    basis_position,
    basis_rank,
    coeff_task,
    coeff_component,
    coeff_position,
    ids_step,
    out_task,
    out_position,
    out_rank,
    TASKS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    VECTOR: tl.constexpr,
):
    r = r * VECTOR
    basis_component = basis_component.to(tl.int64) * VECTOR
    basis_position = basis_position.to(tl.int64) * VECTOR
    out_task = out_task.to(tl.int64) * VECTOR
    out_position = out_position.to(tl.int64) * VECTOR
    if VECTOR > 1:
        basis_rank = 1
        out_rank = 1
    groups = tl.cdiv(count, TASKS)
    program = tl.program_id(0)
    a = (program % groups) * TASKS + tl.arange(0, TASKS)
    s = (program // groups).to(tl.int64) * S + tl.arange(0, S)
    j = tl.arange(0, R).to(tl.int64)
    asked = a < count
    task = tl.load(task_ids + a.to(tl.int64) * ids_step, mask=asked, other=0).to(tl.int64)
    known = (task >= 0) & (task < n)
    here = (j < r)[:, None] & (s < positions)[None, :]
    component = basis + j[:, None] * basis_rank + s[None, :] * basis_position
    factors = tl.zeros([TASKS, R, S], tl.float32) + tl.load(component, mask=here, other=0.0).to(tl.float32)[None, :, :]
    share = coeff + task[:, None] * coeff_task + s[None, :] * coeff_position
    mask = (asked & known)[:, None] & (s < positions)[None, :]
    for _ in range(components):
        component += basis_component
        direction = tl.load(component, mask=here, other=0.0).to(tl.float32)
        chosen = tl.load(share, mask=mask, other=0.0).to(tl.float32)
        chosen = tl.broadcast_to(chosen[:, None, :], factors.shape)
        factors = tl.fma(chosen, tl.broadcast_to(direction[None, :, :], factors.shape), factors)
        share += coeff_component
    factors = tl.where(known[:, None, None], factors, float("nan"))
    to = out + a[:, None, None] * out_task + (j[:, None] * out_rank + s[None, :] * out_position)[None, :, :]
    tl.store(to, factors.to(out.dtype.element_ty), mask=asked[:, None, None] & here[None, :, :])
