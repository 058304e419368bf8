// Includes the file that PYRX_KERNELS names once for each instruction set, inside that set's namespace and target:
// PYRX_ISA is 0, 2 (AVX2) or 512 (AVX-512).
#define PYRX_ISA 0
namespace pyrx::cpu::plain {
#include PYRX_KERNELS
}
#undef PYRX_ISA

#ifdef PYRX_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#define PYRX_ISA 2
namespace pyrx::cpu::avx2 {
#include PYRX_KERNELS
}
#undef PYRX_ISA
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
#define PYRX_ISA 512
namespace pyrx::cpu::avx512 {
#include PYRX_KERNELS
}
#undef PYRX_ISA
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#undef PYRX_KERNELS
