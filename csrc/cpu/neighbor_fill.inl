// The fill of empty places from their neighbours. Included by simd.inl.

inline Vec<float> divide(const Vec<float>& a, const Vec<float>& b) {
#if PYRX_ISA == 512
  return {_mm512_div_ps(a.v, b.v)};
#elif PYRX_ISA == 2
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
#else
  Vec<float> out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = a.v[i] / b.v[i];
  return out;
#endif
}

inline Vec<double> divide(const Vec<double>& a, const Vec<double>& b) {
  Vec<double> out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = a.v[i] / b.v[i];
  return out;
}

// The elements whose bit is set; the others are 0 and not read.
template <typename T>
inline Vec<accumulate_t<T>> load_kept(const T* p, uint32_t bits) {
#if PYRX_ISA == 512
  const __mmask16 kept = static_cast<__mmask16>(bits);
  if constexpr (std::is_same_v<T, float>) return {_mm512_maskz_loadu_ps(kept, p)};
  if constexpr (std::is_same_v<T, float16>) return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(kept, p))};
  if constexpr (std::is_same_v<T, bfloat16>)
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept, p)), 16))};
#elif PYRX_ISA == 2
  if constexpr (std::is_same_v<T, float>)
    return {_mm256_maskload_ps(p, _mm256_castps_si256(Vec<float>::lanes(bits))),
            _mm256_maskload_ps(p + 8, _mm256_castps_si256(Vec<float>::lanes(bits >> 8)))};
#endif
  T part[kLanes] = {};
  for (int i = 0; i < kLanes; ++i)
    if (bits >> i & 1) part[i] = p[i];
  return load(part);
}

// Writes the elements whose bit is set.
template <typename T>
inline void store_kept(T* p, const Vec<accumulate_t<T>>& x, uint32_t bits) {
#if PYRX_ISA == 512
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, static_cast<__mmask16>(bits), x.v);
#endif
  T part[kLanes];
  store(part, x);
  for (int i = 0; i < kLanes; ++i)
    if (bits >> i & 1) p[i] = part[i];
}

template <typename T>
void neighbor_fill(const FillBlock* plan, int64_t n, int64_t width, T* plane) {
  using V = Vec<accumulate_t<T>>;
  const V zero = V::fill(0), epsilon = V::fill(static_cast<accumulate_t<T>>(1e-5));
  for (const FillBlock* block = plan; block < plan + n; ++block) {
    T* at = plane + block->first;
    const auto near = [&](int j, int64_t offset) { return load_kept(at + offset, block->neighbors[j]); };
    const V above = near(0, -width - 1) + near(1, -width) + near(2, -width + 1);
    const V beside = near(3, -1) + zero + near(4, 1);
    const V below = near(5, width - 1) + near(6, width) + near(7, width + 1);
    accumulate_t<T> counts[kLanes];
    for (int i = 0; i < kLanes; ++i) counts[i] = block->counts[i];
    store_kept(at, divide(above + beside + below, V::get(counts) + epsilon), block->fill);
  }
}

template <typename T>
void neighbor_fill_channels(const FillBlock* plan, int64_t n, int64_t width, int64_t pixel, int64_t channels,
                            const T* zeros, T* image) {
  using Acc = accumulate_t<T>;
  using V = Vec<Acc>;
  const int64_t offsets[kNeighbors] = {-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1};
  for (const FillBlock* block = plan; block < plan + n; ++block) {
    for (uint32_t left = block->fill; left != 0; left &= left - 1) {
      const int i = __builtin_ctz(left);
      T* at = image + (block->first + i) * pixel;
      const T* near[kNeighbors];
      for (int j = 0; j < kNeighbors; ++j) near[j] = block->neighbors[j] >> i & 1 ? at + offsets[j] * pixel : zeros;
      const V zero = V::fill(0), divisor = V::fill(static_cast<Acc>(block->counts[i]) + static_cast<Acc>(1e-5));
      blocks(channels, [&](int64_t c, auto count) {
        const V above = load(near[0] + c, count) + load(near[1] + c, count) + load(near[2] + c, count);
        const V beside = load(near[3] + c, count) + zero + load(near[4] + c, count);
        const V below = load(near[5] + c, count) + load(near[6] + c, count) + load(near[7] + c, count);
        store(at + c, divide(above + beside + below, divisor), count);
      });
    }
  }
}
