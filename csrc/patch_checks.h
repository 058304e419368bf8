// The checks and results of patch_mask, shared by its CPU and CUDA entries, with the texts of pyrx/ops/patch_mask.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>

#include "kernels/patch_mask.h"
#include "tensor_checks.h"

namespace pyrx {

inline PatchDraw check_patch_mask(const at::Tensor& seed, const std::optional<at::Tensor>& losses,
                                  at::IntArrayRef shape, int64_t method, int64_t masked, int64_t hard,
                                  int64_t min_block, double log_aspect) {
  constexpr const char* op = "patch_mask";
  check_seed(op, seed, seed.device());
  PYRX_CHECK_VALUE(method >= kRandomPatches && method <= kHardPatches, op, "method", "in [0, 2]", method);
  const bool grid = shape.size() == 3, row = shape.size() == 2 && method != kBlockPatches;
  PYRX_CHECK_VALUE(grid || row, op, "shape", method == kBlockPatches ? "[N, Hp, Wp]" : "[N, L] or [N, Hp, Wp]", shape);
  for (const int64_t size : shape) PYRX_CHECK_VALUE(size >= 0, op, "shape's sizes", "at least 0", shape);
  const PatchDraw draw{shape[0], grid ? shape[1] : 1, shape.back(), masked, hard, min_block, log_aspect};
  const bool few = draw.height == 0 || draw.width <= (kMostPatches - 1) / draw.height;
  PYRX_CHECK_VALUE(few, op, "shape", "of fewer than 2147483648 patches a sample", shape);
  PYRX_CHECK_VALUE(masked >= 0 && masked <= draw.size(), op, "num_masked", "in [0, " + text(draw.size()) + "]", masked);
  PYRX_CHECK_VALUE(hard >= 0 && hard <= masked, op, "number of hard patches", "in [0, " + text(masked) + "]", hard);
  PYRX_CHECK_VALUE(min_block >= 1 && min_block < kMostPatches, op, "min_block", "in [1, 2147483647]", min_block);
  PYRX_CHECK_VALUE(log_aspect <= 0 && log_aspect >= -700, op, "logarithm of min_aspect", "in [-700, 0]", log_aspect);
  PYRX_CHECK_TYPE(losses.has_value() == (method == kHardPatches), op, "losses", "for method 'hard' alone",
                  losses ? "a Tensor" : "None");
  if (losses) {
    check_float(op, "losses", *losses);
    check_shape(op, "losses", *losses, grid ? "[N, Hp, Wp]" : "[N, L]", shape);
    check_device(op, "losses", *losses, seed.device());
  }
  return draw;
}

// mask, ids_keep (N, keep), ids_restore (N, L); without indices these two are empty.
using PatchResults = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
inline PatchResults patch_results(const at::Tensor& seed, at::IntArrayRef shape, const PatchDraw& draw, bool indices) {
  const int64_t size = draw.size();
  const auto ids = [&](int64_t columns) {
    return indices ? at::empty({draw.samples, columns}, seed.options()) : at::empty({0}, seed.options());
  };
  return {at::empty(shape, seed.options().dtype(at::kBool)), ids(size - draw.masked), ids(size)};
}

}  // namespace pyrx
