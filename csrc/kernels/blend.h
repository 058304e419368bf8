// Alpha compositing, alpha * x + (1 - alpha) * y: where the operands lie, and the arithmetic of one element.
#pragma once

#include "kernels/random.h"

namespace pyrx {

// Alpha lies in rows of `pixels`, one for each sample, channel and frame that has alphas of its own. An alpha weighs
// `group` elements side by side (the channels of a channels_last pixel) in each of `repeat` planes (else).
// x and y are dense within a sample, results altogether.
struct BlendLayout {
  int64_t samples, channels, frames, pixels;
  int64_t group, repeat;  // one of them is 1; both are where channels is not
  int64_t x_sample, y_sample, alpha_sample, alpha_channel, alpha_frame;  // strides

  PYRX_HOST_DEVICE int64_t rows() const { return samples * channels * frames; }
  PYRX_HOST_DEVICE int64_t row() const { return pixels * group; }
  PYRX_HOST_DEVICE int64_t plane() const { return frames * row(); }
  PYRX_HOST_DEVICE int64_t sample() const { return channels * repeat * plane(); }
};

struct BlendRow {
  int64_t sample;
  int64_t inside;  // offset in a sample of x, y and the result
  int64_t alpha;   // offset in alpha
};

PYRX_HOST_DEVICE BlendRow blend_row(const BlendLayout& layout, int64_t row) {
  int64_t frame = 0, channel = 0;
  if (layout.frames > 1) {
    frame = row % layout.frames;
    row /= layout.frames;
  }
  if (layout.channels > 1) {
    channel = row % layout.channels;
    row /= layout.channels;
  }
  return {row, channel * layout.plane() + frame * layout.row(),
          row * layout.alpha_sample + channel * layout.alpha_channel + frame * layout.alpha_frame};
}

template <typename A>
PYRX_HOST_DEVICE A blended(A x, A y, A alpha) { return mul(alpha, x) + mul(1 - alpha, y); }

// What a weight lets through of a gradient: of NaN and infinity nothing where it is 0.
template <typename A>
PYRX_HOST_DEVICE A weighed(A gradient, A weight) { return weight == 0 ? A(0) : mul(weight, gradient); }

// The nearest of 0 .. 255, halves to even; NaN is 0.
PYRX_HOST_DEVICE uint8_t to_byte(float x) { return x > 0 ? static_cast<uint8_t>(std::rint(x < 255 ? x : 255.0f)) : 0; }

}  // namespace pyrx
