// The head's bfloat16 gradients from pairs of partial sums (simd.h, PairTables). A task has classes of the weight gradient
// or rows of the input gradient of its own, so that every sum is made by one thread in one order.
#pragma once

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"

namespace pyrx::cpu {

constexpr int64_t kPairFeatures = 1024;     // most of a task: their codes and values stay in the second-level cache
constexpr int64_t kPairWeightClasses = 64;  // of a task of the weight gradient
constexpr int64_t kPairInputClasses = 128;  // of the input gradient whose tables stay in the first-level cache
constexpr int64_t kPairInputRows = 16;      // most of a task of the input gradient

struct PairGradients {
  int64_t rows, gemm_rows, masks, classes, features;  // of a chunk
  const float* gradients;                   // (rows, gemm_rows, stride) of the logits, 0 beyond the classes
  int64_t stride;
  const uint8_t* codes;  // (rows, ceil(masks / 8), codes_stride)
  int64_t codes_stride;
  Panels<bfloat16> weight;  // (classes, features)

  uint32_t *index, *x;  // of all features (SumKernels), vectors of them index_stride() and x_stride() apart

  struct Scratch {
    uint32_t* tables;
    bfloat16* features;  // (2, padded features)
    float* input;        // (kPairInputRows, kPairFeatures)
  };
  struct Result {
    float* sum;  // (classes, features), rows sum_stride apart; null where one chunk is all
    int64_t sum_stride;
    bool add, last;
    bfloat16* out;  // (classes, features)
  };

  int64_t pairs() const { return (rows + 1) / 2; }
  int64_t groups() const { return (masks + kSubset - 1) / kSubset; }
  int64_t code_rows() const { return (groups() + 1) / 2; }
  // by two vectors of features and eight classes, or by four and four
  int64_t weight_vectors() const { return groups() == 1 ? 2 : 4; }
  int64_t weight_classes() const { return 16 / weight_vectors(); }
  int64_t index_stride() const { return pairs() * code_rows() * kRound; }
  int64_t x_stride() const { return pairs() * kRound; }
  int64_t padded_features() const { return round_up(features, kPanel); }
  int64_t range() const { return even_share(padded_features() / kPanel, kPairFeatures / kPanel) * kPanel; }
  int64_t ranges() const { return (features + range() - 1) / range(); }

  void reserve(Workspace& memory, int64_t offsets[2]) const {
    offsets[0] = memory.reserve<uint32_t>(padded_features() / kRound * index_stride());
    offsets[1] = memory.reserve<uint32_t>(padded_features() / kRound * x_stride());
  }
  void reserve_scratch(Workspace& memory, int64_t offsets[3]) const {
    offsets[0] = memory.reserve<uint32_t>(
        std::max(pairs() * groups() * weight_classes(), kPairInputClasses * std::min<int64_t>(groups(), 2)) * kRound);
    offsets[1] = memory.reserve<bfloat16>(2 * padded_features());
    offsets[2] = memory.reserve<float>(kPairInputRows * kPairFeatures);
  }
  static Scratch cut(const Workspace& memory, const int64_t offsets[3]) {
    return {memory.at_offset<uint32_t>(offsets[0]), memory.at_offset<bfloat16>(offsets[1]),
            memory.at_offset<float>(offsets[2])};
  }

  // Codes and values of a pair of rows; feature(row, out) writes a row's values.
  template <typename F>
  void prepare(int64_t pair, F feature, const Scratch& scratch) const {
    const int64_t first = 2 * pair, second = std::min(first + 1, rows - 1);
    bfloat16* other = scratch.features + padded_features();
    feature(first, scratch.features);
    if (second == first) std::fill_n(other, features, bfloat16{});
    else feature(second, other);
    kernels.features(scratch.features, other, features, x + pair * kRound, x_stride());
    for (int64_t q = 0; q < code_rows(); ++q)
      kernels.index(codes + (first * code_rows() + q) * codes_stride, codes + (second * code_rows() + q) * codes_stride,
                    features, index + (pair * code_rows() + q) * kRound, index_stride());
  }

  PairTables tables_of(int64_t pair, int64_t first_group, int64_t count, int64_t first_class, int64_t number) const {
    const float* own = gradients + 2 * pair * gemm_rows * stride + first_class;
    const bool second = 2 * pair + 1 < rows;
    return {.rows = {own, second ? own + gemm_rows * stride : own},
            .stride = stride,
            .masks = masks,
            .base = gemm_rows > masks,
            .pair = second,
            .first_group = first_group,
            .groups = count,
            .classes = number};
  }

  int64_t weight_tasks() const { return ranges() * ((classes + kPairWeightClasses - 1) / kPairWeightClasses); }

  void weight_gradient(int64_t task, const Scratch& scratch, const Result& result) const {
    const int64_t width = weight_classes(), step = weight_vectors() * kRound, all = groups();
    const int64_t from = task % ranges() * range(), to = std::min(from + range(), features);
    const int64_t first = task / ranges() * kPairWeightClasses, last = std::min(first + kPairWeightClasses, classes);
    for (int64_t c = first; c < last; c += width) {
      for (int64_t p = 0; p < pairs(); ++p)
        kernels.tables(tables_of(p, 0, all, c, width), false, scratch.tables + p * all * width * kRound);
      for (int64_t d = from; d < to; d += step)
        kernels.weight({.pairs = pairs(),
                        .groups = all,
                        .index = index + d / kRound * index_stride(),
                        .index_stride = index_stride(),
                        .x = x + d / kRound * x_stride(),
                        .x_stride = x_stride(),
                        .tables = scratch.tables,
                        .vectors = weight_vectors(),
                        .classes = classes - c,
                        .features = features - d,
                        .sum = result.sum ? result.sum + c * result.sum_stride + d : nullptr,
                        .sum_stride = result.sum_stride,
                        .add = result.add,
                        .out = result.last ? result.out + c * features + d : nullptr,
                        .out_stride = features});
    }
  }

  int64_t input_rows(int64_t threads) const {  // of a task, whole pairs
    return std::min(kPairInputRows, 2 * even_share(pairs(), std::max<int64_t>(1, pairs() / (2 * threads))));
  }
  int64_t input_tasks(int64_t threads) const {
    return ranges() * ((rows + input_rows(threads) - 1) / input_rows(threads));
  }

  // f(row, feature, n, its gradients) of all rows and features of a task.
  template <typename F>
  void input_gradient(int64_t task, int64_t threads, F f, const Scratch& scratch) const {
    const int64_t from = task % ranges() * range(), n = std::min(range(), features - from);
    const int64_t first = task / ranges() * input_rows(threads), last = std::min(first + input_rows(threads), rows);
    std::fill_n(scratch.input, kPairInputRows * kPairFeatures, 0.0f);
    for (int64_t c = 0; c < classes; c += kPairInputClasses) {
      const int64_t number = round_up(std::min(kPairInputClasses, classes - c), 2);
      for (int64_t r = first; r < last; r += 2)
        for (int64_t g = 0; g < groups(); g += 2) {
          const int64_t count = std::min<int64_t>(2, groups() - g), step = count == 2 ? 2 * kRound : 4 * kRound;
          kernels.tables(tables_of(r / 2, g, count, c, number), true, scratch.tables);
          for (int64_t d = 0; d < n; d += step) {
            const int64_t panel = (from + d) / kPanel, width = weight.width(panel);
            float* own = scratch.input + (r - first) * kPairFeatures + d;
            kernels.input({.groups = count,
                           .index = index + (from + d) / kRound * index_stride() + (r / 2 * code_rows() + g / 2) * kRound,
                           .index_stride = index_stride(),
                           .class_pairs = number / 2,
                           .tables = scratch.tables,
                           .weight = reinterpret_cast<const uint32_t*>(weight.panel(panel)) + c / 2 * width +
                                     (from + d) % kPanel,
                           .weight_stride = width,
                           .input_gradient = {own, r + 1 < rows ? own + kPairFeatures : nullptr}});
          }
        }
    }
    for (int64_t r = first; r < last; ++r) f(r, from, n, scratch.input + (r - first) * kPairFeatures);
  }

  const SumKernels& kernels = sum_kernels();
};

}  // namespace pyrx::cpu
