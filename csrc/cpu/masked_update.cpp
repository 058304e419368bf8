// Masked optimizer steps on the CPU: chunk by chunk, updated and then ranked while it is in the cache.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "cpu/elements.h"
#include "cpu/nm_simd.h"
#include "masked_checks.h"

namespace pyrx::cpu {
namespace {

constexpr int64_t kTile = 4096;         // elements that are updated and then ranked
constexpr int64_t kColumnTile = 16384;  // as many in rows that are apart: longer runs of each
constexpr int64_t kTask = 32768;        // the least that a thread is woken for
constexpr int64_t kShortRow = 128;  // rows of bits below this, not whole bytes, are taken many at a time

// What one call does with the masks.
struct MaskPlan {
  NM nm;
  bool read, refresh;
};

int64_t bytes_of(int64_t bits) { return (bits + 7) / 8; }

// flat = `rows` rows of `length` bits, one right after another; a byte beyond its last is written.
void join_bits(const uint8_t* bits, int64_t rows, int64_t length, uint8_t* flat) {
  std::fill_n(flat, bytes_of(rows * length) + 1, uint8_t(0));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < length; i += 8) {
      const int64_t at = row * length + i;
      const uint32_t moved = static_cast<uint32_t>(*bits++) << at % 8;
      flat[at / 8] |= static_cast<uint8_t>(moved);
      flat[at / 8 + 1] |= static_cast<uint8_t>(moved >> 8);
    }
}

// The reverse; a byte beyond flat's last is read.
void split_bits(const uint8_t* flat, int64_t rows, int64_t length, uint8_t* bits) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < length; i += 8) {
      const int64_t at = row * length + i;
      const uint32_t both = flat[at / 8] | static_cast<uint32_t>(flat[at / 8 + 1]) << 8;
      *bits++ = static_cast<uint8_t>(both >> at % 8 & ((1u << std::min<int64_t>(8, length - i)) - 1));
    }
}

template <typename F>
void for_tasks(int64_t tasks, int64_t elements, F f) {
  at::parallel_for(0, tasks, std::max<int64_t>(1, kTask / std::max<int64_t>(1, elements)), f);
}

// update(offset, bits, n) over a dense weight of `shape`, and its mask made anew. Rows of bits are the last dimension's.
template <typename T, typename Update>
void sweep(const MaskPlan& plan, at::IntArrayRef shape, int64_t dim, const T* weight, uint8_t* mask, Update update) {
  const NM& nm = plan.nm;
  const GroupLayout layout = group_layout(shape, dim);
  const int64_t last = shape.back(), numel = layout.outer * layout.length * layout.inner;
  const auto& kernels = nm_kernels<T>();

  if (last % 8 != 0 && last < kShortRow) {
    // whole slabs of M rows, dense in memory, with their bits joined
    const int64_t slab = nm.m * layout.inner, unit = layout.inner < last ? last : slab;
    const int64_t elements = std::max<int64_t>(1, kTile / unit) * unit;
    for_tasks((numel + elements - 1) / elements, elements, [&](int64_t begin, int64_t end) {
      std::vector<uint8_t> flat(bytes_of(elements) + 1), ranked(bytes_of(layout.inner) * nm.m + 1);
      for (int64_t first = begin * elements; first < std::min(end * elements, numel); first += elements) {
        const int64_t n = std::min(elements, numel - first);
        uint8_t* const bits = mask + first / last * bytes_of(last);
        if (plan.read) join_bits(bits, n / last, last, flat.data());
        update(first, plan.read ? flat.data() : nullptr, n);
        if (!plan.refresh) continue;
        if (layout.inner == 1) {
          kernels.rank_groups(weight + first, n / nm.m, nm, flat.data());
          split_bits(flat.data(), n / last, last, bits);
          continue;
        }
        const int64_t rows = layout.inner / last, stride = bytes_of(layout.inner);
        for (int64_t at = 0; at < n; at += slab) {
          kernels.rank_columns(weight + first + at, layout.inner, nm.m, layout.inner, nm, ranked.data(), stride);
          for (int64_t i = 0; i < nm.m; ++i)
            split_bits(ranked.data() + i * stride, rows, last, bits + (at / last + i * rows) * bytes_of(last));
        }
      }
    });
    return;
  }

  if (layout.inner == 1) {
    const int64_t rows = last % 8 == 0 ? 1 : numel / last, length = numel / rows;
    const int64_t step = std::lcm<int64_t>(8, nm.m), tile = std::max<int64_t>(1, kTile / step) * step;
    const int64_t tiles = (length + tile - 1) / tile;
    for_tasks(rows * tiles, std::min(tile, length), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / tiles, at = i % tiles * tile, n = std::min(tile, length - at), first = row * length + at;
        uint8_t* const bits = mask + row * bytes_of(length) + at / 8;
        update(first, plan.read ? bits : nullptr, n);
        if (plan.refresh) kernels.rank_groups(weight + first, n / nm.m, nm, bits);
      }
    });
    return;
  }

  // M rows of as many columns as are one run of bits
  const int64_t width = last % 8 == 0 ? layout.inner : last, runs = layout.inner / width;
  const int64_t tile = std::min(width, std::max<int64_t>(64, kColumnTile / nm.m / 16 * 16)), tiles = (width + tile - 1) / tile;
  const int64_t stride = runs * bytes_of(width);
  for_tasks(numel / (nm.m * width) * tiles, nm.m * tile, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i % tiles * tile, run = i / tiles % runs, row = i / (tiles * runs) * nm.m;
      const int64_t n = std::min(tile, width - column), first = row * layout.inner + run * width + column;
      uint8_t* const bits = mask + row * stride + run * bytes_of(width) + column / 8;
      for (int64_t k = 0; k < nm.m; ++k)
        update(first + k * layout.inner, plan.read ? bits + k * stride : nullptr, n);
      if (plan.refresh) kernels.rank_columns(weight + first, layout.inner, nm.m, n, nm, bits, stride);
    }
  });
}

// Written tensors as the kernels take them: dense, copied back by finish where they are not.
template <typename T>
T* data(const at::Tensor& dense) {
  return static_cast<T*>(dense.mutable_data_ptr());
}

double rate_of(double lr, const std::optional<at::Tensor>& lr_tensor) {
  return lr_tensor ? *lr_tensor->const_data_ptr<double>() : lr;
}

MaskPlan plan_of(const NM& nm, Rule rule, bool refresh) { return {nm, rule != kDense, refresh}; }

void masked_adamw(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                  at::TensorList masks, at::TensorList steps, const std::optional<at::Tensor>& lr_tensor, int64_t n,
                  int64_t m, int64_t dim, bool magnitude, int64_t rule, double strength, bool refresh, double lr,
                  double beta1, double beta2, double eps, double weight_decay, bool maximize) {
  const NM nm = check_masked_adamw(weights, grads, exp_avgs, exp_avg_sqs, masks, steps, lr_tensor, n, m, dim, magnitude,
                                   rule);
  const AdamWOptions options{{static_cast<Rule>(rule), maximize, strength, lr}, beta1, beta2, eps, weight_decay};
  const MaskPlan plan = plan_of(nm, options.rule, refresh);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i].numel() == 0) continue;
    const at::Tensor weight = weights[i].contiguous(), grad = grads[i].contiguous(), mask = masks[i].contiguous(),
                     exp_avg = exp_avgs[i].contiguous(), exp_avg_sq = exp_avg_sqs[i].contiguous();
    dispatch_storage(weight.scalar_type(), [&](auto type) {
      using T = decltype(type);
      const auto step =
          adamw_step<accumulate_t<T>>(options, rate_of(lr, lr_tensor), *steps[i].const_data_ptr<float>());
      const T* g = static_cast<const T*>(grad.const_data_ptr());
      T *w = data<T>(weight), *first = data<T>(exp_avg), *second = data<T>(exp_avg_sq);
      const auto& kernels = masked_kernels<T>();
      sweep(plan, weight.sizes(), dim < 0 ? dim + weight.dim() : dim, w, data<uint8_t>(mask),
            [&](int64_t at, const uint8_t* bits, int64_t count) {
              kernels.adamw(step, g + at, bits, count, w + at, first + at, second + at);
            });
    });
    finish(weight, weights[i]);
    finish(exp_avg, exp_avgs[i]);
    finish(exp_avg_sq, exp_avg_sqs[i]);
    finish(mask, masks[i]);
  }
}

void masked_sgd(at::TensorList weights, at::TensorList grads, at::TensorList momentum_buffers, at::TensorList masks,
                const std::optional<at::Tensor>& lr_tensor, int64_t n, int64_t m, int64_t dim, bool magnitude,
                int64_t rule, double strength, bool refresh, double lr, double momentum, double dampening,
                double weight_decay, bool nesterov, bool maximize) {
  const NM nm = check_masked_sgd(weights, grads, momentum_buffers, masks, lr_tensor, n, m, dim, magnitude, rule, momentum);
  const SGDOptions options{
      {static_cast<Rule>(rule), maximize, strength, lr}, momentum, dampening, weight_decay, nesterov};
  const MaskPlan plan = plan_of(nm, options.rule, refresh);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i].numel() == 0) continue;
    const at::Tensor weight = weights[i].contiguous(), grad = grads[i].contiguous(), mask = masks[i].contiguous();
    const at::Tensor buffer = momentum != 0 ? momentum_buffers[i].contiguous() : at::Tensor();
    dispatch_storage(weight.scalar_type(), [&](auto type) {
      using T = decltype(type);
      const auto step = sgd_step<accumulate_t<T>>(options, rate_of(lr, lr_tensor));
      const T* g = static_cast<const T*>(grad.const_data_ptr());
      T *w = data<T>(weight), *velocity = buffer.defined() ? data<T>(buffer) : nullptr;
      const auto& kernels = masked_kernels<T>();
      sweep(plan, weight.sizes(), dim < 0 ? dim + weight.dim() : dim, w, data<uint8_t>(mask),
            [&](int64_t at, const uint8_t* bits, int64_t count) {
              kernels.sgd(step, g + at, bits, count, w + at, velocity ? velocity + at : nullptr);
            });
    });
    finish(weight, weights[i]);
    finish(mask, masks[i]);
    if (buffer.defined()) finish(buffer, momentum_buffers[i]);
  }
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) {
  m.impl("masked_adamw", &masked_adamw);
  m.impl("masked_sgd", &masked_sgd);
}

}  // namespace
}  // namespace pyrx::cpu
