// The arguments of random_erasing and their checks, shared by the CPU and CUDA entries, with the texts of
// pyrx/ops/random_erasing.py.
#pragma once

#include <cmath>
#include <tuple>

#include "kernels/random_erasing.h"
#include "mix_checks.h"

namespace pyrx {

struct EraseArguments {
  at::Tensor images, seed;           // images (N, C, [T,] H, W)
  std::optional<at::Tensor> boxes;   // (N, K, 4)
  EraseDraw draw;
  int64_t mode;
  at::ArrayRef<double> value;  // of all channels or of each

  int64_t count() const { return boxes ? boxes->size(1) : draw.max_count; }
};

inline EraseDraw erase_draw(const at::Tensor& images, int64_t kind, int64_t prob, int64_t min_count, int64_t max_count,
                            double min_scale, double max_scale, double min_ratio, double max_ratio, int64_t num_splits,
                            bool per_sample) {
  const int64_t dim = images.dim();
  return {dim > 0 ? images.size(0) : 0, dim > 1 ? images.size(dim - 2) : 0, dim > 0 ? images.size(dim - 1) : 0,
          kind, prob, min_count, max_count, min_scale, max_scale, min_ratio, max_ratio, num_splits, per_sample};
}

// Everything that can be known without reading a tensor.
inline void check_erase(const EraseArguments& given) {
  constexpr std::string_view op = "random_erasing";
  const at::Tensor& images = given.images;
  const EraseDraw& draw = given.draw;
  const auto dtype = images.scalar_type();
  const bool bytes = dtype == at::kByte;
  const auto range = [](double low, double high) { return "(" + text(low) + ", " + text(high) + ")"; };
  PYRX_CHECK_VALUE(images.dim() == 4 || images.dim() == 5, op, "images", "of shape [N, C, H, W] or [N, C, T, H, W]",
                   images.sizes());
  PYRX_CHECK_TYPE(bytes || dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble, op,
                  "images", "of dtype uint8, float16, bfloat16, float32 or float64", dtype_name(dtype));
  PYRX_CHECK_VALUE(draw.kind >= kRandomErasing && draw.kind <= kCutout && given.mode >= kConst && given.mode <= kPixel, op,
                   "kind and mode", "in [0, 1] and [0, 2]", text(draw.kind) + " and " + text(given.mode));
  PYRX_CHECK_TYPE(!bytes || given.mode == kConst, op, "images", "of a floating-point dtype to be filled with noise",
                  dtype_name(dtype));
  const int64_t samples = images.size(0), channels = images.size(1);
  if (given.boxes) {
    const at::Tensor& boxes = *given.boxes;
    check_dtype(op, "boxes", boxes, at::kLong);
    PYRX_CHECK_VALUE(boxes.dim() == 3 && boxes.size(0) == samples && boxes.size(2) == 4, op, "boxes",
                     "of shape [N, K, 4] with N = " + text(samples), boxes.sizes());
    PYRX_CHECK_VALUE(boxes.size(1) <= kMostBoxes, op, "boxes", "of at most " + text(kMostBoxes) + " an image", boxes.size(1));
    check_device(op, "boxes", boxes, images.device());
  }
  check_seed(op, given.seed, images.device());
  PYRX_CHECK_VALUE(draw.prob >= 0 && draw.prob <= kLevels, op, "prob", "in [0, 65536]", draw.prob);
  PYRX_CHECK_VALUE(1 <= draw.min_count && draw.min_count <= draw.max_count && draw.max_count <= kMostBoxes, op,
                   "min_count and max_count", "1 <= min_count <= max_count <= " + text(kMostBoxes),
                   text(draw.min_count) + " and " + text(draw.max_count));
  PYRX_CHECK_VALUE(0 <= draw.min_scale && draw.min_scale <= draw.max_scale && draw.max_scale <= 1, op, "scale",
                   "0 <= minimum <= maximum <= 1", range(draw.min_scale, draw.max_scale));
  PYRX_CHECK_VALUE(draw.min_ratio >= 1e-6 && draw.min_ratio <= draw.max_ratio && draw.max_ratio <= 1e6, op, "ratio",
                   "1e-6 <= minimum <= maximum <= 1e6", range(draw.min_ratio, draw.max_ratio));
  PYRX_CHECK_VALUE(draw.num_splits >= 0, op, "num_splits", "at least 0", draw.num_splits);
  const int64_t count = static_cast<int64_t>(given.value.size());
  PYRX_CHECK_VALUE(count == 1 || count == channels, op, "value", "of 1 or C = " + text(channels) + " channels", count);
  PYRX_CHECK_VALUE(count <= kMostEraseChannels, op, "value", "of at most " + text(kMostEraseChannels) + " channels", count);
  for (const double value : given.value)
    PYRX_CHECK_VALUE(!bytes || (value >= 0 && value <= 255 && std::floor(value) == value), op, "value",
                     "a whole number in [0, 255] for uint8 images", value);
}

}  // namespace pyrx
