// Multi-sample dropout on the GPU: the M copies, their fold, and the head around cuBLAS.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <array>
#include <bit>
#include <string_view>
#include <tuple>
#include <vector>

#include "cuda/launch.h"
#include "cuda/multi_sample_dropout.cuh"
#include "head_checks.h"

namespace pyrx::cuda {
namespace {

constexpr std::string_view kOp = "multi_sample_dropout", kFold = "multi_sample_dropout_fold",
                           kHead = "multi_sample_dropout_cross_entropy",
                           kHeadBackward = "multi_sample_dropout_cross_entropy_backward";

// A chunk's X, Z and G stay within this, which is about the L2 of a large GPU, ...
constexpr int64_t kChunkBytes = int64_t(64) << 20;
// ... but a chunk has enough GEMM rows to pay for reading the weight.
constexpr int64_t kMinChunkRows = 1024, kMaxChunkRows = 65536;

cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream(); }

// `memory` holds the thresholds that do not fit the table; it is to live until the kernels are launched.
SampleTable sample_table(at::IntArrayRef thresholds, bool antithetic, at::Tensor& memory, const at::Tensor& like) {
  SampleTable table{};
  const int64_t samples = static_cast<int64_t>(thresholds.size());
  table.antithetic = antithetic;
  table.uniform = std::all_of(thresholds.begin(), thresholds.end(), [&](int64_t t) { return t == thresholds[0]; });
  for (int64_t m = 0; m < std::min<int64_t>(samples, kSliceSamples); ++m) table.few[m] = uint16_t(thresholds[m]);
  if (table.uniform || samples <= kSliceSamples) return table;
  memory = at::empty({samples}, like.options().dtype(at::kShort));
  uint16_t* to = static_cast<uint16_t*>(memory.mutable_data_ptr());
  for (int64_t first = 0; first < samples; first += kPageSamples) {
    ThresholdPage page;
    const int count = int(std::min<int64_t>(samples - first, kPageSamples));
    for (int i = 0; i < count; ++i) page.values[i] = uint16_t(thresholds[first + i]);
    upload_kernel<<<1, kThreads, 0, stream()>>>(to + first, page, count);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  table.more = to;
  return table;
}

at::Tensor expand(const at::Tensor& input, const at::Tensor& seed, at::IntArrayRef thresholds, bool antithetic) {
  check_float(kOp, "input", input);
  check_seed(kOp, seed, input.device());
  check_thresholds(kOp, thresholds);
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor x = input.contiguous(), like = at::empty_like(input);
  const int64_t samples = static_cast<int64_t>(thresholds.size()), numel = x.numel();
  std::vector<int64_t> sizes{samples}, strides{numel};
  sizes.insert(sizes.end(), input.sizes().begin(), input.sizes().end());
  strides.insert(strides.end(), like.strides().begin(), like.strides().end());
  const at::Tensor out = at::empty_strided(sizes, strides, input.options());
  if (numel == 0) return out;
  const at::Tensor y = like.is_contiguous() ? out : at::empty(sizes, input.options());
  at::Tensor memory;
  const SampleTable table = sample_table(thresholds, antithetic, memory, x);
  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(y);
    const bool aligned_samples = is_aligned(to) && numel * sizeof(T) % 16 == 0;
    expand_kernel<<<blocks_for(ceil_div(numel, kGroup), kThreads), kThreads, 0, stream()>>>(
        from, to, seed.const_data_ptr<int64_t>(), numel, samples, table, is_aligned(from), aligned_samples);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return finish(y, out);
}

at::Tensor fold(const at::Tensor& grad, const at::Tensor& seed, at::IntArrayRef thresholds, bool antithetic) {
  check_float(kFold, "grad", grad);
  check_seed(kFold, seed, grad.device());
  check_thresholds(kFold, thresholds);
  const int64_t samples = static_cast<int64_t>(thresholds.size());
  PYRX_CHECK_VALUE(grad.dim() > 0 && grad.size(0) == samples, kFold, "grad",
                   c10::str("of shape [M, ...] with M = ", samples), grad.sizes());
  const c10::cuda::CUDAGuard guard(grad.device());
  const at::Tensor g = grad.contiguous(), out = at::empty_like(grad.select(0, 0)), y = contiguous_target(out);
  const int64_t numel = out.numel();
  if (numel == 0) return out;
  at::Tensor memory;
  const SampleTable table = sample_table(thresholds, antithetic, memory, g);
  dispatch(g.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(g);
    T* to = mutable_data<T>(y);
    const bool aligned_samples = is_aligned(from) && numel * sizeof(T) % 16 == 0;
    fold_samples_kernel<<<blocks_for(ceil_div(numel, kGroup), kThreads), kThreads, 0, stream()>>>(
        from, to, seed.const_data_ptr<int64_t>(), numel, samples, table, is_aligned(to), aligned_samples);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return finish(y, out);
}

// out = a b, or out += a b; out may be float32 where a and b are of a half type.
void multiply(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool add) {
  if (out.scalar_type() == a.scalar_type()) {
    add ? at::addmm_out(out, out, a, b) : at::mm_out(out, a, b);
  } else {
    add ? at::addmm_out(out, out, a, b, out.scalar_type()) : at::mm_out(out, a, b, out.scalar_type());
  }
}

template <typename A, typename Out>
void launch_finish(const A* partials, int parts, int64_t numel, const A* factor, Out* output) {
  if (numel == 0) return;
  finish_kernel<<<blocks_for(numel, kThreads), kThreads, 0, stream()>>>(partials, parts, numel, factor, output);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The checked arguments of one call, contiguous where kernels read them.
struct HeadCall {
  at::Tensor input, linear_weight, linear_bias, target, target_b, lam, class_weight, seed, upstream;
  std::vector<int64_t> thresholds;
  bool antithetic, combine_logits;
  int64_t ignore_index;
  double label_smoothing;
  std::array<bool, 3> needs_grad;
  at::ScalarType gradient_dtype;

  bool wants_gradients() const { return needs_grad[0] || needs_grad[1] || needs_grad[2]; }
};

struct HeadOutcome {
  at::Tensor loss, grad_input, grad_weight, grad_bias;
};

// T: operands; Out: gradients, T or float32 beside float16.
template <typename T, typename Out>
class Head {
  using A = Acc<T>;
  static constexpr bool kHalf = sizeof(T) == 2;
  // float16 keeps G near one; what scales it waits for float32
  static constexpr bool kLate = std::is_same_v<T, __half>;

 public:
  explicit Head(const HeadCall& call)
      : call_(call),
        rows_(call.input.size(0)),
        features_(call.input.size(1)),
        classes_(call.linear_weight.size(0)),
        samples_(static_cast<int64_t>(call.thresholds.size())),
        options_(call.input.options()),
        accumulation_(options_.dtype(accumulation_dtype(call.input.scalar_type()))),
        table_(sample_table(call.thresholds, call.antithetic, table_memory_, call.input)) {
    PYRX_CHECK_VALUE(classes_ < int64_t(1) << 31, kHead, "linear_weight", "of fewer than 2**31 classes",
                     call.linear_weight.sizes());
    // a slice has whole pairs, since kSliceSamples is even
    const int64_t most = call.combine_logits ? samples_ : kSliceSamples;
    for (int64_t first = 0; first < samples_; first += most) {
      const int64_t count = std::min(most, samples_ - first);
      slices_.push_back({first, sample_plan(&call.thresholds[first], count, call.antithetic, call.combine_logits)});
    }
    losses_a_row_ = call.combine_logits ? 1 : samples_;
    const int64_t largest = *std::max_element(call.thresholds.begin(), call.thresholds.end());
    largest_scale_ = call.combine_logits ? 1.0 : 65536.0 / double(65536 - largest);
  }

  HeadOutcome run(bool mean, bool per_row, bool wants_loss) {
    const auto gradient = [&](bool needed, const at::Tensor& like) {
      return at::empty(needed ? like.sizes() : at::IntArrayRef{0}, options_.dtype(call_.gradient_dtype));
    };
    HeadOutcome outcome;
    outcome.grad_input = gradient(call_.needs_grad[0], call_.input);
    outcome.grad_weight = gradient(call_.needs_grad[1], call_.linear_weight);
    outcome.grad_bias = gradient(call_.needs_grad[2], call_.linear_bias);
    allocate(outcome, wants_loss);
    head_stats_kernel<<<1, kThreads, 0, stream()>>>(target(), rows_, mean, double(losses_a_row_), largest_scale_,
                                                   stats());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    for (int64_t row = 0; row < rows_; row += chunk_rows_) {
      for (const Slice& slice : slices_) run_chunk(row, std::min(chunk_rows_, rows_ - row), slice, outcome);
    }
    finish_gradients(outcome);
    if (wants_loss) {
      outcome.loss = at::empty(per_row ? at::IntArrayRef{rows_} : at::IntArrayRef{}, accumulation_);
      const unsigned blocks = per_row ? blocks_for(rows_, kThreads) : 1;
      if (blocks > 0) {
        loss_kernel<<<blocks, kThreads, 0, stream()>>>(data<A>(losses_), rows_, int(parts_), per_row, stats(),
                                                       mutable_data<A>(outcome.loss));
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      }
    }
    return outcome;
  }

 private:
  HeadStats<A>* stats() const { return mutable_data<HeadStats<A>>(stats_); }
  const A* late_factor() const { return kLate ? &stats()->gradient_factor : nullptr; }

  Target<A> target() const {
    const bool ids = call_.target.scalar_type() == at::kLong;
    return {ids ? data<int64_t>(call_.target) : nullptr,
            data<int64_t>(call_.target_b),
            data<A>(call_.lam),
            ids ? nullptr : data<A>(call_.target),
            data<A>(call_.class_weight),
            classes_,
            call_.ignore_index,
            A(call_.label_smoothing)};
  }

  void allocate(const HeadOutcome& outcome, bool wants_loss) {
    const int64_t gemm_rows = slices_[0].plan.gemm_rows;  // of the largest slice
    const bool separate = kHalf && call_.wants_gradients();
    const int64_t row_bytes = features_ * sizeof(T) + classes_ * (sizeof(A) + (separate ? sizeof(T) : 0));
    const int64_t budget = std::clamp(kChunkBytes / row_bytes, kMinChunkRows, kMaxChunkRows);
    chunk_rows_ = std::clamp<int64_t>(budget / gemm_rows, 1, std::max<int64_t>(rows_, 1));
    const int64_t most = chunk_rows_ * gemm_rows;

    // one block a row fills the device, unless rows are few: then samples are shared out, which pairs cannot be
    const Slice& slice = slices_[0];
    const bool whole = slice.plan.paired || slice.plan.averaged;
    const uint64_t wanted = ceil_div(4 * multiprocessors(), chunk_rows_);
    parts_ = whole ? 1 : std::min<int64_t>(std::bit_ceil(wanted), slice.plan.samples);

    stats_ = at::empty({3}, accumulation_);
    if (wants_loss) losses_ = at::empty({rows_, parts_}, accumulation_);
    packed_ = at::empty({most, features_}, options_);
    logits_ = at::empty({most, classes_}, accumulation_);
    gradient_ = separate ? at::empty({most, classes_}, options_) : logits_;
    if (call_.needs_grad[0]) {
      const int64_t groups = ceil_div(chunk_rows_ * features_, kGroup) + 1;
      if (call_.combine_logits) {
        levels_ = at::empty({chunk_rows_, features_}, accumulation_);
      } else {
        bits_ = at::empty({gemm_rows, groups}, options_.dtype(at::kByte));
      }
      if (slices_.size() > 1) carry_ = at::empty({chunk_rows_, features_}, accumulation_);
    }
    if (call_.needs_grad[1]) {
      const bool once = chunk_rows_ >= rows_ && slices_.size() == 1;
      // cuBLAS rounds a single product itself
      const bool direct = outcome.grad_weight.scalar_type() == accumulation_.dtype().toScalarType() || (once && !kLate);
      weight_sum_ = direct ? outcome.grad_weight : at::empty({classes_, features_}, accumulation_);
    }
    if (call_.needs_grad[2]) {
      bias_parts_ = std::clamp<int64_t>(chunk_rows_ / 32, 1, 32);
      bias_sums_ = at::empty({bias_parts_, classes_}, accumulation_);
    }
  }

  void run_chunk(int64_t first_row, int64_t rows, const Slice& slice, const HeadOutcome& outcome) {
    const SamplePlan& plan = slice.plan;
    const int64_t gemm_rows = rows * plan.gemm_rows, first_element = first_row * features_;
    const int64_t first_group = first_element / kGroup;
    const Chunk chunk{first_element, rows, features_, first_group,
                      ceil_div(first_element + rows * features_, kGroup) - first_group};
    const at::Tensor packed = packed_.narrow(0, 0, gemm_rows), logits = logits_.narrow(0, 0, gemm_rows);
    pack(chunk, slice);
    multiply(logits, packed, call_.linear_weight.t(), false);
    cross_entropy(first_row, rows, slice);
    if (!call_.wants_gradients()) return;

    const at::Tensor gradient = gradient_.narrow(0, 0, gemm_rows);
    const bool first = first_row == 0 && slice.first == 0;
    if (call_.needs_grad[1]) multiply(weight_sum_, gradient.t(), packed, !first);
    if (call_.needs_grad[2]) {
      const dim3 grid{unsigned(ceil_div(classes_, kWarp)), unsigned(bias_parts_)};
      bias_kernel<T><<<grid, kThreads, 0, stream()>>>(data<T>(gradient), mutable_data<A>(bias_sums_), rows, classes_,
                                                      slice, table_, first);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    if (call_.needs_grad[0]) {
      multiply(packed, gradient, call_.linear_weight, false);  // X is not needed any more
      fold(chunk, slice, mutable_data<Out>(outcome.grad_input) + first_element);
    }
  }

  void pack(const Chunk& chunk, const Slice& slice) {
    if (chunk.groups == 0) return;
    PackParams<T> params{data<T>(call_.input) + chunk.first_element,
                         mutable_data<T>(packed_),
                         mutable_data<uint8_t>(bits_),
                         mutable_data<A>(levels_),
                         data<int64_t>(call_.seed),
                         samples_,
                         chunk,
                         slice,
                         table_};
    const unsigned batches = slice.plan.averaged ? 1 : unsigned(ceil_div(slice.plan.gemm_rows, kPackSamples));
    const dim3 grid{unsigned(ceil_div(chunk.groups, kThreads)), batches};
    const bool aligned = features_ % kGroup == 0 && is_aligned(params.input);
    const auto kernel = aligned ? pack_kernel<T, true> : pack_kernel<T, false>;
    kernel<<<grid, kThreads, 0, stream()>>>(params);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void cross_entropy(int64_t first_row, int64_t rows, const Slice& slice) {
    CrossEntropyParams<T> params{data<A>(logits_),
                                 call_.wants_gradients() ? mutable_data<T>(gradient_) : nullptr,
                                 data<T>(call_.linear_bias),
                                 data<A>(call_.upstream),
                                 stats(),
                                 mutable_data<A>(losses_),
                                 first_row,
                                 A(largest_scale_),
                                 !kLate,
                                 target(),
                                 slice,
                                 table_};
    const dim3 grid{unsigned(rows), unsigned(parts_)};
    const bool fours = classes_ % 4 == 0 && is_aligned(params.bias, std::min<size_t>(16, 4 * sizeof(T)));
    const auto kernel = slice.plan.paired ? fours ? cross_entropy_kernel<T, 4, true> : cross_entropy_kernel<T, 1, true>
                        : fours           ? cross_entropy_kernel<T, 4, false>
                                          : cross_entropy_kernel<T, 1, false>;
    kernel<<<grid, kThreads, 0, stream()>>>(params);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void fold(const Chunk& chunk, const Slice& slice, Out* output) {
    if (chunk.groups == 0) return;
    A* carry = mutable_data<A>(carry_);
    const bool last = slice.first == slices_.back().first;
    FoldParams<T, Out> params{data<T>(packed_),
                              output,
                              data<uint8_t>(bits_),
                              data<A>(levels_),
                              late_factor(),
                              slice.first == 0 ? nullptr : carry,
                              last ? nullptr : carry,
                              chunk,
                              slice.plan};
    const auto kernel = features_ % kGroup == 0 ? fold_kernel<T, Out, true> : fold_kernel<T, Out, false>;
    kernel<<<unsigned(ceil_div(chunk.groups, kThreads)), kThreads, 0, stream()>>>(params);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void finish_gradients(const HeadOutcome& outcome) {
    if (rows_ == 0) {
      for (const at::Tensor* each : {&outcome.grad_input, &outcome.grad_weight, &outcome.grad_bias}) each->zero_();
      return;
    }
    if (call_.needs_grad[1] && (kLate || !weight_sum_.is_same(outcome.grad_weight))) {
      launch_finish(data<A>(weight_sum_), 1, weight_sum_.numel(), late_factor(),
                    mutable_data<Out>(outcome.grad_weight));
    }
    if (call_.needs_grad[2]) {
      launch_finish(data<A>(bias_sums_), int(bias_parts_), classes_, late_factor(),
                    mutable_data<Out>(outcome.grad_bias));
    }
  }

  const HeadCall& call_;
  const int64_t rows_, features_, classes_, samples_;
  const at::TensorOptions options_, accumulation_;
  at::Tensor table_memory_;
  const SampleTable table_;
  std::vector<Slice> slices_;
  int64_t losses_a_row_ = 1, chunk_rows_ = 1, parts_ = 1, bias_parts_ = 1;
  double largest_scale_ = 1;
  at::Tensor stats_, losses_, packed_, logits_, gradient_, bits_, levels_, carry_, weight_sum_, bias_sums_;
};

at::Tensor contiguous(const std::optional<at::Tensor>& tensor) { return tensor ? tensor->contiguous() : at::Tensor(); }

HeadOutcome run_head(HeadCall call, bool mean, bool per_row, bool wants_loss) {
  call.needs_grad[2] = call.needs_grad[2] && call.linear_bias.defined();
  HeadOutcome outcome;
  dispatch(call.input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, __half>) {
      if (call.gradient_dtype == at::kFloat) {
        outcome = Head<T, float>(call).run(mean, per_row, wants_loss);
        return;
      }
    }
    outcome = Head<T, T>(call).run(mean, per_row, wants_loss);
  });
  return outcome;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> head(
    const at::Tensor& input, const at::Tensor& linear_weight, const std::optional<at::Tensor>& linear_bias,
    const at::Tensor& target, const std::optional<at::Tensor>& target_b, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& weight, const at::Tensor& seed, at::IntArrayRef thresholds, bool antithetic,
    bool combine_logits, int64_t ignore_index, double label_smoothing, std::string_view reduction,
    std::array<bool, 3> needs_grad) {
  check_head(kHead, input, linear_weight, linear_bias, target, target_b, lam, weight, seed, thresholds, ignore_index,
             label_smoothing, reduction);
  const c10::cuda::CUDAGuard guard(input.device());
  const bool none = reduction == "none";
  if (none) needs_grad = {false, false, false};
  const HeadOutcome found = run_head(
      {input.contiguous(), linear_weight.contiguous(), contiguous(linear_bias), target.contiguous(),
       contiguous(target_b), contiguous(lam), contiguous(weight), seed, at::Tensor(), thresholds.vec(), antithetic,
       combine_logits, ignore_index, label_smoothing, needs_grad, saved_gradient_dtype(input.scalar_type())},
      reduction == "mean", none, true);
  return {found.loss, found.grad_input, found.grad_weight, found.grad_bias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> head_backward(
    const at::Tensor& grad_loss, const at::Tensor& input, const at::Tensor& linear_weight,
    const std::optional<at::Tensor>& linear_bias, const at::Tensor& target, const std::optional<at::Tensor>& target_b,
    const std::optional<at::Tensor>& lam, const std::optional<at::Tensor>& weight, const at::Tensor& seed,
    at::IntArrayRef thresholds, bool antithetic, bool combine_logits, int64_t ignore_index, double label_smoothing,
    std::array<bool, 3> needs_grad) {
  check_head(kHeadBackward, input, linear_weight, linear_bias, target, target_b, lam, weight, seed, thresholds,
             ignore_index, label_smoothing, "none");
  check_dtype(kHeadBackward, "grad_loss", grad_loss, accumulation_dtype(input.scalar_type()));
  check_shape(kHeadBackward, "grad_loss", grad_loss, "[B]", {input.size(0)});
  check_device(kHeadBackward, "grad_loss", grad_loss, input.device());
  const c10::cuda::CUDAGuard guard(input.device());
  const HeadOutcome found = run_head(
      {input.contiguous(), linear_weight.contiguous(), contiguous(linear_bias), target.contiguous(),
       contiguous(target_b), contiguous(lam), contiguous(weight), seed, grad_loss.contiguous(), thresholds.vec(),
       antithetic, combine_logits, ignore_index, label_smoothing, needs_grad, input.scalar_type()},
      false, true, false);
  return {found.grad_input, found.grad_weight, found.grad_bias};
}

TORCH_LIBRARY_IMPL(pyrx, CUDA, m) {
  m.impl("multi_sample_dropout", &expand);
  m.impl("multi_sample_dropout_fold", &fold);
  m.impl("multi_sample_dropout_cross_entropy", &head);
  m.impl("multi_sample_dropout_cross_entropy_backward", &head_backward);
}

}  // namespace
}  // namespace pyrx::cuda
