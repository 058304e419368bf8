// N:M sparsity: of each group of M elements the N of the highest rank are kept. No torch headers.
#pragma once

#include "kernels/dropout.h"

namespace pyrx {

constexpr int kMostGroup = 128;  // the largest M

struct NM {
  int n, m;
  bool magnitude;  // ranked by absolute value, else as they are
};

// Bits of positive infinity, which tell the formats apart.
constexpr uint16_t kInfinityHalf = 0x7C00, kInfinityBFloat16 = 0x7F80;
constexpr uint32_t kInfinityFloat = 0x7F800000u;
constexpr uint64_t kInfinityDouble = 0x7FF0000000000000ull;

// An unsigned integer of a float's size that orders as scores rank: zeros are equal, NaN of any sign and payload is one
// value above infinity. Equal keys rank by their index, the lower first.
template <typename U>
PYRX_HOST_DEVICE U rank_key(U bits, U infinity, bool magnitude) {
  constexpr U sign = static_cast<U>(U(1) << (8 * sizeof(U) - 1));
  U absolute = static_cast<U>(bits & static_cast<U>(sign - 1));
  if (absolute > infinity) absolute = static_cast<U>(infinity + 1);
  if (magnitude) return absolute;
  return static_cast<U>(bits & sign && absolute <= infinity ? sign - absolute : sign + absolute);
}

// Below or equal to every score's key: what pads a group that is not full. It has the higher index, so it never wins.
template <typename U>
constexpr U kPadKey = 0;

// What becomes of the elements that are not kept.
enum Dropped : int64_t {
  kZero,      // 0, whatever they were
  kFactor,    // times a factor (MDGF)
  kRegularize // plus strength times their weight (SR-STE's gradient)
};

}  // namespace pyrx
