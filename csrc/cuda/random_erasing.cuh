// Random erasing and Cutout: one launch draws the boxes, copies and fills; in place it writes the boxes alone.
#pragma once

#include "cuda/common.cuh"
#include "kernels/random_erasing.h"

namespace pyrx::cuda {

constexpr int kEraseThreads = 256, kEraseWarps = kEraseThreads / kWarp;

// How a sample lies in memory: `planes` of `height` rows of `row` elements, a pixel's `step` channels side by side.
struct EraseLayout {
  int64_t planes, height, row, step, channels, frames;
};

struct EraseCall {
  EraseDraw draw;
  const int64_t* seed;
  const int64_t* given;  // (N, count, 4) or null
  int64_t* boxes;        // (N, count, 4) out
  int count;
  int64_t mode;
  int64_t value_step;  // 0: one value for all channels
  double value[kMostEraseChannels];
};

__device__ inline Box clipped(Box box, int64_t height, int64_t width) {
  box = {clip(box.y0, 0, height), clip(box.x0, 0, width), clip(box.y1, 0, height), clip(box.x1, 0, width)};
  return box.y0 < box.y1 && box.x0 < box.x1 ? box : Box{0, 0, 0, 0};
}

// The sample's boxes into shared memory; the first block of a sample tells them to the caller. Ends in a barrier.
__device__ inline void find_boxes(const EraseCall& call, int64_t sample, bool tells, Box* boxes) {
  const int box = threadIdx.x;
  if (box < call.count) {
    const int64_t at = (sample * call.count + box) * 4;
    const Box found = call.given ? Box{call.given[at], call.given[at + 1], call.given[at + 2], call.given[at + 3]}
                                 : draw_box(static_cast<uint64_t>(*call.seed), sample, box, call.draw);
    if (tells) {
      call.boxes[at] = found.y0;
      call.boxes[at + 1] = found.x0;
      call.boxes[at + 2] = found.y1;
      call.boxes[at + 3] = found.x1;
    }
    boxes[box] = clipped(found, call.draw.height, call.draw.width);
  }
  __syncthreads();
}

template <typename T>
__device__ inline T constant(double value) { return narrow<T>(static_cast<Acc<T>>(value)); }
template <>
__device__ inline uint8_t constant<uint8_t>(double value) { return static_cast<uint8_t>(value); }
template <typename T>
__device__ inline T noise_value(float value) { return narrow<T>(static_cast<Acc<T>>(value)); }
template <>
__device__ inline uint8_t noise_value<uint8_t>(float) { return 0; }  // uint8 images take constants alone

// Fills elements of one row, `column` counted in elements.
template <typename T>
struct EraseFiller {
  const EraseCall& call;
  const EraseLayout& layout;
  int64_t sample, plane, y;
  uint64_t seed, group = ~uint64_t(0);
  Normals drawn;

  __device__ EraseFiller(const EraseCall& of, const EraseLayout& in, int64_t n, int64_t p, int64_t row)
      : call(of), layout(in), sample(n), plane(p), y(row), seed(static_cast<uint64_t>(*of.seed)) {}

  __device__ T value(int64_t column, int box) {
    const int64_t channel = layout.step == 1 ? plane / layout.frames : column % layout.step;
    if (call.mode == kConst) return constant<T>(call.value[channel * call.value_step]);
    if (call.mode == kRand)
      return noise_value<T>(channel_noise(seed, sample, box, channel, call.count, layout.channels, call.draw));
    const int64_t width = layout.row / layout.step;
    const int64_t row = ((sample * layout.channels + channel) * layout.frames + plane % layout.frames) * layout.height + y;
    const uint64_t element = static_cast<uint64_t>(row * width + column / layout.step);
    if (element / 4 != group) {
      group = element / 4;
      drawn = normals(seed, group, kPixelNoise);
    }
    // by constant places: one that varies would take the four to local memory
    const bool odd = element & 1, upper = element & 2;
    return noise_value<T>(upper ? odd ? drawn.v[3] : drawn.v[2] : odd ? drawn.v[1] : drawn.v[0]);
  }
};

// The last of `count` boxes, from `first` on, that holds pixel (y, x), or -1.
__device__ inline int box_at(const Box* boxes, int first, int count, int64_t y, int64_t x) {
  for (int k = count - 1; k >= first; --k)
    if (y >= boxes[k].y0 && y < boxes[k].y1 && x >= boxes[k].x0 && x < boxes[k].x1) return k;
  return -1;
}

// Out of place. Bytes: 2 n sizeof(T) over 4.8 TB/s, less the reads of the boxes. Operations: about 20 an element in rows
// that a box crosses, 75 more an element of pixel noise (300 in channels-last images).
//
// `blocks` blocks a sample; a warp takes a row at a time, K elements a lane: K divides the row, rows are aligned to it.
template <typename T, int K>
__global__ void __launch_bounds__(kEraseThreads)
    erase_kernel(const T* images, T* output, const __grid_constant__ EraseCall call,
                 const __grid_constant__ EraseLayout layout, int blocks) {
  __shared__ Box boxes[kMostBoxes];
  const int64_t sample = blockIdx.x / blocks, rows = layout.planes * layout.height;
  const int block = blockIdx.x % blocks;
  find_boxes(call, sample, block == 0, boxes);
  const int64_t offset = sample * rows * layout.row;
  for (int64_t i = int64_t(block) * kEraseWarps + threadIdx.x / kWarp; i < rows; i += int64_t(blocks) * kEraseWarps) {
    const int64_t plane = i / layout.height, y = i % layout.height;
    const T* from = images + offset + i * layout.row;
    T* to = output + offset + i * layout.row;
    bool crossed = false;
    for (int k = 0; k < call.count; ++k) crossed |= y >= boxes[k].y0 && y < boxes[k].y1;
    EraseFiller<T> filler(call, layout, sample, plane, y);
    for (int64_t column = (threadIdx.x % kWarp) * K; column < layout.row; column += kWarp * K) {
      Vector<T, K> values = load<T, K>(from + column);
      if (crossed) {
#pragma unroll
        for (int j = 0; j < K; ++j) {
          const int box = box_at(boxes, 0, call.count, y, (column + j) / layout.step);
          if (box >= 0) values.v[j] = filler.value(column + j, box);
        }
      }
      store(to + column, values);
    }
  }
}

// In place. Bytes: those of the boxes. A warp takes a row of a box at a time; where a later box lies over it, it is left
// to that one.
template <typename T>
__global__ void __launch_bounds__(kEraseThreads)
    erase_in_place_kernel(T* images, const __grid_constant__ EraseCall call, const __grid_constant__ EraseLayout layout,
                          int blocks) {
  __shared__ Box boxes[kMostBoxes];
  const int64_t sample = blockIdx.x / blocks;
  const int block = blockIdx.x % blocks;
  find_boxes(call, sample, block == 0, boxes);
  T* own = images + sample * layout.planes * layout.height * layout.row;
  for (int k = 0; k < call.count; ++k) {
    const Box box = boxes[k];
    const int64_t height = box.y1 - box.y0, rows = layout.planes * height;
    for (int64_t i = int64_t(block) * kEraseWarps + threadIdx.x / kWarp; i < rows; i += int64_t(blocks) * kEraseWarps) {
      const int64_t plane = i / height, y = box.y0 + i % height;
      EraseFiller<T> filler(call, layout, sample, plane, y);
      T* row = own + (plane * layout.height + y) * layout.row;
      for (int64_t column = box.x0 * layout.step + threadIdx.x % kWarp; column < box.x1 * layout.step; column += kWarp)
        if (box_at(boxes, k + 1, call.count, y, column / layout.step) < 0) row[column] = filler.value(column, k);
    }
  }
}

}  // namespace pyrx::cuda
