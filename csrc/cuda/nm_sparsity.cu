// N:M masks and sparse weights on the GPU.
#include <torch/library.h>

#include <numeric>

#include "cuda/launch.h"
#include "cuda/nm_sparsity.cuh"
#include "nm_checks.h"

namespace pyrx::cuda {
namespace {

constexpr int64_t kColumnBytes = 48 * 1024;  // of keys in shared memory

unsigned grid_of(int64_t items, int64_t items_a_block) {
  return static_cast<unsigned>(std::min(ceil_div(items, items_a_block), kMostGrid));
}

uint64_t infinity_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf: return kInfinityHalf;
    case at::kBFloat16: return kInfinityBFloat16;
    case at::kDouble: return kInfinityDouble;
    default: return kInfinityFloat;
  }
}

// Calls f with a value of the type of the dtype's raw bits.
template <typename F>
void dispatch_bits(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kHalf:
    case at::kBFloat16: return f(uint16_t());
    case at::kDouble: return f(uint64_t());
    default: return f(uint32_t());
  }
}

template <int kN, int kM, bool kValues, typename T>
void launch_rows(const T* from, NMRows rows, const RankOrder& order, bool dense, const NMOutput<T>& out) {
  const int64_t whole = kM == 0 ? order.m / kGroup : 1;
  rows.chunks = ceil_div(ceil_div(rows.length, kGroup), whole) * whole;
  nm_rows_kernel<T, kN, kM, kValues><<<grid_of(rows.count * rows.chunks, kNMChunks<T>), kNMThreads,
                                       0, c10::cuda::getCurrentCUDAStream()>>>(from, rows, order, dense, out);
}

// Groups along the last dimension of dense rows.
template <bool kValues, typename T>
void rank_rows(const T* from, int64_t count, int64_t length, const RankOrder& order, const NMOutput<T>& out) {
  if (length % order.m == 0 && (!out.bits || length % kGroup == 0)) {
    length *= count;
    count = 1;
  }
  const NMRows rows{count, length, 0};
  const bool dense = count == 1 && is_aligned(from) && is_aligned(out.values);
  const bool served = dispatch_ratio(order.n, order.m, [&](auto ratio) {
    launch_rows<decltype(ratio)::n, decltype(ratio)::m, kValues>(from, rows, order, dense, out);
  });
  if (!served) {
    const int64_t step = std::lcm(order.m, kGroup);
    const int64_t span = std::min<int64_t>(kNMTile / step, ceil_div(length, step)) * step;
    const unsigned blocks = grid_of(count * ceil_div(length, span), kNMTile / span);
    nm_any_rows_kernel<T, kValues><<<blocks, kNMThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        from, rows, static_cast<int>(span), order, out);
  }
}

// Groups along another dimension.
template <bool kValues, typename T>
void rank_columns(const T* from, const NMColumns& layout, const RankOrder& order, const NMOutput<T>& out) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int64_t row_bytes = ceil_div(layout.width, kGroup);
  const int64_t strips = layout.outer * ceil_div(layout.length, order.m) * (layout.inner / layout.width) * row_bytes;
  const bool aligned = is_aligned(from) && is_aligned(out.values) && layout.width % kGroup == 0;
  const auto launch = [&](auto kernel) {
    kernel<<<grid_of(strips, kNMThreads), kNMThreads, 0, stream>>>(from, layout, order, aligned, out);
  };
  if (order.m == 4 && order.n == 1) return launch(&nm_columns_kernel<T, 1, 4, kValues>);
  if (order.m == 4 && order.n == 2) return launch(&nm_columns_kernel<T, 2, 4, kValues>);
  if (order.m == 4 && order.n == 3) return launch(&nm_columns_kernel<T, 3, 4, kValues>);
  if (order.m == 8) return launch(&nm_columns_kernel<T, 0, 8, kValues>);
  if (order.n == 1) return launch(&nm_columns_kernel<T, 1, 0, kValues>);
  if (order.n == 2) return launch(&nm_columns_kernel<T, 2, 0, kValues>);
  const int64_t most = kColumnBytes / (order.m * int64_t(sizeof(T))) / kWarp * kWarp;
  const int64_t threads = std::min<int64_t>(most, kNMThreads);
  nm_any_columns_kernel<T, kValues>
      <<<grid_of(strips * kGroup, threads), static_cast<unsigned>(threads), threads * order.m * sizeof(T), stream>>>(
          from, layout, order, out);
}

// groups along `dim` of a dense tensor of this shape; bits lie along its last dimension.
template <bool kValues, typename T>
void rank(const T* from, at::IntArrayRef shape, int64_t dim, const RankOrder& order, const NMOutput<T>& out) {
  const GroupLayout groups = group_layout(shape, dim);
  if (groups.inner == 1 && (!out.bits || dim + 1 == static_cast<int64_t>(shape.size()))) {
    rank_rows<kValues>(from, groups.outer, groups.length, order, out);
  } else {
    const int64_t width = out.bits ? shape.back() : groups.inner;
    rank_columns<kValues>(from, {groups.outer, groups.length, groups.inner, width}, order, out);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

RankOrder rank_order(const NM& nm, at::ScalarType dtype) { return {infinity_of(dtype), nm.n, nm.m, nm.magnitude}; }

at::Tensor bits_of(const at::Tensor& scores, const NM& nm, int64_t dim) {
  const at::Tensor bits = empty_bits(scores);
  if (scores.numel() == 0) return bits;
  const at::Tensor x = scores.contiguous();
  dispatch_bits(x.scalar_type(), [&](auto type) {
    using U = decltype(type);
    rank<false>(data<U>(x), x.sizes(), dim, rank_order(nm, x.scalar_type()),
                NMOutput<U>{mutable_data<uint8_t>(bits), nullptr, nullptr, nullptr});
  });
  return bits;
}

at::Tensor nm_mask(const at::Tensor& scores, int64_t n, int64_t m, int64_t dim, bool magnitude, bool packed, bool pad) {
  const NM nm = check_nm_mask(scores, n, m, dim, magnitude, pad);
  const c10::cuda::CUDAGuard guard(scores.device());
  if (packed) return bits_of(scores, nm, dim);
  const at::Tensor out = at::empty_like(scores, scores.options().dtype(at::kBool));
  if (out.numel() == 0) return out;
  const at::Tensor x = scores.strides() == out.strides() ? scores : at::empty_like(out, scores.options()).copy_(scores);
  // out is dense: in the order of its strides it is contiguous
  std::vector<int64_t> order(out.dim()), shape;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return out.stride(a) > out.stride(b); });
  for (const int64_t each : order) shape.push_back(out.size(each));
  const int64_t place = std::find(order.begin(), order.end(), dim) - order.begin();
  dispatch_bits(x.scalar_type(), [&](auto type) {
    using U = decltype(type);
    rank<false>(data<U>(x), shape, place, rank_order(nm, x.scalar_type()),
                NMOutput<U>{nullptr, mutable_data<uint8_t>(out), nullptr, nullptr});
  });
  return out;
}

// What becomes of x under bits, in logical order.
at::Tensor apply(const at::Tensor& x, const at::Tensor& bits, Dropped dropped, const std::optional<at::Tensor>& factor,
                 const std::optional<at::Tensor>& weight, double strength) {
  const at::Tensor out = at::empty_like(x);
  if (x.numel() == 0) return out;
  const at::Tensor from = x.contiguous(), mask = bits.contiguous(), target = contiguous_target(out);
  const at::Tensor own = weight ? weight->contiguous() : at::Tensor();
  NMRows rows{x.numel() / x.size(-1), x.size(-1), 0};
  if (rows.length % kGroup == 0) rows = {1, x.numel(), 0};
  rows.chunks = ceil_div(rows.length, kGroup);
  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* to = mutable_data<T>(target);
    const bool dense = rows.count == 1 && is_aligned(data<T>(from)) && is_aligned(data<T>(own)) && is_aligned(to);
    nm_apply_kernel<T><<<grid_of(rows.count * rows.chunks, kNMChunks<T>), kNMThreads, 0,
                         c10::cuda::getCurrentCUDAStream()>>>(
        data<T>(from), data<uint8_t>(mask), data<T>(own), rows, dropped,
        factor ? factor->const_data_ptr<double>() : nullptr, static_cast<Acc<T>>(strength), dense, to);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return finish(target, out);
}

std::tuple<at::Tensor, at::Tensor> nm_sparsify(const at::Tensor& weight, const std::optional<at::Tensor>& scores,
                                               const std::optional<at::Tensor>& mask,
                                               const std::optional<at::Tensor>& decay, int64_t n, int64_t m,
                                               int64_t dim, bool magnitude, bool pad, int64_t estimator, double) {
  const NM nm = check_nm_sparsify(weight, scores, mask, decay, n, m, dim, magnitude, pad, estimator);
  const c10::cuda::CUDAGuard guard(weight.device());
  const Dropped dropped = kForward[estimator];
  if (mask) return {apply(weight, *mask, dropped, decay, {}, 0), at::empty({0}, weight.options().dtype(at::kByte))};
  if (scores) {
    const at::Tensor bits = bits_of(*scores, nm, dim);
    return {apply(weight, bits, dropped, decay, {}, 0), bits};
  }
  const at::Tensor out = at::empty_like(weight), bits = empty_bits(weight);
  if (out.numel() == 0) return {out, bits};
  const at::Tensor x = weight.contiguous(), target = contiguous_target(out);
  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    rank<true>(data<T>(x), x.sizes(), dim, rank_order(nm, x.scalar_type()),
               NMOutput<T>{mutable_data<uint8_t>(bits), nullptr, mutable_data<T>(target),
                           decay ? decay->const_data_ptr<double>() : nullptr});
  });
  return {finish(target, out), bits};
}

at::Tensor nm_apply(const at::Tensor& x, const at::Tensor& bits, int64_t dropped,
                    const std::optional<at::Tensor>& factor, const std::optional<at::Tensor>& weight, double strength) {
  check_nm_apply(x, bits, dropped, factor, weight);
  const c10::cuda::CUDAGuard guard(x.device());
  return apply(x, bits, static_cast<Dropped>(dropped), factor, weight, strength);
}

TORCH_LIBRARY_IMPL(pyrx, CUDA, m) {
  m.impl("nm_mask", &nm_mask);
  m.impl("nm_sparsify", &nm_sparsify);
  m.impl("nm_apply", &nm_apply);
}

}  // namespace
}  // namespace pyrx::cuda
