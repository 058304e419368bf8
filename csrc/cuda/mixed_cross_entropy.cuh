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
constexpr int kLaneColumns = sizeof(A) == 8 ? 8 : 32;
template <typename A>
constexpr int kWarpColumns = kWarp * kLaneColumns<A>;

constexpr int64_t kWeightRows = 2048;  // rows of a block of mixed_weight_kernel
constexpr int kMaxWeightParts = 256;

template <typename T>
struct MixedParams {
  using A = Acc<T>;
  const T* logits;         // (N, C), rows `stride` apart
  Saved<T>* gradient;      // (N, C) contiguous, or null
  A* row_losses;           // (N,) or null
  T* narrow_row_losses;    // (N,) or null
  double* partial_losses;  // (gridDim.x,) or null: one of the three
  A* denominator;          // of "mean", made by block 0
  const double* weights;   // (weight_parts,), whose sum it is; null: found by every block itself
  int weight_parts;
  Target<A> target;
  int64_t rows, stride;
  bool mean;

  // By a whole block.
  __device__ LossStats<A> stats() const {
    const double class_weights = target.smoothing != 0 && target.class_weight ? class_weight_sum(target) : double(target.classes);
    const double weight = !mean     ? 1.0
                          : weights ? block_sum(int(threadIdx.x) < weight_parts ? weights[threadIdx.x] : 0.0)
                                    : row_weight_sum(target, 0, rows);
    const LossStats<A> found = LossStats<A>::of(class_weights, weight, 1.0);
    if (blockIdx.x == 0 && threadIdx.x == 0) *denominator = found.denominator;
    return found;
  }

  __device__ void write_loss(int64_t row, A loss) const {
    if (row_losses) row_losses[row] = loss;
    if (narrow_row_losses) narrow_row_losses[row] = narrow<T>(loss);
  }

  // By a whole block: its threads' shares of the sum.
  __device__ void write_partial(double loss) const {
    if (!partial_losses) return;
    loss = block_sum(loss);
    if (threadIdx.x == 0) partial_losses[blockIdx.x] = loss;
  }

  template <typename Index>
  __device__ void ignore_row(int64_t row, Index first, Index step) const {
    if (first == 0) write_loss(row, A(0));
    for (int64_t c = first; c < target.classes && gradient; c += step) gradient[row * target.classes + c] = narrow<Saved<T>>(0);
  }
};

// weights[block]: what its share of the rows adds to the denominator. kLossThreads threads, at most kMaxWeightParts blocks.
template <typename A>
__global__ void __launch_bounds__(kLossThreads)
    mixed_weight_kernel(double* weights, const __grid_constant__ Target<A> target, int64_t rows) {
  const int64_t parts = gridDim.x, each = (rows + parts - 1) / parts, first = blockIdx.x * each;
  const double weight = row_weight_sum(target, first, min(first + each, rows));
  if (threadIdx.x == 0) weights[blockIdx.x] = weight;
}

// Up to kWarpColumns classes: a warp takes row after row, held in registers from loss to gradient. kSpan columns are one
// access: 16 bytes where all rows are aligned so, else 1. kUniform: there is label smoothing.
// Bytes: N C (sizeof(T) + sizeof(Saved<T>)) over 4.8 TB/s, 0.9 us at 1024 x 1000 in bfloat16. Operations: an exponential
// and about 10 more an element over 34e12, 0.4 us. Latency: one read of the row, that of the targets beside it, two warp
// reductions, one write: some 3 us, which the small sizes are bound by.
template <typename T, int kSpan, bool kUniform>
__global__ void __launch_bounds__(kLossThreads) mixed_cross_entropy_kernel(const __grid_constant__ MixedParams<T> p) {
  using A = Acc<T>;
  constexpr int kSpans = kLaneColumns<A> / kSpan;
  const int lane = threadIdx.x % kWarp, classes = int(p.target.classes), warps = blockDim.x / kWarp;
  const int64_t first = int64_t(blockIdx.x) * warps + threadIdx.x / kWarp, step = int64_t(gridDim.x) * warps;
  LossStats<A> stats;
  double total = 0;
  for (int64_t index = first; index == first || index < p.rows; index += step) {
    const bool exists = index < p.rows;
    const T* logits = p.logits + (exists ? index : 0) * p.stride;
    Vector<T, kSpan> read[kSpans];
#pragma unroll
    for (int j = 0; j < kSpans; ++j) {
      const int c = (j * kWarp + lane) * kSpan;
      if (c < classes && exists) read[j] = load<T, kSpan>(logits + c);
    }
    if (index == first) stats = p.stats();  // while the row is on its way
    if (!exists) break;

    const RowGoal<A> row(p.target, index, stats.class_weight_sum);
    if (!row.goal.counts) {  // whatever its logits are
      p.ignore_row(index, lane, kWarp);
      continue;
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
          const A weight = p.target.column(index, c + i);
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
    if (lane == 0) {
      const A loss = row.loss(sums);
      p.write_loss(index, loss);
      total += double(loss);
    }
    if (!p.gradient) continue;
    Saved<T>* gradient = p.gradient + index * classes;
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
  p.write_partial(total);
}

// Any number of classes: a block takes row after row, each read once for the loss and, from L1 or L2, once more for the
// gradient. Bytes: N C (sizeof(T) + sizeof(Saved<T>)) over 4.8 TB/s. Operations: two exponentials and about 40 more an
// element.
template <typename T, int kSpan>
__global__ void __launch_bounds__(kLossThreads)
    mixed_cross_entropy_wide_kernel(const __grid_constant__ MixedParams<T> p) {
  using A = Acc<T>;
  __shared__ Part<A> parts[kLossWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t classes = p.target.classes, stretch = int64_t(blockDim.x) * kSpan;
  const LossStats<A> stats = p.stats();
  double total = 0;
  for (int64_t index = blockIdx.x; index < p.rows; index += gridDim.x) {
    const T* logits = p.logits + index * p.stride;
    const RowGoal<A> row(p.target, index, stats.class_weight_sum);
    if (!row.goal.counts) {
      p.ignore_row(index, threadIdx.x, blockDim.x);
      continue;
    }
    const bool uniform = row.goal.uniform != 0;
    Part<A> part;
#pragma unroll 2
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
          const A weight = p.target.column(index, c + i);
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
    __syncthreads();  // the row before may still be read
    if (lane == 0) parts[warp] = part;
    __syncthreads();
    Part<A> all = parts[0];
    for (int i = 1; i < int(blockDim.x) / kWarp; ++i) all.add(parts[i]);
    const RowSums<A> sums{widen(logits[row.goal.a]), widen(logits[row.goal.b]), all.shift(), all.sum, all.dot, all.weight};
    if (threadIdx.x == 0) {
      const A loss = row.loss(sums);
      p.write_loss(index, loss);
      total += double(loss);
    }
    if (!p.gradient) continue;
    Saved<T>* gradient = p.gradient + index * classes;
    const A times = row.total(sums) / sums.sum * stats.gradient_factor;
#pragma unroll 2
    for (int64_t c = threadIdx.x * kSpan; c < classes; c += stretch) {
      const Vector<T, kSpan> z = load<T, kSpan>(logits + c);
      Vector<A, kSpan> g;
#pragma unroll
      for (int i = 0; i < kSpan; ++i) g.v[i] = exponential(widen(z.v[i]) - sums.shift) * times;
      row.template subtract<true>(g, int(c), stats.gradient_factor);
      store_span(gradient + c, g);
    }
  }
  p.write_partial(total);
}

// The sum of the blocks' losses over *denominator, to one of `loss` and `narrow_loss`. One block.
template <typename T>
__global__ void __launch_bounds__(kLossThreads)
    mixed_loss_kernel(const double* partials, int count, const Acc<T>* denominator, Acc<T>* loss, T* narrow_loss) {
  double sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += partials[i];
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  const Acc<T> value = Acc<T>(sum / double(*denominator));
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
