// Runs of pixels, mixed, converted, normalised, swapped. Included by simd.inl.

template <typename Acc, typename T, typename Count>
inline Vec<Acc> load_as(const T* p, Count count) {
  if constexpr (std::is_same_v<Acc, accumulate_t<T>>) {
    return load(p, count);
  } else {
    Vec<Acc> out = Vec<Acc>::fill(0);
    for (int i = 0; i < int(count); ++i) out.v[i] = static_cast<Acc>(widen(p[i]));
    return out;
  }
}

template <typename Acc, typename T, typename Count>
inline void store_as(T* p, const Vec<Acc>& x, Count count) {
  if constexpr (std::is_same_v<Acc, accumulate_t<T>>) {
    store(p, x, count);
  } else {
    for (int i = 0; i < int(count); ++i) p[i] = narrow<T>(static_cast<accumulate_t<T>>(x.v[i]));
  }
}

#if PYRX_ISA == 512
// Past the caches: a line that is written whole need not be read first.
inline void stream_line(void* to, __m512i line) { _mm512_stream_si512(static_cast<__m512i*>(to), line); }
#endif

// Elements before the first 64-byte line that begins at one; n where there is none.
template <typename T>
inline int64_t before_line(const T* p, int64_t n) {
  const int64_t bytes = -reinterpret_cast<intptr_t>(p) & 63;
  return bytes % int64_t(sizeof(T)) != 0 ? n : std::min<int64_t>(n, bytes / int64_t(sizeof(T)));
}

inline void copy_stream(uint8_t* to, const uint8_t* from, int64_t n) {
#if PYRX_ISA == 512
  const int64_t head = before_line(to, n);
  std::memcpy(to, from, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + 256 <= n; i += 256)
    for (int64_t k = 0; k < 256; k += 64) stream_line(to + i + k, _mm512_loadu_si512(from + i + k));
  for (; i + 64 <= n; i += 64) stream_line(to + i, _mm512_loadu_si512(from + i));
  std::memcpy(to + i, from + i, static_cast<size_t>(n - i));
#else
  std::memcpy(to, from, static_cast<size_t>(n));
#endif
}

inline void swap_bytes(uint8_t* a, uint8_t* b, int64_t n) {
  constexpr int64_t kBlock = 64;
  uint8_t x[kBlock], y[kBlock];
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    std::memcpy(x, a + i, kBlock);
    std::memcpy(y, b + i, kBlock);
    std::memcpy(a + i, y, kBlock);
    std::memcpy(b + i, x, kBlock);
  }
  for (; i < n; ++i) std::swap(a[i], b[i]);
}

// kMix: own and other are weighed. kAffine: scale and bias follow.
template <typename In, typename Out, bool kMix, bool kAffine>
void mix_run(const MixRun<In, Out>& run, const In* own, const In* other, int64_t n, Out* out) {
  using Acc = pixel_acc_t<In, Out>;
  using V = Vec<Acc>;
  const V own_weight = V::fill(run.weight), other_weight = V::fill(1 - run.weight);
  int64_t i = 0, phase = 0;
  const auto value_at = [&](auto count) {
    V value = load_as<Acc>(own + i, count);
    if constexpr (kMix) value = value * own_weight + load_as<Acc>(other + i, count) * other_weight;
    if constexpr (kAffine) {
      value = value * V::get(run.scale + phase) + V::get(run.bias + phase);
      phase += count;
      if (phase >= run.period) phase -= run.period;
    }
    return value;
  };
  const auto some = [&](int count) {
    const V value = value_at(count);
    store_as<Acc>(out + i, value, count);
    i += count;
  };
  constexpr std::integral_constant<int, kLanes> whole;
#if PYRX_ISA == 512
  if constexpr (std::is_same_v<Out, float> && std::is_same_v<Acc, float>) {
    if (run.stream) {
      if (const int64_t head = before_line(out, n); head > 0 && head < kLanes) some(static_cast<int>(head));
      if (reinterpret_cast<uintptr_t>(out + i) % 64 == 0)
        for (; i + kLanes <= n; i += kLanes) _mm512_stream_ps(out + i, value_at(whole).v);
    }
  }
#endif
  for (; i + kLanes <= n; i += kLanes) store_as<Acc>(out + i, value_at(whole), whole);
  if (i < n) some(static_cast<int>(n - i));
}

template <typename In, typename Out>
void mix_pixels(const MixRun<In, Out>& run, const In* own, const In* other, int64_t n, Out* out) {
  if (other && run.scale) return mix_run<In, Out, true, true>(run, own, other, n, out);
  if (other) return mix_run<In, Out, true, false>(run, own, other, n, out);
  if (run.scale) return mix_run<In, Out, false, true>(run, own, other, n, out);
  mix_run<In, Out, false, false>(run, own, other, n, out);
}

template <typename T>
void mix_pair(T* a, T* b, accumulate_t<T> weight_a, accumulate_t<T> weight_b, int64_t n) {
  using V = Vec<accumulate_t<T>>;
  const V own_a = V::fill(weight_a), other_a = V::fill(1 - weight_a);
  const V own_b = V::fill(weight_b), other_b = V::fill(1 - weight_b);
  blocks(n, [&](int64_t i, auto count) {
    const V x = load(a + i, count), y = load(b + i, count);
    store(a + i, x * own_a + y * other_a, count);
    store(b + i, y * own_b + x * other_b, count);
  });
}

constexpr ByteKernels byte_table() { return {&copy_stream, &swap_bytes}; }
template <typename In, typename Out>
constexpr MixKernels<In, Out> mix_table() { return {&mix_pixels<In, Out>}; }
template <typename T>
constexpr PairKernels<T> pair_table() { return {&mix_pair<T>}; }
