// Compressed N:M weights: a thread an element in, a tile in shared memory out.
#pragma once

#include "cuda/common.cuh"
#include "kernels/nm_packed.h"

namespace pyrx::cuda {

constexpr int kPackedThreads = 256;
constexpr int kPackedTile = 2048;  // most elements of a dense tile: sixteen groups of the largest m

// Bytes: the kept values and the bits in, values and indices out; a warp reads and writes runs. Operations: about 130 an
// element, for two divisions and the bits of the group. weight (rows, row_groups, m), bits (rows, row_bytes).
template <typename T>
__global__ void __launch_bounds__(kPackedThreads)
    nm_compress_kernel(const T* weight, const uint8_t* bits, int64_t groups, int64_t row_groups, int64_t row_bytes, int n,
                       int m, T* values, uint8_t* indices) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < groups * m; i += stride) {
    const int64_t group = quotient(i, m), row = quotient(group, row_groups);
    const int place = static_cast<int>(i - group * m);
    const GroupMask mask = group_mask(bits + row * row_bytes, (group - row * row_groups) * m, m);
    const Slot slot = slot_of(mask, place, n);
    if (slot.place < 0) continue;
    values[group * n + slot.place] = slot.kept ? weight[i] : narrow<T>(0);
    indices[group * n + slot.place] = static_cast<uint8_t>(place);
  }
}

// Groups of a tile: a multiple of eight, so that tiles begin at 16-byte boundaries.
PYRX_HOST_DEVICE int packed_tile_groups(int m) { return kPackedTile / m / kGroup * kGroup; }

// Bytes: values, indices and the dense weight, each once. An index of m or more is passed over. `aligned`: output is to
// 16 bytes.
template <typename T>
__global__ void __launch_bounds__(kPackedThreads)
    nm_decompress_kernel(const T* values, const uint8_t* indices, int64_t groups, int n, int m, bool aligned, T* output) {
  __shared__ Vector<T, kGroup> memory[kPackedTile / kGroup];
  T* tile = reinterpret_cast<T*>(memory);
  const int tile_groups = packed_tile_groups(m);
  for (int64_t first = int64_t(blockIdx.x) * tile_groups; first < groups; first += int64_t(gridDim.x) * tile_groups) {
    const int count = groups - first < tile_groups ? static_cast<int>(groups - first) : tile_groups, size = count * m;
    for (int i = threadIdx.x; i < size; i += kPackedThreads) tile[i] = narrow<T>(0);
    __syncthreads();
    for (int k = threadIdx.x; k < count * n; k += kPackedThreads) {
      const int place = indices[first * n + k];
      if (place < m) tile[k / n * m + place] = values[first * n + k];
    }
    __syncthreads();
    T* to = output + first * m;
    for (int i = threadIdx.x * kGroup; i < size; i += kPackedThreads * kGroup) {
      const int left = size - i < kGroup ? size - i : kGroup;
      store_group(to + i, load_group(tile + i, left, true), left, aligned);
    }
    __syncthreads();  // the next tile is cleared
  }
}

}  // namespace pyrx::cuda
