"""What the Jacobi kernels share: exact scaling, rotations, one-sided Jacobi on tiles, orthonormal completion, signs.

Everything is fp32. A tile [C, M, B] holds C lines of length M of each of B matrices.
"""

from __future__ import annotations

import triton
import triton.language as tl

TINY = tl.constexpr(1e-30)  # squares below this count as zero
LARGEST = tl.constexpr(3.4028234663852886e38)
DEFICIENT = tl.constexpr(1e-6)  # σ below this fraction of the largest counts as zero
EPSILON = tl.constexpr(1.1920929e-7)
MAX_SWEEPS = tl.constexpr(15)


@triton.jit
def power_of_two(exponent):
    """2^exponent for int32 exponents from −126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(largest):
    """Exact powers of two that bring `largest`, finite and not negative, into [2, 4) and back: up1, up2, down1, down2.

    In two factors each, so that every one is representable; of zero, all are 1.
    """
    low = (largest.to(tl.int32, bitcast=True) >> 23) < 63
    lift = tl.where(low, 64, 0)
    up1 = power_of_two(lift)
    exponent = ((largest * up1).to(tl.int32, bitcast=True) >> 23) - 128
    exponent = tl.where(largest > 0, exponent, 0)
    lift = tl.where(largest > 0, lift, 0)
    return power_of_two(lift), power_of_two(-exponent), power_of_two(-lift), power_of_two(exponent)


@triton.jit
def squared_times(squares, factor1, factor2):
    """squares · (factor1 factor2)², one factor after the other: only a result out of range is out of range."""
    return squares * factor2 * factor2 * factor1 * factor1


@triton.jit
def inverse_root(x):
    """1/√x for normal x > 0, to an ulp or so: the hardware's estimate and a Newton step in residual form."""
    y = tl.rsqrt(x)
    return tl.fma(y, tl.fma(-(0.5 * x * y), y, 0.5), y)


@triton.jit
def needs_turn(pp, qq, pq, floor):
    """Where columns p and q are to be rotated: not orthogonal, or p the shorter one. Not where both are negligible.

    pp and qq are their squared norms, pq their product, `floor` (1e-7 ‖X‖)⁴ or so.
    """
    tolerance: tl.constexpr = 4e-7
    gap = pp - qq
    slanted = (pq * pq > (tolerance * pp) * (tolerance * qq)) & (pp * qq > floor)
    return (slanted | (qq > pp)) & (gap * gap + 4.0 * pq * pq > TINY)


@triton.jit
def find_turn(pp, qq, pq, turned):
    """The rotation that makes p and q orthogonal and p the longer one: cosine, sine, and the squared norms after it.

    1 and 0 where not `turned`. p becomes cosine p + sine q, q becomes cosine q − sine p. The angle need only be good (it is
    found again next sweep), but cosine² + sine² = 1 must hold to rounding: columns must not drift in length.
    """
    gap = pp - qq
    radius2 = gap * gap + 4.0 * pq * pq
    inverse = tl.rsqrt(tl.where(turned, radius2, 1.0))
    z = tl.minimum(0.5 + 0.5 * (tl.abs(gap) * inverse), 1.0)  # cos² of the smaller angle
    slope = pq * inverse  # its cos · sin
    root = inverse_root(tl.where(turned, z * z + slope * slope, 1.0))
    large = z * root
    small = slope * root
    excess = 0.5 * tl.fma(small, small, tl.fma(large, large, -1.0))
    large -= excess * large
    small -= excess * small
    shift = pq * small * root  # how far the squared norms move apart
    swap = qq > pp
    longer = tl.where(swap, qq, pp) + shift
    shorter = tl.maximum(tl.where(swap, pp, qq) - shift, 0.0)
    cosine = tl.where(swap, tl.abs(small), large)
    sine = tl.where(swap, tl.where(pq < 0, -large, large), small)
    return (
        tl.where(turned, cosine, 1.0),
        tl.where(turned, sine, 0.0),
        tl.where(turned, longer, pp),
        tl.where(turned, shorter, qq),
    )


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

    Where not `live` [B], or where nothing is left of it, what is left of the unit vector that sticks out most of them: by a
    margin, so that rounding does not decide.
    """
    column = j[:, None]
    left = tl.where(column < length, 1.0 - tl.sum(done * done, 0), -1.0)
    candidates = tl.where(left > tl.max(left, 0)[None, :] - 1e-3, column, length)
    unit = (column == tl.min(candidates, 0)[None, :]).to(tl.float32)
    row = tl.where(live[None, :], row, unit)
    for attempt in tl.static_range(3):
        along = tl.sum(done * row[None, :, :], 1)
        row -= tl.sum(along[:, None, :] * done, 0)
        square = tl.sum(row * row, 0)
        if attempt == 0:
            left_over = square > 1e4 * EPSILON * EPSILON
            row = tl.where(left_over[None, :], row, unit)
            square = tl.where(left_over, square, 1.0)
        row *= inverse_root(tl.maximum(square, TINY))[None, :]
    return row * (1.5 - 0.5 * tl.sum(row * row, 0))[None, :]


@triton.jit
def peak_sign(row, j):
    """±1 [B]: the sign of the entry of largest magnitude of row [J, B], the lowest index on ties."""
    magnitude = tl.abs(row)
    peak = tl.min(tl.where(magnitude == tl.max(magnitude, 0)[None, :], j[:, None], j.shape[0]), 0)
    value = tl.sum(tl.where(j[:, None] == peak[None, :], row, 0.0), 0)
    return tl.where(value < 0, -1.0, 1.0)
