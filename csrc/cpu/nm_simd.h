// Row kernels of the N:M ops, compiled like those of simd.h for plain x86-64 (or any machine), AVX2 and AVX-512.
// No torch headers. Bits are one per element, little-endian.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"
#include "kernels/masked_update.h"
#include "kernels/nm_sparsity.h"

namespace pyrx::cpu {

// Bits one behind another.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* to) : to_(to) {}
  ~BitWriter() {
    for (; filled_ > 0; filled_ -= 8, last_ >>= 8) *to_++ = static_cast<uint8_t>(last_);
  }
  // the lowest n <= 32 bits of a value that has no others
  void put(uint32_t value, int n) {
    last_ |= static_cast<uint64_t>(value) << filled_;
    filled_ += n;
    if (filled_ < 32) return;
    const uint32_t word = static_cast<uint32_t>(last_);
    for (int i = 0; i < 4; ++i) *to_++ = static_cast<uint8_t>(word >> 8 * i);
    last_ >>= 32;
    filled_ -= 32;
  }
  // bits first .. first + n - 1
  void put(const uint8_t* bits, int64_t first, int64_t n) {
    bits += first / 8;
    const int shift = static_cast<int>(first % 8);
    for (; n >= 32; n -= 32, bits += 4) {
      const uint32_t word = bits[0] | bits[1] << 8 | bits[2] << 16 | static_cast<uint32_t>(bits[3]) << 24;
      put(shift == 0 ? word : word >> shift | static_cast<uint32_t>(bits[4]) << (32 - shift), 32);
    }
    for (; n > 0; n -= 8, ++bits) {
      const int count = static_cast<int>(std::min<int64_t>(8, n));
      uint32_t byte = static_cast<uint32_t>(bits[0]) >> shift;
      if (shift + count > 8) byte |= static_cast<uint32_t>(bits[1]) << (8 - shift);
      put(byte & ((1u << count) - 1), count);
    }
  }

 private:
  uint8_t* to_;
  uint64_t last_ = 0;
  int filled_ = 0;
};

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
  // rows of `width` < 8 bits, one behind another, to a byte each, and back
  void (*spread)(const uint8_t* bits, int64_t rows, int width, uint8_t* bytes);
  void (*gather)(const uint8_t* bytes, int64_t rows, int width, uint8_t* bits);
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
