"""gram: up to 64 columns, several matrices per program; more, a pair of blocks of columns per program, each pair once.

Numerics: fp16 and bf16 as they are multiply on tensor cores, exactly, into fp32 sums. fp32, whatever is centred, and up to 16
columns, which no tensor core would speed up, take fp32 multiply-adds (input_precision "ieee", never TF32).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, require, require_floats, vector_width

_COLUMNS = 64  # of a block
_ROWS = 32  # of a step
_TILE = 1024  # values of a step


def gram(x: Tensor, center: bool = False) -> Tensor:
    require(x.ndim == 3, "x [B, m, k]")
    require_floats(x)
    batch, m, k = x.shape
    out = x.new_empty(batch, k, k, dtype=torch.float32)
    if out.numel() == 0:
        return out
    if m == 0:
        return out.fill_(0)
    columns = max(16, min(_COLUMNS, triton.next_power_of_2(k)))
    rows = max(16, min(_ROWS, triton.next_power_of_2(m)))
    blocks = triton.cdiv(k, columns)
    group = max(1, min(8, _TILE // (rows * columns), triton.next_power_of_2(batch))) if blocks == 1 else 1
    # 64-bit loads are enough for short rows, and spread them over lanes so that banks don't conflict.
    vector = min(vector_width(x), 4) if columns == 16 else vector_width(x)
    launch(
        _gram,
        (triton.cdiv(batch, group) * blocks * blocks,),
        x,
        out,
        batch,
        m,
        k // vector,
        blocks,
        x.stride(0) // vector,
        x.stride(1) // vector,
        x.stride(2),
        CENTER=center,
        EXACT=center or x.dtype == torch.float32 or columns == 16,
        WHOLE=blocks == 1,
        G=group,
        M=rows,
        K=columns,
        VECTOR=vector,
        num_warps=4 if group * columns >= 64 else 2,
    )
    return out


@triton.jit
def _block(
    row, first, x_column, m_mask, k, inverse_k, CENTER: tl.constexpr, EXACT: tl.constexpr, WHOLE: tl.constexpr, K: tl.constexpr
):
    """Columns from `first` on of some rows (pointers [G, M, 1]): [G, M, K], centred over all k columns where that is asked."""
    column = first + tl.arange(0, K)
    mask = m_mask & (column < k)[None, None, :]
    tile = tl.load(row + column.to(tl.int64)[None, None, :] * x_column, mask=mask, other=0.0)
    if EXACT:
        tile = tile.to(tl.float32)
    if CENTER and WHOLE:
        # The first column goes first: exactly so where all columns share an offset.
        offset = tl.expand_dims(tl.sum(tl.where((column == 0)[None, None, :], tile, 0.0), 2), 2)
        tile = tl.where(mask, tile - offset, 0.0)
        mean = tl.expand_dims(tl.sum(tile, 2), 2) * inverse_k
        tile = tl.where(mask, tile - mean, 0.0)
    elif CENTER:
        offset = tl.load(row, mask=m_mask, other=0.0).to(tl.float32)
        total = tl.zeros_like(offset)
        for start in range(0, k, K):
            other = start + tl.arange(0, K)
            there = m_mask & (other < k)[None, None, :]
            values = tl.load(row + other.to(tl.int64)[None, None, :] * x_column, mask=there, other=0.0).to(tl.float32)
            total += tl.expand_dims(tl.sum(tl.where(there, values - offset, 0.0), 2), 2)
        tile = tl.where(mask, tile - offset - total * inverse_k, 0.0)
    return tile


@triton.jit
def _store(out, tile, b, top, left, k, there, K: tl.constexpr):
    """tile [G, K, K] to rows from `top` and columns from `left` on of out [batch, k, k]."""
    p = top + tl.arange(0, K)[None, :, None]
    q = left + tl.arange(0, K)[None, None, :]
    offsets = b[:, None, None] * k * k + p.to(tl.int64) * k + q
    tl.store(out + offsets, tile, mask=there[:, None, None] & (p < k) & (q < k))


@triton.jit(do_not_specialize=["batch", "m", "k", "blocks", "x_matrix", "x_row", "x_column"])
def _gram(
    x,
    out,
    batch,
    m,
    k,  # like x_matrix and x_row in units of VECTOR, so that the compiler sees what they are multiples of
    blocks,
    x_matrix,
    x_row,
    x_column,
    CENTER: tl.constexpr,
    EXACT: tl.constexpr,
    WHOLE: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    VECTOR: tl.constexpr,
):
    k = k * VECTOR
    x_matrix = x_matrix.to(tl.int64) * VECTOR
    x_row = x_row.to(tl.int64) * VECTOR
    if VECTOR > 1:
        x_column = 1
    program = tl.program_id(0)
    pair = program % (blocks * blocks)
    left = (pair // blocks) * K
    right = (pair % blocks) * K
    if left <= right:
        b = (program // (blocks * blocks)).to(tl.int64) * G + tl.arange(0, G)
        inverse_k = 1.0 / k.to(tl.float32)
        sums = tl.zeros([G, K, K], tl.float32)
        for start in range(0, m, M):
            i = start + tl.arange(0, M)
            m_mask = (b < batch)[:, None, None] & (i < m)[None, :, None]
            row = x + b[:, None, None] * x_matrix + i.to(tl.int64)[None, :, None] * x_row
            one = _block(row, left, x_column, m_mask, k, inverse_k, CENTER, EXACT, WHOLE, K)
            other = one
            if left != right:
                other = _block(row, right, x_column, m_mask, k, inverse_k, CENTER, EXACT, WHOLE, K)
            sums = tl.dot(tl.permute(one, (0, 2, 1)), other, sums, input_precision="ieee")
        _store(out, sums, b, left, right, k, b < batch, K)
        if left != right:
            _store(out, tl.permute(sums, (0, 2, 1)), b, right, left, k, b < batch, K)
