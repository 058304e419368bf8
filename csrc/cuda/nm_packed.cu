// Compressed N:M weights on the GPU. Products are the library's, of the dense weight.
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "cuda/launch.h"
#include "cuda/nm_packed.cuh"
#include "nm_packed_checks.h"

namespace pyrx::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor> nm_compress(const at::Tensor& weight, const at::Tensor& bits, int64_t n, int64_t m) {
  check_nm_compress(weight, bits, n, m);
  const c10::cuda::CUDAGuard guard(weight.device());
  const at::Tensor w = weight.contiguous(), mask = bits.contiguous();
  const at::Tensor values = at::empty(regrouped(w.sizes(), m, n), w.options());
  const at::Tensor indices = at::empty(values.sizes(), w.options().dtype(at::kByte));
  if (w.numel() == 0) return {values, indices};
  dispatch(w.scalar_type(), [&](auto type) {
    using T = decltype(type);
    nm_compress_kernel<<<blocks_for(w.numel(), kPackedThreads), kPackedThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        data<T>(w), data<uint8_t>(mask), w.numel() / m, w.size(-1) / m, mask.size(-1), static_cast<int>(n),
        static_cast<int>(m), mutable_data<T>(values), mutable_data<uint8_t>(indices));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {values, indices};
}

at::Tensor decompressed(const at::Tensor& values, const at::Tensor& indices, int64_t n, int64_t m) {
  const at::Tensor v = values.contiguous(), places = indices.contiguous();
  const at::Tensor out = at::empty(regrouped(v.sizes(), n, m), v.options());
  if (out.numel() == 0) return out;
  const int64_t groups = v.numel() / n;
  dispatch(v.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* to = mutable_data<T>(out);
    const unsigned blocks = blocks_for(groups, packed_tile_groups(static_cast<int>(m)));
    nm_decompress_kernel<<<blocks, kPackedThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        data<T>(v), data<uint8_t>(places), groups, static_cast<int>(n), static_cast<int>(m), is_aligned(to), to);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

at::Tensor nm_decompress(const at::Tensor& values, const at::Tensor& indices, int64_t n, int64_t m) {
  check_packed_weight("nm_decompress", values, indices, n, m);
  const c10::cuda::CUDAGuard guard(values.device());
  return decompressed(values, indices, n, m);
}

at::Tensor nm_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                     const std::optional<at::Tensor>& bias, int64_t n, int64_t m) {
  check_nm_linear(x, values, indices, bias, n, m);
  const c10::cuda::CUDAGuard guard(values.device());
  return at::linear(x, decompressed(values, indices, n, m), bias);
}

TORCH_LIBRARY_IMPL(pyrx, CUDA, m) {
  m.impl("nm_compress", &nm_compress);
  m.impl("nm_decompress", &nm_decompress);
  m.impl("nm_linear", &nm_linear);
}

}  // namespace
}  // namespace pyrx::cuda
