// Kernels with planted bugs for test_checks.py, each beside its correct form where useful.
#include <cuda_pipeline.h>

#include <cstdint>

extern "C" __global__ void missing_barrier(const float* x, float* y) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = s[127 - threadIdx.x];
}
extern "C" __global__ void missing_second_barrier(const float* x, float* y, int n) {  // write-after-read race
  __shared__ float s[128];
  float t = 0;
  for (int k = 0; k < n; k++) {
    s[threadIdx.x] = x[k * 128 + threadIdx.x];
    __syncthreads();
    t += s[127 - threadIdx.x];
  }
  y[threadIdx.x] = t;
}
extern "C" __global__ void missing_syncwarp(const float* x, float* y, int sync) {
  __shared__ float s[32];
  s[threadIdx.x] = x[threadIdx.x];
  if (sync) __syncwarp();
  y[threadIdx.x] = s[31 - threadIdx.x];
}
extern "C" __global__ void off_by_one(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) y[i] = 2 * x[i];
}
extern "C" __global__ void vector_load(const float* x, float* y) {
  float4 v = *(const float4*)(x + threadIdx.x * 4);
  y[threadIdx.x] = v.x + v.y + v.z + v.w;
}
extern "C" __global__ void uninitialised(const float* x, float* y) {
  __shared__ float s[64];
  if (threadIdx.x < 63) s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];
}
extern "C" __global__ void async_copy(const float4* x, float4* y, int wait) {
  __shared__ float4 s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 16);
  __pipeline_commit();
  if (wait) __pipeline_wait_prior(0);
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];
}
extern "C" __global__ void divergent_barrier(float* y) {
  __shared__ float s[32];
  s[threadIdx.x] = threadIdx.x;
  if (threadIdx.x < 16) {
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x + 16];
  }
}
extern "C" __global__ void two_barriers(float* y) {
  __shared__ float s[32];
  if (threadIdx.x & 1) {
    s[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x ^ 1];
  } else {
    s[threadIdx.x] = 2;
    __syncthreads();
    y[threadIdx.x] = 3 * s[threadIdx.x ^ 1];
  }
}
extern "C" __global__ void named_barrier_deadlock(float* y) {
  if (threadIdx.x < 32)
    asm volatile("bar.sync 1, 64;");
  else
    asm volatile("bar.sync 2, 64;");
  y[threadIdx.x] = 1;
}
extern "C" __global__ void same_output(const float* x, float* y) { y[threadIdx.x] = x[blockIdx.x * 32 + threadIdx.x]; }
extern "C" __global__ void reads_other_block(float* y) {
  y[blockIdx.x * 32 + threadIdx.x] = 1 + y[((blockIdx.x + 1) % gridDim.x) * 32 + threadIdx.x];
}
extern "C" __global__ void same_instruction(float* y) { y[threadIdx.x / 2] = threadIdx.x; }
extern "C" __global__ void endless(volatile int* y) {
  while (y[0] == 0) {
  }
}
extern "C" __global__ void last_block_sums(const float* x, float* partial, unsigned* ticket,
                                           float* y) {  // correct: fence and atomic
  __shared__ bool last;
  partial[blockIdx.x] = x[blockIdx.x];
  __threadfence();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  if (last && threadIdx.x == 0) {
    float s = 0;
    for (int i = 0; i < gridDim.x; i++) s += ((volatile float*)partial)[i];
    *y = s;
  }
}
extern "C" __global__ void early_exit(float* y, int n) {
  if (threadIdx.x >= n) return;
  __syncthreads();
  y[threadIdx.x] = 1;
}
extern "C" __global__ void shuffle_from_idle_lane(const float* x, float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_down_sync(0xffff, x[threadIdx.x], 8);
}
extern "C" __global__ void missing_member(const float* x, float* y, int barrier) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0xffffffff, x[threadIdx.x], 1);
  if (barrier) {
    __syncthreads();
    y[threadIdx.x] += 1;
  }
}
// statistics
extern "C" __global__ void copy(const float* x, float* y, int stride) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i * stride] = x[i * stride];
}
extern "C" __global__ void copy4(const float4* x, float4* y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i];
}
extern "C" __global__ void bank_conflict(float* y, int stride) {
  __shared__ float s[32 * 33];
  for (int i = threadIdx.x; i < 32 * 33; i += 32) s[i] = i;
  __syncthreads();
  y[threadIdx.x] = ((volatile float*)s)[threadIdx.x * stride];
}
extern "C" __global__ void arithmetic(float* y, int n) {
  float a = threadIdx.x, b = 1.0f;
  int k = threadIdx.x;
  for (int i = 0; i < n; i++) {
    a = fmaf(a, 0.5f, b);
    b = b * 0.999f + a;
    k = k * 3 + i;
    k ^= k >> 3;
  }
  y[blockIdx.x * blockDim.x + threadIdx.x] = a + b + k;
}
extern "C" __global__ void shared_traffic(const float* x, float* y, int n) {
  __shared__ float s[256];
  float t = 0, v = x[threadIdx.x];
  for (int i = 0; i < n; i++) {
    s[threadIdx.x] = v + i;
    __syncthreads();
    for (int j = 0; j < 16; j++) t += s[(threadIdx.x + j * 7) & 255] * v;
    __syncthreads();
  }
  y[blockIdx.x * blockDim.x + threadIdx.x] = t;
}

// Eight lanes read, synchronise among themselves, and one of them writes, while the warp's other lanes are elsewhere.
extern "C" __global__ void part_of_a_warp_syncs(int* out) {
  __shared__ int value;
  if (threadIdx.x == 0) value = 1;
  __syncwarp();
  int sum = 0;
  if (threadIdx.x < 8) {
    sum = value;
    __syncwarp(0xff);
    if (threadIdx.x == 3) value = 2;
  }
  out[threadIdx.x] = sum;
}

extern "C" __global__ void too_small_a_part_syncs(int* out) {
  __shared__ int value;
  if (threadIdx.x == 0) value = 1;
  __syncwarp();
  int sum = 0;
  if (threadIdx.x < 8) {
    sum = value;
    if (threadIdx.x < 4) {
      __syncwarp(0xf);
      if (threadIdx.x == 3) value = 2;
    }
  }
  out[threadIdx.x] = sum;
}
