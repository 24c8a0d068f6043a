// Correct kernels for test_cuda.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cassert>
#include <cstdint>
#include <cstdio>

extern "C" __global__ void warp_reduce(const float* x, float* y) {
  __shared__ float partial[8];
  float v = x[blockIdx.x * 256 + threadIdx.x];
  for (int o = 16; o; o >>= 1) v += __shfl_down_sync(~0u, v, o);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    float t = 0;
    for (int i = 0; i < 8; i++) t += partial[i];
    y[blockIdx.x] = t;
  }
}

extern "C" __global__ void tiled_matmul(const float* a, const float* b, float* c, int n) {
  __shared__ float ta[16][16], tb[16][17];
  int r = blockIdx.y * 16 + threadIdx.y, q = blockIdx.x * 16 + threadIdx.x;
  float s = 0;
  for (int k = 0; k < n; k += 16) {
    ta[threadIdx.y][threadIdx.x] = a[r * n + k + threadIdx.x];
    tb[threadIdx.y][threadIdx.x] = b[(k + threadIdx.y) * n + q];
    __syncthreads();
    for (int i = 0; i < 16; i++) s += ta[threadIdx.y][i] * tb[i][threadIdx.x];
    __syncthreads();
  }
  c[r * n + q] = s;
}

extern "C" __global__ void reverse_dynamic(const int* x, int* y, int n) {
  extern __shared__ int buffer[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) buffer[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = buffer[n - 1 - i];
}

// One 8x8 symmetric eigenproblem per thread, in registers: cyclic Jacobi.
extern "C" __global__ void jacobi8(const float* in, float* values, float* vectors, int count, int sweeps) {
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= count) return;
  float a[8][8], v[8][8];
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) {
      a[i][j] = in[t * 64 + i * 8 + j];
      v[i][j] = i == j;
    }
  for (int s = 0; s < sweeps; s++)
#pragma unroll
    for (int p = 0; p < 7; p++)
#pragma unroll
      for (int q = p + 1; q < 8; q++) {
        float apq = a[p][q];
        if (fabsf(apq) < 1e-30f) continue;
        float tau = (a[q][q] - a[p][p]) / (2 * apq);
        float tn = copysignf(1.0f, tau) / (fabsf(tau) + sqrtf(1 + tau * tau));
        float c = rsqrtf(1 + tn * tn), sn = tn * c;
#pragma unroll
        for (int k = 0; k < 8; k++) {
          float x = a[k][p], y = a[k][q];
          a[k][p] = c * x - sn * y;
          a[k][q] = sn * x + c * y;
        }
#pragma unroll
        for (int k = 0; k < 8; k++) {
          float x = a[p][k], y = a[q][k];
          a[p][k] = c * x - sn * y;
          a[q][k] = sn * x + c * y;
        }
#pragma unroll
        for (int k = 0; k < 8; k++) {
          float x = v[k][p], y = v[k][q];
          v[k][p] = c * x - sn * y;
          v[k][q] = sn * x + c * y;
        }
      }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    values[t * 8 + i] = a[i][i];
#pragma unroll
    for (int j = 0; j < 8; j++) vectors[t * 64 + i * 8 + j] = v[i][j];
  }
}

// G = A^T A, one warp per (rows x 8) matrix; float4 loads.
extern "C" __global__ void warp_gram(const float4* a, float* g, int rows) {
  int lane = threadIdx.x & 31, m = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  float acc[36];
#pragma unroll
  for (int i = 0; i < 36; i++) acc[i] = 0;
  for (int r = lane; r < rows; r += 32) {
    float4 u = a[(m * rows + r) * 2], w = a[(m * rows + r) * 2 + 1];
    float x[8] = {u.x, u.y, u.z, u.w, w.x, w.y, w.z, w.w};
    int n = 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = i; j < 8; j++) acc[n++] += x[i] * x[j];
  }
  int n = 0;
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = i; j < 8; j++) {
      float s = acc[n++];
      for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
      if (lane == 0) {
        g[m * 64 + i * 8 + j] = s;
        g[m * 64 + j * 8 + i] = s;
      }
    }
}

extern "C" __global__ void half_math(const __half2* h, const __nv_bfloat162* b, __half2* ho, __nv_bfloat162* bo, float* f,
                                     int n) {
  int i = threadIdx.x;
  if (i >= n) return;
  ho[i] = __hadd2(__hfma2(h[i], h[i], h[i]), __hmax2(h[i], __hneg2(h[i])));
  bo[i] = __hadd2(__hmul2(b[i], b[i]), __hmin2(b[i], __habs2(b[i])));
  float2 x = __half22float2(h[i]), y = __bfloat1622float2(b[i]);
  f[i] =
      x.x * y.x + x.y * y.y + (__hgt(__low2half(h[i]), __high2half(h[i])) ? 1.0f : 0.0f) + __half2float(hexp(__low2half(h[i])));
}

extern "C" __global__ void async_pipeline(const float4* x, float4* y, int tiles) {
  __shared__ float4 stage[3][64];
  int t = threadIdx.x;
  for (int s = 0; s < 2; s++) {
    if (s < tiles) __pipeline_memcpy_async(&stage[s][t], &x[s * 64 + t], 16);
    __pipeline_commit();
  }
  float4 sum = make_float4(0, 0, 0, 0);
  for (int k = 0; k < tiles; k++) {
    if (k + 2 < tiles) __pipeline_memcpy_async(&stage[(k + 2) % 3][t], &x[(k + 2) * 64 + t], 16);
    __pipeline_commit();
    __pipeline_wait_prior(2);
    __syncthreads();
    float4 v = stage[k % 3][63 - t];
    sum.x += v.x;
    sum.y += v.y;
    sum.z += v.z;
    sum.w += v.w;
    __syncthreads();
  }
  y[t] = sum;
}

// D (16x8) = A (16x16 bf16, row) * B (16x8 bf16, column): ldmatrix + mma.
extern "C" __global__ void mma_bf16(const __nv_bfloat16* a, const __nv_bfloat16* bt, float* d) {
  __shared__ __align__(16) __nv_bfloat16 sa[16 * 16], sb[8 * 16];
  int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) sa[i] = a[i];
  for (int i = lane; i < 128; i += 32) sb[i] = bt[i];
  __syncwarp();
  uint32_t ra[4], rb[2];
  uint32_t pa = (uint32_t)__cvta_generic_to_shared(&sa[(lane % 16) * 16 + (lane / 16) * 8]);
  uint32_t pb = (uint32_t)__cvta_generic_to_shared(&sb[(lane % 8) * 16 + (lane / 8 % 2) * 8]);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(ra[0]), "=r"(ra[1]), "=r"(ra[2]), "=r"(ra[3])
               : "r"(pa));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(rb[0]), "=r"(rb[1]) : "r"(pb));
  float c[4] = {0, 0, 0, 0};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(ra[0]), "r"(ra[1]), "r"(ra[2]), "r"(ra[3]), "r"(rb[0]), "r"(rb[1]));
  int g = lane / 4, t = lane % 4 * 2;
  d[g * 8 + t] = c[0];
  d[g * 8 + t + 1] = c[1];
  d[(g + 8) * 8 + t] = c[2];
  d[(g + 8) * 8 + t + 1] = c[3];
}

extern "C" __global__ void mma_s8_f64_f16(const int8_t* a, const int8_t* bt, int* d, const double* da, const double* dbt,
                                          double* dd, const __half* ha, const __half* hbt, __half* hd) {
  int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const int *aw = (const int*)a, *bw = (const int*)bt;  // a: 16x32, bt: 8x32
  int a0 = aw[g * 8 + t], a1 = aw[(g + 8) * 8 + t], a2 = aw[g * 8 + t + 4], a3 = aw[(g + 8) * 8 + t + 4], b0 = bw[g * 8 + t],
      b1 = bw[g * 8 + t + 4], c[4] = {0, 0, 0, 0};
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  d[g * 8 + t * 2] = c[0];
  d[g * 8 + t * 2 + 1] = c[1];
  d[(g + 8) * 8 + t * 2] = c[2];
  d[(g + 8) * 8 + t * 2 + 1] = c[3];
  double e0 = 0, e1 = 0;  // da: 8x4, dbt: 8x4
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
               : "+d"(e0), "+d"(e1)
               : "d"(da[g * 4 + t]), "d"(dbt[g * 4 + t]));
  dd[g * 8 + t * 2] = e0;
  dd[g * 8 + t * 2 + 1] = e1;
  const unsigned *hw = (const unsigned*)ha, *hb = (const unsigned*)hbt;  // ha: 16x8, hbt: 8x8, f16 accumulators
  unsigned r0 = 0, r1 = 0;
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3}, {%4}, {%0,%1};"
               : "+r"(r0), "+r"(r1)
               : "r"(hw[g * 4 + t]), "r"(hw[(g + 8) * 4 + t]), "r"(hb[g * 4 + t]));
  ((unsigned*)hd)[g * 4 + t] = r0;
  ((unsigned*)hd)[(g + 8) * 4 + t] = r1;
}

extern "C" __global__ void atomics(const int* x, int* bins, float* total, unsigned* biggest, unsigned long long* wide, int n) {
  __shared__ int local_bins[16];
  if (threadIdx.x < 16) local_bins[threadIdx.x] = 0;
  __syncthreads();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    atomicAdd(&local_bins[x[i] & 15], 1);
    atomicAdd(total, (float)x[i]);
    atomicMax(biggest, (unsigned)x[i]);
    unsigned long long old = *(volatile unsigned long long*)wide, seen;
    do {
      seen = old;
      old = atomicCAS(wide, seen, seen + x[i]);
    } while (old != seen);
  }
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&bins[threadIdx.x], local_bins[threadIdx.x]);
}

extern "C" __global__ void dynamic_index(const float* x, const int* idx, float* y) {
  float a[16];
  for (int i = 0; i < 16; i++) a[i] = x[threadIdx.x * 16 + i];
  for (int i = 0; i < 16; i++) {
    int k = idx[threadIdx.x * 16 + i];
    float t = a[k];
    a[k] = a[i];
    a[i] = t;
  }
  for (int i = 0; i < 16; i++) y[threadIdx.x * 16 + i] = a[i];
}

template <class T, int N>
__global__ void scaled_copy(const T* x, T* y, T scale) {
#pragma unroll
  for (int i = 0; i < N; i++)
    y[(blockIdx.x * N + i) * blockDim.x + threadIdx.x] = scale * x[(blockIdx.x * N + i) * blockDim.x + threadIdx.x];
}
template __global__ void scaled_copy<double, 3>(const double*, double*, double);
template __global__ void scaled_copy<int, 2>(const int*, int*, int);

struct Pair {
  float a;
  int b;
};
__device__ __noinline__ float power(float x, int n) {
  float r = 1;
  for (int i = 0; i < n; i++) r *= x;
  return r;
}
__device__ __noinline__ Pair split(float x) {
  Pair p;
  p.b = (int)floorf(x);
  p.a = x - p.b;
  return p;
}
__device__ __noinline__ float nested(float x, int n) {
  Pair p = split(power(x, n));
  return p.a + 10 * p.b;
}
extern "C" __global__ void device_functions(const float* x, float* y) {
  int i = threadIdx.x;
  y[i] = i % 3 ? nested(x[i], i % 4) : power(x[i], i % 5);
}

extern "C" __global__ void intrinsics(const float* __restrict__ x, const unsigned* __restrict__ u, float* y, unsigned* v) {
  int i = threadIdx.x;
  float a = __ldg(x + i);
  unsigned m = __ballot_sync(~0u, a > 0), w = __ldg(u + i);
  v[i] = __popc(m) + __clz(w) * 3 + __brev(w) + __byte_perm(w, m, 0x5140) + __funnelshift_l(w, m, 7) + __ffs(w) +
         __umulhi(w, m) + __vadd2(w, m) + __dp4a(w, m, 5u) + __any_sync(~0u, a > 5) + __all_sync(~0u, a > -9) +
         __match_any_sync(~0u, w & 3) + __reduce_add_sync(~0u, w & 255);
  y[i] = __fdividef(a, 3.0f) + __expf(a) + rsqrtf(fabsf(a) + 1) + __logf(fabsf(a) + 1) + __sinf(a) + tanhf(a) +
         powf(fabsf(a), 1.5f) + fmodf(a, 0.7f) + erff(a) + __fmul_rz(a, 1.1f) + sinf(100000.0f * a);
}

struct Settings {
  float scale;
  int shift;
  double offset;
  short flags[3];
};
__constant__ float table[4] = {1.5f, 2.5f, 3.5f, 4.5f};
__device__ int visits = 7;
extern "C" __global__ void structs_and_constants(Settings s, const float* x, float* y, int kind) {
  int i = threadIdx.x;
  float r = s.scale * x[i] + table[(i + s.shift) & 3] + (float)s.offset + s.flags[i % 3];
  switch (kind + i % 7) {
    case 0:
      r += 1;
      break;
    case 1:
      r *= 2;
      break;
    case 2:
      r = -r;
      break;
    case 3:
      r += x[0];
      break;
    case 4:
      r -= 4;
      break;
    case 5:
      r *= r;
      break;
    default:
      r = 0;
  }
  y[i] = r;
  if (i == 0) atomicAdd(&visits, 5);
  if (i == 1) printf("kind %d scale %.2f %s\n", kind, s.scale, "done");
}
extern "C" __global__ void checked(const int* x) { assert(x[threadIdx.x] >= 0); }

extern "C" __global__ void divergent(int* y) {
  int i = threadIdx.x, n = 0, k = i;
  while (k != 1 && n < 200) {
    k = k == 0 ? 1 : (k & 1) ? 3 * k + 1 : k / 2;
    n++;
  }
  int s = __reduce_max_sync(~0u, n);
  y[i] = n * 1000 + s + __popc(__activemask());
}
extern "C" __global__ void integers(const int* a, const int* b, long long* o) {
  int i = threadIdx.x;
  long long x = a[i], y = b[i];
  o[i] = x * y + (x << 5) / (y | 1) + x % (y | 1) + (a[i] / (b[i] | 1)) + ((unsigned)a[i] % ((unsigned)b[i] | 1)) +
         __mulhi(a[i], b[i]) + __mul64hi(x << 30, y << 30) + (a[i] >> 3) + ((unsigned)b[i] >> 3) + abs(a[i]) + min(a[i], b[i]) +
         (short)a[i] + (signed char)b[i];
}
