// Dropout and its mask: one Philox call a group of eight elements, one 16-byte access (or two) each way.
#pragma once

#include "cuda/common.cuh"

namespace pyrx::cuda {

constexpr int kDropoutThreads = 256;
constexpr int kDropoutGroups = 4;  // loads in flight a thread

// Bytes: 2 n sizeof(T) over 4.8 TB/s. Operations: about 120 a group, n / 8 * 120 over 15e12 int32 operations a second:
// for bfloat16 1.0 us against 1.2 us of memory a million elements, for wider types memory alone.
template <typename T>
__global__ void __launch_bounds__(kDropoutThreads)
    dropout_kernel(const T* input, T* output, const int64_t* seed_at, int64_t numel, SampleMask mask, bool aligned) {
  const uint64_t seed = static_cast<uint64_t>(*seed_at);
  const Acc<T> scale = scale_of<Acc<T>>(mask);
  const bool untouched = mask.threshold == 0;
  const int64_t tile = int64_t(kDropoutThreads) * kDropoutGroups;  // groups a block takes at a time
  for (int64_t first = blockIdx.x * tile + threadIdx.x; first * kGroup < numel; first += gridDim.x * tile) {
    Vector<T, kGroup> groups[kDropoutGroups];
#pragma unroll
    for (int i = 0; i < kDropoutGroups; ++i) {
      const int64_t at = (first + i * kDropoutThreads) * kGroup;
      if (at < numel) groups[i] = load_group(input + at, numel - at < kGroup ? int(numel - at) : kGroup, aligned);
    }
#pragma unroll
    for (int i = 0; i < kDropoutGroups; ++i) {
      const int64_t group = first + i * kDropoutThreads, at = group * kGroup;
      if (at < numel) {
        const uint32_t bits = untouched ? 0 : group_bits(seed, group, mask);
        store_group(output + at, drop(groups[i], bits, scale, untouched),
                    numel - at < kGroup ? int(numel - at) : kGroup, aligned);
      }
    }
  }
}

// Bytes: n over 4.8 TB/s; operations: n / 8 * 100, ten times as long. output: bool, 16-byte aligned.
__global__ void __launch_bounds__(kDropoutThreads)
    mask_kernel(uint8_t* output, const int64_t* seed_at, int64_t numel, SampleMask mask) {
  const uint64_t seed = static_cast<uint64_t>(*seed_at);
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; group * kGroup < numel; group += stride) {
    const uint32_t bits = group_bits(seed, group, mask);
    Vector<uint8_t, kGroup> bytes;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) bytes.v[j] = bits >> j & 1;
    const int64_t left = numel - group * kGroup;
    if (left >= kGroup) {
      store(output + group * kGroup, bytes);
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (j < left) output[group * kGroup + j] = bytes.v[j];
    }
  }
}

// Bytes: n / 8 over 4.8 TB/s; operations: n / 8 * 100. output: (rows, ceil(columns / 8)), a thread a byte; where
// columns is no multiple of 8 the byte's elements lie in two groups.
__global__ void __launch_bounds__(kDropoutThreads)
    packed_mask_kernel(uint8_t* output, const int64_t* seed_at, int64_t rows, int64_t columns, SampleMask mask) {
  const uint64_t seed = static_cast<uint64_t>(*seed_at);
  const int64_t row_bytes = (columns + 7) / 8, stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * row_bytes; i += stride) {
    const int64_t row = i / row_bytes, column = i % row_bytes * 8, element = row * columns + column;
    const int count = columns - column < 8 ? int(columns - column) : 8, shift = int(element % kGroup);
    uint32_t bits = uint32_t(group_bits(seed, element / kGroup, mask)) >> shift;
    if (shift + count > kGroup) bits |= uint32_t(group_bits(seed, element / kGroup + 1, mask)) << (kGroup - shift);
    output[i] = static_cast<uint8_t>(bits & ((1u << count) - 1));
  }
}

}  // namespace pyrx::cuda
