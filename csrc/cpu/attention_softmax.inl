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

// The same of two vectors, one after another.
template <typename G>
inline void store_weights(G* p, const Vec<accumulate_t<G>>& x, const Vec<accumulate_t<G>>& y) {
#if PYRX_ISA == 512
  if constexpr (std::is_same_v<G, bfloat16>) {
    alignas(64) static constexpr uint16_t kHigh[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i a = _mm512_add_epi32(_mm512_castps_si512(x.v), half);
    const __m512i b = _mm512_add_epi32(_mm512_castps_si512(y.v), half);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16(a, _mm512_load_si512(kHigh), b));
    return;
  }
#endif
  store_weight(p, x);
  store_weight(p + kLanes, y);
}

#if PYRX_ISA == 512
struct Sum {
  static __m512 join(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
};
struct Greatest {
  static __m512 join(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};

// Rows first, first + 4 .. in a quarter each, joined to four lanes.
template <typename Op>
inline __m512 quarters(const Vec<float>* rows) {
  const __m512 a = rows[0].v, b = rows[4].v, c = rows[8].v, d = rows[12].v;
  const __m512 ab = Op::join(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  const __m512 cd = Op::join(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
  return Op::join(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
}
// The same of two such, joined to two lanes each.
template <typename Op>
inline __m512 pairs(const Vec<float>* rows) {
  const __m512d a = _mm512_castps_pd(quarters<Op>(rows)), b = _mm512_castps_pd(quarters<Op>(rows + 1));
  return Op::join(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}
// Lane i: the lanes of rows[i] joined. Sixteen reductions at once cost a fifth of one after another.
template <typename Op>
inline Vec<float> across(const Vec<float>* rows) {
  const __m512 a = pairs<Op>(rows), b = pairs<Op>(rows + 2);
  return {Op::join(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD))};
}
#endif

// Lane i: the sum of rows[i].
template <typename Acc>
inline Vec<Acc> sums(const Vec<Acc>* rows) {
#if PYRX_ISA == 512
  if constexpr (sizeof(Acc) == 4) return across<Sum>(rows);
#endif
  Acc v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = rows[i].sum();
  return Vec<Acc>::get(v);
}

// Lane i: the greatest of rows[i], in which there is no NaN.
template <typename Acc>
inline Vec<Acc> greatest(const Vec<Acc>* rows) {
#if PYRX_ISA == 512
  if constexpr (sizeof(Acc) == 4) return across<Greatest>(rows);
#endif
  Acc v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = rows[i].greatest();
  return Vec<Acc>::get(v);
}

// A row's logits become (factor * logit - base) / factor. Where base is past the integers, a product that is not rounded
// as base is would leave hundreds: weights are then infinite or all 0.
template <typename Acc>
[[gnu::noinline, gnu::cold]] void take_off(Acc* row, int64_t vectors, Acc factor, Acc base) {
  using V = Vec<Acc>;
  for (int64_t i = 0; i < vectors * kLanes; i += kLanes)
    store(row + i, (load(row + i) * V::fill(factor) - V::fill(base)) * V::fill(1 / factor));
}

// Rows first .. first + n - 1 of a tile of `vectors` vectors of keys, n at most sixteen: what they have one of is a
// vector. After each, `lines` of `ahead` are fetched.
template <typename G, bool kWeighted, bool kDropped, typename Vectors>
inline void softmax_rows(const SoftmaxTile<G>& tile, int64_t first, int n, Vectors vectors, Ahead& ahead,
                         int64_t lines) {
  using Acc = accumulate_t<G>;
  using V = Vec<Acc>;
  const V nothing = V::fill(-std::numeric_limits<Acc>::infinity()), factor = V::fill(tile.factor);
  V rows[kLanes];
  for (int r = 0; r < n; ++r) {
    const Acc* row = tile.logits + (first + r) * tile.stride;
    V even = nothing, odd = nothing;  // NaN is passed over
    for (int i = 0; i + 1 < vectors; i += 2) {
      even = V::max(load(row + i * kLanes), even);
      odd = V::max(load(row + (i + 1) * kLanes), odd);
    }
    if (vectors % 2 != 0) even = V::max(load(row + (vectors - 1) * kLanes), even);
    rows[r] = V::max(even, odd);
  }
  for (int r = n; r < kLanes; ++r) rows[r] = nothing;

  const V before = load(tile.most + first, n), found = factor * greatest(rows);
  const uint32_t grown = less(before + V::fill(kExponentSlack), found) & ((1u << n) - 1);
  const V now = V::choose(grown, found, before);
  const V base = V::choose(less(nothing, now), now, V::fill(0));
  Acc offsets[kLanes];
  (V::fill(0) - base).put(offsets);
  constexpr Acc kPast = 1 / std::numeric_limits<Acc>::epsilon();
  for (uint32_t past = less(V::fill(kPast), V::max(base, V::fill(0) - base)); past != 0; past &= past - 1) {
    const int r = __builtin_ctz(past);
    if (r >= n) break;
    take_off(tile.logits + (first + r) * tile.stride, int64_t(vectors), tile.factor, -offsets[r]);
    offsets[r] = 0;
  }

  V weighted[kWeighted ? kLanes : 1];
  for (int r = 0; r < n; ++r) {
    const V offset = V::fill(offsets[r]);
    const Acc* row = tile.logits + (first + r) * tile.stride;
    G* out = tile.weights + (first + r) * tile.weights_stride;
    V even = V::fill(0), odd = even;
    if constexpr (kWeighted) weighted[r] = even;
    const auto weigh = [&](int i, V& total) {
      const V exponent = V::multiply_add(load(row + i * kLanes), factor, offset), weight = exp2(exponent);
      total = total + weight;
      // a weight of 0 has an exponent of minus infinity, perhaps
      if constexpr (kWeighted) weighted[r] = V::multiply_add(weight, V::max(exponent, V::fill(-1000)), weighted[r]);
      if constexpr (kDropped)
        return weight.keep(bits_of(tile.bits + (first + r) * tile.bits_stride, i * kLanes, kLanes));
      else
        return weight;
    };
    for (int i = 0; i + 1 < vectors; i += 2) {
      const V one = weigh(i, even);
      store_weights(out + i * kLanes, one, weigh(i + 1, odd));
    }
    if (vectors % 2 != 0) store_weight(out + (vectors - 1) * kLanes, weigh(vectors - 1, even));
    rows[r] = even + odd;
    ahead.fetch(lines);
  }
  for (int r = n; r < kLanes; ++r) rows[r] = V::fill(0);

  const V total = load(tile.total + first, n);
  if (grown == 0) {
    store(tile.total + first, total + sums(rows), n);
  } else {
    const V shrink = exp2(before - base);
    store(tile.most + first, now, n);
    store(tile.total + first, V::multiply_add(total, shrink, sums(rows)), n);
    Acc by[kLanes];
    shrink.put(by);
    for (uint32_t left = tile.out ? grown : 0; left != 0; left &= left - 1) {
      const int r = __builtin_ctz(left);
      Acc* out = tile.out + (first + r) * tile.out_stride;
      blocks(tile.size, [&](int64_t i, auto count) { store(out + i, load(out + i, count) * V::fill(by[r]), count); });
    }
  }
  if constexpr (kWeighted) {
    for (int r = n; r < kLanes; ++r) weighted[r] = V::fill(0);
    const V own = sums(weighted), old = load(tile.weighted + first, n);
    const uint32_t seen = less(nothing, before);
    // so far that nothing is left of the old sums, times a total, is a number still
    const V by = V::max(before - base, V::fill(-1000));
    const V moved = old + V::choose(seen, by, V::fill(0)) * total;
    store(tile.weighted + first, V::multiply_add(moved, V::choose(grown, exp2(before - base), V::fill(1)), own), n);
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
  int64_t lines = 0;
  for (int64_t i = 0; i < tile.aheads; ++i) lines += tile.ahead[i].count;
  Ahead ahead(tile.ahead, tile.aheads);
  lines = (lines + tile.rows - 1) / tile.rows;
  const auto run = [&](auto width) {
    for (int64_t r = 0; r < tile.rows; r += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, tile.rows - r));
      if (tile.weighted && tile.bits) softmax_rows<G, true, true>(tile, r, n, width, ahead, lines);
      else if (tile.weighted) softmax_rows<G, true, false>(tile, r, n, width, ahead, lines);
      else if (tile.bits) softmax_rows<G, false, true>(tile, r, n, width, ahead, lines);
      else softmax_rows<G, false, false>(tile, r, n, width, ahead, lines);
    }
  };
  constexpr int64_t kWhole = kLogitKeys / kLanes;  // known to the compiler, so that the loops are unrolled
  vectors == kWhole ? run(std::integral_constant<int, kWhole>()) : run(static_cast<int>(vectors));
}

template <typename G>
constexpr SoftmaxKernels<G> softmax_table() {
  return {&softmax_step<G>};
}
