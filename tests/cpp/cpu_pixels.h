// Runs of pixels: bit for bit what the definition's scalar arithmetic gives. Part of test_cpu_simd.cpp.
#pragma once

#include <algorithm>

#include "cpu/simd.h"
#include "cuda_test.h"

namespace pixels_test {

using namespace pyrx;
using namespace pyrx::cpu;

const int64_t kSizes[] = {0, 1, 3, 15, 16, 17, 48, 63, 64, 65, 200, 1311};

template <typename T>
Buffer<T> pixels(int64_t n, uint64_t first) {
  Buffer<T> out(n, 1);
  for (int64_t i = 0; i < n; ++i) {
    const double drawn = std::min(255.0, std::abs(40 * normal(first + i)));
    out[i] = plain::narrow<T>(static_cast<accumulate_t<T>>(drawn));
  }
  return out;
}

// Acc's arithmetic, each operation stored before the next.
template <typename In, typename Out>
Out expected(const MixRun<In, Out>& run, const In* own, const In* other, int64_t i) {
  using Acc = pixel_acc_t<In, Out>;
  volatile Acc value = static_cast<Acc>(plain::widen(own[i]));
  if (other) {
    volatile Acc first = value * run.weight, second = static_cast<Acc>(plain::widen(other[i])) * (1 - run.weight);
    value = first + second;
  }
  if (run.scale) {
    volatile Acc product = value * run.scale[i % run.period];
    value = product + run.bias[i % run.period];
  }
  return plain::narrow<Out>(static_cast<accumulate_t<Out>>(value));
}

template <typename In, typename Out>
void test_mix(const char* set, const MixKernels<In, Out>& kernels) {
  using Acc = pixel_acc_t<In, Out>;
  for (const int64_t n : kSizes)
    for (const int64_t channels : {0, 1, 3, 5})
      for (const bool mixed : {false, true})
        for (const int64_t offset : {0, 1, 5}) {  // of the result from the start of its memory
          const Buffer<In> own = pixels<In>(n, 3), other = pixels<In>(n, 5000);
          const int64_t period = 16 * channels;
          Buffer<Acc> scale(period + 16), bias(period + 16);
          for (int64_t i = 0; channels > 0 && i < period + 16; ++i) {
            scale[i] = Acc(0.3) + Acc(i % channels) / 7;
            bias[i] = Acc(i % channels) / 3;
          }
          const bool affine = channels > 0 && !std::is_same_v<Out, uint8_t>;
          for (const bool stream : {false, true}) {
            const MixRun<In, Out> run{Acc(0.37f), affine ? scale.data() : nullptr, affine ? bias.data() : nullptr, period,
                                      stream};
            Buffer<Out> out(n + offset, 1);
            kernels.mix(run, own.data(), mixed ? other.data() : nullptr, n, out.data() + offset);
            for (int64_t i = 0; i < n; ++i)
              CHECK(same_bits(out[offset + i], expected(run, own.data(), mixed ? other.data() : nullptr, i)),
                    "%s: pixel %ld of %ld, %ld channels, mixed %d", set, i, n, channels, mixed);
          }
        }
}

template <typename T>
void test_pair(const char* set, const PairKernels<T>& kernels) {
  using Acc = accumulate_t<T>;
  for (const int64_t n : kSizes) {
    const Buffer<T> a = pixels<T>(n, 1), b = pixels<T>(n, 900);
    Buffer<T> first = pixels<T>(n, 1), second = pixels<T>(n, 900);
    kernels.mix_pair(first.data(), second.data(), Acc(0.25f), Acc(0.7f), n);
    const MixRun<T, T> run_a{Acc(0.25f), nullptr, nullptr, 0, false}, run_b{Acc(0.7f), nullptr, nullptr, 0, false};
    for (int64_t i = 0; i < n; ++i) {
      CHECK(same_bits(first[i], expected(run_a, a.data(), b.data(), i)), "%s: first of a pair, %ld of %ld", set, i, n);
      CHECK(same_bits(second[i], expected(run_b, b.data(), a.data(), i)), "%s: second of a pair, %ld of %ld", set, i, n);
    }
  }
}

void test_bytes(const char* set, const ByteKernels& kernels) {
  for (const int64_t n : {0, 1, 63, 64, 65, 200, 256, 1000, 4097})
    for (const int64_t offset : {0, 1, 60}) {
      Buffer<uint8_t> from(n + offset), to(n + offset + 1), a(n), b(n);
      for (int64_t i = 0; i < n + offset; ++i) from[i] = static_cast<uint8_t>(i * 37 + 1);
      to[n + offset] = 99;
      kernels.copy_stream(to.data() + offset, from.data(), n);
      for (int64_t i = 0; i < n; ++i) CHECK_EQUAL(to[offset + i], from[i], "%s: copied byte %ld of %ld", set, i, n);
      CHECK_EQUAL(to[n + offset], 99, "%s: the byte after %ld", set, n);
      for (int64_t i = 0; i < n; ++i) {
        a[i] = from[i];
        b[i] = static_cast<uint8_t>(~from[i]);
      }
      kernels.swap(a.data(), b.data(), n);
      for (int64_t i = 0; i < n; ++i)
        CHECK(a[i] == static_cast<uint8_t>(~from[i]) && b[i] == from[i], "%s: swapped byte %ld of %ld", set, i, n);
    }
}

// The tables of one instruction set, a namespace of simd.cpp.
#define TEST_PIXELS_OF(set, In)                                       \
  pixels_test::test_pair<In>(#set, set::pair_table<In>());            \
  pixels_test::test_mix<In, float>(#set, set::mix_table<In, float>()); \
  pixels_test::test_mix<In, double>(#set, set::mix_table<In, double>()); \
  pixels_test::test_mix<In, bfloat16>(#set, set::mix_table<In, bfloat16>()); \
  pixels_test::test_mix<In, float16>(#set, set::mix_table<In, float16>());
#define TEST_PIXELS(set)                                              \
  pixels_test::test_bytes(#set, set::byte_table());                   \
  pixels_test::test_mix<uint8_t, uint8_t>(#set, set::mix_table<uint8_t, uint8_t>()); \
  TEST_PIXELS_OF(set, uint8_t)                                        \
  TEST_PIXELS_OF(set, float)                                          \
  TEST_PIXELS_OF(set, double)                                         \
  TEST_PIXELS_OF(set, bfloat16)                                       \
  TEST_PIXELS_OF(set, float16)

}  // namespace pixels_test
