// Mixed cross-entropy's autograd formula: the forward's gradient, scaled by the upstream one.
#include "autograd/losses.h"

#include <string_view>
#include <tuple>

namespace pyrx {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using OptionalTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor>;

#define PYRX_OP "pyrx::mixed_cross_entropy"
#define PYRX_ARGUMENTS                                                                                      \
  const Tensor &input, const Tensor &target, const Tensor &target_b, const Tensor &lam,                     \
      const OptionalTensor &weight, int64_t ignore_index, double label_smoothing, std::string_view reduction, \
      bool needs_grad, at::ScalarType loss_dtype

Outputs below(PYRX_ARGUMENTS) {
  static const auto op = find<decltype(below)>(PYRX_OP);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(input, target, target_b, lam, weight, ignore_index, label_smoothing, reduction, needs_grad, loss_dtype);
}

class MixedCrossEntropy : public torch::autograd::Function<MixedCrossEntropy> {
 public:
  static variable_list forward(AutogradContext* context, PYRX_ARGUMENTS, Outputs* outputs) {
    *outputs = below(input, target, target_b, lam, weight, ignore_index, label_smoothing, reduction, needs_grad, loss_dtype);
    context->set_materialize_grads(false);
    context->save_for_backward({std::get<1>(*outputs)});
    context->saved_data["dtype"] = input.scalar_type();
    return {std::get<0>(*outputs)};
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    variable_list gradients(kArguments);
    if (!upstream[0].defined()) return gradients;
    static const auto op = find<void(Tensor, const Tensor&)>(PYRX_OP "_scale_");
    const auto scale = [](const variable_list& found, const Tensor& factor) { op.call(found[0], factor); };
    const variable_list found =
        scaled(scale, context->get_saved_variables(), upstream[0], context->saved_data["dtype"].toScalarType());
    gradients[0] = differentiable_once(PYRX_OP, found)[0];
    return gradients;
  }

 private:
  static constexpr size_t kArguments = 11;
};

Outputs mixed_cross_entropy(PYRX_ARGUMENTS) {
  if (!is_differentiated(input))
    return below(input, target, target_b, lam, weight, ignore_index, label_smoothing, reduction, needs_grad, loss_dtype);
  Outputs outputs;  // the gradient goes past autograd, which is not to know it
  std::get<0>(outputs) = MixedCrossEntropy::apply(input, target, target_b, lam, weight, ignore_index, label_smoothing,
                                                  reduction, needs_grad, loss_dtype, &outputs)[0];
  return outputs;
}

TORCH_LIBRARY_IMPL(pyrx, Autograd, m) { m.impl("mixed_cross_entropy", &mixed_cross_entropy); }

}  // namespace
}  // namespace pyrx
