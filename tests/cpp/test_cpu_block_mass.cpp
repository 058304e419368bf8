// Sums of exponentials over tiles of logits by every instruction set this machine has, against float64.
#include <limits>
#include <vector>

#include "cpu/attention_simd.cpp"
#include "cpu_test.h"

namespace {

using namespace pyrx;
using namespace pyrx::cpu;

// A tile of products in memory of exactly its size, its limits and its key mask.
template <typename Acc>
struct Case {
  int64_t rows, keys, stride;
  Buffer<Acc> products, factor, offset;
  Buffer<int32_t> first, last;
  Buffer<uint8_t> key_mask;

  Case(int64_t rows, int64_t keys, double spread = 3)
      : rows(rows), keys(keys), stride((keys + 15) / 16 * 16), products(rows * stride, 1), factor(rows, 1), offset(rows, 1),
        first(rows), last(rows), key_mask(keys) {
    for (int64_t i = 0; i < rows * stride; ++i) products[i] = static_cast<Acc>(spread * normal(i));
    for (int64_t r = 0; r < rows; ++r) {
      factor[r] = static_cast<Acc>(r % 5 == 4 ? -1.5 : 1 + 0.1 * static_cast<double>(r % 7));
      offset[r] = static_cast<Acc>(4 + normal(9000 + r));
      first[r] = static_cast<int32_t>(lane_of(1, r, 0) % (keys + 1));
      last[r] = static_cast<int32_t>(first[r] + lane_of(2, r, 0) % (keys - first[r] + 1));
    }
    for (int64_t k = 0; k < keys; ++k) key_mask[k] = lane_of(3, k + 1, 0) % 3 != 0;
    key_mask[0] = 0;
  }
  // 0: all keys are visible, 1: those of the limits, 2: of the key mask too
  ExponentTile<Acc> tile(int kind) const {
    return {rows, keys, products.data(), stride, factor.data(), kind ? first.data() : nullptr,
            kind ? last.data() : nullptr, kind == 2 ? key_mask.data() : nullptr};
  }
  bool visible(int kind, int64_t r, int64_t k) const {
    return kind == 0 || (k >= first[r] && k < last[r] && (kind == 1 || key_mask[k]));
  }
  double exponent(int64_t r, int64_t k) const {
    return static_cast<double>(products[r * stride + k]) * static_cast<double>(factor[r]);
  }
};

template <typename Acc>
constexpr double kUnit = sizeof(Acc) == 8 ? 0x1p-52 : 0x1p-23;

template <typename Acc>
void test_mass(const char* set, const MassKernels<Acc>& kernels, int64_t rows, int64_t keys, int64_t q_block,
               int64_t k_block) {
  const Case<Acc> data(rows, keys);
  for (int kind = keys % 16 == 0 ? 0 : 1; kind < 3; ++kind) {
    const int64_t down = (rows + q_block - 1) / q_block, across = (keys + k_block - 1) / k_block, stride = across + 3;
    Buffer<Acc> mass((down - 1) * stride + across);
    kernels.mass(data.tile(kind), data.offset.data(), q_block, k_block, mass.data(), stride);
    for (int64_t i = 0; i < down; ++i)
      for (int64_t j = 0; j < stride && i * stride + j < mass.size(); ++j) {
        const Acc got = mass[i * stride + j];
        if (j >= across) {
          CHECK(got != got, "%s: row %ld of blocks is written past its end", set, i);
          continue;
        }
        double expected = 0;
        for (int64_t r = i * q_block; r < std::min(rows, (i + 1) * q_block); ++r)
          for (int64_t k = j * k_block; k < std::min(keys, (j + 1) * k_block); ++k)
            if (data.visible(kind, r, k)) expected += std::exp2(data.exponent(r, k) - double(data.offset[r]));
        CHECK(std::abs(double(got) - expected) <= 48 * kUnit<Acc> * expected,
              "%s: mass of %ld x %ld, blocks %ld x %ld, kind %d, block %ld %ld: %g, expected %g", set, rows, keys, q_block,
              k_block, kind, i, j, double(got), expected);
      }
  }
}

template <typename Acc>
void test_shares(const char* set, const MassKernels<Acc>& kernels, int64_t rows, int64_t keys, int64_t q_block) {
  const Case<Acc> data(rows, keys), second(rows, keys, 4);
  const int64_t down = (rows + q_block - 1) / q_block;
  Buffer<uint8_t> kept(down), others(down);
  for (int64_t i = 0; i < down; ++i) kept[i] = static_cast<uint8_t>(lane_of(5, i, 0)), others[i] = 0;
  for (int kind = keys % 16 == 0 ? 0 : 1; kind < 3; ++kind)
    for (int times = 0; times < 3; ++times) {  // twice: the second tile's keys are none of what is kept
      Buffer<Acc> most(rows * 16, 1), total(rows * 16, 1), sums(rows * 16, 1), recall(rows);
      for (int64_t i = 0; i < rows * 16; ++i) most[i] = std::numeric_limits<Acc>::lowest(), total[i] = sums[i] = 0;
      const ShareRows<Acc> state{most.data(), total.data(), sums.data(), q_block};
      if (times > 0) kernels.add(data.tile(kind), kept.data(), state);
      if (times > 1) kernels.add(second.tile(kind), others.data(), state);
      kernels.finish(state, rows, recall.data());
      for (int64_t r = 0; r < rows; ++r) {
        double all = 0, own = 0;
        for (int64_t k = 0; k < keys; ++k)
          if (data.visible(kind, r, k)) {
            const double e = std::exp2(data.exponent(r, k));
            all += e + (times > 1 ? std::exp2(second.exponent(r, k)) : 0);
            if (kept[r / q_block] >> k / 16 & 1) own += e;
          }
        const double expected = all == 0 || times == 0 ? 1 : own / all;
        CHECK(std::abs(double(recall[r]) - expected) <= 32 * kUnit<Acc>, "%s: share, kind %d, row %ld: %g, expected %g",
              set, kind, r, double(recall[r]), expected);
      }
    }
}

// 2^x through the sum of one number.
template <typename Acc>
void test_powers(const char* set, const MassKernels<Acc>& kernels) {
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::nan("");
  std::vector<double> x{0, -0.0, 1, -1, 0.5, 1e-30, -1e-30, -1e-9, 126.99, 127.5, 128, 1e5, infinity, -infinity, nan,
                        -125.5, -126, -126.5, -1e5, -1e30, 1e30};
  for (int i = 0; i < 4000; ++i) x.push_back(normal(i) * 30);
  for (const double each : x) {
    Buffer<Acc> products(16), factor(1), offset(1), mass(1);
    for (int i = 0; i < 16; ++i) products[i] = i == 3 ? static_cast<Acc>(each) : -std::numeric_limits<Acc>::infinity();
    factor[0] = 1, offset[0] = 0;
    kernels.mass({1, 16, products.data(), 16, factor.data(), nullptr, nullptr, nullptr}, offset.data(), 16, 16, mass.data(),
                 1);
    const double exact = std::exp2(static_cast<double>(static_cast<Acc>(each))), got = double(mass[0]);
    const Acc expected = static_cast<Acc>(exact);
    const bool right = expected != expected ? got != got
                       : std::isinf(expected) ? got == exact || std::isinf(got)
                                              : std::abs(got - exact) <= 2 * kUnit<Acc> * exact + 2e-38;
    CHECK(right, "%s: 2^%.9g: %.9g, expected %.9g", set, each, got, exact);
  }
}

template <typename Acc>
void test_set(const char* set, const MassKernels<Acc>& kernels) {
  test_powers(set, kernels);
  for (const int64_t q_block : {16, 32, 64, 128}) {
    for (const int64_t k_block : {16, 32, 64, 128})
      for (const int64_t rows : {1, 63, 128})
        for (const int64_t keys : {1, 16, 100, 128}) test_mass(set, kernels, rows, keys, q_block, k_block);
    test_shares(set, kernels, 77, 128, q_block);
    test_shares(set, kernels, 128, 90, q_block);
    test_shares(set, kernels, 5, 7, q_block);
  }
}

#define TEST_SET(name)                               \
  test_set<float>(#name, name::mass_table<float>()); \
  test_set<double>(#name, name::mass_table<double>());

}  // namespace

int main() {
  FOR_EACH_SET(TEST_SET)
  return report("cpu_block_mass");
}
