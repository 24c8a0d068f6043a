"""lora_expand_: y_t += scaling_i Σ_k c_k ⊙ (basis_b[k] u_t).

A program owns a tile of y, which it reads and writes once: u [T, r] against basis [d, r], tensor cores with fp32 sums. u may
come in spans [splits, T, r] as shrink leaves it; they are added in order.

Numerics: u's rows are rounded once to y's dtype for the product, in fp16 after an exact scaling by a power of two, since u may
be beyond fp16; a rebuilt factor is formed in fp32 and rounded once; coefficients and scaling are applied in fp32, and y is
rounded once. fp32 products are IEEE on AMD, three of TF32 on NVIDIA (lora.precision); fused multiply-adds are allowed. Rows
without a task are neither read nor written; a tile that has no other ends at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import lora
from ._launch import launch, require, require_floats
from .lora import Config, tasks_of


@triton.jit
def powers_of_two(u):
    """Powers of two (up, 1 / up) for each row of u [T, r] fp32, up bringing its largest value into 1 … 2.

    Within what both can be: a row of zeros or subnormals gets the largest up, NaN and Inf stay what they are.
    """
    exponent = (tl.max(tl.abs(u), 1).to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True), (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["tokens", "n"])
def expand_kernel(
    y,
    u,
    basis,
    coeff,
    ids,
    scaling,
    tokens,
    n,
    width,
    y_t,
    y_d,
    u_s,
    u_t,
    u_r,
    basis_k,
    basis_d,
    basis_r,
    coeff_n,
    coeff_k,
    coeff_d,
    ids_t,
    scaling_n,
    P: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(width, BLOCK_D)
    t = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    active, task, lowest, highest = tasks_of(ids, ids_t, t, tokens, n)
    if highest < 0:
        return
    inside = d < width
    taken = active[:, None] & inside[None, :]
    at = y + t[:, None] * y_t + d[None, :] * y_d
    if not ADAPTIVE:  # early, as there are few programs to hide its latency
        before = tl.load(at, mask=taken, other=0)
    delta = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for part in tl.static_range((R + BLOCK_R - 1) // BLOCK_R):
        r = part * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        # Ranks outermost: so compiled, the loads of u are as wide as its own type allows.
        given = u + t[None, :] * u_t + r[:, None] * u_r
        total = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
        for split in tl.range(0, SPLITS, loop_unroll_factor=8 if SPLITS >= 8 else SPLITS):
            total += tl.load(given + tl.cast(split, tl.int64) * u_s, mask=(r < R)[:, None] & active[None, :], other=0)
        total = tl.trans(total)
        if y.dtype.element_ty == tl.float16:
            up, down = powers_of_two(total)
            total *= up[:, None]
        rounded = total.to(y.dtype.element_ty)
        factor = basis + d[:, None] * basis_d + r[None, :] * basis_r
        inner = inside[:, None] & (r < R)[None, :]
        if ADAPTIVE and lowest == highest:
            own = coeff + highest * coeff_n + d * coeff_d
            rebuilt = tl.load(factor, mask=inner, other=0).to(tl.float32)
            for k in tl.static_range(P):
                c = tl.load(own + k * coeff_k, mask=inside, other=0).to(tl.float32)
                component = tl.load(factor + (k + 1) * basis_k, mask=inner, other=0)
                rebuilt += c[:, None] * component.to(tl.float32)
            sums = tl.dot(rounded, tl.trans(rebuilt.to(rounded.dtype)), input_precision=PRECISION)
        else:
            weights = coeff + task[:, None] * coeff_n + d[None, :] * coeff_d
            sums = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
            for k in tl.range(0, P + 1, num_stages=STAGES):
                component = tl.load(factor + tl.cast(k, tl.int64) * basis_k, mask=inner, other=0)
                product = tl.dot(rounded, tl.trans(component), input_precision=PRECISION)
                if P > 0:
                    reads_c = d < tl.where(k == 0, 0, width)
                    at_c = weights + tl.cast(k - 1, tl.int64) * coeff_k
                    # 1 where there is none: a select after the load, without which fp32's c lies in shared memory unswizzled.
                    c = tl.load(at_c, mask=active[:, None] & reads_c[None, :], other=1.0)
                    product *= c.to(tl.float32)
                sums += product
        if y.dtype.element_ty == tl.float16:
            sums *= down[:, None]
        delta += sums
    scale = tl.load(scaling + task * scaling_n, mask=active, other=0)
    if ADAPTIVE:
        before = tl.load(at, mask=taken, other=0)
    tl.store(at, (before.to(tl.float32) + scale[:, None] * delta).to(y.dtype.element_ty), mask=taken)


def lora_expand_(
    y: Tensor,
    u: Tensor,
    basis_b: Tensor,
    coeff_b: Tensor,
    task_ids: Tensor,
    scaling: Tensor,
    config: Config | None = None,
) -> None:
    """See `rmm_kernels.lora_expand_`. `config` replaces the table's launch parameters."""
    check(y, basis_b, coeff_b, task_ids, scaling)
    require(u.dtype == scaling.dtype and u.shape == (y.shape[0], basis_b.shape[2]), "u [T, r], float32")
    expand(y, u[None], basis_b, coeff_b, task_ids, scaling, config or configure(y, basis_b))


def check(y: Tensor, basis_b: Tensor, coeff_b: Tensor, task_ids: Tensor, scaling: Tensor) -> None:
    require_floats(y, basis_b, coeff_b)
    require(
        (y.ndim, basis_b.ndim, coeff_b.ndim, task_ids.ndim) == (2, 3, 3, 1)
        and basis_b.shape[0] == coeff_b.shape[1] + 1
        and basis_b.shape[1] == coeff_b.shape[2] == y.shape[1]
        and task_ids.shape[0] == y.shape[0]
        and scaling.shape == coeff_b.shape[:1],
        "y [T, out], basis_b [p+1, out, r], coeff_b [n, p, out], task_ids [T], scaling [n]",
    )
    require(scaling.dtype.is_floating_point and scaling.element_size() == 4, "scaling, float32")


def configure(y: Tensor, basis_b: Tensor) -> Config:
    components, width, r = basis_b.shape
    return lora.configure("expand", lora.arch(y.device), r, components - 1, y.shape[0], width, y.element_size())


def expand(
    y: Tensor,
    partial: Tensor,
    basis_b: Tensor,
    coeff_b: Tensor,
    task_ids: Tensor,
    scaling: Tensor,
    config: Config,
) -> None:
    """As `lora_expand_`, of u in spans [splits, T, r]."""
    tokens, width = y.shape
    components, _, r = basis_b.shape
    launch(
        expand_kernel,
        (triton.cdiv(tokens, config.block_t) * triton.cdiv(width, config.block_d),),
        y,
        partial,
        basis_b,
        coeff_b,
        task_ids,
        scaling,
        tokens,
        coeff_b.shape[0],
        width,
        *y.stride(),
        *partial.stride(),
        *basis_b.stride(),
        *coeff_b.stride(),
        *task_ids.stride(),
        *scaling.stride(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        fp_fusion=True,
        P=components - 1,
        R=r,
        SPLITS=len(partial),
        BLOCK_T=config.block_t,
        BLOCK_D=config.block_d,
        BLOCK_R=config.block_r,
        STAGES=config.num_stages,
        ADAPTIVE=config.adaptive,
        PRECISION=lora.precision(y.device),
    )
