"""truncated_svd: one-sided Jacobi on the shorter side's vectors, a group of matrices per program.

Jacobi makes the lines of A [C, M], the vectors of the shorter side, orthogonal by rotations gathered in V. V, made
orthonormal once more, is the short side's vectors. V A is then formed from A itself, free of what rotations rounded on the
way: its lines' norms are σ, and its normalised lines the long side's vectors.

Numerics: fp32 throughout, no tensor cores, nothing fused but where tl.fma says so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import lora
from ._jacobi import LARGEST, TINY, inverse_root, jacobi, line, orthonormal, peak_sign, scale_of
from ._launch import launch, most_registers, require, require_floats, vector_width
from ._limits import LARGEST_K, LARGEST_TILE, power_of_two, truncated_svd_fits

# On 16 × 8 matrices in a single warp Triton 3.4's LLVM fails an assertion, which ends the process.
FEWEST_WARPS = 2 if triton.__version__.startswith("3.4.") else 1


def truncated_svd(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    require(x.ndim == 3 and 0 <= rank <= min(x.shape[1:]), "x [B, m, k] with rank up to min(m, k)")
    require_floats(x)
    batch, m, k = x.shape
    u = x.new_empty(batch, m, rank)
    s = x.new_empty(batch, rank, dtype=torch.float32)
    vh = x.new_empty(batch, rank, k)
    if batch == 0 or rank == 0:
        return u, s, vh
    require(truncated_svd_fits(m, k), f"min(m, k) of at most {LARGEST_K} and a tile of at most {LARGEST_TILE} values")
    lines, length = power_of_two(min(m, k)), power_of_two(max(m, k))
    group = max(1, min(8, LARGEST_TILE // 2 // (lines * length)))
    vector = vector_width(x)
    warps = max(FEWEST_WARPS, min(16, group * lines * length // 1024))
    tall = m >= k
    sizes = (m, k // vector) if tall else (k // vector, m)
    launch(
        _truncated_svd,
        (triton.cdiv(batch, group),),
        x,
        u,
        s,
        vh,
        batch,
        *sizes,
        rank,
        x.stride(0) // vector,
        x.stride(1) // vector,
        x.stride(2),
        TALL=tall,
        B=group,
        C=lines,
        M=length,
        P=power_of_two(rank),
        VECTOR=vector,
        num_warps=warps,
        maxnreg=most_registers(lora.arch(x.device), warps),
    )
    return u, s, vh


@triton.jit
def _store(to, tile, b, rows, i, columns, j, there):
    """tile [B, I, J] into a contiguous [batch, rows, columns]; its axes as memory has them, so that lanes go along it."""
    offsets = (b[:, None, None] * rows + i[None, :, None]) * columns + j[None, None, :]
    tl.store(to + offsets, tile, mask=there & (i < rows)[None, :, None] & (j < columns)[None, None, :])


@triton.jit(do_not_specialize=["batch", "long", "short", "rank", "x_matrix", "x_row", "x_column"])
def _truncated_svd(
    x,
    u,
    s,
    vh,
    batch,
    long,
    short,  # the columns, like x_matrix and x_row, in units of VECTOR
    rank,
    x_matrix,
    x_row,
    x_column,
    TALL: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    VECTOR: tl.constexpr,
):
    x_matrix = x_matrix.to(tl.int64) * VECTOR
    x_row = x_row.to(tl.int64) * VECTOR
    if VECTOR > 1:
        x_column = 1
    b = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    c = tl.arange(0, C)
    m = tl.arange(0, M)
    if TALL:
        short = short * VECTOR
        offsets = c.to(tl.int64)[:, None, None] * x_column + m.to(tl.int64)[None, :, None] * x_row
    else:
        long = long * VECTOR
        offsets = c.to(tl.int64)[:, None, None] * x_row + m.to(tl.int64)[None, :, None] * x_column
    there = (c < short)[:, None, None] & (m < long)[None, :, None] & (b < batch)[None, None, :]
    a = tl.load(x + (b * x_matrix)[None, None, :] + offsets, mask=there, other=0.0).to(tl.float32)

    finite = tl.min(tl.min((tl.abs(a) <= LARGEST).to(tl.int32), 1), 0) > 0
    a = tl.where(finite[None, None, :], a, 0.0)
    up1, up2, down1, down2 = scale_of(tl.max(tl.max(tl.abs(a), 1), 0))
    a = a * up1[None, None, :] * up2[None, None, :]
    v = tl.zeros([C, C, B], tl.float32) + (c[:, None, None] == c[None, :, None]).to(tl.float32)
    _, v, _ = jacobi(a, v, c, True)

    of_p = tl.arange(0, P)
    near = tl.zeros([P, C, B], tl.float32)
    far = tl.zeros([P, M, B], tl.float32)
    sigma = tl.zeros([P, B], tl.float32)
    least = tl.full([B], LARGEST, tl.float32)
    all_of_them = b >= 0
    for k in range(rank):
        short_row = orthonormal(line(v, c, k), near, all_of_them, c, short)
        long_row = tl.sum(short_row[:, None, :] * a, 0)
        square = tl.sum(long_row * long_row, 0)
        live = square > TINY
        inverse = tl.where(live, inverse_root(tl.where(live, square, 1.0)), 0.0)
        least = tl.minimum(least, square * inverse)  # equal ones may differ by a rounding
        long_row = orthonormal(long_row * inverse[None, :], far, live, m, long)
        if TALL:
            sign = peak_sign(long_row.to(u.dtype.element_ty).to(tl.float32), m)
        else:
            sign = peak_sign(short_row.to(u.dtype.element_ty).to(tl.float32), c)
        this = of_p[:, None, None] == k
        near = tl.where(this, (short_row * sign[None, :])[None, :, :] + 0.0, near)
        far = tl.where(this, (long_row * sign[None, :])[None, :, :] + 0.0, far)
        sigma = tl.where(of_p[:, None] == k, least[None, :], sigma)

    nan = float("nan")
    near = tl.where(finite[None, None, :], near, nan).to(u.dtype.element_ty)
    far = tl.where(finite[None, None, :], far, nan).to(u.dtype.element_ty)
    chosen = of_p < rank
    there = (b < batch)[:, None, None]
    if TALL:
        _store(u, tl.permute(far, (2, 1, 0)), b, long, m, rank, of_p, there)
        _store(vh, tl.permute(near, (2, 0, 1)), b, rank, of_p, short, c, there)
    else:
        _store(u, tl.permute(near, (2, 1, 0)), b, short, c, rank, of_p, there)
        _store(vh, tl.permute(far, (2, 0, 1)), b, rank, of_p, long, m, there)
    sigma = tl.where(finite[None, :], sigma * down2[None, :] * down1[None, :], nan)
    tl.store(s + b[None, :] * rank + of_p[:, None], sigma, mask=chosen[:, None] & (b < batch)[None, :])
