"""compress: mean, Helmert reduction, one-sided Jacobi, basis and coefficients, a group of positions per program.

Y, the centred vectors in a Helmert basis (see csrc/cpu/compress.cpp), has K = min(r, n−1) singular values and no guaranteed
zero. The vectors of its shorter side are the lines of a tile [C, M, B] of B positions: where Y is tall (r ≥ n−1) tasks,
whose lines Jacobi turns into u σ; where it is wide ranks, and the rotations, gathered in V, give u.

Numerics: fp32 throughout, no tensor cores, nothing fused but where tl.fma says so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ._jacobi import (
    DEFICIENT,
    EPSILON,
    LARGEST,
    MAX_SWEEPS,
    TINY,
    find_turn,
    inverse_root,
    needs_turn,
    scale_of,
    squared_times,
)
from ._launch import launch, require, require_floats, vector_width

# The largest tile of one matrix, K by the longer side, both rounded up to a power of two.
LARGEST_K = 64
LARGEST_TILE = 16384

# What is not worth a kernel of its own per value.
SIZES = [
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
    "coeff_task",
    "coeff_component",
    "coeff_position",
]


def supported(n: int, r: int, components: int) -> bool:
    """Whether the kernel takes n tasks' vectors of r ranks."""
    lines, length, chosen = _tile(n, r, components)
    return lines <= LARGEST_K and max(lines * length, chosen * triton.next_power_of_2(r)) <= LARGEST_TILE


def _tile(n: int, r: int, components: int) -> tuple[int, int, int]:
    """The shorter and the longer side of Y, and the components, as powers of two."""
    tasks = max(n - 1, 1)
    sides = min(r, tasks), max(r, tasks), max(components, 1)
    return tuple(triton.next_power_of_2(side) for side in sides)


def compress(x: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    require(x.ndim == 3 and x.shape[0] >= 1 and 0 <= components <= x.shape[2], "x [n >= 1, S, r], components from 0 to r")
    require_floats(x)
    n, positions, r = x.shape
    basis = reference.like_layout(x, components + 1)
    coeff = x.new_empty(n, components, positions)
    energy = x.new_empty(positions, min(r, n - 1), dtype=torch.float32)
    if positions == 0 or r == 0:
        return basis, coeff, energy.fill_(0)
    require(supported(n, r, components), f"min(r, n - 1) of at most {LARGEST_K}, tiles of at most {LARGEST_TILE} values")
    lines, length, chosen = _tile(n, r, components)
    tile = max(lines * length, chosen * triton.next_power_of_2(r))
    vector = vector_width(x)
    group = max(1, min(8, LARGEST_TILE // 2 // tile))
    launch(
        _compress_tile,
        (triton.cdiv(positions, group),),
        x,
        basis,
        coeff,
        energy,
        n,
        positions,
        r // vector,
        components,
        x.stride(0) // vector,
        x.stride(1) // vector,
        x.stride(2),
        *basis.stride(),
        *coeff.stride(),
        inverse_n=1.0 / n,
        spread=1.0 / (n**0.5 - 1.0) if n > 1 else 0.0,
        WIDE=r < n - 1,
        B=group,
        C=lines,
        M=length,
        P=chosen,
        VECTOR=vector,
        num_warps=max(1, min(16, group * tile // 1024)),
    )
    return basis, coeff, energy


@triton.jit
def line(tile, c, k):
    """Line k of each matrix of a tile [C, M, B]: [M, B]."""
    return tl.sum(tl.where(c[:, None, None] == k, tile, 0.0), 0)


@triton.jit
def jacobi(y, v, c, ROTATE_V: tl.constexpr):
    """Rotates the lines of y [C, M, B] until those of each matrix are orthogonal, of falling norm; v [C, ., B] with them.

    At step s of a sweep line c meets line c ^ s, so that in C − 1 steps all have met; both sides find the same rotation. A
    matrix that has converged is left as it is, so that its result does not depend on its neighbours. Returns y, v and the
    squared norms [C, B].
    """
    norms = tl.sum(y * y, 1)
    negligible: tl.constexpr = 0.7 * EPSILON * 0.7 * EPSILON  # pairs of lines both this short relative to the matrix
    floor = tl.sum(norms, 0) * negligible
    floor = (floor * floor)[None, :]
    sweep = 0
    active = 1
    while (sweep < MAX_SWEEPS) & (active > 0):
        swept = tl.zeros_like(norms).to(tl.int32)
        for step in range(1, c.shape[0]):
            partner = c ^ step
            upper = (c > partner)[:, None]
            partners = tl.gather(norms, tl.broadcast_to(partner[:, None], norms.shape), 0)
            other = tl.gather(y, tl.broadcast_to(partner[:, None, None], y.shape), 0)
            pq = tl.sum(y * other, 1)
            pp = tl.where(upper, partners, norms)
            qq = tl.where(upper, norms, partners)
            turned = needs_turn(pp, qq, pq, floor)
            swept |= turned.to(tl.int32)
            cosine, sine, longer, shorter = find_turn(pp, qq, pq, turned)
            sine = tl.where(upper, -sine, sine)
            norms = tl.where(upper, shorter, longer)
            rotated = tl.fma(cosine[:, None, :], y, sine[:, None, :] * other)
            y = tl.where(turned[:, None, :], rotated, y)
            if ROTATE_V:
                other_v = tl.gather(v, tl.broadcast_to(partner[:, None, None], v.shape), 0)
                rotated_v = tl.fma(cosine[:, None, :], v, sine[:, None, :] * other_v)
                v = tl.where(turned[:, None, :], rotated_v, v)
        norms = tl.sum(y * y, 1)
        active = tl.max(tl.max(swept, 1), 0)
        sweep += 1
    return y, v, norms


@triton.jit
def falling(values, c):
    """values [C, B] made to fall along C: each the least of those up to it."""
    earlier = c[None, :, None] <= c[:, None, None]
    return tl.min(tl.where(earlier, values[None, :, :], LARGEST), 1)


@triton.jit
def orthonormal(row, done, live, j, length):
    """row [J, B] rid of the orthonormal lines `done` [P, J, B] (zero where there is none yet), of norm 1.

    Where not `live` [B], what is left of the unit vector that sticks out most of them: by a margin, so that rounding does not
    decide.
    """
    column = j[:, None]
    left = tl.where(column < length, 1.0 - tl.sum(done * done, 0), -1.0)
    candidates = tl.where(left > tl.max(left, 0)[None, :] - 1e-3, column, length)
    unit = (column == tl.min(candidates, 0)[None, :]).to(tl.float32)
    row = tl.where(live[None, :], row, unit)
    for _ in tl.static_range(2):
        along = tl.sum(done * row[None, :, :], 1)
        row -= tl.sum(along[:, None, :] * done, 0)
        row *= inverse_root(tl.maximum(tl.sum(row * row, 0), TINY))[None, :]
    return row * (1.5 - 0.5 * tl.sum(row * row, 0))[None, :]


@triton.jit
def peak_sign(row, j):
    """±1 [B]: the sign of the entry of largest magnitude of row [J, B], the lowest index on ties."""
    magnitude = tl.abs(row)
    peak = tl.min(tl.where(magnitude == tl.max(magnitude, 0)[None, :], j[:, None], j.shape[0]), 0)
    value = tl.sum(tl.where(j[:, None] == peak[None, :], row, 0.0), 0)
    return tl.where(value < 0, -1.0, 1.0)


@triton.jit(do_not_specialize=SIZES)
def _compress_tile(
    x,
    basis,
    coeff,
    energy,
    n,
    positions,
    r,  # like x_task and x_position in units of VECTOR, so that the compiler sees what they are multiples of
    components,
    x_task,
    x_position,
    x_rank,
    basis_component,
    basis_position,
    basis_rank,
    coeff_task,
    coeff_component,
    coeff_position,
    inverse_n: tl.constexpr,
    spread: tl.constexpr,
    WIDE: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    VECTOR: tl.constexpr,
):
    r = r * VECTOR
    x_task = x_task.to(tl.int64) * VECTOR
    x_position = x_position.to(tl.int64) * VECTOR
    if VECTOR > 1:
        x_rank = 1
    s = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    c = tl.arange(0, C)
    m = tl.arange(0, M)
    valid = (s < positions)[None, :]
    k_all = tl.minimum(r, n - 1)

    # The tasks from the second on, [C, M, B], and the first one's vector, which lies along the ranks.
    at = (x + s * x_position)[None, :]
    over: tl.constexpr = 1 if WIDE else 0
    J: tl.constexpr = C if WIDE else M
    if WIDE:
        task = m[None, :, None]
        rank = c[:, None, None]
    else:
        task = c[:, None, None]
        rank = m[None, :, None]
    j = tl.arange(0, J)[:, None]
    first = tl.load(at + j.to(tl.int64) * x_rank, mask=valid & (j < r), other=0.0).to(tl.float32)
    there = (task < n - 1) & (rank < r)
    offsets = (task + 1) * x_task + rank.to(tl.int64) * x_rank
    rest = tl.load(at[None, :, :] + offsets, mask=valid[None, :, :] & there, other=0.0).to(tl.float32)

    good = tl.min(tl.min((tl.abs(rest) <= LARGEST).to(tl.int32), 1), 0)
    finite = tl.minimum(good, tl.min((tl.abs(first) <= LARGEST).to(tl.int32), 0)) > 0
    first = tl.where(finite[None, :], first, 0.0)
    rest = tl.where(finite[None, None, :], rest, 0.0)
    largest = tl.maximum(tl.max(tl.max(tl.abs(rest), 1), 0), tl.max(tl.abs(first), 0))
    up1, up2, down1, down2 = scale_of(largest)

    # The first task's vector goes first: exactly so where all share an offset, which then costs no accuracy, and equal
    # vectors become exactly zero. Then the mean goes twice: what the first one rounds off, the second takes.
    offset = first * up1[None, :] * up2[None, :]
    rest = rest * up1[None, None, :] * up2[None, None, :]
    rest = tl.where(there, rest - tl.expand_dims(offset, over), 0.0)
    mean = inverse_n * tl.sum(rest, over)
    first = -mean
    rest = tl.where(there, rest - tl.expand_dims(mean, over), 0.0)
    more = inverse_n * (first + tl.sum(rest, over))
    first -= more
    rest = tl.where(there, rest - tl.expand_dims(more, over), 0.0)
    mean = offset + (mean + more)

    # Helmert, and scaled again: what tells the tasks apart may be much smaller than what they share.
    y = tl.where(there, rest + spread * tl.expand_dims(first, over), 0.0)
    again1, again2, back1, back2 = scale_of(tl.max(tl.max(tl.abs(y), 1), 0))
    y = y * again1[None, None, :] * again2[None, None, :]

    if WIDE:
        v = tl.zeros([C, C, B], tl.float32) + (c[:, None, None] == c[None, :, None]).to(tl.float32)
        y, v, norms = jacobi(y, v, c, True)
        u = v
    else:
        y, u, norms = jacobi(y, y, c, False)
        u = y
    energies = squared_times(falling(norms, c), back1[None, :], back2[None, :])
    top = tl.sum(tl.where(c[:, None] == 0, norms, 0.0), 0)

    # u, one component after the other, lines of falling norm; and the coefficients, from x itself.
    nan = float("nan")
    inside = valid & (j < r)
    to_basis = basis + s[None, :] * basis_position + j.to(tl.int64) * basis_rank
    mean = tl.where(finite[None, :], mean * down2[None, :] * down1[None, :], nan)
    tl.store(to_basis, mean.to(basis.dtype.element_ty), mask=inside)
    to_coeff = coeff + s[None, :] * coeff_position
    done = tl.zeros([P, J, B], tl.float32)
    of_p = tl.arange(0, P)[:, None, None]
    for k in range(components):
        squared = tl.sum(tl.where(c[:, None] == k, norms, 0.0), 0)
        live = (squared > DEFICIENT * DEFICIENT * top) & (squared > TINY) & (k < k_all)
        row = line(u, c, k)
        if not WIDE:
            row *= inverse_root(tl.where(live, squared, 1.0))[None, :]
        row = orthonormal(row, done, live, tl.arange(0, J), r)
        done = tl.where(of_p == k, row[None, :, :], done)
        row = row * peak_sign(row.to(basis.dtype.element_ty).to(tl.float32), tl.arange(0, J))[None, :] + 0.0
        to_basis += basis_component
        tl.store(to_basis, tl.where(finite[None, :], row, nan).to(basis.dtype.element_ty), mask=inside)

        others = tl.sum(rest * tl.expand_dims(row, over), 1 - over)
        others = tl.where(live[None, :], others, 0.0)
        own = tl.where(live, tl.sum(first * row, 0), 0.0)[None, :]
        found = tl.sum(others * others, 0)[None, :] + own * own
        energies = tl.where((c[:, None] == k) & live[None, :], found, energies)
        own = tl.where(finite[None, :], own * down2[None, :] * down1[None, :], nan)
        others = tl.where(finite[None, :], others * down2[None, :] * down1[None, :], nan)
        i = 1 + (m if WIDE else c)[:, None]
        tl.store(to_coeff, own.to(coeff.dtype.element_ty), mask=valid)
        tl.store(to_coeff + i.to(tl.int64) * coeff_task, others.to(coeff.dtype.element_ty), mask=valid & (i < n))
        to_coeff += coeff_component

    energies = squared_times(falling(energies, c), down1[None, :], down2[None, :])
    energies = tl.where(finite[None, :], energies, nan)
    tl.store(energy + s[None, :] * k_all + c[:, None], energies, mask=valid & (c < k_all)[:, None])
