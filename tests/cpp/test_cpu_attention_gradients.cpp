// The row kernels of attention's backward, of every instruction set this machine has, against their definition in float64.
#include <limits>
#include <vector>

#include "cpu/attention_simd.cpp"
#include "cpu_test.h"

namespace {

using namespace pyrx;
using namespace pyrx::cpu;

// What a tile has beside its products.
enum Feature { kRange = 1, kMask = 2, kDropout = 4, kBias = 8, kEntropy = 16, kCap = 32, kFeatures = 64 };

template <typename G>
double unit() {
  return sizeof(G) == 8 ? 0x1p-52 : std::is_same_v<G, float> ? 0x1p-23 : std::is_same_v<G, float16> ? 0x1p-10 : 0x1p-7;
}

template <typename G>
void test_tile(const char* set, const GradientKernels<G>& kernels, int64_t keys, int64_t width, int features, bool upstream) {
  using Acc = accumulate_t<G>;
  const int64_t size = keys * width, bits_stride = keys + 3;
  Buffer<Acc> logits(size), from(size), bias(size), factor(width), lse(width), delta(width), entropy(width), low(width),
      high(width);
  Buffer<uint8_t> key_mask(keys), bits(width / 8 * bits_stride);
  for (int64_t i = 0; i < size; ++i) {
    logits[i] = Acc(normal(i)), from[i] = Acc(normal(i + 100000)), bias[i] = Acc(normal(i + 200000));
  }
  for (int64_t c = 0; c < width; ++c) {
    factor[c] = Acc(0.5 + 0.1 * double(c % 7)), lse[c] = Acc(2 + normal(c + 300000));
    delta[c] = Acc(normal(c + 400000)), entropy[c] = Acc(normal(c + 500000));
    low[c] = Acc(lane_of(5, c, 0) % (keys + 1)), high[c] = Acc(lane_of(6, c, 0) % (keys + 1));
  }
  lse[width / 2] = std::numeric_limits<Acc>::infinity();  // sees nothing
  for (int64_t k = 0; k < keys; ++k) key_mask[k] = lane_of(7, k, 0) % 4 != 0;
  for (int64_t i = 0; i < bits.size(); ++i) bits[i] = uint8_t(lane_of(8, i, 0));

  GradientTile<G> tile{};
  tile.keys = keys, tile.width = width, tile.logits = logits.data();
  tile.factor = factor.data(), tile.lse = lse.data(), tile.delta = delta.data();
  tile.keep_scale = Acc(1.25);
  if (upstream) tile.upstream = from.data();
  if (features & kBias) tile.bias = bias.data();
  if (features & kEntropy) tile.entropy = entropy.data();
  if (features & kRange) tile.low = low.data(), tile.high = high.data();
  if (features & kMask) tile.key_mask = key_mask.data();
  if (features & kDropout) tile.bits = bits.data(), tile.bits_stride = bits_stride;
  if (features & kCap) tile.softcap = Acc(5);

  for (int outputs = 1; outputs < (upstream ? 4 : 2); ++outputs) {
    Buffer<G> weights(size), gradients(size), pairs((keys + 1) / 2 * 2 * width);
    tile.weights = outputs & 1 ? weights.data() : nullptr;
    tile.gradients = outputs & 2 ? gradients.data() : nullptr;
    tile.pairs = sizeof(G) == 2 && upstream ? pairs.data() : nullptr;
    kernels.gradients(tile);
    for (int64_t k = 0; k < keys; ++k)
      for (int64_t c = 0; c < width; ++c) {
        const int64_t i = k * width + c;
        const bool seen = (!(features & kRange) || (low[c] <= Acc(k) && Acc(k) < high[c])) &&
                          (!(features & kMask) || key_mask[k]) && lse[c] != std::numeric_limits<Acc>::infinity();
        const bool kept = !(features & kDropout) || bits[c / 8 * bits_stride + k] >> c % 8 & 1;
        const double x = std::min(0.0, double(logits[i]) * factor[c] + (features & kBias ? double(bias[i]) : 0) - lse[c]);
        const double weight = seen ? std::exp(x) : 0;
        double gradient = (kept ? double(from[i]) * (features & kDropout ? 1.25 : 1) : 0) - delta[c];
        if (features & kEntropy) gradient -= entropy[c] * (seen ? x : 0);
        if (features & kCap) gradient *= 1 - double(logits[i]) / 5 * (double(logits[i]) / 5);
        gradient *= weight;
        const auto close = [&](G got, double expected, double scale) {
          const double error = std::abs(double(plain::widen(got)) - expected);
          return error <= 16 * 0x1p-24 * (sizeof(G) == 8 ? 0x1p-29 : 1) * scale + unit<G>() * std::abs(expected) + 1e-30 +
                              (std::is_same_v<G, float16> ? 0x1p-25 : 0);
        };
        const double size_of = weight * (std::abs(double(from[i])) + std::abs(double(delta[c])) + 8) * 8;
        if (tile.weights)
          CHECK(close(weights[i], kept ? weight : 0, 8 * weight), "%s: weight %ld %ld of %ld x %ld, features %d", set, long(k),
                long(c), long(keys), long(width), features);
        if (tile.gradients)
          CHECK(close(gradients[i], gradient, size_of), "%s: gradient %ld %ld of %ld x %ld, features %d: %g, expected %g", set,
                long(k), long(c), long(keys), long(width), features, double(plain::widen(gradients[i])), gradient);
        if (tile.pairs)
          CHECK(close(pairs[k / 2 * 2 * width + 2 * c + k % 2], gradient, size_of), "%s: pair %ld %ld of %ld x %ld, features %d",
                set, long(k), long(c), long(keys), long(width), features);
      }
    if (tile.pairs && keys % 2)  // the pair's missing key
      for (int64_t c = 0; c < width; ++c)
        CHECK(plain::widen(pairs[(keys - 1) * width + 2 * c + 1]) == 0, "%s: a missing key of %ld, column %ld", set, long(keys),
              long(c));
  }
}

// Rows whose lse has no room for how many keys there are: weights are at most 1.
template <typename G>
void test_far(const char* set, const GradientKernels<G>& kernels) {
  using Acc = accumulate_t<G>;
  const int64_t keys = 3, width = 16;
  for (const double far : {-1e7, -1e10, -3e12, -1e30, 1e10, 1e30}) {
    Buffer<Acc> logits(keys * width), from(keys * width), factor(width), lse(width), delta(width);
    Buffer<G> weights(keys * width), gradients(keys * width);
    for (int64_t i = 0; i < keys * width; ++i) logits[i] = Acc(far * 8), from[i] = Acc(normal(i));
    for (int64_t c = 0; c < width; ++c) factor[c] = Acc(0.125), lse[c] = Acc(far + std::log(3.0)), delta[c] = Acc(0);
    GradientTile<G> tile{};
    tile.keys = keys, tile.width = width, tile.logits = logits.data(), tile.factor = factor.data(), tile.lse = lse.data();
    tile.delta = delta.data(), tile.upstream = from.data(), tile.weights = weights.data(), tile.gradients = gradients.data();
    kernels.gradients(tile);
    for (int64_t i = 0; i < keys * width; ++i) {
      const double got = plain::widen(weights[i]), gradient = plain::widen(gradients[i]);
      CHECK(got >= 0 && got <= 1 && std::abs(gradient) <= 8, "%s: %zu bytes, at %g a weight of %g, a gradient of %g", set,
            sizeof(G), far, got, gradient);
    }
  }
}

template <typename G>
void test_dot(const char* set, const GradientKernels<G>& kernels) {
  using Acc = accumulate_t<G>;
  for (const int64_t n : {1, 7, 16, 33, 100}) {
    Buffer<G> x(n, 1);
    Buffer<Acc> y(n, 1);
    double sum = 0, size = 0;
    for (int64_t i = 0; i < n; ++i) {
      x[i] = plain::narrow<G>(Acc(normal(i))), y[i] = Acc(normal(i + 1000));
      const double term = double(plain::widen(x[i])) * double(y[i]);
      sum += term, size += std::abs(term);
    }
    CHECK(std::abs(double(kernels.dot(x.data(), y.data(), n)) - sum) <= 0x1p-20 * (sizeof(G) == 8 ? 0x1p-29 : 1) * size,
          "%s: dot of %ld", set, long(n));
  }
}

template <typename G>
void test_type(const char* set, const GradientKernels<G>& kernels) {
  test_far<G>(set, kernels);
  for (const int64_t keys : {1, 2, 5, 16, 33})
    for (const int64_t width : {16, 32, 64})
      for (int features = 0; features < kFeatures; ++features)
        for (const bool upstream : {false, true}) test_tile<G>(set, kernels, keys, width, features, upstream);
  test_dot<G>(set, kernels);
}

// A visible logit that is NaN shows, whatever is asked for; a hidden one does not reach the weights.
template <typename G>
void test_nan(const char* set, const GradientKernels<G>& kernels) {
  using Acc = accumulate_t<G>;
  for (int features = 0; features < kFeatures; ++features) {
    if (features & kMask) continue;
    Buffer<Acc> logits(32), from(32), column(16), high(16), zero(16);
    Buffer<uint8_t> bits(4);
    Buffer<G> weights(32), gradients(32);
    for (int i = 0; i < 32; ++i) logits[i] = from[i] = 1;
    for (int i = 0; i < 16; ++i) column[i] = 1, high[i] = 1, zero[i] = 0;
    logits[3] = logits[16 + 3] = std::numeric_limits<Acc>::quiet_NaN();
    GradientTile<G> tile{};
    tile.keys = 2, tile.width = 16, tile.logits = logits.data(), tile.upstream = from.data();
    tile.factor = tile.lse = tile.delta = column.data();
    tile.keep_scale = 1;
    if (features & kEntropy) tile.entropy = column.data();
    if (features & kRange) tile.low = zero.data(), tile.high = high.data();
    if (features & kDropout) tile.bits = bits.data(), tile.bits_stride = 2;
    if (features & kBias) tile.bias = logits.data();
    if (features & kCap) tile.softcap = 5;
    tile.weights = weights.data(), tile.gradients = gradients.data();
    kernels.gradients(tile);
    CHECK(std::isnan(plain::widen(weights[3])) && std::isnan(plain::widen(gradients[3])), "%s: NaN, features %d", set, features);
    if (features & kRange)
      CHECK(plain::widen(weights[16 + 3]) == 0, "%s: a hidden NaN, features %d", set, features);
  }
}

#define TEST_SET(set)                                      \
  test_type<float>(#set, set::gradient_table<float>());    \
  test_type<double>(#set, set::gradient_table<double>());  \
  test_type<bfloat16>(#set, set::gradient_table<bfloat16>()); \
  test_type<float16>(#set, set::gradient_table<float16>()); \
  test_nan<float>(#set, set::gradient_table<float>());     \
  test_nan<double>(#set, set::gradient_table<double>());   \
  test_nan<bfloat16>(#set, set::gradient_table<bfloat16>());

}  // namespace

int main() {
  FOR_EACH_SET(TEST_SET)
  return report("cpu_attention_gradients");
}
