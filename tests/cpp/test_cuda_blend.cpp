// The blend kernels on the host shim against loops over samples, channels, frames and pixels.
#include "cuda_shim.h"

#include "cuda/blend.cuh"
#include "cuda_test.h"

#include <vector>

using namespace pyrx;
using namespace pyrx::cuda;

namespace {

// What alpha is broadcast over, and how the channels lie.
struct Form {
  int64_t samples, channels, frames, pixels;
  bool last;                                     // channels side by side
  bool alpha_sample, alpha_channel, alpha_frame;  // whether alpha has its own
};

BlendLayout layout_of(const Form& form, bool expanded) {
  const int64_t pixel = form.last && form.alpha_channel ? form.channels : 1, pixels = form.pixels * pixel;
  const int64_t frames = form.alpha_frame ? form.frames : 1, planes = form.alpha_channel && !form.last ? form.channels : 1;
  BlendLayout layout{form.samples, planes, form.frames, pixels, form.last && !form.alpha_channel ? form.channels : 1,
                     form.last || form.alpha_channel ? 1 : form.channels, 0, 0, 0, 0, 0};
  layout.x_sample = expanded ? 0 : layout.sample();
  layout.y_sample = layout.sample();
  layout.alpha_frame = form.alpha_frame ? pixels : 0;
  layout.alpha_channel = planes > 1 ? frames * pixels : 0;
  layout.alpha_sample = form.alpha_sample ? planes * frames * pixels : 0;
  return layout;
}

template <typename T>
T value_at(uint64_t i) {
  if constexpr (std::is_same_v<T, uint8_t>) return static_cast<uint8_t>(lane_of(3, i, 0));
  else return narrow<T>(Acc<T>(i % 13 == 5 ? NAN : i % 17 == 3 ? -0.0 : normal(i)));
}

template <typename A>
A alpha_at(uint64_t i) {
  const double value = std::min(1.0, std::max(0.0, lane_of(4, i, 0) / 32768.0 - 0.5));
  if constexpr (std::is_same_v<A, uint8_t>) return value > 0.5;
  else return narrow<A>(Acc<A>(value));
}

template <typename T>
bool same(T got, T expected) {
  if constexpr (!std::is_same_v<T, uint8_t>)
    if (std::isnan(double(widen(expected)))) return std::isnan(double(widen(got)));
  return same_bits(got, expected);
}

// f(sample, offset in a sample, alpha's offset, alpha's result) for every element in the order of its alpha's sum.
template <typename F>
void for_elements(const Form& form, const BlendLayout& layout, F f) {
  for (int64_t n = 0; n < form.samples; ++n)
    for (int64_t t = 0; t < form.frames; ++t)
      for (int64_t p = 0; p < form.pixels; ++p)
        for (int64_t c = 0; c < form.channels; ++c) {
          const int64_t pixel = form.last && form.alpha_channel ? p * form.channels + c : p;
          const int64_t inside = form.last ? (t * form.pixels + p) * form.channels + c
                                           : (c * form.frames + t) * form.pixels + p;
          const int64_t channel = form.alpha_channel && !form.last ? c : 0;
          const int64_t row = (n * layout.channels + channel) * form.frames + t;
          f(n, inside, n * layout.alpha_sample + channel * layout.alpha_channel + t * layout.alpha_frame + pixel,
            row * layout.pixels + pixel);
        }
}

template <typename T, typename A>
void test_form(const Form& form, bool expanded, bool partners, unsigned blocks, int64_t offset) {
  const BlendLayout layout = layout_of(form, expanded);
  const int64_t sample = layout.sample(), others = partners ? 2 : form.samples;
  const int64_t alphas = layout.alpha_sample * (form.samples - 1) + layout.alpha_channel * (layout.channels - 1) +
                         layout.alpha_frame * (layout.frames - 1) + layout.pixels;
  Buffer<T> x(expanded ? sample : form.samples * sample, offset), y(others * sample, offset), out(form.samples * sample, offset);
  Buffer<A> alpha(alphas, offset);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = value_at<T>(i);
  for (int64_t i = 0; i < y.size(); ++i) y[i] = value_at<T>(i + 1000000);
  for (int64_t i = 0; i < alphas; ++i) alpha[i] = alpha_at<A>(i);
  Buffer<int64_t> partner(form.samples);
  for (int64_t n = 0; n < form.samples; ++n) partner[n] = n % 4 == 3 ? (n % 8 == 3 ? -1 : others) : (n + 1) % others;
  const auto other_of = [&](int64_t n) { return partners ? (partner[n] == others ? -1 : partner[n]) : n; };
  const bool whole = layout.row() % kGroup == 0 && layout.x_sample % kGroup == 0 && offset == 0 &&
                     (layout.group > 1 || (layout.pixels % kGroup == 0));
  for (const bool aligned : {false, whole}) {
    shim::launch(blend_kernel<T, A>, {blocks}, {kBlendThreads}, 0, x.data(), y.data(), alpha.data(),
                 partners ? partner.data() : nullptr, others, layout, aligned, out.data());
    for_elements(form, layout, [&](int64_t n, int64_t inside, int64_t at, int64_t) {
      const T own = x[n * layout.x_sample + inside];
      const T against = other_of(n) < 0 ? pixel_of<T>(NAN) : y[other_of(n) * sample + inside];
      const Acc<T> a = Acc<T>(pixel_value(alpha[at])), rest = 1 - a, first = a * pixel_value(own), second = rest * pixel_value(against);
      T expected = a == 1 ? own : a == 0 ? against : pixel_of<T>(first + second);
      if constexpr (std::is_same_v<T, uint8_t>)
        if (a != 0 && a != 1) expected = static_cast<uint8_t>(std::nearbyint(std::isnan(first + second) ? 0 : first + second));
      CHECK(same(out[n * sample + inside], expected), "blend of sample %lld, element %lld", (long long)n, (long long)inside);
    });
  }
  if constexpr (!std::is_same_v<T, uint8_t>) {
    const int64_t rows = layout.rows() * layout.pixels;
    for (const int needs : {1, 2, 4, 7}) {
      Buffer<T> grad(form.samples * sample, offset), grad_x(form.samples * sample, offset), grad_y(form.samples * sample, offset);
      Buffer<Acc<T>> grad_alpha(rows, offset);
      for (int64_t i = 0; i < grad.size(); ++i) grad[i] = value_at<T>(i + 2000000);
      BlendLayout own = layout;
      own.x_sample = sample;
      T *to_x = needs & 1 ? grad_x.data() : nullptr, *to_y = needs & 2 ? grad_y.data() : nullptr;
      Acc<T>* to_alpha = needs & 4 ? grad_alpha.data() : nullptr;
      const int64_t* given = partners ? partner.data() : nullptr;
      if (to_alpha && layout.group > 1)
        shim::launch(blend_pixel_gradients_kernel<T, A>, {blocks}, {kBlendThreads}, 0, grad.data(), x.data(), y.data(),
                     alpha.data(), given, others, own, layout.x_sample, to_x, to_y, to_alpha);
      else
        shim::launch(blend_gradients_kernel<T, A>, {blocks}, {kBlendThreads}, 0, grad.data(), x.data(), y.data(),
                     alpha.data(), given, others, own, layout.x_sample, whole && needs == 7, to_x, to_y, to_alpha);
      std::vector<Acc<T>> sums(rows);
      std::vector<bool> begun(rows);
      for_elements(form, layout, [&](int64_t n, int64_t inside, int64_t at, int64_t sum) {
        const Acc<T> a = Acc<T>(pixel_value(alpha[at])), g = widen(grad[n * sample + inside]);
        const Acc<T> against = other_of(n) < 0 ? Acc<T>(NAN) : widen(y[other_of(n) * sample + inside]);
        if (to_x)
          CHECK(same(to_x[n * sample + inside], narrow<T>(a == 0 ? 0 : a * g)), "gradient of x, element %lld", (long long)inside);
        if (to_y)
          CHECK(same(to_y[n * sample + inside], narrow<T>(a == 1 ? 0 : (1 - a) * g)), "gradient of y, element %lld",
                (long long)inside);
        const Acc<T> difference = widen(x[n * layout.x_sample + inside]) - against, term = g * difference;
        sums[sum] = begun[sum] ? sums[sum] + term : term;
        begun[sum] = true;
      });
      for (int64_t i = 0; to_alpha && i < rows; ++i) CHECK(same(to_alpha[i], sums[i]), "gradient of alpha %lld", (long long)i);
    }
  }
}

template <typename T, typename A>
void test_types() {
  const Form forms[] = {
      {3, 3, 1, 40, false, true, false, true},  {3, 3, 1, 40, true, true, false, true},  {2, 3, 1, 40, false, false, true, true},
      {2, 3, 1, 40, true, false, true, true},   {1, 1, 1, 1, false, true, false, true},  {9, 5, 1, 7, false, true, false, true},
      {9, 5, 1, 7, true, true, false, true},    {2, 2, 3, 24, false, true, false, false}, {2, 2, 3, 24, true, true, false, false},
      {2, 3, 2, 13, false, true, true, false},  {2, 3, 2, 13, true, false, true, false},  {1, 11, 1, 2, true, true, false, true},
      {2, 3, 1, 2312, false, true, false, true}};
  for (const Form& form : forms)
    for (const bool odd : {false, true}) {
      test_form<T, A>(form, odd, false, odd ? 1 : 3, odd);
      test_form<T, A>(form, false, true, 2, odd);
    }
}

void test_bytes() {
  for (int i = -5000; i < 70000; ++i) {
    const float x = i / 256.0f;
    CHECK_EQUAL(to_byte(x), std::nearbyint(std::min(255.0f, std::max(0.0f, x))), "%g as a byte", x);
  }
  CHECK_EQUAL(to_byte(NAN), 0, "NaN as a byte");
  CHECK_EQUAL(to_byte(INFINITY), 255, "infinity as a byte");
}

}  // namespace

int main() {
  test_bytes();
  test_types<float, float>();
  test_types<float, uint8_t>();
  test_types<double, double>();
  test_types<__half, __half>();
  test_types<__nv_bfloat16, float>();
  test_types<__nv_bfloat16, uint8_t>();
  test_types<uint8_t, float>();
  test_types<uint8_t, uint8_t>();
  return report("blend kernels");
}
