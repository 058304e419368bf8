// Filling empty places from their neighbours: what an empty place takes, and rows of places as bits.
#pragma once

#include "kernels/dropout.h"

namespace pyrx {

// Neighbours are numbered row by row without the centre: 0 1 2 above, 3 4 beside, 5 6 7 below.
constexpr int kNeighbors = 8;

// The value of an empty place whose `count` present neighbours sum to `sum`. Every backend adds in one order: each row
// from left to right with 0 for an absent place and the centre, then the rows from top to bottom.
template <typename A>
PYRX_HOST_DEVICE A fill_value(A sum, int count) { return sum / (static_cast<A>(count) + static_cast<A>(1e-5)); }

// Places within one column of a present one; bit j of a word is column j, `left` and `right` are the words beside it.
PYRX_HOST_DEVICE uint64_t spread(uint64_t left, uint64_t word, uint64_t right) {
  return word | word << 1 | word >> 1 | left >> 63 | right << 63;
}

// Up to sixteen places of one row that are filled in the same iteration.
constexpr int kFillLanes = 16;
struct FillBlock {
  int64_t first;                    // the first place's position in the plane
  uint16_t fill;                    // bit i: place first + i is filled
  uint16_t neighbors[kNeighbors];   // bit i of [j]: it has a present neighbour j
  uint8_t counts[kFillLanes];       // its present neighbours
};

}  // namespace pyrx
