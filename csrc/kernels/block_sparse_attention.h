// Attention over listed blocks: shapes, and which keys a query sees.
#pragma once

#include <cstdint>

#include "kernels/dropout.h"

namespace pyrx {

struct AttentionShape {
  int64_t batch, heads, kv_heads, queries, keys;
  int64_t size, value_size;  // of a head of queries and keys, and of values
  int64_t q_block, k_block;

  PYRX_HOST_DEVICE int64_t q_blocks() const { return (queries + q_block - 1) / q_block; }
  PYRX_HOST_DEVICE int64_t k_blocks() const { return (keys + k_block - 1) / k_block; }
  // query heads that share a head of keys
  PYRX_HOST_DEVICE int64_t group() const { return heads / kv_heads; }
  // logical index of a weight, which the dropout's mask goes by
  PYRX_HOST_DEVICE uint64_t index(int64_t b, int64_t h, int64_t q, int64_t k) const {
    return static_cast<uint64_t>(((b * heads + h) * queries + q) * keys + k);
  }
};

// Keys first .. last - 1.
struct KeyRange {
  int64_t first, last;
  PYRX_HOST_DEVICE bool empty() const { return first >= last; }
  PYRX_HOST_DEVICE KeyRange operator&(const KeyRange& other) const {
    return {first > other.first ? first : other.first, last < other.last ? last : other.last};
  }
};

// Which keys a query sees, but for key_mask and the blocks: pyrx/_attention.py.
struct KeyRules {
  int64_t left, right;   // -1: no limit
  const int32_t* range;  // (B or 1, Sq, 2) or null
  int64_t range_stride;  // of a batch entry, 0 where there is one
  int64_t keys;

  PYRX_HOST_DEVICE KeyRange of(int64_t b, int64_t q) const {
    KeyRange found{0, keys};
    if (left >= 0) found = found & KeyRange{q - left, keys};
    if (right >= 0) found = found & KeyRange{0, right < keys - q ? q + right + 1 : keys};  // none overflows
    if (range != nullptr) {
      const int32_t* own = range + b * range_stride + 2 * q;
      found = found & KeyRange{own[0], own[1]};
    }
    return found;
  }
};

// A bias of the logits: row[k / columns] + column[k % columns], or row[k] where there are no columns. Strides in elements,
// 0 where a dimension is one; rows of keys are contiguous.
template <typename T>
struct KeyBias {
  const T* row;     // (B or 1, H or 1, Sq, keys / columns) or null: no bias
  const T* column;  // (B or 1, H or 1, Sq, columns) or null: columns is 1
  int64_t columns;
  int64_t row_batch, row_head, row_query, column_batch, column_head, column_query;

  PYRX_HOST_DEVICE const T* row_of(int64_t b, int64_t h, int64_t q) const {
    return row + b * row_batch + h * row_head + q * row_query;
  }
  PYRX_HOST_DEVICE const T* column_of(int64_t b, int64_t h, int64_t q) const {
    return column + b * column_batch + h * column_head + q * column_query;
  }
};

}  // namespace pyrx
