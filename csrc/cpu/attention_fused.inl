// Both products of attention and the softmax between them, one tile of keys at a time: FusedKernels. Included by
// attention_simd.inl.
//
// Tiles stand keys by queries: a lane is a query, so that what a query has one of, its maximum or its sum, is a lane too, and
// rows of keys and values are broadcast from where they lie, 32 bits at a time: a float, or a pair of bfloat16.

#if PYRX_ISA == 512
constexpr int kFusedVectors = kFusedQueries / kLanes;

template <typename G>
constexpr int64_t kPerUnit = 4 / sizeof(G);  // elements in 32 bits

inline __m512i broadcast(const void* p) {  // which need not be aligned
  int32_t x;
  std::memcpy(&x, p, sizeof(x));
  return _mm512_set1_epi32(x);
}

template <typename G>
PYRX_BF16 inline __m512 multiply_add(__m512i a, __m512i b, __m512 sum) {
  if constexpr (sizeof(G) == 2) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  else return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

// out += values * weights of the tile's keys from .. to - 1.
template <typename G, int kVectors>
PYRX_BF16 void add_values(const FusedTile<G>& tile, int64_t from, int64_t to) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const auto* weights = reinterpret_cast<const uint32_t*>(tile.weights);
  const int64_t size = tile.value_size;
  for (int64_t d = 0; d < size; d += kFusedRows) {
    __m512 sums[kFusedRows][kVectors];
    float* out = tile.out + d * kWidth;
#pragma GCC unroll 16
    for (int r = 0; r < kFusedRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_loadu_ps(out + r * kWidth + v * kLanes);
    int64_t at = 0;  // of the part's first key
    for (int64_t part = 0; part < tile.count; ++part) {
      const FusedKeys<G>& keys = tile.parts[part];
      const int64_t begin = std::max(from, at) / kPerUnit<G>, end = std::min(to, at + keys.count) / kPerUnit<G>;
      const uint32_t* value = reinterpret_cast<const uint32_t*>(keys.value) + (begin - at / kPerUnit<G>) * size + d;
      const uint32_t* weight = weights + begin * kWidth;
#pragma GCC unroll 4
      for (int64_t j = begin; j < end; ++j, value += size, weight += kWidth) {
        __m512i own[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) own[v] = _mm512_loadu_si512(weight + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kFusedRows; ++r) {
          const __m512i x = broadcast(value + r);
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add<G>(x, own[v], sums[r][v]);
        }
      }
      at += keys.count;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kFusedRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(out + r * kWidth + v * kLanes, sums[r][v]);
  }
}

// The maximum of the `grown` lanes of vector v becomes `now`, and sums follow it. Weights of keys from .. to - 1, which
// followed the old one, are summed up before.
template <typename G, int kVectors>
[[gnu::noinline, gnu::cold]] PYRX_BF16 void grow(const FusedTile<G>& tile, int v, __mmask16 grown, __m512 now, int64_t from,
                                                 int64_t to) {
  if (from < to) add_values<G, kVectors>(tile, from, to);
  const auto scale = [&](float* sums, __m512 by) { _mm512_storeu_ps(sums, _mm512_mul_ps(_mm512_loadu_ps(sums), by)); };
  const __m512 before = _mm512_loadu_ps(tile.most + v * kLanes);
  now = _mm512_mask_mov_ps(before, grown, now);
  _mm512_storeu_ps(tile.most + v * kLanes, now);
  float* const total = tile.total + v * kLanes;
  if (_mm512_mask_cmp_ps_mask(grown, _mm512_loadu_ps(total), _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0) return;  // the first keys
  const __m512 by = exp2(Vec<float>{_mm512_sub_ps(before, now)}).v;
  scale(total, by);
  for (int64_t d = 0; d < tile.value_size; ++d) scale(tile.out + (d * kVectors + v) * kLanes, by);
}

// Lanes of vector v that see key `at` of a part that hides some.
template <typename G>
inline __mmask16 seeing(const FusedTile<G>& tile, const FusedKeys<G>& keys, int v, int64_t at) {
  const __m512i key = _mm512_set1_epi32(static_cast<int32_t>(keys.first + at));
  __mmask16 seen = _mm512_cmple_epi32_mask(_mm512_loadu_si512(tile.low + v * kLanes), key);
  seen = _mm512_mask_cmpgt_epi32_mask(seen, _mm512_loadu_si512(tile.high + v * kLanes), key);
  return keys.key_mask && seen != 0 && !keys.key_mask[at] ? 0 : seen;
}

// Two keys' weights, pairs of 16-bit ones. They are not negative; halves are rounded up.
template <typename G, int kVectors>
inline void put_weights(const FusedTile<G>& tile, int64_t at, int v, __m512 x, __m512 y) {
  constexpr int64_t kWidth = kVectors * kLanes;
  if constexpr (sizeof(G) == 2) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(x), half), 16);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(y), half);
    _mm512_storeu_si512(tile.weights + at * kWidth + 2 * v * kLanes, _mm512_mask_mov_epi16(low, 0xAAAAAAAA, high));
  } else {
    _mm512_storeu_ps(tile.weights + at * kWidth + v * kLanes, x);
    _mm512_storeu_ps(tile.weights + (at + 1) * kWidth + v * kLanes, y);
  }
}

// 2^x within 2 ulp. Of the multiplying pipes, which the products keep busy, it takes three operations and a half: a table of
// 32 powers leaves a remainder of a 64th at most to a parabola, the one of least error.
inline __m512 exp2_by_table(__m512 x) {
  alignas(64) static constexpr float kPowers[32] = {
      1.0f,         1.021897149f, 1.044273782f, 1.067140401f, 1.090507733f, 1.114386743f, 1.138788635f, 1.163724859f,
      1.189207115f, 1.21524736f,  1.241857812f, 1.269050957f, 1.296839555f, 1.325236643f, 1.354255547f, 1.383909882f,
      1.414213562f, 1.445180807f, 1.476826146f, 1.509164428f, 1.542210825f, 1.575980845f, 1.610490332f, 1.645755478f,
      1.681792831f, 1.718619298f, 1.75625216f,  1.794709075f, 1.834008086f, 1.874167634f, 1.915206561f, 1.957144124f};
  const __m512 rest = _mm512_reduce_ps(x, 5 << 4), whole = _mm512_sub_ps(x, rest);  // whole: in 32nds
  // its last bits are the table's index, the whole number is scalef's to find
  const __m512i index = _mm512_castps_si512(_mm512_add_ps(whole, _mm512_set1_ps(0x1.8p18f)));
  const __m512 power = _mm512_permutex2var_ps(_mm512_load_ps(kPowers), index, _mm512_load_ps(kPowers + kLanes));
  const __m512 slope = _mm512_fmadd_ps(rest, _mm512_set1_ps(0.24022651f), _mm512_set1_ps(0.69315734f));
  return _mm512_scalef_ps(_mm512_fmadd_ps(_mm512_mul_ps(power, rest), slope, power), whole);
}

// kEdited: some keys are hidden or some weights dropped. `units` are those of a row of keys.
//
// The softmax of eight keys stands between the products of the next eight, a pair of keys of a vector of queries at a time:
// the processor multiplies while it waits for exponentials.
template <typename G, int kVectors, bool kEdited, typename Size>
PYRX_BF16 void fused_tile(const FusedTile<G>& given, Size units) {
  constexpr int64_t kWidth = kVectors * kLanes;
  constexpr int kPairs = kFusedRows / 2 * kVectors;
  const int64_t size = units, steps = size / kPairs;
  const FusedTile<G> tile = given;  // nothing that is written may change it
  const auto* queries = reinterpret_cast<const uint32_t*>(tile.queries);
  alignas(64) float logits[kPairs][2][kLanes];  // of keys `before` and on
  std::fill_n(&logits[0][0][0], kFusedRows * kWidth, -std::numeric_limits<float>::infinity());
  int64_t before = 0;
  const auto weigh = [&](int pair) PYRX_BF16 {
    const int v = pair % kVectors;
    const int64_t at = before + pair / kVectors * 2;
    const __m512 most = _mm512_loadu_ps(tile.most + v * kLanes);
    __m512 even = exp2_by_table(_mm512_sub_ps(_mm512_load_ps(logits[pair][0]), most));
    __m512 odd = exp2_by_table(_mm512_sub_ps(_mm512_load_ps(logits[pair][1]), most));
    float* total = tile.total + v * kLanes;
    _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), _mm512_add_ps(even, odd)));
    if constexpr (kEdited) {
      const auto kept = [&](int64_t key) -> __mmask16 {
        if (!tile.bits) return 0xFFFF;
        const uint8_t* bits = tile.bits + 2 * v * tile.bits_stride + key;
        return static_cast<__mmask16>(bits[0] | bits[tile.bits_stride] << 8);
      };
      even = _mm512_maskz_mov_ps(kept(at), even), odd = _mm512_maskz_mov_ps(kept(at + 1), odd);
    }
    put_weights<G, kVectors>(tile, at, v, even, odd);
  };
  int64_t summed = 0, j = 0;
  for (const FusedKeys<G>*part = tile.parts, *end = part + tile.count; part != end; ++part) {
    const auto* keys = reinterpret_cast<const uint32_t*>(part->key);
    for (int64_t k = 0; k < part->count; k += kFusedRows, j += kFusedRows, keys += kFusedRows * size) {
      __m512 x[kFusedRows][kVectors];
#pragma GCC unroll 16
      for (int r = 0; r < kFusedRows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) x[r][v] = _mm512_setzero_ps();
      const auto multiply = [&](int64_t first, int64_t count) PYRX_BF16 {
        const uint32_t *query = queries + first * kWidth, *key = keys + first;
#pragma GCC unroll 8
        for (int64_t d = 0; d < count; ++d, query += kWidth, ++key) {
          __m512i own[kVectors];
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) own[v] = _mm512_loadu_si512(query + v * kLanes);
#pragma GCC unroll 16
          for (int r = 0; r < kFusedRows; ++r) {
            const __m512i same = broadcast(key + r * size);
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; ++v) x[r][v] = multiply_add<G>(same, own[v], x[r][v]);
          }
        }
      };
#pragma GCC unroll 1
      for (int pair = 0; pair < kPairs; ++pair) {
        weigh(pair);
        multiply(pair * steps, steps);
      }
      multiply(kPairs * steps, size % kPairs);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const __m512 bound =
            _mm512_add_ps(_mm512_loadu_ps(tile.most + v * kLanes), _mm512_set1_ps(static_cast<float>(kExponentSlack)));
        const __m512 hidden = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        __m512 greatest = bound;  // NaN is passed over
#pragma GCC unroll 16
        for (int r = 0; r < kFusedRows; ++r) {
          if constexpr (sizeof(G) == 2) x[r][v] = _mm512_mul_ps(x[r][v], _mm512_loadu_ps(tile.factor + v * kLanes));
          if (kEdited && part->hides) x[r][v] = _mm512_mask_mov_ps(hidden, seeing(tile, *part, v, k + r), x[r][v]);
          greatest = _mm512_max_ps(x[r][v], greatest);
          _mm512_store_ps(logits[r / 2 * kVectors + v][r % 2], x[r][v]);
        }
        const __mmask16 grown = _mm512_cmp_ps_mask(bound, greatest, _CMP_LT_OQ);
        if (__builtin_expect(grown != 0, 0)) {
          grow<G, kVectors>(tile, v, grown, greatest, summed, j);
          summed = j;
        }
      }
      before = j;
      tile.ahead->fetch(tile.lines);
    }
  }
#pragma GCC unroll 1
  for (int pair = 0; pair < kPairs; ++pair) weigh(pair);
  add_values<G, kVectors>(tile, summed, j);
}

template <typename G, int kVectors, bool kEdited>
inline void fused_tile_of(const FusedTile<G>& tile) {
  const int64_t size = tile.size / kPerUnit<G>;
  if constexpr (kVectors == kFusedVectors) {  // sizes known to the compiler
    if (size == 32) return fused_tile<G, kVectors, kEdited>(tile, std::integral_constant<int64_t, 32>());
    if (size == 64) return fused_tile<G, kVectors, kEdited>(tile, std::integral_constant<int64_t, 64>());
    if (size == 128) return fused_tile<G, kVectors, kEdited>(tile, std::integral_constant<int64_t, 128>());
  }
  fused_tile<G, kVectors, kEdited>(tile, size);
}

template <typename G>
void fused_step(const FusedTile<G>& tile) {
  const bool edited = tile.low || tile.bits;
  if (tile.width != kFusedQueries) edited ? fused_tile_of<G, 1, true>(tile) : fused_tile_of<G, 1, false>(tile);
  else if (edited) fused_tile_of<G, kFusedVectors, true>(tile);
  else fused_tile_of<G, kFusedVectors, false>(tile);
}

inline void normalize(float* out, const float* total, int64_t value_size, int64_t width, float scale) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const __m512 sum = _mm512_loadu_ps(total + i);
    const __mmask16 some = _mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512 by = _mm512_maskz_div_ps(some, _mm512_set1_ps(scale), sum);
    for (int64_t d = 0; d < value_size; ++d) {
      float* const at = out + d * width + i;
      _mm512_storeu_ps(at, _mm512_maskz_mul_ps(some, _mm512_loadu_ps(at), by));
    }
  }
}
#endif

template <typename G>
constexpr FusedKernels<G> fused_table() {
#if PYRX_ISA == 512
  return {&fused_step<G>, &normalize};
#else
  return {};
#endif
}
