// compress: mean, Helmert reduction, QR, SVD of its R, basis and coefficients, one position per lane.
//
// Y, the centred vectors in a Helmert basis, has K = min(r, n−1) singular values and no guaranteed zero. Where it is tall,
// Y = QR first, so that R [K, K] is decomposed and only the p chosen vectors go back through Q; where it is wide, Yᵀ = QR and
// the left singular vectors of Rᵀ are those of Y. The SVD goes by way of a bidiagonal matrix; in lanes where that does not do,
// and for the smallest K, by one-sided Jacobi.

#include "bidiagonal.h"
#include "jacobi.h"
#include "tile.h"

namespace rmm {

struct CompressArgs {
  View x, basis, coeff, energy;  // [n, S, r], [p+1, S, r], [n, p, S], [S, K]
};

// Groups of as many positions as there are lanes, from `begin` to before `end`.
RMM_DECLARE_KERNEL(void compress(const CompressArgs& args, int64_t begin, int64_t end))

namespace RMM_ISA {

// Groups of positions, one per lane, four at a time: each loaded, centred and written by itself, but factored in pairs, and of
// both pairs the singular values are found abreast.
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
        live_(p_ < k_ ? p_ : k_),
        tall_(r_ >= columns_),
        rows_(tall_ ? r_ : columns_),
        task_(r_ | 1),
        jacobi_(k_),
        values_room_(5 * k_),
        found_(values_room_.take(5 * k_)),
        wide_scratch_(kGroups / 2 * (columns_ * r_ + k_ * k_ + 12 * k_ + live_ * (k_ + 1) + p_ * r_)),
        scratch_(kGroups * (n_ * task_ + r_) + k_ * k_ + 3 * k_ + p_ * r_ + p_),
        core_(scratch_.take(k_ * k_)),
        norms_(scratch_.take(k_)),
        energy_(scratch_.take(k_)),
        kept_(scratch_.take(k_)),
        u_(scratch_.take(p_ * r_)),
        c_(scratch_.take(p_)) {
    for (GroupPair& pair : pairs_) {
      pair.y = wide_scratch_.take(columns_ * r_);
      pair.core = wide_scratch_.take(k_ * k_);
      pair.tau = wide_scratch_.take(k_);
      pair.diagonal = wide_scratch_.take(k_);
      pair.values = wide_scratch_.take(k_);
      pair.room = wide_scratch_.take(9 * k_);
      pair.vectors = wide_scratch_.take(live_ * k_);
      pair.kept = wide_scratch_.take(live_);
      pair.u = wide_scratch_.take(p_ * r_);
    }
    for (Group& group : groups_) {
      group.x = scratch_.take(n_ * task_);
      group.mean = scratch_.take(r_);
    }
  }

  static constexpr int kGroups = 4;

  // The groups from position `first` on, up to kGroups of them.
  void groups(int64_t first, int count) {
    for (int g = 0; g < kGroups; ++g) {
      Group& group = groups_[g];
      group.first = first + g * kLanes<T>;
      const int64_t left = g < count ? positions_ - group.first : 0;
      group.lanes = left < kLanes<T> ? static_cast<int>(left) : kLanes<T>;
      if (group.lanes > 0) {
        load_and_scale(group);
        centre(group, g);
      } else {
        for (int64_t i = 0; i < columns_ * r_; ++i) of_group(&GroupPair::y, g, i) = Vec<T>{};
      }
    }
    for (GroupPair& pair : pairs_) householder(pair.y, rows_, k_, pair.tau, pair.diagonal);
    decompose();
    for (GroupPair& pair : pairs_) components(pair);
    for (int g = 0; g < count; ++g) write(groups_[g], g);
  }

 private:
  using Wide = Pair<Vec<T>>;

  struct Group {
    Vec<T>*x, *mean;  // [n][task_], [r]
    int64_t first;    // position
    int lanes;        // that are positions
    Mask<T> finite;
    Scale<T> scale, centred;
  };

  struct GroupPair {
    Wide *y, *tau, *diagonal;       // Y and its QR
    Wide *core, *room;              // [k][k], [9 k]: R on the way to its singular vectors
    Wide *values, *vectors, *kept;  // [k], [live][k], [live]
    Wide* u;                        // [p][r]
  };

  // Entry i of group g's half of what pairs have.
  RMM_INLINE Vec<T>& of_group(Wide* GroupPair::* what, int g, int64_t i) {
    return reinterpret_cast<Vec<T>*>(pairs_[g / 2].*what)[2 * i + g % 2];
  }

  // Loads x and finds its power of two per lane; lanes with NaN or Inf become 0.
  void load_and_scale(Group& group) {
    const View& x = args_.x;
    Mask<T> largest{};  // of magnitudes by their bits, which order like them, NaN and Inf above all
    for (int64_t i = 0; i < n_; ++i) {
      Vec<T>* const task = group.x + i * task_;
      load_tile<T>(x.dtype, x.at(i, group.first), x.stride[1], x.stride[2], group.lanes, r_, task);
      for (int64_t j = 0; j < r_; ++j) largest = larger_magnitude<T>(largest, task[j]);
    }
    group.finite = (Vec<T>)largest <= Bits<T>::largest;
    if (any<T>(~group.finite)) {
      largest &= group.finite;
      each_of_x(group, [&](Vec<T>& value) { value = select<T>(group.finite, value, splat<T>(0)); });
    }
    group.scale = scale_of<T>((Vec<T>)largest);
    if (any<T>(group.scale.up1 != T(1))) {
      each_of_x(group, [&](Vec<T>& value) { value *= group.scale.up1; });
    }
  }

  template <class Change>
  void each_of_x(const Group& group, const Change& change) {
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = 0; j < r_; ++j) change(group.x[i * task_ + j]);
    }
  }

  // x becomes the scaled and centred x, y its Helmert reduction y_i = x_i + x_0 / (√n − 1), i = 1 … n−1, stored as columns over
  // ranks where Y is tall, over tasks where it is wide, and scaled once more where what tells the tasks apart is much smaller
  // than what they share.
  void centre(Group& group, int g) {
    const Vec<T> largest = (Vec<T>)centre_of<2>(group, g);
    group.centred = scale_of<T>(largest);
    const Mask<T> near = (largest >= T(0.125)) & (largest < T(16));
    const Vec<T> one = splat<T>(1);
    group.centred = {select<T>(near, one, group.centred.up1), select<T>(near, one, group.centred.up2),
                     select<T>(near, one, group.centred.down1), select<T>(near, one, group.centred.down2)};
    if (any<T>(~near)) {
      for (int64_t i = 0; i < columns_ * r_; ++i) {
        Vec<T>& y = of_group(&GroupPair::y, g, i);
        y = y * group.centred.up1 * group.centred.up2;
      }
    }
  }

  template <int N>
  Mask<T> centre_of(Group& group, int g) {
    if constexpr (N > 8) {
      return centre_tasks<0>(group, g);
    } else {
      return n_ == N ? centre_tasks<N>(group, g) : centre_of<N + 1>(group, g);
    }
  }

  // The first task's vector goes first: exactly so where all share an offset, which then costs no accuracy, and equal vectors
  // become exactly zero. Then the mean goes twice: what the first one rounds off, the second takes. N is n where that is known
  // when compiling, and all of a rank fits in registers. Returns the largest magnitude of y.
  //
  // Meanwhile, a share in each step, it asks for the memory that a later group reads and this one writes.
  template <int N>
  Mask<T> centre_tasks(Group& group, int g) {
    const int64_t n = N ? N : n_, step = N ? 1 : task_;
    const View &in = args_.x, &basis = args_.basis, &coeff = args_.coeff;
    const int64_t later = group.first + kGroups * kLanes<T>;
    const bool more = later + kLanes<T> <= positions_;
    const TileLines read(in, in.at(0, later), more ? n : 0, kLanes<T>, in.stride[1], r_, in.stride[2]);
    const TileLines write(basis, basis.at(0, group.first), more ? p_ + 1 : 0, kLanes<T>, basis.stride[1], r_, basis.stride[2]);
    const TileLines write_c(coeff, coeff.at(0, 0, group.first), more ? n : 0, kLanes<T>, coeff.stride[2], p_, coeff.stride[1]);
    const int64_t along_task = tall_ ? r_ : 1, along_rank = tall_ ? 1 : columns_;
    const T share = T(1) / static_cast<T>(n);
    const T spread = n > 1 ? T(1) / (T(sqrt(static_cast<double>(n))) - T(1)) : T(0);
    const Vec<T> up = group.scale.up2;
    Mask<T> largest{};
    for (int64_t j = 0; j < r_; ++j) {
      read.template prefetch<false>(j, r_);
      write.template prefetch<true>(j, r_);
      write_c.template prefetch<true>(j, r_);
      Vec<T>* const x = group.x + j;
      Vec<T> own[N ? N : 1];
      Vec<T>* const v = N ? own : x;
      const Vec<T> offset = x[0] * up;
      Vec<T> sum{};
      for (int64_t i = 1; i < n; ++i) {
        v[i * step] = x[i * task_] * up - offset;
        sum += v[i * step];
      }
      const Vec<T> mean = share * sum;
      sum = -mean;
      for (int64_t i = 1; i < n; ++i) {
        v[i * step] -= mean;
        sum += v[i * step];
      }
      const Vec<T> rest = share * sum, first = -mean - rest, spread_first = spread * first;
      group.mean[j] = offset + (mean + rest);
      x[0] = first;
      for (int64_t i = 1; i < n; ++i) {
        const Vec<T> centred = v[i * step] - rest, y = centred + spread_first;
        x[i * task_] = centred;
        of_group(&GroupPair::y, g, (i - 1) * along_task + j * along_rank) = y;
        largest = larger_magnitude<T>(largest, y);
      }
    }
    return largest;
  }

  // The core, R of the QR of Y or, where Y is wide, Rᵀ.
  template <class Put>
  void each_of_core(const GroupPair& pair, const Put& put) const {
    for (int64_t c = 0; c < k_; ++c) {
      for (int64_t i = 0; i < k_; ++i) {
        const int64_t row = tall_ ? i : c, column = tall_ ? c : i;
        put(c * k_ + i, row < column ? pair.y[column * rows_ + row] : row == column ? pair.diagonal[row] : Wide{});
      }
    }
  }

  // vectors [live][k]: the leading left singular vectors of the core, completed where σ is negligible, as kept says; values:
  // σ².
  void decompose() {
    if (k_ == 0) return;
    PairMask<Mask<T>> good[2] = {};
    if (k_ >= kBidiagonal) {
      for (GroupPair& pair : pairs_) {
        each_of_core(pair, [&](int64_t at, const Wide& entry) { pair.core[at] = entry; });
      }
      Bidiagonal<Wide> cores[2] = {{pairs_[0].core, k_, pairs_[0].room}, {pairs_[1].core, k_, pairs_[1].room}};
      Wide* const values[2] = {pairs_[0].values, pairs_[1].values};
      Wide* const vectors[2] = {pairs_[0].vectors, pairs_[1].vectors};
      Wide* const kept[2] = {pairs_[0].kept, pairs_[1].kept};
      decompose_two_of<kBidiagonal>(cores, live_, values, vectors, kept, good, found_);
    }
    for (int g = 0; g < kGroups; ++g) {
      const Mask<T> bad = ~(g % 2 ? good[g / 2].high : good[g / 2].low);
      if (groups_[g].lanes > 0 && any<T>(bad)) decompose_jacobi(g, bad);
    }
  }

  // The same in some lanes of one group by Jacobi.
  void decompose_jacobi(int g, Mask<T> lanes) {
    each_of_core(pairs_[g / 2], [&](int64_t at, const Wide& entry) { core_[at] = g % 2 ? entry.high : entry.low; });
    jacobi_(core_, k_, k_, norms_);
    energies(g);
    orthonormalise<T>(core_, k_, live_, norms_, kept_);
    const auto replace = [&](Wide* GroupPair::* what, int64_t i, Vec<T> value) {
      of_group(what, g, i) = select<T>(lanes, value, of_group(what, g, i));
    };
    for (int64_t c = 0; c < k_; ++c) replace(&GroupPair::values, c, energy_[c]);
    for (int64_t c = 0; c < live_; ++c) replace(&GroupPair::kept, c, kept_[c]);
    for (int64_t i = 0; i < live_ * k_; ++i) replace(&GroupPair::vectors, i, core_[i]);
  }

  // energy_[c] = ‖Yᵀu‖² with u along the core's column c: the columns' own norms carry what all rotations rounded. Those of the
  // components are found closer in write(); and a negligible column has no direction of its own: there its norm will do.
  void energies(int g) {
    for (int64_t c = 0; c < k_; ++c) {
      energy_[c] = norms_[c];
      if (c < p_) continue;
      const Vec<T>* const u = core_ + c * k_;
      Vec<T> square{};
      for (int64_t i = 0; i < k_; ++i) {
        Vec<T> along = of_group(&GroupPair::diagonal, g, i) * u[i];
        if (tall_) {
          for (int64_t j = 0; j < i; ++j) along += of_group(&GroupPair::y, g, i * rows_ + j) * u[j];  // (Rᵀu)_i
        } else {
          for (int64_t j = i + 1; j < k_; ++j) along += of_group(&GroupPair::y, g, j * rows_ + i) * u[j];  // (Ru)_i
        }
        square += along * along;
      }
      const Mask<T> live = (norms_[c] > Bits<T>::deficient * Bits<T>::deficient * norms_[0]) & (norms_[c] > Bits<T>::tiny);
      energy_[c] = select<T>(live, square / select<T>(live, norms_[c], splat<T>(1)), norms_[c]);
    }
  }

  // u: the leading left singular vectors of Y, completed to orthonormal ones.
  void components(const GroupPair& pair) {
    for (int64_t c = 0; c < p_; ++c) {
      for (int64_t j = 0; j < r_; ++j) {
        pair.u[c * r_ + j] = c < live_ && j < k_ ? pair.vectors[c * k_ + j] : splat_as<Wide>(c >= live_ && j == c ? 1 : 0);
      }
    }
    if (k_ > 0 && tall_) apply_q(pair.y, pair.tau, r_, k_, pair.u, p_);
    for (int64_t c = 0; c < p_; ++c) polish_norm(pair.u + c * r_, r_);
  }

  void write(const Group& group, int g) {
    const View &basis = args_.basis, &coeff = args_.coeff, &energy = args_.energy;
    const Scale<T>&scale = group.scale, &centred = group.centred;
    const Vec<T> zero{}, nan = zero / zero;
    const Mask<T> finite = group.finite;
    for (int64_t c = 0; c < p_; ++c) {
      Vec<T>* const u = u_ + c * r_;
      for (int64_t j = 0; j < r_; ++j) u[j] = of_group(&GroupPair::u, g, c * r_ + j);
      const Vec<T> sign = peak_sign<T>(u, r_, basis.dtype);
      for (int64_t j = 0; j < r_; ++j) u[j] = u[j] * sign + T(0);  // + 0: no −0
    }
    for (int64_t c = 0; c < k_; ++c) {
      energy_[c] = of_group(&GroupPair::values, g, c) * centred.down2 * centred.down2 * centred.down1 * centred.down1;
    }
    for (int64_t c = 0; c < live_; ++c) {
      kept_[c] = of_group(&GroupPair::kept, g, c);
      energy_[c] *= T(1) - kept_[c];  // found again below, closer
      norms_[c] = Vec<T>{};           // sums over eight tasks: a few long ones round less than one longer
    }
    for (int64_t i = 0; i < n_; ++i) {
      dots(group.x + i * task_, u_, r_, p_, c_);
      for (int64_t c = 0; c < live_; ++c) {
        c_[c] *= kept_[c];
        norms_[c] += c_[c] * c_[c];
        if (i % 8 == 7 || i + 1 == n_) {
          energy_[c] += norms_[c];
          norms_[c] = Vec<T>{};
        }
      }
      for (int64_t c = 0; c < p_; ++c) {
        const Vec<T> along = c < k_ ? c_[c] : zero;
        c_[c] = select<T>(finite, along * scale.down2 * scale.down1, nan);
      }
      store_tile<T>(coeff.dtype, coeff.at(i, 0, group.first), coeff.stride[2], coeff.stride[1], group.lanes, p_, c_);
    }
    for (int64_t j = 0; j < r_; ++j) group.mean[j] = select<T>(finite, group.mean[j] * scale.down2 * scale.down1, nan);
    store_tile<T>(basis.dtype, basis.at(0, group.first), basis.stride[1], basis.stride[2], group.lanes, r_, group.mean);
    if (any<T>(~finite)) {
      for (int64_t j = 0; j < p_ * r_; ++j) u_[j] = select<T>(finite, u_[j], nan);
    }
    for (int64_t c = 0; c < p_; ++c) {
      store_tile<T>(basis.dtype, basis.at(c + 1, group.first), basis.stride[1], basis.stride[2], group.lanes, r_, u_ + c * r_);
    }
    for (int64_t c = 0; c < k_; ++c) {
      if (c > 0) energy_[c] = energy_[c] < energy_[c - 1] ? energy_[c] : energy_[c - 1];  // equal ones may differ by a rounding
    }
    for (int64_t c = 0; c < k_; ++c) {
      const Vec<T> square = energy_[c] * scale.down2 * scale.down2 * scale.down1 * scale.down1;
      energy_[c] = select<T>(finite, square, nan);
    }
    store_tile<T>(energy.dtype, energy.at(group.first), energy.stride[0], energy.stride[1], group.lanes, k_, energy_);
  }

  static constexpr int kBidiagonal = 4;  // from how many columns on Jacobi takes longer

  const CompressArgs& args_;
  const int64_t n_, positions_, r_, p_, columns_, k_, live_;
  const bool tall_;
  const int64_t rows_,
      task_;  // task_: from one task's vector to the next in x, odd, so that they do not share a place in the cache
  const Jacobi<T> jacobi_;
  Scratch<Pair<Wide>> values_room_;
  Pair<Wide>* const found_;
  Scratch<Wide> wide_scratch_;
  Scratch<Vec<T>> scratch_;
  Vec<T>*core_, *norms_, *energy_, *kept_, *u_, *c_;  // of one group
  GroupPair pairs_[kGroups / 2];
  Group groups_[kGroups];
};

template <class T>
void compress_groups(const CompressArgs& args, int64_t begin, int64_t end) {
  Compressor<T> compressor(args);
  constexpr int most = Compressor<T>::kGroups;
  for (int64_t group = begin; group < end; group += most) {
    compressor.groups(group * kLanes<T>, end - group < most ? static_cast<int>(end - group) : most);
  }
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
