// launch.h's other end where there is no GPU: what tests/simulator.py sets, and in the CUDA runtime's place the entry points
// that nvcc's code calls when it is loaded, which tell each kernel's name.
#define RMM_SIMULATED 1
#include <map>

#include "launch.h"

namespace rmm::detail {

Callback callback = nullptr;
Device device{80, 163 * 1024};

static std::map<const void*, const char*>& names() {
  static std::map<const void*, const char*> known;
  return known;
}

}  // namespace rmm::detail

extern "C" {

void rmm_simulate(rmm::detail::Callback callback) { rmm::detail::callback = callback; }

void rmm_simulated_device(int arch, int shared_bytes) { rmm::detail::device = {arch, shared_bytes}; }

const char* rmm_kernel_name(const void* kernel) { return rmm::detail::names().at(kernel); }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  rmm::detail::names()[kernel] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

// What <<<>>> would call.
int __cudaPushCallConfiguration() { return 1; }
int __cudaPopCallConfiguration() { return 1; }
int __cudaGetKernel() { return 1; }
int __cudaLaunchKernel() { return 1; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorUnknown; }
}
