// The library `rmm_kernels._cuda`: how it was built, and what a failed launch means. Importing it registers the CUDA kernels.

#include <pybind11/pybind11.h>

#include "launch.h"

namespace rmm {
namespace {

// What to say where no kernel was built for compute capability major.minor.
std::string wrong_arch(int major, int minor) {
  return "rmm_kernels' CUDA kernels were built for archs " RMM_CUDA_ARCHS "; this device has arch " + std::to_string(major) +
         "." + std::to_string(minor) + ". Reinstall with TORCH_CUDA_ARCH_LIST=\"" + std::to_string(major) + "." +
         std::to_string(minor) + "\"";
}

}  // namespace

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
}
