// What the ops over attention logits share on the CPU: the problem as kernels see it, its operands packed for GEMM tiles,
// lists of blocks, and tasks.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <type_traits>
#include <vector>

#include "attention_checks.h"
#include "cpu/attention_simd.h"
#include "cpu/elements.h"
#include "cpu/gemm.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"

namespace pyrx::cpu {

// Empty (B, H, S, `size`) laid out (B, S, H, D) where the tensor is, else contiguous: pyrx/ops.
inline at::Tensor empty_like_tokens(const at::Tensor& tensor, int64_t size) {
  const int64_t batch = tensor.size(0), heads = tensor.size(1), tokens = tensor.size(2);
  if (tensor.transpose(1, 2).is_contiguous() && !tensor.is_contiguous())
    return at::empty({batch, tokens, heads, size}, tensor.options()).transpose(1, 2);
  return at::empty({batch, heads, tokens, size}, tensor.options());
}

// (B, H, S, D), the last dimension contiguous, rows at least D apart.
template <typename T>
struct TokenRows {
  const T* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;  // strides in elements

  const T* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * token; }
};

// Tensors that pointers point into; those whose strides a kernel cannot take are copied.
class Kept {
 public:
  template <typename T>
  TokenRows<T> rows(const at::Tensor& t) {
    const int64_t size = t.size(3);
    const bool ready = (size == 1 || t.stride(3) == 1) && (t.size(2) == 1 || t.stride(2) >= size);
    const at::Tensor& own = keep(ready ? t : t.contiguous());
    // where there is one token its stride may be anything
    return {static_cast<const T*>(own.const_data_ptr()), own.stride(0), own.stride(1), std::max(own.stride(2), size)};
  }
  template <typename T>
  const T* contiguous(const std::optional<at::Tensor>& t) {
    return t ? static_cast<const T*>(keep(t->contiguous()).const_data_ptr()) : nullptr;
  }
  template <typename T>
  KeyBias<T> bias(const std::optional<at::Tensor>& row, const std::optional<at::Tensor>& column) {
    KeyBias<T> found{};
    found.columns = 1;
    const auto stride = [](const at::Tensor& t, int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); };
    if (row) {
      const at::Tensor& t = keep(last_contiguous(*row));
      found.row = static_cast<const T*>(t.const_data_ptr());
      found.row_batch = stride(t, 0), found.row_head = stride(t, 1), found.row_query = t.stride(2);
    }
    if (column) {
      const at::Tensor& t = keep(last_contiguous(*column));
      found.column = static_cast<const T*>(t.const_data_ptr());
      found.column_batch = stride(t, 0), found.column_head = stride(t, 1), found.column_query = t.stride(2);
      found.columns = t.size(3);
    }
    return found;
  }

 private:
  static at::Tensor last_contiguous(const at::Tensor& t) {
    return t.size(3) == 1 || t.stride(3) == 1 ? t : t.contiguous();
  }
  const at::Tensor& keep(at::Tensor t) { return kept_.emplace_back(std::move(t)); }

  std::vector<at::Tensor> kept_;
};

// Which blocks of the other side every block of one side lists.
struct BlockLists {
  const int32_t *counts = nullptr, *indices = nullptr;  // (B or 1, H or 1, rows), (.., rows, width)
  int64_t rows = 0, width = 0, limit = 0;               // limit: blocks of the other side
  int64_t batch = 0, head = 0;                          // strides in rows, 0 where a dimension is one
  int64_t lists = 0;                                    // all that there are

  // Entries of a row on average.
  double mean() const {
    double total = 0;
    for (int64_t i = 0; i < lists; ++i) total += std::clamp<int64_t>(counts[i], 0, width);
    return lists > 0 ? total / static_cast<double>(lists) : 0;
  }

  // Those of a row, ascending, each once; entries out of range are passed over.
  void of(int64_t b, int64_t h, int64_t row, std::vector<int64_t>& found) const {
    const int64_t at = b * batch + h * head + row, n = std::clamp<int64_t>(counts[at], 0, width);
    const int32_t* listed = indices + at * width;
    found.clear();
    bool ascending = true;
    for (int64_t i = 0; i < n; ++i) {
      if (listed[i] < 0 || listed[i] >= limit) continue;
      ascending = ascending && (found.empty() || found.back() < listed[i]);
      found.push_back(listed[i]);
    }
    if (ascending) return;
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
  }
};

inline BlockLists block_lists(const at::Tensor& counts, const at::Tensor& indices, int64_t limit, Kept& kept) {
  BlockLists lists;
  lists.counts = kept.contiguous<int32_t>(counts);
  lists.indices = kept.contiguous<int32_t>(indices);
  lists.rows = counts.size(2);
  lists.width = indices.size(3);
  lists.limit = limit;
  lists.lists = counts.numel();
  lists.head = counts.size(1) == 1 ? 0 : lists.rows;
  lists.batch = counts.size(0) == 1 ? 0 : counts.size(1) * lists.rows;
  return lists;
}

// What makes logits of queries and keys, from checked tensors.
template <typename T>
struct LogitProblem {
  using Acc = accumulate_t<T>;
  AttentionShape shape;  // value_size 0 where there is no value
  TokenRows<T> query, key;
  KeyRules rules;
  const uint8_t* key_mask;  // (B, Sk) or null
  const Acc* query_scale;   // (B, H, Sq) or null
  KeyBias<T> bias;
  Acc scale, softcap;

  // Whether logits are products times the scale alone, but for what is hidden.
  bool plain() const { return softcap == 0 && query_scale == nullptr && bias.row == nullptr; }
  LogitTile<T> tile(int64_t b, int64_t h, int64_t q, int64_t k, int64_t rows, int64_t keys, Acc* logits,
                    int64_t stride) const {
    return {b, h, q, k, rows, keys, logits, stride, scale, softcap,
            query_scale ? query_scale + (b * shape.heads + h) * shape.queries + q : nullptr,
            bias, rules, key_mask ? key_mask + b * shape.keys + k : nullptr};
  }
};

template <typename T>
LogitProblem<T> logit_problem(const at::Tensor& query, const at::Tensor& key, int64_t q_block, int64_t k_block,
                              const LogitArguments& logits, Kept& kept) {
  using Acc = accumulate_t<T>;
  LogitProblem<T> found{};
  found.shape = attention_shape(query, key, 0, q_block, k_block);
  found.query = kept.rows<T>(query);
  found.key = kept.rows<T>(key);
  found.rules = {logits.left, logits.right, kept.contiguous<int32_t>(logits.key_range),
                 logits.key_range && logits.key_range->size(0) > 1 ? 2 * query.size(2) : 0, key.size(2)};
  found.key_mask = reinterpret_cast<const uint8_t*>(kept.contiguous<bool>(logits.key_mask));
  found.query_scale = kept.contiguous<Acc>(logits.query_scale);
  found.bias = kept.bias<T>(logits.row_bias, logits.column_bias);
  found.scale = static_cast<Acc>(logits.scale);
  found.softcap = static_cast<Acc>(logits.softcap);
  return found;
}

// Attention over listed blocks, from checked tensors.
template <typename T>
struct AttentionProblem : LogitProblem<T> {
  TokenRows<T> value;
  BlockLists kv, q;  // of blocks of queries, and of blocks of keys
  uint64_t seed;
  int64_t threshold;  // of the dropout, 0: none
};

template <typename T>
AttentionProblem<T> attention_problem(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                      const ListArguments& lists, const LogitArguments& logits,
                                      const std::optional<at::Tensor>& seed, int64_t threshold, Kept& kept) {
  AttentionProblem<T> found{logit_problem<T>(query, key, lists.q_block, lists.k_block, logits, kept), {}, {}, {}, 0, 0};
  found.shape.value_size = value.size(3);
  found.value = kept.rows<T>(value);
  found.kv = block_lists(lists.kv_counts, lists.kv_indices, found.shape.k_blocks(), kept);
  found.q = block_lists(lists.q_counts, lists.q_indices, found.shape.q_blocks(), kept);
  found.threshold = threshold;
  if (threshold > 0) found.seed = seed_value(*seed);
  return found;
}

// Of queries q .. q + rows - 1, key_mask aside.
struct Reach {
  KeyRange every, any;  // the keys that each of them sees, and a range that holds all that one of them sees

  bool hides(int64_t k, int64_t keys) const { return k < every.first || k + keys > every.last; }
  bool misses(int64_t k, int64_t keys) const { return k >= any.last || k + keys <= any.first; }
};

inline Reach reach(const KeyRules& rules, int64_t b, int64_t q, int64_t rows) {
  if (rules.range == nullptr) {  // a window's ends go up with the query
    const KeyRange first = rules.of(b, q), last = rules.of(b, q + rows - 1);
    return {first & last, {first.first, last.last}};
  }
  Reach found{{0, rules.keys}, {rules.keys, 0}};
  for (int64_t i = q; i < q + rows; ++i) {
    const KeyRange own = rules.of(b, i);
    found.every = found.every & own;
    if (own.empty()) continue;
    found.any.first = std::min(found.any.first, own.first);
    found.any.last = std::max(found.any.last, own.last);
  }
  return found;
}

template <typename G>
int64_t transposed_depth(int64_t size) { return round_up(size, pairing<G>); }

// n rows of `size` elements, `stride` apart, transposed: (transposed_depth, width), columns past n zero, in the layout of a
// GEMM's second operand (pairs of depth for 16-bit types). `scratch` holds as much.
template <typename T, typename G>
void pack_transposed(const T* rows, int64_t stride, int64_t n, int64_t size, int64_t width, G* scratch, G* out) {
  const auto& kernels = head_kernels<T, G>();
  const int64_t depth = transposed_depth<G>(size);
  // whole rows of the operand's own type are read where they are
  const bool direct = std::is_same_v<T, G> && n == width && depth == size && stride % pairing<G> == 0;
  if (!direct) {
    for (int64_t i = 0; i < n; ++i) {
      kernels.select(rows + i * stride, nullptr, size, scratch + i * depth);
      std::fill(scratch + i * depth + size, scratch + (i + 1) * depth, G{});
    }
    std::fill(scratch + n * depth, scratch + width * depth, G{});
  }
  const void* from = direct ? static_cast<const void*>(rows) : scratch;
  const int64_t apart = direct ? stride : depth;
  if constexpr (sizeof(G) == 8)
    kernels.transpose(static_cast<const G*>(from), apart, width, depth, out, width);
  else  // a pair of 16-bit elements is one 32-bit element
    mask_kernels().transpose32(static_cast<const uint32_t*>(from), apart / pairing<G>, width, depth / pairing<G>,
                               reinterpret_cast<uint32_t*>(out), width);
}

// n rows as they are: (depth, width) with depth n rounded up to pairs, columns past `size` and the pair's missing row zero.
template <typename T, typename G>
void pack_rows(const T* rows, int64_t stride, int64_t n, int64_t size, int64_t width, G* out) {
  const auto& kernels = head_kernels<T, G>();
  if constexpr (sizeof(G) == 2) {
    for (int64_t i = 0; i < n; i += 2, out += 2 * width) {
      const T* row = rows + i * stride;
      kernels.select_pair(row, nullptr, i + 1 < n ? row + stride : nullptr, nullptr, size, out);
      std::fill(out + 2 * size, out + 2 * width, G{});
    }
  } else {
    for (int64_t i = 0; i < n; ++i, out += width) {
      kernels.select(rows + i * stride, nullptr, size, out);
      std::fill(out + size, out + width, G{});
    }
  }
}

// f(task, scratch) for task < count: a thread that is free takes the next one, with what `make()` gave it.
template <typename G, typename Make, typename F>
void run_tasks(int64_t count, Make make, F f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(std::max(1, at::get_num_threads()), count), 1, [&](int64_t begin, int64_t end) {
    auto scratch = make();
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) f(i, scratch);
    if constexpr (sizeof(G) == 2) at::native::cpublas::brgemm_release();
  });
}

}  // namespace pyrx::cpu
