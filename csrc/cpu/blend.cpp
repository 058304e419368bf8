// Alpha compositing on the CPU.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

#include "blend_checks.h"
#include "cpu/elements.h"
#include "cpu/pages.h"

namespace pyrx::cpu {
namespace {

constexpr int64_t kRun = 16384;  // bytes of a run: its alphas stay in the caches
constexpr int64_t kTask = 32768;

float widen(bfloat16 x) { return c10::detail::f32_from_bits(x.bits); }
float widen(float16 x) { return c10::detail::fp16_ieee_to_fp32_value(x.bits); }
template <typename A>
A widen(A x) { return x; }

// alphas[i * group ...] = alpha[i], as the arithmetic reads them
template <typename A, typename Acc>
void spread(const A* alpha, int64_t pixels, int64_t group, Acc* alphas) {
  if (group == 1) {
    for (int64_t i = 0; i < pixels; ++i) alphas[i] = static_cast<Acc>(widen(alpha[i]));
  } else if (group == 3) {
    for (int64_t i = 0; i < pixels; ++i)
      alphas[3 * i] = alphas[3 * i + 1] = alphas[3 * i + 2] = static_cast<Acc>(widen(alpha[i]));
  } else {
    for (int64_t i = 0; i < pixels; ++i) std::fill_n(alphas + i * group, group, static_cast<Acc>(widen(alpha[i])));
  }
}

// The alphas of `pixels` pixels from element `first`: where they lie, or spread into `scratch`.
template <typename Acc>
const Acc* alphas_of(const at::Tensor& alpha, int64_t first, int64_t pixels, int64_t group, Acc* scratch) {
  const void* data = alpha.const_data_ptr();
  if (alpha.scalar_type() == at::kBool) {
    spread(static_cast<const uint8_t*>(data) + first, pixels, group, scratch);
    return scratch;
  }
  const Acc* found = scratch;
  dispatch_storage(alpha.scalar_type(), [&](auto type) {
    using A = decltype(type);
    const A* from = static_cast<const A*>(data) + first;
    if constexpr (std::is_same_v<A, Acc>)
      if (group == 1) {
        found = from;
        return;
      }
    spread(from, pixels, group, scratch);
  });
  return found;
}

// f(row, first alpha, pixels, alphas, scratch) for runs of every row, over the threads; `scratch` is for as many elements.
template <typename T, typename F>
void for_runs(const BlendOperands& operands, F f) {
  const BlendLayout& layout = operands.layout;
  using Acc = accumulate_t<T>;
  constexpr int64_t kElements = kRun / sizeof(T);
  const int64_t pixels = std::min(layout.pixels, std::max<int64_t>(1, kElements / layout.group));
  const int64_t runs = (layout.pixels + pixels - 1) / pixels;
  const int64_t elements = pixels * layout.group, grain = std::max<int64_t>(1, kTask / (elements * layout.repeat));
  at::parallel_for(0, layout.rows() * runs, grain, [&](int64_t begin, int64_t end) {
    std::vector<Acc> scratch(2 * elements);
    for (int64_t i = begin; i < end; ++i) {
      const BlendRow row = blend_row(layout, i / runs);
      const int64_t first = i % runs * pixels, n = std::min(pixels, layout.pixels - first);
      f(i / runs, row, first, n, alphas_of(operands.alpha, row.alpha + first, n, layout.group, scratch.data()),
        scratch.data() + elements);
    }
  });
}

// Of each sample the sample of y, which is there.
std::vector<int64_t> partners(std::string_view op, const at::Tensor& partner, int64_t samples, int64_t others) {
  std::vector<int64_t> found(samples);
  for (int64_t i = 0; i < samples; ++i) {
    found[i] = partner.defined() ? partner.const_data_ptr<int64_t>()[i] : i;
    PYRX_CHECK_VALUE(found[i] >= 0 && found[i] < others, op, "partner", "in [0, " + text(others) + ")", found[i]);
  }
  return found;
}

void blend_into(const BlendOperands& operands, const at::Tensor& out) {
  const std::vector<int64_t> partner =
      partners("blend", operands.partner, operands.images.size(0), operands.y.size(0));
  if (out.numel() == 0) return;
  const BlendLayout& layout = operands.layout;
  dispatch_pixels(out.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(operands.images.const_data_ptr());
    const T* y = static_cast<const T*>(operands.y.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const auto& kernels = blend_kernels<T>();
    using Acc = accumulate_t<T>;
    for_runs<T>(operands, [&](int64_t, const BlendRow& row, int64_t first, int64_t n, const Acc* alphas, Acc*) {
      for (int64_t k = 0; k < layout.repeat; ++k) {
        const int64_t inside = row.inside + k * layout.plane() + first * layout.group;
        kernels.blend(x + row.sample * layout.x_sample + inside, y + partner[row.sample] * layout.y_sample + inside, alphas,
                      n * layout.group, to + row.sample * layout.sample() + inside);
      }
    });
  });
}

at::Tensor blend(const at::Tensor& x, const at::Tensor& y, const at::Tensor& alpha, const std::optional<at::Tensor>& partner) {
  check_blend("blend", "x", x, {}, y, alpha, partner);
  const at::MemoryFormat format = sample_format(x);
  const at::Tensor out = at::empty(x.sizes(), x.options(), format);
  use_huge_pages(out);
  blend_into(blend_operands(x, y, alpha, partner, format), out);
  return out;
}

void blend_out(const at::Tensor& out, const at::Tensor& x, const at::Tensor& y, const at::Tensor& alpha,
               const std::optional<at::Tensor>& partner) {
  check_blend("blend_out", "x", x, {}, y, alpha, partner);
  check_blend_out(out, x);
  const at::MemoryFormat format = pixel_format(out);
  const at::Tensor target = contiguous_target(out, format);
  blend_into(blend_operands(x, y, alpha, partner, format), target);
  finish(target, out);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> blend_backward(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                                                              const std::optional<at::Tensor>& y, const at::Tensor& alpha,
                                                              const std::optional<at::Tensor>& partner,
                                                              std::array<bool, 3> needs) {
  check_blend_backward(grad, x, y, alpha, partner, needs);
  const at::MemoryFormat format = sample_format(x ? *x : grad);
  const auto found = blend_gradients(grad, alpha, needs, format);
  for (const at::Tensor& each : found) use_huge_pages(each);
  const BlendOperands operands = blend_operands(grad, y, alpha, partner, format);
  const at::Tensor own = needs[2] ? dense_samples(*x, format) : at::Tensor();
  const std::vector<int64_t> partner_of =
      partners("blend_backward", y ? operands.partner : at::Tensor(), grad.size(0), y ? y->size(0) : grad.size(0));
  if (grad.numel() == 0) {
    found[2].zero_();
    return {found[0], found[1], found[2]};
  }
  const BlendLayout& layout = operands.layout;
  dispatch_storage(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using Acc = accumulate_t<T>;
    const auto data = [](const at::Tensor& tensor, bool there) {
      return there ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
    };
    const auto result = [](const at::Tensor& tensor, bool there) {
      return there ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
    };
    const T *upstream = data(operands.images, true), *x_data = data(own, needs[2]), *y_data = data(operands.y, needs[2]);
    T *grad_x = result(found[0], needs[0]), *grad_y = result(found[1], needs[1]);
    Acc* grad_alpha = needs[2] ? static_cast<Acc*>(found[2].mutable_data_ptr()) : nullptr;
    const int64_t x_sample = needs[2] ? own.stride(0) : 0;
    const auto& kernels = blend_kernels<T>();
    for_runs<T>(operands, [&](int64_t index, const BlendRow& row, int64_t first, int64_t n, const Acc* alphas, Acc* scratch) {
      Acc* sums = grad_alpha ? grad_alpha + index * layout.pixels + first : nullptr;
      Acc* terms = sums && layout.group > 1 ? scratch : sums;
      for (int64_t k = 0; k < layout.repeat; ++k) {
        const int64_t inside = row.inside + k * layout.plane() + first * layout.group;
        const int64_t at = row.sample * layout.sample() + inside;
        kernels.gradients({upstream + row.sample * layout.x_sample + inside,
                           x_data ? x_data + row.sample * x_sample + inside : nullptr,
                           y_data ? y_data + partner_of[row.sample] * layout.y_sample + inside : nullptr, alphas,
                           grad_x ? grad_x + at : nullptr, grad_y ? grad_y + at : nullptr, terms},
                          k > 0, n * layout.group);
      }
      if (terms == sums) return;
      for (int64_t i = 0; i < n; ++i) {
        Acc sum = terms[i * layout.group];
        for (int64_t c = 1; c < layout.group; ++c) sum += terms[i * layout.group + c];
        sums[i] = sum;
      }
    });
  });
  return {found[0], found[1], found[2]};
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) {
  m.impl("blend", &blend);
  m.impl("blend_out", &blend_out);
  m.impl("blend_backward", &blend_backward);
}

}  // namespace
}  // namespace pyrx::cpu
