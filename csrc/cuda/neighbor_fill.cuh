// Filling empty places from their neighbours: a block finds for one tile of one image which places are filled when and
// which of them the tile depends on, as rows of bits; each of its warps then works on channels of its own.
#pragma once

#include "cuda/common.cuh"
#include "kernels/neighbor_fill.h"

namespace pyrx::cuda {

constexpr int kFillTile = 32;        // places of a tile on a side
constexpr int kFillIterations = 8;   // most of one launch: a tile's halo on each side
constexpr int kFillThreads = 256;    // most of a block
constexpr int kFillBatch = 8;        // loads in flight a thread

struct FillSizes {
  int64_t channels, height, width;
  int iterations;
  int64_t channels_a_block;
};

// Rows and columns of a tile with its halo; both fit a word of bits.
__host__ __device__ constexpr int fill_side(int iterations) { return kFillTile + 2 * iterations; }

// present and need: (iterations + 1, side) words; list: (side * side,) entries; values: (side, side) a warp.
constexpr int64_t fill_shared_bytes(int iterations, int warps, int64_t element) {
  const int64_t side = fill_side(iterations);
  return 2 * (iterations + 1) * side * 8 + side * side * 4 + warps * side * side * element;
}

__device__ inline int lowest_bit(uint64_t word) {
  const uint32_t low = static_cast<uint32_t>(word);
  return low != 0 ? __ffs(static_cast<int>(low)) - 1 : __ffs(static_cast<int>(word >> 32)) + 31;
}

__device__ inline int bit_count(uint64_t word) {
  return __popc(static_cast<uint32_t>(word)) + __popc(static_cast<uint32_t>(word >> 32));
}

// Row y with the rows beside it, each spread to its neighbouring columns; none beyond the rows.
__device__ inline uint64_t around(const uint64_t* rows, int y, int side) {
  uint64_t found = spread(0, rows[y], 0);
  if (y > 0) found |= spread(0, rows[y - 1], 0);
  if (y + 1 < side) found |= spread(0, rows[y + 1], 0);
  return found;
}

// Bytes: input and output once over 4.8 TB/s (a halo's places are read only where the tile depends on them).
// Operations: about 10 an element, 40 a filled one and iteration for its nine additions and division.
template <typename T>
__global__ void __launch_bounds__(kFillThreads)
    neighbor_fill_kernel(const T* input, const uint8_t* mask, T* output, uint8_t* after, FillSizes sizes) {
  PYRX_DYNAMIC_SHARED(uint64_t, present);
  __shared__ int starts[kFillIterations + 2], counts[kFillIterations + 1];
  const int k = sizes.iterations, side = fill_side(k), threads = blockDim.x, thread = threadIdx.x;
  const int warp = thread / kWarp, lane = thread % kWarp, warps = threads / kWarp;
  uint64_t* need = present + (k + 1) * side;
  uint32_t* list = reinterpret_cast<uint32_t*>(need + (k + 1) * side);
  T* values = reinterpret_cast<T*>(list + side * side) + warp * side * side;

  const int64_t across = (sizes.width + kFillTile - 1) / kFillTile, down = (sizes.height + kFillTile - 1) / kFillTile;
  const int64_t groups = max((sizes.channels + sizes.channels_a_block - 1) / sizes.channels_a_block, int64_t(1));
  const int64_t group = blockIdx.x % groups, tile = blockIdx.x / groups % (across * down);
  const int64_t image = blockIdx.x / groups / (across * down), plane = sizes.height * sizes.width;
  const int64_t x0 = tile % across * kFillTile, y0 = tile / across * kFillTile;
  const int tile_width = min(int64_t(kFillTile), sizes.width - x0), tile_height = min(int64_t(kFillTile), sizes.height - y0);
  const int64_t corner = (y0 - k) * sizes.width + x0 - k;  // of the halo, in the plane

  if (thread <= k) counts[thread] = 0;
  for (int row = warp; row < side; row += warps) {
    const int64_t y = y0 - k + row;
    uint64_t word = 0;
    for (int half = 0; half < 2; ++half) {
      const int64_t x = x0 - k + half * kWarp + lane;
      const bool inside = y >= 0 && y < sizes.height && x >= 0 && x < sizes.width;
      const bool here = inside && mask[image * plane + y * sizes.width + x] != 0;
      word |= static_cast<uint64_t>(__ballot_sync(kAllLanes, here)) << half * kWarp;
    }
    if (lane == 0) present[row] = word;
  }
  __syncthreads();

  // columns of the image
  const int left = x0 < k ? int(k - x0) : 0;
  const int64_t right = sizes.width - x0 + k;
  const uint64_t columns = ~uint64_t(0) << left & (right < 64 ? (uint64_t(1) << right) - 1 : ~uint64_t(0));
  for (int t = 1; t <= k; ++t) {
    for (int row = thread; row < side; row += threads) {
      const int64_t y = y0 - k + row;
      present[t * side + row] = y >= 0 && y < sizes.height ? around(present + (t - 1) * side, row, side) & columns : 0;
    }
    __syncthreads();
  }
  // what the tile depends on, back from its last fills; the tile's own present places are loaded anyway
  for (int t = k; t >= 0; --t) {
    for (int row = thread; row < side; row += threads) {
      const bool in_tile = row >= k && row < k + kFillTile;
      const uint64_t own = in_tile ? ((uint64_t(1) << kFillTile) - 1) << k : 0;
      const uint64_t later = t < k ? around(need + (t + 1) * side, row, side) : 0;
      const uint64_t here = present[t * side + row];
      const uint64_t found = t == 0 ? here & later & ~own : here & ~present[(t - 1) * side + row] & (own | later);
      need[t * side + row] = found;
      if (found != 0) atomicAdd(&counts[t], bit_count(found));
    }
    __syncthreads();
  }
  if (thread == 0) {
    int sum = 0;
    for (int t = 0; t <= k; ++t) {
      starts[t] = sum;
      sum += counts[t];
      counts[t] = starts[t];
    }
    starts[k + 1] = sum;
  }
  __syncthreads();
  // in any order: the places of one iteration do not see each other
  for (int i = thread; i < (k + 1) * side; i += threads) {
    const int t = i / side, row = i % side;
    uint64_t word = need[i];
    int at = word != 0 ? atomicAdd(&counts[t], bit_count(word)) : 0;
    for (; word != 0; word &= word - 1) {
      const int column = lowest_bit(word);
      uint32_t neighbors = 0;
      if (t > 0) {
        // a needed place is never on the halo's rim
        const uint64_t* rows = present + (t - 1) * side + row;
        neighbors = uint32_t(rows[-1] >> (column - 1)) & 7;
        neighbors |= (uint32_t(rows[0] >> (column - 1)) & 1) << 3 | (uint32_t(rows[0] >> (column + 1)) & 1) << 4;
        neighbors |= (uint32_t(rows[1] >> (column - 1)) & 7) << 5;
      }
      list[at++] = uint32_t(row) << 6 | uint32_t(column) | neighbors << 12;
    }
  }
  __syncthreads();

  // element lane + 32 i of the tile, row by row
  const int elements = tile_width * tile_height, magic = 65536 / tile_width + 1;
  uint32_t kept = 0;
  for (int i = 0; i * kWarp + lane < elements; ++i) {
    const int e = i * kWarp + lane, row = e * magic >> 16, column = e - row * tile_width;
    kept |= uint32_t(present[row + k] >> (column + k) & 1) << i;
    if (group == 0 && warp == 0)
      after[image * plane + (y0 + row) * sizes.width + x0 + column] = present[k * side + row + k] >> (column + k) & 1;
  }
  const int64_t first = group * sizes.channels_a_block;
  const int64_t last = min(first + sizes.channels_a_block, sizes.channels);
  const bool filling = starts[k + 1] != 0;
  for (int64_t channel = first + warp; channel < last; channel += warps) {
    const T* from = input + (image * sizes.channels + channel) * plane + corner;
    T* to = output + (image * sizes.channels + channel) * plane + corner;
    for (int i0 = 0; i0 * kWarp < elements; i0 += kFillBatch) {
      T batch[kFillBatch];
#pragma unroll
      for (int j = 0; j < kFillBatch; ++j) {
        const int i = i0 + j, e = i * kWarp + lane, row = e * magic >> 16, column = e - row * tile_width;
        batch[j] = narrow<T>(0);
        if (e < elements && kept >> i & 1) batch[j] = from[(row + k) * sizes.width + column + k];
      }
#pragma unroll
      for (int j = 0; j < kFillBatch; ++j) {
        const int e = (i0 + j) * kWarp + lane, row = e * magic >> 16, column = e - row * tile_width;
        if (e >= elements) continue;
        if (filling) values[(row + k) * side + column + k] = batch[j];
        else to[(row + k) * sizes.width + column + k] = batch[j];
      }
    }
    if (!filling) continue;
    for (int e = lane; e < starts[1]; e += kWarp) {
      const int row = list[e] >> 6 & 63, column = list[e] & 63;
      values[row * side + column] = from[row * sizes.width + column];
    }
    __syncwarp();
    for (int t = 1; t <= k; ++t) {
      for (int e = starts[t] + lane; e < starts[t + 1]; e += kWarp) {
        const uint32_t entry = list[e], neighbors = entry >> 12;
        T* at = values + (entry >> 6 & 63) * side + (entry & 63);
        const auto near = [&](int j, int offset) { return neighbors >> j & 1 ? widen(at[offset]) : Acc<T>(0); };
        const Acc<T> above = near(0, -side - 1) + near(1, -side) + near(2, -side + 1);
        const Acc<T> beside = near(3, -1) + Acc<T>(0) + near(4, 1);
        const Acc<T> below = near(5, side - 1) + near(6, side) + near(7, side + 1);
        *at = narrow<T>(fill_value(above + beside + below, __popc(neighbors)));
      }
      __syncwarp();
    }
    for (int e = lane; e < elements; e += kWarp) {
      const int row = e * magic >> 16, column = e - row * tile_width;
      to[(row + k) * sizes.width + column + k] = values[(row + k) * side + column + k];
    }
    __syncwarp();  // the next channel's values go where these were
  }
}

}  // namespace pyrx::cuda
