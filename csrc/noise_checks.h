// The checks of noise_mask's arguments, shared by the CPU and CUDA entries, with the texts of pyrx/ops/noise_mask.py.
#pragma once

#include <cmath>

#include "kernels/noise_mask.h"
#include "tensor_checks.h"

namespace pyrx {

inline Noise check_noise(std::string_view op, const at::Tensor& images, std::string_view name, const at::Tensor& seed,
                         double std, double mean, int64_t sample) {
  check_float(op, name, images);
  PYRX_CHECK_VALUE(images.dim() >= 3, op, name, "of shape [N, C, ..., W]", images.sizes());
  check_seed(op, seed, images.device());
  PYRX_CHECK_VALUE(std >= 0 && std::isfinite(std), op, "std", "finite and at least 0", std);
  PYRX_CHECK_VALUE(std::isfinite(mean), op, "mean", "finite", mean);
  PYRX_CHECK_VALUE(sample >= 0 && sample <= 0xFFFFFFFFll, op, "sample", "in [0, 4294967295]", sample);
  return {static_cast<float>(std), static_cast<float>(mean), static_cast<uint32_t>(sample)};
}

inline void check_noise_mask(const at::Tensor& images, const at::Tensor& mask) {
  constexpr std::string_view op = "noise_mask";
  check_dtype(op, "mask", mask, images.scalar_type());
  auto one = images.sizes().vec();
  one[1] = 1;
  PYRX_CHECK_VALUE(mask.sizes() == images.sizes() || mask.sizes() == at::IntArrayRef(one), op, "mask",
                   "of shape [N, 1 or C, ...] with [N, C, ...] = " + text(images.sizes()), mask.sizes());
  check_device(op, "mask", mask, images.device());
}

// images (N, C, S), mask (N, C or 1, S)
struct NoiseShape {
  int64_t samples, channels, pixels;
  bool broadcast;  // one channel of mask for all
};

inline NoiseShape noise_shape(at::IntArrayRef images, bool broadcast) {
  int64_t pixels = 1;
  for (size_t i = 2; i < images.size(); ++i) pixels *= images[i];
  return {images[0], images[1], pixels, broadcast && images[1] != 1};
}

}  // namespace pyrx
