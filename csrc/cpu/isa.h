// One source, one object per instruction set. setup.py compiles every file of this folder once per set with RMM_ISA naming
// it (`baseline`, and on x86-64 `avx2` and `avx512`), those of the LoRA forward also with `avx512_bf16`; kernels live in
// namespace rmm::RMM_ISA, and the op that chooses among them is compiled once, with the baseline (RMM_OPS).
//
// Kernel objects of different sets are linked together, so they must not emit shared inline functions: nothing of the C++
// library beyond C headers is included by a kernel.
#pragma once

#include <stdint.h>

#ifndef RMM_ISA
#define RMM_ISA baseline
#define RMM_OPS 1
#endif

#if defined(__x86_64__)
#define RMM_DECLARE_KERNEL(signature) \
  namespace baseline {                \
  signature;                          \
  }                                   \
  namespace avx2 {                    \
  signature;                          \
  }                                   \
  namespace avx512 {                  \
  signature;                          \
  }
#define RMM_KERNEL(name) \
  (::rmm::isa() >= ::rmm::Isa::avx512 ? avx512::name : ::rmm::isa() == ::rmm::Isa::avx2 ? avx2::name : baseline::name)
#define RMM_DECLARE_KERNEL_BF16(signature) \
  RMM_DECLARE_KERNEL(signature)            \
  namespace avx512_bf16 {                  \
  signature;                               \
  }
#define RMM_KERNEL_BF16(name) (::rmm::isa() == ::rmm::Isa::avx512_bf16 ? avx512_bf16::name : RMM_KERNEL(name))
#else
#define RMM_DECLARE_KERNEL(signature) \
  namespace baseline {                \
  signature;                          \
  }
#define RMM_KERNEL(name) baseline::name
#define RMM_DECLARE_KERNEL_BF16(signature) RMM_DECLARE_KERNEL(signature)
#define RMM_KERNEL_BF16(name) RMM_KERNEL(name)
#endif

namespace rmm {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

// The set in use: the best this CPU has, unless a test chose another (module.cpp).
Isa isa();

// From how many tokens of a task in a chunk on the LoRA forward restores its factors; 0 leaves the choice to the kernels.
// Returns what was asked for before (lora_shrink.cpp).
int64_t force_restored(int64_t tokens);

}  // namespace rmm
