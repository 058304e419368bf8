// The samples of a call on the GPU: their thresholds, their masks group by group, the slices they go through GEMMs in.
#pragma once

#include "cuda/common.cuh"
#include "kernels/multi_sample_dropout.h"

namespace pyrx::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSliceSamples = 64;   // samples of a row that go through the GEMMs together
constexpr int kPackSamples = 4;     // samples a thread of pack_kernel writes
constexpr int kPageSamples = 1024;  // thresholds a launch of upload_kernel carries

// The samples' thresholds, in the kernel's parameters as far as they fit.
struct SampleTable {
  const uint16_t* more;  // all of them in device memory where they are many and differ, else null
  uint16_t few[kSliceSamples];
  bool uniform, antithetic;

  __device__ SampleMask mask(int64_t sample) const {
    return sample_mask(sample, more ? more[sample] : few[uniform ? 0 : sample], antithetic);
  }
};

struct ThresholdPage {
  uint16_t values[kPageSamples];
};

__global__ void upload_kernel(uint16_t* to, const __grid_constant__ ThresholdPage page, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = page.values[i];
}

// The masks of one group for sample after sample; the second of an antithetic pair takes the first one's words.
struct GroupMasks {
  uint64_t seed, group;
  PhiloxWords words;

  __device__ uint32_t bits(const SampleMask& mask, bool first) {
    if (first || !mask.complement) words = philox(seed, group, mask.sample);
    return mask_bits(words, mask);
  }
};

// The samples [first, first + plan.samples) of every row, and the GEMM rows they have: all of them where they are few.
struct Slice {
  int64_t first;
  SamplePlan plan;
};

}  // namespace pyrx::cuda
