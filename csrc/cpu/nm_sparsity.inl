// Ranking inside groups of M, and runs of elements under the bits that come of it. Included by nm_simd.inl.

// Lane orders that turn the groups of a vector, as many as it holds, by 1 .. m - 1 places, and which lanes see an element
// of a lower index then: its equal key comes first.
template <typename K, int kMost>
struct Turns {
  static constexpr int kWidth = Keys<K>::kWidth;
  alignas(64) K from[kMost][kWidth] = {}, lower[kMost][kWidth] = {};  // by places
  uint32_t starts = 0;                                                // the first lane of each group

  constexpr explicit Turns(int m) {
    for (int i = 0; i < kWidth / m * m; ++i) {
      const int place = i % m;
      if (place == 0) starts |= 1u << i;
      for (int turn = 1; turn < m; ++turn) {
        from[turn][i] = static_cast<K>(i - place + (place + turn) % m);
        lower[turn][i] = place + turn >= m;
      }
    }
  }
};

// Groups that are not wider than a vector: each lane is compared with the others of its group. kM is m or, where that is
// known at run time alone, 0.
template <int kM, typename K>
void rank_narrow(const K* scores, int64_t groups, const NM& nm, const KeyRule<K>& rule, uint8_t* bits) {
  using V = Keys<K>;
  constexpr int kMost = kM ? kM : V::kWidth;
  const int m = kM ? kM : nm.m, step = V::kWidth / m * m;
  const Turns<K, kMost> turns(m);
  typename V::Order orders[kMost];
  for (int turn = 1; turn < m; ++turn) orders[turn] = V::order(turns.from[turn]);
  const V kept = V::fill(static_cast<K>(nm.n));
  const auto rank = [&](const V& own) {
    V higher = V::fill(0);
    for (int turn = 1; turn < m; ++turn)
      higher = higher.count_greater(own.permute(orders[turn]), own.minus(V::load(turns.lower[turn])));
    return higher.below(kept);
  };
  const auto first_of_highest = [&](const V& own) {
    V highest = own;
    for (int turn = 1; turn < m; turn *= 2) highest = highest.max(highest.permute(orders[turn]));
    const uint32_t equal = own.equal(highest) & low_bits(step);
    return equal & ~(equal - turns.starts);  // each group has one, so no group borrows of another
  };
  BitWriter writer(bits);
  const int64_t size = groups * m;
  const auto all = [&](auto ranked) {
    int64_t i = 0;
    for (; i + V::kWidth <= size; i += step) writer.put(ranked(V::load(scores + i).ranked(rule)) & low_bits(step), step);
    for (; i < size; i += step) {
      const int count = static_cast<int>(std::min<int64_t>(size - i, step));
      writer.put(ranked(V::load(scores + i, count).ranked(rule)) & low_bits(count), count);
    }
  };
  if (nm.n == 1) all(first_of_highest);
  else all(rank);
}

// The first `count` lanes of a vector, of scores that end at `end`; what the others are does not matter.
template <typename K>
inline Keys<K> load_within(const K* p, int count, const K* end) {
  return end - p >= Keys<K>::kWidth ? Keys<K>::load(p) : Keys<K>::load(p, count);
}

// Groups wider than a vector, of few kept: the first of the highest is kept, again and again.
template <typename K>
void rank_few(const K* scores, int64_t groups, const NM& nm, const KeyRule<K>& rule, uint8_t* bits) {
  using V = Keys<K>;
  constexpr int kWidth = V::kWidth, kMost = kMostGroup / kWidth;
  const Turns<K, kWidth> turns(kWidth);
  typename V::Order orders[kWidth];
  for (int turn = 1; turn < kWidth; turn *= 2) orders[turn] = V::order(turns.from[turn]);
  const V lowest = V::fill(std::numeric_limits<K>::min());
  const int vectors = (nm.m + kWidth - 1) / kWidth, last = nm.m - (vectors - 1) * kWidth;
  const K* end = scores + groups * nm.m;
  BitWriter writer(bits);
  for (; scores < end; scores += nm.m) {
    V keys[kMost];
    uint32_t kept[kMost] = {};
    for (int i = 0; i < vectors - 1; ++i) keys[i] = V::load(scores + i * kWidth).ranked(rule);
    keys[vectors - 1] = lowest.choose(~low_bits(last), load_within(scores + nm.m - last, last, end).ranked(rule));
    for (int k = 0; k < nm.n; ++k) {
      V highest = keys[0];
      for (int i = 1; i < vectors; ++i) highest = highest.max(keys[i]);
      for (int turn = 1; turn < kWidth; turn *= 2) highest = highest.max(highest.permute(orders[turn]));
      uint32_t open = ~0u;
      for (int i = 0; i < vectors; ++i) {
        const uint32_t equal = keys[i].equal(highest) & open, first = equal & -equal;
        open &= equal ? 0 : ~0u;
        kept[i] |= first;
        keys[i] = lowest.choose(first, keys[i]);
      }
    }
    for (int i = 0; i < vectors - 1; ++i) writer.put(kept[i], kWidth);
    writer.put(kept[vectors - 1], last);
  }
}

// Groups wider than a vector: each vector is compared with every key of its group.
template <typename K>
void rank_wide(const K* scores, int64_t groups, const NM& nm, const KeyRule<K>& rule, uint8_t* bits) {
  using V = Keys<K>;
  constexpr int kWidth = V::kWidth;
  alignas(64) K keys[kMostGroup + kWidth], later[2 * kWidth] = {};
  std::fill_n(later + kWidth, kWidth, K(1));
  const V one = V::fill(1), kept = V::fill(static_cast<K>(nm.n));
  const K* end_of_scores = scores + groups * nm.m;
  BitWriter writer(bits);
  for (; scores < end_of_scores; scores += nm.m) {
    for (int i = 0; i < nm.m; i += kWidth)
      load_within(scores + i, nm.m - i, end_of_scores).ranked(rule).store(keys + i);
    for (int first = 0; first < nm.m; first += kWidth) {
      const int end = std::min(first + kWidth, nm.m);
      const V own = V::load(keys + first), or_equal = own.minus(one);
      V higher = V::fill(0);
      for (int j = 0; j < first; ++j) higher = higher.count_greater(V::fill(keys[j]), or_equal);
      for (int j = first; j < end; ++j)
        higher = higher.count_greater(V::fill(keys[j]), own.minus(V::load(later + kWidth - 1 - (j - first))));
      for (int j = end; j < nm.m; ++j) higher = higher.count_greater(V::fill(keys[j]), own);
      writer.put(higher.below(kept) & low_bits(end - first), end - first);
    }
  }
}

template <typename T>
void rank_groups(const T* scores, int64_t groups, const NM& nm, uint8_t* bits) {
  using K = typename KeyOf<T>::type;
  const KeyRule<K> rule{static_cast<K>(KeyOf<T>::infinity), nm.magnitude};
  const K* from = reinterpret_cast<const K*>(scores);
  constexpr int kWidth = Keys<K>::kWidth;
  if (nm.m > kWidth) {
    const bool few = 8 * nm.n <= nm.m;
    return few ? rank_few(from, groups, nm, rule, bits) : rank_wide(from, groups, nm, rule, bits);
  }
  switch (nm.m) {
    case 2: return rank_narrow<2>(from, groups, nm, rule, bits);
    case 4: return rank_narrow<4>(from, groups, nm, rule, bits);
    case 8: return rank_narrow<8>(from, groups, nm, rule, bits);
    case 16: return rank_narrow<std::min(16, kWidth)>(from, groups, nm, rule, bits);
    case 32: return rank_narrow<std::min(32, kWidth)>(from, groups, nm, rule, bits);
    default: return rank_narrow<0>(from, groups, nm, rule, bits);
  }
}

// Whole lanes of columns: key i of each group is in vector i.
template <int kM, typename K, typename Count>
inline void rank_lanes(const K* scores, int64_t stride, int rows, Count count, const NM& nm, const KeyRule<K>& rule,
                       uint8_t* bits, int64_t bits_stride) {
  using V = Keys<K>;
  V keys[kM ? kM : kMostGroup];
  const auto put = [&](int i, uint32_t found) {
    found &= low_bits(count);
    std::memcpy(bits + i * bits_stride, &found, static_cast<size_t>((count + 7) / 8));
  };
  for (int i = 0; i < rows; ++i) {
    if constexpr (std::is_same_v<Count, int>) keys[i] = V::load(scores + i * stride, count).ranked(rule);
    else keys[i] = V::load(scores + i * stride).ranked(rule);
  }
  if (nm.n == 1) {
    V highest = keys[0];
    for (int i = 1; i < rows; ++i) highest = highest.max(keys[i]);
    uint32_t before = 0;
    for (int i = 0; i < rows; ++i) {
      const uint32_t equal = keys[i].equal(highest);
      put(i, equal & ~before);
      before |= equal;
    }
    return;
  }
  const V one = V::fill(1), kept = V::fill(static_cast<K>(nm.n));
  for (int i = 0; i < rows; ++i) {
    const V own = keys[i], or_equal = own.minus(one);
    V higher = V::fill(0);
    for (int j = 0; j < i; ++j) higher = higher.count_greater(keys[j], or_equal);
    for (int j = i + 1; j < rows; ++j) higher = higher.count_greater(keys[j], own);
    put(i, higher.below(kept));
  }
}

template <int kM, typename K>
void rank_columns_of(const K* scores, int64_t stride, int rows, int64_t columns, const NM& nm, const KeyRule<K>& rule,
                     uint8_t* bits, int64_t bits_stride) {
  constexpr int kWidth = Keys<K>::kWidth;
  if (kM) rows = kM;
  int64_t column = 0;
  for (; column + kWidth <= columns; column += kWidth)
    rank_lanes<kM>(scores + column, stride, rows, std::integral_constant<int, kWidth>(), nm, rule, bits + column / 8,
                   bits_stride);
  if (column < columns)
    rank_lanes<kM>(scores + column, stride, rows, static_cast<int>(columns - column), nm, rule, bits + column / 8,
                   bits_stride);
}

template <typename T>
void rank_columns(const T* scores, int64_t stride, int64_t rows, int64_t columns, const NM& nm, uint8_t* bits,
                  int64_t bits_stride) {
  using K = typename KeyOf<T>::type;
  const KeyRule<K> rule{static_cast<K>(KeyOf<T>::infinity), nm.magnitude};
  const K* from = reinterpret_cast<const K*>(scores);
  const int here = static_cast<int>(rows);  // what pads a group never wins, so only those that are there are ranked
  switch (rows) {
    case 2: return rank_columns_of<2>(from, stride, here, columns, nm, rule, bits, bits_stride);
    case 4: return rank_columns_of<4>(from, stride, here, columns, nm, rule, bits, bits_stride);
    case 8: return rank_columns_of<8>(from, stride, here, columns, nm, rule, bits, bits_stride);
    default: return rank_columns_of<0>(from, stride, here, columns, nm, rule, bits, bits_stride);
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
  int64_t i = 0;
#if PYRX_ISA == 512
  for (; i + 64 <= n; i += 64) {
    uint64_t kept;
    std::memcpy(&kept, bits + i / 8, 8);
    _mm512_storeu_si512(bytes + i, _mm512_maskz_set1_epi8(kept, 1));
  }
#elif PYRX_ISA == 2
  const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201)), one = _mm256_set1_epi8(1);
  for (; i + 32 <= n; i += 32) {
    int kept;
    std::memcpy(&kept, bits + i / 8, 4);
    const __m256i bytes_of = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(kept), spread), bit);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + i), _mm256_min_epu8(bytes_of, one));
  }
#endif
  for (; i < n; ++i) bytes[i] = bits[i / 8] >> i % 8 & 1;
}

template <typename T>
constexpr NMKernels<T> nm_table() {
  return {&rank_groups<T>, &rank_columns<T>, &apply<T>};
}

constexpr NMByteKernels nm_byte_table() { return {&unpack_bits}; }
