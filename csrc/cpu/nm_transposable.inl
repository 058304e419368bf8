// Masks of rows and columns at once: a vector holds one element each of as many tiles side by side, or a tile is sorted.
// Included by nm_simd.inl.

#include "kernels/nm_transposable.inl"

constexpr int kWideBytes = PYRX_ISA == 512 ? 64 : PYRX_ISA == 2 ? 32 : 16;
template <typename E>
struct WideOf {
  typedef E type __attribute__((vector_size(kWideBytes)));
};
template <typename E>
using Wide = typename WideOf<E>::type;
template <typename E>
constexpr int kWideLanes = kWideBytes / int(sizeof(E));
template <typename E>
using integer_of = std::conditional_t<sizeof(E) == 8, int64_t, int32_t>;

// f(i, count) for blocks of kCount and the rest.
template <int kCount, typename F>
inline void blocks_of(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kCount <= n; i += kCount) f(i, std::integral_constant<int, kCount>());
  if (i < n) f(i, static_cast<int>(n - i));
}

// x[c] is column c of as many 4-column tiles, side by side in a row, as fit; in_order undoes the order they are in.
template <typename T, typename A>
inline void load_columns(const T* p, Wide<A> (&x)[4]) {
#if PYRX_ISA == 512
  if constexpr (std::is_same_v<A, float>) {
    const __m512 a = load(p).v, b = load(p + 16).v, c = load(p + 32).v, d = load(p + 48).v;
    const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
    x[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
    x[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    const __m512d ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    const __m512d cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    x[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high));
    x[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high));
    return;
  }
#elif PYRX_ISA == 2
  if constexpr (std::is_same_v<A, float>) {
    const Vec<float> first = load(p), second = load(p + 16);
    const __m256 a = first.low, b = first.high, c = second.low, d = second.high;
    const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
    x[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
    x[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
    const __m256d ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
    const __m256d cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    x[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high));
    x[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high));
    return;
  }
#endif
  // into the vectors themselves: by way of an array g++ 12 takes wrong elements at -O1 and -O2
  for (int c = 0; c < 4; ++c)
    for (int i = 0; i < kWideLanes<A>; ++i) x[c][i] = widen(p[4 * i + c]);
}

inline Wide<int32_t> in_order(Wide<int32_t> found) {
#if PYRX_ISA == 512
  const __m512i from = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return reinterpret_cast<Wide<int32_t>>(_mm512_permutexvar_epi32(from, reinterpret_cast<__m512i>(found)));
#elif PYRX_ISA == 2
  const __m256i from = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return reinterpret_cast<Wide<int32_t>>(_mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(found), from));
#else
  return found;
#endif
}
inline Wide<int64_t> in_order(Wide<int64_t> found) { return found; }

// pyrx::tile_value of vectors.
template <bool kMagnitude, typename E>
inline Wide<E> tile_values(Wide<E> scores) {
  using A = Wide<E>;
  const A most = A{} + TileBounds<E>::most, nan = A{} + TileBounds<E>::nan;
  A values = scores;
  if constexpr (kMagnitude) values = values > -values ? values : -values;
  else values = values < -most ? -most : values;
  values = values > most ? most : values;
  return scores == scores ? values : nan;
}

// The patterns of as many tiles as a vector has lanes.
template <bool kMagnitude, typename T>
inline void exact_patterns(const T* scores, int64_t stride, int32_t* patterns) {
  using A = accumulate_t<T>;
  using P = Wide<integer_of<A>>;
  TileSearch<Wide<A>, P> tiles;
#pragma GCC unroll 4
  for (int row = 0; row < 4; ++row) {
    Wide<A> x[4];
    load_columns<T, A>(scores + row * stride, x);
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column) x[column] = tile_values<kMagnitude, A>(x[column]);
    tiles.set_row(row, x[0], x[1], x[2], x[3]);
  }
  const P found = in_order(tiles.search());
  for (int i = 0; i < kWideLanes<A>; ++i) patterns[i] = static_cast<int32_t>(found[i]);
}

template <typename Count>
inline void write_patterns(const int32_t* patterns, Count count, bool packed, uint8_t* out, int64_t out_stride) {
  for (int row = 0; row < 4; ++row, out += out_stride) {
    if (packed) {
      for (int i = 0; i < count / 2; ++i) {
        const int32_t low = patterns[2 * i] >> 4 * row & 15, high = patterns[2 * i + 1] >> 4 * row & 15;
        out[i] = static_cast<uint8_t>(low | high << 4);
      }
      if (count % 2) out[count / 2] = static_cast<uint8_t>(patterns[count - 1] >> 4 * row & 15);
    } else {
      for (int i = 0; i < count; ++i) {
        const uint32_t bytes = bytes_of_row(static_cast<uint32_t>(patterns[i] >> 4 * row & 15));
        std::memcpy(out + 4 * i, &bytes, 4);
      }
    }
  }
}

template <bool kMagnitude, typename T>
inline void exact_run(const T* scores, int64_t stride, int64_t tiles, bool packed, uint8_t* out, int64_t out_stride) {
  constexpr int lanes = kWideLanes<accumulate_t<T>>;
  static_assert(lanes % 2 == 0);  // packed blocks begin at bytes
  blocks_of<lanes>(tiles, [&](int64_t first, auto count) {
    const T* from = scores + 4 * first;
    int32_t patterns[lanes];
    T part[4][4 * lanes] = {};
    if constexpr (std::is_same_v<decltype(count), int>) {
      for (int row = 0; row < 4; ++row) std::memcpy(part[row], from + row * stride, 4 * count * sizeof(T));
      exact_patterns<kMagnitude>(part[0], 4 * lanes, patterns);
    } else {
      exact_patterns<kMagnitude>(from, stride, patterns);
    }
    write_patterns(patterns, count, packed, out + (packed ? first / 2 : 4 * first), out_stride);
  });
}

template <typename T>
void exact_tiles(const T* scores, int64_t stride, int64_t tiles, bool magnitude, bool packed, uint8_t* out,
                 int64_t out_stride) {
  magnitude ? exact_run<true>(scores, stride, tiles, packed, out, out_stride)
            : exact_run<false>(scores, stride, tiles, packed, out, out_stride);
}

// A signed integer that orders as scores rank, above kTaken.
template <typename K>
constexpr K kTaken = std::numeric_limits<K>::min();

template <typename K, typename T>
inline K signed_key(T score, bool magnitude) {
  using U = std::make_unsigned_t<K>;
  constexpr U top = sizeof(T) == sizeof(K) ? U(1) << (8 * sizeof(K) - 1) : 0;
  // by magnitude no key reaches the top bit
  return static_cast<K>(key_of(score, magnitude) ^ (magnitude ? 0 : top));
}

// Greedy masks of small tiles, as many as a vector has lanes. In each round every element is kept that is the first, by
// rank and index, of what is left in its row and in its column: nothing before it can take their room. The first of a
// tile is among them, so a round that keeps none is the last. The scores of one row after another, tile by tile.
// kGroup is M, or 0: known when it is called.
template <int kGroup, typename T, typename K = integer_of<T>>
inline void greedy_lanes(const T* scores, int64_t stride, int count, const NM& nm, uint8_t* bytes,
                         int64_t bytes_stride) {
  using V = Wide<K>;
  constexpr int lanes = kWideLanes<K>;
  const int m = kGroup ? kGroup : nm.m;
  const V taken = V{} + kTaken<K>, none = V{} - 1;
  V keys[kLaneGroup * kLaneGroup], row_room[kLaneGroup], column_room[kLaneGroup], kept[kLaneGroup];
  for (int i = 0; i < m; ++i) {
    row_room[i] = column_room[i] = V{} + nm.n;
    kept[i] = V{};
    K ranks[kLaneGroup * lanes];
    for (int j = 0; j < count * m; ++j) ranks[j] = signed_key<K>(scores[i * stride + j], nm.magnitude);
    for (int j = 0; j < m; ++j) {
      K column[lanes];
      for (int lane = 0; lane < lanes; ++lane) column[lane] = lane < count ? ranks[lane * m + j] : kTaken<K>;
      std::memcpy(&keys[i * m + j], column, sizeof(V));
    }
  }
  for (bool again = true; again;) {
    V row_first[kLaneGroup], column_first[kLaneGroup], column_best[kLaneGroup];
    for (int j = 0; j < m; ++j) column_best[j] = taken, column_first[j] = none;
    for (int i = 0; i < m; ++i) {
      V row_best = taken, first = none;
      const V full = row_room[i] == 0;
      for (int j = 0; j < m; ++j) {
        const V key = (full | (column_room[j] == 0)) ? taken : keys[i * m + j];
        keys[i * m + j] = key;
        const V above = key > row_best, over = key > column_best[j];
        row_best = above ? key : row_best;
        first = above ? V{} + j : first;
        column_best[j] = over ? key : column_best[j];
        column_first[j] = over ? V{} + i : column_first[j];
      }
      row_first[i] = first;
    }
    V some = {};
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < m; ++j) {
        const V keep = (row_first[i] == j) & (column_first[j] == i);
        keys[i * m + j] = keep ? taken : keys[i * m + j];
        kept[i] |= keep & (K(1) << j);
        row_room[i] += keep;  // -1 where kept
        column_room[j] += keep;
        some |= keep;
      }
    K any = 0;
    for (int lane = 0; lane < lanes; ++lane) any |= some[lane];
    again = any != 0;
  }
  for (int i = 0; i < m; ++i) {
    K rows[lanes];
    std::memcpy(rows, &kept[i], sizeof(V));
    for (int lane = 0; lane < count; ++lane)
      for (int j = 0; j < m; j += 4) {
        const uint32_t four = bytes_of_row(static_cast<uint32_t>(rows[lane] >> j & 15));
        std::memcpy(bytes + i * bytes_stride + lane * m + j, &four, std::min(4, m - j));
      }
  }
}

// By descending key, of equal ones in the order they have: a radix sort of (key, place), least digit first. Returns the
// places; `keys` and `places` hold 2 * size, the second half is scratch.
template <typename Key>
inline const uint16_t* sort_descending(Key* keys, uint16_t* places, int size) {
  uint32_t starts[sizeof(Key)][256] = {};
  for (int i = 0; i < size; ++i)
    for (size_t digit = 0; digit < sizeof(Key); ++digit) ++starts[digit][255 - (keys[i] >> 8 * digit & 255)];
  Key *from = keys, *to = keys + size;
  uint16_t *from_places = places, *to_places = places + size;
  for (size_t digit = 0; digit < sizeof(Key); ++digit) {
    uint32_t* start = starts[digit];
    if (start[255 - (from[0] >> 8 * digit & 255)] == static_cast<uint32_t>(size)) continue;  // all the same
    for (uint32_t bin = 0, before = 0; bin < 256; ++bin) {
      const uint32_t here = start[bin];
      start[bin] = before;
      before += here;
    }
    for (int i = 0; i < size; ++i) {
      const uint32_t at = start[255 - (from[i] >> 8 * digit & 255)]++;
      to[at] = from[i];
      to_places[at] = from_places[i];
    }
    std::swap(from, to);
    std::swap(from_places, to_places);
  }
  return from_places;
}

template <typename T>
inline void greedy_sorted(const T* scores, int64_t stride, const NM& nm, void* scratch, uint8_t* bytes,
                          int64_t bytes_stride) {
  using Key = key_t_of<T>;
  const int m = nm.m, size = m * m;
  Key* keys = static_cast<Key*>(scratch);
  uint16_t* places = reinterpret_cast<uint16_t*>(keys + 2 * size);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < m; ++j) {
      keys[i * m + j] = key_of(scores[i * stride + j], nm.magnitude);
      places[i * m + j] = static_cast<uint16_t>(i << 8 | j);
    }
  const uint16_t* order = sort_descending(keys, places, size);
  uint8_t row_room[kMostGroup], column_room[kMostGroup];
  std::fill_n(row_room, m, static_cast<uint8_t>(nm.n));
  std::fill_n(column_room, m, static_cast<uint8_t>(nm.n));
  for (int k = 0; k < size; ++k) {
    const int i = order[k] >> 8, j = order[k] & 255;
    const uint8_t fits = (row_room[i] > 0) & (column_room[j] > 0);
    row_room[i] = static_cast<uint8_t>(row_room[i] - fits);
    column_room[j] = static_cast<uint8_t>(column_room[j] - fits);
    bytes[i * bytes_stride + j] = fits;
  }
}

template <typename T>
void greedy_tiles(const T* scores, int64_t stride, int64_t tiles, const NM& nm, void* scratch, uint8_t* bytes,
                  int64_t bytes_stride) {
  if (nm.m <= kLaneGroup) {
    blocks_of<kWideLanes<integer_of<T>>>(tiles, [&](int64_t first, int count) {
      const T* from = scores + first * nm.m;
      uint8_t* to = bytes + first * nm.m;
      if (nm.m == 4) greedy_lanes<4>(from, stride, count, nm, to, bytes_stride);
      else if (nm.m == 8) greedy_lanes<8>(from, stride, count, nm, to, bytes_stride);
      else greedy_lanes<0>(from, stride, count, nm, to, bytes_stride);
    });
  } else {
    for (int64_t tile = 0; tile < tiles; ++tile)
      greedy_sorted(scores + tile * nm.m, stride, nm, scratch, bytes + tile * nm.m, bytes_stride);
  }
}

template <typename T>
constexpr NMTransposableKernels<T> nm_transposable_table() {
  return {&exact_tiles<T>, &greedy_tiles<T>};
}
