// Transposition in tiles through shared memory.

#include "tile.cuh"
#include "turn.cuh"

namespace rmm {

struct Turn2 {
  View from, to;
};

constexpr int kTurned = 32, kTurners = 8;

// Grid: tiles of columns, tiles of rows, matrices.
__global__ void __launch_bounds__(kTurned* kTurners) turn_kernel(const __grid_constant__ Turn2 args) {
  __shared__ float tile[kTurned][kTurned + 1];
  const int x = static_cast<int>(threadIdx.x) % kTurned, y = static_cast<int>(threadIdx.x) / kTurned;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kTurned, column = static_cast<int64_t>(blockIdx.x) * kTurned;
  const int64_t rows = args.from.size[1] - row, columns = args.from.size[2] - column;
  for (int64_t matrix = blockIdx.z; matrix < args.from.size[0]; matrix += gridDim.z) {
    __syncthreads();  // the last tile is written
    with_dtype(args.from.dtype, [&](auto dtype) {
      using Element = decltype(dtype);
      const Element* const from = reinterpret_cast<const Element*>(args.from.data) + matrix * args.from.stride[0] +
                                  row * args.from.stride[1] + (column + x) * args.from.stride[2];
#pragma unroll
      for (int i = y; i < kTurned; i += kTurners) {
        if (i < rows && x < columns) tile[i][x] = Storage<Element>::widen(from[i * args.from.stride[1]]);
      }
    });
    __syncthreads();
    with_dtype(args.to.dtype, [&](auto dtype) {
      using Element = decltype(dtype);
      Element* const to = reinterpret_cast<Element*>(args.to.data) + matrix * args.to.stride[0] +
                          (row + x) * args.to.stride[1] + column * args.to.stride[2];
#pragma unroll
      for (int j = y; j < kTurned; j += kTurners) {
        if (x < rows && j < columns) to[j * args.to.stride[2]] = Storage<Element>::narrow(tile[x][j]);
      }
    });
  }
}

void turn(const Queue& queue, const View& from, const View& to) {
  const unsigned matrices = from.size[0] < 65535 ? static_cast<unsigned>(from.size[0]) : 65535;
  queue.launch({{blocks(from.size[2], kTurned), blocks(from.size[1], kTurned), matrices}, kTurned * kTurners}, turn_kernel,
               Turn2{from, to});
}

}  // namespace rmm
