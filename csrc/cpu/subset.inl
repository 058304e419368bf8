// The head's gradients from partial sums of four masks each: SubsetBlock and LookupRow. Included by simd.inl.

template <typename Acc>
void subset_table(const Acc* base, const Acc* rows, int64_t stride, int64_t count, int64_t width, Acc* table) {
  using V = Vec<Acc>;
  for (int64_t i = 0; i < width; i += kLanes) {
    V entries[kSubsetEntries];
    entries[0] = base ? load(base + i) : V::fill(0);
    for (int64_t m = 0; m < kSubset; ++m) {
      const V row = m < count ? load(rows + m * stride + i) : V::fill(0);
      for (int64_t e = 0; e < int64_t(1) << m; ++e) entries[(int64_t(1) << m) + e] = entries[e] + row;
    }
    for (int64_t e = 0; e < kSubsetEntries; ++e) store(table + e * width + i, entries[e]);
  }
}

// out[r] += the sum of row r of sixteen rows of sixteen.
template <typename Acc>
inline void add_sums(const Acc* rows, int64_t n, Acc* out) {
#if PYRX_ISA == 512
  if constexpr (std::is_same_v<Acc, float>) {
    __m512 t[8], u[4];
    for (int i = 0; i < 8; ++i) {
      const __m512 a = _mm512_loadu_ps(rows + 32 * i), b = _mm512_loadu_ps(rows + 32 * i + 16);
      t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
      u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x44), _mm512_shuffle_f32x4(u[0], u[1], 0xEE));
    const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x44), _mm512_shuffle_f32x4(u[2], u[3], 0xEE));
    const Vec<float> sums{
        _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD))};
    if (n == kLanes) store(out, load(out) + sums);
    else store(out, load(out, static_cast<int>(n)) + sums, static_cast<int>(n));
    return;
  }
#endif
  for (int64_t r = 0; r < n; ++r) out[r] += load(rows + r * kLanes).sum();
}

// kGroups is 0 where the number of tables is known at run time only.
template <typename Acc, int kVectors, int kGroups, bool kWeight, bool kInput>
void subset_block(const SubsetBlock<Acc>& block) {
  using V = Vec<Acc>;
  constexpr int64_t width = kVectors * kLanes, table = kSubsetEntries * width;
  const int64_t groups = kGroups ? kGroups : block.groups, code_bytes = (groups + 1) / 2;
  alignas(64) Acc dots[kSubsetRows * kLanes * kLanes];
  for (int64_t first = 0; first < block.features; first += kLanes) {
    const int64_t n = block.features - first < kLanes ? block.features - first : kLanes;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t d = first + j;
      V weight[kVectors], gradient[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        if (kInput) weight[v] = load(block.weight + d * width + v * kLanes);
        if (kWeight) gradient[v] = load(block.weight_gradient + d * width + v * kLanes);
      }
      for (int64_t b = 0; b < block.rows; ++b) {
        const Acc* tables = block.tables + b * groups * table;
        const uint8_t* code = block.codes + b * block.codes_stride + d * code_bytes;
        uint32_t word = 0;  // the whole code where its length is known
        if constexpr (kGroups > 0) std::memcpy(&word, code, (kGroups + 1) / 2);
        const auto entry = [&](int64_t g) {
          return tables + g * table + ((kGroups ? word >> 4 * g : code[g / 2] >> 4 * (g & 1)) & 15) * width;
        };
        V s[kVectors];
        for (int v = 0; v < kVectors; ++v) s[v] = load(entry(0) + v * kLanes);
#pragma GCC unroll 8
        for (int64_t g = 1; g < groups; ++g)
          for (int v = 0; v < kVectors; ++v) s[v] = s[v] + load(entry(g) + v * kLanes);
        if (kWeight) {
          const V x = V::fill(block.x[b * block.x_stride + d]);
          for (int v = 0; v < kVectors; ++v) gradient[v] = V::multiply_add(x, s[v], gradient[v]);
        }
        if (kInput) {
          V dot = s[0] * weight[0];
          for (int v = 1; v < kVectors; ++v) dot = V::multiply_add(s[v], weight[v], dot);
          store(dots + (b * kLanes + j) * kLanes, dot);
        }
      }
      if (kWeight)
        for (int v = 0; v < kVectors; ++v) store(block.weight_gradient + d * width + v * kLanes, gradient[v]);
    }
    if (kInput)
      for (int64_t b = 0; b < block.rows; ++b)
        add_sums(dots + b * kLanes * kLanes, n, block.input_gradient + b * block.input_stride + first);
  }
}

template <typename Acc, int kVectors, int kGroups>
void subset_wanted(const SubsetBlock<Acc>& block) {
  if (!block.input_gradient) subset_block<Acc, kVectors, kGroups, true, false>(block);
  else if (!block.weight_gradient) subset_block<Acc, kVectors, kGroups, false, true>(block);
  else subset_block<Acc, kVectors, kGroups, true, true>(block);
}

template <typename Acc, int kVectors>
void subset_vectors(const SubsetBlock<Acc>& block) {
  if (block.groups == 1) subset_wanted<Acc, kVectors, 1>(block);
  else if (block.groups == 2) subset_wanted<Acc, kVectors, 2>(block);
  else if (kVectors == 4 && block.groups == 4) subset_wanted<Acc, 4, 4>(block);
  else if (kVectors == 4 && block.groups == 8) subset_wanted<Acc, 4, 8>(block);
  else subset_wanted<Acc, kVectors, 0>(block);
}

template <typename Acc>
void subset_gradients(const SubsetBlock<Acc>& block) {
  switch (block.width / kLanes) {
    case 1: return subset_vectors<Acc, 1>(block);
    case 2: return subset_vectors<Acc, 2>(block);
    case 3: return subset_vectors<Acc, 3>(block);
    default: return subset_vectors<Acc, 4>(block);
  }
}

#if PYRX_ISA == 512
template <int kBlocks, bool kTwo, bool kWeight, bool kInput>
inline void lookup_features(const LookupRow<float>& row, const float* tables, int64_t d) {
  __m512i low[kBlocks], high[kBlocks];  // permutexvar reads the lowest four bits
  __m512 x[kBlocks], dot[kBlocks];
  for (int u = 0; u < kBlocks; ++u) {
    const int64_t at = d + u * kLanes;
    low[u] = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row.codes + at)));
    high[u] = _mm512_srli_epi32(low[u], 4);
    x[u] = kWeight ? _mm512_loadu_ps(row.x + at) : _mm512_setzero_ps();
    dot[u] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < row.classes; ++c) {
    const __m512 first = _mm512_load_ps(tables + c * 2 * kLanes), second = _mm512_load_ps(tables + (c * 2 + 1) * kLanes);
    for (int u = 0; u < kBlocks; ++u) {
      const int64_t at = d + u * kLanes;
      __m512 s = _mm512_permutexvar_ps(low[u], first);
      if (kTwo) s = _mm512_add_ps(s, _mm512_permutexvar_ps(high[u], second));
      if (kInput) dot[u] = _mm512_fmadd_ps(s, _mm512_loadu_ps(row.weight + c * row.weight_stride + at), dot[u]);
      if (kWeight) {
        float* gradient = row.weight_gradient + c * row.gradient_stride + at;
        _mm512_storeu_ps(gradient, _mm512_fmadd_ps(s, x[u], _mm512_loadu_ps(gradient)));
      }
    }
  }
  if (kInput)
    for (int u = 0; u < kBlocks; ++u) _mm512_storeu_ps(row.input_gradient + d + u * kLanes, dot[u]);
}

template <bool kTwo, bool kWeight, bool kInput>
void lookup_wanted(const LookupRow<float>& row, const float* tables) {
  constexpr int kBlocks = 4;
  int64_t d = 0;
  for (; d + kBlocks * kLanes <= row.features; d += kBlocks * kLanes)
    lookup_features<kBlocks, kTwo, kWeight, kInput>(row, tables, d);
  for (; d < row.features; d += kLanes) lookup_features<1, kTwo, kWeight, kInput>(row, tables, d);
}

inline void lookup_gradients(const LookupRow<float>& row) {
  alignas(64) float tables[kLookupClasses * 2 * kSubsetEntries];
  constexpr __mmask16 kBit[kSubset] = {0xAAAA, 0xCCCC, 0xF0F0, 0xFF00};  // the entries that hold mask m
  for (int64_t c = 0; c < row.classes; ++c) {
    __m512 entries[2] = {_mm512_set1_ps(row.base ? row.base[c] : 0.0f), _mm512_setzero_ps()};
    for (int64_t m = 0; m < row.masks; ++m) {
      __m512& table = entries[m / kSubset];
      table = _mm512_mask_add_ps(table, kBit[m % kSubset], table, _mm512_set1_ps(row.rows[m * row.rows_stride + c]));
    }
    for (int g = 0; g < 2; ++g) _mm512_store_ps(tables + (c * 2 + g) * kSubsetEntries, entries[g]);
  }
  const auto run = [&](auto weight, auto input) {
    constexpr bool kWeight = decltype(weight)::value, kInput = decltype(input)::value;
    row.masks > kSubset ? lookup_wanted<true, kWeight, kInput>(row, tables)
                        : lookup_wanted<false, kWeight, kInput>(row, tables);
  };
  if (!row.input_gradient) run(std::true_type(), std::false_type());
  else if (!row.weight_gradient) run(std::false_type(), std::true_type());
  else run(std::true_type(), std::true_type());
}
#endif
