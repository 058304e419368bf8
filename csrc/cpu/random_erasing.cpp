// Random erasing and Cutout on the CPU.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>

#include "cpu/elements.h"
#include "cpu/pages.h"
#include "erase_checks.h"

namespace pyrx::cpu {
namespace {

constexpr int64_t kTaskBytes = 128 << 10;  // of a task: in the second-level cache
constexpr int64_t kSerialBytes = 4 << 20;  // less than this is not worth a second thread
constexpr int64_t kNoiseWork = 8;          // an element of noise takes as long as copying so many

// The boxes of one call.
struct Erasures {
  int64_t count;      // a sample
  at::Tensor result;  // (N, count, 4)

  const Box& at(int64_t sample, int64_t box) const {
    return reinterpret_cast<const Box*>(result.const_data_ptr<int64_t>())[sample * count + box];
  }
};

Erasures draw(const EraseArguments& given) {
  const int64_t samples = given.draw.samples, count = given.count();
  const at::Tensor result = at::empty({samples, count, 4}, given.seed.options());
  Box* boxes = reinterpret_cast<Box*>(result.mutable_data_ptr<int64_t>());
  const at::Tensor values = given.boxes ? given.boxes->contiguous() : at::Tensor();
  for (int64_t i = 0; i < samples * count; ++i) {
    if (!given.boxes) {
      boxes[i] = draw_box(seed_value(given.seed), i / count, i % count, given.draw);
      continue;
    }
    const int64_t* value = values.const_data_ptr<int64_t>() + 4 * i;
    const Box box{value[0], value[1], value[2], value[3]};
    const bool inside = 0 <= box.y0 && box.y0 <= box.y1 && box.y1 <= given.draw.height && 0 <= box.x0 &&
                        box.x0 <= box.x1 && box.x1 <= given.draw.width;
    PYRX_CHECK_VALUE(inside, "random_erasing", "boxes",
                     "0 <= y0 <= y1 <= " + text(given.draw.height) + " and 0 <= x0 <= x1 <= " + text(given.draw.width),
                     at::IntArrayRef(value, 4));
    boxes[i] = box;
  }
  return {count, result};
}

template <typename T, typename In>
void convert(const In* from, int64_t n, T* to) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    std::copy_n(from, n, to);
  } else {
    mix_kernels<In, T>().mix(MixRun<In, T>{1, nullptr, nullptr, 0, false}, from, nullptr, n, to);
  }
}

// What one thread fills rows of boxes with.
template <typename T>
class Filler {
 public:
  Filler(const EraseArguments& given, const PixelLayout& layout)
      : given_(given), layout_(layout), frames_(layout.step == 1 ? layout.planes / layout.channels : layout.planes),
        width_(layout.row / layout.step), values_(layout.channels), pixels_(width_), key_(seed_value(given.seed)) {
    std::vector<double> constant(layout.channels);
    for (int64_t c = 0; c < layout.channels; ++c) constant[c] = given.value.size() == 1 ? given.value[0] : given.value[c];
    if (given.mode == kConst) convert(constant.data(), layout.channels, values_.data());
    if (given.mode == kPixel) scratch_.resize(normals_scratch(width_));
  }

  // Box `box` of a plane of a sample is next.
  void begin(int64_t sample, int64_t plane, int64_t box) {
    if (given_.mode != kRand) return;
    const bool one = layout_.step == 1;  // channel a plane
    const int64_t first = one ? plane / frames_ : 0, last = one ? first + 1 : layout_.channels;
    for (int64_t c = first; c < last; ++c) {
      const float drawn = channel_noise(key_, sample, box, c, given_.count(), layout_.channels, given_.draw);
      convert(&drawn, 1, &values_[c]);
    }
  }

  // Pixels [x0, x1) of row y of a plane, which begin at `to`.
  void fill(int64_t sample, int64_t plane, int64_t y, int64_t x0, int64_t x1, T* to) {
    if (layout_.step == 1) return fill_channel(sample, plane / frames_, plane % frames_, y, x0, x1 - x0, to);
    for (int64_t c = 0; c < layout_.channels; ++c) fill_channel(sample, c, plane, y, x0, x1 - x0, to + c);
  }

 private:
  void fill_channel(int64_t sample, int64_t channel, int64_t frame, int64_t y, int64_t x0, int64_t n, T* to) {
    const int64_t step = layout_.step;
    if (given_.mode != kPixel) {
      if (step == 1) std::fill_n(to, n, values_[channel]);
      else for (int64_t x = 0; x < n; ++x) to[x * step] = values_[channel];
      return;
    }
    const int64_t row = ((sample * layout_.channels + channel) * frames_ + frame) * layout_.height + y;
    const uint64_t element = static_cast<uint64_t>(row * width_ + x0);
    const float* drawn = normals(key_, kPixelNoise, element, n, scratch_.data());
    if (step == 1) return convert(drawn, n, to);
    convert(drawn, n, pixels_.data());
    for (int64_t x = 0; x < n; ++x) to[x * step] = pixels_[x];
  }

  const EraseArguments& given_;
  const PixelLayout& layout_;
  const int64_t frames_, width_;
  std::vector<T> values_;  // (C,)
  std::vector<T> pixels_;  // (W,)
  std::vector<float> scratch_;
  uint64_t key_;
};

// Erases boxes of `to`; from other memory all else is copied.
template <typename T>
void erase(const EraseArguments& given, const PixelLayout& layout, const Erasures& erasures, const T* from, T* to) {
  const int64_t rows = std::max<int64_t>(1, std::min<int64_t>(layout.height, kTaskBytes / (layout.row * int64_t(sizeof(T)))));
  const int64_t blocks = (layout.height + rows - 1) / rows, each = layout.planes * blocks;
  int64_t filled = 0;
  for (int64_t i = 0; i < given.draw.samples * erasures.count; ++i) filled += erasures.at(0, i).area();
  filled *= layout.planes * layout.step * (given.mode == kPixel ? kNoiseWork : 1);
  const int64_t work = (filled + (from != to ? given.draw.samples * layout.sample() : 0)) * int64_t(sizeof(T));
  const int64_t tasks = given.draw.samples * each;
  at::parallel_for(0, tasks, work < kSerialBytes ? tasks : 1, [&](int64_t begin, int64_t end) {
    Filler<T> filler(given, layout);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / each, plane = i / blocks % layout.planes, first = i % blocks * rows;
      const int64_t last = std::min(layout.height, first + rows), offset = n * layout.sample() + plane * layout.plane();
      if (from != to)
        std::memcpy(to + offset + first * layout.row, from + offset + first * layout.row, (last - first) * layout.row * sizeof(T));
      for (int64_t k = 0; k < erasures.count; ++k) {
        const Box& box = erasures.at(n, k);
        const int64_t y0 = std::max(first, box.y0), y1 = std::min(last, box.y1);
        if (y0 >= y1 || box.x0 >= box.x1) continue;
        filler.begin(n, plane, k);
        for (int64_t y = y0; y < y1; ++y)
          filler.fill(n, plane, y, box.x0, box.x1, to + offset + y * layout.row + box.x0 * layout.step);
      }
    }
  });
}

void erase_into(const EraseArguments& given, const Erasures& erasures, const at::Tensor& images, at::MemoryFormat format,
                const at::Tensor& to) {
  if (images.numel() == 0) return;
  const PixelLayout layout = pixel_layout(images, format);
  dispatch_pixels(images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    erase(given, layout, erasures, static_cast<const T*>(images.const_data_ptr()), static_cast<T*>(to.mutable_data_ptr()));
  });
}

std::tuple<at::Tensor, at::Tensor> random_erasing(const at::Tensor& images, const at::Tensor& seed,
                                                  const std::optional<at::Tensor>& boxes, int64_t kind, int64_t prob,
                                                  int64_t min_count, int64_t max_count, double min_scale, double max_scale,
                                                  double min_ratio, double max_ratio, int64_t num_splits, bool per_sample,
                                                  int64_t mode, at::ArrayRef<double> value) {
  const EraseArguments given{images, seed, boxes,
                             erase_draw(images, kind, prob, min_count, max_count, min_scale, max_scale, min_ratio,
                                        max_ratio, num_splits, per_sample),
                             mode, value};
  check_erase(given);
  const Erasures erasures = draw(given);
  const at::MemoryFormat format = pixel_format(images);
  const at::Tensor erased = at::empty(images.sizes(), images.options(), format);
  use_huge_pages(erased);
  erase_into(given, erasures, images.contiguous(format), format, erased);
  return {erased, erasures.result};
}

at::Tensor random_erasing_(const at::Tensor& images, const at::Tensor& seed, const std::optional<at::Tensor>& boxes,
                           int64_t kind, int64_t prob, int64_t min_count, int64_t max_count, double min_scale,
                           double max_scale, double min_ratio, double max_ratio, int64_t num_splits, bool per_sample,
                           int64_t mode, at::ArrayRef<double> value) {
  const EraseArguments given{images, seed, boxes,
                             erase_draw(images, kind, prob, min_count, max_count, min_scale, max_scale, min_ratio,
                                        max_ratio, num_splits, per_sample),
                             mode, value};
  check_erase(given);
  const Erasures erasures = draw(given);
  const at::MemoryFormat format = pixel_format(images);
  const at::Tensor dense = images.contiguous(format);
  erase_into(given, erasures, dense, format, dense);
  finish(dense, images);
  return erasures.result;
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) {
  m.impl("random_erasing", &random_erasing);
  m.impl("random_erasing_", &random_erasing_);
}

}  // namespace
}  // namespace pyrx::cpu
