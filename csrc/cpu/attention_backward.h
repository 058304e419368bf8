// The gradients of attention over listed blocks on the CPU.
//
// A task is a head of keys and every `chunks`-th of its blocks. It walks a block's list of query blocks, in panels of at most 64
// queries, for every query head of the group: logits and the upstream gradient of the weights are made once, transposed (keys by
// queries), and give the block's dK and dV, which the task owns, and dQ, which goes to a buffer of the chunk. The buffers are
// summed in the chunks' order. Five products, no atomics, the same bits whatever the number of threads. Gradients of biases
// are a pass of its own over the query blocks.
//
// With x = logit - LSE: P = exp(x), dS = P (keep (dO V) - delta - dH x), delta = dO O - dLSE + dH H.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/attention.h"
#include "cpu/pages.h"

namespace pyrx::cpu {

constexpr int64_t kQueries = 64;     // most queries of a panel
constexpr int64_t kTasks = 16;       // at least, where there are blocks: chunks make up for missing heads
constexpr int64_t kMostChunks = 8;   // each has a dQ of its own
constexpr int64_t kBitsStride = 16;  // bytes of a query's bits of a block of keys

struct Needs {
  bool query, key, value, query_scale, row_bias, column_bias;
  bool any_query() const { return query || query_scale; }
  bool bias() const { return row_bias || column_bias; }
  bool logits() const { return any_query() || key || bias(); }
};

// (B, H, S, D) results, the last dimension contiguous.
template <typename T>
struct ResultRows {
  T* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;  // strides in elements

  T* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * token; }
};

template <typename T>
ResultRows<T> result_rows(const at::Tensor& t, bool wanted) {
  if (!wanted) return {};
  return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// The gradient of a bias, contiguous; nothing where it is not wanted.
template <typename T>
struct ResultBias {
  T* data = nullptr;
  int64_t batch = 0, heads = 0, size = 0;  // (batch, heads, Sq, size)
};

template <typename T>
ResultBias<T> result_bias(const at::Tensor& t, bool wanted) {
  if (!wanted) return {};
  return {static_cast<T*>(t.mutable_data_ptr()), t.size(0), t.size(1), t.size(3)};
}

// What the backward reads beside the forward's arguments, and what it writes.
template <typename T>
struct BackwardProblem : AttentionProblem<T> {
  using Acc = accumulate_t<T>;
  TokenRows<T> grad, out;
  const Acc *lse, *entropy, *grad_lse, *grad_entropy;  // (B, H, Sq), the gradients or null
  Needs needs;
  ResultRows<T> to_query, to_key, to_value;
  Acc* to_query_scale;  // (B, H, Sq)
  ResultBias<T> to_row, to_column;
};

template <typename T, typename G>
class Backward {
  using Acc = accumulate_t<T>;

 public:
  explicit Backward(const BackwardProblem<T>& problem) : in_(problem) {
    if (in_.needs.any_query()) std::memset(touched_, 0, chunks_ * panels());
    for (const at::Tensor& each : {query_buffers_.memory(), query_columns_.memory(), grad_columns_.memory()})
      use_huge_pages(each);
  }

  void run() {
    const Needs& needs = in_.needs;
    const auto make = [this] { return Scratch(*this); };
    run_tasks<G>(panels(), make, [&](int64_t task, Scratch& scratch) { prepare(task, scratch); });
    if (needs.any_query() || needs.key || needs.value)
      run_tasks<G>(shape_.batch * shape_.kv_heads * chunks_, make, [&](int64_t task, Scratch& scratch) {
        const int64_t head = task / chunks_, chunk = task % chunks_;
        for (int64_t j = chunk; j < shape_.k_blocks(); j += chunks_)
          walk_key_block(head / shape_.kv_heads, head % shape_.kv_heads, chunk, j, scratch);
      });
    if (needs.any_query())
      run_tasks<G>(panels(), make, [&](int64_t task, Scratch& scratch) { sum_query(task, scratch); });
    const bool together = in_.to_row.batch == in_.to_column.batch && in_.to_row.heads == in_.to_column.heads;
    if (needs.bias()) sum_bias(needs.row_bias, needs.column_bias && (together || !needs.row_bias));
    if (needs.row_bias && needs.column_bias && !together) sum_bias(false, true);
  }

 private:
  // A thread's own memory.
  struct Scratch {
    explicit Scratch(const Backward& own)
        : rows(own.most_rows() * own.most_size()),
          wide(own.most_rows() * own.most_size()),
          key(own.most_rows() * own.most_size()),
          value(own.most_rows() * own.most_size()),
          key_columns(own.most_size() * own.keys_),
          logits(own.tile()),
          upstream(own.tile()),
          bias(own.tile()),
          summed(own.tile()),
          weights(own.tile()),
          gradients(own.tile()),
          pairs(own.tile()),
          grad_key(own.keys_ * own.padded_),
          grad_value(own.keys_ * own.value_padded_),
          low(own.width_),
          high(own.width_),
          ones(own.width_),
          bits(own.width_ * kBitsStride),
          some_bits(kBitsStride + 2),
          kept(own.width_ / 8 * own.keys_) {
      std::fill_n(static_cast<Acc*>(ones), own.width_, Acc(1));
    }

    std::vector<int64_t> list;
    Array<G> rows;                            // operands being packed
    Array<Acc> wide;                          // rows of accumulators
    Array<G> key, value, key_columns;         // a block's operands: (keys, D), (keys, Dv), (D, keys)
    Array<Acc> logits, upstream, bias, summed;  // (keys, queries)
    Array<G> weights, gradients, pairs;       // (keys, queries) operands, as GradientTile has them
    Array<Acc> grad_key, grad_value;          // (keys, D), (keys, Dv), padded
    Array<Acc> low, high, ones;               // (queries,)
    Array<uint8_t> bits, some_bits, kept;     // dropout: by query, scratch, by key
  };

  // A block of keys as operands.
  struct KeyBlock {
    int64_t first, keys;
    const G *key, *value;
    int64_t key_stride, value_stride;
    const uint8_t* key_mask;  // null where no key is hidden
  };

  // Queries first .. first + rows - 1 of a head; index: of the panel.
  struct Panel {
    int64_t b, h, index, first, rows;
  };

  int64_t panels() const { return shape_.batch * shape_.heads * head_panels_; }
  int64_t most_rows() const { return std::max(keys_, width_); }
  int64_t most_size() const { return round_up(std::max(shape_.size, shape_.value_size), kRound); }
  int64_t tile() const { return keys_ * width_; }

  Panel panel(int64_t index) const {
    const int64_t head = index / head_panels_, first = index % head_panels_ * width_;
    return {head / shape_.heads, head % shape_.heads, index, first, std::min(width_, shape_.queries - first)};
  }

  // n rows as operands, where they lie or in `out`, rows of `depth`, zero past `size`.
  const G* operand_rows(const T* rows, int64_t stride, int64_t n, int64_t size, int64_t depth, G* out, int64_t& out_stride) const {
    if constexpr (std::is_same_v<T, G>)
      if (depth == size) {
        out_stride = stride;
        return rows;
      }
    for (int64_t i = 0; i < n; ++i) {
      operand_.select(rows + i * stride, nullptr, size, out + i * depth);
      std::fill(out + i * depth + size, out + (i + 1) * depth, G{});
    }
    out_stride = depth;
    return out;
  }

  // n rows, each times its factor where there is one, as the second operand of a product over them: Panels (n, size).
  void pack_panels(const T* rows, int64_t stride, int64_t n, int64_t size, const Acc* factor, G* out, Scratch& scratch) const {
    const Panels<G> to{out, width_, size};
    const G* scaled = scratch.rows;
    if (factor) {
      Acc* row = scratch.wide;
      for (int64_t i = 0; i < n; ++i) {
        std::fill_n(row, size, Acc(0));
        element_kernels<T>().accumulate(rows + i * stride, nullptr, size, factor[i], row);
        operand_.convert(row, size, scratch.rows + i * size);
      }
    }
    for (int64_t p = 0; p < to.count(); ++p) {
      const int64_t from = p * kPanel, some = std::min(kPanel, size - from);
      if (factor) pack_rows(scaled + from, size, n, some, to.width(p), to.panel(p));
      else pack_rows(rows + from, stride, n, some, to.width(p), to.panel(p));
    }
  }

  // c (m, size) (+)= a (m, depth) b (depth, size), b rows where they lie or Panels.
  void multiply_rows(int64_t m, int64_t depth, const G* a, int64_t size, bool direct, const T* rows, int64_t stride, G* packed,
                     Acc* c, int64_t ldc, bool add) const {
    const Panels<G> panels{packed, width_, size};
    for (int64_t p = 0; p < panels.count(); ++p) {
      const int64_t width = panels.width(p);
      if constexpr (std::is_same_v<T, G> && sizeof(T) >= 4)
        if (direct) {
          multiply(m, width, depth, a, width_, rows + p * kPanel, stride, c + p * kPanel, ldc, add);
          continue;
        }
      multiply(m, width, round_up(depth, pairing<G>), a, width_, panels.panel(p), width, c + p * kPanel, ldc, add);
    }
  }

  // Operands of a panel of queries and what a column of a tile has.
  void prepare(int64_t index, Scratch& scratch) {
    const Panel own = panel(index);
    if (own.rows <= 0) return;
    const T *query = in_.query.at(own.b, own.h, own.first), *grad = in_.grad.at(own.b, own.h, own.first);
    const int64_t at = (own.b * shape_.heads + own.h) * shape_.queries + own.first, to = index * width_;
    const Acc* query_scale = in_.query_scale ? in_.query_scale + at : nullptr;
    pack_transposed(query, in_.query.token, own.rows, shape_.size, width_, static_cast<G*>(scratch.rows),
                    query_columns_ + to * depth_);
    if (in_.needs.key && !direct_query_)
      pack_panels(query, in_.query.token, own.rows, shape_.size, query_scale, query_rows_ + to * padded_, scratch);
    if (in_.needs.logits())
      pack_transposed(grad, in_.grad.token, own.rows, shape_.value_size, width_, static_cast<G*>(scratch.rows),
                      grad_columns_ + to * value_depth_);
    if (in_.needs.value && !direct_grad_)
      pack_panels(grad, in_.grad.token, own.rows, shape_.value_size, nullptr, grad_rows_ + to * value_padded_, scratch);
    constexpr Acc infinite = std::numeric_limits<Acc>::infinity();
    for (int64_t i = 0; i < width_; ++i) {
      const bool real = i < own.rows;
      const Acc lse = real ? in_.lse[at + i] : -infinite;
      factor_[to + i] = in_.scale * (real && query_scale ? query_scale[i] : Acc(1));
      lse_[to + i] = lse == -infinite ? infinite : lse;  // a weight of 0 then
      delta_[to + i] = entropy_[to + i] = 0;
      if (!real || !in_.needs.logits()) continue;
      const T* out = in_.out.at(own.b, own.h, own.first + i);
      const Acc* wide = scratch.wide;
      if constexpr (std::is_same_v<T, Acc>) wide = out;
      else wide_.select(out, nullptr, shape_.value_size, scratch.wide);
      Acc delta = rows_.dot(grad + i * in_.grad.token, wide, shape_.value_size);
      if (in_.grad_lse) delta -= in_.grad_lse[at + i];
      if (in_.grad_entropy) {
        entropy_[to + i] = in_.grad_entropy[at + i];
        delta += in_.grad_entropy[at + i] * in_.entropy[at + i];
      }
      delta_[to + i] = delta;
    }
  }

  KeyBlock key_operands(int64_t b, int64_t kv_head, int64_t j, Scratch& scratch) const {
    const int64_t first = j * shape_.k_block, keys = std::min(shape_.k_block, shape_.keys - first);
    KeyBlock block{first, keys, nullptr, nullptr, 0, 0, in_.key_mask ? in_.key_mask + b * shape_.keys + first : nullptr};
    block.key = operand_rows(in_.key.at(b, kv_head, first), in_.key.token, keys, shape_.size, depth_, scratch.key,
                             block.key_stride);
    if (in_.needs.logits())
      block.value = operand_rows(in_.value.at(b, kv_head, first), in_.value.token, keys, shape_.value_size, value_depth_,
                                 scratch.value, block.value_stride);
    if (block.key_mask && std::memchr(block.key_mask, 0, keys) == nullptr) block.key_mask = nullptr;
    return block;
  }

  // (D, keys), the keys padded to pairs with zeros.
  void transpose_key(int64_t b, int64_t kv_head, const KeyBlock& block, Scratch& scratch) const {
    const T* rows = in_.key.at(b, kv_head, block.first);
    const int64_t size = shape_.size, keys = round_up(block.keys, pairing<G>);
    G* out = scratch.key_columns;
    if constexpr (std::is_same_v<T, Acc>) {
      operand_.transpose(rows, in_.key.token, block.keys, size, out, keys);
    } else {
      for (int64_t i = 0; i < block.keys; ++i) wide_.select(rows + i * in_.key.token, nullptr, size, scratch.wide + i * size);
      operand_.transpose(scratch.wide, size, block.keys, size, out, keys);
    }
    if (keys > block.keys)
      for (int64_t d = 0; d < size; ++d) out[d * keys + block.keys] = G{};
  }

  // The products of a tile and what its columns have; false where nothing in it is seen.
  template <typename Operand>
  bool fill_tile(const Panel& own, const KeyBlock& block, bool capped, Scratch& scratch, GradientTile<Operand>& tile) const {
    const int64_t to = own.index * width_, keys = block.keys;
    tile = {};
    if (ruled_) {
      const Reach& seen = reach_[own.b * head_panels_ + own.index % head_panels_];
      if (seen.misses(block.first, keys)) return false;
      if (seen.hides(block.first, keys)) {
        for (int64_t i = 0; i < width_; ++i) {
          const KeyRange range = i < own.rows ? in_.rules.of(own.b, own.first + i) : KeyRange{0, 0};
          scratch.low[i] = static_cast<Acc>(std::clamp<int64_t>(range.first - block.first, 0, keys));
          scratch.high[i] = static_cast<Acc>(std::clamp<int64_t>(range.last - block.first, 0, keys));
        }
        tile.low = scratch.low, tile.high = scratch.high;
      }
    }
    tile.keys = keys, tile.width = width_;
    tile.logits = scratch.logits;
    tile.factor = factor_ + to, tile.lse = lse_ + to, tile.delta = delta_ + to;
    tile.entropy = in_.grad_entropy ? entropy_ + to : nullptr;
    tile.key_mask = block.key_mask;
    tile.keep_scale = keep_scale<Acc>(in_.threshold);
    tile.softcap = capped ? in_.softcap : 0;
    multiply(keys, width_, depth_, block.key, block.key_stride, query_columns_ + to * depth_, width_, scratch.logits, width_,
             false);
    if (in_.softcap > 0) {
      for (int64_t k = 0; k < keys; ++k)
        for (int64_t i = 0; i < width_; ++i) scratch.logits[k * width_ + i] *= factor_[to + i];
      LogitTile<T> products{};
      products.rows = keys, products.keys = width_, products.logits = scratch.logits, products.stride = width_;
      products.scale = 1, products.softcap = in_.softcap;
      logits_.scale(products);
      tile.factor = scratch.ones;
    }
    if (in_.bias.row) tile.bias = transposed_bias(own, block, scratch);
    if (in_.threshold > 0) {
      tile.bits = kept_bits(own, block, scratch);
      tile.bits_stride = keys_;
    }
    return true;
  }

  void fill_upstream(const Panel& own, const KeyBlock& block, Scratch& scratch) const {
    multiply(block.keys, width_, value_depth_, block.value, block.value_stride,
             grad_columns_ + own.index * width_ * value_depth_, width_, scratch.upstream, width_, false);
  }

  // (keys, queries)
  const Acc* transposed_bias(const Panel& own, const KeyBlock& block, Scratch& scratch) const {
    Acc* rows = scratch.summed;
    std::fill_n(rows, tile(), Acc(0));
    LogitTile<T> tile{};
    tile.b = own.b, tile.h = own.h, tile.q = own.first, tile.k = block.first, tile.rows = own.rows, tile.keys = block.keys;
    tile.logits = rows, tile.stride = keys_;
    tile.bias = in_.bias;
    tile.rules = {-1, -1, nullptr, 0, shape_.keys};
    logits_.hide(tile);
    wide_.transpose(rows, keys_, width_, block.keys, scratch.bias, width_);
    return scratch.bias;
  }

  // Bits of kept weights, eight queries a byte.
  const uint8_t* kept_bits(const Panel& own, const KeyBlock& block, Scratch& scratch) const {
    const SampleMask mask = sample_mask(0, in_.threshold, false);
    tile_bits(in_.seed, mask, shape_.index(own.b, own.h, own.first, block.first), shape_.keys, own.rows, block.keys,
              scratch.some_bits, scratch.bits, kBitsStride);
    for (int64_t i = 0; i < width_; i += 8)
      subset_codes(scratch.bits + i * kBitsStride, kBitsStride, std::clamp<int64_t>(own.rows - i, 0, 8), block.keys,
                   scratch.kept + i / 8 * keys_);
    return scratch.kept;
  }

  void walk_key_block(int64_t b, int64_t kv_head, int64_t chunk, int64_t j, Scratch& scratch) {
    const Needs& needs = in_.needs;
    const int64_t group = shape_.group(), of_block = shape_.q_block / width_;
    KeyBlock block = key_operands(b, kv_head, j, scratch);
    if (needs.any_query()) transpose_key(b, kv_head, block, scratch);
    bool any = false;
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
      in_.q.of(b, h, j, scratch.list);
      for (const int64_t i : scratch.list)
        for (int64_t p = i * of_block; p < (i + 1) * of_block; ++p) {
          const Panel own = panel((b * shape_.heads + h) * head_panels_ + p);
          if (own.rows > 0 && add_tile(own, block, chunk, any, scratch)) any = true;
        }
    }
    const auto finish = [&](const ResultRows<T>& to, int64_t size, const Acc* sum, int64_t stride, Acc scale) {
      for (int64_t k = 0; k < block.keys; ++k) {
        T* row = to.at(b, kv_head, block.first + k);
        if (any) rounded_.store(sum + k * stride, size, scale, row);
        else std::fill_n(row, size, T{});
      }
    };
    if (needs.key) finish(in_.to_key, shape_.size, scratch.grad_key, padded_, in_.scale);
    if (needs.value) finish(in_.to_value, shape_.value_size, scratch.grad_value, value_padded_, keep_scale<Acc>(in_.threshold));
  }

  // Adds what a tile gives to dK, dV and the chunk's dQ (sets dK and dV where `add` is false); whether it gave anything.
  bool add_tile(const Panel& own, const KeyBlock& block, int64_t chunk, bool add, Scratch& scratch) {
    const Needs& needs = in_.needs;
    const bool logits = needs.any_query() || needs.key;
    GradientTile<G> tile;
    if (!fill_tile(own, block, true, scratch, tile)) return false;
    if (logits) {
      fill_upstream(own, block, scratch);
      tile.upstream = scratch.upstream;
    }
    if (needs.value) tile.weights = scratch.weights;
    if (needs.key || (needs.any_query() && sizeof(G) != 2)) tile.gradients = scratch.gradients;
    if (needs.any_query() && sizeof(G) == 2) tile.pairs = scratch.pairs;
    gradients_.gradients(tile);
    const int64_t to = own.index * width_;
    if (needs.value)
      multiply_rows(block.keys, own.rows, scratch.weights, shape_.value_size, direct_grad_, in_.grad.at(own.b, own.h, own.first),
                    in_.grad.token, grad_rows_ + to * value_padded_, scratch.grad_value, value_padded_, add);
    if (needs.key)
      multiply_rows(block.keys, own.rows, scratch.gradients, shape_.size, direct_query_, in_.query.at(own.b, own.h, own.first),
                    in_.query.token, query_rows_ + to * padded_, scratch.grad_key, padded_, add);
    if (needs.any_query()) {
      const int64_t at = chunk * panels() + own.index, keys = round_up(block.keys, pairing<G>);
      multiply(shape_.size, width_, keys, scratch.key_columns, keys, sizeof(G) == 2 ? scratch.pairs : scratch.gradients, width_,
               query_buffers_ + at * shape_.size * width_, width_, touched_[at]);
      touched_[at] = 1;
    }
    return true;
  }

  // dQ of a panel from the chunks' buffers, (D, queries) each.
  void sum_query(int64_t index, Scratch& scratch) {
    const Panel own = panel(index);
    if (own.rows <= 0) return;
    const int64_t size = shape_.size;
    Acc* sum = nullptr;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const int64_t at = chunk * panels() + index;
      if (!touched_[at]) continue;
      Acc* part = query_buffers_ + at * size * width_;
      if (sum == nullptr) sum = part;
      else accumulator_.axpy(1, part, size * width_, sum);
    }
    Acc* rows = scratch.wide;
    if (sum) wide_.transpose(sum, width_, size, width_, rows, size);
    else std::fill_n(rows, width_ * size, Acc(0));
    for (int64_t i = 0; i < own.rows; ++i) {
      if (in_.needs.query)
        rounded_.store(rows + i * size, size, factor_[index * width_ + i], in_.to_query.at(own.b, own.h, own.first + i));
      if (in_.needs.query_scale)
        in_.to_query_scale[(own.b * shape_.heads + own.h) * shape_.queries + own.first + i] =
            in_.scale * rows_.dot(in_.query.at(own.b, own.h, own.first + i), rows + i * size, size);
    }
  }

  // Sums of gradients of logits: (queries, Sk / C) by row of the grid and (queries, C) by column, or null.
  struct BiasSums {
    Acc *row, *column;
  };

  // The gradients of one bias or of two of one shape: a task has the sums of a panel's rows, over the batch and the heads that
  // share them.
  void sum_bias(bool want_row, bool want_column) {
    const ResultBias<T>& shared = want_row ? in_.to_row : in_.to_column;
    const int64_t row = want_row ? in_.to_row.size : 0, column = want_column ? in_.to_column.size : 0;
    struct BiasScratch : Scratch {
      BiasScratch(const Backward& own, int64_t sums) : Scratch(own), sums(sums) {}
      Array<Acc> sums;
    };
    const int64_t some_batch = shape_.batch / shared.batch, some_heads = shape_.heads / shared.heads;
    const auto make = [&] { return BiasScratch(*this, width_ * (row + column)); };
    run_tasks<G>(shared.batch * shared.heads * head_panels_, make, [&](int64_t task, BiasScratch& scratch) {
      const int64_t head = task / head_panels_, p = task % head_panels_, first = p * width_;
      const int64_t rows = std::min(width_, shape_.queries - first);
      if (rows <= 0) return;
      std::fill_n(static_cast<Acc*>(scratch.sums), width_ * (row + column), Acc(0));
      const BiasSums sums{want_row ? static_cast<Acc*>(scratch.sums) : nullptr,
                          want_column ? scratch.sums + width_ * row : nullptr};
      for (int64_t i = 0; i < some_batch; ++i)
        for (int64_t k = 0; k < some_heads; ++k) {
          const int64_t b = head / shared.heads * some_batch + i, h = head % shared.heads * some_heads + k;
          add_bias({b, h, (b * shape_.heads + h) * head_panels_ + p, first, rows}, sums, scratch);
        }
      const int64_t to = head * shape_.queries + first;
      if (want_row) rounded_.store(sums.row, rows * row, 1, in_.to_row.data + to * row);
      if (want_column) rounded_.store(sums.column, rows * column, 1, in_.to_column.data + to * column);
    });
  }

  // Adds the gradients of a panel's logits.
  void add_bias(const Panel& own, const BiasSums& sums, Scratch& scratch) const {
    const int64_t columns = in_.bias.columns, grid_rows = shape_.keys / columns;
    in_.kv.of(own.b, own.h, own.first / shape_.q_block, scratch.list);
    for (const int64_t j : scratch.list) {
      const KeyBlock block = key_operands(own.b, own.h / shape_.group(), j, scratch);
      GradientTile<Acc> tile;
      if (!fill_tile(own, block, false, scratch, tile)) continue;
      fill_upstream(own, block, scratch);
      tile.upstream = scratch.upstream;
      tile.gradients = scratch.upstream;
      wide_gradients_.gradients(tile);
      Acc* part = scratch.summed;
      wide_.transpose(scratch.upstream, width_, block.keys, width_, part, keys_);
      for (int64_t i = 0; i < own.rows; ++i, part += keys_) {
        Acc* by_row = sums.row ? sums.row + i * grid_rows : nullptr;
        if (columns == 1 && !sums.column) {
          accumulator_.axpy(1, part, block.keys, by_row + block.first);
          continue;
        }
        for (int64_t k = 0; k < block.keys;) {  // keys of one row of the grid
          const int64_t row = (block.first + k) / columns, c = (block.first + k) % columns;
          const int64_t n = std::min(columns - c, block.keys - k);
          if (sums.column) accumulator_.axpy(1, part + k, n, sums.column + i * columns + c);
          if (sums.row) by_row[row] += rows_sum(part + k, n);
          k += n;
        }
      }
    }
  }

  static Acc rows_sum(const Acc* x, int64_t n) {
    Acc sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += x[i];
    return sum;
  }

  std::vector<Reach> reaches() const {
    std::vector<Reach> found;
    for (int64_t b = 0; ruled_ && b < shape_.batch; ++b)
      for (int64_t p = 0; p < head_panels_; ++p)
        found.push_back(reach(in_.rules, b, p * width_, std::min(width_, shape_.queries - p * width_)));
    return found;
  }

  // elements of a buffer of all panels, `each` of a column
  int64_t held(bool needed, int64_t each) const { return needed ? panels() * width_ * each : 0; }

  const BackwardProblem<T>& in_;
  const AttentionShape shape_ = in_.shape;
  const HeadKernels<T, G>& operand_ = head_kernels<T, G>();
  const HeadKernels<T, Acc>& wide_ = head_kernels<T, Acc>();
  const ElementKernels<T>& rounded_ = element_kernels<T>();
  const AccumulatorKernels<Acc>& accumulator_ = accumulator_kernels<Acc>();
  const LogitKernels<T>& logits_ = logit_kernels<T>();
  const GradientKernels<T>& rows_ = gradient_kernels<T>();
  const GradientKernels<G>& gradients_ = gradient_kernels<G>();
  const GradientKernels<Acc>& wide_gradients_ = gradient_kernels<Acc>();

  const int64_t width_ = std::min(kQueries, shape_.q_block);  // queries of a panel
  const int64_t head_panels_ = shape_.q_blocks() * (shape_.q_block / width_);
  const int64_t keys_ = shape_.k_block;
  const int64_t depth_ = transposed_depth<G>(shape_.size), value_depth_ = transposed_depth<G>(shape_.value_size);
  const int64_t padded_ = round_up(shape_.size, kRound), value_padded_ = round_up(shape_.value_size, kRound);
  const int64_t chunks_ =
      std::min({blocks_of(kTasks, shape_.batch * shape_.kv_heads), kMostChunks, shape_.k_blocks()});
  // whether rows serve as second operands where they lie
  const bool plain_type_ = std::is_same_v<T, G> && sizeof(T) >= 4;
  const bool direct_query_ = plain_type_ && padded_ == shape_.size && !in_.query_scale;
  const bool direct_grad_ = plain_type_ && value_padded_ == shape_.value_size;
  const bool ruled_ = in_.rules.left >= 0 || in_.rules.right >= 0 || in_.rules.range;
  const std::vector<Reach> reach_ = reaches();  // (B, panels of a head)

  // of every panel: the queries and the upstream gradient as second operands, (D, queries) and Panels (queries, D)
  const Array<G> query_columns_{held(true, depth_)}, query_rows_{held(in_.needs.key && !direct_query_, padded_)};
  const Array<G> grad_columns_{held(in_.needs.logits(), value_depth_)};
  const Array<G> grad_rows_{held(in_.needs.value && !direct_grad_, value_padded_)};
  const Array<Acc> factor_{held(true, 1)}, lse_{held(true, 1)}, delta_{held(true, 1)}, entropy_{held(true, 1)};
  // of every chunk and panel: dQ (D, queries), and whether it is there
  const Array<Acc> query_buffers_{held(in_.needs.any_query(), chunks_ * shape_.size)};
  const Array<uint8_t> touched_{in_.needs.any_query() ? chunks_ * panels() : 0};
};

}  // namespace pyrx::cpu
