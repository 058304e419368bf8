// Rows of scores to the blocks that they keep. Included once for each instruction set by block_mask.cpp.

// keys of n > 0 scores, their least and largest; the units too where they are asked for, and their sum
inline KeyBounds keys_of(const float* scores, int64_t n, uint32_t* keys, uint64_t* units) {
  uint32_t low = ~uint32_t(0), high = 0;
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = block_key(scores[i]);
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  uint64_t total = 0;
  if (units != nullptr)
    for (int64_t i = 0; i < n; ++i) total += units[i] = score_units(scores[i]);
  return {low, high, total};
}

inline int64_t count_from(const uint32_t* keys, int64_t n, uint32_t key) {
  uint32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= key;
  return count;
}

inline uint64_t sum_from(const uint32_t* keys, const uint64_t* units, int64_t n, uint32_t key) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += keys[i] >= key ? units[i] : 0;
  return sum;
}

// bytes of 0 or 1
inline void keep(const uint32_t* keys, int64_t n, BlockCut cut, uint8_t* out) {
  // a row whose ties are all kept or all dropped needs no ranks
  const int64_t ties = cut.ties > 0 && cut.ties < n ? cut.ties : 0;
  const bool whole = cut.ties >= n;
  for (int64_t i = 0; i < n; ++i) {
    const bool kept = whole ? keys[i] >= cut.least : keys[i] > cut.least;
    out[i] = kept & (keys[i] != kNeverKey);
  }
  if (cut.least == kNeverKey) return;
  for (int64_t i = 0, left = ties; left > 0 && i < n; ++i) {
    if (keys[i] != cut.least) continue;
    out[i] = 1;
    --left;
  }
}

inline void select_row(const float* scores, int64_t n, const int32_t* count, double mass, uint32_t* keys,
                       uint64_t* units, uint8_t* out) {
  const KeyBounds bounds = keys_of(scores, n, keys, count == nullptr ? units : nullptr);
  if (count != nullptr) {
    const auto from = [&](uint32_t key) { return count_from(keys, n, key); };
    return keep(keys, n, cut_by_count(*count, n, bounds.low, bounds.high, from), out);
  }
  const uint64_t limit = mass_limit(bounds.total, mass);
  const auto from = [&](uint32_t key) { return sum_from(keys, units, n, key); };
  keep(keys, n, cut_by_mass(limit, bounds.total, n, bounds.low, bounds.high, from), out);
}

constexpr SelectKernels select_table() { return {&select_row}; }
