// Transposition in tiles through shared memory, 16 bytes a thread on both sides where memory is aligned.

#include "tile.cuh"
#include "turn.cuh"

namespace rmm {

struct Turn2 {
  View from, to;
  bool from_aligned, to_aligned;
};

constexpr int kTurned = 32, kTurners = 128;
using Turned = float[kTurned][kTurned + 1];

// move(outer, inner, count) on every run of `Width` values of a tile along its inner axis, `count` of them at an edge. Lanes 4
// or 8 values apart meet all banks, for the tile's rows are of odd length.
template <int Width, class Move>
__device__ __forceinline__ void each_run(int64_t outer_size, int64_t inner_size, const Move& move) {
  constexpr int kAcross = kTurned / Width;
#pragma unroll 2
  for (int first = 0; first < kTurned * kAcross; first += kTurners) {
    const int index = first + static_cast<int>(threadIdx.x), outer = index / kAcross, inner = index % kAcross * Width;
    if (outer >= outer_size || inner >= inner_size) continue;
    move(outer, inner, inner_size - inner < Width ? static_cast<int>(inner_size - inner) : Width);
  }
}

// From memory, along columns.
template <int Width, class T>
__device__ __forceinline__ void load(const T* from, const View& of, int64_t rows, int64_t columns, Turned& tile) {
  each_run<Width>(rows, columns, [&](int i, int j, int count) {
    const T* const at = from + i * of.stride[1] + j * of.stride[2];
    float values[Width];
    if constexpr (Width > 1) {
      if (count == Width) load_vector(at, values);
    }
#pragma unroll
    for (int e = 0; e < Width; ++e) {
      if ((Width == 1 || count < Width) && e < count) values[e] = Storage<T>::widen(at[e]);
      if (e < count) tile[i][j + e] = values[e];
    }
  });
}

// To memory, along rows.
template <int Width, class T>
__device__ __forceinline__ void store(T* to, const View& of, int64_t rows, int64_t columns, const Turned& tile) {
  each_run<Width>(columns, rows, [&](int j, int i, int count) {
    T* const at = to + i * of.stride[1] + j * of.stride[2];
    float values[Width];
#pragma unroll
    for (int e = 0; e < Width; ++e) values[e] = e < count ? tile[i + e][j] : 0.0f;
    if constexpr (Width > 1) {
      if (count == Width) return store_vector(at, values);
    }
#pragma unroll
    for (int e = 0; e < Width; ++e) {
      if (e < count) at[e] = Storage<T>::narrow(values[e]);
    }
  });
}

// Grid: tiles of columns, tiles of rows, matrices.
__global__ void __launch_bounds__(kTurners, 8) turn_kernel(const __grid_constant__ Turn2 args) {
  __shared__ Turned tile;
  const View &from = args.from, &to = args.to;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kTurned, column = static_cast<int64_t>(blockIdx.x) * kTurned;
  const int64_t rows = from.size[1] - row, columns = from.size[2] - column;
  for (int64_t matrix = blockIdx.z; matrix < from.size[0]; matrix += gridDim.z) {
    __syncthreads();  // the last tile is written
    with_dtype(from.dtype, [&](auto dtype) {
      using Element = decltype(dtype);
      const Element* const at = reinterpret_cast<const Element*>(from.data) + matrix * from.stride[0] + row * from.stride[1] +
                                column * from.stride[2];
      args.from_aligned ? load<kVector<Element>>(at, from, rows, columns, tile) : load<1>(at, from, rows, columns, tile);
    });
    __syncthreads();
    with_dtype(to.dtype, [&](auto dtype) {
      using Element = decltype(dtype);
      Element* const at =
          reinterpret_cast<Element*>(to.data) + matrix * to.stride[0] + row * to.stride[1] + column * to.stride[2];
      args.to_aligned ? store<kVector<Element>>(at, to, rows, columns, tile) : store<1>(at, to, rows, columns, tile);
    });
  }
}

void turn(const Queue& queue, const View& from, const View& to) {
  const unsigned matrices = from.size[0] < 65535 ? static_cast<unsigned>(from.size[0]) : 65535;
  const Plane in = plane_of(from), out = plane_of(to);
  const Turn2 args{from, to, in.aligned && !in.positions_inside, out.aligned && out.positions_inside};
  queue.launch({{blocks(from.size[2], kTurned), blocks(from.size[1], kTurned), matrices}, kTurners}, turn_kernel, args);
}

}  // namespace rmm
