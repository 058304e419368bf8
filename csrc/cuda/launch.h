// From tensors to launches: element types, grids. Host code of the .cu files.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "layout.h"

namespace pyrx::cuda {

constexpr int64_t kMostGrid = (int64_t(1) << 31) - 1;  // blocks along x

// Calls f with a value of the device's type for dtype, which check_float has passed.
template <typename F>
void dispatch(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kHalf: return f(__half());
    case at::kBFloat16: return f(__nv_bfloat16());
    case at::kDouble: return f(double());
    default: return f(float());
  }
}

template <typename T>
const T* data(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}

template <typename T>
T* mutable_data(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

// Null is aligned.
inline bool is_aligned(const void* pointer, size_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int multiprocessors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Blocks of a grid-stride kernel: enough to fill the device.
inline unsigned blocks_for(int64_t items, int64_t items_a_block) {
  return static_cast<unsigned>(std::min<int64_t>(ceil_div(items, items_a_block), 8 * multiprocessors()));
}

}  // namespace pyrx::cuda
