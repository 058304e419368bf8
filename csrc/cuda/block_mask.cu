// Lists of a mask's blocks, and the choice of blocks by score, on the GPU.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "block_mask_checks.h"
#include "cuda/block_mask.cuh"
#include "cuda/launch.h"

namespace pyrx::cuda {
namespace {

ListResults block_lists(const at::Tensor& blocks, int64_t kv_width, int64_t q_width) {
  const BlockGrid grid = check_block_lists(blocks, kv_width, q_width);
  const c10::cuda::CUDAGuard guard(blocks.device());
  const auto results = list_results(blocks, grid);
  const auto& [kv_counts, kv_indices, q_counts, q_indices] = results;
  const int64_t tasks = ceil_div(grid.masks * grid.rows, kListWarps) + grid.masks * ceil_div(grid.columns, kWarp);
  if (tasks == 0) return results;
  const at::Tensor dense = blocks.contiguous();
  const ListOutput out{mutable_data<int32_t>(kv_counts), mutable_data<int32_t>(kv_indices),
                       mutable_data<int32_t>(q_counts), mutable_data<int32_t>(q_indices)};
  block_lists_kernel<<<static_cast<unsigned>(std::min(tasks, kMostGrid)), kListThreads, 0,
                       c10::cuda::getCurrentCUDAStream()>>>(data<uint8_t>(dense), grid, out);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return results;
}

template <bool kMass>
void select(const at::Tensor& scores, const SelectRows& rows, const at::Tensor& out) {
  const auto launch = [&](auto kernel, int64_t blocks, int64_t threads) {
    kernel<<<static_cast<unsigned>(std::min(blocks, kMostGrid)), static_cast<unsigned>(threads), 0,
             c10::cuda::getCurrentCUDAStream()>>>(data<float>(scores), mutable_data<uint8_t>(out), rows);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  const int64_t warps = ceil_div(rows.count, kSelectThreads / kWarp);
  const int64_t threads = ceil_div(rows.columns, kBlockKeys * kWarp) * kWarp;
  if (rows.columns <= 4 * kWarp) return launch(&select_blocks_kernel<4, false, kMass>, warps, kSelectThreads);
  if (rows.columns <= kWarpKeys * kWarp)
    return launch(&select_blocks_kernel<kWarpKeys, false, kMass>, warps, kSelectThreads);
  if (threads <= kMostSelectThreads) return launch(&select_blocks_kernel<kBlockKeys, true, kMass>, rows.count, threads);
  launch(&select_blocks_kernel<0, true, kMass>, rows.count, kMostSelectThreads);
}

at::Tensor select_blocks(const at::Tensor& scores, const std::optional<at::Tensor>& count, double mass,
                         const std::optional<at::Tensor>& always) {
  check_select_blocks(scores, count, mass, always);
  const c10::cuda::CUDAGuard guard(scores.device());
  const at::Tensor out = at::empty(scores.sizes(), scores.options().dtype(at::kBool));
  if (out.numel() == 0) return out;
  const at::Tensor dense = scores.contiguous();
  SelectRows rows{out.numel() / scores.size(3), scores.size(1), scores.size(2), scores.size(3), mass};
  if (count) {
    const at::Tensor wanted = count->expand(scores.sizes().slice(0, 3));
    rows.wanted = data<int32_t>(wanted);
    rows.wanted_batch = wanted.stride(0), rows.wanted_head = wanted.stride(1), rows.wanted_row = wanted.stride(2);
  }
  if (always) {
    const at::Tensor kept = always->expand(scores.sizes());
    rows.always = data<uint8_t>(kept);
    rows.always_batch = kept.stride(0), rows.always_head = kept.stride(1), rows.always_row = kept.stride(2);
    rows.always_column = kept.stride(3);
  }
  count ? select<false>(dense, rows, out) : select<true>(dense, rows, out);
  return out;
}

TORCH_LIBRARY_IMPL(pyrx, CUDA, m) {
  m.impl("block_lists", &block_lists);
  m.impl("select_blocks", &select_blocks);
}

}  // namespace
}  // namespace pyrx::cuda
