// Transposable masks of one tile by their definition: greedy in plain loops, the exact search by brute force.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <vector>

#include "cuda_test.h"

// A score of a kind that is hard to rank now and then, else one of a few values (ties) or any.
inline double score_at(uint64_t i) {
  const double kinds[] = {0.0, -0.0, INFINITY, -INFINITY, NAN, -NAN, 6e-8, -1.5};
  if (i % 7 == 3) return kinds[i / 7 % 8];
  if (i / 300 % 3 == 2) return kinds[lane_of(5, i, 0) % 5];  // tiles that cannot keep or drop all of a kind
  return i / 50 % 2 ? std::round(2 * normal(i)) : normal(i);
}

// values (m, m): elements from the highest on, where their row and column still have room.
inline std::vector<uint8_t> greedy_tile(const std::vector<double>& values, int n, int m, bool magnitude) {
  std::vector<int> order(values.size()), rows(m, n), columns(m, n);
  std::iota(order.begin(), order.end(), 0);
  const auto rank = [&](int i) { return magnitude ? std::abs(values[i]) : values[i]; };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return std::isnan(values[a]) ? !std::isnan(values[b]) : rank(a) > rank(b);
  });
  std::vector<uint8_t> kept(values.size(), 0);
  for (const int i : order)
    if (rows[i / m] > 0 && columns[i % m] > 0) {
      kept[i] = 1;
      --rows[i / m];
      --columns[i % m];
    }
  return kept;
}

// The sum of a pattern of a tile of 16 values, each addition rounded as the search rounds it.
template <typename A>
A pattern_sum(const std::vector<double>& values, unsigned pattern, bool magnitude, A most, A nan) {
  A rows[4];
  for (int r = 0; r < 4; ++r) {
    A pair[2] = {};
    for (int c = 0, k = 0; c < 4; ++c) {
      if (!(pattern >> (4 * r + c) & 1)) continue;
      const A x = static_cast<A>(values[4 * r + c]), value = magnitude ? std::abs(x) : x;
      pair[k++] = std::isnan(x) ? nan : std::min(std::max(value, -most), most);
    }
    rows[r] = pair[0] + pair[1];
  }
  return (rows[0] + rows[1]) + (rows[2] + rows[3]);
}

// The patterns that keep two of every row and column.
inline std::vector<unsigned> exact_patterns() {
  std::vector<unsigned> found;
  for (unsigned pattern = 0; pattern < 1u << 16; ++pattern) {
    bool fits = true;
    for (int i = 0; i < 4; ++i)
      fits = fits && std::popcount(pattern >> 4 * i & 15) == 2 && std::popcount(pattern >> i & 0x1111) == 2;
    if (fits) found.push_back(pattern);
  }
  return found;
}

// Whether no pattern's sum is larger than this one's, and it is one of the 90.
template <typename A>
bool is_best(const std::vector<double>& values, unsigned pattern, bool magnitude, A most, A nan) {
  static const std::vector<unsigned> patterns = exact_patterns();
  if (std::find(patterns.begin(), patterns.end(), pattern) == patterns.end()) return false;
  A best = pattern_sum(values, patterns[0], magnitude, most, nan);
  for (const unsigned each : patterns) best = std::max(best, pattern_sum(values, each, magnitude, most, nan));
  return pattern_sum(values, pattern, magnitude, most, nan) == best;
}
