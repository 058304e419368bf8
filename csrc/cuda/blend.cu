// Alpha compositing on the GPU.
#include <torch/library.h>

#include "blend_checks.h"
#include "cuda/blend.cuh"
#include "cuda/launch.h"

namespace pyrx::cuda {
namespace {

template <typename F>
void dispatch_pixels(at::ScalarType dtype, F&& f) {
  if (dtype == at::kByte) return f(uint8_t());
  dispatch(dtype, f);
}

// The operands with alpha as the kernels take it: of bool, of the images' own or of the arithmetic's type.
BlendOperands device_operands(const at::Tensor& images, const std::optional<at::Tensor>& y, const at::Tensor& alpha,
                              const std::optional<at::Tensor>& partner, at::MemoryFormat format) {
  const at::ScalarType dtype = images.scalar_type();
  const bool taken = alpha.scalar_type() == at::kBool || alpha.scalar_type() == dtype;
  return blend_operands(images, y, taken ? alpha : alpha.to(accumulation_dtype(dtype)), partner, format);
}

// f(T, A) for device_operands.
template <typename F>
void dispatch_alpha(const BlendOperands& operands, F f) {
  dispatch_pixels(operands.images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if (operands.alpha.scalar_type() == at::kBool) f(type, uint8_t());
    else if (operands.alpha.scalar_type() == accumulation_dtype(operands.images.scalar_type())) f(type, Acc<T>());
    else if constexpr (sizeof(T) == 2) f(type, type);
  });
}

// Whether eight elements of a row and their alphas can be moved at once.
bool is_vectorised(const BlendOperands& operands, std::initializer_list<const void*> pointers, size_t alpha_bytes) {
  const BlendLayout& layout = operands.layout;
  bool found = layout.row() % kGroup == 0 && layout.x_sample % kGroup == 0 && layout.y_sample % kGroup == 0;
  for (const void* each : pointers) found = found && is_aligned(each);
  if (layout.group > 1) return found;
  return found && layout.alpha_sample % kGroup == 0 && layout.alpha_channel % kGroup == 0 &&
         layout.alpha_frame % kGroup == 0 && is_aligned(operands.alpha.const_data_ptr(), alpha_bytes);
}

void blend_into(const BlendOperands& operands, const at::Tensor& out) {
  if (out.numel() == 0) return;
  dispatch_alpha(operands, [&](auto type, auto alpha_type) {
    using T = decltype(type);
    using A = decltype(alpha_type);
    const BlendLayout& layout = operands.layout;
    const T *x = data<T>(operands.images), *y = data<T>(operands.y);
    T* to = mutable_data<T>(out);
    const bool aligned = is_vectorised(operands, {x, y, to}, std::min<size_t>(16, sizeof(A) * kGroup));
    const unsigned blocks = blocks_for(layout.rows() * ceil_div(layout.row(), kGroup), kBlendThreads);
    blend_kernel<T, A><<<blocks, kBlendThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        x, y, data<A>(operands.alpha), data<int64_t>(operands.partner), operands.y.size(0), layout, aligned, to);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

at::Tensor blend(const at::Tensor& x, const at::Tensor& y, const at::Tensor& alpha, const std::optional<at::Tensor>& partner) {
  check_blend("blend", "x", x, {}, y, alpha, partner);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::MemoryFormat format = sample_format(x);
  const at::Tensor out = at::empty(x.sizes(), x.options(), format);
  blend_into(device_operands(x, y, alpha, partner, format), out);
  return out;
}

void blend_out(const at::Tensor& out, const at::Tensor& x, const at::Tensor& y, const at::Tensor& alpha,
               const std::optional<at::Tensor>& partner) {
  check_blend("blend_out", "x", x, {}, y, alpha, partner);
  check_blend_out(out, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::MemoryFormat format = pixel_format(out);
  const at::Tensor target = out.is_contiguous(format) ? out : at::empty(out.sizes(), out.options(), format);
  blend_into(device_operands(x, y, alpha, partner, format), target);
  finish(target, out);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> blend_backward(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                                                              const std::optional<at::Tensor>& y, const at::Tensor& alpha,
                                                              const std::optional<at::Tensor>& partner,
                                                              std::array<bool, 3> needs) {
  check_blend_backward(grad, x, y, alpha, partner, needs);
  const c10::cuda::CUDAGuard guard(grad.device());
  const at::MemoryFormat format = sample_format(x ? *x : grad);
  const auto found = blend_gradients(grad, alpha, needs, format);
  if (grad.numel() == 0) {
    found[2].zero_();
    return {found[0], found[1], found[2]};
  }
  const BlendOperands operands = device_operands(grad, y, alpha, partner, format);
  const at::Tensor own = needs[2] ? dense_samples(*x, format) : at::Tensor();
  const int64_t x_sample = needs[2] ? own.stride(0) : 0, others = y ? y->size(0) : 0;
  dispatch_alpha(operands, [&](auto type, auto alpha_type) {
    using T = decltype(type);
    using A = decltype(alpha_type);
    if constexpr (!std::is_same_v<T, uint8_t>) {  // check_float
      const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
      const BlendLayout& layout = operands.layout;
      const T *upstream = data<T>(operands.images), *x_data = data<T>(own), *y_data = data<T>(operands.y);
      const A* alphas = data<A>(operands.alpha);
      const int64_t* partners = data<int64_t>(operands.partner);
      T* grad_x = needs[0] ? mutable_data<T>(found[0]) : nullptr;
      T* grad_y = needs[1] ? mutable_data<T>(found[1]) : nullptr;
      Acc<T>* grad_alpha = needs[2] ? mutable_data<Acc<T>>(found[2]) : nullptr;
      if (grad_alpha && layout.group > 1) {
        const unsigned blocks = blocks_for(layout.rows() * layout.pixels, kBlendThreads);
        blend_pixel_gradients_kernel<T, A><<<blocks, kBlendThreads, 0, stream>>>(
            upstream, x_data, y_data, alphas, partners, others, layout, x_sample, grad_x, grad_y, grad_alpha);
      } else {
        const bool aligned =
            x_sample % kGroup == 0 && is_vectorised(operands, {upstream, x_data, y_data, grad_x, grad_y, grad_alpha},
                                                    std::min<size_t>(16, sizeof(A) * kGroup));
        const unsigned blocks = blocks_for(layout.rows() * ceil_div(layout.row(), kGroup), kBlendThreads);
        blend_gradients_kernel<T, A><<<blocks, kBlendThreads, 0, stream>>>(
            upstream, x_data, y_data, alphas, partners, others, layout, x_sample, aligned, grad_x, grad_y, grad_alpha);
      }
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return {found[0], found[1], found[2]};
}

TORCH_LIBRARY_IMPL(pyrx, CUDA, m) {
  m.impl("blend", &blend);
  m.impl("blend_out", &blend_out);
  m.impl("blend_backward", &blend_backward);
}

}  // namespace
}  // namespace pyrx::cuda
