// Attention over listed blocks, forward, in one kernel of products and softmax (FusedTile): float32 on AVX-512, bfloat16 on
// its dot products. Nothing is packed but queries, and keys and values whose rows the kernel does not take.
#pragma once

#include <cstring>
#include <limits>
#include <numbers>
#include <vector>

#include "cpu/attention_forward.h"

namespace pyrx::cpu {

template <typename T>
class FusedForward {
 public:
  static bool serves(const AttentionProblem<T>& problem, const AttentionResults<T>& results) {
    if (fused_kernels<T>().step == nullptr || results.entropy || problem.softcap > 0 || problem.bias.row) return false;
    return sizeof(T) == 4 || (multiplies_half(at::kBFloat16) && !native_half(at::kBFloat16));
  }

  FusedForward(const AttentionProblem<T>& problem, const AttentionResults<T>& results)
      : in_(problem),
        out_(results),
        shape_(problem.shape),
        depth_(round_up(shape_.size, pairing<T>)),
        values_(round_up(shape_.value_size, kFusedRows)),
        panels_((shape_.q_block + kFusedQueries - 1) / kFusedQueries),
        together_(std::max<int64_t>(1, kTaskRows / shape_.q_block)),
        tasks_((shape_.q_blocks() + together_ - 1) / together_) {}

  void run() {
    run_tasks<T>(
        shape_.batch * shape_.heads * tasks_, [&] { return Scratch(*this); },
        [&](int64_t task, Scratch& scratch) { attend(task, scratch); });
  }

 private:
  // At most 32 queries of a block, and what is summed up of them.
  struct Panel {
    int64_t first, rows, width;
    Reach seen;
    T* queries;
    float *out, *most, *total, *factor;
    int32_t *low, *high;
    bool ranged;  // low and high are written
  };
  // Keys first .. first + keys - 1 of blocks that follow each other.
  struct Run {
    int64_t first, keys;
  };

  // A thread's own.
  struct Scratch {
    Workspace memory;
    std::vector<Panel> panels;
    T *rows, *keys, *values, *weights, *results;
    uint8_t *bits, *kept, *shifted;
    std::vector<int64_t> listed, next_listed;
    std::vector<Run> runs, next_runs;       // of a tile
    std::vector<FusedKeys<T>> parts, seen;  // of a tile; what a panel sees of them
    std::vector<Lines> ahead;
    int64_t fetched = -1;  // the task whose first operands are fetched

    explicit Scratch(const FusedForward& f) : panels(f.panels_) {
      const int64_t own = f.panels_ * kFusedQueries;
      const auto reserve = [&]<typename U>(U, int64_t n) { return memory.reserve<U>(n); };
      const int64_t at[] = {reserve(T(), own * f.depth_),
                            reserve(0.0f, own * f.values_),
                            reserve(0.0f, 3 * own),
                            reserve(int32_t(), 2 * own),
                            reserve(T(), kFusedQueries * f.depth_),
                            reserve(T(), kFusedTileKeys * f.depth_),
                            reserve(T(), kFusedTileKeys * f.values_),
                            reserve(T(), kFusedTileKeys * kFusedQueries),
                            reserve(T(), kFusedQueries * f.values_),
                            reserve(uint8_t(), kFusedQueries * kBitsStride),
                            reserve(uint8_t(), kFusedQueries / 8 * kFusedTileKeys),
                            reserve(uint8_t(), kFusedTileKeys / 8 + 2)};
      memory.allocate();
      for (int64_t p = 0; p < f.panels_; ++p) {
        Panel& panel = panels[p];
        const int64_t i = p * kFusedQueries;
        panel.queries = memory.at_offset<T>(at[0]) + i * f.depth_;
        panel.out = memory.at_offset<float>(at[1]) + i * f.values_;
        panel.most = memory.at_offset<float>(at[2]) + i;
        panel.total = panel.most + own, panel.factor = panel.total + own;
        panel.low = memory.at_offset<int32_t>(at[3]) + i, panel.high = panel.low + own;
      }
      rows = memory.at_offset<T>(at[4]), keys = memory.at_offset<T>(at[5]), values = memory.at_offset<T>(at[6]);
      weights = memory.at_offset<T>(at[7]), results = memory.at_offset<T>(at[8]);
      bits = memory.at_offset<uint8_t>(at[9]), kept = memory.at_offset<uint8_t>(at[10]);
      shifted = memory.at_offset<uint8_t>(at[11]);
    }
    ~Scratch() { store_fence(); }  // of the thread's streamed results
  };

  // Blocks of queries first .. last - 1 of a head.
  struct Queries {
    int64_t b, h, first, last;
  };
  Queries queries_of(int64_t task) const {
    const int64_t head = task / tasks_;
    // the last blocks of a head come first: they see most where attention is causal
    const int64_t first = (tasks_ - 1 - task % tasks_) * together_;
    return {head / shape_.heads, head % shape_.heads, first, std::min(first + together_, shape_.q_blocks())};
  }
  int64_t rows_of(int64_t block) const { return std::min(shape_.q_block, shape_.queries - block * shape_.q_block); }

  void attend(int64_t task, Scratch& scratch) const {
    const Queries own = queries_of(task);
    for (int64_t block = own.first; block < own.last; ++block) {
      seen_blocks(in_, own.b, own.h, block, scratch.listed);
      const std::vector<int64_t>& listed = scratch.listed;
      if (block == own.first && scratch.fetched != task) fetch_first(own, block, scratch);
      const int64_t count = begin(own.b, own.h, block, scratch);
      for (size_t i = 0, next; i < listed.size(); i = next) {
        next = runs_from(listed, i, scratch.runs);
        scratch.ahead.clear();
        if (next < listed.size()) {
          add_runs(own.b, own.h, listed, next, scratch);
        } else if (block + 1 < own.last) {
          add_queries(own, block + 1, scratch);
        } else if (const int64_t following = task + at::get_num_threads(); following < shape_.batch * shape_.heads * tasks_) {
          const Queries after = queries_of(following);
          add_queries(after, after.first, scratch);
          scratch.fetched = following;
        }
        attend_tile(own.b, own.h, count, scratch);
      }
      for (int64_t p = 0; p < count; ++p) finish(own.b, own.h, scratch.panels[p], scratch);
    }
  }

  // The blocks from listed[i] that make a tile; which one begins the next.
  size_t runs_from(const std::vector<int64_t>& listed, size_t i, std::vector<Run>& runs) const {
    const size_t next = std::min(listed.size(), i + static_cast<size_t>(kFusedTileKeys / shape_.k_block));
    runs.clear();
    for (; i < next; ++i) {
      const int64_t first = listed[i] * shape_.k_block, keys = std::min(shape_.k_block, shape_.keys - first);
      if (!runs.empty() && runs.back().first + runs.back().keys == first) runs.back().keys += keys;
      else runs.push_back({first, keys});
    }
    return next;
  }

  void fetch_first(const Queries& own, int64_t block, Scratch& scratch) const {
    scratch.ahead.clear();
    add_queries(own, block, scratch);
    Ahead(scratch.ahead.data(), static_cast<int64_t>(scratch.ahead.size())).fetch(std::numeric_limits<int64_t>::max());
  }
  // What a block of queries begins with.
  void add_queries(const Queries& own, int64_t block, Scratch& scratch) const {
    add_rows(in_.query, own.b, own.h, block * shape_.q_block, rows_of(block), shape_.size, scratch.ahead);
    seen_blocks(in_, own.b, own.h, block, scratch.next_listed);
    if (!scratch.next_listed.empty()) add_runs(own.b, own.h, scratch.next_listed, 0, scratch);
  }
  void add_runs(int64_t b, int64_t h, const std::vector<int64_t>& listed, size_t i, Scratch& scratch) const {
    runs_from(listed, i, scratch.next_runs);
    for (const Run& run : scratch.next_runs) {
      add_rows(in_.key, b, h / shape_.group(), run.first, run.keys, shape_.size, scratch.ahead);
      add_rows(in_.value, b, h / shape_.group(), run.first, run.keys, shape_.value_size, scratch.ahead);
    }
  }

  // Panels of a block of queries before its first key; how many there are.
  int64_t begin(int64_t b, int64_t h, int64_t block, Scratch& scratch) const {
    const int64_t end = block * shape_.q_block + rows_of(block);
    int64_t count = 0;
    for (int64_t q = block * shape_.q_block; q < end; ++count) {
      Panel& panel = scratch.panels[count];
      panel.first = q, panel.rows = std::min(kFusedQueries, end - q);
      panel.width = panel.rows > kFusedQueries / 2 ? kFusedQueries : kFusedQueries / 2;
      std::memset(panel.out, 0, panel.width * values_ * sizeof(float));
      std::fill_n(panel.most, panel.width, std::numeric_limits<float>::lowest());
      std::fill_n(panel.total, panel.width, 0.0f);
      panel.seen = reach(in_.rules, b, q, panel.rows);
      const float* scale = in_.query_scale ? in_.query_scale + (b * shape_.heads + h) * shape_.queries + q : nullptr;
      panel.ranged = false;
      for (int64_t i = 0; i < panel.width; ++i)
        panel.factor[i] = std::numbers::log2e_v<float> * in_.scale * (scale && i < panel.rows ? scale[i] : 1);
      pack_queries(in_.query.at(b, h, q), panel, scratch);
      q += panel.rows;
    }
    return count;
  }

  void write_ranges(int64_t b, Panel& panel) const {
    for (int64_t i = 0; i < panel.width; ++i) {
      const KeyRange range = i < panel.rows ? in_.rules.of(b, panel.first + i) : KeyRange{0, shape_.keys};
      panel.low[i] = static_cast<int32_t>(std::clamp<int64_t>(range.first, 0, shape_.keys));
      panel.high[i] = static_cast<int32_t>(std::clamp<int64_t>(range.last, 0, shape_.keys));
    }
    panel.ranged = true;
  }

  // Transposed, and times `factor` but for 16-bit queries, which would lose by it.
  void pack_queries(const T* rows, const Panel& panel, const Scratch& scratch) const {
    int64_t stride = in_.query.token;
    if constexpr (sizeof(T) == 4) {
      const bool alike = !in_.query_scale && stride == depth_ && depth_ == shape_.size;
      const int64_t together = alike ? panel.rows : 1;
      for (int64_t i = 0; i < panel.rows; i += together)
        element_kernels<T>().store(rows + i * stride, together * shape_.size, panel.factor[i], scratch.rows + i * depth_);
      rows = scratch.rows, stride = depth_;
    }
    pack_transposed<T, T>(rows, stride, panel.rows, shape_.size, panel.width, scratch.rows, panel.queries);
  }

  // The keys of a run as the kernel takes them; `at`: of its first in the tile.
  FusedKeys<T> keys_of(int64_t b, int64_t h, const Run& run, int64_t at, const Scratch& scratch) const {
    const int64_t kv_head = h / shape_.group(), padded = round_up(run.keys, kFusedRows);
    FusedKeys<T> part{padded, in_.key.at(b, kv_head, run.first), in_.value.at(b, kv_head, run.first), run.first, false,
                      nullptr};
    // what lies between rows is not read, though it would be as wide as the padding
    if (in_.key.token != depth_ || shape_.size != depth_ || padded != run.keys) {
      T* const keys = scratch.keys + at * depth_;
      for (int64_t i = 0; i < run.keys; ++i) {
        std::copy_n(part.key + i * in_.key.token, shape_.size, keys + i * depth_);
        std::fill_n(keys + i * depth_ + shape_.size, depth_ - shape_.size, T{});
      }
      std::fill_n(keys + run.keys * depth_, (padded - run.keys) * depth_, T{});
      part.key = keys;
    }
    if (sizeof(T) == 2 || in_.value.token != values_ || shape_.value_size != values_ || padded != run.keys) {
      T* const values = scratch.values + at * values_;
      const int64_t rows = round_up(run.keys, pairing<T>);
      pack_rows<T, T>(part.value, in_.value.token, run.keys, shape_.value_size, values_, values);
      std::fill_n(values + rows * values_, (padded - rows) * values_, T{});
      part.value = values;
    }
    const uint8_t* key_mask = in_.key_mask ? in_.key_mask + b * shape_.keys + run.first : nullptr;
    if (key_mask && std::memchr(key_mask, 0, run.keys) != nullptr) part.hides = true, part.key_mask = key_mask;
    return part;
  }

  // What queries of a panel see of a tile, cut where some see a key and others do not; whether there is such a key. Of keys
  // that none sees only those beside seen ones are multiplied.
  bool see(const Panel& panel, Scratch& scratch) const {
    const Reach& reach = panel.seen;
    bool hides = false;
    scratch.seen.clear();
    if (reach.any.empty()) return false;
    for (const FusedKeys<T>& part : scratch.parts) {
      const auto within = [&](int64_t key) { return std::clamp<int64_t>(key - part.first, 0, part.count); };
      const int64_t first = within(reach.any.first) / kFusedRows * kFusedRows, last = round_up(within(reach.any.last), kFusedRows);
      // keys that all of them see
      const int64_t from = std::clamp(round_up(within(reach.every.first), kFusedRows), first, std::max(first, last));
      const int64_t to = std::clamp(within(reach.every.last) / kFusedRows * kFusedRows, from, std::max(from, last));
      const auto add = [&](int64_t begin, int64_t end, bool hidden) {
        if (begin >= end) return;
        scratch.seen.push_back({end - begin, part.key + begin * depth_, part.value + begin * values_, part.first + begin, hidden,
                                part.key_mask ? part.key_mask + begin : nullptr});
        hides |= hidden;
      };
      if (part.hides) {
        add(first, last, true);
      } else {
        add(first, from, true);
        add(from, to, false);
        add(to, last, true);
      }
    }
    return hides;
  }

  void attend_tile(int64_t b, int64_t h, int64_t count, Scratch& scratch) const {
    int64_t keys = 0, lines = 0;
    scratch.parts.clear();
    for (const Run& run : scratch.runs) {
      scratch.parts.push_back(keys_of(b, h, run, keys, scratch));
      keys += scratch.parts.back().count;
    }
    for (const Lines& each : scratch.ahead) lines += each.count;
    Ahead ahead(scratch.ahead.data(), static_cast<int64_t>(scratch.ahead.size()));
    FusedTile<T> tile{};
    tile.size = depth_, tile.value_size = values_, tile.weights = scratch.weights, tile.ahead = &ahead;
    tile.lines = (lines * kFusedRows + count * keys - 1) / (count * keys);
    for (int64_t p = 0; p < count; ++p) {
      Panel& panel = scratch.panels[p];
      const bool hides = see(panel, scratch);
      if (scratch.seen.empty()) continue;
      if (hides && !panel.ranged) write_ranges(b, panel);
      tile.width = panel.width, tile.queries = panel.queries;
      tile.parts = scratch.seen.data(), tile.count = static_cast<int64_t>(scratch.seen.size());
      tile.factor = panel.factor, tile.most = panel.most, tile.total = panel.total, tile.out = panel.out;
      tile.low = hides ? panel.low : nullptr, tile.high = panel.high;
      if (in_.threshold > 0) tile.bits = kept_bits(b, h, panel, scratch);
      tile.bits_stride = kFusedTileKeys;
      fused_kernels<T>().step(tile);
    }
    ahead.fetch(lines);
  }

  // Bits of kept weights, eight queries a byte.
  const uint8_t* kept_bits(int64_t b, int64_t h, const Panel& panel, const Scratch& scratch) const {
    const SampleMask mask = sample_mask(0, in_.threshold, false);
    int64_t at = 0;
    for (const FusedKeys<T>& part : scratch.seen) {
      const int64_t keys = std::min(part.count, shape_.keys - part.first);
      tile_bits(in_.seed, mask, shape_.index(b, h, panel.first, part.first), shape_.keys, panel.rows, keys, scratch.shifted,
                scratch.bits, kBitsStride);
      for (int64_t i = 0; i < panel.width; i += 8)
        subset_codes(scratch.bits + i * kBitsStride, kBitsStride, std::clamp<int64_t>(panel.rows - i, 0, 8), keys,
                     scratch.kept + i / 8 * kFusedTileKeys + at);
      at += part.count;
    }
    return scratch.kept;
  }

  void finish(int64_t b, int64_t h, const Panel& panel, const Scratch& scratch) const {
    const int64_t size = shape_.value_size;
    T* const to = out_.at(b, h, panel.first);
    T* const rows = out_.streamed ? scratch.results : to;
    const int64_t stride = out_.streamed ? size : out_.token;
    fused_kernels<T>().normalize(panel.out, panel.total, size, panel.width,
                                 in_.threshold > 0 ? keep_scale<float>(in_.threshold) : 1.0f);
    head_kernels<T, T>().transpose(panel.out, panel.width, size, panel.rows, rows, stride);
    if (out_.streamed) out_.stream(rows, panel.rows, size, to);
    out_.finish_lse((b * shape_.heads + h) * shape_.queries + panel.first, panel.rows, panel.most, panel.total);
  }

  static constexpr int64_t kBitsStride = kFusedTileKeys / 8;

  const AttentionProblem<T>& in_;
  const AttentionResults<T>& out_;
  const AttentionShape shape_;
  const int64_t depth_, values_;  // of a row of keys and of values, padded
  const int64_t panels_;          // most of a block of queries
  const int64_t together_;        // blocks of queries of a task
  const int64_t tasks_;           // of a head
};

}  // namespace pyrx::cpu
