#include "cpu/simd.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "cpu/isa.h"

#define PYRX_KERNELS "cpu/simd.inl"
#include "cpu/each_isa.inl"

namespace pyrx::cpu {

const char* capability() { return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "default"; }

const MaskKernels& mask_kernels() { PYRX_PICK(mask_table()) }
const ByteKernels& byte_kernels() { PYRX_PICK(byte_table()) }
const SumKernels& sum_kernels() { PYRX_PICK(sum_table()) }
const NormalKernels& normal_kernels() { PYRX_PICK(normal_table()) }

template <typename T>
const NoiseKernels<T>& noise_kernels() {
  PYRX_PICK(noise_table<T>())
}

template <typename In, typename Out>
const MixKernels<In, Out>& mix_kernels() {
  PYRX_PICK(mix_table<In, Out>())
}

template <typename T>
const PairKernels<T>& pair_kernels() {
  PYRX_PICK(pair_table<T>())
}

template <typename T>
const BlendKernels<T>& blend_kernels() {
  PYRX_PICK(blend_table<T>())
}

template <typename T>
const ElementKernels<T>& element_kernels() {
  PYRX_PICK(element_table<T>())
}

template <typename Acc>
const AccumulatorKernels<Acc>& accumulator_kernels() {
  PYRX_PICK(accumulator_table<Acc>())
}

template <typename T, typename G>
const HeadKernels<T, G>& head_kernels() {
  PYRX_PICK(head_table<T, G>())
}

template <typename T, typename O>
const LossKernels<T, O>& loss_kernels() {
  PYRX_PICK(loss_table<T, O>())
}

#define PYRX_PIXELS(In)                                                 \
  template const PairKernels<In>& pair_kernels<In>();                   \
  template const BlendKernels<In>& blend_kernels<In>();                 \
  template const MixKernels<In, float>& mix_kernels<In, float>();       \
  template const MixKernels<In, double>& mix_kernels<In, double>();     \
  template const MixKernels<In, bfloat16>& mix_kernels<In, bfloat16>(); \
  template const MixKernels<In, float16>& mix_kernels<In, float16>();
PYRX_PIXELS(uint8_t)
PYRX_PIXELS(float)
PYRX_PIXELS(double)
PYRX_PIXELS(bfloat16)
PYRX_PIXELS(float16)
template const MixKernels<uint8_t, uint8_t>& mix_kernels<uint8_t, uint8_t>();

template const NoiseKernels<float>& noise_kernels<float>();
template const NoiseKernels<double>& noise_kernels<double>();
template const NoiseKernels<bfloat16>& noise_kernels<bfloat16>();
template const NoiseKernels<float16>& noise_kernels<float16>();
template const ElementKernels<float>& element_kernels<float>();
template const ElementKernels<double>& element_kernels<double>();
template const ElementKernels<bfloat16>& element_kernels<bfloat16>();
template const ElementKernels<float16>& element_kernels<float16>();
template const AccumulatorKernels<float>& accumulator_kernels<float>();
template const AccumulatorKernels<double>& accumulator_kernels<double>();
template const HeadKernels<float, float>& head_kernels<float, float>();
template const HeadKernels<double, double>& head_kernels<double, double>();
template const HeadKernels<bfloat16, bfloat16>& head_kernels<bfloat16, bfloat16>();
template const HeadKernels<bfloat16, float>& head_kernels<bfloat16, float>();
template const HeadKernels<float16, float16>& head_kernels<float16, float16>();
template const HeadKernels<float16, float>& head_kernels<float16, float>();
template const LossKernels<float, float>& loss_kernels<float, float>();
template const LossKernels<double, double>& loss_kernels<double, double>();
template const LossKernels<bfloat16, bfloat16>& loss_kernels<bfloat16, bfloat16>();
template const LossKernels<float16, float>& loss_kernels<float16, float>();

}  // namespace pyrx::cpu
