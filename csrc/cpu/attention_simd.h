// Row kernels of attention over tiles of logits, compiled apart from simd.h's and picked at run time. No torch headers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"
#include "kernels/block_mass.h"
#include "kernels/block_sparse_attention.h"

namespace pyrx::cpu {

constexpr int64_t kLogitKeys = 128;  // most keys of a LogitTile

// A tile of products (rows, keys) of queries q .. and keys k .. of head (b, h), and what its logits are made of.
template <typename T>
struct LogitTile {
  using Acc = accumulate_t<T>;
  int64_t b, h, q, k;        // of its first row and column
  int64_t rows, keys;        // keys at most kLogitKeys
  Acc* logits;               // (rows, keys) in rows of `stride`
  int64_t stride;
  Acc scale, softcap;        // softcap 0: none
  const Acc* query_scale;    // of row q, (rows,), or null
  KeyBias<T> bias;           // of the whole problem
  KeyRules rules;
  const uint8_t* key_mask;   // of key k, (keys,) bytes of 0 or 1, or null
};

template <typename T>
struct LogitKernels {
  // products to logits before bias: softcap * tanh(scale * query_scale * product / softcap), or without the cap
  void (*scale)(const LogitTile<T>& tile);
  // logits += bias; minus infinity where a key is hidden from a query
  void (*hide)(const LogitTile<T>& tile);
};

// How far an exponent may go above the `most` of its row before sums follow it: they are floating point numbers, and a
// weight of 2^8 is a number of every operand's type. So rows are seldom scaled anew.
constexpr int kExponentSlack = 8;

// Whole cache lines.
struct Lines {
  const void* first;
  int64_t count;
};

// Cache lines on their way to the second-level cache, a few at a time between arithmetic: all at once they would wait for
// each other.
class Ahead {
 public:
  Ahead(const Lines* ranges, int64_t count) : range_(ranges), end_(ranges + count) { open(); }
  void fetch(int64_t n) {
    while (n > 0 && at_ != last_) {
      const int64_t run = std::min<int64_t>(n, (last_ - at_) / 64);
      const char* const end = at_ + 64 * run;
      for (const char* line = at_; line != end; line += 64) __builtin_prefetch(line, 0, 2);
      n -= run, at_ = end;
      if (at_ == last_) open();
    }
  }

 private:
  void open() {
    at_ = last_ = nullptr;
    while (range_ != end_ && at_ == last_) {
      at_ = static_cast<const char*>(range_->first), last_ = at_ + 64 * range_->count;
      ++range_;
    }
  }
  const Lines *range_, *end_;
  const char *at_ = nullptr, *last_ = nullptr;
};

// One step of an online softmax: a tile of logits (rows, keys), and what its rows have summed up before it.
template <typename G>
struct SoftmaxTile {
  using Acc = accumulate_t<G>;
  int64_t rows, keys;
  Acc* logits;      // (rows, keys) in rows of `stride`, a multiple of 16; columns up to the next multiple are overwritten
  int64_t stride;
  Acc factor;       // above 0; weights are 2^(factor * logit - most)
  Acc* most;        // (rows,): the greatest factor * logit so far, but for the slack; minus infinity before the first
  Acc* total;       // (rows,): sum of the weights
  Acc* weighted;    // (rows,): sum of the weights times their exponents, or null
  Acc* out;         // (rows, size) in rows of out_stride: sums that follow `most`; null: none yet
  int64_t size, out_stride;
  const uint8_t* bits;  // of the kept weights, rows bits_stride bytes apart, or null: all
  int64_t bits_stride;
  G* weights;           // (rows, keys rounded up to 16) in rows of weights_stride, 0 where dropped; may be the logits
  int64_t weights_stride;
  const Lines* ahead = nullptr;  // (aheads,): what is wanted in the second-level cache soon
  int64_t aheads = 0;
};

template <typename G>
struct SoftmaxKernels {
  // logits to weights, and the sums of the rows brought up to them
  void (*step)(const SoftmaxTile<G>& tile);
};

constexpr int64_t kFusedQueries = 32, kFusedTileKeys = 256;  // most of a FusedTile
constexpr int64_t kFusedRows = 8;                             // keys, and values of one, that are multiplied at once

// Keys that follow each other in memory, rows contiguous; there are finite values for every row.
template <typename G>
struct FusedKeys {
  int64_t count;            // a multiple of eight
  const G* key;             // (count, size)
  const G* value;           // (count, value_size), in pairs of keys for 16-bit G
  int64_t first;            // the first one's position
  bool hides;               // some of them, from some queries: by the tile's low and high, and `key_mask`
  const uint8_t* key_mask;  // (count,), read where low and high show a key, or null
};

// One step of attention: a tile (keys, queries) from products to weights to the sums of values.
template <typename G>
struct FusedTile {
  int64_t width;              // 16 or 32 queries
  int64_t size, value_size;   // of a row of keys, even for 16-bit G, and of values, a multiple of eight
  const G* queries;           // (size, width), in pairs of the size for 16-bit G, else times `factor`
  const FusedKeys<G>* parts;  // (count,): the tile's keys
  int64_t count;
  const float* factor;        // (width,): exponents of 2 are factor * product; read for 16-bit G
  float *most, *total;        // (width,): SoftmaxTile; at first the lowest number, and 0
  float* out;                 // (value_size, width): sums of the values that follow `most`
  G* weights;                 // (keys, width) of scratch
  const int32_t *low, *high;  // (width,): keys at low <= position < high are seen; null where no part hides any
  const uint8_t* bits;        // of kept weights, of the keys in turn: GradientTile, or null: all
  int64_t bits_stride;
  Ahead* ahead;  // `lines` are fetched with every eight keys
  int64_t lines;
};

template <typename G>
struct FusedKernels {
  void (*step)(const FusedTile<G>& tile) = nullptr;  // null: the instruction set has none
  // out (value_size, width) *= scale / total (width,), or 0 where there is no total
  void (*normalize)(float* out, const float* total, int64_t value_size, int64_t width, float scale) = nullptr;
};

template <typename T>
const LogitKernels<T>& logit_kernels();
template <typename G>
const SoftmaxKernels<G>& softmax_kernels();
template <typename G>
const FusedKernels<G>& fused_kernels();

// A tile of the backward, keys by queries: row k is a key, column c a query; operands of the products are G. Arrays of columns
// and the tile's rows are contiguous, the width is a multiple of sixteen.
template <typename G>
struct GradientTile {
  using Acc = accumulate_t<G>;
  int64_t keys, width;
  const Acc* logits;    // (keys, width) products, or capped logits
  const Acc* upstream;  // (keys, width) products of value and grad; null: the weights alone are made
  const Acc* bias;      // (keys, width) or null
  // per column: logit = factor * logits + bias; log-sum-exp, +inf where nothing is seen; see block_sparse_attention_backward
  const Acc *factor, *lse, *delta, *entropy;  // entropy: the gradient of it, or null
  const Acc *low, *high;                      // keys low <= k < high are seen; null: all
  const uint8_t* key_mask;                    // (keys,) bytes of 0 or 1, or null
  const uint8_t* bits;  // kept weights: bit j of bits[i * bits_stride + k] is of column 8 i + j; null: all
  int64_t bits_stride;
  Acc keep_scale, softcap;  // softcap: of the logits whose gradient is wanted, 0: none
  G* weights;    // (keys, width) out, kept ones not scaled; or null; may be the logits
  G* gradients;  // (keys, width) out, of the logits; or null; may be the upstream
  G* pairs;      // the same as (keys / 2, width, 2), of 16-bit G; or null
};

template <typename G>
struct GradientKernels {
  using Acc = accumulate_t<G>;
  void (*gradients)(const GradientTile<G>& tile);
  // sum of x[i] * y[i]
  Acc (*dot)(const G* x, const Acc* y, int64_t n);
};

template <typename G>
const GradientKernels<G>& gradient_kernels();

// What of every row's exponentials was summed, in base 2, sixteen lanes a row: (rows, 16) each.
template <typename Acc>
struct ShareRows {
  Acc *most, *total, *kept;  // most: the lane's largest x so far, at first the lowest number
  int64_t q_block;
};

template <typename Acc>
struct MassKernels {
  // mass[i][j], in rows of `stride`: the sum of 2^x over block (i, j) of the tile, whose rows have these offsets
  void (*mass)(const ExponentTile<Acc>& tile, const Acc* offset, int64_t q_block, int64_t k_block, Acc* mass,
               int64_t stride);
  // Adds 2^x to the totals; to what is kept where bit v of kept[row / q_block] is set, v = key / 16.
  void (*add)(const ExponentTile<Acc>& tile, const uint8_t* kept, const ShareRows<Acc>& sums);
  void (*finish)(const ShareRows<Acc>& sums, int64_t rows, Acc* recall);
};

template <typename Acc>
const MassKernels<Acc>& mass_kernels();

}  // namespace pyrx::cpu
