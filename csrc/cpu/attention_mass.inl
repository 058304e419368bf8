// Sums of exponentials over tiles of logits: MassKernels. Included by attention_simd.inl.

// Bits of the keys i .. i + 15 of a row that are visible.
template <typename Acc>
inline uint32_t visible_bits(const ExponentTile<Acc>& tile, const uint32_t* masked, int64_t row, int64_t i) {
  const int low = static_cast<int>(std::clamp<int64_t>(tile.first[row] - i, 0, kLanes));
  const int high = static_cast<int>(std::clamp<int64_t>(tile.last[row] - i, 0, kLanes));
  return ((1u << high) - 1) & ~((1u << low) - 1) & masked[i / kLanes];
}

// The key mask as bits, one entry for sixteen keys.
template <typename Acc>
inline void key_bits(const ExponentTile<Acc>& tile, uint32_t* bits) {
  std::fill(bits, bits + kLogitKeys / kLanes, 0xFFFFu);
  if (tile.key_mask)
    for (int64_t i = 0; i < tile.keys; ++i)
      if (!tile.key_mask[i]) bits[i / kLanes] &= ~(1u << i % kLanes);
}

// The sum over `rows` rows from `row` and kVectors vectors of keys from `key`.
template <int kVectors, bool kMasked, typename Acc>
inline Acc sum_block(const ExponentTile<Acc>& tile, const Acc* offset, const uint32_t* masked, int64_t row, int64_t rows,
                     int64_t key) {
  using V = Vec<Acc>;
  constexpr int kSums = kVectors < 4 ? kVectors : 4;
  V sums[kSums];
  for (V& each : sums) each = V::fill(0);
  for (int64_t r = row; r < row + rows; ++r) {
    const Acc* products = tile.products + r * tile.stride + key;
    const V factor = V::fill(tile.factor[r]), shift = V::fill(-offset[r]);
    for (int v = 0; v < kVectors; ++v) {
      V e = exp2(V::multiply_add(V::get(products + v * kLanes), factor, shift));
      if constexpr (kMasked) e = e.keep(visible_bits(tile, masked, r, key + v * kLanes));
      sums[v % kSums] = sums[v % kSums] + e;
    }
  }
  for (int i = 1; i < kSums; ++i) sums[0] = sums[0] + sums[i];
  return sums[0].sum();
}

template <int kVectors, bool kMasked, typename Acc>
inline void sum_blocks(const ExponentTile<Acc>& tile, const Acc* offset, int64_t q_block, Acc* mass, int64_t stride) {
  constexpr int64_t kBlock = kVectors * kLanes;
  uint32_t masked[kLogitKeys / kLanes];
  if constexpr (kMasked) key_bits(tile, masked);
  for (int64_t row = 0; row < tile.rows; row += q_block, mass += stride) {
    const int64_t rows = std::min(q_block, tile.rows - row);
    int64_t key = 0;
    for (; key + kBlock <= tile.keys; key += kBlock)
      mass[key / kBlock] = sum_block<kVectors, kMasked>(tile, offset, masked, row, rows, key);
    if (key == tile.keys) continue;
    Acc& rest = mass[key / kBlock] = 0;
    for (; key < tile.keys; key += kLanes) rest += sum_block<1, kMasked>(tile, offset, masked, row, rows, key);
  }
}

template <int kVectors, typename Acc>
void mass_of_blocks(const ExponentTile<Acc>& tile, const Acc* offset, int64_t q_block, Acc* mass, int64_t stride) {
  if (tile.first) sum_blocks<kVectors, true>(tile, offset, q_block, mass, stride);
  else sum_blocks<kVectors, false>(tile, offset, q_block, mass, stride);
}

template <typename Acc>
void mass_of_tile(const ExponentTile<Acc>& tile, const Acc* offset, int64_t q_block, int64_t k_block, Acc* mass,
                  int64_t stride) {
  switch (k_block) {
    case 16: return mass_of_blocks<1>(tile, offset, q_block, mass, stride);
    case 32: return mass_of_blocks<2>(tile, offset, q_block, mass, stride);
    case 64: return mass_of_blocks<4>(tile, offset, q_block, mass, stride);
    default: return mass_of_blocks<8>(tile, offset, q_block, mass, stride);
  }
}

// Each lane keeps its own maximum, so that nothing is summed across lanes before the end.
template <bool kMasked, typename Acc>
void add_rows(const ExponentTile<Acc>& tile, const uint8_t* kept, const ShareRows<Acc>& sums) {
  using V = Vec<Acc>;
  constexpr Acc kHidden = -std::numeric_limits<Acc>::infinity();
  constexpr int kMost = kLogitKeys / kLanes;
  uint32_t masked[kMost];
  if constexpr (kMasked) key_bits(tile, masked);
  const int count = static_cast<int>((tile.keys + kLanes - 1) / kLanes);
  for (int64_t r = 0; r < tile.rows; ++r) {
    if (kMasked && tile.first[r] >= tile.last[r]) continue;
    const Acc* products = tile.products + r * tile.stride;
    const V factor = V::fill(tile.factor[r]), before = V::get(sums.most + r * kLanes);
    const uint32_t chosen = kept[r / sums.q_block];
    V x[kMost], most = before;
    for (int v = 0; v < count; ++v) {
      x[v] = V::get(products + v * kLanes) * factor;
      if constexpr (kMasked) x[v] = V::choose(visible_bits(tile, masked, r, v * kLanes), x[v], V::fill(kHidden));
      most = V::max(x[v], most);
    }
    const V rest = exp2(before - most);
    V total = V::get(sums.total + r * kLanes) * rest, own_share = V::get(sums.kept + r * kLanes) * rest;
    for (int v = 0; v < count; ++v) {
      const V e = exp2(x[v] - most);
      total = total + e;
      own_share = own_share + e.keep(chosen >> v & 1 ? 0xFFFF : 0);
    }
    most.put(sums.most + r * kLanes);
    total.put(sums.total + r * kLanes);
    own_share.put(sums.kept + r * kLanes);
  }
}

template <typename Acc>
void add_shares(const ExponentTile<Acc>& tile, const uint8_t* kept, const ShareRows<Acc>& sums) {
  if (tile.first) add_rows<true>(tile, kept, sums);
  else add_rows<false>(tile, kept, sums);
}

template <typename Acc>
void finish_shares(const ShareRows<Acc>& sums, int64_t rows, Acc* recall) {
  using V = Vec<Acc>;
  for (int64_t r = 0; r < rows; ++r) {
    const V most = V::get(sums.most + r * kLanes), weight = exp2(most - V::fill(most.greatest()));
    const V total = V::get(sums.total + r * kLanes) * weight, kept = V::get(sums.kept + r * kLanes) * weight;
    recall[r] = share(kept.sum(), total.sum());
  }
}

template <typename Acc>
constexpr MassKernels<Acc> mass_table() {
  return {&mass_of_tile<Acc>, &add_shares<Acc>, &finish_shares<Acc>};
}
