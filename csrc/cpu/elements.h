// What the elementwise ops share: types, chunks of the flat index.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "check.h"
#include "cpu/simd.h"
#include "layout.h"

namespace pyrx::cpu {

constexpr int64_t kChunk = 16384;  // elements a thread takes at a time: a multiple of 8, inside the first-level cache

inline uint64_t seed_value(const at::Tensor& seed) { return static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()); }

template <typename Acc>
Acc keep_scale(int64_t threshold) {
  return static_cast<Acc>(kLevels) / static_cast<Acc>(kLevels - threshold);
}

// f(storage type) for a checked floating-point dtype.
template <typename F>
void dispatch_storage(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kFloat: return f(float());
    case at::kDouble: return f(double());
    case at::kBFloat16: return f(bfloat16());
    default: return f(float16());
  }
}

// Of images: bytes too.
template <typename F>
void dispatch_pixels(at::ScalarType dtype, F f) {
  if (dtype == at::kByte) return f(uint8_t());
  dispatch_storage(dtype, f);
}

// f(first, n, bits) over chunks of [0, numel), first a multiple of 8; bits are the thread's own, for kChunk elements.
template <typename F>
void for_chunks(int64_t numel, F f) {
  at::parallel_for(0, (numel + kChunk - 1) / kChunk, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> bits(kChunk / 8);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk;
      f(first, std::min(kChunk, numel - first), bits.data());
    }
  });
}

}  // namespace pyrx::cpu
