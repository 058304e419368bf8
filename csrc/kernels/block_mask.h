// Which blocks of a mask are listed, and which of a row's blocks are kept by their scores.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/nm_sparsity.h"

namespace pyrx {

// Masks of (rows, columns) blocks, and at most how many of a row and of a column are listed.
struct BlockGrid {
  int64_t masks, rows, columns;
  int64_t kv_width, q_width;
};

constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;  // along either side: indices are int32

// The larger the key the earlier it ranks; equal ones by index, the lower first.
PYRX_HOST_DEVICE uint32_t block_key(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return rank_key(bits, kInfinityFloat, false);
}

constexpr uint32_t kNeverKey = 0x80000000u - kInfinityFloat;  // minus infinity's

PYRX_HOST_DEVICE float score_of(uint32_t key) {
  const uint32_t bits = key >> 31 ? key - 0x80000000u : 0x80000000u | (0x80000000u - key);
  float score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

// Of a score in [0, 1024], NaN as 1024, in steps of 2^-36: sums have the same bits in any order.
PYRX_HOST_DEVICE uint64_t score_units(float score) {
  constexpr float most = 1024.0f;
  const float value = score < most ? (score > 0.0f ? score : 0.0f) : most;
  return static_cast<uint64_t>(static_cast<int64_t>(value * 0x1p36f));
}

// The units that a row's first keys may sum to.
PYRX_HOST_DEVICE uint64_t mass_limit(uint64_t total, double mass) {
  return static_cast<uint64_t>(static_cast<int64_t>(static_cast<double>(static_cast<int64_t>(total)) * mass));
}

// What a row keeps: the keys above `least`, and of those that equal it the `ties` of the lowest index.
struct BlockCut {
  uint32_t least;
  int64_t ties;
};

// The `count` first of `size` keys in [low, high]; count_from(key) tells how many are at least that.
template <typename CountFrom>
PYRX_HOST_DEVICE BlockCut cut_by_count(int64_t count, int64_t size, uint32_t low, uint32_t high, CountFrom count_from) {
  if (count <= 0) return {~uint32_t(0), 0};
  if (count >= size) return {low, size};
  int64_t above = 0;  // count_from(end) < count <= count_from(low)
  uint32_t end = high + 1;
  while (end - low > 1) {
    const uint32_t middle = low + (end - low) / 2;
    const int64_t found = count_from(middle);
    if (found == count) return {middle, size};
    if (found > count) {
      low = middle;
    } else {
      end = middle;
      above = found;
    }
  }
  return {low, count - above};
}

// The longest run of first keys whose units sum to at most `limit`, at least one; sum_from(key) is of those that are at
// least that, `total` of all of them.
template <typename SumFrom>
PYRX_HOST_DEVICE BlockCut cut_by_mass(uint64_t limit, uint64_t total, int64_t size, uint32_t low, uint32_t high,
                                      SumFrom sum_from) {
  if (total <= limit) return {low, size};
  uint64_t within = total, above = 0;  // sum_from(low) > limit >= sum_from(end)
  uint32_t end = high + 1;
  // keys in [low, end) have the units of low or more: below twice that there is one key, and it is not kept
  while (end - low > 1 && within - above >= 2 * score_units(score_of(low))) {
    const uint32_t middle = low + (end - low) / 2;
    const uint64_t found = sum_from(middle);
    if (found > limit) {
      low = middle;
      within = found;
    } else {
      end = middle;
      above = found;
    }
  }
  BlockCut cut{end, size};
  if (end - low == 1) cut = {low, static_cast<int64_t>((limit - above) / score_units(score_of(low)))};
  return cut.least > high || (cut.least == high && cut.ties == 0) ? BlockCut{high, 1} : cut;
}

}  // namespace pyrx
