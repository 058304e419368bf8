// Attention over listed blocks, forward: FlashAttention-2's online softmax between GEMMs of tiles of listed keys.
#pragma once

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <thread>
#include <vector>

#include "cpu/attention.h"
#include "cpu/pages.h"

namespace pyrx::cpu {

constexpr int64_t kTaskRows = 128;   // most queries of a task, more where a block has more
constexpr int64_t kPackBlocks = 4;   // blocks of keys that a task packs
constexpr int64_t kApart = 64;       // values of blocks of as many keys are multiplied apart, of smaller ones joined
// As many blocks of queries, or fewer, on average, each pack the keys they see, which are then in their thread's caches.
constexpr double kFew = 3;

template <typename T>
struct AttentionResults {
  using Acc = accumulate_t<T>;
  T* out;
  int64_t batch, head, token;  // strides of out in elements
  Acc* lse;                    // (B, H, Sq)
  Acc* entropy;                // (B, H, Sq) or null
  bool streamed;               // out goes past the caches

  T* at(int64_t b, int64_t h, int64_t q) const { return out + b * batch + h * head + q * token; }

  // Of queries q .. q + rows - 1: sums (rows, size) in rows of `stride`, which are overwritten, and what belongs to a row.
  void finish(const AttentionShape& shape, int64_t b, int64_t h, int64_t q, int64_t rows, Acc* sums, int64_t stride,
              const Acc* most, const Acc* total, const Acc* weighted, Acc kept) const {
    const auto store = element_kernels<T>().store;
    const int64_t first = (b * shape.heads + h) * shape.queries + q, size = shape.value_size;
    T* const staged = reinterpret_cast<T*>(sums);  // in place: elements are not wider than sums
    T* const to = at(b, h, q);
    for (int64_t r = 0; r < rows; ++r) {
      const bool nothing = total[r] == 0;
      store(sums + r * stride, size, nothing ? Acc(0) : kept / total[r], streamed ? staged + r * size : to + r * token);
      if (entropy)
        entropy[first + r] =
            nothing ? Acc(0) : std::log(total[r]) - std::numbers::ln2_v<Acc> * (weighted[r] / total[r]);
    }
    finish_lse(first, rows, most, total);
    if (streamed) stream(staged, rows, size, to);
  }

  void finish_lse(int64_t first, int64_t rows, const Acc* most, const Acc* total) const {
    for (int64_t r = 0; r < rows; ++r)
      lse[first + r] = total[r] == 0 ? -std::numeric_limits<Acc>::infinity()
                                     : most[r] * std::numbers::ln2_v<Acc> + std::log(total[r]);
  }

  // Contiguous rows to rows that are `token` apart.
  void stream(const T* from, int64_t rows, int64_t size, T* to) const {
    const int64_t run = token == size ? rows : 1;  // rows that follow each other
    for (int64_t r = 0; r < rows; r += run)
      byte_kernels().copy_stream(reinterpret_cast<uint8_t*>(to + r * token),
                                 reinterpret_cast<const uint8_t*>(from + r * size), run * size * sizeof(T));
  }
};

// Blocks of keys that some query of a block sees.
template <typename T>
Reach seen_blocks(const AttentionProblem<T>& in, int64_t b, int64_t h, int64_t block, std::vector<int64_t>& listed) {
  const AttentionShape& shape = in.shape;
  const int64_t q = block * shape.q_block;
  const Reach seen = reach(in.rules, b, q, std::min(shape.q_block, shape.queries - q));
  in.kv.of(b, h, block, listed);
  listed.erase(std::remove_if(listed.begin(), listed.end(),
                              [&](int64_t j) {
                                const int64_t k = j * shape.k_block;
                                return seen.any.empty() || seen.misses(k, std::min(shape.k_block, shape.keys - k));
                              }),
               listed.end());
  return seen;
}

template <typename U>
void add_lines(const U* from, int64_t n, std::vector<Lines>& ahead) {
  ahead.push_back({from, (n * int64_t(sizeof(U)) + 63) / 64});
}
template <typename U>
void add_rows(const TokenRows<U>& from, int64_t b, int64_t h, int64_t first, int64_t n, int64_t size,
              std::vector<Lines>& ahead) {
  if (from.token == size) return add_lines(from.at(b, h, first), n * size, ahead);
  for (int64_t i = 0; i < n; ++i) add_lines(from.at(b, h, first + i), size, ahead);
}

// Keys and values are packed once, or where few see them by each that does: a block of keys transposed, a block of values
// in rows padded to 16 columns.
template <typename T, typename G>
class Forward {
  using Acc = accumulate_t<T>;

 public:
  Forward(const AttentionProblem<T>& problem, const AttentionResults<T>& results)
      : in_(problem),
        out_(results),
        shape_(problem.shape),
        depth_(transposed_depth<G>(shape_.size)),
        values_(round_up(shape_.value_size, kRound)),
        blocks_(shape_.k_blocks()),
        together_(std::max<int64_t>(1, kTaskRows / shape_.q_block)),
        shared_(problem.kv.mean() * double(shape_.q_blocks() * shape_.group()) > kFew * double(blocks_)),
        packs_(shared_ ? (blocks_ + kPackBlocks - 1) / kPackBlocks : 0),
        attends_(shape_.group() * ((shape_.q_blocks() + together_ - 1) / together_)),
        folded_(problem.plain() && problem.scale > 0),
        values_as_they_are_(std::is_same_v<T, G> && sizeof(G) != 2 && shape_.value_size == values_ &&
                            problem.value.token == values_) {}

  // A head of keys is packed one head before it is needed, so that it is still in cache then and nobody waits long, into
  // the place of one that is done with.
  void run() {
    const int64_t heads = shape_.batch * shape_.kv_heads;
    reserve(std::min(heads, 3 + 2 * at::get_num_threads() / attends_));
    std::vector<std::atomic<int64_t>> packed(heads), attended(heads);
    const auto wait = [](const std::atomic<int64_t>& done, int64_t count) {
      while (done.load(std::memory_order_acquire) < count) std::this_thread::yield();
    };
    run_tasks<G>(
        heads * (packs_ + attends_), [&] { return Scratch(*this); },
        [&](int64_t number, Scratch& scratch) {
          const Task task = task_of(number);
          if (task.pack) {
            if (task.head >= places_) wait(attended[task.head - places_], attends_);
            const Done done{packed[task.head]};
            return pack(task.head, task.part, scratch);
          }
          wait(packed[task.head], packs_);
          const Done done{attended[task.head]};
          attend(task, number, scratch);
        });
  }

 private:
  // Counts a task when it ends, by an exception too: nobody waits for what does not come.
  struct Done {
    std::atomic<int64_t>& count;
    ~Done() { count.fetch_add(1, std::memory_order_release); }
  };

  // Tasks follow each other as: packs of head 0, and for every head packs of the next one and attends of this one. A task
  // waits for earlier ones alone.
  struct Task {
    bool pack;
    int64_t head, part;
  };
  Task task_of(int64_t number) const {
    if (number < packs_) return {true, 0, number};
    const int64_t head = (number - packs_) / (packs_ + attends_), own = (number - packs_) % (packs_ + attends_);
    const int64_t first = head + 1 < shape_.batch * shape_.kv_heads ? packs_ : 0;
    return own < first ? Task{true, head + 1, own} : Task{false, head, own - first};
  }

  // A thread's own, for one block of queries and a tile of keys.
  struct Scratch {
    Workspace memory;
    G *queries, *weights, *rows, *keys, *values;  // rows: of a block of keys, keys: the same packed
    Acc *logits, *out, *most, *total, *weighted;
    uint8_t *bits, *shifted;
    std::vector<int64_t> listed, next_listed;
    std::vector<Lines> ahead;
    int64_t fetched = -1;  // the task whose first operands are fetched

    explicit Scratch(const Forward& f) {
      const int64_t rows = f.shape_.q_block;
      const auto acc = [&](int64_t n) { return memory.reserve<Acc>(n); };
      const auto operand = [&](int64_t n) { return memory.reserve<G>(n); };
      const int64_t at[] = {operand(rows * f.depth_), operand(rows * kLogitKeys), operand(f.depth_ * f.shape_.k_block),
                            operand(f.depth_ * f.shape_.k_block), operand(kLogitKeys * f.values_),
                            acc(rows * kLogitKeys), acc(rows * f.values_), acc(rows), acc(rows), acc(rows),
                            memory.reserve<uint8_t>(rows * kLogitKeys / 8),
                            memory.reserve<uint8_t>(kLogitKeys / 8 + 2)};
      memory.allocate();
      queries = memory.at_offset<G>(at[0]), weights = memory.at_offset<G>(at[1]), this->rows = memory.at_offset<G>(at[2]);
      keys = memory.at_offset<G>(at[3]), values = memory.at_offset<G>(at[4]), logits = memory.at_offset<Acc>(at[5]);
      out = memory.at_offset<Acc>(at[6]), most = memory.at_offset<Acc>(at[7]), total = memory.at_offset<Acc>(at[8]);
      weighted = memory.at_offset<Acc>(at[9]), bits = memory.at_offset<uint8_t>(at[10]);
      shifted = memory.at_offset<uint8_t>(at[11]);
      if constexpr (std::is_same_v<G, Acc>) weights = logits;
    }
    ~Scratch() { store_fence(); }  // of the thread's streamed results
  };

  // Towards the second-level cache, all at once: lists and rows of a few lines defeat the processor's own guesses.
  template <typename U>
  static void fetch(const U* from, int64_t n) {
    const char* line = reinterpret_cast<const char*>(from);
    for (int64_t i = 0; i < n * int64_t(sizeof(U)); i += 64) __builtin_prefetch(line + i, 0, 2);
  }
  template <typename U>
  static void fetch_rows(const TokenRows<U>& from, int64_t b, int64_t h, int64_t first, int64_t n, int64_t size) {
    for (int64_t i = 0; i < n; ++i) fetch(from.at(b, h, first + i), size);
  }

  int64_t kv_head(int64_t b, int64_t h) const { return b * shape_.kv_heads + h / shape_.group(); }
  int64_t keys_in(int64_t block) const { return std::min(shape_.k_block, shape_.keys - block * shape_.k_block); }
  int64_t place_of(int64_t head, int64_t block) const { return (head % places_ * blocks_ + block) * shape_.k_block; }
  G* keys_of(int64_t head, int64_t block) const { return keys_ + place_of(head, block) * depth_; }
  const G* values_of(int64_t head, int64_t block) const {
    if (!values_as_they_are_) return packed_values_ + place_of(head, block) * values_;
    return reinterpret_cast<const G*>(
        in_.value.at(head / shape_.kv_heads, head % shape_.kv_heads, block * shape_.k_block));
  }

  static at::Tensor operands(int64_t n) {
    at::Tensor memory = at::empty({n * static_cast<int64_t>(sizeof(G))}, at::kByte);
    use_huge_pages(memory);
    return memory;
  }

  void reserve(int64_t places) {
    places_ = places;
    if (!shared_) return;
    key_memory_ = operands(places * blocks_ * shape_.k_block * depth_);
    keys_ = static_cast<G*>(key_memory_.mutable_data_ptr());
    if (values_as_they_are_) return;
    value_memory_ = operands(places * blocks_ * shape_.k_block * values_);
    packed_values_ = static_cast<G*>(value_memory_.mutable_data_ptr());
  }

  void pack(int64_t head, int64_t run, const Scratch& scratch) const {
    const int64_t b = head / shape_.kv_heads, h = head % shape_.kv_heads, first = run * kPackBlocks;
    for (int64_t block = first; block < std::min(first + kPackBlocks, blocks_); ++block) {
      const int64_t k = block * shape_.k_block, n = keys_in(block);
      fetch_rows(in_.key, b, h, k, n, shape_.size);
      if (!values_as_they_are_) fetch_rows(in_.value, b, h, k, n, shape_.value_size);
      pack_keys(head, block, scratch, keys_of(head, block));
      if (!values_as_they_are_) pack_values(head, block, packed_values_ + place_of(head, block) * values_);
    }
  }
  void pack_keys(int64_t head, int64_t block, const Scratch& scratch, G* out) const {
    const T* rows = in_.key.at(head / shape_.kv_heads, head % shape_.kv_heads, block * shape_.k_block);
    pack_transposed<T, G>(rows, in_.key.token, keys_in(block), shape_.size, shape_.k_block, scratch.rows, out);
  }
  void pack_values(int64_t head, int64_t block, G* out) const {
    const T* rows = in_.value.at(head / shape_.kv_heads, head % shape_.kv_heads, block * shape_.k_block);
    pack_rows<T, G>(rows, in_.value.token, keys_in(block), shape_.value_size, values_, out);
  }

  // A copy: rows read one after another come from memory faster than as the GEMM takes them.
  void copy_queries(int64_t b, int64_t h, int64_t q, int64_t rows, const Scratch& scratch) const {
    const auto select = head_kernels<T, G>().select;
    for (int64_t i = 0; i < rows; ++i) {
      G* to = scratch.queries + i * depth_;
      select(in_.query.at(b, h, q + i), nullptr, shape_.size, to);
      std::fill(to + shape_.size, to + depth_, G{});
    }
  }

  // Blocks listed[0 .. count) of a tile, the keys of which follow each other in it: all but the last block are whole.
  struct Tile {
    const int64_t* listed;
    int64_t count, keys;
  };

  // Blocks of queries first .. last of a head.
  struct Queries {
    int64_t b, h, first, last;
  };
  Queries queries_of(const Task& task) const {
    const int64_t runs = attends_ / shape_.group();
    // the last blocks of a head come first: they see most where attention is causal
    const int64_t first = (runs - 1 - task.part % runs) * together_;
    return {task.head / shape_.kv_heads, task.head % shape_.kv_heads * shape_.group() + task.part / runs, first,
            std::min(first + together_, shape_.q_blocks())};
  }

  void attend(const Task& task, int64_t number, Scratch& scratch) const {
    const Queries own = queries_of(task);
    for (int64_t i = own.first; i < own.last; ++i) {
      const bool fetched = i > own.first || scratch.fetched == number;
      attend(task, own, i, number, fetched, scratch);
    }
  }

  void attend(const Task& task, const Queries& own, int64_t block, int64_t number, bool fetched, Scratch& scratch) const {
    const int64_t b = own.b, h = own.h, q = block * shape_.q_block, rows = std::min(shape_.q_block, shape_.queries - q);
    std::vector<int64_t>& listed = scratch.listed;
    const Reach seen = seen_blocks(in_, b, h, block, listed);
    std::fill_n(scratch.most, rows, -std::numeric_limits<Acc>::infinity());
    std::fill_n(scratch.total, rows, Acc(0));
    std::fill_n(scratch.weighted, rows, Acc(0));
    const int64_t together = kLogitKeys / shape_.k_block, blocks = static_cast<int64_t>(listed.size());
    if (!fetched) {
      scratch.ahead.clear();
      add_tile(task.head, listed, 0, scratch.ahead);
      for (const Lines& lines : scratch.ahead) fetch(static_cast<const char*>(lines.first), 64 * lines.count);
    }
    if (blocks > 0) copy_queries(b, h, q, rows, scratch);
    for (int64_t i = 0; i < blocks; i += together) {
      scratch.ahead.clear();
      if (i + together < blocks) add_tile(task.head, listed, i + together, scratch.ahead);
      else if (block + 1 < own.last) add_queries(b, h, block + 1, scratch);
      else scratch.fetched = add_task(number + at::get_num_threads(), scratch);
      const int64_t count = std::min(together, blocks - i);
      const Tile tile{listed.data() + i, count, (count - 1) * shape_.k_block + keys_in(listed[i + count - 1])};
      step(b, h, q, rows, tile, seen, i == 0, scratch);
    }
    finish(b, h, q, rows, blocks == 0, scratch);
  }

  // Keys and values of a tile, but for blocks that follow another: those are found by the processor.
  void add_tile(int64_t head, const std::vector<int64_t>& listed, int64_t first, std::vector<Lines>& ahead) const {
    const int64_t last = std::min<int64_t>(first + kLogitKeys / shape_.k_block, listed.size());
    for (int64_t i = first; i < last; ++i) {
      if (i > 0 && listed[i] == listed[i - 1] + 1) continue;
      const int64_t b = head / shape_.kv_heads, h = head % shape_.kv_heads, k = listed[i] * shape_.k_block;
      const int64_t keys = keys_in(listed[i]);
      if (shared_) add_lines(keys_of(head, listed[i]), shape_.k_block * depth_, ahead);
      else add_rows(in_.key, b, h, k, keys, shape_.size, ahead);
      if (shared_ && !values_as_they_are_) add_lines(values_of(head, listed[i]), keys * values_, ahead);
      else add_rows(in_.value, b, h, k, keys, shape_.value_size, ahead);
    }
  }

  // What a block of queries begins with.
  void add_queries(int64_t b, int64_t h, int64_t block, Scratch& scratch) const {
    const int64_t q = block * shape_.q_block;
    add_rows(in_.query, b, h, q, std::min(shape_.q_block, shape_.queries - q), shape_.size, scratch.ahead);
    seen_blocks(in_, b, h, block, scratch.next_listed);
    add_tile(kv_head(b, h), scratch.next_listed, 0, scratch.ahead);
  }

  // What a task begins with, which a thread takes next if the others are as fast as it.
  int64_t add_task(int64_t number, Scratch& scratch) const {
    if (number >= shape_.batch * shape_.kv_heads * (packs_ + attends_)) return -1;
    const Task task = task_of(number);
    if (task.pack) return -1;
    const Queries own = queries_of(task);
    add_queries(own.b, own.h, own.first, scratch);
    return number;
  }

  void step(int64_t b, int64_t h, int64_t q, int64_t rows, const Tile& tile, const Reach& seen, bool first,
            const Scratch& scratch) const {
    const int64_t head = kv_head(b, h);
    for (int64_t i = 0; i < tile.count; ++i) {
      G* const keys = shared_ ? keys_of(head, tile.listed[i]) : scratch.keys;
      if (!shared_) pack_keys(head, tile.listed[i], scratch, keys);
      multiply(rows, shape_.k_block, depth_, scratch.queries, depth_, keys, shape_.k_block,
               scratch.logits + i * shape_.k_block, kLogitKeys, false);
    }
    for (int64_t i = 0; i < tile.count; ++i) logits(b, h, q, rows, tile.listed[i], i * shape_.k_block, seen, scratch);
    if (in_.threshold > 0)
      for (int64_t i = 0; i < tile.count; ++i) drop(b, h, q, rows, tile.listed[i], i * shape_.k_block, scratch);
    softmax_kernels<G>().step({
        .rows = rows,
        .keys = tile.keys,
        .logits = scratch.logits,
        .stride = kLogitKeys,
        .factor = static_cast<Acc>(std::numbers::log2e * (folded_ ? static_cast<double>(in_.scale) : 1.0)),
        .most = scratch.most,
        .total = scratch.total,
        .weighted = out_.entropy ? scratch.weighted : nullptr,
        .out = first ? nullptr : scratch.out,
        .size = values_,
        .out_stride = values_,
        .bits = in_.threshold > 0 ? scratch.bits : nullptr,
        .bits_stride = kLogitKeys / 8,
        .weights = scratch.weights,
        .weights_stride = kLogitKeys,
        .ahead = scratch.ahead.data(),
        .aheads = static_cast<int64_t>(scratch.ahead.size()),
    });
    const auto weigh = [&](int64_t column, int64_t keys, const G* values) {
      multiply(rows, values_, round_up(keys, pairing<G>), scratch.weights + column, kLogitKeys, values, values_,
               scratch.out, values_, !first || column > 0);
    };
    const bool packed = shared_ || values_as_they_are_;
    if (packed && tile.listed[tile.count - 1] - tile.listed[0] == tile.count - 1) {  // values that follow each other
      weigh(0, tile.keys, values_of(head, tile.listed[0]));
    } else if (packed && shape_.k_block >= kApart) {
      for (int64_t i = 0; i < tile.count; ++i)
        weigh(i * shape_.k_block, keys_in(tile.listed[i]), values_of(head, tile.listed[i]));
    } else {
      for (int64_t i = 0; i < tile.count; ++i) {
        G* const to = scratch.values + i * shape_.k_block * values_;
        if (!packed) pack_values(head, tile.listed[i], to);
        else
          std::memcpy(to, values_of(head, tile.listed[i]),
                      round_up(keys_in(tile.listed[i]), pairing<G>) * values_ * sizeof(G));
      }
      weigh(0, tile.keys, scratch.values);
    }
  }

  // Products of a block at `column` of the tile to its logits, but for a scale that the softmax takes with it.
  void logits(int64_t b, int64_t h, int64_t q, int64_t rows, int64_t block, int64_t column, const Reach& seen,
              const Scratch& scratch) const {
    const int64_t k = block * shape_.k_block, keys = keys_in(block);
    const LogitTile<T> tile = in_.tile(b, h, q, k, rows, keys, scratch.logits + column, kLogitKeys);
    if (!folded_) logit_kernels<T>().scale(tile);
    const bool masked = tile.key_mask && std::memchr(tile.key_mask, 0, keys) != nullptr;
    if (tile.bias.row || masked || seen.hides(k, keys)) logit_kernels<T>().hide(tile);
  }

  void drop(int64_t b, int64_t h, int64_t q, int64_t rows, int64_t block, int64_t column, const Scratch& scratch) const {
    const SampleMask mask = sample_mask(0, in_.threshold, false);
    const int64_t k = block * shape_.k_block, keys = keys_in(block);
    tile_bits(in_.seed, mask, shape_.index(b, h, q, k), shape_.keys, rows, keys, scratch.shifted,
              scratch.bits + column / 8, kLogitKeys / 8);
  }

  void finish(int64_t b, int64_t h, int64_t q, int64_t rows, bool empty, const Scratch& scratch) const {
    if (empty) std::fill_n(scratch.out, rows * values_, Acc(0));
    out_.finish(shape_, b, h, q, rows, scratch.out, values_, scratch.most, scratch.total, scratch.weighted,
                in_.threshold > 0 ? keep_scale<Acc>(in_.threshold) : Acc(1));
  }

  const AttentionProblem<T>& in_;
  const AttentionResults<T>& out_;
  const AttentionShape shape_;
  const int64_t depth_, values_;   // of a head of keys and of values, padded
  const int64_t blocks_;           // of keys
  const int64_t together_;         // blocks of queries of a task
  const bool shared_;              // keys and values are packed once
  const int64_t packs_, attends_;  // tasks of a head of keys
  const bool folded_;              // logits are products times a scale that goes into the softmax's base
  const bool values_as_they_are_;
  int64_t places_ = 0;  // heads whose packed operands are kept
  at::Tensor key_memory_, value_memory_;
  G *keys_ = nullptr, *packed_values_ = nullptr;
};

}  // namespace pyrx::cpu
