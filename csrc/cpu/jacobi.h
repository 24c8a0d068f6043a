// One-sided Jacobi on one matrix per lane.
#pragma once

#include "dense.h"

namespace rmm {
namespace RMM_ISA {

struct ColumnPair {
  int32_t p, q;
};

// The k(k−1)/2 pairs p < q of k columns in odd-even order: k rounds, in each of which neighbours in a list meet and trade
// places, so that in the end all have met. Pairs of a round share no column, so their rotations do not wait for each other;
// and with the longer column always going to the lower index, this order takes one to two sweeps less than a tournament's.
inline void odd_even_pairs(int64_t k, int32_t* list, ColumnPair* pairs) {
  for (int64_t i = 0; i < k; ++i) list[i] = static_cast<int32_t>(i);
  for (int64_t round = 0; round < k; ++round) {
    for (int64_t i = round & 1; i + 1 < k; i += 2) {
      const int32_t a = list[i], b = list[i + 1];
      *pairs++ = a < b ? ColumnPair{a, b} : ColumnPair{b, a};
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
void jacobi_sweeps(Vec<T>* a, int64_t rows_given, int64_t all_rows_given, int64_t cols, const ColumnPair* pairs, Turn<T>* turns,
                   Vec<T>* norms) {
  const int64_t rows = Rows ? Rows : rows_given, all_rows = Rows ? Rows : all_rows_given;
  constexpr int kMaxSweeps = 15;
  const T tolerance = T(3.4) * Bits<T>::epsilon;
  Vec<T> floor{};
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    for (int64_t c = 0; c < cols; ++c) norms[c] = dot(a + c * all_rows, a + c * all_rows, rows);
    if (sweep == 0) {
      Vec<T> total{};
      for (int64_t c = 0; c < cols; ++c) total += norms[c];
      const T negligible = T(0.7) * Bits<T>::epsilon;  // pairs of columns both this short relative to the matrix
      total *= negligible * negligible;
      floor = total * total;
    }
    Mask<T> swept{};
    const ColumnPair* pair = pairs;
    for (int64_t round = 0, in_round; round < cols; ++round, pair += in_round) {
      in_round = (cols - (round & 1)) / 2;
      Mask<T> turned{};
      for (int64_t i = 0; i < in_round; ++i) {
        const int64_t p = pair[i].p, q = pair[i].q;
        turns[i].pq = dot(a + p * all_rows, a + q * all_rows, rows);
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
  for (int64_t c = 0; c < cols; ++c) norms[c] = dot(a + c * all_rows, a + c * all_rows, rows);
}

template <class T, int Rows>
void jacobi_of(Vec<T>* a, int64_t rows, int64_t all_rows, int64_t cols, const ColumnPair* pairs, Turn<T>* turns,
               Vec<T>* norms) {
  if constexpr (Rows > 3) {  // more columns seldom come here
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
        pairs_(static_cast<ColumnPair*>(malloc(sizeof(ColumnPair) * (cols * cols / 2 + 1)))),
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
  ColumnPair* const pairs_;
  Turn<T>* const turns_;
};

// Scales each of the first `count` columns, of falling squared norms, to norm 1 and kept[c] = 1, or both to 0 where σ_c is
// negligible.
template <class T>
void normalise(Vec<T>* columns, int64_t rows, int64_t count, const Vec<T>* norms, Vec<T>* kept) {
  const T limit = Bits<T>::deficient * Bits<T>::deficient;
  for (int64_t c = 0; c < count; ++c) {
    const Mask<T> live = (norms[c] > limit * norms[0]) & (norms[c] > Bits<T>::tiny);
    kept[c] = select<T>(live, splat<T>(1), splat<T>(0));
    const Vec<T> inverse = rsqrt<T>(select<T>(live, norms[c], splat<T>(1))) * kept[c];
    for (int64_t i = 0; i < rows; ++i) columns[c * rows + i] *= inverse;
  }
}

}  // namespace RMM_ISA
}  // namespace rmm
