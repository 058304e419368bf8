// The block_pool kernel on the host shim against the definition in double.
#include "cuda_shim.h"

#include "cuda/block_pool.cuh"
#include "cuda_test.h"
#include "pool_formula.h"

using namespace pyrx;
using namespace pyrx::cuda;

namespace {

struct Case {
  int64_t tokens, size, block;
};

template <typename T>
void test_pool(const Case& c, bool interleaved, bool centred, unsigned grid, int64_t offset) {
  using A = Acc<T>;
  const double tolerance = sizeof(A) == 8 ? 1e-14 : 2e-6;
  const int64_t batch = 2, heads = 2, size = c.size, pad = interleaved ? 0 : 8;  // between rows NaN
  PoolShape shape{batch, heads, c.tokens, size, c.block, 0, 0, 0};
  shape.token_stride = interleaved ? heads * size : size + pad;
  shape.head_stride = interleaved ? size : c.tokens * (size + pad);
  shape.batch_stride = heads * c.tokens * (size + pad);
  const auto at = [&](int64_t head, int64_t t) {
    return head / heads * shape.batch_stride + head % heads * shape.head_stride + t * shape.token_stride;
  };
  Buffer<T> x(batch * shape.batch_stride, offset);
  Buffer<A> mean(batch * heads * size), means(shape.items() * size, offset), similarity(shape.items(), offset);
  for (int64_t head = 0; head < batch * heads; ++head)
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t i = 0; i < size; ++i)
        x[at(head, t) + i] = narrow<T>(A(t % 7 == 3 ? 0 : normal((head * c.tokens + t) * size + i) + 0.5));
  for (int64_t i = 0; i < mean.size(); ++i) mean[i] = A(normal(i + 100000));
  std::vector<PoolAnswer> answers;
  for (int64_t item = 0; item < shape.items(); ++item) {
    const int64_t head = item / shape.blocks(), first = item % shape.blocks() * c.block;
    answers.push_back(pooled(std::min(c.block, c.tokens - first), size, [&](int64_t t, int64_t i) {
      return double(widen(x[at(head, first + t) + i])) - (centred ? double(mean[head * size + i]) : 0);
    }));
  }
  const bool whole = offset == 0 && size % kGroup == 0;
  for (const bool aligned : {false, whole}) {
    shim::launch(block_pool_kernel<T>, {grid}, {unsigned(pool_threads(shape))}, 0, x.data(),
                 centred ? mean.data() : nullptr, shape, pool_lanes(size), aligned, means.data(), similarity.data());
    for (int64_t item = 0; item < shape.items(); ++item) {
      const PoolAnswer& expected = answers[item];
      CHECK(std::abs(similarity[item] - expected.similarity) <= tolerance, "similarity %g of item %lld, expected %g",
            double(similarity[item]), (long long)item, expected.similarity);
      for (int64_t i = 0; i < size; ++i)
        CHECK(std::abs(means[item * size + i] - expected.mean[i]) <= tolerance, "mean %lld of item %lld, size %lld",
              (long long)i, (long long)item, (long long)size);
    }
  }
}

constexpr Case kCases[] = {{40, 8, 16}, {33, 12, 32}, {130, 40, 64}, {17, 249, 128}, {1, 1, 16}, {128, 64, 128}, {70, 100, 64},
                           {40, 256, 32}};

template <typename T>
void test_types(int cases) {
  for (int i = 0; i < cases; ++i)
    for (const bool interleaved : {false, true}) {
      test_pool<T>(kCases[i], interleaved, !interleaved, interleaved ? 3 : 100, 0);
      test_pool<T>(kCases[i], interleaved, interleaved, 1, 1);
    }
}

}  // namespace

int main() {
  using shim::Order;
  for (const Order order : {Order::kForward, Order::kBackward, Order::kShuffled, Order::kWarpByWarp}) {
    shim::order = order;
    test_types<float>(2);
  }
  shim::order = Order::kForward;
  test_types<float>(8);
  test_types<double>(8);
  test_types<__half>(8);
  test_types<__nv_bfloat16>(8);
  return report("block pool kernel");
}
