// The head's losses: the targets, cross-entropy with its gradient from the logits, and the sums over the rows.
#pragma once

#include "cuda/multi_sample_dropout_samples.cuh"

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
struct HeadStats {
  A class_weight_sum;
  A gradient_factor;  // what makes G the loss's gradient: the largest dropout scale over losses a row and denominator
  A denominator;      // what the sum of all samples' losses is divided by
};

template <typename A>
struct StatsParams {
  HeadStats<A>* stats;  // or null: they are made already
  Target<A> target;
  int64_t rows;         // B
  bool mean;
  double losses_a_row, largest_scale;
};

// By one block. Bytes: the targets once; latency-bound, some microseconds up to 10^4 rows.
template <typename A>
__device__ void head_stats(const StatsParams<A>& p) {
  double sum = 0;
  for (int64_t c = threadIdx.x; c < p.target.classes; c += blockDim.x)
    sum += p.target.class_weight ? double(p.target.class_weight[c]) : 1.0;
  const double class_weight_sum = block_sum(sum);
  double weight = 0;
  if (p.mean && !p.target.probabilities) {
#pragma unroll 4
    for (int64_t row = threadIdx.x; row < p.rows; row += blockDim.x)
      weight += double(p.target.row(row, A(class_weight_sum)).weight);
  }
  weight = block_sum(weight);
  if (threadIdx.x != 0) return;
  const double denominator = p.losses_a_row * (!p.mean ? 1.0 : p.target.probabilities ? double(p.rows) : weight);
  // every row ignored: loss nan, gradients 0, as F.cross_entropy has them
  *p.stats = {A(class_weight_sum), A(denominator == 0 ? 0.0 : p.largest_scale / denominator), A(denominator)};
}

// Columns of Z and G a lane takes at once, and how many such spans of a row it holds in registers.
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
  const HeadStats<Acc<T>>* stats;
  Acc<T>* losses;      // (B, gridDim.y), the sum over the samples of a block; or null
  int64_t first_row;   // of the chunk among the B rows
  int64_t stride;      // C rounded up to a multiple of kSpan at least
  Acc<T> largest_scale;
  bool early;          // G holds stats->gradient_factor; float16's range leaves that to float32 afterwards
  Target<Acc<T>> target;
  Slice slice;
  SampleTable table;
};

// Sums of one sample over a part of the columns; sum and dot are relative to shift.
template <typename A>
struct Part {
  A peak, sum, dot, weight;

  __device__ A shift() const { return peak == -INFINITY ? A(0) : peak; }
};

// A lane's column spans, kWarp * kSpan columns apart, in a stretch of kHeldColumns of a row.
template <typename A>
struct Held {
  Vector<A, kSpan> spans[kHeld<A>];
};

// The column of a lane's span j in the stretch that begins at `start`.
__device__ inline int span_column(int start, int j) { return start + (j * kWarp + int(threadIdx.x) % kWarp) * kSpan; }

// Whether any lane's span j has columns before `end`.
__device__ inline bool reaches(int start, int j, int end) { return start + j * kWarp * kSpan < end; }

template <typename A>
__device__ inline void load_spans(const A* row, Held<A>& z, int start, int end) {
#pragma unroll
  for (int j = 0; j < kHeld<A>; ++j) {
    const int c = span_column(start, j);
    z.spans[j] = c < end ? load<A, kSpan>(row + c) : Vector<A, kSpan>{};
  }
}

// raw logits -> z = scale * raw + bias; -inf from column `end` on.
template <typename T>
__device__ inline void finish_logits(const T* bias_at, Held<Acc<T>>& z, Acc<T> scale, int start, int end) {
#pragma unroll
  for (int j = 0; j < kHeld<Acc<T>>; ++j) {
    if (!reaches(start, j, end)) break;
    const int c = span_column(start, j), left = end - c;
    Vector<T, kSpan> bias;
    if (bias_at && left >= kSpan) {
      bias = load<T, kSpan>(bias_at + c);
    } else {
#pragma unroll
      for (int i = 0; i < kSpan; ++i) bias.v[i] = bias_at && left > i ? bias_at[c + i] : narrow<T>(0);
    }
#pragma unroll
    for (int i = 0; i < kSpan; ++i)
      z.spans[j].v[i] = left > i ? z.spans[j].v[i] * scale + widen(bias.v[i]) : Acc<T>(-INFINITY);
  }
}

// Takes a stretch of logits into `part`, whose sum, dot and weight are the lane's own; z becomes exp(z - part.shift()).
template <typename A>
__device__ inline void take(Part<A>& part, Held<A>& z, const Target<A>& target, int64_t row, bool uniform, int start,
                            int end) {
  A peak = part.peak;
#pragma unroll
  for (int j = 0; j < kHeld<A>; ++j) {
    if (!reaches(start, j, end)) break;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) peak = fmax(peak, z.spans[j].v[i]);
  }
  const Part<A> before = part;
  part.peak = warp_max(peak);
  const A shift = part.shift();
  if (before.peak != -INFINITY) part.sum *= exponential(before.peak - shift);
  if (uniform) {
    part.dot += (before.shift() - shift) * before.weight;
#pragma unroll
    for (int j = 0; j < kHeld<A>; ++j) {
      const int c = span_column(start, j);
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        if (c + i >= end) break;
        const A weight = target.column(row, c + i);
        part.dot += weight * (z.spans[j].v[i] - shift);
        part.weight += weight;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kHeld<A>; ++j) {
    if (!reaches(start, j, end)) break;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) part.sum += z.spans[j].v[i] = exponential(z.spans[j].v[i] - shift);
  }
}

template <typename A>
__device__ inline void exponentials(Held<A>& z, A shift, int start, int end) {
#pragma unroll
  for (int j = 0; j < kHeld<A>; ++j) {
    if (!reaches(start, j, end)) break;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) z.spans[j].v[i] = exponential(z.spans[j].v[i] - shift);
  }
}

template <typename T>
__device__ inline void store_span(T* to, const Vector<Acc<T>, kSpan>& value) {
  Vector<T, kSpan> narrowed;
#pragma unroll
  for (int i = 0; i < kSpan; ++i) narrowed.v[i] = narrow<T>(value.v[i]);
  store(to, narrowed);
}

// A block takes a part of the samples of one row (gridDim.y parts; one where they are paired). An item is a sample, or
// where kPaired a pair of them, whose odd one has the logits scale * (base - raw) + bias, base being the row's last GEMM
// row. The warps share the items, or where there are fewer samples than warps, the columns of each. Up to kHeldColumns
// classes stay in registers between loss and gradient; wider rows are read again.
// Bytes: rows K C (4 + sizeof(T)) over 4.8 TB/s, 2.6 us at 256 rows, K = 8, C = 1000, bfloat16, less where Z is still
// in L2. Operations: an exponential and about 20 more an element over 34e12, 1.5 us.
template <typename T, bool kPaired>
__global__ void __launch_bounds__(kThreads, kPaired || sizeof(T) == 8 ? 1 : 2)
    cross_entropy_kernel(const __grid_constant__ CrossEntropyParams<T> p) {
  using A = Acc<T>;
  constexpr int kEach = kPaired ? 2 : 1;  // samples an item
  constexpr A kPairedScale = 2;
  constexpr int kStretch = kHeldColumns<A>;
  __shared__ Part<A> parts[kSliceSamples];
  __shared__ A peaks[kSliceSamples], rates[kSliceSamples], losses[kSliceSamples];
  const SamplePlan& plan = p.slice.plan;
  const int classes = int(p.target.classes);
  const int64_t row = p.first_row + blockIdx.x, gemm_row = int64_t(blockIdx.x) * plan.gemm_rows;
  const unsigned all = plan.averaged ? 1 : unsigned(plan.samples);
  const int begin = all * blockIdx.y / gridDim.y, count = int(all * (blockIdx.y + 1) / gridDim.y) - begin;
  if (count == 0) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const HeadStats<A> stats = *p.stats;
  const ClassTarget<A> goal = p.target.row(row, stats.class_weight_sum);
  const bool dense = p.target.probabilities != nullptr, uniform = dense || goal.uniform != 0;
  A* loss = p.losses ? p.losses + row * gridDim.y + blockIdx.y : nullptr;

  if (!goal.counts) {  // nothing, whatever the logits are
    if (loss && threadIdx.x == 0 && p.slice.first == 0) *loss = 0;
    if (p.gradient) {
      const int64_t gemm_rows = kPaired ? plan.gemm_rows : count;
      T* to = p.gradient + (gemm_row + begin) * p.stride;
      for (int64_t i = threadIdx.x; i < gemm_rows * p.stride; i += blockDim.x) to[i] = narrow<T>(0);
    }
    return;
  }

  const int items = (count + kEach - 1) / kEach;
  const int pieces = kPaired || count >= warps ? 1 : warps / count;  // of an item's columns
  const int piece_columns = (classes + pieces * kSpan - 1) / (pieces * kSpan) * kSpan;
  const A* raw_rows = p.logits + (gemm_row + begin) * p.stride;
  const A* base_row = p.logits + (gemm_row + plan.gemm_rows - 1) * p.stride;
  const auto scale = [&](int local) {
    return plan.averaged ? A(1) : scale_of<A>(p.table.mask(p.slice.first + begin + local));
  };
  // logits [start, end) of an item's samples
  const auto read = [&](int item, Held<A>(&z)[kEach], int start, int end) {
    load_spans(raw_rows + item * p.stride, z[0], start, end);
    if constexpr (kPaired) {
      load_spans(base_row, z[1], start, end);
#pragma unroll
      for (int j = 0; j < kHeld<A>; ++j)
#pragma unroll
        for (int i = 0; i < kSpan; ++i) z[1].spans[j].v[i] -= z[0].spans[j].v[i];
      finish_logits(p.bias, z[1], kPairedScale, start, end);
    }
    finish_logits(p.bias, z[0], kPaired ? kPairedScale : scale(item), start, end);
  };

  Held<A> z[kEach];
  for (int unit = warp; unit < items * pieces; unit += warps) {
    const int item = unit / pieces;
    const int from = unit % pieces * piece_columns, to = min(from + piece_columns, classes);
    Part<A> part[kEach];
#pragma unroll
    for (int s = 0; s < kEach; ++s) part[s] = {A(-INFINITY), A(0), A(0), A(0)};
    for (int start = from; start < to; start += kStretch) {
      read(item, z, start, to);
#pragma unroll
      for (int s = 0; s < kEach; ++s) take(part[s], z[s], p.target, row, uniform, start, to);
    }
#pragma unroll
    for (int s = 0; s < kEach; ++s) {
      part[s].sum = warp_sum(part[s].sum);
      if (uniform) {
        part[s].dot = warp_sum(part[s].dot);
        part[s].weight = warp_sum(part[s].weight);
      }
      if (lane == 0 && unit * kEach + s < kSliceSamples) parts[unit * kEach + s] = part[s];
    }
  }
  const bool held = items * pieces <= warps && piece_columns <= kStretch;  // z is what the gradient needs
  __syncthreads();

  if (int(threadIdx.x) < count) {
    const int local = threadIdx.x;
    const Part<A>* mine = parts + local * pieces;
    A peak = -INFINITY, sum = 0, dot = 0, weight = 0;
    for (int i = 0; i < pieces; ++i) peak = fmax(peak, mine[i].peak);
    for (int i = 0; i < pieces; ++i) {
      sum += mine[i].sum * (mine[i].peak == peak ? A(1) : std::exp(mine[i].peak - peak));
      dot += mine[i].dot + (mine[i].shift() - peak) * mine[i].weight;
      weight += mine[i].weight;
    }
    const A* raw = raw_rows + local / kEach * p.stride;
    const auto logit = [&](int64_t c) {
      const A value = kPaired && local % 2 ? base_row[c] - raw[c] : raw[c];
      return value * scale(local) + (p.bias ? widen(p.bias[c]) : A(0));
    };
    const A total = dense ? weight : goal.total;
    A value = total * std::log(sum);
    if (goal.a_coefficient != 0) value -= goal.a_coefficient * (logit(goal.a) - peak);
    if (goal.b_coefficient != 0) value -= goal.b_coefficient * (logit(goal.b) - peak);
    if (uniform) value -= goal.uniform * dot;
    peaks[local] = peak;
    rates[local] = total / sum;
    losses[local] = value;
  }
  __syncthreads();

  if (loss && threadIdx.x == 0) {
    A sum = p.slice.first == 0 ? A(0) : *loss;
    for (int i = 0; i < count; ++i) sum += losses[i];
    *loss = sum;
  }
  if (!p.gradient) return;

  // scales other than the largest, which is in gradient_factor, come in `relative`
  const A factor = (p.early ? stats.gradient_factor : A(1)) * (p.upstream ? p.upstream[row] : A(1));
  T* gradients = p.gradient + (gemm_row + begin) * p.stride;
  const int a = int(goal.a), b = int(goal.b);
  // g -= times * target's part of the gradient
  const auto subtract_target = [&](Vector<A, kSpan>& g, int c, A times) {
    if (uniform) {
#pragma unroll
      for (int i = 0; i < kSpan; ++i)
        if (c + i < classes) g.v[i] -= times * goal.uniform * p.target.column(row, c + i);
    }
    if (unsigned(a - c) >= kSpan && unsigned(b - c) >= kSpan) return;
#pragma unroll
    for (int i = 0; i < kSpan; ++i)
      g.v[i] -= times * ((c + i == a ? goal.a_coefficient : A(0)) + (c + i == b ? goal.b_coefficient : A(0)));
  };
  // what makes softmax times the row's total of the exponentials that take() or exponentials() left
  const auto rate = [&](int local, const Part<A>& part) {
    if (part.peak == peaks[local]) return rates[local];
    return (part.peak == -INFINITY ? A(0) : std::exp(part.peak - peaks[local])) * rates[local];
  };
  if constexpr (!kPaired) {
    for (int unit = warp; unit < items * pieces; unit += warps) {
      const int item = unit / pieces;
      const Part<A> part = parts[unit];
      const A relative = factor * (plan.averaged ? A(1) : scale(item) / p.largest_scale);
      const A times = rate(item, part) * relative;
      T* gradient = gradients + item * p.stride;
      const int from = unit % pieces * piece_columns, to = min(from + piece_columns, classes);
      for (int start = from; start < to; start += kStretch) {
        if (!held) {
          read(item, z, start, to);
          exponentials(z[0], part.shift(), start, to);
        }
#pragma unroll
        for (int j = 0; j < kHeld<A>; ++j) {
          const int c = span_column(start, j);
          if (c >= to) break;
          Vector<A, kSpan> g;
#pragma unroll
          for (int i = 0; i < kSpan; ++i) g.v[i] = z[0].spans[j].v[i] * times;
          subtract_target(g, c, relative);
          store_span(gradient + c, g);
        }
      }
    }
  } else {
    // an odd sample's logits are base - even: its gradient goes to the base row and, negated, to the even one, where
    // the targets of the two cancel
    __shared__ Vector<A, kSpan> odd_sums[kWarps][kStretch / kSpan];
    const A relative = factor * (kPairedScale / p.largest_scale);
    for (int start = 0; start < classes; start += kStretch) {
      Held<A> odd_sum = {};
      for (int pair = warp; pair < items; pair += warps) {
        const bool has_odd = 2 * pair + 1 < count;
        const Part<A> even_part = parts[2 * pair], odd_part = parts[2 * pair + has_odd];
        if (!held) {
          read(pair, z, start, classes);
          exponentials(z[0], even_part.shift(), start, classes);
          exponentials(z[1], odd_part.shift(), start, classes);
        }
        const A even_times = rate(2 * pair, even_part) * relative;
        const A odd_times = rate(2 * pair + has_odd, odd_part) * relative;
        T* gradient = gradients + pair * p.stride;
#pragma unroll
        for (int j = 0; j < kHeld<A>; ++j) {
          const int c = span_column(start, j);
          if (c >= classes) break;
          Vector<A, kSpan> g;
#pragma unroll
          for (int i = 0; i < kSpan; ++i) g.v[i] = z[0].spans[j].v[i] * even_times;
          if (has_odd) {
#pragma unroll
            for (int i = 0; i < kSpan; ++i) {
              const A odd = z[1].spans[j].v[i] * odd_times;
              odd_sum.spans[j].v[i] += odd;
              g.v[i] -= odd;
            }
          } else {
            subtract_target(g, c, relative);
          }
          store_span(gradient + c, g);
        }
      }
#pragma unroll
      for (int j = 0; j < kHeld<A>; ++j) odd_sums[warp][j * kWarp + lane] = odd_sum.spans[j];
      __syncthreads();
      for (int span = threadIdx.x; span < kStretch / kSpan && start + span * kSpan < classes; span += blockDim.x) {
        Vector<A, kSpan> sum = odd_sums[0][span];
        for (int other = 1; other < min(warps, items); ++other)
#pragma unroll
          for (int i = 0; i < kSpan; ++i) sum.v[i] += odd_sums[other][span].v[i];
        subtract_target(sum, start + span * kSpan, relative * A(count / 2));
        store_span(gradients + (plan.gemm_rows - 1) * p.stride + start + span * kSpan, sum);
      }
      __syncthreads();
    }
  }
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
  Vector<A, kEach> sum = {};
#pragma unroll 4
  for (unsigned row = from + warp; row < to && c < p.classes; row += kWarps) {
    const Vector<T, kEach> g = load<T, kEach>(p.gradient + row * p.stride + c);
    const A share = bias_share<A>(p.slice, p.table, row % per_row);
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
  const HeadStats<A>* stats;
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
#pragma unroll 4
      for (int64_t i = threadIdx.x; i < p.rows * p.loss_parts; i += blockDim.x) sum += double(p.losses[i]);
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
#pragma unroll 4
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
