// Transposable N:M sparsity: of each M x M tile at most N elements of every row and of every column are kept.
#pragma once

#include <cmath>

#include "kernels/nm_sparsity.h"

namespace pyrx {

constexpr int kExactTile = 4;  // M of the exact search, whose N is 2

// What infinity counts as in the exact search, and NaN, which no sum of others reaches.
template <typename E>
struct TileBounds;
template <>
struct TileBounds<float> {
  static constexpr float most = 0x1p120f, nan = 0x1p124f;
};
template <>
struct TileBounds<double> {
  static constexpr double most = 0x1p1000, nan = 0x1p1004;
};

// What the exact search adds up.
template <typename A>
PYRX_HOST_DEVICE A tile_value(A score, bool magnitude) {
  constexpr A most = TileBounds<A>::most, nan = TileBounds<A>::nan;
  const A value = std::fmin(magnitude ? std::fabs(score) : std::fmax(score, -most), most);
  return score == score ? value : nan;
}

// Pairs of columns: (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3). The columns that pair p does not have are 5 - p.
constexpr int pair_index(int a, int b) {
  const int low = a < b ? a : b, high = a < b ? b : a;
  return low == 0 ? high - 1 : low + high;
}
constexpr int pair_bits(int pair) { return 0xCA6953 >> 4 * pair & 15; }

// The bits of rows `row` and row + 1 of a tile that keep these pairs.
constexpr int rows_bits(int row, int first, int second) { return (pair_bits(first) | pair_bits(second) << 4) << 4 * row; }

#include "kernels/nm_transposable.inl"

// Four bits as four bytes, the lowest first.
PYRX_HOST_DEVICE uint32_t bytes_of_row(uint32_t bits) { return bits * 0x00204081u & 0x01010101u; }

}  // namespace pyrx
