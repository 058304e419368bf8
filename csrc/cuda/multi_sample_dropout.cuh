// The M dropped copies, their fold, and what stands around the GEMMs of the head.
//
// The head takes input rows in chunks; in a chunk, a row b has gemm_rows GEMM rows b * gemm_rows + k (see SamplePlan):
//   pack            input (rows, D) -> X (rows * gemm_rows, D), masked, not scaled
//   GEMM            Z = X W^T, float32 (float64)
//   cross_entropy   Z -> the rows' losses, and G, the gradient of Z with the dropout scale in it
//   GEMMs           dW += G^T X; dX = G W, over X
//   fold            dX (rows * gemm_rows, D) -> the input's gradient (rows, D) through the same masks; the bias's sums
// and last, once a call,
//   finish          the loss, the bias's gradient
#pragma once

#include "cuda/multi_sample_dropout_loss.cuh"

namespace pyrx::cuda {

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
  __device__ RowColumn place(int64_t at) const {
    if (rows * features > INT32_MAX) return {at / features, at % features};  // 64-bit division is a subroutine
    return {int64_t(uint32_t(at) / uint32_t(features)), int64_t(uint32_t(at) % uint32_t(features))};
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
  StatsParams<Acc<T>> stats;  // made by one block more than the groups need
};

// Bytes: rows D sizeof(T) (1 + K) over 4.8 TB/s; operations: 120 K rows D / 8 over 15e12: at 256 x 2048, K = 8,
// bfloat16 2.0 us and 4.2 us. The bits (1/16 of that) spare the fold its Philox calls. kAligned: D is a multiple of 8
// and every pointer of 16 bytes, so a group is one access in one row.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackParams<T> p) {
  if (p.stats.stats && blockIdx.x == gridDim.x - 1) {
    if (blockIdx.y == 0) head_stats(p.stats);
    return;
  }
  const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (group >= p.chunk.groups) return;
  const SamplePlan& plan = p.slice.plan;
  const int64_t columns = p.chunk.features, begin = p.chunk.begin(group);
  const int count = int(p.chunk.end(group) - begin), first_lane = p.chunk.lane(group, begin);
  const RowColumn start = p.chunk.place(begin);
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
#pragma unroll 2
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
  int splits;              // lanes that share a group's GEMM rows, a power of two
  unsigned blocks;         // that fold; those after them sum G for the bias
  BiasParams<T> bias;
};

// Bytes: rows D (K sizeof(T) + K / 8 + sizeof(Out)) over 4.8 TB/s: 2.0 us at 256 x 2048, K = 8, bfloat16; operations:
// about 24 K a group, a fifth of that time.
template <typename T, typename Out, bool kAligned>
__global__ void __launch_bounds__(kThreads) fold_kernel(const __grid_constant__ FoldParams<T, Out> p) {
  if (blockIdx.x >= p.blocks) return sum_bias(p.bias, blockIdx.x - p.blocks);
  const int lane = threadIdx.x % kWarp, warp_groups = kWarp / p.splits, split = lane / warp_groups;
  const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t group = warp * warp_groups + lane % warp_groups;
  const bool inside = group < p.chunk.groups;  // the others still take part in the shuffles
  const int64_t columns = p.chunk.features, begin = inside ? p.chunk.begin(group) : 0;
  const int64_t gemm_rows = inside ? p.plan.gemm_rows : 0;
  const int count = inside ? int(p.chunk.end(group) - begin) : 0;
  const RowColumn start = p.chunk.place(begin);
  Acc<T> sum[kGroup];
#pragma unroll
  for (int j = 0; j < kGroup; ++j) sum[j] = p.carry_in && split == 0 && j < count ? p.carry_in[begin + j] : Acc<T>(0);
  const T* row = p.gradient + (start.row * gemm_rows + split) * columns + start.column;
  const uint8_t* mask = p.bits + split * p.chunk.groups + group;
#pragma unroll(sizeof(T) > 4 ? 2 : 4)
  for (int64_t k = split; k < gemm_rows; k += p.splits) {
    Vector<T, kGroup> g;
    if constexpr (kAligned) {
      g = load<T, kGroup>(row);
    } else {
      RowColumn from = start;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        g.v[j] = j < count ? p.gradient[(from.row * gemm_rows + k) * columns + from.column] : narrow<T>(0);
        from.next(columns);
      }
    }
    const uint32_t bits = p.levels ? 0xFF : *mask;
    row += p.splits * columns;
    mask += p.splits * p.chunk.groups;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) sum[j] += bits >> j & 1 ? widen(g.v[j]) : Acc<T>(0);
  }
  for (int offset = warp_groups; offset < kWarp; offset *= 2)
#pragma unroll
    for (int j = 0; j < kGroup; ++j) sum[j] += __shfl_xor_sync(kAllLanes, sum[j], offset);
  if (!inside || split != 0) return;
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

}  // namespace pyrx::cuda
