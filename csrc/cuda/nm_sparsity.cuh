// N:M masks and weights under them. A thread ranks chunks of eight elements of a row, or strips of eight columns side by
// side; other sizes of groups are ranked from shared memory.
#pragma once

#include "cuda/nm_rank.cuh"
#include "kernels/random.h"

namespace pyrx::cuda {

constexpr int kNMThreads = 256;
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

// `count` elements' bits, `fill` beyond them; `aligned`: to 16 bytes.
template <typename U>
__device__ inline Vector<U, kGroup> load_raw(const U* from, int count, bool aligned, U fill) {
  if (aligned && count == kGroup) return load<U, kGroup>(from);
  Vector<U, kGroup> chunk;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) chunk.v[j] = j < count ? from[j] : fill;
  return chunk;
}

// Bits 0 .. 7 as bytes 0 and 1.
__device__ inline Vector<uint8_t, kGroup> bytes_of(uint32_t bits) {
  const uint32_t halves[2] = {(bits & 0xF) * 0x00204081u & 0x01010101u, (bits >> 4 & 0xF) * 0x00204081u & 0x01010101u};
  Vector<uint8_t, kGroup> bytes;
  std::memcpy(&bytes, halves, sizeof bytes);
  return bytes;
}

// Elements where bits are set, else 0.
template <typename U>
__device__ inline Vector<U, kGroup> zeroed(Vector<U, kGroup> raw, uint32_t bits) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) raw.v[j] = bits >> j & 1 ? raw.v[j] : U(0);
  return raw;
}

template <typename T>
__device__ inline Vector<T, kGroup> scaled(const Vector<T, kGroup>& x, uint32_t bits, Acc<T> factor) {
  Vector<T, kGroup> found;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) found.v[j] = bits >> j & 1 ? x.v[j] : narrow<T>(mul(widen(x.v[j]), factor));
  return found;
}

// The first `count` of eight elements, element 0 at `element` and byte `byte`. `aligned`: the addresses, to 16 bytes.
template <typename T, bool kValues>
__device__ inline void put(const NMOutput<T>& out, const Vector<Bits<T>, kGroup>& raw, uint32_t bits, int64_t element,
                           int64_t byte, int count, bool aligned, Acc<T> factor) {
  if (out.bits) out.bits[byte] = static_cast<uint8_t>(bits & ((1u << count) - 1));
  if constexpr (kValues) {
    const Vector<T, kGroup> values = out.factor ? scaled(typed<T>(raw), bits, factor) : typed<T>(zeroed(raw, bits));
    store_group(out.values + element, values, count, aligned);
  } else if (out.bytes) {
    store_group(out.bytes + element, bytes_of(bits), count, aligned);
  }
}

// Rows of `length` elements, or the one row that dense rows of whole groups (and of whole bytes, for bits) make.
struct NMRows {
  int64_t count, length;
  int64_t chunks;  // of a row: ceil(length / 8), rounded up to whole groups
};

// Bytes of 2:4 bfloat16: 2 + 1/8 (bits), 3 (bool), 4 + 1/8 (values and bits) an element over 3.35 TB/s: 0.63, 0.90,
// 1.23 ps. Operations an element over 14e12 integer operations a second: of bfloat16 five for 2:4, ten for 4:8, six for
// 1:16, nine for 2:32: 0.35 to 0.7 ps; twice as many of float32, beside twice the bytes.
// 64 bytes in flight a thread. `aligned`: pointers and rows, to 16 bytes.
template <typename T, int kN, int kM, bool kValues>
__global__ void __launch_bounds__(kNMThreads)
    nm_rows_kernel(const T* __restrict__ scores, NMRows rows, RankOrder order, bool aligned, NMOutput<T> out) {
  using U = Bits<T>;
  constexpr int lanes = KeyWord<U>::lanes, units = sizeof(U) == 8 ? 1 : 2;
  const U* from = reinterpret_cast<const U*>(scores);
  const int64_t chunks = rows.count * rows.chunks, tile = int64_t(kNMThreads) * units * lanes;
  const int64_t row_bytes = (rows.length + 7) / 8;
  const Acc<T> factor = kValues && out.factor ? static_cast<Acc<T>>(*out.factor) : Acc<T>(0);
  for (int64_t first = blockIdx.x * tile; first < chunks; first += gridDim.x * tile) {
    Vector<U, kGroup> raw[units][lanes];
    int64_t element[units][lanes], byte[units][lanes];
    int count[units][lanes];
#pragma unroll
    for (int u = 0; u < units; ++u)
#pragma unroll
      for (int c = 0; c < lanes; ++c) {
        const int64_t chunk = first + (u * lanes + c) * kNMThreads + threadIdx.x;
        const int64_t row = rows.count == 1 ? 0 : quotient(chunk, rows.chunks), inside = chunk - row * rows.chunks;
        const int64_t left = chunk < chunks ? rows.length - inside * kGroup : 0;
        count[u][c] = left < 0 ? 0 : left < kGroup ? static_cast<int>(left) : kGroup;
        element[u][c] = row * rows.length + inside * kGroup;
        byte[u][c] = row * row_bytes + inside;
        raw[u][c] = load_raw(from + element[u][c], count[u][c], aligned, order.padding<U>());
      }
#pragma unroll
    for (int u = 0; u < units; ++u) {
      const uint32_t bits = rank_chunks<U, kN, kM>(raw[u], order);
#pragma unroll
      for (int c = 0; c < lanes; ++c)
        if (count[u][c] > 0)
          put<T, kValues>(out, raw[u][c], bits >> 16 * c & 0xFF, element[u][c], byte[u][c], count[u][c], aligned,
                          factor);
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

// The tops of a row's words, two columns a word where it has two lanes, as a byte.
template <typename U>
__device__ inline uint32_t row_byte(const Word<U> (&kept)[kGroup / KeyWord<U>::lanes]) {
  constexpr int lanes = KeyWord<U>::lanes, digits = 8 * sizeof(U);
  uint32_t found = 0;
#pragma unroll
  for (int w = 0; w < kGroup / lanes; ++w)
    found |= (static_cast<uint32_t>(kept[w] >> (digits - 1)) & static_cast<uint32_t>(KeyWord<U>::ones)) << lanes * w;
  return (found | found >> 15) & 0xFF;
}

template <typename U>
__device__ inline void row_words(const Vector<U, kGroup>& row, Word<U> (&words)[kGroup / KeyWord<U>::lanes]) {
  static_assert(sizeof row == sizeof words);
  std::memcpy(words, &row, sizeof words);
}

// A strip whose kM rows are held in registers.
template <typename T, int kN, int kM, bool kValues, bool kFull>
__device__ inline void rank_strip(const Bits<T>* from, const NMColumns& layout, const NMStrip& strip,
                                  const RankOrder& order, bool aligned, Acc<T> factor, const NMOutput<T>& out) {
  using U = Bits<T>;
  constexpr int words = kGroup / KeyWord<U>::lanes;
  Vector<U, kGroup> raw[kM];
  Word<U> kept[kM][words];
#pragma unroll
  for (int i = 0; i < kM; ++i)
    raw[i] = load_raw(from + strip.element + i * layout.inner, i < strip.rows ? strip.columns : 0, aligned,
                      order.padding<U>());
#pragma unroll
  for (int w = 0; w < words; ++w) {
    Word<U> key[kM], stays[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      Word<U> row[words];
      row_words(raw[i], row);
      key[i] = key_word<U, kFull>(row[w], order.infinity);
    }
    rank_pairs<U, kN, kM, kFull>(key, order.n, stays);
#pragma unroll
    for (int i = 0; i < kM; ++i) kept[i][w] = stays[i];
  }
#pragma unroll
  for (int i = 0; i < kM; ++i)
    if (i < strip.rows)
      put<T, kValues>(out, raw[i], row_byte<U>(kept[i]), strip.element + i * layout.inner,
                      strip.byte + i * layout.strips(), strip.columns, aligned, factor);
}

// A strip of order.m rows, read once for the threshold, and once more, from the caches, to compare with it. kN: 1 or 2.
template <typename T, int kN, bool kValues, bool kFull>
__device__ inline void stream_strip(const Bits<T>* from, const NMColumns& layout, const NMStrip& strip,
                                    const RankOrder& order, bool aligned, Acc<T> factor, const NMOutput<T>& out) {
  using U = Bits<T>;
  using W = Word<U>;
  constexpr int words = kGroup / KeyWord<U>::lanes;
  W best[words][kN] = {}, row[words];
#pragma unroll 4
  for (int i = 0; i < strip.rows; ++i) {
    row_words(load_raw(from + strip.element + i * layout.inner, strip.columns, aligned, U(0)), row);
#pragma unroll
    for (int w = 0; w < words; ++w) insert<U, kN>(best[w], key_word<U, kFull>(row[w], order.infinity));
  }
  W open[words], second[words];  // whether one more that equals the threshold may stay, and one after it
#pragma unroll
  for (int w = 0; w < words; ++w) {
    open[w] = ~W(0);
    second[w] = kN == 1 ? W(0) : at_least<U, kFull>(best[w][kN - 1], best[w][0]);
  }
#pragma unroll 2
  for (int i = 0; i < strip.rows; ++i) {
    const int64_t element = strip.element + i * layout.inner;
    const Vector<U, kGroup> raw = load_raw(from + element, strip.columns, aligned, U(0));
    row_words(raw, row);
    W kept[words];
#pragma unroll
    for (int w = 0; w < words; ++w) {
      const W key = key_word<U, kFull>(row[w], order.infinity), threshold = best[w][kN - 1];
      const W reached = at_least<U, kFull>(key, threshold);
      const W above = kN == 1 ? W(0) : at_least<U, kFull>(key, threshold + KeyWord<U>::ones);
      const W equal = reached & ~above;
      kept[w] = reached & (above | open[w]);
      open[w] = (equal & second[w]) | (~equal & open[w]);
      second[w] &= ~equal;
    }
    put<T, kValues>(out, raw, row_byte<U>(kept), element, strip.byte + i * layout.strips(), strip.columns, aligned,
                    factor);
  }
}

// Bytes and operations as for rows; kM 0 (1:M and 2:M of any M) reads twice, the second time from the caches.
template <typename T, int kN, int kM, bool kValues>
__global__ void __launch_bounds__(kNMThreads)
    nm_columns_kernel(const T* __restrict__ scores, NMColumns layout, RankOrder order, bool aligned, NMOutput<T> out) {
  const auto* from = reinterpret_cast<const Bits<T>*>(scores);
  const int64_t items = layout.outer * layout.groups(order.m) * layout.strips();
  const Acc<T> factor = kValues && out.factor ? static_cast<Acc<T>>(*out.factor) : Acc<T>(0);
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < items; item += stride) {
    const NMStrip strip(layout, item, order.m);
    if constexpr (kM == 0) {
      if (order.magnitude) stream_strip<T, kN, kValues, false>(from, layout, strip, order, aligned, factor, out);
      else stream_strip<T, kN, kValues, true>(from, layout, strip, order, aligned, factor, out);
    } else {
      if (order.magnitude) rank_strip<T, kN, kM, kValues, false>(from, layout, strip, order, aligned, factor, out);
      else rank_strip<T, kN, kM, kValues, true>(from, layout, strip, order, aligned, factor, out);
    }
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
// A row is cut into `parts` of `span` elements, a multiple of M and of 8; a block takes kNMTile / span of them at a time.
template <typename T, bool kValues>
__global__ void __launch_bounds__(kNMThreads)
    nm_any_rows_kernel(const T* __restrict__ scores, NMRows rows, int span, RankOrder order, NMOutput<T> out) {
  using U = Bits<T>;
  __shared__ U keys[kNMTile];
  const U* from = reinterpret_cast<const U*>(scores);
  const int64_t parts = (rows.length + span - 1) / span, row_bytes = (rows.length + 7) / 8;
  const int a_block = kNMTile / span, tile = a_block * span;
  const Acc<T> factor = kValues && out.factor ? static_cast<Acc<T>>(*out.factor) : Acc<T>(0);
  for (int64_t first = int64_t(blockIdx.x) * a_block; first < rows.count * parts; first += int64_t(gridDim.x) * a_block) {
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

// x where its bit is set, else 0, x * factor, or x + strength * weight, each rounded once in the accumulation type.
// Bytes: 2 x, 1/8, and the weight's, an element over 3.35 TB/s. Operations: two to five.
template <typename T>
__global__ void __launch_bounds__(kNMThreads)
    nm_apply_kernel(const T* __restrict__ x, const uint8_t* __restrict__ bits, const T* __restrict__ weight, NMRows rows,
                    Dropped dropped, const double* __restrict__ factor_at, Acc<T> strength, bool aligned,
                    T* __restrict__ out) {
  using U = Bits<T>;
  constexpr int units = sizeof(U) == 2 ? 4 : sizeof(U) == 4 ? 2 : 1;
  const int64_t chunks = rows.count * rows.chunks, tile = int64_t(kNMThreads) * units;
  const Acc<T> factor = dropped == kFactor ? static_cast<Acc<T>>(*factor_at) : Acc<T>(0);
  for (int64_t first = blockIdx.x * tile + threadIdx.x; first < chunks; first += gridDim.x * tile) {
    Vector<U, kGroup> raw[units], other[units];
    uint32_t kept[units];
    int64_t element[units];
    int count[units];
#pragma unroll
    for (int u = 0; u < units; ++u) {
      const int64_t chunk = first + u * kNMThreads;
      const int64_t row = rows.count == 1 ? 0 : quotient(chunk, rows.chunks), inside = chunk - row * rows.chunks;
      const int64_t left = chunk < chunks ? rows.length - inside * kGroup : 0;
      count[u] = left < kGroup ? static_cast<int>(left) : kGroup;
      element[u] = row * rows.length + inside * kGroup;
      kept[u] = count[u] > 0 ? bits[chunk] : 0;
      raw[u] = load_raw(reinterpret_cast<const U*>(x) + element[u], count[u], aligned, U(0));
      if (dropped == kRegularize)
        other[u] = load_raw(reinterpret_cast<const U*>(weight) + element[u], count[u], aligned, U(0));
    }
#pragma unroll
    for (int u = 0; u < units; ++u) {
      if (count[u] <= 0) continue;
      Vector<T, kGroup> value = typed<T>(raw[u]);
      if (dropped == kZero) {
        value = typed<T>(zeroed(raw[u], kept[u]));
      } else if (dropped == kFactor) {
        value = scaled(value, kept[u], factor);
      } else {
        const Vector<T, kGroup> own = typed<T>(other[u]);
#pragma unroll
        for (int j = 0; j < kGroup; ++j)
          if (!(kept[u] >> j & 1)) value.v[j] = narrow<T>(widen(value.v[j]) + mul(strength, widen(own.v[j])));
      }
      store_group(out + element[u], value, count[u], aligned);
    }
  }
}

}  // namespace pyrx::cuda
