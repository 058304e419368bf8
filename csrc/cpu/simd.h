// Row kernels of the CPU backend, compiled for plain x86-64 (or any machine), AVX2 and AVX-512 and picked at run time.
// No torch headers. Bits are one per element, little-endian; a row of n elements has ceil(n / 8) bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/dropout.h"
#include "kernels/multi_sample_dropout.h"
#include "kernels/neighbor_fill.h"
#include "kernels/noise_mask.h"
#include "kernels/random.h"

namespace pyrx::cpu {

// Storage of the 16-bit types; layout of c10::BFloat16 and c10::Half.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elementwise kernels over T; `bits` may be null: every element is kept.
template <typename T>
struct ElementKernels {
  using Acc = accumulate_t<T>;
  // out[i] = kept ? x[i] * scale : 0, with x itself where scale is 1
  void (*dropout)(const T* x, const uint8_t* bits, int64_t n, Acc scale, T* out);
  // sum[i] += kept ? x[i] * scale : 0
  void (*accumulate)(const T* x, const uint8_t* bits, int64_t n, Acc scale, Acc* sum);
  // out[i] = x[i] * scale
  void (*store)(const Acc* x, int64_t n, Acc scale, T* out);
  // out[i] = scale * sum over k < rows of (kept by bits row k ? tile[k][i] : 0)
  void (*fold)(const Acc* tile, int64_t tile_stride, const uint8_t* bits, int64_t bits_stride, int64_t rows, int64_t n,
               Acc scale, T* out);
  // out[i] = scale * tile[i] * level[i], likewise
  void (*fold_level)(const Acc* tile, const Acc* level, int64_t n, Acc scale, T* out);
  // Fills the places of a plane's plan of n blocks, which are in the order of their iterations.
  void (*neighbor_fill)(const FillBlock* plan, int64_t n, int64_t width, T* plane);
  // Likewise, `channels` channels of an image whose pixels are `pixel` elements apart; `zeros` are as many zeros.
  void (*neighbor_fill_channels)(const FillBlock* plan, int64_t n, int64_t width, int64_t pixel, int64_t channels,
                                 const T* zeros, T* image);
};

// What one row of logits is compared with.
template <typename Acc>
struct RowGoal {
  const Acc* class_weight;   // (C,) or null
  const Acc* probabilities;  // (C,) dense target or null
  ClassTarget<Acc> target;   // where probabilities is null
  Acc label_smoothing;
  Acc gradient_factor;  // of the written gradient
  int64_t classes;
};

// One row of the head's GEMM to its loss and its gradient.
template <typename Acc>
struct CrossEntropyRow : RowGoal<Acc> {
  const Acc* raw;   // (C,) product of the masked features, may equal `gradient`
  const Acc* base;  // (C,) unmasked product, the row is base - raw then; null: the row is raw
  const Acc* bias;  // (C,) or null
  Acc scale;        // of the kept features: logits = scale * row + bias
  Acc* gradient;    // (C,) out: gradient_factor * dloss/dlogits
};

// One row of logits likewise; O is T, or float32 for float16 that waits for the loss scale.
template <typename T, typename O>
struct LogitsRow : RowGoal<accumulate_t<T>> {
  const T* logits;           // (C,)
  O* gradient;               // (C,) out, or null
  accumulate_t<T>* scratch;  // (C,), may be the gradient; unread where that is null
};

template <typename T, typename O>
struct LossKernels {
  accumulate_t<T> (*cross_entropy)(const LogitsRow<T, O>& row);
};

constexpr int64_t kSubset = 4;                     // masks that share a table of their 2^4 partial sums
constexpr int64_t kSubsetEntries = 1 << kSubset;
constexpr int64_t kSubsetRows = 8;                 // most rows of one SubsetBlock

// Both gradients of a block of rows b, features d and classes c from s(b, d) = sum over m of kept_m(b, d) G_m(b, c):
// weight_gradient(d, c) += x(b, d) s(b, d, c), input_gradient(b, d) += sum over c of s(b, d, c) weight(d, c).
// s is one table entry for every four masks ("four Russians"), not M multiply-adds.
template <typename Acc>
struct SubsetBlock {
  int64_t rows, features, width, groups;  // width classes, a multiple of 16 up to 64
  const Acc* tables;                      // (rows, groups, 16, width)
  const uint8_t* codes;                   // (rows, features, ceil(groups / 2)): the entries of groups 2q and 2q + 1
  int64_t codes_stride;                   // of rows
  const Acc* x;  // (rows, features)
  int64_t x_stride;
  const Acc* weight;     // (features, width)
  Acc* weight_gradient;  // (features, width) or null
  Acc* input_gradient;   // (rows, features) or null
  int64_t input_stride;
};

// Both gradients of one input row, up to kLookupClasses classes and two groups of masks, by the same sums s(d, c), which
// here are looked up for sixteen features at a time: a class's table is one register, codes are its indices.
constexpr int64_t kLookupClasses = 32;
template <typename Acc>
struct LookupRow {
  int64_t features, classes, masks;
  const Acc* base;  // (classes,) of the unmasked row, or null
  const Acc* rows;  // (masks, classes) G_m
  int64_t rows_stride;
  const uint8_t* codes;  // (features,)
  const Acc* x;          // (features,); readable, as the others, up to a multiple of sixteen features
  const Acc* weight;     // (classes, features)
  int64_t weight_stride;
  Acc* weight_gradient;  // (classes, features), added to; or null
  int64_t gradient_stride;
  Acc* input_gradient;  // (features,), set; or null
};

// Both gradients in bfloat16 from the same sums s(b, d, c), rounded to it once. A register of sixteen features looks the
// sums of four masks up by its codes, in pairs that one dot product multiplies by x or by the weight and adds: for the
// weight gradient those of one class and two rows, for the input gradient those of one row and two classes.
struct PairTables {
  const float* rows[2];  // two input rows' (masks + base, classes) G_m
  int64_t stride, masks;
  bool base;                    // the last row is in every sum
  bool pair;                    // whether there is a second row
  int64_t first_group, groups;  // of four masks
  int64_t classes;
};
struct WeightPairs {
  int64_t pairs, groups;  // of rows, of masks
  const uint32_t* index;  // (vectors, pairs, ceil(groups / 2), 16), vectors index_stride apart
  int64_t index_stride;
  const uint32_t* x;  // (vectors, pairs, 16), vectors x_stride apart
  int64_t x_stride;
  const uint32_t* tables;  // (pairs, groups, classes, 16)
  int64_t vectors;         // 2 by eight classes, or 4 by four
  int64_t classes, features;  // of them that there are
  float* sum;                 // (classes, features); null where there is nothing to add and `out` takes it all
  int64_t sum_stride;
  bool add;       // to the sum
  bfloat16* out;  // (classes, features), or null: into the sum
  int64_t out_stride;
};
struct InputPairs {
  int64_t groups;         // 1, of 4 vectors of features, or 2, of 2 vectors
  const uint32_t* index;  // (vectors, 16)
  int64_t index_stride;
  int64_t class_pairs;
  const uint32_t* tables;  // (class pairs, 2 rows, groups, 16)
  const uint32_t* weight;  // (class pairs, features)
  int64_t weight_stride;
  float* input_gradient[2];  // (features,) of each row, added to; null where there is no second one
};
struct SumKernels {
  // tables (groups, classes, 16) of pairs of rows or, `of_classes`, (class pairs, 2 rows, groups, 16) of pairs of classes
  void (*tables)(const PairTables& of, bool of_classes, uint32_t* out);
  // sixteen features' codes of two rows, and their values, `step` apart in `out`
  void (*index)(const uint8_t* first, const uint8_t* second, int64_t n, uint32_t* out, int64_t step);
  void (*features)(const bfloat16* first, const bfloat16* second, int64_t n, uint32_t* out, int64_t step);
  void (*weight)(const WeightPairs& block);
  void (*input)(const InputPairs& block);
};

// Kernels of the head: features T, GEMM operands G, accumulators accumulate_t<T>.
template <typename T, typename G>
struct HeadKernels {
  using Acc = accumulate_t<T>;
  // out[i] = kept ? x[i] : 0
  void (*select)(const T* x, const uint8_t* bits, int64_t n, G* out);
  // out[2 i], out[2 i + 1] = the kept x0[i], x1[i]; x1 may be null: zeros (the VNNI layout of two rows)
  void (*select_pair)(const T* x0, const uint8_t* bits0, const T* x1, const uint8_t* bits1, int64_t n, G* out);
  // out[i] = x[i] * level[i], 0 where the level is 0, whatever x is
  void (*multiply)(const T* x, const Acc* level, int64_t n, G* out);
  // out[i] = G(x[i])
  void (*convert)(const Acc* x, int64_t n, G* out);
  // out[c][r] = G(in[r][c])
  void (*transpose)(const Acc* in, int64_t in_stride, int64_t rows, int64_t columns, G* out, int64_t out_stride);
};

template <typename Acc>
struct AccumulatorKernels {
  // level[i] += kept ? value : 0
  void (*add_level)(const uint8_t* bits, int64_t n, Acc value, Acc* level);
  // The row's loss; `gradient` holds the logits after it where want_gradient is false.
  Acc (*cross_entropy)(const CrossEntropyRow<Acc>& row, bool want_gradient);
  // y[i] += a * x[i]
  void (*axpy)(Acc a, const Acc* x, int64_t n, Acc* y);
  // table[e] = base + the sum of rows i whose bit is in e, each (width,); base may be null, absent rows are zero
  void (*subset_table)(const Acc* base, const Acc* rows, int64_t stride, int64_t count, int64_t width, Acc* table);
  void (*subset_gradients)(const SubsetBlock<Acc>& block);
  void (*lookup_gradients)(const LookupRow<Acc>& row);  // null where a register holds no table
};

// codes[d * step] = bit m of it: element d is kept by row m < count <= 8 of `bits`; n rounded up to 8 codes are written.
inline void subset_codes(const uint8_t* bits, int64_t stride, int64_t count, int64_t n, uint8_t* codes, int64_t step = 1) {
  for (int64_t i = 0; i < (n + 7) / 8; ++i) {
    uint64_t x = 0;  // an 8 x 8 bit matrix, transposed in three steps (Hacker's Delight 7-3)
    for (int64_t m = 0; m < count; ++m) x |= static_cast<uint64_t>(bits[m * stride + i]) << 8 * m;
    uint64_t t = (x ^ x >> 7) & 0x00AA00AA00AA00AAull;
    x ^= t ^ t << 7;
    t = (x ^ x >> 14) & 0x0000CCCC0000CCCCull;
    x ^= t ^ t << 14;
    t = (x ^ x >> 28) & 0x00000000F0F0F0F0ull;
    x ^= t ^ t << 28;
    if (step == 1) std::memcpy(codes + 8 * i, &x, 8);
    else for (int64_t j = 0; j < 8; ++j) codes[(8 * i + j) * step] = static_cast<uint8_t>(x >> 8 * j);
  }
}

struct MaskKernels {
  // Bits of `groups` groups of eight elements from `first_group`, one byte each.
  void (*group_bits)(uint64_t seed, SampleMask mask, uint64_t first_group, int64_t groups, uint8_t* out);
  // Those of `rows` such runs, their first groups `step` apart and their bytes `stride`.
  void (*tile_bits)(uint64_t seed, SampleMask mask, uint64_t first_group, uint64_t step, int64_t rows, int64_t groups,
                    uint8_t* out, int64_t stride);
  // out[c][r] = in[r][c] of 32-bit elements
  void (*transpose32)(const uint32_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint32_t* out,
                      int64_t out_stride);
};

template <typename In, typename Out>
using pixel_acc_t = std::conditional_t<std::is_same_v<In, double> || std::is_same_v<Out, double>, double, float>;

// Runs of bytes.
struct ByteKernels {
  // past the caches where the processor can; a store fence comes after the last
  void (*copy_stream)(uint8_t* to, const uint8_t* from, int64_t n);
  void (*swap)(uint8_t* a, uint8_t* b, int64_t n);
};

// What runs of pixels In to Out have in common: out[i] = v * scale[i % period] + bias[i % period] with
// v = own[i] * weight + other[i] * (1 - weight), products and sums rounded one by one.
template <typename In, typename Out>
struct MixRun {
  using Acc = pixel_acc_t<In, Out>;
  Acc weight;
  const Acc* scale;  // (period + 16,), the last sixteen repeat the first; or null: out[i] = v
  const Acc* bias;
  int64_t period;  // at least sixteen
  bool stream;     // past the caches, where the processor can
};

template <typename In, typename Out>
struct MixKernels {
  // without `other` v = own[i]; out may be own
  void (*mix)(const MixRun<In, Out>& run, const In* own, const In* other, int64_t n, Out* out);
};

template <typename T>
struct PairKernels {
  using Acc = accumulate_t<T>;
  // both at once: a = a * weight_a + b * (1 - weight_a), b = b * weight_b + a * (1 - weight_b)
  void (*mix_pair)(T* a, T* b, Acc weight_a, Acc weight_b, int64_t n);
};

// A run of elements, of which each has an alpha.
template <typename T>
struct BlendRun {
  const T* grad;
  const T* x;  // x and y are read for the terms alone
  const T* y;
  const accumulate_t<T>* alpha;
  T* grad_x;  // alpha * grad, or null
  T* grad_y;  // (1 - alpha) * grad, or null
  accumulate_t<T>* terms;  // grad * (x - y), or null
};

template <typename T>
struct BlendKernels {
  // out[i] = alpha[i] * x[i] + (1 - alpha[i]) * y[i], rounded one by one; x or y itself where alpha is 1 or 0
  void (*blend)(const T* x, const T* y, const accumulate_t<T>* alpha, int64_t n, T* out);
  // `add`: to the terms that are there
  void (*gradients)(const BlendRun<T>& run, bool add, int64_t n);
};

constexpr int64_t kNormalBlock = 64;  // normals made at once

struct NormalKernels {
  // Standard normals of elements from 4 * first_group on; groups rounded up to a whole block are written.
  void (*normals)(uint64_t seed, uint32_t sample, uint64_t first_group, int64_t groups, float* out);
};

template <typename T>
struct NoiseKernels {
  using Acc = accumulate_t<T>;
  // out[i] = images[i] + mask[i] * noise[i]
  void (*add)(const T* images, const T* mask, const float* normals, const Noise& noise, int64_t n, T* out);
  // sum[i] += grad[i] * noise[i]
  void (*accumulate)(const T* grad, const float* normals, const Noise& noise, int64_t n, Acc* sum);
};

// "avx512", "avx2" or "default": what this processor has, less what ATEN_CPU_CAPABILITY forbids.
const char* capability();

const MaskKernels& mask_kernels();
const ByteKernels& byte_kernels();
const NormalKernels& normal_kernels();
template <typename T>
const NoiseKernels<T>& noise_kernels();
template <typename In, typename Out>
const MixKernels<In, Out>& mix_kernels();
template <typename T>
const PairKernels<T>& pair_kernels();
template <typename T>
const BlendKernels<T>& blend_kernels();
template <typename T>
const ElementKernels<T>& element_kernels();
template <typename Acc>
const AccumulatorKernels<Acc>& accumulator_kernels();
const SumKernels& sum_kernels();  // where the processor has dot products of bfloat16
template <typename T, typename G>
const HeadKernels<T, G>& head_kernels();
template <typename T, typename O>
const LossKernels<T, O>& loss_kernels();

// Bits of elements first .. first + n - 1 of a sample's mask, aligned to the first; bits past n are 0.
// `scratch` holds ceil(n / 8) + 2 bytes, `out` ceil(n / 8).
inline void row_bits(uint64_t seed, SampleMask mask, uint64_t first, int64_t n, uint8_t* scratch, uint8_t* out) {
  const int shift = static_cast<int>(first % kGroup);
  const int64_t bytes = (n + 7) / 8, groups = (shift + n + 7) / 8;
  uint8_t* bits = shift == 0 ? out : scratch;
  mask_kernels().group_bits(seed, mask, first / kGroup, groups, bits);
  if (shift != 0) {
    scratch[groups] = 0;
    for (int64_t i = 0; i < bytes; ++i) out[i] = static_cast<uint8_t>((scratch[i] | scratch[i + 1] << 8) >> shift);
  }
  if (n % 8 != 0) out[bytes - 1] &= static_cast<uint8_t>((1 << n % 8) - 1);
}

// Of `rows` such runs of elements, `step` elements apart, into rows of `stride` bytes.
inline void tile_bits(uint64_t seed, SampleMask mask, uint64_t first, uint64_t step, int64_t rows, int64_t n,
                      uint8_t* scratch, uint8_t* out, int64_t stride) {
  if (first % kGroup == 0 && step % kGroup == 0 && n % kGroup == 0) {
    mask_kernels().tile_bits(seed, mask, first / kGroup, step / kGroup, rows, n / kGroup, out, stride);
    return;
  }
  for (int64_t r = 0; r < rows; ++r) row_bits(seed, mask, first + r * step, n, scratch, out + r * stride);
}

// Floats of scratch that `normals` asks for.
inline int64_t normals_scratch(int64_t n) { return (n + 3 + kNormalBlock - 1) / kNormalBlock * kNormalBlock; }

// Standard normals of elements first .. first + n - 1, somewhere in `scratch`.
inline const float* normals(uint64_t seed, uint32_t sample, uint64_t first, int64_t n, float* scratch) {
  const int64_t shift = static_cast<int64_t>(first % 4);
  normal_kernels().normals(seed, sample, first / 4, (shift + n + 3) / 4, scratch);
  return scratch + shift;
}

}  // namespace pyrx::cpu
