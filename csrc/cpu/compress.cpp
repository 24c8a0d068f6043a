// compress: mean, Helmert reduction, QR, one-sided Jacobi, basis and coefficients, one position per lane.
//
// Y, the centred vectors in a Helmert basis, has K = min(r, n−1) singular values and no guaranteed zero. Where it is tall,
// Y = QR first, so that Jacobi works on R [K, K] and only the p chosen columns go back through Q; where it is wide, Yᵀ = QR
// and Jacobi works on Rᵀ, whose left singular vectors are those of Y.

#include "jacobi.h"
#include "tile.h"

namespace rmm {

struct CompressArgs {
  View x, basis, coeff, energy;  // [n, S, r], [p+1, S, r], [n, p, S], [S, K]
};

// Groups of as many positions as there are lanes, from `begin` to before `end`.
RMM_DECLARE_KERNEL(void compress(const CompressArgs& args, int64_t begin, int64_t end))

namespace RMM_ISA {

template <class T>
class Compressor {
 public:
  explicit Compressor(const CompressArgs& args)
      : args_(args),
        n_(args.x.size[0]),
        positions_(args.x.size[1]),
        r_(args.x.size[2]),
        p_(args.coeff.size[1]),
        columns_(n_ - 1),
        k_(r_ < columns_ ? r_ : columns_),
        tall_(r_ >= columns_),
        task_(r_ | 1),
        jacobi_(k_),
        scratch_(n_ * task_ + columns_ * r_ + k_ * k_ + 5 * k_ + p_ * r_ + r_ + p_),
        x_(scratch_.take(n_ * task_)),
        y_(scratch_.take(columns_ * r_)),
        core_(scratch_.take(k_ * k_)),
        tau_(scratch_.take(k_)),
        diagonal_(scratch_.take(k_)),
        norms_(scratch_.take(k_)),
        kept_(scratch_.take(k_)),
        energy_(scratch_.take(k_)),
        u_(scratch_.take(p_ * r_)),
        mean_(scratch_.take(r_)),
        c_(scratch_.take(p_)) {}

  void group(int64_t first) {
    const int lanes = positions_ - first < kLanes<T> ? static_cast<int>(positions_ - first) : kLanes<T>;
    const Mask<T> finite = load_and_scale(first, lanes);
    centre(first);
    factorise();
    if (k_ > 0) jacobi_(core_, k_, k_, norms_);
    energies();
    components();
    write(first, lanes, finite);
  }

 private:
  // Loads x and finds its power of two per lane; lanes with NaN or Inf become 0. Returns which lanes are finite.
  Mask<T> load_and_scale(int64_t first, int lanes) {
    const View& x = args_.x;
    Mask<T> largest{};  // of magnitudes by their bits, which order like them, NaN and Inf above all
    for (int64_t i = 0; i < n_; ++i) {
      load_tile<T>(x.dtype, x.at(i, first), x.stride[1], x.stride[2], lanes, r_, x_ + i * task_);
      for (int64_t j = 0; j < r_; ++j) largest = larger_magnitude<T>(largest, x_[i * task_ + j]);
    }
    const Mask<T> finite = (Vec<T>)largest <= Bits<T>::largest;
    if (any<T>(~finite)) {
      largest &= finite;
      each_of_x([&](Vec<T>& value) { value = select<T>(finite, value, splat<T>(0)); });
    }
    scale_ = scale_of<T>((Vec<T>)largest);
    if (any<T>(scale_.up1 != T(1))) {
      each_of_x([&](Vec<T>& value) { value *= scale_.up1; });
    }
    return finite;
  }

  template <class Change>
  void each_of_x(const Change& change) {
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = 0; j < r_; ++j) change(x_[i * task_ + j]);
    }
  }

  // x_ becomes the scaled and centred x, y_ its Helmert reduction y_i = x_i + x_0 / (√n − 1), i = 1 … n−1, stored as
  // columns over ranks where Y is tall, over tasks where it is wide. The first task's vector goes first: exactly so where all
  // share an offset, which then costs no accuracy, and equal vectors become exactly zero. Then the mean goes twice: what the
  // first one rounds off, the second takes.
  //
  // Meanwhile, a share in each step, it asks for the memory that the next group reads and this one writes.
  void centre(int64_t first_position) {
    const View &in = args_.x, &basis = args_.basis, &coeff = args_.coeff;
    const int64_t next = first_position + kLanes<T>;
    const bool more = next + kLanes<T> <= positions_;
    const TileLines read(in, in.at(0, next), more ? n_ : 0, kLanes<T>, in.stride[1], r_, in.stride[2]);
    const TileLines write(basis, basis.at(0, first_position), more ? p_ + 1 : 0, kLanes<T>, basis.stride[1], r_,
                          basis.stride[2]);
    const TileLines write_c(coeff, coeff.at(0, 0, first_position), more ? n_ : 0, kLanes<T>, coeff.stride[2], p_,
                            coeff.stride[1]);
    const T share = T(1) / static_cast<T>(n_);
    const T spread = n_ > 1 ? T(1) / (T(sqrt(static_cast<double>(n_))) - T(1)) : T(0);
    Mask<T> largest{};
    for (int64_t j = 0; j < r_; ++j) {
      read.prefetch<false>(j, r_);
      write.prefetch<true>(j, r_);
      write_c.prefetch<true>(j, r_);
      Vec<T>* const x = x_ + j;
      const Vec<T> up = scale_.up2, offset = x[0] * up;
      Vec<T> sum{};
      for (int64_t i = 1; i < n_; ++i) sum += x[i * task_] * up - offset;
      const Vec<T> mean = share * sum;
      sum = -mean;
      for (int64_t i = 1; i < n_; ++i) sum += (x[i * task_] * up - offset) - mean;
      const Vec<T> rest = share * sum;
      mean_[j] = offset + (mean + rest);
      x[0] = -mean - rest;
      // Scaled again below: what tells the tasks apart may be much smaller than what they share.
      const Vec<T> first = abs<T>(spread * x[0]);
      for (int64_t i = 1; i < n_; ++i) {
        x[i * task_] = ((x[i * task_] * up - offset) - mean) - rest;
        largest = larger_magnitude<T>(largest, abs<T>(x[i * task_]) + first);
      }
    }
    centred_ = scale_of<T>((Vec<T>)largest);
    const bool low = any<T>(centred_.up1 != T(1));
    const int64_t along_task = tall_ ? r_ : 1, along_rank = tall_ ? 1 : columns_;
    for (int64_t j = 0; j < r_; ++j) {
      Vec<T>* const y = y_ + j * along_rank;
      const Vec<T>* const x = x_ + j;
      const Vec<T> first = spread * x[0];
      if (low) {
        for (int64_t i = 1; i < n_; ++i) y[(i - 1) * along_task] = (x[i * task_] + first) * centred_.up1 * centred_.up2;
      } else {
        for (int64_t i = 1; i < n_; ++i) y[(i - 1) * along_task] = (x[i * task_] + first) * centred_.up2;
      }
    }
  }

  // QR of Y or of Yᵀ, whichever is tall; core_ gets R or Rᵀ.
  void factorise() {
    const int64_t rows = tall_ ? r_ : columns_;
    householder<T>(y_, rows, k_, tau_, diagonal_);
    for (int64_t c = 0; c < k_; ++c) {
      for (int64_t i = 0; i < k_; ++i) {
        const int64_t column = tall_ ? c : i, row = tall_ ? i : c;  // R[row, column]
        core_[c * k_ + i] = row < column ? y_[column * rows + row] : row == column ? diagonal_[row] : Vec<T>{};
      }
    }
  }

  // energy_[c] = ‖Yᵀu‖² with u along the core's column c: the columns' own norms carry what all rotations rounded. Those of the
  // components are found closer in write(); and a negligible column has no direction of its own: there its norm will do.
  void energies() {
    const int64_t rows = tall_ ? r_ : columns_;
    for (int64_t c = 0; c < k_; ++c) {
      energy_[c] = norms_[c];
      if (c >= p_) {
        const Vec<T>* const u = core_ + c * k_;
        Vec<T> square{};
        for (int64_t i = 0; i < k_; ++i) {
          Vec<T> along = diagonal_[i] * u[i];
          if (tall_) {
            for (int64_t j = 0; j < i; ++j) along += y_[i * rows + j] * u[j];  // (Rᵀu)_i
          } else {
            for (int64_t j = i + 1; j < k_; ++j) along += y_[j * rows + i] * u[j];  // (Ru)_i
          }
          square += along * along;
        }
        const Mask<T> live = (norms_[c] > Bits<T>::deficient * Bits<T>::deficient * norms_[0]) & (norms_[c] > Bits<T>::tiny);
        energy_[c] = select<T>(live, square / select<T>(live, norms_[c], splat<T>(1)), norms_[c]);
      }
      energy_[c] = energy_[c] * centred_.down2 * centred_.down2 * centred_.down1 * centred_.down1;
    }
  }

  // u_ [p][r]: the leading left singular vectors of Y, completed to orthonormal ones.
  void components() {
    const int64_t live = p_ < k_ ? p_ : k_;
    if (live > 0) orthonormalise<T>(core_, k_, live, norms_, kept_);
    for (int64_t c = 0; c < p_; ++c) {
      for (int64_t j = 0; j < r_; ++j) {
        u_[c * r_ + j] = c < live && j < k_ ? core_[c * k_ + j] : splat<T>(c >= live && j == c ? 1 : 0);
      }
    }
    if (k_ > 0 && tall_) apply_q<T>(y_, tau_, r_, k_, u_, p_);
    for (int64_t c = 0; c < p_; ++c) {
      Vec<T>* const u = u_ + c * r_;
      polish_norm<T>(u, r_);
      const Vec<T> sign = peak_sign<T>(u, r_, args_.basis.dtype);
      for (int64_t j = 0; j < r_; ++j) u[j] = u[j] * sign + T(0);
    }
  }

  void write(int64_t first, int lanes, Mask<T> finite) {
    const View &basis = args_.basis, &coeff = args_.coeff, &energy = args_.energy;
    const Vec<T> zero{}, nan = zero / zero;
    const int64_t live = p_ < k_ ? p_ : k_;
    for (int64_t c = 0; c < live; ++c) {
      energy_[c] *= T(1) - kept_[c];  // found again below, closer
      norms_[c] = Vec<T>{};           // sums over eight tasks: a few long ones round less than one longer
    }
    for (int64_t i = 0; i < n_; ++i) {
      dots<T>(x_ + i * task_, u_, r_, p_, c_);
      for (int64_t c = 0; c < live; ++c) {
        c_[c] *= kept_[c];
        norms_[c] += c_[c] * c_[c];
        if (i % 8 == 7 || i + 1 == n_) {
          energy_[c] += norms_[c];
          norms_[c] = Vec<T>{};
        }
      }
      for (int64_t c = 0; c < p_; ++c) {
        const Vec<T> along = c < k_ ? c_[c] : zero;
        c_[c] = select<T>(finite, along * scale_.down2 * scale_.down1, nan);
      }
      store_tile<T>(coeff.dtype, coeff.at(i, 0, first), coeff.stride[2], coeff.stride[1], lanes, p_, c_);
    }
    for (int64_t j = 0; j < r_; ++j) mean_[j] = select<T>(finite, mean_[j] * scale_.down2 * scale_.down1, nan);
    store_tile<T>(basis.dtype, basis.at(0, first), basis.stride[1], basis.stride[2], lanes, r_, mean_);
    if (any<T>(~finite)) {
      for (int64_t j = 0; j < p_ * r_; ++j) u_[j] = select<T>(finite, u_[j], nan);
    }
    for (int64_t c = 0; c < p_; ++c) {
      store_tile<T>(basis.dtype, basis.at(c + 1, first), basis.stride[1], basis.stride[2], lanes, r_, u_ + c * r_);
    }
    for (int64_t c = 0; c < k_; ++c) {
      if (c > 0) energy_[c] = energy_[c] < energy_[c - 1] ? energy_[c] : energy_[c - 1];  // equal ones may differ by a rounding
    }
    for (int64_t c = 0; c < k_; ++c) {
      const Vec<T> square = energy_[c] * scale_.down2 * scale_.down2 * scale_.down1 * scale_.down1;
      energy_[c] = select<T>(finite, square, nan);
    }
    store_tile<T>(energy.dtype, energy.at(first), energy.stride[0], energy.stride[1], lanes, k_, energy_);
  }

  const CompressArgs& args_;
  const int64_t n_, positions_, r_, p_, columns_, k_;
  const bool tall_;
  const int64_t task_;  // from one task's vector to the next in x_: odd, so that they do not share a place in the cache
  const Jacobi<T> jacobi_;
  Scratch<T> scratch_;
  Vec<T>*x_, *y_, *core_, *tau_, *diagonal_, *norms_, *kept_, *energy_, *u_, *mean_, *c_;
  Scale<T> scale_, centred_;
};

template <class T>
void compress_groups(const CompressArgs& args, int64_t begin, int64_t end) {
  Compressor<T> compressor(args);
  for (int64_t group = begin; group < end; ++group) compressor.group(group * kLanes<T>);
}

void compress(const CompressArgs& args, int64_t begin, int64_t end) {
  args.x.dtype == Dtype::f64 ? compress_groups<double>(args, begin, end) : compress_groups<float>(args, begin, end);
}

}  // namespace RMM_ISA
}  // namespace rmm

#ifdef RMM_OPS
#include <tuple>

#include "../common/tensor.h"
#include "parallel.h"

namespace rmm {

std::tuple<Tensor, Tensor, Tensor> compress_op(Tensor x, int64_t components) {
  const View in = view(x, 3, "x");
  const int64_t n = in.size[0], positions = in.size[1], r = in.size[2];
  check_same(n >= 1 && components >= 0 && components <= r, "x [n, S, r] with n >= 1, components from 0 to r");
  Tensor basis = like_layout(x, components + 1);
  Tensor coeff = torch::stable::new_empty(x, {n, components, positions});
  Tensor energy = torch::stable::new_empty(x, {positions, r < n - 1 ? r : n - 1}, accumulator(x));
  const CompressArgs args{in, view(basis, 3, "basis"), view(coeff, 3, "coeff"), view(energy, 2, "energy")};
  const auto kernel = RMM_KERNEL(compress);
  parallel_groups(positions, in.dtype, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {basis, coeff, energy};
}

STABLE_TORCH_LIBRARY_IMPL(rmm_kernels, CPU, m) {
  m.impl("compress", TORCH_BOX(&compress_op));
  m.impl("compress.cpu", TORCH_BOX(&compress_op));
}

}  // namespace rmm
#endif
