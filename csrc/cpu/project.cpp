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
  const int64_t n = x.size[0], positions = x.size[1], r = x.size[2], p = coeff.size[1];
  Scratch<Vec<T>> scratch((p + 2) * r + p);
  Vec<T>*u = scratch.take((p + 1) * r), *centred = scratch.take(r), *c = scratch.take(p);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kLanes<T>;
    const int lanes = positions - first < kLanes<T> ? static_cast<int>(positions - first) : kLanes<T>;
    for (int64_t k = 0; k <= p; ++k) {
      load_tile<T>(basis.dtype, basis.at(k, first), basis.stride[1], basis.stride[2], lanes, r, u + k * r);
    }
    for (int64_t i = 0; i < n; ++i) {
      load_tile<T>(x.dtype, x.at(i, first), x.stride[1], x.stride[2], lanes, r, centred);
      for (int64_t j = 0; j < r; ++j) centred[j] -= u[j];
      in_fours(p, [&](int64_t k, auto some) { dots_with<some, 1>(centred, u + (k + 1) * r, r, r, c + k); });
      store_tile<T>(coeff.dtype, coeff.at(i, 0, first), coeff.stride[2], coeff.stride[1], lanes, p, c);
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
