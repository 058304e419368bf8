// The online softmax over tiles of logits: SoftmaxKernels. Included by attention_simd.inl.

#if PYRX_ISA
// 2^r on [0, 1), below 2 at its end, to a relative error of 1e-7
constexpr float kExp2[] = {1.8671300495e-3f, 9.0170307085e-3f, 5.5799912661e-2f, 2.4016444385e-1f, 6.9315129519e-1f, 1.0f};
#endif

#if PYRX_ISA == 2
// From the least normal number to 0 in a straight line.
inline __m256 exp2(__m256 x) {
  // NaN is the second operand, which is what is returned where they do not compare
  x = _mm256_min_ps(_mm256_set1_ps(128.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), x));
  const __m256 n = _mm256_floor_ps(x), r = _mm256_sub_ps(x, n);
  __m256 y = _mm256_set1_ps(kExp2[0]);
  for (int i = 1; i < 6; ++i) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(kExp2[i]));
  // n more in the exponent of y in [1, 2): 1 to infinity by 128, to 0 by -127
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
}
#endif

// 2^x within 2 ulp in float32, 0 of minus infinity, infinity past the largest number; NaN stays.
template <typename Acc>
inline Vec<Acc> exp2(const Vec<Acc>& x) {
#if PYRX_ISA == 512
  if constexpr (sizeof(Acc) == 4) {
    const __m512 r = _mm512_reduce_ps(x.v, 1);  // x - floor(x), 0 of infinities
    __m512 y = _mm512_set1_ps(kExp2[0]);
    for (int i = 1; i < 6; ++i) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(kExp2[i]));
    return {_mm512_scalef_ps(y, x.v)};  // y * 2^floor(x)
  }
#elif PYRX_ISA == 2
  if constexpr (sizeof(Acc) == 4) return {exp2(x.low), exp2(x.high)};
#endif
  Acc v[kLanes];
  x.put(v);
  for (int i = 0; i < kLanes; ++i) v[i] = std::exp2(v[i]);
  return Vec<Acc>::get(v);
}

// A weight, which is not negative, to an operand: halves are rounded up, which saves what rounding to even takes.
template <typename G>
inline void store_weight(G* p, const Vec<accumulate_t<G>>& x) {
#if PYRX_ISA == 512
  if constexpr (std::is_same_v<G, bfloat16>) {
    const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x8000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    return;
  }
#endif
  store(p, x);
}

// factor * the greatest of each row; minus infinity where there is none but NaN.
template <typename G, typename Vectors>
inline void greatest_of_rows(const SoftmaxTile<G>& tile, int64_t first, int64_t last, Vectors vectors,
                             accumulate_t<G>* found) {
  using Acc = accumulate_t<G>;
  using V = Vec<Acc>;
  for (int64_t r = first; r < last; ++r) {
    const Acc* row = tile.logits + r * tile.stride;
    V even = V::fill(-std::numeric_limits<Acc>::infinity()), odd = even;
    for (int i = 0; i + 1 < vectors; i += 2) {
      even = V::max(load(row + i * kLanes), even);
      odd = V::max(load(row + (i + 1) * kLanes), odd);
    }
    if (vectors % 2 != 0) even = V::max(load(row + (vectors - 1) * kLanes), even);
    found[r - first] = tile.factor * V::max(even, odd).greatest();
  }
}

// Rows of a tile of `vectors` vectors of keys. The greatest of some rows are found before the first weight: the chain of
// what a row waits for is long, and a processor looks ahead over few rows.
template <typename G, bool kWeighted, bool kDropped, typename Vectors>
inline void softmax_rows(const SoftmaxTile<G>& tile, Vectors vectors) {
  using Acc = accumulate_t<G>;
  using V = Vec<Acc>;
  constexpr Acc kNothing = -std::numeric_limits<Acc>::infinity();
  constexpr int64_t kAhead = 16;
  const V factor = V::fill(tile.factor);
  Acc greatest[kAhead];
  for (int64_t r = 0; r < tile.rows; ++r) {
    if (r % kAhead == 0) greatest_of_rows(tile, r, std::min(r + kAhead, tile.rows), vectors, greatest);
    const Acc before = tile.most[r], found = greatest[r % kAhead], now = found > before ? found : before;
    const Acc base = now == kNothing ? 0 : now;
    const V offset = V::fill(-base);
    const Acc* row = tile.logits + r * tile.stride;
    G* out = tile.weights + r * tile.weights_stride;
    V even = V::fill(0), odd = even, weighted = even;
    const auto weigh = [&](int i, V& total) {
      const V exponent = V::multiply_add(load(row + i * kLanes), factor, offset), weight = exp2(exponent);
      total = total + weight;
      // a weight of 0 has an exponent of minus infinity, perhaps
      if constexpr (kWeighted) weighted = V::multiply_add(weight, V::max(exponent, V::fill(-1000)), weighted);
      if constexpr (kDropped)
        store_weight(out + i * kLanes, weight.keep(bits_of(tile.bits + r * tile.bits_stride, i * kLanes, kLanes)));
      else
        store_weight(out + i * kLanes, weight);
    };
    for (int i = 0; i + 1 < vectors; i += 2) {
      weigh(i, even);
      weigh(i + 1, odd);
    }
    if (vectors % 2 != 0) weigh(vectors - 1, even);
    const Acc sum = (even + odd).sum();
    if (now == before) {
      tile.total[r] += sum;
      if constexpr (kWeighted) tile.weighted[r] += weighted.sum();
      continue;
    }
    tile.most[r] = now;
    const Acc shrink = before == kNothing ? 0 : std::exp2(before - base);
    if constexpr (kWeighted) {
      const Acc moved = before == kNothing ? 0 : tile.weighted[r] + (before - base) * tile.total[r];
      tile.weighted[r] = moved * shrink + weighted.sum();
    }
    tile.total[r] = tile.total[r] * shrink + sum;
    if (tile.out == nullptr) continue;
    Acc* sums = tile.out + r * tile.out_stride;
    const V by = V::fill(shrink);
    blocks(tile.size, [&](int64_t i, auto count) { store(sums + i, load(sums + i, count) * by, count); });
  }
}

template <typename G>
void softmax_step(const SoftmaxTile<G>& tile) {
  using Acc = accumulate_t<G>;
  const int64_t vectors = (tile.keys + kLanes - 1) / kLanes;
  if (tile.keys % kLanes != 0)
    for (int64_t r = 0; r < tile.rows; ++r)
      std::fill(tile.logits + r * tile.stride + tile.keys, tile.logits + r * tile.stride + vectors * kLanes,
                -std::numeric_limits<Acc>::infinity());
  const auto run = [&](auto width) {
    if (tile.weighted)
      return tile.bits ? softmax_rows<G, true, true>(tile, width) : softmax_rows<G, true, false>(tile, width);
    tile.bits ? softmax_rows<G, false, true>(tile, width) : softmax_rows<G, false, false>(tile, width);
  };
  constexpr int64_t kWhole = kLogitKeys / kLanes;  // known to the compiler, so that the loops are unrolled
  vectors == kWhole ? run(std::integral_constant<int, kWhole>()) : run(static_cast<int>(vectors));
}

template <typename G>
constexpr SoftmaxKernels<G> softmax_table() {
  return {&softmax_step<G>};
}
