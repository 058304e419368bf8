// The N:M kernels on the host shim against the definition, one element at a time.
#include "cuda_shim.h"

#include "cuda/nm_sparsity.cuh"
#include "cuda_test.h"

#include <cfloat>
#include <initializer_list>
#include <numeric>

using namespace pyrx;
using namespace pyrx::cuda;

namespace {

template <typename T>
constexpr uint64_t kInfinity = sizeof(T) == 8 ? kInfinityDouble : kInfinityFloat;
template <>
constexpr uint64_t kInfinity<__half> = kInfinityHalf;
template <>
constexpr uint64_t kInfinity<__nv_bfloat16> = kInfinityBFloat16;

// Kinds of scores: 0 normal, 1 a few values of either sign, 2 those, zeros, infinities, subnormals and NaN of any
// payload, 3 all equal.
template <typename T>
T score(int kind, uint64_t i) {
  const uint32_t u = lane_of(kind, i, 5);
  if (kind == 0) return narrow<T>(static_cast<Acc<T>>(normal(i)));
  if (kind == 3) return narrow<T>(Acc<T>(-1));
  if (kind == 2 && u % 3 == 0) {
    using U = Bits<T>;
    const U infinity = static_cast<U>(kInfinity<T>), sign = static_cast<U>(U(1) << (8 * sizeof(U) - 1));
    const U kinds[] = {0, infinity, static_cast<U>(infinity + 1 + u % 60), static_cast<U>(sign - 1), 1, 2};
    return typed<T>(static_cast<U>(kinds[u / 3 % 6] | (u & 4096 ? sign : 0)));
  }
  return narrow<T>(static_cast<Acc<T>>(int(u % 5) - 2));
}

// Numbers that order as scores rank: NaN above infinity.
template <typename T>
std::vector<double> ranks(const Buffer<T>& x, bool magnitude) {
  std::vector<double> found(x.size());
  for (int64_t i = 0; i < x.size(); ++i) {
    const double value = widen(x[i]);
    found[i] = std::isnan(value) ? INFINITY : std::isinf(value) ? std::copysign(DBL_MAX, value) : value;
    if (magnitude) found[i] = std::fabs(found[i]);
  }
  return found;
}

struct Shape {
  int64_t outer, length, inner, width;
  int64_t numel() const { return outer * length * inner; }
};

template <typename T>
std::vector<uint8_t> expected_mask(const Buffer<T>& x, const Shape& shape, const RankOrder& order) {
  const std::vector<double> rank = ranks(x, order.magnitude);
  std::vector<uint8_t> found(shape.numel());
  for (int64_t o = 0; o < shape.outer; ++o)
    for (int64_t first = 0; first < shape.length; first += order.m)
      for (int64_t c = 0; c < shape.inner; ++c) {
        const auto at = [&](int64_t i) { return (o * shape.length + i) * shape.inner + c; };
        const int64_t end = std::min<int64_t>(first + order.m, shape.length);
        for (int64_t i = first; i < end; ++i) {
          int ahead = 0;
          for (int64_t j = first; j < end; ++j)
            ahead += j < i ? rank[at(j)] >= rank[at(i)] : rank[at(j)] > rank[at(i)];
          found[at(i)] = ahead < order.n;
        }
      }
  return found;
}

template <typename T>
T dropped_value(T x, const double* factor) {
  return factor ? narrow<T>(widen(x) * static_cast<Acc<T>>(*factor)) : narrow<T>(0);
}

// Runs launch(scores, output) for bits, bools, and values with bits, and compares them all.
template <typename T, typename Launch>
void compare(const Shape& shape, const RankOrder& order, int kind, int offset, const char* what, Launch&& launch) {
  using U = Bits<T>;
  const int64_t rows = shape.numel() / shape.width, row_bytes = (shape.width + 7) / 8;
  const Buffer<T> x(shape.numel(), offset);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = score<T>(kind, i);
  const std::vector<uint8_t> kept = expected_mask(x, shape, order);
  const auto check_bits = [&](const Buffer<uint8_t>& bits) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < 8 * row_bytes; ++i)
        CHECK_EQUAL(bits[row * row_bytes + i / 8] >> i % 8 & 1, i < shape.width && kept[row * shape.width + i],
                    "%s, %d:%d of %lld x %lld x %lld, magnitude %d, kind %d: bit %lld of row %lld", what, order.n, order.m,
                    (long long)shape.outer, (long long)shape.length, (long long)shape.inner, order.magnitude, kind,
                    (long long)i, (long long)row);
  };
  const U* raw = reinterpret_cast<const U*>(x.data());
  const Buffer<uint8_t> bits(rows * row_bytes), bytes(shape.numel()), others(rows * row_bytes);
  launch(raw, NMOutput<U>{bits.data(), nullptr, nullptr, nullptr});
  check_bits(bits);
  launch(raw, NMOutput<U>{nullptr, bytes.data(), nullptr, nullptr});
  for (int64_t i = 0; i < x.size(); ++i)
    CHECK_EQUAL(bytes[i], kept[i], "%s, %d:%d, magnitude %d, kind %d: element %lld of %lld", what, order.n, order.m,
                order.magnitude, kind, (long long)i, (long long)x.size());
  const double decay = 0.3;
  for (const double* factor : {static_cast<const double*>(nullptr), &decay}) {
    const Buffer<T> values(shape.numel(), offset);
    launch(x.data(), NMOutput<T>{others.data(), nullptr, values.data(), factor});
    check_bits(others);
    for (int64_t i = 0; i < x.size(); ++i) {
      const T expected = kept[i] ? x[i] : dropped_value(x[i], factor);
      CHECK(same_bits(values[i], expected) || (!kept[i] && std::isnan(widen(values[i])) && std::isnan(widen(expected))),
            "%s, %d:%d: value %lld", what, order.n, order.m, (long long)i);
    }
  }
}

// The launchers' arithmetic.
bool collapses(const Shape& shape, int m) { return shape.length % m == 0 && shape.length % kGroup == 0; }

template <typename T>
void test_rows(const Shape& shape, int n, int m, bool magnitude, int kind, int offset, unsigned blocks) {
  const RankOrder order{kInfinity<T>, n, m, magnitude};
  NMRows rows{shape.outer, shape.length, 0};
  if (collapses(shape, m)) rows = {1, shape.numel(), 0};
  const bool dense = offset == 0 && rows.count == 1;
  const auto launch_any = [&](auto* from, auto out) {
    using E = std::remove_cv_t<std::remove_pointer_t<decltype(from)>>;
    const int step = std::lcm(m, kGroup);
    const int span = int(std::min<int64_t>(kNMTile / step, (rows.length + step - 1) / step)) * step;
    if (out.values) {
      if constexpr (!std::is_integral_v<E>)
        shim::launch(nm_any_rows_kernel<E, true>, {blocks}, {kNMThreads}, 0, from, rows, span, order, out);
    } else {
      shim::launch(nm_any_rows_kernel<E, false>, {blocks}, {kNMThreads}, 0, from, rows, span, order, out);
    }
  };
  compare<T>(shape, order, kind, offset, "any rows", launch_any);
  dispatch_ratio(n, m, [&](auto ratio) {
    constexpr int kN = decltype(ratio)::n, kM = decltype(ratio)::m;
    const int64_t whole = kM == 0 ? m / kGroup : 1;
    rows.chunks = ((rows.length + 7) / 8 + whole - 1) / whole * whole;
    compare<T>(shape, order, kind, offset, "rows", [&](auto* from, auto out) {
      using E = std::remove_cv_t<std::remove_pointer_t<decltype(from)>>;
      constexpr bool values = !std::is_integral_v<E>;
      shim::launch(nm_rows_kernel<E, kN, kM, values>, {blocks}, {kNMThreads}, 0, from, rows, order, dense, out);
    });
  });
}

template <typename T, int kN, int kM>
void test_columns(const Shape& shape, int n, int m, bool magnitude, int kind, int offset, unsigned blocks) {
  const RankOrder order{kInfinity<T>, n, m, magnitude};
  const NMColumns layout{shape.outer, shape.length, shape.inner, shape.width};
  const bool aligned = offset == 0 && shape.width % kGroup == 0;
  compare<T>(shape, order, kind, offset, "columns", [&](auto* from, auto out) {
    using E = std::remove_cv_t<std::remove_pointer_t<decltype(from)>>;
    constexpr bool values = !std::is_integral_v<E>;
    if constexpr (kM == -1)
      shim::launch(nm_any_columns_kernel<E, values>, {blocks}, {64}, 64 * m * sizeof(E), from, layout, order, out);
    else
      shim::launch(nm_columns_kernel<E, kN, kM, values>, {blocks}, {kNMThreads}, 0, from, layout, order, aligned, out);
  });
}

template <typename T>
void test_ratios(int kind, int offset, unsigned blocks) {
  const int ratios[][2] = {{1, 1}, {1, 2}, {2, 2}, {1, 4}, {2, 4}, {3, 4}, {1, 8}, {2, 8}, {4, 8}, {5, 8}, {8, 8},
                           {1, 16}, {2, 16}, {8, 16}, {1, 32}, {2, 32}, {31, 32}, {40, 64}, {1, 128}, {2, 128},
                           {64, 128}, {128, 128}, {1, 3}, {2, 3}, {3, 5}, {5, 12}, {90, 127}};
  for (const bool magnitude : {true, false}) {
    for (const auto& [n, m] : ratios) {
      if ((kind == 0 || kind == 3) && (n + m + magnitude) % 3 != 0) continue;  // each ratio at some type and kind
      // the first is more than two tiles of a block
      for (const Shape& shape : {Shape{3, 5504, 1, 5504}, Shape{3, 8 * m, 1, 8 * m}, Shape{5, 37, 1, 37}})
        if (shape.length < 5504 || (m != 1 && (kind == 1 || kind == 2) && 128 % m == 0))
          test_rows<T>(shape, n, m, magnitude, kind, offset, blocks);
      for (const Shape& shape : {Shape{2, 2 * m, 16, 16}, Shape{1, 19, 27, 9}, Shape{2, 11, 9, 9}, Shape{1, m, 48, 24}}) {
        test_columns<T, 0, -1>(shape, n, m, magnitude, kind, offset, blocks);
        if (m == 4 && n == 1) test_columns<T, 1, 4>(shape, n, m, magnitude, kind, offset, blocks);
        if (m == 4 && n == 2) test_columns<T, 2, 4>(shape, n, m, magnitude, kind, offset, blocks);
        if (m == 4 && n == 3) test_columns<T, 3, 4>(shape, n, m, magnitude, kind, offset, blocks);
        if (m == 8) test_columns<T, 0, 8>(shape, n, m, magnitude, kind, offset, blocks);
        if (n == 1) test_columns<T, 1, 0>(shape, n, m, magnitude, kind, offset, blocks);
        if (n == 2) test_columns<T, 2, 0>(shape, n, m, magnitude, kind, offset, blocks);
      }
    }
  }
}

// Every pattern of a few values in a group of four and of eight: all that comparisons can see.
template <typename T>
void test_all_patterns() {
  const float values[] = {0, 1, -2, 3};
  for (const int m : {4, 8}) {
    const int64_t base = m == 4 ? 4 : 3, groups = m == 4 ? 256 : 6561;
    const Buffer<T> x(groups * m);
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0, rest = g; i < m; ++i, rest /= base) x[g * m + i] = narrow<T>(Acc<T>(values[rest % base]));
    const Shape shape{1, groups * m, 1, groups * m};
    const Buffer<uint8_t> bits((shape.numel() + 7) / 8);
    for (const bool magnitude : {true, false})
      for (int n = 1; n < m; ++n) {
        const RankOrder order{kInfinity<T>, n, m, magnitude};
        const std::vector<uint8_t> kept = expected_mask(x, shape, order);
        dispatch_ratio(n, m, [&](auto ratio) {
          using U = Bits<T>;
          shim::launch(nm_rows_kernel<U, decltype(ratio)::n, decltype(ratio)::m, false>, {4}, {kNMThreads}, 0,
                       reinterpret_cast<const U*>(x.data()), NMRows{1, shape.numel(), bits.size()}, order, true,
                       NMOutput<U>{bits.data(), nullptr, nullptr, nullptr});
        });
        for (int64_t i = 0; i < shape.numel(); ++i)
          CHECK_EQUAL(bits[i / 8] >> i % 8 & 1, kept[i], "%d:%d, pattern %lld, element %lld", n, m, (long long)(i / m),
                      (long long)(i % m));
      }
  }
}

template <typename T>
void test_apply(const Shape& shape, int offset, unsigned blocks) {
  const int64_t count = shape.numel() / shape.width, row_bytes = (shape.width + 7) / 8;
  const Buffer<T> x(shape.numel(), offset), weight(shape.numel(), offset), out(shape.numel(), offset);
  const Buffer<uint8_t> bits(count * row_bytes);
  for (int64_t i = 0; i < x.size(); ++i) {
    x[i] = score<T>(2, i);
    weight[i] = score<T>(0, i + 1000);
  }
  for (int64_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint8_t>(lane_of(9, i, 0));
  NMRows rows{count, shape.width, row_bytes};
  if (shape.width % kGroup == 0) rows = {1, shape.numel(), shape.numel() / kGroup};
  const double factor = 0.7;
  const Acc<T> strength = static_cast<Acc<T>>(0.013);
  for (const Dropped dropped : {kZero, kFactor, kRegularize}) {
    shim::launch(nm_apply_kernel<T>, {blocks}, {kNMThreads}, 0, x.data(), bits.data(),
                 dropped == kRegularize ? weight.data() : nullptr, rows, dropped, dropped == kFactor ? &factor : nullptr,
                 strength, offset == 0 && rows.count == 1, out.data());
    for (int64_t i = 0; i < x.size(); ++i) {
      const int64_t row = i / shape.width, column = i % shape.width;
      T expected = x[i];
      if (!(bits[row * row_bytes + column / 8] >> column % 8 & 1)) {
        if (dropped == kRegularize) expected = narrow<T>(widen(x[i]) + strength * widen(weight[i]));
        else expected = dropped_value(x[i], dropped == kFactor ? &factor : nullptr);
      }
      CHECK(same_bits(out[i], expected) || (std::isnan(widen(out[i])) && std::isnan(widen(expected))),
            "apply %d to %lld x %lld: element %lld", int(dropped), (long long)count, (long long)shape.width,
            (long long)i);
    }
  }
}

template <typename T>
void test_type(std::initializer_list<int> kinds) {
  for (const int kind : kinds) test_ratios<T>(kind, kind % 2, kind == 2 ? 1 : 2);
  test_all_patterns<T>();
  for (const int offset : {0, 1})
    for (const Shape& shape : {Shape{1, 1, 1, 1}, Shape{3, 1, 5, 5}, Shape{7, 1, 100, 100}, Shape{5, 1, 1312, 1312}})
      test_apply<T>(shape, offset, offset + 1);
}

}  // namespace

int main() {
  test_type<__nv_bfloat16>({1, 2, 3});
  test_type<__half>({2});
  test_type<float>({0, 2});
  test_type<double>({2});
  return report("N:M kernels");
}
