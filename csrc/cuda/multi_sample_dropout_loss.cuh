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

// Columns of Z and G a lane takes at once, and a warp.
constexpr int kSpan = 4;
constexpr int kWarpColumns = kWarp * kSpan;

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
  int pieces;          // warps that share a row: as many as C fills, a power of two
  Acc<T> largest_scale;
  bool early;          // G holds stats->gradient_factor; float16's range leaves that to float32 afterwards
  Target<Acc<T>> target;
  Slice slice;
  SampleTable table;
};

// Sums of one sample over a part of the columns; sum and dot are relative to shift.
template <typename A>
struct Part {
  A peak = -INFINITY, sum = 0, dot = 0, weight = 0;

  __device__ A shift() const { return peak == -INFINITY ? A(0) : peak; }

  // Adds another part, shifting this one where that one's peak is higher.
  __device__ void add(const Part& other) {
    const Part before = *this;
    peak = fmax(peak, other.peak);
    sum = before.sum * exponential(before.peak - shift()) + other.sum * exponential(other.peak - shift());
    dot = before.dot + (before.shift() - shift()) * before.weight + other.dot +
          (other.shift() - shift()) * other.weight;
    weight += other.weight;
  }
};

// The lanes' parts, added up; `uniform`: whether they have dots and weights.
template <typename A>
__device__ inline Part<A> warp_part(const Part<A>& part, bool uniform) {
  Part<A> all;
  all.peak = warp_max(part.peak);
  all.sum = warp_sum(part.sum * exponential(part.peak - all.shift()));
  if (uniform) {
    all.dot = warp_sum(part.dot + (part.shift() - all.shift()) * part.weight);
    all.weight = warp_sum(part.weight);
  }
  return all;
}

// A block takes a part of the samples of one row (gridDim.y parts; one where they are paired), a team of p.pieces warps
// an item: a sample, or where kPaired a pair of them, whose odd one has the logits scale * (base - raw) + bias, base
// being the row's last GEMM row. A lane has one span of columns; only where kWide they do not cover a row, and Z is
// read a second time. Little code, since every warp fetches all of it for few elements.
// Bytes: rows K C (4 + sizeof(T)) over 4.8 TB/s, 2.6 us at 256 rows, K = 8, C = 1000, bfloat16, less where Z is still
// in L2. Operations: an exponential and about 40 more an element over 34e12, 2.5 us.
template <typename T, bool kPaired, bool kWide>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 3)
    cross_entropy_kernel(const __grid_constant__ CrossEntropyParams<T> p) {
  using A = Acc<T>;
  using Span = Vector<A, kSpan>;
  constexpr int kEach = kPaired ? 2 : 1;  // samples an item
  constexpr A kPairedScale = 2;
  // of one item and the next, so that a barrier an item is enough
  __shared__ Part<A> parts[2][kWarps][kEach];
  __shared__ A chosen[2][kWarps][kEach][2];  // the logits of the two classes of a team's row
  __shared__ A team_losses[kWarps];
  const SamplePlan& plan = p.slice.plan;
  const int classes = int(p.target.classes);
  const int64_t row = p.first_row + blockIdx.x, gemm_row = int64_t(blockIdx.x) * plan.gemm_rows;
  const unsigned all = plan.averaged ? 1 : unsigned(plan.samples);
  const int begin = all * blockIdx.y / gridDim.y, count = int(all * (blockIdx.y + 1) / gridDim.y) - begin;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int team = warp / p.pieces, teams = blockDim.x / kWarp / p.pieces;
  const int first_column = (warp % p.pieces * kWarp + lane) * kSpan, stretch = p.pieces * kWarpColumns;
  const bool leads = warp % p.pieces == 0 && lane == 0;
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

  const int items = (count + kEach - 1) / kEach, a = int(goal.a), b = int(goal.b);
  const A* raw_rows = p.logits + (gemm_row + begin) * p.stride;
  const A* base_row = p.logits + (gemm_row + plan.gemm_rows - 1) * p.stride;
  const auto raw_span = [&](const A* row, int c) { return c < classes ? load<A, kSpan>(row + c) : Span{}; };
  const auto bias_span = [&](int c) {
    Span bias{};
    if (p.bias && c + kSpan <= classes) {
      const Vector<T, kSpan> values = load<T, kSpan>(p.bias + c);
#pragma unroll
      for (int i = 0; i < kSpan; ++i) bias.v[i] = widen(values.v[i]);
    } else if (p.bias) {
      for (int i = 0; i < kSpan; ++i)
        if (c + i < classes) bias.v[i] = widen(p.bias[c + i]);
    }
    return bias;
  };
  const auto scale = [&](int item) {
    return kPaired ? kPairedScale : plan.averaged ? A(1) : scale_of<A>(p.table.mask(p.slice.first + begin + item));
  };
  // of sample s of an item; -inf beyond the classes
  const auto logits = [&](const Span& raw, const Span& base, const Span& bias, int s, A scale, int c) {
    Span z;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      const A value = s == 0 ? raw.v[i] : base.v[i] - raw.v[i];
      z.v[i] = c + i < classes ? value * scale + bias.v[i] : A(-INFINITY);
    }
    return z;
  };
  // into a lane's part; z becomes exp(z - part.shift())
  const auto take = [&](Part<A>& part, Span& z, int c) {
    Part<A> mine;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) mine.peak = fmax(mine.peak, z.v[i]);
    if (kWide) mine.peak = fmax(mine.peak, part.peak);
    if (uniform) {
      for (int i = 0; i < kSpan && c + i < classes; ++i) {
        const A weight = p.target.column(row, c + i);
        mine.dot += weight * (z.v[i] - mine.shift());
        mine.weight += weight;
      }
    }
#pragma unroll
    for (int i = 0; i < kSpan; ++i) mine.sum += z.v[i] = exponential(z.v[i] - mine.shift());
    if (kWide) {
      part.add(mine);
    } else {
      part = mine;
    }
  };
  const auto note_chosen = [&](const Span& z, int c, int turn, int s) {
    if (unsigned(a - c) >= kSpan && unsigned(b - c) >= kSpan) return;
    for (int i = 0; i < kSpan; ++i) {
      if (c + i == a) chosen[turn % 2][team][s][0] = z.v[i];
      if (c + i == b) chosen[turn % 2][team][s][1] = z.v[i];
    }
  };
  // a sample's sums over all of its team's columns
  const auto whole = [&](int turn, int s) {
    const Part<A>(*mine)[kEach] = parts[turn % 2] + team * p.pieces;
    Part<A> sum;
    for (int i = 0; i < p.pieces; ++i) sum.peak = fmax(sum.peak, mine[i][s].peak);
    for (int i = 0; i < p.pieces; ++i) {
      sum.sum += mine[i][s].sum * exponential(mine[i][s].peak - sum.shift());
      if (uniform) {
        sum.dot += mine[i][s].dot + (mine[i][s].shift() - sum.shift()) * mine[i][s].weight;
        sum.weight += mine[i][s].weight;
      }
    }
    return sum;
  };
  const auto total = [&](const Part<A>& sum) { return dense ? sum.weight : goal.total; };
  const auto loss_of = [&](const Part<A>& sum, int turn, int s) {
    A value = total(sum) * std::log(sum.sum);
    if (goal.a_coefficient != 0) value -= goal.a_coefficient * (chosen[turn % 2][team][s][0] - sum.shift());
    if (goal.b_coefficient != 0) value -= goal.b_coefficient * (chosen[turn % 2][team][s][1] - sum.shift());
    if (uniform) value -= goal.uniform * sum.dot;
    return value;
  };
  // scales other than the largest, which is in gradient_factor, come in `relative`
  const A factor = (p.early ? stats.gradient_factor : A(1)) * (p.upstream ? p.upstream[row] : A(1));
  const auto relative = [&](int item) { return plan.averaged ? factor : factor * (scale(item) / p.largest_scale); };
  T* gradients = p.gradient ? p.gradient + (gemm_row + begin) * p.stride : nullptr;
  // g less `times` the target's part of it, rounded
  const auto store_gradient = [&](int64_t gradient_row, Span g, int c, A times) {
    if (uniform) {
      for (int i = 0; i < kSpan && c + i < classes; ++i)
        g.v[i] -= times * goal.uniform * p.target.column(row, c + i);
    }
    if (unsigned(a - c) < kSpan || unsigned(b - c) < kSpan) {
#pragma unroll
      for (int i = 0; i < kSpan; ++i)
        g.v[i] -= times * ((c + i == a ? goal.a_coefficient : A(0)) + (c + i == b ? goal.b_coefficient : A(0)));
    }
    Vector<T, kSpan> rounded;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) rounded.v[i] = narrow<T>(g.v[i]);
    store(gradients + gradient_row * p.stride + c, rounded);
  };
  // e: the exponentials of an item's samples, times[s] what makes gradients of them. An odd sample's logits are
  // base - even: its gradient goes to the base row and, negated, to the even one, where the targets of the two cancel.
  const auto gradient = [&](int item, const Span (&e)[kEach], const A (&times)[kEach], Span& odd_sum, int c) {
    if (c >= classes) return;
    Span g;
    const bool has_odd = kPaired && 2 * item + 1 < count;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      g.v[i] = e[0].v[i] * times[0];
      if (has_odd) {
        const A odd = e[kEach - 1].v[i] * times[kEach - 1];
        g.v[i] -= odd;
        odd_sum.v[i] += odd;
      }
    }
    store_gradient(item, g, c, has_odd ? A(0) : relative(item));
  };

  A team_loss = 0;
  const int turns = (items + teams - 1) / teams;
  if constexpr (!kWide) {
    const int c = first_column;
    const Span bias = bias_span(c), base = kPaired ? raw_span(base_row, c) : Span{};
    Span odd_sum{};
    Span raw = team < items ? raw_span(raw_rows + team * p.stride, c) : Span{};
    for (int turn = 0; turn < turns; ++turn) {
      const int item = turn * teams + team;
      Span e[kEach];
      Part<A> part[kEach];
#pragma unroll
      for (int s = 0; s < kEach; ++s) {
        e[s] = logits(raw, base, bias, s, scale(min(item, items - 1)), c);
        note_chosen(e[s], c, turn, s);
        take(part[s], e[s], c);
        const Part<A> of_warp = warp_part(part[s], uniform);
        if (lane == 0) parts[turn % 2][warp][s] = of_warp;
      }
      if (item + teams < items) raw = raw_span(raw_rows + (item + teams) * p.stride, c);
      __syncthreads();
      if (item >= items) continue;
      A times[kEach];
#pragma unroll
      for (int s = 0; s < kEach; ++s) {
        const Part<A> sum = whole(turn, s);
        if (leads && item * kEach + s < count) team_loss += loss_of(sum, turn, s);
        times[s] = exponential(part[s].peak - sum.shift()) * (total(sum) / sum.sum) * relative(item);
      }
      if (gradients) gradient(item, e, times, odd_sum, c);
    }
    if (kPaired && gradients) {
      __shared__ Span odd_sums[kWarps][kWarp];
      odd_sums[warp][lane] = odd_sum;
      __syncthreads();
      if (team == 0 && c < classes) {
        for (int other = 1; other < teams; ++other)
#pragma unroll
          for (int i = 0; i < kSpan; ++i) odd_sum.v[i] += odd_sums[other * p.pieces + warp][lane].v[i];
        store_gradient(plan.gemm_rows - 1, odd_sum, c, relative(0) * A(count / 2));
      }
    }
  } else {
    __shared__ A shifts[kSliceSamples], rates[kSliceSamples];
    for (int turn = 0; turn < turns; ++turn) {  // one team
      Part<A> part[kEach];
      for (int start = 0; start < classes; start += stretch) {
        const int c = start + first_column;
        const Span bias = bias_span(c), raw = raw_span(raw_rows + turn * p.stride, c);
        const Span base = kPaired ? raw_span(base_row, c) : Span{};
#pragma unroll
        for (int s = 0; s < kEach; ++s) {
          Span z = logits(raw, base, bias, s, scale(turn), c);
          note_chosen(z, c, turn, s);
          take(part[s], z, c);
        }
      }
#pragma unroll
      for (int s = 0; s < kEach; ++s) {
        const Part<A> of_warp = warp_part(part[s], uniform);
        if (lane == 0) parts[turn % 2][warp][s] = of_warp;
      }
      __syncthreads();
      for (int s = 0; s < kEach && turn * kEach + s < count && leads; ++s) {
        const Part<A> sum = whole(turn, s);
        team_loss += loss_of(sum, turn, s);
        shifts[turn * kEach + s] = sum.shift();
        rates[turn * kEach + s] = total(sum) / sum.sum;
      }
    }
    __syncthreads();
    for (int start = 0; start < classes && gradients; start += stretch) {
      const int c = start + first_column;
      const Span bias = bias_span(c), base = kPaired ? raw_span(base_row, c) : Span{};
      Span odd_sum{};
      for (int item = 0; item < items; ++item) {
        const Span raw = raw_span(raw_rows + item * p.stride, c);
        Span e[kEach];
        A times[kEach];
#pragma unroll
        for (int s = 0; s < kEach; ++s) {
          const int local = min(item * kEach + s, count - 1);
          e[s] = logits(raw, base, bias, s, scale(item), c);
#pragma unroll
          for (int i = 0; i < kSpan; ++i) e[s].v[i] = exponential(e[s].v[i] - shifts[local]);
          times[s] = rates[local] * relative(item);
        }
        gradient(item, e, times, odd_sum, c);
      }
      if (kPaired && c < classes) store_gradient(plan.gemm_rows - 1, odd_sum, c, relative(0) * A(count / 2));
    }
  }

  if (!loss) return;
  if (leads) team_losses[team] = team_loss;
  __syncthreads();
  if (threadIdx.x != 0) return;
  A sum = p.slice.first == 0 ? A(0) : *loss;
  for (int i = 0; i < teams; ++i) sum += team_losses[i];
  *loss = sum;
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
