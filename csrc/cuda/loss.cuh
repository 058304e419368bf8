// What the losses share on the GPU: targets, a row's loss and gradient from its sums, the sums over the rows.
#pragma once

#include "cuda/common.cuh"
#include "kernels/mixed_cross_entropy.h"

namespace pyrx::cuda {

// What the losses compare with; pointers may be null as said.
template <typename A>
struct Target {
  const int64_t* a;        // (B) class ids, or null: probabilities
  const int64_t* b;        // (B) with lam, or null
  const A* lam;
  const A* probabilities;  // (B, C)
  const A* class_weight;   // (C), or null: ones
  int64_t classes, ignore_index;
  A smoothing;

  __device__ ClassTarget<A> row(int64_t row, A class_weight_sum) const {
    if (probabilities) return {0, 0, A(0), A(0), A(1), A(0), A(0), true, true};
    return class_target(a[row], b ? b[row] : ignore_index, lam ? lam[row] : A(1), class_weight, class_weight_sum,
                        classes, ignore_index, smoothing);
  }
  // What z[c] weighs within ClassTarget::uniform.
  __device__ A column(int64_t row, int64_t c) const {
    if (probabilities)
      return probability_coefficient(probabilities[row * classes + c], class_weight, c, classes, smoothing);
    return class_weight ? class_weight[c] : A(1);
  }
};

// Made once a call, read by the kernels after it.
template <typename A>
struct LossStats {
  A class_weight_sum;
  A gradient_factor;  // what makes G the loss's gradient: the largest dropout scale over losses a row and denominator
  A denominator;      // what the sum of all samples' losses is divided by

  // every row ignored: loss nan, gradients 0, as F.cross_entropy has them
  __device__ static LossStats of(double class_weight_sum, double denominator, double largest_scale) {
    return {A(class_weight_sum), A(denominator == 0 ? 0.0 : largest_scale / denominator), A(denominator)};
  }
};

// By one block, every thread of which gets it.
template <typename A>
__device__ double class_weight_sum(const Target<A>& target) {
  double sum = 0;
  for (int64_t c = threadIdx.x; c < target.classes; c += blockDim.x)
    sum += target.class_weight ? double(target.class_weight[c]) : 1.0;
  return block_sum(sum);
}

// What rows [first, last) add to the denominator of "mean", likewise. Bytes: the targets once; latency-bound, some
// microseconds up to 10^4 rows.
template <typename A>
__device__ double row_weight_sum(const Target<A>& target, int64_t first, int64_t last) {
  double weight = 0;
#pragma unroll 4
  for (int64_t row = first + threadIdx.x; row < last; row += blockDim.x) weight += double(target.row(row, A(0)).weight);
  return block_sum(weight);
}

// Of one row of logits: those of its target's classes; dot and weight are sums over the columns within
// ClassTarget::uniform, relative to shift.
template <typename A>
struct RowSums {
  A a, b, shift, sum = 0, dot = 0, weight = 0;
};

// A row's target and what it makes of the row's sums.
template <typename A>
struct RowGoal {
  const Target<A>& target;
  int64_t row;
  ClassTarget<A> goal;

  __device__ RowGoal(const Target<A>& targets, int64_t index, A class_weight_sum)
      : target(targets), row(index), goal(targets.row(index, class_weight_sum)) {
    if (goal.b_coefficient == 0) goal.b = goal.a;
  }

  __device__ A total(const RowSums<A>& sums) const { return target.probabilities ? sums.weight : goal.total; }

  __device__ A loss(const RowSums<A>& sums) const {
    A value = total(sums) * std::log(sums.sum);
    if (goal.a_coefficient != 0) value -= goal.a_coefficient * (sums.a - sums.shift);
    if (goal.b_coefficient != 0) value -= goal.b_coefficient * (sums.b - sums.shift);
    return value - (goal.uniform != 0 ? goal.uniform * sums.dot : A(0));
  }

  // g -= times * the target's part of the gradient, of columns c and after it
  template <bool kUniform, int kSpan>
  __device__ void subtract(Vector<A, kSpan>& g, int c, A times) const {
    if constexpr (kUniform) {
#pragma unroll
      for (int i = 0; i < kSpan; ++i)
        if (c + i < target.classes) g.v[i] -= times * goal.uniform * target.column(row, c + i);
    }
    const int a = int(goal.a), b = int(goal.b);
    if (unsigned(a - c) >= kSpan && unsigned(b - c) >= kSpan) return;
#pragma unroll
    for (int i = 0; i < kSpan; ++i)
      g.v[i] -= times * ((c + i == a ? goal.a_coefficient : A(0)) + (c + i == b ? goal.b_coefficient : A(0)));
  }
};

// Sums of one row of logits over a part of the columns; sum and dot are relative to shift.
template <typename A>
struct Part {
  A peak = -INFINITY, sum = 0, dot = 0, weight = 0;

  __device__ A shift() const { return peak == -INFINITY ? A(0) : peak; }

  __device__ void add(const Part& other) {
    const Part before = *this;
    peak = fmax(peak, other.peak);
    sum = before.sum * exponential(before.peak - shift()) + other.sum * exponential(other.peak - shift());
    dot = before.dot + (before.shift() - shift()) * before.weight + other.dot +
          (other.shift() - shift()) * other.weight;
    weight += other.weight;
  }
};

template <typename T, int kSpan>
__device__ inline void store_span(T* to, const Vector<Acc<T>, kSpan>& value) {
  Vector<T, kSpan> rounded;
#pragma unroll
  for (int i = 0; i < kSpan; ++i) rounded.v[i] = narrow<T>(value.v[i]);
  store(to, rounded);
}

}  // namespace pyrx::cuda
