// gram: xᵀx of small matrices, several a block. A matrix's rows come through shared memory, a few at a time; each of its
// threads keeps a part of one column of the result in registers, so that neighbours write neighbours.

#include "launch.h"
#include "reference.h"
#include "tile.cuh"

namespace rmm {

struct Gram {
  Plane x;     // [B, m, k]
  float* out;  // [B, k, k]
  bool center;
};

constexpr int kRowsAtATime = 16;

// Up to K columns, Threads of a matrix, K · K / Threads results each; both powers of two. Rows are K + 4 floats apart, and
// matrices K more than a multiple of all banks, as several share a warp.
template <int K, int Threads>
__global__ void __launch_bounds__(128, 4) gram(const __grid_constant__ Gram args) {
  constexpr int kMatrices = 128 / Threads, kEach = K * K / Threads, kStride = K + 4;
  __shared__ __align__(16) float shared[kMatrices][kRowsAtATime * kStride + K % 32];
  const int m = static_cast<int>(args.x.view.size[1]), k = static_cast<int>(args.x.view.size[2]);
  const int thread = static_cast<int>(threadIdx.x) % Threads, which = static_cast<int>(threadIdx.x) / Threads;
  const int64_t matrix = static_cast<int64_t>(blockIdx.x) * kMatrices + which;
  const bool here = matrix < args.x.view.size[0];
  const int column = thread % K, begin = thread / K * kEach;
  float* const rows = shared[which];
  float sums[kEach] = {};
  for (int first = 0; first < m; first += kRowsAtATime) {
    const int count = m - first < kRowsAtATime ? m - first : kRowsAtATime;
    if (first > 0) __syncthreads();
    for (int index = thread; index < kRowsAtATime * kStride; index += Threads) rows[index] = 0;
    __syncthreads();
    if (here) {
      with_dtype(args.x.view.dtype, [&](auto dtype) {
        using Element = decltype(dtype);
        Plane plane = args.x;
        plane.view.data += matrix * plane.view.stride[0] * static_cast<int64_t>(sizeof(Element));
        each_loaded<Element>(plane, 1, first, count, thread, Threads,
                             [&](int, int i, int j, const float (&values)[kVector<Element>], int some) {
                               to_tile(plane, i, values, some, rows + i * kStride + j, kStride);
                             });
      });
    }
    __syncthreads();
    if (args.center) {  // the first column goes first: exactly so where all columns share an offset
      for (int i = thread; i < count; i += Threads) {
        float* const of = rows + i * kStride;
        const float offset = of[0];
        float sum = 0;
        for (int a = 0; a < k; ++a) sum += of[a] - offset;
        const float mean = sum * (1.0f / static_cast<float>(k));
        for (int a = 0; a < k; ++a) of[a] = of[a] - offset - mean;
      }
      __syncthreads();
    }
    for (int i = 0; i < count; ++i) {
      const float mine = rows[i * kStride + column];
#pragma unroll
      for (int b = 0; b < kEach; ++b) sums[b] = fmaf(mine, rows[i * kStride + begin + b], sums[b]);
    }
  }
  if (here && column < k) {
    float* const out = args.out + (matrix * k + begin) * k + column;
#pragma unroll
    for (int b = 0; b < kEach; ++b) {
      if (begin + b < k) out[b * k] = sums[b];
    }
  }
}

Tensor gram_op(Tensor x, bool center) {
  const View in = view(x, 3, "x");
  const int64_t batch = in.size[0], k = in.size[2];
  if (in.dtype == Dtype::f64 || k > 64) return tensor_of(call_reference<1>("gram", x, center)[0]);
  Tensor out = torch::stable::new_empty(x, {batch, k, k}, ScalarType::Float);
  const Queue queue{x, out};
  if (k == 0) return out;
  const Gram args{plane_of(in), static_cast<float*>(out.data_ptr()), center};
  if (k <= 8) {
    queue.launch({blocks(batch, 16), 128}, gram<8, 8>, args);
  } else if (k <= 16) {
    queue.launch({blocks(batch, 4), 128}, gram<16, 32>, args);
  } else if (k <= 32) {
    queue.launch({blocks(batch, 2), 128}, gram<32, 64>, args);
  } else {
    queue.launch({blocks(batch, 1), 128}, gram<64, 128>, args);
  }
  return out;
}

RMM_CUDA_OP("gram", gram_op)

}  // namespace rmm
