// Mixed cross-entropy on the GPU.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "cuda/launch.h"
#include "cuda/mixed_cross_entropy.cuh"
#include "head_checks.h"

namespace pyrx::cuda {
namespace {

// Blocks beyond which a block takes more rows, so that their losses are soon added up.
constexpr int64_t kBlocksAMultiprocessor = 16;

template <typename T>
bool by_16_bytes(const void* pointer, int64_t stride) {
  return is_aligned(pointer) && stride * int64_t(sizeof(T)) % 16 == 0;
}

std::tuple<at::Tensor, at::Tensor> mixed_cross_entropy(
    const at::Tensor& input, const at::Tensor& target, const at::Tensor& target_b, const at::Tensor& lam,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing, std::string_view reduction,
    bool needs_grad, at::ScalarType loss_dtype) {
  check_mixed_cross_entropy(input, target, target_b, lam, weight, label_smoothing, reduction, loss_dtype);
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor x = input.stride(1) == 1 ? input : input.contiguous();
  const at::Tensor a = target.contiguous(), b = target_b.contiguous(), share = lam.contiguous();
  const at::Tensor class_weight = weight ? weight->contiguous() : at::Tensor();
  const int64_t rows = x.size(0), classes = x.size(1);
  const bool none = reduction == "none", mean = reduction == "mean";
  const at::TensorOptions accumulation = x.options().dtype(lam.scalar_type()), narrow = x.options().dtype(loss_dtype);
  const at::Tensor gradient = at::empty({needs_grad ? rows : 0, needs_grad ? classes : 0},
                                        x.options().dtype(saved_gradient_dtype(x.scalar_type())));
  if (rows == 0) return {none ? at::empty({0}, narrow) : at::full({}, mean ? NAN : 0.0, narrow), gradient};
  const at::Tensor loss = at::empty(none ? at::IntArrayRef{rows} : at::IntArrayRef{}, narrow);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();

  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const bool is_narrow = loss_dtype != accumulation.dtype().toScalarType();
    A* wide_loss = is_narrow ? nullptr : mutable_data<A>(loss);
    T* narrow_loss = is_narrow ? mutable_data<T>(loss) : nullptr;
    const Target<A> targets{data<int64_t>(a), data<int64_t>(b), data<A>(share), nullptr, data<A>(class_weight), classes,
                            ignore_index, A(label_smoothing)};
    const bool wide = classes > kWarpColumns<A>;
    // few rows are spread over all multiprocessors
    const int64_t warps = wide ? kLossWarps : std::clamp<int64_t>(ceil_div(rows, multiprocessors()), 1, kLossWarps);
    const int64_t blocks = std::min(wide ? rows : ceil_div(rows, warps), kBlocksAMultiprocessor * multiprocessors());
    // every block finds the denominator of a few rows by itself, which is less than another launch takes
    const bool apart = mean && (wide || rows > kWeightRows);
    const int weight_parts = int(std::min<int64_t>(ceil_div(rows, kWeightRows), kMaxWeightParts));
    const at::Tensor scratch = at::empty({1 + weight_parts + blocks}, x.options().dtype(at::kDouble));
    double *const weights = mutable_data<double>(scratch) + 1, *const partials = weights + weight_parts;
    if (apart) {
      mixed_weight_kernel<A><<<weight_parts, kLossThreads, 0, stream>>>(weights, targets, rows);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    const MixedParams<T> params{.logits = data<T>(x),
                                .gradient = needs_grad ? mutable_data<Saved<T>>(gradient) : nullptr,
                                .row_losses = none ? wide_loss : nullptr,
                                .narrow_row_losses = none ? narrow_loss : nullptr,
                                .partial_losses = none ? nullptr : partials,
                                .denominator = reinterpret_cast<A*>(scratch.mutable_data_ptr()),
                                .weights = apart ? weights : nullptr,
                                .weight_parts = weight_parts,
                                .target = targets,
                                .rows = rows,
                                .stride = x.stride(0),
                                .mean = mean};
    constexpr int kSpan = 16 / sizeof(T);
    const bool spans = classes % kSpan == 0 && by_16_bytes<T>(params.logits, params.stride);
    const bool smoothed = label_smoothing != 0;
    const auto kernel = wide ? spans ? mixed_cross_entropy_wide_kernel<T, kSpan> : mixed_cross_entropy_wide_kernel<T, 1>
                        : spans ? smoothed ? mixed_cross_entropy_kernel<T, kSpan, true>
                                           : mixed_cross_entropy_kernel<T, kSpan, false>
                        : smoothed ? mixed_cross_entropy_kernel<T, 1, true>
                                   : mixed_cross_entropy_kernel<T, 1, false>;
    kernel<<<unsigned(blocks), unsigned(warps * kWarp), 0, stream>>>(params);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (none) return;
    mixed_loss_kernel<T><<<1, kLossThreads, 0, stream>>>(partials, int(blocks), params.denominator, wide_loss, narrow_loss);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {loss, gradient};
}

void mixed_cross_entropy_scale(at::Tensor gradient, const at::Tensor& grad_loss) {
  check_mixed_scale(gradient, grad_loss);
  const c10::cuda::CUDAGuard guard(gradient.device());
  if (gradient.numel() == 0) return;
  const at::Tensor factors = grad_loss.contiguous();
  dispatch(gradient.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const bool is_narrow = factors.scalar_type() == gradient.scalar_type();
    const MixedScaleParams<T> params{.gradient = mutable_data<T>(gradient),
                                     .factor = is_narrow ? nullptr : data<Acc<T>>(factors),
                                     .narrow_factor = is_narrow ? data<T>(factors) : nullptr,
                                     .rows = gradient.size(0),
                                     .classes = gradient.size(1),
                                     .per_row = factors.dim() == 1};
    constexpr int kSpan = 16 / sizeof(T);
    const bool spans = by_16_bytes<T>(params.gradient, params.classes);
    const auto kernel = spans ? mixed_scale_kernel<T, kSpan> : mixed_scale_kernel<T, 1>;
    kernel<<<blocks_for(params.rows, kLossWarps), kLossThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(params);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

TORCH_LIBRARY_IMPL(pyrx, CUDA, m) {
  m.impl("mixed_cross_entropy", &mixed_cross_entropy);
  m.impl("mixed_cross_entropy_scale_", &mixed_cross_entropy_scale);
}

}  // namespace
}  // namespace pyrx::cuda
