// The library `rmm_kernels._cuda`: how it was built, and what a failed launch means. Importing it registers the CUDA kernels.

#include <pybind11/pybind11.h>

#include <cstdio>
#include <cstring>

#include "launch.h"

namespace rmm {
namespace {

// What to say where no kernel was built for compute capability major.minor.
std::string wrong_arch(int major, int minor) {
  return "rmm_kernels' CUDA kernels were built for archs " RMM_CUDA_ARCHS "; this device has arch " + std::to_string(major) +
         "." + std::to_string(minor) + ". Reinstall with TORCH_CUDA_ARCH_LIST=\"" + std::to_string(major) + "." +
         std::to_string(minor) + "\"";
}

// The newest of `archs`, as RMM_CUDA_ARCHS has them, that is not newer than a device of that compute capability, 90 for 9.0; 0
// where all are. What runs there was compiled for it: PTX of 8.0 on a device of 9.0 still has no more than 8.0 has.
int newest_for(const std::string& archs, int capability) {
  int newest = 0, major = 0, minor = 0, read = 0;
  for (const char* at = archs.c_str(); std::sscanf(at, "%d.%d%n", &major, &minor, &read) == 2;) {
    const int arch = 10 * major + minor;
    if (arch <= capability && arch > newest) newest = arch;
    at += read;
    at += std::strcspn(at, " ");  // the comma, or +PTX
  }
  return newest;
}

}  // namespace

int detail::built_for(int capability) { return newest_for(RMM_CUDA_ARCHS, capability); }

std::string detail::explain(cudaError_t error) {
  int device = 0, major = 0, minor = 0;
  const bool arch = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
                    error == cudaErrorUnsupportedPtxVersion || error == cudaErrorInvalidKernelImage;
  if (arch && cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess) {
    return wrong_arch(major, minor);
  }
  return std::string("CUDA error: ") + cudaGetErrorString(error);
}

}  // namespace rmm

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of rmm_kernels; importing it registers them with torch.";
  m.attr("archs") = RMM_CUDA_ARCHS;
  m.attr("cudart") = CUDART_VERSION;
  m.def("wrong_arch", &rmm::wrong_arch, pybind11::arg("major"), pybind11::arg("minor"),
        "The error that a launch raises on a device of that compute capability if no kernel was built for it.");
  m.def("newest_for", &rmm::newest_for, pybind11::arg("archs"), pybind11::arg("capability"),
        "Of which of `archs` the code is that runs on a device of that compute capability, 90 for 9.0; 0 for none.");
}
