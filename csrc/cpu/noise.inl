// Standard normals, and images with noise added. Included by simd.inl.

inline void square_roots(float* x) {
#if PYRX_ISA == 512
  _mm512_storeu_ps(x, _mm512_sqrt_ps(_mm512_loadu_ps(x)));
#elif PYRX_ISA == 2
  for (int i = 0; i < kLanes; i += 8) _mm256_storeu_ps(x + i, _mm256_sqrt_ps(_mm256_loadu_ps(x + i)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
#endif
}

#if PYRX_ISA == 512
using Wide = __m512i;  // 64-bit lanes; of what is multiplied the upper halves are of no account
inline Wide fill64(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
inline Wide count_from(uint64_t x) { return _mm512_add_epi64(fill64(x), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)); }
inline Wide times(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
inline Wide high(Wide a) { return _mm512_shuffle_epi32(a, _MM_PERM_DDBB); }
inline Wide exclusive_or(Wide a, Wide b, Wide c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
#elif PYRX_ISA == 2
using Wide = __m256i;
inline Wide fill64(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
inline Wide count_from(uint64_t x) { return _mm256_add_epi64(fill64(x), _mm256_setr_epi64x(0, 1, 2, 3)); }
inline Wide times(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
inline Wide high(Wide a) { return _mm256_srli_epi64(a, 32); }
inline Wide exclusive_or(Wide a, Wide b, Wide c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
#endif

// The words of sixteen counters from `first` on.
inline void noise_words(uint64_t seed, uint32_t sample, uint64_t first, uint32_t words[4][kLanes]) {
#if PYRX_ISA
  constexpr int kWide = sizeof(Wide) / 8, kParts = kLanes / kWide;
  Wide c[4][kParts];
  for (int u = 0; u < kParts; ++u) {
    c[0][u] = count_from(first + static_cast<uint64_t>(u * kWide));
    c[1][u] = high(c[0][u]);
    c[2][u] = fill64(sample);
    c[3][u] = fill64(kNoiseDomain);
  }
  const Wide m0 = fill64(kPhiloxM0), m1 = fill64(kPhiloxM1);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    const Wide key0 = fill64(k0), key1 = fill64(k1);
    for (int u = 0; u < kParts; ++u) {
      const Wide p0 = times(c[0][u], m0), p1 = times(c[2][u], m1);
      c[0][u] = exclusive_or(high(p1), c[1][u], key0);
      c[1][u] = p1;
      c[2][u] = exclusive_or(high(p0), c[3][u], key1);
      c[3][u] = p0;
    }
  }
  for (int w = 0; w < 4; ++w) {
    alignas(64) uint64_t lanes[kLanes];
    std::memcpy(lanes, c[w], sizeof(lanes));
    for (int i = 0; i < kLanes; ++i) words[w][i] = static_cast<uint32_t>(lanes[i]);
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    const PhiloxWords found = philox(seed, first + static_cast<uint64_t>(i), sample, kNoiseDomain);
    for (int w = 0; w < 4; ++w) words[w][i] = found.w[w];
  }
#endif
}

inline void normals(uint64_t seed, uint32_t sample, uint64_t first_group, int64_t groups, float* out) {
  for (int64_t g = 0; g < groups; g += kLanes, out += 4 * kLanes) {
    alignas(64) uint32_t words[4][kLanes];
    alignas(64) float radius[kLanes], cosine[kLanes], sine[kLanes];
    noise_words(seed, sample, first_group + static_cast<uint64_t>(g), words);
    for (int pair = 0; pair < 4; pair += 2) {
      for (int i = 0; i < kLanes; ++i) radius[i] = squared_radius(uniform_float(words[pair][i]));
      square_roots(radius);
      for (int i = 0; i < kLanes; ++i) {
        const TurnFloat turned = turn(uniform_float(words[pair + 1][i]));
        cosine[i] = radius[i] * turned.cosine;
        sine[i] = radius[i] * turned.sine;
      }
      for (int i = 0; i < kLanes; ++i) {
        out[4 * i + pair] = cosine[i];
        out[4 * i + pair + 1] = sine[i];
      }
    }
  }
}

// Noise in the accumulator's type, made in float32.
template <typename Acc, typename Count>
inline Vec<Acc> noise_at(const float* normals, const Noise& noise, Count count) {
  const Vec<float> made = load(normals, count) * Vec<float>::fill(noise.std) + Vec<float>::fill(noise.mean);
  if constexpr (std::is_same_v<Acc, float>) {
    return made;
  } else {
    float values[kLanes];
    made.put(values);
    return load_as<Acc>(values, std::integral_constant<int, kLanes>());
  }
}

template <typename T>
void add_noise(const T* images, const T* mask, const float* normals, const Noise& noise, int64_t n, T* out) {
  using Acc = accumulate_t<T>;
  blocks(n, [&](int64_t i, auto count) {
    store(out + i, load(images + i, count) + load(mask + i, count) * noise_at<Acc>(normals + i, noise, count), count);
  });
}

template <typename T>
void accumulate_noise(const T* grad, const float* normals, const Noise& noise, int64_t n, accumulate_t<T>* sum) {
  using Acc = accumulate_t<T>;
  blocks(n, [&](int64_t i, auto count) {
    store(sum + i, load(sum + i, count) + load(grad + i, count) * noise_at<Acc>(normals + i, noise, count), count);
  });
}

constexpr NormalKernels normal_table() { return {&normals}; }
template <typename T>
constexpr NoiseKernels<T> noise_table() { return {&add_noise<T>, &accumulate_noise<T>}; }
