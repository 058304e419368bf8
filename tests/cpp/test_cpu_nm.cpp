// Kernels of the N:M ops of every instruction set this machine has, against the definition, bit for bit.
#include <limits>
#include <vector>

#include "cpu/nm_simd.cpp"
#include "cpu_test.h"

namespace {

using namespace pyrx;
using namespace pyrx::cpu;

template <typename T>
struct Format;
template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr Bits infinity = kInfinityFloat;
};
template <>
struct Format<double> {
  using Bits = uint64_t;
  static constexpr Bits infinity = kInfinityDouble;
};
template <>
struct Format<bfloat16> {
  using Bits = uint16_t;
  static constexpr Bits infinity = kInfinityBFloat16;
};
template <>
struct Format<float16> {
  using Bits = uint16_t;
  static constexpr Bits infinity = kInfinityHalf;
};
template <typename T>
using bits_t = typename Format<T>::Bits;

enum Kind { kNormal, kTied, kSpecial, kRandomBits, kKinds };

template <typename T>
T score(Kind kind, uint64_t i) {
  const uint32_t random = lane_of(3, i, 0);
  const double special[] = {0, 1, 2, 65504, 1e-7, std::numeric_limits<double>::infinity(), std::nan("")};
  const double x = kind == kNormal ? normal(i) : kind == kTied ? static_cast<int>(random % 5) - 2 : special[random % 7];
  T out = plain::narrow<T>(static_cast<accumulate_t<T>>(x));
  bits_t<T> bits;
  std::memcpy(&bits, &out, sizeof(bits));
  // every sign and payload of NaN, zeros of both signs
  if (kind == kSpecial)
    bits |= static_cast<bits_t<T>>(random >> 8 & 1) << (8 * sizeof(bits) - 1) | (x != x ? random & 7 : 0);
  if (kind == kRandomBits)
    for (size_t j = 0; j < sizeof(bits); j += 2)
      bits = static_cast<bits_t<T>>(static_cast<uint64_t>(bits) << 16 | lane_of(4 + j, i, 0));
  std::memcpy(&out, &bits, sizeof(bits));
  return out;
}

template <typename T>
Buffer<T> scores(Kind kind, int64_t n) {
  Buffer<T> out(n, 1);
  for (int64_t i = 0; i < n; ++i) out[i] = score<T>(kind, i);
  return out;
}

// How many of a group's m elements, `stride` apart, come before element i.
template <typename T>
int rank_of(const T* group, int64_t stride, int m, int i, bool magnitude) {
  const auto key = [&](int j) {
    bits_t<T> bits;
    std::memcpy(&bits, group + j * stride, sizeof(bits));
    return rank_key(bits, Format<T>::infinity, magnitude);
  };
  int rank = 0;
  for (int j = 0; j < m; ++j) rank += key(j) > key(i) || (key(j) == key(i) && j < i);
  return rank;
}

std::vector<int> kept_counts(int m) {
  std::vector<int> found;
  for (int n = 1; n <= m; ++n)
    if (m <= 16 || n <= 4 || n == m / 8 || n == m / 8 + 1 || n == m / 2 || n >= m - 1) found.push_back(n);
  return found;
}

void pack(const std::vector<int>& ranks, int64_t first, int64_t count, int n, uint8_t* bits) {
  std::memset(bits, 0, (count + 7) / 8);
  for (int64_t i = 0; i < count; ++i) bits[i / 8] |= (ranks[first + i] < n) << i % 8;
}

bool same(const Buffer<uint8_t>& a, const Buffer<uint8_t>& b) { return std::memcmp(a.data(), b.data(), a.size()) == 0; }

template <typename T>
void test_groups(const char* set, const NMKernels<T>& kernels, int m, Kind kind, bool magnitude) {
  for (const int64_t groups : {1, 2, 19}) {
    const Buffer<T> x = scores<T>(kind, groups * m);
    std::vector<int> ranks(groups * m);
    for (int64_t i = 0; i < groups * m; ++i)
      ranks[i] = rank_of(x.data() + i / m * m, 1, m, static_cast<int>(i % m), magnitude);
    for (const int n : kept_counts(m)) {
      Buffer<uint8_t> got((groups * m + 7) / 8), expected(got.size());
      pack(ranks, 0, groups * m, n, expected.data());
      kernels.rank_groups(x.data(), groups, {n, m, magnitude}, got.data());
      CHECK(same(got, expected), "%s: %ld groups of %d:%d, %zu bytes, kind %d, magnitude %d", set, groups, n, m,
            sizeof(T), kind, magnitude);
    }
  }
}

template <typename T>
void test_columns(const char* set, const NMKernels<T>& kernels, int m, Kind kind, bool magnitude) {
  for (const int64_t columns : {1, 9, 16, 71})
    for (const int rows : {m, m - 1, 1}) {
      if (rows < 1 || (m > 16 && columns != 71)) continue;
      const int64_t stride = columns + 3, bits_stride = (columns + 7) / 8 + 1;
      const Buffer<T> x = scores<T>(kind, (rows - 1) * stride + columns);
      std::vector<int> ranks(rows * columns);
      for (int i = 0; i < rows; ++i)
        for (int64_t c = 0; c < columns; ++c)
          ranks[i * columns + c] = rank_of(x.data() + c, stride, rows, i, magnitude);
      for (const int n : kept_counts(m)) {
        Buffer<uint8_t> got(rows * bits_stride - 1), expected(got.size());  // what is between the rows stays
        for (int i = 0; i < rows; ++i) pack(ranks, i * columns, columns, n, expected.data() + i * bits_stride);
        kernels.rank_columns(x.data(), stride, rows, columns, {n, m, magnitude}, got.data(), bits_stride);
        CHECK(same(got, expected), "%s: %ld columns of %d:%d, %d rows, %zu bytes, kind %d, magnitude %d", set, columns,
              n, m, rows, sizeof(T), kind, magnitude);
      }
    }
}

template <typename T>
void test_ranks(const char* set, const NMKernels<T>& kernels) {
  std::vector<int> sizes;
  for (int m = 1; m <= 16; ++m) sizes.push_back(m);
  for (const int m : {17, 24, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128}) sizes.push_back(m);
  for (const int m : sizes)
    for (int kind = 0; kind < kKinds; ++kind)
      for (const bool magnitude : {true, false}) {
        test_groups(set, kernels, m, static_cast<Kind>(kind), magnitude);
        test_columns(set, kernels, m, static_cast<Kind>(kind), magnitude);
      }
}

template <typename T>
void test_apply(const char* set, const NMKernels<T>& kernels) {
  using Acc = accumulate_t<T>;
  const auto is_nan = [](T x) { return plain::widen(x) != plain::widen(x); };
  for (const int64_t n : {1, 3, 8, 15, 16, 31, 32, 33, 64, 100, 1311})
    for (int kind = 0; kind < kKinds; ++kind)
      for (const Dropped dropped : {kZero, kFactor, kRegularize})
        for (const bool in_place : {false, true}) {
          const Buffer<T> x = scores<T>(static_cast<Kind>(kind), n), weight = scores<T>(kNormal, n);
          Buffer<uint8_t> bits((n + 7) / 8);
          for (int64_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint8_t>(lane_of(9, i, 0));
          Buffer<T> out(n, 1);
          if (in_place) std::memcpy(out.data(), x.data(), n * sizeof(T));
          const ApplyRun<T> run{dropped, Acc(0.3), Acc(0.7), dropped == kRegularize ? weight.data() : nullptr};
          kernels.apply(run, in_place ? out.data() : x.data(), bits.data(), n, out.data());
          for (int64_t i = 0; i < n; ++i) {
            Acc rest = 0;
            if (dropped == kFactor) rest = plain::widen(x[i]) * Acc(0.3);
            if (dropped == kRegularize) rest = plain::widen(x[i]) + Acc(0.7) * plain::widen(weight[i]);
            const bool kept = bits[i / 8] >> i % 8 & 1;
            const T expected = kept ? x[i] : plain::narrow<T>(rest);
            CHECK(same_bits(out[i], expected) || (!kept && is_nan(out[i]) && is_nan(expected)),
                  "%s: apply %ld to %zu bytes, kind %d, element %ld of %ld", set, int64_t(dropped), sizeof(T), kind,
                  i, n);
          }
        }
}

void test_unpack(const char* set, const NMByteKernels& kernels) {
  for (const int64_t n : {1, 7, 8, 31, 32, 33, 63, 64, 65, 100, 1311}) {
    Buffer<uint8_t> bits((n + 7) / 8), bytes(n, 1);
    for (int64_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint8_t>(lane_of(9, i, 0));
    kernels.unpack(bits.data(), n, bytes.data());
    for (int64_t i = 0; i < n; ++i)
      CHECK_EQUAL(bytes[i], bits[i / 8] >> i % 8 & 1, "%s: unpack, element %ld of %ld", set, i, n);
  }
}

void test_rows(const char* set, const NMByteKernels& kernels) {
  for (int width = 1; width < 8; ++width)
    for (const int64_t rows : {1, 7, 8, 9, 16, 100}) {
      Buffer<uint8_t> bits((rows * width + 7) / 8), spread(rows), back(bits.size());
      for (int64_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint8_t>(lane_of(9, i, 0));
      if (rows * width % 8 != 0) bits[bits.size() - 1] &= (1 << rows * width % 8) - 1;
      kernels.spread(bits.data(), rows, width, spread.data());
      kernels.gather(spread.data(), rows, width, back.data());
      CHECK(same(bits, back), "%s: gather %ld rows of %d bits", set, rows, width);
      for (int64_t i = 0; i < rows * 8; ++i) {
        const int64_t at = i / 8 * width + i % 8;
        const bool expected = i % 8 < width && bits[at / 8] >> at % 8 & 1;
        CHECK_EQUAL(spread[i / 8] >> i % 8 & 1, expected, "%s: spread %ld rows of %d bits, row %ld", set, rows, width,
                    i / 8);
      }
    }
}

template <typename T>
void test_type(const char* set, const NMKernels<T>& kernels) {
  test_ranks<T>(set, kernels);
  test_apply<T>(set, kernels);
}

#define TEST_SET(name)                                     \
  test_type<float>(#name, name::nm_table<float>());        \
  test_type<double>(#name, name::nm_table<double>());      \
  test_type<bfloat16>(#name, name::nm_table<bfloat16>());  \
  test_type<float16>(#name, name::nm_table<float16>());    \
  test_unpack(#name, name::nm_byte_table());               \
  test_rows(#name, name::nm_byte_table());

}  // namespace

int main() {
  FOR_EACH_SET(TEST_SET)
  return report("cpu_nm");
}
