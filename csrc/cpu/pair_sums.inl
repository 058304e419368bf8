// The head's bfloat16 gradients from partial sums of four masks each, two to a dot product: PairTables, WeightPairs and
// InputPairs. Included by simd.inl.

#if PYRX_ISA == 512
// The sixteen sums of up to four masks of class c, in float32.
inline __m512 mask_sums(const float* base, const float* rows, int64_t stride, int64_t count, int64_t c) {
  constexpr __mmask16 kBit[kSubset] = {0xAAAA, 0xCCCC, 0xF0F0, 0xFF00};  // the entries that hold mask m
  __m512 sums = _mm512_set1_ps(base ? base[c] : 0.0f);
  for (int64_t m = 0; m < count; ++m)
    sums = _mm512_mask_add_ps(sums, kBit[m], sums, _mm512_set1_ps(rows[m * stride + c]));
  return sums;
}

template <int kCount>
PYRX_BF16 inline void tables_of(const PairTables& of, int64_t group, bool of_classes, uint32_t* out, int64_t step) {
  const float* base[2];
  const float* rows[2];
  for (int b = 0; b < 2; ++b) {
    rows[b] = of.rows[b] + group * kSubset * of.stride;
    base[b] = of.base && group == 0 ? of.rows[b] + of.masks * of.stride : nullptr;
  }
  if (!of_classes) {
    for (int64_t c = 0; c < of.classes; ++c) {
      const __m512 first = mask_sums(base[0], rows[0], of.stride, kCount, c);
      const __m512 second = of.pair ? mask_sums(base[1], rows[1], of.stride, kCount, c) : _mm512_setzero_ps();
      _mm512_storeu_si512(out + c * step, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
    return;
  }
  alignas(64) static constexpr uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  for (int64_t c = 0; c < of.classes; c += 2, out += step)
    for (int b = 0; b < 2; ++b) {
      const __m512 first = mask_sums(base[b], rows[b], of.stride, kCount, c);
      const __m512 second = mask_sums(base[b], rows[b], of.stride, kCount, c + 1);
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
      _mm512_storeu_si512(out + b * of.groups * kLanes, _mm512_permutexvar_epi16(interleave, both));
    }
}

inline void pair_tables(const PairTables& of, bool of_classes, uint32_t* out) {
  const int64_t step = of_classes ? 2 * of.groups * kLanes : kLanes;
  for (int64_t g = 0; g < of.groups; ++g) {
    const int64_t group = of.first_group + g;
    uint32_t* to = out + g * (of_classes ? 1 : of.classes) * kLanes;
    switch (std::min<int64_t>(kSubset, of.masks - group * kSubset)) {
      case 1: tables_of<1>(of, group, of_classes, to, step); break;
      case 2: tables_of<2>(of, group, of_classes, to, step); break;
      case 3: tables_of<3>(of, group, of_classes, to, step); break;
      default: tables_of<4>(of, group, of_classes, to, step); break;
    }
  }
}

inline void pair_index(const uint8_t* first, const uint8_t* second, int64_t n, uint32_t* out, int64_t step) {
  const __m512i low = _mm512_set1_epi32(15), high = _mm512_set1_epi32(0xF0), row = _mm512_set1_epi32(0x10100000);
  const auto spread = [&](const uint8_t* codes) {  // group 2 q in the low byte, 2 q + 1 in the next
    const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm512_or_si512(_mm512_and_si512(code, low), _mm512_slli_epi32(_mm512_and_si512(code, high), 4));
  };
  for (int64_t i = 0; i < n; i += kLanes, out += step) {
    const __m512i both = _mm512_or_si512(spread(first + i), _mm512_slli_epi32(spread(second + i), 16));
    _mm512_storeu_si512(out, _mm512_or_si512(both, row));
  }
}

inline void pair_features(const bfloat16* first, const bfloat16* second, int64_t n, uint32_t* out, int64_t step) {
  const auto widened = [&](const bfloat16* x) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  };
  for (int64_t i = 0; i < n; i += kLanes, out += step)
    _mm512_storeu_si512(out, _mm512_or_si512(widened(first + i), _mm512_slli_epi32(widened(second + i), 16)));
}

template <int kVectors, int kClasses>
PYRX_BF16 void weight_pairs(const WeightPairs& block) {
  __m512 sums[kVectors][kClasses];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 16
    for (int c = 0; c < kClasses; ++c) sums[v][c] = _mm512_setzero_ps();
  const uint32_t* tables = block.tables;
  const int64_t code_rows = (block.groups + 1) / 2;
  for (int64_t p = 0; p < block.pairs; ++p) {
    __m512bh x[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v)
      x[v] = (__m512bh)_mm512_loadu_si512(block.x + v * block.x_stride + p * kLanes);
    for (int64_t g = 0; g < block.groups; ++g) {
      __m512i index[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        index[v] = _mm512_loadu_si512(block.index + v * block.index_stride + (p * code_rows + g / 2) * kLanes);
        index[v] = _mm512_srl_epi16(index[v], _mm_cvtsi32_si128(g % 2 * 8));
      }
#pragma GCC unroll 16
      for (int c = 0; c < kClasses; ++c, tables += kLanes) {
        const __m512i table = _mm512_loadu_si512(tables);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v)
          sums[v][c] = _mm512_dpbf16_ps(sums[v][c], x[v], (__m512bh)_mm512_permutexvar_epi16(index[v], table));
      }
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < kClasses; ++c) {
    if (c >= block.classes) break;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = v * kLanes, n = block.features - at;
      if (n <= 0) break;
      Vec<float> sum{sums[v][c]};
      float* own = block.sum ? block.sum + c * block.sum_stride + at : nullptr;
      if (block.add) sum = sum + load(own);
      if (!block.out) store(own, sum);
      else if (n >= kLanes) store(block.out + c * block.out_stride + at, sum);
      else store(block.out + c * block.out_stride + at, sum, static_cast<int>(n));
    }
  }
}

inline void weight_pairs(const WeightPairs& block) {
  if (block.vectors == 2) weight_pairs<2, 8>(block);
  else weight_pairs<4, 4>(block);
}

template <int kVectors, int kGroups>
PYRX_BF16 void input_pairs(const InputPairs& block) {
  __m512i index[2][kGroups][kVectors];
  __m512 sums[2][kGroups][kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const __m512i all = _mm512_loadu_si512(block.index + v * block.index_stride);
#pragma GCC unroll 16
    for (int b = 0; b < 2; ++b)
#pragma GCC unroll 16
      for (int g = 0; g < kGroups; ++g) {
        index[b][g][v] = _mm512_srli_epi32(all, 16 * b + 8 * g);
        sums[b][g][v] = _mm512_setzero_ps();
      }
  }
  const uint32_t *tables = block.tables, *weight = block.weight;
  for (int64_t p = 0; p < block.class_pairs; ++p, weight += block.weight_stride) {
    __m512bh w[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) w[v] = (__m512bh)_mm512_loadu_si512(weight + v * kLanes);
#pragma GCC unroll 16
    for (int b = 0; b < 2; ++b)
#pragma GCC unroll 16
      for (int g = 0; g < kGroups; ++g, tables += kLanes) {
        const __m512i table = _mm512_loadu_si512(tables);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v)
          sums[b][g][v] = _mm512_dpbf16_ps(sums[b][g][v], w[v], (__m512bh)_mm512_permutexvar_epi32(index[b][g][v], table));
      }
  }
#pragma GCC unroll 16
  for (int b = 0; b < 2; ++b) {
    if (!block.input_gradient[b]) break;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* out = block.input_gradient[b] + v * kLanes;
      __m512 sum = sums[b][0][v];
      if (kGroups == 2) sum = _mm512_add_ps(sum, sums[b][kGroups - 1][v]);
      _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sum));
    }
  }
}

inline void input_pairs(const InputPairs& block) {
  if (block.groups == 2) input_pairs<2, 2>(block);
  else input_pairs<4, 1>(block);
}
#endif

constexpr SumKernels sum_table() {
#if PYRX_ISA == 512
  return {&pair_tables, &pair_index, &pair_features, &weight_pairs, &input_pairs};
#else
  return {};
#endif
}
