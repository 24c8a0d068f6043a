// reconstruct: factors of chosen tasks, one position per lane.

#include "dense.h"
#include "tile.h"

namespace rmm {

struct ReconstructArgs {
  View basis, coeff, out;  // [p+1, S, r], [n, p, S], [a, S, r]
  Ids tasks;               // [a]
};

// Groups of as many positions as there are lanes, from `begin` to before `end`.
RMM_DECLARE_KERNEL(void reconstruct(const ReconstructArgs& args, int64_t begin, int64_t end))

namespace RMM_ISA {

template <class T>
void reconstruct_groups(const ReconstructArgs& args, int64_t begin, int64_t end) {
  const View &basis = args.basis, &coeff = args.coeff, &out = args.out;
  const int64_t r = basis.size[2], p = coeff.size[1];
  const int64_t apart = r | 1;  // of components: odd, so that they do not share cache sets
  const int64_t block = block_of<T>((p + 1) * apart, basis.stride[1] == 1);
  Scratch<Vec<T>> scratch(kBlock * ((p + 1) * (apart + 1) + r));
  Vec<T>*u[kBlock], *sum[kBlock], *c[kBlock], *c_rest[kBlock], *component[kBlock];
  for (int g = 0; g < kBlock; ++g) {
    u[g] = scratch.take((p + 1) * apart);
    sum[g] = scratch.take(r);
    c[g] = scratch.take(p + 1);
    c[g][0] = splat<T>(1);  // of the mean
    c_rest[g] = c[g] + 1;
  }
  const int64_t last = end * kLanes<T> < basis.size[1] ? end * kLanes<T> : basis.size[1];
  for (int64_t first = begin * kLanes<T>; first < last; first += block) {
    const int64_t lanes = last - first < block ? last - first : block;
    for (int64_t k = 0; k <= p; ++k) {
      for (int g = 0; g < kBlock; ++g) component[g] = u[g] + k * apart;
      load_block<T>(basis.dtype, basis.at(k, first), basis.stride[1], basis.stride[2], lanes, r, component);
    }
    for (int64_t a = 0; a < args.tasks.size; ++a) {
      load_block<T>(coeff.dtype, coeff.at(args.tasks[a], 0, first), coeff.stride[2], coeff.stride[1], lanes, p, c_rest);
      for (int g = 0; g * kLanes<T> < lanes; ++g) product(c[g], u[g], apart, r, p + 1, sum[g]);
      store_block<T>(out.dtype, out.at(a, first), out.stride[1], out.stride[2], lanes, r, sum);
    }
  }
}

void reconstruct(const ReconstructArgs& args, int64_t begin, int64_t end) {
  args.basis.dtype == Dtype::f64 ? reconstruct_groups<double>(args, begin, end) : reconstruct_groups<float>(args, begin, end);
}

}  // namespace RMM_ISA
}  // namespace rmm

#ifdef RMM_OPS
#include "../common/tensor.h"
#include "pages.h"
#include "parallel.h"

namespace rmm {

Tensor reconstruct_op(Tensor basis, Tensor coeff, Tensor task_ids) {
  const View on = view(basis, 3, "basis"), of = view(coeff, 3, "coeff");
  const Ids tasks = ids(task_ids);
  check_same(on.size[0] == of.size[1] + 1 && on.size[1] == of.size[2] && on.dtype == of.dtype,
             "basis [p+1, S, r] and coeff [n, p, S]");
  check_ids(tasks, of.size[0], 0);
  Tensor out = like_layout(basis, tasks.size);
  const ReconstructArgs args{on, of, in_huge_pages(view(out, 3, "out")), tasks};
  const auto kernel = RMM_KERNEL(reconstruct);
  const int64_t products = tasks.size * on.size[0] * on.size[2];
  parallel_groups(on.size[1], on.dtype, products, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(rmm_kernels, CPU, m) {
  m.impl("reconstruct", TORCH_BOX(&reconstruct_op));
  m.impl("reconstruct.cpu", TORCH_BOX(&reconstruct_op));
}

}  // namespace rmm
#endif
