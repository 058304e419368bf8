// Attention mass of blocks and the share of it that a mask keeps: tiles of logits to sums of their exponentials.
#pragma once

#include <cstdint>

#include "kernels/dropout.h"

namespace pyrx {

// A tile of logits in base 2: x = product * factor - offset, of which 2^x is summed. At most 128 keys.
template <typename Acc>
struct ExponentTile {
  int64_t rows, keys;
  const Acc* products;  // (rows, keys) in rows of `stride`, readable up to a multiple of sixteen keys
  int64_t stride;
  const Acc* factor;  // (rows,) log2(e) times what makes a product a logit
  // (rows,) the keys first .. last - 1 are visible; null: all are, which are a multiple of sixteen then
  const int32_t *first, *last;
  const uint8_t* key_mask;  // (keys,) bytes, 0 where nobody sees the key; null: all are seen; unread where `first` is null
};

// What part of a total was kept; of nothing all of it is.
template <typename Acc>
PYRX_HOST_DEVICE Acc share(Acc kept, Acc total) {
  return total == 0 ? Acc(1) : kept / total;
}

}  // namespace pyrx
