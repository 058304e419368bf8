// Dropout's autograd formula: the gradient goes through the same mask.
#include "autograd/dispatch.h"

namespace pyrx {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const auto& dropout_op() {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, int64_t, int64_t)>("pyrx::dropout");
  return op;
}

Tensor dropout_below(const Tensor& input, const Tensor& seed, int64_t threshold, int64_t sample) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return dropout_op().call(input, seed, threshold, sample);
}

class DropoutFunction : public torch::autograd::Function<DropoutFunction> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& seed, int64_t threshold,
                        int64_t sample) {
    context->save_for_backward({seed});
    context->saved_data["threshold"] = threshold;
    context->saved_data["sample"] = sample;
    return dropout_below(input, seed, threshold, sample);
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    const Tensor seed = context->get_saved_variables()[0];
    return {dropout_op().call(upstream[0], seed, context->saved_data["threshold"].toInt(),
                              context->saved_data["sample"].toInt()),
            Tensor(), Tensor(), Tensor()};
  }
};

Tensor dropout(const Tensor& input, const Tensor& seed, int64_t threshold, int64_t sample) {
  return is_differentiated(input) ? DropoutFunction::apply(input, seed, threshold, sample)
                                  : dropout_below(input, seed, threshold, sample);
}

TORCH_LIBRARY_IMPL(pyrx, Autograd, m) { m.impl("dropout", &dropout); }

}  // namespace
}  // namespace pyrx
