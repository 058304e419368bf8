#include "cpu/block_pool_simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/isa.h"

#define PYRX_KERNELS "cpu/block_pool.inl"
#include "cpu/each_isa.inl"

namespace pyrx::cpu {

template <typename T>
const PoolKernels<T>& pool_kernels() {
  PYRX_PICK(pool_table<T>())
}
template const PoolKernels<float>& pool_kernels<float>();
template const PoolKernels<double>& pool_kernels<double>();
template const PoolKernels<bfloat16>& pool_kernels<bfloat16>();
template const PoolKernels<float16>& pool_kernels<float16>();

}  // namespace pyrx::cpu
