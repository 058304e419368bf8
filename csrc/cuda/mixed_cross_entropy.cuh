// Mixed cross-entropy: a row of logits to its loss and gradient in one pass, the rows' sum, the scale of the backward.
#pragma once

#include "cuda/loss.cuh"

namespace pyrx::cuda {

constexpr int kLossThreads = 256;
constexpr int kLossWarps = kLossThreads / kWarp;

// float16 gradients wait for the upstream (loss) scale in float32, whose range they need.
template <typename T>
struct SavedGradient {
  using type = T;
};
template <>
struct SavedGradient<__half> {
  using type = float;
};
template <typename T>
using Saved = typename SavedGradient<T>::type;

// Columns of a row that a lane holds in its registers, and a warp.
template <typename A>
constexpr int kLaneColumns = sizeof(A) == 8 ? 16 : 32;
template <typename A>
constexpr int kWarpColumns = kWarp * kLaneColumns<A>;

template <typename T>
struct MixedParams {
  using A = Acc<T>;
  const T* logits;        // (N, C), rows `stride` apart
  Saved<T>* gradient;     // (N, C) contiguous, or null
  A* losses;              // (N,) or null
  T* narrow_losses;       // (N,) or null
  LossStats<A>* made;     // by block 0 where `given` is null; or null
  const LossStats<A>* given;
  StatsParams<A> stats;
  int64_t stride;

  __device__ void write_loss(int64_t row, A loss) const {
    if (losses)
      losses[row] = loss;
    else
      narrow_losses[row] = narrow<T>(loss);
  }
};

template <typename A>
__global__ void __launch_bounds__(kLossThreads) loss_stats_kernel(LossStats<A>* to, const __grid_constant__ StatsParams<A> p) {
  const LossStats<A> stats = loss_stats(p);
  if (threadIdx.x == 0) *to = stats;
}

// Up to kWarpColumns classes: a warp has a row, held in registers from loss to gradient. kSpan columns are one access:
// 16 bytes where all rows are aligned so, else 1. kUniform: there is label smoothing.
// Bytes: N C (sizeof(T) + sizeof(Saved<T>)) over 4.8 TB/s, 0.9 us at 1024 x 1000 in bfloat16. Operations: an exponential
// and about 10 more an element over 34e12, 0.4 us. Latency: one read of the row, that of the targets beside it, two warp
// reductions, one write: some 3 us, which the small sizes are bound by.
template <typename T, int kSpan, bool kUniform>
__global__ void __launch_bounds__(kLossThreads) mixed_cross_entropy_kernel(const __grid_constant__ MixedParams<T> p) {
  using A = Acc<T>;
  constexpr int kSpans = kLaneColumns<A> / kSpan;
  const int lane = threadIdx.x % kWarp, classes = int(p.stats.target.classes);
  const int64_t index = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  const bool exists = index < p.stats.rows;
  const T* logits = p.logits + (exists ? index : 0) * p.stride;

  Vector<T, kSpan> read[kSpans];  // before the targets, so that the two latencies overlap
#pragma unroll
  for (int j = 0; j < kSpans; ++j) {
    const int c = (j * kWarp + lane) * kSpan;
    if (c < classes && exists) read[j] = load<T, kSpan>(logits + c);
  }
  const LossStats<A> stats = p.given ? *p.given : loss_stats(p.stats);
  if (p.made && blockIdx.x == 0 && threadIdx.x == 0) *p.made = stats;
  if (!exists) return;

  const RowGoal<A> row(p.stats.target, index, stats.class_weight_sum);
  Saved<T>* gradient = p.gradient ? p.gradient + index * classes : nullptr;
  if (!row.goal.counts) {  // whatever its logits are
    if (lane == 0) p.write_loss(index, A(0));
    for (int c = lane; c < classes && gradient; c += kWarp) gradient[c] = narrow<Saved<T>>(0);
    return;
  }
  Vector<A, kSpan> z[kSpans];
  RowSums<A> sums{widen(logits[row.goal.a]), widen(logits[row.goal.b]), A(0)};
  A peak = -INFINITY;
#pragma unroll
  for (int j = 0; j < kSpans; ++j) {
    const bool inside = (j * kWarp + lane) * kSpan < classes;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      z[j].v[i] = inside ? widen(read[j].v[i]) : A(-INFINITY);
      peak = fmax(peak, z[j].v[i]);
    }
  }
  peak = warp_max(peak);
  sums.shift = peak == -INFINITY ? A(0) : peak;
#pragma unroll
  for (int j = 0; j < kSpans; ++j) {
    const int c = (j * kWarp + lane) * kSpan;
    if (j * kWarp * kSpan >= classes) break;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      A& value = z[j].v[i];
      value -= sums.shift;
      if (kUniform && c < classes) {
        const A weight = row.target.column(index, c + i);
        sums.dot += weight * value;
        sums.weight += weight;
      }
      sums.sum += value = exponential(value);
    }
  }
  sums.sum = warp_sum(sums.sum);
  if constexpr (kUniform) {
    sums.dot = warp_sum(sums.dot);
    sums.weight = warp_sum(sums.weight);
  }
  if (lane == 0) p.write_loss(index, row.loss(sums));
  if (!gradient) return;
  const A times = row.total(sums) / sums.sum * stats.gradient_factor;
#pragma unroll
  for (int j = 0; j < kSpans; ++j) {
    const int c = (j * kWarp + lane) * kSpan;
    if (c >= classes) break;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) z[j].v[i] *= times;
    row.template subtract<kUniform>(z[j], c, stats.gradient_factor);
    store_span(gradient + c, z[j]);
  }
}

// Any number of classes: a block has a row, read once for the loss and, from L1 or L2, once more for the gradient.
// Bytes: N C (sizeof(T) + sizeof(Saved<T>)) over 4.8 TB/s. Operations: two exponentials and about 40 more an element.
template <typename T, int kSpan>
__global__ void __launch_bounds__(kLossThreads)
    mixed_cross_entropy_wide_kernel(const __grid_constant__ MixedParams<T> p) {
  using A = Acc<T>;
  __shared__ Part<A> parts[kLossWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t index = blockIdx.x, classes = p.stats.target.classes, stretch = int64_t(blockDim.x) * kSpan;
  const T* logits = p.logits + index * p.stride;
  const LossStats<A> stats = *p.given;
  const RowGoal<A> row(p.stats.target, index, stats.class_weight_sum);
  Saved<T>* gradient = p.gradient ? p.gradient + index * classes : nullptr;
  if (!row.goal.counts) {
    if (threadIdx.x == 0) p.write_loss(index, A(0));
    for (int64_t c = threadIdx.x; c < classes && gradient; c += blockDim.x) gradient[c] = narrow<Saved<T>>(0);
    return;
  }
  const bool uniform = row.goal.uniform != 0;

  Part<A> part;
#pragma unroll 4
  for (int64_t c = threadIdx.x * kSpan; c < classes; c += stretch) {
    const Vector<T, kSpan> z = load<T, kSpan>(logits + c);
    Part<A> mine;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) mine.peak = fmax(mine.peak, widen(z.v[i]));
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      const A value = widen(z.v[i]) - mine.shift();
      mine.sum += exponential(value);
      if (uniform) {
        const A weight = row.target.column(index, c + i);
        mine.dot += weight * value;
        mine.weight += weight;
      }
    }
    part.add(mine);
  }
#pragma unroll 1
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    part.add({__shfl_xor_sync(kAllLanes, part.peak, offset), __shfl_xor_sync(kAllLanes, part.sum, offset),
              __shfl_xor_sync(kAllLanes, part.dot, offset), __shfl_xor_sync(kAllLanes, part.weight, offset)});
  if (lane == 0) parts[warp] = part;
  __syncthreads();
  Part<A> all = parts[0];
  for (int i = 1; i < int(blockDim.x) / kWarp; ++i) all.add(parts[i]);
  const RowSums<A> sums{widen(logits[row.goal.a]), widen(logits[row.goal.b]), all.shift(), all.sum, all.dot, all.weight};
  if (threadIdx.x == 0) p.write_loss(index, row.loss(sums));
  if (!gradient) return;
  const A times = row.total(sums) / sums.sum * stats.gradient_factor;
#pragma unroll 4
  for (int64_t c = threadIdx.x * kSpan; c < classes; c += stretch) {
    const Vector<T, kSpan> z = load<T, kSpan>(logits + c);
    Vector<A, kSpan> g;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) g.v[i] = exponential(widen(z.v[i]) - sums.shift) * times;
    row.template subtract<true>(g, int(c), stats.gradient_factor);
    store_span(gradient + c, g);
  }
}

// The sum of the rows' losses over stats->denominator, to one of `loss` and `narrow_loss`. One block.
template <typename T>
__global__ void __launch_bounds__(kLossThreads)
    mixed_loss_kernel(const Acc<T>* losses, const LossStats<Acc<T>>* stats, int64_t rows, Acc<T>* loss, T* narrow_loss) {
  const double sum = sum_losses(losses, rows);
  if (threadIdx.x != 0) return;
  const Acc<T> value = Acc<T>(sum / double(stats->denominator));
  if (loss)
    *loss = value;
  else
    *narrow_loss = narrow<T>(value);
}

template <typename T>
struct MixedScaleParams {
  T* gradient;            // (N, C) contiguous
  const Acc<T>* factor;   // one of the two, of one element or (N,)
  const T* narrow_factor;
  int64_t rows, classes;
  bool per_row;
};

// Gradients times the upstream one, in place; a row whose factor is one is not touched, as all are of a loss that
// backward() starts from. A warp takes row after row. Bytes: none then, else 2 N C sizeof(T) over 4.8 TB/s.
template <typename T, int kSpan>
__global__ void __launch_bounds__(kLossThreads) mixed_scale_kernel(const __grid_constant__ MixedScaleParams<T> p) {
  const auto factor = [&](int64_t i) { return p.factor ? p.factor[i] : widen(p.narrow_factor[i]); };
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const Acc<T> common = p.per_row ? Acc<T>(0) : factor(0);
  if (common == 1) return;
  const int64_t first = int64_t(blockIdx.x) * warps + threadIdx.x / kWarp;
  for (int64_t row = first; row < p.rows; row += int64_t(gridDim.x) * warps) {
    const Acc<T> times = p.per_row ? factor(row) : common;
    if (times == 1) continue;
    T* gradient = p.gradient + row * p.classes;
#pragma unroll 4
    for (int64_t c = lane * kSpan; c < p.classes; c += kWarp * kSpan) {
      Vector<T, kSpan> g = load<T, kSpan>(gradient + c);
#pragma unroll
      for (int i = 0; i < kSpan; ++i) g.v[i] = narrow<T>(widen(g.v[i]) * times);
      store(gradient + c, g);
    }
  }
}

}  // namespace pyrx::cuda
