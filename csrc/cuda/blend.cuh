// Alpha compositing: a thread takes eight elements of a row of alpha through all the channels that share it.
#pragma once

#include <type_traits>

#include "cuda/common.cuh"
#include "kernels/blend.h"

namespace pyrx::cuda {

constexpr int kBlendThreads = 256;

template <typename T>
__device__ inline Acc<T> pixel_value(T x) {
  if constexpr (std::is_same_v<T, uint8_t>) return static_cast<float>(x);
  else return widen(x);
}

template <typename T>
__device__ inline T pixel_of(Acc<T> x) {
  if constexpr (std::is_same_v<T, uint8_t>) return to_byte(x);
  else return narrow<T>(x);
}

// `count` elements, of which the others are not read; `aligned`: to 16 bytes.
template <typename T>
__device__ inline Vector<T, kGroup> load_pixels(const T* from, int count, bool aligned) {
  if (aligned) return load<T, kGroup>(from);
  Vector<T, kGroup> group{};
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    if (j < count) group.v[j] = from[j];
  return group;
}

template <typename T, typename A>
__device__ inline void load_alphas(const A* alpha, int64_t first, int count, const BlendLayout& layout, bool aligned,
                                   Acc<T> (&alphas)[kGroup]) {
  if (layout.group == 1) {
    const Vector<A, kGroup> found = load_pixels(alpha + first, count, aligned);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) alphas[j] = static_cast<Acc<T>>(pixel_value(found.v[j]));
    return;
  }
  int64_t pixel = quotient(first, layout.group), inside = first - pixel * layout.group;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    alphas[j] = j < count ? static_cast<Acc<T>>(pixel_value(alpha[pixel])) : Acc<T>(0);
    if (++inside == layout.group) {
      inside = 0;
      ++pixel;
    }
  }
}

// Which sample of y belongs to a sample, -1 where there is none.
__device__ inline int64_t partner_of(const int64_t* partner, int64_t sample, int64_t others) {
  const int64_t found = partner ? partner[sample] : sample;
  return found >= 0 && found < others ? found : -1;
}

// Where the eight elements of one item lie.
struct BlendItem {
  BlendRow row;
  int64_t index, first;  // the row's number, the first element in the row
  int count;
};

__device__ inline BlendItem blend_item(const BlendLayout& layout, int64_t item, int64_t items_a_row) {
  const int64_t row = quotient(item, items_a_row), first = (item - row * items_a_row) * kGroup;
  const int64_t left = layout.row() - first;
  return {blend_row(layout, row), row, first, left < kGroup ? int(left) : kGroup};
}

// Bytes: x, y and the result, and alpha once a pixel, over 4.8 TB/s. Operations: five an element.
// A: alpha's type: bool as uint8_t, the accumulator's, or T. `aligned`: rows and pointers, to eight elements and 16 bytes.
template <typename T, typename A>
__global__ void __launch_bounds__(kBlendThreads)
    blend_kernel(const T* __restrict__ x, const T* __restrict__ y, const A* __restrict__ alpha,
                 const int64_t* __restrict__ partner, int64_t others, BlendLayout layout, bool aligned,
                 T* __restrict__ out) {
  const int64_t items_a_row = (layout.row() + kGroup - 1) / kGroup, items = layout.rows() * items_a_row;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < items; i += stride) {
    const BlendItem item = blend_item(layout, i, items_a_row);
    const int64_t other = partner_of(partner, item.row.sample, others);
    Acc<T> alphas[kGroup];
    load_alphas<T>(alpha + item.row.alpha, item.first, item.count, layout, aligned, alphas);
    const T* own_at = x + item.row.sample * layout.x_sample + item.row.inside + item.first;
    const T* other_at = y + other * layout.y_sample + item.row.inside + item.first;
    T* out_at = out + item.row.sample * layout.sample() + item.row.inside + item.first;
    for (int64_t k = 0; k < layout.repeat; ++k, own_at += layout.plane(), other_at += layout.plane(), out_at += layout.plane()) {
      Vector<T, kGroup> own = load_pixels(own_at, item.count, aligned), against;
      if (other >= 0) {
        against = load_pixels(other_at, item.count, aligned);
      } else {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) against.v[j] = pixel_of<T>(NAN);
      }
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const T mixed = pixel_of<T>(blended<Acc<T>>(pixel_value(own.v[j]), pixel_value(against.v[j]), alphas[j]));
        own.v[j] = alphas[j] == 1 ? own.v[j] : alphas[j] == 0 ? against.v[j] : mixed;
      }
      store_group(out_at, own, item.count, aligned);
    }
  }
}

// Bytes: the gradients that are asked for and the result's, alpha, and x and y for alpha's. Operations: five an element.
// grad_x, grad_y and grad_alpha may be null; grad_alpha (of the accumulator's type, in alpha's rows) where group is 1.
template <typename T, typename A>
__global__ void __launch_bounds__(kBlendThreads)
    blend_gradients_kernel(const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ y,
                           const A* __restrict__ alpha, const int64_t* __restrict__ partner, int64_t others,
                           BlendLayout layout, int64_t x_sample, bool aligned, T* __restrict__ grad_x,
                           T* __restrict__ grad_y, Acc<T>* __restrict__ grad_alpha) {
  const int64_t items_a_row = (layout.row() + kGroup - 1) / kGroup, items = layout.rows() * items_a_row;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < items; i += stride) {
    const BlendItem item = blend_item(layout, i, items_a_row);
    const int64_t other = grad_alpha ? partner_of(partner, item.row.sample, others) : -1;
    Acc<T> alphas[kGroup], sums[kGroup] = {};
    load_alphas<T>(alpha + item.row.alpha, item.first, item.count, layout, aligned, alphas);
    for (int64_t k = 0; k < layout.repeat; ++k) {
      const int64_t inside = item.row.inside + k * layout.plane() + item.first;
      const int64_t at = item.row.sample * layout.sample() + inside;
      const Vector<T, kGroup> upstream =
          load_pixels(grad + item.row.sample * layout.x_sample + inside, item.count, aligned);
      Vector<T, kGroup> result;
      if (grad_x) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) result.v[j] = narrow<T>(weighed<Acc<T>>(widen(upstream.v[j]), alphas[j]));
        store_group(grad_x + at, result, item.count, aligned);
      }
      if (grad_y) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) result.v[j] = narrow<T>(weighed<Acc<T>>(widen(upstream.v[j]), 1 - alphas[j]));
        store_group(grad_y + at, result, item.count, aligned);
      }
      if (grad_alpha) {
        const Vector<T, kGroup> own = load_pixels(x + item.row.sample * x_sample + inside, item.count, aligned);
        Vector<T, kGroup> against;
        if (other >= 0) against = load_pixels(y + other * layout.y_sample + inside, item.count, aligned);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const Acc<T> value = other >= 0 ? widen(against.v[j]) : Acc<T>(NAN);
          const Acc<T> term = mul(widen(upstream.v[j]), widen(own.v[j]) - value);
          sums[j] = k > 0 ? sums[j] + term : term;
        }
      }
    }
    if (grad_alpha) {
      Vector<Acc<T>, kGroup> result;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) result.v[j] = sums[j];
      store_group(grad_alpha + item.index * layout.pixels + item.first, result, item.count, aligned);
    }
  }
}

// The same where `group` channels side by side share an alpha: a thread takes a pixel.
template <typename T, typename A>
__global__ void __launch_bounds__(kBlendThreads)
    blend_pixel_gradients_kernel(const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ y,
                                 const A* __restrict__ alpha, const int64_t* __restrict__ partner, int64_t others,
                                 BlendLayout layout, int64_t x_sample, T* __restrict__ grad_x, T* __restrict__ grad_y,
                                 Acc<T>* __restrict__ grad_alpha) {
  const int64_t pixels = layout.rows() * layout.pixels, stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < pixels; i += stride) {
    const int64_t row_index = quotient(i, layout.pixels), pixel = i - row_index * layout.pixels;
    const BlendRow row = blend_row(layout, row_index);
    const int64_t other = partner_of(partner, row.sample, others), inside = row.inside + pixel * layout.group;
    const Acc<T> weight = static_cast<Acc<T>>(pixel_value(alpha[row.alpha + pixel]));
    Acc<T> sum = 0;
    for (int64_t c = inside; c < inside + layout.group; ++c) {
      const Acc<T> upstream = widen(grad[row.sample * layout.x_sample + c]);
      const int64_t at = row.sample * layout.sample() + c;
      if (grad_x) grad_x[at] = narrow<T>(weighed<Acc<T>>(upstream, weight));
      if (grad_y) grad_y[at] = narrow<T>(weighed<Acc<T>>(upstream, 1 - weight));
      const Acc<T> value = other >= 0 ? widen(y[other * layout.y_sample + c]) : Acc<T>(NAN);
      const Acc<T> term = mul(upstream, widen(x[row.sample * x_sample + c]) - value);
      sum = c > inside ? sum + term : term;
    }
    grad_alpha[i] = sum;
  }
}

}  // namespace pyrx::cuda
