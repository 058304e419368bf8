// Masks for masked image modelling on the CPU: a thread takes whole samples.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <optional>
#include <vector>

#include "cpu/elements.h"
#include "patch_checks.h"

namespace pyrx::cpu {
namespace {

constexpr int kDigit = 8;  // bits of the keys that are counted before any are compared

// f(type) for a checked floating-point dtype.
template <typename F>
void dispatch_losses(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kHalf: return f(c10::Half());
    case at::kBFloat16: return f(c10::BFloat16());
    case at::kDouble: return f(double());
    default: return f(float());
  }
}

// A thread's memory for one sample.
struct Scratch {
  explicit Scratch(const PatchDraw& draw)
      : keys(draw.size()), candidates(draw.size()), order(draw.size()), bits(draw.height * row_words(draw)) {}
  std::vector<uint64_t> keys, candidates, order;
  std::vector<uint32_t> bits;
};

// The count-th largest of the keys, which differ; above all of them where count is 0.
uint64_t nth_largest(const std::vector<uint64_t>& keys, int64_t count, std::vector<uint64_t>& candidates) {
  if (count == 0) return ~uint64_t(0);
  constexpr int kShift = 64 - kDigit;
  int64_t bins[1 << kDigit] = {};
  for (const uint64_t key : keys) ++bins[key >> kShift];
  uint64_t digit = (1 << kDigit) - 1;
  for (; bins[digit] < count; --digit) count -= bins[digit];
  uint64_t* end = candidates.data();
  for (const uint64_t key : keys) {
    *end = key;
    end += key >> kShift == digit;
  }
  uint64_t* nth = candidates.data() + count - 1;
  std::nth_element(candidates.data(), nth, end, std::greater<>());
  return *nth;
}

void draw_keys(uint64_t seed, int64_t sample, std::vector<uint64_t>& keys) {
  const int64_t size = static_cast<int64_t>(keys.size());
  for (int64_t patch = 0; patch < size; patch += kPatchGroup) {
    const PhiloxWords words = patch_words(seed, sample, patch / kPatchGroup);
    const int count = static_cast<int>(std::min<int64_t>(kPatchGroup, size - patch));
    for (int i = 0; i < count; ++i) keys[patch + i] = patch_key(words.w[i], patch + i);
  }
}

// Sets the leading bit of the keys in the sample's rectangles.
void mark_blocks(uint64_t seed, int64_t sample, const PatchDraw& draw, Scratch& scratch) {
  const int64_t words = row_words(draw);
  uint32_t* bits = scratch.bits.data();
  std::fill(scratch.bits.begin(), scratch.bits.end(), 0);
  const auto each_word = [&](const PatchBlock& block, auto f) {
    for (int64_t y = block.y0; y < block.y1; ++y)
      for (int64_t w = block.x0 / kPatchWord; w * kPatchWord < block.x1; ++w)
        f(bits[y * words + w], block_bits(block, w));
  };
  const auto fresh = [&](const PatchBlock& block) {
    int64_t count = 0;
    each_word(block, [&](uint32_t have, uint32_t added) { count += std::popcount(added & ~have); });
    return count;
  };
  const auto mark = [&](const PatchBlock& block) {
    each_word(block, [](uint32_t& have, uint32_t added) { have |= added; });
  };
  draw_blocks(seed, sample, draw, fresh, mark);
  uint64_t* key = scratch.keys.data();
  for (int64_t y = 0; y < draw.height; ++y)
    for (int64_t x = 0; x < draw.width; ++x)
      *key++ |= static_cast<uint64_t>(bits[y * words + x / kPatchWord] >> x % kPatchWord & 1) << 63;
}

// Sets the leading bit of the keys of the highest losses.
template <typename T>
void mark_hard(const T* losses, const PatchDraw& draw, Scratch& scratch) {
  const int64_t size = draw.size();
  for (int64_t i = 0; i < size; ++i) scratch.order[i] = loss_key(static_cast<float>(losses[i]), i);
  const uint64_t least = nth_largest(scratch.order, draw.hard, scratch.candidates);
  for (int64_t i = 0; i < size; ++i) scratch.keys[i] |= static_cast<uint64_t>(scratch.order[i] >= least) << 63;
}

// The kept patches in ascending order, and where each patch stands in (kept, masked).
void write_indices(const uint8_t* mask, int64_t size, int64_t keep, int64_t* ids_keep, int64_t* ids_restore) {
  int64_t i = 0;
  // masks are random: a branch would be guessed wrong, so every patch is written where the next kept one belongs
  for (int64_t kept = 0; kept < keep; ++i) {
    ids_keep[kept] = i;
    ids_restore[i] = mask[i] ? keep + i - kept : kept;
    kept += 1 - mask[i];
  }
  for (; i < size; ++i) ids_restore[i] = i;
}

PatchResults patch_mask(const at::Tensor& seed, const std::optional<at::Tensor>& losses, at::IntArrayRef shape,
                        int64_t method, int64_t masked, int64_t hard, int64_t min_block, double log_aspect,
                        bool indices) {
  const PatchDraw draw = check_patch_mask(seed, losses, shape, method, masked, hard, min_block, log_aspect);
  const auto [out, ids_keep, ids_restore] = patch_results(seed, shape, draw, indices);
  const int64_t size = draw.size(), keep = size - draw.masked;
  if (out.numel() == 0) return {out, ids_keep, ids_restore};
  const at::Tensor values = losses ? losses->contiguous() : at::Tensor();
  const uint64_t key = seed_value(seed);
  uint8_t* mask = static_cast<uint8_t*>(out.mutable_data_ptr());
  int64_t* kept = indices ? ids_keep.mutable_data_ptr<int64_t>() : nullptr;
  int64_t* restore = indices ? ids_restore.mutable_data_ptr<int64_t>() : nullptr;
  at::parallel_for(0, draw.samples, std::max<int64_t>(1, 4096 / size), [&](int64_t begin, int64_t end) {
    Scratch scratch(draw);
    for (int64_t sample = begin; sample < end; ++sample) {
      draw_keys(key, sample, scratch.keys);
      if (method == kBlockPatches) mark_blocks(key, sample, draw, scratch);
      if (method == kHardPatches)
        dispatch_losses(values.scalar_type(), [&](auto type) {
          using T = decltype(type);
          mark_hard(static_cast<const T*>(values.const_data_ptr()) + sample * size, draw, scratch);
        });
      const uint64_t least = nth_largest(scratch.keys, draw.masked, scratch.candidates);
      uint8_t* row = mask + sample * size;
      for (int64_t i = 0; i < size; ++i) row[i] = scratch.keys[i] >= least;
      if (indices) write_indices(row, size, keep, kept + sample * keep, restore + sample * size);
    }
  });
  return {out, ids_keep, ids_restore};
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) { m.impl("patch_mask", &patch_mask); }

}  // namespace
}  // namespace pyrx::cpu
