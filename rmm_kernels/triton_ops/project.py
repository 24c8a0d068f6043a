"""project: a block of positions and of tasks per program; what it reads of x and of the basis it reads once.

Numerics: fp32 sums of fp32 products, no tensor cores, nothing fused.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, require, require_floats, vector_width

# Values of x that a program holds: 64 a thread of four warps.
_TILE = 8192
_MOST_POSITIONS = 64


def project(x: Tensor, basis: Tensor) -> Tensor:
    fits = x.ndim == 3 and basis.ndim == 3 and basis.shape[0] >= 1 and basis.shape[1:] == x.shape[1:]
    require(fits, "x [n, S, r] and basis [p+1, S, r]")
    require_floats(x, basis)
    n, positions, r = x.shape
    components = basis.shape[0] - 1
    coeff = x.new_empty(n, components, positions)
    if coeff.numel() == 0:
        return coeff
    ranks = triton.next_power_of_2(max(r, 1))
    block = max(1, min(_MOST_POSITIONS, _TILE // ranks, triton.next_power_of_2(positions)))
    tasks = max(1, min(_TILE // (ranks * block), triton.next_power_of_2(n)))
    vector = min(vector_width(x), vector_width(basis)) if r else 1
    launch(
        _project,
        (triton.cdiv(positions, block) * triton.cdiv(n, tasks),),
        x,
        basis,
        coeff,
        n,
        positions,
        r // vector,
        components,
        *(stride // vector for stride in x.stride()[:2]),
        x.stride(2),
        *(stride // vector for stride in basis.stride()[:2]),
        basis.stride(2),
        TASKS=tasks,
        R=ranks,
        S=block,
        VECTOR=vector,
        num_warps=max(1, min(4, tasks * ranks * block // 1024)),
    )
    return coeff


@triton.jit(
    do_not_specialize=[
        "n",
        "positions",
        "r",
        "components",
        "x_task",
        "x_position",
        "x_rank",
        "basis_component",
        "basis_position",
        "basis_rank",
    ]
)
def _project(
    x,
    basis,
    coeff,
    n,
    positions,
    r,  # like the strides but those of ranks in units of VECTOR, so that the compiler sees what they are multiples of
    components,
    x_task,
    x_position,
    x_rank,
    basis_component,
    basis_position,
    basis_rank,
    TASKS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    VECTOR: tl.constexpr,
):
    r = r * VECTOR
    x_task = x_task.to(tl.int64) * VECTOR
    x_position = x_position.to(tl.int64) * VECTOR
    basis_component = basis_component.to(tl.int64) * VECTOR
    basis_position = basis_position.to(tl.int64) * VECTOR
    if VECTOR > 1:
        x_rank = 1
        basis_rank = 1
    groups = tl.cdiv(n, TASKS)
    program = tl.program_id(0)
    i = (program % groups) * TASKS + tl.arange(0, TASKS)
    s = (program // groups).to(tl.int64) * S + tl.arange(0, S)
    j = tl.arange(0, R)
    here = (j < r)[:, None] & (s < positions)[None, :]
    offsets = i[:, None, None] * x_task + (j.to(tl.int64)[:, None] * x_rank + s[None, :] * x_position)[None, :, :]
    some = (i < n)[:, None, None] & here[None, :, :]
    vectors = tl.load(x + offsets, mask=some, other=0.0).to(tl.float32)
    component = basis + j.to(tl.int64)[:, None] * basis_rank + s[None, :] * basis_position
    vectors -= tl.load(component, mask=here, other=0.0).to(tl.float32)[None, :, :]
    to = coeff + i.to(tl.int64)[:, None] * components * positions + s[None, :]
    mask = (i < n)[:, None] & (s < positions)[None, :]
    for _ in range(components):
        component += basis_component
        direction = tl.load(component, mask=here, other=0.0).to(tl.float32)
        sums = tl.sum(vectors * direction[None, :, :], 1)
        tl.store(to, sums.to(coeff.dtype.element_ty), mask=mask)
        to += positions
