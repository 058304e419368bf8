// Means of blocks of tokens, and how alike the directions of a block's tokens are: where the tokens lie, and the
// arithmetic of one.
#pragma once

#include <cmath>

#include "kernels/dropout.h"

namespace pyrx {

struct PoolShape {
  int64_t batch, heads, tokens, size, block;
  int64_t batch_stride, head_stride, token_stride;  // of x, in elements; a token's own are side by side

  PYRX_HOST_DEVICE int64_t blocks() const { return (tokens + block - 1) / block; }
  PYRX_HOST_DEVICE int64_t items() const { return batch * heads * blocks(); }
};

// One block of one head.
struct PoolItem {
  int64_t x;       // offset of its first token
  int64_t tokens;  // as many as there are
};

// head: of batch * heads
PYRX_HOST_DEVICE PoolItem pool_item(const PoolShape& shape, int64_t head, int64_t block) {
  const int64_t first = block * shape.block, left = shape.tokens - first;
  return {head / shape.heads * shape.batch_stride + head % shape.heads * shape.head_stride + first * shape.token_stride,
          left < shape.block ? left : shape.block};
}

// What a token is multiplied with to be of length one; a zero token has no direction.
template <typename A>
PYRX_HOST_DEVICE A inverse_length(A squares) {
  return squares == 0 ? A(0) : 1 / std::sqrt(squares);
}

}  // namespace pyrx
