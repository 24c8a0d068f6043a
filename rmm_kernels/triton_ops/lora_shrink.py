"""lora_shrink: u_t = Σ_k basis_a[k] (c_k ⊙ x_t).

A program owns a tile of tokens and a span of positions: x [T, d] against basis [r, d], tensor cores with fp32 sums. Spans'
sums go to a workspace [splits, T, r] and are added in order by whoever reads it, so nothing is atomic and every bit repeats.

Numerics: x ⊙ c and a rebuilt factor are formed in fp32 and rounded once to x's dtype; fp32 products are IEEE on AMD, three of
TF32 on NVIDIA (lora.precision); fused multiply-adds are allowed. Rows without a task are never read, and neither are x's and
coeff's in a tile that has no other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import lora
from ._launch import launch, require, require_floats
from .lora import Config, tasks_of


@triton.jit(do_not_specialize=["tokens", "n"])
def shrink_kernel(
    x,
    basis,
    coeff,
    ids,
    out,
    tokens,
    n,
    width,
    span,
    x_t,
    x_d,
    basis_k,
    basis_r,
    basis_d,
    coeff_n,
    coeff_k,
    coeff_d,
    ids_t,
    P: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    ZERO: tl.constexpr,
):
    """out[split] [T, r]; rows without a task are 0 where ZERO, else left alone."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    active, task, lowest, highest = tasks_of(ids, ids_t, t, tokens, n)
    begin = tl.program_id(1) * span
    end = tl.where(highest < 0, begin, tl.minimum(begin + span, width))
    rows = x + t[:, None] * x_t
    factor = basis + r[:, None].to(tl.int64) * basis_r
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    if ADAPTIVE and lowest == highest:
        own = coeff + highest * coeff_n
        for start in tl.range(begin, end, BLOCK_D, num_stages=STAGES):
            d = start + tl.arange(0, BLOCK_D).to(tl.int64)
            inside = d < end
            part = (r < R)[:, None] & inside[None, :]
            tile = tl.load(rows + d[None, :] * x_d, mask=active[:, None] & inside[None, :], other=0)
            rebuilt = tl.load(factor + d[None, :] * basis_d, mask=part, other=0).to(tl.float32)
            for k in tl.static_range(P):
                c = tl.load(own + k * coeff_k + d * coeff_d, mask=inside, other=0).to(tl.float32)
                component = tl.load(factor + (k + 1) * basis_k + d[None, :] * basis_d, mask=part, other=0)
                rebuilt += c[None, :] * component.to(tl.float32)
            acc = tl.dot(tile, tl.trans(rebuilt.to(tile.dtype)), acc, input_precision=PRECISION)
    else:
        # One loop over positions and components, so that all its loads are in flight: x is read with component 0 and kept.
        weights = coeff + task[:, None] * coeff_n
        kept = tl.zeros((BLOCK_T, BLOCK_D), x.dtype.element_ty)
        for i in tl.range(0, tl.cdiv(end - begin, BLOCK_D) * (P + 1), num_stages=STAGES):
            k = i % (P + 1)
            d = begin + i // (P + 1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
            reads_x = d < tl.where(k == 0, end, begin)
            fresh = tl.load(rows + d[None, :] * x_d, mask=active[:, None] & reads_x[None, :], other=0)
            kept = tl.where(k == 0, fresh, kept)
            scaled = kept
            if P > 0:
                reads_c = d < tl.where(k == 0, begin, end)
                c = tl.load(
                    weights + tl.cast(k - 1, tl.int64) * coeff_k + d[None, :] * coeff_d,
                    mask=active[:, None] & reads_c[None, :],
                    other=0,
                )
                scaled = tl.where(k == 0, kept, (kept.to(tl.float32) * c.to(tl.float32)).to(kept.dtype))
            component = tl.load(
                factor + tl.cast(k, tl.int64) * basis_k + d[None, :] * basis_d,
                mask=(r < R)[:, None] & (d < end)[None, :],
                other=0,
            )
            acc = tl.dot(scaled, tl.trans(component), acc, input_precision=PRECISION)
    written = t < tokens if ZERO else active
    to = out + (tl.program_id(1).to(tl.int64) * tokens + t[:, None]) * R + r[None, :]
    tl.store(to, acc, mask=written[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["tokens", "n"])
def sum_kernel(
    partial,
    ids,
    out,
    tokens,
    n,
    splits,
    ids_t,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ZERO: tl.constexpr,
):
    """out [T, r] = the splits of partial [splits, T, r], added in order."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    active, _task, _lowest, highest = tasks_of(ids, ids_t, t, tokens, n)
    at = t[:, None] * R + r[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for split in tl.range(0, tl.where(highest < 0, 0, splits), loop_unroll_factor=8):
        total += tl.load(partial + tl.cast(split, tl.int64) * tokens * R + at, mask=active[:, None] & (r < R)[None, :], other=0)
    written = t < tokens if ZERO else active
    tl.store(out + at, total, mask=written[:, None] & (r < R)[None, :])


def lora_shrink(x: Tensor, basis_a: Tensor, coeff_a: Tensor, task_ids: Tensor, config: Config | None = None) -> Tensor:
    """u [T, r] fp32; see `rmm_kernels.lora_shrink`. `config` replaces the table's launch parameters."""
    check(x, basis_a, coeff_a, task_ids)
    config = config or configure(x, basis_a)
    partial = shrink(x, basis_a, coeff_a, task_ids, config, zero=True)
    return partial[0] if len(partial) == 1 else add(partial, task_ids, coeff_a.shape[0], zero=True)


def check(x: Tensor, basis_a: Tensor, coeff_a: Tensor, task_ids: Tensor) -> None:
    require_floats(x, basis_a, coeff_a)
    require(
        (x.ndim, basis_a.ndim, coeff_a.ndim, task_ids.ndim) == (2, 3, 3, 1)
        and basis_a.shape[0] == coeff_a.shape[1] + 1
        and basis_a.shape[2] == coeff_a.shape[2] == x.shape[1]
        and task_ids.shape[0] == x.shape[0]
        and task_ids.dtype in (torch.int32, torch.int64),
        "x [T, in], basis_a [p+1, r, in], coeff_a [n, p, in], task_ids [T] of int32 or int64",
    )


def configure(x: Tensor, basis_a: Tensor) -> Config:
    components, r, width = basis_a.shape
    return lora.configure("shrink", lora.arch(x.device), r, components - 1, x.shape[0], width, x.element_size())


def splits(config: Config, tokens: int, r: int, width: int) -> int:
    """Into how many spans the positions are cut: enough programs, each at least a tile wide."""
    programs = triton.cdiv(tokens, config.block_t) * triton.cdiv(r, config.block_r)
    blocks = triton.cdiv(width, config.block_d)
    per_split = triton.cdiv(blocks, max(1, min(blocks, config.programs // max(1, programs))))
    return max(1, triton.cdiv(blocks, max(1, per_split)))


def shrink(x: Tensor, basis_a: Tensor, coeff_a: Tensor, task_ids: Tensor, config: Config, zero: bool) -> Tensor:
    """The spans' sums [splits, T, r] fp32, to be added in order; rows without a task are 0, or anything unless `zero`."""
    tokens, width = x.shape
    components, r, _ = basis_a.shape
    count = splits(config, tokens, r, width)
    span = triton.cdiv(triton.cdiv(width, count), config.block_d) * config.block_d
    partial = x.new_empty(count, tokens, r, dtype=torch.float32)
    launch(
        shrink_kernel,
        (triton.cdiv(tokens, config.block_t), count, triton.cdiv(r, config.block_r)),
        x,
        basis_a,
        coeff_a,
        task_ids,
        partial,
        tokens,
        coeff_a.shape[0],
        width,
        span,
        *x.stride(),
        *basis_a.stride(),
        *coeff_a.stride(),
        *task_ids.stride(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        fp_fusion=True,
        P=components - 1,
        R=r,
        BLOCK_T=config.block_t,
        BLOCK_D=config.block_d,
        BLOCK_R=config.block_r,
        STAGES=config.num_stages,
        ADAPTIVE=config.adaptive,
        PRECISION=lora.precision(x.device),
        ZERO=zero and count == 1,
    )
    return partial


def add(partial: Tensor, task_ids: Tensor, n: int, zero: bool) -> Tensor:
    """u [T, r] from `shrink`'s spans; rows without a task are 0, or anything unless `zero`."""
    count, tokens, r = partial.shape
    u = partial.new_empty(tokens, r)
    block_r = min(64, triton.next_power_of_2(max(1, r)))
    block_t = 512 // block_r
    launch(
        sum_kernel,
        (triton.cdiv(tokens, block_t), triton.cdiv(r, block_r)),
        partial,
        task_ids,
        u,
        tokens,
        n,
        count,
        *task_ids.stride(),
        fp_fusion=True,
        R=r,
        BLOCK_T=block_t,
        BLOCK_R=block_r,
        ZERO=zero,
    )
    return u
