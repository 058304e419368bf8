// Row kernels of attention of every instruction set this machine has, against their definition in float64.
#include <limits>
#include <numbers>
#include <vector>

#include "cpu/attention_simd.cpp"
#include "cpu_test.h"

namespace {

using namespace pyrx;
using namespace pyrx::cpu;

constexpr int64_t kLanes = plain::kLanes, kBatch = 2, kHeads = 3, kQueries = 20;

template <typename T>
bool near(T got, double expected, double tolerance) {
  if (std::isinf(expected) || std::isnan(expected))
    return same_bits(double(got), expected) || (got != got && expected != expected);
  const double unit = sizeof(T) == 8 ? 0x1p-52 : 0x1p-23;
  return std::abs(double(got) - expected) <= tolerance * unit * std::max(1e-6, std::abs(expected));
}

template <typename T>
void fill(Buffer<T>& x, uint64_t seed) {
  for (int64_t i = 0; i < x.size(); ++i) x[i] = plain::narrow<T>(static_cast<accumulate_t<T>>(normal(seed + i)));
}

// What a problem of `keys` keys has beside its products.
enum Bias { kNone, kRow, kPair, kBiases };

template <typename T>
void test_logits(const char* set, const LogitKernels<T>& kernels, int64_t keys, int64_t k, int64_t n, Bias kind,
                 int64_t columns, bool shared) {
  using Acc = accumulate_t<T>;
  const int64_t rows = 5, stride = n + 7, q = 9, b = 1, h = 2, batch = shared ? 1 : kBatch, heads = shared ? 1 : kHeads;
  Buffer<Acc> logits((rows - 1) * stride + n, 1), query_scale(rows);
  Buffer<T> row(batch * heads * kQueries * (keys / columns), 1), column(batch * heads * kQueries * columns, 3);
  Buffer<int32_t> range(kBatch * kQueries * 2);
  Buffer<uint8_t> key_mask(n);
  fill(logits, 1);
  fill(query_scale, 2);
  fill(row, 3);
  fill(column, 40000);
  const std::vector<Acc> before(logits.data(), logits.data() + logits.size());
  for (int64_t i = 0; i < kBatch * kQueries; ++i) {
    range[2 * i] = static_cast<int32_t>(k) + static_cast<int32_t>(lane_of(5, i, 0) % (n + 4)) - 2;
    range[2 * i + 1] = static_cast<int32_t>(k) + static_cast<int32_t>(lane_of(6, i, 0) % (2 * n + 4)) - 2;
  }
  for (int64_t i = 0; i < n; ++i) key_mask[i] = lane_of(7, i, 0) % 4 != 0;
  for (const Acc softcap : {Acc(0), Acc(1.5)})
    for (int rules = 0; rules < 4; ++rules)
      for (const bool scaled : {false, true}) {
        std::memcpy(logits.data(), before.data(), before.size() * sizeof(Acc));
        LogitTile<T> tile{};
        tile.b = b, tile.h = h, tile.q = q, tile.k = k, tile.rows = rows, tile.keys = n;
        tile.logits = logits.data(), tile.stride = stride, tile.scale = Acc(0.7), tile.softcap = softcap;
        tile.query_scale = scaled ? query_scale.data() : nullptr;
        tile.bias.columns = 1;
        if (kind != kNone) {
          tile.bias.row = row.data(), tile.bias.row_query = keys / columns;
          if (!shared) tile.bias.row_head = kQueries * (keys / columns);
          tile.bias.row_batch = kHeads * tile.bias.row_head;
        }
        if (kind == kPair) {
          tile.bias.column = column.data(), tile.bias.columns = columns, tile.bias.column_query = columns;
          if (!shared) tile.bias.column_head = kQueries * columns;
          tile.bias.column_batch = kHeads * tile.bias.column_head;
        }
        tile.rules = {-1, -1, nullptr, 0, keys};
        if (rules == 1) tile.rules.left = 2 * n / 3, tile.rules.right = 0;
        if (rules == 2) tile.rules.range = range.data(), tile.rules.range_stride = 2 * kQueries;
        if (rules == 3) tile.rules.left = q + 2 - k, tile.key_mask = key_mask.data();
        kernels.scale(tile);
        const std::vector<Acc> capped(logits.data(), logits.data() + logits.size());
        kernels.hide(tile);
        for (int64_t i = 0; i < logits.size(); ++i) {
          const int64_t r = i / stride, c = i % stride;
          if (c >= n) {  // between the rows
            CHECK(same_bits(logits[i], before[i]), "%s: %zu bytes, row %ld, past its %ld keys", set, sizeof(T), r, n);
            continue;
          }
          double x = double(before[i]) * 0.7 * (scaled ? double(query_scale[r]) : 1);
          if (softcap > 0) x = softcap * std::tanh(x / softcap);
          CHECK(near(capped[i], x, 8), "%s: scale %zu bytes, cap %g, row %ld, key %ld: %g, expected %g", set, sizeof(T),
                double(softcap), r, c, double(capped[i]), x);
          x = capped[i];
          const int64_t of = ((shared ? 0 : b * kHeads + h) * kQueries + q + r), key = k + c;
          double bias = 0;
          if (kind != kNone) bias = plain::widen(row[of * (keys / columns) + key / columns]);
          if (kind == kPair) bias += plain::widen(column[of * columns + key % columns]);
          const KeyRange seen = tile.rules.of(b, q + r);
          const bool visible = key >= seen.first && key < seen.last && !(rules == 3 && !key_mask[c]);
          const double expected = visible ? x + bias : -std::numeric_limits<double>::infinity();
          const double slack = 4 * (std::abs(x) + std::abs(bias)) * (sizeof(Acc) == 8 ? 0x1p-52 : 0x1p-23);
          CHECK(visible ? std::abs(double(logits[i]) - expected) <= slack : same_bits(double(logits[i]), expected),
                "%s: hide %zu bytes, bias %d of %ld columns, rules %d, %ld keys from %ld, row %ld, key %ld: %g, not %g",
                set, sizeof(T), kind, columns, rules, n, k, r, c, double(logits[i]), expected);
        }
      }
}

template <typename T>
void test_tanh(const char* set, const LogitKernels<T>& kernels) {
  using Acc = accumulate_t<T>;
  std::vector<Acc> x{0, Acc(-0.0), Acc(1e-30), Acc(0.625), Acc(-0.625), Acc(0.6249999), 9, 10, 11, 1000, Acc(1e30),
                     Acc(INFINITY), Acc(-INFINITY), Acc(NAN)};
  for (int i = 0; i < 300; ++i) x.push_back(static_cast<Acc>(normal(900 + i) * std::pow(10.0, i % 7 - 5)));
  for (size_t from = 0; from < x.size(); from += kLogitKeys) {
    LogitTile<T> tile{};
    std::vector<Acc> logits(x.begin() + from, x.begin() + std::min(x.size(), from + kLogitKeys));
    tile.rows = 1, tile.keys = static_cast<int64_t>(logits.size()), tile.logits = logits.data(), tile.scale = 1;
    tile.softcap = 1;
    kernels.scale(tile);
    for (size_t i = 0; i < logits.size(); ++i) {
      const double expected = std::tanh(double(x[from + i]));
      const double tolerance = 2 * (sizeof(Acc) == 8 ? 0x1p-52 : 0x1p-23) * std::abs(expected);
      CHECK(std::isnan(expected) ? logits[i] != logits[i] : std::abs(double(logits[i]) - expected) <= tolerance,
            "%s: tanh of %g: %.9g, expected %.9g", set, double(x[from + i]), double(logits[i]), expected);
    }
  }
}

// A tile of logits as of a mask that is added, of one value, and then one of small logits, which nothing of it reaches.
template <typename G>
void test_far(const char* set, const SoftmaxKernels<G>& kernels) {
  using Acc = accumulate_t<G>;
  const int64_t rows = 17, keys = 40, stride = 48;
  for (const double far : {-1e7, -1e9, -1e10, -3e12, -1e30, -2e38, 1e10, 1e30}) {
    Buffer<Acc> logits(rows * stride, 16), most(rows), total(rows), sums(rows), out(rows);
    Buffer<G> weights(rows * stride, 16);
    const auto step = [&](double value, bool first) {
      for (int64_t i = 0; i < rows * stride; ++i) logits[i] = static_cast<Acc>(value);
      kernels.step({rows, keys, logits.data(), stride, std::numbers::log2e_v<Acc>, most.data(), total.data(), sums.data(),
                    first ? nullptr : out.data(), 1, 1, nullptr, 0, weights.data(), stride});
    };
    for (int64_t r = 0; r < rows; ++r) most[r] = -std::numeric_limits<Acc>::infinity(), total[r] = sums[r] = 0, out[r] = 1;
    for (const double value : {far, 1.0}) {
      step(value, value == far);
      const double kept = std::max(value, far) == value ? 1 : 0;
      for (int64_t r = 0; r < rows; ++r) {
        const double got = plain::widen(weights[r * stride + keys - 1]);
        CHECK(std::abs(got - kept) <= 1e-6, "%s: %zu bytes, a weight of %g after %g: %g", set, sizeof(G), value, far, got);
        CHECK(std::abs(total[r] - keys) <= 1e-4, "%s: %zu bytes, total of %g after %g: %g", set, sizeof(G), value, far, double(total[r]));
        CHECK(std::abs(sums[r]) <= 1e-3, "%s: %zu bytes, exponents of %g after %g: %g", set, sizeof(G), value, far, double(sums[r]));
      }
    }
  }
}

// Steps of tiles of `keys` keys, the last of `rest`, against the sums over all of them at once.
template <typename G>
void test_softmax(const char* set, const SoftmaxKernels<G>& kernels, int64_t keys, int64_t rest, bool dropped,
                  bool weighted, bool in_place) {
  using Acc = accumulate_t<G>;
  constexpr double kHidden = -std::numeric_limits<double>::infinity(), unit = sizeof(Acc) == 8 ? 0x1p-52 : 0x1p-23;
  const int64_t rows = 19, stride = 144, size = 21, out_stride = 24, bits_stride = 17, tiles = 4;
  const Acc factor = Acc(0.3);
  Buffer<Acc> most(rows), total(rows), sums(rows), out(rows * out_stride, 1);
  std::vector<double> seen(rows, kHidden), sum(rows, 0), moment(rows, 0), shrunk(rows, 1);
  for (int64_t r = 0; r < rows; ++r) most[r] = static_cast<Acc>(kHidden), total[r] = sums[r] = 0;
  const std::vector<Acc> ones(rows * out_stride, 1);
  std::copy(ones.begin(), ones.end(), out.data());
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t n = t + 1 == tiles ? rest : keys, padded = (n + kLanes - 1) / kLanes * kLanes;
    Buffer<Acc> logits((rows - 1) * stride + padded, 16);
    Buffer<G> weights((rows - 1) * stride + padded, 16);
    Buffer<uint8_t> bits((rows - 1) * bits_stride + padded / 8);
    for (int64_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint8_t>(lane_of(11 + t, i, 0));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < n; ++c) {
        const uint64_t i = (t * rows + r) * 128 + c;
        // a row of nothing in the first tiles, one of nothing at all, one that is hidden here and there, large ones, and
        // rows that grow by more than the slack
        const bool hidden = (r == 2 && t < 2) || r == 3 || (r == 4 && lane_of(12, i, 0) % 2);
        const double grown = r > 5 && r % 3 == 0 ? double(40 * t) : 0;
        logits[r * stride + c] = static_cast<Acc>(hidden ? kHidden : normal(i) * (r == 5 ? 1000 : 10) + grown);
      }
    const std::vector<Acc> before(logits.data(), logits.data() + logits.size());
    G* to = weights.data();
    if constexpr (std::is_same_v<G, Acc>) to = in_place ? logits.data() : to;
    kernels.step({rows, n, logits.data(), stride, factor, most.data(), total.data(), weighted ? sums.data() : nullptr,
                  t == 0 ? nullptr : out.data(), size, out_stride, dropped ? bits.data() : nullptr, bits_stride, to,
                  stride});
    for (int64_t r = 0; r < rows; ++r) {
      double greatest = kHidden, here = 0, moved = 0;
      for (int64_t c = 0; c < n; ++c) greatest = std::max(greatest, double(factor) * double(before[r * stride + c]));
      const double now = greatest > seen[r] + kExponentSlack ? greatest : seen[r];
      const double base = now == kHidden ? 0 : now;
      const double shrink = seen[r] != kHidden ? std::exp2(seen[r] - base) : now == kHidden ? 1 : 0;
      for (int64_t c = 0; c < padded; ++c) {
        const double exponent = c < n ? double(factor) * double(before[r * stride + c]) - base : kHidden;
        const double weight = std::exp2(exponent);
        here += weight;
        if (weight > 0) moved += weight * exponent;
        const bool kept = !dropped || bits[r * bits_stride + c / 8] >> c % 8 & 1;
        const double got = plain::widen(to[r * stride + c]), expected = kept ? weight : 0;
        const double step = std::max(sizeof(G) == 2 ? 0x1p-8 : 0.0, 4 * unit * (1 + std::abs(base)));
        const double least = sizeof(G) == 2 ? 0x1p-24 : 1e-37;
        CHECK(kept && weight > 0 ? std::abs(got - expected) <= step * expected + least : got == 0,
              "%s: weight %zu bytes, tile %ld of %ld keys, row %ld, key %ld: %g, expected %g", set, sizeof(G), t, n, r,
              c, got, expected);
      }
      moment[r] = (seen[r] == kHidden ? 0 : moment[r] + (seen[r] - base) * sum[r]) * shrink + moved;
      sum[r] = sum[r] * shrink + here;
      seen[r] = now;
      if (t > 0) shrunk[r] *= shrink;
      const double slack = 64 * unit * (1 + std::abs(base));
      CHECK(same_bits(double(most[r]), now) || std::abs(double(most[r]) - now) <= unit * std::abs(now),
            "%s: greatest of row %ld: %g, expected %g", set, r, double(most[r]), now);
      CHECK(std::abs(double(total[r]) - sum[r]) <= slack * sum[r], "%s: total of row %ld: %g, expected %g", set, r,
            double(total[r]), sum[r]);
      if (weighted)
        CHECK(std::abs(double(sums[r]) - moment[r]) <= slack * (sum[r] + std::abs(moment[r])),
              "%s: weighted sum of row %ld, tile %ld: %g, expected %g", set, r, t, double(sums[r]), moment[r]);
      for (int64_t c = 0; c < out_stride; ++c) {
        const double expected = c < size ? shrunk[r] : 1, got = double(out[r * out_stride + c]);
        CHECK(std::abs(got - expected) <= slack * expected + 1e-37, "%s: out of row %ld, column %ld: %g, expected %g", set,
              r, c, got, expected);
      }
    }
  }
}

// Weights whose exponents are the logits themselves.
template <typename G>
void test_exp2(const char* set, const SoftmaxKernels<G>& kernels) {
  using Acc = accumulate_t<G>;
  Buffer<Acc> logits(128), most(1), total(1);
  Buffer<G> weights(128);
  for (int round = 0; round < 50; ++round) {
    for (int64_t i = 0; i < 128; ++i)
      logits[i] = static_cast<Acc>(i == 0 ? 0 : -double(lane_of(13, round * 128 + i, 0)) / 65536 * (round % 2 ? 1 : 125));
    std::vector<Acc> x(logits.data(), logits.data() + 128);
    most[0] = static_cast<Acc>(-INFINITY), total[0] = 0;
    kernels.step({1, 128, logits.data(), 128, 1, most.data(), total.data(), nullptr, nullptr, 16, 16, nullptr, 0,
                  weights.data(), 128});
    for (int64_t i = 0; i < 128; ++i) {
      const double expected = std::exp2(double(x[i])), got = plain::widen(weights[i]);
      const bool half = std::is_same_v<G, float16>;
      const double unit = sizeof(G) == 8 ? 0x1p-52 : sizeof(G) == 4 ? 0x1p-23 : half ? 0x1p-11 : 0x1p-8;
      CHECK(std::abs(got - expected) <= 2 * unit * expected + (half ? 0x1p-25 : 0),
            "%s: 2^%.9g to %zu bytes: %.9g, expected %.9g", set, double(x[i]), sizeof(G), got, expected);
    }
  }
}

template <typename G>
void test_nan(const char* set, const SoftmaxKernels<G>& kernels) {
  using Acc = accumulate_t<G>;
  Buffer<Acc> logits(16), most(1), total(1);
  Buffer<G> weights(16);
  for (int64_t i = 0; i < 16; ++i) logits[i] = static_cast<Acc>(i == 5 ? NAN : double(i));
  most[0] = static_cast<Acc>(-INFINITY), total[0] = 0;
  kernels.step({1, 16, logits.data(), 16, 1, most.data(), total.data(), nullptr, nullptr, 16, 16, nullptr, 0,
                weights.data(), 16});
  CHECK(total[0] != total[0], "%s: the total of a row with NaN: %g", set, double(total[0]));
}

template <typename G>
void test_softmax_type(const char* set, const SoftmaxKernels<G>& kernels) {
  test_far<G>(set, kernels);
  test_exp2(set, kernels);
  test_nan(set, kernels);
  for (const int64_t keys : {16, 32, 48, 64, 128})
    for (const int64_t rest : {1, 15, 16, 33, 100, 128})
      for (int flags = 0; flags < 8; ++flags)
        if (rest <= keys) test_softmax<G>(set, kernels, keys, rest, flags & 1, flags & 2, flags & 4);
}

template <typename T>
void test_type(const char* set, const LogitKernels<T>& kernels) {
  test_tanh<T>(set, kernels);
  for (const int64_t n : {1, 3, 16, 31, 64, 100, 128})
    for (const int64_t k : {int64_t(0), int64_t(37), int64_t(128)})
      for (const bool shared : {false, true}) {
        test_logits<T>(set, kernels, 240, std::min(k, 240 - n), n, kNone, 1, shared);
        test_logits<T>(set, kernels, 240, std::min(k, 240 - n), n, kRow, 1, shared);
        for (const int64_t columns : {1, 2, 5, 15, 16, 20, 80, 120, 240})
          test_logits<T>(set, kernels, 240, std::min(k, 240 - n), n, kPair, columns, shared);
      }
}

#define TEST_TYPE(name, T)                       \
  test_type<T>(#name, name::logit_table<T>());   \
  test_softmax_type<T>(#name, name::softmax_table<T>());
#define TEST_SET(name)      \
  TEST_TYPE(name, float)    \
  TEST_TYPE(name, double)   \
  TEST_TYPE(name, bfloat16) \
  TEST_TYPE(name, float16)

}  // namespace

int main() {
  FOR_EACH_SET(TEST_SET)
  return report("cpu_attention");
}
