// CutMix, mixup and ResizeMix on the GPU.
#include <torch/library.h>

#include <limits>

#include "cuda/batch_mix.cuh"
#include "cuda/launch.h"
#include "mix_checks.h"

namespace pyrx::cuda {
namespace {

constexpr int64_t kBlocksPerMultiprocessor = 8;  // wanted: few enough to make up for their draws, which take 1 to 4 us
// Elements of a row and rows of a channel; the image's sides where it shrinks: what Divisor is exact for.
constexpr int64_t kMostRow = int64_t(1) << 24, kMostShrunkSide = int64_t(1) << 21;

// Images as kernels read them, of `format`.
struct DenseImages {
  at::Tensor tensor;
  at::MemoryFormat format;
  MixLayout layout;

  DenseImages(const MixArguments& given, at::MemoryFormat wanted) : format(wanted) {
    const at::Tensor& images = given.images;
    PixelLayout found = pixel_layout(images, format);
    if (found.row > kMostRow) found = pixel_layout(images, format = at::MemoryFormat::Contiguous);
    const int64_t rows = images.dim() == 5 ? images.size(2) * found.height : found.height;
    const int64_t most = given.draw.kind == kResizemix ? kMostShrunkSide : kMostRow;
    PYRX_CHECK_VALUE(given.draw.width <= most && rows <= most, "batch_mix", "images",
                     "of at most " + text(most) + " columns, and rows of a channel", images.sizes());
    tensor = images.contiguous(format);
    layout = {found.sample(), found.planes, found.step == 1 ? rows * found.row : 1, static_cast<int>(found.height),
              static_cast<int>(found.row), static_cast<int>(found.step), static_cast<int>(found.channels),
              make_divisor(found.row), make_divisor(found.height), make_divisor(found.step), make_divisor(rows)};
  }
};

// The call on the device: contiguous arguments, kept alive, and the results.
struct MixTensors {
  at::Tensor labels, lam, boxes, partner;
  MixResults results;
  MixCall call;

  MixTensors(const MixArguments& given, bool swap) {
    const auto dense = [](const std::optional<at::Tensor>& value) {
      return value ? value->contiguous() : at::Tensor();
    };
    labels = dense(given.labels), lam = dense(given.lam), boxes = dense(given.boxes), partner = dense(given.partner);
    const int64_t samples = given.draw.samples;
    const auto options = given.seed.options();
    results = {at::empty({given.labels ? samples : 0}, options), at::empty({samples}, options),
               at::empty({samples}, options.dtype(at::kFloat)), at::empty({samples, 4}, options)};
    const auto& [to_labels, to_partner, to_lam, to_boxes] = results;
    const auto dtype = given.images.scalar_type();
    call = {data<int64_t>(given.seed),
            data<int64_t>(labels),
            data<float>(lam),
            data<int64_t>(boxes),
            data<int64_t>(partner),
            mutable_data<int64_t>(to_labels),
            mutable_data<int64_t>(to_partner),
            mutable_data<int64_t>(to_boxes),
            mutable_data<float>(to_lam),
            given.draw,
            given.pairing,
            swap,
            !is_weighable(dtype)};
  }
};

// f(device type): what mixes, or for other dtypes one of their size, since their pixels are moved only.
template <typename F>
void dispatch_pixels(at::ScalarType dtype, F&& f) {
  if (dtype == at::kByte) return f(uint8_t());
  if (is_float(dtype)) return dispatch(dtype, f);
  switch (c10::elementSize(dtype)) {
    case 1: return f(uint8_t());
    case 2: return f(__half());
    case 4: return f(float());
    default: return f(double());
  }
}

// Vectors of a sample that a block takes.
int64_t chunk_of(const MixCall& call, int64_t vectors) {
  const int64_t samples = call.draw.samples;
  int64_t each = vectors * samples / (kBlocksPerMultiprocessor * multiprocessors() * kMixThreads);  // a thread
  // the search for a partner costs about as much as copying this many
  if (call.pairing == kRandom) each = std::max(each, samples / (kMixThreads / 2));
  if (each >= kMixFlight) each = each / kMixFlight * kMixFlight;
  return kMixThreads * std::clamp<int64_t>(each, 1, 32);
}

struct MixGrid {
  int blocks;  // a sample
  int64_t chunk;

  MixGrid(const MixCall& call, int64_t vectors) : chunk(chunk_of(call, vectors)) {
    const int64_t most = std::numeric_limits<int>::max() / call.draw.samples;
    if (ceil_div(vectors, chunk) > most) chunk = ceil_div(vectors, most);
    blocks = static_cast<int>(std::max<int64_t>(1, ceil_div(vectors, chunk)));
    chunk = ceil_div(ceil_div(vectors, blocks), kMixThreads) * kMixThreads;
  }
  unsigned total(const MixCall& call) const { return static_cast<unsigned>(call.draw.samples * blocks); }
};

template <typename In, typename Out>
void launch_mix(const MixCall& call, const DenseImages& images, const MixArguments& given, const at::Tensor& to) {
  using A = MixAcc<In, Out>;
  const In* from = data<In>(images.tensor);
  Out* target = mutable_data<Out>(to);
  MixNormalisation<A> normalisation{!given.scale.empty(), {}, {}};
  std::copy(given.scale.begin(), given.scale.end(), normalisation.scale);
  std::copy(given.bias.begin(), given.bias.end(), normalisation.bias);
  const auto launch = [&](auto width) {
    constexpr int K = decltype(width)::value;
    const MixGrid grid(call, images.layout.elements / K);
    mix_kernel<In, Out, K><<<grid.total(call), kMixThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        from, target, call, images.layout, normalisation, grid.blocks, grid.chunk);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  // 16 bytes on the wider side, so that a warp's accesses lie side by side on both; conversions of float64 are rare
  constexpr bool kRare = std::is_same_v<A, double> && !std::is_same_v<In, Out>;
  constexpr int kVector = kRare ? 1 : 16 / std::max(sizeof(In), sizeof(Out));
  const bool aligned = images.layout.elements % kVector == 0 && is_aligned(from, kVector * sizeof(In)) &&
                       is_aligned(target, kVector * sizeof(Out));
  if (aligned) return launch(std::integral_constant<int, kVector>());
  if constexpr (kVector > 1) launch(std::integral_constant<int, 1>());
}

MixResults mix_into(const at::Tensor& out, const MixArguments& given, at::MemoryFormat format) {
  const c10::cuda::CUDAGuard guard(given.images.device());
  const MixTensors tensors(given, false);
  if (given.draw.samples == 0) return tensors.results;
  const DenseImages images(given, format);
  const at::Tensor target = contiguous_target(out, images.format);
  dispatch_pixels(given.images.scalar_type(), [&](auto in) {
    using In = decltype(in);
    if (given.dtype == given.images.scalar_type()) return launch_mix<In, In>(tensors.call, images, given, target);
    dispatch(given.dtype, [&](auto other) {
      using Out = decltype(other);
      if constexpr (!std::is_same_v<In, Out>) launch_mix<In, Out>(tensors.call, images, given, target);
    });
  });
  finish(target, out);
  return tensors.results;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_mix(
    const at::Tensor& images, const std::optional<at::Tensor>& labels, const at::Tensor& seed,
    const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& boxes,
    const std::optional<at::Tensor>& partner, int64_t pairing, int64_t kind, int64_t granularity, int64_t prob,
    int64_t switch_prob, double mixup_alpha, double cutmix_alpha, double minimum, double maximum, bool correct_lam,
    at::ArrayRef<double> scale, at::ArrayRef<double> bias, at::ScalarType dtype) {
  const MixArguments given{images, labels, seed, lam, boxes, partner, pairing,
                           mix_draw(images, kind, granularity, prob, switch_prob, mixup_alpha, cutmix_alpha, minimum,
                                    maximum, correct_lam),
                           scale, bias, dtype};
  check_mix(given);
  const at::MemoryFormat format = pixel_format(images);
  const at::Tensor mixed = at::empty(images.sizes(), images.options().dtype(dtype), format);
  return std::tuple_cat(std::make_tuple(mixed), mix_into(mixed, given, format));
}

MixResults batch_mix_out(const at::Tensor& out, const at::Tensor& images, const std::optional<at::Tensor>& labels,
                         const at::Tensor& seed, const std::optional<at::Tensor>& lam,
                         const std::optional<at::Tensor>& boxes, const std::optional<at::Tensor>& partner,
                         int64_t pairing, int64_t kind, int64_t granularity, int64_t prob, int64_t switch_prob,
                         double mixup_alpha, double cutmix_alpha, double minimum, double maximum, bool correct_lam,
                         at::ArrayRef<double> scale, at::ArrayRef<double> bias) {
  const MixArguments given{images, labels, seed, lam, boxes, partner, pairing,
                           mix_draw(images, kind, granularity, prob, switch_prob, mixup_alpha, cutmix_alpha, minimum,
                                    maximum, correct_lam),
                           scale, bias, out.scalar_type()};
  check_mix(given);
  check_out(out, images);
  return mix_into(out, given, pixel_format(out));
}

MixResults batch_mix_(const at::Tensor& images, const std::optional<at::Tensor>& labels, const at::Tensor& seed,
                      const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& boxes,
                      const std::optional<at::Tensor>& partner, int64_t pairing, int64_t kind, int64_t granularity,
                      int64_t prob, int64_t switch_prob, double mixup_alpha, double cutmix_alpha, double minimum,
                      double maximum, bool correct_lam) {
  const MixArguments given{images, labels, seed, lam, boxes, partner, pairing,
                           mix_draw(images, kind, granularity, prob, switch_prob, mixup_alpha, cutmix_alpha, minimum,
                                    maximum, correct_lam),
                           {}, {}, images.scalar_type()};
  check_mix(given);
  check_swap(given);
  const c10::cuda::CUDAGuard guard(images.device());
  const MixTensors tensors(given, true);
  if (given.draw.samples == 0) return tensors.results;
  const DenseImages dense(given, pixel_format(images));
  dispatch_pixels(images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* pixels = mutable_data<T>(dense.tensor);
    const auto launch = [&](auto width) {
      constexpr int K = decltype(width)::value;
      const MixGrid grid(tensors.call, dense.layout.elements / K);
      swap_kernel<T, K><<<grid.total(tensors.call), kMixThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
          pixels, tensors.call, dense.layout, grid.blocks);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    };
    constexpr int kVector = 16 / sizeof(T);
    const bool aligned = dense.layout.row % kVector == 0 && is_aligned(pixels);
    if (aligned) return launch(std::integral_constant<int, kVector>());
    launch(std::integral_constant<int, 1>());
  });
  finish(dense.tensor, images);
  return tensors.results;
}

TORCH_LIBRARY_IMPL(pyrx, CUDA, m) {
  m.impl("batch_mix", &batch_mix);
  m.impl("batch_mix_out", &batch_mix_out);
  m.impl("batch_mix_", &batch_mix_);
}

}  // namespace
}  // namespace pyrx::cuda
