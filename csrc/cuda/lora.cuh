// What shrink and expand share: tensors as kernels see them, tiles of tokens, packs fetched into a warp's ring.
//
// Each warp works on its own: it streams the shared basis, and the coefficients of its tokens, through a ring of stages in
// shared memory that only it uses, kStages − 1 steps ahead of the arithmetic. A lane gets back the packs it asked for, except
// where said, so a step needs no barrier of the block.
//
// A warp whose tokens have no task returns at once. One whose tokens have one task between them, and are many, rebuilds that
// task's factor (the restored-tile form: one product instead of p + 1). Which it is, is read from the ids on the device, and
// the grid does not depend on it.
#pragma once

#include <climits>

#include "launch.h"
#include "mma.cuh"

namespace rmm {

// A tensor of up to three axes, the one that packs lie along last. Strides in elements.
struct Source {
  char* data;
  int64_t stride[3];
  bool packs;  // packs along the last axis are consecutive in memory and aligned
};

// The axes of a view in the order that a kernel sees them.
inline Source source(const View& from, int first, int second, int last) {
  const int64_t pack = 16 / element_size(from.dtype);
  const auto stride = [&](int axis) { return from.size[axis] > 1 ? from.stride[axis] : 0; };
  Source result{from.data, {stride(first), stride(second), stride(last)}, false};
  result.packs = (from.size[last] <= 1 || from.stride[last] == 1) && result.stride[0] % pack == 0 &&
                 result.stride[1] % pack == 0 && reinterpret_cast<uintptr_t>(from.data) % 16 == 0;
  return result;
}

// u [T, r] on its way from shrink to expand: the sum of `count` slices, added in order: first kTogether neighbours at a time,
// which is what a cluster does before it writes them as one, then their sums.
constexpr int kTogether = 8;
struct Slices {
  const float* data;
  int64_t count, stride;  // slices
  int64_t token, rank;    // strides of the axes
  bool packs;             // four ranks are consecutive in memory and aligned
};

// Writes u as slices into memory of its own, which is returned; rows of tokens without a task are undefined.
Tensor run_shrink(Queue& queue, const Tensor& like, const View& x, const View& basis_a, const View& coeff_a, const Ids& ids,
                  Slices& u);
// The slices that run_shrink wrote become one, whose memory is returned; rows of tokens without a task are 0.
Tensor run_sum(Queue& queue, const Tensor& like, const Ids& ids, int64_t tasks, Slices& u);
// after_own: the kernel before it in the stream is one of the above, and writes none of its tensors but u.
void run_expand(const Queue& queue, const View& y, const Slices& u, const View& basis_b, const View& coeff_b, const Ids& ids,
                const View& scaling, bool after_own);

void check_shrink(const View& x, const View& basis_a, const View& coeff_a, const Ids& ids);
void check_expand(const View& y, const View& basis_b, const View& coeff_b, const Ids& ids, const View& scaling);

// Tokens of a tile, a function of T alone. A kernel for few tokens has 8; one for many takes them 16 at a time, or where they
// are of one task 32.
constexpr int kFew = 8, kSome = 16, kMost = 32;
inline int tile_of(int64_t tokens) { return tokens <= kFew ? kFew : tokens <= 64 ? kSome : kMost; }

// Calls function(T()) with the type that `dtype` is stored as.
template <class F>
void with_type(Dtype dtype, const F& function) {
  switch (dtype) {
    case Dtype::f16:
      return function(__half());
    case Dtype::bf16:
      return function(__nv_bfloat16());
    default:
      return function(float());
  }
}

template <class T>
__device__ __forceinline__ T* row(const Source& from, int64_t i, int64_t j = 0) {
  return reinterpret_cast<T*>(from.data) + i * from.stride[0] + j * from.stride[1];
}

// How many of a row's `size` values there are from `first` on, at most a pack.
template <class T>
__device__ __forceinline__ int left(int64_t first, int64_t size) {
  const int64_t count = size - first;
  return count <= 0 ? 0 : count < kPack<T> ? static_cast<int>(count) : kPack<T>;
}

// Values `first` … of a row of `size` into *to, 0 beyond its end, as part of the group of copies that is being filled. Only
// where from.packs.
template <class T, bool Shared = false>
__device__ __forceinline__ void fetch(uint4* to, const Source& from, const T* row, int64_t first, int64_t size) {
  const int count = left<T>(first, size);
  const void* const at = count == 0 ? from.data : reinterpret_cast<const void*>(row + first);
  if constexpr (Shared) {
    copy_async_shared(to, at, count * static_cast<int>(sizeof(T)));
  } else {
    copy_async(to, at, count * static_cast<int>(sizeof(T)));
  }
}

// The same for any strides, at once.
template <class T>
__device__ __forceinline__ void gather(uint4* to, const Source& from, const T* row, int64_t first, int64_t size) {
  const int count = left<T>(first, size);
  T each[kPack<T>];
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e) each[e] = e < count ? row[(first + e) * from.stride[2]] : T(0.f);
  memcpy(to, each, 16);
}

// The task of a token, −1 where it has none.
__device__ __forceinline__ int task_of(const Ids& ids, int64_t tasks, int64_t token) {
  const int64_t id = ids.wide ? reinterpret_cast<const int64_t*>(ids.data)[token * ids.stride]
                              : reinterpret_cast<const int32_t*>(ids.data)[token * ids.stride];
  return id >= 0 && id < tasks ? static_cast<int>(id) : -1;
}

// Tokens of a warp's or block's tile, at most 32.
struct Tile {
  int task;         // of token `lane`
  unsigned active;  // which tokens have one
  bool one;         // kMany or more tokens of one task

  // The task of a token of the tile.
  __device__ int of(int token) const { return __shfl_sync(kAllLanes, task, token); }

  // The one task.
  __device__ int any() const { return __reduce_max_sync(kAllLanes, task); }

  // kSome tokens from `first` on.
  __device__ Tile part(int first) const {
    const int moved = __shfl_down_sync(kAllLanes, task, first);
    return {threadIdx.x % kWarp < kSome ? moved : -1, active >> first & ((1u << kSome) - 1), false};
  }
};

constexpr int kMany = 16;  // tokens for which a factor is worth rebuilding

__device__ __forceinline__ Tile inspect(const Ids& ids, int64_t tasks, int64_t first, int count) {
  const int lane = threadIdx.x % kWarp;
  Tile tile{-1, 0, false};
  if (lane < count && first + lane < ids.size) tile.task = task_of(ids, tasks, first + lane);
  tile.active = __ballot_sync(kAllLanes, tile.task >= 0);
  const int highest = __reduce_max_sync(kAllLanes, tile.task);
  const int lowest = __reduce_min_sync(kAllLanes, tile.task >= 0 ? tile.task : INT_MAX);
  tile.one = lowest == highest && __popc(tile.active) >= kMany;
  return tile;
}

// The sum of u's slices at one place.
__device__ __forceinline__ float sum_slices(const float* from, int64_t stride, int64_t slices) {
  float total = 0;
  for (int64_t first = 0; first < slices; first += kTogether) {
    float some = 0;
#pragma unroll
    for (int s = 0; s < kTogether; ++s) {
      if (first + s < slices) some += from[(first + s) * stride];
    }
    total += some;
  }
  return total;
}

// to[e] += c[e] · from[e], or at first to[e] = from[e].
template <class T>
__device__ __forceinline__ void add_scaled(float (&to)[kPack<T>], const uint4& from, const uint4& c, bool first) {
#pragma unroll
  for (int i = 0; i < kPack<T> / 2; ++i) {
    const float2 v = values<T>(from, i);
    const float2 w = values<T>(c, i);
    to[2 * i] = first ? v.x : fmaf(w.x, v.x, to[2 * i]);
    to[2 * i + 1] = first ? v.y : fmaf(w.y, v.y, to[2 * i + 1]);
  }
}

// The same for the values of one word and one c.
template <class T>
__device__ __forceinline__ void add_scaled(float (&to)[4 / sizeof(T)], uint32_t from, float c, bool first) {
  if constexpr (sizeof(T) == 4) {
    to[0] = first ? __uint_as_float(from) : fmaf(c, __uint_as_float(from), to[0]);
  } else {
    const float2 v = unpack<T>(from);
    to[0] = first ? v.x : fmaf(c, v.x, to[0]);
    to[1] = first ? v.y : fmaf(c, v.y, to[1]);
  }
}

}  // namespace rmm
