// compress: mean, Helmert reduction, SVD, basis and coefficients, one position per lane.
//
// Y, the centred vectors in a Helmert basis, has K = min(r, n−1) singular values and no guaranteed zero. Of the tall one of Y
// and Yᵀ, A, the right singular vectors v are found, from a bidiagonal matrix (by way of AᵀA in lanes whose σ are not far
// apart) or, in lanes where that does not do and for the smallest K, from that by one-sided Jacobi. Where Y is wide, they are
// the components u; else u = Y v / σ.

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

// Groups of positions, one per lane, four at a time: each loaded, centred and written by itself, but decomposed in pairs, and
// of both pairs the singular values are found abreast.
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
        values_room_(6 * k_),
        found_(values_room_.take(6 * k_)),
        wide_scratch_(3 * (k_ * k_ + 7 * k_) + columns_ * r_ + 3 * k_ + rows_ + live_ * (k_ + 1) + p_ * r_),
        y_(wide_scratch_.take(columns_ * r_)),
        work_(wide_scratch_.take(3 * k_ + rows_)),
        spare_(wide_scratch_.take(k_ * k_ + 6 * k_)),
        vectors_(wide_scratch_.take(live_ * k_)),
        kept_(wide_scratch_.take(live_)),
        components_(wide_scratch_.take(p_ * r_)),
        scratch_(kGroups * (n_ * task_ + r_) + k_ * k_ + 3 * k_ + 2 * p_ * (r_ + n_) + 4 * n_),
        core_(scratch_.take(k_ * k_)),
        norms_(scratch_.take(k_)),
        energy_(scratch_.take(k_)),
        core_kept_(scratch_.take(k_)),
        u_(scratch_.take(2 * p_ * r_)),
        coeff_(scratch_.take(2 * n_ * p_)),
        weights_(scratch_.take(4 * n_)) {
    for (int pair = 0; pair < 2; ++pair) {
      rooms_[pair] = wide_scratch_.take(k_ * k_ + 6 * k_);
      values_[pair] = wide_scratch_.take(k_);
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
      groups_[g].first = first + g * kLanes<T>;
      const int64_t left = g < count ? positions_ - groups_[g].first : 0;
      groups_[g].lanes = left < kLanes<T> ? static_cast<int>(left) : kLanes<T>;
    }
    const View &in = args_.x, &basis = args_.basis;
    constexpr int64_t block = kGroups * kLanes<T>;
    const int64_t rest = positions_ - first, now = rest < block ? rest : block, next = rest >= 2 * block ? block : 0;
    Lines lines{{in, in.at(0, first + next), next > 0 ? n_ : 0, next, in.stride[1], r_, in.stride[2], kGroups * r_},
                {basis, basis.at(0, first), p_ + 1, now, basis.stride[1], r_, basis.stride[2], kGroups * r_}};
    PairMask<PairMask<Mask<T>>> good{};
    Bidiagonal<Wide> matrices[2] = {{y_, rows_, k_, rooms_[0], work_}, {y_, rows_, k_, rooms_[1], work_}};
    const bool abreast = in.stride[1] == 1 && now == block;
    if (abreast) load_abreast();
    for (int pair = 0; pair < 2; ++pair) {
      for (int g = 2 * pair; g < 2 * pair + 2; ++g) {
        if (groups_[g].lanes > 0) {
          if (!abreast) load(groups_[g]);
          scale(groups_[g]);
          centre(groups_[g], g, lines);
        } else {
          for (int64_t i = 0; i < columns_ * r_; ++i) half(y_, g, i) = Vec<T>{};
        }
      }
      if (k_ > 0) {
        with_size<kBidiagonal>([&](auto k) {
          if (rows_ >= 2 * k_ && k_ >= kBidiagonal && k_ <= kProducts) {
            (pair == 0 ? good.low : good.high) = matrices[pair].template factor_products<k>(spare_);
          } else {
            matrices[pair].template factor<k>();
          }
        });
      }
    }
    if (k_ >= kBidiagonal) {
      with_size<kBidiagonal>([&](auto k) { good = squared_singular_values_of<k>(matrices, good, values_, found_); });
    }
    for (int pair = 0; pair < 2; ++pair) {
      if (k_ > 0) directions(matrices[pair], values_[pair], pair == 0 ? good.low : good.high, 2 * pair);
      components(2 * pair);
      for (int g = 2 * pair; g < 2 * pair + 2; ++g) {
        if (groups_[g].lanes > 0) write(groups_[g], g, values_[pair]);
      }
      if (groups_[2 * pair].lanes > 0) write_pair(groups_[2 * pair], groups_[2 * pair + 1]);
    }
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

  // What the next groups read, and what these write.
  struct Lines {
    TileLines next, out;
  };

  // What one of a pair's groups has of entry i.
  RMM_INLINE Vec<T>& half(Wide* what, int g, int64_t i) { return reinterpret_cast<Vec<T>*>(what)[2 * i + g % 2]; }

  // body(k), as a constant where it is from K to 8 and T float, else 0: enough for the shortest loops; more would take long to
  // compile.
  template <int K, class Body>
  void with_size(const Body& body) {
    if constexpr (K > 8 || sizeof(T) == 8) {
      body(std::integral_constant<int, 0>{});
    } else {
      k_ == K ? body(std::integral_constant<int, K>{}) : with_size<K + 1>(body);
    }
  }

  void load(Group& group) {
    const View& x = args_.x;
    for (int64_t i = 0; i < n_; ++i) {
      load_tile<T>(x.dtype, x.at(i, group.first), x.stride[1], x.stride[2], group.lanes, r_, group.x + i * task_);
    }
  }

  // All groups, positions innermost. A rank's line is read once: ranks mostly lie a power of two apart, and then few of their
  // lines are in the cache at the same time.
  void load_abreast() {
    const View& x = args_.x;
    for (int64_t i = 0; i < n_; ++i) {
      Vec<T>* tasks[kGroups];
      for (int g = 0; g < kGroups; ++g) tasks[g] = groups_[g].x + i * task_;
      load_tiles<kGroups, T>(x.dtype, x.at(i, groups_[0].first), x.stride[2], r_, tasks);
    }
  }

  // Finds x's power of two per lane; lanes with NaN or Inf become 0.
  void scale(Group& group) {
    Mask<T> largest{};  // of magnitudes by their bits, which order like them, NaN and Inf above all
    for (int64_t i = 0; i < n_; ++i) {
      Vec<T>* const task = group.x + i * task_;
#pragma GCC unroll 4
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
  void centre(Group& group, int g, Lines& lines) {
    const Vec<T> largest = (Vec<T>)centre_of<2>(group, g, lines);
    group.centred = scale_of<T>(largest);
    const Mask<T> near = (largest >= T(0.125)) & (largest < T(16));
    const Vec<T> one = splat<T>(1);
    group.centred = {select<T>(near, one, group.centred.up1), select<T>(near, one, group.centred.up2),
                     select<T>(near, one, group.centred.down1), select<T>(near, one, group.centred.down2)};
    if (any<T>(~near)) {
      for (int64_t i = 0; i < columns_ * r_; ++i) {
        Vec<T>& y = half(y_, g, i);
        y = y * group.centred.up1 * group.centred.up2;
      }
    }
  }

  template <int N>
  Mask<T> centre_of(Group& group, int g, Lines& lines) {
    if constexpr (N > 8) {
      return centre_tasks<0>(group, g, lines);
    } else {
      return n_ == N ? centre_tasks<N>(group, g, lines) : centre_of<N + 1>(group, g, lines);
    }
  }

  // The first task's vector goes first: exactly so where all share an offset, which then costs no accuracy, and equal vectors
  // become exactly zero. Then the mean goes twice: what the first one rounds off, the second takes. N is n where that is known
  // when compiling, and all of a rank fits in registers. Returns the largest magnitude of y.
  //
  // Meanwhile, a share in each step, it asks for `lines`.
  template <int N>
  Mask<T> centre_tasks(Group& group, int g, Lines& lines) {
    const int64_t n = N ? N : n_, step = N ? 1 : task_;
    const int64_t along_task = tall_ ? r_ : 1, along_rank = tall_ ? 1 : columns_;
    const T share = T(1) / static_cast<T>(n);
    const T spread = helmert();
    const Vec<T> up = group.scale.up2;
    Mask<T> largest{};
    for (int64_t j = 0; j < r_; ++j) {
      lines.next.template prefetch<0>();
      lines.out.template prefetch<1>();
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
        half(y_, g, (i - 1) * along_task + j * along_rank) = y;
        largest = larger_magnitude<T>(largest, y);
      }
    }
    return largest;
  }

  // vectors_ [live][k]: the leading right singular vectors of A, no direction where σ is negligible, as kept_ says; by Jacobi,
  // and then values too, in the lanes where it takes that. Of the pair of groups that begins with g.
  void directions(const Bidiagonal<Wide>& matrix, Wide* values, PairMask<Mask<T>> good, int g) {
    if (k_ >= kBidiagonal) {
      with_size<kBidiagonal>(
          [&](auto k) { good &= matrix.template vectors<k>(values, live_, vectors_, kept_, Bits<T>::deficient); });
    }
    if (groups_[g].lanes > 0 && any<T>(~good.low)) directions_by_jacobi(matrix, values, ~good.low, g);
    if (groups_[g + 1].lanes > 0 && any<T>(~good.high)) directions_by_jacobi(matrix, values, ~good.high, g + 1);
    matrix.turn_back(vectors_, live_);
  }

  // Values and vectors of B, but for its rows' signs, in some lanes of one group.
  void directions_by_jacobi(const Bidiagonal<Wide>& matrix, Wide* values, Mask<T> lanes, int g) {
    const auto of = [g](const Wide& wide) { return g % 2 ? wide.high : wide.low; };
    for (int64_t c = 0; c < k_; ++c) {  // Bᵀ: its left singular vectors are B's right ones
      const Vec<T> inverse = rsqrt<T>(of(matrix.q[c]));
      for (int64_t i = 0; i < k_; ++i) core_[c * k_ + i] = Vec<T>{};
      core_[c * k_ + c] = of(matrix.q[c]) * inverse;
      if (c + 1 < k_) core_[c * k_ + c + 1] = of(matrix.products[c]) * inverse;
    }
    jacobi_(core_, k_, k_, norms_);
    for (int64_t c = 0; c < k_; ++c) {  // ‖B v‖²: the columns' own norms carry what all rotations rounded
      const Vec<T>* const v = core_ + c * k_;
      Vec<T> square{};
      for (int64_t i = 0; i < k_; ++i) {
        Vec<T> along = of(matrix.q[i]) * v[i];
        if (i + 1 < k_) along += of(matrix.products[i]) * v[i + 1];
        square += along * along / of(matrix.q[i]);
      }
      // A negligible column has no direction of its own: there its norm will do.
      const Mask<T> live = (norms_[c] > Bits<T>::deficient * Bits<T>::deficient * norms_[0]) & (norms_[c] > Bits<T>::tiny);
      energy_[c] = select<T>(live, square / select<T>(live, norms_[c], splat<T>(1)), norms_[c]);
    }
    normalise<T>(core_, k_, live_, norms_, core_kept_);
    const auto replace = [&](Wide* what, int64_t i, Vec<T> value) {
      half(what, g, i) = select<T>(lanes, value, half(what, g, i));
    };
    for (int64_t c = 0; c < k_; ++c) replace(values, c, energy_[c]);
    for (int64_t c = 0; c < live_; ++c) replace(kept_, c, core_kept_[c]);
    for (int64_t i = 0; i < live_ * k_; ++i) replace(vectors_, i, core_[i]);
  }

  // components_ [p][r]: the leading left singular vectors of Y, completed to orthonormal ones.
  void components(int g) {
    if (!tall_) {
      for (int64_t i = 0; i < p_ * r_; ++i) components_[i] = vectors_[i];
    } else {
      if (groups_[g].lanes > 0) weigh(groups_[g], g);
      if (groups_[g + 1].lanes > 0) weigh(groups_[g + 1], g + 1);
    }
    for (int64_t c = 0; c < p_; ++c) {
      if (c < live_) take_out(components_, r_, c);
      make_unit(components_, r_, c, c < live_ ? kept_[c] > T(0) : Wide{} > Wide{}, Bits<T>::tiny);
    }
  }

  // components_ = Y v, whose norm and what it has of others are to be seen to, from x: y_i = x_i + spread x_0.
  void weigh(const Group& group, int g) {
    const T spread = helmert();
    in_fours(live_, [&](int64_t c, auto n) {
      Vec<T> sum[n];
      for (int b = 0; b < n; ++b) sum[b] = Vec<T>{};
      for (int64_t i = 1; i < n_; ++i) {
        for (int b = 0; b < n; ++b) {
          const Vec<T> v = half(vectors_, g, (c + b) * k_ + i - 1);
          weights_[i * n + b] = v * group.centred.up1 * group.centred.up2;
          sum[b] += weights_[i * n + b];
        }
      }
      for (int b = 0; b < n; ++b) weights_[b] = spread * sum[b];
      int64_t j = 0;
      for (; j + 2 <= r_; j += 2) weigh_ranks<n, 2>(group, g, c, j);
      if (j < r_) weigh_ranks<n, 1>(group, g, c, j);
    });
  }

  // Of N of them, from c on, M ranks, from j on.
  template <int N, int M>
  RMM_INLINE void weigh_ranks(const Group& group, int g, int64_t c, int64_t j) {
    Vec<T> sum[M][N];
    const Vec<T>* x = group.x + j;
    const Vec<T>* const end = x + n_ * task_;
    const Vec<T>* weight = weights_;
    for (int a = 0; a < M; ++a) {
      for (int b = 0; b < N; ++b) sum[a][b] = x[a] * weight[b];
    }
    while ((x += task_) != end) {
      weight += N;
      for (int a = 0; a < M; ++a) {
        for (int b = 0; b < N; ++b) sum[a][b] += x[a] * weight[b];
      }
    }
    for (int b = 0; b < N; ++b) {
      for (int a = 0; a < M; ++a) half(components_, g, (c + b) * r_ + j + a) = sum[a][b];
    }
  }

  // y_i − x_i as a part of x_0, i = 1 … n−1.
  T helmert() const { return n_ > 1 ? T(1) / (T(sqrt(static_cast<double>(n_))) - T(1)) : T(0); }

  void write(const Group& group, int g, Wide* values) {
    const View &basis = args_.basis, &energy = args_.energy;
    const Scale<T>&scale = group.scale, &centred = group.centred;
    const Vec<T> nan = Vec<T>{} / Vec<T>{}, down2 = select<T>(group.finite, scale.down2, nan);
    for (int64_t c = 0; c < p_; ++c) {
      const Vec<T>* const from = &half(components_, g, c * r_);
      const Vec<T> sign = peak_sign<T>(from, r_, basis.dtype, 2);
      Vec<T>* const u = u_of(g) + c * r_;
#pragma GCC unroll 4
      for (int64_t j = 0; j < r_; ++j) u[j] = from[2 * j] * sign + T(0);  // + 0: no −0
    }
    for (int64_t c = 0; c < k_; ++c) {
      energy_[c] = half(values, g, c) * centred.down2 * centred.down2 * centred.down1 * centred.down1;
    }
    in_fours(p_, [&](int64_t c, auto n) { coefficients<n>(group, g, c, down2); });
    for (int64_t j = 0; j < r_; ++j) group.mean[j] = group.mean[j] * down2 * scale.down1;
    if (any<T>(~group.finite)) {
      for (int64_t j = 0; j < p_ * r_; ++j) u_of(g)[j] = select<T>(group.finite, u_of(g)[j], nan);
    }
    for (int64_t c = 1; c < k_; ++c) energy_[c] = smaller(energy_[c], energy_[c - 1]);  // equal ones may differ by a rounding
    for (int64_t c = 0; c < k_; ++c) energy_[c] = energy_[c] * down2 * scale.down2 * scale.down1 * scale.down1;
    store_tile<T>(energy.dtype, energy.at(group.first), energy.stride[0], energy.stride[1], group.lanes, k_, energy_);
  }

  // Basis and coefficients of a pair of groups.
  void write_pair(const Group& low, const Group& high) {
    const View &basis = args_.basis, &coeff = args_.coeff;
    const auto put = [&](const View& view, char* to, int lane_axis, int row_axis, Vec<T>* const(&tiles)[2]) {
      store_block<T>(view.dtype, to, view.stride[lane_axis], view.stride[row_axis], low.lanes + high.lanes, view.size[row_axis],
                     tiles);
    };
    put(basis, basis.at(0, low.first), 1, 2, {low.mean, high.mean});
    for (int64_t c = 0; c < p_; ++c) put(basis, basis.at(c + 1, low.first), 1, 2, {u_of(0) + c * r_, u_of(1) + c * r_});
    for (int64_t i = 0; i < n_; ++i) put(coeff, coeff.at(i, 0, low.first), 2, 1, {coeff_of(0) + i * p_, coeff_of(1) + i * p_});
  }

  Vec<T>* u_of(int g) const { return u_ + g % 2 * p_ * r_; }
  Vec<T>* coeff_of(int g) const { return coeff_ + g % 2 * n_ * p_; }

  // N of the components' coefficients, from c on, and from them their energies, closer than the values are.
  template <int N>
  RMM_INLINE void coefficients(const Group& group, int g, int64_t c, Vec<T> down2) {
    const Vec<T>* const u = u_of(g) + c * r_;
    Vec<T>* const to = coeff_of(g) + c;
    Vec<T> kept[N], energy[N], some[N], row[N];
    for (int b = 0; b < N; ++b) {
      kept[b] = c + b < live_ ? half(kept_, g, c + b) : Vec<T>{};
      energy[b] = some[b] = Vec<T>{};
    }
    for (int64_t i = 0; i < n_; ++i) {
      dots_with<N, 1>(group.x + i * task_, u, r_, r_, row);
      for (int b = 0; b < N; ++b) {
        row[b] *= kept[b];
        some[b] += row[b] * row[b];  // over eight tasks: a few long sums round less than one longer
        row[b] = row[b] * down2 * group.scale.down1;
      }
      if (i % 8 == 7 || i + 1 == n_) {
        for (int b = 0; b < N; ++b) {
          energy[b] += some[b];
          some[b] = Vec<T>{};
        }
      }
      for (int b = 0; b < N; ++b) to[i * p_ + b] = row[b];
    }
    for (int b = 0; b < N && c + b < live_; ++b) energy_[c + b] = select<T>(kept[b] > T(0), energy[b], energy_[c + b]);
  }

  const CompressArgs& args_;
  const int64_t n_, positions_, r_, p_, columns_, k_, live_;
  const bool tall_;
  const int64_t rows_,
      task_;  // task_: from one task's vector to the next in x, odd, so that they do not share a place in the cache
  const Jacobi<T> jacobi_;
  Scratch<Pair<Wide>> values_room_;
  Pair<Wide>* const found_;
  Scratch<Wide> wide_scratch_;
  Wide *const y_, *const work_, *const spare_;             // A, of one pair of groups, and room to decompose it
  Wide *const vectors_, *const kept_, *const components_;  // of one pair, [live][k], [live], [p][r]
  Wide *rooms_[2], *values_[2];
  Scratch<Vec<T>> scratch_;
  Vec<T>*core_, *norms_, *energy_, *core_kept_;  // of one group
  Vec<T>*u_, *coeff_, *weights_;                 // of one pair, [2][p][r], [2][n][p]; of one group
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
#include "pages.h"
#include "parallel.h"

namespace rmm {

std::tuple<Tensor, Tensor, Tensor> compress_op(Tensor x, int64_t components) {
  const View in = view(x, 3, "x");
  const int64_t n = in.size[0], positions = in.size[1], r = in.size[2];
  check_same(n >= 1 && components >= 0 && components <= r, "x [n, S, r] with n >= 1, components from 0 to r");
  Tensor basis = like_layout(x, components + 1);
  Tensor coeff = torch::stable::new_empty(x, {n, components, positions});
  Tensor energy = torch::stable::new_empty(x, {positions, r < n - 1 ? r : n - 1}, accumulator(x));
  const CompressArgs args{in, in_huge_pages(view(basis, 3, "basis")), in_huge_pages(view(coeff, 3, "coeff")),
                          in_huge_pages(view(energy, 2, "energy"))};
  const auto kernel = RMM_KERNEL(compress);
  const int64_t products = 4 * n * r * (r < n ? r : n);
  parallel_groups(positions, in.dtype, products, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {basis, coeff, energy};
}

STABLE_TORCH_LIBRARY_IMPL(rmm_kernels, CPU, m) {
  m.impl("compress", TORCH_BOX(&compress_op));
  m.impl("compress.cpu", TORCH_BOX(&compress_op));
}

}  // namespace rmm
#endif
