// project: coefficients of tasks on a basis, one position per lane.

#include "dense.h"
#include "tile.h"

namespace rmm {

struct ProjectArgs {
  View x, basis, coeff;  // [n, S, r], [p+1, S, r], [n, p, S]
};

// Groups of as many positions as there are lanes, from `begin` to before `end`.
RMM_DECLARE_KERNEL(void project(const ProjectArgs& args, int64_t begin, int64_t end))

namespace RMM_ISA {

template <class T>
void project_groups(const ProjectArgs& args, int64_t begin, int64_t end) {
  const View &x = args.x, &basis = args.basis, &coeff = args.coeff;
  const int64_t n = x.size[0], r = x.size[2], p = coeff.size[1];
  const int64_t apart = r | 1;  // of components: odd, so that they do not share cache sets
  const int64_t block = block_of<T>((p + 1) * apart, x.stride[1] == 1);
  Scratch<Vec<T>> scratch(kBlock * ((p + 1) * apart + r + p));
  Vec<T>*u[kBlock], *centred[kBlock], *c[kBlock], *component[kBlock];
  for (int g = 0; g < kBlock; ++g) {
    u[g] = scratch.take((p + 1) * apart);
    centred[g] = scratch.take(r);
    c[g] = scratch.take(p);
  }
  const int64_t last = end * kLanes<T> < x.size[1] ? end * kLanes<T> : x.size[1];
  for (int64_t first = begin * kLanes<T>; first < last; first += block) {
    const int64_t lanes = last - first < block ? last - first : block, next = first + block;
    const int64_t ahead = next + block <= last ? block : 0;
    TileLines read(x, x.at(0, ahead > 0 ? next : first), ahead > 0 ? n : 0, ahead, x.stride[1], r, x.stride[2], n);
    TileLines written(coeff, coeff.at(0, 0, first), n, lanes, coeff.stride[2], p, coeff.stride[1], n);
    for (int64_t k = 0; k <= p; ++k) {
      for (int g = 0; g < kBlock; ++g) component[g] = u[g] + k * apart;
      load_block<T>(basis.dtype, basis.at(k, first), basis.stride[1], basis.stride[2], lanes, r, component);
    }
    for (int64_t i = 0; i < n; ++i) {
      read.prefetch();
      written.prefetch<1>();
      load_block<T>(x.dtype, x.at(i, first), x.stride[1], x.stride[2], lanes, r, centred);
      for (int g = 0; g * kLanes<T> < lanes; ++g) {
        for (int64_t j = 0; j < r; ++j) centred[g][j] -= u[g][j];
        in_fours(p, [&](int64_t k, auto some) { dots_with<some, 1>(centred[g], u[g] + (k + 1) * apart, apart, r, c[g] + k); });
      }
      store_block<T>(coeff.dtype, coeff.at(i, 0, first), coeff.stride[2], coeff.stride[1], lanes, p, c);
    }
  }
}

void project(const ProjectArgs& args, int64_t begin, int64_t end) {
  args.x.dtype == Dtype::f64 ? project_groups<double>(args, begin, end) : project_groups<float>(args, begin, end);
}

}  // namespace RMM_ISA
}  // namespace rmm

#ifdef RMM_OPS
#include "../common/tensor.h"
#include "pages.h"
#include "parallel.h"

namespace rmm {

Tensor project_op(Tensor x, Tensor basis) {
  const View in = view(x, 3, "x"), on = view(basis, 3, "basis");
  check_same(on.size[0] >= 1 && on.size[1] == in.size[1] && on.size[2] == in.size[2] && on.dtype == in.dtype,
             "x [n, S, r] and basis [p+1, S, r]");
  Tensor coeff = torch::stable::new_empty(x, {in.size[0], on.size[0] - 1, in.size[1]});
  const ProjectArgs args{in, on, in_huge_pages(view(coeff, 3, "coeff"))};
  const auto kernel = RMM_KERNEL(project);
  const int64_t products = in.size[0] * on.size[0] * on.size[2];
  parallel_groups(in.size[1], in.dtype, products, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return coeff;
}

STABLE_TORCH_LIBRARY_IMPL(rmm_kernels, CPU, m) {
  m.impl("project", TORCH_BOX(&project_op));
  m.impl("project.cpu", TORCH_BOX(&project_op));
}

}  // namespace rmm
#endif
