// Products with compressed N:M rows by every instruction set this machine has, in buffers of exactly their size, against
// sums in float64.
#include <cmath>
#include <vector>

#include "cpu/nm_simd.cpp"
#include "cpu_test.h"

namespace {

using namespace pyrx;
using namespace pyrx::cpu;

template <typename T>
struct Weight {
  Buffer<T> values;
  Buffer<uint8_t> indices;
  PackedRows<T> rows;

  Weight(int64_t count, int64_t groups, int n, int m, int64_t more)
      : values(count * (groups * n + more), 1), indices(count * (groups * n + more), 3),
        rows{values.data(), indices.data(), groups * n + more, count, groups, n, m} {
    for (int64_t i = 0; i < values.size(); ++i) {
      values[i] = plain::narrow<T>(static_cast<accumulate_t<T>>(normal(i)));
      const int place = static_cast<int>(i % rows.stride % n);
      indices[i] = static_cast<uint8_t>(place + lane_of(1, i / n, 0) % (m - n + 1));  // ascending
    }
  }

  double product(int64_t r, const std::vector<double>& x) const {
    double sum = 0;
    for (int64_t k = 0; k < rows.groups * rows.n; ++k)
      sum += value(values[r * rows.stride + k]) * x[k / rows.n * rows.m + indices[r * rows.stride + k]];
    return sum;
  }
};

template <typename Acc>
void check_near(const char* set, const char* what, const PackedRows<Acc>* of, double got, double expected, double scale) {
  const double allowed = (sizeof(Acc) == 8 ? 1e-14 : 1e-6) * (1 + scale);
  CHECK(std::abs(got - expected) <= allowed, "%s, %s of %d:%d: %g, expected %g", set, what, of->n, of->m, got, expected);
}

template <typename T>
void test_shape(const char* set, const NMPackedKernels<T>& kernels, int n, int m, int64_t rows, int64_t groups) {
  using Acc = accumulate_t<T>;
  const Weight<T> weight(rows, groups, n, m, 5);
  const int64_t columns = groups * m;
  const double scale = std::sqrt(double(groups * n)) * 4;
  const PackedRows<Acc> of{nullptr, nullptr, 0, 0, 0, n, m};
  for (int vectors = 1; vectors <= kernels.most_vectors; ++vectors) {
    const int64_t width = vectors * kPackedLanes;
    Buffer<Acc> x(columns * width, 1), sums(rows * width, 1);
    for (int64_t i = 0; i < x.size(); ++i) x[i] = static_cast<Acc>(normal(i + 77));
    for (int64_t i = 0; i < sums.size(); ++i) sums[i] = static_cast<Acc>(i % 9);
    CHECK(kernels.multiply(weight.rows, x.data(), vectors, sums.data()), "%s, multiply of %d:%d", set, n, m);
    std::vector<double> column(columns);
    for (int64_t b = 0; b < width; b += width > 16 ? 7 : 1) {
      for (int64_t c = 0; c < columns; ++c) column[c] = x[c * width + b];
      for (int64_t r = 0; r < rows; ++r)
        check_near(set, "multiply", &of, sums[r * width + b], (r * width + b) % 9 + weight.product(r, column), scale);
    }
  }
  const int most = kernels.most_dots && kernels.most_dots(n, m) ? kDotBatch : 0;
  if constexpr (sizeof(Acc) == 4)
    for (int batch = 1; batch <= most; ++batch) {
      Buffer<Acc> x((batch - 1) * (columns + 3) + columns, 1), sums(rows * batch, 1);
      for (int64_t i = 0; i < x.size(); ++i) x[i] = static_cast<Acc>(normal(i + 77));
      for (int64_t i = 0; i < sums.size(); ++i) sums[i] = static_cast<Acc>(i % 9);
      CHECK(kernels.dot(weight.rows, x.data(), columns + 3, batch, sums.data()), "%s, dot of %d:%d", set, n, m);
      for (int b = 0; b < batch; ++b) {
        const std::vector<double> row(x.data() + b * (columns + 3), x.data() + b * (columns + 3) + columns);
        for (int64_t r = 0; r < rows; ++r)
          check_near(set, "dot", &of, sums[r * batch + b], (r * batch + b) % 9 + weight.product(r, row), scale);
      }
    }
  // an index beyond its group, in every row in turn: x is not as long
  for (int64_t r = 0; r < rows && groups > 0; ++r) {
    uint8_t& last = weight.indices[r * weight.rows.stride + groups * n - 1];
    const uint8_t before = last;
    for (const int wrong : {m, 255}) {
      last = static_cast<uint8_t>(wrong);
      Buffer<Acc> x(columns * kPackedLanes, 1), sums(rows * kPackedLanes, 1);
      CHECK(!kernels.multiply(weight.rows, x.data(), 1, sums.data()), "%s, multiply of index %d of %d", set, wrong, m);
      if (most) {
        Buffer<Acc> row(columns, 1);
        CHECK(!kernels.dot(weight.rows, row.data(), columns, 1, sums.data()), "%s, dot of index %d of %d", set, wrong, m);
      }
    }
    last = before;
  }
}

template <typename T>
void test_type(const char* set, const NMPackedKernels<T>& kernels) {
  const int ratios[][2] = {{2, 4}, {1, 4},  {1, 8},  {2, 16}, {4, 8},  {1, 1},   {8, 8},   {16, 16}, {16, 32},
                           {3, 8}, {5, 13}, {8, 64}, {1, 2},  {4, 32}, {1, 128}, {100, 128}};
  for (const auto& [n, m] : ratios) {
    test_shape(set, kernels, n, m, 5, 0);
    test_shape(set, kernels, n, m, 1, 1);
    test_shape(set, kernels, n, m, 6, 9);
  }
  test_shape(set, kernels, 2, 4, 9, 70);
  test_shape(set, kernels, 1, 8, 4, 100);
  Buffer<T> from(37, 1), to(37, 1);
  Buffer<accumulate_t<T>> wide(37, 1);
  for (int64_t i = 0; i < 37; ++i) from[i] = plain::narrow<T>(static_cast<accumulate_t<T>>(normal(i)));
  kernels.widen(from.data(), 37, wide.data());
  kernels.narrow(wide.data(), 37, to.data());
  for (int64_t i = 0; i < 37; ++i) {
    CHECK_EQUAL(wide[i], value(from[i]), "%s, widened %lld", set, (long long)i);
    CHECK(same_bits(to[i], from[i]), "%s, narrowed %lld", set, (long long)i);
  }
}

#define TEST_SET(name)                                                \
  test_type<float>(#name, name::nm_packed_table<float>());            \
  test_type<double>(#name, name::nm_packed_table<double>());          \
  test_type<bfloat16>(#name, name::nm_packed_table<bfloat16>());      \
  test_type<float16>(#name, name::nm_packed_table<float16>());

}  // namespace

int main() {
  FOR_EACH_SET(TEST_SET)
  return report("products with compressed N:M rows");
}
