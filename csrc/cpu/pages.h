// Memory of large results.
#pragma once

#include "../common/view.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rmm {

// A fresh, dense result, whose memory the system is asked to hold in huge pages as far as it spans such: in small ones, the
// faults of its first writing take about as long as the writing. An advice; where it can't be followed, nothing changes.
inline View in_huge_pages(View result) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const int64_t bytes = result.size[0] * result.size[1] * result.size[2] * element_size(result.dtype);
  const uintptr_t at = reinterpret_cast<uintptr_t>(result.data);
  const uintptr_t begin = (at + page - 1) / page * page, end = (at + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return result;
}

}  // namespace rmm
