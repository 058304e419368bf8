// The neighbour fill's kernel on the host shim against loops written from the formula, bit for bit.
#include "cuda_shim.h"

#include "cuda/neighbor_fill.cuh"
#include "cuda_test.h"

#include <vector>

using namespace pyrx;
using namespace pyrx::cuda;

namespace {

struct Case {
  int64_t images, channels, height, width;
  int iterations, warps;
  int64_t channels_a_block;
};

// Iterated 3x3 sums over the whole plane, nine additions in order.
template <typename T>
void expected(std::vector<T>& x, std::vector<uint8_t>& m, const Case& c) {
  const int64_t plane = c.height * c.width;
  for (int t = 0; t < c.iterations; ++t) {
    const std::vector<T> before = x;
    const std::vector<uint8_t> there = m;
    for (int64_t i = 0; i < c.images * plane; ++i) {
      const int64_t image = i / plane, row = i % plane / c.width, column = i % c.width;
      if (there[i]) continue;
      for (int64_t channel = 0; channel < std::max<int64_t>(c.channels, 1); ++channel) {
        Acc<T> rows[3];
        int count = 0;
        for (int dy = -1; dy <= 1; ++dy) {
          Acc<T> values[3] = {0, 0, 0};
          for (int dx = -1; dx <= 1; ++dx) {
            const int64_t y = row + dy, z = column + dx;
            if (y < 0 || y >= c.height || z < 0 || z >= c.width || !there[image * plane + y * c.width + z]) continue;
            if (c.channels) values[dx + 1] = widen(before[(image * c.channels + channel) * plane + y * c.width + z]);
            ++count;
          }
          rows[dy + 1] = values[0] + values[1] + values[2];
        }
        if (count == 0) continue;
        m[i] = 1;
        if (c.channels)
          x[(image * c.channels + channel) * plane + i % plane] =
              narrow<T>((rows[0] + rows[1] + rows[2]) / (Acc<T>(count) + Acc<T>(1e-5)));
      }
    }
  }
}

template <typename T>
void test_fill(const Case& c, double keep, int patch) {
  const int64_t plane = c.height * c.width, n = c.images * c.channels * plane;
  Buffer<T> input(n), output(n);
  Buffer<uint8_t> mask(c.images * plane), after(c.images * plane);
  std::vector<T> x(n);
  std::vector<uint8_t> m(c.images * plane);
  for (int64_t i = 0; i < c.images * plane; ++i) {
    const int64_t cell = i / plane * 65537 + i % plane / c.width / patch * 257 + i % c.width / patch;
    m[i] = mask[i] = lane_of(9, cell, patch) < keep * 65536;
  }
  for (int64_t i = 0; i < n; ++i) {
    const bool kept = m[i / plane / c.channels * plane + i % plane];
    input[i] = narrow<T>(kept ? Acc<T>(normal(i)) : Acc<T>(NAN));
    x[i] = kept ? input[i] : narrow<T>(0);
  }
  expected(x, m, c);
  const int64_t tiles = (c.height + kFillTile - 1) / kFillTile * ((c.width + kFillTile - 1) / kFillTile) * c.images;
  const int64_t groups = std::max<int64_t>((c.channels + c.channels_a_block - 1) / c.channels_a_block, 1);
  shim::launch(neighbor_fill_kernel<T>, {unsigned(tiles * groups)}, {unsigned(c.warps * kWarp)},
               fill_shared_bytes(c.iterations, c.warps, sizeof(T)), input.data(), mask.data(), output.data(), after.data(),
               FillSizes{c.channels, c.height, c.width, c.iterations, c.channels_a_block});
  for (int64_t i = 0; i < n; ++i)
    CHECK(same_bits(output[i], x[i]), "%lldx%lld, %d iterations, keep %g, patch %d, element %lld", (long long)c.height,
          (long long)c.width, c.iterations, keep, patch, (long long)i);
  for (int64_t i = 0; i < c.images * plane; ++i)
    CHECK_EQUAL(after[i], m[i], "mask of %lldx%lld, %d iterations, place %lld", (long long)c.height, (long long)c.width,
                c.iterations, (long long)i);
}

}  // namespace

int main() {
  using shim::Order;
  const Case cases[] = {{1, 1, 1, 1, 2, 1, 1},  {2, 3, 5, 7, 3, 4, 4},    {1, 5, 33, 65, 2, 4, 4}, {1, 2, 64, 40, 8, 2, 2},
                        {2, 9, 14, 31, 6, 8, 8}, {1, 2, 70, 33, 0, 4, 4}, {1, 0, 40, 33, 3, 4, 1}, {1, 3, 37, 100, 7, 2, 2}};
  for (const Case& c : cases) {
    for (const double keep : {0.0, 0.03, 0.5, 1.0}) {
      for (const int patch : {1, 11}) {
        test_fill<float>(c, keep, patch);
        test_fill<double>(c, keep, patch);
        test_fill<__half>(c, keep, patch);
        test_fill<__nv_bfloat16>(c, keep, patch);
      }
    }
  }
  for (const Order order : {Order::kBackward, Order::kShuffled, Order::kWarpByWarp}) {
    shim::order = order;
    test_fill<float>(cases[2], 0.05, 1);
    test_fill<float>(cases[3], 0.3, 11);
  }
  return report("neighbor_fill kernel");
}
