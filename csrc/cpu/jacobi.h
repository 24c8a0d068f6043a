// Dense pieces on one matrix per lane: Householder QR, one-sided Jacobi, completion of deficient columns.
//
// Matrices are column-major, a column being `rows` consecutive vectors. Their entries are scaled to at most 4 and finite.
#pragma once

#include <math.h>

#include "tile.h"

namespace rmm {
namespace RMM_ISA {

template <class T>
RMM_INLINE Vec<T> dot(const Vec<T>* a, const Vec<T>* b, int64_t rows) {
  Vec<T> sum[4] = {};  // four chains: one does not wait for the other, and each rounds less
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    for (int c = 0; c < 4; ++c) sum[c] += a[i + c] * b[i + c];
  }
  for (int c = 0; i < rows; ++i, ++c) sum[c] += a[i] * b[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// out[c] = a · columns[c], c < count.
template <class T>
RMM_INLINE void dots(const Vec<T>* a, const Vec<T>* columns, int64_t rows, int64_t count, Vec<T>* out) {
  int64_t c = 0;
  for (; c + 4 <= count; c += 4) {
    Vec<T> sum[4] = {};
    for (int64_t i = 0; i < rows; ++i) {
      for (int b = 0; b < 4; ++b) sum[b] += a[i] * columns[(c + b) * rows + i];
    }
    for (int b = 0; b < 4; ++b) out[c + b] = sum[b];
  }
  for (; c < count; ++c) out[c] = dot<T>(a, columns + c * rows, rows);
}

// columns ← (I − tau v vᵀ) columns, `count` of them, `stride` apart: two at a time, which share v and do not wait for each
// other.
template <class T>
RMM_INLINE void reflect(const Vec<T>* v, Vec<T> tau, int64_t rows, Vec<T>* columns, int64_t stride, int64_t count) {
  int64_t c = 0;
  for (; c + 2 <= count; c += 2) {
    Vec<T>*const a = columns + c * stride, *const b = a + stride;
    Vec<T> sum[4] = {};
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
    const Vec<T> step_a = tau * (sum[0] + sum[2]), step_b = tau * (sum[1] + sum[3]);
    for (i = 0; i < rows; ++i) {
      const Vec<T> vi = v[i];
      a[i] -= step_a * vi;
      b[i] -= step_b * vi;
    }
  }
  if (c < count) {
    Vec<T>* const a = columns + c * stride;
    const Vec<T> step = tau * dot<T>(v, a, rows);
    for (int64_t i = 0; i < rows; ++i) a[i] -= step * v[i];
  }
}

// A = QR in place. Column j then holds R above its diagonal and the Householder vector from it on; R's diagonal goes to
// diagonal[j]; H_j = I − tau[j] v_j v_jᵀ. A column without norm gives H_j = I.
template <class T>
void householder(Vec<T>* a, int64_t rows, int64_t cols, Vec<T>* tau, Vec<T>* diagonal) {
  for (int64_t j = 0; j < cols; ++j) {
    Vec<T>* v = a + j * rows + j;
    const int64_t length = rows - j;
    const Vec<T> square = dot<T>(v, v, length);
    const Mask<T> live = square > Bits<T>::tiny;
    const Vec<T> safe = select<T>(live, square, splat<T>(1));
    const Vec<T> norm = safe * rsqrt<T>(safe);
    const Vec<T> first = v[0];
    tau[j] = select<T>(live, T(2) / (safe + norm * (T(2) * abs<T>(first) + norm)), splat<T>(0));  // 2 / vᵀv
    diagonal[j] = select<T>(live, copy_sign<T>(-norm, -first), first);
    v[0] = first + copy_sign<T>(norm, first);
    reflect<T>(v, tau[j], length, v + rows, rows, cols - j - 1);
  }
}

// columns ← Q columns, `count` of them of `rows` each.
template <class T>
void apply_q(const Vec<T>* a, const Vec<T>* tau, int64_t rows, int64_t cols, Vec<T>* columns, int64_t count) {
  for (int64_t j = cols - 1; j >= 0; --j) reflect<T>(a + j * rows + j, tau[j], rows - j, columns + j, rows, count);
}

struct Pair {
  int32_t p, q;
};

// The k(k−1)/2 pairs p < q of k columns in odd-even order: k rounds, in each of which neighbours in a list meet and trade
// places, so that in the end all have met. Pairs of a round share no column, so their rotations do not wait for each other;
// and with the longer column always going to the lower index, this order takes one to two sweeps less than a tournament's.
inline void odd_even_pairs(int64_t k, int32_t* list, Pair* pairs) {
  for (int64_t i = 0; i < k; ++i) list[i] = static_cast<int32_t>(i);
  for (int64_t round = 0; round < k; ++round) {
    for (int64_t i = round & 1; i + 1 < k; i += 2) {
      const int32_t a = list[i], b = list[i + 1];
      *pairs++ = a < b ? Pair{a, b} : Pair{b, a};
      list[i] = b;
      list[i + 1] = a;
    }
  }
}

// A rotation of two columns, and what it has to do with: squared norms and dot product.
template <class T>
struct Turn {
  Vec<T> pq, cosine, sine;
  Mask<T> turned;
};

// Where p and q are to be rotated: not orthogonal, or p the shorter one. Not where both are negligible: pp·qq up to `floor`.
template <class T>
RMM_INLINE Mask<T> needs_turn(Vec<T> pp, Vec<T> qq, Vec<T> pq, T tolerance, Vec<T> floor) {
  const Vec<T> product = pp * qq, square = pq * pq, gap = pp - qq;
  const Mask<T> slanted = (square > (tolerance * tolerance) * product) & (product > floor);
  return (slanted | (qq > pp)) & (gap * gap + T(4) * square > Bits<T>::tiny);
}

// The rotation that makes p and q orthogonal and p the longer one, 1 and 0 in lanes that need none; updates pp and qq.
// The angle need only be good (it is found again next sweep), but cosine² + sine² = 1 must hold to rounding.
template <class T>
RMM_INLINE void find_turn(Vec<T>& pp, Vec<T>& qq, Turn<T>& turn) {
  const Vec<T> pq = turn.pq, gap = pp - qq, radius2 = gap * gap + T(4) * pq * pq;
  // 1/√radius2, to 5e-6 (fp64: 3e-11).
  Vec<T> inverse = (Vec<T>)(Bits<T>::rsqrt_magic - ((Mask<T>)radius2 >> 1));
  for (int i = 0; i < (sizeof(T) == 4 ? 2 : 3); ++i) inverse = inverse * (T(1.5) - (T(0.5) * radius2) * (inverse * inverse));
  const Vec<T> z = T(0.5) + T(0.5) * (abs<T>(gap) * inverse);            // cos² of the smaller angle
  const Vec<T> slope = pq * inverse;                                     // its cos · sin
  const Vec<T> square = z * z + slope * slope;                           // cos², in [0.5, 1]
  Vec<T> root = T(2.2354) + square * (T(-2.0575) + T(0.8246) * square);  // 1/cos within 0.5%
  for (int i = 0; i < (sizeof(T) == 4 ? 1 : 2); ++i) root = root * (T(1.5) - (T(0.5) * square) * (root * root));
  Vec<T> large = z * root, small = slope * root;
  // The last Newton step on both together, in the form that leaves no error of its own: columns must not drift in length.
  const Vec<T> excess = T(0.5) * ((large * large - T(1)) + small * small);
  large -= excess * large;
  small -= excess * small;
  const Vec<T> shift = pq * small * root;  // how far the squared norms move apart
  const Mask<T> swap = qq > pp, turned = turn.turned;
  const Vec<T> longer = select<T>(swap, qq, pp) + shift, shorter = select<T>(swap, pp, qq) - shift;
  pp = select<T>(turned, longer, pp);
  qq = select<T>(turned, shorter > T(0) ? shorter : Vec<T>{}, qq);
  const Vec<T> cosine = select<T>(swap, abs<T>(small), large);
  const Vec<T> sine = select<T>(swap, copy_sign<T>(large, pq), small);
  turn.cosine = select<T>(turned, cosine, splat<T>(1));
  turn.sine = select<T>(turned, sine, splat<T>(0));
}

template <class T>
RMM_INLINE void rotate(Vec<T>* p, Vec<T>* q, int64_t rows, Vec<T> cosine, Vec<T> sine) {
  for (int64_t j = 0; j < rows; ++j) {
    const Vec<T> pj = p[j], qj = q[j];
    p[j] = cosine * pj + sine * qj;
    q[j] = cosine * qj - sine * pj;
  }
}

// One-sided Jacobi: rotates the `cols` columns until the leading `rows` of each are orthogonal, `all_rows` taking part in
// the rotations: started from an identity, the rows beneath gather them. norms[c] then holds the squared norms of the leading
// rows. Lanes that have converged are left as they are, so that a lane's result does not depend on its neighbours. Rows is
// `rows` where that is known when compiling, else 0.
template <class T, int Rows>
void jacobi_sweeps(Vec<T>* a, int64_t rows_given, int64_t all_rows_given, int64_t cols, const Pair* pairs, Turn<T>* turns,
                   Vec<T>* norms) {
  const int64_t rows = Rows ? Rows : rows_given, all_rows = Rows ? Rows : all_rows_given;
  constexpr int kMaxSweeps = 15;
  const T tolerance = T(3.4) * Bits<T>::epsilon;
  Vec<T> floor{};
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    for (int64_t c = 0; c < cols; ++c) norms[c] = dot<T>(a + c * all_rows, a + c * all_rows, rows);
    if (sweep == 0) {
      Vec<T> total{};
      for (int64_t c = 0; c < cols; ++c) total += norms[c];
      const T negligible = T(0.7) * Bits<T>::epsilon;  // pairs of columns both this short relative to the matrix
      total *= negligible * negligible;
      floor = total * total;
    }
    Mask<T> swept{};
    const Pair* pair = pairs;
    for (int64_t round = 0, in_round; round < cols; ++round, pair += in_round) {
      in_round = (cols - (round & 1)) / 2;
      Mask<T> turned{};
      for (int64_t i = 0; i < in_round; ++i) {
        const int64_t p = pair[i].p, q = pair[i].q;
        turns[i].pq = dot<T>(a + p * all_rows, a + q * all_rows, rows);
        turns[i].turned = needs_turn<T>(norms[p], norms[q], turns[i].pq, tolerance, floor);
        turned |= turns[i].turned;
      }
      if (sweep > 1 && !any<T>(turned)) continue;
      swept |= turned;
      for (int64_t i = 0; i < in_round; ++i) find_turn<T>(norms[pair[i].p], norms[pair[i].q], turns[i]);
      for (int64_t i = 0; i < in_round; ++i) {
        rotate<T>(a + pair[i].p * all_rows, a + pair[i].q * all_rows, all_rows, turns[i].cosine, turns[i].sine);
      }
    }
    if (!any<T>(swept)) break;
  }
  for (int64_t c = 0; c < cols; ++c) norms[c] = dot<T>(a + c * all_rows, a + c * all_rows, rows);
}

template <class T, int Rows>
void jacobi_of(Vec<T>* a, int64_t rows, int64_t all_rows, int64_t cols, const Pair* pairs, Turn<T>* turns, Vec<T>* norms) {
  if constexpr (Rows > 16) {
    jacobi_sweeps<T, 0>(a, rows, all_rows, cols, pairs, turns, norms);
  } else if (rows == Rows && all_rows == rows) {
    jacobi_sweeps<T, Rows>(a, rows, rows, cols, pairs, turns, norms);
  } else {
    jacobi_of<T, Rows + 1>(a, rows, all_rows, cols, pairs, turns, norms);
  }
}

// Jacobi on matrices of `cols` columns: the order of the pairs and room for a round of rotations.
template <class T>
class Jacobi {
 public:
  explicit Jacobi(int64_t cols)
      : cols_(cols),
        pairs_(static_cast<Pair*>(malloc(sizeof(Pair) * (cols * cols / 2 + 1)))),
        turns_(static_cast<Turn<T>*>(aligned_alloc(64, (sizeof(Turn<T>) * (cols / 2 + 1) + 63) / 64 * 64))) {
    if (pairs_ == nullptr || turns_ == nullptr) abort();
    int32_t* const list = static_cast<int32_t*>(malloc(sizeof(int32_t) * (cols + 1)));
    if (list == nullptr) abort();
    odd_even_pairs(cols, list, pairs_);
    free(list);
  }
  ~Jacobi() {
    free(pairs_);
    free(turns_);
  }
  Jacobi(const Jacobi&) = delete;
  Jacobi& operator=(const Jacobi&) = delete;

  // As jacobi_sweeps, and sorts the columns by falling norm.
  void operator()(Vec<T>* a, int64_t rows, int64_t all_rows, Vec<T>* norms) const {
    jacobi_of<T, 1>(a, rows, all_rows, cols_, pairs_, turns_, norms);
    sort(a, all_rows, norms);
  }

 private:
  void sort(Vec<T>* a, int64_t all_rows, Vec<T>* norms) const {
    for (bool sorted = false; !sorted;) {
      sorted = true;
      for (int64_t c = 0; c + 1 < cols_; ++c) {
        const Mask<T> swap = norms[c + 1] > norms[c];
        if (!any<T>(swap)) continue;
        sorted = false;
        const Vec<T> upper = norms[c], lower = norms[c + 1];
        norms[c] = select<T>(swap, lower, upper);
        norms[c + 1] = select<T>(swap, upper, lower);
        for (int64_t j = c * all_rows; j < (c + 1) * all_rows; ++j) {
          const Vec<T> left = a[j], right = a[j + all_rows];
          a[j] = select<T>(swap, right, left);
          a[j + all_rows] = select<T>(swap, left, right);
        }
      }
    }
  }

  const int64_t cols_;
  Pair* const pairs_;
  Turn<T>* const turns_;
};

// In the lanes of `dead`, column c becomes what is left of the unit vector that sticks out most of the columns before it, those
// being orthonormal (twice Gram–Schmidt). By lanes, because hardly any need it.
template <class T>
void complete(Vec<T>* columns, int64_t rows, int64_t c, Mask<T> dead) {
  Vec<T>* const column = columns + c * rows;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    if (!dead[lane]) continue;
    int64_t best = 0;
    T most = -1;
    for (int64_t i = 0; i < rows; ++i) {
      T left = 1;
      for (int64_t b = 0; b < c; ++b) left -= columns[b * rows + i][lane] * columns[b * rows + i][lane];
      if (left > most + T(1e-3)) most = left, best = i;  // by a margin, so that rounding does not decide
    }
    for (int64_t i = 0; i < rows; ++i) column[i][lane] = T(i == best ? 1 : 0);
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t b = 0; b < c; ++b) {
        const Vec<T>* const before = columns + b * rows;
        T along = 0;
        for (int64_t i = 0; i < rows; ++i) along += column[i][lane] * before[i][lane];
        for (int64_t i = 0; i < rows; ++i) column[i][lane] -= along * before[i][lane];
      }
      T square = 0;
      for (int64_t i = 0; i < rows; ++i) square += column[i][lane] * column[i][lane];
      const T inverse = T(1) / T(sqrt(square));
      for (int64_t i = 0; i < rows; ++i) column[i][lane] *= inverse;
    }
  }
}

// Scales each of the first `count` columns, of falling squared norms, to norm 1, and takes out of it what Jacobi left of the
// ones before it; kept[c] is 1 where it could be, 0 where σ_c is negligible and the column was completed.
template <class T>
void orthonormalise(Vec<T>* columns, int64_t rows, int64_t count, const Vec<T>* norms, Vec<T>* kept) {
  const T limit = Bits<T>::deficient * Bits<T>::deficient;
  for (int64_t c = 0; c < count; ++c) {
    const Mask<T> live = (norms[c] > limit * norms[0]) & (norms[c] > Bits<T>::tiny);
    kept[c] = select<T>(live, splat<T>(1), splat<T>(0));
    const Vec<T> inverse = rsqrt<T>(select<T>(live, norms[c], splat<T>(1)));
    Vec<T>* const column = columns + c * rows;
    for (int64_t i = 0; i < rows; ++i) column[i] = column[i] * inverse + T(0);  // + 0: no −0, whatever the neighbours did
    for (int64_t b = 0; b < c; ++b) {
      const Vec<T>* const before = columns + b * rows;
      const Vec<T> along = dot<T>(before, column, rows);
      for (int64_t i = 0; i < rows; ++i) column[i] -= along * before[i];
    }
    if (any<T>(~live)) complete<T>(columns, rows, c, ~live);
  }
}

// A Newton step towards norm 1, for a vector that has it to a few roundings.
template <class T>
RMM_INLINE void polish_norm(Vec<T>* vector, int64_t rows) {
  const Vec<T> factor = T(1.5) - T(0.5) * dot<T>(vector, vector, rows);
  for (int64_t i = 0; i < rows; ++i) vector[i] *= factor;
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
