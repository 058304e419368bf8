// Masks for masked image modelling: a block a sample. Keys are drawn again wherever they are asked for, which costs
// less than memory to keep them, so that a sample may have any number of patches.
#pragma once

#include "cuda/common.cuh"
#include "kernels/patch_mask.h"

namespace pyrx::cuda {

constexpr int kPatchThreads = 512;
constexpr int kPatchBins = 256;

// What a call writes; the indices may be null.
struct PatchOutput {
  uint8_t* mask;         // (N, L)
  int64_t* ids_keep;     // (N, keep)
  int64_t* ids_restore;  // (N, L)
};

// The count-th largest of 0 < L < 2^31 keys, which differ, above all of them where count is 0; on every thread.
// group(g) gives the keys of patches 4 g .. 4 g + 3. A radix select: of each digit the one at which that key lies.
template <typename Group>
__device__ uint64_t nth_largest(int64_t size, int64_t count, Group group) {
  __shared__ int bins[kPatchBins];
  __shared__ int digit, above;
  __shared__ bool whole;  // every key of the prefix is among the largest
  if (count == 0) return ~uint64_t(0);
  uint64_t prefix = 0, known = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kPatchBins; i += blockDim.x) bins[i] = 0;
    __syncthreads();
    for (int64_t first = int64_t(threadIdx.x) * kPatchGroup; first < size; first += int64_t(blockDim.x) * kPatchGroup) {
      const Vector<uint64_t, kPatchGroup> keys = group(first / kPatchGroup);
#pragma unroll
      for (int i = 0; i < kPatchGroup; ++i)
        if (first + i < size && ((keys.v[i] ^ prefix) & known) == 0)
          atomicAdd(&bins[keys.v[i] >> shift & (kPatchBins - 1)], 1);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      // lane 0 has the highest bins
      constexpr int kBins = kPatchBins / kWarp;
      const int top = kPatchBins - 1 - int(threadIdx.x) * kBins;
      int own = 0;
#pragma unroll
      for (int i = 0; i < kBins; ++i) own += bins[top - i];
      int before = own;
#pragma unroll
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, before, offset);
        if (int(threadIdx.x) >= offset) before += other;
      }
      before -= own;
      if (before < count && count <= before + own) {
        int bin = top;
        for (; before + bins[bin] < count; --bin) before += bins[bin];
        digit = bin;
        above = before;
        whole = before + bins[bin] == count;
      }
    }
    __syncthreads();
    prefix |= uint64_t(digit) << shift;
    known |= uint64_t(kPatchBins - 1) << shift;
    count -= above;
    if (whole) break;
  }
  return prefix;
}

// The sum of x over the threads before this one, and over all of them; x is at most kPatchGroup.
__device__ inline int2 scan_threads(int x) {
  __shared__ int warps[kPatchThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, count = blockDim.x / kWarp;
  int sum = x;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += other;
  }
  __syncthreads();  // the call before may still be reading
  if (lane == kWarp - 1) warps[warp] = sum;
  __syncthreads();
  int before = sum - x, total = 0;
  for (int i = 0; i < count; ++i) {
    if (i < warp) before += warps[i];
    total += warps[i];
  }
  return make_int2(before, total);
}

// Marks the sample's rectangles in `bits` (Hp, row_words), by the first warp; the others wait.
__device__ inline void mark_blocks(uint64_t seed, int64_t sample, const PatchDraw& draw, uint32_t* bits) {
  const int64_t words = row_words(draw);
  for (int64_t i = threadIdx.x; i < draw.height * words; i += blockDim.x) bits[i] = 0;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    // f(word, its bits in the block) for the words of the block, which the lanes share
    const auto each_word = [&](const PatchBlock& block, auto f) {
      const int64_t first = block.x0 / kPatchWord;
      const int across = int((block.x1 - 1) / kPatchWord - first + 1);
      for (int64_t i = threadIdx.x; i < (block.y1 - block.y0) * across; i += kWarp)
        f(bits[(block.y0 + i / across) * words + first + i % across], block_bits(block, first + i % across));
    };
    const auto fresh = [&](const PatchBlock& block) {
      int count = 0;
      each_word(block, [&](uint32_t have, uint32_t added) { count += __popc(added & ~have); });
      return int64_t(warp_sum(count));
    };
    const auto mark = [&](const PatchBlock& block) {
      each_word(block, [](uint32_t& have, uint32_t added) { have |= added; });
      __syncwarp();
    };
    draw_blocks(seed, sample, draw, fresh, mark);
  }
  __syncthreads();
}

// Bytes: N L, with losses N L sizeof(T) more, with indices 16 N L more. Operations: about 30 a patch and digit (a
// quarter of a Philox call), two or three digits for random keys; a sample's chain of barriers is longer than either:
// some us. Losses: null, and T any, but for hard masks. scratch: bits (blocks, Hp, row_words) where they are too many
// to share.
template <int kMethod, typename T>
__global__ void __launch_bounds__(kPatchThreads)
    patch_mask_kernel(const int64_t* seed_at, const T* losses, PatchDraw draw, uint32_t* scratch, PatchOutput output) {
  PYRX_DYNAMIC_SHARED(uint32_t, shared_bits);
  const uint64_t seed = static_cast<uint64_t>(*seed_at);
  const int64_t size = draw.size(), keep = size - draw.masked, words = row_words(draw);
  for (int64_t sample = blockIdx.x; sample < draw.samples; sample += gridDim.x) {
    uint32_t* bits = scratch == nullptr ? shared_bits : scratch + blockIdx.x * draw.height * words;
    const auto order = [&](int64_t patch) {
      return loss_key(static_cast<float>(widen(losses[sample * size + patch])), patch);
    };
    uint64_t least_order = 0;
    if constexpr (kMethod == kBlockPatches) mark_blocks(seed, sample, draw, bits);
    if constexpr (kMethod == kHardPatches)
      least_order = nth_largest(size, draw.hard, [&](int64_t group) {
        Vector<uint64_t, kPatchGroup> keys;
#pragma unroll
        for (int i = 0; i < kPatchGroup; ++i) {
          const int64_t patch = group * kPatchGroup + i;
          keys.v[i] = patch < size ? order(patch) : 0;
        }
        return keys;
      });
    const auto keys_of = [&](int64_t group) {
      const PhiloxWords drawn = patch_words(seed, sample, group);
      Vector<uint64_t, kPatchGroup> keys;
#pragma unroll
      for (int i = 0; i < kPatchGroup; ++i) {
        const int64_t patch = group * kPatchGroup + i;
        keys.v[i] = patch_key(drawn.w[i], patch);
        if (patch >= size) continue;
        if constexpr (kMethod == kBlockPatches) {
          const int row = int(patch) / int(draw.width), column = int(patch) % int(draw.width);
          if (bits[row * words + column / kPatchWord] >> column % kPatchWord & 1) keys.v[i] |= kFirst;
        }
        if constexpr (kMethod == kHardPatches)
          if (order(patch) >= least_order) keys.v[i] |= kFirst;
      }
      return keys;
    };
    const uint64_t least = nth_largest(size, draw.masked, keys_of);
    int64_t kept = 0;  // patches before this round's
    for (int64_t start = 0; start < size; start += int64_t(blockDim.x) * kPatchGroup) {
      const int64_t first = start + int64_t(threadIdx.x) * kPatchGroup, at = sample * size + first;
      const int count = first >= size ? 0 : size - first < kPatchGroup ? int(size - first) : kPatchGroup;
      uint32_t masked = 0;
      if (count > 0) {
        const Vector<uint64_t, kPatchGroup> keys = keys_of(first / kPatchGroup);
#pragma unroll
        for (int i = 0; i < kPatchGroup; ++i) masked |= uint32_t(keys.v[i] >= least) << i;
        Vector<uint8_t, kPatchGroup> bytes;
#pragma unroll
        for (int i = 0; i < kPatchGroup; ++i) bytes.v[i] = masked >> i & 1;
        if (count == kPatchGroup && at % kPatchGroup == 0) {
          store(output.mask + at, bytes);
        } else {
#pragma unroll
          for (int i = 0; i < kPatchGroup; ++i)
            if (i < count) output.mask[at + i] = bytes.v[i];
        }
      }
      if (output.ids_restore == nullptr) continue;
      const uint32_t inside = (1u << count) - 1;
      const int2 scan = scan_threads(__popc(~masked & inside));
      int64_t rank = kept + scan.x;
#pragma unroll
      for (int i = 0; i < kPatchGroup; ++i) {
        if (i >= count) continue;
        if (masked >> i & 1) {
          output.ids_restore[at + i] = keep + first + i - rank;
        } else {
          output.ids_keep[sample * keep + rank] = first + i;
          output.ids_restore[at + i] = rank++;
        }
      }
      kept += scan.y;
    }
    __syncthreads();  // the next sample's bits
  }
}

}  // namespace pyrx::cuda
