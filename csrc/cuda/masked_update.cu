// Masked optimizer steps on the GPU.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "cuda/launch.h"
#include "cuda/masked_update.cuh"
#include "masked_checks.h"

namespace pyrx::cuda {
namespace {

constexpr size_t kParameterBytes = 4096;

// The tensors of one weight, row-major: themselves, or copies.
struct Operands {
  at::Tensor weight, grad, moments[kMostMoments], bits;
};

template <typename T>
UpdateTensor<T> update_tensor(const Operands& operands, const at::Tensor& step, int64_t dim) {
  const at::Tensor& weight = operands.weight;
  return {mutable_data<T>(weight),
          data<T>(operands.grad),
          {mutable_data<T>(operands.moments[0]), mutable_data<T>(operands.moments[1])},
          mutable_data<uint8_t>(operands.bits),
          data<float>(step),
          weight.numel(),
          weight.size(-1),
          group_layout(weight.sizes(), dim).inner,
          0};
}

template <typename Update, typename T>
void launch(void (*kernel)(UpdateTable<Update, T>), UpdateTable<Update, T> table,
            const std::vector<UpdateTensor<T>>& tensors, int64_t tile) {
  static_assert(sizeof table <= kParameterBytes);
  for (size_t first = 0; first < tensors.size(); first += kUpdateTensors) {
    table.count = static_cast<int>(std::min<size_t>(kUpdateTensors, tensors.size() - first));
    int64_t blocks = 0;
    for (int i = 0; i < table.count; ++i) {
      table.tensors[i] = tensors[first + i];
      table.tensors[i].first_block = blocks;
      blocks += ceil_div(table.tensors[i].numel, tile);
    }
    kernel<<<static_cast<unsigned>(blocks), kUpdateThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(table);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

// A mask by the op itself, for groups that no fused kernel ranks.
void make_mask(const at::Tensor& weight, const NM& nm, int64_t dim, const at::Tensor& bits) {
  using Signature = at::Tensor(const at::Tensor&, int64_t, int64_t, int64_t, bool, bool, bool);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("pyrx::nm_mask", "").typed<Signature>();
  bits.copy_(op.call(weight, nm.n, nm.m, dim, nm.magnitude, true, false));
}

// steps and lr_tensor may be null.
template <typename Update>
void masked_update(at::TensorList weights, at::TensorList grads, std::initializer_list<at::TensorList> moments,
                   at::TensorList masks, const at::TensorList* steps, const std::optional<at::Tensor>& lr_tensor,
                   const NM& nm, int64_t dim, bool refresh, const typename Update::Options& options) {
  if (weights.empty()) return;
  const c10::cuda::CUDAGuard guard(weights[0].device());
  const at::AutoDispatchBelowADInplaceOrView below;
  dispatch(weights[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    std::vector<UpdateTensor<T>> rows, columns, plain, odd;  // by the kernel that takes them
    std::vector<Operands> operands(weights.size());
    std::vector<size_t> unranked;
    const bool fuses = refresh && !std::is_same_v<T, double>;
    const bool by_rows = fuses && dispatch_fused(nm, false, [](auto) {});
    const bool by_columns = fuses && dispatch_fused(nm, true, [](auto) {});
    for (size_t i = 0; i < weights.size(); ++i) {
      if (weights[i].numel() == 0) continue;
      Operands& own = operands[i];
      own = {weights[i].contiguous(), grads[i].contiguous(), {}, masks[i].contiguous()};
      int moment = 0;
      for (const at::TensorList& list : moments) own.moments[moment++] = list[i].contiguous();
      const int64_t dims = weights[i].dim(), along = dim < 0 ? dim + dims : dim;
      const UpdateTensor<T> tensor = update_tensor<T>(own, steps ? (*steps)[i] : at::Tensor(), along);
      const bool whole = tensor.row % kGroup == 0 && is_aligned(tensor.weight) && is_aligned(tensor.grad) &&
                         is_aligned(tensor.moments[0]) && is_aligned(tensor.moments[1]);
      const bool ranks = whole && (along == dims - 1 ? by_rows : by_columns);
      if (refresh && !ranks) unranked.push_back(i);
      (!whole ? odd : !ranks ? plain : along == dims - 1 ? rows : columns).push_back(tensor);
    }
    const double* lr = lr_tensor ? data<double>(*lr_tensor) : nullptr;
    const UpdateTable<Update, T> table{{}, options, lr, {kInfinity<T>, nm.n, nm.m, nm.magnitude}, 0};
    launch(&update_elements_kernel<Update, T>, table, odd, kElementTile);
    launch(&update_rows_kernel<Update, T, 0, 1>, table, plain, kRowTile<T>);
    if constexpr (!std::is_same_v<T, double>) {
      dispatch_fused(nm, false, [&](auto ratio) {
        launch(&update_rows_kernel<Update, T, ratio.n, ratio.m>, table, rows, kRowTile<T>);
      });
      dispatch_fused(nm, true, [&](auto ratio) {
        if constexpr (ratio.m != 0)
          launch(&update_columns_kernel<Update, T, ratio.n, ratio.m>, table, columns, kColumnTile<T, ratio.m>);
      });
    }
    for (const size_t i : unranked)
      make_mask(operands[i].weight, nm, dim < 0 ? dim + weights[i].dim() : dim, operands[i].bits);
    for (size_t i = 0; i < weights.size(); ++i) {
      if (weights[i].numel() == 0) continue;
      finish(operands[i].weight, weights[i]);
      int moment = 0;
      for (const at::TensorList& list : moments) finish(operands[i].moments[moment++], list[i]);
      if (refresh) finish(operands[i].bits, masks[i]);
    }
  });
}

void masked_adamw(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                  at::TensorList masks, at::TensorList steps, const std::optional<at::Tensor>& lr_tensor, int64_t n,
                  int64_t m, int64_t dim, bool magnitude, int64_t rule, double strength, bool refresh, double lr,
                  double beta1, double beta2, double eps, double weight_decay, bool maximize) {
  const NM nm =
      check_masked_adamw(weights, grads, exp_avgs, exp_avg_sqs, masks, steps, lr_tensor, n, m, dim, magnitude, rule);
  const AdamWOptions options{{static_cast<Rule>(rule), maximize, strength, lr}, beta1, beta2, eps, weight_decay};
  masked_update<AdamW>(weights, grads, {exp_avgs, exp_avg_sqs}, masks, &steps, lr_tensor, nm, dim, refresh, options);
}

void masked_sgd(at::TensorList weights, at::TensorList grads, at::TensorList momentum_buffers, at::TensorList masks,
                const std::optional<at::Tensor>& lr_tensor, int64_t n, int64_t m, int64_t dim, bool magnitude,
                int64_t rule, double strength, bool refresh, double lr, double momentum, double dampening,
                double weight_decay, bool nesterov, bool maximize) {
  const NM nm =
      check_masked_sgd(weights, grads, momentum_buffers, masks, lr_tensor, n, m, dim, magnitude, rule, momentum);
  const SGDOptions options{
      {static_cast<Rule>(rule), maximize, strength, lr}, momentum, dampening, weight_decay, nesterov};
  const auto update = [&](std::initializer_list<at::TensorList> moments) {
    masked_update<SGD>(weights, grads, moments, masks, nullptr, lr_tensor, nm, dim, refresh, options);
  };
  if (momentum != 0) update({momentum_buffers});
  else update({});
}

TORCH_LIBRARY_IMPL(pyrx, CUDA, m) {
  m.impl("masked_adamw", &masked_adamw);
  m.impl("masked_sgd", &masked_sgd);
}

}  // namespace
}  // namespace pyrx::cuda
