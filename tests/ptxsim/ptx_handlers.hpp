// What each instruction does to the 32 lanes of a warp. The decoder
// (ptx_decoder.hpp) picks the handlers.
#pragma once
#include "ptx_machine.hpp"

// ---- applying a function to the active lanes --------------------------------
template <class D, class A, class F>
inline void map1(Machine& m, const Instr& in, u32 mask, F f) {
  D* d = m.at<D>(in.dst[0]);
  const A* a = m.at<A>(in.src[0]);
  if (mask == ALL_LANES) {
#pragma GCC ivdep
    for (int i = 0; i < 32; ++i) d[i] = f(a[i]);
  } else
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) d[i] = f(a[i]);
}
template <class D, class A, class F>
inline void map2(Machine& m, const Instr& in, u32 mask, F f) {
  D* d = m.at<D>(in.dst[0]);
  const A *a = m.at<A>(in.src[0]), *b = m.at<A>(in.src[1]);
  if (mask == ALL_LANES) {
#pragma GCC ivdep
    for (int i = 0; i < 32; ++i) d[i] = f(a[i], b[i]);
  } else
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) d[i] = f(a[i], b[i]);
}
template <class D, class A, class B, class C, class F>
inline void map3(Machine& m, const Instr& in, u32 mask, F f) {
  D* d = m.at<D>(in.dst[0]);
  const A* a = m.at<A>(in.src[0]);
  const B* b = m.at<B>(in.src[1]);
  const C* c = m.at<C>(in.src[2]);
  if (mask == ALL_LANES) {
#pragma GCC ivdep
    for (int i = 0; i < 32; ++i) d[i] = f(a[i], b[i], c[i]);
  } else
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) d[i] = f(a[i], b[i], c[i]);
}

#define UNARY(D, A, ...)                                                 \
  [](Machine& m, const Instr& in, u32 mask) {                            \
    (void)in;                                                            \
    map1<D, A>(m, in, mask, [&](A a) -> D { return (D)(__VA_ARGS__); }); \
  }
#define BINARY(T, ...)                                                        \
  [](Machine& m, const Instr& in, u32 mask) {                                 \
    (void)in;                                                                 \
    map2<T, T>(m, in, mask, [&](T a, T b) -> T { return (T)(__VA_ARGS__); }); \
  }
#define BINARY_TO(D, T, ...)                                                  \
  [](Machine& m, const Instr& in, u32 mask) {                                 \
    (void)in;                                                                 \
    map2<D, T>(m, in, mask, [&](T a, T b) -> D { return (D)(__VA_ARGS__); }); \
  }
#define TERNARY(D, A, B, C, ...)                                                         \
  [](Machine& m, const Instr& in, u32 mask) {                                            \
    (void)in;                                                                            \
    map3<D, A, B, C>(m, in, mask, [&](A a, B b, C c) -> D { return (D)(__VA_ARGS__); }); \
  }

// ---- floating point ---------------------------------------------------------
struct Add {
  template <class T>
  static T f(T a, T b) {
    return a + b;
  }
};
struct Sub {
  template <class T>
  static T f(T a, T b) {
    return a - b;
  }
};
struct Mul {
  template <class T>
  static T f(T a, T b) {
    return a * b;
  }
};
struct Div {
  template <class T>
  static T f(T a, T b) {
    return a / b;
  }
};
inline f32 fused(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
inline f64 fused(f64 a, f64 b, f64 c) { return __builtin_fma(a, b, c); }
inline f32 finish(const Instr& in, f32 r) {
  if (in.sat) r = std::isnan(r) ? 0.0f : r < 0 ? 0.0f : r > 1 ? 1.0f : r;
  if (in.ftz) r = flush_subnormal(r);
  return r;
}
inline f64 finish(const Instr& in, f64 r) { return in.sat ? (std::isnan(r) ? 0.0 : r < 0 ? 0.0 : r > 1 ? 1.0 : r) : r; }
inline f32 start(const Instr& in, f32 a) { return in.ftz ? flush_subnormal(a) : a; }
inline f64 start(const Instr&, f64 a) { return a; }

template <class T, class Op>
void float_binary(Machine& m, const Instr& in, u32 mask) {
  map2<T, T>(m, in, mask, [](T a, T b) { return Op::f(a, b); });
}
template <class T, class Op>
void float_binary_general(Machine& m, const Instr& in, u32 mask) {
  with_rounding(in.rounding,
                [&] { map2<T, T>(m, in, mask, [&](T a, T b) { return finish(in, Op::f(start(in, a), start(in, b))); }); });
}
template <class Op>
void float_binary_ftz(Machine& m, const Instr& in, u32 mask) {
  map2<f32, f32>(m, in, mask, [](f32 a, f32 b) { return flush_subnormal(Op::f(flush_subnormal(a), flush_subnormal(b))); });
}
template <class T>
void float_fma(Machine& m, const Instr& in, u32 mask) {
  map3<T, T, T, T>(m, in, mask, [](T a, T b, T c) { return fused(a, b, c); });
}
inline void float_fma_ftz(Machine& m, const Instr& in, u32 mask) {
  map3<f32, f32, f32, f32>(m, in, mask, [](f32 a, f32 b, f32 c) {
    return flush_subnormal(fused(flush_subnormal(a), flush_subnormal(b), flush_subnormal(c)));
  });
}
template <class T>
void float_fma_general(Machine& m, const Instr& in, u32 mask) {
  with_rounding(in.rounding, [&] {
    map3<T, T, T, T>(m, in, mask, [&](T a, T b, T c) { return finish(in, fused(start(in, a), start(in, b), start(in, c))); });
  });
}
template <class T>
void float_minmax(Machine& m, const Instr& in, u32 mask) {
  map2<T, T>(m, in, mask, [&](T a, T b) {
    a = start(in, a);
    b = start(in, b);
    bool negative = std::signbit(a) != std::signbit(b);
    if (in.xorsign) {
      a = std::fabs(a);
      b = std::fabs(b);
    }
    T r = in.mode ? ptx_max(a, b, in.nan_wins) : ptx_min(a, b, in.nan_wins);
    return in.xorsign ? std::copysign(r, negative ? (T)-1 : (T)1) : r;
  });
}
inline void float_minmax3(Machine& m, const Instr& in, u32 mask) {
  map3<f32, f32, f32, f32>(m, in, mask, [&](f32 a, f32 b, f32 c) {
    a = start(in, a);
    b = start(in, b);
    c = start(in, c);
    return in.mode ? ptx_max(ptx_max(a, b, in.nan_wins), c, in.nan_wins) : ptx_min(ptx_min(a, b, in.nan_wins), c, in.nan_wins);
  });
}
enum class Special1 : u8 { Rcp, Sqrt, Rsqrt, Ex2, Lg2, Sin, Cos, Tanh };
inline f64 special_function(Special1 op, f64 x) {
  switch (op) {
    case Special1::Rcp:
      return 1.0 / x;
    case Special1::Sqrt:
      return std::sqrt(x);
    case Special1::Rsqrt:
      return 1.0 / std::sqrt(x);
    case Special1::Ex2:
      return std::exp2(x);
    case Special1::Lg2:
      return std::log2(x);
    case Special1::Sin:
      return std::sin(x);
    case Special1::Cos:
      return std::cos(x);
    default:
      return std::tanh(x);
  }
}
inline void special_f32(Machine& m, const Instr& in, u32 mask) {
  Special1 op = (Special1)in.mode;
  map1<f32, f32>(m, in, mask, [&](f32 a) { return finish(in, (f32)special_function(op, (f64)start(in, a))); });
}
inline void special_f64(Machine& m, const Instr& in, u32 mask) {
  Special1 op = (Special1)in.mode;
  with_rounding(in.rounding, [&] { map1<f64, f64>(m, in, mask, [&](f64 a) { return special_function(op, a); }); });
}
inline void rcp_sqrt_f32_rounded(Machine& m, const Instr& in, u32 mask) {
  bool root = (Special1)in.mode == Special1::Sqrt;
  with_rounding(in.rounding, [&] {
    map1<f32, f32>(m, in, mask, [&](f32 a) {
      a = start(in, a);
      return finish(in, root ? std::sqrt(a) : 1.0f / a);
    });
  });
}
inline void div_f32_approx(Machine& m, const Instr& in, u32 mask) {
  map2<f32, f32>(m, in, mask, [&](f32 a, f32 b) { return finish(in, (f32)((f64)start(in, a) / (f64)start(in, b))); });
}

// 16-bit floats, one or two per register
template <class Format>
inline u16 half_finish(const Instr& in, f64 r) {
  if (in.sat) r = std::isnan(r) ? 0.0 : r < 0 ? 0.0 : r > 1 ? 1.0 : r;
  if (in.relu && (r < 0 || std::signbit(r)) && !std::isnan(r)) r = 0.0;
  return Format::from_double(r);
}
enum class HalfOp : u8 { Add, Sub, Mul, Fma, Min, Max, Neg, Abs, Ex2, Tanh };
template <class Format>
inline u16 half_apply(const Instr& in, u16 a16, u16 b16, u16 c16) {
  HalfOp op = (HalfOp)in.mode;
  if (op == HalfOp::Neg) return a16 ^ 0x8000;
  if (op == HalfOp::Abs) return a16 & 0x7fff;
  f32 a = Format::to_float(a16), b = Format::to_float(b16);
  if (!in.sat && !in.relu) {
    if (op == HalfOp::Add) return Format::from_float(a + b);
    if (op == HalfOp::Sub) return Format::from_float(a - b);
    if (op == HalfOp::Mul) return Format::from_float(a * b);
  }
  switch (op) {
    case HalfOp::Add:
      return half_finish<Format>(in, (f64)(a + b));
    case HalfOp::Sub:
      return half_finish<Format>(in, (f64)(a - b));
    case HalfOp::Mul:
      return half_finish<Format>(in, (f64)(a * b));
    case HalfOp::Fma:
      return half_finish<Format>(in, __builtin_fma((f64)a, (f64)b, (f64)Format::to_float(c16)));
    case HalfOp::Min:
    case HalfOp::Max: {
      bool negative = std::signbit(a) != std::signbit(b);
      if (in.xorsign) {
        a = std::fabs(a);
        b = std::fabs(b);
      }
      f32 r = op == HalfOp::Max ? ptx_max(a, b, in.nan_wins) : ptx_min(a, b, in.nan_wins);
      return Format::from_float(in.xorsign ? std::copysign(r, negative ? -1.0f : 1.0f) : r);
    }
    case HalfOp::Ex2:
      return Format::from_double(std::exp2((f64)a));
    default:
      return Format::from_double(std::tanh((f64)a));
  }
}
template <class Format, class Word>
void half_arithmetic(Machine& m, const Instr& in, u32 mask) {
  Word* d = m.at<Word>(in.dst[0]);
  const Word* a = m.at<Word>(in.src[0]);
  const Word* b = in.src_count > 1 ? m.at<Word>(in.src[1]) : a;
  const Word* c = in.src_count > 2 ? m.at<Word>(in.src[2]) : a;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    Word r = half_apply<Format>(in, (u16)a[i], (u16)b[i], (u16)c[i]);
    if (sizeof(Word) == 4)
      r |= (Word)((u32)half_apply<Format>(in, (u16)((u32)a[i] >> 16), (u16)((u32)b[i] >> 16), (u16)((u32)c[i] >> 16)) << 16);
    d[i] = r;
  }
}
inline void f32x2_arithmetic(Machine& m, const Instr& in, u32 mask) {
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    u64 a = m.at<u64>(in.src[0])[i], b = m.at<u64>(in.src[1])[i], c = in.src_count > 2 ? m.at<u64>(in.src[2])[i] : 0, r = 0;
    for (int h = 0; h < 64; h += 32) {
      f32 x = start(in, bit_cast<f32>((u32)(a >> h))), y = start(in, bit_cast<f32>((u32)(b >> h))),
          z = start(in, bit_cast<f32>((u32)(c >> h)));
      f32 v = in.mode == 0 ? x + y : in.mode == 1 ? x - y : in.mode == 2 ? x * y : fused(x, y, z);
      r |= (u64)bit_cast<u32>(finish(in, v)) << h;
    }
    m.at<u64>(in.dst[0])[i] = r;
  }
}

// ---- comparisons ------------------------------------------------------------
enum class Cmp : u8 { Eq, Lt, Le, Gt, Ge, LtGt, Num };
template <class T, Cmp op>
u32 compare_lanes(const char* pa, const char* pb, bool ftz) {
  const T *a = (const T*)pa, *b = (const T*)pb;
  u32 bits = 0;
  for (int i = 0; i < 32; ++i) {
    T x = a[i], y = b[i];
    if (std::is_same<T, f32>::value && ftz) {
      x = (T)flush_subnormal((f32)x);
      y = (T)flush_subnormal((f32)y);
    }
    bool r = op == Cmp::Eq     ? x == y
             : op == Cmp::Lt   ? x < y
             : op == Cmp::Le   ? x <= y
             : op == Cmp::Gt   ? x > y
             : op == Cmp::Ge   ? x >= y
             : op == Cmp::LtGt ? (x < y || x > y)
                               : (x == x && y == y);
    bits |= (u32)r << i;
  }
  return bits;
}
template <class Format, Cmp op, int shift, class Word>
u32 compare_half(const char* pa, const char* pb, bool) {
  f32 a[32], b[32];
  for (int i = 0; i < 32; ++i) {
    a[i] = Format::to_float((u16)(((const Word*)pa)[i] >> shift));
    b[i] = Format::to_float((u16)(((const Word*)pb)[i] >> shift));
  }
  return compare_lanes<f32, op>((const char*)a, (const char*)b, false);
}
inline u32 compared(Machine& m, const Instr& in) {
  u32 bits = in.compare(m.at<char>(in.src[0]), m.at<char>(in.src[1]), in.ftz);
  return in.flag ? ~bits : bits;
}
inline u32 combine_predicates(u32 r, u32 c, u8 mode) { return mode == 1 ? r & c : mode == 2 ? r | c : mode == 3 ? r ^ c : r; }
inline void setp(Machine& m, const Instr& in, u32 mask) {
  u32 r = compared(m, in), c = in.src_count > 2 ? m.predicate(in.src[2]) : 0;
  u32 second = combine_predicates(~r, c, in.mode);
  m.set_predicate(in.dst[0], combine_predicates(r, c, in.mode), mask);
  if (in.dst_count > 1) m.set_predicate(in.dst[1], second, mask);
}
inline void set_value(Machine& m, const Instr& in, u32 mask) {
  u32 r = compared(m, in);
  if (in.src_count > 2) r = combine_predicates(r, m.predicate(in.src[2]), in.mode);
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) m.write_raw(in.dst[0], i, (r >> i & 1) ? (u64)in.immediate : 0);
}
template <class T>
void selp(Machine& m, const Instr& in, u32 mask) {
  u32 p = m.predicate(in.src[2]);
  T* d = m.at<T>(in.dst[0]);
  const T *a = m.at<T>(in.src[0]), *b = m.at<T>(in.src[1]);
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) d[i] = (p >> i & 1) ? a[i] : b[i];
}

// ---- moves and conversions --------------------------------------------------
template <class T>
void move_value(Machine& m, const Instr& in, u32 mask) {
  map1<T, T>(m, in, mask, [](T a) { return a; });
}
inline void move_predicate(Machine& m, const Instr& in, u32 mask) { m.set_predicate(in.dst[0], m.predicate(in.src[0]), mask); }
inline void move_pack(Machine& m, const Instr& in, u32 mask) {  // mov.b64 d, {a, b}
  int shift = in.src[0].bytes * 8;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    u64 v = 0;
    for (int k = 0; k < in.src_count; ++k) v |= m.read_raw(in.src[k], i) << (shift * k);
    m.write_raw(in.dst[0], i, v);
  }
}
inline void move_unpack(Machine& m, const Instr& in, u32 mask) {  // mov.b64 {a, b}, d
  int shift = in.mode * 8;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    u64 v = m.read_raw(in.src[0], i);
    for (int k = 0; k < in.dst_count; ++k)
      m.write_raw(in.dst[k], i, (v >> (shift * k)) & (shift == 64 ? ~0ull : (1ull << shift) - 1));
  }
}
inline void move_vector(Machine& m, const Instr& in, u32 mask) {  // mov {a, b}, {c, d}
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    u64 v[8];
    for (int k = 0; k < in.src_count; ++k) v[k] = m.read_raw(in.src[k], i);
    for (int k = 0; k < in.dst_count; ++k) m.write_raw(in.dst[k], i, v[k]);
  }
}
inline void read_clock(Machine& m, const Instr& in, u32 mask) {
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) m.write_raw(in.dst[0], i, m.executed);
}

enum class Type : u8 { U8, U16, U32, U64, S8, S16, S32, S64, F16, BF16, F32, F64, F16x2, BF16x2, TF32, E4M3x2, E5M2x2, Other };
inline bool is_integer(Type t) { return t <= Type::S64; }
inline bool is_signed_type(Type t) { return t >= Type::S8 && t <= Type::S64; }
inline int integer_bits(Type t) { return 8 << ((int)t & 3); }
inline u64 extend(u64 v, Type t) {
  int bits = integer_bits(t);
  if (bits == 64) return v;
  return is_signed_type(t) ? (u64)((s64)(v << (64 - bits)) >> (64 - bits)) : v & ((1ull << bits) - 1);
}
inline f64 float_value(u64 v, Type t) {
  switch (t) {
    case Type::F16:
      return Half::to_float((u16)v);
    case Type::BF16:
      return BFloat::to_float((u16)v);
    case Type::F32:
    case Type::TF32:
      return bit_cast<f32>((u32)v);
    default:
      return bit_cast<f64>(v);
  }
}
inline f32 narrow_to_f32(f64 x, Rounding mode) {
  f32 r = (f32)x;
  if (mode == Rounding::Nearest || mode == Rounding::NearestAway || (f64)r == x || std::isnan(x)) return r;
  bool above = (f64)r > x, away = std::fabs((f64)r) > std::fabs(x);
  if ((mode == Rounding::Zero && away) || (mode == Rounding::Down && above))
    return std::nextafter(r, mode == Rounding::Zero ? 0.0f : -INFINITY);
  if (mode == Rounding::Up && !above) return std::nextafter(r, INFINITY);
  return r;
}
inline u64 float_bits(const Instr& in, f64 x, Type t) {
  if (in.sat) x = std::isnan(x) ? 0.0 : x < 0 ? 0.0 : x > 1 ? 1.0 : x;
  if (in.relu && x < 0) x = 0;
  switch (t) {
    case Type::F16:
      return Half::from_double(x, in.rounding);
    case Type::BF16:
      return BFloat::from_double(x, in.rounding);
    case Type::F32: {
      f32 r = narrow_to_f32(x, in.rounding);
      if (in.ftz) r = flush_subnormal(r);
      return bit_cast<u32>(std::isnan(r) ? canonical_nan() : r);
    }
    case Type::TF32:
      return to_tf32(bit_cast<u32>((f32)x), in.rounding);
    default:
      return bit_cast<u64>(x);
  }
}
inline u64 convert(const Instr& in, u64 v, Type from, Type to) {
  if (is_integer(from)) {
    v = extend(v, from);
    if (is_integer(to)) {
      if (in.sat) {
        __int128 x = is_signed_type(from) ? (__int128)(s64)v : (__int128)v;
        int bits = integer_bits(to);
        __int128 low = is_signed_type(to) ? -((__int128)1 << (bits - 1)) : 0;
        __int128 high = ((__int128)1 << (is_signed_type(to) ? bits - 1 : bits)) - 1;
        return (u64)(x < low ? low : x > high ? high : x);
      }
      return extend(v, to);
    }
    long double exact = is_signed_type(from) ? (long double)(s64)v : (long double)v;
    if (to == Type::F64) {
      f64 r = 0;
      with_rounding(in.rounding, [&] {
        volatile long double e = exact;
        r = (f64)e;
      });
      return bit_cast<u64>(r);
    }
    if (to == Type::F32) {
      f32 r = 0;
      with_rounding(in.rounding, [&] {
        volatile long double e = exact;
        r = (f32)e;
      });
      return bit_cast<u32>(r);
    }
    f64 sticky = (f64)exact;  // more than 53 significant bits cannot matter for a 16-bit result except as a sticky bit
    if ((long double)sticky != exact) sticky = std::nextafter((f64)sticky, (long double)sticky > exact ? 0.0 : (f64)sticky);
    return float_bits(in, sticky, to);
  }
  f64 x = float_value(v, from);
  if (in.ftz && from == Type::F32) x = flush_subnormal((f32)x);
  if (in.flag) {  // round to an integral value: rni, rzi, rmi, rpi
    Rounding mode = in.rounding;
    x = mode == Rounding::Zero   ? std::trunc(x)
        : mode == Rounding::Down ? std::floor(x)
        : mode == Rounding::Up   ? std::ceil(x)
                                 : std::nearbyint(x);
  }
  if (!is_integer(to)) return float_bits(in, x, to);
  bool wide = from == Type::F64 || to == Type::S64 || to == Type::U64;
  switch (to) {
    case Type::U8:
      return clamp_to_int<u8>(x, 0);
    case Type::U16:
      return clamp_to_int<u16>(x, 0);
    case Type::U32:
      return clamp_to_int<u32>(x, wide ? 0x80000000u : 0);
    case Type::U64:
      return clamp_to_int<u64>(x, 0x8000000000000000ull);
    case Type::S8:
      return (u64)(s64)clamp_to_int<s8>(x, 0);
    case Type::S16:
      return (u64)(s64)clamp_to_int<s16>(x, 0);
    case Type::S32:
      return (u64)(s64)clamp_to_int<s32>(x, wide ? std::numeric_limits<s32>::min() : 0);
    default:
      return (u64)clamp_to_int<s64>(x, std::numeric_limits<s64>::min());
  }
}
inline void cvt(Machine& m, const Instr& in, u32 mask) {
  Type to = (Type)in.type, from = (Type)in.type2;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) m.write_raw(in.dst[0], i, convert(in, m.read_raw(in.src[0], i), from, to));
}
template <class D, class A>
void cvt_simple(Machine& m, const Instr& in, u32 mask) {
  map1<D, A>(m, in, mask, [](A a) { return (D)a; });
}
inline void cvt_f32_to_half(Machine& m, const Instr& in, u32 mask) {
  map1<u16, f32>(m, in, mask, [](f32 a) { return Half::from_float(a); });
}
inline void cvt_half_to_f32(Machine& m, const Instr& in, u32 mask) {
  map1<f32, u16>(m, in, mask, [](u16 a) { return Half::to_float(a); });
}
inline void cvt_f32_to_bf16(Machine& m, const Instr& in, u32 mask) {
  map1<u16, f32>(m, in, mask, [](f32 a) { return BFloat::from_float(a); });
}
inline void cvt_bf16_to_f32(Machine& m, const Instr& in, u32 mask) {
  map1<f32, u16>(m, in, mask, [](u16 a) { return BFloat::to_float(a); });
}
inline void cvt_pack2(Machine& m, const Instr& in, u32 mask) {  // d = {high: src0, low: src1}, or unpacking fp8 pairs
  Type to = (Type)in.type, from = (Type)in.type2;
  auto narrow = [&](f64 x) -> u32 {
    if (in.relu && x < 0) x = 0;
    switch (to) {
      case Type::F16x2: {
        u32 h = Half::from_double(x, in.rounding);
        if (in.sat && (h & 0x7fff) == 0x7c00) h = (h & 0x8000) | 0x7bff;
        return h;
      }
      case Type::BF16x2: {
        u32 h = BFloat::from_double(x, in.rounding);
        if (in.sat && (h & 0x7fff) == 0x7f80) h = (h & 0x8000) | 0x7f7f;
        return h;
      }
      case Type::E4M3x2:
        return float_to_e4m3_satfinite(x);
      default:
        return float_to_e5m2_satfinite(x);
    }
  };
  int out = (to == Type::F16x2 || to == Type::BF16x2) ? 16 : 8;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    f64 high, low;
    u64 a = m.read_raw(in.src[0], i);
    if (from == Type::F32) {
      high = bit_cast<f32>((u32)a);
      low = bit_cast<f32>((u32)m.read_raw(in.src[1], i));
    } else if (from == Type::F16x2) {
      high = Half::to_float((u16)(a >> 16));
      low = Half::to_float((u16)a);
    } else if (from == Type::BF16x2) {
      high = BFloat::to_float((u16)(a >> 16));
      low = BFloat::to_float((u16)a);
    } else if (from == Type::E4M3x2) {
      high = e4m3_to_float((u8)(a >> 8));
      low = e4m3_to_float((u8)a);
    } else {
      high = e5m2_to_float((u8)(a >> 8));
      low = e5m2_to_float((u8)a);
    }
    m.write_raw(in.dst[0], i, narrow(high) << out | narrow(low));
  }
}

// ---- integer helpers --------------------------------------------------------
template <class T>
inline T bit_field_extract(T a, u32 b, u32 c) {
  using U = typename std::make_unsigned<T>::type;
  const int bits = sizeof(T) * 8;
  int pos = (int)(b & 0xff), len = (int)(c & 0xff);
  if (len == 0) return 0;
  bool sign = std::is_signed<T>::value && ((U)a >> std::min(pos + len - 1, bits - 1) & 1);
  U r = pos >= bits ? (U)0 : (U)((U)a >> pos);
  int valid = std::min(len, std::max(bits - pos, 0));
  if (valid < bits) r &= (U)(((U)1 << valid) - 1);
  if (sign && valid < bits) r |= (U) ~(((U)1 << valid) - 1);
  return (T)r;
}
template <class U>
inline U bit_field_insert(U a, U b, u32 c, u32 d) {
  const int bits = sizeof(U) * 8;
  int pos = (int)(c & 0xff), len = (int)(d & 0xff);
  if (len == 0 || pos >= bits) return b;
  int valid = std::min(len, bits - pos);
  U field = valid >= bits ? (U) ~(U)0 : (U)(((U)1 << valid) - 1);
  return (U)((b & ~(U)(field << pos)) | ((a & field) << pos));
}
inline u32 permute_bytes(u32 a, u32 b, u32 c, u8 mode) {
  u64 pool = (u64)b << 32 | a;
  auto byte = [&](u32 i) { return (u32)(pool >> (8 * (i & 7))) & 0xff; };
  u32 r = 0;
  for (u32 i = 0; i < 4; ++i) {
    u32 v;
    switch (mode) {
      case 1:
        v = byte((c & 3) + i);
        break;  // f4e
      case 2:
        v = byte((c & 3) - i);
        break;  // b4e
      case 3:
        v = byte(c & 3);
        break;  // rc8
      case 4:
        v = byte(std::max(i, c & 3));
        break;  // ecl
      case 5:
        v = byte(std::min(i, c & 3));
        break;  // ecr
      case 6:
        v = byte((c & 1) * 2 + (i & 1));
        break;  // rc16
      default: {
        u32 s = c >> (4 * i) & 15;
        v = byte(s & 7);
        if (s & 8) v = (v & 0x80) ? 0xff : 0;
      }
    }
    r |= v << (8 * i);
  }
  return r;
}
template <class T>
inline s32 find_bit(T a, bool shift_amount) {
  using U = typename std::make_unsigned<T>::type;
  U v = (U)a;
  if (std::is_signed<T>::value && a < 0) v = (U)~v;
  if (v == 0) return -1;
  int bit = 63 - __builtin_clzll((u64)v);
  return shift_amount ? (int)sizeof(T) * 8 - 1 - bit : bit;
}
inline u32 lop3_value(u32 a, u32 b, u32 c, u32 table) {
  u32 r = 0;
  if (table & 1) r |= ~a & ~b & ~c;
  if (table & 2) r |= ~a & ~b & c;
  if (table & 4) r |= ~a & b & ~c;
  if (table & 8) r |= ~a & b & c;
  if (table & 16) r |= a & ~b & ~c;
  if (table & 32) r |= a & ~b & c;
  if (table & 64) r |= a & b & ~c;
  if (table & 128) r |= a & b & c;
  return r;
}
inline void lop3(Machine& m, const Instr& in, u32 mask) {
  u32 table = (u32)in.immediate;
  switch (table) {
    case 0x96:
      map3<u32, u32, u32, u32>(m, in, mask, [](u32 a, u32 b, u32 c) { return a ^ b ^ c; });
      break;
    case 0xf8:
      map3<u32, u32, u32, u32>(m, in, mask, [](u32 a, u32 b, u32 c) { return a | (b & c); });
      break;
    default:
      map3<u32, u32, u32, u32>(m, in, mask, [table](u32 a, u32 b, u32 c) { return lop3_value(a, b, c, table); });
  }
  if (in.dst_count > 1) {
    u32 bits = 0;
    for (int i = 0; i < 32; ++i) bits |= (u32)(m.at<u32>(in.dst[0])[i] != 0) << i;
    u32 q = m.predicate(in.src[3]);
    m.set_predicate(in.dst[1], in.mode == 1 ? bits & q : bits | q, mask);
  }
}
// add/sub/mad with carry-in and carry-out; mode: 0 add, 1 sub, 2 mad.lo, 3 mad.hi; flag: uses carry; mode2: sets carry
template <class U>
void carry_arithmetic(Machine& m, const Instr& in, u32 mask) {
  u32* carry = (u32*)(m.base[0] + m.program->carry_offset);
  const int bits = sizeof(U) * 8;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    U a = m.at<U>(in.src[0])[i], b = m.at<U>(in.src[1])[i];
    unsigned __int128 x = a, y = b;
    u32 c = in.flag ? (*carry >> i & 1) : 0;
    if (in.mode >= 2) {
      unsigned __int128 p;
      if (in.is_signed)
        p = (unsigned __int128)((__int128)(typename std::make_signed<U>::type)a * (typename std::make_signed<U>::type)b);
      else
        p = (unsigned __int128)a * b;
      x = (U)(in.mode == 2 ? p : p >> bits);
      y = m.at<U>(in.src[2])[i];
    }
    unsigned __int128 r = in.mode == 1 ? x - y - c : x + y + c;
    m.at<U>(in.dst[0])[i] = (U)r;
    if (in.mode2) *carry = (*carry & ~(1u << i)) | ((u32)(r >> bits & 1) << i);
  }
}
inline void dp4a(Machine& m, const Instr& in, u32 mask) {
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    u32 a = m.at<u32>(in.src[0])[i], b = m.at<u32>(in.src[1])[i];
    u32 r = m.at<u32>(in.src[2])[i];
    if (in.mode == 4)
      for (int k = 0; k < 32; k += 8) {
        s32 x = in.type ? (s32)(s8)(a >> k) : (s32)(u8)(a >> k), y = in.type2 ? (s32)(s8)(b >> k) : (s32)(u8)(b >> k);
        r += (u32)(x * y);
      }
    else
      for (int k = 0; k < 2; ++k) {
        u32 bb = in.flag ? b >> 16 : b;
        s32 x = in.type ? (s32)(s16)(a >> (16 * k)) : (s32)(u16)(a >> (16 * k)),
            y = in.type2 ? (s32)(s8)(bb >> (8 * k)) : (s32)(u8)(bb >> (8 * k));
        r += (u32)(x * y);
      }
    m.at<u32>(in.dst[0])[i] = r;
  }
}
template <class T>
void video_minmax2(Machine& m, const Instr& in, u32 mask) {  // add/min/max on 16-bit pairs
  map2<u32, u32>(m, in, mask, [&](u32 a, u32 b) {
    u32 r = 0;
    for (int h = 0; h < 32; h += 16) {
      T x = (T)(a >> h), y = (T)(b >> h);
      T v = in.mode == 0 ? (T)(x + y) : in.mode == 1 ? std::min(x, y) : std::max(x, y);
      if (in.relu && std::is_signed<T>::value && v < 0) v = 0;
      r |= (u32)(u16)v << h;
    }
    return r;
  });
}

// ---- memory -----------------------------------------------------------------
inline void gather_addresses(Machine& m, const Instr& in, u64* address) {
  const Ref& base = in.src[0];
  if (base.bytes == 4) {
    const u32* p = m.at<u32>(base);
    for (int i = 0; i < 32; ++i) address[i] = (u64)p[i] + (u64)in.immediate;
  } else {
    const u64* p = m.at<u64>(base);
    for (int i = 0; i < 32; ++i) address[i] = p[i] + (u64)in.immediate;
  }
}
template <class T>
inline void copy_lanes(const Instr& in, Machine& m, const char* const* from, u32 mask) {
  for (int v = 0; v < in.vector; ++v) {
    const Ref& r = in.dst[v];
    if (r.sink) continue;
    if (r.bytes == sizeof(T)) {
      T* d = m.at<T>(r);
      for (u32 left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        std::memcpy(&d[i], from[i] + v * sizeof(T), sizeof(T));
      }
    } else
      for (u32 left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        T x;
        std::memcpy(&x, from[i] + v * sizeof(T), sizeof(T));
        u64 wide = (u64)x;
        if (in.is_signed) wide = (u64)((s64)(wide << (64 - 8 * sizeof(T))) >> (64 - 8 * sizeof(T)));
        m.write_raw(r, i, wide);
      }
  }
}
inline void load_from(Machine& m, const Instr& in, u32 mask, const char* const* from) {
  switch (in.element) {
    case 1:
      copy_lanes<u8>(in, m, from, mask);
      break;
    case 2:
      copy_lanes<u16>(in, m, from, mask);
      break;
    case 4:
      copy_lanes<u32>(in, m, from, mask);
      break;
    default:
      copy_lanes<u64>(in, m, from, mask);
  }
}
inline void fetch_store_data(Machine& m, const Instr& in, int lane, char* out) {
  for (int v = 0; v < in.vector; ++v) {
    u64 x = m.read_raw(in.src[1 + v], lane);
    std::memcpy(out + v * in.element, &x, in.element);
  }
}
inline void check_local(Machine& m, const Instr& in, int lane, u64 a, u32 bytes) {
  if (a & (bytes - 1))
    m.fault(in, lane, "misaligned " + std::to_string(bytes) + "-byte local access at offset " + std::to_string(a));
  if (a + bytes > m.program->local_bytes)
    m.fault(in, lane,
            "local access out of bounds at offset " + std::to_string(a) + " of " + std::to_string(m.program->local_bytes));
}
inline void load_in_space(Machine& m, const Instr& in, u32 mask, u64* address, Space space) {
  const char* from[32];
  u32 bytes = (u32)in.element * in.vector;
  switch (space) {
    case Space::Global:
    case Space::Const:
      for (u32 left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        m.check_global(in, i, address[i], bytes);
        if (m.checks & CHECK_GLOBAL_RACE)
          m.note_global(in, i, address[i], bytes, in.strong ? Machine::STRONG_READ : Machine::READ);
        from[i] = (const char*)address[i];
      }
      if (m.statistics) m.count_global(in, address, mask, bytes);
      break;
    case Space::Shared:
      for (u32 left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        Machine& owner = in.clustered ? m.owner_of(in, i, address[i]) : m;
        m.check_shared(in, i, address[i], bytes);
        if (&owner != &m)
          m.note_peer_access(in, i, address[i], bytes, owner, false);
        else if (m.checks & (CHECK_UNINITIALISED | CHECK_SHARED_RACE))
          m.note_shared_read(in, i, address[i], bytes, in.strong);
        from[i] = owner.shared.data() + address[i];
      }
      if (m.statistics) m.count_shared(in, address, mask, bytes);
      break;
    case Space::Param:
      for (u32 left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        if (address[i] + bytes > m.launch->params.size())
          m.fault(in, i, "parameter read out of bounds at offset " + std::to_string(address[i]));
        from[i] = (const char*)m.launch->params.data() + address[i];
      }
      break;
    default:
      for (u32 left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        check_local(m, in, i, address[i], bytes);
        from[i] = m.local_memory(i) + address[i];
      }
      if (m.statistics) {
        Counters& c = m.counter(in);
        c.requests++;
        c.bytes += (u64)__builtin_popcount(mask) * bytes;
      }
  }
  load_from(m, in, mask, from);
  if (in.strong && (m.checks & CHECK_SHARED_RACE) && !m.flags.empty())
    for (u32 left = mask; left; left &= left - 1) m.synchronise_through(address[__builtin_ctz(left)], false, true, mask);
}
inline void store_in_space(Machine& m, const Instr& in, u32 mask, u64* address, Space space) {
  u32 bytes = (u32)in.element * in.vector;
  alignas(16) char data[64];
  m.serial++;
  if (in.aligned) m.warp->fenced = true;
  if (in.strong && (m.checks & CHECK_SHARED_RACE))
    for (u32 left = mask; left; left &= left - 1) m.synchronise_through(address[__builtin_ctz(left)], true, false, mask);
  switch (space) {
    case Space::Global:
      for (u32 left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        m.check_global(in, i, address[i], bytes, true);
        if (m.checks & CHECK_GLOBAL_RACE) m.note_global(in, i, address[i], bytes, in.strong ? Machine::ATOMIC : Machine::WRITE);
        fetch_store_data(m, in, i, data);
        if (m.checks & CHECK_GLOBAL_RACE)
          for (u32 before = mask & ((1u << i) - 1); before; before &= before - 1) {
            int j = __builtin_ctz(before);
            if (address[j] == address[i] && std::memcmp((char*)address[i], data, bytes) != 0)
              m.fault(in, i,
                      "lanes " + std::to_string(j) + " and " + std::to_string(i) +
                          " of one instruction write different values to " + Machine::hex(address[i]) + " " +
                          m.nearest(address[i]));
          }
        std::memcpy((char*)address[i], data, bytes);
      }
      if (m.statistics) m.count_global(in, address, mask, bytes);
      break;
    case Space::Shared:
      for (u32 left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        Machine& owner = in.clustered ? m.owner_of(in, i, address[i]) : m;
        m.check_shared(in, i, address[i], bytes);
        fetch_store_data(m, in, i, data);
        if (&owner != &m)
          m.note_peer_access(in, i, address[i], bytes, owner, true);
        else if (m.checks & (CHECK_UNINITIALISED | CHECK_SHARED_RACE))
          m.note_shared_write(in, i, address[i], bytes, data, in.strong);
        std::memcpy(owner.shared.data() + address[i], data, bytes);
      }
      if (m.statistics) m.count_shared(in, address, mask, bytes);
      break;
    case Space::Local:
      for (u32 left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        check_local(m, in, i, address[i], bytes);
        fetch_store_data(m, in, i, data);
        std::memcpy(m.local_memory(i) + address[i], data, bytes);
      }
      if (m.statistics) {
        Counters& c = m.counter(in);
        c.requests++;
        c.bytes += (u64)__builtin_popcount(mask) * bytes;
      }
      break;
    default:
      m.fault(in, __builtin_ctz(mask), "store to a read-only state space");
  }
}
// The kernel before this one has ended, and what it wrote is there: for the threads that wait.
inline void wait_for_grid(Machine& m, const Instr&, u32 mask) { m.warp->waited |= mask; }
// The address, in the block of rank src[1], of what is at src[0] in this one.
template <class T>
inline void map_to_peer(Machine& m, const Instr& in, u32 mask) {
  const T* from = m.at<T>(in.src[0]);
  const u32* rank = m.at<u32>(in.src[1]);
  T* to = m.at<T>(in.dst[0]);
  for (u32 left = mask; left; left &= left - 1) {
    int i = __builtin_ctz(left);
    if (rank[i] >= (m.cluster ? m.cluster->members.size() : 1))
      m.fault(in, i, "there is no block " + std::to_string(rank[i]) + " in the cluster");
    to[i] = (from[i] & ~((T)0xff << RANK_SHIFT)) | (T)(rank[i] + 1) << RANK_SHIFT;
  }
}
template <class T>
inline void rank_of_address(Machine& m, const Instr& in, u32 mask) {
  const T* from = m.at<T>(in.src[0]);
  u32* to = m.at<u32>(in.dst[0]);
  for (u32 left = mask; left; left &= left - 1) {
    int i = __builtin_ctz(left);
    const u32 rank = (u32)(from[i] >> RANK_SHIFT) & 0xff;
    to[i] = rank ? rank - 1 : m.rank;
  }
}
// Calls body(space, submask) with addresses made relative to each lane's state space.
template <class Body>
inline void split_by_space(Machine&, const Instr& in, u32 mask, u64* address, Body body) {
  if (in.space != Space::Generic) {
    if (in.space == Space::Param) {
      u32 in_local = 0;
      for (int i = 0; i < 32; ++i)
        if ((mask >> i & 1) && (address[i] & PARAM_IN_LOCAL)) {
          address[i] -= PARAM_IN_LOCAL;
          in_local |= 1u << i;
        }
      if (in_local) body(Space::Local, in_local);
      if (mask & ~in_local) body(Space::Param, mask & ~in_local);
      return;
    }
    body(in.space, mask);
    return;
  }
  u32 shared = 0, local = 0;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    u64 window = address[i] >> 56;
    if (window == 1) {
      shared |= 1u << i;
      address[i] -= SHARED_WINDOW;
    } else if (window == 2) {
      local |= 1u << i;
      address[i] -= LOCAL_WINDOW;
    }
  }
  u32 global = mask & ~shared & ~local;
  if (global) body(Space::Global, global);
  if (shared) body(Space::Shared, shared);
  if (local) body(Space::Local, local);
}
inline void load(Machine& m, const Instr& in, u32 mask) {
  u64 address[32];
  gather_addresses(m, in, address);
  split_by_space(m, in, mask, address, [&](Space space, u32 lanes) { load_in_space(m, in, lanes, address, space); });
}
inline void store(Machine& m, const Instr& in, u32 mask) {
  u64 address[32];
  gather_addresses(m, in, address);
  split_by_space(m, in, mask, address, [&](Space space, u32 lanes) { store_in_space(m, in, lanes, address, space); });
}

enum class AtomOp : u8 { Add, Min, Max, Inc, Dec, Cas, Exch, And, Or, Xor };
inline u64 atomic_result(const Instr& in, AtomOp op, u64 old, u64 b, u64 c) {
  Type t = (Type)in.type;
  switch (op) {
    case AtomOp::Exch:
      return b;
    case AtomOp::Cas:
      return old == b ? c : old;
    case AtomOp::And:
      return old & b;
    case AtomOp::Or:
      return old | b;
    case AtomOp::Xor:
      return old ^ b;
    case AtomOp::Inc:
      return (u32)old >= (u32)b ? 0 : old + 1;
    case AtomOp::Dec:
      return ((u32)old == 0 || (u32)old > (u32)b) ? b : old - 1;
    default:
      break;
  }
  if (is_integer(t)) {
    u64 x = extend(old, t), y = extend(b, t);
    if (op == AtomOp::Add) return x + y;
    bool less = is_signed_type(t) ? (s64)x < (s64)y : x < y;
    return (op == AtomOp::Min) == less ? x : y;
  }
  if (t == Type::F32) {
    f32 x = bit_cast<f32>((u32)old), y = bit_cast<f32>((u32)b);
    return bit_cast<u32>(op == AtomOp::Add ? x + y : op == AtomOp::Min ? ptx_min(x, y, false) : ptx_max(x, y, false));
  }
  if (t == Type::F64) {
    f64 x = bit_cast<f64>(old), y = bit_cast<f64>(b);
    return bit_cast<u64>(op == AtomOp::Add ? x + y : op == AtomOp::Min ? ptx_min(x, y, false) : ptx_max(x, y, false));
  }
  Instr half = in;
  half.mode = (u8)(op == AtomOp::Add ? HalfOp::Add : op == AtomOp::Min ? HalfOp::Min : HalfOp::Max);
  switch (t) {
    case Type::F16:
      return half_apply<Half>(half, (u16)old, (u16)b, 0);
    case Type::BF16:
      return half_apply<BFloat>(half, (u16)old, (u16)b, 0);
    case Type::F16x2:
      return (u32)half_apply<Half>(half, (u16)old, (u16)b, 0) | (u32)half_apply<Half>(half, (u16)(old >> 16), (u16)(b >> 16), 0)
                                                                    << 16;
    default:
      return (u32)half_apply<BFloat>(half, (u16)old, (u16)b, 0) |
             (u32)half_apply<BFloat>(half, (u16)(old >> 16), (u16)(b >> 16), 0) << 16;
  }
}
inline std::atomic_flag& atomic_lock() {
  static std::atomic_flag lock = ATOMIC_FLAG_INIT;
  return lock;
}
inline void atomic(Machine& m, const Instr& in, u32 mask) {
  u64 address[32];
  gather_addresses(m, in, address);
  AtomOp op = (AtomOp)in.mode;
  u32 bytes = (u32)in.element * in.vector;
  m.serial++;
  if (in.aligned) {
    m.fenced_blocks[m.block_number] = 1;
    m.warp->fenced = true;
  }  // acquire/release semantics
  split_by_space(m, in, mask, address, [&](Space space, u32 lanes) {
    bool lock = m.launch->threaded && space == Space::Global;
    for (u32 left = lanes; left; left &= left - 1) {
      int i = __builtin_ctz(left);
      char* p;
      if (space == Space::Global) {
        m.check_global(in, i, address[i], bytes, true);
        if (m.checks & CHECK_GLOBAL_RACE) m.note_global(in, i, address[i], bytes, Machine::ATOMIC);
        p = (char*)address[i];
      } else if (space == Space::Shared) {
        m.check_shared(in, i, address[i], bytes);
        if (m.checks & (CHECK_UNINITIALISED | CHECK_SHARED_RACE)) {
          if (op != AtomOp::Exch) m.note_shared_read(in, i, address[i], bytes, true);
          m.note_shared_write(in, i, address[i], bytes, nullptr, true);
        }
        p = m.shared.data() + address[i];
      } else
        m.fault(in, i, "atomic operation on local memory");
      if (lock)
        while (atomic_lock().test_and_set(std::memory_order_acquire)) {
        }
      for (int v = 0; v < in.vector; ++v) {
        u64 old = 0;
        std::memcpy(&old, p + v * in.element, in.element);
        u64 b = m.read_raw(in.src[1 + v], i), c = op == AtomOp::Cas ? m.read_raw(in.src[2], i) : 0;
        if (in.element < 8) {
          b &= (1ull << (8 * in.element)) - 1;
          c &= (1ull << (8 * in.element)) - 1;
        }
        u64 fresh = atomic_result(in, op, old, b, c);
        std::memcpy(p + v * in.element, &fresh, in.element);
        if (in.dst_count) m.write_raw(in.dst[v], i, old);
      }
      if (m.checks & CHECK_SHARED_RACE) m.synchronise_through(address[i], true, true, lanes);
      if (lock) atomic_lock().clear(std::memory_order_release);
    }
    if (m.statistics) {
      if (space == Space::Global)
        m.count_global(in, address, lanes, bytes);
      else if (space == Space::Shared)
        m.count_shared(in, address, lanes, bytes);
    }
  });
}
inline void fence(Machine& m, const Instr&, u32) {
  m.fenced_blocks[m.block_number] = 1;
  m.warp->fenced = true;
}
inline void fence_block(Machine& m, const Instr&, u32) { m.warp->fenced = true; }
inline void no_operation(Machine&, const Instr&, u32) {}
inline void is_space(Machine& m, const Instr& in, u32 mask) {
  u32 bits = 0;
  for (int i = 0; i < 32; ++i) {
    u64 window = m.read_raw(in.src[0], i) >> 56;
    bool yes = in.space == Space::Shared ? window == 1 : in.space == Space::Local ? window == 2 : window == 0;
    bits |= (u32)yes << i;
  }
  m.set_predicate(in.dst[0], bits, mask);
}

// ---- asynchronous copies ----------------------------------------------------
inline void cp_async(Machine& m, const Instr& in, u32 mask) {  // src: to, from, [source bytes]; immediate/target: offsets
  u64 to[32], from[32];
  u32 bytes = in.element;
  m.serial++;
  u32 reading = 0;
  for (u32 left = mask; left; left &= left - 1) {
    int i = __builtin_ctz(left);
    to[i] = m.read_raw(in.src[0], i) + (u64)in.immediate;
    if (to[i] >> 56 == 1) to[i] -= SHARED_WINDOW;
    from[i] = m.read_raw(in.src[1], i) + (u64)(s64)(s32)in.target;
    u32 take = bytes;
    if (in.src_count > 2) {
      if (in.src[2].bytes == 0)
        take = (m.predicate(in.src[2]) >> i & 1) ? 0 : bytes;  // ignore-src predicate
      else
        take = (u32)std::min<u64>(bytes, m.read_raw(in.src[2], i));
    }
    PendingCopy c{};
    c.lane = (u32)i;
    c.group = m.warp->commits[i];
    c.bytes = bytes;
    c.to = to[i];
    c.line = in.line;
    m.check_shared(in, i, to[i], bytes);
    if (take) {
      if (from[i] & (bytes - 1))
        m.fault(in, i,
                "misaligned " + std::to_string(bytes) + "-byte cp.async source " + Machine::hex(from[i]) + " " +
                    m.nearest(from[i]));
      m.check_global(in, i, from[i], 1);
      if (from[i] + take > m.last_region->high)
        m.fault(in, i, "cp.async reads out of bounds at " + Machine::hex(from[i]) + " " + m.nearest(from[i]));
      if (m.checks & CHECK_GLOBAL_RACE) m.note_global(in, i, from[i], take, Machine::READ);
      std::memcpy(c.data, (const char*)from[i], take);
      reading |= 1u << i;
    }
    if (m.checks & (CHECK_UNINITIALISED | CHECK_SHARED_RACE)) m.note_shared_write(in, i, to[i], bytes, c.data, false, true);
    m.warp->copies.push_back(c);
  }
  if (m.statistics) {
    m.count_global(in, from, reading, bytes);
    m.count_shared(in, to, mask, bytes);
  }
}
inline void cp_async_commit(Machine& m, const Instr&, u32 mask) {
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) m.warp->commits[i]++;
}
inline void cp_async_wait(Machine& m, const Instr& in, u32 mask) {  // immediate: groups that may stay pending, -1 for wait_all
  auto& copies = m.warp->copies;
  m.serial++;
  size_t kept = 0;
  for (auto& c : copies) {
    bool done = (mask >> c.lane & 1) && (in.immediate < 0 || (s64)c.group < (s64)m.warp->commits[c.lane] - in.immediate);
    if (done)
      m.land_copy(c);
    else
      copies[kept++] = c;
  }
  copies.resize(kept);
}

// ---- exchange between lanes -------------------------------------------------
inline void shfl(Machine& m, const Instr& in, u32 mask) {  // mode: 0 up 1 down 2 bfly 3 idx
  u32 result[32], valid = 0;
  const u32* a = m.at<u32>(in.src[0]);
  const u32 *b = m.at<u32>(in.src[1]), *c = m.at<u32>(in.src[2]);
  for (u32 left = mask; left; left &= left - 1) {
    int lane = __builtin_ctz(left);
    int bval = (int)(b[lane] & 31), cval = (int)(c[lane] & 31), segment = (int)(c[lane] >> 8 & 31);
    int max_lane = (lane & segment) | (cval & ~segment), min_lane = lane & segment;
    int j;
    bool ok;
    switch (in.mode) {
      case 0:
        j = lane - bval;
        ok = j >= max_lane;
        break;
      case 1:
        j = lane + bval;
        ok = j <= max_lane;
        break;
      case 2:
        j = lane ^ bval;
        ok = j <= max_lane;
        break;
      default:
        j = min_lane | (bval & ~segment);
        ok = j <= max_lane;
    }
    if (!ok) j = lane;
    if (!(mask >> j & 1) && (m.checks & CHECK_CONVERGENCE))
      m.fault(in, lane, "shfl.sync reads lane " + std::to_string(j) + ", which does not take part");
    result[lane] = a[j];
    valid |= (u32)ok << lane;
  }
  u32* d = in.dst[0].sink ? nullptr : m.at<u32>(in.dst[0]);
  if (d)
    for (u32 left = mask; left; left &= left - 1) {
      int i = __builtin_ctz(left);
      d[i] = result[i];
    }
  if (in.dst_count > 1) m.set_predicate(in.dst[1], valid, mask);
}
inline void vote(Machine& m, const Instr& in, u32 mask) {  // mode: 0 all 1 any 2 uni 3 ballot
  u32 p = m.predicate(in.src[0]);
  if (in.mode == 3) {
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) m.write_raw(in.dst[0], i, p & mask);
    return;
  }
  bool all = (p & mask) == mask, any = (p & mask) != 0;
  bool r = in.mode == 0 ? all : in.mode == 1 ? any : all || !any;
  m.set_predicate(in.dst[0], r ? ALL_LANES : 0, mask);
}
inline void match_sync(Machine& m, const Instr& in, u32 mask) {
  u64 v[32];
  for (int i = 0; i < 32; ++i) v[i] = m.read_raw(in.src[0], i);
  if (in.mode == 0) {
    u32 same[32];
    for (int i = 0; i < 32; ++i) {
      same[i] = 0;
      for (int j = 0; j < 32; ++j)
        if ((mask >> j & 1) && v[i] == v[j]) same[i] |= 1u << j;
    }
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) m.write_raw(in.dst[0], i, same[i]);
  } else {
    bool all = true;
    int first = __builtin_ctz(mask);
    for (int i = 0; i < 32; ++i)
      if ((mask >> i & 1) && v[i] != v[first]) all = false;
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) m.write_raw(in.dst[0], i, all ? mask : 0);
    if (in.dst_count > 1) m.set_predicate(in.dst[1], all ? ALL_LANES : 0, mask);
  }
}
inline void redux(Machine& m, const Instr& in, u32 mask) {
  u64 total = m.read_raw(in.src[0], __builtin_ctz(mask));
  for (u32 left = mask & (mask - 1); left; left &= left - 1)
    total = atomic_result(in, (AtomOp)in.mode, total, m.read_raw(in.src[0], __builtin_ctz(left)), 0);
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) m.write_raw(in.dst[0], i, (u32)total);
}
inline void active_mask(Machine& m, const Instr& in, u32 mask) {
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) m.write_raw(in.dst[0], i, mask);
}
inline void elect(Machine& m, const Instr& in, u32 mask) {
  int leader = __builtin_ctz(mask);
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) m.write_raw(in.dst[0], i, (u64)leader);
  m.set_predicate(in.dst[1], 1u << leader, mask);
}

// ---- matrices ---------------------------------------------------------------
inline void matrix_rows(Machine& m, const Instr& in, int count, u64* address) {
  u64 all[32];
  gather_addresses(m, in, all);
  for (int i = 0; i < 8 * count; ++i) {
    address[i] = all[i] >> 56 == 1 ? all[i] - SHARED_WINDOW : all[i];
    m.check_shared(in, i, address[i], 16);
  }
  if (m.statistics) m.count_shared(in, address, count == 4 ? ALL_LANES : (1u << (8 * count)) - 1, 16);
}
inline void ldmatrix(Machine& m, const Instr& in, u32) {
  u64 row[32];
  int count = in.dst_count;
  matrix_rows(m, in, count, row);
  if (m.checks & (CHECK_UNINITIALISED | CHECK_SHARED_RACE))
    for (int i = 0; i < 8 * count; ++i) m.note_shared_read(in, MANY_LANES, row[i], 16, false);
  for (int k = 0; k < count; ++k) {
    u16 tile[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(tile[r], m.shared.data() + row[8 * k + r], 16);
    u32* d = m.at<u32>(in.dst[k]);
    for (int lane = 0; lane < 32; ++lane) {
      int r = lane / 4, c = lane % 4 * 2;
      d[lane] = in.trans ? (u32)tile[c][r] | (u32)tile[c + 1][r] << 16 : (u32)tile[r][c] | (u32)tile[r][c + 1] << 16;
    }
  }
}
inline void stmatrix(Machine& m, const Instr& in, u32) {
  u64 row[32];
  int count = in.src_count - 1;
  matrix_rows(m, in, count, row);
  m.serial++;
  for (int k = 0; k < count; ++k) {
    u16 tile[8][8];
    const u32* s = m.at<u32>(in.src[1 + k]);
    for (int lane = 0; lane < 32; ++lane) {
      int r = lane / 4, c = lane % 4 * 2;
      if (in.trans) {
        tile[c][r] = (u16)s[lane];
        tile[c + 1][r] = (u16)(s[lane] >> 16);
      } else {
        tile[r][c] = (u16)s[lane];
        tile[r][c + 1] = (u16)(s[lane] >> 16);
      }
    }
    for (int r = 0; r < 8; ++r) {
      if (m.checks & (CHECK_UNINITIALISED | CHECK_SHARED_RACE))
        m.note_shared_write(in, MANY_LANES, row[8 * k + r], 16, tile[r], false);
      std::memcpy(m.shared.data() + row[8 * k + r], tile[r], 16);
    }
  }
}
inline void movmatrix(Machine& m, const Instr& in, u32) {
  u16 tile[8][8];
  const u32* s = m.at<u32>(in.src[0]);
  for (int lane = 0; lane < 32; ++lane) {
    tile[lane / 4][lane % 4 * 2] = (u16)s[lane];
    tile[lane / 4][lane % 4 * 2 + 1] = (u16)(s[lane] >> 16);
  }
  u32* d = m.at<u32>(in.dst[0]);
  for (int lane = 0; lane < 32; ++lane) {
    int r = lane / 4, c = lane % 4 * 2;
    d[lane] = (u32)tile[c][r] | (u32)tile[c + 1][r] << 16;
  }
}
enum class MmaType : u8 { F16, BF16, TF32, S8, U8, F64, E4M3, E5M2, F32, S32 };
template <class T>
inline T mma_element(u64 word, int i, MmaType t) {
  switch (t) {
    case MmaType::F16:
      return (T)Half::to_float((u16)(word >> (16 * i)));
    case MmaType::BF16:
      return (T)BFloat::to_float((u16)(word >> (16 * i)));
    case MmaType::TF32:
      return (T)bit_cast<f32>((u32)word & ~0x1fffu);
    case MmaType::S8:
      return (T)(s8)(word >> (8 * i));
    case MmaType::U8:
      return (T)(u8)(word >> (8 * i));
    case MmaType::E4M3:
      return (T)e4m3_to_float((u8)(word >> (8 * i)));
    case MmaType::E5M2:
      return (T)e5m2_to_float((u8)(word >> (8 * i)));
    default:
      return (T)bit_cast<f64>(word);
  }
}
// Every register of a fragment holds `per` consecutive k elements; registers alternate rows g, g+8 and step k by 4*per.
template <class T>
void mma_shape(Machine& m, const Instr& in) {
  MmaType ta = (MmaType)in.type, tb = (MmaType)in.type2, tc = (MmaType)in.mode, td = (MmaType)in.mode2;
  auto per_register = [](MmaType t) {
    return t == MmaType::F16 || t == MmaType::BF16 ? 2 : t == MmaType::TF32 || t == MmaType::F64 ? 1 : 4;
  };
  int per = per_register(ta);
  int rows = in.m, depth = in.k;
  int a_count = rows * depth / 32 / per, b_count = 8 * depth / 32 / per;
  T A[16][32], B[32][8], C[16][8];
  int at = 0;
  for (int r = 0; r < a_count; ++r, ++at) {
    int row = rows == 16 ? 8 * (r & 1) : 0, col = (rows == 16 ? r >> 1 : r) * 4 * per;
    for (int lane = 0; lane < 32; ++lane) {
      u64 w = m.read_raw(in.src[at], lane);
      for (int i = 0; i < per; ++i) A[row + lane / 4][col + lane % 4 * per + i] = mma_element<T>(w, i, ta);
    }
  }
  for (int r = 0; r < b_count; ++r, ++at)
    for (int lane = 0; lane < 32; ++lane) {
      u64 w = m.read_raw(in.src[at], lane);
      for (int i = 0; i < per; ++i) B[r * 4 * per + lane % 4 * per + i][lane / 4] = mma_element<T>(w, i, tb);
    }
  int halves = rows / 8;
  for (int h = 0; h < halves; ++h)
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 2; ++i) {
        T v;
        if (tc == MmaType::F16)
          v = (T)Half::to_float((u16)(m.read_raw(in.src[at + h], lane) >> (16 * i)));
        else {
          u64 w = m.read_raw(in.src[at + 2 * h + i], lane);
          v = tc == MmaType::F32 ? (T)bit_cast<f32>((u32)w) : tc == MmaType::S32 ? (T)(s32)w : (T)bit_cast<f64>(w);
        }
        C[8 * h + lane / 4][lane % 4 * 2 + i] = v;
      }
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < depth; ++k) {
      T a = A[r][k];
#pragma GCC ivdep
      for (int c = 0; c < 8; ++c) C[r][c] += a * B[k][c];
    }
  for (int h = 0; h < halves; ++h)
    for (int lane = 0; lane < 32; ++lane) {
      T x = C[8 * h + lane / 4][lane % 4 * 2], y = C[8 * h + lane / 4][lane % 4 * 2 + 1];
      if (td == MmaType::F16) {
        m.at<u32>(in.dst[h])[lane] = (u32)Half::from_double((f64)x) | (u32)Half::from_double((f64)y) << 16;
        continue;
      }
      for (int i = 0; i < 2; ++i) {
        T v = i ? y : x;
        const Ref& d = in.dst[2 * h + i];
        if (td == MmaType::F32)
          m.at<f32>(d)[lane] = toward_zero((f64)v);
        else if (td == MmaType::F64)
          m.at<f64>(d)[lane] = (f64)v;
        else {
          s64 wide = (s64)v;
          if (in.sat) wide = std::max<s64>(std::min<s64>(wide, 2147483647), -2147483648ll);
          m.at<u32>(d)[lane] = (u32)wide;
        }
      }
    }
}
inline void mma_float(Machine& m, const Instr& in, u32) { mma_shape<f64>(m, in); }
inline void mma_integer(Machine& m, const Instr& in, u32) { mma_shape<s64>(m, in); }

// ---- mbarrier (CTA-local, simple form) --------------------------------------
inline u64 mbarrier_address(Machine& m, const Instr& in, int lane) {
  u64 a = m.read_raw(in.src[0], lane) + (u64)in.immediate;
  if (a >> 56 == 1) a -= SHARED_WINDOW;
  m.check_shared(in, lane, a, 8);
  return a;
}
inline MBarrier& mbarrier_at(Machine& m, const Instr& in, int lane, u64 a) {
  auto it = m.mbarriers.find(a);
  if (it == m.mbarriers.end())
    m.fault(in, lane, "mbarrier at offset " + std::to_string(a - SHARED_START) + " was never initialised");
  return it->second;
}
inline void mbarrier_complete_phase(MBarrier& b) {
  if (b.pending == 0 && b.transactions <= 0) {
    b.phase++;
    b.pending = b.expected;
    b.transactions = 0;
  }
}
inline void mbarrier_init(Machine& m, const Instr& in, u32 mask) {
  for (u32 left = mask; left; left &= left - 1) {
    int i = __builtin_ctz(left);
    MBarrier b{};
    b.expected = b.pending = (u32)m.read_raw(in.src[1], i);
    m.mbarriers[mbarrier_address(m, in, i)] = b;
  }
}
inline void mbarrier_inval(Machine& m, const Instr& in, u32 mask) {
  for (u32 left = mask; left; left &= left - 1) m.mbarriers.erase(mbarrier_address(m, in, __builtin_ctz(left)));
}
inline void mbarrier_arrive(Machine& m, const Instr& in,
                            u32 mask) {  // mode: 0 arrive, 1 arrive.expect_tx, 2 expect_tx, 3 complete_tx
  for (u32 left = mask; left; left &= left - 1) {
    int i = __builtin_ctz(left);
    MBarrier& b = mbarrier_at(m, in, i, mbarrier_address(m, in, i));
    u64 value = in.src_count > 1 ? m.read_raw(in.src[1], i) : 1;
    if (in.dst_count) m.write_raw(in.dst[0], i, b.phase);
    if (in.mode == 1 || in.mode == 2) b.transactions += (s64)value;
    if (in.mode == 3) b.transactions -= (s64)value;
    u32 arrivals = in.mode == 0 ? (u32)value : in.mode == 1 ? 1 : 0;
    if (arrivals > b.pending) m.fault(in, i, "more arrivals at an mbarrier than it expects");
    b.pending -= arrivals;
    for (int w = 0; w < MAX_WARPS; ++w) b.seen[w] = std::max(b.seen[w], m.warp->seen[w]);
    b.seen[m.warp->index] = std::max(b.seen[m.warp->index], m.warp->clock + 1);
    mbarrier_complete_phase(b);
  }
  m.synchronise_lanes(*m.warp, mask);
}
inline void mbarrier_test(Machine& m, const Instr& in, u32 mask) {  // flag: parity form
  u32 done = 0;
  for (u32 left = mask; left; left &= left - 1) {
    int i = __builtin_ctz(left);
    MBarrier& b = mbarrier_at(m, in, i, mbarrier_address(m, in, i));
    u64 v = m.read_raw(in.src[1], i);
    bool ok = in.flag ? (b.phase & 1) != (v & 1) : b.phase != (u32)v;
    if (ok) {
      done |= 1u << i;
      for (int w = 0; w < MAX_WARPS; ++w) m.warp->seen[w] = std::max(m.warp->seen[w], b.seen[w]);
    }
  }
  m.set_predicate(in.dst[0], done, mask);
  if (done) m.synchronise_lanes(*m.warp, done);
  if (done != mask) m.forced_switch = true;
}
inline void trap(Machine& m, const Instr& in, u32 mask) { m.fault(in, __builtin_ctz(mask), "trap"); }
inline void unsupported(Machine& m, const Instr& in, u32 mask) {
  m.fault(in, __builtin_ctz(mask), "unsupported instruction " + (in.text ? *in.text : ""));
}
