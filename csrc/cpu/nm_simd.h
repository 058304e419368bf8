// Row kernels of the N:M ops, compiled like those of simd.h for plain x86-64 (or any machine), AVX2 and AVX-512.
// No torch headers. Bits are one per element, little-endian.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
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

}  // namespace pyrx::cpu
