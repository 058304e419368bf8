// Means of blocks of tokens on the CPU.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "cpu/block_pool_simd.h"
#include "cpu/elements.h"
#include "pool_checks.h"

namespace pyrx::cpu {
namespace {

constexpr int64_t kTask = 32768;  // elements that are worth a thread

std::tuple<at::Tensor, at::Tensor> block_pool(const at::Tensor& x, const std::optional<at::Tensor>& mean, int64_t block) {
  const PoolCall call = pool_call(x, mean, block);
  const PoolShape& shape = call.shape;
  if (shape.items() == 0) return {call.means, call.similarity};
  const int64_t blocks = shape.blocks();
  dispatch_storage(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using Acc = accumulate_t<T>;
    const T* data = static_cast<const T*>(call.x.const_data_ptr());
    const Acc* centre = mean ? call.mean.const_data_ptr<Acc>() : nullptr;
    Acc *means = call.means.mutable_data_ptr<Acc>(), *similarity = call.similarity.mutable_data_ptr<Acc>();
    const auto& kernels = pool_kernels<T>();
    const int64_t grain = std::max<int64_t>(1, kTask / std::max<int64_t>(1, shape.block * shape.size));
    at::parallel_for(0, shape.items(), grain, [&](int64_t begin, int64_t end) {
      alignas(64) Acc directions[kMostHeadSize];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / blocks;
        const PoolItem item = pool_item(shape, head, i % blocks);
        similarity[i] = kernels.pool(data + item.x, shape.token_stride, item.tokens, shape.size,
                                     centre ? centre + head * shape.size : nullptr, means + i * shape.size, directions);
      }
    });
  });
  return {call.means, call.similarity};
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) { m.impl("block_pool", &block_pool); }

}  // namespace
}  // namespace pyrx::cpu
