// The samples of a batch_mix call on the GPU: each block draws what it needs, so that one launch does all.
#pragma once

#include "cuda/common.cuh"
#include "kernels/batch_mix.h"

namespace pyrx::cuda {

constexpr int kMixThreads = 256;

// n / divisor, the upper half of (n + 1) * floor((2^64 - 1) / divisor): exact where (n + 1) * divisor is at most 2^64.
struct Divisor {
  int64_t divisor;
  uint64_t reciprocal;

  __device__ int64_t quotient(int64_t n) const {
    return static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(n) + 1, reciprocal));
  }
};

// 0 counts as 1.
PYRX_HOST_DEVICE Divisor make_divisor(int64_t divisor) {
  if (divisor < 1) divisor = 1;
  return {divisor, ~uint64_t(0) / static_cast<uint64_t>(divisor)};
}

// One call's arguments and per-sample results, in device memory; null where there are none.
struct MixCall {
  const int64_t *seed, *labels;                       // (1), (N)
  const float* lam;                                   // (N)
  const int64_t *boxes, *partner;                     // (N, 4), (N)
  int64_t *to_partner_labels, *to_partner, *to_boxes;  // (N), (N), (N, 4)
  float* to_lam;                                      // (N)
  MixDraw draw;
  int64_t pairing;
  bool swap;         // in place: the partner's partner is the sample
  bool select_only;  // pixels that cannot be weighed: the partner's where its weight is 1, else the own
};

// One sample's memory: `planes` of `height` rows of `row` elements, `step` to a pixel; `run` consecutive ones share a
// channel.
struct MixLayout {
  int64_t elements, planes, run;
  int height, row, step, channels;
  Divisor by_row, by_height, by_step, by_channel_rows;
};

// Where a sample is not its own image alone: inside it is weight * own + (1 - weight) * partner's.
struct MixRegion {
  int y0, x0, y1, x1;  // x in elements
  float weight;

  __device__ bool is_empty() const { return y0 >= y1 || x0 >= x1; }
};

// One sample as its block, or its pair's, has it in shared memory.
struct MixSample {
  int64_t partner;
  Box box;
  float lam;
  MixRegion region;
  Divisor by_box_height, by_box_width;  // in pixels
};

// Rank, nearest key below and above of one sample's key, over the threads of a warp or block.
struct Neighbours {
  unsigned rank;
  uint64_t below, above;  // 0 and all ones: none

  __device__ void join(const Neighbours& other) {
    rank += other.rank;
    below = below > other.below ? below : other.below;
    above = above < other.above ? above : other.above;
  }
};

// The partner of sample n in the random matching, on every thread; to be called by all of them. N Philox calls a block.
__device__ __noinline__ int64_t matched(uint64_t seed, int64_t n, int64_t samples) {
  __shared__ Neighbours warps[kMixThreads / kWarp];
  const uint64_t own = pairing_key(seed, n);
  Neighbours found{0, 0, ~uint64_t(0)};
  for (int64_t i = threadIdx.x; i < samples; i += kMixThreads) {
    const uint64_t key = pairing_key(seed, i);
    found.join({key < own, key < own ? key : 0, key > own ? key : ~uint64_t(0)});
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    found.join({__shfl_xor_sync(kAllLanes, found.rank, offset), __shfl_xor_sync(kAllLanes, found.below, offset),
                __shfl_xor_sync(kAllLanes, found.above, offset)});
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = found;
  __syncthreads();
  found = warps[0];
#pragma unroll
  for (int i = 1; i < kMixThreads / kWarp; ++i) found.join(warps[i]);
  const uint64_t key = found.rank % 2 ? found.below : found.above == ~uint64_t(0) ? own : found.above;
  return static_cast<int64_t>(key & (kMostSamples - 1));
}

// -1 where the one given cannot be. To be called by every thread of the block.
__device__ inline int64_t find_partner(const MixCall& call, int64_t n) {
  const int64_t samples = call.draw.samples;
  switch (call.pairing) {
    case kFlip: return samples - 1 - n;
    case kRoll: return n == 0 ? samples - 1 : n - 1;
    case kRandom: return matched(static_cast<uint64_t>(*call.seed), n, samples);
    default: {
      const int64_t partner = call.partner[n];
      if (partner < 0 || partner >= samples) return -1;
      return call.swap && call.partner[partner] != n ? -1 : partner;
    }
  }
}

// Draws sample n or takes what is given; a sample with values that cannot be stays as it is, its lam NaN.
__device__ __noinline__ void draw_sample(const MixCall& call, const MixLayout& layout, int64_t n, int64_t partner,
                                         MixSample* to) {
  const MixDraw& draw = call.draw;
  const float lam = call.lam ? call.lam[n] : -1;
  bool good = partner >= 0 && (!call.lam || (lam >= 0 && lam <= 1));
  Mix mix{1, 1, {0, 0, 0, 0}};
  if (good && call.boxes) {
    const int64_t* values = call.boxes + 4 * n;
    const Box box{values[0], values[1], values[2], values[3]};
    mix = given_mix(box, lam, draw);
    good = is_box(box, draw) && !(mix.lam < 0);
  } else if (good) {
    const int64_t index = draw.granularity == kPerSample ? n
                          : draw.granularity == kPerBatch ? 0
                          : partner < n                   ? partner
                                                          : n;
    mix = draw_mix(static_cast<uint64_t>(*call.seed), static_cast<uint64_t>(index), lam, draw);
  }
  if (!good) mix = {NAN, 1, {0, 0, 0, 0}};
  to->partner = partner >= 0 ? partner : n;
  to->box = mix.box;
  to->lam = mix.lam;
  if (mix.box.y0 >= 0) {
    to->region = {static_cast<int>(mix.box.y0), static_cast<int>(mix.box.x0) * layout.step,
                  static_cast<int>(mix.box.y1), static_cast<int>(mix.box.x1) * layout.step, 0};
  } else if (mix.weight == 1 || (call.select_only && mix.weight != 0)) {
    to->region = {0, 0, 0, 0, 0};
  } else {
    to->region = {0, 0, layout.height, layout.row, mix.weight};
  }
  if (draw.kind == kResizemix) {
    to->by_box_height = make_divisor(mix.box.y1 - mix.box.y0);
    to->by_box_width = make_divisor(mix.box.x1 - mix.box.x0);
  }
}

__device__ inline void write_sample(const MixCall& call, int64_t n, const MixSample& sample) {
  if (call.labels) call.to_partner_labels[n] = call.labels[sample.partner];
  call.to_partner[n] = sample.partner;
  call.to_lam[n] = sample.lam;
  int64_t* box = call.to_boxes + 4 * n;
  box[0] = sample.box.y0, box[1] = sample.box.x0, box[2] = sample.box.y1, box[3] = sample.box.x1;
}

}  // namespace pyrx::cuda
