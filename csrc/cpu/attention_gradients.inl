// Tiles of logits to weights and gradients of the logits, keys by queries. Included by attention_simd.inl.

// Sixteen columns of two rows, the even one's first.
template <typename G>
inline void store_pairs(G* out, const G* a, const G* b) {
#if PYRX_ISA == 512
  const __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  const __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  _mm512_storeu_si512(out, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
#else
  for (int i = 0; i < kLanes; ++i) {
    out[2 * i] = a[i];
    out[2 * i + 1] = b[i];
  }
#endif
}

// kPlain: both results of a tile that every column sees, without dropout, bias, cap and entropy.
template <typename G, bool kPlain>
void attention_gradient_columns(const GradientTile<G>& given, int64_t c) {
  using Acc = accumulate_t<G>;
  using V = Vec<Acc>;
  const GradientTile<G> tile = given;  // nothing that is written may change it
  const bool want_gradient = kPlain || tile.upstream, capped = !kPlain && tile.softcap > 0;
  const bool ranged = !kPlain && tile.low, entropic = !kPlain && tile.entropy && want_gradient;
  const V zero = V::fill(0), one = V::fill(1), least = V::fill(-1e4), ln2 = V::fill(std::numbers::ln2_v<Acc>);
  const V log2e = V::fill(std::numbers::log2e_v<Acc>);
  const V factor = load(tile.factor + c) * log2e, offset = zero - load(tile.lse + c) * log2e;
  const V low = ranged ? load(tile.low + c) : zero, high = ranged ? load(tile.high + c) : zero;
  const V delta = want_gradient ? load(tile.delta + c) : zero, entropy = entropic ? load(tile.entropy + c) : zero;
  const V keep_scale = V::fill(tile.keep_scale), cap = V::fill(capped ? 1 / tile.softcap : 0);
  const uint8_t* bits = kPlain || !tile.bits ? nullptr : tile.bits + c / 8 * tile.bits_stride;

  // the gradient of row k's logits; its weights are stored
  const auto row = [&](int64_t k) {
    const int64_t at = k * tile.width + c;
    const V logits = load(tile.logits + at);
    const V base = !kPlain && tile.bias ? V::multiply_add(load(tile.bias + at), log2e, offset) : offset;
    // where lse is past the integers, what is left of a row's maximum is hundreds; NaN passes
    V x = V::min(zero, V::multiply_add(logits, factor, base));
    if (entropic) x = V::max(least, x);  // a finite floor, that a weight of 0 has a gradient of 0; NaN passes
    V weight = exp2(x);
    if (ranged) {
      const V own = V::fill(static_cast<Acc>(k));
      weight = weight.keep(less(own, high) & ~less(own, low));
    }
    if (!kPlain && tile.key_mask && !tile.key_mask[k]) weight = zero;
    const uint32_t kept = bits ? bits[k] | static_cast<uint32_t>(bits[k + tile.bits_stride]) << 8 : 0xFFFF;
    if (tile.weights) store(tile.weights + at, bits ? weight.keep(kept) : weight);
    if (!want_gradient) return zero;
    V upstream = load(tile.upstream + at);
    if (bits) upstream = (upstream * keep_scale).keep(kept);
    V gradient = upstream - delta;
    if (entropic) gradient = gradient - entropy * (x * ln2);
    gradient = weight * gradient;
    if (capped) {
      const V tangent = logits * cap;
      gradient = gradient * (one - tangent * tangent);
    }
    return gradient;
  };

  if constexpr (sizeof(G) == 2) {
    for (int64_t k = 0; k < tile.keys; k += 2) {
      const bool two = k + 1 < tile.keys;
      const V even = row(k), odd = two ? row(k + 1) : zero;
      G scratch[2 * kLanes];
      G* first = tile.gradients ? tile.gradients + k * tile.width + c : scratch;
      G* second = tile.gradients && two ? first + tile.width : scratch + kLanes;
      store(first, even);
      store(second, odd);
      if (tile.pairs) store_pairs(tile.pairs + k * tile.width + 2 * c, first, second);
    }
  } else {
    for (int64_t k = 0; k < tile.keys; ++k) {
      const V gradient = row(k);
      if (tile.gradients) store(tile.gradients + k * tile.width + c, gradient);
    }
  }
}

template <typename G>
void attention_gradients(const GradientTile<G>& tile) {
  const bool plain = tile.upstream && !tile.low && !tile.key_mask && !tile.bits && !tile.bias && !tile.entropy &&
                     tile.softcap == 0;
  for (int64_t c = 0; c < tile.width; c += kLanes) {
    if (plain) attention_gradient_columns<G, true>(tile, c);
    else attention_gradient_columns<G, false>(tile, c);
  }
}

template <typename T>
accumulate_t<T> dot_rows(const T* x, const accumulate_t<T>* y, int64_t n) {
  using V = Vec<accumulate_t<T>>;
  V sum = V::fill(0);
  blocks(n, [&](int64_t i, auto count) { sum = V::multiply_add(load(x + i, count), load(y + i, count), sum); });
  return sum.sum();
}

template <typename T>
constexpr GradientKernels<T> gradient_table() {
  return {&attention_gradients<T>, &dot_rows<T>};
}
