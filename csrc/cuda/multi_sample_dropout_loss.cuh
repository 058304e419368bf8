// The head's losses: the targets, cross-entropy with its gradient from the logits, and the sums over the rows.
#pragma once

#include "cuda/loss.cuh"
#include "cuda/multi_sample_dropout_samples.cuh"

namespace pyrx::cuda {

template <typename A>
struct StatsParams {
  LossStats<A>* stats;  // or null: they are made already
  Target<A> target;
  int64_t rows;         // B
  bool mean;
  double losses_a_row, largest_scale;
};

// By one block.
template <typename A>
__device__ void head_stats(const StatsParams<A>& p) {
  const double class_weights = class_weight_sum(p.target);
  const double weight = p.mean && !p.target.probabilities ? row_weight_sum(p.target, 0, p.rows) : double(p.rows);
  if (threadIdx.x == 0) *p.stats = LossStats<A>::of(class_weights, p.losses_a_row * (p.mean ? weight : 1.0), p.largest_scale);
}

// Columns of Z and G a lane takes at once, and how many such spans a warp's registers hold of one row.
constexpr int kSpan = 4;
template <typename A>
constexpr int kHeld = sizeof(A) == 8 ? 4 : 8;
template <typename A>
constexpr int kHeldColumns = kWarp * kSpan * kHeld<A>;

template <typename T>
struct CrossEntropyParams {
  const Acc<T>* logits;    // Z (rows * gemm_rows, C), 16-byte aligned rows `stride` apart
  T* gradient;             // G, like Z, or null; Z itself where T is its type
  const T* bias;           // (C), aligned to a span, or null
  const Acc<T>* upstream;  // (B), or null: ones
  const LossStats<Acc<T>>* stats;
  Acc<T>* losses;      // (B, gridDim.y), the sum over the samples of a block; or null
  int64_t first_row;   // of the chunk among the B rows
  int64_t stride;      // C rounded up to a multiple of kSpan at least
  int items;           // of a row: samples, or pairs of them
  Acc<T> largest_scale;
  bool early;          // G holds stats->gradient_factor; float16's range leaves that to float32 afterwards
  Target<Acc<T>> target;
  Slice slice;
  SampleTable table;
};

// What the kernels know of their block's row.
template <typename T>
struct LossRow : RowGoal<Acc<T>> {
  using A = Acc<T>;
  using RowGoal<A>::row;
  static constexpr A kPairedScale = 2;
  const CrossEntropyParams<T>& p;
  int64_t gemm_row;
  LossStats<A> stats;

  __device__ explicit LossRow(const CrossEntropyParams<T>& params)
      : RowGoal<A>(params.target, params.first_row + blockIdx.x, params.stats->class_weight_sum),
        p(params),
        gemm_row(int64_t(blockIdx.x) * p.slice.plan.gemm_rows),
        stats(*p.stats) {}

  __device__ const A* raw(int item) const { return p.logits + (gemm_row + item) * p.stride; }
  __device__ const A* base() const { return raw(int(p.slice.plan.gemm_rows) - 1); }
  __device__ T* gradient(int item) const { return p.gradient + (gemm_row + item) * p.stride; }
  __device__ T* base_gradient() const { return gradient(int(p.slice.plan.gemm_rows) - 1); }

  template <bool kPaired>
  __device__ A scale(int item) const {
    if (kPaired) return kPairedScale;
    return p.slice.plan.averaged ? A(1) : scale_of<A>(p.table.mask(p.slice.first + item));
  }
  // What makes G's row of an item from the gradient of its logits: the largest scale is in gradient_factor.
  template <bool kPaired>
  __device__ A factor(int item) const {
    const A common = (p.early ? stats.gradient_factor : A(1)) * (p.upstream ? p.upstream[row] : A(1));
    return p.slice.plan.averaged ? common : common * (scale<kPaired>(item) / p.largest_scale);
  }

  // A lane's logits of an item from column c on, of the odd one of a pair too; -inf beyond the classes.
  template <int kEach>
  __device__ void finish(Vector<A, kSpan> (&z)[kEach], A scale, int c) const {
    const int left = int(p.target.classes) - c;
    Vector<T, kSpan> bias{};
    if (p.bias && left >= kSpan) bias = load<T, kSpan>(p.bias + c);
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      if (p.bias && left < kSpan && i < left) bias.v[i] = p.bias[c + i];
      if (kEach == 2) z[kEach - 1].v[i] -= z[0].v[i];
#pragma unroll
      for (int s = 0; s < kEach; ++s) z[s].v[i] = z[s].v[i] * scale + widen(bias.v[i]);
    }
    if (left >= kSpan) return;  // so that most spans are spared the comparisons
#pragma unroll
    for (int i = 0; i < kSpan; ++i)
#pragma unroll
      for (int s = 0; s < kEach; ++s)
        if (i >= left) z[s].v[i] = -INFINITY;
  }

  // The logit of a class, for a sample s of an item.
  __device__ A logit(int item, int s, A scale, int64_t c) const {
    const A value = s == 0 ? raw(item)[c] : base()[c] - raw(item)[c];
    return value * scale + (p.bias ? widen(p.bias[c]) : A(0));
  }

  // An ignored row counts nothing, whatever its logits are.
  __device__ void ignore(A* loss) const {
    if (loss && threadIdx.x == 0 && p.slice.first == 0) *loss = 0;
    if (!p.gradient || blockIdx.y != 0) return;
    T* to = gradient(0);
    for (int64_t i = threadIdx.x; i < p.slice.plan.gemm_rows * p.stride; i += blockDim.x) to[i] = narrow<T>(0);
  }
};

// Adds the warps' losses (their lane 0's) to the row's.
template <typename A>
__device__ inline void add_losses(A* row_loss, A loss, bool first) {
  __shared__ A losses[kWarps];
  if (!row_loss) return;
  if (threadIdx.x % kWarp == 0) losses[threadIdx.x / kWarp] = loss;
  __syncthreads();
  if (threadIdx.x != 0) return;
  A sum = first ? A(0) : *row_loss;
  for (int i = 0; i < int(blockDim.x) / kWarp; ++i) sum += losses[i];
  *row_loss = sum;
}

// Up to kHeldColumns classes. A block has a row, or gridDim.y of them its samples where they are not paired; a warp
// takes item after item, all of a GEMM row in its registers from loss to gradient, so that it waits for no other. An
// item is a sample, or where kPaired a pair, whose odd one has the logits scale * (base - raw) + bias, base being the
// row's last GEMM row. kUniform: ClassTarget::uniform is not always 0.
// Bytes: rows K C (4 + sizeof(T)) over 4.8 TB/s, 2.6 us at 256 rows, K = 8, C = 1000, bfloat16, less where Z is still
// in L2. Operations: an exponential and about 20 more an element over 34e12, 1.5 us.
template <typename T, bool kPaired, bool kUniform>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 || kPaired ? 1 : kUniform ? 2 : 3)
    cross_entropy_kernel(const __grid_constant__ CrossEntropyParams<T> p) {
  using A = Acc<T>;
  using Span = Vector<A, kSpan>;
  constexpr int kEach = kPaired ? 2 : 1;
  const LossRow<T> row(p);
  const int classes = int(p.target.classes), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp, columns = (classes + kSpan - 1) / kSpan;  // in spans
  A* row_loss = p.losses ? p.losses + row.row * gridDim.y + blockIdx.y : nullptr;
  if (!row.goal.counts) return row.ignore(row_loss);

  A loss = 0;
  Span odd_sum[kPaired ? kHeld<A> : 1] = {};
  for (int item = blockIdx.y * warps + warp; item < p.items; item += gridDim.y * warps) {
    const A scale = row.template scale<kPaired>(item), factor = row.template factor<kPaired>(item);
    const A* raw = row.raw(item);
    const bool has_odd = kPaired && 2 * item + 1 < p.slice.plan.samples;
    Span z[kHeld<A>][kEach];
#pragma unroll
    for (int j = 0; j < kHeld<A>; ++j) {
      const int span = j * kWarp + lane;
      z[j][0] = span < columns ? load<A, kSpan>(raw + span * kSpan) : Span{};
      if constexpr (kPaired) z[j][1] = span < columns ? load<A, kSpan>(row.base() + span * kSpan) : Span{};
    }
    A peak[kEach];
    RowSums<A> sums[kEach];
#pragma unroll
    for (int s = 0; s < kEach; ++s) {
      peak[s] = -INFINITY;
      // before any lane may have written G over Z
      sums[s].a = row.logit(item, s, scale, row.goal.a);
      sums[s].b = row.logit(item, s, scale, row.goal.b);
    }
#pragma unroll
    for (int j = 0; j < kHeld<A>; ++j) {
      row.template finish<kEach>(z[j], scale, (j * kWarp + lane) * kSpan);
#pragma unroll
      for (int s = 0; s < kEach; ++s)
#pragma unroll
        for (int i = 0; i < kSpan; ++i) peak[s] = fmax(peak[s], z[j][s].v[i]);
    }
    A times[kEach];
#pragma unroll
    for (int s = 0; s < kEach; ++s) {
      peak[s] = warp_max(peak[s]);
      sums[s].shift = peak[s] == -INFINITY ? A(0) : peak[s];
#pragma unroll
      for (int j = 0; j < kHeld<A>; ++j) {
#pragma unroll
        for (int i = 0; i < kSpan; ++i) {
          A& value = z[j][s].v[i];
          value -= sums[s].shift;
          if constexpr (kUniform) {
            const int c = (j * kWarp + lane) * kSpan + i;
            if (c < classes) {
              const A weight = p.target.column(row.row, c);
              sums[s].dot += weight * value;
              sums[s].weight += weight;
            }
          }
          sums[s].sum += value = exponential(value);
        }
      }
      sums[s].sum = warp_sum(sums[s].sum);
      if constexpr (kUniform) {
        sums[s].dot = warp_sum(sums[s].dot);
        sums[s].weight = warp_sum(sums[s].weight);
      }
      times[s] = row.total(sums[s]) / sums[s].sum * factor;
      if (lane == 0 && (s == 0 || has_odd)) loss += row.loss(sums[s]);
    }
    if (!p.gradient) continue;
    __syncwarp();  // lane 0 has read the logits that others may write G over
    // an odd sample's gradient goes to the base row and, negated, to the even one, where the targets of the two cancel
    T* gradient = row.gradient(item);
#pragma unroll
    for (int j = 0; j < kHeld<A>; ++j) {
      const int span = j * kWarp + lane;
      if (span >= columns) break;
      Span g;
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        g.v[i] = z[j][0].v[i] * times[0];
        if (has_odd) {
          const A odd = z[j][kEach - 1].v[i] * times[kEach - 1];
          g.v[i] -= odd;
          odd_sum[kPaired ? j : 0].v[i] += odd;
        }
      }
      if (!has_odd) row.template subtract<kUniform>(g, span * kSpan, factor);
      store_span(gradient + span * kSpan, g);
    }
  }
  if (kPaired && p.gradient) {
    __shared__ Span odd_sums[kWarps][kWarp];
    const A factor = row.template factor<true>(0) * A(p.slice.plan.samples / 2);
#pragma unroll
    for (int j = 0; j < (kPaired ? kHeld<A> : 0); ++j) {  // a stretch of kWarp spans after the other
      if (j * kWarp >= columns) break;
      odd_sums[warp][lane] = odd_sum[j];
      __syncthreads();
      const int span = j * kWarp + lane;
      if (warp == j % warps && span < columns) {
        Span sum = odd_sums[0][lane];
        for (int other = 1; other < warps; ++other)
#pragma unroll
          for (int i = 0; i < kSpan; ++i) sum.v[i] += odd_sums[other][lane].v[i];
        row.template subtract<kUniform>(sum, span * kSpan, factor);
        store_span(row.base_gradient() + span * kSpan, sum);
      }
      __syncthreads();
    }
  }
  add_losses(row_loss, loss, p.slice.first == 0);
}

// Any number of classes: a block has a row, or gridDim.y of them its items where they are not paired; all its threads
// share an item, whose logits are read once for the loss and once more for the gradient.
// Bytes: rows K C (8 + sizeof(T)) over 4.8 TB/s. Operations: two exponentials and about 60 more an element.
template <typename T, bool kPaired>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_wide_kernel(const __grid_constant__ CrossEntropyParams<T> p) {
  using A = Acc<T>;
  using Span = Vector<A, kSpan>;
  constexpr int kEach = kPaired ? 2 : 1;
  __shared__ Part<A> parts[kWarps][kEach];
  __shared__ A shifts[kSliceSamples], rates[kSliceSamples];
  const LossRow<T> row(p);
  const int classes = int(p.target.classes), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int stretch = blockDim.x * kSpan;
  const bool uniform = p.target.probabilities || row.goal.uniform != 0;
  A* row_loss = p.losses ? p.losses + row.row * gridDim.y + blockIdx.y : nullptr;
  if (!row.goal.counts) return row.ignore(row_loss);

  const auto read = [&](int item, Span(&z)[kEach], int c) {
    z[0] = c < classes ? load<A, kSpan>(row.raw(item) + c) : Span{};
    if constexpr (kPaired) z[1] = c < classes ? load<A, kSpan>(row.base() + c) : Span{};
    row.template finish<kEach>(z, row.template scale<kPaired>(item), c);
  };

  A loss = 0;
  for (int item = blockIdx.y; item < p.items; item += gridDim.y) {
    Part<A> part[kEach];
#pragma unroll 2
    for (int c = threadIdx.x * kSpan; c < classes; c += stretch) {
      Span z[kEach];
      read(item, z, c);
#pragma unroll
      for (int s = 0; s < kEach; ++s) {
        Part<A> mine;
#pragma unroll
        for (int i = 0; i < kSpan; ++i) mine.peak = fmax(mine.peak, z[s].v[i]);
#pragma unroll
        for (int i = 0; i < kSpan; ++i) {
          const A value = z[s].v[i] - mine.shift();
          mine.sum += exponential(value);
          if (uniform && c + i < classes) {
            const A weight = p.target.column(row.row, c + i);
            mine.dot += weight * value;
            mine.weight += weight;
          }
        }
        part[s].add(mine);
      }
    }
#pragma unroll
    for (int s = 0; s < kEach; ++s) {
#pragma unroll 1
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        part[s].add({__shfl_xor_sync(kAllLanes, part[s].peak, offset), __shfl_xor_sync(kAllLanes, part[s].sum, offset),
                     __shfl_xor_sync(kAllLanes, part[s].dot, offset),
                     __shfl_xor_sync(kAllLanes, part[s].weight, offset)});
      }
      if (lane == 0) parts[warp][s] = part[s];
    }
    __syncthreads();
    for (int s = 0; s < kEach && threadIdx.x == 0 && item * kEach + s < p.slice.plan.samples; ++s) {
      Part<A> all = parts[0][s];
      for (int i = 1; i < int(blockDim.x) / kWarp; ++i) all.add(parts[i][s]);
      const A scale = row.template scale<kPaired>(item);
      const RowSums<A> sums{row.logit(item, s, scale, row.goal.a), row.logit(item, s, scale, row.goal.b),
                                           all.shift(), all.sum, all.dot, all.weight};
      loss += row.loss(sums);
      shifts[item * kEach + s] = sums.shift;
      rates[item * kEach + s] = row.total(sums) / sums.sum;
    }
    __syncthreads();
  }
  for (int c = threadIdx.x * kSpan; c < classes && p.gradient; c += stretch) {
    Span odd_sum{};
    for (int item = blockIdx.y; item < p.items; item += gridDim.y) {
      const A factor = row.template factor<kPaired>(item);
      const bool has_odd = kPaired && 2 * item + 1 < p.slice.plan.samples;
      Span z[kEach], g;
      read(item, z, c);
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        g.v[i] = exponential(z[0].v[i] - shifts[item * kEach]) * rates[item * kEach] * factor;
        if (has_odd) {
          const A odd = exponential(z[kEach - 1].v[i] - shifts[2 * item + 1]) * rates[2 * item + 1] * factor;
          g.v[i] -= odd;
          odd_sum.v[i] += odd;
        }
      }
      if (!has_odd) row.template subtract<true>(g, c, factor);
      store_span(row.gradient(item) + c, g);
    }
    if constexpr (kPaired) {
      row.template subtract<true>(odd_sum, c, row.template factor<true>(0) * A(p.slice.plan.samples / 2));
      store_span(row.base_gradient() + c, odd_sum);
    }
  }
  add_losses(row_loss, loss, p.slice.first == 0);
}

// What takes a row of G back to the gradient of the bias: the dropout scale out, a paired base row for both of a pair.
template <typename A>
__device__ inline A bias_share(const Slice& slice, const SampleTable& table, int64_t k) {
  if (slice.plan.averaged || (slice.plan.paired && k == slice.plan.gemm_rows - 1)) return A(1);
  return A(1) / scale_of<A>(table.mask(slice.first + slice.plan.mask_of(k)));
}

template <typename T>
struct BiasParams {
  const T* gradient;        // G (gemm_rows, C), 16-byte aligned rows `stride` apart
  Acc<T>* partials;         // (parts, C), set where first, else added to; or null: no bias gradient
  unsigned gemm_rows, parts;
  int64_t classes, stride;  // stride a multiple of kGroup
  bool first;
  Slice slice;
  SampleTable table;

  static constexpr int kColumns = kWarp * (16 / int(sizeof(T)));  // of a block

  __host__ __device__ unsigned tiles() const { return unsigned((classes + kColumns - 1) / kColumns); }
};

// By block `index` of tiles * parts: the sum of its columns over its rows of G. Bytes: G once, from L2; operations: two
// an element.
template <typename T>
__device__ void sum_bias(const BiasParams<T>& p, unsigned index) {
  using A = Acc<T>;
  constexpr int kEach = 16 / sizeof(T);
  __shared__ Vector<A, kEach> sums[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned part = index / p.tiles(), per_row = unsigned(p.slice.plan.gemm_rows);
  const int64_t tile = int64_t(index % p.tiles()) * p.kColumns, c = tile + lane * kEach;
  const unsigned from = unsigned(uint64_t(p.gemm_rows) * part / p.parts);
  const unsigned to = unsigned(uint64_t(p.gemm_rows) * (part + 1) / p.parts);
  const bool same = p.table.uniform && !p.slice.plan.paired;  // all rows have one share
  const A common = same ? bias_share<A>(p.slice, p.table, 0) : A(0);
  Vector<A, kEach> sum = {};
#pragma unroll 8
  for (unsigned row = from + warp; row < to && c < p.classes; row += kWarps) {
    const Vector<T, kEach> g = load<T, kEach>(p.gradient + row * p.stride + c);
    const A share = same ? common : bias_share<A>(p.slice, p.table, row % per_row);
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum.v[i] += widen(g.v[i]) * share;
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (int(threadIdx.x) >= p.kColumns || tile + threadIdx.x >= p.classes) return;
  A* to_partial = p.partials + part * p.classes + tile + threadIdx.x;
  A total = p.first ? A(0) : *to_partial;
  for (int i = 0; i < kWarps; ++i) total += sums[i][threadIdx.x / kEach].v[threadIdx.x % kEach];
  *to_partial = total;
}

template <typename T, typename Out>
struct FinishParams {
  using A = Acc<T>;
  const LossStats<A>* stats;
  const A* factor;     // multiplies gradients, or null
  const A* losses;     // (rows, loss_parts) -> `loss` or rounded to `narrow_loss`: (rows) where per_row, else one number
  A* loss;
  T* narrow_loss;
  int64_t rows;
  int loss_parts;
  bool per_row;
  const A* bias_partials;  // (bias_parts, classes) -> bias (classes)
  Out* bias;
  int bias_parts;
  int64_t classes;
  const A* weight_sum;  // (weights) -> weight; may be the same memory
  Out* weight;
  int64_t weights;
  unsigned loss_blocks, bias_blocks, weight_blocks;  // the grid; none where there is nothing to do
};

// The last sums and roundings. Bytes: what is read and written, once; latency-bound but for a weight gradient.
template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ FinishParams<T, Out> p) {
  using A = Acc<T>;
  unsigned block = blockIdx.x;
  if (block < p.loss_blocks) {
    const auto write = [&](int64_t i, A value) {
      if (p.loss)
        p.loss[i] = value;
      else
        p.narrow_loss[i] = narrow<T>(value);
    };
    if (!p.per_row) {
      double sum = 0;
      const int64_t count = p.rows * p.loss_parts;
#pragma unroll 2
      for (int64_t i = threadIdx.x * kSpan; i < count; i += blockDim.x * kSpan) {
        if (i + kSpan <= count) {
          const Vector<A, kSpan> four = load<A, kSpan>(p.losses + i);
          sum += (double(four.v[0]) + double(four.v[1])) + (double(four.v[2]) + double(four.v[3]));
        } else {
          for (int64_t j = i; j < count; ++j) sum += double(p.losses[j]);
        }
      }
      sum = block_sum(sum);
      if (threadIdx.x == 0) write(0, A(sum / double(p.stats->denominator)));
      return;
    }
    const int64_t row = int64_t(block) * blockDim.x + threadIdx.x;
    if (row >= p.rows) return;
    A sum = 0;
    for (int part = 0; part < p.loss_parts; ++part) sum += p.losses[row * p.loss_parts + part];
    return write(row, sum / p.stats->denominator);
  }
  const A factor = p.factor ? *p.factor : A(1);
  block -= p.loss_blocks;
  if (block < p.bias_blocks) {  // kWarp columns
    __shared__ A sums[kWarps][kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t c = int64_t(block) * kWarp + lane;
    A sum = 0;
#pragma unroll 8
    for (int part = warp; part < p.bias_parts && c < p.classes; part += kWarps)
      sum += p.bias_partials[part * p.classes + c];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || c >= p.classes) return;
    for (int i = 1; i < kWarps; ++i) sum += sums[i][lane];
    p.bias[c] = narrow<Out>(sum * factor);
    return;
  }
  block -= p.bias_blocks;
  const int64_t stride = int64_t(p.weight_blocks) * blockDim.x;
  for (int64_t i = int64_t(block) * blockDim.x + threadIdx.x; i < p.weights; i += stride)
    p.weight[i] = narrow<Out>(p.weight_sum[i] * factor);
}

template <typename T>
struct ScaleParams {
  T* gradients[3];
  int64_t numel[3];
  const Acc<T>* factor;   // one of the two, of one element
  const T* narrow_factor;
};

// Gradients times the upstream gradient, in place; nothing is touched where that is one, as it is for a loss that
// backward() starts from. Bytes: none then, else 2 numel sizeof(T).
template <typename T>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleParams<T> p) {
  const Acc<T> factor = p.factor ? *p.factor : widen(*p.narrow_factor);
  if (factor == 1) return;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
#pragma unroll
  for (int k = 0; k < 3; ++k)
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.numel[k]; i += stride)
      p.gradients[k][i] = narrow<T>(widen(p.gradients[k][i]) * factor);
}

}  // namespace pyrx::cuda
