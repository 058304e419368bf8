// Means of blocks of tokens. Included by block_pool_simd.cpp once for each instruction set, inside that set's namespace.
#include "cpu/vec.inl"

// Tokens whose lengths are taken before any is added: they stay in the first-level cache meanwhile.
constexpr int kPoolTokens = kLanes;

template <bool kCentred, typename T>
accumulate_t<T> pool_tokens(const T* x, int64_t stride, int64_t count, int64_t size, const accumulate_t<T>* mean,
                            accumulate_t<T>* means, accumulate_t<T>* directions) {
  using Acc = accumulate_t<T>;
  using V = Vec<Acc>;
  const auto values = [&](const T* token, int64_t i, auto n) {
    if constexpr (kCentred) return load(token + i, n) - load(mean + i, n);
    else return load(token + i, n);
  };
  for (int64_t first = 0; first < count; first += kPoolTokens, x += kPoolTokens * stride) {
    const int tokens = static_cast<int>(std::min<int64_t>(kPoolTokens, count - first));
    Acc scale[kPoolTokens];
    for (int t = 0; t < tokens; ++t) {
      V squares = V::fill(0);
      blocks(size, [&](int64_t i, auto n) {
        const V v = values(x + t * stride, i, n);
        squares = V::multiply_add(v, v, squares);
      });
      scale[t] = squares.sum();
    }
    for (int t = 0; t < tokens; ++t) scale[t] = inverse_length(scale[t]);
    blocks(size, [&](int64_t i, auto n) {
      V sum = V::fill(0), direction = sum;
      for (int t = 0; t < tokens; ++t) {
        const V v = values(x + t * stride, i, n);
        sum = sum + v;
        direction = V::multiply_add(v, V::fill(scale[t]), direction);
      }
      store(means + i, first == 0 ? sum : load(means + i, n) + sum, n);
      store(directions + i, first == 0 ? direction : load(directions + i, n) + direction, n);
    });
  }
  const Acc share = Acc(1) / static_cast<Acc>(count);
  V squares = V::fill(0);
  blocks(size, [&](int64_t i, auto n) {
    store(means + i, load(means + i, n) * V::fill(share), n);
    const V direction = load(directions + i, n) * V::fill(share);
    squares = V::multiply_add(direction, direction, squares);
  });
  return squares.sum();
}

template <typename T>
accumulate_t<T> pool(const T* x, int64_t stride, int64_t count, int64_t size, const accumulate_t<T>* mean,
                     accumulate_t<T>* means, accumulate_t<T>* directions) {
  return mean ? pool_tokens<true>(x, stride, count, size, mean, means, directions)
              : pool_tokens<false>(x, stride, count, size, mean, means, directions);
}

template <typename T>
constexpr PoolKernels<T> pool_table() {
  return {&pool<T>};
}
