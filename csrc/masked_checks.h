// The arguments of the masked optimizer steps and their checks, shared by the CPU and CUDA entries, with the texts of
// pyrx/ops/masked_update.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

#include "kernels/masked_update.h"
#include "nm_checks.h"

namespace pyrx {

inline void check_scalar(std::string_view op, std::string_view argument, const at::Tensor& value, at::ScalarType dtype,
                         at::Device device) {
  check_dtype(op, argument, value, dtype);
  check_device(op, argument, value, device);
  PYRX_CHECK_VALUE(value.numel() == 1, op, argument, "of one element", value.sizes());
}

// Everything that can be known without reading a tensor; `moving` have the shape and dtype of their weights, `steps` may
// be null.
inline NM check_masked_update(std::string_view op, at::TensorList weights,
                              std::initializer_list<std::pair<const char*, at::TensorList>> moving, at::TensorList masks,
                              const at::TensorList* steps, const std::optional<at::Tensor>& lr_tensor, int64_t n,
                              int64_t m, int64_t dim, bool magnitude, int64_t rule) {
  const NM nm = check_nm(op, n, m, magnitude);
  PYRX_CHECK_VALUE(rule >= kHold && rule <= kDense, op, "rule", "in [0, 2]", rule);
  const auto check_count = [&](std::string_view name, at::TensorList list) {
    PYRX_CHECK_VALUE(list.size() == weights.size(), op, name, "of as many tensors as weights = " + text(weights.size()),
                     list.size());
  };
  for (const auto& [name, list] : moving) check_count(name, list);
  check_count("masks", masks);
  if (steps) check_count("steps", *steps);
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto name_of = [&](std::string_view name) { return std::string(name) + "[" + text(i) + "]"; };
    const at::Tensor& weight = weights[i];
    const std::string name = name_of("weights");
    const int64_t dims = weight.dim();
    check_float(op, name, weight);
    PYRX_CHECK_VALUE(dims > 0, op, name, "of at least one dimension", weight.sizes());
    PYRX_CHECK_VALUE(dim >= -dims && dim < dims, op, "dim", "in [" + text(-dims) + ", " + text(dims - 1) + "]", dim);
    PYRX_CHECK_VALUE(weight.size(dim) % m == 0, op, name,
                     "of a size along dimension " + text(dim < 0 ? dim + dims : dim) + " that m = " + text(m) + " divides",
                     weight.sizes());
    check_dtype(op, name, weight, weights[0].scalar_type());
    check_device(op, name, weight, weights[0].device());
    for (const auto& [list_name, list] : moving) {
      check_dtype(op, name_of(list_name), list[i], weight.scalar_type());
      check_shape(op, name_of(list_name), list[i], "of its weight", weight.sizes());
      check_device(op, name_of(list_name), list[i], weight.device());
    }
    check_bits(op, name_of("masks"), masks[i], weight);
    if (steps) check_scalar(op, name_of("steps"), (*steps)[i], at::kFloat, weight.device());
  }
  if (lr_tensor && !weights.empty()) check_scalar(op, "lr_tensor", *lr_tensor, at::kDouble, weights[0].device());
  return nm;
}

inline NM check_masked_adamw(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs,
                             at::TensorList exp_avg_sqs, at::TensorList masks, at::TensorList steps,
                             const std::optional<at::Tensor>& lr_tensor, int64_t n, int64_t m, int64_t dim,
                             bool magnitude, int64_t rule) {
  return check_masked_update("masked_adamw", weights,
                             {{"grads", grads}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}}, masks, &steps,
                             lr_tensor, n, m, dim, magnitude, rule);
}

inline NM check_masked_sgd(at::TensorList weights, at::TensorList grads, at::TensorList momentum_buffers,
                           at::TensorList masks, const std::optional<at::Tensor>& lr_tensor, int64_t n, int64_t m,
                           int64_t dim, bool magnitude, int64_t rule, double momentum) {
  const std::string_view op = "masked_sgd";
  if (momentum != 0)
    return check_masked_update(op, weights, {{"grads", grads}, {"momentum_buffers", momentum_buffers}}, masks, nullptr,
                               lr_tensor, n, m, dim, magnitude, rule);
  PYRX_CHECK_VALUE(momentum_buffers.empty(), op, "momentum_buffers", "to be empty without momentum",
                   momentum_buffers.size());
  return check_masked_update(op, weights, {{"grads", grads}}, masks, nullptr, lr_tensor, n, m, dim, magnitude, rule);
}

}  // namespace pyrx
