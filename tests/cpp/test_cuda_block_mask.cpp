// The kernels of block lists and of block selection on the host shim, against loops and a stable sort of a row.
#include "cuda_shim.h"

#include "cuda/block_mask.cuh"
#include "cuda_test.h"

#include <functional>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <vector>

using namespace pyrx;
using namespace pyrx::cuda;

namespace {

bool coin(uint64_t i, double probability) { return lane_of(31, i, 0) < 65536 * probability; }

void test_lists(const BlockGrid& grid, double density, unsigned blocks) {
  const int64_t size = grid.rows * grid.columns;
  const Buffer<uint8_t> from(grid.masks * size);
  for (int64_t i = 0; i < from.size(); ++i) from[i] = coin(i, density);
  const Buffer<int32_t> kv_counts(grid.masks * grid.rows), kv_indices(grid.masks * grid.rows * grid.kv_width);
  const Buffer<int32_t> q_counts(grid.masks * grid.columns), q_indices(grid.masks * grid.columns * grid.q_width);
  shim::launch(block_lists_kernel, {blocks}, {unsigned(kListThreads)}, 0, from.data(), grid,
               ListOutput{kv_counts.data(), kv_indices.data(), q_counts.data(), q_indices.data()});
  const auto check = [&](const char* side, int64_t lists, int64_t length, int64_t width, const int32_t* counts,
                         const int32_t* indices, auto set) {
    for (int64_t list = 0; list < grid.masks * lists; ++list) {
      std::vector<int32_t> expected;
      for (int64_t i = 0; i < length; ++i)
        if (set(list / lists, list % lists, i)) expected.push_back(int32_t(i));
      expected.resize(std::min<int64_t>(width, expected.size()));
      CHECK_EQUAL(counts[list], int32_t(expected.size()), "%s list %lld of %lld x %lld", side, (long long)list,
                  (long long)grid.rows, (long long)grid.columns);
      expected.resize(width, 0);
      for (int64_t i = 0; i < width; ++i)
        CHECK_EQUAL(indices[list * width + i], expected[i], "%s list %lld, entry %lld", side, (long long)list,
                    (long long)i);
    }
  };
  check("kv", grid.rows, grid.columns, grid.kv_width, kv_counts.data(), kv_indices.data(),
        [&](int64_t mask, int64_t row, int64_t i) { return from[mask * size + row * grid.columns + i]; });
  check("q", grid.columns, grid.rows, grid.q_width, q_counts.data(), q_indices.data(),
        [&](int64_t mask, int64_t column, int64_t i) { return from[mask * size + i * grid.columns + column]; });
}

enum Kind { kNormal, kTies, kSpecial, kProbabilities, kHidden };

float score_at(Kind kind, int64_t i) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float specials[] = {0.0f, -0.0f, infinity, -infinity, NAN, -NAN, 1e-42f, 0x1p-36f, 0x1p-37f, 1024.0f, 1025.0f};
  switch (kind) {
    case kNormal: return float(normal(i));
    case kTies: return float(std::round(normal(i))) / 4;
    case kSpecial: return coin(i + 1, 0.5) ? specials[lane_of(32, i, 0) % 11] : float(normal(i));
    case kProbabilities: return float(std::exp(4 * normal(i))) * 0x1p-10f;
    default: return -infinity;
  }
}

struct Select {
  unsigned blocks, threads;
  int64_t columns;
};

template <int kItems, bool kBlock, bool kMass>
void test_select(const Select& launch, Kind kind, double share) {
  constexpr int64_t batch = 2, heads = 2, q_blocks = 3;
  const int64_t count = batch * heads * q_blocks, columns = launch.columns;
  const Buffer<float> scores(count * columns);
  for (int64_t i = 0; i < scores.size(); ++i) scores[i] = score_at(kind, i);
  const Buffer<int32_t> wanted(heads * q_blocks);  // of every batch entry
  for (int64_t i = 0; i < wanted.size(); ++i) wanted[i] = int32_t(std::lround(share * columns)) + int32_t(i) - 2;
  const Buffer<uint8_t> always(batch * columns);  // of every head and row
  for (int64_t i = 0; i < always.size(); ++i) always[i] = coin(1000 + i, 0.1);
  for (const bool forced : {false, true}) {
    const Buffer<uint8_t> out(count * columns);
    SelectRows rows{count, heads, q_blocks, columns, share};
    if (!kMass) rows.wanted = wanted.data(), rows.wanted_head = q_blocks, rows.wanted_row = 1;
    if (forced) rows.always = always.data(), rows.always_batch = columns, rows.always_column = 1;
    shim::launch(select_blocks_kernel<kItems, kBlock, kMass>, {launch.blocks}, {launch.threads}, 0, scores.data(),
                 out.data(), rows);
    for (int64_t row = 0; row < count; ++row) {
      const float* own = scores.data() + row * columns;
      std::vector<int64_t> order(columns);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return std::isnan(own[a]) ? !std::isnan(own[b]) : own[a] > own[b];
      });
      int64_t keep = kMass ? 0 : wanted[row % (heads * q_blocks)];
      if (kMass) {
        const auto units = [&](int64_t i) {
          const double value = std::isnan(own[i]) ? 1024 : std::min(std::max(double(own[i]), 0.0), 1024.0);
          return int64_t(std::floor(value * 0x1p36));
        };
        int64_t total = 0, sum = 0;
        for (int64_t i = 0; i < columns; ++i) total += units(i);
        const int64_t limit = int64_t(std::floor(double(total) * share));
        while (keep < columns && (sum += units(order[keep])) <= limit) ++keep;
        keep = std::max<int64_t>(keep, 1);
      }
      std::vector<uint8_t> expected(columns, 0);
      for (int64_t i = 0; i < std::min(keep, columns); ++i) expected[order[i]] = own[order[i]] != -INFINITY;
      for (int64_t i = 0; i < columns; ++i) {
        if (forced) expected[i] |= always[row / (heads * q_blocks) * columns + i];
        CHECK_EQUAL(out[row * columns + i], expected[i],
                    "%d items, %s, %s, kind %d, share %g: row %lld, block %lld of %lld", kItems,
                    kBlock ? "a block" : "a warp", kMass ? "mass" : "count", kind, share, (long long)row, (long long)i,
                    (long long)columns);
      }
    }
  }
}

template <int kItems, bool kBlock>
void test_both(const Select& launch,
               std::initializer_list<Kind> kinds = {kNormal, kTies, kSpecial, kProbabilities, kHidden},
               std::initializer_list<double> shares = {0.0, 0.3, 0.5, 1.0}) {
  for (const Kind kind : kinds)
    for (const double share : shares) {
      test_select<kItems, kBlock, false>(launch, kind, share);
      test_select<kItems, kBlock, true>(launch, kind, share);
    }
}

void test_keys() {
  const float rising[] = {-INFINITY, -2, -1e-40f, 0, 1e-40f, 1, INFINITY, NAN};
  for (int i = 0; i + 1 < 8; ++i) CHECK(block_key(rising[i]) < block_key(rising[i + 1]), "score %d", i);
  for (const float score : rising) {
    const float back = score_of(block_key(score));
    CHECK(std::isnan(score) ? std::isnan(back) : back == score, "%g", score);
  }
  CHECK_EQUAL(block_key(0.0f), block_key(-0.0f), "zeros");
  CHECK_EQUAL(block_key(NAN), block_key(-NAN), "NaN");
  CHECK_EQUAL(block_key(-INFINITY), kNeverKey, "minus infinity");
  CHECK_EQUAL(score_units(NAN), uint64_t(1) << 46, "NaN");
  CHECK_EQUAL(score_units(INFINITY), uint64_t(1) << 46, "infinity");
  CHECK_EQUAL(score_units(-INFINITY), 0u, "minus infinity");
  CHECK_EQUAL(score_units(0x1.8p-36f), 1u, "rounded down");
}

// Cuts of a few neighbouring scores, where bounds fall on keys and sums meet limits.
void test_cuts() {
  for (int64_t row = 0; row < 200; ++row) {
    const int64_t n = 1 + row % 6;
    std::vector<float> scores(n);
    for (int64_t i = 0; i < n; ++i) scores[i] = 1 + (lane_of(33, 8 * row + i, 0) % 6) * 0x1p-23f;
    std::vector<uint32_t> keys(n);
    std::transform(scores.begin(), scores.end(), keys.begin(), block_key);
    const auto [low, high] = std::minmax_element(keys.begin(), keys.end());
    std::vector<float> order = scores;
    std::sort(order.begin(), order.end(), std::greater<>());
    const auto kept = [&](const BlockCut& cut) {
      int64_t ties = 0, above = 0;
      for (const uint32_t key : keys) above += key > cut.least, ties += key == cut.least;
      return above + std::min(ties, cut.ties);
    };
    const auto count_from = [&](uint32_t key) {
      return int64_t(std::count_if(keys.begin(), keys.end(), [&](uint32_t other) { return other >= key; }));
    };
    const auto sum_from = [&](uint32_t key) {
      uint64_t sum = 0;
      for (const uint32_t other : keys) sum += other >= key ? score_units(score_of(other)) : 0;
      return sum;
    };
    uint64_t sum = 0;
    const uint64_t total = sum_from(0);
    for (int64_t count = 0; count <= n; ++count) {
      CHECK_EQUAL(kept(cut_by_count(count, n, *low, *high, count_from)), count, "row %lld", (long long)row);
      for (const int shift : {-1, 0, 1}) {
        if (sum + shift > total) continue;  // sum - 1 of 0 too
        const int64_t expected = std::max<int64_t>(1, shift < 0 ? count - 1 : count);
        CHECK_EQUAL(kept(cut_by_mass(sum + shift, total, n, *low, *high, sum_from)), expected,
                    "row %lld, the units of %lld scores and %d", (long long)row, (long long)count, shift);
      }
      if (count < n) sum += score_units(order[count]);
    }
  }
}

}  // namespace

int main() {
  test_keys();
  test_cuts();
  using shim::Order;
  for (const Order order : {Order::kForward, Order::kBackward, Order::kShuffled, Order::kWarpByWarp}) {
    shim::order = order;
    for (const double density : {0.0, 0.2, 1.0}) {
      test_lists({1, 1, 1, 1, 1}, density, 2);
      test_lists({2, 9, 33, 33, 9}, density, 3);
      test_lists({3, 70, 40, 7, 5}, density, 4);
      test_lists({2, 5, 100, 0, 5}, density, 100);
      test_lists({1, 0, 40, 40, 0}, density, 1);
      test_lists({1, 4, 0, 0, 4}, density, 1);
    }
    test_both<4, false>({1, 64, 100}, {kTies, kSpecial}, {0.3});
    test_both<kBlockKeys, true>({5, 64, 70}, {kTies, kSpecial}, {0.3});
  }
  test_lists({1, 2100, 3, 3, 2100}, 0.3, 2);  // more rows than their bits are shared at a time
  test_both<4, false>({2, 256, 1});
  test_both<4, false>({2, 96, 128});
  test_both<kWarpKeys, false>({6, 64, 512});
  test_both<kWarpKeys, false>({2, 32, 33});
  test_both<kBlockKeys, true>({7, 96, 700});
  test_both<0, true>({3, 96, 300});
  test_both<0, true>({3, 32, 1});
  return report("block mask kernels");
}
