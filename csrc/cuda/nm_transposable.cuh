// Transposable N:M masks: the exact search of 2:4 in the registers of a thread, greedy tiles of any M in a block.
#pragma once

#include <cstring>

#include "cuda/common.cuh"
#include "kernels/nm_transposable.h"

namespace pyrx::cuda {

constexpr int kExactThreads = 256;
constexpr int kGreedyThreads = kMostGroup;  // at most: a thread is a row and a column of a tile

// The pattern of the 4 x 4 tile whose rows begin at rows[0][offset].
template <bool kMagnitude, typename T, int N>
__device__ inline uint32_t tile_pattern(const Vector<T, N> (&rows)[4], int offset) {
  TileSearch<Acc<T>, uint32_t> tile;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const auto value = [&](int c) { return tile_value<Acc<T>>(widen(rows[r].v[offset + c]), kMagnitude); };
    tile.set_row(r, value(0), value(1), value(2), value(3));
  }
  return tile.search();
}

// Two tiles side by side a thread: 8 consecutive scores of four rows, aligned to 16 bytes where kWhole, which needs
// columns that 8 divides. Scores (4 rows, columns), aligned to four elements.
// Bytes: the scores and the mask once over 4.8 TB/s. Operations: about 380 a tile.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kExactThreads)
    nm_transposable_exact_kernel(const T* scores, uint8_t* mask, int64_t rows, int64_t columns, bool magnitude,
                                 bool packed) {
  const int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (first >= columns) return;
  const bool both = kWhole || first + 4 < columns;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    Vector<T, 8> scored[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const T* from = scores + (4 * row + r) * columns + first;
      if constexpr (kWhole) {
        scored[r] = load<T, 8>(from);
      } else {
        const Vector<T, 4> left = load<T, 4>(from), right = both ? load<T, 4>(from + 4) : left;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          scored[r].v[c] = left.v[c];
          scored[r].v[4 + c] = right.v[c];
        }
      }
    }
    const uint32_t left = magnitude ? tile_pattern<true>(scored, 0) : tile_pattern<false>(scored, 0);
    uint32_t right = 0;
    if (both) right = magnitude ? tile_pattern<true>(scored, 4) : tile_pattern<false>(scored, 4);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t low = left >> 4 * r & 15, high = right >> 4 * r & 15;
      if (packed) {
        mask[(4 * row + r) * ((columns + 7) / 8) + first / 8] = static_cast<uint8_t>(low | high << 4);
        continue;
      }
      uint8_t* to = mask + (4 * row + r) * columns + first;
      const Vector<uint32_t, 2> bytes{{bytes_of_row(low), bytes_of_row(high)}};
      if constexpr (kWhole) {
        store(reinterpret_cast<uint32_t*>(to), bytes);
      } else {
        *reinterpret_cast<uint32_t*>(to) = bytes.v[0];
        if (both) *reinterpret_cast<uint32_t*>(to + 4) = bytes.v[1];
      }
    }
  }
}

template <typename U, typename T>
__device__ inline U key_of(T score, U infinity, bool magnitude) {
  U bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return rank_key(bits, infinity, magnitude);
}
__device__ inline uint16_t greedy_key(__half x, bool magnitude) { return key_of(x, kInfinityHalf, magnitude); }
__device__ inline uint16_t greedy_key(__nv_bfloat16 x, bool magnitude) { return key_of(x, kInfinityBFloat16, magnitude); }
__device__ inline uint32_t greedy_key(float x, bool magnitude) { return key_of(x, kInfinityFloat, magnitude); }
__device__ inline uint64_t greedy_key(double x, bool magnitude) { return key_of(x, kInfinityDouble, magnitude); }

// Scores (rows of tiles x m, columns) as `count` tiles, one row of tiles after another.
struct GreedyTiles {
  int64_t columns, count;
  NM nm;
  int a_block;  // tiles of a block: blockDim.x is m times as many
  bool staged;  // in shared memory, else read where they are
};

// A tile's rows have one element more: threads that read a column or a row each meet no bank conflicts.
constexpr int64_t greedy_shared_bytes(int m, int tiles, int64_t element) { return int64_t(tiles) * m * (m + 1) * element; }

// In each round every element is kept that is the first, by rank and index, of what is left in its row and in its
// column: nothing before it can take their room. The first of a tile is among them, so a round that keeps none is the
// last. A thread holds the first of its row and of its column, and looks for another one when that is gone.
// Bytes: the scores and the mask once. Operations: m reads of shared memory a row or column and time its first is gone.
template <typename T>
__global__ void __launch_bounds__(kGreedyThreads)
    nm_transposable_greedy_kernel(const T* scores, uint8_t* mask, GreedyTiles tiles) {
  PYRX_DYNAMIC_SHARED(T, staged);
  __shared__ int row_first[kGreedyThreads], column_first[kGreedyThreads];  // -1: none
  __shared__ bool row_full[kGreedyThreads], column_full[kGreedyThreads];
  __shared__ uint32_t kept[kGreedyThreads][kMostGroup / 32];  // bits of a row
  __shared__ bool progress[2];
  constexpr int kUnknown = -2;
  const int m = tiles.nm.m, thread = threadIdx.x, own = thread % m, base = thread - own;
  const auto is_kept = [&](int r, int c) { return (kept[base + r][c / 32] >> c % 32 & 1) != 0; };
  for (int64_t block = int64_t(blockIdx.x) * tiles.a_block; block < tiles.count; block += int64_t(gridDim.x) * tiles.a_block) {
    const int64_t tile = block + thread / m, across = tiles.columns / m;
    const bool here = tile < tiles.count;
    const int64_t corner = tile / across * m * tiles.columns + tile % across * m;
    const T* at = scores + corner;
    int64_t stride = tiles.columns;
    __syncthreads();  // the tiles before have been read
    if (tiles.staged) {
      T* copy = staged + base * (m + 1);
      for (int r = 0; here && r < m; ++r) copy[r * (m + 1) + own] = at[r * stride + own];
      at = copy;
      stride = m + 1;
    }
    row_full[thread] = column_full[thread] = false;
    for (int word = 0; word < kMostGroup / 32; ++word) kept[thread][word] = 0;
    __syncthreads();
    int row_room = tiles.nm.n, column_room = tiles.nm.n, in_row = kUnknown, in_column = kUnknown;
    for (int round = 0;; ++round) {
      if (thread == 0) progress[round % 2] = false;  // two, as the one before may still be read
      if (here) {
        if (row_room == 0) in_row = -1;
        if (in_row == kUnknown || (in_row >= 0 && (is_kept(own, in_row) || column_full[base + in_row]))) {
          in_row = -1;
          auto best = greedy_key(at[own * stride], tiles.nm.magnitude);
          for (int c = 0; c < m; ++c) {
            if (is_kept(own, c) || column_full[base + c]) continue;
            const auto key = greedy_key(at[own * stride + c], tiles.nm.magnitude);
            if (in_row < 0 || key > best) in_row = c, best = key;
          }
        }
        if (column_room == 0) in_column = -1;
        if (in_column == kUnknown || (in_column >= 0 && (is_kept(in_column, own) || row_full[base + in_column]))) {
          in_column = -1;
          auto best = greedy_key(at[own], tiles.nm.magnitude);
          for (int r = 0; r < m; ++r) {
            if (is_kept(r, own) || row_full[base + r]) continue;
            const auto key = greedy_key(at[r * stride + own], tiles.nm.magnitude);
            if (in_column < 0 || key > best) in_column = r, best = key;
          }
        }
        row_first[thread] = in_row;
        column_first[thread] = in_column;
      }
      __syncthreads();
      if (here) {
        if (in_row >= 0 && column_first[base + in_row] == own) {
          kept[thread][in_row / 32] |= 1u << in_row % 32;
          row_full[thread] = --row_room == 0;
          progress[round % 2] = true;
        }
        if (in_column >= 0 && row_first[base + in_column] == own) column_full[thread] = --column_room == 0;
      }
      __syncthreads();
      if (!progress[round % 2]) break;
    }
    for (int r = 0; here && r < m; ++r) mask[corner + r * tiles.columns + own] = is_kept(r, own);
  }
}

// Bits of rows of bytes, eight to a byte.
__global__ void __launch_bounds__(kExactThreads)
    nm_transposable_pack_kernel(const uint8_t* bytes, uint8_t* bits, int64_t rows, int64_t columns) {
  const int64_t across = (columns + 7) / 8, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * across; i += step) {
    const int64_t row = quotient(i, across), column = (i - row * across) * 8;
    const uint8_t* from = bytes + row * columns + column;
    uint32_t found = 0;
    if (columns % 8 == 0) {  // and bytes are aligned, as allocations are
      const Vector<uint32_t, 2> eight = load<uint32_t, 2>(reinterpret_cast<const uint32_t*>(from));
      // each byte is 0 or 1: its bit goes to the top byte, the lowest byte's the lowest
      found = (eight.v[0] * 0x10204080u >> 28) | (eight.v[1] * 0x10204080u >> 28) << 4;
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (column + j < columns) found |= uint32_t(from[j]) << j;
    }
    bits[i] = static_cast<uint8_t>(found);
  }
}

}  // namespace pyrx::cuda
