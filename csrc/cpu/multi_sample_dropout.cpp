// Multi-sample dropout on the CPU: the M copies, their fold, and the fused head.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <array>
#include <string_view>
#include <tuple>

#include "cpu/multi_sample_dropout_head.h"
#include "cpu/targets.h"
#include "head_checks.h"

namespace pyrx::cpu {
namespace {

constexpr std::string_view kOp = "multi_sample_dropout", kFold = "multi_sample_dropout_fold",
                           kHead = "multi_sample_dropout_cross_entropy",
                           kHeadBackward = "multi_sample_dropout_cross_entropy_backward",
                           kHeadScale = "multi_sample_dropout_cross_entropy_scale_";

at::Tensor expand(const at::Tensor& input, const at::Tensor& seed, at::IntArrayRef thresholds, bool antithetic) {
  check_float(kOp, "input", input);
  check_seed(kOp, seed, input.device());
  check_thresholds(kOp, thresholds);
  const at::Tensor x = input.contiguous(), like = at::empty_like(input);
  const int64_t samples = static_cast<int64_t>(thresholds.size()), numel = x.numel();
  std::vector<int64_t> sizes{samples}, strides{numel};
  sizes.insert(sizes.end(), input.sizes().begin(), input.sizes().end());
  strides.insert(strides.end(), like.strides().begin(), like.strides().end());
  const at::Tensor out = at::empty_strided(sizes, strides, input.options());
  const at::Tensor y = like.is_contiguous() ? out : at::empty(sizes, input.options());
  use_huge_pages(y);
  const uint64_t key = seed_value(seed);
  dispatch_storage(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    const auto& kernels = element_kernels<T>();
    for_chunks(numel, [&](int64_t first, int64_t n, uint8_t* bits) {
      for (int64_t m = 0; m < samples; ++m) {
        row_bits(key, sample_mask(m, thresholds[m], antithetic), static_cast<uint64_t>(first), n, nullptr, bits);
        kernels.dropout(from + first, bits, n, keep_scale<accumulate_t<T>>(thresholds[m]), to + m * numel + first);
      }
    });
  });
  return finish(y, out);
}

at::Tensor fold(const at::Tensor& grad, const at::Tensor& seed, at::IntArrayRef thresholds, bool antithetic) {
  check_float(kFold, "grad", grad);
  check_seed(kFold, seed, grad.device());
  check_thresholds(kFold, thresholds);
  const int64_t samples = static_cast<int64_t>(thresholds.size());
  PYRX_CHECK_VALUE(grad.dim() > 0 && grad.size(0) == samples, kFold, "grad",
                   "of shape [M, ...] with M = " + text(samples), grad.sizes());
  const at::Tensor g = grad.contiguous(), out = at::empty_like(grad.select(0, 0)), y = contiguous_target(out);
  use_huge_pages(y);
  const uint64_t key = seed_value(seed);
  const int64_t numel = out.numel();
  dispatch_storage(g.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using Acc = accumulate_t<T>;
    const T* from = static_cast<const T*>(g.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    const auto& kernels = element_kernels<T>();
    for_chunks(numel, [&](int64_t first, int64_t n, uint8_t* bits) {
      thread_local std::vector<Acc> sum(kChunk);
      std::fill_n(sum.begin(), n, Acc(0));
      for (int64_t m = 0; m < samples; ++m) {
        row_bits(key, sample_mask(m, thresholds[m], antithetic), static_cast<uint64_t>(first), n, nullptr, bits);
        kernels.accumulate(from + m * numel + first, bits, n, keep_scale<Acc>(thresholds[m]), sum.data());
      }
      kernels.store(sum.data(), n, Acc(1), to + first);
    });
  });
  return finish(y, out);
}

struct Outcome {
  at::Tensor row_loss, grad_input, grad_weight, grad_bias;
  double loss = 0, denominator = 0;  // sum of row_loss; what "mean" divides it by
};

// The head over checked tensors: the rows' losses in the accumulation dtype and the gradients asked for in
// `gradient_dtype`, each times `factor` of the denominator.
template <typename Factor>
Outcome run_head(std::string_view op, const at::Tensor& input, const at::Tensor& linear_weight,
                   const std::optional<at::Tensor>& linear_bias, const at::Tensor& target,
                   const std::optional<at::Tensor>& target_b, const std::optional<at::Tensor>& lam,
                   const std::optional<at::Tensor>& weight, const at::Tensor& seed, at::IntArrayRef thresholds,
                   bool antithetic, bool combine_logits, int64_t ignore_index, double label_smoothing,
                   std::array<bool, 3> needs_grad, const std::optional<at::Tensor>& grad_loss, at::ScalarType gradient_dtype,
                 Factor factor) {
  const at::Tensor x = rows_of(input), w = rows_of(linear_weight);
  const int64_t rows = x.size(0), features = x.size(1), classes = w.size(0);
  const auto accumulation = accumulation_dtype(x.scalar_type());
  const bool ids = target.scalar_type() == at::kLong;
  const at::Tensor a = target.contiguous(), b = target_b ? target_b->contiguous() : a;
  if (ids) {
    check_classes(op, a, classes, ignore_index);
    if (target_b) check_classes(op, b, classes, ignore_index);
  }
  const auto as_accumulation = [&](const std::optional<at::Tensor>& t) {
    return t ? t->to(accumulation).contiguous() : at::Tensor();
  };
  const at::Tensor bias = as_accumulation(linear_bias), class_weight = as_accumulation(weight),
                   share = as_accumulation(lam), upstream = as_accumulation(grad_loss);
  const auto gradient = [&](bool needed, at::IntArrayRef shape) {
    const at::Tensor found = at::empty(needed ? shape : at::IntArrayRef{0}, x.options().dtype(gradient_dtype));
    use_huge_pages(found);
    return found;
  };
  needs_grad[2] = needs_grad[2] && linear_bias;
  Outcome outcome{at::empty({rows}, x.options().dtype(accumulation)), gradient(needs_grad[0], {rows, features}),
                  gradient(needs_grad[1], {classes, features}), gradient(needs_grad[2], {classes})};

  dispatch_storage(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using Acc = accumulate_t<T>;
    const auto data = [](const at::Tensor& t) {
      return t.defined() ? static_cast<const Acc*>(t.const_data_ptr()) : nullptr;
    };
    HeadArguments<T> arguments{
        .rows = rows,
        .features = features,
        .classes = classes,
        .input = static_cast<const T*>(x.const_data_ptr()),
        .input_stride = x.stride(0),
        .linear_weight = static_cast<const T*>(w.const_data_ptr()),
        .weight_stride = w.stride(0),
        .bias = data(bias),
        .class_weight = data(class_weight),
        .target_a = ids ? a.const_data_ptr<int64_t>() : nullptr,
        .target_b = ids ? b.const_data_ptr<int64_t>() : nullptr,
        .lam = data(share),
        .probabilities = ids ? nullptr : static_cast<const Acc*>(a.const_data_ptr()),
        .grad_loss = data(upstream),
        .class_weight_sum = static_cast<Acc>(classes),
        .label_smoothing = static_cast<Acc>(label_smoothing),
        .ignore_index = ignore_index,
        .seed = seed_value(seed),
        .thresholds = thresholds.data(),
        .antithetic = antithetic,
        .plan = sample_plan(thresholds.data(), static_cast<int64_t>(thresholds.size()), antithetic, combine_logits),
    };
    if (arguments.class_weight) {
      arguments.class_weight_sum = 0;
      for (int64_t c = 0; c < classes; ++c) arguments.class_weight_sum += arguments.class_weight[c];
    }
    for (int64_t i = 0; i < rows; ++i) outcome.denominator += ids ? static_cast<double>(arguments.target(i).weight) : 1.0;
    const Acc scale = static_cast<Acc>(factor(outcome.denominator) / (combine_logits ? 1.0 : static_cast<double>(thresholds.size())));

    const auto run = [&](auto operand, auto result) {
      using O = decltype(result);
      const auto out = [](const at::Tensor& t, bool needed) {
        return needed ? static_cast<O*>(t.mutable_data_ptr()) : nullptr;
      };
      Acc* losses = static_cast<Acc*>(outcome.row_loss.mutable_data_ptr());
      const HeadResults<T, O> results{losses, out(outcome.grad_input, needs_grad[0]),
                                      out(outcome.grad_weight, needs_grad[1]), out(outcome.grad_bias, needs_grad[2]),
                                      scale};
      Head<T, decltype(operand), O>(arguments, results).run();
      for (int64_t i = 0; i < rows; ++i) outcome.loss += static_cast<double>(losses[i]);
    };
    const auto with_result = [&](auto operand) {
      if constexpr (std::is_same_v<T, float16>) {
        if (gradient_dtype == at::kFloat) return run(operand, float());
      }
      run(operand, T());
    };
    dispatch_operand<T>(x.scalar_type(), with_result);
  });
  return outcome;
}

using HeadResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

HeadResult head(const at::Tensor& input, const at::Tensor& linear_weight, const std::optional<at::Tensor>& linear_bias,
                const at::Tensor& target, const std::optional<at::Tensor>& target_b, const std::optional<at::Tensor>& lam,
                const std::optional<at::Tensor>& weight, const at::Tensor& seed, at::IntArrayRef thresholds,
                bool antithetic, bool combine_logits, int64_t ignore_index, double label_smoothing,
                std::string_view reduction, std::array<bool, 3> needs_grad, at::ScalarType loss_dtype) {
  check_head(kHead, input, linear_weight, linear_bias, target, target_b, lam, weight, seed, thresholds, ignore_index,
             label_smoothing, reduction);
  check_loss_dtype(kHead, "loss_dtype", loss_dtype, input.scalar_type());
  const bool none = reduction == "none", mean = reduction == "mean";
  if (none) needs_grad = {false, false, false};
  const Outcome outcome = run_head(
      kHead, input, linear_weight, linear_bias, target, target_b, lam, weight, seed, thresholds, antithetic,
      combine_logits, ignore_index, label_smoothing, needs_grad, std::nullopt, saved_gradient_dtype(input.scalar_type()),
      // every row ignored: loss nan, gradients 0, as F.cross_entropy has them
      [&](double denominator) { return !mean ? 1.0 : denominator == 0 ? 0.0 : 1 / denominator; });
  const at::Tensor loss =
      none ? outcome.row_loss.to(loss_dtype)
           : at::full({}, mean ? outcome.loss / outcome.denominator : outcome.loss,
                      outcome.row_loss.options().dtype(loss_dtype));
  return {loss, outcome.grad_input, outcome.grad_weight, outcome.grad_bias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> head_backward(
    const at::Tensor& grad_loss, const at::Tensor& input, const at::Tensor& linear_weight,
    const std::optional<at::Tensor>& linear_bias, const at::Tensor& target, const std::optional<at::Tensor>& target_b,
    const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& weight, const at::Tensor& seed,
    at::IntArrayRef thresholds, bool antithetic, bool combine_logits, int64_t ignore_index, double label_smoothing,
    std::array<bool, 3> needs_grad) {
  check_head(kHeadBackward, input, linear_weight, linear_bias, target, target_b, lam, weight, seed, thresholds,
             ignore_index, label_smoothing, "none");
  check_loss_dtype(kHeadBackward, "grad_loss", grad_loss.scalar_type(), input.scalar_type());
  check_shape(kHeadBackward, "grad_loss", grad_loss, "[B]", {input.size(0)});
  check_device(kHeadBackward, "grad_loss", grad_loss, input.device());
  const Outcome outcome = run_head(kHeadBackward, input, linear_weight, linear_bias, target, target_b, lam, weight, seed,
                                   thresholds, antithetic, combine_logits, ignore_index, label_smoothing, needs_grad,
                                   grad_loss, input.scalar_type(), [](double) { return 1.0; });
  return {outcome.grad_input, outcome.grad_weight, outcome.grad_bias};
}

void head_scale(at::Tensor grad_input, at::Tensor grad_weight, at::Tensor grad_bias, const at::Tensor& grad_loss) {
  const std::array<at::Tensor, 3> gradients{grad_input, grad_weight, grad_bias};
  check_scale(kHeadScale, gradients, grad_loss);
  if (grad_loss.item<double>() == 1) return;
  for (const at::Tensor& each : gradients) each.mul_(grad_loss);
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) {
  m.impl("multi_sample_dropout", &expand);
  m.impl("multi_sample_dropout_fold", &fold);
  m.impl("multi_sample_dropout_cross_entropy", &head);
  m.impl("multi_sample_dropout_cross_entropy_backward", &head_backward);
  m.impl("multi_sample_dropout_cross_entropy_scale_", &head_scale);
}

}  // namespace
}  // namespace pyrx::cpu
