// The kernels of compressed N:M weights on the host shim against loops over the elements of each group.
#include "cuda_shim.h"

#include "cuda/nm_packed.cuh"
#include "cuda_test.h"

#include <vector>

using namespace pyrx;
using namespace pyrx::cuda;

namespace {

// Bits (rows, ceil(columns / 8)) that keep at most `most` of each group, or more of some where `over`.
std::vector<uint8_t> mask_of(int64_t rows, int64_t columns, int m, int most, bool full, bool over) {
  const int64_t row_bytes = (columns + 7) / 8;
  std::vector<uint8_t> bits(rows * row_bytes);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t first = 0; first < columns; first += m) {
      const uint64_t group = r * columns + first;
      const int count = full ? most : static_cast<int>(lane_of(1, group, 0) % (most + 1));
      int kept = over && group % 3 == 0 ? -1 : 0;
      for (int tried = 0; kept < count && tried < 64 * m; ++tried) {
        const int64_t at = first + lane_of(2, group, tried) % m;
        uint8_t& byte = bits[r * row_bytes + at / 8];
        kept += !(byte >> at % 8 & 1);
        byte |= static_cast<uint8_t>(1 << at % 8);
      }
    }
  return bits;
}

template <typename T>
void test_shape(int64_t rows, int64_t row_groups, int n, int m, bool full, bool over, unsigned blocks, int64_t offset) {
  const int64_t columns = row_groups * m, row_bytes = (columns + 7) / 8, groups = rows * row_groups;
  const std::vector<uint8_t> bits = mask_of(rows, columns, m, n, full, over && n < m);
  const auto keeps = [&](int64_t group, int i) {
    const int64_t row = group / row_groups, column = group % row_groups * m + i;
    return bits[row * row_bytes + column / 8] >> column % 8 & 1;
  };
  Buffer<T> weight(groups * m, offset), values(groups * n, offset), dense(groups * m, offset);
  Buffer<uint8_t> indices(groups * n), mask(rows * row_bytes);
  std::copy(bits.begin(), bits.end(), mask.data());
  for (int64_t i = 0; i < groups * m; ++i)
    if (i % 11 != 5) weight[i] = narrow<T>(Acc<T>(i % 7 == 3 ? -0.0 : normal(i)));  // the others are a NaN of all bits
  const T zero = narrow<T>(0);
  // two elements that take one slot are told from the order of their threads
  for (const shim::Order order : {shim::Order::kForward, shim::Order::kBackward}) {
    shim::order = order;
    shim::launch(nm_compress_kernel<T>, {blocks}, {kPackedThreads}, 0, weight.data(), mask.data(), groups, row_groups,
                 row_bytes, n, m, values.data(), indices.data());
    for (int64_t g = 0; g < groups; ++g) {
      int total = 0;
      for (int i = 0; i < m; ++i) total += keeps(g, i);
      int missing = std::max(0, n - total), place = 0;
      for (int i = 0; i < m; ++i) {
        if (!keeps(g, i) && missing-- <= 0) continue;
        if (place == n) break;
        CHECK_EQUAL(indices[g * n + place], i, "%d:%d, group %lld, place %d", n, m, (long long)g, place);
        const T own = keeps(g, i) ? weight[g * m + i] : zero;
        CHECK(same_bits(values[g * n + place], own), "%d:%d, value %d of group %lld", n, m, place, (long long)g);
        ++place;
      }
      CHECK_EQUAL(place, n, "%d:%d, group %lld", n, m, (long long)g);
    }
  }
  std::vector<T> expected(groups * m, zero);
  for (int64_t k = 0; k < groups * n; ++k) {
    if (k % 13 == 4) indices[k] = static_cast<uint8_t>(m + k % (256 - m));  // which is not there
    if (indices[k] < m) expected[k / n * m + indices[k]] = values[k];
  }
  for (const shim::Order order : {shim::Order::kForward, shim::Order::kWarpByWarp, shim::Order::kShuffled}) {
    shim::order = order;
    std::memset(dense.data(), 0xFF, groups * m * sizeof(T));
    shim::launch(nm_decompress_kernel<T>, {blocks}, {kPackedThreads}, 0, values.data(), indices.data(), groups, n, m,
                 offset == 0, dense.data());
    for (int64_t i = 0; i < groups * m; ++i)
      CHECK(same_bits(dense[i], expected[i]), "%d:%d, dense element %lld", n, m, (long long)i);
  }
  shim::order = shim::Order::kForward;
}

template <typename T>
void test_type() {
  const int ratios[][2] = {{2, 4},  {1, 4},  {1, 1},  {3, 3},    {1, 8},     {2, 16},   {3, 5},   {5, 13},
                           {7, 63}, {9, 64}, {3, 65}, {50, 100}, {127, 127}, {64, 128}, {1, 128}, {128, 128}};
  for (const auto& [n, m] : ratios)
    for (const bool full : {true, false}) {
      test_shape<T>(3, 2, n, m, full, false, 2, 0);
      test_shape<T>(2, 3, n, m, full, true, 1, 1);
    }
  test_shape<T>(5, 301, 2, 4, false, false, 2, 0);
  test_shape<T>(1, 5000, 1, 2, false, false, 3, 0);
}

void test_masks() {
  for (int m = 1; m <= kMostGroup; ++m)
    for (const int64_t first : {0, 1, 7, 8, 13}) {
      std::vector<uint8_t> bits((first + m + 7) / 8);
      for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint8_t>(lane_of(9, i + m, 0));
      const GroupMask mask = group_mask(bits.data(), first, m);
      int before = 0;
      for (int i = 0; i < 128; ++i) {
        const bool expected = i < m && bits[(first + i) / 8] >> (first + i) % 8 & 1;
        CHECK_EQUAL(mask.keeps(i), expected, "bit %d of %d from %lld", i, m, (long long)first);
        CHECK_EQUAL(kept_before(mask, i), before, "bits before %d of %d", i, m);
        before += expected;
      }
      CHECK_EQUAL(count_ones(mask), before, "bits of %d", m);
      CHECK_EQUAL(kept_before(mask, 128), before, "bits of %d", m);
    }
}

}  // namespace

int main() {
  test_masks();
  test_type<float>();
  test_type<double>();
  test_type<__half>();
  test_type<__nv_bfloat16>();
  return report("kernels of compressed N:M weights");
}
