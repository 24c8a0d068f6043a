"""One-sided Jacobi on up to eight columns, one matrix per lane or per 2, 4 or 8 of them, everything in registers.

A column of L numbers of each of W B matrices is a tile [L / G, W, G, B]: G lanes to a matrix, each with every G-th row; G B
lanes to a warp; W warps, each with B matrices. Triton's own choice of layout for such a tile is just that. No number then moves
between lanes, no sum is anyone else's, what a mask that is known at compile time selects costs nothing, and sums over rows,
alone, are shuffled. Householder first turns the K columns into reflectors and a triangle K × K, so that Jacobi turns K² numbers
and not K L. What memory holds are tiles [L, W B], whose lanes and warps may lie otherwise: `in_lanes` and `flat` go between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._jacobi import DEFICIENT, EPSILON, LARGEST, MAX_SWEEPS, TINY, find_turn, inverse_root, needs_turn, scale_of

# Times that a side of a tile may be halved. Triton 3.4 takes no function that calls itself.
HALVINGS = tl.constexpr(8)


@triton.jit
def halves(tile):
    """The upper and the lower half of a tile [H, W, G, B], along H."""
    tile = tl.reshape(tile, [2, tile.shape[0] // 2, tile.shape[1], tile.shape[2], tile.shape[3]])
    return tl.split(tl.permute(tile, [1, 2, 3, 4, 0]))


@triton.jit
def stacked(upper, lower):
    """The inverse of `halves`."""
    tile = tl.permute(tl.join(upper, lower), [4, 0, 1, 2, 3])
    return tl.reshape(tile, [2 * upper.shape[0], upper.shape[1], upper.shape[2], upper.shape[3]])


@triton.jit
def pieces(tile):
    """The tiles [1, L, 1, B] that a tile [N, L, B] consists of, N a power of two, as a tuple."""
    apart = (tl.reshape(tile, [tile.shape[0], tile.shape[1], 1, tile.shape[2]]),)
    for level in tl.static_range(HALVINGS):
        if 2**level < tile.shape[0]:
            halved = ()
            for k in tl.static_range(2**level):
                halved = halved + halves(apart[k])
            apart = halved
    return apart


@triton.jit
def in_lanes(tile, W: tl.constexpr, G: tl.constexpr):
    """A tile [1, L, 1, W B] in fp32, each matrix in its own lanes however the tile lies.

    The layout that it was loaded in would go with it. Halves that were apart and are added to something forget that; and so
    does what is gathered from its own place, which Triton puts where no warp needs another's.
    """
    H: tl.constexpr = tile.shape[1] // G
    B: tl.constexpr = tile.shape[3] // W
    tile = tl.permute(tl.reshape(tile.to(tl.float32), [H, G, W, B]), [0, 2, 1, 3])
    if W > 1:
        own = tl.broadcast_to(tl.arange(0, G)[None, :, None], H * W, G, B)
        return tl.reshape(tl.gather(tl.reshape(tile, [H * W, G, B]), own, 1), [H, W, G, B])
    elif H == 1:
        return tile
    else:
        upper, lower = halves(tile)
        return stacked(upper + 0.0, lower + 0.0)


@triton.jit
def flat(tile):
    """A tile [L / G, W, G, B] as [L, W B]."""
    L: tl.constexpr = tile.shape[0] * tile.shape[2]
    return tl.reshape(tl.permute(tile, [0, 2, 1, 3]), [L, tile.shape[1] * tile.shape[3]])


@triton.jit
def over_rows(tile, reduced: tl.constexpr):
    """A tile [H, W, G, B] reduced over its rows, [1, W, 1, B], in as few operations as it takes: kernels have hundreds."""
    if tile.shape[2] == 1:
        return reduced(tile, 0, keep_dims=True)
    elif tile.shape[0] == 1:
        return reduced(tile, 2, keep_dims=True)
    else:
        return reduced(reduced(tile, 0), 1)[None, :, None, :]


@triton.jit
def total(tile):
    """The sum [1, W, 1, B] of a tile [H, W, G, B] over its rows."""
    return over_rows(tile, tl.sum)


@triton.jit
def highest(tile):
    """The largest number [1, W, 1, B] of each matrix's rows."""
    return over_rows(tile, tl.max)


@triton.jit
def lowest(tile):
    """The smallest number [1, W, 1, B] of each matrix's rows."""
    return over_rows(tile, tl.min)


@triton.jit
def centred_columns(first, rest, inverse_n, spread, K: tl.constexpr):
    """The first task's vector [L, B] and the K others', centred and in the Helmert basis.

    Returns the scaled mean, Y's columns, scaled again; which positions are finite, and both scales' factors back, [1, B] each.
    What is not finite is 0.
    """
    good = tl.abs(first) <= LARGEST
    largest = tl.abs(first)
    for k in tl.static_range(K):
        good &= tl.abs(rest[k]) <= LARGEST
        largest = tl.maximum(largest, tl.abs(rest[k]))
    finite = lowest(good.to(tl.int32)) > 0
    up1, up2, down1, down2 = scale_of(highest(tl.where(finite, largest, 0.0)))

    # As for tiles (_centred in compress.py): the first task's vector goes first, then the mean twice.
    offset = tl.where(finite, first, 0.0) * up1 * up2
    columns = ()
    mean = tl.zeros_like(offset)
    for k in tl.static_range(K):
        columns = columns + (tl.where(finite, rest[k], 0.0) * up1 * up2 - offset,)
        mean += columns[k]
    mean *= inverse_n
    remainder = -mean
    for k in tl.static_range(K):
        columns = exchanged(columns, k, columns[k] - mean, K)
        remainder += columns[k]
    more = inverse_n * remainder
    first = -mean - more

    largest = tl.zeros_like(offset)
    for k in tl.static_range(K):
        columns = exchanged(columns, k, columns[k] - more + spread * first, K)
        largest = tl.maximum(largest, tl.abs(columns[k]))
    again1, again2, back1, back2 = scale_of(highest(largest))
    for k in tl.static_range(K):
        columns = exchanged(columns, k, columns[k] * again1 * again2, K)
    return offset + (mean + more), columns, finite, down1, down2, back1, back2


@triton.jit
def head(tile, H: tl.constexpr):
    """The first H of a tile's rows in each lane."""
    for _ in tl.static_range(HALVINGS):
        if tile.shape[0] > H:
            tile, _lower = halves(tile)
    return tile


@triton.jit
def padded(tile, H: tl.constexpr):
    """A tile with zeros below it, H rows in each lane."""
    for _ in tl.static_range(HALVINGS):
        if tile.shape[0] < H:
            tile = stacked(tile, tl.zeros_like(tile))
    return tile


@triton.jit
def row(tile, i, j):
    """Row j of a tile whose rows are i. Summed as integers: a compiler drops zeros from such a sum."""
    return total(tl.where(i == j, tile.to(tl.int32, bitcast=True), 0)).to(tl.float32, bitcast=True)


@triton.jit
def peak_sign_of_columns(tile, i):
    """±1 [1, W, 1, B]: the sign of each matrix's entry of largest magnitude, in the first row on ties; rows are i."""
    magnitude = tl.abs(tile)
    peak = lowest(tl.where(magnitude == highest(magnitude), i, tile.shape[0] * tile.shape[2]))
    return tl.where(row(tile, i, peak) < 0, -1.0, 1.0)


@triton.jit
def exchanged(values, i: tl.constexpr, value, COUNT: tl.constexpr):
    """The tuple `values` of COUNT with `value` in place i."""
    result = ()
    for k in tl.static_range(COUNT):
        if k == i:
            result = result + (value,)
        else:
            result = result + (values[k],)
    return result


@triton.jit
def householder(y, i, K: tl.constexpr):
    """QR of K columns y [L, B] with rows i: reflectors (from row j of column j on, R above), and R's diagonal, [1, B] each.

    H_j = 1 − v_j v_jᵀ. A column of nothing is not reflected.
    """
    diagonal = ()
    for j in tl.static_range(K):
        below = tl.where(i >= j, y[j], 0.0)
        square = total(below * below)
        live = square > TINY
        safe = tl.where(live, square, 1.0)
        norm = safe * inverse_root(safe)
        first = row(y[j], i, j)
        scale = tl.where(live, inverse_root(0.5 * (safe + norm * (2.0 * tl.abs(first) + norm))), 0.0)
        signed = tl.where(first < 0, -norm, norm)
        diagonal = diagonal + (tl.where(live, -signed, first),)
        y = exchanged(y, j, tl.where(i >= j, tl.where(i == j, y[j] + signed, y[j]) * scale, y[j]), K)
        for c in tl.static_range(j + 1, K):
            y = exchanged(y, c, reflected(y[c], y[j], i, j), K)
    return y, diagonal


@triton.jit
def reflected(x, reflector, i, j: tl.constexpr):
    """H x of a column x [L, B]; the reflector lies in rows from j on."""
    along = total(tl.where(i >= j, reflector * x, 0.0))
    return tl.where(i >= j, tl.fma(tl.broadcast_to(-along, x.shape), reflector, x), x)


@triton.jit
def squared_norms(core, K: tl.constexpr):
    norms = ()
    for c in tl.static_range(K):
        norms = norms + (total(core[c] * core[c]),)
    return norms


@triton.jit
def meetings(core, norms, swept, floor, i, FIRST: tl.constexpr, K: tl.constexpr):
    """Neighbours in a list of K columns, from FIRST on, meet: are rotated, the left to be the longer, and trade places."""
    for m in tl.static_range((K - FIRST) // 2):
        # The pair p, p + 1 is that of FIRST + 2 m, which a name would make a tensor.
        of_p = core[FIRST + 2 * m]
        of_q = core[FIRST + 2 * m + 1]
        pp = norms[FIRST + 2 * m]
        qq = norms[FIRST + 2 * m + 1]
        pq = total(of_p * of_q)
        turned = needs_turn(pp, qq, pq, floor)
        swept |= turned.to(tl.int32)
        cosine, sine, longer, shorter = find_turn(pp, qq, pq, turned)
        cosine = tl.broadcast_to(cosine, of_p.shape)
        core = exchanged(core, FIRST + 2 * m + 1, tl.where(i < K, tl.fma(cosine, of_p, sine * of_q), 0.0), K)
        core = exchanged(core, FIRST + 2 * m, tl.where(i < K, tl.fma(cosine, of_q, -sine * of_p), 0.0), K)
        norms = exchanged(norms, FIRST + 2 * m + 1, longer, K)
        norms = exchanged(norms, FIRST + 2 * m, shorter, K)
    return core, norms, swept


@triton.jit
def jacobi_columns(core, i, K: tl.constexpr):
    """Rotates K columns [C, B] with rows i until they are orthogonal, of falling norm; returns them and squared norms [1, B].

    In K rounds, of every other pair of neighbours each, all have met once and the list is turned round. A matrix that has
    converged turns by nothing, so that its result does not depend on its neighbours.
    """
    norms = squared_norms(core, K)
    floor = norms[0]
    for c in tl.static_range(1, K):
        floor += norms[c]
    floor *= 0.7 * EPSILON * 0.7 * EPSILON  # pairs of columns both this short relative to the matrix are left alone
    floor *= floor
    sweep = 0
    active = 1
    while (sweep < MAX_SWEEPS) & (active > 0):
        swept = tl.zeros_like(floor).to(tl.int32)
        for _ in range(K // 2):
            core, norms, swept = meetings(core, norms, swept, floor, i, 0, K)
            core, norms, swept = meetings(core, norms, swept, floor, i, 1, K)
        if K % 2 == 1:
            core, norms, swept = meetings(core, norms, swept, floor, i, 0, K)
        turned_round = ()
        for c in tl.static_range(K):
            turned_round = turned_round + (core[K - 1 - c],)
        core = turned_round
        norms = squared_norms(core, K)
        active = tl.max(swept)
        sweep += 1
    return core, norms


@triton.jit
def orthonormal_columns(core, norms, i, K: tl.constexpr, COUNT: tl.constexpr):
    """The first COUNT of K columns [C, B] with rows i, made orthonormal, and which of them are live, [1, B] each.

    One that is not is what is left of the unit vector that sticks out most of those before: by a margin, so that rounding
    does not decide.
    """
    found = ()
    lives = ()
    for c in tl.static_range(COUNT):
        live = (norms[c] > norms[0] * (DEFICIENT * DEFICIENT)) & (norms[c] > TINY)
        left = tl.where(i < K, tl.zeros_like(core[0]) + 1.0, -1.0)
        for b in tl.static_range(c):
            left -= found[b] * found[b]
        candidates = tl.where(left > highest(left) - 1e-3, i, K)
        unit = (i == lowest(candidates)).to(tl.float32)
        column = tl.where(live, core[c] * inverse_root(tl.where(live, norms[c], 1.0)), unit)
        for _ in range(2):
            for b in tl.static_range(c):
                column -= total(found[b] * column) * found[b]
            column *= inverse_root(tl.maximum(total(column * column), TINY))
        found = found + (tl.where(i < K, column, 0.0),)
        lives = lives + (live,)
    return found, lives
