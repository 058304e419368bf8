#include "cpu/nm_simd.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/isa.h"

// The kernels once more for each instruction set: PYRX_ISA is 0, 2 (AVX2) or 512 (AVX-512).
#define PYRX_ISA 0
namespace pyrx::cpu::plain {
#include "cpu/nm_simd.inl"
}
#undef PYRX_ISA

#ifdef PYRX_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#define PYRX_ISA 2
namespace pyrx::cpu::avx2 {
#include "cpu/nm_simd.inl"
}
#undef PYRX_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define PYRX_ISA 512
namespace pyrx::cpu::avx512 {
#include "cpu/nm_simd.inl"
}
#undef PYRX_ISA
#pragma GCC pop_options
#endif

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
const MaskedKernels<T>& masked_kernels() {
  PYRX_PICK(masked_table<T>())
}
template const MaskedKernels<float>& masked_kernels<float>();
template const MaskedKernels<double>& masked_kernels<double>();
template const MaskedKernels<bfloat16>& masked_kernels<bfloat16>();
template const MaskedKernels<float16>& masked_kernels<float16>();

const NMByteKernels& nm_byte_kernels() { PYRX_PICK(nm_byte_table()) }

}  // namespace pyrx::cpu
