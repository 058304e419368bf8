// Which N of each group of M scores stay, ranked in registers: comparisons inside words, two 16-bit keys at a time.
// The scores are chunks of eight consecutive elements; what comes of a chunk is a byte, bit j of element j.
#pragma once

#include <cstring>

#include "cuda/common.cuh"
#include "kernels/nm_sparsity.h"

namespace pyrx::cuda {

// The unsigned integer of a float's size; integers are the raw bits of floats already.
template <typename T>
struct BitsOf {
  using type = T;
};
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};
template <>
struct BitsOf<__half> {
  using type = uint16_t;
};
template <>
struct BitsOf<__nv_bfloat16> {
  using type = uint16_t;
};
template <typename T>
using Bits = typename BitsOf<T>::type;

// A word holds one key, or two of 16 bits side by side: `lanes`. Comparisons answer in each lane's top bit and leave
// the others undefined.
template <typename U>
struct KeyWord {
  using type = U;
  static constexpr int lanes = 1;
  static constexpr U ones = 1, top = static_cast<U>(U(1) << (8 * sizeof(U) - 1));
};
template <>
struct KeyWord<uint16_t> {
  using type = uint32_t;
  static constexpr int lanes = 2;
  static constexpr uint32_t ones = 0x00010001u, top = 0x80008000u;
};
template <typename U>
using Word = typename KeyWord<U>::type;

// How scores rank, whatever their format.
struct RankOrder {
  uint64_t infinity;  // positive infinity's bits
  int n, m;
  bool magnitude;

  // Raw bits that rank below or equal to every score's: what stands for elements that are not there.
  template <typename U>
  __device__ U padding() const {
    return magnitude ? U(0) : static_cast<U>(infinity | U(1) << (8 * sizeof(U) - 1));
  }
};

// Whether a >= b. kFull: keys that use the top bit.
template <typename U, bool kFull>
__device__ inline Word<U> at_least(Word<U> a, Word<U> b) {
  constexpr Word<U> top = KeyWord<U>::top;
  if constexpr (!kFull) return (a | top) - b;
  const Word<U> rest = (a | top) - (b & ~top);
  return (a & ~b) | (~(a ^ b) & rest);
}

// All bits of the lanes whose top bit is set.
__device__ inline uint32_t spread_tops(uint32_t x) {
#if defined(__CUDA_ARCH__)
  uint32_t found;
  asm("prmt.b32 %0, %1, 0, 0xBB99;" : "=r"(found) : "r"(x));  // the signs of bytes 1 and 3
  return found;
#else
  return (x >> 15 & 0x00010001u) * 0xFFFFu;
#endif
}

// The larger and the smaller of each lane; kFull as of at_least.
template <typename U, bool kFull>
__device__ inline Word<U> larger(Word<U> a, Word<U> b) {
  if constexpr (KeyWord<U>::lanes == 1) {
    return a > b ? a : b;
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return __vmaxu2(a, b);  // one instruction, before sm_90 a dozen
#else
    const uint32_t mask = spread_tops(at_least<U, kFull>(a, b));
    return (a & mask) | (b & ~mask);
#endif
  }
}

template <typename U, bool kFull>
__device__ inline Word<U> smaller(Word<U> a, Word<U> b) {
  if constexpr (KeyWord<U>::lanes == 1) {
    return a < b ? a : b;
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return __vminu2(a, b);
#else
    const uint32_t mask = spread_tops(at_least<U, kFull>(a, b));
    return (b & mask) | (a & ~mask);
#endif
  }
}

template <typename W>
__device__ inline W majority(W a, W b, W c) { return (a & b) | (c & (a | b)); }

// rank_key of each lane; by magnitude the top bit stays free.
template <typename U, bool kFull>
__device__ inline Word<U> key_word(Word<U> raw, uint64_t infinity) {
  using W = Word<U>;
  constexpr W top = KeyWord<U>::top, ones = KeyWord<U>::ones;
  const W nan = (static_cast<W>(infinity) + 1) * ones;
  const W absolute = smaller<U, false>(raw & ~top, nan);
  if constexpr (!kFull) return absolute;
  const W is_nan = absolute + (top - nan);  // in the top bit
  const W negative = raw & ~is_nan & top;
  const W all = (negative >> (8 * sizeof(U) - 1)) * static_cast<W>(static_cast<U>(~U(0)));
  return (all & (top - absolute)) | (~all & (top | absolute));
}

// Element j of each chunk, one chunk a lane.
template <typename U>
__device__ inline void words_of(const Vector<U, kGroup> (&chunks)[KeyWord<U>::lanes], Word<U> (&words)[kGroup]) {
  if constexpr (KeyWord<U>::lanes == 1) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) words[j] = chunks[0].v[j];
  } else {
    uint32_t pairs[2][kGroup / 2];
    std::memcpy(pairs, chunks, sizeof pairs);
#pragma unroll
    for (int j = 0; j < kGroup / 2; ++j) {
#if defined(__CUDA_ARCH__)
      words[2 * j] = __byte_perm(pairs[0][j], pairs[1][j], 0x5410);
      words[2 * j + 1] = __byte_perm(pairs[0][j], pairs[1][j], 0x7632);
#else
      words[2 * j] = (pairs[0][j] & 0xFFFFu) | pairs[1][j] << 16;
      words[2 * j + 1] = pairs[0][j] >> 16 | (pairs[1][j] & 0xFFFF0000u);
#endif
    }
  }
}

// The top bits of words 0 .. 7 as bits 0 .. 7; of a second lane as bits 16 .. 23.
template <typename U>
__device__ inline uint32_t gather_tops(const Word<U> (&words)[kGroup]) {
  constexpr bool wide = sizeof(U) == 8;
  constexpr uint32_t top = wide ? 0x80000000u : static_cast<uint32_t>(KeyWord<U>::top);
  uint32_t found = 0;
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    found = found >> 1 | (static_cast<uint32_t>(wide ? static_cast<uint64_t>(words[j]) >> 32 : words[j]) & top);
  return sizeof(U) == 2 ? found >> 8 & 0x00FF00FFu : found >> 24;
}

// Whether fewer than N of M - 1 losses, M of 2, 4 or 8; kN 0: than n.
template <typename W, int kN, int kM>
__device__ inline W fewer_losses(const W (&loss)[kM - 1], int n) {
  if constexpr (kM == 2) {
    return ~loss[0];
  } else if constexpr (kM == 4) {
    static_assert(kN >= 1 && kN <= 3);
    if constexpr (kN == 1) return ~(loss[0] | loss[1] | loss[2]);
    if constexpr (kN == 2) return ~majority(loss[0], loss[1], loss[2]);
    return ~(loss[0] & loss[1] & loss[2]);
  } else {
    const W a = majority(loss[0], loss[1], loss[2]), b = majority(loss[3], loss[4], loss[5]);
    const W low_a = loss[0] ^ loss[1] ^ loss[2], low_b = loss[3] ^ loss[4] ^ loss[5];
    const W c = majority(low_a, low_b, loss[6]);
    if constexpr (kN == 2) return ~(a | b | c);
    if constexpr (kN == 4) return ~majority(a, b, c);
    static_assert(kN == 0 || kN == 2 || kN == 4);
    // the count's binary digits against those of n
    const W digits[3] = {low_a ^ low_b ^ loss[6], a ^ b ^ c, majority(a, b, c)};
    W fewer = 0;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const W digit = n >> k & 1 ? ~W(0) : W(0);
      fewer = (digit & ~digits[k]) | (~(digit ^ digits[k]) & fewer);
    }
    return n >= kM ? ~W(0) : fewer;
  }
}

// Of M keys, whether each stays, by all comparisons of two.
template <typename U, int kN, int kM, bool kFull>
__device__ inline void rank_pairs(const Word<U>* key, int n, Word<U>* kept) {
  Word<U> ahead[kM][kM];  // [i][j], i < j: key i wins, as of equal ones the first does
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int j = i + 1; j < kM; ++j) ahead[i][j] = at_least<U, kFull>(key[i], key[j]);
#pragma unroll
  for (int i = 0; i < kM; ++i) {
    Word<U> loss[kM - 1];
#pragma unroll
    for (int j = 0; j < kM; ++j)
      if (j != i) loss[j < i ? j : j - 1] = j < i ? ahead[j][i] : ~ahead[i][j];
    kept[i] = fewer_losses<Word<U>, kN, kM>(loss, n);
  }
}

// The first `most` set bits of a byte, none where it is negative; kMost: a bound on `most`, 0 for none.
template <int kMost>
__device__ inline uint32_t first_set(uint32_t byte, int most) {
  if constexpr (kMost > 0) {
    uint32_t found = 0;
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      const uint32_t rest = byte & (byte - 1);
      if (k < most) found |= byte ^ rest;
      byte = rest;
    }
    return found;
  } else {
    int end = 0;
    most = most > 0 ? most : 0;
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
      const int inside = __popc(byte >> end & ((1u << step) - 1));
      if (inside <= most) {
        most -= inside;
        end += step;
      }
    }
    return byte & ((1u << end) - 1);
  }
}

// What stays of groups over `lanes` adjacent lanes of the warp: all that is above the threshold and of what equals it
// the first, so many as make n. above, equal: a byte of the chunk, the second chunk's in bits 16 .. 23.
template <typename U, int kMost>
__device__ inline uint32_t break_ties(uint32_t above, uint32_t equal, int n, int lanes) {
  constexpr int chunks = KeyWord<U>::lanes;
  uint32_t total = 0, before = 0;  // 16 bits a chunk: how many equal, above those how many above, each at most 128
#pragma unroll
  for (int c = 0; c < chunks; ++c)
    total |= static_cast<uint32_t>(__popc(equal >> 16 * c & 0xFF) | __popc(above >> 16 * c & 0xFF) << 8) << 16 * c;
  for (int offset = 1; offset < lanes; offset *= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, total, offset);
    if (threadIdx.x & offset) before += other;
    total += other;
  }
  uint32_t kept = above;
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const int left = n - static_cast<int>(total >> (16 * c + 8) & 0xFF) - static_cast<int>(before >> 16 * c & 0xFF);
    kept |= first_set<kMost>(equal >> 16 * c & 0xFF, left) << 16 * c;
  }
  return kept;
}

// Puts a key into the N largest, largest first.
template <typename U, int kN, bool kFull>
__device__ inline void insert(Word<U> (&best)[kN], Word<U> key) {
#pragma unroll
  for (int k = 0; k < kN; ++k) {
    const Word<U> lower = smaller<U, kFull>(best[k], key);
    best[k] = larger<U, kFull>(best[k], key);
    key = lower;
  }
}

// The N-th largest key of groups over `lanes` adjacent lanes.
template <typename U, int kN, bool kFull>
__device__ inline Word<U> threshold_of_best(const Word<U> (&key)[kGroup], int lanes) {
  using W = Word<U>;
  W best[kN] = {};
#pragma unroll
  for (int j = 0; j < kGroup; ++j) insert<U, kN, kFull>(best, key[j]);
  for (int offset = 1; offset < lanes; offset *= 2) {
    W other[kN];
#pragma unroll
    for (int k = 0; k < kN; ++k) other[k] = __shfl_xor_sync(kAllLanes, best[k], offset);
#pragma unroll
    for (int k = 0; k < kN; ++k) insert<U, kN, kFull>(best, other[k]);
  }
  return best[kN - 1];
}

// a becomes the larger.
template <typename U, bool kFull>
__device__ inline void order_pair(Word<U>& a, Word<U>& b) {
  const Word<U> larger_one = larger<U, kFull>(a, b);
  b = smaller<U, kFull>(a, b);
  a = larger_one;
}

// The same of any n: all keys are sorted, largest first, in each lane and then by bitonic merges over the lanes.
template <typename U, bool kFull>
__device__ inline Word<U> threshold_by_sorting(const Word<U> (&key)[kGroup], int n, int lanes) {
  using W = Word<U>;
  W sorted[kGroup];
#pragma unroll
  for (int j = 0; j < kGroup; ++j) sorted[j] = key[j];
  // Batcher's odd-even merge sort of eight
  constexpr int pairs[19][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {0, 2}, {1, 3}, {4, 6}, {5, 7}, {1, 2}, {5, 6},
                                {0, 4}, {1, 5}, {2, 6}, {3, 7}, {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};
#pragma unroll
  for (int i = 0; i < 19; ++i) order_pair<U, kFull>(sorted[pairs[i][0]], sorted[pairs[i][1]]);
#pragma unroll 1
  for (int width = 1; width < lanes; width *= 2) {
    const bool first = !(threadIdx.x & width);  // of the half that has the larger ones
    W other[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j)  // the other half from its end
      other[j] = __shfl_xor_sync(kAllLanes, sorted[kGroup - 1 - j], 2 * width - 1);
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      sorted[j] = first ? larger<U, kFull>(sorted[j], other[j]) : smaller<U, kFull>(sorted[j], other[j]);
#pragma unroll 1
    for (int offset = width / 2; offset > 0; offset /= 2) {
      const bool lower = !(threadIdx.x & offset);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const W across = __shfl_xor_sync(kAllLanes, sorted[j], offset);
        sorted[j] = lower ? larger<U, kFull>(sorted[j], across) : smaller<U, kFull>(sorted[j], across);
      }
    }
#pragma unroll
    for (int k = kGroup / 2; k > 0; k /= 2)
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (!(j & k)) order_pair<U, kFull>(sorted[j], sorted[j + k]);
  }
  const int place = n - 1;  // a bit at a time: an index that is not constant would take the keys to local memory
#pragma unroll
  for (int k = 1; k < kGroup; k *= 2)
#pragma unroll
    for (int j = 0; j < kGroup; j += 2 * k) sorted[j] = place & k ? sorted[j + k] : sorted[j];
  // of the lane of the group that has it
  return __shfl_sync(kAllLanes, sorted[0], int(threadIdx.x % kWarp & ~unsigned(lanes - 1)) + place / kGroup);
}

template <typename U, int kN, int kM, bool kFull>
__device__ inline uint32_t rank_words(const Word<U> (&raw)[kGroup], const RankOrder& order) {
  using W = Word<U>;
  W key[kGroup], kept[kGroup];
#pragma unroll
  for (int j = 0; j < kGroup; ++j) key[j] = key_word<U, kFull>(raw[j], order.infinity);
  if constexpr (kM != 0) {
#pragma unroll
    for (int j = 0; j < kGroup; j += kM) rank_pairs<U, kN, kM, kFull>(key + j, order.n, kept + j);
    return gather_tops<U>(kept);
  } else {
    const int lanes = order.m / kGroup;
    W threshold;
    if constexpr (kN == 0) threshold = threshold_by_sorting<U, kFull>(key, order.n, lanes);
    else threshold = threshold_of_best<U, kN, kFull>(key, lanes);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) kept[j] = at_least<U, kFull>(key[j], threshold);
    const uint32_t reached = gather_tops<U>(kept);
    uint32_t above = 0;
    if constexpr (kN != 1) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) kept[j] = at_least<U, kFull>(key[j], threshold + KeyWord<U>::ones);
      above = gather_tops<U>(kept);
    }
    return break_ties<U, kN>(above, reached & ~above, order.n, lanes);
  }
}

// The bytes of a thread's chunks of raw bits, the second's (16-bit scores alone) in bits 16 .. 23.
// kM 2, 4 or 8: groups lie inside a chunk. kM 0: order.m is 8, 16, 32, 64 or 128, a group lies in order over m / 8
// adjacent lanes of the warp, and all 32 lanes call. kN 0: any order.n, else it is order.n.
template <typename U, int kN, int kM>
__device__ inline uint32_t rank_chunks(const Vector<U, kGroup> (&chunks)[KeyWord<U>::lanes], const RankOrder& order) {
  Word<U> raw[kGroup];
  words_of<U>(chunks, raw);
  return order.magnitude ? rank_words<U, kN, kM, false>(raw, order) : rank_words<U, kN, kM, true>(raw, order);
}

template <int kN, int kM>
struct Ratio {
  static constexpr int n = kN, m = kM;
};

// Calls f with the Ratio whose rank_chunks serves n of m; false where none does.
template <typename F>
bool dispatch_ratio(int n, int m, F&& f) {
  if (m == 2 && n == 1) f(Ratio<1, 2>());
  else if (m == 4 && n == 1) f(Ratio<1, 4>());
  else if (m == 4 && n == 2) f(Ratio<2, 4>());
  else if (m == 4 && n == 3) f(Ratio<3, 4>());
  else if (m == 8 && n == 2) f(Ratio<2, 8>());
  else if (m == 8 && n == 4) f(Ratio<4, 8>());
  else if (m == 8 && n != 1) f(Ratio<0, 8>());
  else if (m != 8 && m != 16 && m != 32 && m != 64 && m != 128) return false;
  else if (n == 1) f(Ratio<1, 0>());
  else if (n == 2) f(Ratio<2, 0>());
  else f(Ratio<0, 0>());
  return true;
}

}  // namespace pyrx::cuda
