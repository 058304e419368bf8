// Where results go whose strides are not row-major.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace pyrx {

// Masks follow the logical index, so kernels write in its order: into `out` itself, or where its strides are others
// into a buffer that finish() copies.
inline at::Tensor contiguous_target(const at::Tensor& out, at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  return out.is_contiguous(format) ? out : at::empty(out.sizes(), out.options(), format);
}

inline at::Tensor finish(const at::Tensor& written, const at::Tensor& out) {
  if (!written.is_same(out)) out.copy_(written);
  return out;
}

}  // namespace pyrx
