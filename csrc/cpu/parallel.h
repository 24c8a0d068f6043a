// Work over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../common/view.h"
#include "isa.h"

namespace rmm {

inline int64_t lanes(Dtype dtype) {
  const int64_t bytes = isa() >= Isa::avx512 ? 64 : isa() == Isa::avx2 ? 32 : 16;
  return bytes / (dtype == Dtype::f64 ? 8 : 4);
}

// body(begin, end) over 0 … count, by as many threads as have `least` each. Every thread has a share of its own, which it takes
// `unit` at a time; who is done takes from the others' shares: threads are rarely equally fast, other work has some of a core.
template <class Body>
void parallel_shares(int64_t count, int64_t least, int64_t unit, const Body& body) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  if (count == 0) return;
  const int64_t number = std::min<int64_t>(torch::stable::get_num_threads(), (count + least - 1) / least);
  if (number <= 1) return body(int64_t(0), count);
  std::vector<Share> shares(number);
  for (int64_t i = 0; i < number; ++i) {
    shares[i].next = count * i / number;
    shares[i].end = count * (i + 1) / number;
  }
  torch::stable::parallel_for(0, number, 1, [&](int64_t first, int64_t last) {
    for (int64_t own = first; own < last; ++own) {
      for (int64_t i = 0; i < number; ++i) {
        Share& share = shares[(own + i) % number];
        for (int64_t begin; (begin = share.next.fetch_add(unit, std::memory_order_relaxed)) < share.end;) {
          body(begin, std::min(begin + unit, share.end));
        }
      }
    }
  });
}

// body(begin, end) over groups of as many of `count` items as there are lanes, at least half a million products at a time, of
// which an item takes about `products`.
template <class Body>
void parallel_groups(int64_t count, Dtype dtype, int64_t products, const Body& body) {
  const int64_t width = lanes(dtype), groups = (count + width - 1) / width;
  const int64_t least = std::max<int64_t>(1, (int64_t(1) << 19) / (width * std::max<int64_t>(1, products)));
  const int64_t unit = std::max<int64_t>(least, groups / torch::stable::get_num_threads() / 16);
  const int64_t together = unit < 16 ? 4 : 16;  // kernels take up to so many groups at once
  parallel_shares(groups, least, (unit + together - 1) / together * together, body);
}

}  // namespace rmm
