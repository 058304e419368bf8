// The arguments of batch_mix and their checks, shared by the CPU and CUDA entries, with the texts of pyrx/ops/batch_mix.py.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "kernels/batch_mix.h"
#include "tensor_checks.h"

namespace pyrx {

constexpr int64_t kMostMixChannels = 64;

// Whether pixels can be weighed; others only have boxes.
inline bool is_weighable(at::ScalarType dtype) { return dtype == at::kByte || is_float(dtype); }

struct MixArguments {
  at::Tensor images;  // (N, C, [T,] H, W)
  std::optional<at::Tensor> labels;
  at::Tensor seed;
  std::optional<at::Tensor> lam, boxes, partner;
  int64_t pairing;
  MixDraw draw;
  at::ArrayRef<double> scale, bias;
  at::ScalarType dtype;  // of the result

  bool is_arithmetic() const {
    return draw.kind == kMixup || draw.kind == kEither || !scale.empty() || dtype != images.scalar_type();
  }
};

// (partner_labels, partner, lam, boxes)
using MixResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline MixDraw mix_draw(const at::Tensor& images, int64_t kind, int64_t granularity, int64_t prob, int64_t switch_prob,
                        double mixup_alpha, double cutmix_alpha, double minimum, double maximum, bool correct_lam) {
  const int64_t dim = images.dim();
  return {images.dim() > 0 ? images.size(0) : 0, dim > 1 ? images.size(dim - 2) : 0, dim > 0 ? images.size(dim - 1) : 0,
          kind, granularity, prob, switch_prob, mixup_alpha, cutmix_alpha, minimum, maximum, correct_lam};
}

// Everything that can be known without reading a tensor.
inline void check_mix(const MixArguments& given) {
  constexpr std::string_view op = "batch_mix";
  const at::Tensor& images = given.images;
  const MixDraw& draw = given.draw;
  PYRX_CHECK_VALUE(images.dim() == 4 || images.dim() == 5, op, "images", "of shape [N, C, H, W] or [N, C, T, H, W]",
                   images.sizes());
  PYRX_CHECK_TYPE(!images.is_complex(), op, "images", "of a real dtype", dtype_name(images.scalar_type()));
  const int64_t samples = images.size(0), channels = images.size(1);
  PYRX_CHECK_VALUE(samples < kMostSamples, op, "images", "of fewer than " + text(kMostSamples) + " samples", samples);
  PYRX_CHECK_TYPE(!given.is_arithmetic() || is_weighable(images.scalar_type()), op, "images",
                  "of dtype uint8, float16, bfloat16, float32 or float64", dtype_name(images.scalar_type()));
  PYRX_CHECK_TYPE(given.dtype == images.scalar_type() || is_float(given.dtype), op, "dtype",
                  dtype_name(images.scalar_type()) + " or a floating-point dtype", dtype_name(given.dtype));
  PYRX_CHECK_TYPE(given.scale.empty() || is_float(given.dtype), op, "dtype",
                  "a floating-point dtype for a normalised result", dtype_name(given.dtype));
  const int64_t count = static_cast<int64_t>(given.scale.size());
  PYRX_CHECK_VALUE(given.scale.size() == given.bias.size() && (count == 0 || count == channels), op, "mean and std",
                   "of C = " + text(channels) + " channels", text(given.bias.size()) + " and " + text(count));
  PYRX_CHECK_VALUE(count <= kMostMixChannels, op, "mean and std", "of at most " + text(kMostMixChannels) + " channels", count);
  const auto check_row = [&](std::string_view name, const std::optional<at::Tensor>& value, at::ScalarType dtype,
                             std::string_view names, at::IntArrayRef shape) {
    if (!value) return;
    check_dtype(op, name, *value, dtype);
    check_shape(op, name, *value, names, shape);
    check_device(op, name, *value, images.device());
  };
  check_row("labels", given.labels, at::kLong, "[N]", {samples});
  check_row("lam", given.lam, at::kFloat, "[N]", {samples});
  check_row("boxes", given.boxes, at::kLong, "[N, 4]", {samples, 4});
  check_row("pairing", given.partner, at::kLong, "[N]", {samples});
  check_seed(op, given.seed, images.device());
  PYRX_CHECK_VALUE((given.pairing == kGiven) == given.partner.has_value() && given.pairing >= 0 && given.pairing <= kGiven,
                   op, "pairing", "in [0, 3], 3 where a permutation is given", given.pairing);
  PYRX_CHECK_VALUE(draw.kind >= kMixup && draw.kind <= kEither && draw.granularity >= kPerBatch &&
                       draw.granularity <= kPerSample,
                   op, "kind and granularity", "in [0, 3] and [0, 2]", text(draw.kind) + " and " + text(draw.granularity));
  const auto check_level = [&](std::string_view name, int64_t value) {
    PYRX_CHECK_VALUE(value >= 0 && value <= kLevels, op, name, "in [0, 65536]", value);
  };
  check_level("prob", draw.prob);
  check_level("switch_prob", draw.switch_prob);
  const auto check_alpha = [&](std::string_view name, double alpha, int64_t kind) {
    const bool drawn = (draw.kind == kind || draw.kind == kEither) && !given.lam && !given.boxes;
    PYRX_CHECK_VALUE(!drawn || alpha > 0, op, name, "above 0", alpha);
  };
  check_alpha("mixup_alpha", draw.mixup_alpha, kMixup);
  check_alpha("cutmix_alpha", draw.cutmix_alpha, kCutmix);
  PYRX_CHECK_VALUE(0 <= draw.minimum && draw.minimum <= draw.maximum && draw.maximum <= 1, op, "minmax",
                   "0 <= minimum <= maximum <= 1", "(" + text(draw.minimum) + ", " + text(draw.maximum) + ")");
}

inline void check_own_memory(std::string_view argument, const at::Tensor& value) {
  PYRX_CHECK_VALUE(at::has_internal_overlap(value) != at::MemOverlap::Yes, "batch_mix", argument,
                   "to be memory of its own for every element", "strides " + text(value.strides()));
}

// In place: partners swap, so pairs must be each other's.
inline void check_swap(const MixArguments& given) {
  PYRX_CHECK_VALUE(given.pairing != kRoll, "batch_mix", "pairing", "to be its own inverse for inplace=True", "'roll'");
  PYRX_CHECK_VALUE(given.draw.kind != kResizemix, "batch_mix", "inplace", "of patches that keep their size", "resizemix's");
  check_own_memory("inplace", given.images);
}

inline void check_out(const at::Tensor& out, const at::Tensor& images) {
  check_shape("batch_mix", "out", out, "[N, C, ...]", images.sizes());
  check_device("batch_mix", "out", out, images.device());
  check_own_memory("out", out);
  const at::MemOverlapStatus shared = at::get_overlap_status(out, images);
  PYRX_CHECK_VALUE(shared != at::MemOverlapStatus::Full && shared != at::MemOverlapStatus::Partial, "batch_mix", "out",
                   "to be other memory than the inputs", "the same");
}

// Channels last where the images' strides are such, else contiguous: the layout of results.
inline at::MemoryFormat pixel_format(const at::Tensor& images) {
  if (images.is_contiguous()) return at::MemoryFormat::Contiguous;
  const auto last = images.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
  return images.is_contiguous(last) ? last : images.suggest_memory_format();
}

// A sample's memory: `planes` of `height` rows of `row` elements, a pixel's `step` channels side by side.
struct PixelLayout {
  int64_t planes, height, row, step, channels;

  int64_t plane() const { return height * row; }
  int64_t sample() const { return planes * plane(); }
  // of an element of a plane
  int64_t channel(int64_t plane, int64_t frames) const { return step == 1 ? plane / frames : 0; }
};

inline PixelLayout pixel_layout(const at::Tensor& images, at::MemoryFormat format) {
  const int64_t dim = images.dim(), channels = images.size(1), frames = dim == 5 ? images.size(2) : 1;
  const int64_t height = images.size(dim - 2), width = images.size(dim - 1);
  if (format == at::MemoryFormat::Contiguous) return {channels * frames, height, width, 1, channels};
  return {frames, height, width * channels, channels, channels};
}

}  // namespace pyrx
