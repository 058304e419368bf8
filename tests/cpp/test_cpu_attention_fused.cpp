// The kernel of attention's products and softmax in one, where this machine has it, against its definition in float64.
#include <limits>
#include <vector>

#include "cpu/attention_simd.cpp"
#include "cpu_test.h"

namespace {

using namespace pyrx;
using namespace pyrx::cpu;

enum Flags { kRanges = 1, kMasked = 2, kDropped = 4, kAll = 8 };

template <typename G>
double put(G& to, double x) {
  to = plain::narrow<G>(static_cast<float>(x));
  return plain::widen(to);
}

// Tiles of `keys` keys one after another, the later ones with larger logits; query 1 sees none, query 2 none of the first tile.
template <typename G>
void test_tiles(const FusedKernels<G>& kernels, int64_t width, int64_t keys, int64_t size, int64_t value_size, int flags) {
  constexpr int64_t kTiles = 3, kPer = sizeof(G) == 2 ? 2 : 1;
  const int64_t first = 40, all = kTiles * keys;
  Buffer<G> queries(size * width), weights(keys * width);
  Buffer<float> factor(width), most(width), total(width), out(value_size * width);
  Buffer<int32_t> low(width), high(width);
  std::vector<double> q(size * width), expected(value_size * width), sum(width), greatest(width, -INFINITY);
  std::vector<std::vector<double>> logits(width, std::vector<double>(all, -INFINITY));
  for (int64_t i = 0; i < width; ++i) {
    factor[i] = (i % 3 == 0 ? -1.0f : 1.0f) / static_cast<float>(std::sqrt(double(size)));
    most[i] = std::numeric_limits<float>::lowest(), total[i] = 0;
    low[i] = static_cast<int32_t>(i == 2 ? first + keys : first + lane_of(21, i, 0) % keys);
    high[i] = static_cast<int32_t>(i == 1 ? first : first + all - lane_of(22, i, 0) % keys);
  }
  const auto scale = [&](int64_t i) { return kPer == 2 ? 1.0 : double(factor[i]); };  // 16-bit queries are not scaled
  for (int64_t d = 0; d < size; ++d)
    for (int64_t i = 0; i < width; ++i)
      q[d * width + i] = put(queries[(d / kPer * width + i) * kPer + d % kPer], normal(d * width + i) * scale(i));
  std::fill_n(out.data(), out.size(), 0.0f);
  std::vector<double> values(all * value_size);
  std::vector<uint8_t> kept(all * width, 1);
  for (int64_t t = 0; t < kTiles; ++t) {
    Buffer<G> key(keys * size, 1), value(keys * value_size, 1);
    Buffer<uint8_t> key_mask(keys), bits(width / 8 * keys);
    for (int64_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint8_t>(lane_of(23 + t, i, 0));
    for (int64_t k = 0; k < keys; ++k) {
      key_mask[k] = lane_of(24 + t, k, 0) % 4 != 0;
      for (int64_t d = 0; d < value_size; ++d)
        values[(t * keys + k) * value_size + d] =
            put(value[(k / kPer * value_size + d) * kPer + k % kPer], normal(90000 + (t * keys + k) * value_size + d));
      std::vector<double> own(size);
      for (int64_t d = 0; d < size; ++d)
        own[d] = put(key[k * size + d], normal(500000 + (t * keys + k) * size + d) * double(1 + 6 * t));
      for (int64_t i = 0; i < width; ++i) {
        const int64_t at = first + t * keys + k;
        if ((flags & kRanges) && (at < low[i] || at >= high[i])) continue;
        if ((flags & kMasked) && !key_mask[k]) continue;
        double x = 0;
        for (int64_t d = 0; d < size; ++d) x += own[d] * q[d * width + i];
        logits[i][t * keys + k] = x * double(factor[i]) / scale(i);
        if (flags & kDropped) kept[(t * keys + k) * width + i] = bits[i / 8 * keys + k] >> i % 8 & 1;
      }
    }
    const Lines lines[] = {{value.data(), 3}, {key.data(), 1}};
    Ahead ahead(lines, 2);
    // in two parts where there are as many keys
    const int64_t own = keys > 8 ? 8 : keys;
    const uint8_t* mask = flags & kMasked ? key_mask.data() : nullptr;
    const bool hides = flags & (kRanges | kMasked);
    const FusedKeys<G> parts[] = {{own, key.data(), value.data(), first + t * keys, hides, mask},
                                  {keys - own, key.data() + own * size, value.data() + own * value_size, first + t * keys + own,
                                   hides, mask ? mask + own : mask}};
    kernels.step({width, size, value_size, queries.data(), parts, keys > own ? 2 : 1, factor.data(), most.data(), total.data(),
                  out.data(), weights.data(), hides ? low.data() : nullptr, high.data(),
                  flags & kDropped ? bits.data() : nullptr, keys, &ahead, 1});
  }
  for (int64_t i = 0; i < width; ++i) {
    for (const double x : logits[i]) greatest[i] = std::max(greatest[i], x);
    for (int64_t k = 0; k < all && greatest[i] > -INFINITY; ++k) {
      const double weight = std::exp2(logits[i][k] - greatest[i]);
      sum[i] += weight;
      for (int64_t d = 0; d < value_size && kept[k * width + i]; ++d)
        expected[d * width + i] += weight * values[k * value_size + d];
    }
    const bool nothing = sum[i] == 0;
    CHECK(nothing ? total[i] == 0 : std::abs(std::log2(double(total[i])) + double(most[i]) - std::log2(sum[i]) - greatest[i]) <= 1e-4,
          "%zu bytes, flags %d: total of query %ld: %g above %g, expected %g above %g", sizeof(G), flags, i, double(total[i]),
          double(most[i]), sum[i], greatest[i]);
    for (int64_t d = 0; d < value_size; ++d) {
      const double got = nothing ? out[d * width + i] : double(out[d * width + i]) / double(total[i]);
      const double wanted = nothing ? 0 : expected[d * width + i] / sum[i];
      CHECK(std::abs(got - wanted) <= (sizeof(G) == 2 ? 2e-2 : 3e-5),
            "%zu bytes, %ld queries, tiles of %ld keys, sizes %ld and %ld, flags %d: query %ld, value %ld: %g, expected %g",
            sizeof(G), width, keys, size, value_size, flags, i, d, got, wanted);
    }
  }
}

// Two vectors of queries, query 3 without a total.
template <typename G>
void test_normalize(const FusedKernels<G>& kernels) {
  constexpr int64_t kSize = 24, kWidth = kFusedQueries;
  Buffer<float> out(kSize * kWidth), total(kWidth);
  for (int64_t i = 0; i < kWidth; ++i) total[i] = i == 3 ? 0.0f : static_cast<float>(1 + i);
  for (int64_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(normal(i));
  out[3] = std::numeric_limits<float>::infinity();
  kernels.normalize(out.data(), total.data(), kSize, kWidth, 1.25f);
  for (int64_t i = 0; i < out.size(); ++i) {
    const float by = 1.25f / static_cast<float>(1 + i % kWidth), expected = static_cast<float>(normal(i)) * by;
    CHECK(out[i] == (i % kWidth == 3 ? 0.0f : expected), "normalize, element %ld: %g, expected %g", i, double(out[i]),
          double(expected));
  }
}

#ifdef PYRX_X86
PYRX_BF16 void test_exp2() {
  constexpr int kLanes = 16;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto powers = [](float (&x)[kLanes]) PYRX_BF16 {
    _mm512_storeu_ps(x, avx512::exp2_by_table(_mm512_loadu_ps(x)));
  };
  constexpr int64_t kCount = 200000 * kLanes;  // of exponents from 8 down to -122
  for (int64_t i = 0; i < kCount; i += kLanes) {
    float x[kLanes], y[kLanes];
    for (int k = 0; k < kLanes; ++k) x[k] = y[k] = static_cast<float>(8 - 130 * double(i + k) / kCount);
    powers(y);
    for (int k = 0; k < kLanes; ++k) {
      const double expected = std::exp2(double(x[k]));
      CHECK(std::abs(double(y[k]) - expected) <= 0x1p-22 * expected, "2^%.9g: %.9g, expected %.9g", double(x[k]), double(y[k]),
            expected);
    }
  }
  float x[kLanes] = {-kInfinity, std::numeric_limits<float>::lowest(), -1e6f, -200.0f, 0.0f, 8.0f, kInfinity, NAN};
  powers(x);
  CHECK(x[0] == 0 && x[1] == 0 && x[2] == 0 && x[3] == 0 && x[4] == 1 && x[5] == 256 && x[6] == kInfinity && x[7] != x[7],
        "2^ of extremes: %g %g %g %g %g %g %g %g", double(x[0]), double(x[1]), double(x[2]), double(x[3]), double(x[4]),
        double(x[5]), double(x[6]), double(x[7]));
}
#endif

template <typename G>
void test_type() {
  const FusedKernels<G>& kernels = fused_kernels<G>();
  if (kernels.step == nullptr) return;
  test_normalize(kernels);
  for (const int64_t width : {kFusedQueries / 2, kFusedQueries})
    for (const int64_t keys : {8, 16, 120, 128})
      for (const auto& [size, value_size] : {std::pair<int64_t, int64_t>{20, 8}, {64, 64}, {128, 40}, {256, 16}})
        for (int flags = 0; flags < kAll; ++flags)
          // the mask of keys is read where ranges show a key
          if ((flags & kMasked) == 0 || (flags & kRanges)) test_tiles(kernels, width, keys, size, value_size, flags);
}

}  // namespace

int main() {
  test_type<float>();
#ifdef PYRX_X86
  __builtin_cpu_init();
  if (fused_kernels<float>().step) test_exp2();
  if (__builtin_cpu_supports("avx512bf16")) test_type<bfloat16>();
#endif
  return report("cpu_attention_fused");
}
