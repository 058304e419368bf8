// The CPU kernels of block_pool of every instruction set this machine has, against the definition in double.
#include "cpu/block_pool_simd.cpp"
#include "cpu_test.h"
#include "pool_formula.h"

namespace {

using namespace pyrx;
using namespace pyrx::cpu;

template <typename T>
void test_pool(const char* set, const PoolKernels<T>& kernels) {
  using A = accumulate_t<T>;
  const double tolerance = sizeof(A) == 8 ? 1e-14 : 2e-6;
  for (const int64_t size : {1, 3, 15, 16, 17, 63, 64, 100, 256})
    for (const int64_t count : {1, 2, 15, 16, 17, 33, 128})
      for (const bool centred : {false, true}) {
        const int64_t stride = size + (count % 2 == 0 ? 5 : 0);
        Buffer<T> x((count - 1) * stride + size, 1);  // between the tokens NaN
        Buffer<A> mean(size), means(size), directions(size);
        for (int64_t t = 0; t < count; ++t)
          for (int64_t i = 0; i < size; ++i)
            x[t * stride + i] = plain::narrow<T>(A(t % 7 == 3 ? 0 : normal(t * 1000 + i) + 0.5));
        for (int64_t i = 0; i < size; ++i) mean[i] = A(normal(i + 77));
        const A got = kernels.pool(x.data(), stride, count, size, centred ? mean.data() : nullptr, means.data(),
                                   directions.data());
        const PoolAnswer expected = pooled(count, size, [&](int64_t t, int64_t i) {
          return double(plain::widen(x[t * stride + i])) - (centred ? double(mean[i]) : 0);
        });
        CHECK(std::abs(got - expected.similarity) <= tolerance, "%s: similarity %g of %lld x %lld, expected %g", set,
              double(got), (long long)count, (long long)size, expected.similarity);
        for (int64_t i = 0; i < size; ++i)
          CHECK(std::abs(means[i] - expected.mean[i]) <= tolerance, "%s: mean %lld of %lld x %lld", set, (long long)i,
                (long long)count, (long long)size);
      }
}

template <typename T>
void test_not_finite(const char* set, const PoolKernels<T>& kernels) {
  using A = accumulate_t<T>;
  const int64_t size = 20, count = 5;
  for (const double bad : {double(NAN), double(INFINITY)}) {
    Buffer<T> x(count * size);
    Buffer<A> means(size), directions(size);
    for (int64_t i = 0; i < x.size(); ++i) x[i] = plain::narrow<T>(A(normal(i)));
    x[2 * size + 18] = plain::narrow<T>(A(bad));
    const A got = kernels.pool(x.data(), size, count, size, nullptr, means.data(), directions.data());
    CHECK(got != got, "%s: similarity of a token of %g", set, bad);
    for (int64_t i = 0; i < size; ++i)
      CHECK(i == 18 ? !std::isfinite(double(means[i])) : std::isfinite(double(means[i])), "%s: mean %lld beside %g", set,
            (long long)i, bad);
  }
}

#define TEST_SET(set)                                      \
  {                                                        \
    test_pool<float>(#set, set::pool_table<float>());       \
    test_pool<double>(#set, set::pool_table<double>());     \
    test_pool<bfloat16>(#set, set::pool_table<bfloat16>()); \
    test_pool<float16>(#set, set::pool_table<float16>());   \
    test_not_finite<float>(#set, set::pool_table<float>()); \
    test_not_finite<bfloat16>(#set, set::pool_table<bfloat16>()); \
  }

}  // namespace

int main() {
  FOR_EACH_SET(TEST_SET)
  return report("block pool, CPU kernels");
}
