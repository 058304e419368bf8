// Attention over listed blocks on the CPU, forward.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/attention_forward.h"
#include "cpu/attention_forward_fused.h"

namespace pyrx::cpu {
namespace {

constexpr std::string_view kOp = "block_sparse_attention";

std::tuple<at::Tensor, at::Tensor, at::Tensor> block_sparse_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& kv_counts,
    const at::Tensor& kv_indices, const at::Tensor& q_counts, const at::Tensor& q_indices, int64_t q_block,
    int64_t k_block, int64_t left, int64_t right, const std::optional<at::Tensor>& key_range,
    const std::optional<at::Tensor>& key_mask, const std::optional<at::Tensor>& query_scale,
    const std::optional<at::Tensor>& row_bias, const std::optional<at::Tensor>& column_bias, double scale,
    double softcap, const std::optional<at::Tensor>& seed, int64_t threshold, bool want_entropy) {
  const ListArguments lists{kv_counts, kv_indices, q_counts, q_indices, q_block, k_block};
  const LogitArguments logits{left, right, key_range, key_mask, query_scale, row_bias, column_bias, scale, softcap};
  check_attention(kOp, query, key, value, lists, logits, seed, threshold);
  const at::Tensor out = empty_like_tokens(query, value.size(3));
  const auto options = query.options().dtype(accumulation_dtype(query.scalar_type()));
  const at::Tensor lse = at::empty(query.sizes().slice(0, 3), options);
  const at::Tensor entropy = want_entropy ? at::empty(query.sizes().slice(0, 3), options) : at::empty({0}, options);
  if (out.numel() == 0) return {out, lse, entropy};
  use_huge_pages(out);
  dispatch_storage(query.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using Acc = accumulate_t<T>;
    Kept kept;
    const auto problem = attention_problem<T>(query, key, value, lists, logits, seed, threshold, kept);
    const AttentionResults<T> results{static_cast<T*>(out.mutable_data_ptr()), out.stride(0), out.stride(1), out.stride(2),
                                      static_cast<Acc*>(lse.mutable_data_ptr()),
                                      want_entropy ? static_cast<Acc*>(entropy.mutable_data_ptr()) : nullptr,
                                      is_streamed(query.nbytes() + key.nbytes() + value.nbytes() + out.nbytes())};
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bfloat16>) {
      if (FusedForward<T>::serves(problem, results)) return FusedForward<T>(problem, results).run();
    }
    dispatch_operand<T>(query.scalar_type(),
                        [&](auto operand) { Forward<T, decltype(operand)>(problem, results).run(); });
  });
  return {out, lse, entropy};
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) { m.impl("block_sparse_attention", &block_sparse_attention); }

}  // namespace
}  // namespace pyrx::cpu
