// Tensor cores and asynchronous copies, for fp32, fp16 and bf16 alike.
//
// Everything moves in packs of 16 bytes, E = 16 / sizeof(T) values. The sum of an m16n8 product may take its terms in any
// order, as long as both operands take the same, so lane (g = lane / 4, t = lane % 4) is given *consecutive* terms:
//
//   step          E/2 terms of each of 4 lanes t: 8 bytes a row. One m16n8k16 of 16-bit values, or one m16n8k8 of TF32
//   operand A     rows g and g + 8, terms t·E/2 … of the step
//   operand B     column g, the same terms
//   sums          rows g (0, 1) and g + 8 (2, 3), columns 2t (0, 2) and 2t + 1 (1, 3)
//
// A pack along the summed axis thus holds the operands of two steps, and is loaded from memory as it is.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace rmm {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

// ---- copies to shared memory, 16 bytes each, the bytes beyond `bytes` being 0 ----

// Keeps the line in L1, for what other warps of the block read too.
__device__ __forceinline__ void copy_async_shared(void* to, const void* from, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

// Ends a group of copies. Groups end in order.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` groups of this thread are under way.
template <int Pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// One access each, which the compiler might split.
__device__ __forceinline__ uint4 load_pack(const uint4* shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared)))
               : "memory");
  return v;
}

__device__ __forceinline__ void store_pack(void* global, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// ---- values ----

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 pair;
    memcpy(&pair, &word, 4);
    return __half22float2(pair);
  } else {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  }
  return word;
}

__device__ __forceinline__ uint32_t word(const uint4& pack, int i) {
  return i == 0 ? pack.x : i == 1 ? pack.y : i == 2 ? pack.z : pack.w;
}

// Values 2i and 2i + 1 of a pack.
template <class T>
__device__ __forceinline__ float2 values(const uint4& from, int i) {
  if constexpr (sizeof(T) == 4) {
    return {__uint_as_float(word(from, 2 * i)), __uint_as_float(word(from, 2 * i + 1))};
  } else {
    return unpack<T>(word(from, i));
  }
}

// The pack of E values.
template <class T>
__device__ __forceinline__ uint4 packed(const float* v) {
  if constexpr (sizeof(T) == 4) {
    return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])};
  } else {
    return {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
  }
}

// The word of 4 / sizeof(T) values.
template <class T>
__device__ __forceinline__ uint32_t as_word(const float (&v)[4 / sizeof(T)]) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(v[0]);
  } else {
    return pack<T>(v[0], v[1]);
  }
}

// The products of two words, each rounded once to T.
template <class T>
__device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(__uint_as_float(a) * __uint_as_float(b));
  } else if constexpr (std::is_same_v<T, __half>) {
    __half2 x, y;
    memcpy(&x, &a, 4);
    memcpy(&y, &b, 4);
    const __half2 product = __hmul2(x, y);
    memcpy(&a, &product, 4);
    return a;
  } else {
    __nv_bfloat162 x, y;
    memcpy(&x, &a, 4);
    memcpy(&y, &b, 4);
    const __nv_bfloat162 product = __hmul2(x, y);
    memcpy(&a, &product, 4);
    return a;
  }
}

template <class T>
__device__ __forceinline__ uint4 times(const uint4& a, const uint4& b) {
  return {times<T>(a.x, b.x), times<T>(a.y, b.y), times<T>(a.z, b.z), times<T>(a.w, b.w)};
}

// ---- products ----

// What an operand of one step is: 8 bytes of a row as they are, or fp32 values as the sum of two TF32 values.
struct Halves {
  uint2 high, low;
};
template <class T>
using Operand = std::conditional_t<sizeof(T) == 4, Halves, uint2>;

__device__ __forceinline__ uint32_t tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}

__device__ __forceinline__ Halves split_tf32(float x, float y) {
  const uint2 high{tf32(x), tf32(y)};
  return {high, {tf32(x - __uint_as_float(high.x)), tf32(y - __uint_as_float(high.y))}};
}

template <class T>
__device__ __forceinline__ Operand<T> operand(uint32_t x, uint32_t y) {
  if constexpr (sizeof(T) == 4) {
    return split_tf32(__uint_as_float(x), __uint_as_float(y));
  } else {
    return uint2{x, y};
  }
}

template <class T>
__device__ __forceinline__ void mma(float (&sum)[4], uint2 a0, uint2 a8, uint2 b) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0.x), "r"(a8.x), "r"(a0.y), "r"(a8.y), "r"(b.x), "r"(b.y));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0.x), "r"(a8.x), "r"(a0.y), "r"(a8.y), "r"(b.x), "r"(b.y));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0.x), "r"(a8.x), "r"(a0.y), "r"(a8.y), "r"(b.x), "r"(b.y));
  }
}

// sum += A B of one step, small terms first. Without the smallest, fp32 would be off by half a dozen roundings; and tensor
// cores cut their sums off, so that those of a step are added to the others by fp32's own addition. `b` of 16-bit values is one
// operand, or the sum of two.
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], const Operand<T>& a0, const Operand<T>& a8, const Halves& b) {
  if constexpr (sizeof(T) == 4) {
    float step[4] = {};
    mma<T>(step, a0.low, a8.low, b.low);
    mma<T>(step, a0.low, a8.low, b.high);
    mma<T>(step, a0.high, a8.high, b.low);
    mma<T>(step, a0.high, a8.high, b.high);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += step[i];
  } else {
    mma<T>(sum, a0, a8, b.low);
    mma<T>(sum, a0, a8, b.high);
  }
}

template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint2& a0, const uint2& a8, const uint2& b) {
  mma<T>(sum, a0, a8, b);
}

}  // namespace rmm
