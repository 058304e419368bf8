// Means of blocks of tokens on the GPU.
#include <torch/library.h>

#include "cuda/block_pool.cuh"
#include "cuda/launch.h"
#include "pool_checks.h"

namespace pyrx::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor> block_pool(const at::Tensor& x, const std::optional<at::Tensor>& mean, int64_t block) {
  const c10::cuda::CUDAGuard guard(x.device());
  const PoolCall call = pool_call(x, mean, block);
  const PoolShape& shape = call.shape;
  if (shape.items() == 0) return {call.means, call.similarity};
  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(call.x);
    const bool aligned = is_aligned(from) && shape.size % kGroup == 0 && shape.batch_stride % kGroup == 0 &&
                         shape.head_stride % kGroup == 0 && shape.token_stride % kGroup == 0;
    const unsigned grid = static_cast<unsigned>(std::min(shape.items(), kMostGrid));
    block_pool_kernel<T><<<grid, pool_threads(shape), 0, c10::cuda::getCurrentCUDAStream()>>>(
        from, data<Acc<T>>(call.mean), shape, pool_lanes(shape.size), aligned, mutable_data<Acc<T>>(call.means),
        mutable_data<Acc<T>>(call.similarity));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {call.means, call.similarity};
}

TORCH_LIBRARY_IMPL(pyrx, CUDA, m) { m.impl("block_pool", &block_pool); }

}  // namespace
}  // namespace pyrx::cuda
