// Work over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../common/view.h"
#include "isa.h"

namespace rmm {

inline int64_t lanes(Dtype dtype) {
  const int64_t bytes = isa() >= Isa::avx512 ? 64 : isa() == Isa::avx2 ? 32 : 16;
  return bytes / (dtype == Dtype::f64 ? 8 : 4);
}

// body(begin, end) over groups of as many of `count` items as there are lanes, at least half a million products a thread, of
// which an item takes about `products`.
template <class Body>
void parallel_groups(int64_t count, Dtype dtype, int64_t products, const Body& body) {
  const int64_t width = lanes(dtype), groups = (int64_t(1) << 19) / (width * (products > 0 ? products : 1));
  torch::stable::parallel_for(0, (count + width - 1) / width, groups > 0 ? groups : 1, body);
}

}  // namespace rmm
