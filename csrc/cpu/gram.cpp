// gram: one matrix per lane.

#include "jacobi.h"
#include "tile.h"

namespace rmm {

struct GramArgs {
  View x, out;  // [B, m, k], [B, k, k]
  bool center;
};

// Groups of as many matrices as there are lanes, from `begin` to before `end`.
RMM_DECLARE_KERNEL(void gram(const GramArgs& args, int64_t begin, int64_t end))

namespace RMM_ISA {

template <class T>
void gram_groups(const GramArgs& args, int64_t begin, int64_t end) {
  const View &x = args.x, &out = args.out;
  const int64_t batch = x.size[0], m = x.size[1], k = x.size[2];
  Scratch<Vec<T>> scratch(k + k * k);
  Vec<T>*row = scratch.take(k), *sums = scratch.take(k * k);
  const T share = T(1) / static_cast<T>(k);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kLanes<T>;
    const int lanes = batch - first < kLanes<T> ? static_cast<int>(batch - first) : kLanes<T>;
    for (int64_t i = 0; i < k * k; ++i) sums[i] = Vec<T>{};
    for (int64_t i = 0; i < m; ++i) {
      load_tile<T>(x.dtype, x.at(first, i), x.stride[0], x.stride[2], lanes, k, row);
      if (args.center) {  // the first column goes first: exactly so where all columns share an offset
        const Vec<T> offset = row[0];
        Vec<T> mean{};
        for (int64_t a = 0; a < k; ++a) mean += row[a] -= offset;
        mean *= share;
        for (int64_t a = 0; a < k; ++a) row[a] -= mean;
      }
      for (int64_t a = 0; a < k; ++a) {
        for (int64_t b = 0; b <= a; ++b) sums[a * k + b] += row[a] * row[b];
      }
    }
    for (int64_t a = 0; a < k; ++a) {
      for (int64_t b = 0; b < a; ++b) sums[b * k + a] = sums[a * k + b];
    }
    for (int64_t a = 0; a < k; ++a) {
      store_tile<T>(out.dtype, out.at(first, a), out.stride[0], out.stride[2], lanes, k, sums + a * k);
    }
  }
}

void gram(const GramArgs& args, int64_t begin, int64_t end) {
  args.x.dtype == Dtype::f64 ? gram_groups<double>(args, begin, end) : gram_groups<float>(args, begin, end);
}

}  // namespace RMM_ISA
}  // namespace rmm

#ifdef RMM_OPS
#include "../common/tensor.h"
#include "parallel.h"

namespace rmm {

Tensor gram_op(Tensor x, bool center) {
  const View in = view(x, 3, "x");
  const int64_t batch = in.size[0], k = in.size[2];
  Tensor out = torch::stable::new_empty(x, {batch, k, k}, accumulator(x));
  const GramArgs args{in, view(out, 3, "out"), center};
  const auto kernel = RMM_KERNEL(gram);
  parallel_groups(batch, in.dtype, in.size[1] * k * k, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(rmm_kernels, CPU, m) {
  m.impl("gram", TORCH_BOX(&gram_op));
  m.impl("gram.cpu", TORCH_BOX(&gram_op));
}

}  // namespace rmm
#endif
