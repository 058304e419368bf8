// What every kernel here builds on: element types, 16-byte accesses, warp and block reductions.
// No torch header; on the host the tests' cuda_shim.h stands in for CUDA and is included first.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define PYRX_DYNAMIC_SHARED(type, name)                               \
  extern __shared__ __align__(16) unsigned char pyrx_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(pyrx_dynamic_shared)
#endif

#include "kernels/dropout.h"

namespace pyrx::cuda {

// What sums and products of T are made in.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using Acc = typename Accumulator<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T narrow(Acc<T> x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline double narrow<double>(double x) { return x; }
template <>
__device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// a / b of small numbers by a 32-bit division, which is a fifth of the other's instructions.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}

// N consecutive elements, moved in accesses of up to 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T v[N];
};

template <typename T, int N>
__device__ inline Vector<T, N> load(const T* from) { return *reinterpret_cast<const Vector<T, N>*>(from); }

// To global memory. Of a plain assignment nvcc often makes a store for each element.
template <typename T, int N>
__device__ inline void store(T* to, const Vector<T, N>& value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof value % 8 == 0) {
    uint2 words[sizeof value / 8];
    std::memcpy(words, &value, sizeof value);
    const size_t at = __cvta_generic_to_global(to);
    if constexpr (sizeof value == 8)
      asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(words[0].x), "r"(words[0].y) : "memory");
    else
#pragma unroll
      for (size_t i = 0; i < sizeof value / 16; ++i)
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at + 16 * i), "r"(words[2 * i].x),
                     "r"(words[2 * i].y), "r"(words[2 * i + 1].x), "r"(words[2 * i + 1].y)
                     : "memory");
    return;
  }
#endif
  *reinterpret_cast<Vector<T, N>*>(to) = value;
}

// `count` elements (8 but at a tensor's end); `aligned`: to 16 bytes.
template <typename T>
__device__ inline Vector<T, kGroup> load_group(const T* from, int count, bool aligned) {
  if (aligned && count == kGroup) return load<T, kGroup>(from);
  Vector<T, kGroup> group;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) group.v[j] = j < count ? from[j] : narrow<T>(0);
  return group;
}

template <typename T>
__device__ inline void store_group(T* to, const Vector<T, kGroup>& group, int count, bool aligned) {
  if (aligned && count == kGroup) return store(to, group);
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    if (j < count) to[j] = group.v[j];
}

// SampleMask::scale in the accumulation type.
template <typename A>
__device__ inline A scale_of(const SampleMask& mask) { return A(kLevels) / A(kLevels - mask.threshold); }

// A kept element times `scale`, a dropped one exactly 0 whatever it was. Without a threshold no bit changes.
template <typename T>
__device__ inline Vector<T, kGroup> drop(Vector<T, kGroup> group, uint32_t bits, Acc<T> scale, bool untouched) {
  if (untouched) return group;
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    group.v[j] = bits >> j & 1 ? narrow<T>(widen(group.v[j]) * scale) : narrow<T>(0);
  return group;
}

// exp(x) for a softmax, where x <= 0: the error grows with |x|, but not against exp(x)'s share of a sum of at least one.
__device__ inline float exponential(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));  // __expf minds subnormal results
  return y;
#else
  return std::exp(x);
#endif
}
__device__ inline double exponential(double x) { return std::exp(x); }

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Every lane gets the result, the same bits on every lane and from run to run.
template <typename A>
__device__ inline A warp_sum(A x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// A NaN is passed over, as fmax does.
template <typename A>
__device__ inline A warp_max(A x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmax(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// The sum over a one-dimensional block of whole warps, on every thread; to be called by all of them.
__device__ inline double block_sum(double x) {
  __shared__ double warps[32];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, count = blockDim.x / kWarp;
  x = warp_sum(x);
  __syncthreads();  // the call before may still be reading
  if (lane == 0) warps[warp] = x;
  __syncthreads();
  return warp_sum(lane < count ? warps[lane] : 0.0);
}

}  // namespace pyrx::cuda
