// Noise that a mask weighs: images + mask * noise.
#pragma once

#include "kernels/random.h"

namespace pyrx {

// N(mean, std) from standard normals.
struct Noise {
  float std, mean;
  uint32_t sample;

  PYRX_HOST_DEVICE float of(float normal) const { return mul(std, normal) + mean; }
};

template <typename A>
PYRX_HOST_DEVICE A add_noise(A image, A mask, float noise) { return image + mul(mask, static_cast<A>(noise)); }

}  // namespace pyrx
