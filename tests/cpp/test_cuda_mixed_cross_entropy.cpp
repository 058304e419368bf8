// The mixed cross-entropy kernels on the host shim against the loss's definition in double precision.
#include "cuda_shim.h"

#include "cuda/mixed_cross_entropy.cuh"
#include "cuda_test.h"

#include <string>
#include <vector>

using namespace pyrx;
using namespace pyrx::cuda;

namespace {

struct Case {
  int64_t rows, classes;
  bool weighted, smoothed, mean, wide, apart, per_row;
  unsigned warps, blocks;
  int64_t stride_more = 0;  // elements between rows
};

template <typename T>
double tolerance() {
  return sizeof(T) == 8 ? 1e-13 : sizeof(T) == 4 ? 2e-6 : std::is_same_v<T, __half> ? 1e-3 : 8e-3;
}

bool near(double got, double expected, double error) {
  return std::fabs(got - expected) <= error * std::max(1.0, std::fabs(expected));
}

// By 16 bytes where rows allow it, else by single elements, as the launcher chooses.
template <typename T>
bool by_spans(int64_t classes, int64_t stride) {
  return classes % (16 / int64_t(sizeof(T))) == 0 && stride * int64_t(sizeof(T)) % 16 == 0;
}

template <typename T>
void test_loss(const Case& c) {
  using A = Acc<T>;
  constexpr int kSpan = 16 / sizeof(T);
  const std::string name = "rows " + std::to_string(c.rows) + ", classes " + std::to_string(c.classes) + ", bytes " +
                           std::to_string(sizeof(T)) + (c.weighted ? ", weighted" : "") + (c.smoothed ? ", smoothed" : "") +
                           (c.mean ? ", mean" : "") + (c.wide ? ", wide" : "") + (c.apart ? ", apart" : "");
  const int64_t stride = c.classes + c.stride_more;
  Buffer<T> logits((c.rows - 1) * stride + c.classes), narrow_losses(c.rows);
  Buffer<Saved<T>> gradient(c.rows * c.classes);
  Buffer<int64_t> a(c.rows), b(c.rows);
  Buffer<A> lam(c.rows), class_weight(c.classes), losses(c.rows), denominator_of(1);
  Buffer<double> weights(3), partials(c.blocks);
  for (int64_t row = 0; row < c.rows; ++row) {
    // ignored: b of every fourth row, a of every fifth, both of row 2
    a[row] = row % 5 == 4 || row == 2 ? -100 : (row * 7 + 3) % c.classes;
    b[row] = row % 4 == 1 || row == 2 ? -100 : row == 3 ? a[row] : (row * 11 + 1) % c.classes;
    lam[row] = A(0.0625) * A(row % 17);
    for (int64_t i = 0; i < c.classes; ++i)
      logits[row * stride + i] = row == 2 ? narrow<T>(A(NAN)) : narrow<T>(A(3 * normal(row * c.classes + i)));
  }
  for (int64_t i = 0; i < c.classes; ++i) class_weight[i] = A(0.25 + i % 5);
  const A smoothing = c.smoothed ? A(0.125) : A(0);
  const Target<A> target{a.data(), b.data(), lam.data(), nullptr, c.weighted ? class_weight.data() : nullptr, c.classes,
                         -100, smoothing};
  MixedParams<T> params{logits.data(),
                        gradient.data(),
                        c.per_row ? nullptr : losses.data(),
                        c.per_row ? narrow_losses.data() : nullptr,
                        partials.data(),
                        denominator_of.data(),
                        c.apart ? weights.data() : nullptr,
                        int(weights.size()),
                        target,
                        c.rows,
                        stride,
                        c.mean};
  if (c.apart)
    shim::launch(mixed_weight_kernel<A>, {unsigned(weights.size())}, {kLossThreads}, 0, weights.data(), target, c.rows);
  const bool spans = by_spans<T>(c.classes, stride);
  const auto run = [&] {
    if (c.wide) {
      shim::launch(spans ? mixed_cross_entropy_wide_kernel<T, kSpan> : mixed_cross_entropy_wide_kernel<T, 1>,
                   {c.blocks}, {c.warps * kWarp}, 0, params);
    } else {
      const auto kernel = spans ? c.smoothed ? mixed_cross_entropy_kernel<T, kSpan, true>
                                             : mixed_cross_entropy_kernel<T, kSpan, false>
                          : c.smoothed ? mixed_cross_entropy_kernel<T, 1, true>
                                       : mixed_cross_entropy_kernel<T, 1, false>;
      shim::launch(kernel, {c.blocks}, {c.warps * kWarp}, 0, params);
    }
  };
  run();

  std::vector<double> expected(c.rows);
  double denominator = 0, total_loss = 0;
  const auto weight_of = [&](int64_t id) { return c.weighted ? double(class_weight[id]) : 1.0; };
  for (int64_t row = 0; row < c.rows; ++row) {
    if (a[row] >= 0) denominator += double(lam[row]) * weight_of(a[row]);
    if (b[row] >= 0) denominator += (1 - double(lam[row])) * weight_of(b[row]);
  }
  if (!c.mean) denominator = 1;
  CHECK(near(double(denominator_of[0]), denominator, tolerance<A>()), "%s: denominator", name.c_str());
  for (int64_t row = 0; row < c.rows; ++row) {
    const double share_a = a[row] < 0 ? 0 : double(lam[row]), share_b = b[row] < 0 ? 0 : 1 - double(lam[row]);
    const bool counts = a[row] >= 0 || b[row] >= 0;
    std::vector<double> z(c.classes), q(c.classes);
    double peak = -1e300, sum = 0, total = 0, loss = 0;
    for (int64_t i = 0; i < c.classes; ++i) {
      z[i] = double(widen(logits[row * stride + i]));
      peak = std::max(peak, z[i]);
      const double own = (i == a[row] ? share_a : 0) + (i == b[row] ? share_b : 0);
      q[i] = ((1 - smoothing) * own + smoothing * (share_a + share_b) / double(c.classes)) * weight_of(i);
      total += q[i];
    }
    for (const double each : z) sum += std::exp(each - peak);
    for (int64_t i = 0; i < c.classes; ++i) loss += q[i] * (peak + std::log(sum) - z[i]);
    if (!counts) loss = 0;
    total_loss += loss;
    const double got = c.per_row ? double(widen(narrow_losses[row])) : double(losses[row]);
    CHECK(near(got, loss, c.per_row ? tolerance<T>() : 4 * tolerance<A>()), "%s: loss %lld: %g, not %g", name.c_str(),
          (long long)row, got, loss);
    for (int64_t i = 0; i < c.classes; ++i) {
      const double g = !counts ? 0 : (total * std::exp(z[i] - peak) / sum - q[i]) / denominator;
      const double found = double(widen(gradient[row * c.classes + i]));
      CHECK(counts ? near(found, g, tolerance<Saved<T>>()) : found == 0, "%s: gradient %lld %lld: %g, not %g",
            name.c_str(), (long long)row, (long long)i, found, g);
    }
  }
  A sum_loss = A(NAN);
  T narrow_loss = narrow<T>(A(NAN));
  for (const bool narrowed : {false, true})
    shim::launch(mixed_loss_kernel<T>, {1}, {kLossThreads}, 0, partials.data(), int(c.blocks), denominator_of.data(),
                 narrowed ? nullptr : &sum_loss, narrowed ? &narrow_loss : nullptr);
  CHECK(near(double(sum_loss), total_loss / denominator, 4 * tolerance<A>()), "%s: %g", name.c_str(), double(sum_loss));
  CHECK(same_bits(narrow_loss, narrow<T>(sum_loss)), "%s: narrow loss", name.c_str());

  // without a gradient: the same losses, bit for bit
  std::vector<A> before(losses.data(), losses.data() + c.rows);
  params.gradient = nullptr;
  run();
  for (int64_t row = 0; row < c.rows && !c.per_row; ++row)
    CHECK(same_bits(losses[row], before[row]), "%s: loss without a gradient", name.c_str());

  // a class id out of range: NaN, and nothing outside is read
  params.gradient = gradient.data();
  for (const int64_t bad : {int64_t(-1), c.classes, int64_t(1) << 62}) {
    for (Buffer<int64_t>* ids : {&a, &b}) {
      const int64_t good = (*ids)[0];
      (*ids)[0] = bad;
      run();
      const double got = c.per_row ? double(widen(narrow_losses[0])) : double(losses[0]);
      CHECK(std::isnan(got), "%s: loss of class id %lld", name.c_str(), (long long)bad);
      CHECK(std::isnan(double(widen(gradient[c.classes - 1]))), "%s: gradient of a bad class id", name.c_str());
      (*ids)[0] = good;
    }
  }
}

// All rows ignored; infinite logits of classes that count nothing.
template <typename T>
void test_edges(bool wide) {
  using A = Acc<T>;
  const int64_t rows = 3, classes = 20;
  Buffer<T> logits(rows * classes);
  Buffer<Saved<T>> gradient(rows * classes);
  Buffer<A> losses(rows), lam(rows);
  Buffer<int64_t> a(rows), b(rows);
  Buffer<double> partials(2);
  A denominator = A(NAN);
  for (const bool ignored : {true, false}) {
    for (int64_t i = 0; i < rows * classes; ++i) logits[i] = narrow<T>(A(normal(i)));
    for (int64_t row = 0; row < rows; ++row) {
      a[row] = ignored ? -100 : 0;
      b[row] = ignored ? -100 : 5;
      lam[row] = A(0);
      if (!ignored) logits[row * classes] = narrow<T>(A(-INFINITY));
    }
    const Target<A> target{a.data(), b.data(), lam.data(), nullptr, nullptr, classes, -100, A(0)};
    const MixedParams<T> params{logits.data(), gradient.data(), losses.data(), nullptr, partials.data(), &denominator,
                                nullptr,       0,               target,        rows,    classes,         true};
    if (wide)
      shim::launch(mixed_cross_entropy_wide_kernel<T, 1>, {2}, {64}, 0, params);
    else
      shim::launch(mixed_cross_entropy_kernel<T, 1, false>, {2}, {64}, 0, params);
    A sum = A(0);
    shim::launch(mixed_loss_kernel<T>, {1}, {kLossThreads}, 0, partials.data(), 2, &denominator, &sum, nullptr);
    CHECK_EQUAL(std::isnan(double(sum)), ignored, "mean loss of %d", ignored);
    CHECK(std::isfinite(double(losses[0])), "row loss");
    for (int64_t i = 0; i < rows * classes; ++i) {
      const double g = double(widen(gradient[i]));
      CHECK(ignored ? g == 0 : std::isfinite(g) && (i % classes != 0 || g == 0), "gradient %lld: %g", (long long)i, g);
    }
  }
}

template <typename T>
void test_scale(int64_t rows, int64_t classes, bool per_row, bool narrowed, unsigned blocks) {
  constexpr int kSpan = 16 / sizeof(T);
  Buffer<T> gradient(rows * classes), narrow_factor(rows);
  Buffer<Acc<T>> factor(rows);
  std::vector<T> before;
  for (int64_t i = 0; i < rows * classes; ++i) before.push_back(gradient[i] = narrow<T>(Acc<T>(normal(i))));
  gradient[0] = before[0] = narrow<T>(Acc<T>(NAN));
  for (int64_t i = 0; i < rows; ++i) {
    factor[i] = i == 1 ? Acc<T>(1) : Acc<T>(-0.75) * Acc<T>(i + 1);
    narrow_factor[i] = narrow<T>(factor[i]);
  }
  const MixedScaleParams<T> params{gradient.data(), narrowed ? nullptr : factor.data(),
                                   narrowed ? narrow_factor.data() : nullptr, rows, classes, per_row};
  shim::launch(by_spans<T>(classes, classes) ? mixed_scale_kernel<T, kSpan> : mixed_scale_kernel<T, 1>, {blocks},
               {kLossThreads}, 0, params);
  for (int64_t i = 0; i < rows * classes; ++i) {
    const Acc<T> times = widen(narrow<T>(factor[per_row ? i / classes : 0]));
    const T expected = times == 1 ? before[i] : narrow<T>(widen(before[i]) * times);
    CHECK(same_bits(gradient[i], expected) || (i == 0 && std::isnan(double(widen(gradient[0])))), "scale of %lld x %lld: %lld",
          (long long)rows, (long long)classes, (long long)i);
  }
}

template <typename T>
void test_type() {
  const int64_t most = kWarpColumns<Acc<T>>;
  int option = 0;
  for (const int64_t classes : {int64_t(1), int64_t(2), int64_t(3), int64_t(8), int64_t(31), int64_t(64), int64_t(100),
                                int64_t(1311) % most, most - 1, most, most + 8, int64_t(1311)}) {
    for (int round = 0; round < 4; ++round, ++option) {
      const bool wide = classes > most || option % 5 == 4;
      test_loss<T>({round == 3 ? 1 : 7, classes, bool(option & 1), bool(round & 1), bool(round & 2), wide,
                    option % 3 == 2, option % 7 == 3, round == 0 ? 8u : 2u, option % 2 ? 2u : 4u,
                    option % 4 == 2 ? 8 : 0});
    }
  }
  for (const bool wide : {false, true}) test_edges<T>(wide);
  for (const int64_t classes : {1, 8, 100, 1311})
    for (const bool per_row : {false, true}) test_scale<T>(classes > 100 ? 3 : 11, classes, per_row, classes == 8, 2);
}

}  // namespace

int main() {
  using shim::Order;
  test_type<double>();
  test_type<__half>();
  test_type<__nv_bfloat16>();
  for (const Order order : {Order::kForward, Order::kShuffled, Order::kWarpByWarp}) {
    shim::order = order;
    test_type<float>();
  }
  return report("mixed cross-entropy kernels");
}
