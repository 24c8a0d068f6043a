// Transposition in tiles through shared memory, 16 bytes a thread on both sides where memory is aligned.

#include "tile.cuh"
#include "turn.cuh"

namespace rmm {

struct Turn2 {
  Plane from, to;
};

constexpr int kTurned = 32, kTurners = 128;

// The part of a matrix from (row, column) on, as wide as `columns`, as the rows of a plane with one leading row.
template <class T>
__device__ __forceinline__ Plane part_of(Plane plane, int64_t matrix, int64_t row, int64_t column, int columns) {
  View& view = plane.view;
  view.data += (matrix * view.stride[0] + row * view.stride[1] + column * view.stride[2]) * static_cast<int64_t>(sizeof(T));
  view.size[2] = columns;
  return plane;
}

// Grid: tiles of columns, tiles of rows, matrices. Lanes that move 16 bytes are 4 or 8 columns apart and rows one: with an odd
// stride they meet all banks.
__global__ void __launch_bounds__(kTurners) turn_kernel(const __grid_constant__ Turn2 args) {
  __shared__ float tile[kTurned][kTurned + 1];
  const View& all = args.from.view;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kTurned, column = static_cast<int64_t>(blockIdx.x) * kTurned;
  const int rows = static_cast<int>(all.size[1] - row < kTurned ? all.size[1] - row : kTurned);
  const int columns = static_cast<int>(all.size[2] - column < kTurned ? all.size[2] - column : kTurned);
  for (int64_t matrix = blockIdx.z; matrix < all.size[0]; matrix += gridDim.z) {
    __syncthreads();  // the last tile is written
    with_dtype(all.dtype, [&](auto dtype) {
      using Element = decltype(dtype);
      const Plane part = part_of<Element>(args.from, matrix, row, column, columns);
      each_loaded<Element>(part, 1, 0, rows, thread, kTurners,
                           [&](int, int i, int j, const float (&values)[kVector<Element>], int count) {
                             to_tile(part, i, values, count, &tile[i][j], kTurned + 1, false);
                           });
    });
    __syncthreads();
    with_dtype(args.to.view.dtype, [&](auto dtype) {
      using Element = decltype(dtype);
      each_stored<Element>(part_of<Element>(args.to, matrix, row, column, columns), 1, 0, rows, thread, kTurners,
                           [&](int, int i, int j) { return tile[i][j]; });
    });
  }
}

void turn(const Queue& queue, const View& from, const View& to) {
  const unsigned matrices = from.size[0] < 65535 ? static_cast<unsigned>(from.size[0]) : 65535;
  queue.launch({{blocks(from.size[2], kTurned), blocks(from.size[1], kTurned), matrices}, kTurners}, turn_kernel,
               Turn2{plane_of(from), plane_of(to)});
}

}  // namespace rmm
