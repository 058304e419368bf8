// Multi-sample dropout on the GPU: the M copies, their fold, and the head around cuBLAS.
#include <ATen/ops/addmm_cuda_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cuda_dispatch.h>
#include <torch/library.h>

#include <array>
#include <bit>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/launch.h"
#include "cuda/multi_sample_dropout.cuh"
#include "head_checks.h"

namespace pyrx::cuda {
namespace {

constexpr std::string_view kOp = "multi_sample_dropout", kFold = "multi_sample_dropout_fold",
                           kHead = "multi_sample_dropout_cross_entropy",
                           kHeadBackward = "multi_sample_dropout_cross_entropy_backward",
                           kHeadScale = "multi_sample_dropout_cross_entropy_scale_";

// A chunk's X, Z and G stay within this, which is about the L2 of a large GPU, ...
constexpr int64_t kChunkBytes = int64_t(64) << 20;
// ... but a chunk has enough GEMM rows to pay for reading the weight.
constexpr int64_t kMinChunkRows = 1024, kMaxChunkRows = 65536;
// Rows of G that a block sums for the bias, and the most partial sums.
constexpr int64_t kBiasRows = 32, kMaxBiasParts = 128;
// Threads a multiprocessor that hide the latency of the fold's loads, and the most lanes that share a group.
constexpr int64_t kFoldThreads = 512;
constexpr uint64_t kMaxSplits = 8;

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
                   "of shape [M, ...] with M = " + text(samples), grad.sizes());
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

// A matrix of scratch or of another's memory; no dispatcher, no allocation.
at::Tensor matrix(const void* data, const at::TensorOptions& options, int64_t rows, int64_t columns, int64_t row_stride,
                  int64_t column_stride = 1) {
  const std::array<int64_t, 2> sizes{rows, columns}, strides{row_stride, column_stride};
  return at::for_blob(const_cast<void*>(data), sizes)
      .strides(strides)
      .options(options)
      .target_device(options.device())
      .make_tensor();
}

// out = a b, or out += a b; out may be float32 where a and b are of a half type.
void multiply(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool add) {
  if (out.scalar_type() == a.scalar_type()) {
    add ? at::cuda::addmm_out(out, out, a, b) : at::cuda::mm_out(out, a, b);
  } else {
    add ? at::cuda::addmm_out(out, out, a, b, out.scalar_type()) : at::cuda::mm_out(out, a, b, out.scalar_type());
  }
}

// Scratch in one allocation: places are asked for, then set all at once.
class Scratch {
 public:
  template <typename T>
  void reserve(T*& place, int64_t count) {
    wanted_.push_back({reinterpret_cast<void**>(&place), bytes_});
    bytes_ += ceil_div(count * sizeof(T), 256) * 256;
  }

  void allocate(const at::TensorOptions& options) {
    memory_ = at::empty({bytes_}, options.dtype(at::kByte));
    for (const auto& [place, offset] : wanted_) *place = memory_.mutable_data_ptr<uint8_t>() + offset;
  }

 private:
  std::vector<std::pair<void**, int64_t>> wanted_;
  int64_t bytes_ = 0;
  at::Tensor memory_;
};

// The checked arguments of one call, contiguous where kernels read them.
struct HeadCall {
  at::Tensor input, linear_weight, linear_bias, target, target_b, lam, class_weight, seed, upstream;
  std::vector<int64_t> thresholds;
  bool antithetic, combine_logits;
  int64_t ignore_index;
  double label_smoothing;
  std::array<bool, 3> needs_grad;
  at::ScalarType gradient_dtype;
  std::optional<at::ScalarType> loss_dtype;  // none: no loss

  bool wants_gradients() const { return needs_grad[0] || needs_grad[1] || needs_grad[2]; }
};

struct HeadOutcome {
  at::Tensor loss, grad_input, grad_weight, grad_bias;
};

// T: operands; Out: gradients, T or float32 beside float16.
template <typename T, typename Out>
class Head {
  using A = Acc<T>;
  // float16 keeps G near one; what scales it waits for float32
  static constexpr bool kLate = std::is_same_v<T, __half>;

 public:
  explicit Head(const HeadCall& call)
      : call_(call),
        rows_(call.input.size(0)),
        features_(call.input.size(1)),
        classes_(call.linear_weight.size(0)),
        stride_(ceil_div(classes_, kGroup) * kGroup),
        samples_(static_cast<int64_t>(call.thresholds.size())),
        options_(call.input.options()),
        accumulation_(options_.dtype(accumulation_dtype(call.input.scalar_type()))),
        table_(sample_table(call.thresholds, call.antithetic, table_memory_, call.input)) {
    PYRX_CHECK_VALUE(classes_ < int64_t(1) << 31, kHead, "linear_weight", "of fewer than 2**31 classes",
                     call.linear_weight.sizes());
    // a slice has whole pairs, since kSliceSamples is even; all are paired or none, so that the first is the largest
    const int64_t most = call.combine_logits ? samples_ : kSliceSamples;
    const bool pairs = call.antithetic && table_.uniform;
    for (int64_t first = 0; first < samples_; first += most) {
      const int64_t count = std::min(most, samples_ - first);
      slices_.push_back({first, sample_plan(&call.thresholds[first], count, pairs, call.combine_logits)});
    }
    losses_a_row_ = call.combine_logits ? 1 : samples_;
    const int64_t largest = *std::max_element(call.thresholds.begin(), call.thresholds.end());
    largest_scale_ = call.combine_logits ? 1.0 : 65536.0 / double(65536 - largest);
  }

  HeadOutcome run(bool mean, bool per_row) {
    const auto gradient = [&](bool needed, const at::Tensor& like) {
      return at::empty(needed ? like.sizes() : at::IntArrayRef{0}, options_.dtype(call_.gradient_dtype));
    };
    HeadOutcome outcome;
    outcome.grad_input = gradient(call_.needs_grad[0], call_.input);
    outcome.grad_weight = gradient(call_.needs_grad[1], call_.linear_weight);
    outcome.grad_bias = gradient(call_.needs_grad[2], call_.linear_bias);
    if (call_.loss_dtype) {
      outcome.loss = at::empty(per_row ? at::IntArrayRef{rows_} : at::IntArrayRef{}, options_.dtype(*call_.loss_dtype));
    }
    allocate(outcome);
    stats_params_ = {stats_, target(), rows_, mean, double(losses_a_row_), largest_scale_};
    if (rows_ == 0) {
      pack({0, 0, features_, 0, 0}, slices_[0]);
      for (const at::Tensor* each : {&outcome.grad_input, &outcome.grad_weight, &outcome.grad_bias}) each->zero_();
    }
    for (int64_t row = 0; row < rows_; row += chunk_rows_) {
      for (const Slice& slice : slices_) run_chunk(row, std::min(chunk_rows_, rows_ - row), slice, outcome);
    }
    finish(outcome, per_row);
    return outcome;
  }

 private:
  bool wide() const { return classes_ > kHeldColumns<A>; }
  const A* late_factor() const { return kLate ? &stats_->gradient_factor : nullptr; }

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

  void allocate(const HeadOutcome& outcome) {
    const int64_t gemm_rows = slices_[0].plan.gemm_rows;  // of the largest slice
    const bool separate = sizeof(T) == 2 && call_.wants_gradients();
    const int64_t row_bytes = features_ * sizeof(T) + stride_ * (sizeof(A) + (separate ? sizeof(T) : 0));
    const int64_t budget = std::clamp(kChunkBytes / row_bytes, kMinChunkRows, kMaxChunkRows);
    chunk_rows_ = std::clamp<int64_t>(budget / gemm_rows, 1, std::max<int64_t>(rows_, 1));
    const int64_t most = chunk_rows_ * gemm_rows;

    // a block takes as many samples of a row as it has warps, or of a wide row one; pairs stay together
    const SamplePlan& plan = slices_[0].plan;
    parts_ = plan.paired || plan.averaged ? 1 : wide() ? plan.samples : ceil_div(plan.samples, kWarps);

    Scratch& to = scratch_;
    to.reserve(stats_, 1);
    to.reserve(packed_, most * features_);
    to.reserve(logits_, most * stride_);
    if (call_.loss_dtype) to.reserve(losses_, rows_ * parts_);
    if (separate) to.reserve(gradient_, most * stride_);
    if (call_.needs_grad[0]) {
      if (call_.combine_logits) {
        to.reserve(levels_, chunk_rows_ * features_);
      } else {
        to.reserve(bits_, gemm_rows * (ceil_div(chunk_rows_ * features_, kGroup) + 1));
      }
      if (slices_.size() > 1) to.reserve(carry_, chunk_rows_ * features_);
    }
    if (call_.needs_grad[1]) {
      const bool once = chunk_rows_ >= rows_ && slices_.size() == 1;
      // cuBLAS rounds a single product itself
      direct_weight_ =
          outcome.grad_weight.scalar_type() == accumulation_.dtype().toScalarType() || (once && !kLate);
      if (!direct_weight_) to.reserve(weight_sum_, classes_ * features_);
    }
    if (call_.needs_grad[2]) {
      bias_parts_ = std::clamp<int64_t>(most / kBiasRows, 1, kMaxBiasParts);
      to.reserve(bias_partials_, bias_parts_ * classes_);
    }
    to.allocate(options_);
    if (!separate && call_.wants_gradients()) gradient_ = reinterpret_cast<T*>(logits_);  // A is T
  }

  void run_chunk(int64_t first_row, int64_t rows, const Slice& slice, const HeadOutcome& outcome) {
    const int64_t gemm_rows = rows * slice.plan.gemm_rows, first_element = first_row * features_;
    const int64_t first_group = first_element / kGroup;
    const Chunk chunk{first_element, rows, features_, first_group,
                      ceil_div(first_element + rows * features_, kGroup) - first_group};
    const bool first = first_row == 0 && slice.first == 0;
    const at::Tensor packed = matrix(packed_, options_, gemm_rows, features_, features_);
    pack(chunk, slice);
    stats_params_.stats = nullptr;
    multiply(matrix(logits_, accumulation_, gemm_rows, classes_, stride_), packed,
             matrix(data<T>(call_.linear_weight), options_, features_, classes_, 1, features_), false);
    cross_entropy(first_row, rows, slice);
    if (!call_.wants_gradients()) return;

    if (call_.needs_grad[1]) {
      const at::Tensor sum = direct_weight_ ? outcome.grad_weight
                                            : matrix(weight_sum_, accumulation_, classes_, features_, features_);
      multiply(sum, matrix(gradient_, options_, classes_, gemm_rows, 1, stride_), packed, !first);
    }
    if (call_.needs_grad[0]) {
      multiply(packed, matrix(gradient_, options_, gemm_rows, classes_, stride_), call_.linear_weight, false);
    }
    fold(chunk, slice, mutable_data<Out>(outcome.grad_input), first);
  }

  void pack(const Chunk& chunk, const Slice& slice) {
    PackParams<T> params{data<T>(call_.input) + chunk.first_element,
                         packed_,
                         bits_,
                         levels_,
                         data<int64_t>(call_.seed),
                         samples_,
                         chunk,
                         slice,
                         table_,
                         stats_params_};
    const unsigned blocks = unsigned(ceil_div(chunk.groups, kThreads)) + (stats_params_.stats != nullptr);
    if (blocks == 0) return;
    const unsigned batches = slice.plan.averaged ? 1 : unsigned(ceil_div(slice.plan.gemm_rows, kPackSamples));
    const bool aligned = features_ % kGroup == 0 && is_aligned(params.input);
    const auto kernel = aligned ? pack_kernel<T, true> : pack_kernel<T, false>;
    kernel<<<dim3{blocks, batches}, kThreads, 0, stream()>>>(params);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void cross_entropy(int64_t first_row, int64_t rows, const Slice& slice) {
    const bool paired = slice.plan.paired;
    const int items = int(slice.plan.averaged ? 1 : paired ? slice.plan.gemm_rows - 1 : slice.plan.samples);
    CrossEntropyParams<T> params{logits_,
                                 gradient_,
                                 data<T>(call_.linear_bias),
                                 data<A>(call_.upstream),
                                 stats_,
                                 losses_,
                                 first_row,
                                 stride_,
                                 items,
                                 A(largest_scale_),
                                 !kLate,
                                 target(),
                                 slice,
                                 table_};
    // pairs need so many registers that blocks of fewer warps fill a multiprocessor better
    const int64_t most = paired ? kWarps / 2 : kWarps;
    const unsigned warps = wide() ? kWarps : unsigned(std::min(ceil_div(items, parts_), most));
    const bool uniform = params.target.probabilities || call_.label_smoothing != 0;
    const auto kernel = paired ? wide()    ? cross_entropy_wide_kernel<T, true>
                                 : uniform ? cross_entropy_kernel<T, true, true>
                                           : cross_entropy_kernel<T, true, false>
                        : wide()  ? cross_entropy_wide_kernel<T, false>
                        : uniform ? cross_entropy_kernel<T, false, true>
                                  : cross_entropy_kernel<T, false, false>;
    kernel<<<dim3{unsigned(rows), unsigned(parts_)}, warps * kWarp, 0, stream()>>>(params);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // The input's gradient, and the bias's sums beside it.
  void fold(const Chunk& chunk, const Slice& slice, Out* output, bool first) {
    const bool last = slice.first == slices_.back().first;
    // few groups fill the device when lanes share the rows of each
    const uint64_t wanted = multiprocessors() * kFoldThreads / std::max<int64_t>(chunk.groups, 1);
    const uint64_t most = std::min<uint64_t>(slice.plan.gemm_rows, kMaxSplits);
    const int splits = int(std::bit_floor(std::clamp<uint64_t>(wanted, 1, most)));
    const unsigned blocks = call_.needs_grad[0] ? unsigned(ceil_div(chunk.groups * splits, kThreads)) : 0;
    FoldParams<T, Out> params{packed_,
                              blocks ? output + chunk.first_element : nullptr,
                              bits_,
                              levels_,
                              late_factor(),
                              slice.first == 0 ? nullptr : carry_,
                              last ? nullptr : carry_,
                              chunk,
                              slice.plan,
                              splits,
                              blocks,
                              {gradient_, bias_partials_, unsigned(chunk.rows * slice.plan.gemm_rows),
                               unsigned(bias_parts_), classes_, stride_, first, slice, table_}};
    const unsigned bias_blocks = call_.needs_grad[2] ? params.bias.tiles() * params.bias.parts : 0;
    if (blocks + bias_blocks == 0) return;
    const auto kernel = features_ % kGroup == 0 ? fold_kernel<T, Out, true> : fold_kernel<T, Out, false>;
    kernel<<<blocks + bias_blocks, kThreads, 0, stream()>>>(params);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void finish(const HeadOutcome& outcome, bool per_row) {
    FinishParams<T, Out> params{};
    params.stats = stats_;
    params.factor = late_factor();
    if (call_.loss_dtype) {
      params.losses = losses_;
      if (*call_.loss_dtype == accumulation_.dtype().toScalarType()) {
        params.loss = mutable_data<A>(outcome.loss);
      } else {
        params.narrow_loss = mutable_data<T>(outcome.loss);
      }
      params.rows = rows_;
      params.loss_parts = int(parts_);
      params.per_row = per_row;
      params.loss_blocks = per_row ? unsigned(ceil_div(rows_, kThreads)) : 1;
    }
    if (call_.needs_grad[2] && rows_ > 0) {
      params.bias_partials = bias_partials_;
      params.bias = mutable_data<Out>(outcome.grad_bias);
      params.bias_parts = int(bias_parts_);
      params.classes = classes_;
      params.bias_blocks = unsigned(ceil_div(classes_, kWarp));
    }
    if (call_.needs_grad[1] && rows_ > 0 && (kLate || !direct_weight_)) {
      params.weight = mutable_data<Out>(outcome.grad_weight);
      params.weight_sum = direct_weight_ ? reinterpret_cast<const A*>(params.weight) : weight_sum_;  // Out is A
      params.weights = classes_ * features_;
      params.weight_blocks = blocks_for(params.weights, kThreads);
    }
    const unsigned blocks = params.loss_blocks + params.bias_blocks + params.weight_blocks;
    if (blocks == 0) return;
    finish_kernel<T, Out><<<blocks, kThreads, 0, stream()>>>(params);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  const HeadCall& call_;
  const int64_t rows_, features_, classes_, stride_, samples_;
  const at::TensorOptions options_, accumulation_;
  at::Tensor table_memory_;
  const SampleTable table_;
  std::vector<Slice> slices_;
  int64_t losses_a_row_ = 1, chunk_rows_ = 1, parts_ = 1, bias_parts_ = 1;
  double largest_scale_ = 1;
  bool direct_weight_ = true;
  StatsParams<A> stats_params_{};
  Scratch scratch_;
  LossStats<A>* stats_ = nullptr;
  T *packed_ = nullptr, *gradient_ = nullptr;
  uint8_t* bits_ = nullptr;
  A *logits_ = nullptr, *losses_ = nullptr, *levels_ = nullptr, *carry_ = nullptr, *weight_sum_ = nullptr,
    *bias_partials_ = nullptr;
};

at::Tensor contiguous(const std::optional<at::Tensor>& tensor) { return tensor ? tensor->contiguous() : at::Tensor(); }

// Contiguous and aligned to 16 bytes, as kernels load it.
at::Tensor aligned(const std::optional<at::Tensor>& tensor) {
  const at::Tensor found = contiguous(tensor);
  return found.defined() && !is_aligned(found.const_data_ptr()) ? found.clone() : found;
}

HeadOutcome run_head(HeadCall call, bool mean, bool per_row) {
  call.needs_grad[2] = call.needs_grad[2] && call.linear_bias.defined();
  HeadOutcome outcome;
  dispatch(call.input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, __half>) {
      if (call.gradient_dtype == at::kFloat) {
        outcome = Head<T, float>(call).run(mean, per_row);
        return;
      }
    }
    outcome = Head<T, T>(call).run(mean, per_row);
  });
  return outcome;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> head(
    const at::Tensor& input, const at::Tensor& linear_weight, const std::optional<at::Tensor>& linear_bias,
    const at::Tensor& target, const std::optional<at::Tensor>& target_b, const std::optional<at::Tensor>& lam,
    const std::optional<at::Tensor>& weight, const at::Tensor& seed, at::IntArrayRef thresholds, bool antithetic,
    bool combine_logits, int64_t ignore_index, double label_smoothing, std::string_view reduction,
    std::array<bool, 3> needs_grad, at::ScalarType loss_dtype) {
  check_head(kHead, input, linear_weight, linear_bias, target, target_b, lam, weight, seed, thresholds, ignore_index,
             label_smoothing, reduction);
  check_loss_dtype(kHead, "loss_dtype", loss_dtype, input.scalar_type());
  const c10::cuda::CUDAGuard guard(input.device());
  const bool none = reduction == "none";
  if (none) needs_grad = {false, false, false};
  const HeadOutcome found =
      run_head({input.contiguous(), linear_weight.contiguous(), aligned(linear_bias), target.contiguous(),
                contiguous(target_b), contiguous(lam), contiguous(weight), seed, at::Tensor(), thresholds.vec(),
                antithetic, combine_logits, ignore_index, label_smoothing, needs_grad,
                saved_gradient_dtype(input.scalar_type()), loss_dtype},
               reduction == "mean", none);
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
  check_loss_dtype(kHeadBackward, "grad_loss", grad_loss.scalar_type(), input.scalar_type());
  check_shape(kHeadBackward, "grad_loss", grad_loss, "[B]", {input.size(0)});
  check_device(kHeadBackward, "grad_loss", grad_loss, input.device());
  const c10::cuda::CUDAGuard guard(input.device());
  const HeadOutcome found =
      run_head({input.contiguous(), linear_weight.contiguous(), aligned(linear_bias), target.contiguous(),
                contiguous(target_b), contiguous(lam), contiguous(weight), seed,
                grad_loss.to(accumulation_dtype(input.scalar_type())).contiguous(), thresholds.vec(), antithetic,
                combine_logits, ignore_index, label_smoothing, needs_grad, input.scalar_type(), std::nullopt},
               false, true);
  return {found.grad_input, found.grad_weight, found.grad_bias};
}

void head_scale(at::Tensor grad_input, at::Tensor grad_weight, at::Tensor grad_bias, const at::Tensor& grad_loss) {
  const std::array<at::Tensor, 3> gradients{grad_input, grad_weight, grad_bias};
  check_scale(kHeadScale, gradients, grad_loss);
  const c10::cuda::CUDAGuard guard(grad_loss.device());
  const int64_t numel = std::max({grad_input.numel(), grad_weight.numel(), grad_bias.numel()});
  if (numel == 0) return;
  dispatch(grad_input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    ScaleParams<T> params{};
    for (int i = 0; i < 3; ++i) params.gradients[i] = mutable_data<T>(gradients[i]), params.numel[i] = gradients[i].numel();
    if (grad_loss.scalar_type() == grad_input.scalar_type()) {
      params.narrow_factor = data<T>(grad_loss);
    } else {
      params.factor = data<Acc<T>>(grad_loss);
    }
    scale_kernel<T><<<blocks_for(numel, kThreads), kThreads, 0, stream()>>>(params);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

TORCH_LIBRARY_IMPL(pyrx, CUDA, m) {
  m.impl("multi_sample_dropout", &expand);
  m.impl("multi_sample_dropout_fold", &fold);
  m.impl("multi_sample_dropout_cross_entropy", &head);
  m.impl("multi_sample_dropout_cross_entropy_backward", &head_backward);
  m.impl("multi_sample_dropout_cross_entropy_scale_", &head_scale);
}

}  // namespace
}  // namespace pyrx::cuda
