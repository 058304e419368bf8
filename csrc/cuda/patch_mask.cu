// Masks for masked image modelling on the GPU.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/launch.h"
#include "cuda/patch_mask.cuh"
#include "patch_checks.h"

namespace pyrx::cuda {
namespace {

constexpr int64_t kSharedBytes = 32 * 1024;  // of a grid's bits

PatchResults patch_mask(const at::Tensor& seed, const std::optional<at::Tensor>& losses, at::IntArrayRef shape,
                        int64_t method, int64_t masked, int64_t hard, int64_t min_block, double log_aspect,
                        bool indices) {
  const PatchDraw draw = check_patch_mask(seed, losses, shape, method, masked, hard, min_block, log_aspect);
  const c10::cuda::CUDAGuard guard(seed.device());
  const auto [out, ids_keep, ids_restore] = patch_results(seed, shape, draw, indices);
  if (out.numel() == 0) return {out, ids_keep, ids_restore};
  const at::Tensor values = losses ? losses->contiguous() : at::Tensor();
  const int64_t threads = std::min<int64_t>(kPatchThreads, ceil_div(draw.size(), kPatchGroup * kWarp) * kWarp);
  const int64_t bytes = method == kBlockPatches ? draw.height * row_words(draw) * int64_t(sizeof(uint32_t)) : 0;
  int64_t blocks = std::min(draw.samples, kMostGrid);
  at::Tensor scratch;
  if (bytes > kSharedBytes) {
    blocks = std::min<int64_t>(blocks, 4 * multiprocessors());
    scratch = at::empty({blocks * bytes / int64_t(sizeof(int32_t))}, seed.options().dtype(at::kInt));
  }
  const PatchOutput output{static_cast<uint8_t*>(out.mutable_data_ptr()),
                           indices ? ids_keep.mutable_data_ptr<int64_t>() : nullptr,
                           indices ? ids_restore.mutable_data_ptr<int64_t>() : nullptr};
  const auto launch = [&](auto kernel, auto from) {
    kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), scratch.defined() ? 0 : bytes,
             c10::cuda::getCurrentCUDAStream()>>>(seed.const_data_ptr<int64_t>(), from, draw,
                                                  mutable_data<uint32_t>(scratch), output);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (method == kRandomPatches) {
    launch(&patch_mask_kernel<kRandomPatches, float>, static_cast<const float*>(nullptr));
  } else if (method == kBlockPatches) {
    launch(&patch_mask_kernel<kBlockPatches, float>, static_cast<const float*>(nullptr));
  } else {
    dispatch(values.scalar_type(), [&](auto type) {
      using T = decltype(type);
      launch(&patch_mask_kernel<kHardPatches, T>, data<T>(values));
    });
  }
  return {out, ids_keep, ids_restore};
}

TORCH_LIBRARY_IMPL(pyrx, CUDA, m) { m.impl("patch_mask", &patch_mask); }

}  // namespace
}  // namespace pyrx::cuda
