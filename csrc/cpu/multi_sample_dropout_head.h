// The multi-sample dropout head on the CPU: masked features packed for GEMM tiles, cross-entropy and its gradient while a
// tile's logits are in cache, and the gradients' GEMMs behind it.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/elements.h"
#include "cpu/gemm.h"
#include "cpu/multi_sample_dropout_call.h"
#include "cpu/multi_sample_dropout_pairs.h"
#include "cpu/multi_sample_dropout_subsets.h"
#include "cpu/pages.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"

namespace pyrx::cpu {

constexpr int64_t kTileRows = 128;        // GEMM rows whose logits one thread holds
constexpr int64_t kRowRound = 8;          // GEMM rows are padded to this: few sizes of kernels
constexpr int64_t kChunkRows = 1024;      // most GEMM rows between two updates of the weight gradient
constexpr int64_t kSumRows = 512;         // likewise where partial sums keep the rows in accumulators: tiles of four threads
constexpr int64_t kFoldPanels = 8;        // feature panels of the input gradient between two folds
constexpr int64_t kWeightPanels = 4;      // feature panels of the weight gradient a task packs at a time
constexpr int64_t kWeightRows = 64;       // classes of one multiplication into the weight gradient
constexpr int64_t kSkew = 16;             // elements beyond a power of two, so that rows differ in cache set
constexpr int64_t kSubsetLeast = 3;       // GEMM rows from which partial sums beat the gradients' GEMMs

template <typename T, typename G, typename O>
class Head {
  using Acc = accumulate_t<T>;
  static constexpr bool kSums = !std::is_same_v<G, float16>;  // whether there are partial sums beside a weight of G
  static constexpr bool kPairs = std::is_same_v<G, bfloat16>;

 public:
  Head(const HeadArguments<T>& arguments, const HeadResults<T, O>& results)
      : in_(arguments),
        out_(results),
        // float16 operands keep gradients near one and take the factor at the end
        operand_factor_(std::is_same_v<G, float16> ? Acc(1) : results.factor),
        result_factor_(std::is_same_v<G, float16> ? results.factor : Acc(1)),
        threads_(std::max(1, at::get_num_threads())),
        gemm_rows_(in_.plan.gemm_rows),
        tile_rows_(even_share(in_.rows, std::max<int64_t>(1, kTileRows / gemm_rows_))),
        chunk_rows_(std::min(tile_rows_ * std::max<int64_t>(1, most_gemm_rows() / (tile_rows_ * gemm_rows_)),
                             round_up(std::max<int64_t>(in_.rows, 1), tile_rows_))),
        bias_sums_(std::min(std::max<int64_t>(1, kChunkRows / (tile_rows_ * gemm_rows_)),
                            (std::max<int64_t>(in_.rows, 1) + tile_rows_ - 1) / tile_rows_)),
        padded_tile_(round_up(tile_rows_ * gemm_rows_, kRowRound)),
        logits_stride_(((in_.classes / kRound + 1) | 1) * kRound),
        bits_stride_(round_up(in_.features, 64) / 8),
        gradient_stride_(round_up(chunk_rows_ * gemm_rows_, kRound) + kSkew),
        padded_features_(round_up(in_.features, kRound)),
        masks_(in_.plan.paired ? gemm_rows_ - 1 : gemm_rows_),
        // partial sums on the vector units; GEMMs on matrix units
        subset_(kSums && !(sizeof(G) == 2 && native_half(at::kBFloat16)) && !in_.plan.averaged && gemm_rows_ >= kSubsetLeast &&
                (out_.grad_input || out_.grad_weight) && (!out_.grad_input || weights_are_finite())),
        lookup_(subset_ && accumulator_.lookup_gradients && in_.classes <= kLookupClasses && masks_ <= 2 * kSubset),
        pairs_(kPairs && subset_ && !lookup_),
        direct_(std::is_same_v<O, Acc> && in_.features % kRound == 0) {}

  void run() {
    reserve();
    pack_weights();
    bool first = true;
    for (int64_t row = 0; row < in_.rows; row += chunk_rows_) {
      const int64_t end = std::min(row + chunk_rows_, in_.rows);
      rows_chunk(row, end);
      if (pairs_) pair_gradients(row, end, !first);
      else if (subset_) subset_gradients(row, end, !first);
      if (out_.grad_weight && !subset_) weight_gradient(row, end, !first);
      first = false;
    }
    finish(first);
  }

 private:
  // Of a chunk: many samples are to ask for no more memory than one.
  int64_t most_gemm_rows() const {
    const bool sums = std::is_same_v<G, Acc> && gemm_rows_ >= kSubsetLeast;
    return sums ? std::clamp(threads_ * kTileRows, kSumRows, kChunkRows) : kChunkRows;
  }
  // By partial sums an infinite weight is multiplied by the 0 of features that samples drop, which is NaN.
  bool weights_are_finite() const {
    using Bits = std::conditional_t<sizeof(T) == 2, int16_t, std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
    constexpr Bits kExponent = static_cast<Bits>(sizeof(T) == 8                  ? 0x7FF0000000000000
                                                 : sizeof(T) == 4                ? 0x7F800000
                                                 : std::is_same_v<T, float16> ? 0x7C00
                                                                                 : 0x7F80);
    std::atomic<bool> finite{true};
    at::parallel_for(0, in_.classes, 16, [&](int64_t begin, int64_t end) {
      bool found = false;
      for (int64_t c = begin; c < end; ++c) {
        const T* row = in_.linear_weight + c * in_.weight_stride;
        Bits some = 0;
        for (int64_t d = 0; d < in_.features; ++d) {
          Bits bits;
          std::memcpy(&bits, row + d, sizeof(bits));
          some |= (bits & kExponent) == kExponent;
        }
        found |= some != 0;
      }
      if (found) finite = false;
    });
    return finite;
  }
  bool wants_gradient() const { return out_.grad_input || out_.grad_weight || out_.grad_bias; }
  int64_t packed_depth() const { return kDepth + kSkew; }

  struct Scratch {
    G* features;    // (padded_tile, packed_depth): masked features of one depth block
    Acc* logits;    // (padded_tile, logits_stride), then their gradients
    G* gradients;   // the same as GEMM operands
    Acc* folded;    // (padded_tile, kFoldPanels * kPanel): input gradients before the fold
    Acc* odd;       // (2, logits_stride): an odd sample's gradient, and their sum
    uint8_t* bits;  // (2, bits_stride + 2)
    G* panels;      // (kDepth, kWeightPanels * kPanel): masked features of a weight gradient block
    G* pair;        // (2, kPanel)
    typename SubsetGradients<Acc>::Scratch subset_sums;
    PairGradients::Scratch pair_sums;
  };

  void reserve() {
    const int64_t classes = in_.classes, features = in_.features;
    const bool averaged = in_.plan.averaged;
    const int64_t weight_offset = memory_.reserve<G>(Panels<G>::elements(features, classes));
    const bool transposed = out_.grad_input && (!subset_ || pairs_);
    const int64_t transposed_offset =
        memory_.reserve<G>(transposed ? Panels<G>::elements(classes, features) + 2 * kPanel : 0);
    const int64_t bits_offset = memory_.reserve<uint8_t>(averaged ? 0 : chunk_rows_ * gemm_rows_ * bits_stride_ + 8);
    const int64_t levels_offset = memory_.reserve<Acc>(averaged ? chunk_rows_ * padded_features_ : 0);
    const int64_t gradients_offset = memory_.reserve<G>(out_.grad_weight && !subset_ ? classes * gradient_stride_ : 0);
    const int64_t rows_offset = memory_.reserve<Acc>(subset_ ? chunk_rows_ * gemm_rows_ * logits_stride_ : 0);
    const int64_t codes_offset = memory_.reserve<uint8_t>(subset_ ? chunk_rows_ * code_rows() * padded_features_ : 0);
    const bool panels = sums_by_panels();  // the weight gradient comes from panel_sum_
    const int64_t panel_sum_offset =
        memory_.reserve<Acc>(panels && out_.grad_weight ? Panels<Acc>::elements(features, classes) : 0);
    const bool at_once = pairs_ && chunk_rows_ >= in_.rows;  // one chunk writes the weight gradient itself
    const bool sums = out_.grad_weight && !direct_ && !panels && !at_once;
    const int64_t sum_offset = memory_.reserve<Acc>(sums ? classes * padded_features_ : 0);
    const int64_t bias_offset = memory_.reserve<Acc>(out_.grad_bias ? (bias_sums_ + 1) * logits_stride_ : 0);
    int64_t pair_offsets[2] = {};
    if (pairs_) pair_sums(chunk_rows_).reserve(memory_, pair_offsets);
    const bool convert = !std::is_same_v<G, Acc>;
    int64_t offsets[15] = {};
    const auto cut = [&](Workspace& part) {
      offsets[0] = part.template reserve<G>(std::max(padded_tile_, kPanel) * packed_depth());
      offsets[1] = part.template reserve<Acc>(padded_tile_ * logits_stride_);
      offsets[2] = part.template reserve<G>(convert && out_.grad_input && !subset_ ? padded_tile_ * logits_stride_ : 0);
      offsets[3] = part.template reserve<Acc>(out_.grad_input && !subset_ ? padded_tile_ * kFoldPanels * kPanel : 0);
      offsets[4] = part.template reserve<Acc>(2 * logits_stride_);
      offsets[5] = part.template reserve<uint8_t>(2 * (bits_stride_ + 10));
      offsets[6] = part.template reserve<G>(out_.grad_weight && !subset_ ? kDepth * kWeightPanels * kPanel : 0);
      offsets[7] = part.template reserve<G>(2 * kPanel);
      if (subset_ && !pairs_) subset_sums(chunk_rows_).reserve_scratch(part, lookup_, offsets + 8);
      if constexpr (kPairs)
        if (pairs_) pair_sums(chunk_rows_).reserve_scratch(part, offsets + 12);
    };
    std::vector<Scratch> scratch(threads_);
    std::vector<std::array<int64_t, 15>> cuts(threads_);
    for (auto& each : cuts) {
      cut(memory_);
      std::copy(offsets, offsets + 15, each.begin());
    }
    memory_.allocate();
    use_huge_pages(memory_.memory());
    for (int64_t t = 0; t < threads_; ++t) {
      const auto& o = cuts[t];
      scratch[t] = {memory_.at_offset<G>(o[0]),   memory_.at_offset<Acc>(o[1]),     memory_.at_offset<G>(o[2]),
                    memory_.at_offset<Acc>(o[3]), memory_.at_offset<Acc>(o[4]),     memory_.at_offset<uint8_t>(o[5]),
                    memory_.at_offset<G>(o[6]),   memory_.at_offset<G>(o[7]),
                    SubsetGradients<Acc>::cut(memory_, o.data() + 8), PairGradients::cut(memory_, o.data() + 12)};
    }
    scratch_ = std::move(scratch);
    weight_ = memory_.at_offset<G>(weight_offset);
    transposed_ = memory_.at_offset<G>(transposed_offset);
    bits_ = memory_.at_offset<uint8_t>(bits_offset);
    levels_ = memory_.at_offset<Acc>(levels_offset);
    gradients_ = memory_.at_offset<G>(gradients_offset);
    rows_ = memory_.at_offset<Acc>(rows_offset);
    codes_ = memory_.at_offset<uint8_t>(codes_offset);
    panel_sum_ = memory_.at_offset<Acc>(panel_sum_offset);
    pair_index_ = memory_.at_offset<uint32_t>(pair_offsets[0]);
    pair_x_ = memory_.at_offset<uint32_t>(pair_offsets[1]);
    if (subset_)  // padding classes have no gradient
      for (int64_t r = 0; r < chunk_rows_ * gemm_rows_; ++r)
        std::fill(rows_ + r * logits_stride_ + classes, rows_ + (r + 1) * logits_stride_, Acc(0));
    sum_ = direct_ ? reinterpret_cast<Acc*>(out_.grad_weight) : memory_.at_offset<Acc>(sum_offset);
    bias_ = memory_.at_offset<Acc>(bias_offset);
    if (out_.grad_bias) std::fill_n(bias_, (bias_sums_ + 1) * logits_stride_, Acc(0));
  }

  // f(index, scratch) for index < count on all threads, each with a scratch of its own; who is free takes the next.
  template <typename F>
  void parallel(int64_t count, F f) {
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min(threads_, count), 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread)
        for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) f(i, scratch_[thread]);
      if constexpr (sizeof(G) == 2) at::native::cpublas::brgemm_release();
    });
  }

  Panels<G> weight_panels() const { return {weight_, in_.features, in_.classes}; }
  Panels<G> transposed_panels() const { return {transposed_, in_.classes, in_.features}; }

  void pack_weights() {
    const Panels<G> weight = weight_panels();
    const int64_t depth_blocks = (in_.features + kDepth - 1) / kDepth;
    parallel(weight.count() * depth_blocks, [&](int64_t task, const Scratch& scratch) {
      const int64_t panel = task / depth_blocks, from = task % depth_blocks * kDepth;
      const int64_t depth = std::min(kDepth, in_.features - from), padded = round_up(depth, pairing<G>);
      const int64_t width = weight.width(panel), first = panel * kPanel;
      for (int64_t c = 0; c < width; ++c) {
        G* row = scratch.features + c * packed_depth();
        const bool real = first + c < in_.classes;
        if (real) head_.select(in_.linear_weight + (first + c) * in_.weight_stride + from, nullptr, depth, row);
        std::fill(row + (real ? depth : 0), row + padded, G{});
      }
      G* out = weight.panel(panel) + from * width;
      if constexpr (sizeof(G) == 8)
        head_.transpose(scratch.features, packed_depth(), width, depth, out, width);
      else  // pairs of 16-bit elements are one 32-bit element
        mask_kernels().transpose32(reinterpret_cast<const uint32_t*>(scratch.features), packed_depth() / pairing<G>,
                                   width, padded / pairing<G>, reinterpret_cast<uint32_t*>(out), width);
    });
    if (!out_.grad_input || (subset_ && !pairs_)) return;
    const Panels<G> transposed = transposed_panels();
    const int64_t class_blocks = (in_.classes + kDepth - 1) / kDepth;
    parallel(transposed.count() * class_blocks, [&](int64_t task, const Scratch&) {
      const int64_t panel = task / class_blocks, from = task % class_blocks * kDepth;
      pack_rows(transposed, panel, from, std::min(kDepth, in_.classes - from), panel * kPanel, [&](int64_t c) {
        return Row{in_.linear_weight + c * in_.weight_stride, nullptr, nullptr};
      }, nullptr, from);
    });
  }

  // A GEMM row's features, with the mask's bits or, for the mean of the masks, its levels.
  struct Row {
    const T* x;
    const uint8_t* bits;
    const Acc* level;
  };

  Row gemm_row(int64_t row, int64_t chunk_begin) const {  // row counts from the chunk's first
    const T* x = in_.input + (chunk_begin + row / gemm_rows_) * in_.input_stride;
    if (in_.plan.averaged) return {x, nullptr, levels_ + row * padded_features_};
    return {x, bits_ + row * bits_stride_, nullptr};
  }

  void masked(const Row& row, int64_t from, int64_t n, G* out) const {
    if (row.level) head_.multiply(row.x + from, row.level + from, n, out);
    else head_.select(row.x + from, row.bits ? row.bits + from / 8 : nullptr, n, out);
  }

  // Rows begin .. begin + n of a (depth, features) operand into depth 0 .. n of `panel`, features from `column` on.
  template <typename F>
  void pack_rows(const Panels<G>& panels, int64_t panel, int64_t begin, int64_t n, int64_t column, F row_of, G* pair,
                 int64_t offset) const {
    const int64_t width = panels.width(panel), real = std::min(width, in_.features - column);
    G* out = panels.panel(panel) + offset * width;
    if constexpr (sizeof(G) == 2) {
      for (int64_t r = 0; r < n; r += 2, out += 2 * width) {
        const Row first = row_of(begin + r), second = r + 1 < n ? row_of(begin + r + 1) : Row{nullptr, nullptr, nullptr};
        if (first.level) {
          masked(first, column, real, pair);
          if (second.x) masked(second, column, real, pair + kPanel);
          interleave(pair, second.x ? pair + kPanel : nullptr, real, out);
        } else {
          const auto bits = [&](const Row& row) { return row.bits ? row.bits + column / 8 : nullptr; };
          head_.select_pair(first.x + column, bits(first), second.x ? second.x + column : nullptr, bits(second), real, out);
        }
        std::fill(out + 2 * real, out + 2 * width, G{});
      }
    } else {
      for (int64_t r = 0; r < n; ++r, out += width) {
        masked(row_of(begin + r), column, real, out);
        std::fill(out + real, out + width, G{});
      }
    }
  }

  void interleave(const G* a, const G* b, int64_t n, G* out) const {
    for (int64_t i = 0; i < n; ++i) {
      out[2 * i] = a[i];
      out[2 * i + 1] = b ? b[i] : G{};
    }
  }

  void rows_chunk(int64_t begin, int64_t end) {
    parallel((end - begin + tile_rows_ - 1) / tile_rows_, [&](int64_t tile, const Scratch& scratch) {
      const int64_t first = tile * tile_rows_, count = std::min(tile_rows_, end - begin - first);
      const int64_t rows = count * gemm_rows_, padded = round_up(rows, kRowRound);
      draw_masks(begin, first, count, scratch);
      logits(begin, first * gemm_rows_, rows, padded, scratch);
      Acc* bias = out_.grad_bias ? bias_ + (begin / tile_rows_ + tile) % bias_sums_ * logits_stride_ : nullptr;
      for (int64_t i = 0; i < count; ++i) {
        Acc* logits = scratch.logits + i * gemm_rows_ * logits_stride_;
        Acc* gradients = subset_ ? rows_ + (first + i) * gemm_rows_ * logits_stride_ : logits;
        out_.row_loss[begin + first + i] = row_loss(begin + first + i, logits, gradients, scratch.odd, bias);
      }
      if (subset_) return;
      if (out_.grad_weight)
        head_.transpose(scratch.logits, logits_stride_, rows, in_.classes, gradients_ + first * gemm_rows_,
                        gradient_stride_);
      if (out_.grad_input) input_gradient(begin, first, count, padded, scratch);
    });
  }

  void draw_masks(int64_t begin, int64_t first, int64_t count, const Scratch& scratch) {
    const int64_t features = in_.features;
    for (int64_t i = first; i < first + count; ++i) {
      const uint64_t element = static_cast<uint64_t>((begin + i) * features);
      if (in_.plan.averaged) {
        Acc* level = levels_ + i * padded_features_;
        std::fill_n(level, features, Acc(0));
        for (int64_t m = 0; m < in_.plan.samples; ++m) {
          row_bits(in_.seed, in_.mask(m), element, features, scratch.bits + bits_stride_ + 2, scratch.bits);
          accumulator_.add_level(scratch.bits, features,
                                 keep_scale<Acc>(in_.thresholds[m]) / static_cast<Acc>(in_.plan.samples), level);
        }
        continue;
      }
      for (int64_t k = 0; k < gemm_rows_; ++k) {
        uint8_t* bits = bits_ + (i * gemm_rows_ + k) * bits_stride_;
        const int64_t sample = in_.plan.mask_of(k);
        if (sample < 0) std::fill_n(bits, bits_stride_, uint8_t(0xFF));
        else row_bits(in_.seed, in_.mask(sample), element, features, scratch.bits, bits);
      }
      if (subset_)
        for (int64_t q = 0; q < code_rows(); ++q)
          subset_codes(bits_ + (i * gemm_rows_ + 8 * q) * bits_stride_, bits_stride_, std::min<int64_t>(8, masks_ - 8 * q),
                       features, codes_ + i * code_rows() * padded_features_ + q * (pairs_ ? padded_features_ : 1),
                       pairs_ ? 1 : code_rows());
    }
  }

  // scratch.logits (rows, C) = masked features times the weight's transpose
  void logits(int64_t begin, int64_t first, int64_t rows, int64_t padded, const Scratch& scratch) {
    const Panels<G> weight = weight_panels();
    if (in_.features == 0) std::fill_n(scratch.logits, rows * logits_stride_, Acc(0));
    for (int64_t from = 0; from < in_.features; from += kDepth) {
      const int64_t depth = std::min(kDepth, in_.features - from), even = round_up(depth, pairing<G>);
      for (int64_t r = 0; r < rows; ++r) {
        G* out = scratch.features + r * packed_depth();
        masked(gemm_row(first + r, begin), from, depth, out);
        std::fill(out + depth, out + even, G{});
      }
      multiply_panels(padded, scratch.features, packed_depth(), weight, 0, weight.count(), from, even, scratch.logits,
                      logits_stride_, from > 0);
    }
  }

  // The mean over the samples of row's loss from its logits (gemm_rows, C), and the GEMM rows' gradients, which may
  // take the logits' place.
  Acc row_loss(int64_t row, const Acc* logits, Acc* gradients, Acc* odd, Acc* bias) const {
    const int64_t classes = in_.classes, samples = in_.plan.averaged ? 1 : in_.plan.samples;
    const bool gradient = wants_gradient();
    CrossEntropyRow<Acc> entry{};
    entry.bias = in_.bias;
    entry.class_weight = in_.class_weight;
    entry.label_smoothing = in_.label_smoothing;
    entry.classes = classes;
    if (in_.probabilities) entry.probabilities = in_.probabilities + row * classes;
    else entry.target = in_.target(row);
    const Acc factor = operand_factor_ * (in_.grad_loss ? in_.grad_loss[row] : Acc(1));
    const auto sample_loss = [&](int64_t m, const Acc* raw, const Acc* base, Acc* out) {
      entry.raw = raw;
      entry.base = base;
      entry.gradient = out;
      entry.scale = in_.plan.averaged ? Acc(1) : keep_scale<Acc>(in_.thresholds[m]);
      entry.gradient_factor = factor * entry.scale;
      const Acc loss = accumulator_.cross_entropy(entry, gradient);
      if (bias) accumulator_.axpy(Acc(1) / entry.scale, out, classes, bias);
      return loss;
    };
    Acc loss = 0;
    if (!in_.plan.paired) {
      for (int64_t m = 0; m < samples; ++m)
        loss += sample_loss(m, logits + m * logits_stride_, nullptr, gradients + m * logits_stride_);
      return loss / static_cast<Acc>(samples);
    }
    // x o m' = x - x o m: the odd samples' gradients go to the unmasked row and, negated, to their even partners'
    const int64_t unmasked = (gemm_rows_ - 1) * logits_stride_;
    Acc* odd_sum = odd + logits_stride_;
    std::fill_n(odd_sum, classes, Acc(0));
    for (int64_t m = 0; m < samples; m += 2) {
      const int64_t at = m / 2 * logits_stride_;
      if (m + 1 < samples) loss += sample_loss(m + 1, logits + at, logits + unmasked, odd);
      loss += sample_loss(m, logits + at, nullptr, gradients + at);
      if (m + 1 < samples && gradient) {
        accumulator_.axpy(Acc(-1), odd, classes, gradients + at);
        accumulator_.axpy(Acc(1), odd, classes, odd_sum);
      }
    }
    std::copy_n(odd_sum, classes, gradients + unmasked);
    return loss / static_cast<Acc>(samples);
  }

  void input_gradient(int64_t begin, int64_t first, int64_t count, int64_t padded, const Scratch& scratch) {
    const Panels<G> weight = transposed_panels();
    const G* operand;
    if constexpr (std::is_same_v<G, Acc>) {
      operand = scratch.logits;
    } else {
      for (int64_t r = 0; r < count * gemm_rows_; ++r) {
        G* row = scratch.gradients + r * logits_stride_;
        head_.convert(scratch.logits + r * logits_stride_, in_.classes, row);
        row[in_.classes] = G{};  // the pair of an odd number of classes
      }
      operand = scratch.gradients;
    }
    constexpr int64_t block = kFoldPanels * kPanel;
    for (int64_t p = 0; p < weight.count(); p += kFoldPanels) {
      for (int64_t from = 0; from < in_.classes; from += kDepth)
        multiply_panels(padded, operand + from, logits_stride_, weight, p, std::min(p + kFoldPanels, weight.count()), from,
                        round_up(std::min(kDepth, in_.classes - from), pairing<G>), scratch.folded, block, from > 0);
      const int64_t column = p * kPanel, n = std::min(block, in_.features - column);
      for (int64_t i = 0; i < count; ++i) {
        const Acc* tile = scratch.folded + i * gemm_rows_ * block;
        O* out = out_.grad_input + (begin + first + i) * in_.features + column;
        if (in_.plan.averaged)
          element_.fold_level(tile, levels_ + (first + i) * padded_features_ + column, n, result_factor_, out);
        else
          element_.fold(tile, block, bits_ + (first + i) * gemm_rows_ * bits_stride_ + column / 8, bits_stride_,
                        gemm_rows_, n, result_factor_, out);
      }
    }
  }

  // sum (C, D) (+)= gradients (C, rows) times the masked features (rows, D), packed once more by feature panels
  void weight_gradient(int64_t begin, int64_t end, bool add) {
    const int64_t rows = (end - begin) * gemm_rows_, classes = in_.classes;
    if (rows % 2 != 0)  // the pair of an odd number of rows
      for (int64_t c = 0; c < classes; ++c) gradients_[c * gradient_stride_ + rows] = G{};
    const int64_t panels = (padded_features_ + kPanel - 1) / kPanel;
    const int64_t blocks = (panels + kWeightPanels - 1) / kWeightPanels;
    // more threads than feature blocks share the classes
    const int64_t splits = std::min((threads_ + blocks - 1) / std::max<int64_t>(blocks, 1), (classes + kWeightRows - 1) / kWeightRows);
    const int64_t share = round_up((classes + splits - 1) / splits, kWeightRows);
    parallel(blocks * splits, [&](int64_t task, const Scratch& scratch) {
      const int64_t column = task / splits * kWeightPanels * kPanel, class_begin = task % splits * share;
      const int64_t class_end = std::min(class_begin + share, classes);
      const int64_t width = std::min(kWeightPanels * kPanel, padded_features_ - column);
      for (int64_t from = 0; from < rows; from += kDepth) {
        const int64_t depth = std::min(kDepth, rows - from);
        const Panels<G> features(scratch.panels, depth, width);
        for (int64_t p = 0; p < features.count(); ++p)
          pack_rows(features, p, from, depth, column + p * kPanel, [&](int64_t r) { return gemm_row(r, begin); },
                    scratch.pair, 0);
        for (int64_t c = class_begin; c < class_end; c += kWeightRows)
          multiply_panels(std::min(kWeightRows, class_end - c), gradients_ + c * gradient_stride_ + from, gradient_stride_,
                          features, 0, features.count(), 0, round_up(depth, pairing<G>),
                          sum_ + c * padded_features_ + column, padded_features_, add || from > 0);
      }
    });
  }

  // The masks' code bytes of an input row: one for eight masks.
  int64_t code_rows() const { return (masks_ + 7) / 8; }
  bool sums_by_panels() const { return subset_ && !lookup_ && !pairs_; }

  SubsetGradients<Acc> subset_sums(int64_t rows) const {
    return {.rows = rows,
            .gemm_rows = gemm_rows_,
            .masks = masks_,
            .classes = in_.classes,
            .features = in_.features,
            .threads = threads_,
            .gradients = rows_,
            .stride = logits_stride_,
            .codes = codes_,
            .codes_stride = padded_features_};
  }

  void subset_gradients(int64_t begin, int64_t end, bool add) {
    const SubsetGradients<Acc> sums = subset_sums(end - begin);
    const typename SubsetGradients<Acc>::Result result{.sum = !out_.grad_weight ? nullptr : lookup_ ? sum_ : panel_sum_,
                                                       .sum_stride = padded_features_,
                                                       .add = add,
                                                       .input = out_.grad_input != nullptr};
    parallel(sums.tasks(), [&](int64_t task, const Scratch& scratch) {
      const auto feature = [&](int64_t row, int64_t from, int64_t n, Acc* out) {
        ever_kept(begin, row, from, n, scratch, out);
      };
      const auto store = [&](int64_t row, int64_t from, int64_t n, const Acc* gradient) {
        element_.store(gradient, n, result_factor_, out_.grad_input + (begin + row) * in_.features + from);
      };
      const auto weight = [&](int64_t c, int64_t from, int64_t n, Acc* out) {
        wide_.select(in_.linear_weight + c * in_.weight_stride + from, nullptr, n, out);
      };
      if (lookup_) sums.by_lookups(task, weight, result, feature, store, scratch.subset_sums);
      else if constexpr (std::is_same_v<G, Acc>)
        sums.by_tables(task, weight_panels(), result, feature, store, scratch.subset_sums);
    });
  }

  // Features from .. from + n of the chunk's row r: those that every sample drops are 0, whatever they are.
  template <typename X>
  void ever_kept(int64_t begin, int64_t r, int64_t from, int64_t n, const Scratch& scratch, X* out) const {
    for (int64_t i = 0; i < n; i += 64) {  // a row of bits has whole words
      uint64_t kept = 0;
      for (int64_t k = 0; k < gemm_rows_; ++k) {
        uint64_t word;
        std::memcpy(&word, bits_ + (r * gemm_rows_ + k) * bits_stride_ + (from + i) / 8, 8);
        kept |= word;
      }
      std::memcpy(scratch.bits + i / 8, &kept, 8);
    }
    head_kernels<T, X>().select(in_.input + (begin + r) * in_.input_stride + from, scratch.bits, n, out);
  }

  PairGradients pair_sums(int64_t rows) const {
    return {.rows = rows,
            .gemm_rows = gemm_rows_,
            .masks = masks_,
            .classes = in_.classes,
            .features = in_.features,
            .gradients = reinterpret_cast<const float*>(rows_),
            .stride = logits_stride_,
            .codes = codes_,
            .codes_stride = padded_features_,
            .weight = {reinterpret_cast<bfloat16*>(transposed_), in_.classes, in_.features},
            .index = pair_index_,
            .x = pair_x_};
  }

  void pair_gradients(int64_t begin, int64_t end, bool add) {
    if constexpr (kPairs) {
      const PairGradients sums = pair_sums(end - begin);
      parallel(sums.pairs(), [&](int64_t pair, const Scratch& scratch) {
        const auto kept = [&](int64_t row, G* out) { ever_kept(begin, row, 0, in_.features, scratch, out); };
        sums.prepare(pair, kept, scratch.pair_sums);
      });
      const PairGradients::Result result{.sum = chunk_rows_ < in_.rows ? sum_ : nullptr,
                                         .sum_stride = padded_features_,
                                         .add = add,
                                         .last = end == in_.rows,
                                         .out = out_.grad_weight};
      const int64_t inputs = out_.grad_input ? sums.input_tasks(threads_) : 0;
      parallel(inputs + (out_.grad_weight ? sums.weight_tasks() : 0), [&](int64_t task, const Scratch& scratch) {
        if (task >= inputs) return sums.weight_gradient(task - inputs, scratch.pair_sums, result);
        sums.input_gradient(task, threads_, [&](int64_t row, int64_t from, int64_t n, const float* gradient) {
          element_.store(gradient, n, result_factor_, out_.grad_input + (begin + row) * in_.features + from);
        }, scratch.pair_sums);
      });
    }
  }

  // grad_weight (C, D) from its panels (D, classes)
  void turn_panels() {
    const Panels<Acc> panels(panel_sum_, in_.features, in_.classes);
    const int64_t blocks = (in_.features + kDepth - 1) / kDepth;
    parallel(panels.count() * blocks, [&](int64_t task, const Scratch&) {
      const int64_t p = task / blocks, from = task % blocks * kDepth, width = panels.width(p);
      head_kernels<O, O>().transpose(panels.panel(p) + from * width, width, std::min(kDepth, in_.features - from),
                                     std::min(width, in_.classes - p * kPanel),
                                     out_.grad_weight + p * kPanel * in_.features + from, in_.features);
    });
  }

  void finish(bool empty) {
    if (out_.grad_bias) {
      Acc* total = bias_ + bias_sums_ * logits_stride_;
      for (int64_t t = 0; t < bias_sums_; ++t) accumulator_.axpy(Acc(1), bias_ + t * logits_stride_, in_.classes, total);
      element_.store(total, in_.classes, result_factor_, out_.grad_bias);
    }
    if (!out_.grad_weight) return;
    if (sums_by_panels() && !empty) return turn_panels();
    if (pairs_ && !empty) return;
    if (empty) {
      std::fill_n(out_.grad_weight, in_.classes * in_.features, O{});
    } else if (!direct_ || result_factor_ != 1) {
      at::parallel_for(0, in_.classes, 16, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c)
          element_.store(sum_ + c * padded_features_, in_.features, result_factor_, out_.grad_weight + c * in_.features);
      });
    }
  }

  const HeadArguments<T>& in_;
  const HeadResults<T, O>& out_;
  const HeadKernels<T, G>& head_ = head_kernels<T, G>();
  const HeadKernels<T, Acc>& wide_ = head_kernels<T, Acc>();
  const ElementKernels<O>& element_ = element_kernels<O>();
  const AccumulatorKernels<Acc>& accumulator_ = accumulator_kernels<Acc>();
  const Acc operand_factor_, result_factor_;
  const int64_t threads_, gemm_rows_, tile_rows_, chunk_rows_;
  const int64_t bias_sums_;  // one a tile of a chunk, as many whatever the threads: each adds the same rows in the same order
  const int64_t padded_tile_;
  const int64_t logits_stride_;  // an odd number of cache lines, so that rows do not meet in the same sets of a cache
  const int64_t bits_stride_, gradient_stride_, padded_features_, masks_;
  const bool subset_, lookup_, pairs_, direct_;
  Workspace memory_;
  std::vector<Scratch> scratch_;
  G *weight_{}, *transposed_{}, *gradients_{};
  uint8_t *bits_{}, *codes_{};
  Acc *levels_{}, *rows_{}, *panel_sum_{}, *sum_{}, *bias_{};
  uint32_t *pair_index_{}, *pair_x_{};
};

}  // namespace pyrx::cpu
