// Row kernels of the N:M ops, compiled like those of simd.h for plain x86-64 (or any machine), AVX2 and AVX-512.
// No torch headers. Bits are one per element, little-endian.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"
#include "kernels/masked_update.h"
#include "kernels/nm_sparsity.h"
#include "kernels/nm_transposable.h"

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

constexpr int kLaneGroup = 16;  // the largest M whose greedy tiles lie in the lanes of vectors; larger ones are sorted

// Masks of `tiles` tiles side by side, whose rows are `stride` elements apart and those of the result out_stride bytes.
template <typename T>
struct NMTransposableKernels {
  // 2:4, as bytes or bits
  void (*exact)(const T* scores, int64_t stride, int64_t tiles, bool magnitude, bool packed, uint8_t* out,
                int64_t out_stride);
  // as bytes; scratch: 2 m^2 scores and 2 m^2 uint16 where m > kLaneGroup, aligned to 8 bytes
  void (*greedy)(const T* scores, int64_t stride, int64_t tiles, const NM& nm, void* scratch, uint8_t* bytes,
                 int64_t bytes_stride);
};

template <typename T>
const NMTransposableKernels<T>& nm_transposable_kernels();

constexpr int64_t kPackedLanes = 16;     // elements of one vector of x
constexpr int64_t kDotBatch = 4;
constexpr int64_t kPackedSegment = 1024;  // most values of a row that `multiply` takes at once

// Rows of a compressed weight, or a run of their groups.
template <typename T>
struct PackedRows {
  const T* values;         // (rows, groups, n)
  const uint8_t* indices;  // likewise
  int64_t stride;          // from row to row of both
  int64_t rows, groups;
  int n, m;
};

// The products give false, and anything, where an index is m or more; what it points to is not read.
template <typename T>
struct NMPackedKernels {
  using Acc = accumulate_t<T>;
  int most_vectors;
  // sums[r][b] += row r times x[.][b]; x (groups * m, vectors * 16), sums (rows, vectors * 16)
  bool (*multiply)(const PackedRows<T>& weight, const Acc* x, int vectors, Acc* sums);
  // Up to how many rows of x `dot` is the faster of the two, 0: it does not take this N:M. Null where it is not.
  int (*most_dots)(int n, int m);
  // sums[r][b] += row r times x[b]; x (batch, groups * m), sums (rows, batch), batch up to kDotBatch
  bool (*dot)(const PackedRows<T>& weight, const Acc* x, int64_t x_stride, int batch, Acc* sums);
  void (*widen)(const T* x, int64_t n, Acc* out);
  void (*narrow)(const Acc* x, int64_t n, T* out);
};

template <typename T>
const NMPackedKernels<T>& nm_packed_kernels();

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
