// The M dropped copies, their fold, and what stands around the GEMMs of the head.
//
// The head takes input rows in chunks; in a chunk, a row b has gemm_rows GEMM rows b * gemm_rows + k (see SamplePlan):
//   pack            input (rows, D) -> X (rows * gemm_rows, D), masked, not scaled
//   GEMM            Z = X W^T, float32 (float64)
//   cross_entropy   Z -> the rows' losses, and G, the gradient of Z with the dropout scale in it
//   GEMMs           dW += G^T X; dX = G W, over X
//   fold            dX (rows * gemm_rows, D) -> the input's gradient (rows, D) through the same masks
#pragma once

#include "cuda/common.cuh"
#include "kernels/multi_sample_dropout.h"

namespace pyrx::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSliceSamples = 64;   // samples of a row that go through the GEMMs together
constexpr int kPackSamples = 4;     // samples a thread of pack_kernel writes
constexpr int kPageSamples = 1024;  // thresholds a launch of upload_kernel carries

// The samples' thresholds, in the kernel's parameters as far as they fit.
struct SampleTable {
  const uint16_t* more;  // all of them in device memory where they are many and differ, else null
  uint16_t few[kSliceSamples];
  bool uniform, antithetic;

  __device__ SampleMask mask(int64_t sample) const {
    return sample_mask(sample, more ? more[sample] : few[uniform ? 0 : sample], antithetic);
  }
};

struct ThresholdPage {
  uint16_t values[kPageSamples];
};

__global__ void upload_kernel(uint16_t* to, const __grid_constant__ ThresholdPage page, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = page.values[i];
}

// The masks of one group for sample after sample; the second of an antithetic pair takes the first one's words.
struct GroupMasks {
  uint64_t seed, group;
  PhiloxWords words;

  __device__ uint32_t bits(const SampleMask& mask, bool first) {
    if (first || !mask.complement) words = philox(seed, group, mask.sample);
    return mask_bits(words, mask);
  }
};

// input (n) -> output (samples, n).
// Bytes: (1 + M) n sizeof(T) over 4.8 TB/s; operations: 120 M n / 8 over 15e12: for bfloat16 0.42 and 1.0 us a sample
// and million elements (antithetic 0.6), for float32 0.83 and 1.0: the masks set the pace, stores hide behind them.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    expand_kernel(const T* input, T* output, const int64_t* seed_at, int64_t numel, int64_t samples,
                  const __grid_constant__ SampleTable table, bool aligned, bool aligned_samples) {
  const uint64_t seed = static_cast<uint64_t>(*seed_at);
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; group * kGroup < numel; group += stride) {
    const int64_t at = group * kGroup;
    const int count = numel - at < kGroup ? int(numel - at) : kGroup;
    const Vector<T, kGroup> x = load_group(input + at, count, aligned);
    GroupMasks masks{static_cast<uint64_t>(seed), static_cast<uint64_t>(group), {}};
    for (int64_t m = 0; m < samples; ++m) {
      const SampleMask mask = table.mask(m);
      const bool untouched = mask.threshold == 0;
      const uint32_t bits = masks.bits(mask, m == 0);
      store_group(output + m * numel + at, drop(x, bits, scale_of<Acc<T>>(mask), untouched), count, aligned_samples);
    }
  }
}

// gradient (samples, n) -> output (n): the sum in float32 (float64), rounded once. Bytes and operations of
// expand_kernel.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    fold_samples_kernel(const T* gradient, T* output, const int64_t* seed_at, int64_t numel, int64_t samples,
                        const __grid_constant__ SampleTable table, bool aligned, bool aligned_samples) {
  const uint64_t seed = static_cast<uint64_t>(*seed_at);
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; group * kGroup < numel; group += stride) {
    const int64_t at = group * kGroup;
    const int count = numel - at < kGroup ? int(numel - at) : kGroup;
    GroupMasks masks{static_cast<uint64_t>(seed), static_cast<uint64_t>(group), {}};
    Acc<T> sum[kGroup] = {};
#pragma unroll 4
    for (int64_t m = 0; m < samples; ++m) {
      const Vector<T, kGroup> g = load_group(gradient + m * numel + at, count, aligned_samples);
      const SampleMask mask = table.mask(m);
      const uint32_t bits = masks.bits(mask, m == 0);
      const Acc<T> scale = scale_of<Acc<T>>(mask);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) sum[j] += bits >> j & 1 ? widen(g.v[j]) * scale : Acc<T>(0);
    }
    Vector<T, kGroup> folded;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) folded.v[j] = narrow<T>(sum[j]);
    store_group(output + at, folded, count, aligned);
  }
}

// The samples [first, first + plan.samples) of every row, and the GEMM rows they have: all of them where they are few.
struct Slice {
  int64_t first;
  SamplePlan plan;
};

// Where element `at` (its place in the chunk) and the seven after it lie among the chunk's rows.
struct RowColumn {
  int64_t row, column;

  __device__ void next(int64_t columns) {
    if (++column == columns) ++row, column = 0;
  }
};

// A chunk's elements [first_element, first_element + rows * features) of the logical input, in Philox groups.
struct Chunk {
  int64_t first_element, rows, features;
  int64_t first_group, groups;

  __device__ int64_t begin(int64_t group) const {  // the group's first element in the chunk
    const int64_t at = (first_group + group) * kGroup - first_element;
    return at < 0 ? 0 : at;
  }
  __device__ int64_t end(int64_t group) const {
    const int64_t at = (first_group + group + 1) * kGroup - first_element;
    return at < rows * features ? at : rows * features;
  }
  __device__ int lane(int64_t group, int64_t at) const {
    return int(at + first_element - (first_group + group) * kGroup);
  }
};

template <typename T>
struct PackParams {
  const T* input;        // (rows, D)
  T* packed;             // (rows * gemm_rows, D)
  uint8_t* bits;         // (gemm_rows, groups): the masks, for the fold; or null
  Acc<T>* levels;        // (rows * D): of combine = "logits", the mean of the scaled masks; or null
  const int64_t* seed;
  int64_t samples;       // M
  Chunk chunk;
  Slice slice;
  SampleTable table;
};

// Bytes: rows D sizeof(T) (1 + K) over 4.8 TB/s; operations: 120 K rows D / 8 over 15e12: at 256 x 2048, K = 8,
// bfloat16 2.0 us and 4.2 us. The bits (1/16 of that) spare the fold its Philox calls. kAligned: D is a multiple of 8
// and every pointer of 16 bytes, so a group is one access in one row.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackParams<T> p) {
  const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (group >= p.chunk.groups) return;
  const SamplePlan& plan = p.slice.plan;
  const int64_t columns = p.chunk.features, begin = p.chunk.begin(group);
  const int count = int(p.chunk.end(group) - begin), first_lane = p.chunk.lane(group, begin);
  const RowColumn start{begin / columns, begin % columns};
  GroupMasks masks{static_cast<uint64_t>(*p.seed), static_cast<uint64_t>(p.chunk.first_group + group), {}};
  const Vector<T, kGroup> x = load_group(p.input + begin, count, kAligned);

  const auto write = [&](int64_t k, const Vector<T, kGroup>& value) {
    if constexpr (kAligned) {
      store(p.packed + (start.row * plan.gemm_rows + k) * columns + start.column, value);
    } else {
      RowColumn to = start;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (j < count) p.packed[(to.row * plan.gemm_rows + k) * columns + to.column] = value.v[j];
        to.next(columns);
      }
    }
  };

  if (plan.averaged) {
    Acc<T> level[kGroup] = {};
    for (int64_t m = 0; m < p.samples; ++m) {
      const SampleMask mask = p.table.mask(m);
      const uint32_t bits = masks.bits(mask, m == 0) >> first_lane;
      const Acc<T> scale = scale_of<Acc<T>>(mask);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) level[j] += bits >> j & 1 ? scale : Acc<T>(0);
    }
    Vector<T, kGroup> mean;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      level[j] /= Acc<T>(p.samples);
      mean.v[j] = level[j] == 0 ? narrow<T>(0) : narrow<T>(widen(x.v[j]) * level[j]);
      if (p.levels && j < count) p.levels[begin + j] = level[j];
    }
    return write(0, mean);
  }
  const int64_t first = int64_t(blockIdx.y) * kPackSamples;
#pragma unroll
  for (int i = 0; i < kPackSamples; ++i) {
    const int64_t k = first + i;
    if (k >= plan.gemm_rows) return;
    const int64_t sample = plan.mask_of(k);
    const uint32_t bits =
        sample < 0 ? 0xFF : masks.bits(p.table.mask(p.slice.first + sample), i == 0) >> first_lane;
    if (p.bits) p.bits[k * p.chunk.groups + group] = static_cast<uint8_t>(bits);
    Vector<T, kGroup> kept = x;
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (!(bits >> j & 1)) kept.v[j] = narrow<T>(0);
    write(k, kept);
  }
}

template <typename T, typename Out>
struct FoldParams {
  const T* gradient;       // (rows * gemm_rows, D)
  Out* output;             // (rows, D)
  const uint8_t* bits;     // as pack_kernel left them
  const Acc<T>* levels;
  const Acc<T>* factor;    // multiplies the sum, or null
  const Acc<T>* carry_in;  // (rows * D): the sums of the slices before, or null
  Acc<T>* carry_out;       // where this one's go if it is not the last, or null
  Chunk chunk;
  SamplePlan plan;
};

// Bytes: rows D (K sizeof(T) + K / 8 + sizeof(Out)) over 4.8 TB/s: 2.0 us at 256 x 2048, K = 8, bfloat16; operations:
// about 24 K a group, a fifth of that time.
template <typename T, typename Out, bool kAligned>
__global__ void __launch_bounds__(kThreads) fold_kernel(const __grid_constant__ FoldParams<T, Out> p) {
  const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (group >= p.chunk.groups) return;
  const SamplePlan& plan = p.plan;
  const int64_t columns = p.chunk.features, begin = p.chunk.begin(group);
  const int count = int(p.chunk.end(group) - begin);
  const RowColumn start{begin / columns, begin % columns};
  Acc<T> sum[kGroup];
#pragma unroll
  for (int j = 0; j < kGroup; ++j) sum[j] = p.carry_in && j < count ? p.carry_in[begin + j] : Acc<T>(0);
#pragma unroll(sizeof(T) > 4 ? 2 : 4)
  for (int64_t k = 0; k < plan.gemm_rows; ++k) {
    Vector<T, kGroup> g;
    if constexpr (kAligned) {
      g = load<T, kGroup>(p.gradient + (start.row * plan.gemm_rows + k) * columns + start.column);
    } else {
      RowColumn from = start;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        g.v[j] = j < count ? p.gradient[(from.row * plan.gemm_rows + k) * columns + from.column] : narrow<T>(0);
        from.next(columns);
      }
    }
    const uint32_t bits = p.levels ? 0xFF : p.bits[k * p.chunk.groups + group];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) sum[j] += bits >> j & 1 ? widen(g.v[j]) : Acc<T>(0);
  }
  if (p.carry_out) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (j < count) p.carry_out[begin + j] = sum[j];
    return;
  }
  const Acc<T> factor = p.factor ? *p.factor : Acc<T>(1);
  Vector<Out, kGroup> folded;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    Acc<T> value = sum[j] * factor;
    if (p.levels) {
      const Acc<T> level = j < count ? p.levels[begin + j] : Acc<T>(0);
      value = level == 0 ? Acc<T>(0) : value * level;
    }
    folded.v[j] = narrow<Out>(value);
  }
  store_group(p.output + begin, folded, count, kAligned);
}

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

// One block. Bytes: the targets once; latency-bound, about 5 us up to 10^4 rows.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    head_stats_kernel(const __grid_constant__ Target<A> target, int64_t rows, bool mean, double losses_a_row,
                      double largest_scale, HeadStats<A>* stats) {
  double sum = 0;
  for (int64_t c = threadIdx.x; c < target.classes; c += blockDim.x)
    sum += target.class_weight ? double(target.class_weight[c]) : 1.0;
  const double class_weight_sum = block_sum(sum);
  double weight = 0;
  if (mean && !target.probabilities) {
    for (int64_t row = threadIdx.x; row < rows; row += blockDim.x)
      weight += double(target.row(row, A(class_weight_sum)).weight);
  }
  weight = block_sum(weight);
  if (threadIdx.x != 0) return;
  const double denominator = losses_a_row * (!mean ? 1.0 : target.probabilities ? double(rows) : weight);
  // every row ignored: loss nan, gradients 0, as F.cross_entropy has them
  *stats = {A(class_weight_sum), A(denominator == 0 ? 0.0 : largest_scale / denominator), A(denominator)};
}

template <typename T>
struct CrossEntropyParams {
  const Acc<T>* logits;    // Z (rows * gemm_rows, C)
  T* gradient;             // G, like Z, or null; Z itself where T is its type
  const T* bias;           // (C), or null
  const Acc<T>* upstream;  // (B), or null: ones
  const HeadStats<Acc<T>>* stats;
  Acc<T>* losses;      // (B, gridDim.y), the sum over the samples of a block; or null
  int64_t first_row;   // of the chunk among the B rows
  Acc<T> largest_scale;
  bool early;          // G holds stats->gradient_factor; float16's range leaves that to float32 afterwards
  Target<Acc<T>> target;
  Slice slice;
  SampleTable table;
};

// Partial sums of one sample over a part of the columns; sum and dot are relative to shift.
template <typename A>
struct Part {
  A peak, sum, dot, weight;

  __device__ A shift() const { return peak == -INFINITY ? A(0) : peak; }
};

// The logits of one sample of a row: scale * raw + bias, or of an odd paired sample scale * (base - raw) + bias.
// raw and base are places in Z: pointers in their stead, some of them null, would be loaded as generic, not global.
template <typename T, bool kPaired>
struct SampleLogits {
  int64_t raw, base;  // base: -1 where there is none
  Acc<T> scale;

  template <int N>
  __device__ Vector<Acc<T>, N> at(const CrossEntropyParams<T>& p, int64_t c) const {
    Vector<Acc<T>, N> z = load<Acc<T>, N>(p.logits + raw + c);
    if (kPaired && base >= 0) {
      const Vector<Acc<T>, N> all = load<Acc<T>, N>(p.logits + base + c);
#pragma unroll
      for (int i = 0; i < N; ++i) z.v[i] = all.v[i] - z.v[i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) z.v[i] *= scale;
    if (p.bias) {
      const Vector<T, N> b = load<T, N>(p.bias + c);
#pragma unroll
      for (int i = 0; i < N; ++i) z.v[i] += widen(b.v[i]);
    }
    return z;
  }
};

// A block takes a part of the samples of one row (gridDim.y parts; one where they are paired): its warps share the
// samples, or where there are fewer samples than warps, the columns of each. N: columns an access, dividing C.
// Bytes: rows K C (4 + sizeof(T)) over 4.8 TB/s, 2.6 us at 256 rows, K = 8, C = 1000, bfloat16, less where Z is still
// in L2; it is read two or three times, again from L1. Operations: two exponentials and about 40 more an element, 5 us.
template <typename T, int N, bool kPaired>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    cross_entropy_kernel(const __grid_constant__ CrossEntropyParams<T> p) {
  using A = Acc<T>;
  __shared__ Part<A> parts[kSliceSamples];
  __shared__ A peaks[kSliceSamples], rates[kSliceSamples], losses[kSliceSamples];
  const SamplePlan& plan = p.slice.plan;
  const int64_t classes = p.target.classes;
  const int blocks = int(classes / N);  // of N columns
  const int64_t row = p.first_row + blockIdx.x, gemm_row = int64_t(blockIdx.x) * plan.gemm_rows;
  const unsigned all = plan.averaged ? 1 : unsigned(plan.samples);
  const int begin = all * blockIdx.y / gridDim.y, count = int(all * (blockIdx.y + 1) / gridDim.y) - begin;
  if (count == 0) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool dense = p.target.probabilities != nullptr;
  const ClassTarget<A> goal = p.target.row(row, p.stats->class_weight_sum);
  const bool uniform = dense || goal.uniform != 0;
  A* loss = p.losses ? p.losses + row * gridDim.y + blockIdx.y : nullptr;

  if (!goal.counts) {  // nothing, whatever the logits are
    if (loss && threadIdx.x == 0 && p.slice.first == 0) *loss = 0;
    if (p.gradient) {
      const int64_t gemm_rows = kPaired ? plan.gemm_rows : count;
      T* to = p.gradient + (gemm_row + begin) * classes;
      for (int64_t i = threadIdx.x; i < gemm_rows * classes; i += blockDim.x) to[i] = narrow<T>(0);
    }
    return;
  }

  const auto logits_of = [&](int local) -> SampleLogits<T, kPaired> {
    if (plan.averaged) return {gemm_row * classes, -1, A(1)};
    const int64_t raw = gemm_row + (kPaired ? local / 2 : local);
    const int64_t base = kPaired && local % 2 ? (gemm_row + plan.gemm_rows - 1) * classes : -1;
    return {raw * classes, base, scale_of<A>(p.table.mask(p.slice.first + local))};
  };

  const int pieces = count >= kWarps ? 1 : kWarps / count;  // of a sample's columns
  const int piece_blocks = (blocks + pieces - 1) / pieces;
  for (int item = warp; item < count * pieces; item += kWarps) {
    const SampleLogits<T, kPaired> logits = logits_of(begin + item / pieces);
    const int from = item % pieces * piece_blocks, to = min(from + piece_blocks, blocks);
    Part<A> part{A(-INFINITY), A(0), A(0), A(0)};
#pragma unroll 4
    for (int block = from + lane; block < to; block += kWarp) {
      const Vector<A, N> z = logits.template at<N>(p, int64_t(block) * N);
#pragma unroll
      for (int i = 0; i < N; ++i) part.peak = fmax(part.peak, z.v[i]);
    }
    part.peak = warp_max(part.peak);
    const A shift = part.shift();
    for (int block = from + lane; block < to; block += kWarp) {
      const Vector<A, N> z = logits.template at<N>(p, int64_t(block) * N);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        part.sum += std::exp(z.v[i] - shift);
        if (uniform) {
          const A weight = p.target.column(row, int64_t(block) * N + i);
          part.dot += weight * (z.v[i] - shift);
          part.weight += weight;
        }
      }
    }
    part.sum = warp_sum(part.sum);
    part.dot = warp_sum(part.dot);
    part.weight = warp_sum(part.weight);
    if (lane == 0) parts[item] = part;
  }
  __syncthreads();

  if (int(threadIdx.x) < count) {
    const Part<A>* mine = parts + threadIdx.x * pieces;
    A peak = -INFINITY, sum = 0, dot = 0, weight = 0;
    for (int i = 0; i < pieces; ++i) peak = fmax(peak, mine[i].peak);
    for (int i = 0; i < pieces; ++i) {
      sum += mine[i].sum * (mine[i].peak == peak ? A(1) : std::exp(mine[i].peak - peak));
      dot += mine[i].dot + (mine[i].shift() - peak) * mine[i].weight;
      weight += mine[i].weight;
    }
    const SampleLogits<T, kPaired> logits = logits_of(begin + threadIdx.x);
    const A total = dense ? weight : goal.total;
    A value = total * std::log(sum);
    if (goal.a_coefficient != 0) value -= goal.a_coefficient * (logits.template at<1>(p, goal.a).v[0] - peak);
    if (goal.b_coefficient != 0) value -= goal.b_coefficient * (logits.template at<1>(p, goal.b).v[0] - peak);
    if (uniform) value -= goal.uniform * dot;
    peaks[threadIdx.x] = peak;
    rates[threadIdx.x] = total / sum;
    losses[threadIdx.x] = value;
  }
  __syncthreads();

  if (loss && threadIdx.x == 0) {
    A sum = p.slice.first == 0 ? A(0) : *loss;
    for (int i = 0; i < count; ++i) sum += losses[i];
    *loss = sum;
  }
  if (!p.gradient) return;

  const A factor = (p.early ? p.stats->gradient_factor : A(1)) * (p.upstream ? p.upstream[row] : A(1));
  const auto target_part = [&](int64_t c) {
    A part = uniform ? goal.uniform * p.target.column(row, c) : A(0);
    if (c == goal.a) part += goal.a_coefficient;
    if (c == goal.b) part += goal.b_coefficient;
    return part;
  };
  if constexpr (!kPaired) {
    for (int item = warp; item < count * pieces; item += kWarps) {
      const int local = item / pieces;
      const SampleLogits<T, kPaired> logits = logits_of(begin + local);
      // scales other than the largest, which is in gradient_factor
      const A relative = factor * (plan.averaged ? A(1) : logits.scale / p.largest_scale);
      T* gradient = p.gradient + (gemm_row + begin + local) * classes;
      const int from = item % pieces * piece_blocks, to = min(from + piece_blocks, blocks);
      for (int block = from + lane; block < to; block += kWarp) {
        const Vector<A, N> z = logits.template at<N>(p, int64_t(block) * N);
        Vector<T, N> g;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const A softmax = std::exp(z.v[i] - peaks[local]) * rates[local];
          g.v[i] = narrow<T>((softmax - target_part(int64_t(block) * N + i)) * relative);
        }
        store(gradient + int64_t(block) * N, g);
      }
    }
  } else {
    // an odd sample's logits are base - even: its gradient goes to the base row and, negated, to the even one
    const A* raw = p.logits + gemm_row * classes;
    T* gradient = p.gradient + gemm_row * classes;
    const int64_t base_row = (plan.gemm_rows - 1) * classes;
    for (int block = threadIdx.x; block < blocks; block += kThreads) {
      const int64_t c = int64_t(block) * N;
      const Vector<A, N> base = load<A, N>(raw + base_row + c);
      A odd_sum[N] = {}, offset[N], target[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        offset[i] = p.bias ? widen(p.bias[c + i]) : A(0);
        target[i] = target_part(c + i);
      }
      const A scale = p.largest_scale;
      for (int pair = 0; 2 * pair < count; ++pair) {
        const Vector<A, N> even = load<A, N>(raw + pair * classes + c);
        Vector<T, N> g;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const A z = even.v[i] * scale + offset[i];
          A value = std::exp(z - peaks[2 * pair]) * rates[2 * pair] - target[i];
          if (2 * pair + 1 < count) {
            const A other = (base.v[i] - even.v[i]) * scale + offset[i];
            const A odd = std::exp(other - peaks[2 * pair + 1]) * rates[2 * pair + 1] - target[i];
            odd_sum[i] += odd;
            value -= odd;
          }
          g.v[i] = narrow<T>(value * factor);
        }
        store(gradient + pair * classes + c, g);
      }
      Vector<T, N> g;
#pragma unroll
      for (int i = 0; i < N; ++i) g.v[i] = narrow<T>(odd_sum[i] * factor);
      store(gradient + base_row + c, g);
    }
  }
}

// What takes a row of G back to the gradient of the bias: the dropout scale out, a paired base row for both of a pair.
template <typename A>
__device__ inline A bias_share(const Slice& slice, const SampleTable& table, int64_t k) {
  if (slice.plan.averaged || (slice.plan.paired && k == slice.plan.gemm_rows - 1)) return A(1);
  return A(1) / scale_of<A>(table.mask(slice.first + slice.plan.mask_of(k)));
}

// G (rows * gemm_rows, C) -> partials (gridDim.y, C), set where first, else added to: block (x, y) sums 32 columns over
// a part of the rows. Bytes: G once, from L2. Operations: one an element.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    bias_kernel(const T* gradient, Acc<T>* partials, int64_t rows, int64_t classes, const __grid_constant__ Slice slice,
                const __grid_constant__ SampleTable table, bool first) {
  using A = Acc<T>;
  __shared__ A sums[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t c = int64_t(blockIdx.x) * kWarp + lane, gemm_rows = slice.plan.gemm_rows;
  const int64_t from = rows * blockIdx.y / gridDim.y, to = rows * (blockIdx.y + 1) / gridDim.y;
  A sum = 0;
  for (int64_t k = 0; k < gemm_rows; ++k) {
    A column = 0;
    if (c < classes) {
      for (int64_t row = from + warp; row < to; row += kWarps)
        column += widen(gradient[(row * gemm_rows + k) * classes + c]);
    }
    sum += column * bias_share<A>(slice, table, k);
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= classes) return;
  sum = first ? A(0) : partials[blockIdx.y * classes + c];
  for (int i = 0; i < kWarps; ++i) sum += sums[i][lane];
  partials[blockIdx.y * classes + c] = sum;
}

// partials (parts, n) -> output (n): the sum times factor (or null). Bytes: n (parts sizeof(A) + sizeof(Out)).
// With one part it also rounds a float32 weight gradient; it may run in place then.
template <typename A, typename Out>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const A* partials, int parts, int64_t numel, const A* factor, Out* output) {
  const A times = factor ? *factor : A(1);
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < numel; i += stride) {
    A sum = partials[i];
    for (int part = 1; part < parts; ++part) sum += partials[part * numel + i];
    output[i] = narrow<Out>(sum * times);
  }
}

// losses (rows, parts) -> output: per_row (rows), or one number from one block. Bytes: the losses once.
template <typename A>
__global__ void __launch_bounds__(kThreads) loss_kernel(const A* losses, int64_t rows, int parts, bool per_row,
                                                        const HeadStats<A>* stats, A* output) {
  if (!per_row) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < rows * parts; i += blockDim.x) sum += double(losses[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) *output = A(sum / double(stats->denominator));
    return;
  }
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < rows; row += stride) {
    A sum = 0;
    for (int part = 0; part < parts; ++part) sum += losses[row * parts + part];
    output[row] = sum / stats->denominator;
  }
}

}  // namespace pyrx::cuda
