// Filling empty places from their neighbours on the CPU: which places, when and from where is planned once an image;
// every channel is then a copy of its present places and the plan's blocks, in the first or second-level cache.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <bit>

#include "cpu/elements.h"
#include "cpu/pages.h"
#include "neighbor_fill_checks.h"

namespace pyrx::cpu {
namespace {

constexpr int64_t kWord = 64;
constexpr int64_t kChannels = 64;  // of a channels_last image that a thread takes at a time

struct Plan {
  std::vector<FillBlock> blocks;
  std::vector<uint8_t> kept;  // a bit a place: it is present from the start
};

// Byte i = bit i of eight.
inline uint64_t bytes_of(uint64_t bits) {
  constexpr uint64_t ones = 0x0101010101010101ull, one_each = 0x8040201008040201ull;
  return ((bits * ones & one_each) + 0x7F * ones) >> 7 & ones;
}

// Rows of bits with an empty row above and below and an empty word on either side.
class BitRows {
 public:
  BitRows(int64_t height, int64_t width)
      : words_((width + kWord - 1) / kWord), stride_(words_ + 2), bits_((height + 2) * stride_) {}
  uint64_t* row(int64_t y) { return bits_.data() + (y + 1) * stride_ + 1; }
  int64_t words() const { return words_; }
  // Sixteen bits from column x, which may be -1, of a row.
  static uint32_t window(const uint64_t* row, int64_t x) {
    const int64_t word = (x + kWord) / kWord - 1, shift = x - word * kWord;
    const uint64_t low = row[word] >> shift, high = shift > kWord - kFillLanes ? row[word + 1] << (kWord - shift) : 0;
    return static_cast<uint32_t>(low | high) & 0xFFFF;
  }

 private:
  int64_t words_, stride_;
  std::vector<uint64_t> bits_;
};

FillBlock fill_block(BitRows& present, int64_t y, int64_t x, int64_t width, uint32_t fill) {
  FillBlock block{y * width + x, static_cast<uint16_t>(fill), {}, {}};
  int j = 0;
  uint64_t counts[2] = {0, 0};
  for (int64_t dy = -1; dy <= 1; ++dy) {
    for (int64_t dx = -1; dx <= 1; ++dx) {
      if (dy == 0 && dx == 0) continue;
      const uint32_t bits = BitRows::window(present.row(y + dy), x + dx) & fill;
      block.neighbors[j++] = static_cast<uint16_t>(bits);
      counts[0] += bytes_of(bits & 0xFF);
      counts[1] += bytes_of(bits >> 8);
    }
  }
  std::memcpy(block.counts, counts, sizeof counts);
  return block;
}

// mask, after: (height, width) bytes.
Plan make_plan(const bool* mask, int64_t height, int64_t width, int64_t iterations, bool* after) {
  Plan plan;
  plan.kept.resize((height * width + 7) / 8);
  for (int64_t i = 0; i < height * width; ++i) plan.kept[i / 8] |= static_cast<uint8_t>(mask[i]) << i % 8;
  BitRows present(height, width), wide(height, width);
  const int64_t words = present.words();
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x) present.row(y)[x / kWord] |= static_cast<uint64_t>(mask[y * width + x]) << x % kWord;
  const uint64_t last = ~uint64_t{0} >> (words * kWord - width);
  std::vector<uint64_t> grown(height * words);
  bool growing = true;
  for (int64_t t = 0; growing && t < iterations; ++t) {
    growing = false;
    for (int64_t y = 0; y < height; ++y) {
      const uint64_t* row = present.row(y);
      for (int64_t w = 0; w < words; ++w) wide.row(y)[w] = spread(row[w - 1], row[w], row[w + 1]);
    }
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t w = 0; w < words; ++w) {
        uint64_t& place = grown[y * words + w];
        place = (wide.row(y - 1)[w] | wide.row(y)[w] | wide.row(y + 1)[w]) & (w == words - 1 ? last : ~uint64_t{0});
        uint64_t ring = place & ~present.row(y)[w];
        growing |= ring != 0;
        while (ring != 0) {  // from the first place to be filled on
          const int64_t shift = std::countr_zero(ring);
          const uint32_t fill = static_cast<uint32_t>(ring >> shift) & 0xFFFF;
          plan.blocks.push_back(fill_block(present, y, w * kWord + shift, width, fill));
          ring &= ~(uint64_t{0xFFFF} << shift);
        }
      }
    }
    for (int64_t y = 0; y < height; ++y) std::copy_n(&grown[y * words], words, present.row(y));
  }
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x) after[y * width + x] = present.row(y)[x / kWord] >> x % kWord & 1;
  return plan;
}

template <typename T>
void fill_planes(const T* from, const std::vector<Plan>& plans, int64_t channels, int64_t size, int64_t width, T* to) {
  const auto& kernels = element_kernels<T>();
  at::parallel_for(0, static_cast<int64_t>(plans.size()) * channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const Plan& plan = plans[plane / channels];
      T* out = to + plane * size;
      kernels.dropout(from + plane * size, plan.kept.data(), size, 1, out);
      kernels.neighbor_fill(plan.blocks.data(), static_cast<int64_t>(plan.blocks.size()), width, out);
    }
  });
}

template <typename T>
void fill_channels(const T* from, const std::vector<Plan>& plans, int64_t channels, int64_t size, int64_t width, T* to) {
  const auto& kernels = element_kernels<T>();
  const int64_t parts = (channels + kChannels - 1) / kChannels;
  const T zeros[kChannels] = {};
  at::parallel_for(0, static_cast<int64_t>(plans.size()) * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Plan& plan = plans[task / parts];
      const int64_t first = task % parts * kChannels, count = std::min(kChannels, channels - first);
      const int64_t offset = task / parts * size * channels + first;
      for (int64_t i = 0; i < size; ++i) {
        const bool kept = plan.kept[i / 8] >> i % 8 & 1;
        std::copy_n(kept ? from + offset + i * channels : zeros, count, to + offset + i * channels);
      }
      kernels.neighbor_fill_channels(plan.blocks.data(), static_cast<int64_t>(plan.blocks.size()), width, channels, count,
                                     zeros, to + offset);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> neighbor_fill(const at::Tensor& input, const at::Tensor& mask, int64_t iterations) {
  check_neighbor_fill(input, mask, iterations);
  const int64_t images = input.size(0), channels = input.size(1), height = input.size(2), width = input.size(3);
  const at::Tensor out = at::empty_like(input), present = mask.contiguous();
  const at::Tensor after = at::empty(mask.sizes(), mask.options());
  use_huge_pages(out);
  const int64_t size = height * width;
  if (images * size == 0) return {out, after};
  std::vector<Plan> plans(images);
  at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      plans[n] = make_plan(present.const_data_ptr<bool>() + n * size, height, width, iterations,
                           after.mutable_data_ptr<bool>() + n * size);
  });
  const bool last = !out.is_contiguous() && out.is_contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor x = input.contiguous(last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  const at::Tensor y = last ? out : contiguous_target(out);
  dispatch_storage(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    (last ? fill_channels<T> : fill_planes<T>)(from, plans, channels, size, width, to);
  });
  return {finish(y, out), after};
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) { m.impl("neighbor_fill", &neighbor_fill); }

}  // namespace
}  // namespace pyrx::cpu
