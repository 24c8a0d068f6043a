// truncated_svd: QR and one-sided Jacobi, one matrix per lane.
//
// The tall one of X and Xᵀ, A [M, N], is factored QR, and Jacobi makes R's columns orthogonal by rotations gathered in V
// beneath R. V, made orthonormal once more, is the short side's vectors. A V is then formed from A itself, free of what QR and
// rotations rounded on the way: its columns' norms are σ, and its normalised columns the tall side's vectors.

#include "jacobi.h"
#include "tile.h"

namespace rmm {

struct SvdArgs {
  View x, u, s, vh;  // [B, m, k], [B, m, rank], [B, rank], [B, rank, k]
};

// Groups of as many matrices as there are lanes, from `begin` to before `end`.
RMM_DECLARE_KERNEL(void truncated_svd(const SvdArgs& args, int64_t begin, int64_t end))

namespace RMM_ISA {

// Takes out of vectors[c], of norm 1 or 0, what it has of the ones before it, twice, and makes its norm 1; where nothing is
// left of it, completes it. In falling order of σ, so that the large ones stay as they are.
template <class T>
void orthogonalise(Vec<T>* vectors, int64_t rows, int64_t c) {
  Vec<T>* const vector = vectors + c * rows;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t b = 0; b < c; ++b) {
      const Vec<T>* const before = vectors + b * rows;
      const Vec<T> along = dot(before, vector, rows);
      for (int64_t i = 0; i < rows; ++i) vector[i] -= along * before[i];
    }
    const Vec<T> square = dot(vector, vector, rows);
    const Mask<T> live = square > T(1e4) * Bits<T>::epsilon * Bits<T>::epsilon;
    const Vec<T> inverse = rsqrt<T>(select<T>(live, square, splat<T>(1)));
    for (int64_t i = 0; i < rows; ++i) vector[i] *= inverse;
    if (any<T>(~live)) complete(vectors, rows, c, ~live);
  }
  polish_norm(vector, rows);
}

template <class T>
class Decomposer {
 public:
  explicit Decomposer(const SvdArgs& args)
      : args_(args),
        tall_(args.x.size[1] >= args.x.size[2]),
        m_(args.x.size[tall_ ? 1 : 2]),
        n_(args.x.size[tall_ ? 2 : 1]),
        rank_(args.s.size[1]),
        jacobi_(n_),
        scratch_(2 * m_ * n_ + 2 * n_ * n_ + 4 * n_ + rank_ * (m_ + n_ + 1)),
        a_(scratch_.take(m_ * n_)),
        qr_(scratch_.take(m_ * n_)),
        core_(scratch_.take(2 * n_ * n_)),
        tau_(scratch_.take(n_)),
        diagonal_(scratch_.take(n_)),
        norms_(scratch_.take(n_)),
        row_(scratch_.take(n_)),
        left_(scratch_.take(rank_ * m_)),
        right_(scratch_.take(rank_ * n_)),
        sigma_(scratch_.take(rank_)) {}

  void group(int64_t first) {
    const int64_t left = args_.x.size[0] - first;
    const int lanes = left < kLanes<T> ? static_cast<int>(left) : kLanes<T>;
    load(first, lanes);
    for (int64_t i = 0; i < m_ * n_; ++i) qr_[i] = a_[i];
    householder(qr_, m_, n_, tau_, diagonal_);
    for (int64_t c = 0; c < n_; ++c) {
      for (int64_t i = 0; i < n_; ++i) {
        core_[c * 2 * n_ + i] = i < c ? qr_[c * m_ + i] : i == c ? diagonal_[c] : Vec<T>{};
        core_[c * 2 * n_ + n_ + i] = splat<T>(i == c ? 1 : 0);
      }
    }
    jacobi_(core_, n_, 2 * n_, norms_);
    vectors();
    write(first, lanes);
  }

 private:
  // a_ [column of n][m]: the matrices, the longer side as m, scaled by a power of two; 0 where one is not finite.
  void load(int64_t first, int lanes) {
    const View& x = args_.x;
    const int64_t along_m = x.stride[tall_ ? 1 : 2], along_n = x.stride[tall_ ? 2 : 1], size = element_size(x.dtype);
    char* const from = x.at(first);
    if (along_m <= along_n) {
      for (int64_t c = 0; c < n_; ++c) {
        load_tile<T>(x.dtype, from + c * along_n * size, x.stride[0], along_m, lanes, m_, a_ + c * m_);
      }
    } else {
      for (int64_t i = 0; i < m_; ++i) {
        load_tile<T>(x.dtype, from + i * along_m * size, x.stride[0], along_n, lanes, n_, row_);
        for (int64_t c = 0; c < n_; ++c) a_[c * m_ + i] = row_[c];
      }
    }
    Vec<T> largest{};
    finite_ = ~Mask<T>{};
    for (int64_t i = 0; i < m_ * n_; ++i) {
      const Vec<T> magnitude = abs<T>(a_[i]);
      finite_ &= magnitude <= Bits<T>::largest;
      largest = magnitude > largest ? magnitude : largest;
    }
    scale_ = scale_of<T>(select<T>(finite_, largest, Vec<T>{}));
    for (int64_t i = 0; i < m_ * n_; ++i) a_[i] = select<T>(finite_, a_[i], Vec<T>{}) * scale_.up1 * scale_.up2;
  }

  // right_ = V, left_ = A V normalised, σ, and the signs.
  void vectors() {
    for (int64_t c = 0; c < rank_; ++c) {
      Vec<T>*const left = left_ + c * m_, *const right = right_ + c * n_;
      for (int64_t i = 0; i < n_; ++i) right[i] = core_[c * 2 * n_ + n_ + i];
      orthogonalise<T>(right_, n_, c);
      for (int64_t i = 0; i < m_; ++i) left[i] = Vec<T>{};
      for (int64_t j = 0; j < n_; j += 8) {  // eight at a time rounds less than one by one
        const int64_t some = n_ - j < 8 ? n_ - j : 8;
        for (int64_t i = 0; i < m_; ++i) {
          Vec<T> sum{};
          for (int64_t b = j; b < j + some; ++b) sum += a_[b * m_ + i] * right[b];
          left[i] += sum;
        }
      }
      const Vec<T> square = dot(left, left, m_);
      const Mask<T> live = square > Bits<T>::tiny;
      const Vec<T> inverse = select<T>(live, rsqrt<T>(select<T>(live, square, splat<T>(1))), Vec<T>{});
      sigma_[c] = square * inverse;
      if (c > 0) sigma_[c] = sigma_[c] < sigma_[c - 1] ? sigma_[c] : sigma_[c - 1];  // equal ones may differ by a rounding
      for (int64_t i = 0; i < m_; ++i) left[i] *= inverse;
      orthogonalise<T>(left_, m_, c);
      const Vec<T> sign = peak_sign<T>(tall_ ? left : right, tall_ ? m_ : n_, args_.x.dtype);
      for (int64_t i = 0; i < m_; ++i) left[i] = left[i] * sign + T(0);
      for (int64_t i = 0; i < n_; ++i) right[i] = right[i] * sign + T(0);
    }
  }

  void write(int64_t first, int lanes) {
    const Vec<T> nan = Vec<T>{} / Vec<T>{};
    if (any<T>(~finite_)) {
      for (int64_t i = 0; i < rank_ * m_; ++i) left_[i] = select<T>(finite_, left_[i], nan);
      for (int64_t i = 0; i < rank_ * n_; ++i) right_[i] = select<T>(finite_, right_[i], nan);
    }
    const View &u = args_.u, &s = args_.s, &vh = args_.vh;
    const Vec<T>*const us = tall_ ? left_ : right_, *const vs = tall_ ? right_ : left_;
    const int64_t m = u.size[1], k = vh.size[2];
    for (int64_t c = 0; c < rank_; ++c) {
      store_tile<T>(u.dtype, u.at(first, 0, c), u.stride[0], u.stride[1], lanes, m, us + c * m);
      store_tile<T>(vh.dtype, vh.at(first, c), vh.stride[0], vh.stride[2], lanes, k, vs + c * k);
      sigma_[c] = select<T>(finite_, sigma_[c] * scale_.down2 * scale_.down1, nan);
    }
    store_tile<T>(s.dtype, s.at(first), s.stride[0], s.stride[1], lanes, rank_, sigma_);
  }

  const SvdArgs& args_;
  const bool tall_;
  const int64_t m_, n_, rank_;
  const Jacobi<T> jacobi_;
  Scratch<Vec<T>> scratch_;
  Vec<T>*a_, *qr_, *core_, *tau_, *diagonal_, *norms_, *row_, *left_, *right_, *sigma_;
  Scale<T> scale_;
  Mask<T> finite_;
};

template <class T>
void decompose_groups(const SvdArgs& args, int64_t begin, int64_t end) {
  Decomposer<T> decomposer(args);
  for (int64_t group = begin; group < end; ++group) decomposer.group(group * kLanes<T>);
}

void truncated_svd(const SvdArgs& args, int64_t begin, int64_t end) {
  args.x.dtype == Dtype::f64 ? decompose_groups<double>(args, begin, end) : decompose_groups<float>(args, begin, end);
}

}  // namespace RMM_ISA
}  // namespace rmm

#ifdef RMM_OPS
#include <tuple>

#include "../common/tensor.h"
#include "parallel.h"

namespace rmm {

std::tuple<Tensor, Tensor, Tensor> truncated_svd_op(Tensor x, int64_t rank) {
  const View in = view(x, 3, "x");
  const int64_t batch = in.size[0], m = in.size[1], k = in.size[2];
  check_same(rank >= 0 && rank <= m && rank <= k, "x [B, m, k] with rank up to min(m, k)");
  Tensor u = torch::stable::new_empty(x, {batch, m, rank});
  Tensor s = torch::stable::new_empty(x, {batch, rank}, accumulator(x));
  Tensor vh = torch::stable::new_empty(x, {batch, rank, k});
  if (rank > 0) {
    const SvdArgs args{in, view(u, 3, "u"), view(s, 2, "s"), view(vh, 3, "vh")};
    const auto kernel = RMM_KERNEL(truncated_svd);
    parallel_groups(batch, in.dtype, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
  return {u, s, vh};
}

STABLE_TORCH_LIBRARY_IMPL(rmm_kernels, CPU, m) {
  m.impl("truncated_svd", TORCH_BOX(&truncated_svd_op));
  m.impl("truncated_svd.cpu", TORCH_BOX(&truncated_svd_op));
}

}  // namespace rmm
#endif
