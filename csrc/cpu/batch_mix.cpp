// CutMix, mixup and ResizeMix on the CPU.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/elements.h"
#include "cpu/pages.h"
#include "mix_checks.h"

namespace pyrx::cpu {
namespace {

constexpr int64_t kTaskBytes = 128 << 10;  // of a task: in the second-level cache; less is not worth a second thread

template <typename T>
uint8_t* as_bytes(T* p) { return reinterpret_cast<uint8_t*>(p); }
template <typename T>
const uint8_t* as_bytes(const T* p) { return reinterpret_cast<const uint8_t*>(p); }

// The mixes of one call, and as the caller gets them.
struct Mixes {
  std::vector<Mix> of;
  std::vector<int64_t> partner;
  MixResults results;
};

// The random matching: neighbours in the order of the keys.
std::vector<int64_t> matching(uint64_t seed, int64_t samples) {
  std::vector<uint64_t> keys(samples);
  for (int64_t i = 0; i < samples; ++i) keys[i] = pairing_key(seed, i);
  std::sort(keys.begin(), keys.end());
  std::vector<int64_t> partner(samples);
  for (int64_t rank = 0; rank < samples; ++rank) {
    const int64_t other = (rank ^ 1) < samples ? rank ^ 1 : rank;
    partner[keys[rank] & (kMostSamples - 1)] = static_cast<int64_t>(keys[other] & (kMostSamples - 1));
  }
  return partner;
}

std::vector<int64_t> partners(const MixArguments& given, bool swap) {
  const int64_t samples = given.draw.samples;
  std::vector<int64_t> partner(samples);
  switch (given.pairing) {
    case kFlip:
      for (int64_t i = 0; i < samples; ++i) partner[i] = samples - 1 - i;
      break;
    case kRoll:
      for (int64_t i = 0; i < samples; ++i) partner[i] = i == 0 ? samples - 1 : i - 1;
      break;
    case kRandom: return matching(seed_value(given.seed), samples);
    default: {
      const at::Tensor values = given.partner->contiguous();
      std::copy_n(values.const_data_ptr<int64_t>(), samples, partner.begin());
      std::vector<bool> seen(samples);
      for (const int64_t each : partner) {
        const bool fresh = each >= 0 && each < samples && !seen[each];
        PYRX_CHECK_VALUE(fresh, "batch_mix", "pairing", "to be a permutation of the samples",
                         at::IntArrayRef(partner));
        seen[each] = true;
      }
      for (int64_t i = 0; swap && i < samples; ++i)
        PYRX_CHECK_VALUE(partner[partner[i]] == i, "batch_mix", "pairing", "to be its own inverse for inplace=True",
                         at::IntArrayRef(partner));
    }
  }
  return partner;
}

Mixes draw(const MixArguments& given, bool swap) {
  const int64_t samples = given.draw.samples;
  Mixes mixes{std::vector<Mix>(samples), partners(given, swap), {}};
  const at::Tensor lams = given.lam ? given.lam->contiguous() : at::Tensor();
  const at::Tensor boxes = given.boxes ? given.boxes->contiguous() : at::Tensor();
  const bool weighable = is_weighable(given.images.scalar_type());
  for (int64_t i = 0; i < samples; ++i) {
    const float lam = given.lam ? lams.const_data_ptr<float>()[i] : -1.0f;
    PYRX_CHECK_VALUE(!given.lam || (lam >= 0 && lam <= 1), "batch_mix", "lam", "in [0, 1]", double(lam));
    if (given.boxes) {
      const int64_t* values = boxes.const_data_ptr<int64_t>() + 4 * i;
      const Box box{values[0], values[1], values[2], values[3]};
      PYRX_CHECK_VALUE(is_box(box, given.draw) && (box.y0 >= 0 || weighable), "batch_mix", "boxes",
                       "0 <= y0 <= y1 <= " + text(given.draw.height) + " and 0 <= x0 <= x1 <= " + text(given.draw.width),
                       at::IntArrayRef(values, 4));
      PYRX_CHECK_VALUE(given.lam || box.y0 >= 0, "batch_mix", "lam", "to be given beside boxes of -1", "None");
      mixes.of[i] = given_mix(box, lam, given.draw);
    } else {
      const int64_t index = given.draw.granularity == kPerSample ? i
                            : given.draw.granularity == kPerPair ? std::min(i, mixes.partner[i])
                                                                 : 0;
      mixes.of[i] = draw_mix(seed_value(given.seed), static_cast<uint64_t>(index), lam, given.draw);
    }
  }
  const auto options = given.seed.options();
  const at::Tensor labels = given.labels ? given.labels->contiguous() : at::Tensor();
  const at::Tensor partner_labels = at::empty({given.labels ? samples : 0}, options);
  const at::Tensor partner = at::empty({samples}, options), lam = at::empty({samples}, options.dtype(at::kFloat));
  const at::Tensor box = at::empty({samples, 4}, options);
  for (int64_t i = 0; i < samples; ++i) {
    const Mix& mix = mixes.of[i];
    if (given.labels)
      partner_labels.mutable_data_ptr<int64_t>()[i] = labels.const_data_ptr<int64_t>()[mixes.partner[i]];
    partner.mutable_data_ptr<int64_t>()[i] = mixes.partner[i];
    lam.mutable_data_ptr<float>()[i] = mix.lam;
    std::copy_n(&mix.box.y0, 4, box.mutable_data_ptr<int64_t>() + 4 * i);
  }
  mixes.results = {partner_labels, partner, lam, box};
  return mixes;
}

// f(inside, begin, end) over the elements of rows [first, last) of a plane, in order: runs inside and outside the box.
template <typename F>
void for_runs(const PixelLayout& layout, const Box& box, int64_t first, int64_t last, F f) {
  int64_t at = first * layout.row;
  const int64_t x0 = box.x0 * layout.step, x1 = box.x1 * layout.step;
  for (int64_t y = std::max(first, box.y0); x0 < x1 && y < std::min(last, box.y1); ++y) {
    const int64_t begin = y * layout.row + x0;
    if (at < begin) f(false, at, begin);
    at = y * layout.row + x1;
    f(true, begin, at);
  }
  if (at < last * layout.row) f(false, at, last * layout.row);
}

// f(plane, first row, last row) for blocks of rows of every plane of every item, over the threads.
template <typename F>
void for_blocks(int64_t items, const PixelLayout& layout, int64_t element, F f) {
  const int64_t row_bytes = layout.row * element;
  const int64_t rows = std::max<int64_t>(1, std::min(layout.height, kTaskBytes / row_bytes));
  const int64_t blocks = (layout.height + rows - 1) / rows, each = layout.planes * blocks;
  const int64_t grain = std::max<int64_t>(1, kTaskBytes / (rows * row_bytes));
  at::parallel_for(0, items * each, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * rows;
      f(i / each, i / blocks % layout.planes, first, std::min(layout.height, first + rows));
    }
    store_fence();
  });
}

// Row y of a box shows the whole of `image`, a plane, as small as the box.
template <typename T>
void shrink_row(const T* image, const PixelLayout& layout, const Box& box, int64_t y, T* out) {
  const int64_t step = layout.step, width = layout.row / step;
  const T* row = image + (y - box.y0) * layout.height / (box.y1 - box.y0) * layout.row;
  for (int64_t x = 0; x < box.x1 - box.x0; ++x) {
    const T* pixel = row + x * width / (box.x1 - box.x0) * step;
    for (int64_t c = 0; c < step; ++c) out[x * step + c] = pixel[c];
  }
}

// Pixels that keep their bytes, of element type T; see mix_into.
template <typename T>
void paste_into(const T* from, const PixelLayout& layout, const Mixes& mixes, bool shrink, bool stream, T* to) {
  const ByteKernels& kernels = byte_kernels();
  const int64_t samples = static_cast<int64_t>(mixes.of.size());
  for_blocks(samples, layout, sizeof(T), [&](int64_t n, int64_t plane, int64_t first, int64_t last) {
    const int64_t offset = plane * layout.plane();
    const Box& box = mixes.of[n].box;
    const T* own = from + n * layout.sample() + offset;
    const T* other = from + mixes.partner[n] * layout.sample() + offset;
    T* out = to + n * layout.sample() + offset;
    for_runs(layout, box, first, last, [&](bool inside, int64_t begin, int64_t end) {
      if (inside && shrink) return shrink_row(other, layout, box, begin / layout.row, out + begin);
      const T* source = (inside ? other : own) + begin;
      const int64_t bytes = (end - begin) * sizeof(T);
      if (!stream) std::memcpy(out + begin, source, bytes);
      else kernels.copy_stream(as_bytes(out + begin), as_bytes(source), bytes);
    });
  });
}

// Scale and bias a channel as a run of pixels meets them.
template <typename Acc>
struct Affine {
  std::vector<Acc> scale, bias;  // (channels or 1) x (period + 16)
  int64_t period = 0;
  bool each_channel;  // of planes of one channel

  Affine(at::ArrayRef<double> scales, at::ArrayRef<double> biases, const PixelLayout& layout)
      : each_channel(layout.step == 1) {
    if (scales.empty()) return;
    period = each_channel ? 16 : layout.channels * 16;
    for (int64_t c = 0; c < (each_channel ? layout.channels : 1); ++c)
      for (int64_t i = 0; i < period + 16; ++i) {
        scale.push_back(static_cast<Acc>(scales[each_channel ? c : i % layout.channels]));
        bias.push_back(static_cast<Acc>(biases[each_channel ? c : i % layout.channels]));
      }
  }
  const Acc* at(const std::vector<Acc>& values, int64_t channel) const {
    return values.empty() ? nullptr : values.data() + (each_channel ? channel * (period + 16) : 0);
  }
};

template <typename In, typename Out>
void mix_into(const In* from, const PixelLayout& layout, int64_t frames, const Mixes& mixes, bool shrink,
              at::ArrayRef<double> scale, at::ArrayRef<double> bias, bool stream, Out* to) {
  using Acc = pixel_acc_t<In, Out>;
  const Affine<Acc> affine(scale, bias, layout);
  const auto& kernels = mix_kernels<In, Out>();
  const int64_t samples = static_cast<int64_t>(mixes.of.size());
  for_blocks(samples, layout, sizeof(Out), [&](int64_t n, int64_t plane, int64_t first, int64_t last) {
    const int64_t offset = plane * layout.plane(), channel = layout.channel(plane, frames);
    const Mix& mix = mixes.of[n];
    const In* own = from + n * layout.sample() + offset;
    const In* other = from + mixes.partner[n] * layout.sample() + offset;
    Out* out = to + n * layout.sample() + offset;
    const MixRun<In, Out> run{mix.weight, affine.at(affine.scale, channel), affine.at(affine.bias, channel),
                              affine.period, stream};
    std::vector<In> shrunk(shrink ? layout.row : 0);
    for_runs(layout, mix.box, first, last, [&](bool inside, int64_t begin, int64_t end) {
      const In* source = own + begin;
      if (inside && shrink) {
        shrink_row(other, layout, mix.box, begin / layout.row, shrunk.data());
        source = shrunk.data();
      } else if (inside || mix.weight == 0) {
        source = other + begin;
      }
      const bool weighed = !inside && mix.weight != 0 && mix.weight != 1;
      kernels.mix(run, source, weighed ? other + begin : nullptr, end - begin, out + begin);
    });
  });
}

// Out of place, from images of pixel_format to `to` of the same.
void mix_out(const MixArguments& given, const Mixes& mixes, const at::Tensor& images, at::MemoryFormat format,
             const at::Tensor& to, bool stream) {
  if (images.numel() == 0) return;
  const PixelLayout layout = pixel_layout(images, format);
  const bool shrink = given.draw.kind == kResizemix;
  const bool pasted = images.scalar_type() == to.scalar_type() && given.scale.empty() &&
                      std::all_of(mixes.of.begin(), mixes.of.end(), [](const Mix& mix) { return mix.weight == 1; });
  if (pasted) {
    const auto paste = [&](auto type) {
      using T = decltype(type);
      paste_into(static_cast<const T*>(images.const_data_ptr()), layout, mixes, shrink, stream,
                 static_cast<T*>(to.mutable_data_ptr()));
    };
    switch (images.element_size()) {
      case 1: return paste(uint8_t());
      case 2: return paste(uint16_t());
      case 4: return paste(uint32_t());
      default: return paste(uint64_t());
    }
  }
  const int64_t frames = images.dim() == 5 ? images.size(2) : 1;
  dispatch_pixels(images.scalar_type(), [&](auto in) {
    dispatch_pixels(to.scalar_type(), [&](auto out) {
      using In = decltype(in);
      using Out = decltype(out);
      if constexpr (!std::is_same_v<Out, uint8_t> || std::is_same_v<In, Out>)
        mix_into(static_cast<const In*>(images.const_data_ptr()), layout, frames, mixes, shrink, given.scale,
                 given.bias, stream, static_cast<Out*>(to.mutable_data_ptr()));
    });
  });
}

// In place: rows of both partners of a pair at once. f(weight_a, weight_b, begin, end): runs of one pair of weights.
template <typename F>
void for_pair_runs(const PixelLayout& layout, const Mix& a, const Mix& b, int64_t first, int64_t last, F f) {
  const auto run = [&](float weight_a, float weight_b, int64_t begin, int64_t end) {
    if (begin < end && (weight_a != 1 || weight_b != 1)) f(weight_a, weight_b, begin, end);
  };
  const auto holds = [](const Box& box, int64_t y) { return box.y0 <= y && y < box.y1 && box.x0 < box.x1; };
  for (int64_t y = first; y < last; ++y) {
    const bool in_a = holds(a.box, y), in_b = holds(b.box, y);
    int64_t edges[6] = {0, in_a ? a.box.x0 : 0, in_a ? a.box.x1 : 0, in_b ? b.box.x0 : 0, in_b ? b.box.x1 : 0,
                        layout.row / layout.step};
    std::sort(edges, edges + 6);
    for (int k = 0; k < 5; ++k) {
      const auto inside = [&](bool in, const Box& box) { return in && box.x0 <= edges[k] && edges[k] < box.x1; };
      const int64_t row = y * layout.row;
      run(inside(in_a, a.box) ? 0 : a.weight, inside(in_b, b.box) ? 0 : b.weight, row + edges[k] * layout.step,
          row + edges[k + 1] * layout.step);
    }
  }
}

template <typename T, typename MixPair>
void swap_in_place(T* images, const PixelLayout& layout, const Mixes& mixes, MixPair mix_pair) {
  std::vector<int64_t> firsts;  // of each pair, and the samples that are their own partners
  for (int64_t i = 0; i < static_cast<int64_t>(mixes.of.size()); ++i)
    if (i <= mixes.partner[i]) firsts.push_back(i);
  const ByteKernels& kernels = byte_kernels();
  const int64_t pairs = static_cast<int64_t>(firsts.size());
  for_blocks(pairs, layout, 2 * sizeof(T), [&](int64_t pair, int64_t plane, int64_t first, int64_t last) {
    const int64_t i = firsts[pair], j = mixes.partner[i], offset = plane * layout.plane();
    T* a = images + i * layout.sample() + offset;
    T* b = images + j * layout.sample() + offset;
    const auto run = [&](float weight_a, float weight_b, int64_t begin, int64_t end) {
      const int64_t n = end - begin;
      if (weight_a == 0 && weight_b == 0 && i != j)
        kernels.swap(as_bytes(a + begin), as_bytes(b + begin), n * sizeof(T));
      else if (weight_a == 0 && weight_b == 1) std::memcpy(a + begin, b + begin, n * sizeof(T));
      else if (weight_a == 1 && weight_b == 0) std::memcpy(b + begin, a + begin, n * sizeof(T));
      else if (weight_a != 0 || i != j) mix_pair(a + begin, b + begin, weight_a, weight_b, n);
    };
    const Mix &mix_a = mixes.of[i], &mix_b = mixes.of[j];
    if (i == j && mix_a.weight == 1) return;
    const auto is_empty = [](const Box& box) { return box.area() == 0; };
    if (is_empty(mix_a.box) && is_empty(mix_b.box)) {
      if (mix_a.weight != 1 || mix_b.weight != 1)
        run(mix_a.weight, mix_b.weight, first * layout.row, last * layout.row);
    } else {
      for_pair_runs(layout, mix_a, mix_b, first, last, run);
    }
  });
}

// Both partners of a pair at once. A weight of 0 or 1 copies, whatever the other side holds.
template <typename T>
void mix_pair(T* a, T* b, accumulate_t<T> weight_a, accumulate_t<T> weight_b, int64_t n) {
  if (weight_a == 0 || weight_a == 1) {
    std::swap(a, b);
    std::swap(weight_a, weight_b);
  }
  if (a != b && weight_b != 0 && weight_b != 1) return pair_kernels<T>().mix_pair(a, b, weight_a, weight_b, n);
  constexpr int64_t kBlock = 256;
  const MixRun<T, T> run{weight_a, nullptr, nullptr, 0, false};
  T before[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = std::min(kBlock, n - i);
    std::copy_n(a + i, count, before);
    mix_kernels<T, T>().mix(run, a + i, b + i, count, a + i);
    if (a != b && weight_b == 0) std::copy_n(before, count, b + i);
  }
}

void mix_in_place(const Mixes& mixes, const at::Tensor& images, at::MemoryFormat format) {
  if (images.numel() == 0) return;
  const PixelLayout layout = pixel_layout(images, format);
  const bool pasted = std::all_of(mixes.of.begin(), mixes.of.end(), [](const Mix& mix) { return mix.weight == 1; });
  if (pasted) {
    const auto swap = [&](auto type) {
      using T = decltype(type);
      swap_in_place(static_cast<T*>(images.mutable_data_ptr()), layout, mixes, [](T*, T*, float, float, int64_t) {});
    };
    switch (images.element_size()) {
      case 1: return swap(uint8_t());
      case 2: return swap(uint16_t());
      case 4: return swap(uint32_t());
      default: return swap(uint64_t());
    }
  }
  dispatch_pixels(images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using Acc = accumulate_t<T>;
    swap_in_place(static_cast<T*>(images.mutable_data_ptr()), layout, mixes,
                  [](T* a, T* b, float weight_a, float weight_b, int64_t n) {
                    mix_pair(a, b, static_cast<Acc>(weight_a), static_cast<Acc>(weight_b), n);
                  });
  });
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
  const Mixes mixes = draw(given, false);
  const at::MemoryFormat format = pixel_format(images);
  const at::Tensor mixed = at::empty(images.sizes(), images.options().dtype(dtype), format);
  use_huge_pages(mixed);
  mix_out(given, mixes, images.contiguous(format), format, mixed, false);
  return std::tuple_cat(std::make_tuple(mixed), mixes.results);
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
  const Mixes mixes = draw(given, false);
  // the layout of `out` where it has one that is dense, since it is written once and images often are the smaller
  const at::MemoryFormat format = pixel_format(out);
  const at::Tensor target = out.is_contiguous(format) ? out : at::empty(out.sizes(), out.options(), format);
  mix_out(given, mixes, images.contiguous(format), format, target, is_streamed(target.nbytes()));
  finish(target, out);
  return mixes.results;
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
  const Mixes mixes = draw(given, true);
  const at::MemoryFormat format = pixel_format(images);
  const at::Tensor dense = images.contiguous(format);
  mix_in_place(mixes, dense, format);
  finish(dense, images);
  return mixes.results;
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) {
  m.impl("batch_mix", &batch_mix);
  m.impl("batch_mix_out", &batch_mix_out);
  m.impl("batch_mix_", &batch_mix_);
}

}  // namespace
}  // namespace pyrx::cpu
