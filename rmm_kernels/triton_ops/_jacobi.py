"""What the Jacobi kernels share: exact scaling, the rotation of two columns, signs.

Everything is elementwise, on fp32 tensors of any shape.
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
