// Which patches of an image masked image modelling hides.
//
// Every patch has a key, no two the same, and the `masked` patches of the largest keys are masked. Keys are random
// under a leading bit that is set on the patches in block masking's rectangles, or on hard patch mining's hardest.
#pragma once

#include "kernels/random.h"

namespace pyrx {

enum PatchMethod : int64_t { kRandomPatches = 0, kBlockPatches = 1, kHardPatches = 2 };

// Of one call.
struct PatchDraw {
  int64_t samples, height, width;  // patches of a sample in rows and columns
  int64_t masked;                  // of each sample, exactly
  int64_t hard;                    // of those, how many are the ones of the highest losses
  int64_t min_block;               // patches of a rectangle
  double log_aspect;               // of the narrowest rectangle, at most 0

  PYRX_HOST_DEVICE int64_t size() const { return height * width; }
};

constexpr int kPatchGroup = 4;            // patches that share a Philox call
constexpr int64_t kMostPatches = int64_t(1) << 31;
constexpr uint64_t kFirst = uint64_t(1) << 63;  // set on a key: masked before those without
constexpr int kBlockTries = 10;           // of a rectangle, after which random patches are masked
constexpr int kBlockDraws = 128;          // of all of a sample's rectangles
constexpr uint32_t kBlockCounter = uint32_t(1) << 31;

// The words of patches 4 * group .. 4 * group + 3 of a sample.
PYRX_HOST_DEVICE PhiloxWords patch_words(uint64_t seed, int64_t sample, int64_t group) {
  return philox(seed, static_cast<uint64_t>(sample), static_cast<uint32_t>(group), kPatchDomain);
}

// Bits 62 .. 31 the word, below them the patch.
PYRX_HOST_DEVICE uint64_t patch_key(uint32_t word, int64_t patch) {
  return static_cast<uint64_t>(word) << 31 | static_cast<uint64_t>(patch);
}

// The larger the loss the larger the key, NaN above all; of equal losses that of the lower patch is the larger.
PYRX_HOST_DEVICE uint64_t loss_key(float loss, int64_t patch) {
  uint32_t bits;
  std::memcpy(&bits, &loss, sizeof(bits));
  if (bits == 0x80000000u) bits = 0;  // -0 equals 0
  uint32_t order = bits >> 31 ? ~bits : bits | 0x80000000u;
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) order = ~uint32_t(0);
  return static_cast<uint64_t>(order) << 31 | static_cast<uint64_t>(kMostPatches - 1 - patch);
}

// Patches [y0, y1) x [x0, x1) of the grid; empty where the draw does not fit.
struct PatchBlock {
  int64_t y0, x0, y1, x1;

  PYRX_HOST_DEVICE int64_t area() const { return (y1 - y0) * (x1 - x0); }
};

// Rectangle `index` of a sample (Bao et al. 2022, algorithm 1), `left` patches still to be masked: its area is uniform
// between min_block and left, its aspect log-uniform between min_aspect and 1 / min_aspect, its place uniform.
PYRX_HOST_DEVICE PatchBlock draw_block(uint64_t seed, int64_t sample, int index, int64_t left, const PatchDraw& draw) {
  const PhiloxWords words = philox(seed, static_cast<uint64_t>(sample), kBlockCounter + index, kPatchDomain);
  const double u = (static_cast<double>(words.w[0]) + 0.5) * 0x1p-32;
  const double v = (static_cast<double>(words.w[1] & 0x7FFFFFFFu) + 0.5) * 0x1p-31;
  const double area = static_cast<double>(draw.min_block) + mul(static_cast<double>(left - draw.min_block), u);
  const double aspect = exp_negative(mul(draw.log_aspect, v));
  const int64_t shorter = static_cast<int64_t>(std::sqrt(mul(area, aspect)) + 0.5);
  const int64_t longer = static_cast<int64_t>(std::sqrt(area / aspect) + 0.5);
  const bool tall = words.w[1] >> 31;
  const int64_t height = tall ? longer : shorter, width = tall ? shorter : longer;
  if (height > draw.height || width > draw.width) return {0, 0, 0, 0};
  const int64_t y0 = below(words.w[2], draw.height - height + 1), x0 = below(words.w[3], draw.width - width + 1);
  return {y0, x0, y0 + height, x0 + width};
}

// The grid as bits, a row in whole words.
constexpr int kPatchWord = 32;
PYRX_HOST_DEVICE int64_t row_words(const PatchDraw& draw) { return (draw.width + kPatchWord - 1) / kPatchWord; }

// The block's columns in word `word` of each of its rows.
PYRX_HOST_DEVICE uint32_t block_bits(const PatchBlock& block, int64_t word) {
  const int64_t first = word * kPatchWord, end = first + kPatchWord;
  const int from = static_cast<int>(block.x0 > first ? block.x0 - first : 0);
  const int to = static_cast<int>(block.x1 < end ? block.x1 - first : kPatchWord);
  return from < to ? ~uint32_t(0) >> (kPatchWord - (to - from)) << from : 0;
}

// Draws the rectangles of a sample. fresh(block) counts its patches that no rectangle before has, mark(block) adds it.
// A rectangle is taken if it has fresh patches, and no more than are still to be masked.
template <typename Fresh, typename Mark>
PYRX_HOST_DEVICE void draw_blocks(uint64_t seed, int64_t sample, const PatchDraw& draw, Fresh fresh, Mark mark) {
  int64_t left = draw.masked;
  for (int index = 0, tries = 0; left > 0 && tries < kBlockTries && index < kBlockDraws; ++index, ++tries) {
    const PatchBlock block = draw_block(seed, sample, index, left, draw);
    const int64_t count = block.area() > 0 ? fresh(block) : 0;
    if (count == 0 || count > left) continue;
    mark(block);
    left -= count;
    tries = -1;
  }
}

}  // namespace pyrx
