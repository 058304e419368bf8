// What a call of the multi-sample dropout head on the CPU reads and writes.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace pyrx::cpu {

template <typename T>
struct HeadArguments {
  using Acc = accumulate_t<T>;
  int64_t rows, features, classes;  // B, D, C
  const T* input;                   // (B, D), rows input_stride apart
  int64_t input_stride;
  const T* linear_weight;  // (C, D), rows weight_stride apart
  int64_t weight_stride;
  const Acc* bias;            // (C,) or null
  const Acc* class_weight;    // (C,) or null
  const int64_t* target_a;    // (B,) or null: probabilities
  const int64_t* target_b;    // (B,), target_a where there is one class
  const Acc* lam;             // (B,) or null: one class
  const Acc* probabilities;   // (B, C) or null
  const Acc* grad_loss;       // (B,) or null: ones
  Acc class_weight_sum, label_smoothing;
  int64_t ignore_index;
  uint64_t seed;
  const int64_t* thresholds;  // (M,)
  bool antithetic;
  SamplePlan plan;

  ClassTarget<Acc> target(int64_t row) const {
    return class_target<Acc>(target_a[row], target_b[row], lam ? lam[row] : Acc(1), class_weight, class_weight_sum, classes,
                             ignore_index, label_smoothing);
  }
  SampleMask mask(int64_t sample) const { return sample_mask(sample, thresholds[sample], antithetic); }
};

// Where the results go; a null gradient is not computed. O is T, or float32 for float16 that waits for the loss scale.
template <typename T, typename O>
struct HeadResults {
  using Acc = accumulate_t<T>;
  Acc* row_loss;  // (B,) mean over the samples
  O* grad_input;  // (B, D)
  O* grad_weight;  // (C, D)
  O* grad_bias;    // (C,)
  Acc factor;      // of every gradient
};

}  // namespace pyrx::cpu
