// Ranking inside groups of M, and runs of elements under the bits that come of it. Included by nm_simd.inl.

template <typename T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
  static constexpr type infinity = kInfinityFloat;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
  static constexpr type infinity = kInfinityDouble;
};
template <>
struct KeyOf<bfloat16> {
  using type = uint16_t;
  static constexpr type infinity = kInfinityBFloat16;
};
template <>
struct KeyOf<float16> {
  using type = uint16_t;
  static constexpr type infinity = kInfinityHalf;
};
template <typename T>
using key_t_of = typename KeyOf<T>::type;

template <typename T>
inline key_t_of<T> key_of(T score, bool magnitude) {
  key_t_of<T> bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return rank_key(bits, KeyOf<T>::infinity, magnitude);
}

inline void put_bit(uint8_t* bits, int64_t i, bool value) {
  const uint8_t bit = static_cast<uint8_t>(1 << i % 8);
  bits[i / 8] = static_cast<uint8_t>(value ? bits[i / 8] | bit : bits[i / 8] & ~bit);
}

// Whether element i of m keys is kept.
template <typename Key>
inline bool is_kept(const Key* keys, const NM& nm, int i) {
  int rank = 0;
  for (int j = 0; j < nm.m; ++j) rank += j < i ? keys[j] >= keys[i] : keys[j] > keys[i];
  return rank < nm.n;
}

template <typename T>
void rank_groups(const T* scores, int64_t groups, const NM& nm, uint8_t* bits) {
  key_t_of<T> keys[kMostGroup];
  if (groups * nm.m % 8 != 0) bits[groups * nm.m / 8] = 0;
  for (int64_t group = 0; group < groups; ++group) {
    for (int i = 0; i < nm.m; ++i) keys[i] = key_of(scores[group * nm.m + i], nm.magnitude);
    for (int i = 0; i < nm.m; ++i) put_bit(bits, group * nm.m + i, is_kept(keys, nm, i));
  }
}

template <typename T>
void rank_columns(const T* scores, int64_t stride, int64_t rows, int64_t columns, const NM& nm, uint8_t* bits,
                  int64_t bits_stride) {
  key_t_of<T> keys[kMostGroup];
  if (columns % 8 != 0)
    for (int64_t i = 0; i < rows; ++i) bits[i * bits_stride + columns / 8] = 0;
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t i = 0; i < nm.m; ++i)
      keys[i] = i < rows ? key_of(scores[i * stride + column], nm.magnitude) : kPadKey<key_t_of<T>>;
    for (int64_t i = 0; i < rows; ++i) put_bit(bits + i * bits_stride, column, is_kept(keys, nm, static_cast<int>(i)));
  }
}

template <typename T>
void apply(const ApplyRun<T>& run, const T* x, const uint8_t* bits, int64_t n, T* out) {
  using V = Vec<accumulate_t<T>>;
  const V factor = V::fill(run.factor), strength = V::fill(run.strength);
  blocks(n, [&](int64_t i, auto count) {
    const uint32_t kept = bits_of(bits, i, count);
    const V own = load(x + i, count);
    V rest = V::fill(0);
    if (run.dropped == kFactor) rest = own * factor;
    if (run.dropped == kRegularize) rest = own + strength * load(run.weight + i, count);
    T before[kLanes];
    if constexpr (sizeof(T) == 2) std::memcpy(before, x + i, static_cast<size_t>(int(count)) * sizeof(T));
    store(out + i, V::choose(kept, own, rest), count);
    if constexpr (sizeof(T) == 2)  // a conversion would touch NaN's bits
      if (kept & (own - own).nonzero())
        for (int j = 0; j < int(count); ++j)
          if (kept >> j & 1) out[i + j] = before[j];
  });
}

inline void unpack_bits(const uint8_t* bits, int64_t n, uint8_t* bytes) {
  for (int64_t i = 0; i < n; ++i) bytes[i] = bits[i / 8] >> i % 8 & 1;
}

template <typename T>
constexpr NMKernels<T> nm_table() {
  return {&rank_groups<T>, &rank_columns<T>, &apply<T>};
}

constexpr NMByteKernels nm_byte_table() { return {&unpack_bits}; }
