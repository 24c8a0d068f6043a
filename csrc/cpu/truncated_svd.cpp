// truncated_svd: the SVD of a bidiagonal matrix, one matrix per lane.
//
// Of the tall one of X and Xᵀ, A [m, n], the right singular vectors V are found, from a bidiagonal matrix or, in lanes where
// that does not do and for the smallest n, from that by one-sided Jacobi. A V is then formed from A itself, free of what
// reflections and rotations rounded on the way: its columns' norms are σ, and its normalised columns the tall side's vectors.

#include "bidiagonal.h"
#include "jacobi.h"
#include "tile.h"

namespace rmm {

struct SvdArgs {
  View x, u, s, vh;  // [B, m, k], [B, m, rank], [B, rank], [B, rank, k]
};

// Groups of as many matrices as there are lanes, from `begin` to before `end`.
RMM_DECLARE_KERNEL(void truncated_svd(const SvdArgs& args, int64_t begin, int64_t end))

namespace RMM_ISA {

// As many groups at a time as there are in a V.
template <class V>
class Decomposer {
  using T = Scalar<V>;

 public:
  static constexpr int kGroups = Parts<V>::step;

  explicit Decomposer(const SvdArgs& args)
      : args_(args),
        tall_(args.x.size[1] >= args.x.size[2]),
        m_(args.x.size[tall_ ? 1 : 2]),
        n_(args.x.size[tall_ ? 2 : 1]),
        rank_(args.s.size[1]),
        jacobi_(n_),
        wide_scratch_(2 * m_ * n_ + n_ * n_ + 15 * n_ + 2 * m_ + rank_ * (m_ + n_ + 2)),
        a_(wide_scratch_.take(m_ * n_)),
        factored_(wide_scratch_.take(m_ * n_)),
        room_(wide_scratch_.take(n_ * n_ + 6 * n_)),
        work_(wide_scratch_.take(3 * n_ + m_)),
        q_(wide_scratch_.take(2 * n_)),
        e_(wide_scratch_.take(2 * n_)),
        values_(wide_scratch_.take(n_)),
        kept_(wide_scratch_.take(rank_)),
        right_(wide_scratch_.take(rank_ * n_)),
        left_(wide_scratch_.take(rank_ * m_)),
        sigma_(wide_scratch_.take(rank_)),
        column_(wide_scratch_.take(m_)),
        scratch_(2 * n_ * n_ + n_ + m_ + n_),
        core_(scratch_.take(2 * n_ * n_)),
        norms_(scratch_.take(n_)),
        row_(scratch_.take(m_ + n_)) {}

  void groups(int64_t first) {
    int lanes[kGroups];
    for (int h = 0; h < kGroups; ++h) {
      const int64_t begin = first + h * kLanes<T>, left = args_.x.size[0] - begin;
      lanes[h] = left < kLanes<T> ? static_cast<int>(left) : kLanes<T>;
      load(begin, lanes[h], h);
    }
    for (int64_t i = 0; i < m_ * n_; ++i) factored_[i] = a_[i];
    right_vectors();
    left_vectors();
    for (int h = 0; h < kGroups; ++h) write(first + h * kLanes<T>, lanes[h], h);
  }

 private:
  // What group h has of entry i.
  RMM_INLINE Vec<T>& of(V* what, int h, int64_t i) const { return part(what, h)[kGroups * i]; }

  // a_ [column of n][m]: the matrices, the longer side as m, scaled by a power of two; 0 where one is not finite. Lanes without
  // a matrix do what the first one does: zero matrices take longer.
  void load(int64_t first, int lanes, int h) {
    const View& x = args_.x;
    const int64_t along_m = x.stride[tall_ ? 1 : 2], along_n = x.stride[tall_ ? 2 : 1], size = element_size(x.dtype);
    char* const from = x.at(first);
    Vec<T> largest{};
    Mask<T> finite = ~Mask<T>{};
    const auto put = [&](int64_t i, Vec<T> value) {
      for (int lane = lanes; lane < kLanes<T>; ++lane) value[lane] = value[0];
      const Vec<T> magnitude = abs<T>(value);
      finite &= magnitude <= Bits<T>::largest;
      largest = larger(magnitude, largest);
      of(a_, h, i) = value;
    };
    if (along_m <= along_n) {
      for (int64_t c = 0; c < n_; ++c) {
        load_tile<T>(x.dtype, from + c * along_n * size, x.stride[0], along_m, lanes, m_, row_);
        for (int64_t i = 0; i < m_; ++i) put(c * m_ + i, row_[i]);
      }
    } else {
      for (int64_t i = 0; i < m_; ++i) {
        load_tile<T>(x.dtype, from + i * along_m * size, x.stride[0], along_n, lanes, n_, row_);
        for (int64_t c = 0; c < n_; ++c) put(c * m_ + i, row_[c]);
      }
    }
    finite_[h] = finite;
    scale_[h] = scale_of<T>(select<T>(finite, largest, Vec<T>{}));
    for (int64_t i = 0; i < m_ * n_; ++i) {
      Vec<T>& value = of(a_, h, i);
      value = select<T>(finite, value, Vec<T>{}) * scale_[h].up1 * scale_[h].up2;
    }
  }

  // right_ [rank][n] = V, orthonormal.
  void right_vectors() {
    Bidiagonal<V> matrix(factored_, m_, n_, room_, work_);
    matrix.template factor<0>();
    auto good = V{} > V{};
    if (n_ >= kBidiagonal) {
      for (int64_t i = 0; i < n_; ++i) {
        q_[i] = matrix.q[i];
        e_[i] = matrix.e[i];
      }
      good = squared_singular_values<0>(q_, e_, n_, values_);
      good &= matrix.template vectors<0>(values_, rank_, right_, kept_, T(0));
    }
    for (int h = 0; h < kGroups; ++h) {
      const Mask<T> bad = ~reinterpret_cast<const Mask<T>*>(&good)[h];
      if (any<T>(bad)) right_vectors_by_jacobi(matrix, bad, h);
    }
    matrix.turn_back(right_, rank_);
    for (int64_t c = 0; c < rank_; ++c) orthonormalise(right_, n_, c);
  }

  // In some lanes of group h, those of B, by rotations gathered in an identity beneath it.
  void right_vectors_by_jacobi(const Bidiagonal<V>& matrix, Mask<T> lanes, int h) {
    for (int64_t c = 0; c < n_; ++c) {
      for (int64_t i = 0; i < n_; ++i) {
        Vec<T>* const entry = core_ + c * 2 * n_ + i;
        *entry = i == c ? of(matrix.diagonal, h, c) : i + 1 == c ? of(matrix.upper, h, i) : Vec<T>{};
        entry[n_] = splat<T>(i == c ? 1 : 0);
      }
    }
    jacobi_(core_, n_, 2 * n_, norms_);
    for (int64_t c = 0; c < rank_; ++c) {
      for (int64_t i = 0; i < n_; ++i) {
        Vec<T>& entry = of(right_, h, c * n_ + i);
        entry = select<T>(lanes, core_[c * 2 * n_ + n_ + i], entry);
      }
    }
  }

  // left_ [rank][m] = A V, made orthonormal in falling order of σ, its norms, so that the large ones stay as they are.
  void left_vectors() {
    for (int64_t c = 0; c < rank_; ++c) {
      V* const left = left_ + c * m_;
      for (int64_t j = 0; j < n_; j += 8) {  // eight at a time rounds less than one by one
        product(right_ + c * n_ + j, a_ + j * m_, m_, m_, n_ - j < 8 ? n_ - j : 8, j == 0 ? left : column_);
        for (int64_t i = 0; j > 0 && i < m_; ++i) left[i] += column_[i];
      }
      const V square = dot(left, left, m_);
      const auto live = square > Bits<T>::tiny;
      const V inverse = select(live, rsqrt(select(live, square, splat_as<V>(1))), V{});
      sigma_[c] = square * inverse;
      if (c > 0) sigma_[c] = smaller(sigma_[c], sigma_[c - 1]);  // equal ones may differ by a rounding
      for (int64_t i = 0; i < m_; ++i) left[i] *= inverse;
      for (int pass = 0; pass < 2; ++pass) orthonormalise(left_, m_, c);
    }
  }

  // Takes out of column c what it has of the ones before it, and makes its norm 1; where nothing is left of it, completes it.
  void orthonormalise(V* vectors, int64_t rows, int64_t c) {
    take_out(vectors, rows, c);
    make_unit(vectors, rows, c, V{} >= V{}, T(1e4) * Bits<T>::epsilon * Bits<T>::epsilon);
  }

  void write(int64_t first, int lanes, int h) {
    const Vec<T> nan = Vec<T>{} / Vec<T>{};
    const Mask<T> finite = finite_[h];
    const View &u = args_.u, &s = args_.s, &vh = args_.vh;
    for (int64_t c = 0; c < rank_; ++c) {
      V *const left = left_ + c * m_, *const right = right_ + c * n_;
      const Vec<T> sign = peak_sign<T>(part(tall_ ? left : right, h), tall_ ? m_ : n_, args_.x.dtype, kGroups);
      const auto out = [&](V* vector, int64_t size) {
        for (int64_t i = 0; i < size; ++i) row_[i] = select<T>(finite, of(vector, h, i) * sign + T(0), nan);  // + 0: no −0
        return row_;
      };
      const int64_t m = u.size[1], k = vh.size[2];
      store_tile<T>(u.dtype, u.at(first, 0, c), u.stride[0], u.stride[1], lanes, m, out(tall_ ? left : right, m));
      store_tile<T>(vh.dtype, vh.at(first, c), vh.stride[0], vh.stride[2], lanes, k, out(tall_ ? right : left, k));
    }
    for (int64_t c = 0; c < rank_; ++c) {
      row_[c] = select<T>(finite, of(sigma_, h, c) * scale_[h].down2 * scale_[h].down1, nan);
    }
    store_tile<T>(s.dtype, s.at(first), s.stride[0], s.stride[1], lanes, rank_, row_);
  }

  const SvdArgs& args_;
  const bool tall_;
  const int64_t m_, n_, rank_;
  const Jacobi<T> jacobi_;
  Scratch<V> wide_scratch_;
  V *const a_, *const factored_, *const room_, *const work_, *const q_, *const e_, *const values_, *const kept_;
  V *const right_, *const left_, *const sigma_, *const column_;
  Scratch<Vec<T>> scratch_;
  Vec<T>*const core_, *const norms_, *const row_;
  Scale<T> scale_[kGroups];
  Mask<T> finite_[kGroups];
};

template <class T>
void decompose_groups(const SvdArgs& args, int64_t begin, int64_t end) {
  if (end - begin > 1) {
    Decomposer<Pair<Vec<T>>> two(args);
    for (; end - begin > 1; begin += 2) two.groups(begin * kLanes<T>);
  }
  if (begin < end) Decomposer<Vec<T>>(args).groups(begin * kLanes<T>);
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
    const int64_t products = 4 * m * k * (m < k ? m : k);
    parallel_groups(batch, in.dtype, products, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
  return {u, s, vh};
}

STABLE_TORCH_LIBRARY_IMPL(rmm_kernels, CPU, m) {
  m.impl("truncated_svd", TORCH_BOX(&truncated_svd_op));
  m.impl("truncated_svd.cpu", TORCH_BOX(&truncated_svd_op));
}

}  // namespace rmm
#endif
