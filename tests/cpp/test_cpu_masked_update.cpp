// Kernels of the masked optimizer steps of every instruction set this machine has, against the definition, bit for bit.
#include "cpu/nm_simd.cpp"
#include "cpu_test.h"

namespace {

using namespace pyrx;
using namespace pyrx::cpu;

constexpr int64_t kSizes[] = {1, 3, 8, 15, 16, 17, 31, 33, 100, 1311};

template <typename T>
Buffer<T> drawn(int64_t n, uint64_t seed, double scale = 1, bool squared = false) {
  Buffer<T> out(n, 1);
  for (int64_t i = 0; i < n; ++i) {
    const double x = normal(seed * 10007 + i) * scale;
    out[i] = plain::narrow<T>(static_cast<accumulate_t<T>>(squared ? x * x : x));
  }
  return out;
}

template <typename T>
Buffer<T> copied(const Buffer<T>& from) {
  Buffer<T> out(from.size(), 1);
  std::memcpy(out.data(), from.data(), from.size() * sizeof(T));
  return out;
}

// Elements that hold nothing but NaN of some payload, which has to stay where the rule holds.
template <typename T>
void poison(const Buffer<T>& values) {
  for (int64_t i = 0; i < values.size(); i += 7) {
    std::memset(static_cast<void*>(&values[i]), 0xFF, sizeof(T));
    reinterpret_cast<unsigned char*>(&values[i])[0] = static_cast<unsigned char>(i % 200 + 3);
  }
}

template <typename T>
bool same(const T& got, const T& expected, bool held) {
  const auto wide = plain::widen(expected);
  return same_bits(got, expected) || (!held && wide != wide && plain::widen(got) != plain::widen(got));
}

template <typename T>
void test_adamw(const char* set, const MaskedKernels<T>& kernels) {
  using A = accumulate_t<T>;
  for (const int64_t n : kSizes)
    for (const Rule rule : {kHold, kSrSte, kDense})
      for (const bool maximize : {false, true})
        for (const double beta1 : {0.9, 0.3}) {
          const AdamWOptions options{{rule, maximize, 0.2, 0.01}, beta1, 0.99, 1e-4, 0.3};
          const AdamWStep<A> step = adamw_step<A>(options, 0.01, 5);
          const Buffer<T> weight = drawn<T>(n, 1), gradient = drawn<T>(n, 2), first = drawn<T>(n, 3, 0.1),
                          second = drawn<T>(n, 4, 0.3, true);
          poison(weight);
          poison(first);
          const Buffer<T> w = copied(weight), a = copied(first), b = copied(second);
          Buffer<uint8_t> bits((n + 7) / 8);
          for (int64_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint8_t>(lane_of(9, i, 0));
          kernels.adamw(step, gradient.data(), rule == kDense ? nullptr : bits.data(), n, w.data(), a.data(), b.data());
          for (int64_t i = 0; i < n; ++i) {
            const bool kept = bits[i / 8] >> i % 8 & 1, held = rule == kHold && !kept;
            const AdamWElement<A> moved = adamw<A>(
                step, {plain::widen(weight[i]), plain::widen(first[i]), plain::widen(second[i])}, plain::widen(gradient[i]), kept);
            const auto check = [&](const char* what, T got, T old, A value) {
              CHECK(same(got, held ? old : plain::narrow<T>(value), held), "%s: %s of adamw, %zu bytes, rule %ld, element %ld of %ld",
                    set, what, sizeof(T), int64_t(rule), i, n);
            };
            check("weight", w[i], weight[i], moved.weight);
            check("exp_avg", a[i], first[i], moved.exp_avg);
            check("exp_avg_sq", b[i], second[i], moved.exp_avg_sq);
          }
        }
}

template <typename T>
void test_sgd(const char* set, const MaskedKernels<T>& kernels) {
  using A = accumulate_t<T>;
  for (const int64_t n : kSizes)
    for (const Rule rule : {kHold, kSrSte, kDense})
      for (const double momentum : {0.0, 0.9})
        for (const bool nesterov : {false, true})
          for (const double decay : {0.0, 0.3}) {
            const SGDOptions options{{rule, nesterov, 0.2, 0.01}, momentum, 0.1, decay, nesterov};
            const SGDStep<A> step = sgd_step<A>(options, 0.01);
            const Buffer<T> weight = drawn<T>(n, 1), gradient = drawn<T>(n, 2), buffer = drawn<T>(n, 3);
            poison(weight);
            const Buffer<T> w = copied(weight), v = copied(buffer);
            Buffer<uint8_t> bits((n + 7) / 8);
            for (int64_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint8_t>(lane_of(9, i, 0));
            kernels.sgd(step, gradient.data(), bits.data(), n, w.data(), momentum == 0 ? nullptr : v.data());
            for (int64_t i = 0; i < n; ++i) {
              const bool kept = bits[i / 8] >> i % 8 & 1, held = rule == kHold && !kept;
              const SGDElement<A> moved =
                  sgd<A>(step, {plain::widen(weight[i]), plain::widen(buffer[i])}, plain::widen(gradient[i]), kept);
              CHECK(same(w[i], held ? weight[i] : plain::narrow<T>(moved.weight), held),
                    "%s: weight of sgd, %zu bytes, rule %ld, element %ld of %ld", set, sizeof(T), int64_t(rule), i, n);
              CHECK(same(v[i], held || momentum == 0 ? buffer[i] : plain::narrow<T>(moved.momentum), held),
                    "%s: momentum of sgd, %zu bytes, rule %ld, element %ld of %ld", set, sizeof(T), int64_t(rule), i, n);
            }
          }
}

template <typename T>
void test_type(const char* set, const MaskedKernels<T>& kernels) {
  test_adamw<T>(set, kernels);
  test_sgd<T>(set, kernels);
}

#define TEST_SET(name)                                        \
  test_type<float>(#name, name::masked_table<float>());       \
  test_type<double>(#name, name::masked_table<double>());     \
  test_type<bfloat16>(#name, name::masked_table<bfloat16>()); \
  test_type<float16>(#name, name::masked_table<float16>());

}  // namespace

int main() {
  CHECK(power(0.5, 10) == 0x1p-10 && power(3, 0) == 1 && power(0, 5) == 0 && power(1.5, 3) == 3.375, "power");
  FOR_EACH_SET(TEST_SET)
  return report("cpu_masked_update");
}
