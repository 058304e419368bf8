// Checks of neighbor_fill shared by the CPU and CUDA entries, with the texts of pyrx/ops/neighbor_fill.py.
#pragma once

#include "tensor_checks.h"

namespace pyrx {

constexpr int64_t kMaxFillIterations = 65535;

inline void check_neighbor_fill(const at::Tensor& input, const at::Tensor& mask, int64_t iterations) {
  constexpr std::string_view op = "neighbor_fill";
  check_float(op, "input", input);
  PYRX_CHECK_VALUE(input.dim() == 4, op, "input", "of shape [N, C, H, W]", input.sizes());
  check_dtype(op, "mask", mask, at::kBool);
  check_shape(op, "mask", mask, "[N, 1, H, W]", {input.size(0), 1, input.size(2), input.size(3)});
  check_device(op, "mask", mask, input.device());
  PYRX_CHECK_VALUE(iterations >= 0 && iterations <= kMaxFillIterations, op, "iterations", "in [0, 65535]", iterations);
}

}  // namespace pyrx
