#include "cpu/attention_simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>

#include "cpu/isa.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // of the undefined values in GCC 12's own intrinsics
#endif

#define PYRX_KERNELS "cpu/attention_simd.inl"
#include "cpu/each_isa.inl"

namespace pyrx::cpu {

template <typename T>
const LogitKernels<T>& logit_kernels() {
  PYRX_PICK(logit_table<T>())
}
template const LogitKernels<float>& logit_kernels<float>();
template const LogitKernels<double>& logit_kernels<double>();
template const LogitKernels<bfloat16>& logit_kernels<bfloat16>();
template const LogitKernels<float16>& logit_kernels<float16>();

template <typename G>
const GradientKernels<G>& gradient_kernels() {
  PYRX_PICK(gradient_table<G>())
}
template const GradientKernels<float>& gradient_kernels<float>();
template const GradientKernels<double>& gradient_kernels<double>();
template const GradientKernels<bfloat16>& gradient_kernels<bfloat16>();
template const GradientKernels<float16>& gradient_kernels<float16>();

template <typename G>
const SoftmaxKernels<G>& softmax_kernels() {
  PYRX_PICK(softmax_table<G>())
}
template const SoftmaxKernels<float>& softmax_kernels<float>();
template const SoftmaxKernels<double>& softmax_kernels<double>();
template const SoftmaxKernels<bfloat16>& softmax_kernels<bfloat16>();
template const SoftmaxKernels<float16>& softmax_kernels<float16>();

template <typename G>
const FusedKernels<G>& fused_kernels() {
  PYRX_PICK(fused_table<G>())
}
template const FusedKernels<float>& fused_kernels<float>();
template const FusedKernels<bfloat16>& fused_kernels<bfloat16>();

template <typename Acc>
const MassKernels<Acc>& mass_kernels() {
  PYRX_PICK(mass_table<Acc>())
}
template const MassKernels<float>& mass_kernels<float>();
template const MassKernels<double>& mass_kernels<double>();

}  // namespace pyrx::cpu
