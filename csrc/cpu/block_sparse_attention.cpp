// Attention over listed blocks on the CPU, forward.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/attention_forward.h"
#include "cpu/attention_forward_fused.h"

namespace pyrx::cpu {
namespace {

constexpr std::string_view kOp = "block_sparse_attention";

// Where every head has one query, as in decoding, those of a group become the rows of one block, which reads their keys once.
template <typename T>
void fold_groups(AttentionProblem<T>& in, AttentionResults<T>& out, Kept& kept) {
  AttentionShape& shape = in.shape;
  const int64_t group = shape.group();
  if (shape.queries != 1 || group == 1 || group > std::min(kFusedQueries, shape.q_block) || in.kv.head != 0) return;
  if (in.threshold > 0 || in.bias.row != nullptr || in.query.head < shape.size) return;
  if (KeyRules& rules = in.rules; rules.left >= 0 || rules.right >= 0 || rules.range != nullptr) {  // of the one position
    const int64_t batch = rules.range_stride > 0 ? shape.batch : 1;
    at::Tensor ranges = at::empty({batch, group, 2}, at::kInt);
    int32_t* range = ranges.mutable_data_ptr<int32_t>();
    for (int64_t b = 0; b < batch; ++b) {
      const KeyRange own = rules.of(b, 0);
      for (int64_t i = 0; i < group; ++i, range += 2)
        range[0] = static_cast<int32_t>(own.first), range[1] = static_cast<int32_t>(own.last);
    }
    rules = {-1, -1, kept.contiguous<int32_t>(ranges), batch > 1 ? 2 * group : 0, rules.keys};
  }
  in.query.token = in.query.head, in.query.head *= group;
  out.token = out.head, out.head *= group;
  shape.heads = shape.kv_heads, shape.queries = group;
}

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
    auto problem = attention_problem<T>(query, key, value, lists, logits, seed, threshold, kept);
    AttentionResults<T> results{static_cast<T*>(out.mutable_data_ptr()), out.stride(0), out.stride(1), out.stride(2),
                                static_cast<Acc*>(lse.mutable_data_ptr()),
                                want_entropy ? static_cast<Acc*>(entropy.mutable_data_ptr()) : nullptr,
                                is_streamed(query.nbytes() + key.nbytes() + value.nbytes() + out.nbytes())};
    fold_groups(problem, results, kept);
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
