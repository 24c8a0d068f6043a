// Matrices with more columns than a warp's registers hold, a block each: one-sided Jacobi on columns in memory, those of the
// matrix itself where it is tall, else those of Rᵀ, with R from a QR of its transpose that takes some columns at a time. So
// nothing is squared, and the left singular vectors are the columns, made orthonormal.
#pragma once

#include "directions.cuh"
#include "launch.h"

namespace rmm {

constexpr int kLargest = 256;       // of the shorter side
constexpr int kLargeThreads = 256;  // as many: in a QR each has one column of R
constexpr int kLargeChunk = 16;     // columns at a time
using LargeTeam = Team<kLargeThreads, 8>;

// Sizes, and where a block keeps what, in floats: in shared memory, or in a workspace where that does not hold it.
struct Large {
  int r, columns, k, p;  // k = min(r, columns); p vectors are wanted, up to r
  bool tall;             // r ≥ columns
  float deficient = kDeficient;
  int stride, tile_stride;  // of columns in core, u; in the tile
  int reflector;            // [2][kReflector]: always shared, as are the next ones
  int norms, kept, order;   // [k] each
  int room, shared_end;     // [max(r, p)]
  int tile;                 // [kLargeChunk, or as many as there are][tile_stride]
  bool whole;               // all columns have room in the tile, and are brought in once
  int core, u, memory_end;  // [k slots][stride], [p][stride], from the start of the memory that may be either
};
constexpr int kReflector = kLargeChunk + 4;

// Takes `count` floats, 16-byte aligned, from what `next` counts.
inline int take_floats(int64_t& next, int64_t count) {
  const int64_t at = next;
  next += (count + 3) / 4 * 4;
  return static_cast<int>(at < 0x7fffffff ? at : 0x7fffffff);
}

inline Large large_at(int64_t r, int64_t columns, int64_t p) {
  Large at{};
  const int64_t k = r < columns ? r : columns;
  at.r = static_cast<int>(r), at.columns = static_cast<int>(columns), at.k = static_cast<int>(k), at.p = static_cast<int>(p);
  at.tall = r >= columns;
  at.stride = static_cast<int>(column_stride(r, LargeTeam::kGroup));
  at.tile_stride = static_cast<int>((r + 3) / 8 * 8 + 4);
  int64_t next = 0;
  at.reflector = take_floats(next, 2 * kReflector);
  at.norms = take_floats(next, k), at.kept = take_floats(next, k), at.order = take_floats(next, k);
  at.room = take_floats(next, r < p ? p : r), at.shared_end = static_cast<int>(next);
  next = 0;
  at.core = take_floats(next, k * at.stride), at.u = take_floats(next, p * at.stride);
  at.memory_end = static_cast<int>(next);
  return at;
}

// Places the tile, last in shared memory, for chunks of `columns`; for all of them where as many blocks have room then. Two
// blocks at most: they have no registers for more.
inline void place_tile(Large& at, int64_t columns, int64_t& next, int64_t most_floats) {
  const int64_t rest = next + at.memory_end, chunk = kLargeChunk * at.tile_stride;
  const int64_t chunks = (columns + kLargeChunk - 1) / kLargeChunk;
  at.whole = rest + chunks * chunk <= (rest + chunk <= most_floats / 2 ? most_floats / 2 : most_floats);
  at.tile = take_floats(next, at.whole ? chunks * chunk : chunk);
}

// work(begin, count, columns): on each chunk of a matrix of `x` [matrices, columns, rows], once it is in the tile, from
// columns[0] on. `again`: not for the first time.
template <class Work>
__device__ __forceinline__ void each_chunk(const Plane& x, int64_t matrix, int all, const Large& at, float* tile, bool again,
                                           const Work& work) {
  const auto place = [&](int begin) { return tile + (at.whole ? begin * at.tile_stride : 0); };
  const auto load = [&](int begin, int count) {
    if (again && at.whole) return;
    with_dtype(x.view.dtype, [&](auto dtype) {
      using Element = decltype(dtype);
      Plane chunk = x;  // its columns are the positions of one row of it
      chunk.view.data += (matrix * x.view.stride[0] + begin * x.view.stride[1]) * static_cast<int64_t>(sizeof(Element));
      each_loaded<Element>(chunk, 1, 0, count, static_cast<int>(threadIdx.x), kLargeThreads,
                           [&](int, int i, int j, const float (&values)[kVector<Element>], int some) {
                             to_tile(chunk, i, values, some, place(begin) + i * at.tile_stride + j, at.tile_stride);
                           });
    });
  };
  each_chunk<kLargeChunk>(all, load, [&](int begin, int count) { work(begin, count, place(begin)); });
}

// The columns `begin` … `begin + count` − 1 of the matrix, of which value(i, j) is the entry of the (begin + i)-th in row j, go
// into the core: as they are, or into R, whose row j is the core's slot of j and 0 at first. A thread has a column of R, which
// is never negative on its diagonal, so that what late columns add to a large R is a small correction (Parlett's reflection).
template <class Value>
__device__ __forceinline__ void add_columns(const LargeTeam& team, const Large& at, float* core, float* reflector, int begin,
                                            int count, const Value& value) {
  if (at.tall) {
    for (int i = 0; i < count; ++i) {
      float* const column = core + slot_of(at.k, begin + i) * at.stride;
      for (int j = team.lane; j < at.r; j += kLargeThreads) column[j] = value(i, j);
    }
    return;
  }
  const int c = team.lane;
  float a[kLargeChunk];
#pragma unroll
  for (int i = 0; i < kLargeChunk; ++i) a[i] = c < at.r && i < count ? value(i, c) : 0.0f;
#pragma unroll 1
  for (int j = 0; j < at.r; ++j) {
    float4* const v = reinterpret_cast<float4*>(reflector + (j & 1) * kReflector);
    float* const row = core + slot_of(at.k, j) * at.stride;
    if (c == j) {
      float even = 0, odd = 0;
#pragma unroll
      for (int i = 0; i < kLargeChunk; i += 2) even = fmaf(a[i], a[i], even), odd = fmaf(a[i + 1], a[i + 1], odd);
      const float below = even + odd, first = row[j];
      const bool live = below > kTiny;
      const float square = live ? fmaf(first, first, below) : 1.0f, norm = square * exact_rsqrt(square);
      const float head = live ? __fdividef(-below, norm + first) : 0.0f;  // first − norm
#pragma unroll
      for (int i = 0; i < kLargeChunk; i += 4) v[i / 4] = {a[i], a[i + 1], a[i + 2], a[i + 3]};
      v[kLargeChunk / 4] = {head, live ? __fdividef(2.0f, fmaf(head, head, below)) : 0.0f, 0, 0};
      row[j] = first - head;
    }
    __syncthreads();
    if (c <= j || c >= at.r) continue;
    const float4 turn = v[kLargeChunk / 4];  // head, 2 / vᵀv
    const float top = row[c];
    float even = turn.x * top, odd = 0;
#pragma unroll
    for (int i = 0; i < kLargeChunk; i += 4) {
      const float4 part = v[i / 4];
      even = fmaf(part.x, a[i], even), odd = fmaf(part.y, a[i + 1], odd);
      even = fmaf(part.z, a[i + 2], even), odd = fmaf(part.w, a[i + 3], odd);
    }
    const float step = turn.y * (even + odd);
    row[c] = fmaf(-step, turn.x, top);
#pragma unroll
    for (int i = 0; i < kLargeChunk; i += 4) {
      const float4 part = v[i / 4];
      a[i] = fmaf(-step, part.x, a[i]), a[i + 1] = fmaf(-step, part.y, a[i + 1]);
      a[i + 2] = fmaf(-step, part.z, a[i + 2]), a[i + 3] = fmaf(-step, part.w, a[i + 3]);
    }
  }
}

// One-sided Jacobi: rotates the core's columns, in slots (jacobi.cuh), until they are orthogonal; norms[slot] are their squared
// norms.
__device__ __forceinline__ void orthogonalise(const LargeTeam& team, const Large& at, float* core, float* norms) {
  const int k = at.k, stride = at.stride, rows = at.r;
  const auto measure = [&] {
    for (int c = team.group; c < k; c += LargeTeam::kGroups) {
      const float square = team.dot(core + c * stride, core + c * stride, 0, rows);
      if (team.in_group == 0) norms[c] = square;
    }
    team.sync();
  };
  measure();
  float total = 0;
  for (int c = 0; c < k; ++c) total += norms[c];
  const float noise = kNoise * total * total;
  team.sync();
#pragma unroll 1
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    float worst = 0;
#pragma unroll 1
    for (int round = 0; round < k; ++round) {
#pragma unroll 1
      for (int pair = team.group; pair < meetings(k, round); pair += LargeTeam::kGroups) {
        const Slots slots = meeting(k, round, pair);
        float *const p = core + slots.left * stride, *const q = core + slots.right * stride;
        const Turn turn(norms[slots.left], norms[slots.right], team.dot(p, q, 0, rows));
        worst = fmaxf(worst, turn.excess);
#pragma unroll 4
        for (int i = team.in_group; i < rows; i += LargeTeam::kGroup) {
          const float qi = q[i], about = fmaf(turn.half, qi, p[i]), turned = fmaf(-turn.sine, about, qi);
          q[i] = turned;
          p[i] = fmaf(turn.half, turned, about);
        }
        team.sync_group();  // all have read the norms
        if (team.in_group == 0) norms[slots.left] = turn.longer, norms[slots.right] = turn.shorter;
      }
      team.sync();
    }
    measure();
    if (!team.any(worst > noise)) break;
  }
}

// The largest over a block; the same in all its threads. room: for a value of each warp.
__device__ __forceinline__ uint32_t largest_of_block(int thread, uint32_t value, float* room) {
  value = Team<32, 1>(thread).largest(value);
  __syncthreads();
  if (thread % 32 == 0) room[thread / 32] = __uint_as_float(value);
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kLargeThreads / 32; ++warp) {
    const uint32_t other = __float_as_uint(room[warp]);
    value = other > value ? other : value;
  }
  return value;
}

// The core → u, its columns' norms, and in which order they fall.
__device__ __forceinline__ void directions_of_core(const LargeTeam& team, const Large& at, float* shared, float* core, float* u,
                                                   Dtype stored) {
  float *const norms = shared + at.norms, *const kept = shared + at.kept, *const room = shared + at.room;
  int* const order = reinterpret_cast<int*>(shared + at.order);
  orthogonalise(team, at, core, norms);
  sort(team, at.k, norms, order);
  keep(team, at.k, norms, order, at.deficient, kept);
  choose(team, core, at.stride, at.r, at.k, norms, order, kept, at.p, at.r, u, at.stride, room);
  for (int c = team.group; c < at.p; c += LargeTeam::kGroups) {
    finish_column(team, core, at.r, 0, at.stride, norms, u + c * at.stride, stored);
  }
  team.sync();
}

// How many of `count` matrices to take at a time, so that what each needs of a workspace fits what is sensible together: much
// of it then stays in the L2 cache.
inline int64_t at_a_time(int64_t count, int64_t bytes_each) {
  constexpr int64_t kMost = 64 << 20;
  const int64_t some = kMost / (bytes_each > 0 ? bytes_each : 1) / 64 * 64;
  return count < some ? count : some > 0 ? some : count < 64 ? count : 64;
}

}  // namespace rmm
