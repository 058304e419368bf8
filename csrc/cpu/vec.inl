// Sixteen accumulators as one value, and rows of any storage type as blocks of them. Included by simd.inl.

inline float widen(uint8_t x) { return x; }
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

inline float widen(float16 x) {
#if PYRX_ISA
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  if (exponent == 0) return std::ldexp(static_cast<float>(mantissa), -24) * (sign ? -1.0f : 1.0f);
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
#endif
}

template <typename T>
inline T narrow(accumulate_t<T> x);
// Of values in [0, 255], halves to even.
template <>
inline uint8_t narrow<uint8_t>(float x) { return static_cast<uint8_t>(std::nearbyint(x)); }
template <>
inline float narrow<float>(float x) { return x; }
template <>
inline double narrow<double>(double x) { return x; }
// Round to nearest even; NaN stays NaN.
template <>
inline bfloat16 narrow<bfloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return {0x7FC0};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline float16 narrow<float16>(float x) {
#if PYRX_ISA
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (x != x) return {static_cast<uint16_t>(sign | 0x7E00)};
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  if (magnitude < 6.103515625e-05f)  // subnormal: steps of 2^-24, halves to even
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24))))};
  const uint32_t rounded = (bits & 0x7FFFFFFF) + 0xFFF + (bits >> 13 & 1);
  return {static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13)};
#endif
}

// Sixteen accumulators.
constexpr int kLanes = 16;

template <typename Acc>
struct Vec {
  Acc v[kLanes];

  static Vec fill(Acc x) {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = x;
    return out;
  }
  static Vec get(const Acc* p) {
    Vec out;
    std::memcpy(out.v, p, sizeof(out.v));
    return out;
  }
  void put(Acc* p) const { std::memcpy(p, v, sizeof(v)); }
  Vec keep(uint32_t bits) const { return choose(bits, *this, fill(0)); }
  static Vec choose(uint32_t bits, const Vec& a, const Vec& b) {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = bits >> i & 1 ? a.v[i] : b.v[i];
    return out;
  }
  // NaN in x is passed over
  static Vec max(const Vec& x, const Vec& most) {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = x.v[i] > most.v[i] ? x.v[i] : most.v[i];
    return out;
  }
  static Vec min(const Vec& x, const Vec& least) {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = x.v[i] < least.v[i] ? x.v[i] : least.v[i];
    return out;
  }
  uint32_t nonzero() const {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(v[i] != 0) << i;
    return bits;
  }
  Vec exp() const {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = std::exp(v[i]);
    return out;
  }
  Acc sum() const {
    Acc total = 0;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
  }
  Acc greatest() const {
    Acc most = v[0];
    for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
    return most;
  }
  Vec operator+(const Vec& b) const { return each(b, [](Acc x, Acc y) { return x + y; }); }
  Vec operator-(const Vec& b) const { return each(b, [](Acc x, Acc y) { return x - y; }); }
  Vec operator*(const Vec& b) const { return each(b, [](Acc x, Acc y) { return x * y; }); }
  Vec operator/(const Vec& b) const { return each(b, [](Acc x, Acc y) { return x / y; }); }
  Vec sqrt() const {
    Vec out;
#if PYRX_ISA  // the loop is not vectorised: std::sqrt may set errno
    if constexpr (sizeof(Acc) == 8) {
      for (int i = 0; i < kLanes; i += 4) _mm256_storeu_pd(out.v + i, _mm256_sqrt_pd(_mm256_loadu_pd(v + i)));
      return out;
    }
#endif
    for (int i = 0; i < kLanes; ++i) out.v[i] = std::sqrt(v[i]);
    return out;
  }
  static Vec multiply_add(const Vec& a, const Vec& b, const Vec& c) { return a * b + c; }

 private:
  template <typename F>
  Vec each(const Vec& b, F f) const {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = f(v[i], b.v[i]);
    return out;
  }
};

#if PYRX_ISA
// exp(r) on |r| <= ln(2) / 2, and ln(2) in two parts.
constexpr float kLog2E = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
constexpr float kExp[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f};
#endif

#if PYRX_ISA == 512
template <>
struct Vec<float> {
  __m512 v;

  static Vec fill(float x) { return {_mm512_set1_ps(x)}; }
  static Vec get(const float* p) { return {_mm512_loadu_ps(p)}; }
  void put(float* p) const { _mm512_storeu_ps(p, v); }
  Vec keep(uint32_t bits) const { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v)}; }
  static Vec choose(uint32_t bits, const Vec& a, const Vec& b) {
    return {_mm512_mask_mov_ps(b.v, static_cast<__mmask16>(bits), a.v)};
  }
  static Vec max(const Vec& x, const Vec& most) { return {_mm512_max_ps(x.v, most.v)}; }
  static Vec min(const Vec& x, const Vec& least) { return {_mm512_min_ps(x.v, least.v)}; }
  uint32_t nonzero() const { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
  Vec exp() const {
    const __m512 x = _mm512_max_ps(_mm512_set1_ps(-110.0f), v);  // the second operand, NaN too, where they do not compare
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(kLog2E)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2High), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Low), r);
    __m512 y = _mm512_set1_ps(kExp[0]);
    for (int i = 1; i < 6; ++i) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(kExp[i]));
    y = _mm512_add_ps(_mm512_fmadd_ps(y, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return {_mm512_scalef_ps(y, n)};
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float greatest() const { return _mm512_reduce_max_ps(v); }
  Vec operator+(const Vec& b) const { return {_mm512_add_ps(v, b.v)}; }
  Vec operator-(const Vec& b) const { return {_mm512_sub_ps(v, b.v)}; }
  Vec operator*(const Vec& b) const { return {_mm512_mul_ps(v, b.v)}; }
  Vec operator/(const Vec& b) const { return {_mm512_div_ps(v, b.v)}; }
  Vec sqrt() const { return {_mm512_sqrt_ps(v)}; }
  static Vec multiply_add(const Vec& a, const Vec& b, const Vec& c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
};
#elif PYRX_ISA == 2
template <>
struct Vec<float> {
  __m256 low, high;

  static __m256 lanes(uint32_t bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(
        _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit), bit));
  }
  static Vec fill(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Vec get(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  void put(float* p) const {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
  }
  Vec keep(uint32_t bits) const { return {_mm256_and_ps(lanes(bits), low), _mm256_and_ps(lanes(bits >> 8), high)}; }
  static Vec choose(uint32_t bits, const Vec& a, const Vec& b) {
    return {_mm256_blendv_ps(b.low, a.low, lanes(bits)), _mm256_blendv_ps(b.high, a.high, lanes(bits >> 8))};
  }
  static Vec max(const Vec& x, const Vec& most) {
    return {_mm256_max_ps(x.low, most.low), _mm256_max_ps(x.high, most.high)};
  }
  static Vec min(const Vec& x, const Vec& least) {
    return {_mm256_min_ps(x.low, least.low), _mm256_min_ps(x.high, least.high)};
  }
  uint32_t nonzero() const {
    const __m256 zero = _mm256_setzero_ps();
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(low, zero, _CMP_NEQ_UQ)) |
                                 _mm256_movemask_ps(_mm256_cmp_ps(high, zero, _CMP_NEQ_UQ)) << 8);
  }
  static __m256 exp(__m256 v) {
    const __m256 least = _mm256_set1_ps(-87.0f);
    const __m256 x = _mm256_max_ps(least, v);  // the second operand, NaN too, where they do not compare
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(kLog2E)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2High), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Low), r);
    __m256 y = _mm256_set1_ps(kExp[0]);
    for (int i = 1; i < 6; ++i) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(kExp[i]));
    y = _mm256_add_ps(_mm256_fmadd_ps(y, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    y = _mm256_mul_ps(y, _mm256_castsi256_ps(exponent));
    return _mm256_andnot_ps(_mm256_cmp_ps(v, least, _CMP_LT_OQ), y);
  }
  Vec exp() const { return {exp(low), exp(high)}; }
  float sum() const {
    float v[kLanes], total = 0;
    put(v);
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
  }
  float greatest() const {
    float v[kLanes];
    put(v);
    float most = v[0];
    for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
    return most;
  }
  Vec operator+(const Vec& b) const { return {_mm256_add_ps(low, b.low), _mm256_add_ps(high, b.high)}; }
  Vec operator-(const Vec& b) const { return {_mm256_sub_ps(low, b.low), _mm256_sub_ps(high, b.high)}; }
  Vec operator*(const Vec& b) const { return {_mm256_mul_ps(low, b.low), _mm256_mul_ps(high, b.high)}; }
  Vec operator/(const Vec& b) const { return {_mm256_div_ps(low, b.low), _mm256_div_ps(high, b.high)}; }
  Vec sqrt() const { return {_mm256_sqrt_ps(low), _mm256_sqrt_ps(high)}; }
  static Vec multiply_add(const Vec& a, const Vec& b, const Vec& c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
};
#endif

// Sixteen elements of any storage type.
template <typename T>
inline Vec<accumulate_t<T>> load(const T* p) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    return Vec<T>::get(p);
  } else {
#if PYRX_ISA == 512
    if constexpr (sizeof(T) == 1) {
      return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
    } else {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      if constexpr (std::is_same_v<T, float16>) return {_mm512_cvtph_ps(x)};
      else return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
    }
#else
    float v[kLanes];
    for (int i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
    return Vec<float>::get(v);
#endif
  }
}

template <typename T>
inline void store(T* p, const Vec<accumulate_t<T>>& x) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    x.put(p);
  } else {
#if PYRX_ISA == 512
    __m256i out;
    if constexpr (sizeof(T) == 1) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x.v)));
      return;
    } else if constexpr (std::is_same_v<T, float16>) {
      out = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT);
    } else {
      const __m512i bits = _mm512_castps_si512(x.v);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
      rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q),
                                      _mm512_set1_epi32(0x7FC0));
      out = _mm512_cvtepi32_epi16(rounded);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), out);
#else
    float v[kLanes];
    x.put(v);
    for (int i = 0; i < kLanes; ++i) p[i] = narrow<T>(v[i]);
#endif
  }
}

// The first n < 16 elements; the other lanes are zero.
template <typename T>
inline Vec<accumulate_t<T>> load(const T* p, int n) {
#if PYRX_ISA == 512
  if constexpr (std::is_same_v<T, float>) return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
#endif
  T part[kLanes] = {};
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  return load(part);
}

template <typename T>
inline void store(T* p, const Vec<accumulate_t<T>>& x, int n) {
#if PYRX_ISA == 512
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x.v);
#endif
  T part[kLanes];
  store(part, x);
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}

inline uint32_t bits_of(const uint8_t* bits, int64_t i, int n) {
  if (bits == nullptr) return 0xFFFF;
  return n > 8 ? bits[i / 8] | static_cast<uint32_t>(bits[i / 8 + 1]) << 8 : bits[i / 8];
}

// f(i, count) for blocks of sixteen and the rest; `load` and `store` with a count of sixteen take the whole block.
template <typename F>
inline void blocks(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, std::integral_constant<int, kLanes>());
  if (i < n) f(i, static_cast<int>(n - i));
}

template <typename T>
inline Vec<accumulate_t<T>> load(const T* p, std::integral_constant<int, kLanes>) { return load(p); }
template <typename T>
inline void store(T* p, const Vec<accumulate_t<T>>& x, std::integral_constant<int, kLanes>) { store(p, x); }
