// What the formulas of the native backends share. They are in C++, since Python ones cost small inputs as much as the
// kernels do, about 50 us a step; pyrx/ops has the same formulas for Triton's kernels.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace pyrx {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Whether a formula is to see the call: with a tangent it is to say that there is no forward mode.
inline bool is_differentiated(const at::Tensor& tensor) {
  return (at::GradMode::is_enabled() && tensor.requires_grad()) || tensor._fw_grad(/*level=*/0).defined();
}

}  // namespace pyrx
