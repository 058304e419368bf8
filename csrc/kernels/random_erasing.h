// Which boxes of which images are erased, and what fills them: the draws of random erasing and Cutout.
#pragma once

#include "kernels/batch_mix.h"
#include "kernels/random.h"

namespace pyrx {

enum EraseKind : int64_t { kRandomErasing = 0, kCutout = 1 };
enum EraseMode : int64_t { kConst = 0, kRand = 1, kPixel = 2 };

constexpr int kEraseAttempts = 10;
constexpr int64_t kMostBoxes = 64, kMostEraseChannels = 64;

// Counter word 2: of draws, the event and the count, then an attempt each of a box each; of noise.
constexpr uint32_t kEraseDraw = 256, kChannelNoise = 0xFFFFFFFEu, kPixelNoise = 0xFFFFFFFFu;

// Of one call.
struct EraseDraw {
  int64_t samples, height, width;
  int64_t kind, prob;  // prob out of 65536
  int64_t min_count, max_count;
  double min_scale, max_scale;  // of the area; Cutout: both are the side's share of the shorter edge
  double min_ratio, max_ratio;  // height over width
  int64_t num_splits;           // above 1: the first samples / num_splits are left alone
  bool per_sample;

  PYRX_HOST_DEVICE bool is_erased(int64_t sample) const { return num_splits < 2 || sample >= samples / num_splits; }
  // Of a sample: the batch's one draw or its own.
  PYRX_HOST_DEVICE uint64_t index(int64_t sample) const { return per_sample ? static_cast<uint64_t>(sample) : 0; }
};

// (word + 1/2) / 2^32
PYRX_HOST_DEVICE double uniform(uint32_t word) { return (static_cast<double>(word) + 0.5) * 0x1p-32; }

PYRX_HOST_DEVICE int64_t round_half_up(double x) { return static_cast<int64_t>(x + 0.5); }

// How many boxes a sample has, 0 where it stays as it is.
PYRX_HOST_DEVICE int64_t erase_count(uint64_t seed, int64_t sample, const EraseDraw& draw) {
  const PhiloxWords words = philox(seed, draw.index(sample), kEraseDraw, kDrawDomain);
  if (!draw.is_erased(sample) || !happens(words.w[0], draw.prob)) return 0;
  return draw.min_count + below(words.w[1], draw.max_count - draw.min_count + 1);
}

// Zhong et al. 2020: a share of the area and a log-uniform ratio, until the box is smaller than the image; empty if it never is.
PYRX_HOST_DEVICE Box random_erasing_box(uint64_t seed, uint64_t index, int64_t box, int64_t count, const EraseDraw& draw) {
  const double least = log_positive(draw.min_ratio), most = log_positive(draw.max_ratio);
  const double area = mul(static_cast<double>(draw.height), static_cast<double>(draw.width)) / static_cast<double>(count);
  for (int attempt = 0; attempt < kEraseAttempts; ++attempt) {
    const uint32_t sample = kEraseDraw + 1 + static_cast<uint32_t>(box * kEraseAttempts + attempt);
    const PhiloxWords words = philox(seed, index, sample, kDrawDomain);
    const double share = draw.min_scale + mul(draw.max_scale - draw.min_scale, uniform(words.w[0]));
    const double log_ratio = least + mul(most - least, uniform(words.w[1]));
    const double lesser = exp_negative(log_ratio < 0 ? log_ratio : -log_ratio);
    const double shorter = std::sqrt(mul(mul(share, area), lesser)), longer = std::sqrt(mul(share, area) / lesser);
    const int64_t height = round_half_up(log_ratio < 0 ? shorter : longer);
    const int64_t width = round_half_up(log_ratio < 0 ? longer : shorter);
    if (height < draw.height && width < draw.width) {
      const int64_t y0 = below(words.w[2], draw.height - height + 1), x0 = below(words.w[3], draw.width - width + 1);
      return {y0, x0, y0 + height, x0 + width};
    }
  }
  return {0, 0, 0, 0};
}

// DeVries and Taylor 2017: a square around a uniform centre, clipped at the edges.
PYRX_HOST_DEVICE Box cutout_box(uint64_t seed, uint64_t index, int64_t box, const EraseDraw& draw) {
  const PhiloxWords words =
      philox(seed, index, kEraseDraw + 1 + static_cast<uint32_t>(box * kEraseAttempts), kDrawDomain);
  const int64_t shorter = draw.height < draw.width ? draw.height : draw.width;
  const int64_t side = static_cast<int64_t>(mul(draw.min_scale, static_cast<double>(shorter)));
  const int64_t y = below(words.w[0], draw.height) - side / 2, x = below(words.w[1], draw.width) - side / 2;
  return {clip(y, 0, draw.height), clip(x, 0, draw.width), clip(y + side, 0, draw.height), clip(x + side, 0, draw.width)};
}

// Box `box` of max_count; later boxes lie over earlier ones.
PYRX_HOST_DEVICE Box draw_box(uint64_t seed, int64_t sample, int64_t box, const EraseDraw& draw) {
  const int64_t count = erase_count(seed, sample, draw);
  if (box >= count) return {0, 0, 0, 0};
  const uint64_t index = draw.index(sample);
  return draw.kind == kCutout ? cutout_box(seed, index, box, draw) : random_erasing_box(seed, index, box, count, draw);
}

// What fills one channel of a box, in mode kRand; `boxes` a sample.
PYRX_HOST_DEVICE float channel_noise(uint64_t seed, int64_t sample, int64_t box, int64_t channel, int64_t boxes,
                                     int64_t channels, const EraseDraw& draw) {
  const uint64_t row = draw.index(sample) * static_cast<uint64_t>(boxes) + static_cast<uint64_t>(box);
  return normal(seed, row * static_cast<uint64_t>(channels) + static_cast<uint64_t>(channel), kChannelNoise);
}

}  // namespace pyrx
