// The head's gradients from partial sums of the logits' gradients, in the type that they are summed in: by tables in cache
// (simd.h, SubsetBlock), or of few classes by lookups in registers (LookupRow). A task has features of its own, so that every
// sum is made by one thread in one order.
#pragma once

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"

namespace pyrx::cpu {

constexpr int64_t kSubsetTables = 8;      // tables of 64 classes at a time: 32 KiB of float32
constexpr int64_t kSubsetFeatures = 256;  // most of a task

template <typename Acc>
struct SubsetGradients {
  int64_t rows, gemm_rows, masks, classes, features;  // of a chunk
  int64_t threads;
  const Acc* gradients;  // (rows, gemm_rows, stride) of the logits, 0 beyond the classes
  int64_t stride;
  const uint8_t* codes;  // (rows, codes_stride, ceil(masks / 8))
  int64_t codes_stride;

  struct Scratch {
    Acc* tables;  // (table_rows(), groups(), 16, kPanel)
    Acc* x;       // (rows, kSubsetFeatures), by lookups of one row
    Acc* input;   // the same of the input gradient
    Acc* weight;  // (kLookupClasses, kSubsetFeatures)
  };
  struct Result {
    Acc* sum;            // of the weight gradient: by tables Panels (features, classes), by lookups (classes, features); or null
    int64_t sum_stride;  // of its rows by lookups
    bool add, input;     // to the sum; whether there is an input gradient
  };

  int64_t groups() const { return (masks + kSubset - 1) / kSubset; }
  int64_t code_rows() const { return (masks + 7) / 8; }
  int64_t table_rows() const { return std::clamp<int64_t>(kSubsetTables / groups(), 1, kSubsetRows); }
  // Features of a task: one task a thread, unless they are many; every task makes the tables anew.
  int64_t range() const {
    const int64_t share = round_up((features + threads - 1) / threads, kPanel);
    return std::min(kSubsetFeatures, std::max<int64_t>(share, 1));
  }
  int64_t tasks() const { return (features + range() - 1) / range(); }

  void reserve_scratch(Workspace& memory, bool lookup, int64_t offsets[4]) const {
    offsets[0] = memory.reserve<Acc>(lookup ? 0 : table_rows() * groups() * kSubsetEntries * kPanel);
    offsets[1] = memory.reserve<Acc>((lookup ? 1 : rows) * kSubsetFeatures);
    offsets[2] = memory.reserve<Acc>((lookup ? 1 : rows) * kSubsetFeatures);
    offsets[3] = memory.reserve<Acc>(lookup ? kLookupClasses * kSubsetFeatures : 0);
  }
  static Scratch cut(const Workspace& memory, const int64_t offsets[4]) {
    return {memory.at_offset<Acc>(offsets[0]), memory.at_offset<Acc>(offsets[1]), memory.at_offset<Acc>(offsets[2]),
            memory.at_offset<Acc>(offsets[3])};
  }

  // feature(row, from, n, out) writes features from .. from + n of a row, store(row, from, n, gradient) takes theirs.
  template <typename Feature, typename Store>
  void by_tables(int64_t task, const Panels<Acc>& weight, const Result& result, Feature feature, Store store,
                 const Scratch& scratch) const {
    const int64_t step = range(), from = task * step, n = std::min(step, features - from);
    for (int64_t r = 0; r < rows; ++r) feature(r, from, n, scratch.x + r * step);
    if (result.input) std::fill_n(scratch.input, rows * step, Acc(0));
    for (int64_t p = 0; p < weight.count(); ++p) {
      const int64_t width = weight.width(p);
      Acc* sum = result.sum ? Panels<Acc>(result.sum, features, classes).panel(p) + from * width : nullptr;
      if (sum && !result.add) std::fill_n(sum, n * width, Acc(0));
      for (int64_t r = 0; r < rows; r += table_rows()) {
        const int64_t count = std::min(table_rows(), rows - r);
        for (int64_t b = 0; b < count; ++b)
          make_tables(gradients + (r + b) * gemm_rows * stride + p * kPanel, width,
                      scratch.tables + b * groups() * kSubsetEntries * width);
        kernels.subset_gradients({
            .rows = count,
            .features = n,
            .width = width,
            .groups = groups(),
            .tables = scratch.tables,
            .codes = codes + (r * codes_stride + from) * code_rows(),
            .codes_stride = codes_stride * code_rows(),
            .x = scratch.x + r * step,
            .x_stride = step,
            .weight = weight.panel(p) + from * width,
            .weight_gradient = sum,
            .input_gradient = result.input ? scratch.input + r * step : nullptr,
            .input_stride = step,
        });
      }
    }
    if (result.input)
      for (int64_t r = 0; r < rows; ++r) store(r, from, n, scratch.input + r * step);
  }

  // Likewise of at most kLookupClasses classes and two groups; weight(c, from, n, out) writes a class's weights.
  template <typename Weight, typename Feature, typename Store>
  void by_lookups(int64_t task, Weight weight, const Result& result, Feature feature, Store store,
                  const Scratch& scratch) const {
    const int64_t step = range(), from = task * step, n = std::min(step, features - from);
    if (result.input)
      for (int64_t c = 0; c < classes; ++c) weight(c, from, n, scratch.weight + c * step);
    Acc* sum = result.sum ? result.sum + from : nullptr;
    if (sum && !result.add)
      for (int64_t c = 0; c < classes; ++c) std::fill_n(sum + c * result.sum_stride, round_up(n, kRound), Acc(0));
    for (int64_t r = 0; r < rows; ++r) {
      if (sum) feature(r, from, n, scratch.x);
      const Acc* own = gradients + r * gemm_rows * stride;
      kernels.lookup_gradients({
          .features = n,
          .classes = classes,
          .masks = masks,
          .base = unmasked(own),
          .rows = own,
          .rows_stride = stride,
          .codes = codes + r * codes_stride + from,
          .x = scratch.x,
          .weight = scratch.weight,
          .weight_stride = step,
          .weight_gradient = sum,
          .gradient_stride = result.sum_stride,
          .input_gradient = result.input ? scratch.input : nullptr,
      });
      if (result.input) store(r, from, n, scratch.input);
    }
  }

  // Of an input row's GEMM rows the one without a mask, which is last, or null.
  const Acc* unmasked(const Acc* own) const { return gemm_rows > masks ? own + masks * stride : nullptr; }

  // An input row's tables of `width` classes; the unmasked row is in every entry.
  void make_tables(const Acc* own, int64_t width, Acc* tables) const {
    for (int64_t g = 0; g < groups(); ++g)
      kernels.subset_table(g == 0 ? unmasked(own) : nullptr, own + g * kSubset * stride, stride,
                           std::min(kSubset, masks - g * kSubset), width, tables + g * kSubsetEntries * width);
  }

  const AccumulatorKernels<Acc>& kernels = accumulator_kernels<Acc>();
};

}  // namespace pyrx::cpu
