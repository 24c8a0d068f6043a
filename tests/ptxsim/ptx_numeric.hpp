// Number formats that PTX uses and C++ lacks, and rounding helpers.
#pragma once
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

enum class Rounding : u8 { Nearest, Zero, Down, Up, NearestAway };

// Runs `body` under a directed rounding mode of the host FPU.
template <class Body>
__attribute__((noinline)) void with_rounding(Rounding mode, Body body) {
  const int host = mode == Rounding::Zero   ? FE_TOWARDZERO
                   : mode == Rounding::Down ? FE_DOWNWARD
                   : mode == Rounding::Up   ? FE_UPWARD
                                            : FE_TONEAREST;
  std::fesetround(host);
  asm volatile("" ::: "memory");
  body();
  asm volatile("" ::: "memory");
  std::fesetround(FE_TONEAREST);
}

inline f32 flush_subnormal(f32 x) {
  u32 b = bit_cast<u32>(x);
  return (b & 0x7f800000u) ? x : bit_cast<f32>(b & 0x80000000u);
}
inline f32 canonical_nan() { return bit_cast<f32>(0x7fffffffu); }

// double -> float, cut off; past the largest float infinity, as in any other rounding here.
inline f32 toward_zero(f64 x) {
  f32 nearest = (f32)x;
  bool away = std::fabs((f64)nearest) > std::fabs(x) && !std::isinf(nearest);
  return away ? bit_cast<f32>(bit_cast<u32>(nearest) - 1) : nearest;
}

// double -> float keeping a sticky low bit ("round to odd"), so that a later
// rounding to a narrower format is the correct single rounding.
inline f32 round_to_odd(f64 x) {
  f32 nearest = (f32)x;
  if ((f64)nearest == x || std::isnan(x) || std::isinf(nearest)) {
    if (std::isinf(nearest) && !std::isinf(x)) return std::copysign(std::numeric_limits<f32>::max(), nearest);
    return nearest;
  }
  u32 b = bit_cast<u32>(nearest);
  if (b & 1) return nearest;
  bool too_big = std::fabs((f64)nearest) > std::fabs(x);
  if (nearest == 0) return bit_cast<f32>((u32)(std::signbit(x) ? 0x80000001u : 1u));
  return bit_cast<f32>(too_big ? b - 1 : b + 1);
}

// Rounds x to a binary format with `mantissa` explicit bits and least normal exponent `emin`.
inline f64 round_to_format(f64 x, int mantissa, int emin, Rounding mode) {
  if (x == 0 || !std::isfinite(x)) return x;
  int e;
  std::frexp(x, &e);
  e -= 1;
  if (e < emin) e = emin;
  f64 scaled = std::ldexp(x, mantissa - e), r;
  switch (mode) {
    case Rounding::Zero:
      r = std::trunc(scaled);
      break;
    case Rounding::Down:
      r = std::floor(scaled);
      break;
    case Rounding::Up:
      r = std::ceil(scaled);
      break;
    case Rounding::NearestAway:
      r = std::round(scaled);
      break;
    default:
      r = std::nearbyint(scaled);
  }
  return std::ldexp(r, e - mantissa);
}

struct Half {  // IEEE binary16
  static f32 to_float(u16 h) { return (f32)bit_cast<_Float16>(h); }
  static u16 from_float(f32 x) { return std::isnan(x) ? (u16)0x7fff : bit_cast<u16>((_Float16)x); }
  static u16 from_double(f64 x) { return from_float(round_to_odd(x)); }
  static u16 from_double(f64 x, Rounding mode) {
    if (mode == Rounding::Nearest || !std::isfinite(x)) return from_double(x);
    f64 r = round_to_format(x, 10, -14, mode);
    if (std::fabs(r) > 65504.0) {
      bool to_max = mode == Rounding::Zero || (mode == Rounding::Down && r > 0) || (mode == Rounding::Up && r < 0);
      r = std::copysign(to_max ? 65504.0 : INFINITY, r);
    }
    return from_float((f32)r);
  }
};
struct BFloat {  // bfloat16
  static f32 to_float(u16 h) { return bit_cast<f32>((u32)h << 16); }
  static u16 from_float(f32 x) {
    u32 b = bit_cast<u32>(x);
    if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (u16)((b + 0x7fffu + ((b >> 16) & 1)) >> 16);
  }
  static u16 from_double(f64 x) { return from_float(round_to_odd(x)); }
  static u16 from_double(f64 x, Rounding mode) {
    if (mode == Rounding::Nearest || !std::isfinite(x)) return from_double(x);
    f64 r = round_to_format(x, 7, -126, mode);
    const f64 largest = 3.3895313892515355e38;
    if (std::fabs(r) > largest) {
      bool to_max = mode == Rounding::Zero || (mode == Rounding::Down && r > 0) || (mode == Rounding::Up && r < 0);
      r = std::copysign(to_max ? largest : INFINITY, r);
    }
    return from_float((f32)r);
  }
};

// 8-bit formats. e4m3 has no infinity (0x7f is NaN); e5m2 follows IEEE.
inline f32 e4m3_to_float(u8 v) {
  int e = (v >> 3) & 15, m = v & 7;
  f32 r = (e == 15 && m == 7) ? NAN : e ? std::ldexp(1.0f + m / 8.0f, e - 7) : std::ldexp((f32)m, -9);
  return (v & 0x80) ? -r : r;
}
inline f32 e5m2_to_float(u8 v) { return Half::to_float((u16)(v << 8)); }
inline u8 float_to_e4m3_satfinite(f64 x) {
  if (std::isnan(x)) return 0x7f;
  u8 sign = std::signbit(x) ? 0x80 : 0;
  f64 r = std::fabs(round_to_format(std::fabs(x) > 1e6 ? 1e6 : std::fabs(x), 3, -6, Rounding::Nearest));
  if (r > 448.0) r = 448.0;
  if (r == 0) return sign;
  int e;
  f64 f = std::frexp(r, &e);
  e -= 1;
  if (e < -6) return sign | (u8)std::lround(std::ldexp(r, 9));
  return sign | (u8)((e + 7) << 3) | (u8)std::lround((f * 2 - 1) * 8);
}
inline u8 float_to_e5m2_satfinite(f64 x) {
  if (std::isnan(x)) return 0x7f;
  f64 r = round_to_format(x, 2, -14, Rounding::Nearest);
  if (std::fabs(r) > 57344.0) r = std::copysign(57344.0, r);
  return (u8)(Half::from_float((f32)r) >> 8);
}

inline u32 to_tf32(u32 bits, Rounding mode) {
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits & ~0x1fffu;
  if (mode == Rounding::NearestAway) return (bits + 0x1000u) & ~0x1fffu;
  if (mode == Rounding::Nearest) return (bits + 0xfffu + ((bits >> 13) & 1)) & ~0x1fffu;
  return bits & ~0x1fffu;
}

// PTX min/max: a NaN loses against a number unless nan_wins; -0 < +0.
template <class T>
inline T ptx_min(T a, T b, bool nan_wins) {
  if (std::isnan(a) || std::isnan(b)) {
    if (nan_wins || (std::isnan(a) && std::isnan(b))) return (T)canonical_nan();
    return std::isnan(a) ? b : a;
  }
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
inline T ptx_max(T a, T b, bool nan_wins) {
  if (std::isnan(a) || std::isnan(b)) {
    if (nan_wins || (std::isnan(a) && std::isnan(b))) return (T)canonical_nan();
    return std::isnan(a) ? b : a;
  }
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

// Float to integer with PTX clamping; `x` is already rounded to an integral value.
template <class I>
inline I clamp_to_int(f64 x, I nan_value) {
  if (std::isnan(x)) return nan_value;
  const f64 low = (f64)std::numeric_limits<I>::min();
  const f64 high_exclusive = std::ldexp(1.0, (int)sizeof(I) * 8 - (std::is_signed<I>::value ? 1 : 0));
  if (x <= low) return std::numeric_limits<I>::min();
  if (x >= high_exclusive) return std::numeric_limits<I>::max();
  return (I)x;
}
