// Everything between an op and its kernels: device, stream, launch, errors. Every kernel of this folder goes through launch().
//
// Compiled with RMM_SIMULATED, launch() hands the same kernel, grid, block, shared memory and arguments to a callback instead,
// and the ops take CPU tensors: so tests/simulator.py runs this host code and these kernels without a GPU.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstddef>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

#include "../common/tensor.h"

namespace rmm {

struct Grid {
  dim3 blocks;
  dim3 threads;
  size_t shared_bytes = 0;  // dynamic shared memory
  unsigned cluster = 1;     // blocks along y that read each other's shared memory; more than 1 needs sm_90
  bool dependent = false;   // may start before the kernel before it has ended, and waits for it itself; needs sm_90
};

// Blocks along one axis of a grid: `count` things, `each` a block. Refuses more than a grid can have.
inline unsigned blocks(int64_t count, int64_t each) {
  const int64_t result = (count + each - 1) / each;
  STD_TORCH_CHECK(result <= 0x7fffffff, "too large for one launch: ", count, " in blocks of ", each);
  return static_cast<unsigned>(result);
}

// What a device can do, as far as launches depend on it.
struct Device {
  int arch;          // 80 is sm_80: that of the code which runs there, which may be older than the device
  int shared_bytes;  // shared memory a block may have at most
};

namespace detail {

#ifdef RMM_SIMULATED
struct Region {
  const void* low;
  size_t bytes;
  const void* origin;  // where its allocation starts
};
using Callback = int (*)(const void* kernel, const unsigned* blocks_threads_cluster_dependent, size_t shared_bytes,
                         const void* const* arguments, const size_t* argument_bytes, int arguments_count, const Region* regions,
                         int region_count, char* error, size_t error_bytes);
extern Callback callback;
extern Device device;
#else
std::string explain(cudaError_t error);  // with the built and the present arch where those do not fit
int built_for(int capability);           // the arch of the code that runs on such a device

// libtorch_cuda's aoti_torch_get_current_cuda_stream, which every version has. Looked up, since this library is linked where
// torch may have no CUDA, and torch loads its own libraries where the linker does not look.
using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);
inline CurrentStream current_stream() {
  static const CurrentStream found = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(found != nullptr, "this torch has no aoti_torch_get_current_cuda_stream in a loaded libtorch_cuda.so");
  return found;
}
#endif

}  // namespace detail

// The device and the current stream of an op's tensors. Name every tensor whose memory a kernel touches: all must be on one
// device.
class Queue {
 public:
  explicit Queue(std::initializer_list<Tensor> tensors)
      : index_(tensors.begin()->get_device_index())
#ifndef RMM_SIMULATED
        ,
        guard_(index_)
#endif
  {
    for (const Tensor& tensor : tensors) touches(tensor);
  }

  // A tensor that was allocated after this object.
  void touches(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.get_device_index() == index_, "tensors of one op must be on one device");
#ifdef RMM_SIMULATED
    if (tensor.numel() == 0) return;
    size_t span = 1;
    for (int64_t axis = 0; axis < tensor.dim(); ++axis) span += (tensor.size(axis) - 1) * tensor.stride(axis);
    const size_t size = tensor.element_size();
    const char* const low = static_cast<const char*>(tensor.data_ptr());
    regions_.push_back({low, span * size, low - tensor.storage_offset() * size});
#endif
  }

  Device device() const {
#ifdef RMM_SIMULATED
    return detail::device;
#else
    int major = 0, minor = 0, shared = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index_);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index_);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index_);
    STD_TORCH_CHECK(error == cudaSuccess, detail::explain(error));
    return {detail::built_for(10 * major + minor), shared};
#endif
  }

  // Runs kernel(arguments...) on the current stream; nothing at all where the grid is empty.
  template <class... Parameters, class... Arguments>
  void launch(const Grid& grid, void (*kernel)(Parameters...), const Arguments&... arguments) const {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments), "as many arguments as the kernel has parameters");
    if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
    pass(grid, reinterpret_cast<const void*>(kernel), static_cast<Parameters>(arguments)...);
  }

 private:
  template <class... Parameters>
  void pass(const Grid& grid, const void* kernel, const Parameters&... parameters) const {
    const void* values[] = {&parameters...};
#ifdef RMM_SIMULATED
    const size_t sizes[] = {sizeof parameters...};
    const unsigned shape[] = {grid.blocks.x,  grid.blocks.y,  grid.blocks.z, grid.threads.x,
                              grid.threads.y, grid.threads.z, grid.cluster,  grid.dependent};
    char error[2048] = "no simulator";
    const bool done = detail::callback != nullptr &&
                      detail::callback(kernel, shape, grid.shared_bytes, values, sizes, sizeof...(parameters), regions_.data(),
                                       static_cast<int>(regions_.size()), error, sizeof error) == 0;
    STD_TORCH_CHECK(done, error);
#else
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(detail::current_stream()(index_, &stream));
    cudaError_t error = cudaSuccess;
    if (grid.shared_bytes > 48 * 1024) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes));
    }
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = grid.blocks;
    config.blockDim = grid.threads;
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    if (grid.cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs].val.clusterDim.x = attributes[config.numAttrs].val.clusterDim.z = 1;
      attributes[config.numAttrs].val.clusterDim.y = grid.cluster;
      ++config.numAttrs;
    }
    if (grid.dependent) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
      ++config.numAttrs;
    }
    if (error == cudaSuccess) error = cudaLaunchKernelExC(&config, kernel, const_cast<void**>(values));
    if (error != cudaSuccess) {
      (void)cudaGetLastError();  // not for the next caller to find
      STD_TORCH_CHECK(false, detail::explain(error));
    }
#endif
  }

  int32_t index_;
#ifdef RMM_SIMULATED
  std::vector<detail::Region> regions_;
#else
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace rmm

// Registers `function` as this backend's kernel of `op`, and as what serves CUDA tensors by default.
#ifdef RMM_SIMULATED
#define RMM_CUDA_OP(op, function) \
  STABLE_TORCH_LIBRARY_IMPL(rmm_kernels, CPU, m) { m.impl(op ".cuda", TORCH_BOX(&function)); }
#else
#define RMM_CUDA_OP(op, function)                   \
  STABLE_TORCH_LIBRARY_IMPL(rmm_kernels, CUDA, m) { \
    m.impl(op, TORCH_BOX(&function));               \
    m.impl(op ".cuda", TORCH_BOX(&function));       \
  }
#endif
