// Keys of scores, many as one value: signed integers that order as kernels/nm_sparsity.h says. Included by nm_simd.inl.

// What turns scores into keys.
template <typename K>
struct KeyRule {
  K infinity;
  bool magnitude;
};

template <typename T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = int32_t;
  static constexpr type infinity = kInfinityFloat;
};
template <>
struct KeyOf<double> {
  using type = int64_t;
  static constexpr type infinity = kInfinityDouble;
};
template <>
struct KeyOf<bfloat16> {
  using type = int16_t;
  static constexpr type infinity = kInfinityBFloat16;
};
template <>
struct KeyOf<float16> {
  using type = int16_t;
  static constexpr type infinity = kInfinityHalf;
};

constexpr uint32_t low_bits(int n) { return n >= 32 ? ~0u : (1u << n) - 1; }

template <typename K>
struct PlainKeys {
  static constexpr int kWidth = 8;
  K v[kWidth];

  static PlainKeys load(const K* p) { return load(p, kWidth); }
  // of the first n; the others are 0
  static PlainKeys load(const K* p, int n) {
    PlainKeys out = {};
    std::memcpy(out.v, p, static_cast<size_t>(n) * sizeof(K));
    return out;
  }
  static PlainKeys fill(K x) {
    PlainKeys out;
    for (int i = 0; i < kWidth; ++i) out.v[i] = x;
    return out;
  }
  void store(K* p) const { std::memcpy(p, v, sizeof(v)); }
  // of the bits of scores
  PlainKeys ranked(const KeyRule<K>& rule) const {
    return each(*this, [&](K bits, K) {
      const K absolute = bits & std::numeric_limits<K>::max(), nan = rule.infinity + 1;
      if (absolute >= nan) return nan;
      return static_cast<K>(bits < 0 && !rule.magnitude ? -absolute : absolute);
    });
  }
  PlainKeys minus(const PlainKeys& b) const { return each(b, [](K x, K y) { return static_cast<K>(x - y); }); }
  PlainKeys max(const PlainKeys& b) const { return each(b, [](K x, K y) { return x > y ? x : y; }); }
  // one more where a > b
  PlainKeys count_greater(const PlainKeys& a, const PlainKeys& b) const {
    PlainKeys out;
    for (int i = 0; i < kWidth; ++i) out.v[i] = static_cast<K>(v[i] + (a.v[i] > b.v[i]));
    return out;
  }
  // these where the bit is set, else b's
  PlainKeys choose(uint32_t bits, const PlainKeys& b) const {
    PlainKeys out;
    for (int i = 0; i < kWidth; ++i) out.v[i] = bits >> i & 1 ? v[i] : b.v[i];
    return out;
  }
  // bit i of lane i
  uint32_t below(const PlainKeys& b) const { return bits(b, [](K x, K y) { return x < y; }); }
  uint32_t equal(const PlainKeys& b) const { return bits(b, [](K x, K y) { return x == y; }); }
  int count_below(const PlainKeys& b) const {
    int found = 0;
    for (int i = 0; i < kWidth; ++i) found += v[i] < b.v[i];
    return found;
  }

  struct Order {
    K lane[kWidth];
  };
  static Order order(const K* lanes) {
    Order out;
    std::memcpy(out.lane, lanes, sizeof(out.lane));
    return out;
  }
  // lane i is of lane order[i]
  PlainKeys permute(const Order& order) const {
    PlainKeys out;
    for (int i = 0; i < kWidth; ++i) out.v[i] = v[order.lane[i]];
    return out;
  }

 private:
  template <typename F>
  PlainKeys each(const PlainKeys& b, F f) const {
    PlainKeys out;
    for (int i = 0; i < kWidth; ++i) out.v[i] = f(v[i], b.v[i]);
    return out;
  }
  template <typename F>
  uint32_t bits(const PlainKeys& b, F f) const {
    uint32_t found = 0;
    for (int i = 0; i < kWidth; ++i) found |= static_cast<uint32_t>(f(v[i], b.v[i])) << i;
    return found;
  }
};

#if PYRX_ISA == 512
// name_epi16, name_epi32 or name_epi64 by K's size
#define PYRX_SIZED(name, suffix, ...)                                            \
  [&] {                                                                          \
    if constexpr (sizeof(K) == 2) return name##_epi16##suffix(__VA_ARGS__);      \
    else if constexpr (sizeof(K) == 4) return name##_epi32##suffix(__VA_ARGS__); \
    else return name##_epi64##suffix(__VA_ARGS__);                               \
  }()
template <typename K>
struct WideKeys {
  static constexpr int kWidth = 64 / sizeof(K);
  __m512i v;

  static WideKeys load(const K* p) { return {_mm512_loadu_si512(p)}; }
  static WideKeys load(const K* p, int n) { return {PYRX_SIZED(_mm512_maskz_loadu, , low_bits(n), p)}; }
  static WideKeys fill(K x) { return {PYRX_SIZED(_mm512_set1, , x)}; }
  void store(K* p) const { _mm512_storeu_si512(p, v); }
  WideKeys ranked(const KeyRule<K>& rule) const {
    const __m512i absolute = _mm512_and_si512(v, fill(std::numeric_limits<K>::max()).v);
    const __m512i nan = fill(static_cast<K>(rule.infinity + 1)).v, zero = _mm512_setzero_si512();
    const __m512i key = PYRX_SIZED(_mm512_maskz_min, , ~0, absolute, nan);
    if (rule.magnitude) return {key};
    const auto negative = PYRX_SIZED(_mm512_cmplt, _mask, v, zero);
    return {PYRX_SIZED(_mm512_mask_sub, , key, negative & PYRX_SIZED(_mm512_cmplt, _mask, absolute, nan), zero, key)};
  }
  WideKeys minus(const WideKeys& b) const { return {PYRX_SIZED(_mm512_sub, , v, b.v)}; }
  WideKeys max(const WideKeys& b) const { return {PYRX_SIZED(_mm512_maskz_max, , ~0, v, b.v)}; }
  WideKeys count_greater(const WideKeys& a, const WideKeys& b) const {
    return {PYRX_SIZED(_mm512_mask_sub, , v, PYRX_SIZED(_mm512_cmpgt, _mask, a.v, b.v), v, _mm512_set1_epi32(-1))};
  }
  WideKeys choose(uint32_t bits, const WideKeys& b) const {
    if constexpr (sizeof(K) == 2) return {_mm512_mask_mov_epi16(b.v, bits, v)};
    else if constexpr (sizeof(K) == 4) return {_mm512_mask_mov_epi32(b.v, static_cast<__mmask16>(bits), v)};
    else return {_mm512_mask_mov_epi64(b.v, static_cast<__mmask8>(bits), v)};
  }
  uint32_t below(const WideKeys& b) const { return PYRX_SIZED(_mm512_cmplt, _mask, v, b.v); }
  int count_below(const WideKeys& b) const { return std::popcount(below(b)); }
  uint32_t equal(const WideKeys& b) const { return PYRX_SIZED(_mm512_cmpeq, _mask, v, b.v); }
  using Order = __m512i;
  static Order order(const K* lanes) { return _mm512_loadu_si512(lanes); }
  WideKeys permute(const Order& order) const { return {PYRX_SIZED(_mm512_permutexvar, , order, v)}; }
};
template <typename K>
using Keys = WideKeys<K>;
#elif PYRX_ISA == 2
// name_epi16 or name_epi32 by K's size
#define PYRX_SIZED(name, suffix, ...)                                       \
  [&] {                                                                     \
    if constexpr (sizeof(K) == 2) return name##_epi16##suffix(__VA_ARGS__); \
    else return name##_epi32##suffix(__VA_ARGS__);                          \
  }()
template <typename K>
struct WideKeys {
  static constexpr int kWidth = 32 / sizeof(K);
  __m256i v;

  static WideKeys load(const K* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  static WideKeys load(const K* p, int n) {
    K part[kWidth] = {};
    std::memcpy(part, p, static_cast<size_t>(n) * sizeof(K));
    return load(part);
  }
  static WideKeys fill(K x) { return {PYRX_SIZED(_mm256_set1, , x)}; }
  void store(K* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  WideKeys ranked(const KeyRule<K>& rule) const {
    const __m256i absolute = _mm256_and_si256(v, fill(std::numeric_limits<K>::max()).v);
    const __m256i nan = fill(static_cast<K>(rule.infinity + 1)).v;
    const __m256i key = PYRX_SIZED(_mm256_min, , absolute, nan);
    if (rule.magnitude) return {key};
    const __m256i negative = PYRX_SIZED(_mm256_cmpgt, , _mm256_setzero_si256(), v);
    const __m256i turned = _mm256_and_si256(negative, PYRX_SIZED(_mm256_cmpgt, , nan, absolute));
    return {PYRX_SIZED(_mm256_sub, , _mm256_xor_si256(key, turned), turned)};
  }
  WideKeys minus(const WideKeys& b) const { return {PYRX_SIZED(_mm256_sub, , v, b.v)}; }
  WideKeys max(const WideKeys& b) const { return {PYRX_SIZED(_mm256_max, , v, b.v)}; }
  WideKeys count_greater(const WideKeys& a, const WideKeys& b) const {
    return {PYRX_SIZED(_mm256_sub, , v, PYRX_SIZED(_mm256_cmpgt, , a.v, b.v))};
  }
  WideKeys choose(uint32_t bits, const WideKeys& b) const {
    __m256i bit;
    if constexpr (sizeof(K) == 4) bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    else bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    const __m256i own = PYRX_SIZED(_mm256_cmpeq, , _mm256_and_si256(fill(static_cast<K>(bits)).v, bit), bit);
    return {_mm256_blendv_epi8(b.v, v, own)};
  }
  uint32_t below(const WideKeys& b) const { return bits(PYRX_SIZED(_mm256_cmpgt, , b.v, v)); }
  int count_below(const WideKeys& b) const { return std::popcount(below(b)); }
  uint32_t equal(const WideKeys& b) const { return bits(PYRX_SIZED(_mm256_cmpeq, , v, b.v)); }
  struct Order {
    __m256i own, other;  // lanes; of 16-bit keys bytes of the lane's own half and of the other, -1 where of neither
  };
  static Order order(const K* lanes) {
    if constexpr (sizeof(K) == 4) return {load(lanes).v, load(lanes).v};
    alignas(32) int8_t own[32], other[32];
    for (int i = 0; i < 32; ++i) {
      const int lane = static_cast<int>(lanes[i / 2]), byte = 2 * (lane % 8) + i % 2;
      own[i] = static_cast<int8_t>(lane / 8 == i / 16 ? byte : -1);
      other[i] = static_cast<int8_t>(lane / 8 == i / 16 ? -1 : byte);
    }
    return {_mm256_load_si256(reinterpret_cast<const __m256i*>(own)),
            _mm256_load_si256(reinterpret_cast<const __m256i*>(other))};
  }
  WideKeys permute(const Order& order) const {
    if constexpr (sizeof(K) == 4) return {_mm256_permutevar8x32_epi32(v, order.own)};
    const __m256i turned = _mm256_permute2x128_si256(v, v, 1);
    return {_mm256_or_si256(_mm256_shuffle_epi8(v, order.own), _mm256_shuffle_epi8(turned, order.other))};
  }

 private:
  static uint32_t bits(__m256i lanes) {
    if constexpr (sizeof(K) == 4) return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
  }
};
template <typename K>
using Keys = std::conditional_t<sizeof(K) == 8, PlainKeys<K>, WideKeys<K>>;
#else
template <typename K>
using Keys = PlainKeys<K>;
#endif
#undef PYRX_SIZED
