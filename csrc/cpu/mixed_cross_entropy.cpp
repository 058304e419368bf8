// Mixed cross-entropy on the CPU: a row's loss and gradient while its logits are in the first-level cache.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "cpu/elements.h"
#include "cpu/pages.h"
#include "cpu/targets.h"
#include "head_checks.h"

namespace pyrx::cpu {
namespace {

constexpr std::string_view kOp = "mixed_cross_entropy";

template <typename Acc>
struct Targets {
  const int64_t *a, *b;     // (N,)
  const Acc* lam;           // (N,)
  const Acc* class_weight;  // (C,) or null
  Acc class_weight_sum, label_smoothing;
  int64_t classes, ignore_index;

  ClassTarget<Acc> operator[](int64_t row) const {
    return class_target(a[row], b[row], lam[row], class_weight, class_weight_sum, classes, ignore_index, label_smoothing);
  }
};

// The sum of f(row) in double: blocks of rows, so that the number of threads changes no bit.
template <typename F>
double sum_rows(int64_t rows, int64_t elements_a_row, F f) {
  const int64_t block = std::max<int64_t>(1, kChunk / elements_a_row), blocks = (rows + block - 1) / block;
  std::vector<double> sums(blocks, 0.0);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t row = i * block; row < std::min(rows, (i + 1) * block); ++row) sums[i] += static_cast<double>(f(row));
  });
  double sum = 0;
  for (const double each : sums) sum += each;
  return sum;
}

std::tuple<at::Tensor, at::Tensor> mixed_cross_entropy(
    const at::Tensor& input, const at::Tensor& target, const at::Tensor& target_b, const at::Tensor& lam,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing, std::string_view reduction,
    bool needs_grad, at::ScalarType loss_dtype) {
  check_mixed_cross_entropy(input, target, target_b, lam, weight, label_smoothing, reduction, loss_dtype);
  const at::Tensor x = rows_of(input), a = target.contiguous(), b = target_b.contiguous(), share = lam.contiguous();
  const at::Tensor class_weight = weight ? weight->contiguous() : at::Tensor();
  const int64_t rows = x.size(0), classes = x.size(1);
  check_classes(kOp, a, classes, ignore_index);
  check_classes(kOp, b, classes, ignore_index);
  const bool none = reduction == "none", mean = reduction == "mean";
  const at::TensorOptions accumulation = x.options().dtype(share.scalar_type());
  const at::Tensor row_loss = at::empty({none ? rows : 0}, accumulation);
  const at::Tensor gradient = at::empty({needs_grad ? rows : 0, needs_grad ? classes : 0},
                                        x.options().dtype(saved_gradient_dtype(x.scalar_type())));
  use_huge_pages(gradient);
  const double class_weight_sum = weight ? weight->sum(at::kDouble).item<double>() : static_cast<double>(classes);
  double loss = 0, denominator = 1;
  dispatch_storage(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using O = std::conditional_t<std::is_same_v<T, float16>, float, T>;
    using Acc = accumulate_t<T>;
    const auto data = [](const at::Tensor& t) {
      return t.defined() ? static_cast<const Acc*>(t.const_data_ptr()) : nullptr;
    };
    const Targets<Acc> targets{a.const_data_ptr<int64_t>(), b.const_data_ptr<int64_t>(), data(share), data(class_weight),
                         static_cast<Acc>(class_weight_sum), static_cast<Acc>(label_smoothing), classes, ignore_index};
    if (mean) denominator = sum_rows(rows, 8, [&](int64_t row) { return targets[row].weight; });
    const T* logits = static_cast<const T*>(x.const_data_ptr());
    O* gradients = needs_grad ? static_cast<O*>(gradient.mutable_data_ptr()) : nullptr;
    Acc* losses = none ? static_cast<Acc*>(row_loss.mutable_data_ptr()) : nullptr;
    // every row ignored: loss nan, gradients 0, as F.cross_entropy has them
    const Acc factor = static_cast<Acc>(denominator == 0 ? 0.0 : 1 / denominator);
    const auto& kernels = loss_kernels<T, O>();
    loss = sum_rows(rows, classes, [&](int64_t row) {
      thread_local std::vector<Acc> scratch;
      LogitsRow<T, O> entry{};
      entry.class_weight = targets.class_weight;
      entry.target = targets[row];
      entry.label_smoothing = targets.label_smoothing;
      entry.gradient_factor = factor;
      entry.classes = classes;
      entry.logits = logits + row * x.stride(0);
      if (gradients) {
        entry.gradient = gradients + row * classes;
        if constexpr (std::is_same_v<O, Acc>) {
          entry.scratch = entry.gradient;
        } else {
          if (static_cast<int64_t>(scratch.size()) < classes) scratch.resize(classes);
          entry.scratch = scratch.data();
        }
      }
      const Acc found = kernels.cross_entropy(entry);
      if (losses) losses[row] = found;
      return found;
    });
  });
  if (none) return {row_loss.to(loss_dtype), gradient};
  return {at::full({}, loss / denominator, accumulation.dtype(loss_dtype)), gradient};
}

void mixed_cross_entropy_scale(at::Tensor gradient, const at::Tensor& grad_loss) {
  check_mixed_scale(gradient, grad_loss);
  const int64_t rows = gradient.size(0), classes = gradient.size(1), stride = grad_loss.dim();
  if (gradient.numel() == 0) return;
  const at::Tensor factors = grad_loss.to(accumulation_dtype(gradient.scalar_type())).contiguous();
  dispatch_storage(gradient.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* factor = static_cast<const accumulate_t<T>*>(factors.const_data_ptr());
    if (stride == 0 && *factor == 1) return;
    T* data = static_cast<T*>(gradient.mutable_data_ptr());
    const auto& kernels = element_kernels<T>();
    at::parallel_for(0, rows, std::max<int64_t>(1, kChunk / classes), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* at = data + row * classes;
        kernels.dropout(at, nullptr, classes, factor[row * stride], at);
      }
    });
  });
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) {
  m.impl("mixed_cross_entropy", &mixed_cross_entropy);
  m.impl("mixed_cross_entropy_scale_", &mixed_cross_entropy_scale);
}

}  // namespace
}  // namespace pyrx::cpu
