// Checks of the losses and the head, shared by the CPU and CUDA entries, with the texts of pyrx/_losses.py and pyrx/ops.
#pragma once

#include "tensor_checks.h"

namespace pyrx {

// float16 gradients wait for the upstream (loss) scale in float32, whose range they need.
inline at::ScalarType saved_gradient_dtype(at::ScalarType dtype) { return dtype == at::kHalf ? at::kFloat : dtype; }

inline void check_thresholds(std::string_view op, at::IntArrayRef values) {
  PYRX_CHECK_VALUE(!values.empty(), op, "thresholds", "of at least one sample", values);
  for (const int64_t value : values)
    PYRX_CHECK_VALUE(value >= 0 && value < 65536, op, "thresholds", "in [0, 65536)", value);
}

inline void check_loss_options(std::string_view op, double label_smoothing, std::string_view reduction) {
  PYRX_CHECK_VALUE(label_smoothing >= 0 && label_smoothing <= 1, op, "label_smoothing", "in [0, 1]", label_smoothing);
  PYRX_CHECK_VALUE(reduction == "none" || reduction == "mean" || reduction == "sum", op, "reduction",
                   "to be one of 'none', 'mean', 'sum'", "'" + std::string(reduction) + "'");
}

// The loss, and so its gradient, is of the input's dtype or of the one it is summed in.
inline void check_loss_dtype(std::string_view op, std::string_view argument, at::ScalarType value,
                             at::ScalarType input) {
  const auto accumulation = accumulation_dtype(input);
  PYRX_CHECK_TYPE(value == input || value == accumulation, op, argument,
                  input == accumulation ? dtype_name(input) : dtype_name(input) + " or " + dtype_name(accumulation),
                  dtype_name(value));
}

// Everything about mixed_cross_entropy that can be known without reading a tensor; input (N, C).
inline void check_mixed_cross_entropy(const at::Tensor& input, const at::Tensor& target, const at::Tensor& target_b,
                                      const at::Tensor& lam, const std::optional<at::Tensor>& weight,
                                      double label_smoothing, std::string_view reduction, at::ScalarType loss_dtype) {
  constexpr std::string_view op = "mixed_cross_entropy";
  check_float(op, "input", input);
  PYRX_CHECK_VALUE(input.dim() == 2, op, "input", "of shape [N, C]", input.sizes());
  PYRX_CHECK_VALUE(input.size(1) >= 1, op, "input", "of at least one class", input.sizes());
  const auto accumulation = accumulation_dtype(input.scalar_type());
  check_vector(op, "target", target, at::kLong, "[N]", input.size(0), input.device());
  check_vector(op, "target_b", target_b, at::kLong, "[N]", input.size(0), input.device());
  check_vector(op, "lam", lam, accumulation, "[N]", input.size(0), input.device());
  check_vector(op, "weight", weight, accumulation, "[C]", input.size(1), input.device());
  check_loss_options(op, label_smoothing, reduction);
  check_loss_dtype(op, "loss_dtype", loss_dtype, input.scalar_type());
}

// A gradient to be scaled in place by that of the loss, or its rows by those of theirs.
inline void check_mixed_scale(const at::Tensor& gradient, const at::Tensor& grad_loss) {
  constexpr std::string_view op = "mixed_cross_entropy_scale_";
  check_float(op, "gradient", gradient);
  PYRX_CHECK_VALUE(gradient.dim() == 2 && gradient.is_contiguous(), op, "gradient", "to be contiguous, of shape [N, C]",
                   gradient.sizes());
  check_loss_dtype(op, "grad_loss", grad_loss.scalar_type(), gradient.scalar_type());
  if (grad_loss.dim() != 0) check_shape(op, "grad_loss", grad_loss, "[N]", gradient.sizes().slice(0, 1));
  check_device(op, "grad_loss", grad_loss, gradient.device());
}

// Everything about the head that can be known without reading a tensor; input (B, D), linear_weight (C, D).
inline void check_head(std::string_view op, const at::Tensor& input, const at::Tensor& linear_weight,
                       const std::optional<at::Tensor>& linear_bias, const at::Tensor& target,
                       const std::optional<at::Tensor>& target_b, const std::optional<at::Tensor>& lam,
                       const std::optional<at::Tensor>& weight, const at::Tensor& seed, at::IntArrayRef thresholds,
                       int64_t ignore_index, double label_smoothing, std::string_view reduction) {
  check_float(op, "input", input);
  const auto dtype = input.scalar_type(), accumulation = accumulation_dtype(dtype);
  PYRX_CHECK_VALUE(input.dim() == 2, op, "input", "of shape [B, D]", input.sizes());
  const int64_t rows = input.size(0), features = input.size(1);
  check_dtype(op, "linear_weight", linear_weight, dtype);
  PYRX_CHECK_VALUE(linear_weight.dim() == 2 && linear_weight.size(1) == features, op, "linear_weight",
                   "of shape [C, D] with D = " + text(features), linear_weight.sizes());
  const int64_t classes = linear_weight.size(0);
  PYRX_CHECK_VALUE(classes >= 1, op, "linear_weight", "of at least one class", linear_weight.sizes());
  check_device(op, "linear_weight", linear_weight, input.device());
  check_vector(op, "linear_bias", linear_bias, dtype, "[C]", classes, input.device());
  check_vector(op, "weight", weight, accumulation, "[C]", classes, input.device());
  const bool ids = target.scalar_type() == at::kLong;
  if (ids) {
    check_shape(op, "target", target, "[B]", {rows});
  } else {
    check_dtype(op, "target", target, accumulation);
    check_shape(op, "target", target, "[B, C]", {rows, classes});
  }
  check_device(op, "target", target, input.device());
  PYRX_CHECK_VALUE(target_b.has_value() == lam.has_value(), op, "target_b and lam", "together", "one of them");
  if (target_b) {
    PYRX_CHECK_TYPE(ids, op, "target", "of dtype torch.int64 beside target_b", dtype_name(target.scalar_type()));
    check_vector(op, "target_b", target_b, at::kLong, "[B]", rows, input.device());
    check_vector(op, "lam", lam, accumulation, "[B]", rows, input.device());
  }
  check_seed(op, seed, input.device());
  check_thresholds(op, thresholds);
  check_loss_options(op, label_smoothing, reduction);
  PYRX_CHECK_VALUE(ids || ignore_index < 0, op, "ignore_index", "negative where target holds probabilities",
                   ignore_index);
}

// Gradients to be scaled in place by that of the loss.
inline void check_scale(std::string_view op, at::ArrayRef<at::Tensor> gradients, const at::Tensor& grad_loss) {
  const auto dtype = gradients[0].scalar_type();
  check_float(op, "grad_input", gradients[0]);
  for (const at::Tensor& each : gradients) {
    check_dtype(op, "gradients", each, dtype);
    check_device(op, "gradients", each, grad_loss.device());
    PYRX_CHECK_VALUE(each.is_contiguous(), op, "gradients", "to be contiguous", each.strides());
  }
  check_loss_dtype(op, "grad_loss", grad_loss.scalar_type(), dtype);
  check_shape(op, "grad_loss", grad_loss, "[]", {});
}

}  // namespace pyrx
