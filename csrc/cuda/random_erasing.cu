// Random erasing and Cutout on the GPU.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/launch.h"
#include "cuda/random_erasing.cuh"
#include "erase_checks.h"

namespace pyrx::cuda {
namespace {

constexpr int64_t kRowsOfWarp = 8;  // a warp's share of a sample's rows

EraseLayout erase_layout(const at::Tensor& images, at::MemoryFormat format) {
  const PixelLayout found = pixel_layout(images, format);
  return {found.planes, found.height, found.row, found.step, found.channels, images.dim() == 5 ? images.size(2) : 1};
}

EraseCall erase_call(const EraseArguments& given, const at::Tensor& boxes_in, const at::Tensor& boxes) {
  EraseCall call{given.draw, given.seed.const_data_ptr<int64_t>(),
                 boxes_in.defined() ? boxes_in.const_data_ptr<int64_t>() : nullptr, boxes.mutable_data_ptr<int64_t>(),
                 static_cast<int>(given.count()), given.mode, given.value.size() > 1, {}};
  std::copy(given.value.begin(), given.value.end(), call.value);
  return call;
}

template <typename F>
void dispatch_images(at::ScalarType dtype, F&& f) {
  if (dtype == at::kByte) return f(uint8_t());
  dispatch(dtype, f);
}

// The boxes; all of `images` goes to `to` where that is other memory. Both of `format`.
at::Tensor erase(const EraseArguments& given, const at::Tensor& images, at::MemoryFormat format, const at::Tensor& to) {
  const int64_t samples = given.draw.samples;
  const at::Tensor boxes = at::empty({samples, given.count(), 4}, given.seed.options());
  const at::Tensor boxes_in = given.boxes ? given.boxes->contiguous() : at::Tensor();
  if (samples == 0) return boxes;
  const EraseLayout layout = erase_layout(images, format);
  const EraseCall call = erase_call(given, boxes_in, boxes);
  const int64_t rows = layout.planes * layout.height;
  const int blocks = static_cast<int>(std::max<int64_t>(1, ceil_div(rows, kEraseWarps * kRowsOfWarp)));
  const unsigned grid = static_cast<unsigned>(samples * blocks);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  dispatch_images(images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    constexpr int kVector = 16 / sizeof(T);
    const T* from = data<T>(images);
    T* into = mutable_data<T>(to);
    if (from == into) {
      erase_in_place_kernel<T><<<grid, kEraseThreads, 0, stream>>>(into, call, layout, blocks);
    } else if (layout.row % kVector == 0 && is_aligned(from) && is_aligned(into)) {
      erase_kernel<T, kVector><<<grid, kEraseThreads, 0, stream>>>(from, into, call, layout, blocks);
    } else {
      erase_kernel<T, 1><<<grid, kEraseThreads, 0, stream>>>(from, into, call, layout, blocks);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return boxes;
}

std::tuple<at::Tensor, at::Tensor> random_erasing(const at::Tensor& images, const at::Tensor& seed,
                                                  const std::optional<at::Tensor>& boxes, int64_t kind, int64_t prob,
                                                  int64_t min_count, int64_t max_count, double min_scale, double max_scale,
                                                  double min_ratio, double max_ratio, int64_t num_splits, bool per_sample,
                                                  int64_t mode, at::ArrayRef<double> value) {
  const EraseArguments given{images, seed, boxes,
                             erase_draw(images, kind, prob, min_count, max_count, min_scale, max_scale, min_ratio,
                                        max_ratio, num_splits, per_sample),
                             mode, value};
  check_erase(given);
  const c10::cuda::CUDAGuard guard(images.device());
  const at::MemoryFormat format = pixel_format(images);
  const at::Tensor erased = at::empty(images.sizes(), images.options(), format);
  return {erased, erase(given, images.contiguous(format), format, erased)};
}

at::Tensor random_erasing_(const at::Tensor& images, const at::Tensor& seed, const std::optional<at::Tensor>& boxes,
                           int64_t kind, int64_t prob, int64_t min_count, int64_t max_count, double min_scale,
                           double max_scale, double min_ratio, double max_ratio, int64_t num_splits, bool per_sample,
                           int64_t mode, at::ArrayRef<double> value) {
  const EraseArguments given{images, seed, boxes,
                             erase_draw(images, kind, prob, min_count, max_count, min_scale, max_scale, min_ratio,
                                        max_ratio, num_splits, per_sample),
                             mode, value};
  check_erase(given);
  const c10::cuda::CUDAGuard guard(images.device());
  const at::MemoryFormat format = pixel_format(images);
  const at::Tensor dense = images.contiguous(format);
  const at::Tensor found = erase(given, dense, format, dense);
  finish(dense, images);
  return found;
}

TORCH_LIBRARY_IMPL(pyrx, CUDA, m) {
  m.impl("random_erasing", &random_erasing);
  m.impl("random_erasing_", &random_erasing_);
}

}  // namespace
}  // namespace pyrx::cuda
