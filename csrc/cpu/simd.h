// Vectors of the compiler's own vector types: one lane per matrix or position.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../common/view.h"
#include "isa.h"

#if defined(__AVX2__)
#include <immintrin.h>  // for what compilers have no vector operation of, or a slow one
#endif

namespace rmm {
namespace RMM_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class T, int Bytes = kBytes>
struct VecOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));

// The integer a comparison of T yields per lane, and the bits of T.
template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = int32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr int32_t rsqrt_magic = 0x5f375a86;
  static constexpr float tiny = 1e-30f;  // squares below this count as zero
  static constexpr float epsilon = 1.1920929e-7f;
  static constexpr float largest = 3.40282347e38f;
  static constexpr float deficient = 1e-6f;                        // σ below this fraction of the largest counts as zero
  static constexpr float zero = 3e-9f, zero_square = zero * zero;  // far below the rounding of a matrix scaled to [2, 4)
};
template <>
struct Bits<double> {
  using type = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr int64_t rsqrt_magic = 0x5fe6eb50c7b537a9;
  static constexpr double tiny = 1e-280;
  static constexpr double epsilon = 2.220446049250313e-16;
  static constexpr double largest = 1.7976931348623157e308;
  static constexpr double deficient = 1e-14;
  static constexpr double zero = 6e-18, zero_square = zero * zero;
};
template <class T>
using Mask = typename VecOf<typename Bits<T>::type>::type;

#define RMM_INLINE inline __attribute__((always_inline))

template <class T>
RMM_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};  // −0 stays −0
}

template <class T>
RMM_INLINE Vec<T> load(const T* from) {
  Vec<T> v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
RMM_INLINE void store(T* to, Vec<T> v) {
  memcpy(to, &v, sizeof v);
}

template <class T>
RMM_INLINE Vec<T> select(Mask<T> mask, Vec<T> yes, Vec<T> no) {
  return mask ? yes : no;
}

template <class T>
RMM_INLINE Vec<T> abs(Vec<T> v) {
  using I = typename Bits<T>::type;
  const I sign = I(1) << (sizeof(T) * 8 - 1);
  return (Vec<T>)((Mask<T>)v & ~sign);
}

// The larger of a magnitude and |v|, by their bits, which order as magnitudes do; NaN and Inf come out above all others.
template <class T>
RMM_INLINE Mask<T> larger_magnitude(Mask<T> magnitude, Vec<T> v) {
  const Mask<T> bits = (Mask<T>)abs<T>(v);
  return bits > magnitude ? bits : magnitude;
}

// |magnitude| with the sign of `sign`.
template <class T>
RMM_INLINE Vec<T> copy_sign(Vec<T> magnitude, Vec<T> sign) {
  using I = typename Bits<T>::type;
  const I bit = I(1) << (sizeof(T) * 8 - 1);
  return (Vec<T>)(((Mask<T>)magnitude & ~bit) | ((Mask<T>)sign & bit));
}

template <class T>
RMM_INLINE bool any(Mask<T> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  typedef int64_t Words __attribute__((vector_size(kBytes)));
  const Words words = (Words)mask;
  int64_t all = 0;
  for (int i = 0; i < kBytes / 8; ++i) all |= words[i];
  return all != 0;
#endif
}

// 1/√x for normal x > 0, to an ulp or so: bit trick and Newton steps, cheaper than the hardware's sqrt and division and
// the same sequence of operations on every instruction set.
template <class T>
RMM_INLINE Vec<T> rsqrt(Vec<T> x) {
  constexpr int steps = sizeof(T) == 4 ? 3 : 4;
  Vec<T> y = (Vec<T>)(Bits<T>::rsqrt_magic - ((Mask<T>)x >> 1));
  const Vec<T> half = T(0.5) * x;
  for (int i = 0; i < steps - 1; ++i) y = y * (T(1.5) - half * y * y);
  // Last step in residual form, which keeps its rounding error out of y.
  const Vec<T> residual = T(0.5) - (half * y) * y;
  return y + y * residual;
}

// Scratch of `count` V, aligned to the cache's lines; freed with the object.
template <class V>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<V*>(aligned_alloc(64, (static_cast<size_t>(count) * sizeof(V) + 127) / 64 * 64))) {
    if (data_ == nullptr) abort();  // a few hundred KiB: the process is out of memory
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next `count` of them.
  V* take(int64_t count) {
    V* const taken = data_ + used_;
    used_ += count;
    return taken;
  }

 private:
  V* data_;
  int64_t used_ = 0;
};

}  // namespace RMM_ISA
}  // namespace rmm
