// Between [count, S, r] tensors and shared memory: a run of neighbouring positions, 16 bytes a thread in either memory layout.
#pragma once

#include "../common/view.h"
#include "elements.cuh"

namespace rmm {

// How a [count, S, r] tensor is gone through: along the axis that is innermost in memory, 16 bytes at a time if all is aligned.
struct Plane {
  View view;
  bool positions_inside;
  bool aligned;
};

inline Plane plane_of(const View& view) {
  const bool positions_inside = view.stride[1] < view.stride[2];
  const int inner = positions_inside ? 1 : 2, outer = 3 - inner;
  const int64_t width = 16 / element_size(view.dtype);
  const bool aligned = view.stride[inner] == 1 && view.stride[outer] % width == 0 && view.stride[0] % width == 0 &&
                       reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  return {view, positions_inside, aligned};
}

// The view with its axes in the order that is given, and that of `count` from `first` on along an axis.
inline View permuted(const View& of, int a, int b, int c) {
  return {of.data, of.dtype, {of.size[a], of.size[b], of.size[c]}, {of.stride[a], of.stride[b], of.stride[c]}};
}
inline View narrowed(View of, int axis, int64_t first, int64_t count) {
  of.data += first * of.stride[axis] * element_size(of.dtype);
  of.size[axis] = count;
  return of;
}

// a / b for small non-negative numbers (below 2^22), by `inverse` = 1 / b.
__device__ __forceinline__ int quotient(int a, float inverse) {
  return __float2int_rz((static_cast<float>(a) + 0.5f) * inverse);
}

// put(e, values[e]) of the first `count` values, another one first in each `turn`: for threads that would else meet one bank.
template <int N, class Put>
__device__ __forceinline__ void in_turn(const float (&values)[N], int count, int turn, const Put& put) {
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const int mine = (e + turn) % N;
    float value = values[0];
#pragma unroll
    for (int other = 1; other < N; ++other) {
      if (other == mine) value = values[other];
    }
    if (mine < count) put(mine, value);
  }
}

// put(i, position, j, values, count): `count` neighbours along the inner axis, each element of tensor rows i < rows, positions
// first … first + positions − 1 once, shared out among `threads` threads. A thread keeps its place in a row where it can, and
// takes rows in turn. If Crossed, and ranks are innermost, neighbouring threads have every other position first: 16 ranks of
// two of them, 8 banks apart from one position to the next, would else meet half of the banks.
template <class T, bool Crossed = false, class Put>
__device__ __forceinline__ void each_loaded(const Plane& plane, int rows, int64_t first, int positions, int thread, int threads,
                                            const Put& put) {
  constexpr int kWidth = kVector<T>;
  const View& view = plane.view;
  const int r = static_cast<int>(view.size[2]);
  const int inner_size = plane.positions_inside ? positions : r, outer_size = plane.positions_inside ? r : positions;
  const int width = plane.aligned ? kWidth : 1;
  const int chunks = (inner_size + width - 1) / width, places = chunks * outer_size;
  // Not by an index known at run time: that would put the view into local memory.
  const int64_t inner_step = plane.positions_inside ? view.stride[1] : view.stride[2];
  const int64_t outer_step = plane.positions_inside ? view.stride[2] : view.stride[1];
  const float per_chunk = 1.0f / static_cast<float>(chunks), per_place = 1.0f / static_cast<float>(places);
  const int at_once = places < threads ? quotient(threads, per_place) : 1;
  const bool crossed = Crossed && !plane.positions_inside && outer_size % 4 == 0;
  for (int index = thread; index < places * at_once; index += threads) {
    const int row = quotient(index, per_place), place = index - row * places;
    const int line = quotient(place, per_chunk), inner = (place - line * chunks) * width;
    const int outer = crossed ? (line & ~3) | (line & 1) << 1 | (line >> 1 & 1) : line;
    const int position = plane.positions_inside ? inner : outer, j = plane.positions_inside ? outer : inner;
    const int left = inner_size - inner < width ? inner_size - inner : width;
    const T* from = reinterpret_cast<const T*>(view.data) + row * view.stride[0] + first * view.stride[1] + outer * outer_step +
                    inner * inner_step;
    const bool whole = width == kWidth && left == kWidth;
#pragma unroll 4
    for (int i = row; i < rows; i += at_once) {
      float values[kWidth];
      if (whole) {
        load_vector(from, values);
      } else {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) values[e] = e < left ? Storage<T>::widen(from[e * inner_step]) : 0.0f;
      }
      put(i, position, j, values, left);
      from += at_once * view.stride[0];
    }
  }
}

// What each_loaded gives, into shared memory: ranks side by side from `to` on, which is 16-byte aligned if `wide`; positions
// `step` apart.
template <int N>
__device__ __forceinline__ void to_tile(const Plane& plane, int position, const float (&values)[N], int count, float* to,
                                        int step, bool wide = true) {
  if (plane.positions_inside) {
    in_turn(values, count, position / N, [&](int e, float value) { to[e * step] = value; });
  } else if (wide && count == N) {
#pragma unroll
    for (int e = 0; e < N; e += 4) store_shared(to + e, values[e], values[e + 1], values[e + 2], values[e + 3]);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (e < count) to[e] = values[e];
    }
  }
}

// By a whole block: work(begin, count) on each `Chunk` of `all` things, once load(begin, count) has brought it to shared
// memory.
template <int Chunk, class Load, class Work>
__device__ __forceinline__ void each_chunk(int all, const Load& load, const Work& work) {
#pragma unroll 1
  for (int begin = 0; begin < all; begin += Chunk) {
    const int count = all - begin < Chunk ? all - begin : Chunk;
    __syncthreads();  // the last chunk is used
    load(begin, count);
    __syncthreads();
    work(begin, count);
  }
}

// The same towards memory: get(i, position, j) is one value.
template <class T, class Get>
__device__ __forceinline__ void each_stored(const Plane& plane, int rows, int64_t first, int positions, int thread, int threads,
                                            const Get& get) {
  constexpr int kWidth = kVector<T>;
  const View& view = plane.view;
  const int r = static_cast<int>(view.size[2]);
  const int inner_size = plane.positions_inside ? positions : r, outer_size = plane.positions_inside ? r : positions;
  const int width = plane.aligned ? kWidth : 1;
  const int chunks = (inner_size + width - 1) / width;
  // Not by an index known at run time: that would put the view into local memory.
  const int64_t inner_step = plane.positions_inside ? view.stride[1] : view.stride[2];
  const int64_t outer_step = plane.positions_inside ? view.stride[2] : view.stride[1];
  const float per_chunk = 1.0f / static_cast<float>(chunks), per_row = 1.0f / static_cast<float>(outer_size);
  for (int index = thread; index < rows * outer_size * chunks; index += threads) {
    const int line = quotient(index, per_chunk), inner = (index - line * chunks) * width;
    const int i = quotient(line, per_row), outer = line - i * outer_size;
    T* const to =
        reinterpret_cast<T*>(view.data) + i * view.stride[0] + first * view.stride[1] + outer * outer_step + inner * inner_step;
    const int left = inner_size - inner < width ? inner_size - inner : width;
    float values[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      if (e < left) {
        values[e] = plane.positions_inside ? get(i, inner + e, outer) : get(i, outer, inner + e);
      }
    }
    if (width == kWidth && left == kWidth) {
      store_vector(to, values);
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (e < left) to[e * inner_step] = Storage<T>::narrow(values[e]);
      }
    }
  }
}

// Coefficients [n, p, S] of tasks `begin` … and positions `first` …: get(i, c, position) with i and position from there. Stored
// as T with positions innermost; in a workspace as fp32, with components innermost.
template <class T, class Get>
__device__ __forceinline__ void store_coefficients(const View& coeff, int64_t begin, int count, int p, int64_t first,
                                                   int positions, int thread, int threads, const Get& get) {
  const int64_t start = begin * coeff.stride[0] + first * coeff.stride[2];
  if (coeff.stride[2] == 1) {
    T* const to = reinterpret_cast<T*>(coeff.data) + start;
    for (int index = thread; index < count * p * positions; index += threads) {
      const int position = index % positions, row = index / positions, i = row / p, c = row % p;
      to[i * coeff.stride[0] + c * coeff.stride[1] + position] = Storage<T>::narrow(get(i, c, position));
    }
  } else {
    float* const to = reinterpret_cast<float*>(coeff.data) + start;
    for (int index = thread; index < count * p * positions; index += threads) {
      const int c = index % p, row = index / p, i = row % count, position = row / count;
      to[i * coeff.stride[0] + c * coeff.stride[1] + position * coeff.stride[2]] = get(i, c, position);
    }
  }
}

// One body for every storage dtype: body(T()).
template <class Body>
__device__ __forceinline__ void with_dtype(Dtype dtype, const Body& body) {
  if (dtype == Dtype::f32) {
    body(float());
  } else if (dtype == Dtype::bf16) {
    body(__nv_bfloat16());
  } else {
    body(__half());
  }
}

__device__ __forceinline__ void store_as(Dtype dtype, char* to, int64_t index, float value) {
  if (dtype == Dtype::f32) {
    reinterpret_cast<float*>(to)[index] = value;
  } else if (dtype == Dtype::bf16) {
    reinterpret_cast<__nv_bfloat16*>(to)[index] = __float2bfloat16_rn(value);
  } else {
    reinterpret_cast<__half*>(to)[index] = __float2half_rn(value);
  }
}

// What storing a value leaves of it.
__device__ __forceinline__ float as_stored(Dtype dtype, float value) {
  if (dtype == Dtype::f16) return __half2float(__float2half_rn(value));
  if (dtype == Dtype::bf16) return __bfloat162float(__float2bfloat16_rn(value));
  return value;
}

}  // namespace rmm
