// Masked optimizer steps on the CPU: chunk by chunk, updated and then ranked while it is in the cache.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
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
constexpr int64_t kColumns = 1024;      // the most of these side by side
constexpr int64_t kTask = 32768;        // the least that a thread is woken for
constexpr int64_t kShortRow = 128;      // rows of bits below this, not whole bytes, are taken many at a time

// What one call does with the masks.
struct MaskPlan {
  NM nm;
  bool read, refresh;
};

// Rows of `length` bits, each padded to bytes, one right behind another, and back.
void join(const uint8_t* bits, int64_t rows, int64_t length, uint8_t* flat) {
  if (length < 8) return nm_byte_kernels().gather(bits, rows, static_cast<int>(length), flat);
  BitWriter writer(flat);
  for (int64_t row = 0; row < rows; ++row) writer.put(bits + row * bytes_of(length), 0, length);
}
void split(const uint8_t* flat, int64_t rows, int64_t length, uint8_t* bits) {
  if (length == 1) return nm_byte_kernels().unpack(flat, rows, bits);
  if (length < 8) return nm_byte_kernels().spread(flat, rows, static_cast<int>(length), bits);
  for (int64_t row = 0; row < rows; ++row) BitWriter(bits + row * bytes_of(length)).put(flat, row * length, length);
}

// Bits of a weight of `shape` with its dimensions in another order.
at::Tensor reordered(const at::Tensor& bits, at::IntArrayRef shape, at::IntArrayRef order) {
  const at::Tensor bytes = at::empty(shape, bits.options());
  const int64_t from = shape.back(), rows = bytes.numel() / from;
  const uint8_t* given = bits.const_data_ptr<uint8_t>();
  uint8_t* unpacked = bytes.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, rows, kTask / from + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      nm_byte_kernels().unpack(given + row * bytes_of(from), from, unpacked + row * from);
  });
  const at::Tensor moved = bytes.permute(order).contiguous();
  const at::Tensor found = empty_bits(moved);
  const int64_t to = moved.sizes().back();
  const uint8_t* source = moved.const_data_ptr<uint8_t>();
  uint8_t* packed = found.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, moved.numel() / to, kTask / to + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) join(source + row * to, to, 1, packed + row * bytes_of(to));
  });
  return found;
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
    // whole slabs of M rows, dense in memory, with their bits joined; those of several slabs are ranked side by side
    const int64_t inner = layout.inner, slab = nm.m * inner, unit = inner < last ? last : slab;
    const int64_t slabs = inner == 1 ? 1 : std::max<int64_t>(1, std::min(kTile / slab, kColumns / inner));
    const int64_t elements = inner == 1 ? std::max<int64_t>(1, kTile / unit) * unit : slabs * slab;
    for_tasks((numel + elements - 1) / elements, elements, [&](int64_t begin, int64_t end) {
      std::vector<uint8_t> flat(bytes_of(elements)), ranked(inner == 1 ? 0 : bytes_of(slabs * inner) * nm.m);
      std::vector<T> side(slabs == 1 ? 0 : elements);
      for (int64_t first = begin * elements; first < std::min(end * elements, numel); first += elements) {
        const int64_t n = std::min(elements, numel - first), rows = n / last, row_bytes = bytes_of(last);
        uint8_t* const bits = mask + first / last * row_bytes;
        if (plan.read) join(bits, rows, last, flat.data());
        update(first, plan.read ? flat.data() : nullptr, n);
        if (!plan.refresh) continue;
        const T* scores = weight + first;
        if (inner == 1) {
          kernels.rank_groups(scores, n / nm.m, nm, flat.data());
          split(flat.data(), rows, last, bits);
          continue;
        }
        const int64_t here = n / slab, columns = here * inner, stride = bytes_of(columns);
        if (slabs > 1) {
          for (int64_t k = 0; k < here; ++k)
            for (int64_t i = 0; i < nm.m; ++i)
              std::copy_n(scores + k * slab + i * inner, inner, side.data() + i * columns + k * inner);
          scores = side.data();
        }
        kernels.rank_columns(scores, columns, nm.m, columns, nm, ranked.data(), stride);
        {
          BitWriter writer(flat.data());
          for (int64_t k = 0; k < here; ++k)
            for (int64_t i = 0; i < nm.m; ++i) writer.put(ranked.data() + i * stride, k * inner, inner);
        }
        split(flat.data(), rows, last, bits);
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

// A tensor as the kernels take it: dense, its dimensions in an order of the weight's; finish copies it back.
class Dense {
 public:
  Dense(const at::Tensor& tensor, at::IntArrayRef order)
      : view_(order.empty() ? tensor : tensor.permute(order)), dense_(view_.contiguous()) {}
  void finish() const { pyrx::finish(dense_, view_); }
  at::IntArrayRef shape() const { return dense_.sizes(); }
  template <typename T>
  const T* read() const { return static_cast<const T*>(dense_.const_data_ptr()); }
  template <typename T>
  T* write() const { return static_cast<T*>(dense_.mutable_data_ptr()); }

 private:
  at::Tensor view_, dense_;
};

// The order of dimensions in which a channels_last weight is dense; none where it is their own.
std::vector<int64_t> order_of(const at::Tensor& weight) {
  if (weight.is_contiguous()) return {};
  if (weight.is_contiguous(at::MemoryFormat::ChannelsLast)) return {0, 2, 3, 1};
  if (weight.is_contiguous(at::MemoryFormat::ChannelsLast3d)) return {0, 2, 3, 4, 1};
  return {};
}

// The mask of a weight, likewise.
class DenseMask {
 public:
  DenseMask(const at::Tensor& mask, at::IntArrayRef shape, at::IntArrayRef order)
      : mask_(mask), order_(order), bits_(mask.contiguous()) {
    if (!order.empty()) bits_ = reordered(bits_, shape, order);
  }
  void finish(at::IntArrayRef shape) const {
    std::vector<int64_t> back(order_.size());
    for (size_t i = 0; i < order_.size(); ++i) back[order_[i]] = static_cast<int64_t>(i);
    pyrx::finish(order_.empty() ? bits_ : reordered(bits_, shape, back), mask_);
  }
  uint8_t* bits() const { return bits_.mutable_data_ptr<uint8_t>(); }

 private:
  at::Tensor mask_;
  at::IntArrayRef order_;
  at::Tensor bits_;
};

// Where dimension dim of a weight is in that order.
int64_t place_of(int64_t dim, int64_t dims, at::IntArrayRef order) {
  if (dim < 0) dim += dims;
  return order.empty() ? dim : std::find(order.begin(), order.end(), dim) - order.begin();
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
    const std::vector<int64_t> order = order_of(weights[i]);
    const Dense weight(weights[i], order), grad(grads[i], order), exp_avg(exp_avgs[i], order),
        exp_avg_sq(exp_avg_sqs[i], order);
    const DenseMask mask(masks[i], weights[i].sizes(), order);
    dispatch_storage(weights[i].scalar_type(), [&](auto type) {
      using T = decltype(type);
      const auto step =
          adamw_step<accumulate_t<T>>(options, rate_of(lr, lr_tensor), *steps[i].const_data_ptr<float>());
      const T* g = grad.read<T>();
      T *w = weight.write<T>(), *first = exp_avg.write<T>(), *second = exp_avg_sq.write<T>();
      const auto& kernels = masked_kernels<T>();
      sweep(plan, weight.shape(), place_of(dim, weights[i].dim(), order), w, mask.bits(),
            [&](int64_t at, const uint8_t* bits, int64_t count) {
              kernels.adamw(step, g + at, bits, count, w + at, first + at, second + at);
            });
    });
    weight.finish();
    exp_avg.finish();
    exp_avg_sq.finish();
    if (refresh) mask.finish(weight.shape());
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
    const std::vector<int64_t> order = order_of(weights[i]);
    const Dense weight(weights[i], order), grad(grads[i], order);
    const std::optional<Dense> buffer =
        momentum != 0 ? std::optional<Dense>(std::in_place, momentum_buffers[i], order) : std::nullopt;
    const DenseMask mask(masks[i], weights[i].sizes(), order);
    dispatch_storage(weights[i].scalar_type(), [&](auto type) {
      using T = decltype(type);
      const auto step = sgd_step<accumulate_t<T>>(options, rate_of(lr, lr_tensor));
      const T* g = grad.read<T>();
      T *w = weight.write<T>(), *velocity = buffer ? buffer->write<T>() : nullptr;
      const auto& kernels = masked_kernels<T>();
      sweep(plan, weight.shape(), place_of(dim, weights[i].dim(), order), w, mask.bits(),
            [&](int64_t at, const uint8_t* bits, int64_t count) {
              kernels.sgd(step, g + at, bits, count, w + at, velocity ? velocity + at : nullptr);
            });
    });
    weight.finish();
    if (buffer) buffer->finish();
    if (refresh) mask.finish(weight.shape());
  }
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) {
  m.impl("masked_adamw", &masked_adamw);
  m.impl("masked_sgd", &masked_sgd);
}

}  // namespace
}  // namespace pyrx::cpu
