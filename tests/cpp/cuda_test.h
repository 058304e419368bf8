// What the kernel tests share: checks, exactly sized buffers of poison, the masks from their definition.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "kernels/dropout.h"

inline long checks = 0, failures = 0;

// CHECK(condition, "what was tested, as for printf", ...): goes on, so that a failure's extent is seen.
#define CHECK(condition, ...)                                               \
  do {                                                                      \
    ++checks;                                                               \
    if (!(condition) && ++failures <= 20) {                                 \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);  \
      std::fprintf(stderr, __VA_ARGS__);                                    \
      std::fputc('\n', stderr);                                             \
    }                                                                       \
  } while (false)
#define CHECK_EQUAL(got, expected, ...) CHECK((got) == (expected), __VA_ARGS__)

inline int report(const char* what) {
  std::printf("%s: %ld checks, %ld failures\n", what, checks, failures);
  return failures != 0;
}

// n elements at `offset` elements from 16-byte alignment, all bits 1 (NaN), so that a sanitizer sees a step outside.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n, int64_t offset = 0) : size_(n), memory_(new unsigned char[(n + offset) * sizeof(T)]) {
    std::memset(memory_.get(), 0xFF, (n + offset) * sizeof(T));
    data_ = reinterpret_cast<T*>(memory_.get()) + offset;
  }
  T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  int64_t size_;
  std::unique_ptr<unsigned char[]> memory_;
  T* data_;
};

template <typename T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

// u of element i.
inline uint32_t lane_of(uint64_t seed, uint64_t i, uint32_t sample) {
  return pyrx::lane(pyrx::philox(seed, i / 8, sample), int(i % 8));
}

// A number from a normal distribution, the same for the same i.
inline double normal(uint64_t i) {
  const auto uniform = [&](int j) { return (lane_of(77, i, j) * 65536.0 + lane_of(78, i, j) + 0.5) / 4294967296.0; };
  return std::sqrt(-2 * std::log(uniform(0))) * std::cos(6.283185307179586 * uniform(1));
}
