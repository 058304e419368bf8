// Row kernels of the N:M ops, compiled like those of simd.h for plain x86-64 (or any machine), AVX2 and AVX-512.
// No torch headers. Bits are one per element, little-endian.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "kernels/masked_update.h"
#include "kernels/nm_sparsity.h"

namespace pyrx::cpu {

// What a run of elements under a mask becomes: kept ones are themselves, bit for bit.
template <typename T>
struct ApplyRun {
  using Acc = accumulate_t<T>;
  Dropped dropped;
  Acc factor;       // kFactor: x * factor
  Acc strength;     // kRegularize: x + strength * weight, each rounded alone
  const T* weight;  // of kRegularize, else null
};

template <typename T>
struct NMKernels {
  // Bits of `groups` groups of m elements, one after another: bit i is element i, the last byte's rest is 0.
  void (*rank_groups)(const T* scores, int64_t groups, const NM& nm, uint8_t* bits);
  // Bits of `columns` groups side by side: element i of each is row i, `stride` elements after row i - 1. Of m rows
  // `rows` are there, the others are padding. Row i's bits go to bits + i * bits_stride.
  void (*rank_columns)(const T* scores, int64_t stride, int64_t rows, int64_t columns, const NM& nm, uint8_t* bits,
                       int64_t bits_stride);
  // out[i] = x[i] where kept, else as the run says; out may be x
  void (*apply)(const ApplyRun<T>& run, const T* x, const uint8_t* bits, int64_t n, T* out);
};

template <typename T>
const NMKernels<T>& nm_kernels();

struct NMByteKernels {
  // bytes[i] = bit i, as bool tensors store it
  void (*unpack)(const uint8_t* bits, int64_t n, uint8_t* bytes);
};
const NMByteKernels& nm_byte_kernels();

// Runs of n elements of an optimizer step, under their old bits (null: all are kept).
template <typename T>
struct MaskedKernels {
  using Acc = accumulate_t<T>;
  void (*adamw)(const AdamWStep<Acc>& step, const T* gradient, const uint8_t* bits, int64_t n, T* weight, T* exp_avg,
                T* exp_avg_sq);
  // momentum: null where the step has none
  void (*sgd)(const SGDStep<Acc>& step, const T* gradient, const uint8_t* bits, int64_t n, T* weight, T* momentum);
};
template <typename T>
const MaskedKernels<T>& masked_kernels();

}  // namespace pyrx::cpu
