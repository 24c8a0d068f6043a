// error_grams: what restored factors x̂ are off by, e = x − x̂, as Gram matrices over positions; one position per lane.
//
// Of a chunk of positions e and x̂ [2 r] of a task lie in the nearest cache; the lower half of their Gram matrix is summed up
// tile by tile, a sum per lane, which stays a vector until a span of positions has gone by. Sums stay in the tiles' order until
// those of all spans are added up.

#include "dense.h"
#include "tile.h"

namespace rmm {

struct ErrorGramsArgs {
  View x, basis, coeff;  // [n, S, r], [p+1, S, r], [n, p, S]
  void* sums;            // [spans, n, tile_sums(r)], float, or double for doubles
  int64_t span;          // positions in each, a multiple of all numbers of lanes
  int64_t tasks;         // taken together
};

// Units, a span of positions and as many tasks as are taken together, from `begin` to before `end`.
RMM_DECLARE_KERNEL(void error_grams(const ErrorGramsArgs& args, int64_t begin, int64_t end))

namespace RMM_ISA {

// body(row, rows, column, columns, first) for every tile that is not above the diagonal, four rows, or the last two, by three
// columns, or the last ones, of the Gram matrix of e and x̂ [2r, 2r]; its sums are those from `first` on.
template <class Body>
RMM_INLINE void each_tile(int64_t r, const Body& body) {
  int64_t first = 0;
  const auto across = [&](int64_t row, auto rows) {
    const int64_t end = row + rows;
    int64_t column = 0;
    for (; column + 3 <= end; column += 3, first += rows * 3) body(row, rows, column, std::integral_constant<int, 3>{}, first);
    if (end - column == 2) body(row, rows, column, std::integral_constant<int, 2>{}, first);
    if (end - column == 1) body(row, rows, column, std::integral_constant<int, 1>{}, first);
    first += rows * (end - column);
  };
  int64_t row = 0;
  for (; row + 4 <= 2 * r; row += 4) across(row, std::integral_constant<int, 4>{});
  if (row < 2 * r) across(row, std::integral_constant<int, 2>{});
}

// How many they are, and some more, to whole vectors of any instruction set.
inline int64_t tile_sums(int64_t r) {
  int64_t count = 0;
  each_tile(r, [&](int64_t, auto rows, int64_t, auto columns, int64_t) { count += rows * columns; });
  return (count + 15) / 16 * 16;
}

template <class T>
class ErrorGrams {
 public:
  explicit ErrorGrams(const ErrorGramsArgs& args)
      : args_(args),
        n_(args.x.size[0]),
        positions_(args.x.size[1]),
        r_(args.x.size[2]),
        p_(args.coeff.size[1]),
        tile_sums_(tile_sums(r_)),
        scratch_(kChunk * (p_ + 1) * r_ + 2 * r_ * kRow + (kBlock + 1) * r_ + kBlock * (p_ + 1) + args.tasks * tile_sums_),
        basis_(scratch_.take(kChunk * (p_ + 1) * r_)),
        both_(scratch_.take(2 * r_ * kRow)),
        restored_(scratch_.take(r_)),
        sums_(scratch_.take(args.tasks * tile_sums_)) {
    for (int g = 0; g < kBlock; ++g) {
      x_[g] = scratch_.take(r_);
      c_[g] = scratch_.take(p_ + 1);
      c_[g][0] = splat<T>(1);  // of the mean
    }
  }

  void unit(int64_t index) {
    const int64_t blocks = (n_ + args_.tasks - 1) / args_.tasks, span = index / blocks;
    const int64_t first_task = index % blocks * args_.tasks;
    const int64_t tasks = n_ - first_task < args_.tasks ? n_ - first_task : args_.tasks;
    const int64_t end = (span + 1) * args_.span < positions_ ? (span + 1) * args_.span : positions_;
    for (int64_t i = 0; i < tasks * tile_sums_; ++i) sums_[i] = Vec<T>{};
    for (int64_t first = span * args_.span; first < end; first += kChunk * kLanes<T>) {
      const int64_t left = (end - first + kLanes<T> - 1) / kLanes<T>, count = left < kChunk ? left : kChunk;
      load_basis(first, count);
      for (int64_t i = 0; i < tasks; ++i) {
        restore(first_task + i, first, count);
        Vec<T>* const sums = sums_ + i * tile_sums_;
        each_tile(r_, [&](int64_t row, auto rows, int64_t column, auto columns, int64_t at) {
          add_tile<rows, columns>(both_ + row * kRow, both_ + column * kRow, count, sums + at);
        });
      }
    }
    sum_lanes(tasks * tile_sums_, static_cast<T*>(args_.sums) + (span * n_ + first_task) * tile_sums_);
  }

 private:
  static constexpr int64_t kChunk = 32;        // vectors of positions
  static constexpr int64_t kRow = kChunk + 1;  // from one row of both_ to the next: odd, so that they do not share cache sets

  // Positions from `first` on that `vectors` of them have.
  int64_t lanes(int64_t first, int vectors) const {
    const int64_t left = positions_ - first;
    return left < vectors * kLanes<T> ? left : vectors * kLanes<T>;
  }

  static_assert(kChunk % kBlock == 0, "whole blocks");

  // basis_ [count][p+1][r]
  void load_basis(int64_t first, int64_t count) {
    const View& basis = args_.basis;
    const int64_t next = (p_ + 1) * r_;
    for (int64_t v = 0; v < count; v += kBlock) {
      const int64_t at = first + v * kLanes<T>;
      for (int64_t k = 0; k <= p_; ++k) {
        Vec<T>* to[kBlock];
        for (int g = 0; g < kBlock; ++g) to[g] = basis_ + (v + g) * next + k * r_;
        load_block<T>(basis.dtype, basis.at(k, at), basis.stride[1], basis.stride[2], lanes(at, kBlock), r_, to);
      }
    }
  }

  // both_ [2r][kRow]: e, then x̂ as it would be stored, of one task; 0 where there is no position.
  void restore(int64_t task, int64_t first, int64_t count) {
    const View &x = args_.x, &coeff = args_.coeff;
    Vec<T>* coefficients[kBlock];
    for (int g = 0; g < kBlock; ++g) coefficients[g] = c_[g] + 1;
    for (int64_t v = 0; v < count; ++v) {
      const int g = v % kBlock;
      if (g == 0) {
        const int64_t at = first + v * kLanes<T>, some = lanes(at, kBlock);
        load_block<T>(x.dtype, x.at(task, at), x.stride[1], x.stride[2], some, r_, x_);
        load_block<T>(coeff.dtype, coeff.at(task, 0, at), coeff.stride[2], coeff.stride[1], some, p_, coefficients);
      }
      product(c_[g], basis_ + v * (p_ + 1) * r_, r_, r_, p_ + 1, restored_);
      if (element_size(args_.basis.dtype) < 4) {
        for (int64_t j = 0; j < r_; ++j) restored_[j] = as_stored<T>(args_.basis.dtype, restored_[j]);
      }
      Vec<T>*const error = both_ + v, *const restored = error + r_ * kRow;
#pragma GCC unroll 4
      for (int64_t j = 0; j < r_; ++j) {
        const Vec<T> value = restored_[j];
        error[j * kRow] = x_[g][j] - value;
        restored[j * kRow] = value;
      }
    }
  }

  template <int Rows, int Columns>
  RMM_INLINE void add_tile(const Vec<T>* a, const Vec<T>* b, int64_t count, Vec<T>* sums) {
    Vec<T> sum[Rows][Columns] = {};
    for (int64_t v = 0; v < count; ++v) {
      Vec<T> beside[Columns];
      for (int j = 0; j < Columns; ++j) beside[j] = b[j * kRow + v];
      for (int i = 0; i < Rows; ++i) {
        const Vec<T> entry = a[i * kRow + v];
        for (int j = 0; j < Columns; ++j) sum[i][j] += entry * beside[j];
      }
    }
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < Columns; ++j) sums[i * Columns + j] += sum[i][j];
    }
  }

  // out = the first `count` of sums_, over lanes.
  void sum_lanes(int64_t count, T* out) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      transpose<T>(sums_ + i);
      Vec<T> total = sums_[i];
#pragma GCC unroll 16
      for (int l = 1; l < kLanes<T>; ++l) total += sums_[i + l];
      store<T>(out + i, total);
    }
  }

  const ErrorGramsArgs& args_;
  const int64_t n_, positions_, r_, p_;
  const int64_t tile_sums_;
  Scratch<Vec<T>> scratch_;
  Vec<T>*const basis_, *const both_;
  Vec<T>*x_[kBlock], *c_[kBlock];  // of a block
  Vec<T>*const restored_, *const sums_;
};

template <class T>
void error_gram_units(const ErrorGramsArgs& args, int64_t begin, int64_t end) {
  ErrorGrams<T> grams(args);
  for (int64_t unit = begin; unit < end; ++unit) grams.unit(unit);
}

void error_grams(const ErrorGramsArgs& args, int64_t begin, int64_t end) {
  args.x.dtype == Dtype::f64 ? error_gram_units<double>(args, begin, end) : error_gram_units<float>(args, begin, end);
}

}  // namespace RMM_ISA
}  // namespace rmm

#ifdef RMM_OPS
#include <algorithm>
#include <vector>

#include "../common/tensor.h"
#include "parallel.h"

namespace rmm {

namespace {

constexpr int64_t kSpans = 16;                        // whatever the number of threads, which no sum depends on
constexpr int64_t kShortest = 1024, kLongest = 4096;  // positions of a span
constexpr int64_t kRanks = 4096;  // r² of the tasks taken together: their sums stay in a core's second-level cache

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
void add(const T* sums, std::vector<double>& total) {
  for (size_t i = 0; i < total.size(); ++i) total[i] += sums[i];
}

// A task's sums, to where they belong: eᵀe, eᵀx̂ and x̂ᵀx̂ [r, r], `part` apart.
void place(const double* sums, int64_t r, double* out, int64_t part) {
  RMM_ISA::each_tile(r, [&](int64_t row, auto rows, int64_t column, auto columns, int64_t first) {
    for (int i = 0; i < rows * columns; ++i) {
      const int64_t a = row + i / columns, b = column + i % columns;
      if (b > a) continue;
      const double sum = sums[first + i];
      if (a < r) {
        out[a * r + b] = out[b * r + a] = sum;
      } else if (b < r) {
        out[part + b * r + a - r] = sum;
      } else {
        double* const last = out + 2 * part;
        last[(a - r) * r + b - r] = last[(b - r) * r + a - r] = sum;
      }
    }
  });
}

}  // namespace

Tensor error_grams_op(Tensor x, Tensor basis, Tensor coeff) {
  const View in = view(x, 3, "x"), on = view(basis, 3, "basis"), of = view(coeff, 3, "coeff");
  const int64_t n = in.size[0], positions = in.size[1], r = in.size[2];
  check_same(on.size[0] == of.size[1] + 1 && on.size[1] == positions && on.size[2] == r && of.size[0] == n &&
                 of.size[2] == positions && on.dtype == of.dtype && (in.dtype == Dtype::f64) == (on.dtype == Dtype::f64),
             "x [n, S, r], basis [p+1, S, r] and coeff [n, p, S], all of them float64 or none");
  Tensor out = torch::stable::new_zeros(x, {3, n, r, r}, ScalarType::Double);
  if (n == 0 || positions == 0 || r == 0) return out;
  const int64_t together = std::clamp<int64_t>(kRanks / (r * r), 1, n);
  const int64_t span = std::clamp(ceil_div(positions, ceil_div(kSpans * together, n)), kShortest, kLongest) / 64 * 64;
  const int64_t threads = torch::stable::get_num_threads(), wanted = threads > 1 ? 2 * threads : 1;  // units
  const int64_t spans = ceil_div(positions, span), tasks = std::clamp<int64_t>(n * spans / wanted, 1, together);
  const int64_t each = RMM_ISA::tile_sums(r);
  Tensor sums = torch::stable::new_empty(x, {spans, n, each}, accumulator(x));
  const ErrorGramsArgs args{in, on, of, sums.data_ptr(), span, tasks};
  const auto kernel = RMM_KERNEL(error_grams);
  const int64_t units = spans * ceil_div(n, tasks);
  parallel_shares(units, 1, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  std::vector<double> total(each);
  for (int64_t i = 0; i < n; ++i) {
    std::fill(total.begin(), total.end(), 0);
    for (int64_t s = 0; s < spans; ++s) {
      const int64_t first = (s * n + i) * each;
      in.dtype == Dtype::f64 ? add(static_cast<const double*>(args.sums) + first, total)
                             : add(static_cast<const float*>(args.sums) + first, total);
    }
    place(total.data(), r, static_cast<double*>(out.data_ptr()) + i * r * r, n * r * r);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(rmm_kernels, CPU, m) {
  m.impl("error_grams", TORCH_BOX(&error_grams_op));
  m.impl("error_grams.cpu", TORCH_BOX(&error_grams_op));
}

}  // namespace rmm
#endif
