// What this backend has no kernel for goes to the op's reference, in plain torch on the same device.
#pragma once

#include <algorithm>
#include <array>
#include <string>

#include "../common/tensor.h"

namespace rmm {

// Calls torch.ops.rmm_kernels.<op>.reference; the first `Results` entries of what it returns are the results.
template <size_t Results, class... Arguments>
auto call_reference(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, std::max(Results, sizeof...(Arguments))> stack{torch::stable::detail::from(arguments)...};
  const std::string name = std::string("rmm_kernels::") + op;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name.c_str(), "reference", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

inline Tensor tensor_of(StableIValue value) { return torch::stable::detail::to<Tensor>(value); }

}  // namespace rmm
