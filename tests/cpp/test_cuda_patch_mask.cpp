// The patch mask kernels on the host shim against sorts of the same keys, one sample at a time.
#include "cuda_shim.h"

#include "cuda/patch_mask.cuh"
#include "cuda_test.h"

#include <set>
#include <utility>

using namespace pyrx;
using namespace pyrx::cuda;

namespace {

struct Case {
  int64_t height, width, masked, hard;
  unsigned blocks, threads;
  bool scratch;
};

template <typename T>
T loss_at(int64_t i) {
  const double kinds[] = {0.0, -0.0, INFINITY, -INFINITY, NAN};
  return narrow<T>(Acc<T>(i % 4 == 1 ? kinds[i / 4 % 5] : std::round(2 * normal(i)) / 2));
}

// The patches that are masked before any random one.
template <int kMethod, typename T>
std::set<int64_t> first_patches(uint64_t seed, int64_t sample, const PatchDraw& draw, const T* losses) {
  std::set<int64_t> found;
  if (kMethod == kHardPatches) {
    std::vector<int64_t> order(draw.size());
    std::iota(order.begin(), order.end(), 0);
    const auto value = [&](int64_t i) { return float(widen(losses[sample * draw.size() + i])); };
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return std::isnan(value(a)) ? !std::isnan(value(b)) : value(a) > value(b);
    });
    found.insert(order.begin(), order.begin() + draw.hard);
  }
  if (kMethod == kBlockPatches) {
    const auto missing = [&](const PatchBlock& block) {
      std::set<int64_t> fresh;
      for (int64_t y = block.y0; y < block.y1; ++y)
        for (int64_t x = block.x0; x < block.x1; ++x)
          if (!found.count(y * draw.width + x)) fresh.insert(y * draw.width + x);
      return fresh;
    };
    draw_blocks(
        seed, sample, draw, [&](const PatchBlock& block) { return int64_t(missing(block).size()); },
        [&](const PatchBlock& block) { found.merge(missing(block)); });
  }
  return found;
}

template <int kMethod, typename T>
void test_masks(const Case& c) {
  const int64_t samples = 3, size = c.height * c.width, keep = size - c.masked, seed = -77 - size;
  const PatchDraw draw{samples, c.height, c.width, c.masked, c.hard, 4, std::log(0.3)};
  const Buffer<T> losses(kMethod == kHardPatches ? samples * size : 0);
  for (int64_t i = 0; i < losses.size(); ++i) losses[i] = loss_at<T>(i);
  const Buffer<uint32_t> scratch(c.blocks * c.height * row_words(draw));
  for (const bool indices : {false, true}) {
    const Buffer<uint8_t> mask(samples * size);
    const Buffer<int64_t> ids_keep(samples * keep), ids_restore(samples * size);
    const PatchOutput output{mask.data(), indices ? ids_keep.data() : nullptr, indices ? ids_restore.data() : nullptr};
    const size_t shared = c.scratch || kMethod != kBlockPatches ? 0 : c.height * row_words(draw) * sizeof(uint32_t);
    shim::launch(patch_mask_kernel<kMethod, T>, {c.blocks}, {c.threads}, shared, &seed, losses.data(), draw,
                 c.scratch ? scratch.data() : nullptr, output);
    for (int64_t n = 0; n < samples; ++n) {
      const auto first = first_patches<kMethod>(seed, n, draw, losses.data());
      std::vector<std::pair<uint64_t, int64_t>> order;  // by what is masked first
      for (int64_t i = 0; i < size; ++i) {
        const uint32_t word = philox(uint64_t(seed), n, uint32_t(i / 4), kPatchDomain).w[i % 4];
        order.push_back({uint64_t(!first.count(i)) << 32 | uint32_t(~word), -i});
      }
      std::sort(order.begin(), order.end());
      std::vector<uint8_t> expected(size, 0);
      for (int64_t i = 0; i < c.masked; ++i) expected[-order[i].second] = 1;
      int64_t kept = 0;
      for (int64_t i = 0; i < size; ++i) {
        const int64_t at = n * size + i;
        CHECK_EQUAL(mask[at], expected[i], "method %d, %lld x %lld, %lld masked, sample %lld, patch %lld", kMethod,
                    (long long)c.height, (long long)c.width, (long long)c.masked, (long long)n, (long long)i);
        if (!indices) continue;
        CHECK_EQUAL(ids_restore[at], expected[i] ? keep + i - kept : kept, "restore of patch %lld", (long long)i);
        if (!expected[i]) {
          CHECK_EQUAL(ids_keep[n * keep + kept], i, "kept patch %lld", (long long)kept);
          ++kept;
        }
      }
    }
  }
}

void test_loss_keys() {
  const float rising[] = {-INFINITY, -2, -1, -1e-40f, 0, 1e-40f, 1, 1.5, INFINITY, NAN};
  for (int i = 0; i + 1 < 10; ++i) CHECK(loss_key(rising[i], 0) < loss_key(rising[i + 1], 5), "loss %d", i);
  CHECK_EQUAL(loss_key(0.0f, 3), loss_key(-0.0f, 3), "zeros");
  CHECK_EQUAL(loss_key(NAN, 3), loss_key(-NAN, 3), "NaN");
  CHECK(loss_key(1, 3) > loss_key(1, 4), "ties");
  CHECK(loss_key(NAN, 0) < ~uint64_t(0), "below what nothing reaches");
}

void test_block_bits() {
  for (int64_t x0 = 0; x0 < 70; ++x0)
    for (int64_t x1 = x0; x1 <= 70; ++x1)
      for (int64_t word = 0; word < 3; ++word)
        for (int64_t i = 0; i < 32; ++i) {
          const int64_t x = word * 32 + i;
          CHECK_EQUAL(block_bits({0, x0, 1, x1}, word) >> i & 1, uint32_t(x >= x0 && x < x1), "columns %lld to %lld",
                      (long long)x0, (long long)x1);
        }
}

}  // namespace

int main() {
  test_loss_keys();
  test_block_bits();
  const Case cases[] = {
      {1, 1, 0, 0, 1, 32, false},     {1, 1, 1, 1, 3, 32, false},    {1, 3, 2, 1, 3, 32, false},
      {7, 9, 47, 23, 2, 32, false},   {14, 14, 147, 73, 3, 64, false}, {14, 14, 75, 75, 3, 64, true},
      {14, 14, 196, 5, 3, 64, false}, {3, 70, 100, 0, 2, 64, false},  {33, 40, 990, 200, 2, 96, true},
      {33, 40, 1319, 1, 3, 512, false},
  };
  using shim::Order;
  for (const Order order : {Order::kForward, Order::kBackward, Order::kShuffled, Order::kWarpByWarp}) {
    shim::order = order;
    for (const Case& c : cases) {
      test_masks<kRandomPatches, float>(c);
      test_masks<kBlockPatches, float>(c);
      test_masks<kHardPatches, float>(c);
    }
  }
  test_masks<kHardPatches, double>(cases[4]);
  test_masks<kHardPatches, __half>(cases[4]);
  test_masks<kHardPatches, __nv_bfloat16>(cases[4]);
  return report("patch mask kernels");
}
