// The arguments of block_pool and their checks, with the texts of pyrx/ops/block_pool.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>

#include "attention_checks.h"
#include "kernels/block_pool.h"

namespace pyrx {

// The operands of one call and its results: means (B, H, N, D), similarity (B, H, N).
struct PoolCall {
  at::Tensor x, mean, means, similarity;  // mean: undefined where there is none
  PoolShape shape;
};

inline PoolCall pool_call(const at::Tensor& x, const std::optional<at::Tensor>& mean, int64_t block) {
  constexpr std::string_view op = "block_pool";
  check_float(op, "x", x);
  PYRX_CHECK_VALUE(x.dim() == 4, op, "x", "of shape [B, H, S, D]", x.sizes());
  PYRX_CHECK_VALUE(x.size(3) <= kMostHeadSize, op, "x", "of a head size of at most " + text(kMostHeadSize), x.size(3));
  const at::ScalarType accumulation = accumulation_dtype(x.scalar_type());
  if (mean) {
    check_dtype(op, "mean", *mean, accumulation);
    check_shape(op, "mean", *mean, "[B, H, D]", {x.size(0), x.size(1), x.size(3)});
    check_device(op, "mean", *mean, x.device());
  }
  check_block_size(op, "block", block);
  const at::Tensor rows = x.size(3) > 1 && x.stride(3) != 1 ? x.contiguous() : x;
  const int64_t blocks = blocks_of(x.size(2), block);
  const auto options = x.options().dtype(accumulation);
  return {rows,
          mean ? mean->contiguous() : at::Tensor(),
          at::empty({x.size(0), x.size(1), blocks, x.size(3)}, options),
          at::empty({x.size(0), x.size(1), blocks}, options),
          {x.size(0), x.size(1), x.size(2), x.size(3), block, rows.stride(0), rows.stride(1), rows.stride(2)}};
}

}  // namespace pyrx
