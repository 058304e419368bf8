#include "cpu/nm_simd.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/isa.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // of the undefined values in GCC 12's own intrinsics
#endif

#define PYRX_KERNELS "cpu/nm_simd.inl"
#include "cpu/each_isa.inl"

namespace pyrx::cpu {

template <typename T>
const NMKernels<T>& nm_kernels() {
  PYRX_PICK(nm_table<T>())
}
template const NMKernels<float>& nm_kernels<float>();
template const NMKernels<double>& nm_kernels<double>();
template const NMKernels<bfloat16>& nm_kernels<bfloat16>();
template const NMKernels<float16>& nm_kernels<float16>();

template <typename T>
const NMTransposableKernels<T>& nm_transposable_kernels() {
  PYRX_PICK(nm_transposable_table<T>())
}
template const NMTransposableKernels<float>& nm_transposable_kernels<float>();
template const NMTransposableKernels<double>& nm_transposable_kernels<double>();
template const NMTransposableKernels<bfloat16>& nm_transposable_kernels<bfloat16>();
template const NMTransposableKernels<float16>& nm_transposable_kernels<float16>();

template <typename T>
const NMPackedKernels<T>& nm_packed_kernels() {
  PYRX_PICK(nm_packed_table<T>())
}
template const NMPackedKernels<float>& nm_packed_kernels<float>();
template const NMPackedKernels<double>& nm_packed_kernels<double>();
template const NMPackedKernels<bfloat16>& nm_packed_kernels<bfloat16>();
template const NMPackedKernels<float16>& nm_packed_kernels<float16>();

template <typename T>
const MaskedKernels<T>& masked_kernels() {
  PYRX_PICK(masked_table<T>())
}
template const MaskedKernels<float>& masked_kernels<float>();
template const MaskedKernels<double>& masked_kernels<double>();
template const MaskedKernels<bfloat16>& masked_kernels<bfloat16>();
template const MaskedKernels<float16>& masked_kernels<float16>();

const NMByteKernels& nm_byte_kernels() { PYRX_PICK(nm_byte_table()) }

}  // namespace pyrx::cpu
