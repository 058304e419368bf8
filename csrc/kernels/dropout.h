// The one definition of pyrx's randomness (Philox4x32-10, Salmon et al. 2011), for host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYRX_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYRX_HOST_DEVICE inline
#endif

namespace pyrx {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;

// Elements that share one Philox counter: four 32-bit words are eight 16-bit lanes.
constexpr int kGroup = 8;
constexpr uint32_t kLevels = 65536;

struct PhiloxWords {
  uint32_t w[4];
};

// Counter (low32(group), high32(group), sample, domain), key = seed. In domain 0, the masks', these are the eight lanes of
// elements 8*group .. 8*group + 7.
PYRX_HOST_DEVICE PhiloxWords philox(uint64_t seed, uint64_t group, uint32_t sample, uint32_t domain = 0) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32), c2 = sample, c3 = domain;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// One sample's mask: which counter row it reads and which lanes it keeps.
struct SampleMask {
  uint32_t sample;     // counter word 2
  uint32_t threshold;  // round(65536 p), at most 65535
  bool complement;     // the second of an antithetic pair reads 65535 - u

  PYRX_HOST_DEVICE float scale() const { return float(kLevels) / float(kLevels - threshold); }
};

PYRX_HOST_DEVICE SampleMask sample_mask(int64_t sample, int64_t threshold, bool antithetic) {
  const bool second = antithetic && (sample & 1);
  return {static_cast<uint32_t>(second ? sample - 1 : sample), static_cast<uint32_t>(threshold), second};
}

// Lane j (0..7) of a group's words, low half first.
PYRX_HOST_DEVICE uint32_t lane(const PhiloxWords& words, int j) { return (words.w[j >> 1] >> ((j & 1) * 16)) & 0xFFFFu; }

// Bit j = lane j is kept.
PYRX_HOST_DEVICE uint8_t mask_bits(const PhiloxWords& words, const SampleMask& mask) {
  // compared in the upper half, where the low half of a word cannot turn the comparison; 65535 - u flips every bit
  const uint32_t level = mask.threshold << 16, flip = mask.complement ? ~0u : 0u;
  uint32_t bits = 0;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int k = 0; k < kGroup / 2; ++k) {
    const uint32_t word = words.w[k] ^ flip;
    bits |= static_cast<uint32_t>((word << 16) >= level) << (2 * k);
    bits |= static_cast<uint32_t>(word >= level) << (2 * k + 1);
  }
  return static_cast<uint8_t>(bits);
}

// Bit j = element 8*group + j is kept.
PYRX_HOST_DEVICE uint8_t group_bits(uint64_t seed, uint64_t group, const SampleMask& mask) {
  return mask_bits(philox(seed, group, mask.sample), mask);
}

}  // namespace pyrx
