// The attention mass of blocks, and the share of it that a mask keeps, on the CPU.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <numbers>

#include "cpu/attention.h"

namespace pyrx::cpu {
namespace {

constexpr int64_t kRows = 128, kKeys = kLogitKeys;  // of a tile: whole blocks

// The keys of every head, transposed for GEMMs a tile at a time: (B, Hkv) of (depth, kKeys) panels, the last narrower.
template <typename G>
struct KeyPanels {
  at::Tensor memory;
  const G* data;
  int64_t depth, head;  // elements of a head

  const G* of(int64_t index, int64_t tile) const { return data + index * head + tile * kKeys * depth; }
};

template <typename G, typename T>
KeyPanels<G> pack_keys(const LogitProblem<T>& problem) {
  const AttentionShape& shape = problem.shape;
  const int64_t depth = transposed_depth<G>(shape.size), head = round_up(shape.keys, kRound) * depth;
  const at::Tensor memory = at::empty({shape.batch * shape.kv_heads * head * static_cast<int64_t>(sizeof(G))}, at::kByte);
  G* data = static_cast<G*>(memory.mutable_data_ptr());
  const int64_t tiles = blocks_of(shape.keys, kKeys);
  at::parallel_for(0, shape.batch * shape.kv_heads * tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<G> scratch(kKeys * depth);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = i / tiles, key = i % tiles * kKeys, n = std::min(kKeys, shape.keys - key);
      const T* from = problem.key.at(index / shape.kv_heads, index % shape.kv_heads, key);
      pack_transposed<T, G>(from, problem.key.token, n, shape.size, round_up(n, kRound), scratch.data(),
                            data + index * head + key * depth);
    }
  });
  return {memory, data, depth, head};
}

// A thread's place for a tile of queries.
template <typename T, typename G>
struct Scratch {
  using Acc = accumulate_t<T>;
  std::vector<G> query = std::vector<G>(kRows * kMostHeadSize);
  std::vector<Acc> products = std::vector<Acc>(kRows * kKeys), factor = std::vector<Acc>(kRows);
  std::vector<Acc> offset = std::vector<Acc>(kRows);  // of block_mass
  std::vector<Acc> sums;                              // of block_recall
  std::vector<KeyRange> visible = std::vector<KeyRange>(kRows);
  std::vector<int32_t> first = std::vector<int32_t>(kRows), last = std::vector<int32_t>(kRows);
  std::vector<uint8_t> kept;
};

// A tile of queries, and the tiles of keys that it sees.
template <typename T, typename G>
class Pass {
 public:
  using Acc = accumulate_t<T>;

  Pass(const LogitProblem<T>& problem, const KeyPanels<G>& keys, int64_t b, int64_t h, int64_t q, Scratch<T, G>& scratch)
      : problem_(problem), keys_(keys), b_(b), h_(h), q_(q), scratch_(scratch) {
    const AttentionShape& shape = problem.shape;
    rows = std::min(kRows, shape.queries - q);
    index_ = b * shape.kv_heads + h / shape.group();
    query_ = operand(problem.query.at(b, h, q));
    finished_ = problem.softcap != 0 || problem.bias.row != nullptr;
    const Acc* own = problem.query_scale ? problem.query_scale + (b * shape.heads + h) * shape.queries + q : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      const double scale = finished_ ? 1 : own ? problem.scale * static_cast<double>(own[r]) : problem.scale;
      scratch.factor[r] = static_cast<Acc>(scale * std::numbers::log2e);
      scratch.visible[r] = problem.rules.of(b, q + r);
    }
  }

  void hide(int64_t row) { scratch_.visible[row] = {0, 0}; }

  // f(first key, tile of exponents) for each tile of keys that one of the queries sees.
  template <typename F>
  void run(F f) {
    const int64_t keys = problem_.shape.keys;
    KeyRange every{0, keys}, any{keys, 0};  // that all see, that one sees
    for (int64_t r = 0; r < rows; ++r) {
      const KeyRange own = scratch_.visible[r];
      every = every & own;
      if (!own.empty()) any = {std::min(any.first, own.first), std::max(any.last, own.last)};
    }
    for (int64_t k = any.first / kKeys * kKeys; k < any.last; k += kKeys) {
      const int64_t n = std::min(kKeys, keys - k), width = round_up(n, kRound);
      Acc* products = scratch_.products.data();
      multiply(rows, width, keys_.depth, query_, query_stride_, keys_.of(index_, k / kKeys), width, products, width, false);
      const LogitTile<T> tile = problem_.tile(b_, h_, q_, k, rows, n, products, width);
      if (finished_) {
        logit_kernels<T>().scale(tile);
        if (problem_.bias.row) logit_kernels<T>().hide(tile);
      }
      ExponentTile<Acc> exponents{rows, n, products, width, scratch_.factor.data(), nullptr, nullptr, tile.key_mask};
      if (tile.key_mask || width > n || k < every.first || k + n > every.last) {
        for (int64_t r = 0; r < rows; ++r) {
          const KeyRange own = scratch_.visible[r];
          scratch_.first[r] = static_cast<int32_t>(std::clamp<int64_t>(own.first - k, 0, n));
          scratch_.last[r] = static_cast<int32_t>(std::clamp<int64_t>(own.last - k, 0, n));
        }
        exponents.first = scratch_.first.data();
        exponents.last = scratch_.last.data();
      }
      f(k, exponents);
    }
  }

  int64_t rows;

 private:
  // The queries where they lie, or as GEMMs take them.
  const G* operand(const T* from) {
    const int64_t size = problem_.shape.size;
    if constexpr (std::is_same_v<T, G>)
      if (size == keys_.depth) {
        query_stride_ = problem_.query.token;
        return from;
      }
    G* to = scratch_.query.data();
    query_stride_ = keys_.depth;
    for (int64_t r = 0; r < rows; ++r, to += keys_.depth) {
      head_kernels<T, G>().select(from + r * problem_.query.token, nullptr, size, to);
      std::fill(to + size, to + keys_.depth, G{});
    }
    return scratch_.query.data();
  }

  const LogitProblem<T>& problem_;
  const KeyPanels<G>& keys_;
  int64_t b_, h_, q_, index_, query_stride_;
  Scratch<T, G>& scratch_;
  const G* query_;
  bool finished_;  // whether the tiles hold logits, not products
};

// f(pass, b, h, first query, scratch) for every tile of queries, over the threads.
template <typename F>
void for_passes(const at::Tensor& query, const at::Tensor& key, int64_t q_block, int64_t k_block,
                const LogitArguments& logits, F f) {
  dispatch_storage(query.scalar_type(), [&](auto type) {
    using T = decltype(type);
    dispatch_operand<T>(query.scalar_type(), [&](auto operand) {
      using G = decltype(operand);
      Kept kept;
      const LogitProblem<T> problem = logit_problem<T>(query, key, q_block, k_block, logits, kept);
      const AttentionShape& shape = problem.shape;
      const KeyPanels<G> keys = pack_keys<G>(problem);
      const int64_t tiles = blocks_of(shape.queries, kRows);
      run_tasks<G>(
          shape.batch * shape.heads * tiles, [] { return Scratch<T, G>(); },
          [&](int64_t task, Scratch<T, G>& scratch) {
            const int64_t head = task / tiles, b = head / shape.heads, h = head % shape.heads;
            Pass<T, G> pass(problem, keys, b, h, task % tiles * kRows, scratch);
            f(pass, b, h, task % tiles * kRows, scratch);
          });
    });
  });
}

at::TensorOptions accumulator_options(const at::Tensor& query) {
  return query.options().dtype(accumulation_dtype(query.scalar_type()));
}

at::Tensor block_mass(const at::Tensor& query, const at::Tensor& key, const at::Tensor& lse, int64_t q_block,
                      int64_t k_block, int64_t left, int64_t right, const std::optional<at::Tensor>& key_range,
                      const std::optional<at::Tensor>& key_mask, const std::optional<at::Tensor>& query_scale,
                      const std::optional<at::Tensor>& row_bias, const std::optional<at::Tensor>& column_bias, double scale,
                      double softcap) {
  const LogitArguments logits{left, right, key_range, key_mask, query_scale, row_bias, column_bias, scale, softcap};
  check_mass(query, key, lse, q_block, k_block, logits);
  const int64_t heads = query.size(1), queries = query.size(2);
  const int64_t q_blocks = blocks_of(queries, q_block), k_blocks = blocks_of(key.size(2), k_block);
  // tiles that nobody sees are passed over
  const at::Tensor mass = at::zeros({query.size(0), heads, q_blocks, k_blocks}, accumulator_options(query));
  if (mass.numel() == 0) return mass;
  const at::Tensor own = lse.contiguous();
  for_passes(query, key, q_block, k_block, logits, [&](auto& pass, int64_t b, int64_t h, int64_t q, auto& scratch) {
    using Acc = typename std::decay_t<decltype(pass)>::Acc;
    const Acc* sums = own.const_data_ptr<Acc>() + (b * heads + h) * queries + q;
    for (int64_t r = 0; r < pass.rows; ++r) {
      scratch.offset[r] = static_cast<Acc>(sums[r] * std::numbers::log2e);
      if (sums[r] == -std::numeric_limits<Acc>::infinity()) pass.hide(r);
    }
    Acc* to = mass.mutable_data_ptr<Acc>() + ((b * heads + h) * q_blocks + q / q_block) * k_blocks;
    pass.run([&](int64_t k, const ExponentTile<Acc>& tile) {
      mass_kernels<Acc>().mass(tile, scratch.offset.data(), q_block, k_block, to + k / k_block, k_blocks);
    });
  });
  return mass;
}

at::Tensor block_recall(const at::Tensor& query, const at::Tensor& key, const at::Tensor& blocks, int64_t q_block,
                        int64_t k_block, int64_t left, int64_t right, const std::optional<at::Tensor>& key_range,
                        const std::optional<at::Tensor>& key_mask, const std::optional<at::Tensor>& query_scale,
                        const std::optional<at::Tensor>& row_bias, const std::optional<at::Tensor>& column_bias,
                        double scale, double softcap) {
  const LogitArguments logits{left, right, key_range, key_mask, query_scale, row_bias, column_bias, scale, softcap};
  check_recall(query, key, blocks, q_block, k_block, logits);
  const int64_t heads = query.size(1), queries = query.size(2);
  const at::Tensor recall = at::empty({query.size(0), heads, queries}, accumulator_options(query));
  if (recall.numel() == 0) return recall;
  const at::Tensor own = blocks.contiguous();
  const int64_t q_blocks = blocks.size(2), k_blocks = blocks.size(3), vectors = k_block / kRound;
  const int64_t of_head = blocks.size(1) == 1 ? 0 : q_blocks * k_blocks;
  const int64_t of_batch = blocks.size(0) == 1 ? 0 : blocks.size(1) * q_blocks * k_blocks;
  for_passes(query, key, q_block, k_block, logits, [&](auto& pass, int64_t b, int64_t h, int64_t q, auto& scratch) {
    using Acc = typename std::decay_t<decltype(pass)>::Acc;
    constexpr int64_t kRow = kRows * kRound;
    scratch.sums.assign(3 * kRow, 0);
    std::fill_n(scratch.sums.begin(), kRow, std::numeric_limits<Acc>::lowest());
    const ShareRows<Acc> sums{scratch.sums.data(), scratch.sums.data() + kRow, scratch.sums.data() + 2 * kRow, q_block};
    const bool* chosen = own.const_data_ptr<bool>() + b * of_batch + h * of_head + q / q_block * k_blocks;
    const int64_t own_blocks = blocks_of(pass.rows, q_block);
    pass.run([&](int64_t k, const ExponentTile<Acc>& tile) {
      scratch.kept.assign(own_blocks, 0);
      for (int64_t i = 0; i < own_blocks; ++i)
        for (int64_t v = 0; v * kRound < tile.keys; ++v)
          scratch.kept[i] |= static_cast<uint8_t>(chosen[i * k_blocks + k / k_block + v / vectors] << v);
      mass_kernels<Acc>().add(tile, scratch.kept.data(), sums);
    });
    mass_kernels<Acc>().finish(sums, pass.rows, recall.mutable_data_ptr<Acc>() + (b * heads + h) * queries + q);
  });
  return recall;
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) {
  m.impl("block_mass", &block_mass);
  m.impl("block_recall", &block_recall);
}

}  // namespace
}  // namespace pyrx::cpu
