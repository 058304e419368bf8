// Compressed N:M weights: of each group of M elements N values and their positions, ascending. No torch headers.
#pragma once

#include "kernels/nm_sparsity.h"

namespace pyrx {

// The mask of one group: element i is bit i of the 128.
struct GroupMask {
  uint64_t low, high;

  PYRX_HOST_DEVICE bool keeps(int i) const { return (i < 64 ? low >> i : high >> (i - 64)) & 1; }
};

PYRX_HOST_DEVICE int count_ones(uint64_t x) {
#if defined(__CUDA_ARCH__)
  return __popcll(x);
#else
  return __builtin_popcountll(x);
#endif
}

PYRX_HOST_DEVICE int count_ones(const GroupMask& mask) { return count_ones(mask.low) + count_ones(mask.high); }

// How many of the elements before i are kept, 0 <= i <= 128.
PYRX_HOST_DEVICE int kept_before(const GroupMask& mask, int i) {
  if (i == 128) return count_ones(mask);
  const uint64_t before = (1ull << i % 64) - 1;
  return i < 64 ? count_ones(mask.low & before) : count_ones(mask.low) + count_ones(mask.high & before);
}

// Bits first .. first + m - 1 of a row of bits.
PYRX_HOST_DEVICE GroupMask group_mask(const uint8_t* bits, int64_t first, int m) {
  GroupMask mask{0, 0};
  const int64_t end = first + m;
  for (int64_t at = first; at < end;) {
    const int shift = static_cast<int>(at % 8), left = static_cast<int>(end - at);
    const int count = left < 8 - shift ? left : 8 - shift;
    const uint64_t piece = (bits[at / 8] >> shift) & ((1u << count) - 1);
    const int place = static_cast<int>(at - first);
    if (place < 64) mask.low |= piece << place;
    if (place >= 64) mask.high |= piece << (place - 64);
    else if (place + count > 64) mask.high |= piece >> (64 - place);
    at += count;
  }
  return mask;
}

struct Slot {
  int place;  // among the group's N; negative: not stored
  bool kept;  // else its value is 0
};

// Where element i of a group is stored: the kept ones are, and of a group that keeps fewer than n the lowest others. Of
// one that keeps more, whose mask is at fault, the lowest n.
PYRX_HOST_DEVICE Slot slot_of(const GroupMask& mask, int i, int n) {
  const int before = kept_before(mask, i), gaps = i - before, total = count_ones(mask);
  const int missing = total < n ? n - total : 0;
  const bool kept = mask.keeps(i), stored = kept || gaps < missing;
  const int place = before + (gaps < missing ? gaps : missing);
  return {stored && place < n ? place : -1, kept};
}

}  // namespace pyrx
