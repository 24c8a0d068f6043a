// Squared singular values and leading right singular vectors of a matrix per lane, at least as tall as wide, without iterating
// on its vectors: Householder bidiagonalisation, the squared singular values by dqds, each vector from a twisted factorisation;
// or, of a well-conditioned tall matrix, the first two from the products of its columns (tridiagonal.h). Where a lane's vectors
// do not pass the checks, because singular values all but coincide, Jacobi is to do it (jacobi.h).
//
// dqds: Fernando and Parlett, Accurate singular values and differential qd algorithms (1994). Twisted factorisations: Dhillon
// and Parlett, Multiple representations to compute orthogonal eigenvectors of symmetric tridiagonal matrices (2004).
//
// K is k where that is known when compiling, else 0; a lane's numbers do not depend on its neighbours.
#pragma once

#include "tridiagonal.h"

namespace rmm {
namespace RMM_ISA {

// columns[c] −= v · across[c] + along · row[c].
template <int N, int Step, class V>
RMM_INLINE void subtract_both(V* columns, int64_t stride, int64_t rows, const V* v, const V* across, const V* along,
                              const V* row) {
  V of_v[N], of_along[N];
  for (int c = 0; c < N; ++c) {
    of_v[c] = across[c * Step];
    of_along[c] = row[c * Step];
  }
  for (int64_t i = 0; i < rows; ++i) {
    const V vi = v[i * Step], along_i = along[i * Step];
    for (int c = 0; c < N; ++c) {
      V& entry = columns[(c * stride + i) * Step];
      entry = (entry - vi * of_v[c]) - along_i * of_along[c];
    }
  }
}

// A [rows, k] = U B Vᵀ, rows ≥ k, B with `diagonal` and, above it, `upper`. Row j of `right` [k][k] then holds from column
// j + 1 on the Householder vector y of V's G_j = I − tau[j] y yᵀ, V = G_0 G_1 …; A is overwritten. `room` is for k + rows.
//
// A column's reflection and its row's change the rest of A together, in one pass.
template <int K, class V>
void bidiagonalise(V* a, int64_t rows, int64_t size, V* right, V* tau, V* diagonal, V* upper, V* room) {
  constexpr int step = Parts<V>::step;
  const int64_t k = K ? K : size;
  V *const across = room, *const along = room + k;
  for (int64_t j = 0; j < k; ++j) {
    const int64_t rest = k - j - 1, length = rows - j;
    V *const v = a + j * rows + j, *const block = v + rows, *const row = right + j * k + j + 1;
    const Reflector<V> left = reflector(v, length);
    diagonal[j] = left.diagonal;
    if (rest == 0) break;
    for (int h = 0; h < step; ++h) {
      in_fours(rest, [&](int64_t c, auto n) {
        dots_with<n, step>(part(v, h), part(block + c * rows, h), rows, length, part(across + c, h));
      });
    }
    for (int64_t c = 0; c < rest; ++c) {
      across[c] *= left.tau;
      row[c] = block[c * rows] - v[0] * across[c];
    }
    if (rest == 1) {
      upper[j] = row[0];
      for (int64_t i = 1; i < length; ++i) block[i] -= v[i] * across[0];
      continue;
    }
    const Reflector<V> turn = reflector(row, rest);
    tau[j] = turn.tau;
    upper[j] = turn.diagonal;
    const V less = dot(across, row, rest);
    product(row, block + 1, rows, length - 1, rest, along);
    for (int64_t i = 0; i < length - 1; ++i) along[i] = turn.tau * (along[i] - v[1 + i] * less);
    for (int h = 0; h < step; ++h) {
      in_fours(rest, [&](int64_t c, auto n) {
        subtract_both<n, step>(part(block + c * rows + 1, h), rows, length - 1, part(v + 1, h), part(across + c, h),
                               part(along, h), part(row + c, h));
      });
    }
  }
}

constexpr int kBidiagonal = 4;     // columns from which on Jacobi takes longer
constexpr int kProducts = 24;      // columns up to which factor_products is tried, of matrices twice as tall
constexpr int kConditioned = 256;  // σ_0² / σ_{k−1}², up to which it does for the leading directions

// The squared singular values, falling, of a bidiagonal matrix of k ≥ 3 rows from its squared entries: q the diagonal's, none
// zero, e the others'; the least of them, which stand for zeros, come out as 0. q and e are overwritten and have room for as
// many again behind them. Returns the lanes in which they converged.
//
// A sweep is a step of dqds: q and e become those of a matrix whose squared singular values are all less by `shift`. That must
// not exceed the least one: where it did, a q comes out negative, and the lane takes its sweep back and tries less. A value
// that has split off leaves at the bottom; the rows above it then move down, and rows that tell nothing follow at the top.
template <int K, class V>
auto squared_singular_values(V* q, V* e, int64_t size, V* values) {
  using T = Scalar<V>;
  const int64_t k = K ? K : size;
  const T below_one = T(1) - T(8) * Bits<T>::epsilon;
  // A row that tells nothing has this q and e = 0. It is a power of two, and any shift less than a ulp of it: its d is just
  // that again, and the row below it stays exactly as it is.
  const T nothing = sizeof(T) == 4 ? T(0x1p60) : T(0x1p200);
  const V zero{}, one = splat_as<V>(1);
  V *next_q = q + k, *next_e = e + k;
  V found{}, shifted{}, shift{}, tries{};
  V upper{}, between{}, lower{}, offset{};  // q, e, q and `shifted` of the two rows that are left in the end
  int64_t first = 0;
  for (int64_t sweep = 0; first < k - 2 && sweep < 8 * k + 16; ++sweep) {
    V d = q[first] - shift, least = d;
    for (int64_t i = first; i < k - 1; ++i) {
      const V new_q = d + e[i], ratio = q[i + 1] / new_q;
      next_q[i] = new_q;
      next_e[i] = e[i] * ratio;
      least = smaller(d, least);
      d = d * ratio - shift;
    }
    next_q[k - 1] = d;
    const auto running = found < T(k - 2);
    const auto late = least > zero;
    const auto good = late & (d >= zero) & running;
    if (any(running & ~good)) {
      for (int64_t i = first; i < k; ++i) next_q[i] = select(good, next_q[i], q[i]);
      for (int64_t i = first; i < k - 1; ++i) next_e[i] = select(good, next_e[i], e[i]);
    }
    V* other = q;
    q = next_q;
    next_q = other;
    other = e;
    e = next_e;
    next_e = other;
    // If but the last row's came out negative, the shift less that is close below the least.
    const V corrected = select(late, (shift + d) * below_one, T(0.25) * shift);
    const V retry = select((tries < T(2)) & (corrected > zero), corrected, zero);
    tries = select(good, zero, tries + one);
    shifted = select(good, shifted + shift, shifted);
    // The last row splits off where what ties it to the others, d · e as the square of an off-diagonal entry, moves no value:
    // by more than its root it can't, however close another one is.
    const V noise = Bits<T>::epsilon * (shifted + d);
    const auto split = good & (e[k - 2] <= T(0.25) * noise) & (d * e[k - 2] <= noise * noise);
    if (any(split)) {
      for (int64_t i = 0; i < k - 2; ++i) values[i] = select(split & (found == T(i)), shifted + d, values[i]);
      for (int64_t i = k - 1; i > first; --i) q[i] = select(split, q[i - 1], q[i]);
      for (int64_t i = k - 2; i > first; --i) e[i] = select(split, e[i - 1], e[i]);
      q[first] = select(split, splat_as<V>(nothing), q[first]);
      e[first] = select(split, zero, e[first]);
      found += select(split, one, zero);
      const auto done = split & (found == T(k - 2));
      upper = select(done, q[k - 2], upper);
      between = select(done, e[k - 2], between);
      lower = select(done, q[k - 1], lower);
      offset = select(done, shifted, offset);
      while (first < k - 2 && !any(found <= T(first))) ++first;
      d = q[k - 1];
    }
    // The next shift: the lesser value of the last two rows, the upper of them first less what the row before may take. Far
    // from a split that is no bound: then a part of the least d, which is one for the value itself.
    const V q1 = q[k - 2], e1 = e[k - 2], e2 = e[k - 3], room = q[k - 3] + e2 - d;
    const auto clear = room > zero;
    const V apart = (q1 + e1 - d) - T(1.3) * q1 * e2 / select(clear, room, one);
    const V less = d * e1 / apart;
    const auto close = clear & (apart > zero) & (less < T(0.8) * d);
    const V guess = select(close, d - less, T(0.4) * smaller(least, d)) * below_one;
    shift = select(found < T(k - 2), select(good, guess, retry), zero);
  }
  const V apart = (upper - lower) + between, radius2 = apart * apart + T(4) * between * lower;
  constexpr T least_radius2 = Bits<T>::zero_square * Bits<T>::zero_square;
  const V safe = select(radius2 > least_radius2, radius2, splat_as<V>(least_radius2));
  const V larger = T(0.5) * (((upper + between) + lower) + safe * rsqrt(safe));
  values[k - 2] = offset + upper * (lower / larger);
  values[k - 1] = offset + larger;
  for (int64_t c = 0; c < k / 2; ++c) {  // found in rising order, mostly
    const V other = values[c];
    values[c] = values[k - 1 - c];
    values[k - 1 - c] = other;
  }
  for (bool sorted = false; !sorted;) {
    sorted = true;
    for (int64_t c = 0; c + 1 < k; ++c) {
      const V left = values[c], right = values[c + 1];
      const auto wrong = right > left;
      if (!any(wrong)) continue;
      sorted = false;
      values[c] = select(wrong, right, left);
      values[c + 1] = select(wrong, left, right);
    }
  }
  for (int64_t c = 0; c < k; ++c) values[c] = select(values[c] > T(8) * Bits<T>::zero_square, values[c], zero);
  return found == T(k - 2);
}

// vectors [count][k]: eigenvectors of Bᵀ B to its largest eigenvalues, values[c], of norm 1; kept[c] is 1, or 0 where σ_c is at
// most negligible · σ_0, and the vector 0. q and e are B's squared entries, product[i] = B[i, i] B[i, i+1]. Returns the lanes
// in which all are eigenvectors, but for a rounding of their value or of `error`. `room` is for 3 k.
template <int K, class V>
auto bidiagonal_vectors(const V* q, const V* e, const V* product, int64_t size, const V* values, const V& error, int64_t count,
                        V* vectors, V* kept, Scalar<V> negligible, V* room) {
  using T = Scalar<V>;
  const int64_t k = K ? K : size;
  const T limit = negligible * negligible;
  const V zero{}, one = splat_as<V>(1);
  V *const above = room, *const down = room + k, *const up = room + 2 * k;
  auto good = zero >= zero;
  for (int64_t c = 0; c < count; ++c) {
    const V value = values[c];
    const auto live = (value > limit * values[0]) & (value > zero);
    kept[c] = select(live, one, zero);
    // Bᵀ B − λ is factored from the top and from the bottom. z solves both, but in the row where they meet: best in that with
    // the least rest, gamma.
    V rest = -value;
    for (int64_t i = 0; i < k - 1; ++i) {
      above[i] = rest;
      const V inverse = T(1) / (rest + q[i]);
      up[i] = product[i] * inverse;
      rest = (e[i] * inverse) * rest - value;
    }
    V below = q[k - 1] - value, gamma = abs(rest + q[k - 1]), twist = splat_as<V>(T(k - 1));
    for (int64_t i = k - 2; i >= 0; --i) {
      const V inverse = T(1) / (below + e[i]);
      down[i] = product[i] * inverse;
      below = (q[i] * inverse) * below - value;
      const V here = abs(above[i] + (below + value));
      const auto less = here < gamma;
      gamma = select(less, here, gamma);
      twist = select(less, splat_as<V>(T(i)), twist);
    }
    V* const z = vectors + c * k;
    V entry{}, square{};
    for (int64_t i = k - 1; i >= 0; --i) {
      entry = i == k - 1 ? one : select(twist == T(i), one, -up[i] * entry);
      z[i] = entry;
    }
    entry = one;
    square = z[0] * z[0];
    for (int64_t i = 1; i < k; ++i) {
      entry = select(twist == T(i), one, -down[i - 1] * entry);
      z[i] = select(twist < T(i), entry, z[i]);
      square += z[i] * z[i];
    }
    good &= ~live | (gamma <= T(8) * Bits<T>::epsilon * larger(T(k) * value, error) * square);
    const V inverse = rsqrt(select(live, square, one));
    for (int64_t i = 0; i < k; ++i) z[i] = select(live, z[i] * inverse, zero);
  }
  return good;
}

// Makes vectors [count][k] of norm 1, or 0, orthogonal, each to those before it. Returns the lanes in which they all but were.
template <int K, class V>
auto orthogonalise(V* vectors, int64_t size, int64_t count) {
  using T = Scalar<V>;
  const int64_t k = K ? K : size;
  auto good = V{} >= V{};
  for (int64_t c = 1; c < count; ++c) {
    V* const vector = vectors + c * k;
    for (int64_t b = 0; b < c; ++b) {
      const V* const before = vectors + b * k;
      const V along = dot(before, vector, k);
      good &= abs(along) <= T(0.01);
      for (int64_t i = 0; i < k; ++i) vector[i] -= along * before[i];
    }
  }
  return good;
}

// A matrix [rows, k], rows ≥ k, whose largest entry is not far from 1, as a bidiagonal one, on the way to its right singular
// vectors. It is overwritten. `room`, for k² + 6 k, keeps what it becomes; `work`, for 3 k + rows, is free between calls.
template <class V>
struct Bidiagonal {
  Bidiagonal(V* matrix, int64_t rows, int64_t k, V* room, V* work)
      : matrix(matrix),
        rows(rows),
        k(k),
        right(room),
        tau(right + k * k),
        diagonal(tau + k),
        upper(diagonal + k),
        q(upper + k),
        e(q + k),
        products(e + k),
        work(work) {}

  // By reflections of columns and rows.
  template <int K>
  void factor() {
    using T = Scalar<V>;
    int64_t length = rows;
    if (rows >= 3 * k && k >= kBidiagonal) {
      triangular();
      length = k;
    }
    bidiagonalise<K>(matrix, length, k, right, tau, diagonal, upper, work);
    for (int64_t i = 0; i < k; ++i) {  // no zeros for qd: so far down, they are rounding anyway
      const V safe = select(abs(diagonal[i]) > Bits<T>::zero, diagonal[i], splat_as<V>(Bits<T>::zero));
      q[i] = safe * safe;
      if (i + 1 == k) break;
      e[i] = upper[i] * upper[i];
      products[i] = safe * upper[i];
    }
    error = V{};
  }

  // The same from G = AᵀA, made tridiagonal and factored. That is much less work, but it errs by roundings of σ_0²: directions
  // of σ_i and σ_j mix by about ε σ_0² / (σ_i² − σ_j²). So it is done only in lanes where no σ is small against σ_0, which a
  // bound tells: of σ_0² by the sums of rows, of 1 / σ_{k−1}² by the inverse's trace. The others go by reflections, and use
  // `spare`, for as much as `room`. Returns the lanes where it is done; `diagonal` and `upper` are then of the tridiagonal
  // matrix.
  template <int K>
  auto factor_products(V* spare) {
    constexpr int step = Parts<V>::step;
    for (int h = 0; h < step; ++h) {
      for (int64_t j = 0; j < k; ++j) {
        V* const column = matrix + j * rows;
        in_fours(k - j, [&](int64_t c, auto n) {
          dots_with<n, step>(part(column, h), part(column + c * rows, h), rows, rows, part(right + j * k + j + c, h));
        });
      }
    }
    tridiagonalise<K>(right, k, tau, diagonal, upper, work);
    const V one = splat_as<V>(1);
    V inverse = one / diagonal[0], trace = inverse, least = diagonal[0], largest = diagonal[0] + abs(upper[0]);
    q[0] = diagonal[0];
    for (int64_t i = 1; i < k; ++i) {
      products[i - 1] = upper[i - 1];
      e[i - 1] = upper[i - 1] * upper[i - 1] / q[i - 1];
      q[i] = diagonal[i] - e[i - 1];
      least = smaller(q[i], least);
      inverse = (one + e[i - 1] * inverse) / q[i];  // of the inverse's diagonal
      trace += inverse;
      const V row = abs(upper[i - 1]) + diagonal[i];
      largest = larger(i + 1 < k ? row + abs(upper[i]) : row, largest);
    }
    const auto good = (least > V{}) & (largest * trace <= splat_as<V>(kConditioned));
    error = largest;
    if (any(~good)) {
      const int64_t size = k * k + 6 * k;
      for (int64_t i = 0; i < size; ++i) spare[i] = right[i];
      factor<K>();
      for (int64_t i = 0; i < size; ++i) right[i] = select(good, spare[i], right[i]);
      error = select(good, largest, error);
    }
    return good;
  }

  // The matrix becomes R [k, k] of its QR, which where it is much taller than wide is less work than B.
  void triangular() {
    householder(matrix, rows, k, tau, diagonal);
    for (int64_t c = 0; c < k; ++c) {
      for (int64_t i = 0; i < k; ++i) {
        matrix[c * k + i] = i < c ? matrix[c * rows + i] : i == c ? diagonal[c] : V{};
      }
    }
  }

  // Right singular vectors of B to `values`: vectors [count][k], kept [count] as above.
  template <int K>
  auto vectors(const V* values, int64_t count, V* vectors, V* kept, Scalar<V> negligible) const {
    auto good = bidiagonal_vectors<K>(q, e, products, k, values, error, count, vectors, kept, negligible, work);
    good &= orthogonalise<K>(vectors, k, count);
    return good;
  }

  // Right singular vectors of B become those of the matrix.
  void turn_back(V* vectors, int64_t count) const {
    int64_t j = k - 2;  // G_j for j < k − 2
    if (j % 2 == 1) {
      --j;
      reflect(right + j * k + j + 1, tau[j], k - j - 1, vectors + j + 1, k, count);
    }
    while ((j -= 2) >= 0) {
      const V* const v = right + j * k + j + 1;
      reflect_twice<First::w>(v, tau[j], v + k + 1, tau[j + 1], k - j - 1, vectors + j + 1, k, count);
    }
  }

  V* matrix;
  int64_t rows, k;
  V *right, *tau, *diagonal, *upper, *q, *e, *products, *work;
  V error;  // what squared singular values may be off, beyond their own roundings, in units of ε
};

// The squared singular values, falling, of two matrices abreast: values[i] [k]. By QR in the lanes of `conditioned`, for which
// factor_products did, else by dqds. Returns the lanes in which they converged. `room` is for 6 k.
template <int K, class V, class M>
PairMask<M> squared_singular_values_of(const Bidiagonal<V>* matrices, PairMask<M> conditioned, V* const* values,
                                       Pair<V>* room) {
  const int64_t k = K ? K : matrices[0].k;
  Pair<V>*const q = room, *const e = room + 2 * k, *const found = room + 4 * k, *const better = room + 5 * k;
  const auto load = [&](const V* low_q, const V* high_q, const V* low_e, const V* high_e) {
    for (int64_t i = 0; i < k; ++i) {
      q[i] = {low_q[i], high_q[i]};
      if (i + 1 < k) e[i] = {low_e[i], high_e[i]};
    }
  };
  auto converged = conditioned;
  const auto others = ~conditioned;
  if (any(others)) {
    load(matrices[0].q, matrices[1].q, matrices[0].e, matrices[1].e);
    converged = squared_singular_values<K>(q, e, k, found) | conditioned;
  }
  if (any(conditioned)) {
    load(matrices[0].diagonal, matrices[1].diagonal, matrices[0].upper, matrices[1].upper);
    for (int64_t i = 0; i + 1 < k; ++i) e[i] *= e[i];
    converged &= tridiagonal_values<K>(q, e, k, conditioned, better) | others;
  }
  for (int64_t c = 0; c < k; ++c) {
    const Pair<V> value = any(others) ? select(conditioned, better[c], found[c]) : better[c];
    values[0][c] = value.low;
    values[1][c] = value.high;
  }
  return converged;
}

}  // namespace RMM_ISA
}  // namespace rmm
