// The arguments of the ops over attention logits and their checks, with the texts of pyrx/_attention.py and pyrx/ops.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/block_sparse_attention.h"
#include "tensor_checks.h"

namespace pyrx {

constexpr int64_t kMostHeadSize = 256;

// pyrx/_attention.py: Logits
struct LogitArguments {
  int64_t left, right;
  const std::optional<at::Tensor>&key_range, &key_mask, &query_scale, &row_bias, &column_bias;
  double scale, softcap;
};

// pyrx/ops/block_mask.py: BlockMask
struct ListArguments {
  const at::Tensor &kv_counts, &kv_indices, &q_counts, &q_indices;
  int64_t q_block, k_block;
};

inline int64_t blocks_of(int64_t tokens, int64_t block) { return (tokens + block - 1) / block; }

inline void check_block_size(std::string_view op, std::string_view argument, int64_t size) {
  PYRX_CHECK_VALUE(size == 16 || size == 32 || size == 64 || size == 128, op, argument, "to be one of 16, 32, 64, 128",
                   size);
}

inline void check_blocks(std::string_view op, int64_t q_block, int64_t k_block) {
  check_block_size(op, "q_block", q_block);
  check_block_size(op, "k_block", k_block);
}

// Of keys and values: the query's batch, and heads that divide the query's.
inline void check_key(std::string_view op, std::string_view argument, const at::Tensor& key, const at::Tensor& query) {
  PYRX_CHECK_VALUE(key.size(0) == query.size(0), op, argument, "of the query's batch size " + text(query.size(0)),
                   key.size(0));
  const int64_t heads = query.size(1), kv_heads = key.size(1);
  PYRX_CHECK_VALUE(heads == kv_heads || (kv_heads != 0 && heads % kv_heads == 0), op, argument,
                   "of a number of heads that divides the query's " + text(heads), kv_heads);
}

inline void check_query_key(std::string_view op, const at::Tensor& query, const at::Tensor& key) {
  check_float(op, "query", query);
  PYRX_CHECK_VALUE(query.dim() == 4, op, "query", "of shape [B, H, S, D]", query.sizes());
  check_float(op, "key", key);
  PYRX_CHECK_VALUE(key.dim() == 4, op, "key", "of shape [B, H, S, D]", key.sizes());
  check_dtype(op, "key", key, query.scalar_type());
  check_device(op, "key", key, query.device());
  PYRX_CHECK_VALUE(query.size(3) >= 1 && query.size(3) <= kMostHeadSize, op, "query",
                   "of a head size in [1, " + text(kMostHeadSize) + "]", query.size(3));
  check_key(op, "key", key, query);
  PYRX_CHECK_VALUE(key.size(3) == query.size(3), op, "key", "of the query's head size " + text(query.size(3)),
                   key.size(3));
}

inline void check_key_bias(std::string_view op, std::string_view argument, const at::Tensor& bias,
                           const at::Tensor& query, std::optional<int64_t> last) {
  check_dtype(op, argument, bias, query.scalar_type());
  PYRX_CHECK_VALUE(bias.dim() == 4 && (bias.size(0) == 1 || bias.size(0) == query.size(0)) &&
                       (bias.size(1) == 1 || bias.size(1) == query.size(1)) && bias.size(2) == query.size(2),
                   op, argument, "of shape [B or 1, H or 1, Sq, ...] of a query " + text(query.sizes()), bias.sizes());
  if (last)
    PYRX_CHECK_VALUE(bias.size(3) == *last, op, argument, "of " + text(*last) + " keys along the last dimension",
                     bias.sizes());
  check_device(op, argument, bias, query.device());
}

inline void check_logits(std::string_view op, const at::Tensor& query, const at::Tensor& key,
                         const LogitArguments& logits) {
  check_query_key(op, query, key);
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), keys = key.size(2);
  const auto device = query.device();
  PYRX_CHECK_VALUE(logits.left >= -1 && logits.right >= -1, op, "left and right", "of at least 0, or -1 for no limit",
                   at::IntArrayRef({logits.left, logits.right}));
  if (logits.key_range) {
    const at::Tensor& range = *logits.key_range;
    check_dtype(op, "key_range", range, at::kInt);
    PYRX_CHECK_VALUE(range.dim() == 3 && (range.size(0) == 1 || range.size(0) == batch) && range.size(1) == queries &&
                         range.size(2) == 2,
                     op, "key_range", "of shape [B or 1, Sq, 2] = [" + text(batch) + " or 1, " + text(queries) + ", 2]",
                     range.sizes());
    check_device(op, "key_range", range, device);
  }
  if (logits.key_mask) {
    check_dtype(op, "key_mask", *logits.key_mask, at::kBool);
    check_shape(op, "key_mask", *logits.key_mask, "[B, Sk]", {batch, keys});
    check_device(op, "key_mask", *logits.key_mask, device);
  }
  if (logits.query_scale) {
    check_dtype(op, "query_scale", *logits.query_scale, accumulation_dtype(query.scalar_type()));
    check_shape(op, "query_scale", *logits.query_scale, "[B, H, Sq]", {batch, heads, queries});
    check_device(op, "query_scale", *logits.query_scale, device);
  }
  if (logits.column_bias) {
    PYRX_CHECK_VALUE(logits.row_bias.has_value(), op, "column_bias", "with a row_bias", "None");
    check_key_bias(op, "column_bias", *logits.column_bias, query, std::nullopt);
  }
  if (logits.row_bias) {
    const int64_t columns = logits.column_bias ? logits.column_bias->size(3) : 1;
    PYRX_CHECK_VALUE(columns != 0 && keys % columns == 0, op, "column_bias",
                     "of a last dimension that divides the " + text(keys) + " keys", columns);
    check_key_bias(op, "row_bias", *logits.row_bias, query, keys / columns);
  }
  PYRX_CHECK_VALUE(std::isfinite(logits.scale), op, "scale", "to be finite", logits.scale);
  PYRX_CHECK_VALUE(std::isfinite(logits.softcap) && logits.softcap >= 0, op, "softcap",
                   "to be finite and not negative", logits.softcap);
}

inline void check_list(std::string_view op, const std::string& side, const at::Tensor& counts,
                       const at::Tensor& indices, int64_t rows, const at::Tensor& query) {
  check_dtype(op, side + "_counts", counts, at::kInt);
  check_device(op, side + "_counts", counts, query.device());
  check_dtype(op, side + "_indices", indices, at::kInt);
  check_device(op, side + "_indices", indices, query.device());
  PYRX_CHECK_VALUE(counts.dim() == 3 && (counts.size(0) == 1 || counts.size(0) == query.size(0)) &&
                       (counts.size(1) == 1 || counts.size(1) == query.size(1)) && counts.size(2) == rows,
                   op, side + "_counts",
                   "of shape [B or 1, H or 1, " + text(rows) + "] for a query of " + text(query.sizes()),
                   counts.sizes());
  std::vector<int64_t> shape = counts.sizes().vec();
  std::string named = text(at::IntArrayRef(shape));
  named.insert(named.size() - 1, ", 'W'");
  PYRX_CHECK_VALUE(indices.dim() == 4, op, side + "_indices", "of shape " + named, indices.sizes());
  shape.push_back(indices.size(3));
  check_shape(op, side + "_indices", indices, "[..., W]", shape);
}

inline void check_attention(std::string_view op, const at::Tensor& query, const at::Tensor& key,
                            const at::Tensor& value, const ListArguments& lists, const LogitArguments& logits,
                            const std::optional<at::Tensor>& seed, int64_t threshold) {
  check_logits(op, query, key, logits);
  check_float(op, "value", value);
  PYRX_CHECK_VALUE(value.dim() == 4, op, "value", "of shape [B, H, S, D]", value.sizes());
  check_dtype(op, "value", value, query.scalar_type());
  check_device(op, "value", value, query.device());
  check_key(op, "value", value, query);
  check_shape(op, "value", value, "[B, Hkv, Sk, Dv]", {key.size(0), key.size(1), key.size(2), value.size(3)});
  PYRX_CHECK_VALUE(value.size(3) >= 1 && value.size(3) <= kMostHeadSize, op, "value",
                   "of a head size in [1, " + text(kMostHeadSize) + "]", value.size(3));
  check_blocks(op, lists.q_block, lists.k_block);
  check_list(op, "kv", lists.kv_counts, lists.kv_indices, blocks_of(query.size(2), lists.q_block), query);
  check_list(op, "q", lists.q_counts, lists.q_indices, blocks_of(key.size(2), lists.k_block), query);
  PYRX_CHECK_VALUE(lists.kv_counts.sizes().slice(0, 2) == lists.q_counts.sizes().slice(0, 2), op, "q_counts",
                   "of the leading dimensions of kv_counts " + text(lists.kv_counts.sizes().slice(0, 2)),
                   lists.q_counts.sizes());
  PYRX_CHECK_VALUE(threshold >= 0 && threshold < 65536, op, "threshold", "in [0, 65536)", threshold);
  if (seed) {
    check_seed(op, *seed, query.device());
  } else {
    PYRX_CHECK_VALUE(threshold == 0, op, "seed", "for a threshold above 0", "None");
  }
}

inline void check_mass(const at::Tensor& query, const at::Tensor& key, const at::Tensor& lse, int64_t q_block,
                       int64_t k_block, const LogitArguments& logits) {
  const std::string_view op = "block_mass";
  check_logits(op, query, key, logits);
  check_dtype(op, "lse", lse, accumulation_dtype(query.scalar_type()));
  check_shape(op, "lse", lse, "[B, H, Sq]", query.sizes().slice(0, 3));
  check_device(op, "lse", lse, query.device());
  check_blocks(op, q_block, k_block);
}

inline void check_recall(const at::Tensor& query, const at::Tensor& key, const at::Tensor& blocks, int64_t q_block,
                         int64_t k_block, const LogitArguments& logits) {
  const std::string_view op = "block_recall";
  check_logits(op, query, key, logits);
  check_blocks(op, q_block, k_block);
  check_dtype(op, "blocks", blocks, at::kBool);
  const int64_t batch = query.size(0), heads = query.size(1);
  const int64_t q_blocks = blocks_of(query.size(2), q_block), k_blocks = blocks_of(key.size(2), k_block);
  PYRX_CHECK_VALUE(blocks.dim() == 4 && (blocks.size(0) == 1 || blocks.size(0) == batch) &&
                       (blocks.size(1) == 1 || blocks.size(1) == heads) && blocks.size(2) == q_blocks &&
                       blocks.size(3) == k_blocks,
                   op, "blocks",
                   "of shape [B or 1, H or 1, NQ, NK] of " + text(at::IntArrayRef({batch, heads, q_blocks, k_blocks})),
                   blocks.sizes());
  check_device(op, "blocks", blocks, query.device());
}

inline AttentionShape attention_shape(const at::Tensor& query, const at::Tensor& key, int64_t value_size,
                                      int64_t q_block, int64_t k_block) {
  return {query.size(0), query.size(1), key.size(1), query.size(2), key.size(2),
          query.size(3), value_size,    q_block,     k_block};
}

}  // namespace pyrx
