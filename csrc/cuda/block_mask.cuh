// Lists of a mask's blocks and the choice of blocks by score: warps take rows, ballots give places.
#pragma once

#include "cuda/common.cuh"
#include "kernels/block_mask.h"

namespace pyrx::cuda {

constexpr int kListThreads = 256;
constexpr int kListWarps = kListThreads / kWarp;
constexpr int kListRows = 1024;  // whose bits of a panel of columns are shared at a time
constexpr int kSelectThreads = 256;       // of warps that take a row each
constexpr int kMostSelectThreads = 1024;  // of a block that takes one
constexpr int kWarpKeys = 16;             // of a thread, in registers
constexpr int kBlockKeys = 8;             // of one of 1024 threads, which has 64 of them

// Places that one warp fills: lanes give whether they have an index, in ascending order from call to call.
struct ListWriter {
  int32_t* indices;
  int width, found = 0;

  __device__ void add(bool set, int64_t index) {
    const unsigned votes = __ballot_sync(kAllLanes, set);
    const int at = found + __popc(votes & ((1u << threadIdx.x % kWarp) - 1));
    if (set && at < width) indices[at] = static_cast<int32_t>(index);
    found += __popc(votes);
  }
  __device__ void finish(int32_t* count) {
    if (found > width) found = width;
    for (int64_t i = found + int(threadIdx.x % kWarp); i < width; i += kWarp) indices[i] = 0;
    if (threadIdx.x % kWarp == 0) *count = found;
  }
};

struct ListOutput {
  int32_t *kv_counts, *kv_indices;  // (masks, rows), (masks, rows, kv_width)
  int32_t *q_counts, *q_indices;    // (masks, columns), (masks, columns, q_width)
};

// Blocks of threads below `row_tasks` take kListWarps rows, the others a panel of 32 columns of a mask, whose bits they
// turn in shared memory so that lists are written side by side.
// Bytes: the blocks twice (the second time from L2) and the lists once. Operations: a ballot a 32 blocks, twice.
__global__ void __launch_bounds__(kListThreads)
    block_lists_kernel(const uint8_t* __restrict__ blocks, BlockGrid grid, ListOutput out) {
  __shared__ uint32_t bits[kListRows];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t rows = grid.masks * grid.rows, row_tasks = (rows + kListWarps - 1) / kListWarps;
  const int64_t panels = (grid.columns + kWarp - 1) / kWarp, tasks = row_tasks + grid.masks * panels;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    if (task < row_tasks) {
      const int64_t row = task * kListWarps + warp;
      if (row >= rows) continue;
      ListWriter list{out.kv_indices + row * grid.kv_width, static_cast<int>(grid.kv_width)};
      for (int64_t first = 0; first < grid.columns; first += kWarp) {
        const int64_t column = first + lane;
        list.add(column < grid.columns && blocks[row * grid.columns + column] != 0, column);
      }
      list.finish(out.kv_counts + row);
      continue;
    }
    const int64_t mask = (task - row_tasks) / panels, first = (task - row_tasks) % panels * kWarp;
    constexpr int kOwn = kWarp / kListWarps;  // columns of a warp
    ListWriter lists[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t column = mask * grid.columns + first + warp * kOwn + i;
      lists[i] = {out.q_indices + column * grid.q_width, static_cast<int>(grid.q_width)};
    }
    for (int64_t start = 0; start < grid.rows; start += kListRows) {
      const int count = static_cast<int>(grid.rows - start < kListRows ? grid.rows - start : kListRows);
      const uint8_t* from = blocks + (mask * grid.rows + start) * grid.columns + first + lane;
      for (int row = warp; row < count; row += kListWarps) {
        const bool set = first + lane < grid.columns && from[row * grid.columns] != 0;
        const unsigned votes = __ballot_sync(kAllLanes, set);
        if (lane == 0) bits[row] = votes;
      }
      __syncthreads();
      for (int row = 0; row < count; row += kWarp) {
        const uint32_t own = row + lane < count ? bits[row + lane] : 0;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) lists[i].add(own >> (warp * kOwn + i) & 1, start + row + lane);
      }
      __syncthreads();  // the next rows' bits
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t column = first + warp * kOwn + i;
      if (column < grid.columns) lists[i].finish(out.q_counts + mask * grid.columns + column);
    }
  }
}

// Rows (batch, heads, rows) of `columns` scores; strides in elements, 0 where a dimension is one.
struct SelectRows {
  int64_t count, heads, rows, columns;  // count: of all rows
  double mass;
  const int32_t* wanted = nullptr;  // null: by mass
  int64_t wanted_batch = 0, wanted_head = 0, wanted_row = 0;
  const uint8_t* always = nullptr;  // null: none
  int64_t always_batch = 0, always_head = 0, always_row = 0, always_column = 0;
};

// The threads that share a row: a block's, or a warp's.
template <bool kBlock>
struct RowTeam {
  static __device__ int size() { return kBlock ? int(blockDim.x) : kWarp; }
  static __device__ int rank() { return kBlock ? int(threadIdx.x) : int(threadIdx.x % kWarp); }

  // f(x of all threads), on every one
  template <typename T, typename F>
  static __device__ T reduce(T x, F f) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) x = f(x, __shfl_xor_sync(kAllLanes, x, offset));
    if constexpr (kBlock) {
      __shared__ T warps[kMostSelectThreads / kWarp];
      __syncthreads();  // the call before may still be reading
      if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
      __syncthreads();
      x = warps[0];
      for (unsigned i = 1; i < blockDim.x / kWarp; ++i) x = f(x, warps[i]);
    }
    return x;
  }
  template <typename T>
  static __device__ T sum(T x) {
    return reduce(x, [](T a, T b) { return a + b; });
  }
  // how many threads of lower rank have it, and how many have it
  static __device__ int2 place(bool set) {
    const unsigned votes = __ballot_sync(kAllLanes, set);
    int before = __popc(votes & ((1u << threadIdx.x % kWarp) - 1)), total = __popc(votes);
    if constexpr (kBlock) {
      __shared__ int warps[kMostSelectThreads / kWarp];
      __syncthreads();  // the call before may still be reading
      if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = total;
      __syncthreads();
      total = 0;
      for (unsigned i = 0; i < blockDim.x / kWarp; ++i) {
        if (i < threadIdx.x / kWarp) before += warps[i];
        total += warps[i];
      }
    }
    return make_int2(before, total);
  }
};

// A thread's keys: scores rank, rank + size, ... of a row. kItems 0: any number, read again wherever they are needed.
template <int kItems, bool kBlock, bool kMass>
struct RowKeys {
  using Team = RowTeam<kBlock>;
  static constexpr bool kHeld = kItems > 0, kUnits = kMass && kHeld && !kBlock;  // a large block has no room for units
  const float* scores;
  int64_t n;
  uint32_t keys[kHeld ? kItems : 1];
  uint64_t units[kUnits ? kItems : 1];

  // keys past the row are 0, below every score's
  __device__ RowKeys(const float* row, int64_t columns) : scores(row), n(columns) {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int64_t at = int64_t(i) * Team::size() + Team::rank();
        keys[i] = at < n ? block_key(scores[at]) : 0;
        if constexpr (kUnits) units[i] = score_units(score_of(keys[i]));
      }
    }
  }
  // f(index, key, units()) for each of the team's turns; the index may be past the row
  template <typename F>
  __device__ void each(F f) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        f(int64_t(i) * Team::size() + Team::rank(), keys[i], [&] {
          if constexpr (kUnits) return units[i];
          return score_units(score_of(keys[i]));
        });
    } else {
      for (int64_t first = 0; first < n; first += Team::size()) {
        const int64_t at = first + Team::rank();
        const uint32_t key = at < n ? block_key(scores[at]) : 0;
        f(at, key, [&] { return score_units(score_of(key)); });
      }
    }
  }
  __device__ BlockCut cut(int64_t wanted, double mass) const {
    uint32_t low = ~uint32_t(0), high = 0;
    uint64_t total = 0;
    each([&](int64_t, uint32_t key, auto units) {
      if (key == 0) return;
      low = key < low ? key : low;
      high = key > high ? key : high;
      if constexpr (kMass) total += units();
    });
    low = Team::reduce(low, [](uint32_t a, uint32_t b) { return a < b ? a : b; });
    high = Team::reduce(high, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
    if constexpr (kMass) {
      total = Team::sum(total);
      return cut_by_mass(mass_limit(total, mass), total, n, low, high, [&](uint32_t least) {
        uint64_t sum = 0;
        each([&](int64_t, uint32_t key, auto units) {
          if (key >= least) sum += units();
        });
        return Team::sum(sum);
      });
    } else {
      return cut_by_count(wanted, n, low, high, [&](uint32_t least) {
        int count = 0;
        each([&](int64_t, uint32_t key, auto) { count += key >= least; });
        return int64_t(Team::sum(count));
      });
    }
  }
};

// A warp a row of up to 32 * kItems scores, or a block a row. Keys are halved in rounds of a compare an item and a sum
// over the team, until a bound parts the kept from the others: about 14 rounds for 512 random scores.
// Bytes: the scores and the result once.
template <int kItems, bool kBlock, bool kMass>
__global__ void __launch_bounds__(kBlock ? kMostSelectThreads : kSelectThreads)
    select_blocks_kernel(const float* __restrict__ scores, uint8_t* __restrict__ out, SelectRows rows) {
  using Team = RowTeam<kBlock>;
  const int64_t teams = kBlock ? 1 : blockDim.x / kWarp, own = kBlock ? 0 : threadIdx.x / kWarp;
  for (int64_t row = blockIdx.x * teams + own; row < rows.count; row += gridDim.x * teams) {
    const int64_t b = row / rows.rows / rows.heads, h = row / rows.rows % rows.heads, i = row % rows.rows;
    const RowKeys<kItems, kBlock, kMass> keys(scores + row * rows.columns, rows.columns);
    int64_t wanted = 0;
    if constexpr (!kMass) wanted = rows.wanted[b * rows.wanted_batch + h * rows.wanted_head + i * rows.wanted_row];
    const BlockCut cut = keys.cut(wanted, rows.mass);
    const bool whole = cut.ties >= rows.columns;
    const uint8_t* always = rows.always;
    if (always != nullptr) always += b * rows.always_batch + h * rows.always_head + i * rows.always_row;
    int64_t left = whole ? 0 : cut.ties;  // of the keys that equal the least
    keys.each([&](int64_t at, uint32_t key, auto) {
      bool kept = whole ? key >= cut.least : key > cut.least;
      if (left > 0) {
        const bool tie = key == cut.least;
        const int2 place = Team::place(tie);
        kept |= tie && place.x < left;
        left -= place.y;
      }
      if (at >= rows.columns) return;
      bool value = kept && key != kNeverKey;
      if (always != nullptr) value |= always[at * rows.always_column] != 0;
      out[row * rows.columns + at] = value;
    });
  }
}

}  // namespace pyrx::cuda
