// Filling empty places from their neighbours on the GPU.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "cuda/launch.h"
#include "cuda/neighbor_fill.cuh"
#include "neighbor_fill_checks.h"

namespace pyrx::cuda {
namespace {

template <typename T>
void launch(const at::Tensor& input, const at::Tensor& mask, const at::Tensor& output, const at::Tensor& after,
            int iterations) {
  FillSizes sizes{input.size(1), input.size(2), input.size(3), iterations, 0};
  const int64_t images = input.size(0);
  const int warps = sizeof(T) > 4 || sizes.channels < 8 ? 4 : kFillThreads / kWarp;
  const int64_t tiles = ceil_div(sizes.height, kFillTile) * ceil_div(sizes.width, kFillTile) * images;
  // a block's plan serves many channels, as long as there are blocks for the whole device; without channels there is
  // the mask to grow
  const int64_t most = std::max<int64_t>(ceil_div(sizes.channels, warps), 1);
  const int64_t wanted = std::clamp<int64_t>(ceil_div(8 * multiprocessors(), tiles), 1, most);
  sizes.channels_a_block = std::max<int64_t>(ceil_div(ceil_div(sizes.channels, wanted), warps) * warps, 1);
  const int64_t groups = std::max<int64_t>(ceil_div(sizes.channels, sizes.channels_a_block), 1);
  const int64_t bytes = fill_shared_bytes(iterations, warps, sizeof(T));
  const auto kernel = neighbor_fill_kernel<T>;
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  kernel<<<static_cast<unsigned>(tiles * groups), warps * kWarp, bytes, c10::cuda::getCurrentCUDAStream()>>>(
      data<T>(input), data<uint8_t>(mask), mutable_data<T>(output), mutable_data<uint8_t>(after), sizes);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<at::Tensor, at::Tensor> neighbor_fill(const at::Tensor& input, const at::Tensor& mask, int64_t iterations) {
  check_neighbor_fill(input, mask, iterations);
  const c10::cuda::CUDAGuard guard(input.device());
  at::Tensor x = input.contiguous(), present = mask.contiguous();
  const at::Tensor out = at::empty_like(input), y = contiguous_target(out);
  const at::Tensor after = at::empty(mask.sizes(), mask.options());
  if (mask.numel() == 0) return {out, after};
  // no place is further than this from another
  int64_t left = std::min(iterations, std::max(input.size(2), input.size(3)));
  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    // a tile's halo bounds the iterations of one launch
    for (; left > kFillIterations; left -= kFillIterations) {
      const at::Tensor filled = at::empty_like(x), grown = at::empty_like(present);
      launch<T>(x, present, filled, grown, kFillIterations);
      x = filled;
      present = grown;
    }
    launch<T>(x, present, y, after, static_cast<int>(left));
  });
  return {finish(y, out), after};
}

TORCH_LIBRARY_IMPL(pyrx, CUDA, m) { m.impl("neighbor_fill", &neighbor_fill); }

}  // namespace
}  // namespace pyrx::cuda
