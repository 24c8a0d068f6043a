// lora_forward_ and its functional form: shrink and expand in one op. u stays in slices, which expand adds up itself, for every
// tile of positions anew; where they are so many that this would cost more than a launch, they are added up first, in the same
// order.

#include "lora.cuh"
#include "reference.h"

namespace rmm {

constexpr int64_t kSlicedRanks = 256;  // slices times ranks

void lora_forward_in_place_op(Tensor y, Tensor x, Tensor basis_a, Tensor coeff_a, Tensor basis_b, Tensor coeff_b,
                              Tensor task_ids, Tensor scaling) {
  const View out = view(y, 2, "y"), in = view(x, 2, "x");
  const View a = view(basis_a, 3, "basis_a"), ca = view(coeff_a, 3, "coeff_a");
  const View b = view(basis_b, 3, "basis_b"), cb = view(coeff_b, 3, "coeff_b");
  const View scales = view(scaling, 1, "scaling");
  const Ids tasks = ids(task_ids);
  check_shrink(in, a, ca, tasks);
  check_expand(out, b, cb, tasks, scales);
  check_same(in.dtype == out.dtype && a.size[1] == b.size[2] && ca.size[0] == cb.size[0], "basis_a and basis_b");
  if (out.dtype == Dtype::f64) {
    call_reference<0>("lora_forward_", y, x, basis_a, coeff_a, basis_b, coeff_b, task_ids, scaling);
    return;
  }
  Queue queue{y, x, basis_a, coeff_a, basis_b, coeff_b, task_ids, scaling};
  Slices u;
  const Tensor sums = run_shrink(queue, x, in, a, ca, tasks, u);
  Tensor u_memory = sums;
  if (u.count * u.token > kSlicedRanks) u_memory = run_sum(queue, x, tasks, ca.size[0], u);
  run_expand(queue, out, u, b, cb, tasks, scales, in.size[1] > 0);
}

Tensor lora_forward_op(Tensor y, Tensor x, Tensor basis_a, Tensor coeff_a, Tensor basis_b, Tensor coeff_b, Tensor task_ids,
                       Tensor scaling) {
  check_same(y.dim() == 2, "y [T, out]");
  Tensor out = torch::stable::new_empty(y, {y.size(0), y.size(1)});
  torch::stable::copy_(out, y);
  lora_forward_in_place_op(out, x, basis_a, coeff_a, basis_b, coeff_b, task_ids, scaling);
  return out;
}

RMM_CUDA_OP("lora_forward_", lora_forward_in_place_op)
RMM_CUDA_OP("lora_forward", lora_forward_op)

}  // namespace rmm
