// Ranking inside groups of M, and runs of elements under the bits that come of it. Included by nm_simd.inl.

// Lane orders that turn the groups of a vector, as many as it holds, by 1 .. m - 1 places, and which lanes then see an
// element of a lower index, whose equal key comes first.
template <typename K, int kMost>
struct Turns {
  static constexpr int kWidth = Keys<K>::kWidth;
  alignas(64) K from[kMost][kWidth] = {}, lower[kMost][kWidth] = {};  // by places
  uint32_t starts = 0;                                                // the first lane of each group

  constexpr explicit Turns(int m) {
    for (int first = 0; first + m <= kWidth; first += m) {
      starts |= 1u << first;
      for (int turn = 1; turn < m; ++turn)
        for (int i = 0; i < m; ++i) {
          lower[turn][first + i] = i + turn >= m;
          from[turn][first + i] = static_cast<K>(first + i + turn - (i + turn >= m ? m : 0));
        }
    }
  }
};

template <typename K, int kM>
constexpr Turns<K, kM> kTurns(kM);

// So many keys of a group that finding the last that is kept beats comparing each pair.
constexpr int kSelectedKeys = 48;

// Groups that are not wider than a vector: each lane is compared with the others of its group. kM is m or, where it is
// known at run time alone, 0.
template <int kM, typename K, int kMost>
void rank_narrow(const Turns<K, kMost>& turns, const K* scores, int64_t groups, const NM& nm, const KeyRule<K>& rule,
                 uint8_t* bits) {
  using V = Keys<K>;
  const int m = kM ? kM : nm.m, step = V::kWidth / m * m;
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
    for (; i + V::kWidth <= size; i += step)
      writer.put(ranked(V::load(scores + i).ranked(rule)) & low_bits(step), step);
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
  typename V::Order orders[kWidth];
  for (int turn = 1; turn < kWidth; turn *= 2) orders[turn] = V::order(kTurns<K, kWidth>.from[turn]);
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

// The greatest key that at least n of some keys reach, bit by bit; count(key) is how many reach a key. Ends early at a
// key that n reach, so that all of them are kept.
template <typename K, typename Count>
inline K threshold_of(int n, bool magnitude, Count count) {
  using U = std::make_unsigned_t<K>;
  K found = magnitude ? K(0) : std::numeric_limits<K>::min();
  for (U bit = static_cast<U>(U(1) << (8 * sizeof(K) - (magnitude ? 2 : 1))); bit != 0; bit >>= 1) {
    const K key = static_cast<K>(static_cast<U>(found) + bit);
    const int reached = count(key);
    if (reached >= n) found = key;
    if (reached == n) break;
  }
  return found;
}

// The lowest n of the bits that are set.
inline uint32_t lowest_bits(uint32_t bits, int n) {
#if PYRX_ISA
  return _pdep_u32(low_bits(n), bits);
#else
  uint32_t found = 0;
  for (; n > 0 && bits; --n, bits &= bits - 1) found |= bits & -bits;
  return found;
#endif
}

// A group wider than a vector: the key of the last that is kept is found bit by bit.
template <typename K>
inline void select_group(const K* scores, const K* end, const NM& nm, const KeyRule<K>& rule, BitWriter& writer) {
  using V = Keys<K>;
  constexpr int kWidth = V::kWidth;
  const int vectors = (nm.m + kWidth - 1) / kWidth, last = nm.m - (vectors - 1) * kWidth;
  V keys[kMostGroup / kWidth];
  for (int i = 0; i < vectors; ++i)
    keys[i] = load_within(scores + i * kWidth, i == vectors - 1 ? last : kWidth, end).ranked(rule);
  // what is beyond the group is below all else
  keys[vectors - 1] = V::fill(std::numeric_limits<K>::min()).choose(~low_bits(last), keys[vectors - 1]);
  const K threshold = threshold_of<K>(nm.n, rule.magnitude, [&](K key) {
    const V least = V::fill(key);
    int reached = 0;
    for (int i = 0; i < vectors; ++i) reached += kWidth - keys[i].count_below(least);
    return reached;
  });
  const V least = V::fill(threshold);
  uint32_t equal[kMostGroup / kWidth], kept[kMostGroup / kWidth];
  int open = nm.n;
  for (int i = 0; i < vectors; ++i) {
    equal[i] = keys[i].equal(least);
    kept[i] = ~(keys[i].below(least) | equal[i]) & low_bits(kWidth);
    open -= std::popcount(kept[i]);
  }
  for (int i = 0; i < vectors; ++i) {
    const uint32_t first = lowest_bits(equal[i], open);
    open -= std::popcount(first);
    writer.put(kept[i] | first, i == vectors - 1 ? last : kWidth);
  }
}

template <typename K>
void rank_selected(const K* scores, int64_t groups, const NM& nm, const KeyRule<K>& rule, uint8_t* bits) {
  const K* end = scores + groups * nm.m;
  BitWriter writer(bits);
  for (; scores < end; scores += nm.m) select_group(scores, end, nm, rule, writer);
}

// Groups of two vectors: how many keys are higher, of every key at once, without a branch or a wait. Only where keys
// about the last that is kept are equal does that not tell which are.
template <typename K>
void rank_wide(const K* scores, int64_t groups, const NM& nm, const KeyRule<K>& rule, uint8_t* bits) {
  using V = Keys<K>;
  constexpr int kWidth = V::kWidth;
  const int last = nm.m - kWidth;
  const V kept = V::fill(static_cast<K>(nm.n));
  const K* end = scores + groups * nm.m;
  BitWriter writer(bits);
  for (; scores < end; scores += nm.m) {
    const V low = V::load(scores).ranked(rule), high = load_within(scores + kWidth, last, end).ranked(rule);
    alignas(64) K keys[2 * kWidth];
    low.store(keys);
    high.store(keys + kWidth);
    V above_low = V::fill(0), above_high = above_low;
#pragma GCC unroll 4
    for (int i = 0; i < nm.m; ++i) {
      const V key = V::fill(keys[i]);
      above_low = above_low.count_greater(key, low);
      above_high = above_high.count_greater(key, high);
    }
    const uint32_t first = above_low.below(kept) & low_bits(kWidth), second = above_high.below(kept) & low_bits(last);
    if (std::popcount(first) + std::popcount(second) == nm.n) {
      writer.put(first, kWidth);
      writer.put(second, last);
    } else {
      select_group(scores, end, nm, rule, writer);
    }
  }
}

template <typename T>
void rank_groups(const T* scores, int64_t groups, const NM& nm, uint8_t* bits) {
  using K = typename KeyOf<T>::type;
  const KeyRule<K> rule{static_cast<K>(KeyOf<T>::infinity), nm.magnitude};
  const K* from = reinterpret_cast<const K*>(scores);
  constexpr int kWidth = Keys<K>::kWidth, k16 = std::min(16, kWidth), k32 = std::min(32, kWidth);
  if (nm.m > kWidth) {
    const bool wide = nm.m <= 2 * kWidth && nm.m < kSelectedKeys, few = (wide ? 12 : 8) * nm.n <= nm.m;
    if (few) return rank_few(from, groups, nm, rule, bits);
    return wide ? rank_wide(from, groups, nm, rule, bits) : rank_selected(from, groups, nm, rule, bits);
  }
  switch (nm.m) {
    case 2: return rank_narrow<2>(kTurns<K, 2>, from, groups, nm, rule, bits);
    case 4: return rank_narrow<4>(kTurns<K, 4>, from, groups, nm, rule, bits);
    case 8: return rank_narrow<8>(kTurns<K, 8>, from, groups, nm, rule, bits);
    case 16: return rank_narrow<k16>(kTurns<K, k16>, from, groups, nm, rule, bits);
    case 32: return rank_narrow<k32>(kTurns<K, k32>, from, groups, nm, rule, bits);
    default: return rank_narrow<0>(Turns<K, kWidth>(nm.m), from, groups, nm, rule, bits);
  }
}

// Of each lane the greatest key that at least n of its keys reach, bit by bit.
template <typename K>
inline Keys<K> thresholds_of(const Keys<K>* keys, int rows, int n, bool magnitude) {
  using V = Keys<K>;
  using U = std::make_unsigned_t<K>;
  const V wanted = V::fill(static_cast<K>(n)), one = V::fill(1);
  V found = V::fill(magnitude ? K(0) : std::numeric_limits<K>::min());
  uint32_t exact = 0;  // lanes that need no more bits: as many as wanted reach what is found
  for (U bit = static_cast<U>(U(1) << (8 * sizeof(K) - (magnitude ? 2 : 1))); bit != 0; bit >>= 1) {
    const V key = found.minus(V::fill(static_cast<K>(U(0) - bit))), below = key.minus(one);
    V reached = V::fill(0);
    for (int i = 0; i < rows; ++i) reached = reached.count_greater(keys[i], below);
    found = found.choose(reached.below(wanted), key);
    exact |= reached.equal(wanted);
    if (exact == low_bits(V::kWidth)) break;
  }
  return found;
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
  const V zero = V::fill(0), one = V::fill(1), kept = V::fill(static_cast<K>(nm.n));
  if (rows >= kSelectedKeys) {
    const V threshold = thresholds_of<K>(keys, rows, nm.n, rule.magnitude);
    V open = kept;
    for (int i = 0; i < rows; ++i) open = open.minus(one.choose(threshold.below(keys[i]), zero));
    for (int i = 0; i < rows; ++i) {
      const uint32_t equal = keys[i].equal(threshold), first = equal & zero.below(open);
      put(i, threshold.below(keys[i]) | first);
      open = open.minus(one.choose(first, zero));
    }
    return;
  }
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

template <typename K>
void keep(const K* x, const uint8_t* bits, int64_t n, K* out) {
  using V = Keys<K>;
  constexpr int kWidth = V::kWidth;
  const V zero = V::fill(0);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    uint32_t kept = 0;
    std::memcpy(&kept, bits + i / 8, kWidth / 8);
    V::load(x + i).choose(kept, zero).store(out + i);
  }
  for (; i < n; ++i) out[i] = bits[i / 8] >> i % 8 & 1 ? x[i] : K(0);
}

template <typename T>
void apply(const ApplyRun<T>& run, const T* x, const uint8_t* bits, int64_t n, T* out) {
  if (run.dropped == kZero) {
    using K = typename KeyOf<T>::type;
    return keep(reinterpret_cast<const K*>(x), bits, n, reinterpret_cast<K*>(out));
  }
  using V = Vec<accumulate_t<T>>;
  const V factor = V::fill(run.factor), strength = V::fill(run.strength);
  blocks(n, [&](int64_t i, auto count) {
    const uint32_t kept = bits_of(bits, i, count);
    const V own = load(x + i, count);
    const V rest = run.dropped == kFactor ? own * factor : own + strength * load(run.weight + i, count);
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

// In a word that has eight rows of bytes, the bits that are rows' own.
inline uint64_t row_bits(int width) { return low_bits(width) * 0x0101010101010101u; }

inline void spread_rows(const uint8_t* bits, int64_t rows, int width, uint8_t* bytes) {
  int64_t row = 0;
#if PYRX_ISA
  for (; row + 8 <= rows; row += 8, bits += width) {
    uint64_t run = 0;
    std::memcpy(&run, bits, static_cast<size_t>(width));
    const uint64_t spread = _pdep_u64(run, row_bits(width));
    std::memcpy(bytes + row, &spread, 8);
  }
#endif
  for (int64_t bit = 0; row < rows; ++row, bit += width) BitWriter(bytes + row).put(bits, bit, width);
}

inline void gather_rows(const uint8_t* bytes, int64_t rows, int width, uint8_t* bits) {
  int64_t row = 0;
#if PYRX_ISA
  for (; row + 8 <= rows; row += 8, bits += width) {
    uint64_t spread;
    std::memcpy(&spread, bytes + row, 8);
    const uint64_t run = _pext_u64(spread, row_bits(width));
    std::memcpy(bits, &run, static_cast<size_t>(width));
  }
#endif
  BitWriter writer(bits);
  for (; row < rows; ++row) writer.put(bytes + row, 0, width);
}

template <typename T>
constexpr NMKernels<T> nm_table() {
  return {&rank_groups<T>, &rank_columns<T>, &apply<T>};
}

constexpr NMByteKernels nm_byte_table() { return {&unpack_bits, &spread_rows, &gather_rows}; }
