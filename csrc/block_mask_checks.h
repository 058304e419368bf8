// The arguments of block_lists and select_blocks, their checks and results, shared by the CPU and CUDA entries, with
// the texts of pyrx/ops/block_mask.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>

#include "kernels/block_mask.h"
#include "tensor_checks.h"

namespace pyrx {

inline BlockGrid check_block_lists(const at::Tensor& blocks, int64_t kv_width, int64_t q_width) {
  constexpr std::string_view op = "block_lists";
  check_dtype(op, "blocks", blocks, at::kBool);
  PYRX_CHECK_VALUE(blocks.dim() == 4, op, "blocks", "of shape [B or 1, H or 1, NQ, NK]", blocks.sizes());
  const int64_t rows = blocks.size(2), columns = blocks.size(3);
  PYRX_CHECK_VALUE(kv_width >= 0 && kv_width <= columns, op, "kv_width", "in [0, " + text(columns) + "]", kv_width);
  PYRX_CHECK_VALUE(q_width >= 0 && q_width <= rows, op, "q_width", "in [0, " + text(rows) + "]", q_width);
  PYRX_CHECK_VALUE(rows <= kMostBlocks && columns <= kMostBlocks, op, "blocks", "of at most 2147483647 a side",
                   blocks.sizes());
  return {blocks.size(0) * blocks.size(1), rows, columns, kv_width, q_width};
}

// kv_counts, kv_indices, q_counts, q_indices
using ListResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
inline ListResults list_results(const at::Tensor& blocks, const BlockGrid& grid) {
  const auto options = blocks.options().dtype(at::kInt);
  const int64_t batch = blocks.size(0), heads = blocks.size(1);
  return {at::empty({batch, heads, grid.rows}, options), at::empty({batch, heads, grid.rows, grid.kv_width}, options),
          at::empty({batch, heads, grid.columns}, options),
          at::empty({batch, heads, grid.columns, grid.q_width}, options)};
}

inline void check_select_blocks(const at::Tensor& scores, const std::optional<at::Tensor>& count, double mass,
                                const std::optional<at::Tensor>& always) {
  constexpr std::string_view op = "select_blocks";
  check_dtype(op, "scores", scores, at::kFloat);
  PYRX_CHECK_VALUE(scores.dim() == 4, op, "scores", "of shape [B, H, NQ, NK]", scores.sizes());
  const auto broadcasts = [&](const at::Tensor& value, int64_t dims) {
    bool found = value.dim() == dims;
    for (int64_t i = 0; found && i < dims; ++i) found = value.size(i) == 1 || value.size(i) == scores.size(i);
    return found;
  };
  if (count) {
    check_dtype(op, "count", *count, at::kInt);
    PYRX_CHECK_VALUE(broadcasts(*count, 3), op, "count",
                     "of shape [B or 1, H or 1, NQ or 1] of scores of " + text(scores.sizes()), count->sizes());
    check_device(op, "count", *count, scores.device());
  } else {
    PYRX_CHECK_VALUE(mass >= 0 && mass <= 1, op, "mass", "in [0, 1]", mass);
  }
  if (always) {
    check_dtype(op, "always", *always, at::kBool);
    PYRX_CHECK_VALUE(broadcasts(*always, 4), op, "always",
                     "of a shape that broadcasts to the scores' " + text(scores.sizes()), always->sizes());
    check_device(op, "always", *always, scores.device());
  }
  PYRX_CHECK_VALUE(scores.size(3) <= kMostBlocks, op, "scores", "of at most 2147483647 blocks a row", scores.sizes());
}

}  // namespace pyrx
