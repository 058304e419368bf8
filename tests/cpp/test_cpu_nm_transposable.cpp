// Transposable masks by the CPU kernels of every instruction set this machine has, against their definition.
#include <string>
#include <vector>

#include "cpu/nm_simd.cpp"
#include "cpu_test.h"
#include "nm_tiles.h"

namespace {

using namespace pyrx;
using namespace pyrx::cpu;

// A strip of tiles whose rows are `gap` elements longer than they are wide, ending where the memory does.
template <typename T>
struct Strip {
  int64_t m, tiles, stride;
  Buffer<T> scores;

  Strip(int64_t group, int64_t count, int64_t gap)
      : m(group), tiles(count), stride(group * count + gap), scores((group - 1) * stride + group * count, 1) {
    for (int64_t i = 0; i < scores.size(); ++i) scores[i] = plain::narrow<T>(static_cast<accumulate_t<T>>(score_at(i + 100 * count)));
  }
  std::vector<double> tile(int64_t index) const {
    std::vector<double> found;
    for (int64_t i = 0; i < m * m; ++i) found.push_back(value(scores[i / m * stride + index * m + i % m]));
    return found;
  }
};

template <typename T>
void test_exact(const char* set, const NMTransposableKernels<T>& kernels) {
  using A = accumulate_t<T>;
  for (const int64_t tiles : {1, 2, 3, 7, 8, 16, 17, 35})
    for (const bool magnitude : {true, false}) {
      const Strip<T> strip(4, tiles, tiles % 3);
      const int64_t width = 4 * tiles, row_bytes = (width + 7) / 8;
      Buffer<uint8_t> bytes(3 * (width + 2) + width), bits(3 * (row_bytes + 1) + row_bytes);
      kernels.exact(strip.scores.data(), strip.stride, tiles, magnitude, false, bytes.data(), width + 2);
      kernels.exact(strip.scores.data(), strip.stride, tiles, magnitude, true, bits.data(), row_bytes + 1);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const std::vector<double> values = strip.tile(tile);
        TileSearch<A, uint32_t> search;
        for (int r = 0; r < 4; ++r) {
          const auto at = [&](int c) { return tile_value<A>(static_cast<A>(values[4 * r + c]), magnitude); };
          search.set_row(r, at(0), at(1), at(2), at(3));
        }
        const uint32_t expected = search.search();
        CHECK(is_best(values, expected, magnitude, TileBounds<A>::most, TileBounds<A>::nan), "best of tile %ld", tile);
        for (int i = 0; i < 16; ++i) {
          const int64_t row = i / 4, column = 4 * tile + i % 4;
          CHECK_EQUAL(bytes[row * (width + 2) + column], expected >> i & 1, "%s: element %d of tile %ld of %ld", set, i, tile,
                      tiles);
          CHECK_EQUAL(bits[row * (row_bytes + 1) + column / 8] >> column % 8 & 1, int(expected >> i & 1),
                      "%s: bit %d of tile %ld of %ld", set, i, tile, tiles);
        }
      }
      for (int64_t row = 0; row < 4; ++row) {
        if (tiles % 2) CHECK_EQUAL(bits[row * (row_bytes + 1) + row_bytes - 1] >> 4, 0, "%s: bits beyond row %ld", set, row);
        for (int64_t k = width; row < 3 && k < width + 2; ++k)
          CHECK_EQUAL(bytes[row * (width + 2) + k], 0xFF, "%s: bytes beyond row %ld", set, row);
      }
    }
}

template <typename T>
void test_greedy(const char* set, const NMTransposableKernels<T>& kernels) {
  for (const int m : {1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 61, 128})
    for (const int n : {1, 2, m / 2, m - 1, m})
      for (const int64_t tiles : {1, 3, 16, 19}) {
        if (n < 1 || n > m || m * m * tiles > 40000) continue;
        const NM nm{n, m, (n + tiles) % 2 == 0};
        const Strip<T> strip(m, tiles, n % 3);
        Buffer<uint64_t> scratch(m > kLaneGroup ? (2 * m * m * int64_t(sizeof(T) + 2) + 7) / 8 : 0);
        Buffer<uint8_t> bytes(m * m * tiles);
        kernels.greedy(strip.scores.data(), strip.stride, tiles, nm, scratch.data(), bytes.data(), m * tiles);
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const std::vector<uint8_t> expected = greedy_tile(strip.tile(tile), n, m, nm.magnitude);
          for (int i = 0; i < m * m; ++i)
            CHECK_EQUAL(bytes[i / m * m * tiles + tile * m + i % m], expected[i], "%s: %d:%d, element %d of tile %ld of %ld",
                        set, n, m, i, tile, tiles);
        }
      }
}

#define TEST_TYPE(name, type)                                      \
  test_exact<type>(#name, name::nm_transposable_table<type>());    \
  test_greedy<type>(#name, name::nm_transposable_table<type>());
#define TEST_SET(name) \
  TEST_TYPE(name, float) TEST_TYPE(name, double) TEST_TYPE(name, bfloat16) TEST_TYPE(name, float16)

}  // namespace

int main() {
  FOR_EACH_SET(TEST_SET)
  return report("cpu_nm_transposable");
}
