// Draws that are not masks: uniforms, Beta variates, normals, from Philox words.
//
// The arithmetic is float64 (normals: float32) in +, -, *, / and sqrt alone, each rounded on its own, so that a draw has
// the same bits on every backend. No product may be fused with a sum: the host is compiled with -ffp-contract=off, on the
// device mul() is the intrinsic that is never contracted.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels/dropout.h"

namespace pyrx {

// Counter word 3: what the words are for. Word 2 of draws is 0 to 255 for batch mixing, from 256 on for random erasing; of
// noise it is the caller's sample, the two largest for random erasing.
enum Domain : uint32_t {
  kMaskDomain = 0,
  kDrawDomain = 1,
  kNoiseDomain = 2,
  kPairDomain = 3,
  kPatchDomain = 4,
  kSpectrumDomain = 5
};

#if defined(__CUDA_ARCH__)
PYRX_HOST_DEVICE double mul(double a, double b) { return __dmul_rn(a, b); }
PYRX_HOST_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
#else
PYRX_HOST_DEVICE double mul(double a, double b) { return a * b; }
PYRX_HOST_DEVICE float mul(float a, float b) { return a * b; }
#endif

PYRX_HOST_DEVICE double from_bits(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
PYRX_HOST_DEVICE uint64_t to_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// (k + 1/2) / 2^52 in (0, 1), k the upper 52 bits of two words.
PYRX_HOST_DEVICE double uniform(uint32_t high, uint32_t low) {
  const uint64_t k = (static_cast<uint64_t>(high) << 32 | low) >> 12;
  return (static_cast<double>(k) + 0.5) * 0x1p-52;
}

// In [0, n), n at most 2^31; the bias is below n / 2^32.
PYRX_HOST_DEVICE int64_t below(uint32_t word, int64_t n) {
  return static_cast<int64_t>(static_cast<uint64_t>(word) * static_cast<uint64_t>(n) >> 32);
}

// Whether an event of probability threshold / 65536 happens.
PYRX_HOST_DEVICE bool happens(uint32_t word, int64_t threshold) { return static_cast<int64_t>(word >> 16) < threshold; }

// The polynomials' coefficients, highest first; the reference and Triton's kernels have the same.
// ln(m) = 2 s (1 + z / 3 + z^2 / 5 + ...), s = (m - 1) / (m + 1), z = s^2 <= 0.0295.
PYRX_HOST_DEVICE double log_positive(double x) {
  const uint64_t bits = to_bits(x);
  double exponent = static_cast<double>(static_cast<int64_t>(bits >> 52) - 1022);
  double m = from_bits((bits & 0x000FFFFFFFFFFFFFull) | 0x3FE0000000000000ull);  // in [1/2, 1)
  if (m < 0.70710678118654752) {
    m = m * 2;
    exponent -= 1;
  }
  const double s = (m - 1) / (m + 1), z = mul(s, s);
  double sum = 0;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int odd = 21; odd >= 3; odd -= 2) sum = mul(z, sum + 1.0 / odd);
  return mul(exponent, 0.69314718055994531) + (mul(2 * s, sum) + 2 * s);
}

// exp(x) for x <= 0; 0 below -700.
PYRX_HOST_DEVICE double exp_negative(double x) {
  if (!(x >= -700)) return 0;
  const double n = std::floor(mul(x, 1.4426950408889634) + 0.5);
  const double r = (x - mul(n, 0.693147180369123816490)) - mul(n, 1.90821492927058770002e-10);
  double sum = 1;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int k = 13; k >= 1; --k) sum = 1 + mul(sum, r) / k;
  return mul(sum, from_bits(static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52));
}

// cos(2 pi v) and sin(2 pi v) for v in [0, 1).
struct Turn {
  double cosine, sine;
};
PYRX_HOST_DEVICE Turn turn(double v) {
  const double t = 4 * v, quadrant = std::floor(t + 0.5);
  const double a = mul(t - quadrant, 1.5707963267948966), z = mul(a, a);
  double c = 1, s = 1;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int k = 16; k >= 2; k -= 2) c = 1 - mul(c, z) / (k * (k - 1));
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int k = 17; k >= 3; k -= 2) s = 1 - mul(s, z) / (k * (k - 1));
  s = mul(a, s);
  switch (static_cast<int>(quadrant) & 3) {
    case 0: return {c, s};
    case 1: return {-s, c};
    case 2: return {-c, -s};
    default: return {s, -c};
  }
}

constexpr int kBetaAttempts = 16;  // the last is taken as it is: 2e-11 of the draws at alpha = 1/2, less below

// Beta(alpha, alpha) from words (index, 1 ...) of the draws' domain, in [0, 1].
//   alpha = 1     uniform
//   alpha > 1/2   1/2 + sqrt(1 - U^(2 / (2 alpha - 1))) cos(2 pi V) / 2   (Ulrich 1984; Devroye 1986, IX.3.3)
//   else          X / (X + Y), X = U^(1 / alpha), Y = V^(1 / alpha), given X + Y <= 1   (Johnk 1964)
PYRX_HOST_DEVICE double beta(uint64_t seed, uint64_t index, double alpha) {
  PhiloxWords words = philox(seed, index, 1, kDrawDomain);
  double u = uniform(words.w[0], words.w[1]);
  if (alpha == 1) return u;
  if (alpha > 0.5) {
    const double power = exp_negative(mul(2 / (2 * alpha - 1), log_positive(u)));
    return 0.5 + mul(0.5 * std::sqrt(1 - power), turn(uniform(words.w[2], words.w[3])).cosine);
  }
  for (uint32_t attempt = 1;; ++attempt) {
    // in logarithms, since U^(1 / alpha) underflows
    const double x = log_positive(u) / alpha, y = log_positive(uniform(words.w[2], words.w[3])) / alpha;
    if (attempt == kBetaAttempts || exp_negative(x) + exp_negative(y) <= 1) {
      const double ratio = exp_negative(x < y ? x - y : y - x);  // the lesser over the greater
      return (x < y ? ratio : 1) / (1 + ratio);
    }
    words = philox(seed, index, attempt + 1, kDrawDomain);
    u = uniform(words.w[0], words.w[1]);
  }
}

PYRX_HOST_DEVICE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
PYRX_HOST_DEVICE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Normals, in float32 without a branch, so that loops of it vectorise.

// (word >> 8 + 1/2) / 2^24, in (0, 1].
PYRX_HOST_DEVICE float uniform_float(uint32_t word) {
  return (static_cast<float>(static_cast<int32_t>(word >> 8)) + 0.5f) * 0x1p-24f;
}

// -2 ln(u): ln(m) as in log_positive, m in [sqrt(1/2), sqrt(2)).
PYRX_HOST_DEVICE float squared_radius(float u) {
  const uint32_t shifted = to_bits(u) + (0x3F800000u - 0x3F3504F3u);
  const float exponent = static_cast<float>(static_cast<int32_t>(shifted >> 23) - 127);
  const float m = from_bits((shifted & 0x007FFFFFu) + 0x3F3504F3u);
  const float s = (m - 1) / (m + 1), z = mul(s, s), twice = s + s;
  float sum = 1.0f / 9;
  sum = mul(sum, z) + 1.0f / 7;
  sum = mul(sum, z) + 1.0f / 5;
  sum = mul(sum, z) + 1.0f / 3;
  sum = mul(sum, z);
  return mul(-2.0f, mul(exponent, 0.693147182f) + (mul(twice, sum) + twice));
}

// cos(2 pi v) and sin(2 pi v) for v in [0, 1].
struct TurnFloat {
  float cosine, sine;
};
PYRX_HOST_DEVICE TurnFloat turn(float v) {
  const float t = 4 * v;
  const int32_t quadrant = static_cast<int32_t>(t + 0.5f);
  const float a = mul(t - static_cast<float>(quadrant), 1.57079637f), z = mul(a, a);
  float c = 1.0f / 40320, s = 1.0f / 362880;
  c = mul(c, z) - 1.0f / 720;
  s = mul(s, z) - 1.0f / 5040;
  c = mul(c, z) + 1.0f / 24;
  s = mul(s, z) + 1.0f / 120;
  c = mul(c, z) - 1.0f / 2;
  s = mul(s, z) - 1.0f / 6;
  c = mul(c, z) + 1;
  s = mul(s, z) + 1;
  s = mul(s, a);
  const uint32_t cosine = quadrant & 1 ? to_bits(s) : to_bits(c), sine = quadrant & 1 ? to_bits(c) : to_bits(s);
  // quadrants 0 .. 3: (c, s), (-s, c), (-c, -s), (s, -c)
  return {from_bits(cosine ^ (static_cast<uint32_t>(quadrant + 1) & 2) << 30),
          from_bits(sine ^ (static_cast<uint32_t>(quadrant) & 2) << 30)};
}

// Standard normals of elements 4 * group .. 4 * group + 3 (Box and Muller 1958).
struct Normals {
  float v[4];
};
PYRX_HOST_DEVICE Normals normals(uint64_t seed, uint64_t group, uint32_t sample) {
  const PhiloxWords words = philox(seed, group, sample, kNoiseDomain);
  const float first = std::sqrt(squared_radius(uniform_float(words.w[0])));
  const float second = std::sqrt(squared_radius(uniform_float(words.w[2])));
  const TurnFloat a = turn(uniform_float(words.w[1])), b = turn(uniform_float(words.w[3]));
  return {{mul(first, a.cosine), mul(first, a.sine), mul(second, b.cosine), mul(second, b.sine)}};
}

// The standard normal of one element.
PYRX_HOST_DEVICE float normal(uint64_t seed, uint64_t element, uint32_t sample) {
  return normals(seed, element / 4, sample).v[element % 4];
}

}  // namespace pyrx
