// Transposable N:M masks on the GPU.
#include <torch/library.h>

#include "cuda/launch.h"
#include "cuda/nm_transposable.cuh"
#include "nm_transposable_checks.h"

namespace pyrx::cuda {
namespace {

constexpr int64_t kSharedBytes = 44 * 1024;  // of staged tiles, beside what the kernel has of its own: 48 KiB in all
constexpr int64_t kMostRows = 65535;         // of a grid

template <typename T>
void exact(const at::Tensor& scores, bool magnitude, bool packed, const at::Tensor& out) {
  const int64_t columns = scores.size(-1), rows = scores.numel() / columns / kExactTile;
  const int64_t threads = std::min<int64_t>(kExactThreads, ceil_div(ceil_div(columns, 8), kWarp) * kWarp);
  const dim3 grid(static_cast<unsigned>(ceil_div(columns, 8 * threads)), static_cast<unsigned>(std::min(rows, kMostRows)));
  const auto kernel =
      columns % 8 == 0 ? &nm_transposable_exact_kernel<T, true> : &nm_transposable_exact_kernel<T, false>;
  kernel<<<grid, static_cast<unsigned>(threads), 0, c10::cuda::getCurrentCUDAStream()>>>(
      data<T>(scores), mutable_data<uint8_t>(out), rows, columns, magnitude, packed);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void greedy(const at::Tensor& scores, const NM& nm, const at::Tensor& out) {
  const int64_t columns = scores.size(-1);
  const int a_block = kGreedyThreads / nm.m;
  const int64_t bytes = greedy_shared_bytes(nm.m, a_block, sizeof(T));
  const bool staged = bytes <= kSharedBytes;
  const GreedyTiles tiles{columns, scores.numel() / (nm.m * nm.m), nm, a_block, staged};
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(ceil_div(tiles.count, a_block), 32 * multiprocessors()));
  nm_transposable_greedy_kernel<T><<<blocks, static_cast<unsigned>(a_block * nm.m), staged ? bytes : 0,
                                     c10::cuda::getCurrentCUDAStream()>>>(data<T>(scores), mutable_data<uint8_t>(out), tiles);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor nm_transposable_mask(const at::Tensor& scores, int64_t n, int64_t m, bool magnitude, bool packed,
                                bool is_exact) {
  const NM nm = check_nm_transposable(scores, n, m, magnitude, is_exact);
  const c10::cuda::CUDAGuard guard(scores.device());
  const at::Tensor out = empty_mask(scores, packed), target = contiguous_target(out);
  if (out.numel() == 0) return out;
  at::Tensor dense = scores.contiguous();
  if (!is_aligned(dense.const_data_ptr())) dense = dense.clone();
  dispatch(scores.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if (is_exact) return exact<T>(dense, magnitude, packed, target);
    const at::Tensor bytes = packed ? empty_mask(dense, false) : target;
    greedy<T>(dense, nm, bytes);
    if (!packed) return;
    const int64_t columns = scores.size(-1);
    nm_transposable_pack_kernel<<<blocks_for(target.numel(), kExactThreads), kExactThreads, 0,
                                  c10::cuda::getCurrentCUDAStream()>>>(
        data<uint8_t>(bytes), mutable_data<uint8_t>(target), scores.numel() / columns, columns);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return finish(target, out);
}

TORCH_LIBRARY_IMPL(pyrx, CUDA, m) { m.impl("nm_transposable_mask", &nm_transposable_mask); }

}  // namespace
}  // namespace pyrx::cuda
