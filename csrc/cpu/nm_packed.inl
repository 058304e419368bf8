// Products with compressed N:M rows. Included by nm_simd.inl.

// Whether every index is below m.
inline bool all_below(const uint8_t* indices, int64_t count, int m) {
  uint8_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = indices[i] > most ? indices[i] : most;
  return count == 0 || most < m;
}

template <typename T>
void widen_run(const T* x, int64_t n, accumulate_t<T>* out) {
  blocks(n, [&](int64_t i, auto count) { store(out + i, load(x + i, count), count); });
}

template <typename T>
void narrow_run(const accumulate_t<T>* x, int64_t n, T* out) {
  blocks(n, [&](int64_t i, auto count) { store(out + i, load(x + i, count), count); });
}

// LEVEL: 3 into the first-level cache, 2 into the second.
template <int LEVEL>
inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, LEVEL);
}

#if PYRX_ISA
// Sixteen doubles in registers, where Vec's stay in memory.
struct PackedDoubles {
#if PYRX_ISA == 512
  using Part = __m512d;
  static Part get_part(const double* p) { return _mm512_loadu_pd(p); }
  static void put_part(double* p, Part v) { _mm512_storeu_pd(p, v); }
  static Part fill_part(double x) { return _mm512_set1_pd(x); }
  static Part multiply_add(Part a, Part b, Part c) { return _mm512_fmadd_pd(a, b, c); }
#else
  using Part = __m256d;
  static Part get_part(const double* p) { return _mm256_loadu_pd(p); }
  static void put_part(double* p, Part v) { _mm256_storeu_pd(p, v); }
  static Part fill_part(double x) { return _mm256_set1_pd(x); }
  static Part multiply_add(Part a, Part b, Part c) { return _mm256_fmadd_pd(a, b, c); }
#endif
  static constexpr int kPart = sizeof(Part) / sizeof(double), kParts = kLanes / kPart;
  Part v[kParts];

  static PackedDoubles get(const double* p) {
    PackedDoubles out;
    for (int i = 0; i < kParts; ++i) out.v[i] = get_part(p + i * kPart);
    return out;
  }
  void put(double* p) const {
    for (int i = 0; i < kParts; ++i) put_part(p + i * kPart, v[i]);
  }
  static PackedDoubles fill(double x) {
    PackedDoubles out;
    for (int i = 0; i < kParts; ++i) out.v[i] = fill_part(x);
    return out;
  }
  static PackedDoubles multiply_add(const PackedDoubles& a, const PackedDoubles& b, const PackedDoubles& c) {
    PackedDoubles out;
    for (int i = 0; i < kParts; ++i) out.v[i] = multiply_add(a.v[i], b.v[i], c.v[i]);
    return out;
  }
  PackedDoubles operator+(const PackedDoubles& b) const {
    PackedDoubles out;
    for (int i = 0; i < kParts; ++i) out.v[i] = v[i] + b.v[i];
    return out;
  }
};
template <typename Acc>
using PackedLanes = std::conditional_t<sizeof(Acc) == 8, PackedDoubles, Vec<Acc>>;
#else
template <typename Acc>
using PackedLanes = Vec<Acc>;
#endif

// N: n where it is known, else 0. A product with one value takes V vectors of x; where they are few, kChains sums of
// groups in turn hide the latency of the additions. Each run of groups is summed from 0, which keeps errors small.
template <typename T, int V, int N>
bool multiply_rows(const PackedRows<T>& weight, const accumulate_t<T>* x, accumulate_t<T>* sums) {
  using Acc = accumulate_t<T>;
  using Lanes = PackedLanes<Acc>;
  constexpr int64_t width = V * kLanes;
  constexpr int kChains = V >= 4 ? 1 : V == 3 ? 2 : 4 / V;
  const int64_t n = N ? N : weight.n, step = weight.m * width, count = weight.groups * n;
  Acc wide[sizeof(T) == sizeof(Acc) ? 1 : kPackedSegment];
  for (int64_t r = 0; r < weight.rows; ++r) {
    const T* stored = weight.values + r * weight.stride;
    const uint8_t* indices = weight.indices + r * weight.stride;
    prefetch<2>(stored + count, count * int64_t(sizeof(T)));
    prefetch<2>(indices + count, count);
    prefetch<3>(stored + 2 * weight.stride, count * int64_t(sizeof(T)));
    prefetch<3>(indices + 2 * weight.stride, count);
    if (!all_below(indices, count, weight.m)) return false;
    const Acc* values;
    if constexpr (std::is_same_v<T, Acc>) {
      values = stored;
    } else {
      widen_run(stored, count, wide);
      values = wide;
    }
    Lanes sum[kChains][V];
    for (int c = 0; c < kChains; ++c)
      for (int v = 0; v < V; ++v) sum[c][v] = Lanes::fill(0);
    const Acc* group = x;
    const auto add_group = [&](Lanes(&to)[V]) {
      for (int64_t j = 0; j < n; ++j) {
        const Lanes value = Lanes::fill(values[j]);
        const Acc* row = group + indices[j] * width;
        for (int v = 0; v < V; ++v) to[v] = Lanes::multiply_add(Lanes::get(row + v * kLanes), value, to[v]);
      }
      values += n;
      indices += n;
      group += step;
    };
    int64_t g = 0;
    for (; g + kChains <= weight.groups; g += kChains)
      for (int c = 0; c < kChains; ++c) add_group(sum[c]);
    for (int c = 0; g < weight.groups; ++g, ++c) add_group(sum[c]);
    for (int v = 0; v < V; ++v) {
      for (int c = 1; c < kChains; ++c) sum[0][v] = sum[0][v] + sum[c][v];
      Acc* to = sums + r * width + v * kLanes;
      (Lanes::get(to) + sum[0][v]).put(to);
    }
  }
  return true;
}

// As many vectors as leave registers for a value and an address.
template <typename Acc>
constexpr int kMostVectors = (PYRX_ISA == 512 ? 8 : PYRX_ISA ? 4 : 2) * 4 / sizeof(Acc);

template <typename T, int V = kMostVectors<accumulate_t<T>>>
bool multiply_packed(const PackedRows<T>& weight, const accumulate_t<T>* x, int vectors, accumulate_t<T>* sums) {
  if constexpr (V > 1)
    if (vectors < V) return multiply_packed<T, V - 1>(weight, x, vectors, sums);
  switch (weight.n) {
    case 1: return multiply_rows<T, V, 1>(weight, x, sums);
    case 2: return multiply_rows<T, V, 2>(weight, x, sums);
    case 4: return multiply_rows<T, V, 4>(weight, x, sums);
    default: return multiply_rows<T, V, 0>(weight, x, sums);
  }
}

#if PYRX_ISA == 512
struct DotLanes {
  static constexpr int kPart = 16;
  using Part = __m512;
  using Index = __m512i;

  static Index indices(const uint8_t* p, Index base) {
    return _mm512_add_epi32(base, _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Index get(const int32_t* p) { return _mm512_loadu_si512(p); }
  template <typename T>
  static Part values(const T* p) { return load(p).v; }
  static Part multiply_add(Part a, Part b, Part c) { return _mm512_fmadd_ps(a, b, c); }
  static Part zero() { return _mm512_setzero_ps(); }
  static float sum(Part v) { return Vec<float>{v}.sum(); }

  // Elements of the kPart * RATIO floats from x on, by index.
  template <int RATIO>
  static Part pick(const float* x, Index index) {
    if constexpr (RATIO == 1) {
      return _mm512_permutexvar_ps(index, _mm512_loadu_ps(x));
    } else if constexpr (RATIO == 2) {
      return _mm512_permutex2var_ps(_mm512_loadu_ps(x), index, _mm512_loadu_ps(x + kPart));
    } else {
      const Part low = pick<RATIO / 2>(x, index), high = pick<RATIO / 2>(x + RATIO / 2 * kPart, index);
      return _mm512_mask_mov_ps(low, _mm512_test_epi32_mask(index, _mm512_set1_epi32(RATIO / 2 * kPart)), high);
    }
  }
};
#elif PYRX_ISA == 2
struct DotLanes {
  static constexpr int kPart = 8;
  using Part = __m256;
  using Index = __m256i;

  static Index indices(const uint8_t* p, Index base) {
    return _mm256_add_epi32(base, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static Index get(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  template <typename T>
  static Part values(const T* p) {
    if constexpr (std::is_same_v<T, float>) {
      return _mm256_loadu_ps(p);
    } else {
      const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (std::is_same_v<T, float16>) return _mm256_cvtph_ps(x);
      else return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
    }
  }
  static Part multiply_add(Part a, Part b, Part c) { return _mm256_fmadd_ps(a, b, c); }
  static Part zero() { return _mm256_setzero_ps(); }
  static float sum(Part v) { return Vec<float>{v, zero()}.sum(); }

  template <int RATIO>
  static Part pick(const float* x, Index index) {
    if constexpr (RATIO == 1) {
      return _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), index);
    } else {
      constexpr int kShift = RATIO == 2 ? 28 : RATIO == 4 ? 27 : 26;  // the bit of RATIO / 2 * kPart to the sign
      const Part low = pick<RATIO / 2>(x, index), high = pick<RATIO / 2>(x + RATIO / 2 * kPart, index);
      return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, kShift)));
    }
  }
};
#endif

#if PYRX_ISA
// Rows share what they read of x; the sum of each is the same whichever others there are.
template <typename T, int RATIO, int ROWS, int BATCH>
void dot_rows(const PackedRows<T>& weight, int64_t first, const float* x, int64_t x_stride, DotLanes::Index base,
              float* sums) {
  using D = DotLanes;
  const int64_t count = weight.groups * weight.n;
  D::Part sum[ROWS][BATCH];
  for (int r = 0; r < ROWS; ++r)
    for (int b = 0; b < BATCH; ++b) sum[r][b] = D::zero();
  const T* values = weight.values + first * weight.stride;
  const uint8_t* indices = weight.indices + first * weight.stride;
  int64_t k = 0;
  for (; k + D::kPart <= count; k += D::kPart)
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = r * weight.stride + k;
      const D::Index index = D::indices(indices + at, base);
      const D::Part value = D::values(values + at);
      for (int b = 0; b < BATCH; ++b)
        sum[r][b] = D::multiply_add(D::pick<RATIO>(x + b * x_stride + k * RATIO, index), value, sum[r][b]);
    }
  for (int r = 0; r < ROWS; ++r)
    for (int b = 0; b < BATCH; ++b) {
      float rest = 0;
      for (int64_t i = k; i < count; ++i)
        rest += widen(values[r * weight.stride + i]) *
                x[b * x_stride + i / weight.n * weight.m + indices[r * weight.stride + i]];
      sums[(first + r) * BATCH + b] += D::sum(sum[r][b]) + rest;
    }
}

template <typename T, int RATIO, int BATCH>
bool dot_batch(const PackedRows<T>& weight, const float* x, int64_t x_stride, float* sums) {
  constexpr int kRows = PYRX_ISA == 512 || BATCH <= 2 ? 4 : 2;  // as many sums as registers hold
  const int64_t count = weight.groups * weight.n;
  int32_t groups[DotLanes::kPart];
  for (int i = 0; i < DotLanes::kPart; ++i) groups[i] = i / weight.n * weight.m;
  const DotLanes::Index base = DotLanes::get(groups);
  for (int64_t r = 0; r < weight.rows;) {
    const int rows = weight.rows - r >= kRows ? kRows : 1;
    for (int i = 0; i < rows; ++i)
      if (!all_below(weight.indices + (r + i) * weight.stride, count, weight.m)) return false;
    if (rows == kRows) dot_rows<T, RATIO, kRows, BATCH>(weight, r, x, x_stride, base, sums);
    else dot_rows<T, RATIO, 1, BATCH>(weight, r, x, x_stride, base, sums);
    r += rows;
  }
  return true;
}

template <typename T, int BATCH>
bool dot_ratio(const PackedRows<T>& weight, const float* x, int64_t x_stride, float* sums) {
  switch (weight.m / weight.n) {
    case 1: return dot_batch<T, 1, BATCH>(weight, x, x_stride, sums);
    case 2: return dot_batch<T, 2, BATCH>(weight, x, x_stride, sums);
    case 4: return dot_batch<T, 4, BATCH>(weight, x, x_stride, sums);
    default: return dot_batch<T, 8, BATCH>(weight, x, x_stride, sums);
  }
}

template <typename T>
bool dot_packed(const PackedRows<T>& weight, const float* x, int64_t x_stride, int batch, float* sums) {
  switch (batch) {
    case 1: return dot_ratio<T, 1>(weight, x, x_stride, sums);
    case 2: return dot_ratio<T, 2>(weight, x, x_stride, sums);
    case 3: return dot_ratio<T, 3>(weight, x, x_stride, sums);
    default: return dot_ratio<T, 4>(weight, x, x_stride, sums);
  }
}

// A part's values are of whole groups in 1, 2, 4 or 8 parts of x. For more rows of x than these `multiply`, whose vectors
// are rows of x, is the faster, as measured; it stores widened 16-bit values first.
template <typename T>
int most_dots(int n, int m) {
  const int ratio = m % n == 0 ? m / n : 0;
  if (DotLanes::kPart % n != 0 || !(ratio == 1 || ratio == 2 || ratio == 4 || ratio == 8)) return 0;
  if (PYRX_ISA == 2) return ratio == 8 ? 1 : 3;
  return ratio == 8 ? 4 : sizeof(T) == 2 ? 8 : 6;
}
#endif

template <typename T>
constexpr NMPackedKernels<T> nm_packed_table() {
  constexpr int vectors = kMostVectors<accumulate_t<T>>;
  NMPackedKernels<T> table{vectors, &multiply_packed<T>, nullptr, nullptr, &widen_run<T>, &narrow_run<T>};
#if PYRX_ISA
  if constexpr (sizeof(accumulate_t<T>) == 4) {
    table.most_dots = &most_dots<T>;
    table.dot = &dot_packed<T>;
  }
#endif
  return table;
}
