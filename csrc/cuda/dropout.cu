// Dropout and its masks on the GPU.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cuda/dropout.cuh"
#include "cuda/launch.h"
#include "head_checks.h"

namespace pyrx::cuda {
namespace {

at::Tensor dropout_mask(const at::Tensor& seed, at::IntArrayRef shape, int64_t threshold, int64_t sample,
                        bool antithetic, bool packed) {
  check_seed("dropout_mask", seed, seed.device());
  check_mask("dropout_mask", threshold, sample);
  check_packed("dropout_mask", shape, packed);
  const c10::cuda::CUDAGuard guard(seed.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const SampleMask mask = sample_mask(sample, threshold, antithetic);
  std::vector<int64_t> sizes = shape.vec();
  if (packed) sizes.back() = ceil_div(shape.back(), 8);
  const at::Tensor out = at::empty(sizes, seed.options().dtype(packed ? at::kByte : at::kBool));
  if (out.numel() == 0) return out;
  const int64_t* seed_at = seed.const_data_ptr<int64_t>();
  uint8_t* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  if (packed) {
    packed_mask_kernel<<<blocks_for(out.numel(), kDropoutThreads), kDropoutThreads, 0, stream>>>(
        to, seed_at, out.numel() / sizes.back(), shape.back(), mask);
  } else {
    mask_kernel<<<blocks_for(ceil_div(out.numel(), kGroup), kDropoutThreads), kDropoutThreads, 0, stream>>>(
        to, seed_at, out.numel(), mask);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

at::Tensor dropout(const at::Tensor& input, const at::Tensor& seed, int64_t threshold, int64_t sample) {
  check_float("dropout", "input", input);
  check_seed("dropout", seed, input.device());
  check_mask("dropout", threshold, sample);
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor x = input.contiguous();
  const at::Tensor out = at::empty_like(input), y = contiguous_target(out);
  if (x.numel() == 0) return out;
  const unsigned blocks = blocks_for(ceil_div(x.numel(), kGroup), kDropoutThreads * kDropoutGroups);
  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(y);
    dropout_kernel<<<blocks, kDropoutThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        from, to, seed.const_data_ptr<int64_t>(), x.numel(), sample_mask(sample, threshold, false),
        is_aligned(from) && is_aligned(to));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return finish(y, out);
}

TORCH_LIBRARY_IMPL(pyrx, CUDA, m) {
  m.impl("dropout_mask", &dropout_mask);
  m.impl("dropout", &dropout);
}

}  // namespace
}  // namespace pyrx::cuda
