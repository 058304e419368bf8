// Noise weighed by a mask, and the mask's gradient, on the CPU.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu/elements.h"
#include "cpu/pages.h"
#include "noise_checks.h"

namespace pyrx::cpu {
namespace {

constexpr int64_t kPixels = 4096;  // of a task, of every channel

// f(sample, first pixel, pixels, scratch for their normals) over the threads.
template <typename F>
void for_pixels(const NoiseShape& shape, F f) {
  const int64_t chunks = (shape.pixels + kPixels - 1) / kPixels;
  at::parallel_for(0, shape.samples * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(normals_scratch(kPixels));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * kPixels;
      f(i / chunks, first, std::min(kPixels, shape.pixels - first), scratch.data());
    }
  });
}

at::Tensor noise_mask(const at::Tensor& images, const at::Tensor& mask, const at::Tensor& seed, double std, double mean,
                      int64_t sample) {
  const Noise noise = check_noise("noise_mask", images, "images", seed, std, mean, sample);
  check_noise_mask(images, mask);
  const NoiseShape shape = noise_shape(images.sizes(), mask.size(1) == 1);
  const at::Tensor x = images.contiguous(), weight = mask.contiguous();
  const at::Tensor out = at::empty_like(images), y = contiguous_target(out);
  use_huge_pages(y);
  const uint64_t key = seed_value(seed);
  dispatch_storage(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    const T* by = static_cast<const T*>(weight.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    for_pixels(shape, [&](int64_t n, int64_t first, int64_t count, float* scratch) {
      for (int64_t c = 0; c < shape.channels; ++c) {
        const int64_t at = (n * shape.channels + c) * shape.pixels + first;
        const float* drawn = normals(key, noise.sample, static_cast<uint64_t>(at), count, scratch);
        noise_kernels<T>().add(from + at, by + (shape.broadcast ? n * shape.pixels + first : at), drawn, noise, count, to + at);
      }
    });
  });
  return finish(y, out);
}

at::Tensor noise_mask_backward(const at::Tensor& grad, const at::Tensor& seed, bool broadcast, double std, double mean,
                               int64_t sample) {
  const Noise noise = check_noise("noise_mask_backward", grad, "grad", seed, std, mean, sample);
  const NoiseShape shape = noise_shape(grad.sizes(), broadcast);
  auto sizes = grad.sizes().vec();
  if (broadcast) sizes[1] = 1;
  const at::Tensor upstream = grad.contiguous(), out = at::empty(sizes, grad.options());
  use_huge_pages(out);
  const uint64_t key = seed_value(seed);
  dispatch_storage(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using Acc = accumulate_t<T>;
    const T* from = static_cast<const T*>(upstream.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const int64_t summed = shape.broadcast ? shape.channels : 1, rows = shape.broadcast ? 1 : shape.channels;
    for_pixels(shape, [&](int64_t n, int64_t first, int64_t count, float* scratch) {
      std::vector<Acc> sum(count);
      for (int64_t row = 0; row < rows; ++row) {
        std::fill(sum.begin(), sum.end(), Acc(0));
        for (int64_t c = row; c < row + summed; ++c) {
          const int64_t at = (n * shape.channels + c) * shape.pixels + first;
          const float* drawn = normals(key, noise.sample, static_cast<uint64_t>(at), count, scratch);
          noise_kernels<T>().accumulate(from + at, drawn, noise, count, sum.data());
        }
        element_kernels<T>().store(sum.data(), count, Acc(1), to + (n * rows + row) * shape.pixels + first);
      }
    });
  });
  return out;
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) {
  m.impl("noise_mask", &noise_mask);
  m.impl("noise_mask_backward", &noise_mask_backward);
}

}  // namespace
}  // namespace pyrx::cpu
