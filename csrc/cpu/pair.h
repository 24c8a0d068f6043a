// Two vectors as one of twice the lanes, and two of these as one again. What waits for its own result, as most of a small
// decomposition does, then takes two groups of matrices through in the time of one.
//
// Code for V, which is Vec<T> or a Pair, uses operators and the overloads below, which find T themselves.
#pragma once

#include "simd.h"

namespace rmm {
namespace RMM_ISA {

template <class M>
struct PairMask {
  M low, high;
};

template <class V>
struct Pair {
  V low, high;

  Pair() = default;
  RMM_INLINE Pair(const V& low, const V& high) : low(low), high(high) {}
  // GCC copies an aggregate of vectors through general registers.
  RMM_INLINE Pair(const Pair& other) : low(other.low), high(other.high) {}
  RMM_INLINE Pair& operator=(const Pair& other) {
    low = other.low;
    high = other.high;
    return *this;
  }
};

template <class V>
struct Lanes;
template <>
struct Lanes<Vec<float>> {
  using Scalar = float;
};
template <>
struct Lanes<Vec<double>> {
  using Scalar = double;
};
template <class V>
struct Lanes<Pair<V>> {
  using Scalar = typename Lanes<V>::Scalar;
};
template <class V>
using Scalar = typename Lanes<V>::Scalar;

#define RMM_PAIR(op)                                                    \
  template <class V>                                                    \
  RMM_INLINE Pair<V> operator op(const Pair<V>& x, const Pair<V>& y) {  \
    return {x.low op y.low, x.high op y.high};                          \
  }                                                                     \
  template <class V>                                                    \
  RMM_INLINE Pair<V> operator op(Scalar<V> x, const Pair<V>& y) {       \
    return {x op y.low, x op y.high};                                   \
  }                                                                     \
  template <class V>                                                    \
  RMM_INLINE Pair<V> operator op(const Pair<V>& x, Scalar<V> y) {       \
    return {x.low op y, x.high op y};                                   \
  }                                                                     \
  template <class V>                                                    \
  RMM_INLINE Pair<V>& operator op## = (Pair<V> & x, const Pair<V>& y) { \
    return x = x op y;                                                  \
  }
RMM_PAIR(+)
RMM_PAIR(-)
RMM_PAIR(*)
RMM_PAIR(/)
#undef RMM_PAIR

#define RMM_PAIR(op)                                                             \
  template <class V>                                                             \
  RMM_INLINE auto operator op(const Pair<V>& x, const Pair<V>& y) {              \
    return PairMask<decltype(x.low op y.low)>{x.low op y.low, x.high op y.high}; \
  }                                                                              \
  template <class V>                                                             \
  RMM_INLINE auto operator op(const Pair<V>& x, Scalar<V> y) {                   \
    return PairMask<decltype(x.low op y)>{x.low op y, x.high op y};              \
  }
RMM_PAIR(<)
RMM_PAIR(>)
RMM_PAIR(<=)
RMM_PAIR(>=)
RMM_PAIR(==)
#undef RMM_PAIR

template <class V>
RMM_INLINE Pair<V> operator-(const Pair<V>& x) {
  return {-x.low, -x.high};
}
template <class M>
RMM_INLINE PairMask<M> operator~(PairMask<M> x) {
  return {~x.low, ~x.high};
}
template <class M>
RMM_INLINE PairMask<M> operator&(PairMask<M> x, PairMask<M> y) {
  return {x.low & y.low, x.high & y.high};
}
template <class M>
RMM_INLINE PairMask<M> operator|(PairMask<M> x, PairMask<M> y) {
  return {x.low | y.low, x.high | y.high};
}
template <class M>
RMM_INLINE PairMask<M>& operator&=(PairMask<M>& x, PairMask<M> y) {
  return x = x & y;
}

template <class M, class V>
RMM_INLINE V select(M mask, V yes, V no) {
  return mask ? yes : no;
}
template <class M, class V>
RMM_INLINE Pair<V> select(PairMask<M> mask, const Pair<V>& yes, const Pair<V>& no) {
  return {select(mask.low, yes.low, no.low), select(mask.high, yes.high, no.high)};
}

template <class V>
RMM_INLINE V splat_as(Scalar<V> value) {
  return V{} + value;
}

RMM_INLINE bool any(Mask<float> mask) { return any<float>(mask); }
RMM_INLINE bool any(Mask<double> mask) { return any<double>(mask); }
template <class M>
RMM_INLINE bool any(PairMask<M> mask) {
  return any(mask.low | mask.high);
}

template <class V>
RMM_INLINE V abs(V v) {
  return abs<Scalar<V>>(v);
}
template <class V>
RMM_INLINE Pair<V> abs(const Pair<V>& v) {
  return {abs(v.low), abs(v.high)};
}

// The smaller of two; y where either is NaN.
template <class V>
RMM_INLINE V smaller(V x, V y) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Scalar<V>) == 4) return (V)_mm512_maskz_min_ps(0xffff, (__m512)x, (__m512)y);
  if constexpr (sizeof(Scalar<V>) == 8) return (V)_mm512_maskz_min_pd(0xff, (__m512d)x, (__m512d)y);
#elif defined(__AVX2__)
  if constexpr (sizeof(Scalar<V>) == 4) return (V)_mm256_min_ps((__m256)x, (__m256)y);
  if constexpr (sizeof(Scalar<V>) == 8) return (V)_mm256_min_pd((__m256d)x, (__m256d)y);
#else
  return x < y ? x : y;
#endif
}
template <class V>
RMM_INLINE Pair<V> smaller(const Pair<V>& x, const Pair<V>& y) {
  return {smaller(x.low, y.low), smaller(x.high, y.high)};
}

// The larger of two; y where either is NaN.
template <class V>
RMM_INLINE V larger(V x, V y) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Scalar<V>) == 4) return (V)_mm512_maskz_max_ps(0xffff, (__m512)x, (__m512)y);
  if constexpr (sizeof(Scalar<V>) == 8) return (V)_mm512_maskz_max_pd(0xff, (__m512d)x, (__m512d)y);
#elif defined(__AVX2__)
  if constexpr (sizeof(Scalar<V>) == 4) return (V)_mm256_max_ps((__m256)x, (__m256)y);
  if constexpr (sizeof(Scalar<V>) == 8) return (V)_mm256_max_pd((__m256d)x, (__m256d)y);
#else
  return x > y ? x : y;
#endif
}

template <class V>
RMM_INLINE Pair<V> larger(const Pair<V>& x, const Pair<V>& y) {
  return {larger(x.low, y.low), larger(x.high, y.high)};
}

template <class V>
RMM_INLINE V rsqrt(V v) {
  return rsqrt<Scalar<V>>(v);
}
template <class V>
RMM_INLINE Pair<V> rsqrt(const Pair<V>& v) {
  return {rsqrt(v.low), rsqrt(v.high)};
}

template <class V>
RMM_INLINE V copy_sign(V magnitude, V sign) {
  return copy_sign<Scalar<V>>(magnitude, sign);
}
template <class V>
RMM_INLINE Pair<V> copy_sign(const Pair<V>& magnitude, const Pair<V>& sign) {
  return {copy_sign(magnitude.low, sign.low), copy_sign(magnitude.high, sign.high)};
}

}  // namespace RMM_ISA
}  // namespace rmm
