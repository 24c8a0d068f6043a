// Dense pieces on one matrix per lane of V, which is Vec<T> or a Pair: dot products, Householder QR, completion of deficient
// columns.
//
// Matrices are column-major, a column being `rows` consecutive V. Their entries are finite, and their largest not far from 1.
#pragma once

#include <math.h>

#include <type_traits>

#include "pair.h"
#include "tile.h"

namespace rmm {
namespace RMM_ISA {

// So many terms are summed up one by one; longer sums in parts, which round less: of like terms all roundings may go one way.
constexpr int64_t kLongSum = 16;

template <class V>
RMM_INLINE V dot(const V* a, const V* b, int64_t rows) {
  V first{}, second{}, third{}, fourth{};  // four chains: one does not wait for the other, and each rounds less
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    first += a[i] * b[i];
    second += a[i + 1] * b[i + 1];
    third += a[i + 2] * b[i + 2];
    fourth += a[i + 3] * b[i + 3];
  }
  if (i < rows) first += a[i] * b[i];
  if (i + 1 < rows) second += a[i + 1] * b[i + 1];
  if (i + 2 < rows) third += a[i + 2] * b[i + 2];
  return (first + second) + (third + fourth);
}

// What is done to whole matrices goes by the single vectors of a V, several columns or rows of them at once: then most operands
// are in registers. Part is such a vector, and `step` tells how many of them make a V.
template <class V>
struct Parts {
  using Part = V;
  static constexpr int step = 1;
};
template <class V>
struct Parts<Pair<V>> {
  using Part = V;
  static constexpr int step = 2;
};
template <class V>
using Part = typename Parts<V>::Part;
template <class V>
RMM_INLINE Part<V>* part(V* v, int index) {
  return reinterpret_cast<Part<V>*>(v) + index;
}
template <class V>
RMM_INLINE const Part<V>* part(const V* v, int index) {
  return reinterpret_cast<const Part<V>*>(v) + index;
}

// body(first, N) for `count` in fours, N = 4, and for the rest of them.
template <class Body>
RMM_INLINE void in_fours(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) body(i, std::integral_constant<int, 4>{});
  if (count - i == 3) body(i, std::integral_constant<int, 3>{});
  if (count - i == 2) body(i, std::integral_constant<int, 2>{});
  if (count - i == 1) body(i, std::integral_constant<int, 1>{});
}

// out[c] = v · columns[c].
template <int N, int Step, class V>
RMM_INLINE void dots_with(const V* v, const V* columns, int64_t stride, int64_t rows, V* out) {
  V total[N];
  for (int c = 0; c < N; ++c) total[c] = V{};
  for (int64_t i = 0; i < rows;) {
    const int64_t end = i + kLongSum < rows ? i + kLongSum : rows;
    V even[N], odd[N];
    for (int c = 0; c < N; ++c) even[c] = v[i * Step] * columns[(c * stride + i) * Step];
    for (int c = 0; c < N; ++c) odd[c] = i + 1 < end ? v[(i + 1) * Step] * columns[(c * stride + i + 1) * Step] : V{};
    for (i += 2; i + 2 <= end; i += 2) {
      const V first = v[i * Step], second = v[(i + 1) * Step];
      for (int c = 0; c < N; ++c) even[c] += first * columns[(c * stride + i) * Step];
      for (int c = 0; c < N; ++c) odd[c] += second * columns[(c * stride + i + 1) * Step];
    }
    if (i < end) {
      for (int c = 0; c < N; ++c) even[c] += v[i * Step] * columns[(c * stride + i) * Step];
    }
    i = end;
    for (int c = 0; c < N; ++c) total[c] += even[c] + odd[c];
  }
  for (int c = 0; c < N; ++c) out[c * Step] = total[c];
}

// out[i] = Σ_c columns[c][i] row[c], cols ≥ 1.
template <int N, int Step, class V>
RMM_INLINE void product_with(const V* row, const V* columns, int64_t stride, int64_t cols, V* out) {
  V sum[N];
  for (int i = 0; i < N; ++i) sum[i] = columns[i * Step] * row[0];
  for (int64_t c = 1; c < cols; ++c) {
    const V factor = row[c * Step];
    for (int i = 0; i < N; ++i) sum[i] += columns[(c * stride + i) * Step] * factor;
  }
  for (int i = 0; i < N; ++i) out[i * Step] = sum[i];
}

// out = columns · row, whole vectors of V.
template <class V>
RMM_INLINE void product(const V* row, const V* columns, int64_t stride, int64_t rows, int64_t cols, V* out) {
  constexpr int step = Parts<V>::step;
  for (int h = 0; h < step; ++h) {
    in_fours(rows, [&](int64_t i, auto n) {
      product_with<n, step>(part(row, h), part(columns + i, h), stride, cols, part(out + i, h));
    });
  }
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

// The same for two reflections at once, of v and of w, which begins a row below it: v's first, then w's, or the other way
// round. So each column is read and written half as often.
enum class First { v, w };

template <First first, int N, class V>
RMM_INLINE void reflect_twice(const V* v, V tau_v, const V* w, V tau_w, V across, int64_t rows, V* columns, int64_t stride) {
  V along_v[N], along_w[N];
  for (int c = 0; c < N; ++c) {
    along_v[c] = v[0] * columns[c * stride];
    along_w[c] = V{};
  }
  for (int64_t i = 1; i < rows;) {
    const int64_t end = i + kLongSum < rows ? i + kLongSum : rows;
    V some_v[N], some_w[N];
    for (int c = 0; c < N; ++c) some_v[c] = some_w[c] = V{};
    for (; i < end; ++i) {
      const V vi = v[i], wi = w[i - 1];
      for (int c = 0; c < N; ++c) {
        const V entry = columns[c * stride + i];
        some_v[c] += vi * entry;
        some_w[c] += wi * entry;
      }
    }
    for (int c = 0; c < N; ++c) {
      along_v[c] += some_v[c];
      along_w[c] += some_w[c];
    }
  }
  for (int c = 0; c < N; ++c) {
    if (first == First::v) {
      along_v[c] *= tau_v;
      along_w[c] = tau_w * (along_w[c] - across * along_v[c]);
    } else {
      along_w[c] *= tau_w;
      along_v[c] = tau_v * (along_v[c] - across * along_w[c]);
    }
    columns[c * stride] -= along_v[c] * v[0];
  }
  for (int64_t i = 1; i < rows; ++i) {
    const V vi = v[i], wi = w[i - 1];
    for (int c = 0; c < N; ++c) {
      V& entry = columns[c * stride + i];
      entry = (entry - along_v[c] * vi) - along_w[c] * wi;
    }
  }
}

template <First first, class V>
RMM_INLINE void reflect_twice(const V* v, V tau_v, const V* w, V tau_w, int64_t rows, V* columns, int64_t stride,
                              int64_t count) {
  if (count == 0) return;
  const V across = dot(v + 1, w, rows - 1);
  int64_t c = 0;
  for (; c + 2 <= count; c += 2) reflect_twice<first, 2>(v, tau_v, w, tau_w, across, rows, columns + c * stride, stride);
  if (c < count) reflect_twice<first, 1>(v, tau_v, w, tau_w, across, rows, columns + c * stride, stride);
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
  const auto make = [&](int64_t j) {
    const Reflector<V> h = reflector(a + j * rows + j, rows - j);
    tau[j] = h.tau;
    diagonal[j] = h.diagonal;
  };
  for (int64_t j = 0; j < cols; j += 2) {
    V *const v = a + j * rows + j, *const w = v + rows + 1;
    make(j);
    if (j + 1 == cols) break;
    reflect(v, tau[j], rows - j, v + rows, rows, 1);
    make(j + 1);
    reflect_twice<First::v>(v, tau[j], w, tau[j + 1], rows - j, v + 2 * rows, rows, cols - j - 2);
  }
}

// Takes out of column c what it has of the columns before it, those being orthonormal.
template <class V>
RMM_INLINE void take_out(V* columns, int64_t rows, int64_t c) {
  V* const column = columns + c * rows;
  int64_t b = 0;
  for (; b + 2 <= c; b += 2) {
    const V *const one = columns + b * rows, *const two = one + rows;
    V along_one{}, along_two{};
    for (int64_t i = 0; i < rows; ++i) {
      along_one += one[i] * column[i];
      along_two += two[i] * column[i];
    }
    for (int64_t i = 0; i < rows; ++i) column[i] = (column[i] - along_one * one[i]) - along_two * two[i];
  }
  if (b < c) {
    const V* const one = columns + b * rows;
    const V along = dot(one, column, rows);
    for (int64_t i = 0; i < rows; ++i) column[i] -= along * one[i];
  }
}

// In the lanes of `dead`, column c becomes what is left of the unit vector that sticks out most of the columns before it, those
// being orthonormal (twice Gram–Schmidt).
template <class V, class M>
void complete(V* columns, int64_t rows, int64_t c, M dead) {
  using T = Scalar<V>;
  const V zero{}, one = splat_as<V>(1);
  V* const column = columns + c * rows;
  V most = splat_as<V>(-1), best{};
  for (int64_t i = 0; i < rows; ++i) {
    V left = one;
    for (int64_t b = 0; b < c; ++b) left -= columns[b * rows + i] * columns[b * rows + i];
    const auto more = left > most + splat_as<V>(T(1e-3));  // by a margin, so that rounding does not decide
    most = select(more, left, most);
    best = select(more, splat_as<V>(T(i)), best);
  }
  for (int64_t i = 0; i < rows; ++i) column[i] = select(dead, select(best == T(i), one, zero), column[i]);
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t b = 0; b < c; ++b) {
      const V* const before = columns + b * rows;
      const V along = select(dead, dot(before, column, rows), zero);
      for (int64_t i = 0; i < rows; ++i) column[i] -= along * before[i];
    }
    const V square = dot(column, column, rows);
    const auto off = dead & ~(square == T(1));
    const V inverse = select(off, rsqrt(select(off, square, one)), one);
    for (int64_t i = 0; i < rows; ++i) column[i] *= inverse;
  }
}

// Makes the norm of column c 1; completes it where not `usable`, or where its square is at most `least`.
template <class V, class M>
RMM_INLINE void make_unit(V* columns, int64_t rows, int64_t c, M usable, Scalar<V> least) {
  V* const column = columns + c * rows;
  const V square = dot(column, column, rows);
  const auto live = usable & (square > least);
  const V inverse = rsqrt(select(live, square, splat_as<V>(1)));
  for (int64_t i = 0; i < rows; ++i) column[i] *= inverse;
  if (any(~live)) complete(columns, rows, c, ~live);
}

// ±1 per lane: the sign of the component of largest magnitude, the lowest index on ties, as the vector will be stored. Its
// components are `step` apart.
template <class T>
RMM_INLINE Vec<T> peak_sign(const Vec<T>* vector, int64_t rows, Dtype stored, int64_t step = 1) {
  Vec<T> most{}, least{};
#pragma GCC unroll 4
  for (int64_t i = 0; i < rows; ++i) {
    const Vec<T> rounded = as_stored<T>(stored, vector[i * step]);
    most = larger(rounded, most);
    least = smaller(rounded, least);
  }
  const Vec<T> magnitude = larger(most, -least);
  Mask<T> negative = -least > most;
  Mask<T> open = (most == -least) & (most > T(0));
  for (int64_t i = 0; i < rows && any<T>(open); ++i) {
    const Vec<T> rounded = as_stored<T>(stored, vector[i * step]);
    const Mask<T> here = open & (abs<T>(rounded) == magnitude);
    negative |= here & (rounded < T(0));
    open &= ~here;
  }
  return select<T>(negative, splat<T>(-1), splat<T>(1));
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
