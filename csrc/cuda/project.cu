// project: coefficients of tasks on a basis. A block has 32 positions and 8 tasks, one of each a thread; 16 ranks of tasks,
// mean and up to 8 components at a time are in shared memory.

#include "launch.h"
#include "reference.h"
#include "tile.cuh"

namespace rmm {

struct Project {
  Plane x, basis;  // [n, S, r], [p+1, S, r]
  View coeff;      // [n, p, S]
};

constexpr int kPositions = 32, kTasks = 8, kComponents = 8, kRanksAtATime = 16;
constexpr int kLine = kRanksAtATime + 1;  // floats from one position to the next: neighbours meet different banks

// Columns j0 … j0 + ranks of `rows` rows of a plane, of positions from `first` on.
template <class T>
__device__ __forceinline__ void bring(const Plane& plane, int64_t row, int rows, int64_t first, int positions, int j0,
                                      int ranks, float* to) {
  Plane part = plane;
  part.view.data += (row * plane.view.stride[0] + j0 * plane.view.stride[2]) * static_cast<int64_t>(sizeof(T));
  part.view.size[2] = ranks;
  each_loaded<T>(part, rows, first, positions, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x),
                 [&](int i, int position, int j, const float (&values)[kVector<T>], int count) {
                   float* const at = to + (i * kPositions + position) * kLine + j;
                   if (plane.positions_inside) {
#pragma unroll
                     for (int e = 0; e < kVector<T>; ++e) {
                       if (e < count) at[e * kLine] = values[e];
                     }
                   } else {  // 16 banks between a position and the next, and other banks for the second half of them
                     const int turn = position / kVector<T> % 2 + (kVector<T> - 1) * (position % 2);
                     in_turn(values, count, turn, [&](int e, float value) { at[e] = value; });
                   }
                 });
}

template <class T>
__global__ void __launch_bounds__(kPositions* kTasks, 2) project(const __grid_constant__ Project args) {
  __shared__ float shared[(kTasks + 1 + kComponents) * kPositions * kLine];
  float *const tasks = shared, *const mean = tasks + kTasks * kPositions * kLine, *const components = mean + kPositions * kLine;
  const int r = static_cast<int>(args.x.view.size[2]), p = static_cast<int>(args.coeff.size[1]);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPositions, left = args.x.view.size[1] - first;
  const int positions = left < kPositions ? static_cast<int>(left) : kPositions;
  const int position = static_cast<int>(threadIdx.x) % kPositions, mine = static_cast<int>(threadIdx.x) / kPositions;
  const int64_t n = args.x.view.size[0];
  for (int64_t task = static_cast<int64_t>(blockIdx.y) * kTasks; task < n; task += static_cast<int64_t>(gridDim.y) * kTasks) {
    const int some_tasks = n - task < kTasks ? static_cast<int>(n - task) : kTasks;
    for (int c0 = 0; c0 < p; c0 += kComponents) {
      const int some = p - c0 < kComponents ? p - c0 : kComponents;
      float sums[kComponents] = {};
      for (int j0 = 0; j0 < r; j0 += kRanksAtATime) {
        const int ranks = r - j0 < kRanksAtATime ? r - j0 : kRanksAtATime;
        __syncthreads();
        bring<T>(args.x, task, some_tasks, first, positions, j0, ranks, tasks);
        bring<T>(args.basis, 0, 1, first, positions, j0, ranks, mean);
        bring<T>(args.basis, c0 + 1, some, first, positions, j0, ranks, components);
        __syncthreads();
        if (position < positions && mine < some_tasks) {
          for (int j = 0; j < ranks; ++j) {
            const float value = tasks[(mine * kPositions + position) * kLine + j] - mean[position * kLine + j];
#pragma unroll
            for (int c = 0; c < kComponents; ++c) {
              if (c < some) sums[c] = fmaf(value, components[(c * kPositions + position) * kLine + j], sums[c]);
            }
          }
        }
      }
      if (position < positions && mine < some_tasks) {
        T* const to = reinterpret_cast<T*>(args.coeff.data) + (task + mine) * args.coeff.stride[0] + first + position;
#pragma unroll
        for (int c = 0; c < kComponents; ++c) {
          if (c < some) to[(c0 + c) * args.coeff.stride[1]] = Storage<T>::narrow(sums[c]);
        }
      }
    }
  }
}

Tensor project_op(Tensor x, Tensor basis) {
  const View in = view(x, 3, "x"), on = view(basis, 3, "basis");
  check_same(on.size[0] >= 1 && on.size[1] == in.size[1] && on.size[2] == in.size[2] && on.dtype == in.dtype,
             "x [n, S, r] and basis [p+1, S, r]");
  if (in.dtype == Dtype::f64) return tensor_of(call_reference<1>("project", x, basis)[0]);
  const int64_t n = in.size[0], p = on.size[0] - 1;
  Tensor coeff = torch::stable::new_empty(x, {n, p, in.size[1]});
  const Queue queue{x, basis, coeff};
  const Project args{plane_of(in), plane_of(on), view(coeff, 3, "coeff")};
  const Grid grid{{blocks(in.size[1], kPositions), blocks(n < 4096 ? n : 4096, kTasks)}, kPositions * kTasks};
  switch (in.dtype) {
    case Dtype::f16:
      queue.launch(grid, project<__half>, args);
      break;
    case Dtype::bf16:
      queue.launch(grid, project<__nv_bfloat16>, args);
      break;
    default:
      queue.launch(grid, project<float>, args);
  }
  return coeff;
}

RMM_CUDA_OP("project", project_op)

}  // namespace rmm
