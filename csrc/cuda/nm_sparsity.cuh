// N:M masks and weights under them. A thread ranks chunks of eight elements of a row, or strips of eight columns side
// by side; other sizes of groups are ranked from shared memory.
#pragma once

#include "cuda/nm_rank.cuh"
#include "kernels/random.h"

namespace pyrx::cuda {

constexpr int kNMThreads = 256;
template <typename T>
constexpr int kNMChunks = kNMThreads * (64 / (kGroup * sizeof(T)));  // that a block takes at a time, 64 bytes a thread
constexpr int kNMTile = 2048;  // elements in shared memory where groups lie askew to chunks

// What a kernel writes; what is null is not written. T is a type of raw bits where there are no values.
template <typename T>
struct NMOutput {
  uint8_t* bits;   // one an element, rows padded to bytes
  uint8_t* bytes;  // bool
  T* values;
  const double* factor;  // of dropped values, which are 0 where it is null
};

template <typename T>
__device__ inline Vector<T, kGroup> typed(const Vector<Bits<T>, kGroup>& raw) {
  Vector<T, kGroup> found;
  std::memcpy(&found, &raw, sizeof found);
  return found;
}

template <typename T>
__device__ inline T typed(Bits<T> raw) {
  T found;
  std::memcpy(&found, &raw, sizeof found);
  return found;
}

// `count` elements' bits, `fill` beyond them. kWhole: all eight, aligned to 16 bytes. The two ways never meet in one
// variable, as the compiler would take whole words apart for it.
template <bool kWhole, typename U>
__device__ inline Vector<U, kGroup> load_raw(const U* from, int count, U fill) {
  if constexpr (kWhole) {
    return load<U, kGroup>(from);
  } else {
    Vector<U, kGroup> chunk;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) chunk.v[j] = j < count ? from[j] : fill;
    return chunk;
  }
}

template <bool kWhole, typename T>
__device__ inline void store_some(T* to, const Vector<T, kGroup>& chunk, int count) {
  if constexpr (kWhole) {
    store(to, chunk);
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (j < count) to[j] = chunk.v[j];
  }
}

// Elements where bits are set, else 0.
template <typename U>
__device__ inline Vector<U, kGroup> zeroed(Vector<U, kGroup> raw, uint32_t bits) {
#if defined(__CUDA_ARCH__)
  constexpr bool pairwise = sizeof(U) == 2;
#else
  constexpr bool pairwise = false;
#endif
  if constexpr (pairwise) {
    uint32_t pairs[kGroup / 2];
    std::memcpy(pairs, &raw, sizeof pairs);
#pragma unroll
    for (int j = 0; j < kGroup / 2; ++j) {
      // bit 2 j to the sign of byte 0, the next to that of byte 2; prmt spreads signs
      const uint32_t signs = (bits >> 2 * j) * 0x00400080u;
      uint32_t mask = 0;
#if defined(__CUDA_ARCH__)
      asm("prmt.b32 %0, %1, 0, 0xAA88;" : "=r"(mask) : "r"(signs));
#endif
      pairs[j] &= mask;
    }
    std::memcpy(&raw, pairs, sizeof pairs);
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) raw.v[j] = bits >> j & 1 ? raw.v[j] : U(0);
  }
  return raw;
}

template <typename T>
__device__ inline Vector<T, kGroup> scaled(const Vector<T, kGroup>& x, uint32_t bits, Acc<T> factor) {
  Vector<T, kGroup> found;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) found.v[j] = bits >> j & 1 ? x.v[j] : narrow<T>(mul(widen(x.v[j]), factor));
  return found;
}

// The first `count` of eight elements, element 0 at `element` and byte `byte`; kWhole as of load_raw.
template <typename T, bool kValues, bool kWhole>
__device__ inline void put(const NMOutput<T>& out, const Vector<Bits<T>, kGroup>& raw, uint32_t bits, int64_t element,
                           int64_t byte, int count, Acc<T> factor) {
  if (out.bits) out.bits[byte] = static_cast<uint8_t>(kWhole ? bits : bits & ((1u << count) - 1));
  if constexpr (kValues) {
    if (out.factor) store_some<kWhole>(out.values + element, scaled(typed<T>(raw), bits, factor), count);
    else store_some<kWhole>(out.values + element, typed<T>(zeroed(raw, bits)), count);
  } else if (out.bytes) {
    if constexpr (kWhole) {
      const auto four = [](uint32_t nibble) { return nibble * 0x00204081u & 0x01010101u; };
      *reinterpret_cast<uint2*>(out.bytes + element) = make_uint2(four(bits & 0xF), four(bits >> 4 & 0xF));
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (j < count) out.bytes[element + j] = bits >> j & 1;
    }
  }
}

// Rows of `length` elements, or the one row that dense rows of whole groups (and of whole bytes, for bits) make.
struct NMRows {
  int64_t count, length;
  int64_t chunks;  // of a row: ceil(length / 8), rounded up to whole groups
};

// Eight elements of a row.
struct NMChunk {
  int64_t element, byte;
  int count;  // how many there are

  __device__ NMChunk(const NMRows& rows, int64_t chunk) {
    const int64_t row = rows.count == 1 ? 0 : quotient(chunk, rows.chunks), inside = chunk - row * rows.chunks;
    const int64_t left = row < rows.count ? rows.length - inside * kGroup : 0;
    element = row * rows.length + inside * kGroup;
    byte = row * ((rows.length + 7) / 8) + inside;
    count = static_cast<int>(left < 0 ? 0 : left < kGroup ? left : kGroup);
  }
};

// Bytes of bfloat16: 2 + 1/8 (bits), 3 (bool), 4 + 1/8 (values, bits) an element over 3.35 TB/s: 0.63, 0.90, 1.23 ps.
// Operations an element, as sm_90's code counts them, over 14e12 integer operations a second: of bfloat16 3.7 for 2:4,
// 6.9 for 4:8, 4.9 for 1:16, 8.5 for 2:32: 0.26 to 0.61 ps; of float32 6.9, 12, 7.5, 13 beside twice the bytes.
// Any other n sorts its groups: 10 at 16 elements to 24 at 128, of float32 20 to 45, for sm_80's 16 bits twice that.
// 64 bytes in flight a thread. `dense`: one row, all pointers aligned to 16 bytes.
template <typename T, int kN, int kM, bool kValues>
__global__ void __launch_bounds__(kNMThreads)
    nm_rows_kernel(const T* __restrict__ scores, NMRows rows, RankOrder order, bool dense, NMOutput<T> out) {
  using U = Bits<T>;
  constexpr int lanes = KeyWord<U>::lanes, tile = kNMChunks<T>, units = tile / kNMThreads / lanes;
  const U* from = reinterpret_cast<const U*>(scores);
  const int64_t chunks = rows.count * rows.chunks;
  const Acc<T> factor = kValues && out.factor ? static_cast<Acc<T>>(*out.factor) : Acc<T>(0);
  for (int64_t start = int64_t(blockIdx.x) * tile; start < chunks; start += int64_t(gridDim.x) * tile) {
    const int64_t first = start + threadIdx.x;
    Vector<U, kGroup> raw[units][lanes];
    if (dense && (start + tile) * kGroup <= rows.length) {
#pragma unroll
      for (int i = 0; i < units * lanes; ++i)
        raw[i / lanes][i % lanes] = load_raw<true>(from + (first + i * kNMThreads) * kGroup, kGroup, U(0));
#pragma unroll
      for (int u = 0; u < units; ++u) {
        const uint32_t bits = rank_chunks<U, kN, kM>(raw[u], order);
#pragma unroll
        for (int c = 0; c < lanes; ++c) {
          const int64_t chunk = first + (u * lanes + c) * kNMThreads;
          put<T, kValues, true>(out, raw[u][c], bits >> 16 * c & 0xFF, chunk * kGroup, chunk, kGroup, factor);
        }
      }
      continue;
    }
#pragma unroll 1
    for (int u = 0; u < units; ++u) {
#pragma unroll
      for (int c = 0; c < lanes; ++c) {
        const NMChunk chunk(rows, first + (u * lanes + c) * kNMThreads);
        raw[0][c] = load_raw<false>(from + chunk.element, chunk.count, order.padding<U>());
      }
      const uint32_t bits = rank_chunks<U, kN, kM>(raw[0], order);
#pragma unroll
      for (int c = 0; c < lanes; ++c) {
        const NMChunk chunk(rows, first + (u * lanes + c) * kNMThreads);
        if (chunk.count > 0)
          put<T, kValues, false>(out, raw[0][c], bits >> 16 * c & 0xFF, chunk.element, chunk.byte, chunk.count, factor);
      }
    }
  }
}

// (outer, length, inner), groups along `length`; bits lie in rows of `width` elements, which divides inner.
struct NMColumns {
  int64_t outer, length, inner, width;

  __device__ int64_t row_bytes() const { return (width + 7) / 8; }
  __device__ int64_t strips() const { return inner / width * row_bytes(); }  // of eight columns or fewer, a byte each
  __device__ int64_t groups(int m) const { return (length + m - 1) / m; }
};

// One group of rows, and one strip of its columns.
struct NMStrip {
  int64_t element, byte;  // of its first row's first column
  int rows, columns;      // how many there are

  __device__ NMStrip(const NMColumns& layout, int64_t item, int m) {
    const int64_t strips = layout.strips(), groups = layout.groups(m), row_bytes = layout.row_bytes();
    const int64_t above = quotient(item, strips), strip = item - above * strips;
    const int64_t outer = quotient(above, groups), row = (above - outer * groups) * m;
    const int64_t part = quotient(strip, row_bytes), column = (strip - part * row_bytes) * kGroup;
    const int64_t first = outer * layout.length + row;
    element = first * layout.inner + part * layout.width + column;
    byte = first * strips + strip;
    rows = static_cast<int>(layout.length - row < m ? layout.length - row : m);
    columns = static_cast<int>(layout.width - column < kGroup ? layout.width - column : kGroup);
  }
};

// The tops of a row's word w, a column a lane, as bits that row_byte puts in order.
template <typename U>
__device__ inline uint32_t row_bits(Word<U> kept, int w) {
  return (static_cast<uint32_t>(kept >> (8 * sizeof(U) - 1)) & static_cast<uint32_t>(KeyWord<U>::ones))
         << KeyWord<U>::lanes * w;
}
__device__ inline uint32_t row_byte(uint32_t bits) { return (bits | bits >> 15) & 0xFF; }

template <typename U>
__device__ inline void row_words(const Vector<U, kGroup>& row, Word<U> (&words)[kGroup / KeyWord<U>::lanes]) {
  static_assert(sizeof row == sizeof words);
  std::memcpy(words, &row, sizeof words);
}

// A strip's kM rows, ranked in registers. Of a whole strip all rows are read at once, else a word's columns at a time.
template <typename T, int kN, int kM, bool kValues, bool kFull, bool kWhole>
__device__ inline void rank_strip(const Bits<T>* from, const NMColumns& layout, const NMStrip& strip,
                                  const RankOrder& order, Acc<T> factor, const NMOutput<T>& out) {
  using U = Bits<T>;
  constexpr int lanes = KeyWord<U>::lanes, words = kGroup / lanes;
  Vector<U, kGroup> raw[kM];
  uint32_t bits[kM] = {};
  if constexpr (kWhole) {
#pragma unroll
    for (int i = 0; i < kM; ++i) raw[i] = load_raw<true>(from + strip.element + i * layout.inner, kGroup, U(0));
  }
  const auto rank = [&](int w, auto&& word_of) {
    Word<U> key[kM], kept[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) key[i] = key_word<U, kFull>(word_of(i), order.infinity);
    rank_pairs<U, kN, kM, kFull>(key, order.n, kept);
#pragma unroll
    for (int i = 0; i < kM; ++i) bits[i] |= row_bits<U>(kept[i], w);
  };
  if constexpr (kWhole) {
#pragma unroll
    for (int w = 0; w < words; ++w)
      rank(w, [&](int i) {
        Word<U> row[words];
        row_words(raw[i], row);
        return row[w];
      });
  } else {
#pragma unroll 1
    for (int w = 0; w < words; ++w)
      rank(w, [&](int i) {
        Word<U> word = 0;
#pragma unroll
        for (int c = 0; c < lanes; ++c) {
          const int column = w * lanes + c;
          const bool present = i < strip.rows && column < strip.columns;
          const U own = present ? from[strip.element + i * layout.inner + column] : order.padding<U>();
          word |= static_cast<Word<U>>(own) << 16 * c;
        }
        return word;
      });
  }
#pragma unroll
  for (int i = 0; i < kM; ++i) {
    if (!kWhole && i >= strip.rows) break;
    const int64_t element = strip.element + i * layout.inner;
    if (!kWhole && kValues) raw[i] = load_raw<false>(from + element, strip.columns, U(0));
    put<T, kValues, kWhole>(out, raw[i], row_byte(bits[i]), element, strip.byte + i * layout.strips(), strip.columns,
                            factor);
  }
}

// A strip of order.m rows, read once for the threshold, and once more, from the caches, to compare with it. kN: 1 or 2.
template <typename T, int kN, bool kValues, bool kFull, bool kWhole>
__device__ inline void stream_strip(const Bits<T>* from, const NMColumns& layout, const NMStrip& strip,
                                    const RankOrder& order, Acc<T> factor, const NMOutput<T>& out) {
  using U = Bits<T>;
  using W = Word<U>;
  constexpr int words = kGroup / KeyWord<U>::lanes;
  W best[words][kN] = {}, row[words];
  const U* at = from + strip.element;
#pragma unroll 4
  for (int i = 0; i < strip.rows; ++i, at += layout.inner) {
    row_words(load_raw<kWhole>(at, strip.columns, U(0)), row);
#pragma unroll
    for (int w = 0; w < words; ++w) insert<U, kN, kFull>(best[w], key_word<U, kFull>(row[w], order.infinity));
  }
  W open[words], second[words];  // whether one more that equals the threshold may stay, and one after it
#pragma unroll
  for (int w = 0; w < words; ++w) {
    open[w] = ~W(0);
    second[w] = kN == 1 ? W(0) : at_least<U, kFull>(best[w][kN - 1], best[w][0]);
  }
  int64_t element = strip.element, byte = strip.byte;
#pragma unroll 2
  for (int i = 0; i < strip.rows; ++i, element += layout.inner, byte += layout.strips()) {
    const Vector<U, kGroup> raw = load_raw<kWhole>(from + element, strip.columns, U(0));
    row_words(raw, row);
    uint32_t bits = 0;
#pragma unroll
    for (int w = 0; w < words; ++w) {
      const W key = key_word<U, kFull>(row[w], order.infinity), threshold = best[w][kN - 1];
      const W reached = at_least<U, kFull>(key, threshold);
      const W above = kN == 1 ? W(0) : at_least<U, kFull>(key, threshold + KeyWord<U>::ones);
      const W equal = reached & ~above;
      bits |= row_bits<U>(reached & (above | open[w]), w);
      open[w] = (equal & second[w]) | (~equal & open[w]);
      second[w] &= ~equal;
    }
    put<T, kValues, kWhole>(out, raw, row_byte(bits), element, byte, strip.columns, factor);
  }
}

template <typename T, int kN, int kM, bool kValues, bool kWhole>
__device__ inline void nm_strip(const Bits<T>* from, const NMColumns& layout, const NMStrip& strip,
                                const RankOrder& order, Acc<T> factor, const NMOutput<T>& out) {
  if constexpr (kM == 0) {
    if (order.magnitude) stream_strip<T, kN, kValues, false, kWhole>(from, layout, strip, order, factor, out);
    else stream_strip<T, kN, kValues, true, kWhole>(from, layout, strip, order, factor, out);
  } else {
    if (order.magnitude) rank_strip<T, kN, kM, kValues, false, kWhole>(from, layout, strip, order, factor, out);
    else rank_strip<T, kN, kM, kValues, true, kWhole>(from, layout, strip, order, factor, out);
  }
}

// Bytes and operations as for rows; kM 0 (1:M and 2:M of any M) reads twice, the second time from the caches.
// `aligned`: all pointers, and rows of bits to eight elements. Eight rows of doubles would not fit in the registers.
template <typename T, int kN, int kM, bool kValues>
__global__ void __launch_bounds__(kNMThreads)
    nm_columns_kernel(const T* __restrict__ scores, NMColumns layout, RankOrder order, bool aligned, NMOutput<T> out) {
  const auto* from = reinterpret_cast<const Bits<T>*>(scores);
  const int64_t items = layout.outer * layout.groups(order.m) * layout.strips();
  const Acc<T> factor = kValues && out.factor ? static_cast<Acc<T>>(*out.factor) : Acc<T>(0);
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < items; item += stride) {
    const NMStrip strip(layout, item, order.m);
    if (aligned && (kM == 0 || strip.rows == kM) && sizeof(T) * kM < 64)
      nm_strip<T, kN, kM, kValues, (sizeof(T) * kM < 64)>(from, layout, strip, order, factor, out);
    else
      nm_strip<T, kN, kM, kValues, false>(from, layout, strip, order, factor, out);
  }
}

// Whether key i of m keys, `step` apart, is among the n of the highest rank.
template <typename U>
__device__ inline bool is_kept(const U* keys, int step, int i, int m, int n) {
  const U own = keys[i * step];
  int ahead = 0;
  for (int j = 0; j < i; ++j) ahead += keys[j * step] >= own;
  for (int j = i + 1; j < m; ++j) ahead += keys[j * step] > own;
  return ahead < n;
}

// One element a thread: all lanes of the warp call, lane / 8 of them with the elements of one byte.
template <typename T, bool kValues>
__device__ inline void put_one(const NMOutput<T>& out, const T* scores, bool present, bool kept, int64_t element,
                               int64_t byte, Acc<T> factor) {
  const uint32_t votes = __ballot_sync(kAllLanes, present && kept);
  if (!present) return;
  if (out.bits && threadIdx.x % kGroup == 0) out.bits[byte] = static_cast<uint8_t>(votes >> threadIdx.x % kWarp);
  if constexpr (kValues) {
    const T own = scores[element];
    out.values[element] = kept ? own : out.factor ? narrow<T>(mul(widen(own), factor)) : narrow<T>(0);
  } else if (out.bytes) {
    out.bytes[element] = kept;
  }
}

// Any M: a thread an element, which is compared with its group in shared memory; M operations an element, three each.
// A row is cut into `parts` of `span` elements, a multiple of M and of 8; a block takes kNMTile / span parts at a time.
template <typename T, bool kValues>
__global__ void __launch_bounds__(kNMThreads)
    nm_any_rows_kernel(const T* __restrict__ scores, NMRows rows, int span, RankOrder order, NMOutput<T> out) {
  using U = Bits<T>;
  __shared__ U keys[kNMTile];
  const U* from = reinterpret_cast<const U*>(scores);
  const int64_t parts = (rows.length + span - 1) / span, row_bytes = (rows.length + 7) / 8;
  const int a_block = kNMTile / span, tile = a_block * span;
  const Acc<T> factor = kValues && out.factor ? static_cast<Acc<T>>(*out.factor) : Acc<T>(0);
  const int64_t stride = int64_t(gridDim.x) * a_block;
  for (int64_t first = int64_t(blockIdx.x) * a_block; first < rows.count * parts; first += stride) {
    const auto place = [&](int e, int64_t& row, int64_t& column) {
      const int64_t part = first + e / span;
      row = quotient(part, parts);
      column = (part - row * parts) * span + e % span;
      return e < tile && row < rows.count && column < rows.length;
    };
    int64_t row, column;
    __syncthreads();  // the tile before may still be compared
    for (int e = threadIdx.x; e < tile; e += kNMThreads)
      keys[e] = place(e, row, column) ? rank_key(from[row * rows.length + column], static_cast<U>(order.infinity),
                                                 order.magnitude)
                                      : kPadKey<U>;
    __syncthreads();
    for (int e = threadIdx.x; e - static_cast<int>(threadIdx.x) < tile; e += kNMThreads) {
      const bool present = place(e, row, column);
      const int i = e % span % order.m;
      const bool kept = present && is_kept(keys + e - i, 1, i, order.m, order.n);
      put_one<T, kValues>(out, scores, present, kept, row * rows.length + column, row * row_bytes + column / 8, factor);
    }
  }
}

// Any M along another dimension than the last: a thread a column, whose keys it keeps in shared memory (m, threads).
template <typename T, bool kValues>
__global__ void __launch_bounds__(kNMThreads)
    nm_any_columns_kernel(const T* __restrict__ scores, NMColumns layout, RankOrder order, NMOutput<T> out) {
  using U = Bits<T>;
  PYRX_DYNAMIC_SHARED(U, all_keys);
  U* keys = all_keys + threadIdx.x;
  const U* from = reinterpret_cast<const U*>(scores);
  const int threads = blockDim.x;
  const int64_t items = layout.outer * layout.groups(order.m) * layout.strips() * kGroup;
  const Acc<T> factor = kValues && out.factor ? static_cast<Acc<T>>(*out.factor) : Acc<T>(0);
  for (int64_t first = int64_t(blockIdx.x) * threads; first < items; first += int64_t(gridDim.x) * threads) {
    const int64_t item = first + threadIdx.x;
    const NMStrip strip(layout, (item < items ? item : 0) / kGroup, order.m);
    const int column = threadIdx.x % kGroup;
    const int rows = item < items && column < strip.columns ? strip.rows : 0;
    for (int i = 0; i < order.m; ++i)
      keys[i * threads] = i < rows ? rank_key(from[strip.element + i * layout.inner + column],
                                              static_cast<U>(order.infinity), order.magnitude)
                                   : kPadKey<U>;
    for (int i = 0; i < order.m; ++i)
      put_one<T, kValues>(out, scores, i < rows, i < rows && is_kept(keys, threads, i, order.m, order.n),
                          strip.element + i * layout.inner + column, strip.byte + i * layout.strips(), factor);
  }
}

// x where its bit is set, else 0, x * factor, or x + strength * weight, each rounded alone in the accumulation type.
template <typename T>
__device__ inline Vector<T, kGroup> applied(const Vector<Bits<T>, kGroup>& raw, const Vector<Bits<T>, kGroup>& weight,
                                            uint32_t bits, Dropped dropped, Acc<T> factor, Acc<T> strength) {
  if (dropped == kZero) return typed<T>(zeroed(raw, bits));
  Vector<T, kGroup> x = typed<T>(raw);
  if (dropped == kFactor) return scaled(x, bits, factor);
  const Vector<T, kGroup> own = typed<T>(weight);
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    if (!(bits >> j & 1)) x.v[j] = narrow<T>(widen(x.v[j]) + mul(strength, widen(own.v[j])));
  return x;
}

// Bytes: 2 x, 1/8, and the weight's, an element over 3.35 TB/s. Operations: two to five. `dense` as of nm_rows_kernel.
template <typename T>
__global__ void __launch_bounds__(kNMThreads)
    nm_apply_kernel(const T* __restrict__ x, const uint8_t* __restrict__ bits, const T* __restrict__ weight,
                    NMRows rows, Dropped dropped, const double* __restrict__ factor_at, Acc<T> strength, bool dense,
                    T* __restrict__ out) {
  using U = Bits<T>;
  constexpr int tile = kNMChunks<T>, units = tile / kNMThreads;
  const U *from = reinterpret_cast<const U*>(x), *from_weight = reinterpret_cast<const U*>(weight);
  const int64_t chunks = rows.count * rows.chunks;
  const Acc<T> factor = dropped == kFactor ? static_cast<Acc<T>>(*factor_at) : Acc<T>(0);
  for (int64_t start = int64_t(blockIdx.x) * tile; start < chunks; start += int64_t(gridDim.x) * tile) {
    const int64_t first = start + threadIdx.x;
    if (dense && (start + tile) * kGroup <= rows.length) {
      Vector<U, kGroup> raw[units], own[units];
      uint32_t kept[units];
#pragma unroll
      for (int u = 0; u < units; ++u) {
        const int64_t chunk = first + u * kNMThreads;
        kept[u] = bits[chunk];
        raw[u] = load_raw<true>(from + chunk * kGroup, kGroup, U(0));
        if (dropped == kRegularize) own[u] = load_raw<true>(from_weight + chunk * kGroup, kGroup, U(0));
      }
#pragma unroll
      for (int u = 0; u < units; ++u)
        store(out + (first + u * kNMThreads) * kGroup, applied<T>(raw[u], own[u], kept[u], dropped, factor, strength));
      continue;
    }
#pragma unroll 1
    for (int u = 0; u < units; ++u) {
      const NMChunk chunk(rows, first + u * kNMThreads);
      if (chunk.count == 0) continue;
      const Vector<U, kGroup> raw = load_raw<false>(from + chunk.element, chunk.count, U(0));
      Vector<U, kGroup> own;
      if (dropped == kRegularize) own = load_raw<false>(from_weight + chunk.element, chunk.count, U(0));
      store_some<false>(out + chunk.element, applied<T>(raw, own, bits[chunk.byte], dropped, factor, strength),
                        chunk.count);
    }
  }
}

}  // namespace pyrx::cuda
