// Means of blocks of tokens: a block of threads takes a block of tokens, a few lanes a token.
#pragma once

#include "cuda/common.cuh"
#include "kernels/block_pool.h"

namespace pyrx::cuda {

constexpr int kPoolThreads = 256;
constexpr int kPoolWarps = kPoolThreads / kWarp;
constexpr int kPoolSize = kWarp * kGroup;  // most elements of a token

// Lanes of a token, eight elements each: a power of two up to a warp.
inline int pool_lanes(int64_t size) {
  int lanes = 1;
  while (lanes * kGroup < size) lanes *= 2;
  return lanes;
}

// As many threads as a block's tokens keep busy.
inline int pool_threads(const PoolShape& shape) {
  const int64_t lanes = shape.block * pool_lanes(shape.size);
  return lanes >= kPoolThreads ? kPoolThreads : static_cast<int>((lanes + kWarp - 1) / kWarp * kWarp);
}

// Bytes: x once, over 3.3 TB/s (H100). Operations: six an element, and a square root a token.
// mean (B, H, D) may be null; means (B, H, N, D), similarity (B, H, N). `aligned`: every eight elements, to 16 bytes.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads, sizeof(T) == 8 ? 2 : 4)
    block_pool_kernel(const T* __restrict__ x, const Acc<T>* __restrict__ mean, PoolShape shape, int lanes, bool aligned,
                      Acc<T>* __restrict__ means, Acc<T>* __restrict__ similarity) {
  using A = Acc<T>;
  constexpr int kAhead = sizeof(T) == 8 ? 1 : 2;  // tokens whose loads a thread has under way at once
  __shared__ A parts[2][kPoolWarps][kPoolSize];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int first = lane % lanes * kGroup, slots = blockDim.x / lanes, slot = threadIdx.x / lanes;
  const int64_t left = shape.size - first, blocks = shape.blocks();
  const int count = left < 0 ? 0 : left < kGroup ? int(left) : kGroup;
  for (int64_t i = blockIdx.x; i < shape.items(); i += gridDim.x) {
    const int64_t head = i / blocks;
    const PoolItem item = pool_item(shape, head, i - head * blocks);
    A centre[kGroup], sum[kGroup] = {}, direction[kGroup] = {};
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      centre[j] = mean != nullptr && j < count ? mean[head * shape.size + first + j] : A(0);
    for (int64_t start = 0; start < item.tokens; start += kAhead * slots) {
      Vector<T, kGroup> own[kAhead];
#pragma unroll
      for (int t = 0; t < kAhead; ++t) {
        const int64_t token = start + t * slots + slot;
        const int there = token < item.tokens ? count : 0;
        own[t] = load_group(x + item.x + (there > 0 ? token * shape.token_stride + first : 0), there, aligned);
      }
#pragma unroll
      for (int t = 0; t < kAhead; ++t) {
        const bool there = start + t * slots + slot < item.tokens;
        A value[kGroup], squares = 0;
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          value[j] = there ? widen(own[t].v[j]) - centre[j] : A(0);
          squares += value[j] * value[j];
        }
        for (int offset = lanes / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(kAllLanes, squares, offset);
        const A scale = inverse_length(squares);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          sum[j] += value[j];
          direction[j] += value[j] * scale;
        }
      }
    }
    for (int offset = lanes; offset < kWarp; offset *= 2) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        sum[j] += __shfl_xor_sync(kAllLanes, sum[j], offset);
        direction[j] += __shfl_xor_sync(kAllLanes, direction[j], offset);
      }
    }
    if (lane < lanes) {  // the item before has read its parts: block_sum has barriers
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        parts[0][warp][first + j] = sum[j];
        parts[1][warp][first + j] = direction[j];
      }
    }
    __syncthreads();
    double squares = 0;
    for (int c = threadIdx.x; c < shape.size; c += blockDim.x) {
      A whole = 0, length = 0;
      for (int w = 0; w < warps; ++w) {
        whole += parts[0][w][c];
        length += parts[1][w][c];
      }
      means[i * shape.size + c] = whole / A(item.tokens);
      squares += double(length) * double(length);
    }
    squares = block_sum(squares);
    if (threadIdx.x == 0) similarity[i] = A(squares / (double(item.tokens) * double(item.tokens)));
  }
}

}  // namespace pyrx::cuda
