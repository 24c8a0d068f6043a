// Scalar pieces of a decomposition: scaling by powers of two, the rotation of two columns, what counts as zero. As
// csrc/cpu/jacobi.h.
#pragma once

#include <stdint.h>

namespace rmm {

constexpr float kTiny = 1e-30f;      // squares below this count as zero
constexpr float kDeficient = 1e-6f;  // σ below this fraction of the largest counts as zero
constexpr float kEpsilon = 1.1920929e-7f;
constexpr int kMaxSweeps = 15;

// Largest |value| of a matrix as its bits: NaN and Inf come out above every number.
__device__ __forceinline__ uint32_t magnitude_bits(float value) { return __float_as_uint(value) & 0x7fffffffu; }
__device__ __forceinline__ bool is_finite(uint32_t bits) { return bits < 0x7f800000u; }

// Exact powers of two that bring a matrix's largest entry into [2, 4) and back; in two factors, each representable.
struct Scale {
  float up1, up2, down1, down2;
};

__device__ __forceinline__ Scale scale_of(uint32_t largest) {
  Scale scale;
  const bool low = (largest >> 23) < 63;  // 127 − 64
  scale.up1 = low ? __uint_as_float(191u << 23) : 1.0f;
  scale.down1 = low ? __uint_as_float(63u << 23) : 1.0f;
  const int exponent = static_cast<int>(__float_as_uint(__uint_as_float(largest) * scale.up1) >> 23) - 128;
  const int power = largest > 0 ? exponent : 0;
  scale.up2 = __int_as_float((127 - power) << 23);
  scale.down2 = __int_as_float((127 + power) << 23);
  return scale;
}

// 1/√x to 2^-22 for x of normal size: one instruction.
__device__ __forceinline__ float quick_rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float quick_root(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a / b for b of normal size.
__device__ __forceinline__ float quick_ratio(float a, float b) {
  float y;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// 1/√x to an ulp or so.
__device__ __forceinline__ float exact_rsqrt(float x) {
  const float y = quick_rsqrt(x);
  const float residual = fmaf(-(0.5f * x) * y, y, 0.5f);
  return fmaf(y, residual, y);
}

// The rotation that makes two columns of squared norms pp and qq and dot product `along` orthogonal, p the longer one:
// p' = cosine · p + sine · q, q' = cosine · q − sine · p, or as three shears p += half · q, q −= sine · p, p += half · q. How
// exact it is does not matter: the columns are measured again, and what multiplies them from the right leaves their left
// singular vectors alone.
//
// A sweep after which no two columns are worth another look is known by what it turned: what later turns of the sweep bring
// back of a dot product is about that product times their tangents, its square by half the gap or by the lengths. `excess` is
// how far the square is above what is settled; if it nowhere exceeds kNoise · ‖A‖⁴, which nothing that counts stays below, all
// is.
struct Turn {
  float half, cosine, sine, longer, shorter, excess;
  __device__ __forceinline__ Turn(float pp, float qq, float along) {
    constexpr float kSettled = 3e-7f;
    longer = fmaxf(pp, qq);
    shorter = fminf(pp, qq);
    const float gap = longer - shorter, twice = along + along, gap2 = fmaf(gap, gap, kTiny);
    excess = fmaf(along, along, -kSettled * fminf(pp * qq, gap2));
    const float tangent = quick_ratio(twice, gap + quick_root(fmaf(twice, twice, gap2)));
    const float large = quick_rsqrt(fmaf(tangent, tangent, 1.0f)), small = tangent * large;
    const bool swap = qq > pp;
    cosine = swap ? small : large;
    sine = swap ? large : small;
    half = quick_ratio(sine, 1.0f + cosine);
    longer = fmaf(along, tangent, longer);
    shorter = fmaf(-along, tangent, shorter);
  }
};
constexpr float kNoise = 1e-33f;

// Odd-even order: `columns` columns in a row, in each of `columns` rounds neighbours meet and trade places, so that in the end
// all have met; pairs of a round share no column. Columns move like beads on a ring of twice that length, and a column's slot
// is half its place there at first, so that the columns of one side of a round's pairs are in neighbouring slots. With the
// longer column always kept on the side that meets first (`left`), one to two sweeps less are needed than in a tournament.
struct Slots {
  int left, right;
};
__host__ __device__ constexpr Slots meeting(int columns, int round, int pair) {
  const int ring = 2 * columns, place = (round & 1) + 2 * pair;
  return {((place - round + ring) % ring) / 2, ((2 * columns - 2 - place - round + ring) % ring) / 2};
}
__host__ __device__ constexpr int meetings(int columns, int round) { return (columns - (round & 1)) / 2; }

// The column that starts in a slot, and the slot it starts in.
__host__ __device__ constexpr int column_of(int columns, int slot) {
  return 2 * slot < columns ? 2 * slot : 2 * columns - 1 - 2 * slot;
}
__host__ __device__ constexpr int slot_of(int columns, int column) {
  return (column & 1 ? 2 * columns - 1 - column : column) / 2;
}

}  // namespace rmm
