// Products of queries and keys to logits: LogitKernels. Included by attention_simd.inl.

// Bit i: a[i] < b[i]
template <typename Acc>
inline uint32_t less(const Vec<Acc>& a, const Vec<Acc>& b) {
#if PYRX_ISA == 512
  if constexpr (sizeof(Acc) == 4) return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ);
#elif PYRX_ISA == 2
  if constexpr (sizeof(Acc) == 4)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)) |
                                 _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ)) << 8);
#endif
  Acc x[kLanes], y[kLanes];
  a.put(x);
  b.put(y);
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(x[i] < y[i]) << i;
  return bits;
}

// Within 2 ulp in float32 (Cephes' tanhf): a polynomial near 0, 1 - 2 / (exp(2 |x|) + 1) elsewhere.
template <typename Acc>
inline Vec<Acc> tanh(const Vec<Acc>& x) {
  using V = Vec<Acc>;
#if PYRX_ISA
  if constexpr (sizeof(Acc) == 4) {
    constexpr float small[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                               -3.33332819422e-1f};
    const V zero = V::fill(0), one = V::fill(1), most = V::fill(10);  // tanh(10) rounds to 1
    const uint32_t negative = less(x, zero);
    const V magnitude = V::choose(negative, zero - x, x), z = x * x;
    V near = V::fill(small[0]);
    for (int i = 1; i < 5; ++i) near = V::multiply_add(near, z, V::fill(small[i]));
    near = V::multiply_add(near, z * x, x);
    const V bounded = V::choose(less(most, magnitude), most, magnitude);  // NaN stays
    const V far = one - V::fill(2) / ((bounded + bounded).exp() + one);
    return V::choose(less(magnitude, V::fill(0.625f)), near, V::choose(negative, zero - far, far));
  }
#endif
  Acc v[kLanes];
  x.put(v);
  for (int i = 0; i < kLanes; ++i) v[i] = std::tanh(v[i]);
  return V::get(v);
}

template <typename T>
void scale_logits(const LogitTile<T>& tile) {
  using Acc = accumulate_t<T>;
  using V = Vec<Acc>;
  const bool capped = tile.softcap > 0;
  const V cap = V::fill(tile.softcap);
  for (int64_t r = 0; r < tile.rows; ++r) {
    Acc* row = tile.logits + r * tile.stride;
    const Acc factor = tile.query_scale ? tile.scale * tile.query_scale[r] : tile.scale;
    if (capped) {
      const V inside = V::fill(factor / tile.softcap);
      blocks(tile.keys, [&](int64_t i, auto count) { store(row + i, cap * tanh(load(row + i, count) * inside), count); });
    } else {
      const V scale = V::fill(factor);
      blocks(tile.keys, [&](int64_t i, auto count) { store(row + i, load(row + i, count) * scale, count); });
    }
  }
}

// row[i] += the bias of key tile.k + i for query q
template <typename T>
inline void add_bias(const LogitTile<T>& tile, int64_t q, accumulate_t<T>* row) {
  using V = Vec<accumulate_t<T>>;
  const KeyBias<T>& bias = tile.bias;
  const T* along = bias.row_of(tile.b, tile.h, q);
  if (bias.column == nullptr) {
    blocks(tile.keys, [&](int64_t i, auto count) {
      store(row + i, load(row + i, count) + load(along + tile.k + i, count), count);
    });
    return;
  }
  const T* across = bias.column_of(tile.b, tile.h, q);
  int64_t c = tile.k % bias.columns;
  along += tile.k / bias.columns;
  for (int64_t from = 0; from < tile.keys; c = 0, ++along) {  // keys of one row of the grid
    const int64_t n = std::min(bias.columns - c, tile.keys - from);
    const V own = V::fill(widen(*along));
    accumulate_t<T>* part = row + from;
    blocks(n, [&](int64_t i, auto count) {
      store(part + i, load(part + i, count) + (own + load(across + c + i, count)), count);
    });
    from += n;
  }
}

template <typename T>
void hide_logits(const LogitTile<T>& tile) {
  using Acc = accumulate_t<T>;
  using V = Vec<Acc>;
  constexpr Acc kHidden = -std::numeric_limits<Acc>::infinity();
  uint32_t visible[kLogitKeys / kLanes];  // by key_mask
  if (tile.key_mask)
    blocks(tile.keys, [&](int64_t i, auto count) {
      uint32_t bits = 0;
      for (int j = 0; j < count; ++j) bits |= static_cast<uint32_t>(tile.key_mask[i + j] != 0) << j;
      visible[i / kLanes] = bits;
    });
  for (int64_t r = 0; r < tile.rows; ++r) {
    Acc* row = tile.logits + r * tile.stride;
    if (tile.bias.row) add_bias(tile, tile.q + r, row);
    const KeyRange range = tile.rules.of(tile.b, tile.q + r);
    const int64_t first = std::clamp<int64_t>(range.first - tile.k, 0, tile.keys);
    const int64_t last = std::clamp(range.last - tile.k, first, tile.keys);
    std::fill(row, row + first, kHidden);
    std::fill(row + last, row + tile.keys, kHidden);
    if (tile.key_mask && first < last)
      blocks(tile.keys, [&](int64_t i, auto count) {
        store(row + i, V::choose(visible[i / kLanes], load(row + i, count), V::fill(kHidden)), count);
      });
  }
}

template <typename T>
constexpr LogitKernels<T> logit_table() {
  return {&scale_logits<T>, &hide_logits<T>};
}
