// What csrc/cuda/*.cu use of CUDA's, c10's and ATen's headers, on the host: launches run in the shim, cuBLAS is at::mm.
#pragma once

#include "cuda_shim.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <mutex>

#define C10_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)
#define C10_CUDA_CHECK(call) static_cast<void>(call)

using cudaStream_t = void*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace cuda_host {

constexpr int kMultiprocessors = 3;  // few, so that loops over the grid turn
constexpr size_t kShared = 48 * 1024, kMostShared = 227 * 1024;
inline size_t allowed_shared = kShared;
inline std::mutex mutex;

// kernel<<<grid, threads, shared, stream>>>: what takes the arguments. A launch that a device would refuse ends the program.
template <typename F>
auto configure(const char* name, dim3 grid, dim3 threads, size_t shared_bytes, cudaStream_t, F kernel) {
  return [=](const auto&... arguments) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (shared_bytes > allowed_shared) shim::fail(("more shared memory than it asked for: " + std::string(name)).c_str());
    allowed_shared = kShared;
    shim::order = static_cast<shim::Order>((static_cast<int>(shim::order) + 1) % 4);
    shim::launch(kernel, grid, threads, shared_bytes, arguments...);
  };
}

}  // namespace cuda_host

inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = cuda_host::kMultiprocessors, 0; }
template <typename F>
int cudaFuncSetAttribute(F, cudaFuncAttribute, int bytes) {
  if (static_cast<size_t>(bytes) > cuda_host::kMostShared) shim::fail("more shared memory than a device has");
  cuda_host::allowed_shared = bytes;
  return 0;
}

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
  ~CUDAGuard() {}  // as the guard it stands for: not trivial, so never "unused"
};
struct CUDAStream {
  operator cudaStream_t() const { return nullptr; }
};
inline CUDAStream getCurrentCUDAStream() { return {}; }

}  // namespace c10::cuda

// Below autograd and autocast, as these are on the GPU.
namespace at::cuda {

struct Below {
  AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};
inline Tensor& mm_out(Tensor& out, const Tensor& a, const Tensor& b) {
  const Below below;
  return at::mm_out(out, a, b);
}
inline Tensor& mm_out(Tensor& out, const Tensor& a, const Tensor& b, ScalarType dtype) {
  const Below below;
  return at::mm_out(out, a.to(dtype), b.to(dtype));
}
inline Tensor& addmm_out(Tensor& out, const Tensor& sum, const Tensor& a, const Tensor& b) {
  const Below below;
  return at::addmm_out(out, sum, a, b);
}
inline Tensor& addmm_out(Tensor& out, const Tensor& sum, const Tensor& a, const Tensor& b, ScalarType dtype) {
  const Below below;
  return at::addmm_out(out, sum, a.to(dtype), b.to(dtype));
}

}  // namespace at::cuda
