// The multi-sample dropout kernels on the host shim: copies and fold, and the whole head with plain loops for its
// GEMMs, against the loss and its gradients in float64 from their definition.
#include "cuda_shim.h"

#include "cuda/multi_sample_dropout.cuh"
#include "cuda_test.h"

#include <string>
#include <vector>

using namespace pyrx;
using namespace pyrx::cuda;

namespace {

using Doubles = std::vector<double>;

bool kept(int64_t seed, int64_t element, int64_t sample, int64_t threshold, bool antithetic) {
  const bool second = antithetic && sample % 2;
  const uint32_t u = lane_of(seed, element, uint32_t(sample - second));
  return (second ? 65535 - u : u) >= threshold;
}

double scale(int64_t threshold) { return 65536.0 / double(65536 - threshold); }

// as the launcher makes it; `many`: through device memory
SampleTable make_table(const std::vector<int64_t>& thresholds, bool antithetic, bool many, Buffer<uint16_t>& memory) {
  SampleTable table{};
  table.antithetic = antithetic;
  table.uniform = true;
  for (const int64_t t : thresholds) table.uniform = table.uniform && t == thresholds[0];
  if (many && !table.uniform) {
    ThresholdPage page{};
    for (size_t m = 0; m < thresholds.size(); ++m) page.values[m] = uint16_t(thresholds[m]);
    shim::launch(upload_kernel, {1}, {kThreads}, 0, memory.data(), page, int(thresholds.size()));
    table.more = memory.data();
  } else {
    for (size_t m = 0; m < thresholds.size() && m < size_t(kSliceSamples); ++m) table.few[m] = uint16_t(thresholds[m]);
  }
  return table;
}

template <typename T>
double tolerance() {
  return sizeof(T) == 8 ? 1e-12 : sizeof(T) == 4 ? 3e-6 : std::is_same_v<T, __half> ? 2e-3 : 1.6e-2;
}

// Relative to the largest expected value.
template <typename T, typename U>
void check_close(const U* got, const Doubles& expected, double allowed, const std::string& what) {
  double largest = 1e-30;
  for (const double x : expected) largest = std::max(largest, std::fabs(x));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double x = double(widen(got[i]));
    CHECK(std::isnan(expected[i]) ? std::isnan(x) : std::fabs(x - expected[i]) <= allowed * largest,
          "%s[%zu]: %g, expected %g, scale %g", what.c_str(), i, x, expected[i], largest);
  }
}

template <typename T>
void test_copies() {
  const int64_t seed = 0x123456789abcdef;
  for (const int64_t n : {1, 3, 63, 100, 1311}) {
    for (const int64_t samples : {1, 2, 3, 8}) {
      for (const bool antithetic : {false, true}) {
        for (const int variant : {0, 1, 2}) {  // one threshold; several; several in device memory
          std::vector<int64_t> thresholds(samples, 19661);
          for (int64_t m = 0; m < samples && variant > 0; ++m) thresholds[m] = (m * 23000 + 32768) % 65536;
          if (variant > 0) thresholds[samples - 1] = 0;
          Buffer<uint16_t> memory(samples);
          const SampleTable table = make_table(thresholds, antithetic, variant == 2, memory);
          const int offset = n == 63 ? 1 : 0;
          Buffer<T> input(n, offset), copies(samples * n, offset), folded(n, offset);
          for (int64_t i = 0; i < n; ++i) input[i] = i % 7 == 3 ? narrow<T>(INFINITY) : narrow<T>(Acc<T>(normal(i)));
          const bool aligned = offset == 0, aligned_samples = aligned && n * sizeof(T) % 16 == 0;
          shim::launch(expand_kernel<T>, {2}, {kThreads}, 0, input.data(), copies.data(), &seed, n, samples, table,
                       aligned, aligned_samples);
          for (int64_t m = 0; m < samples; ++m)
            for (int64_t i = 0; i < n; ++i) {
              const T each = thresholds[m] == 0 ? input[i] : narrow<T>(widen(input[i]) * Acc<T>(scale(thresholds[m])));
              CHECK(same_bits(copies[m * n + i], kept(seed, i, m, thresholds[m], antithetic) ? each : narrow<T>(0)),
                    "copy %lld of %lld, element %lld of %lld", (long long)m, (long long)samples, (long long)i,
                    (long long)n);
            }
          for (int64_t i = 0; i < samples * n; ++i) copies[i] = narrow<T>(Acc<T>(normal(i)));
          shim::launch(fold_samples_kernel<T>, {2}, {kThreads}, 0, copies.data(), folded.data(), &seed, n, samples,
                       table, aligned, aligned_samples);
          Doubles expected(n);
          for (int64_t m = 0; m < samples; ++m)
            for (int64_t i = 0; i < n; ++i)
              if (kept(seed, i, m, thresholds[m], antithetic))
                expected[i] += double(widen(copies[m * n + i])) * scale(thresholds[m]);
          check_close<T>(folded.data(), expected, tolerance<T>(), "fold of " + std::to_string(n));
        }
      }
    }
  }
}

enum class Kind { kIds, kMixed, kProbabilities };
enum class Reduction { kMean, kSum, kNone };

struct Case {
  int64_t rows, features, classes, samples;
  bool antithetic = false, combine_logits = false;
  std::vector<int64_t> thresholds = {};  // empty: 32768
  Kind kind = Kind::kIds;
  double smoothing = 0;
  bool bias = true, class_weight = false, ignored = false;
  Reduction reduction = Reduction::kMean;
  int64_t chunk_rows = 3, slice_samples = kSliceSamples;
  unsigned parts = 1;  // of a row's samples, one block each
  unsigned warps = 3;  // of a block
  bool wide = false;   // the kernel for more classes than a warp's registers hold
  int64_t bad_class = -1;  // of row 1
};

template <typename T>
struct Tensors {
  using A = Acc<T>;
  Buffer<T> input, weight, bias;
  Buffer<int64_t> a, b;
  Buffer<A> lam, probabilities, class_weight, upstream;

  explicit Tensors(const Case& c)
      : input(c.rows * c.features), weight(c.classes * c.features), bias(c.classes), a(c.rows), b(c.rows), lam(c.rows),
        probabilities(c.rows * c.classes), class_weight(c.classes), upstream(c.rows) {
    for (int64_t i = 0; i < input.size(); ++i) input[i] = narrow<T>(A(normal(i)));
    for (int64_t i = 0; i < weight.size(); ++i)
      weight[i] = narrow<T>(A(normal(i + 5000) / std::sqrt(double(c.features))));
    for (int64_t i = 0; i < c.classes; ++i) {
      bias[i] = narrow<T>(A(normal(i + 9000)));
      class_weight[i] = A(0.5 + lane_of(1, i, 0) / 65536.0);
    }
    for (int64_t i = 0; i < c.rows; ++i) {
      a[i] = c.ignored && i % 3 == 1 ? -100 : lane_of(2, i, 0) % c.classes;
      b[i] = c.ignored && i % 4 >= 2 ? -100 : lane_of(3, i, 0) % c.classes;
      lam[i] = A(lane_of(4, i, 0) / 65536.0);
      upstream[i] = A(normal(i + 700));
      double sum = 0;
      for (int64_t k = 0; k < c.classes; ++k) sum += lane_of(5, i * c.classes + k, 0) + 1;
      for (int64_t k = 0; k < c.classes; ++k)
        probabilities[i * c.classes + k] = A((lane_of(5, i * c.classes + k, 0) + 1) / sum);
    }
    if (c.bad_class >= 0) a[1] = c.bad_class;
  }
};

struct Results {
  Doubles losses, input, weight, bias;  // losses: (rows), or one number
};

// The definition, in float64, on the tensors' values.
template <typename T>
Results definition(const Case& c, const std::vector<int64_t>& thresholds, const Tensors<T>& t, int64_t seed) {
  Results r{Doubles(c.rows), Doubles(c.rows * c.features), Doubles(c.classes * c.features), Doubles(c.classes)};
  double denominator = 0;
  const auto cw = [&](int64_t k) { return c.class_weight ? double(t.class_weight[k]) : 1.0; };
  const int64_t losses = c.combine_logits ? 1 : c.samples;
  for (int64_t row = 0; row < c.rows; ++row) {
    Doubles target(c.classes);  // what -log softmax is weighted by
    double counted = 0;
    const auto one = [&](int64_t id, double share) {
      if (id == -100) return;
      if (id >= c.classes) return void(counted = NAN);
      target[id] += (1 - c.smoothing) * share;
      counted += share;
      denominator += share * cw(id);
    };
    if (c.kind == Kind::kIds) one(t.a[row], 1);
    if (c.kind == Kind::kMixed) one(t.a[row], t.lam[row]), one(t.b[row], 1 - double(t.lam[row]));
    if (c.kind == Kind::kProbabilities) {
      for (int64_t k = 0; k < c.classes; ++k) target[k] = (1 - c.smoothing) * t.probabilities[row * c.classes + k];
      counted = 1;
      denominator += 1;
    }
    for (int64_t k = 0; k < c.classes; ++k) target[k] = (target[k] + c.smoothing / double(c.classes) * counted) * cw(k);
    if (std::isnan(counted)) target.assign(c.classes, NAN);
    const double upstream = c.reduction == Reduction::kNone ? double(t.upstream[row]) : 1.0;
    for (int64_t loss = 0; loss < losses; ++loss) {
      Doubles x(c.features), mask(c.features), z(c.classes);
      for (int64_t d = 0; d < c.features; ++d) {
        const auto level = [&](int64_t m) {
          return kept(seed, row * c.features + d, m, thresholds[m], c.antithetic) ? scale(thresholds[m]) : 0.0;
        };
        mask[d] = c.combine_logits ? 0 : level(loss);
        for (int64_t m = 0; m < c.samples && c.combine_logits; ++m) mask[d] += level(m) / double(c.samples);
        x[d] = double(widen(t.input[row * c.features + d])) * mask[d];
      }
      double peak = -INFINITY, sum = 0, total = 0;
      for (int64_t k = 0; k < c.classes; ++k) {
        z[k] = c.bias ? double(widen(t.bias[k])) : 0.0;
        for (int64_t d = 0; d < c.features; ++d) z[k] += x[d] * double(widen(t.weight[k * c.features + d]));
        peak = std::max(peak, z[k]);
        total += target[k];
      }
      for (const double each : z) sum += std::exp(each - peak);
      for (int64_t k = 0; k < c.classes; ++k) {
        r.losses[row] += target[k] * (peak + std::log(sum) - z[k]) / double(losses);
        const double g = (total * std::exp(z[k] - peak) / sum - target[k]) * upstream / double(losses);
        r.bias[k] += g;
        for (int64_t d = 0; d < c.features; ++d) {
          r.weight[k * c.features + d] += g * x[d];
          r.input[row * c.features + d] += g * double(widen(t.weight[k * c.features + d])) * mask[d];
        }
      }
    }
  }
  if (c.reduction == Reduction::kNone) return r;
  if (c.reduction == Reduction::kSum) denominator = 1;
  if (c.bad_class >= 0) denominator = NAN;
  double sum = 0;
  for (const double each : r.losses) sum += each;
  r.losses = {sum / denominator};
  // an element that every mask drops has gradient 0 whatever the denominator is
  for (double& x : r.input) x = x == 0 ? 0 : x / denominator;
  for (Doubles* each : {&r.weight, &r.bias})
    for (double& x : *each) x /= denominator;
  return r;
}

// out (m, n) of `a` (m, k) and `b` (k, n) by their strides, in double; what cuBLAS does in the launcher.
template <typename Out, typename T>
void multiply(Out* out, int64_t out_row, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_row, int64_t b_column,
              int64_t m, int64_t k, int64_t n, bool add) {
  Doubles result(m * n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t l = 0; l < k; ++l)
        result[i * n + j] += double(widen(a[i * a_row + l * a_column])) * double(widen(b[l * b_row + j * b_column]));
      if (add) result[i * n + j] += double(widen(out[i * out_row + j]));
    }
  for (int64_t i = 0; i < m * n; ++i) out[i / n * out_row + i % n] = narrow<Out>(Acc<Out>(result[i]));
}

// The launcher's steps.
template <typename T>
void test_head(const Case& c, const std::string& name) {
  using A = Acc<T>;
  constexpr bool kLate = std::is_same_v<T, __half>;
  using Out = std::conditional_t<kLate, float, T>;
  const int64_t seed = 0x0fedcba987654321;
  const auto thresholds = c.thresholds.empty() ? std::vector<int64_t>(c.samples, 32768) : c.thresholds;
  const Tensors<T> t(c);
  Buffer<uint16_t> memory(c.samples);
  const SampleTable table = make_table(thresholds, c.antithetic, c.samples > kSliceSamples, memory);
  double largest_scale = 1;
  for (const int64_t each : thresholds) largest_scale = c.combine_logits ? 1 : std::max(largest_scale, scale(each));
  const bool aligned = c.features % kGroup == 0, per_row = c.reduction == Reduction::kNone;

  const Target<A> target{c.kind == Kind::kProbabilities ? nullptr : t.a.data(),
                         c.kind == Kind::kMixed ? t.b.data() : nullptr,
                         c.kind == Kind::kMixed ? t.lam.data() : nullptr,
                         c.kind == Kind::kProbabilities ? t.probabilities.data() : nullptr,
                         c.class_weight ? t.class_weight.data() : nullptr,
                         c.classes, -100, A(c.smoothing)};
  Buffer<LossStats<A>> stats(1);
  StatsParams<A> make_stats{stats.data(), target, c.rows, c.reduction == Reduction::kMean,
                            double(c.combine_logits ? 1 : c.samples), largest_scale};

  const int64_t stride = (c.classes + kGroup - 1) / kGroup * kGroup;
  const unsigned bias_parts = 3;
  const bool wide = c.wide || c.classes > kHeldColumns<A>;
  Buffer<A> losses(c.rows * c.parts), weight_sum(c.classes * c.features), bias_partials(bias_parts * c.classes);
  Buffer<Out> grad_input(c.rows * c.features), grad_weight(c.classes * c.features), grad_bias(c.classes);
  const int64_t most = c.combine_logits ? c.samples : c.slice_samples;
  for (int64_t first_row = 0; first_row < c.rows; first_row += c.chunk_rows) {
    const int64_t rows = std::min(c.chunk_rows, c.rows - first_row), element = first_row * c.features;
    Buffer<A> carry(rows * c.features), levels(rows * c.features);
    for (int64_t first = 0; first < c.samples; first += most) {
      const Slice slice{
          first, sample_plan(&thresholds[first], std::min(most, c.samples - first), c.antithetic, c.combine_logits)};
      const SamplePlan& plan = slice.plan;
      const int64_t k = plan.gemm_rows, gemm_rows = rows * k, first_group = element / kGroup;
      const Chunk chunk{element, rows, c.features, first_group, (element + rows * c.features + 7) / 8 - first_group};
      Buffer<T> packed(gemm_rows * c.features), separate(sizeof(T) == 2 ? gemm_rows * stride : 0);
      Buffer<A> logits(gemm_rows * stride);
      Buffer<uint8_t> bits(k * chunk.groups);
      const PackParams<T> pack{t.input.data() + element, packed.data(), plan.averaged ? nullptr : bits.data(),
                               plan.averaged ? levels.data() : nullptr, &seed, c.samples, chunk, slice, table,
                               make_stats};
      const unsigned blocks = unsigned((chunk.groups + kThreads - 1) / kThreads);
      const dim3 pack_grid{blocks + (make_stats.stats != nullptr), unsigned((k + kPackSamples - 1) / kPackSamples)};
      make_stats.stats = nullptr;
      shim::launch(aligned ? pack_kernel<T, true> : pack_kernel<T, false>, pack_grid, {kThreads}, 0, pack);
      for (int64_t i = 0; i < gemm_rows * c.features && !plan.averaged; ++i) {
        const int64_t row = i / c.features / k, d = i % c.features, sample = plan.mask_of(i / c.features % k);
        const bool keep = sample < 0 || kept(seed, element + row * c.features + d, first + sample,
                                             thresholds[first + sample], c.antithetic);
        CHECK(same_bits(packed[i], keep ? t.input[element + row * c.features + d] : narrow<T>(0)),
              "%s: packed element %lld", name.c_str(), (long long)i);
      }
      multiply(logits.data(), stride, packed.data(), c.features, 1, t.weight.data(), 1, c.features, gemm_rows,
               c.features, c.classes, false);
      T* gradient = separate.data();
      if constexpr (std::is_same_v<T, A>) gradient = logits.data();
      const int items = int(plan.averaged ? 1 : plan.paired ? k - 1 : plan.samples);
      const CrossEntropyParams<T> loss{logits.data(), gradient, c.bias ? t.bias.data() : nullptr,
                                       per_row ? t.upstream.data() : nullptr, stats.data(), losses.data(), first_row,
                                       stride, items, A(largest_scale), !kLate, target, slice, table};
      const bool uniform = c.kind == Kind::kProbabilities || c.smoothing != 0;
      const auto kernel = plan.paired ? wide      ? cross_entropy_wide_kernel<T, true>
                                        : uniform ? cross_entropy_kernel<T, true, true>
                                                  : cross_entropy_kernel<T, true, false>
                          : wide    ? cross_entropy_wide_kernel<T, false>
                          : uniform ? cross_entropy_kernel<T, false, true>
                                    : cross_entropy_kernel<T, false, false>;
      shim::launch(kernel, {unsigned(rows), c.parts}, {unsigned(kWarp * c.warps)}, 0, loss);
      const bool begin = first_row == 0 && first == 0, last = first + most >= c.samples;
      multiply(weight_sum.data(), c.features, gradient, 1, stride, packed.data(), c.features, 1, c.classes, gemm_rows,
               c.features, !begin);
      multiply(packed.data(), c.features, gradient, stride, 1, t.weight.data(), c.features, 1, gemm_rows, c.classes,
               c.features, false);
      const int splits = k >= 8 ? 8 : k >= 2 ? 2 : 1;
      const unsigned fold_blocks = unsigned((chunk.groups * splits + kThreads - 1) / kThreads);
      const BiasParams<T> bias{gradient, bias_partials.data(), unsigned(gemm_rows), bias_parts, c.classes,
                               stride,   begin,                slice,               table};
      const FoldParams<T, Out> fold{packed.data(), grad_input.data() + element, bits.data(),
                                    plan.averaged ? levels.data() : nullptr,
                                    kLate ? &stats[0].gradient_factor : nullptr, first ? carry.data() : nullptr,
                                    last ? nullptr : carry.data(), chunk, plan, splits, fold_blocks, bias};
      shim::launch(aligned ? fold_kernel<T, Out, true> : fold_kernel<T, Out, false>,
                   {fold_blocks + bias.tiles() * bias_parts}, {kThreads}, 0, fold);
    }
  }
  Buffer<A> loss(per_row ? c.rows : 1);
  Buffer<T> narrow_loss(loss.size());
  FinishParams<T, Out> finish{};
  finish.stats = stats.data();
  finish.factor = kLate ? &stats[0].gradient_factor : nullptr;
  finish.losses = losses.data(), finish.loss = loss.data();
  finish.rows = c.rows, finish.loss_parts = int(c.parts), finish.per_row = per_row;
  finish.bias_partials = bias_partials.data(), finish.bias = grad_bias.data();
  finish.bias_parts = bias_parts, finish.classes = c.classes;
  finish.weight_sum = weight_sum.data(), finish.weight = grad_weight.data(), finish.weights = weight_sum.size();
  finish.loss_blocks = 1, finish.bias_blocks = unsigned((c.classes + kWarp - 1) / kWarp), finish.weight_blocks = 2;
  shim::launch(finish_kernel<T, Out>, {3 + finish.bias_blocks}, {kThreads}, 0, finish);
  finish.loss = nullptr, finish.narrow_loss = narrow_loss.data(), finish.bias_blocks = finish.weight_blocks = 0;
  shim::launch(finish_kernel<T, Out>, {1}, {kThreads}, 0, finish);
  for (int64_t i = 0; i < loss.size(); ++i)
    CHECK(same_bits(narrow_loss[i], narrow<T>(loss[i])), "%s: rounded loss", name.c_str());

  const Results expected = definition(c, thresholds, t, seed);
  const double allowed = 4 * tolerance<T>();
  check_close<T>(loss.data(), expected.losses, sizeof(T) == 8 ? 1e-12 : allowed, name + ": loss");
  check_close<T>(grad_input.data(), expected.input, allowed, name + ": grad_input");
  check_close<T>(grad_weight.data(), expected.weight, allowed, name + ": grad_weight");
  check_close<T>(grad_bias.data(), expected.bias, allowed, name + ": grad_bias");
}

template <typename T>
void test_heads(const std::string& type) {
  for (const Kind kind : {Kind::kIds, Kind::kMixed, Kind::kProbabilities}) {
    for (const bool rich : {false, true}) {
      Case c{.rows = 5, .features = 24, .classes = 12, .samples = 3, .kind = kind};
      c.ignored = c.class_weight = rich;
      c.smoothing = rich ? 0.2 : 0;
      const std::string name = type + ", target " + std::to_string(int(kind)) + (rich ? ", weights and smoothing" : "");
      test_head<T>(c, name + ", independent");
      c.reduction = Reduction::kSum;
      c.combine_logits = true;
      test_head<T>(c, name + ", logits");
      c.combine_logits = false;
      c.antithetic = true;
      c.reduction = Reduction::kNone;
      test_head<T>(c, name + ", paired");
      c.wide = true;
      test_head<T>(c, name + ", paired, wide");
      c.antithetic = false;
      test_head<T>(c, name + ", independent, wide");
    }
  }
}

void test_shapes() {
  for (const int64_t features : {1, 3, 8, 63, 100}) {
    for (const int64_t samples : {1, 2, 3, 8}) {
      for (const bool antithetic : {false, true}) {
        Case c{
            .rows = 4, .features = features, .classes = 10 + samples % 2, .samples = samples, .antithetic = antithetic};
        const std::string name = "D = " + std::to_string(features) + ", M = " + std::to_string(samples);
        test_head<float>(c, name + (antithetic ? ", antithetic" : ""));
        c.thresholds.assign(samples, 19661);
        if (samples > 2) c.thresholds[1] = 0, c.thresholds[2] = 60000;
        c.combine_logits = features == 63;
        test_head<float>(c, name + ", other thresholds");
      }
    }
  }
  for (const int64_t classes : {1, 2, 31, 100, 200, 300, 1024, 1311, 2500}) {
    test_head<float>({.rows = 2, .features = 16, .classes = classes, .samples = 2, .chunk_rows = 2},
                     "C = " + std::to_string(classes));
    test_head<float>(
        {.rows = 2, .features = 16, .classes = classes, .samples = 6, .antithetic = true, .smoothing = 0.1},
        "C = " + std::to_string(classes) + ", paired");
  }
  // more pairs than warps; float64's registers hold half the columns
  test_head<float>({.rows = 2, .features = 16, .classes = 1100, .samples = 21, .antithetic = true}, "21 paired, wide");
  test_head<double>({.rows = 2, .features = 16, .classes = 700, .samples = 18, .antithetic = true}, "18 paired");
  test_head<double>({.rows = 2, .features = 16, .classes = 700, .samples = 9}, "9 samples");
  // a row's samples in slices, and over blocks
  for (const bool antithetic : {false, true}) {
    Case c{.rows = 3, .features = 20, .classes = 8, .samples = 11, .antithetic = antithetic};
    c.slice_samples = 4;
    test_head<float>(c, "slices of 4");
    c.thresholds.assign(11, 6554);
    c.thresholds[9] = 40000;
    c.parts = 4;
    test_head<float>(c, "slices of 4, 4 blocks a row");
    c.slice_samples = kSliceSamples;
    c.parts = 11;
    test_head<float>(c, "11 blocks a row");
    c.wide = !antithetic;  // pairs stay in one block
    test_head<float>(c, "11 blocks a wide row");
  }
  Case many{.rows = 2, .features = 9, .classes = 5, .samples = 67};
  many.antithetic = true;
  test_head<double>(many, "67 samples, paired");
  for (int64_t m = 0; m < 67; ++m) many.thresholds.push_back(m * 900);
  test_head<double>(many, "67 samples and thresholds");
  many.combine_logits = true;
  test_head<double>(many, "67 samples and thresholds, logits");
  // a slice of pairs beside one that drops more
  Case mixed{.rows = 2, .features = 9, .classes = 5, .samples = 7, .antithetic = true};
  mixed.thresholds = {32768, 32768, 32768, 32768, 32768, 60000, 60000};
  mixed.slice_samples = 4;
  test_head<double>(mixed, "a slice of pairs beside another");
}

// NaN in, NaN out in that row alone; an ignored row counts nothing whatever it holds; a class id out of range is NaN.
void test_hostile_rows() {
  for (const bool antithetic : {false, true}) {
    Case c{
        .rows = 4, .features = 8, .classes = 6, .samples = 4, .antithetic = antithetic, .reduction = Reduction::kNone};
    c.bad_class = 6;
    test_head<float>(c, "class id out of range");
    c.bad_class = int64_t(1) << 40;
    test_head<double>(c, "class id far out of range");
    c.reduction = Reduction::kMean;
    test_head<float>(c, "class id out of range, mean");
  }
  const auto run = [](float hostile, bool ignored, bool antithetic, bool gradients) {
    using T = float;
    const int64_t classes = 8;
    Buffer<float> logits(3 * 3 * classes), gradient(3 * 3 * classes), losses(3);
    for (int64_t i = 0; i < logits.size(); ++i) logits[i] = float(normal(i));
    for (int64_t i = 0; i < classes; i += 3) logits[3 * classes + i] = hostile;  // row 1
    const int64_t ids[3] = {0, ignored ? -100 : 1, 2}, thresholds[4] = {32768, 32768, 32768, 32768};
    Buffer<uint16_t> none(0);
    const SampleTable table = make_table({32768}, antithetic, false, none);
    const Target<float> target{ids, nullptr, nullptr, nullptr, nullptr, classes, -100, 0.1f};
    const LossStats<float> stats{float(classes), 1, 1};
    const SamplePlan plan = sample_plan(thresholds, antithetic ? 4 : 3, antithetic, false);
    const CrossEntropyParams<T> params{logits.data(), gradients ? gradient.data() : nullptr, nullptr, nullptr, &stats,
                                       losses.data(), 0, classes, antithetic ? 2 : 3, 2.0f, true, target, {0, plan}, table};
    shim::launch(antithetic ? cross_entropy_kernel<T, true, true> : cross_entropy_kernel<T, false, true>, {3},
                 {2 * kWarp}, 0, params);
    for (int64_t row = 0; row < 3; ++row) {
      const bool is_nan = row == 1 && !ignored;
      CHECK_EQUAL(std::isnan(losses[row]), is_nan || std::isinf(losses[row]), "loss of row %lld", (long long)row);
      if (row == 1 && ignored) CHECK_EQUAL(losses[row], 0, "an ignored row's loss");
      for (int64_t i = 0; i < 3 * classes && gradients; ++i) {
        const float g = gradient[row * 3 * classes + i];
        if (row != 1) CHECK(std::isfinite(g), "a clean row's gradient");
        if (row == 1 && ignored) CHECK_EQUAL(g, 0, "an ignored row's gradient");
        if (is_nan && i < classes) CHECK(std::isnan(g), "a hostile row's gradient");
      }
    }
  };
  for (const float hostile : {NAN, INFINITY})
    for (const bool ignored : {false, true})
      for (const bool antithetic : {false, true})
        for (const bool gradients : {false, true}) run(hostile, ignored, antithetic, gradients);
}

void test_empty_and_ignored() {
  Case c{.rows = 4, .features = 8, .classes = 4, .samples = 2};
  Tensors<float> t(c);
  for (int64_t i = 0; i < 4; ++i) t.a[i] = -100;
  const Target<float> target{t.a.data(), nullptr, nullptr, nullptr, nullptr, 4, -100, 0.0f};
  for (const int64_t rows : {0, 4}) {
    for (const bool mean : {false, true}) {
      Buffer<LossStats<float>> stats(1);
      Buffer<float> losses(rows), loss(1);
      for (int64_t i = 0; i < rows; ++i) losses[i] = 0;
      PackParams<float> pack{};
      pack.stats = {stats.data(), target, rows, mean, 2.0, 2.0};
      shim::launch(pack_kernel<float, true>, {1}, {kThreads}, 0, pack);
      FinishParams<float, float> finish{};
      finish.stats = stats.data(), finish.losses = losses.data(), finish.loss = loss.data();
      finish.rows = rows, finish.loss_parts = 1, finish.loss_blocks = 1;
      shim::launch(finish_kernel<float, float>, {1}, {kThreads}, 0, finish);
      CHECK(mean ? std::isnan(loss[0]) : loss[0] == 0, "the loss of no rows");
      CHECK_EQUAL(stats[0].gradient_factor, mean ? 0.0f : 1.0f, "the gradients' factor of no rows");
    }
  }
}

template <typename T>
void test_scale() {
  const Acc<T> factors[2] = {1, 0.25};
  const T narrow_factors[2] = {narrow<T>(1), narrow<T>(0.25)};
  for (const bool narrow_factor : {false, true}) {
    for (const int f : {0, 1}) {
      Buffer<T> gradients[3] = {Buffer<T>(1311), Buffer<T>(7), Buffer<T>(0)};
      ScaleParams<T> params{{}, {}, narrow_factor ? nullptr : &factors[f], narrow_factor ? &narrow_factors[f] : nullptr};
      for (int k = 0; k < 3; ++k) {
        params.gradients[k] = gradients[k].data(), params.numel[k] = gradients[k].size();
        for (int64_t i = 0; i < gradients[k].size(); ++i) gradients[k][i] = narrow<T>(Acc<T>(normal(i + 100 * k)));
      }
      shim::launch(scale_kernel<T>, {2}, {kThreads}, 0, params);
      for (int k = 0; k < 3; ++k)
        for (int64_t i = 0; i < gradients[k].size(); ++i)
          CHECK(same_bits(gradients[k][i], narrow<T>(widen(narrow<T>(Acc<T>(normal(i + 100 * k)))) * factors[f])),
                "scaled gradient %d, element %lld", k, (long long)i);
    }
  }
}

}  // namespace

int main() {
  test_copies<float>();
  test_copies<double>();
  test_copies<__half>();
  test_copies<__nv_bfloat16>();
  using shim::Order;
  for (const Order order : {Order::kForward, Order::kBackward, Order::kShuffled, Order::kWarpByWarp}) {
    shim::order = order;
    test_heads<float>("float32");
    test_hostile_rows();
  }
  shim::order = shim::Order::kForward;
  test_heads<double>("float64");
  test_heads<__half>("float16");
  test_heads<__nv_bfloat16>("bfloat16");
  test_shapes();
  test_empty_and_ignored();
  test_scale<float>();
  test_scale<__nv_bfloat16>();
  return report("multi-sample dropout kernels");
}
