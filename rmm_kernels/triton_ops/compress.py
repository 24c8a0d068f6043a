"""compress: mean, Helmert reduction, one-sided Jacobi, basis and coefficients, a group of positions per program.

Y, the centred vectors in a Helmert basis (see csrc/cpu/compress.cpp), has K = min(r, n−1) singular values and no guaranteed
zero. The vectors of its shorter side are the lines of a tile [C, M, B] of B positions: where Y is tall (r ≥ n−1) tasks,
whose lines Jacobi turns into u σ; where it is wide ranks, and the rotations, gathered in V, give u. A tall Y of up to 8
columns takes a kernel of its own, everything in registers (_columns.py): a position per lane (8 tasks of 16 ranks, say), or
per 2, 4 or 8 of them. There the coefficients come from Y = QR, Yᵀu = Rᵀ(Qᵀu), by the inverse of the Helmert reduction.

Numerics: fp32 throughout, no tensor cores, nothing fused but where tl.fma says so.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from . import lora
from ._columns import (
    centred_columns,
    flat,
    head,
    householder,
    in_lanes,
    jacobi_columns,
    orthonormal_columns,
    padded,
    peak_sign_of_columns,
    pieces,
    reflected,
    total,
)
from ._jacobi import (
    DEFICIENT,
    LARGEST,
    TINY,
    falling,
    inverse_root,
    jacobi,
    line,
    orthonormal,
    peak_sign,
    scale_of,
    squared_times,
)
from ._launch import launch, most_registers, require, require_floats, vector_width
from ._limits import LARGEST_K, LARGEST_TILE, compress_fits, compress_tile, power_of_two

# Numbers of a matrix that a lane's registers hold: reflectors and triangle while it turns, reflectors and directions after; and
# what is left where loads don't come in fours, each number then having an address and, in shared matrices, a mask.
_ROOM, _LITTLE_ROOM = (161, 140), (90, 90)
_OLD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)

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


def compress(x: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    require(x.ndim == 3 and x.shape[0] >= 1 and 0 <= components <= x.shape[2], "x [n >= 1, S, r], components from 0 to r")
    require_floats(x)
    n, positions, r = x.shape
    basis = reference.like_layout(x, components + 1)
    coeff = x.new_empty(n, components, positions)
    energy = x.new_empty(positions, min(r, n - 1), dtype=torch.float32)
    if positions == 0 or r == 0:
        return basis, coeff, energy.fill_(0)
    require(compress_fits(n, r, components), f"min(r, n - 1) of at most {LARGEST_K}, tiles of at most {LARGEST_TILE} values")
    vector = vector_width(x)
    arguments = (
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
        basis.stride(0) // vector,
        basis.stride(1) // vector,
        basis.stride(2),
        *coeff.stride(),
    )
    lines, length = compress_tile(n, r)
    chosen = power_of_two(components)
    constants: dict[str, Any] = {
        "inverse_n": 1.0 / n,
        "spread": 1.0 / (n**0.5 - 1.0) if n > 1 else 0.0,
        "C": lines,
        "M": length,
        "VECTOR": vector,
        "RANKS_TOGETHER": basis.stride(2) == 1,
    }
    arch = lora.arch(x.device)
    fours = vector >= 4  # loads come in fours
    # Of what has one lane, sm_100's compiler (it packs pairs of numbers) and Triton before 3.9 spill more than others.
    alone = _ROOM if fours or not (_OLD or arch.startswith("sm_10")) else _LITTLE_ROOM
    shared_by = _lanes_of_a_matrix(n - 1, r, components, alone, _ROOM if fours else _LITTLE_ROOM)
    lanes = 64 if arch.startswith("gfx") else 32
    together = 32 // x.element_size()  # positions whose values fill a sector
    if shared_by:
        block = lanes // shared_by
        warps = max(1, together // block)
        launch(
            _compress_columns,
            (triton.cdiv(positions, warps * block),),
            *arguments,
            **{**constants, "C": max(lines, shared_by)},
            inverse_root_n=n**-0.5,
            TASKS=power_of_two(n),
            W=warps,
            G=shared_by,
            B=block,
            K=n - 1,
            COUNT=min(components, n - 1),
            num_warps=warps,
            maxnreg=most_registers(arch, warps),
        )
        return basis, coeff, energy
    wide = r < n - 1
    tasks, ranks = (length, lines) if wide else (lines, length)
    tile = max(lines * length, chosen * ranks)
    group, parts = max(1, min(together, _room(r, wide, fours, together, arch) // tile)), 1
    waiting = chosen * tasks * together  # coefficients of full sectors
    if group < together and (not wide or (r > 8 and max(tile, waiting) <= LARGEST_TILE // 2)):
        group = max(1, LARGEST_TILE // 4 // tile)
        parts = max(1, min(together, LARGEST_TILE * together // 2 // waiting) // group)
    warps = _warps(group * tile, fours, wide)
    launch(
        _compress_tile,
        (triton.cdiv(positions, group * parts),),
        *arguments,
        **constants,
        WIDE=wide,
        B=group,
        PARTS=parts,
        P=chosen,
        COPIES=max(1, lanes * warps // (ranks * group)),
        num_warps=warps,
        maxnreg=most_registers(arch, warps),
    )
    return basis, coeff, energy


def _lanes_of_a_matrix(columns: int, r: int, components: int, alone: tuple[int, int], shared: tuple[int, int]) -> int:
    """The fewest lanes that hold a matrix of so many columns in registers; 0 where none do (tests/test_triton_aot.py).

    `alone` and `shared` are the room in a lane that has a matrix for itself, and in one that does not.
    """
    if not 1 <= columns <= min(r, 8):
        return 0
    for lanes in (1, 2, 4, 8):
        turning, turned = alone if lanes == 1 else shared
        reflectors, rows = columns * power_of_two(r) // lanes, -(-columns // lanes)
        if reflectors + columns * rows <= turning and reflectors + rows * min(components, columns) <= turned:
            return lanes
    return 0


def _room(r: int, wide: bool, fours: bool, together: int, arch: str) -> int:
    """Values that a program's tiles may hold, all positions together, without spills (tests/test_triton_aot.py)."""
    if wide and 2 < r <= (16 if fours else 8):
        return LARGEST_TILE
    more = wide and 8 < r <= 16 and (together == 8 or not arch.startswith(("sm_10", "sm_12")))
    return LARGEST_TILE // 2 if more else LARGEST_TILE // 4


def _warps(values: int, fours: bool, wide: bool) -> int:
    """For tiles of so many values: as few as hold them in registers (tests/test_triton_aot.py looks for spills)."""
    return 4 if values <= 1024 or (wide and fours and not _OLD and values <= 4096) else 8


@triton.jit
def _centred(first, rest, there, inverse_n, spread, over: tl.constexpr):
    """The first task's vector [J, B] and the others' [C, M, B], tasks along axis `over`, centred and in the Helmert basis.

    Returns first and rest, scaled and centred, the scaled mean, Y, scaled again; which positions are finite, and both scales'
    factors back. What is not `there`, and what is not finite, is 0.
    """
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
    return first, rest, mean, y, finite, down1, down2, back1, back2


@triton.jit(do_not_specialize=SIZES)
def _compress_columns(
    x,
    basis,
    coeff,
    energy,
    n,
    positions,
    r,  # as in _compress_tile
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
    C: tl.constexpr,
    M: tl.constexpr,
    VECTOR: tl.constexpr,
    RANKS_TOGETHER: tl.constexpr,
    inverse_root_n: tl.constexpr,
    TASKS: tl.constexpr,
    B: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    COUNT: tl.constexpr,
):
    """K = n − 1 columns in room for C, of up to M ranks, of n tasks in room for TASKS; COUNT = min(components, K).

    W warps, G lanes to a matrix.
    """
    r = r * VECTOR
    x_task = x_task.to(tl.int64) * VECTOR
    x_position = x_position.to(tl.int64) * VECTOR
    basis_component = basis_component.to(tl.int64) * VECTOR
    basis_position = basis_position.to(tl.int64) * VECTOR
    if VECTOR > 1:
        x_rank = 1
    if RANKS_TOGETHER:
        basis_rank = 1
    s = tl.program_id(0).to(tl.int64) * (W * B) + tl.arange(0, W * B)
    in_order = tl.arange(0, C)[:, None]
    rank = tl.arange(0, M)[:, None]
    valid = (s < positions)[None, :]
    inside = valid & (rank < r)
    lane = tl.arange(0, G)[None, None, :, None]
    c = tl.arange(0, C // G)[:, None, None, None] * G + lane
    j = tl.arange(0, M // G)[:, None, None, None] * G + lane

    # One load for all tasks, and below stores through pointers that a loop carries: for every other access Triton's compiler
    # goes through the whole kernel, once for each of its operations.
    task = tl.arange(0, TASKS)[:, None, None]
    at = x + s * x_position + (rank.to(tl.int64) * x_rank + task.to(tl.int64) * x_task)
    vectors = pieces(tl.load(at, mask=inside & (task <= K), other=0.0))
    first = in_lanes(vectors[0], W, G)
    rest = ()
    for k in tl.static_range(K):
        rest = rest + (in_lanes(vectors[k + 1], W, G),)
    mean, y, finite, down1, down2, back1, back2 = centred_columns(first, rest, inverse_n, spread, K)
    nan = float("nan")
    to_basis = basis + s[None, :] * basis_position + rank.to(tl.int64) * basis_rank
    mean = tl.where(finite, mean * down2 * down1, nan)
    tl.store(to_basis, flat(mean.to(basis.dtype.element_ty)), mask=inside)

    lines, diagonal = householder(y, j, K)
    core = ()
    for k in tl.static_range(K):
        core = core + (tl.where(c < k, head(lines[k], C // G), tl.where(c == k, diagonal[k], 0.0)),)
    triangle = core
    core, norms = jacobi_columns(core, c, K)
    directions, lives = orthonormal_columns(core, norms, c, K, COUNT)
    energies = tl.zeros_like(core[0])
    for k in tl.static_range(K):
        energies = tl.where(c == k, norms[k], energies)

    # u, one component after the other, of falling norm; and the coefficients.
    to_basis += basis_component
    to_coeff = coeff + s[None, :] * coeff_position
    for k in range(components):
        start = tl.zeros_like(core[0])
        live = norms[0] < 0
        for b in tl.static_range(COUNT):
            start = tl.where(k == b, directions[b], start)
            live = tl.where(k == b, lives[b], live)
        u = padded(start, M // G) + ((j == k) & (k >= K)).to(tl.float32)
        for back in tl.static_range(K):
            u = reflected(u, lines[K - 1 - back], j, K - 1 - back)
        u *= 1.5 - 0.5 * total(u * u)
        sign = peak_sign_of_columns(u.to(basis.dtype.element_ty).to(tl.float32), j)
        u = u * sign + 0.0
        tl.store(to_basis, flat(tl.where(finite, u, nan).to(basis.dtype.element_ty)), mask=inside)
        to_basis += basis_component

        shares = tl.zeros_like(start)  # Yᵀu
        for b in tl.static_range(K):
            shares = tl.where(c == b, total(triangle[b] * start), shares)
        shares = tl.where(live, shares * sign, 0.0)
        energies = tl.where((c == k) & (c < K) & live, total(shares * shares), energies)
        own = inverse_root_n * total(shares)
        others = tl.where(finite, (shares - spread * own) * back2 * back1 * down2 * down1, nan)
        own = tl.where(finite, own * back2 * back1 * down2 * down1, nan)
        to_others = to_coeff + (in_order + 1).to(tl.int64) * coeff_task
        tl.store(to_coeff, flat(own.to(coeff.dtype.element_ty)), mask=valid)
        tl.store(to_others, flat(others.to(coeff.dtype.element_ty)), mask=valid & (in_order < K))
        to_coeff += coeff_component

    energies = squared_times(falling(flat(energies), tl.arange(0, C)), flat(back1), flat(back2))
    energies = tl.where(flat(finite), squared_times(energies, flat(down1), flat(down2)), nan)
    tl.store(energy + s[None, :] * K + in_order, energies, mask=valid & (in_order < K))


@triton.jit
def repeated(tile, ROWS: tl.constexpr, B: tl.constexpr, TIMES: tl.constexpr):
    """A tile [ROWS, B], TIMES times beside itself: [1, ROWS, TIMES B]."""
    return tl.reshape(tl.broadcast_to(tile[:, None, :], ROWS, TIMES, B), [1, ROWS, TIMES * B])


@triton.jit(do_not_specialize=SIZES)
def _compress_tile(
    x,
    basis,
    coeff,
    energy,
    n,
    positions,
    r,  # like the strides of x and basis but those of ranks in units of VECTOR, so that the compiler sees it divides them
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
    C: tl.constexpr,
    M: tl.constexpr,
    VECTOR: tl.constexpr,
    RANKS_TOGETHER: tl.constexpr,
    WIDE: tl.constexpr,
    B: tl.constexpr,
    PARTS: tl.constexpr,
    P: tl.constexpr,
    COPIES: tl.constexpr,
):
    r = r * VECTOR
    x_task = x_task.to(tl.int64) * VECTOR
    x_position = x_position.to(tl.int64) * VECTOR
    basis_component = basis_component.to(tl.int64) * VECTOR
    basis_position = basis_position.to(tl.int64) * VECTOR
    if VECTOR > 1:
        x_rank = 1
    if RANKS_TOGETHER:
        basis_rank = 1
    c = tl.arange(0, C)
    m = tl.arange(0, M)
    k_all = tl.minimum(r, n - 1)
    over: tl.constexpr = 1 if WIDE else 0
    J: tl.constexpr = C if WIDE else M
    TASKS: tl.constexpr = M if WIDE else C
    if WIDE:
        task = m[None, :, None]
        rank = c[:, None, None]
    else:
        task = c[:, None, None]
        rank = m[None, :, None]
    j = tl.arange(0, J)[:, None]
    of_p = tl.arange(0, P)[:, None, None]
    nan = float("nan")

    # Coefficients lie by positions: those of all PARTS groups wait to be stored together. Of one group none waits.
    every = tl.program_id(0).to(tl.int64) * (PARTS * B) + tl.arange(0, PARTS * B)
    i = 1 + (m if WIDE else c)[:, None]
    to_others = i.to(tl.int64) * coeff_task
    if PARTS > 1:
        of_first = tl.zeros([P, 1, PARTS * B], tl.float32)
        of_others = tl.zeros([P, TASKS, PARTS * B], tl.float32)
    for part in range(PARTS):
        s = (tl.program_id(0).to(tl.int64) * PARTS + part) * B + tl.arange(0, B)
        valid = (s < positions)[None, :]
        here = (tl.arange(0, PARTS * B) // B == part)[None, None, :]

        # The tasks from the second on, [C, M, B], and the first one's vector, which lies along the ranks. A load of fewer
        # values than threads would be repeated, in every layout that wants it: hence copies, all but one of them masked.
        at = (x + s * x_position)[None, :]
        once = tl.arange(0, COPIES)[:, None, None] == 0
        to_first = tl.broadcast_to((at + j.to(tl.int64) * x_rank)[None, :, :], COPIES, J, B)
        first = tl.load(to_first, mask=once & (valid & (j < r))[None, :, :], other=0.0)
        first = tl.sum(first.to(tl.float32), 0)
        there = (task < n - 1) & (rank < r)
        offsets = (task + 1) * x_task + rank.to(tl.int64) * x_rank
        rest = tl.load(at[None, :, :] + offsets, mask=valid[None, :, :] & there, other=0.0).to(tl.float32)

        first, rest, mean, y, finite, down1, down2, back1, back2 = _centred(first, rest, there, inverse_n, spread, over)
        inside = valid & (j < r)
        to_basis = basis + s[None, :] * basis_position + j.to(tl.int64) * basis_rank
        mean = tl.where(finite[None, :], mean * down2[None, :] * down1[None, :], nan)
        tl.store(to_basis, mean.to(basis.dtype.element_ty), mask=inside)

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
        done = tl.zeros([P, J, B], tl.float32)
        for k in range(components):
            squared = tl.sum(tl.where(c[:, None] == k, norms, 0.0), 0)
            live = (squared > top * (DEFICIENT * DEFICIENT)) & (squared > TINY) & (k < k_all)
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
            if PARTS > 1:
                of_first = tl.where((of_p == k) & here, repeated(own, 1, B, PARTS), of_first)
                of_others = tl.where((of_p == k) & here, repeated(others, TASKS, B, PARTS), of_others)
            else:
                to_coeff = coeff + tl.cast(k, tl.int64) * coeff_component + (s * coeff_position)[None, :]
                tl.store(to_coeff, own.to(coeff.dtype.element_ty), mask=valid)
                tl.store(to_coeff + to_others, others.to(coeff.dtype.element_ty), mask=valid & (i < n))

        energies = squared_times(falling(energies, c), down1[None, :], down2[None, :])
        energies = tl.where(finite[None, :], energies, nan)
        tl.store(energy + s[None, :] * k_all + c[:, None], energies, mask=valid & (c < k_all)[:, None])

    if PARTS > 1:
        valid = (every < positions)[None, None, :] & (of_p < components)
        to_coeff = coeff + of_p.to(tl.int64) * coeff_component + (every * coeff_position)[None, None, :]
        tl.store(to_coeff, of_first.to(coeff.dtype.element_ty), mask=valid)
        tl.store(to_coeff + to_others[None, :, :], of_others.to(coeff.dtype.element_ty), mask=valid & (i < n)[None, :, :])
