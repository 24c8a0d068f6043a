// Storage dtypes in device code: 16 bytes at a time, values as float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace rmm {

template <class T>
struct Storage;
template <>
struct Storage<float> {
  static __device__ float widen(float value) { return value; }
  static __device__ float narrow(float value) { return value; }
};
template <>
struct Storage<__half> {
  static __device__ float widen(__half value) { return __half2float(value); }
  static __device__ __half narrow(float value) { return __float2half_rn(value); }
};
template <>
struct Storage<__nv_bfloat16> {
  static __device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
  static __device__ __nv_bfloat16 narrow(float value) { return __float2bfloat16_rn(value); }
};

// Values that one 16-byte access moves.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <class T>
union Packed {
  uint4 bits;
  T values[kVector<T>];
  __device__ Packed() {}
};

// 16 bytes in one instruction: the compiler likes to take a vector store apart.
__device__ __forceinline__ void store_global(void* to, uint4 bits) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
}
__device__ __forceinline__ void store_shared(float* to, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

// kVector values from or to 16-byte aligned global memory.
template <class T>
__device__ __forceinline__ void load_vector(const T* from, float (&values)[kVector<T>]) {
  Packed<T> packed;
  packed.bits = *reinterpret_cast<const uint4*>(from);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) values[i] = Storage<T>::widen(packed.values[i]);
}

template <class T>
__device__ __forceinline__ void store_vector(T* to, const float (&values)[kVector<T>]) {
  Packed<T> packed;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) packed.values[i] = Storage<T>::narrow(values[i]);
  store_global(to, packed.bits);
}

}  // namespace rmm
