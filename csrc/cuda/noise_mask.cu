// Noise weighed by a mask, and the mask's gradient, on the GPU.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cuda/launch.h"
#include "cuda/noise_mask.cuh"
#include "noise_checks.h"

namespace pyrx::cuda {
namespace {

at::Tensor noise_mask(const at::Tensor& images, const at::Tensor& mask, const at::Tensor& seed, double std, double mean,
                      int64_t sample) {
  const Noise noise = check_noise("noise_mask", images, "images", seed, std, mean, sample);
  check_noise_mask(images, mask);
  const c10::cuda::CUDAGuard guard(images.device());
  const NoiseShape shape = noise_shape(images.sizes(), mask.size(1) == 1);
  const at::Tensor x = images.contiguous(), weight = mask.contiguous();
  const at::Tensor out = at::empty_like(images), y = contiguous_target(out);
  if (x.numel() == 0) return out;
  const unsigned blocks = blocks_for(ceil_div(x.numel(), 4), kNoiseThreads);
  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T *from = data<T>(x), *by = data<T>(weight);
    T* to = mutable_data<T>(y);
    noise_mask_kernel<<<blocks, kNoiseThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        from, by, to, seed.const_data_ptr<int64_t>(), x.numel(), shape.channels, shape.pixels, shape.broadcast, noise,
        is_aligned(from) && is_aligned(by) && is_aligned(to));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return finish(y, out);
}

at::Tensor noise_mask_backward(const at::Tensor& grad, const at::Tensor& seed, bool broadcast, double std, double mean,
                               int64_t sample) {
  const Noise noise = check_noise("noise_mask_backward", grad, "grad", seed, std, mean, sample);
  const c10::cuda::CUDAGuard guard(grad.device());
  const NoiseShape shape = noise_shape(grad.sizes(), broadcast);
  auto sizes = grad.sizes().vec();
  if (broadcast) sizes[1] = 1;
  const at::Tensor upstream = grad.contiguous(), out = at::empty(sizes, grad.options());
  if (out.numel() == 0) return out;
  const int64_t summed = broadcast ? shape.channels : 1, planes = out.numel() / shape.pixels;
  const unsigned blocks = blocks_for(planes * ceil_div(shape.pixels, 4), kNoiseThreads);
  dispatch(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(upstream);
    T* to = mutable_data<T>(out);
    noise_mask_backward_kernel<<<blocks, kNoiseThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        from, to, seed.const_data_ptr<int64_t>(), planes, summed, shape.pixels, noise, is_aligned(from) && is_aligned(to));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

TORCH_LIBRARY_IMPL(pyrx, CUDA, m) {
  m.impl("noise_mask", &noise_mask);
  m.impl("noise_mask_backward", &noise_mask_backward);
}

}  // namespace
}  // namespace pyrx::cuda
