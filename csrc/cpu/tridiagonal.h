// Symmetric matrices, one per lane: Householder tridiagonalisation, and the eigenvalues of a tridiagonal one by the QR method
// without square roots of Pal, Walker and Kahan (Parlett, The symmetric eigenvalue problem, 1980, section 8.15).
//
// K is k where that is known when compiling, else 0; a lane's numbers do not depend on its neighbours.
#pragma once

#include "dense.h"

namespace rmm {
namespace RMM_ISA {

// G [k, k] = V T Vᵀ, G symmetric and given by its upper triangle, T tridiagonal with `diagonal` and, beside it, `upper`. Row j
// of g [k][k] then holds from column j + 1 on the Householder vector y of V's H_j = I − tau[j] y yᵀ, V = H_0 H_1 …. `room` is
// for k.
template <int K, class V>
void tridiagonalise(V* g, int64_t size, V* tau, V* diagonal, V* upper, V* room) {
  using T = Scalar<V>;
  const int64_t k = K ? K : size;
#pragma GCC unroll 8
  for (int64_t j = 0; j < k; ++j) {
    diagonal[j] = g[j * k + j];
    const int64_t rest = k - j - 1;
    V *const v = g + j * k + j + 1, *const block = v + k;  // block: what is left of G
    if (rest == 0) break;
    if (rest == 1) {
      upper[j] = v[0];
      continue;
    }
    const Reflector<V> turn = reflector(v, rest);
    tau[j] = turn.tau;
    upper[j] = turn.diagonal;
    for (int64_t i = 0; i < rest; ++i) {
      V sum = block[i * k + i] * v[i];
      for (int64_t c = 0; c < i; ++c) sum += block[c * k + i] * v[c];
      for (int64_t c = i + 1; c < rest; ++c) sum += block[i * k + c] * v[c];
      room[i] = turn.tau * sum;
    }
    const V half = T(0.5) * turn.tau * dot(room, v, rest);
    for (int64_t i = 0; i < rest; ++i) room[i] -= half * v[i];
    for (int64_t i = 0; i < rest; ++i) {
      for (int64_t c = i; c < rest; ++c) {
        V& entry = block[i * k + c];
        entry = (entry - v[i] * room[c]) - room[i] * v[c];
      }
    }
  }
}

// The eigenvalues, falling, of a positive definite tridiagonal matrix of k ≥ 3 rows in `lanes`, to a rounding of the largest:
// `diagonal`, and `squares` of the entries beside it, which are overwritten. Returns the lanes in which they converged.
//
// A sweep of m rows, shifted by the eigenvalue of the last two that is nearer to the last, is repeated until in every lane the
// last row has split off; lanes in which it has wait for the others.
template <int K, class V, class M>
M tridiagonal_values(V* diagonal, V* squares, int64_t size, M lanes, V* values) {
  using T = Scalar<V>;
  constexpr int W = sizeof(V) / sizeof(Vec<T>);
  const int64_t k = K ? K : size;
  const V zero{}, one = splat_as<V>(1);
  V sum = diagonal[0];
  for (int64_t i = 1; i < k; ++i) sum += diagonal[i];
  V least = T(0.05) * Bits<T>::epsilon * sum;  // far below a rounding
  const V least_square = least * least;
  for (int64_t m = k; m > 2; --m) {
    for (int sweep = 0;; ++sweep) {
      const V last = diagonal[m - 1], square = squares[m - 2];
      const auto moves = lanes & (square > least_square);
      if (!any(moves)) break;
      if (sweep == 30) {
        lanes &= ~moves;
        break;
      }
      const V half = T(0.5) * (diagonal[m - 2] - last), radius2 = half * half + square;
      const V safe = select(moves, radius2, one);
      V shift = last - square / (half + copy_sign(safe * rsqrt(safe), half));
      V sine{}, entry = diagonal[0] - shift;
      entry = copy_sign(larger(abs(entry), least), entry);
      V product = entry * entry;
      for (int64_t i = 0; i < m - 1; ++i) {
        for (int h = 0; h < W; ++h) {  // one vector after another: what one takes fits in registers
          const auto at = [h](auto& of) -> auto& { return reinterpret_cast<Vec<T>*>(&of)[h]; };
          const auto moving = reinterpret_cast<const Mask<T>*>(&moves)[h];
          Vec<T>&row = at(diagonal[i]), &s = at(sine), &g = at(entry), &p = at(product);
          const Vec<T> beside = at(squares[i]), length = p + beside;
          const Vec<T> inverse = T(1) / length, cosine = p * inverse, before = g, next = at(diagonal[i + 1]);
          if (i > 0) at(squares[i - 1]) = select<T>(moving, s * length, at(squares[i - 1]));
          s = beside * inverse;
          const Vec<T> turned = cosine * (next - at(shift)) - s * before;
          row = select<T>(moving, before + (next - turned), row);
          g = copy_sign<T>(larger(abs<T>(turned), at(least)), turned);
          p = g * g * (length / p);
        }
      }
      squares[m - 2] = select(moves, sine * product, square);
      diagonal[m - 1] = select(moves, entry + shift, last);
    }
    values[m - 1] = diagonal[m - 1];
  }
  const V half = T(0.5) * (diagonal[0] - diagonal[1]), middle = T(0.5) * (diagonal[0] + diagonal[1]);
  const V safe = larger(half * half + squares[0], least_square);
  values[0] = middle + safe * rsqrt(safe);
  values[1] = middle - safe * rsqrt(safe);
  for (int64_t end = k - 1; end > 0; --end) {
    for (int64_t c = 0; c < end; ++c) {
      const V left = values[c], right = values[c + 1];
      values[c] = larger(left, right);
      values[c + 1] = smaller(left, right);
    }
  }
  for (int64_t c = 0; c < k; ++c) values[c] = larger(values[c], zero);
  return lanes;
}

}  // namespace RMM_ISA
}  // namespace rmm
