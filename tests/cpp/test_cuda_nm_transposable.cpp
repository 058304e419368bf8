// The transposable mask kernels on the host shim against their definition, one tile at a time.
#include "cuda_shim.h"

#include "cuda/nm_transposable.cuh"
#include "cuda_test.h"
#include "nm_tiles.h"

using namespace pyrx;
using namespace pyrx::cuda;

namespace {

template <typename T>
Buffer<T> scores_of(int64_t n) {
  Buffer<T> scores(n);
  for (int64_t i = 0; i < n; ++i) scores[i] = narrow<T>(static_cast<Acc<T>>(score_at(i)));
  return scores;
}

// Tile `index` of m x m of scores (rows, columns), one row of tiles after another.
template <typename T>
std::vector<double> tile_of(const T* scores, int64_t columns, int m, int64_t index) {
  const T* corner = scores + index / (columns / m) * m * columns + index % (columns / m) * m;
  std::vector<double> found;
  for (int i = 0; i < m * m; ++i) found.push_back(widen(corner[i / m * columns + i % m]));
  return found;
}

int64_t place(int64_t columns, int m, int64_t index, int i) {
  return (index / (columns / m) * m + i / m) * columns + index % (columns / m) * m + i % m;
}

template <typename T, bool kWhole>
void test_exact(int64_t rows, int64_t columns, dim3 grid, unsigned threads) {
  const Buffer<T> scores = scores_of<T>(rows * 4 * columns);
  const int64_t row_bytes = (columns + 7) / 8;
  for (const bool magnitude : {true, false}) {
    const Buffer<uint8_t> bytes(rows * 4 * columns), bits(rows * 4 * row_bytes);
    const auto kernel = nm_transposable_exact_kernel<T, kWhole>;
    shim::launch(kernel, grid, {threads}, 0, scores.data(), bytes.data(), rows, columns, magnitude, false);
    shim::launch(kernel, grid, {threads}, 0, scores.data(), bits.data(), rows, columns, magnitude, true);
    for (int64_t tile = 0; tile < rows * columns / 4; ++tile) {
      unsigned pattern = 0;
      for (int i = 0; i < 16; ++i) {
        const int64_t at = place(columns, 4, tile, i);
        CHECK(bytes[at] <= 1, "byte %lld", (long long)at);
        pattern |= unsigned(bytes[at]) << i;
        const int bit = bits[at / columns * row_bytes + at % columns / 8] >> at % columns % 8 & 1;
        CHECK_EQUAL(bit, int(bytes[at]), "bit %d of tile %lld", i, (long long)tile);
      }
      const std::vector<double> values = tile_of(scores.data(), columns, 4, tile);
      CHECK(is_best(values, pattern, magnitude, TileBounds<Acc<T>>::most, TileBounds<Acc<T>>::nan), "tile %lld of %lld columns",
            (long long)tile, (long long)columns);
    }
    if (columns % 8)
      for (int64_t row = 0; row < 4 * rows; ++row)
        CHECK_EQUAL(bits[(row + 1) * row_bytes - 1] >> 4, 0, "bits beyond row %lld", (long long)row);
  }
}

template <typename T>
void test_greedy(int n, int m, int64_t down, int64_t across, unsigned blocks, int a_block, bool staged) {
  const int64_t columns = across * m, count = down * across;
  const NM nm{n, m, (n + across) % 2 == 0};
  const Buffer<T> scores = scores_of<T>(count * m * m);
  const Buffer<uint8_t> mask(count * m * m);
  shim::launch(nm_transposable_greedy_kernel<T>, {blocks}, {unsigned(a_block * m)},
               staged ? greedy_shared_bytes(m, a_block, sizeof(T)) : 0, scores.data(), mask.data(),
               GreedyTiles{columns, count, nm, a_block, staged});
  for (int64_t tile = 0; tile < count; ++tile) {
    const std::vector<uint8_t> expected = greedy_tile(tile_of(scores.data(), columns, m, tile), n, m, nm.magnitude);
    for (int i = 0; i < m * m; ++i)
      CHECK_EQUAL(mask[place(columns, m, tile, i)], expected[i], "%d:%d, element %d of tile %lld of %lld", n, m, i,
                  (long long)tile, (long long)count);
  }
}

void test_pack() {
  for (const int64_t columns : {1, 3, 8, 15, 33}) {
    const int64_t rows = 5, row_bytes = (columns + 7) / 8;
    const Buffer<uint8_t> bytes(rows * columns), bits(rows * row_bytes);
    for (int64_t i = 0; i < bytes.size(); ++i) bytes[i] = lane_of(3, i, 0) & 1;
    shim::launch(nm_transposable_pack_kernel, {2}, {4}, 0, bytes.data(), bits.data(), rows, columns);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < 8 * row_bytes; ++c)
        CHECK_EQUAL(bits[row * row_bytes + c / 8] >> c % 8 & 1, c < columns ? bytes[row * columns + c] : 0,
                    "bit %lld of %lld columns", (long long)c, (long long)columns);
  }
}

}  // namespace

int main() {
  test_exact<float, true>(3, 16, {1, 2}, 32);
  test_exact<float, true>(1, 8 * 70, {3, 1}, 32);
  test_exact<float, false>(2, 4, {1, 1}, 32);
  test_exact<float, false>(5, 36, {1, 2}, 32);
  test_exact<float, false>(2, 24, {1, 2}, 4);
  test_exact<double, true>(2, 40, {1, 2}, 32);
  test_exact<__half, true>(2, 40, {1, 2}, 32);
  test_exact<__nv_bfloat16, true>(2, 40, {1, 1}, 32);
  test_exact<__nv_bfloat16, false>(2, 44, {1, 1}, 32);
  using shim::Order;
  for (const Order order : {Order::kForward, Order::kBackward, Order::kShuffled, Order::kWarpByWarp}) {
    shim::order = order;
    test_greedy<float>(1, 1, 3, 5, 2, 4, true);
    test_greedy<float>(2, 4, 2, 21, 3, 32, true);
    test_greedy<float>(2, 4, 5, 7, 2, 3, false);
    test_greedy<float>(3, 5, 3, 11, 2, 25, true);
    test_greedy<float>(4, 8, 2, 9, 1, 16, true);
    test_greedy<__half>(16, 32, 2, 3, 1, 4, true);
    test_greedy<__nv_bfloat16>(1, 33, 1, 5, 2, 3, true);
    test_greedy<double>(7, 16, 2, 3, 2, 8, false);
    test_greedy<float>(40, 100, 1, 2, 2, 1, true);
    test_greedy<float>(128, 128, 1, 1, 1, 1, false);
    test_greedy<float>(64, 128, 1, 1, 1, 1, false);
  }
  test_pack();
  return report("transposable mask kernels");
}
