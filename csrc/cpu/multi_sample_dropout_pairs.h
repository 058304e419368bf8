// A task of the head's bfloat16 gradients from pairs of partial sums (simd.h, PairTables): features of its own, all rows
// of a chunk and all classes, so that every sum is made by one thread in one order.
#pragma once

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"

namespace pyrx::cpu {

constexpr int64_t kPairFeatures = 1024;     // most of a task: their codes and values stay in the second-level cache
constexpr int64_t kPairInputClasses = 128;  // of the input gradient whose tables stay in the first-level cache

struct PairGradients {
  int64_t rows, gemm_rows, masks, classes;  // of a chunk
  const float* gradients;                   // (rows, gemm_rows, stride) of the logits, 0 beyond the classes
  int64_t stride;
  const uint8_t* codes;  // (rows, ceil(masks / 8), codes_stride)
  int64_t codes_stride;
  Panels<bfloat16> weight;  // (classes, features)

  struct Scratch {
    uint32_t *index, *x, *tables;
    bfloat16* features;  // (2, range)
    float* input;        // (rows, range)
  };
  struct Result {
    float* sum;  // (classes, features) from the task's first feature on; null where one chunk is all
    int64_t sum_stride;
    bool add, last;
    bfloat16* out;  // likewise
    int64_t out_stride;
  };

  int64_t pairs() const { return (rows + 1) / 2; }
  int64_t groups() const { return (masks + kSubset - 1) / kSubset; }
  int64_t code_rows() const { return (groups() + 1) / 2; }
  // by two vectors of features and eight classes, or by four and four
  int64_t weight_vectors() const { return groups() == 1 ? 2 : 4; }
  int64_t weight_classes() const { return 16 / weight_vectors() > kPairClasses ? kPairClasses : 16 / weight_vectors(); }
  int64_t index_stride() const { return pairs() * code_rows() * kRound; }

  void reserve(Workspace& memory, int64_t range, int64_t offsets[5]) const {
    const int64_t vectors = range / kRound;
    offsets[0] = memory.reserve<uint32_t>(vectors * index_stride());
    offsets[1] = memory.reserve<uint32_t>(vectors * pairs() * kRound);
    offsets[2] = memory.reserve<uint32_t>(
        std::max(pairs() * groups() * weight_classes(), kPairInputClasses * std::min<int64_t>(groups(), 2)) * kRound);
    offsets[3] = memory.reserve<bfloat16>(2 * range);
    offsets[4] = memory.reserve<float>(rows * range);
  }
  static Scratch cut(const Workspace& memory, const int64_t offsets[5]) {
    return {memory.at_offset<uint32_t>(offsets[0]), memory.at_offset<uint32_t>(offsets[1]),
            memory.at_offset<uint32_t>(offsets[2]), memory.at_offset<bfloat16>(offsets[3]),
            memory.at_offset<float>(offsets[4])};
  }

  // Codes and values of features from .. from + n of two rows; feature(row, out) writes a row's.
  template <typename F>
  void prepare(int64_t from, int64_t n, int64_t range, F feature, const Scratch& scratch) const {
    for (int64_t p = 0; p < pairs(); ++p) {
      const int64_t first = 2 * p, second = std::min(2 * p + 1, rows - 1);
      feature(first, scratch.features);
      if (second == first) std::fill_n(scratch.features + range, range, bfloat16{});
      else feature(second, scratch.features + range);
      kernels.features(scratch.features, scratch.features + range, n, scratch.x + p * kRound, pairs() * kRound);
      for (int64_t q = 0; q < code_rows(); ++q)
        kernels.index(codes + (first * code_rows() + q) * codes_stride + from,
                      codes + (second * code_rows() + q) * codes_stride + from, n,
                      scratch.index + (p * code_rows() + q) * kRound, index_stride());
    }
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

  void weight_gradient(int64_t n, const Scratch& scratch, const Result& result) const {
    const int64_t width = weight_classes(), vectors = weight_vectors(), all = groups();
    for (int64_t c = 0; c < classes; c += width) {
      for (int64_t p = 0; p < pairs(); ++p)
        kernels.tables(tables_of(p, 0, all, c, width), false, scratch.tables + p * all * width * kRound);
      for (int64_t d = 0; d < n; d += vectors * kRound)
        kernels.weight({.pairs = pairs(),
                        .groups = all,
                        .index = scratch.index + d / kRound * index_stride(),
                        .index_stride = index_stride(),
                        .x = scratch.x + d * pairs(),
                        .x_stride = pairs() * kRound,
                        .tables = scratch.tables,
                        .vectors = vectors,
                        .classes = classes - c,
                        .features = n - d,
                        .sum = result.sum ? result.sum + c * result.sum_stride + d : nullptr,
                        .sum_stride = result.sum_stride,
                        .add = result.add,
                        .out = result.last ? result.out + c * result.out_stride + d : nullptr,
                        .out_stride = result.out_stride});
    }
  }

  // scratch.input (rows, range)
  void input_gradient(int64_t from, int64_t n, int64_t range, const Scratch& scratch) const {
    std::fill_n(scratch.input, rows * range, 0.0f);
    for (int64_t c = 0; c < classes; c += kPairInputClasses) {
      const int64_t number = round_up(std::min(kPairInputClasses, classes - c), 2);
      for (int64_t p = 0; p < pairs(); ++p)
        for (int64_t g = 0; g < groups(); g += 2) {
          const int64_t count = std::min<int64_t>(2, groups() - g), step = count == 2 ? 2 * kRound : 4 * kRound;
          kernels.tables(tables_of(p, g, count, c, number), true, scratch.tables);
          for (int64_t d = 0; d < n; d += step) {
            const int64_t panel = (from + d) / kPanel, width = weight.width(panel);
            float* own = scratch.input + 2 * p * range + d;
            kernels.input({.groups = count,
                           .index = scratch.index + d / kRound * index_stride() + (p * code_rows() + g / 2) * kRound,
                           .index_stride = index_stride(),
                           .class_pairs = number / 2,
                           .tables = scratch.tables,
                           .weight = reinterpret_cast<const uint32_t*>(weight.panel(panel)) + c / 2 * width +
                                     (from + d) % kPanel,
                           .weight_stride = width,
                           .input_gradient = {own, 2 * p + 1 < rows ? own + range : nullptr}});
          }
        }
    }
  }

  const SumKernels& kernels = sum_kernels();
};

}  // namespace pyrx::cpu
