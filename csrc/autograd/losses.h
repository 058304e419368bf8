// What the losses' formulas share: their gradients are made in the forward, with no double backward.
#pragma once

#include "autograd/dispatch.h"

#include <ATen/ops/clone.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/graph_task.h>

#include <string>

namespace pyrx {

// Neither traced nor transformed.
inline bool is_plain(const at::Tensor& tensor) {
  using enum c10::DispatchKey;
  return !tensor.key_set().has_any(
      c10::DispatchKeySet{Python, Functionalize, Batched, BatchedNestedTensor, FuncTorchBatched, FuncTorchGradWrapper});
}

// The gradients times the upstream one, which mostly is one: then no pass over them is spent. In place by
// scale(gradients, upstream), unless the graph is kept: its next backward must find them as they are, whatever was done
// to these. An upstream gradient a row scales the gradients' rows.
template <typename Scale>
torch::autograd::variable_list scaled(Scale scale, torch::autograd::variable_list gradients, const at::Tensor& upstream,
                                      at::ScalarType dtype) {
  if (is_plain(upstream) && gradients[0].scalar_type() == dtype) {
    if (torch::autograd::get_current_graph_task_keep_graph())
      for (at::Tensor& each : gradients) each = each.clone();
    scale(gradients, upstream);
  } else {
    const at::Tensor factor = upstream.dim() == 1 ? upstream.unsqueeze(-1) : upstream;
    for (at::Tensor& each : gradients) each = each.mul(factor).to(dtype);
  }
  return gradients;
}

inline torch::autograd::variable_list differentiable_once(const std::string& op,
                                                          torch::autograd::variable_list gradients) {
  if (!at::GradMode::is_enabled()) return gradients;
  // create_graph: the gradients are constants here, so going through them once more must not pass
  for (at::Tensor& each : gradients) each = each.detach().requires_grad_();
  torch::autograd::DelayedError error(op + ": expected one differentiation, got a second: it has no double backward",
                                      static_cast<int64_t>(gradients.size()));
  return error(std::move(gradients));
}

}  // namespace pyrx
