// Multi-sample dropout's autograd formulas: the copies and their fold, which are each other's, and the head's.
#include "autograd/losses.h"

#include <array>
#include <string_view>
#include <tuple>

namespace pyrx {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Copies = Tensor(const Tensor&, const Tensor&, at::IntArrayRef, bool);

const c10::TypedOperatorHandle<Copies>& copies_op(bool fold) {
  static const std::array ops{find<Copies>("pyrx::multi_sample_dropout"), find<Copies>("pyrx::multi_sample_dropout_fold")};
  return ops[fold];
}

template <bool kFold>
Tensor copies_below(const Tensor& input, const Tensor& seed, at::IntArrayRef thresholds, bool antithetic) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return copies_op(kFold).call(input, seed, thresholds, antithetic);
}

template <bool kFold>
class CopiesFunction : public torch::autograd::Function<CopiesFunction<kFold>> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& seed, at::IntArrayRef thresholds,
                        bool antithetic) {
    context->save_for_backward({seed});
    context->saved_data["thresholds"] = thresholds;
    context->saved_data["antithetic"] = antithetic;
    return copies_below<kFold>(input, seed, thresholds, antithetic);
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    const Tensor seed = context->get_saved_variables()[0];
    return {copies_op(!kFold).call(upstream[0], seed, context->saved_data["thresholds"].toIntVector(),
                                   context->saved_data["antithetic"].toBool()),
            Tensor(), Tensor(), Tensor()};
  }
};

template <bool kFold>
Tensor copies(const Tensor& input, const Tensor& seed, at::IntArrayRef thresholds, bool antithetic) {
  return is_differentiated(input) ? CopiesFunction<kFold>::apply(input, seed, thresholds, antithetic)
                                  : copies_below<kFold>(input, seed, thresholds, antithetic);
}

using OptionalTensor = std::optional<Tensor>;
using Needs = std::array<bool, 3>;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

#define PYRX_HEAD "pyrx::multi_sample_dropout_cross_entropy"

#define PYRX_HEAD_TENSORS                                                                                    \
  const Tensor &input, const Tensor &linear_weight, const OptionalTensor &linear_bias, const Tensor &target, \
      const OptionalTensor &target_b, const OptionalTensor &lam, const OptionalTensor &weight, const Tensor &seed
#define PYRX_HEAD_OPTIONS \
  at::IntArrayRef thresholds, bool antithetic, bool combine_logits, int64_t ignore_index, double label_smoothing

Outputs head_below(PYRX_HEAD_TENSORS, PYRX_HEAD_OPTIONS, std::string_view reduction, Needs needs_grad,
                   at::ScalarType loss_dtype) {
  static const auto op = find<decltype(head_below)>(PYRX_HEAD);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(input, linear_weight, linear_bias, target, target_b, lam, weight, seed, thresholds, antithetic,
                 combine_logits, ignore_index, label_smoothing, reduction, needs_grad, loss_dtype);
}

using Backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, PYRX_HEAD_TENSORS, PYRX_HEAD_OPTIONS, Needs);
using Scale = void(Tensor, Tensor, Tensor, const Tensor&);

class HeadFunction : public torch::autograd::Function<HeadFunction> {
 public:
  static variable_list forward(AutogradContext* context, PYRX_HEAD_TENSORS, PYRX_HEAD_OPTIONS,
                               std::string_view reduction, Needs needs_grad, at::ScalarType loss_dtype,
                               Outputs* outputs) {
    auto [loss, grad_input, grad_weight, grad_bias] =
        head_below(input, linear_weight, linear_bias, target, target_b, lam, weight, seed, thresholds, antithetic,
                   combine_logits, ignore_index, label_smoothing, reduction, needs_grad, loss_dtype);
    context->set_materialize_grads(false);
    auto& saved = context->saved_data;
    const bool recompute = reduction == "none";
    saved["recompute"] = recompute;
    saved["needs_grad"] = int64_t(needs_grad[0] | needs_grad[1] << 1 | needs_grad[2] << 2);
    if (recompute) {
      const auto or_undefined = [](const OptionalTensor& tensor) { return tensor.value_or(Tensor()); };
      context->save_for_backward({input, linear_weight, or_undefined(linear_bias), target, or_undefined(target_b),
                                  or_undefined(lam), or_undefined(weight), seed});
      saved["thresholds"] = thresholds;
      saved["antithetic"] = antithetic;
      saved["combine_logits"] = combine_logits;
      saved["ignore_index"] = ignore_index;
      saved["label_smoothing"] = label_smoothing;
    } else {
      context->save_for_backward({grad_input, grad_weight, grad_bias});
      saved["dtype"] = input.scalar_type();
    }
    *outputs = {loss, grad_input, grad_weight, grad_bias};
    return {loss};
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    variable_list gradients(kArguments);
    if (!upstream[0].defined()) return gradients;
    auto& saved = context->saved_data;
    const int64_t needs = saved["needs_grad"].toInt();
    variable_list found =
        saved["recompute"].toBool() ? recomputed(context, upstream[0], needs) : scaled(context, upstream[0]);
    found = differentiable_once(PYRX_HEAD, std::move(found));
    for (int i = 0; i < 3; ++i)
      if (needs >> i & 1) gradients[i] = found[i];
    return gradients;
  }

 private:
  static constexpr size_t kArguments = 17;

  static variable_list recomputed(AutogradContext* context, const Tensor& upstream, int64_t needs) {
    static const auto op = find<Backward>(PYRX_HEAD "_backward");
    auto& saved = context->saved_data;
    const auto t = context->get_saved_variables();
    const auto optional = [](const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; };
    const auto [grad_input, grad_weight, grad_bias] =
        op.call(upstream.contiguous(), t[0], t[1], optional(t[2]), t[3], optional(t[4]), optional(t[5]),
                optional(t[6]), t[7], saved["thresholds"].toIntVector(), saved["antithetic"].toBool(),
                saved["combine_logits"].toBool(), saved["ignore_index"].toInt(), saved["label_smoothing"].toDouble(),
                Needs{bool(needs & 1), bool(needs & 2), bool(needs & 4)});
    return {grad_input, grad_weight, grad_bias};
  }

  static variable_list scaled(AutogradContext* context, const Tensor& upstream) {
    static const auto op = find<Scale>(PYRX_HEAD "_scale_");
    const auto scale = [](const variable_list& found, const Tensor& factor) {
      op.call(found[0], found[1], found[2], factor);
    };
    return pyrx::scaled(scale, context->get_saved_variables(), upstream, context->saved_data["dtype"].toScalarType());
  }
};

Outputs head(PYRX_HEAD_TENSORS, PYRX_HEAD_OPTIONS, std::string_view reduction, Needs needs_grad,
             at::ScalarType loss_dtype) {
  if (!is_differentiated(input) && !is_differentiated(linear_weight) &&
      !(linear_bias && is_differentiated(*linear_bias))) {
    return head_below(input, linear_weight, linear_bias, target, target_b, lam, weight, seed, thresholds, antithetic,
                      combine_logits, ignore_index, label_smoothing, reduction, needs_grad, loss_dtype);
  }
  needs_grad[2] = needs_grad[2] && linear_bias;
  Outputs outputs;  // the gradients go past autograd, which is not to know them
  std::get<0>(outputs) =
      HeadFunction::apply(input, linear_weight, linear_bias, target, target_b, lam, weight, seed, thresholds, antithetic,
                          combine_logits, ignore_index, label_smoothing, reduction, needs_grad, loss_dtype, &outputs)[0];
  return outputs;
}

TORCH_LIBRARY_IMPL(pyrx, Autograd, m) {
  m.impl("multi_sample_dropout", &copies<false>);
  m.impl("multi_sample_dropout_fold", &copies<true>);
  m.impl("multi_sample_dropout_cross_entropy", &head);
}

}  // namespace
}  // namespace pyrx
