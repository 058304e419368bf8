// Included by simd.cpp once for each instruction set, inside that set's namespace and target.
#include "cpu/vec.inl"
#include "cpu/pixels.inl"
#include "cpu/neighbor_fill.inl"
#include "cpu/blend.inl"
#include "cpu/noise.inl"
#include "cpu/subset.inl"
#include "cpu/pair_sums.inl"

template <typename T, typename G>
void select(const T* x, const uint8_t* bits, int64_t n, G* out) {
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, G>) {  // moved as they are: a conversion would touch NaN's bits
    int64_t i = 0;
#if PYRX_ISA == 512
    for (; i + 32 <= n; i += 32) {
      uint32_t kept = 0xFFFFFFFF;
      if (bits) std::memcpy(&kept, bits + i / 8, 4);
      _mm512_storeu_si512(out + i, _mm512_maskz_loadu_epi16(kept, x + i));
    }
#endif
    for (; i < n; ++i) out[i] = !bits || bits[i / 8] >> i % 8 & 1 ? x[i] : T{0};
  } else {
    blocks(n, [&](int64_t i, auto count) { store(out + i, load(x + i, count).keep(bits_of(bits, i, count)), count); });
  }
}

template <typename T>
void dropout(const T* x, const uint8_t* bits, int64_t n, accumulate_t<T> scale, T* out) {
  if (scale == 1) return select(x, bits, n, out);
  const auto factor = Vec<accumulate_t<T>>::fill(scale);
  blocks(n, [&](int64_t i, auto count) {
    store(out + i, (load(x + i, count) * factor).keep(bits_of(bits, i, count)), count);
  });
}

template <typename T>
void accumulate(const T* x, const uint8_t* bits, int64_t n, accumulate_t<T> scale, accumulate_t<T>* sum) {
  using V = Vec<accumulate_t<T>>;
  const V factor = V::fill(scale);
  blocks(n, [&](int64_t i, auto count) {
    const V kept = (load(x + i, count) * factor).keep(bits_of(bits, i, count));
    store(sum + i, load(sum + i, count) + kept, count);
  });
}

template <typename T>
void scaled_store(const accumulate_t<T>* x, int64_t n, accumulate_t<T> scale, T* out) {
  const auto factor = Vec<accumulate_t<T>>::fill(scale);
  blocks(n, [&](int64_t i, auto count) { store(out + i, load(x + i, count) * factor, count); });
}

template <typename T, typename G>
void select_pair(const T* x0, const uint8_t* bits0, const T* x1, const uint8_t* bits1, int64_t n, G* out) {
  const auto kept = [](const uint8_t* bits, int64_t i) { return !bits || bits[i / 8] >> i % 8 & 1; };
  int64_t i = 0;
#if PYRX_ISA == 512
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (; i + 32 <= n; i += 32) {
    uint32_t kept0 = 0xFFFFFFFF, kept1 = 0xFFFFFFFF;
    if (bits0) std::memcpy(&kept0, bits0 + i / 8, 4);
    if (bits1) std::memcpy(&kept1, bits1 + i / 8, 4);
    const __m512i a = _mm512_maskz_loadu_epi16(kept0, x0 + i);
    const __m512i b = x1 ? _mm512_maskz_loadu_epi16(kept1, x1 + i) : _mm512_setzero_si512();
    const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
    _mm512_storeu_si512(out + 2 * i, _mm512_permutex2var_epi64(low, first, high));
    _mm512_storeu_si512(out + 2 * i + 32, _mm512_permutex2var_epi64(low, second, high));
  }
#endif
  for (; i < n; ++i) {
    out[2 * i] = kept(bits0, i) ? x0[i] : T{0};
    out[2 * i + 1] = x1 && kept(bits1, i) ? x1[i] : T{0};
  }
}

template <typename T, typename G>
void multiply(const T* x, const accumulate_t<T>* level, int64_t n, G* out) {
  blocks(n, [&](int64_t i, auto count) {
    const auto factor = load(level + i, count);
    store(out + i, (load(x + i, count) * factor).keep(factor.nonzero()), count);
  });
}

template <typename T>
void fold(const accumulate_t<T>* tile, int64_t tile_stride, const uint8_t* bits, int64_t bits_stride, int64_t rows,
          int64_t n, accumulate_t<T> scale, T* out) {
  using V = Vec<accumulate_t<T>>;
  blocks(n, [&](int64_t i, auto count) {
    V sum = V::fill(0);
    for (int64_t k = 0; k < rows; ++k)
      sum = sum + load(tile + k * tile_stride + i, count).keep(bits_of(bits + k * bits_stride, i, count));
    store(out + i, sum * V::fill(scale), count);
  });
}

template <typename T>
void fold_level(const accumulate_t<T>* tile, const accumulate_t<T>* level, int64_t n, accumulate_t<T> scale, T* out) {
  using V = Vec<accumulate_t<T>>;
  blocks(n, [&](int64_t i, auto count) {
    const V factor = load(level + i, count);
    store(out + i, (load(tile + i, count) * factor * V::fill(scale)).keep(factor.nonzero()), count);
  });
}

template <typename T, typename G>
void convert(const accumulate_t<T>* x, int64_t n, G* out) {
  blocks(n, [&](int64_t i, auto count) { store(out + i, load(x + i, count), count); });
}

#if PYRX_ISA == 512
// Sixteen rows of sixteen 32-bit elements to sixteen columns.
inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xDD);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xDD);
  }
}
#endif

// out[c][r] = in[r][c], in blocks of sixteen; G and the accumulator may differ.
template <typename S, typename G>
void transpose(const S* in, int64_t in_stride, int64_t rows, int64_t columns, G* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; r += 16) {
    const int64_t height = rows - r < 16 ? rows - r : 16;
    for (int64_t c = 0; c < columns; c += 16) {
      const int64_t width = columns - c < 16 ? columns - c : 16;
#if PYRX_ISA == 512
      if constexpr (sizeof(S) == 4) {
        const __mmask16 some = static_cast<__mmask16>((1u << width) - 1);
        __m512i block[16];
        for (int i = 0; i < 16; ++i)
          block[i] = i < height ? _mm512_maskz_loadu_epi32(some, in + (r + i) * in_stride + c) : _mm512_setzero_si512();
        transpose16(block);
        for (int i = 0; i < width; ++i) {
          G* row = out + (c + i) * out_stride + r;
          if constexpr (std::is_same_v<S, G>) {
            _mm512_mask_storeu_epi32(row, static_cast<__mmask16>((1u << height) - 1), block[i]);
          } else {
            const Vec<float> column{_mm512_castsi512_ps(block[i])};
            if (height == 16) store(row, column);
            else store(row, column, static_cast<int>(height));
          }
        }
        continue;
      }
#endif
      for (int64_t i = 0; i < width; ++i)
        for (int64_t j = 0; j < height; ++j) {
          const S x = in[(r + j) * in_stride + c + i];
          if constexpr (std::is_same_v<S, G>) out[(c + i) * out_stride + r + j] = x;
          else out[(c + i) * out_stride + r + j] = narrow<G>(x);
        }
    }
  }
}

template <typename Acc>
void add_level(const uint8_t* bits, int64_t n, Acc value, Acc* level) {
  const auto step = Vec<Acc>::fill(value);
  blocks(n, [&](int64_t i, auto count) { store(level + i, load(level + i, count) + step.keep(bits_of(bits, i, count)), count); });
}

template <typename Acc>
void axpy(Acc a, const Acc* x, int64_t n, Acc* y) {
  const auto factor = Vec<Acc>::fill(a);
  blocks(n, [&](int64_t i, auto count) {
    store(y + i, Vec<Acc>::multiply_add(load(x + i, count), factor, load(y + i, count)), count);
  });
}

// Loss and gradient of a row whose greatest logit is known; `block(i, count)` gives its logits, `a` and `b` are those of
// the target's classes. exps (C,) may be the gradient, and may be where the logits are.
template <bool kGradient, typename Acc, typename Block, typename O>
Acc row_loss(const RowGoal<Acc>& goal, Acc greatest, Acc a, Acc b, Block block, Acc* exps, O* gradient) {
  using V = Vec<Acc>;
  const int64_t n = goal.classes;
  const bool dense = goal.probabilities != nullptr, weighted = dense || goal.target.uniform != 0;

  // coefficient of class block i in the loss, beside those of the target's own classes
  const V rest = V::fill(1 - goal.label_smoothing), share = V::fill(goal.label_smoothing / static_cast<Acc>(n));
  const V uniform = V::fill(goal.target.uniform);
  const auto coefficient = [&](int64_t i, auto count) {
    V c = dense ? V::multiply_add(load(goal.probabilities + i, count), rest, share) : uniform;
    if (goal.class_weight) c = c * load(goal.class_weight + i, count);
    return c.keep((1u << count) - 1);
  };

  const V shift = V::fill(greatest);
  V sums = V::fill(0), dots = V::fill(0), totals = V::fill(0);
  blocks(n, [&](int64_t i, auto count) {
    const V z = block(i, count) - shift;
    if (weighted) {
      const V c = coefficient(i, count);
      dots = dots + (c * z).keep((1u << count) - 1);
      totals = totals + c;
    }
    const V e = z.exp().keep((1u << count) - 1);
    sums = sums + e;
    if (kGradient) store(exps + i, e, count);
  });
  const Acc sum = sums.sum();
  const Acc total = dense ? totals.sum() : goal.target.total;
  Acc loss = total * std::log(sum);
  if (!dense) {
    // a class that counts nothing may have an infinite logit
    if (goal.target.a_coefficient != 0) loss -= goal.target.a_coefficient * (a - greatest);
    if (goal.target.b_coefficient != 0) loss -= goal.target.b_coefficient * (b - greatest);
  }
  if (weighted) loss -= dots.sum();
  if (!kGradient) return loss;

  const Acc rate = goal.gradient_factor * total / sum;
  const Acc exp_a = exps[goal.target.a], exp_b = exps[goal.target.b];
  const V factor = V::fill(goal.gradient_factor), softmax = V::fill(rate);
  blocks(n, [&](int64_t i, auto count) {
    V g = load(exps + i, count) * softmax;
    if (weighted) g = g - coefficient(i, count) * factor;
    store(gradient + i, g, count);
  });
  if (dense) return loss;
  // the target's own classes once more, so that each is rounded once
  const auto own = [&](int64_t c, Acc exp) {
    Acc q = goal.class_weight ? goal.target.uniform * goal.class_weight[c] : goal.target.uniform;
    if (c == goal.target.a) q += goal.target.a_coefficient;
    if (c == goal.target.b) q += goal.target.b_coefficient;
    gradient[c] = narrow<O>(exp * rate - q * goal.gradient_factor);
  };
  own(goal.target.a, exp_a);
  own(goal.target.b, exp_b);
  return loss;
}

template <typename Acc>
Acc cross_entropy(const CrossEntropyRow<Acc>& row, bool want_gradient) {
  using V = Vec<Acc>;
  const bool dense = row.probabilities != nullptr;
  if (!dense && !row.target.counts) {
    if (want_gradient) std::fill_n(row.gradient, row.classes, Acc(0));
    return 0;
  }
  const V scale = V::fill(row.scale), lowest = V::fill(-std::numeric_limits<Acc>::infinity());
  V most = lowest;
  blocks(row.classes, [&](int64_t i, auto count) {
    V z = load(row.raw + i, count);
    if (row.base) z = load(row.base + i, count) - z;
    z = z * scale;
    if (row.bias) z = z + load(row.bias + i, count);
    most = V::max(V::choose((1u << count) - 1, z, lowest), most);
    store(row.gradient + i, z, count);
  });
  const auto block = [&](int64_t i, auto count) { return load(row.gradient + i, count); };
  const Acc a = row.gradient[row.target.a], b = row.gradient[row.target.b];
  if (!want_gradient) return row_loss<false>(row, most.greatest(), a, b, block, row.gradient, row.gradient);
  return row_loss<true>(row, most.greatest(), a, b, block, row.gradient, row.gradient);
}

template <typename T, typename O>
accumulate_t<T> logits_cross_entropy(const LogitsRow<T, O>& row) {
  using Acc = accumulate_t<T>;
  using V = Vec<Acc>;
  const ClassTarget<Acc>& target = row.target;
  if (!target.counts) {
    if (row.gradient) std::fill_n(row.gradient, row.classes, O{});
    return 0;
  }
  const V lowest = V::fill(-std::numeric_limits<Acc>::infinity());
  V most = lowest;
  blocks(row.classes, [&](int64_t i, auto count) {
    most = V::max(V::choose((1u << count) - 1, load(row.logits + i, count), lowest), most);
  });
  const auto block = [&](int64_t i, auto count) { return load(row.logits + i, count); };
  const Acc greatest = most.greatest(), a = widen(row.logits[target.a]), b = widen(row.logits[target.b]);
  if (!row.gradient) return row_loss<false>(row, greatest, a, b, block, row.scratch, row.gradient);
  return row_loss<true>(row, greatest, a, b, block, row.scratch, row.gradient);
}

#if PYRX_ISA
// The bits of kCount vectors of groups, each from its own first group on. Groups sit in 64-bit lanes: mul_epu32 reads the
// low half of a lane, so what stands in the high half never matters.
#if PYRX_ISA == 512
constexpr int kMaskWidth = 8;
template <int kCount>
inline void mask_vectors(uint64_t seed, SampleMask mask, const uint64_t* first, uint8_t* const* out) {
  using I = __m512i;
  const I m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const I threshold = _mm512_set1_epi16(static_cast<short>(mask.threshold));
  const I flip = _mm512_set1_epi16(mask.complement ? -1 : 0);
  const I iota = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  I c0[kCount], c1[kCount], c2[kCount], c3[kCount];
  for (int u = 0; u < kCount; ++u) {
    c0[u] = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first[u])), iota);
    c1[u] = _mm512_srli_epi64(c0[u], 32);
    c2[u] = _mm512_set1_epi64(mask.sample);
    c3[u] = _mm512_setzero_si512();
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    const I key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
    for (int u = 0; u < kCount; ++u) {
      const I p0 = _mm512_mul_epu32(c0[u], m0), p1 = _mm512_mul_epu32(c2[u], m1);
      // a shuffle brings the high half down, since a shift would wait for the multiplier's port
      c0[u] = _mm512_ternarylogic_epi64(_mm512_shuffle_epi32(p1, _MM_PERM_DDBB), c1[u], key0, 0x96);
      c1[u] = p1;
      c2[u] = _mm512_ternarylogic_epi64(_mm512_shuffle_epi32(p0, _MM_PERM_DDBB), c3[u], key1, 0x96);
      c3[u] = p0;
    }
  }
  for (int u = 0; u < kCount; ++u) {
    const I words[4] = {c0[u], c1[u], c2[u], c3[u]};
    I bits = _mm512_setzero_si512();
    for (int w = 0; w < 4; ++w) {
      const __mmask32 kept = _mm512_cmpge_epu16_mask(_mm512_xor_si512(words[w], flip), threshold);
      const I bit = _mm512_set1_epi64(static_cast<int64_t>((2ull << 2 * w) << 16 | 1ull << 2 * w));
      bits = _mm512_or_si512(bits, _mm512_maskz_mov_epi16(kept, bit));
    }
    bits = _mm512_or_si512(bits, _mm512_srli_epi64(bits, 16));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out[u]), _mm512_cvtepi64_epi8(bits));
  }
}
#else
constexpr int kMaskWidth = 4;
template <int kCount>
inline void mask_vectors(uint64_t seed, SampleMask mask, const uint64_t* first, uint8_t* const* out) {
  using I = __m256i;
  const I m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  const I threshold = _mm256_set1_epi16(static_cast<short>(mask.threshold));
  const I flip = _mm256_set1_epi16(mask.complement ? -1 : 0);
  for (int u = 0; u < kCount; ++u) {
    I c0 = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first[u])), _mm256_setr_epi64x(0, 1, 2, 3));
    I c1 = _mm256_srli_epi64(c0, 32), c2 = _mm256_set1_epi64x(mask.sample), c3 = _mm256_setzero_si256();
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      const I p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k0));
      c1 = p1;
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k1));
      c3 = p0;
    }
    const I words[4] = {c0, c1, c2, c3};
    I bits = _mm256_setzero_si256();
    for (int w = 0; w < 4; ++w) {
      const I lane = _mm256_xor_si256(words[w], flip);
      const I kept = _mm256_cmpeq_epi16(_mm256_max_epu16(lane, threshold), lane);
      const I bit = _mm256_set1_epi64x(static_cast<int64_t>((2ull << 2 * w) << 16 | 1ull << 2 * w));
      bits = _mm256_or_si256(bits, _mm256_and_si256(kept, bit));
    }
    alignas(32) uint64_t lanes[kMaskWidth];
    _mm256_store_si256(reinterpret_cast<I*>(lanes), _mm256_or_si256(bits, _mm256_srli_epi64(bits, 16)));
    for (int j = 0; j < kMaskWidth; ++j) out[u][j] = static_cast<uint8_t>(lanes[j]);
  }
}
#endif

// Vectors of groups wait here until four can go through the rounds side by side: one alone waits for its own products.
class MaskQueue {
 public:
  MaskQueue(uint64_t seed, SampleMask mask) : seed_(seed), mask_(mask) {}
  // `count` groups from `first` on, at most a vector
  void push(uint64_t first, int64_t count, uint8_t* out) {
    const bool whole = count == kMaskWidth;
    first_[size_] = first;
    out_[size_] = whole ? out : part_[size_];
    to_[size_] = out;
    bytes_[size_] = whole ? 0 : count;
    if (++size_ == kDepth) flush();
  }
  void flush() {
    switch (size_) {
      case 4: mask_vectors<4>(seed_, mask_, first_, out_); break;
      case 3: mask_vectors<3>(seed_, mask_, first_, out_); break;
      case 2: mask_vectors<2>(seed_, mask_, first_, out_); break;
      case 1: mask_vectors<1>(seed_, mask_, first_, out_); break;
      default: break;
    }
    for (int u = 0; u < size_; ++u)
      for (int64_t j = 0; j < bytes_[u]; ++j) to_[u][j] = part_[u][j];
    size_ = 0;
  }

 private:
  static constexpr int kDepth = 4;
  uint64_t seed_;
  SampleMask mask_;
  int size_ = 0;
  uint64_t first_[kDepth];
  uint8_t *out_[kDepth], *to_[kDepth];
  int64_t bytes_[kDepth];
  uint8_t part_[kDepth][kMaskWidth];
};
#endif

inline void tile_bits(uint64_t seed, SampleMask mask, uint64_t first, uint64_t step, int64_t rows, int64_t groups,
                      uint8_t* out, int64_t stride) {
#if PYRX_ISA
  MaskQueue queue(seed, mask);
#endif
  for (int64_t r = 0; r < rows; ++r, first += step, out += stride) {
#if PYRX_ISA
    int64_t i = 0;
    for (; i + 4 * kMaskWidth <= groups; i += 4 * kMaskWidth) {
      const uint64_t at = first + static_cast<uint64_t>(i);
      const uint64_t firsts[] = {at, at + kMaskWidth, at + 2 * kMaskWidth, at + 3 * kMaskWidth};
      uint8_t* const to = out + i;
      uint8_t* const outs[] = {to, to + kMaskWidth, to + 2 * kMaskWidth, to + 3 * kMaskWidth};
      mask_vectors<4>(seed, mask, firsts, outs);
    }
    for (; i < groups; i += kMaskWidth)
      queue.push(first + static_cast<uint64_t>(i), std::min<int64_t>(kMaskWidth, groups - i), out + i);
#else
    for (int64_t i = 0; i < groups; ++i) out[i] = pyrx::group_bits(seed, first + static_cast<uint64_t>(i), mask);
#endif
  }
#if PYRX_ISA
  queue.flush();
#endif
}

inline void group_bits(uint64_t seed, SampleMask mask, uint64_t first, int64_t groups, uint8_t* out) {
  tile_bits(seed, mask, first, 0, 1, groups, out, 0);
}

constexpr MaskKernels mask_table() { return {&group_bits, &tile_bits, &transpose<uint32_t, uint32_t>}; }

template <typename T>
constexpr ElementKernels<T> element_table() {
  return {&dropout<T>, &accumulate<T>, &scaled_store<T>, &fold<T>, &fold_level<T>,
          &neighbor_fill<T>, &neighbor_fill_channels<T>};
}

template <typename Acc>
constexpr AccumulatorKernels<Acc> accumulator_table() {
  AccumulatorKernels<Acc> table{&add_level<Acc>, &cross_entropy<Acc>, &axpy<Acc>, &subset_table<Acc>,
                                &subset_gradients<Acc>, nullptr};
#if PYRX_ISA == 512
  if constexpr (std::is_same_v<Acc, float>) table.lookup_gradients = &lookup_gradients;
#endif
  return table;
}

template <typename T, typename O>
constexpr LossKernels<T, O> loss_table() {
  return {&logits_cross_entropy<T, O>};
}

template <typename T, typename G>
constexpr HeadKernels<T, G> head_table() {
  HeadKernels<T, G> table{&select<T, G>, nullptr, &multiply<T, G>, &convert<T, G>,
                          &transpose<accumulate_t<T>, G>};
  if constexpr (sizeof(G) == 2) table.select_pair = &select_pair<T, G>;  // 16-bit operands alone are packed in pairs
  return table;
}
