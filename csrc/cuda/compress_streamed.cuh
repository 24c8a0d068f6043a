// compress of many more tasks than ranks (compress_streamed.cu), for compress.cu.
#pragma once

#include "directions.cuh"
#include "launch.h"

namespace rmm {

struct CompressStreamed {
  Plane x, basis;      // [n, S, r], [p+1, S, r]
  View coeff, energy;  // [n, p, S], [S, r]
  Directions at;
  int n;
  // Where a team keeps the chunk [kChunk][tile_stride], the mean [r], what of it is taken from x as two floats each [2][r],
  // coefficients [p][kChunk + 1] and energies [2][r], found from R and from them; what it has, in floats.
  int tile, tile_stride, mean, taken, coefficients, energies, team_size;
  int teams;  // of a block
};

// The most ranks; and how many times as many tasks make it cheaper than to keep x whole.
constexpr int kStreamedRanks = 64, kStreamedTasks = 4;

// Sets what of `args` is about a block's memory.
void place_streamed(CompressStreamed& args, int64_t r, int64_t p, int64_t most_floats);

void launch_streamed(const Queue& queue, const CompressStreamed& args);

}  // namespace rmm
