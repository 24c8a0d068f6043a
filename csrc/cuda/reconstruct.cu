// reconstruct: factors of chosen tasks, elementwise in the memory order of the output, 16 bytes a thread where that is aligned.

#include "elements.cuh"
#include "launch.h"
#include "reference.h"

namespace rmm {

struct Reconstruct {
  View basis, coeff, out;  // [p+1, S, r], [n, p, S], [a, S, r]
  Ids tasks;               // [a]
  int inner, outer;        // axes of basis and out: the one innermost in memory, and the other
  bool coeff_aligned;      // neighbours' coefficients lie side by side, 16 bytes at a time
};

// Threads along x own `Width` neighbours along the inner axis, and go through the tasks from blockIdx.y on. What a thread
// reads of the basis stays in the first-level cache from task to task. An id out of range, which to refuse would need a host
// sync, gives NaN.
template <class T, int Width>
__global__ void __launch_bounds__(256, 4) reconstruct(const __grid_constant__ Reconstruct args) {
  const int64_t inner_size = args.out.size[args.inner];
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * Width;
  if (index >= inner_size * args.out.size[args.outer]) return;
  const int64_t outer = index / inner_size, inner = index % inner_size;
  const bool ranks_inside = args.inner == 2;
  const int64_t position = ranks_inside ? outer : inner;
  const T* const basis = reinterpret_cast<const T*>(args.basis.data) + outer * args.basis.stride[args.outer] +
                         inner * args.basis.stride[args.inner];
  T* const out = reinterpret_cast<T*>(args.out.data) + outer * args.out.stride[args.outer] + inner;
  const int64_t step = ranks_inside ? 0 : args.coeff.stride[2];  // of the coefficient, from one neighbour to the next
  for (int64_t a = blockIdx.y; a < args.tasks.size; a += gridDim.y) {
    const int64_t task = args.tasks.wide ? reinterpret_cast<const int64_t*>(args.tasks.data)[a * args.tasks.stride]
                                         : reinterpret_cast<const int32_t*>(args.tasks.data)[a * args.tasks.stride];
    const bool known = task >= 0 && task < args.coeff.size[0];
    float sum[Width];
    for (int64_t k = 0; k < args.basis.size[0]; ++k) {
      float values[Width];
      if constexpr (Width > 1) {
        load_vector(basis + k * args.basis.stride[0], values);
      } else {
        values[0] = Storage<T>::widen(basis[k * args.basis.stride[0]]);
      }
      if (k == 0) {
#pragma unroll
        for (int i = 0; i < Width; ++i) sum[i] = known ? values[i] : __int_as_float(0x7fffffff);
      } else if (known) {
        const T* const coeff = reinterpret_cast<const T*>(args.coeff.data) + task * args.coeff.stride[0] +
                               (k - 1) * args.coeff.stride[1] + position * args.coeff.stride[2];
        float weights[Width];
        bool whole = false;
        if constexpr (Width > 1) {
          whole = args.coeff_aligned;
          if (whole) load_vector(coeff, weights);
        }
        if (!whole) {
#pragma unroll
          for (int i = 0; i < Width; ++i) weights[i] = Storage<T>::widen(coeff[i * step]);
        }
#pragma unroll
        for (int i = 0; i < Width; ++i) sum[i] += weights[i] * values[i];
      }
    }
    if constexpr (Width > 1) {
      store_vector(out + a * args.out.stride[0], sum);
    } else {
      out[a * args.out.stride[0]] = Storage<T>::narrow(sum[0]);
    }
  }
}

template <class T>
void launch_reconstruct(const Queue& queue, Reconstruct args) {
  const View &basis = args.basis, &out = args.out, &coeff = args.coeff;
  const int64_t total = out.size[1] * out.size[2], width = kVector<T>;
  const bool aligned = out.size[args.inner] % width == 0 && basis.stride[args.inner] == 1 &&
                       basis.stride[args.outer] % width == 0 && basis.stride[0] % width == 0 &&
                       reinterpret_cast<uintptr_t>(basis.data) % 16 == 0;
  args.coeff_aligned = args.inner == 1 && coeff.stride[2] == 1 && coeff.stride[1] % width == 0 &&
                       coeff.stride[0] % width == 0 && reinterpret_cast<uintptr_t>(coeff.data) % 16 == 0;
  const unsigned tasks = args.tasks.size < 64 ? static_cast<unsigned>((args.tasks.size + 7) / 8) : 8;
  if (aligned) {
    queue.launch({{blocks(total, 256 * width), tasks}, 256}, reconstruct<T, kVector<T>>, args);
  } else {
    queue.launch({{blocks(total, 256), tasks}, 256}, reconstruct<T, 1>, args);
  }
}

Tensor reconstruct_op(Tensor basis, Tensor coeff, Tensor task_ids) {
  const View on = view(basis, 3, "basis"), of = view(coeff, 3, "coeff");
  const Ids tasks = ids(task_ids);
  check_same(on.size[0] == of.size[1] + 1 && on.size[1] == of.size[2] && on.dtype == of.dtype,
             "basis [p+1, S, r] and coeff [n, p, S]");
  if (on.dtype == Dtype::f64) return tensor_of(call_reference<1>("reconstruct", basis, coeff, task_ids)[0]);
  Tensor out = like_layout(basis, tasks.size);
  const Queue queue{basis, coeff, task_ids, out};
  const View to = view(out, 3, "out");
  const bool positions_inside = basis.stride(1) < basis.stride(2);
  const Reconstruct args{on, of, to, tasks, positions_inside ? 1 : 2, positions_inside ? 2 : 1, false};
  switch (on.dtype) {
    case Dtype::f16:
      launch_reconstruct<__half>(queue, args);
      break;
    case Dtype::bf16:
      launch_reconstruct<__nv_bfloat16>(queue, args);
      break;
    default:
      launch_reconstruct<float>(queue, args);
  }
  return out;
}

RMM_CUDA_OP("reconstruct", reconstruct_op)

}  // namespace rmm
