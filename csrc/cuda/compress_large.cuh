// compress with a position per block (compress_large.cu), for compress.cu.
#pragma once

#include "large.cuh"

namespace rmm {

struct CompressLarge {
  Plane x, basis;      // [S, n, r], [p+1, S, r], ranks innermost
  View coeff, energy;  // [n, p, S] in fp32, components innermost; [S, K]
  Large at;
  int n;
  float spread;  // 1 / (√n − 1)
  // In shared memory: the mean [r], what of it is taken from x as two floats each [2][r], the first task's share [r], energies
  // [k]; the end of what must be there.
  int mean, taken, lift, found, end;
  float* workspace;  // [S][at.memory_end], unless that is in shared memory too
};

// Sets what of `args` is about a block's memory; whether there is room for it.
bool fits_large(CompressLarge& args, int64_t n, int64_t r, int64_t p, int64_t most_floats);

// Whether no workspace is needed.
bool is_resident(const CompressLarge& args, int64_t most_floats);

void launch_large(const Queue& queue, const CompressLarge& args, int64_t most_floats);

}  // namespace rmm
