// Which images mix, where and how much: the draws of CutMix, mixup and ResizeMix.
#pragma once

#include "kernels/random.h"

namespace pyrx {

// Which draw a sample uses: the batch's one, its pair's, its own.
enum Granularity : int64_t { kPerBatch = 0, kPerPair = 1, kPerSample = 2 };
enum Pairing : int64_t { kFlip = 0, kRoll = 1, kRandom = 2, kGiven = 3 };
// Mixup weighs pixels by lam; CutMix pastes a box; ResizeMix pastes the whole partner, made as small as the box.
enum MixKind : int64_t { kMixup = 0, kCutmix = 1, kResizemix = 2, kEither = 3 };

// Of one call.
struct MixDraw {
  int64_t samples, height, width;
  int64_t kind, granularity;
  int64_t prob, switch_prob;  // out of 65536: that a sample is mixed at all, that it is CutMix where both can be
  double mixup_alpha, cutmix_alpha;
  double minimum, maximum;  // side lengths as shares of the image, where maximum > 0: CutMix's minmax, ResizeMix's scale
  bool correct_lam;
};

// Pixels [y0, y1) x [x0, x1).
struct Box {
  int64_t y0, x0, y1, x1;

  PYRX_HOST_DEVICE int64_t area() const { return (y1 - y0) * (x1 - x0); }
};

// Of one sample: inside the box the partner's pixel, elsewhere weight * own + (1 - weight) * partner's.
struct Mix {
  float lam;     // of the sample's own label
  float weight;  // of the sample's own pixels
  Box box;
};

// The box of a mixed pixel-by-pixel sample, which has none, as it is told to the caller.
constexpr Box kNoBox{-1, -1, -1, -1};

PYRX_HOST_DEVICE float corrected_lam(const Box& box, const MixDraw& draw) {
  const double area = static_cast<double>(box.area());
  return area == 0 ? 1.0f : static_cast<float>(1 - area / (static_cast<double>(draw.height) * draw.width));
}

PYRX_HOST_DEVICE int64_t clip(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// CutMix's (Yun et al. 2019, equation 2): sides sqrt(1 - lam) of the image's, a uniform centre, clipped at the edges.
PYRX_HOST_DEVICE Box cutmix_box(float lam, uint32_t y, uint32_t x, const MixDraw& draw) {
  const double ratio = std::sqrt(1 - static_cast<double>(lam));
  const int64_t half_height = static_cast<int64_t>(mul(ratio, static_cast<double>(draw.height))) / 2;
  const int64_t half_width = static_cast<int64_t>(mul(ratio, static_cast<double>(draw.width))) / 2;
  const int64_t cy = below(y, draw.height), cx = below(x, draw.width);
  return {clip(cy - half_height, 0, draw.height), clip(cx - half_width, 0, draw.width),
          clip(cy + half_height, 0, draw.height), clip(cx + half_width, 0, draw.width)};
}

// Sides uniform in [minimum, maximum) of the image's, placed uniformly inside it.
PYRX_HOST_DEVICE Box minmax_box(const PhiloxWords& sides, uint32_t y, uint32_t x, const MixDraw& draw) {
  const auto side = [&](uint32_t word, int64_t size) {
    const int64_t least = static_cast<int64_t>(mul(draw.minimum, static_cast<double>(size)));
    const int64_t most = static_cast<int64_t>(mul(draw.maximum, static_cast<double>(size)));
    return least + (most > least ? below(word, most - least) : 0);
  };
  const int64_t height = side(sides.w[0], draw.height), width = side(sides.w[1], draw.width);
  const int64_t y0 = below(y, draw.height - height + 1), x0 = below(x, draw.width - width + 1);
  return {y0, x0, y0 + height, x0 + width};
}

// One scale of [minimum, maximum) for both sides, a uniform centre, moved inside (Qin et al. 2020).
PYRX_HOST_DEVICE Box resizemix_box(const PhiloxWords& scale, uint32_t y, uint32_t x, const MixDraw& draw) {
  const double ratio = draw.minimum + mul(draw.maximum - draw.minimum, uniform(scale.w[0], scale.w[1]));
  const auto place = [&](uint32_t word, int64_t size, int64_t& begin, int64_t& end) {
    const int64_t side = clip(static_cast<int64_t>(mul(ratio, static_cast<double>(size))), size > 0 ? 1 : 0, size);
    begin = clip(below(word, size) - side / 2, 0, size - side);
    end = begin + side;
  };
  Box box;
  place(y, draw.height, box.y0, box.y1);
  place(x, draw.width, box.x0, box.x1);
  return box;
}

// Draw `index` of a seed; lam below 0: drawn, else the one given.
PYRX_HOST_DEVICE Mix draw_mix(uint64_t seed, uint64_t index, float lam, const MixDraw& draw) {
  const PhiloxWords words = philox(seed, index, 0, kDrawDomain);
  if (!happens(words.w[0], draw.prob)) return {1, 1, {0, 0, 0, 0}};
  const bool paste = draw.kind != kMixup && (draw.kind != kEither || happens(words.w[3], draw.switch_prob));
  if (!paste) {
    if (lam < 0) lam = static_cast<float>(beta(seed, index, draw.mixup_alpha));
    return {lam, lam, kNoBox};
  }
  if (draw.maximum > 0) {
    const PhiloxWords sides = philox(seed, index, 1, kDrawDomain);
    const Box box = draw.kind == kResizemix ? resizemix_box(sides, words.w[1], words.w[2], draw)
                                            : minmax_box(sides, words.w[1], words.w[2], draw);
    return {corrected_lam(box, draw), 1, box};
  }
  if (lam < 0) lam = static_cast<float>(beta(seed, index, draw.cutmix_alpha));
  const Box box = cutmix_box(lam, words.w[1], words.w[2], draw);
  return {draw.correct_lam ? corrected_lam(box, draw) : lam, 1, box};
}

// The mix of a sample whose box is given, and its lam unless below 0.
PYRX_HOST_DEVICE Mix given_mix(Box box, float lam, const MixDraw& draw) {
  if (box.y0 < 0) return {lam, lam, kNoBox};
  return {lam < 0 ? corrected_lam(box, draw) : lam, 1, box};
}

PYRX_HOST_DEVICE bool is_box(const Box& box, const MixDraw& draw) {
  if (box.y0 == -1 && box.x0 == -1 && box.y1 == -1 && box.x1 == -1) return true;
  return box.y0 >= 0 && box.y0 <= box.y1 && box.y1 <= draw.height && box.x0 >= 0 && box.x0 <= box.x1 &&
         box.x1 <= draw.width;
}

// A random matching joins the samples of ranks 2k and 2k + 1 among keys of 63 bits, which differ in the last 24; of an odd
// number the last stays alone.
constexpr int64_t kMostSamples = int64_t(1) << 24;
PYRX_HOST_DEVICE uint64_t pairing_key(uint64_t seed, int64_t sample) {
  const PhiloxWords words = philox(seed, static_cast<uint64_t>(sample), 0, kPairDomain);
  const uint64_t drawn = (static_cast<uint64_t>(words.w[0]) << 32 | words.w[1]) >> 1;
  return (drawn & ~static_cast<uint64_t>(kMostSamples - 1)) | static_cast<uint64_t>(sample);
}

}  // namespace pyrx
