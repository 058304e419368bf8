// The gradients of attention over listed blocks on the CPU: checks, results, and the types that they are computed in.
#include <torch/library.h>

#include <array>
#include <tuple>

#include "cpu/attention_backward.h"

namespace pyrx::cpu {
namespace {

constexpr const char* kOp = "block_sparse_attention_backward";

using Found = std::array<at::Tensor, 6>;

// Checks what the forward's arguments do not have, and makes the results.
Found checked_results(const at::Tensor& grad, const std::optional<at::Tensor>& grad_lse,
                      const std::optional<at::Tensor>& grad_entropy, const at::Tensor& out, const at::Tensor& lse,
                      const at::Tensor& entropy, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const LogitArguments& logits, const std::array<bool, 6>& needs) {
  const std::vector<int64_t> shape{query.size(0), query.size(1), query.size(2), value.size(3)};
  const auto check = [&](const char* name, const at::Tensor& t, at::ScalarType dtype, std::string_view names, int64_t dims) {
    check_dtype(kOp, name, t, dtype);
    check_shape(kOp, name, t, names, at::IntArrayRef(shape).slice(0, dims));
    check_device(kOp, name, t, query.device());
  };
  check("grad", grad, query.scalar_type(), "[B, H, Sq, Dv]", 4);
  check("out", out, query.scalar_type(), "[B, H, Sq, Dv]", 4);
  const at::ScalarType accumulated = accumulation_dtype(query.scalar_type());
  check("lse", lse, accumulated, "[B, H, Sq]", 3);
  if (grad_lse) check("grad_lse", *grad_lse, accumulated, "[B, H, Sq]", 3);
  if (grad_entropy) {
    check("grad_entropy", *grad_entropy, accumulated, "[B, H, Sq]", 3);
    check("entropy", entropy, accumulated, "[B, H, Sq]", 3);
  }
  const std::optional<at::Tensor> wanted[] = {query, key, value, logits.query_scale, logits.row_bias, logits.column_bias};
  const char* names[] = {"query", "key", "value", "query_scale", "row_bias", "column_bias"};
  Found found;
  for (int i = 0; i < 6; ++i) {
    PYRX_CHECK_VALUE(!needs[i] || wanted[i], kOp, names[i], "for its gradient", "None");
    found[i] = !needs[i] ? at::empty({0}, query.options())
               : i < 3   ? empty_like_tokens(*wanted[i], wanted[i]->size(3))
                         : at::empty(wanted[i]->sizes(), wanted[i]->options());
    if (needs[i]) use_huge_pages(found[i]);
  }
  return found;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> block_sparse_attention_backward(
    const at::Tensor& grad, const std::optional<at::Tensor>& grad_lse, const std::optional<at::Tensor>& grad_entropy,
    const at::Tensor& out, const at::Tensor& lse, const at::Tensor& entropy, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& kv_counts, const at::Tensor& kv_indices, const at::Tensor& q_counts,
    const at::Tensor& q_indices, int64_t q_block, int64_t k_block, int64_t left, int64_t right,
    const std::optional<at::Tensor>& key_range, const std::optional<at::Tensor>& key_mask,
    const std::optional<at::Tensor>& query_scale, const std::optional<at::Tensor>& row_bias,
    const std::optional<at::Tensor>& column_bias, double scale, double softcap, const std::optional<at::Tensor>& seed,
    int64_t threshold, std::array<bool, 6> needs) {
  const ListArguments lists{kv_counts, kv_indices, q_counts, q_indices, q_block, k_block};
  const LogitArguments logits{left, right, key_range, key_mask, query_scale, row_bias, column_bias, scale, softcap};
  check_attention(kOp, query, key, value, lists, logits, seed, threshold);
  Found found = checked_results(grad, grad_lse, grad_entropy, out, lse, entropy, query, key, value, logits, needs);
  if (query.numel() == 0 || key.numel() == 0) {
    for (at::Tensor& each : found) each.zero_();
  } else {
    dispatch_storage(query.scalar_type(), [&](auto type) {
      using T = decltype(type);
      using Acc = accumulate_t<T>;
      Kept kept;
      BackwardProblem<T> problem{attention_problem<T>(query, key, value, lists, logits, seed, threshold, kept)};
      problem.grad = kept.rows<T>(grad);
      problem.out = kept.rows<T>(out);
      problem.lse = kept.contiguous<Acc>(lse);
      problem.grad_lse = kept.contiguous<Acc>(grad_lse);
      problem.grad_entropy = kept.contiguous<Acc>(grad_entropy);
      problem.entropy = grad_entropy ? kept.contiguous<Acc>(entropy) : nullptr;
      problem.needs = {needs[0], needs[1], needs[2], needs[3], needs[4], needs[5]};
      problem.to_query = result_rows<T>(found[0], needs[0]);
      problem.to_key = result_rows<T>(found[1], needs[1]);
      problem.to_value = result_rows<T>(found[2], needs[2]);
      problem.to_query_scale = needs[3] ? static_cast<Acc*>(found[3].mutable_data_ptr()) : nullptr;
      problem.to_row = result_bias<T>(found[4], needs[4]);
      problem.to_column = result_bias<T>(found[5], needs[5]);
      dispatch_operand<T>(query.scalar_type(), [&](auto operand) { Backward<T, decltype(operand)>(problem).run(); });
    });
  }
  return {found[0], found[1], found[2], found[3], found[4], found[5]};
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) { m.impl("block_sparse_attention_backward", &block_sparse_attention_backward); }

}  // namespace
}  // namespace pyrx::cpu
