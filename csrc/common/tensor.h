// From torch's stable tensors to views, and the shape checks a kernel's memory safety rests on. What a shape means is
// checked in rmm_kernels/ops, with better words; these hold when an op is called past that.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "view.h"

namespace rmm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Double:
      return Dtype::f64;
    default:
      STD_TORCH_CHECK(false, name, " must be one of float32, float16, bfloat16, float64");
  }
}

// fp64 for fp64, else fp32: the dtype sums are kept in.
inline ScalarType accumulator(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline View view(const Tensor& tensor, int64_t dim, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " axes, got ", tensor.dim());
  View result{static_cast<char*>(tensor.data_ptr()), dtype_of(tensor, name), {1, 1, 1}, {0, 0, 0}};
  for (int64_t axis = 0; axis < dim; ++axis) {
    result.size[axis] = tensor.size(axis);
    result.stride[axis] = tensor.stride(axis);
  }
  return result;
}

inline Ids ids(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "task_ids must be int32 or int64");
  STD_TORCH_CHECK(tensor.dim() == 1, "task_ids must have 1 axis, got ", tensor.dim());
  return Ids{static_cast<const char*>(tensor.data_ptr()), type == ScalarType::Long, tensor.size(0), tensor.stride(0)};
}

// Refuses ids outside lowest … n−1 before anything is written.
inline void check_ids(const Ids& task_ids, int64_t n, int64_t lowest) {
  for (int64_t t = 0; t < task_ids.size; ++t) {
    const int64_t id = task_ids[t];
    STD_TORCH_CHECK(id >= lowest && id < n, "task_ids holds ", id, "; allowed are ", lowest, " to ", n - 1);
  }
}

inline void check_same(bool same, const char* what) { STD_TORCH_CHECK(same, "shapes or dtypes do not fit together: ", what); }

// An empty [count, S, r] in the memory layout of like [., S, r]: positions innermost where they are in it.
inline Tensor like_layout(const Tensor& like, int64_t count) {
  const int64_t positions = like.size(1), rank = like.size(2);
  if (like.stride(1) < like.stride(2)) {
    return torch::stable::transpose(torch::stable::new_empty(like, {count, rank, positions}), 1, 2);
  }
  return torch::stable::new_empty(like, {count, positions, rank});
}

}  // namespace rmm
