// The arguments of blend and their checks, shared by the CPU and CUDA entries, with the texts of pyrx/ops/blend.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "kernels/blend.h"
#include "mix_checks.h"

namespace pyrx {

inline void check_blend(std::string_view op, std::string_view name, const at::Tensor& images,
                        const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& y, const at::Tensor& alpha,
                        const std::optional<at::Tensor>& partner) {
  const int64_t dim = images.dim();
  PYRX_CHECK_VALUE(dim == 4 || dim == 5, op, name, "of shape [N, C, H, W] or [N, C, T, H, W]", images.sizes());
  PYRX_CHECK_TYPE(images.scalar_type() == at::kByte || is_float(images.scalar_type()), op, name,
                  "of dtype uint8, float16, bfloat16, float32 or float64", dtype_name(images.scalar_type()));
  if (x) {
    check_dtype(op, "x", *x, images.scalar_type());
    check_shape(op, "x", *x, "[N, C, ...]", images.sizes());
    check_device(op, "x", *x, images.device());
  }
  if (y) {
    check_dtype(op, "y", *y, images.scalar_type());
    if (partner) {
      PYRX_CHECK_VALUE(y->dim() == dim && y->sizes().slice(1) == images.sizes().slice(1), op, "y",
                       "of shape [M, C, ...] with [C, ...] = " + text(images.sizes().slice(1)), y->sizes());
    } else {
      check_shape(op, "y", *y, "[N, C, ...]", images.sizes());
    }
    check_device(op, "y", *y, images.device());
  }
  PYRX_CHECK_TYPE(alpha.scalar_type() == at::kBool || is_float(alpha.scalar_type()), op, "alpha",
                  "of dtype bool, float16, bfloat16, float32 or float64", dtype_name(alpha.scalar_type()));
  bool fits = alpha.dim() == dim;
  for (int64_t i = 0; fits && i < dim; ++i)
    fits = alpha.size(i) == images.size(i) || (alpha.size(i) == 1 && i < dim - 2);
  PYRX_CHECK_VALUE(fits, op, "alpha",
                   std::string("of shape ") + (dim == 5 ? "[N or 1, C or 1, T or 1, H, W]" : "[N or 1, C or 1, H, W]") +
                       " of images of " + text(images.sizes()),
                   alpha.sizes());
  check_device(op, "alpha", alpha, images.device());
  if (partner) {
    check_dtype(op, "partner", *partner, at::kLong);
    check_shape(op, "partner", *partner, "[N]", {images.size(0)});
    check_device(op, "partner", *partner, images.device());
  }
}

inline void check_blend_out(const at::Tensor& out, const at::Tensor& x) {
  check_dtype("blend_out", "out", out, x.scalar_type());
  check_shape("blend_out", "out", out, "[N, C, ...]", x.sizes());
  check_device("blend_out", "out", out, x.device());
}

inline at::Tensor first_sample(const at::Tensor& images) {
  return images.narrow(0, 0, std::min<int64_t>(1, images.size(0)));
}

// The layout of a sample, whatever the strides from one to the next (an expanded image has none).
inline at::MemoryFormat sample_format(const at::Tensor& images) { return pixel_format(first_sample(images)); }

inline at::Tensor dense_samples(const at::Tensor& images, at::MemoryFormat format) {
  return first_sample(images).is_contiguous(format) ? images : images.contiguous(format);
}

// The operands of one call, dense as BlendLayout says.
struct BlendOperands {
  at::Tensor images, y, alpha, partner;  // y, partner: undefined where there is none
  BlendLayout layout;
};

inline BlendOperands blend_operands(const at::Tensor& images, const std::optional<at::Tensor>& y, const at::Tensor& alpha,
                                    const std::optional<at::Tensor>& partner, at::MemoryFormat format) {
  BlendOperands found{dense_samples(images, format), y ? dense_samples(*y, format) : at::Tensor(), alpha,
                      partner ? partner->contiguous() : at::Tensor(), {}};
  const int64_t dim = images.dim(), channels = images.size(1), height = images.size(dim - 2), width = images.size(dim - 1);
  const bool last = format != at::MemoryFormat::Contiguous, full = channels > 1 && alpha.size(1) == channels;
  const int64_t pixel = last && full ? channels : 1;  // alphas of a pixel, side by side
  const bool dense = (pixel == 1 || alpha.stride(1) == 1) && (width == 1 || alpha.stride(dim - 1) == pixel) &&
                     (height == 1 || alpha.stride(dim - 2) == width * pixel);
  if (!dense) found.alpha = alpha.contiguous(pixel > 1 ? format : at::MemoryFormat::Contiguous);
  const auto stride = [&](int64_t i) { return found.alpha.size(i) == 1 ? 0 : found.alpha.stride(i); };
  BlendLayout& layout = found.layout;
  layout = {images.size(0), full && !last ? channels : 1, dim == 5 ? images.size(2) : 1, height * width * pixel,
            last && !full ? channels : 1, last || full ? 1 : channels, found.images.stride(0),
            y ? found.y.stride(0) : 0, stride(0), pixel == 1 ? stride(1) : 0, dim == 5 ? stride(2) : 0};
  if (layout.frames == 1 || layout.alpha_frame == layout.pixels) {
    layout.pixels *= layout.frames;
    layout.frames = 1;
  }
  if (layout.frames == 1 && layout.alpha_channel == layout.pixels) {
    layout.pixels *= layout.channels;
    layout.channels = 1;
  }
  return found;
}

// (grad_x, grad_y, grad_alpha), empty where not needed; grad_alpha is not yet summed over samples and frames.
inline std::array<at::Tensor, 3> blend_gradients(const at::Tensor& grad, const at::Tensor& alpha, at::ArrayRef<bool> needs,
                                                 at::MemoryFormat format) {
  std::vector<int64_t> sizes = grad.sizes().vec();
  const auto like_grad = [&](bool needed) {
    return needed ? at::empty(sizes, grad.options(), format) : at::empty({0}, grad.options());
  };
  std::array<at::Tensor, 3> found{like_grad(needs[0]), like_grad(needs[1]), {}};
  sizes[1] = alpha.size(1);
  const auto options = grad.options().dtype(accumulation_dtype(grad.scalar_type()));
  found[2] = needs[2] ? at::empty(sizes, options, format) : at::empty({0}, options);
  return found;
}

inline void check_blend_backward(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                                 const std::optional<at::Tensor>& y, const at::Tensor& alpha,
                                 const std::optional<at::Tensor>& partner, at::ArrayRef<bool> needs) {
  constexpr std::string_view op = "blend_backward";
  check_blend(op, "grad", grad, x, y, alpha, partner);
  check_float(op, "grad", grad);
  PYRX_CHECK_VALUE(!needs[2] || (x && y), op, "x and y", "to be given for the gradient of alpha", "None");
}

}  // namespace pyrx
