// Dense pieces on one matrix per lane of V, which is Vec<T> or a Pair: dot products, Householder QR, completion of deficient
// columns.
//
// Matrices are column-major, a column being `rows` consecutive V. Their entries are finite, and their largest not far from 1.
#pragma once

#include <math.h>

#include "pair.h"
#include "tile.h"

namespace rmm {
namespace RMM_ISA {

template <class V>
RMM_INLINE V dot(const V* a, const V* b, int64_t rows) {
  V sum[4] = {};  // four chains: one does not wait for the other, and each rounds less
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    for (int c = 0; c < 4; ++c) sum[c] += a[i + c] * b[i + c];
  }
  for (int c = 0; i < rows; ++i, ++c) sum[c] += a[i] * b[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// out[c] = a · columns[c], c < count.
template <class V>
RMM_INLINE void dots(const V* a, const V* columns, int64_t rows, int64_t count, V* out) {
  int64_t c = 0;
  for (; c + 4 <= count; c += 4) {
    V sum[4] = {};
    for (int64_t i = 0; i < rows; ++i) {
      for (int b = 0; b < 4; ++b) sum[b] += a[i] * columns[(c + b) * rows + i];
    }
    for (int b = 0; b < 4; ++b) out[c + b] = sum[b];
  }
  for (; c < count; ++c) out[c] = dot(a, columns + c * rows, rows);
}

// columns ← (I − tau v vᵀ) columns, `count` of them, `stride` apart: two at a time, which share v and do not wait for each
// other.
template <class V>
RMM_INLINE void reflect(const V* v, V tau, int64_t rows, V* columns, int64_t stride, int64_t count) {
  int64_t c = 0;
  for (; c + 2 <= count; c += 2) {
    V *const a = columns + c * stride, *const b = a + stride;
    V sum[4] = {};
    int64_t i = 0;
    for (; i + 2 <= rows; i += 2) {
      sum[0] += v[i] * a[i];
      sum[1] += v[i] * b[i];
      sum[2] += v[i + 1] * a[i + 1];
      sum[3] += v[i + 1] * b[i + 1];
    }
    if (i < rows) {
      sum[0] += v[i] * a[i];
      sum[1] += v[i] * b[i];
    }
    const V step_a = tau * (sum[0] + sum[2]), step_b = tau * (sum[1] + sum[3]);
    for (i = 0; i < rows; ++i) {
      const V vi = v[i];
      a[i] -= step_a * vi;
      b[i] -= step_b * vi;
    }
  }
  if (c < count) {
    V* const a = columns + c * stride;
    const V step = tau * dot(v, a, rows);
    for (int64_t i = 0; i < rows; ++i) a[i] -= step * v[i];
  }
}

// A Householder reflection I − tau v vᵀ, and what it makes of the first entry of the vector it was made from.
template <class V>
struct Reflector {
  V tau, diagonal;
};

// The reflection that takes v [length] to a multiple of e_0, whose v replaces it. One without norm gives I.
template <class V>
RMM_INLINE Reflector<V> reflector(V* v, int64_t length) {
  using T = Scalar<V>;
  const V square = dot(v, v, length);
  const auto live = square > Bits<T>::tiny;
  const V safe = select(live, square, splat_as<V>(1));
  const V norm = safe * rsqrt(safe);
  const V first = v[0];
  v[0] = first + copy_sign(norm, first);
  return {select(live, T(2) / (safe + norm * (T(2) * abs(first) + norm)), V{}),  // 2 / vᵀv
          select(live, copy_sign(-norm, -first), first)};
}

// A = QR in place. Column j then holds R above its diagonal and the Householder vector from it on; R's diagonal goes to
// diagonal[j]; H_j = I − tau[j] v_j v_jᵀ.
template <class V>
void householder(V* a, int64_t rows, int64_t cols, V* tau, V* diagonal) {
  for (int64_t j = 0; j < cols; ++j) {
    V* const v = a + j * rows + j;
    const Reflector<V> h = reflector(v, rows - j);
    tau[j] = h.tau;
    diagonal[j] = h.diagonal;
    reflect(v, h.tau, rows - j, v + rows, rows, cols - j - 1);
  }
}

// columns ← Q columns, `count` of them of `rows` each.
template <class V>
void apply_q(const V* a, const V* tau, int64_t rows, int64_t cols, V* columns, int64_t count) {
  for (int64_t j = cols - 1; j >= 0; --j) reflect(a + j * rows + j, tau[j], rows - j, columns + j, rows, count);
}

// A Newton step towards norm 1, for a vector that has it to a few roundings.
template <class V>
RMM_INLINE void polish_norm(V* vector, int64_t rows) {
  using T = Scalar<V>;
  const V factor = T(1.5) - T(0.5) * dot(vector, vector, rows);
  for (int64_t i = 0; i < rows; ++i) vector[i] *= factor;
}

// In the lanes of `dead`, column c becomes what is left of the unit vector that sticks out most of the columns before it, those
// being orthonormal (twice Gram–Schmidt). By lanes, because hardly any need it.
template <class V, class M>
void complete(V* columns, int64_t rows, int64_t c, M dead) {
  using T = Scalar<V>;
  constexpr int W = sizeof(V) / sizeof(T);
  const auto* const dead_lanes = reinterpret_cast<const typename Bits<T>::type*>(&dead);
  for (int lane = 0; lane < W; ++lane) {
    if (!dead_lanes[lane]) continue;
    T* const entries = reinterpret_cast<T*>(columns) + lane;  // of column b, row i: entries[(b · rows + i) · W]
    T* const column = entries + c * rows * W;
    int64_t best = 0;
    T most = -1;
    for (int64_t i = 0; i < rows; ++i) {
      T left = 1;
      for (int64_t b = 0; b < c; ++b) left -= entries[(b * rows + i) * W] * entries[(b * rows + i) * W];
      if (left > most + T(1e-3)) most = left, best = i;  // by a margin, so that rounding does not decide
    }
    for (int64_t i = 0; i < rows; ++i) column[i * W] = T(i == best ? 1 : 0);
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t b = 0; b < c; ++b) {
        const T* const before = entries + b * rows * W;
        T along = 0;
        for (int64_t i = 0; i < rows; ++i) along += column[i * W] * before[i * W];
        for (int64_t i = 0; i < rows; ++i) column[i * W] -= along * before[i * W];
      }
      T square = 0;
      for (int64_t i = 0; i < rows; ++i) square += column[i * W] * column[i * W];
      const T inverse = T(1) / T(sqrt(square));
      for (int64_t i = 0; i < rows; ++i) column[i * W] *= inverse;
    }
  }
}

// ±1 per lane: the sign of the component of largest magnitude, the lowest index on ties, as the vector will be stored.
template <class T>
RMM_INLINE Vec<T> peak_sign(const Vec<T>* vector, int64_t rows, Dtype stored) {
  Vec<T> best{}, value{};
  for (int64_t i = 0; i < rows; ++i) {
    const Vec<T> rounded = as_stored<T>(stored, vector[i]), magnitude = abs<T>(rounded);
    const Mask<T> larger = magnitude > best;
    best = select<T>(larger, magnitude, best);
    value = select<T>(larger, rounded, value);
  }
  return select<T>(value < T(0), splat<T>(-1), splat<T>(1));
}

// Exact powers of two that bring a matrix's largest entry into [2, 4) and back; in two factors, each representable.
template <class T>
struct Scale {
  Vec<T> up1, up2, down1, down2;
};

template <class T>
RMM_INLINE Scale<T> scale_of(Vec<T> largest) {
  constexpr int mantissa = Bits<T>::mantissa, bias = Bits<T>::bias;
  using I = typename Bits<T>::type;
  const I lift = bias / 2 + 1;  // 64, 512
  const Mask<T> low = (((Mask<T>)largest >> mantissa) < bias - lift);
  const Vec<T> raise = (Vec<T>)(Mask<T>{} + (I(bias + lift) << mantissa));
  const Vec<T> lower = (Vec<T>)(Mask<T>{} + (I(bias - lift) << mantissa));
  Scale<T> scale;
  scale.up1 = select<T>(low, raise, splat<T>(1));
  scale.down1 = select<T>(low, lower, splat<T>(1));
  Mask<T> exponent = ((Mask<T>)(largest * scale.up1) >> mantissa) - bias - 1;  // of the power of two to divide by
  exponent = largest > T(0) ? exponent : Mask<T>{};
  scale.up2 = (Vec<T>)((bias - exponent) << mantissa);
  scale.down2 = (Vec<T>)((bias + exponent) << mantissa);
  return scale;
}

}  // namespace RMM_ISA
}  // namespace rmm
