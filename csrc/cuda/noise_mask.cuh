// Noise weighed by a mask, and the mask's gradient: a thread makes four normals from one Philox call.
#pragma once

#include "cuda/common.cuh"
#include "kernels/noise_mask.h"

namespace pyrx::cuda {

constexpr int kNoiseThreads = 256;

// Elements first .. first + 3 of a tensor of `numel`; `aligned`: to the four's size.
template <typename T>
__device__ inline Vector<T, 4> load_four(const T* from, int64_t first, int64_t numel, bool aligned) {
  if (aligned && first + 4 <= numel) return load<T, 4>(from + first);
  Vector<T, 4> four;
#pragma unroll
  for (int j = 0; j < 4; ++j) four.v[j] = first + j < numel ? from[first + j] : narrow<T>(0);
  return four;
}

// Bytes: 2 n sizeof(T) and the mask over 4.8 TB/s. Operations: about 300 a four (Philox 100, two roots, two divisions,
// four polynomials): n / 4 * 300 over 30e12 a second, as long as the memory for float32, twice as long for 16 bits.
// images, output (N, C, pixels); mask (N, 1, pixels) where `broadcast`, else as images.
template <typename T>
__global__ void __launch_bounds__(kNoiseThreads)
    noise_mask_kernel(const T* images, const T* mask, T* output, const int64_t* seed_at, int64_t numel, int64_t channels,
                      int64_t pixels, bool broadcast, Noise noise, bool aligned) {
  const uint64_t seed = static_cast<uint64_t>(*seed_at);
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; group * 4 < numel; group += stride) {
    const int64_t first = group * 4;
    const Vector<T, 4> x = load_four(images, first, numel, aligned);
    Vector<T, 4> weight;
    if (!broadcast) {
      weight = load_four(mask, first, numel, aligned);
    } else {
      int64_t sample = first / (channels * pixels), pixel = first % pixels;
      if (aligned && pixels % 4 == 0) {
        weight = load<T, 4>(mask + sample * pixels + pixel);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t at = first + j < numel ? first + j : numel - 1;
          weight.v[j] = mask[at / (channels * pixels) * pixels + at % pixels];
        }
      }
    }
    const Normals drawn = normals(seed, group, noise.sample);
    Vector<T, 4> result;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      result.v[j] = narrow<T>(add_noise<Acc<T>>(widen(x.v[j]), widen(weight.v[j]), noise.of(drawn.v[j])));
    if (aligned && first + 4 <= numel) {
      store(output + first, result);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (first + j < numel) output[first + j] = result.v[j];
    }
  }
}

// Bytes: n sizeof(T) and the mask's over 4.8 TB/s; operations as above. A thread has four pixels of the mask and goes
// through the channels that it serves in order. grad (N, C, pixels); output (N, 1, pixels) where `summed` is C > 1, else
// as grad with `summed` 1. Where pixels is no multiple of four a four's normals lie in two groups. `aligned`: as above.
template <typename T>
__global__ void __launch_bounds__(kNoiseThreads)
    noise_mask_backward_kernel(const T* grad, T* output, const int64_t* seed_at, int64_t planes, int64_t summed,
                               int64_t pixels, Noise noise, bool aligned) {
  const uint64_t seed = static_cast<uint64_t>(*seed_at);
  const int64_t fours = (pixels + 3) / 4, stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < planes * fours; i += stride) {
    const int64_t plane = quotient(i, fours), pixel = (i - plane * fours) * 4;
    Acc<T> sum[4] = {};
    for (int64_t c = 0; c < summed; ++c) {
      const int64_t first = (plane * summed + c) * pixels + pixel;
      const int shift = static_cast<int>(first % 4);
      float drawn[8] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half > 0 && shift == 0) break;
        const Normals made = normals(seed, first / 4 + half, noise.sample);
#pragma unroll
        for (int j = 0; j < 4; ++j) drawn[4 * half + j] = made.v[j];
      }
      // moved down by the bits of the shift: an index that varies would take them to local memory
#pragma unroll
      for (int by = 2; by > 0; by /= 2)
#pragma unroll
        for (int j = 0; j + by < 8; ++j) drawn[j] = shift & by ? drawn[j + by] : drawn[j];
      const Vector<T, 4> upstream = load_four(grad, first, first - pixel + pixels, aligned && shift == 0);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] += mul(widen(upstream.v[j]), static_cast<Acc<T>>(noise.of(drawn[j])));
    }
    T* to = output + plane * pixels + pixel;
    if (aligned && pixels % 4 == 0) {
      Vector<T, 4> result;
#pragma unroll
      for (int j = 0; j < 4; ++j) result.v[j] = narrow<T>(sum[j]);
      store(to, result);
      continue;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (pixel + j < pixels) to[j] = narrow<T>(sum[j]);
  }
}

}  // namespace pyrx::cuda
