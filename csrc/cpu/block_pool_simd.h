// Blocks of tokens to their means, compiled apart from simd.h's kernels and picked at run time. No torch headers.
#pragma once

#include "cpu/simd.h"
#include "kernels/block_pool.h"

namespace pyrx::cpu {

template <typename T>
struct PoolKernels {
  using Acc = accumulate_t<T>;
  // `count` tokens of x, (size,) each in rows of `stride`, less `mean` (size,) or null: their mean goes to `means`
  // (size,), and the result is how alike they are. `directions`: scratch, (size,).
  Acc (*pool)(const T* x, int64_t stride, int64_t count, int64_t size, const Acc* mean, Acc* means, Acc* directions);
};

template <typename T>
const PoolKernels<T>& pool_kernels();

}  // namespace pyrx::cpu
