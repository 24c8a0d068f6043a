// Singular values and leading left singular vectors of a square matrix per lane, without iterating on its vectors: Householder
// bidiagonalisation, the squared singular values by dqds, each vector from a twisted factorisation. Where a lane's vectors do
// not pass the checks, because singular values all but coincide, Jacobi is to do it (jacobi.h).
//
// dqds: Fernando and Parlett, Accurate singular values and differential qd algorithms (1994). Twisted factorisations: Dhillon
// and Parlett, Multiple representations to compute orthogonal eigenvectors of symmetric tridiagonal matrices (2004).
//
// K is k where that is known when compiling, else 0; a lane's numbers do not depend on its neighbours.
#pragma once

#include "dense.h"

namespace rmm {
namespace RMM_ISA {

// A [k, k] = U B Vᵀ in place, B with `diagonal` and, above it, `upper`. Column j then holds the Householder vector of U from
// row j on; H_j = I − tau[j] v_j v_jᵀ. `room` is for 2 k.
template <int K, class V>
void bidiagonalise(V* a, int64_t size, V* tau, V* diagonal, V* upper, V* room) {
  const int64_t k = K ? K : size;
  V *const row = room, *const along = room + k;
  for (int64_t j = 0; j < k; ++j) {
    const int64_t rest = k - j - 1;
    V* const column = a + j * k + j;
    const Reflector<V> left = reflector(column, rest + 1);
    tau[j] = left.tau;
    diagonal[j] = left.diagonal;
    reflect(column, left.tau, rest + 1, column + k, k, rest);
    if (rest == 0) break;
    for (int64_t c = 0; c < rest; ++c) row[c] = column[(1 + c) * k];
    if (rest == 1) {
      upper[j] = row[0];
      continue;
    }
    const Reflector<V> right = reflector(row, rest);
    upper[j] = right.diagonal;
    V* const block = column + k + 1;
    for (int64_t i = 0; i < rest; ++i) along[i] = block[i] * row[0];
    for (int64_t c = 1; c < rest; ++c) {
      for (int64_t i = 0; i < rest; ++i) along[i] += block[c * k + i] * row[c];
    }
    for (int64_t c = 0; c < rest; ++c) {
      const V step = right.tau * row[c];
      for (int64_t i = 0; i < rest; ++i) block[c * k + i] -= along[i] * step;
    }
  }
}

// The squared singular values, falling, of a bidiagonal matrix of k ≥ 3 rows from its squared entries: q the diagonal's, none
// zero, e the others'. q and e are overwritten and have room for as many again behind them. Returns the lanes in which they
// converged.
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
  const V safe = select(radius2 > Bits<T>::tiny, radius2, splat_as<V>(Bits<T>::tiny));
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
  return found == T(k - 2);
}

// vectors [count][k]: eigenvectors of B Bᵀ to its largest eigenvalues, values[c], of norm 1; kept[c] is 1, or 0 where σ_c is
// negligible, and the vector 0. q and e are B's squared entries, product[i] = B[i+1, i+1] B[i, i+1]. Returns the lanes in which
// all are eigenvectors. `room` is for 3 k.
template <int K, class V>
auto bidiagonal_vectors(const V* q, const V* e, const V* product, int64_t size, const V* values, int64_t count, V* vectors,
                        V* kept, V* room) {
  using T = Scalar<V>;
  const int64_t k = K ? K : size;
  const T limit = Bits<T>::deficient * Bits<T>::deficient;
  const V zero{}, one = splat_as<V>(1);
  V *const below = room, *const down = room + k, *const up = room + 2 * k;
  auto good = zero >= zero;
  for (int64_t c = 0; c < count; ++c) {
    const V value = values[c];
    const auto live = (value > limit * values[0]) & (value > zero);
    kept[c] = select(live, one, zero);
    // B Bᵀ − λ is factored from the bottom and from the top. z solves both, but in the row where they meet: best in that with
    // the least rest, gamma.
    V rest = -value;
    for (int64_t i = k - 1; i > 0; --i) {
      below[i] = rest;
      const V inverse = T(1) / (rest + q[i]);
      down[i] = product[i - 1] * inverse;
      rest = (e[i - 1] * inverse) * rest - value;
    }
    V above = q[0] - value, gamma = abs(rest + q[0]), twist{};
    for (int64_t i = 1; i < k; ++i) {
      const V inverse = T(1) / (above + e[i - 1]);
      up[i - 1] = product[i - 1] * inverse;
      above = (q[i] * inverse) * above - value;
      const V here = abs(below[i] + (above + value));
      const auto less = here < gamma;
      gamma = select(less, here, gamma);
      twist = select(less, splat_as<V>(T(i)), twist);
    }
    V* const z = vectors + c * k;
    V entry{}, square{};
    for (int64_t i = 0; i < k; ++i) {
      entry = i == 0 ? one : select(twist == T(i), one, -down[i] * entry);
      z[i] = entry;
    }
    entry = one;
    square = z[k - 1] * z[k - 1];
    for (int64_t i = k - 2; i >= 0; --i) {
      entry = select(twist == T(i), one, -up[i] * entry);
      z[i] = select(twist > T(i), entry, z[i]);
      square += z[i] * z[i];
    }
    good &= ~live | (gamma <= T(8) * Bits<T>::epsilon * T(k) * value * square);
    const V inverse = rsqrt(select(live, square, one));
    for (int64_t i = 0; i < k; ++i) z[i] = select(live, z[i] * inverse, zero);
  }
  return good;
}

// Makes vectors [count][k] of norm 1 orthogonal, each to those before it, and completes them where kept is 0. Returns the lanes
// in which they all but were.
template <class V>
auto orthogonalise_kept(V* vectors, int64_t k, int64_t count, const V* kept) {
  using T = Scalar<V>;
  auto good = V{} >= V{};
  for (int64_t c = 0; c < count; ++c) {
    V* const vector = vectors + c * k;
    for (int64_t b = 0; b < c; ++b) {
      const V* const before = vectors + b * k;
      const V along = dot(before, vector, k);
      good &= abs(along) <= T(0.01);
      for (int64_t i = 0; i < k; ++i) vector[i] -= along * before[i];
    }
    polish_norm(vector, k);
    const auto dead = kept[c] == T(0);
    if (any(dead)) complete(vectors, k, c, dead);
  }
  return good;
}

// A core [k, k], whose largest entry is not far from 1, as a bidiagonal matrix, on the way to its left singular vectors. `room`
// is for 9 k.
template <class V>
struct Bidiagonal {
  Bidiagonal(V* core, int64_t k, V* room)
      : core(core), k(k), tau(room), q(room + k), e(room + 2 * k), product(room + 3 * k), room(room + 4 * k) {}

  template <int K>
  void factor() {
    using T = Scalar<V>;
    V *const diagonal = room, *const upper = diagonal + k;
    bidiagonalise<K>(core, k, tau, diagonal, upper, upper + k);
    for (int64_t i = 0; i < k; ++i) {  // no zeros on the diagonal: so far down, they are rounding anyway
      diagonal[i] = select(abs(diagonal[i]) > Bits<T>::zero, diagonal[i], splat_as<V>(Bits<T>::zero));
      q[i] = diagonal[i] * diagonal[i];
      if (i == 0) continue;
      e[i - 1] = upper[i - 1] * upper[i - 1];
      product[i - 1] = diagonal[i] * upper[i - 1];
    }
  }

  // vectors [count][k], kept [count] as above, to values [k].
  template <int K>
  auto vectors(const V* values, int64_t count, V* vectors, V* kept) {
    auto good = bidiagonal_vectors<K>(q, e, product, k, values, count, vectors, kept, room);
    apply_q(core, tau, k, k, vectors, count);
    good &= orthogonalise_kept(vectors, k, count, kept);
    return good;
  }

  V* core;
  int64_t k;
  V *tau, *q, *e, *product, *room;
};

// Two cores abreast: their squared singular values, falling, in values[i] [k]; vectors[i] [count][k] and kept[i] as above; in
// good[i] the lanes in which they hold. `room` is for 5 k.
template <int K, class V, class M>
void decompose_two(Bidiagonal<V>* cores, int64_t count, V* const* values, V* const* vectors, V* const* kept, M* good,
                   Pair<V>* room) {
  using T = Scalar<V>;
  const int64_t k = K ? K : cores[0].k;
  Pair<V>*const q = room, *const e = room + 2 * k, *const found = room + 4 * k;
  for (int i = 0; i < 2; ++i) cores[i].template factor<K>();
  for (int64_t i = 0; i < k; ++i) {
    q[i] = {cores[0].q[i], cores[1].q[i]};
    if (i + 1 < k) e[i] = {cores[0].e[i], cores[1].e[i]};
  }
  const auto converged = squared_singular_values<K>(q, e, k, found);
  for (int64_t c = 0; c < k; ++c) {  // back to zero what was made not to be
    const Pair<V> value = select(found[c] > T(8) * Bits<T>::zero_square, found[c], Pair<V>{});
    values[0][c] = value.low;
    values[1][c] = value.high;
  }
  for (int i = 0; i < 2; ++i) {
    good[i] = cores[i].template vectors<K>(values[i], count, vectors[i], kept[i]);
  }
  good[0] &= converged.low;
  good[1] &= converged.high;
}

// The same for a k of at least K, to be found.
template <int K, class V, class M>
void decompose_two_of(Bidiagonal<V>* cores, int64_t count, V* const* values, V* const* vectors, V* const* kept, M* good,
                      Pair<V>* room) {
  if constexpr (K > 8 || sizeof(Scalar<V>) == 8) {  // enough for the shortest loops; more would take long to compile
    decompose_two<0>(cores, count, values, vectors, kept, good, room);
  } else if (cores[0].k == K) {
    decompose_two<K>(cores, count, values, vectors, kept, good, room);
  } else {
    decompose_two_of<K + 1>(cores, count, values, vectors, kept, good, room);
  }
}

}  // namespace RMM_ISA
}  // namespace rmm
