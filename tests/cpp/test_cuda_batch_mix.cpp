// The kernels of batch_mix on the host shim against loops over pixels, written from the definition.
#include "cuda_shim.h"

#include <optional>

#include "cuda/batch_mix.cuh"
#include "cuda_test.h"

using namespace pyrx;
using namespace pyrx::cuda;

namespace {

struct Shape {
  int64_t n, c, t, h, w;
  bool last;

  int64_t sample() const { return c * t * h * w; }
  int64_t at(int64_t n, int64_t c, int64_t t, int64_t y, int64_t x) const {
    return n * sample() + (last ? ((t * h + y) * w + x) * this->c + c : ((c * this->t + t) * h + y) * w + x);
  }
  MixLayout layout() const {
    const int64_t rows = t * h, row = last ? w * c : w, step = last ? c : 1;
    return {sample(), last ? t : c * t, last ? 1 : rows * w, int(h), int(row), int(step), int(c),
            make_divisor(row), make_divisor(h), make_divisor(step), make_divisor(rows)};
  }
};

// What a caller gives, and from it what each sample must get.
struct Call {
  MixDraw draw;
  int64_t pairing, seed = 0x1234567890;
  bool swap = false, select_only = false;
  std::vector<float> lam{};
  std::vector<int64_t> boxes{}, partner{}, labels{};

  std::vector<int64_t> partners() const {
    std::vector<int64_t> found(draw.samples), order(draw.samples);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(),
              [&](int64_t a, int64_t b) { return pairing_key(seed, a) < pairing_key(seed, b); });
    for (int64_t i = 0; i < draw.samples; ++i) {
      if (pairing == kFlip) found[i] = draw.samples - 1 - i;
      if (pairing == kRoll) found[i] = (i + draw.samples - 1) % draw.samples;
      if (pairing == kRandom) found[order[i]] = order[(i ^ 1) < draw.samples ? i ^ 1 : i];
      if (pairing == kGiven) found[i] = partner[i];
    }
    return found;
  }
};

struct Sample {
  int64_t partner;
  Mix mix;
};

std::vector<Sample> expected_samples(const Call& call) {
  const int64_t samples = call.draw.samples;
  const std::vector<int64_t> partners = call.partners();
  std::vector<Sample> found(samples);
  for (int64_t i = 0; i < samples; ++i) {
    int64_t partner = partners[i];
    bool good = partner >= 0 && partner < samples && (!call.swap || partners[partner] == i);
    if (!good) partner = i;
    const float lam = call.lam.empty() ? -1 : call.lam[i];
    if (!call.lam.empty() && !(lam >= 0 && lam <= 1)) good = false;
    Mix mix{};
    if (good && !call.boxes.empty()) {
      const Box box{call.boxes[4 * i], call.boxes[4 * i + 1], call.boxes[4 * i + 2], call.boxes[4 * i + 3]};
      good = is_box(box, call.draw) && (box.y0 >= 0 || lam >= 0);
      mix = given_mix(box, lam, call.draw);
    } else if (good) {
      int64_t index = i;
      if (call.draw.granularity == kPerPair) index = min(i, partner);
      if (call.draw.granularity == kPerBatch) index = 0;
      mix = draw_mix(call.seed, index, lam, call.draw);
    }
    if (!good) mix = {NAN, 1, {0, 0, 0, 0}};
    found[i] = {partner, mix};
  }
  return found;
}

// Images of finite numbers and a few NaN with payloads.
template <typename T>
void fill(const Buffer<T>& images) {
  for (int64_t i = 0; i < images.size(); ++i) {
    if constexpr (std::is_same_v<T, uint8_t>) {
      images[i] = uint8_t(lane_of(5, i, 0));
    } else {
      images[i] = narrow<T>(Acc<T>(normal(i % 4099)));
      if (i % 97 == 31) {
        std::memset(&images[i], 0xFF, sizeof(T));
        reinterpret_cast<unsigned char*>(&images[i])[0] = uint8_t(i);
      }
    }
  }
}

template <typename In, typename Out>
Out expected_pixel(const Call& call, const Shape& shape, const std::vector<In>& images, const Sample& sample, int64_t n,
                   int64_t c, int64_t t, int64_t y, int64_t x, const std::vector<double>& scale,
                   const std::vector<double>& bias) {
  using A = MixAcc<In, Out>;
  const Box& box = sample.mix.box;
  const bool inside = y >= box.y0 && y < box.y1 && x >= box.x0 && x < box.x1;
  int64_t from_y = y, from_x = x;
  if (inside && call.draw.kind == kResizemix) {
    from_y = (y - box.y0) * shape.h / (box.y1 - box.y0);
    from_x = (x - box.x0) * shape.w / (box.x1 - box.x0);
  }
  const In own = images[shape.at(n, c, t, y, x)], other = images[shape.at(sample.partner, c, t, from_y, from_x)];
  const float weight = sample.mix.weight;
  const bool all = inside || weight == 0, none = !inside && (weight == 1 || call.select_only);
  if constexpr (std::is_same_v<In, Out>)
    if (scale.empty() && (all || none)) return all ? other : own;
  A value = all ? A(widen(other)) : A(widen(own));
  if (!all && !none) {
    const A left = A(widen(own)) * A(weight), right = A(widen(other)) * (1 - A(weight));
    value = left + right;
  }
  if (!scale.empty()) {
    const A product = value * A(scale[c]);
    value = product + A(bias[c]);
  }
  return narrow<Out>(Acc<Out>(value));
}

template <typename T>
bool same(T a, T b) {
  if constexpr (!std::is_same_v<T, uint8_t>)
    if (std::isnan(widen(a)) && std::isnan(widen(b)) && !same_bits(a, b)) return false;
  return same_bits(a, b);
}

void check_samples(const Call& call, const std::vector<Sample>& expected, const MixCall& got) {
  for (int64_t i = 0; i < call.draw.samples; ++i) {
    const Sample& sample = expected[i];
    CHECK_EQUAL(got.to_partner[i], sample.partner, "partner of %lld", (long long)i);
    CHECK(same_bits(got.to_lam[i], sample.mix.lam) || (std::isnan(got.to_lam[i]) && std::isnan(sample.mix.lam)),
          "lam of %lld: %g, not %g", (long long)i, got.to_lam[i], sample.mix.lam);
    CHECK(std::memcmp(got.to_boxes + 4 * i, &sample.mix.box, 32) == 0, "box of %lld", (long long)i);
    if (!call.labels.empty())
      CHECK_EQUAL(got.to_partner_labels[i], call.labels[sample.partner], "label of %lld", (long long)i);
  }
}

struct Results {
  Buffer<int64_t> labels, partner, boxes;
  Buffer<float> lam;

  explicit Results(int64_t n) : labels(n), partner(n), boxes(4 * n), lam(n) {}
  MixCall on_device(const Call& call) const {
    const auto given = [](const auto& values) { return values.empty() ? nullptr : values.data(); };
    return {&call.seed, given(call.labels), given(call.lam), given(call.boxes), given(call.partner), labels.data(),
            partner.data(), boxes.data(), lam.data(), call.draw, call.pairing, call.swap, call.select_only};
  }
};

// `blocks` a sample; `offset`: elements from alignment.
template <typename In, typename Out, int K>
void test_mix(const Call& call, const Shape& shape, int blocks, int offset, const std::vector<double>& scale = {},
              const std::vector<double>& bias = {}) {
  Buffer<In> images(shape.n * shape.sample(), offset);
  Buffer<Out> output(shape.n * shape.sample(), offset);
  fill(images);
  const std::vector<In> before(images.data(), images.data() + images.size());
  const Results results(shape.n);
  const MixCall given = results.on_device(call);
  MixNormalisation<MixAcc<In, Out>> normalisation{!scale.empty(), {}, {}};
  std::copy(scale.begin(), scale.end(), normalisation.scale);
  std::copy(bias.begin(), bias.end(), normalisation.bias);
  const int64_t vectors = shape.sample() / K;
  shim::launch(mix_kernel<In, Out, K>, {unsigned(shape.n * blocks)}, {kMixThreads}, 0, images.data(), output.data(),
               given, shape.layout(), normalisation, blocks, (vectors + blocks - 1) / blocks);
  const std::vector<Sample> expected = expected_samples(call);
  check_samples(call, expected, given);
  for (int64_t n = 0; n < shape.n; ++n)
    for (int64_t c = 0; c < shape.c; ++c)
      for (int64_t t = 0; t < shape.t; ++t)
        for (int64_t y = 0; y < shape.h; ++y)
          for (int64_t x = 0; x < shape.w; ++x) {
            const Out right = expected_pixel<In, Out>(call, shape, before, expected[n], n, c, t, y, x, scale, bias);
            CHECK(same(output[shape.at(n, c, t, y, x)], right),
                  "kind %d, pairing %d, K = %d, %zu to %zu bytes, %s, (%lld, %lld, %lld, %lld, %lld) of %lld x %lld",
                  int(call.draw.kind), int(call.pairing), K, sizeof(In), sizeof(Out), shape.last ? "last" : "first",
                  (long long)n, (long long)c, (long long)t, (long long)y, (long long)x, (long long)shape.h,
                  (long long)shape.w);
          }
}

template <typename T, int K>
void test_swap(Call call, const Shape& shape, int blocks, int offset) {
  call.swap = true;
  Buffer<T> images(shape.n * shape.sample(), offset);
  fill(images);
  const std::vector<T> before(images.data(), images.data() + images.size());
  const Results results(shape.n);
  const MixCall given = results.on_device(call);
  shim::launch(swap_kernel<T, K>, {unsigned(shape.n * blocks)}, {kMixThreads}, 0, images.data(), given, shape.layout(),
               blocks);
  const std::vector<Sample> expected = expected_samples(call);
  check_samples(call, expected, given);
  for (int64_t n = 0; n < shape.n; ++n)
    for (int64_t c = 0; c < shape.c; ++c)
      for (int64_t t = 0; t < shape.t; ++t)
        for (int64_t y = 0; y < shape.h; ++y)
          for (int64_t x = 0; x < shape.w; ++x) {
            const T right = expected_pixel<T, T>(call, shape, before, expected[n], n, c, t, y, x, {}, {});
            CHECK(same(images[shape.at(n, c, t, y, x)], right),
                  "in place, kind %d, pairing %d, K = %d, %zu bytes, %s, (%lld, %lld, %lld, %lld, %lld) of %lld x %lld",
                  int(call.draw.kind), int(call.pairing), K, sizeof(T), shape.last ? "last" : "first", (long long)n,
                  (long long)c, (long long)t, (long long)y, (long long)x, (long long)shape.h, (long long)shape.w);
          }
}

template <typename In, typename Out>
constexpr int kVector = 16 / int(max(sizeof(In), sizeof(Out)));

// Both widths of access wherever the launcher may choose them.
template <typename In, typename Out>
void test_any(const Call& call, const Shape& shape, const std::vector<double>& scale = {},
              const std::vector<double>& bias = {}) {
  constexpr int K = kVector<In, Out>;
  test_mix<In, Out, 1>(call, shape, 1, 1, scale, bias);
  if (shape.sample() % K == 0) test_mix<In, Out, K>(call, shape, 3, 0, scale, bias);
}

template <typename T>
void test_in_place(const Call& call, const Shape& shape) {
  if (call.pairing == kRoll || call.draw.kind == kResizemix) return;
  constexpr int K = 16 / sizeof(T);
  test_swap<T, 1>(call, shape, 1, 1);
  if (shape.layout().row % K == 0) test_swap<T, K>(call, shape, 3, 0);
}

MixDraw draw_of(const Shape& shape, MixKind kind, Granularity granularity = kPerSample, double prob = 1) {
  return {shape.n, shape.h, shape.w, kind, granularity, int64_t(prob * 65536), 32768, 0.4, 1.0,
          kind == kResizemix ? 0.1 : 0.0, kind == kResizemix ? 0.8 : 0.0, true};
}

std::vector<int64_t> labels_of(int64_t n) {
  std::vector<int64_t> labels(n);
  for (int64_t i = 0; i < n; ++i) labels[i] = 1000 + i * i;
  return labels;
}

const Shape kShapes[] = {
    {1, 3, 1, 5, 5, false}, {2, 1, 1, 4, 3, false},   {5, 3, 1, 7, 1, false}, {5, 3, 1, 8, 16, true},
    {5, 1, 2, 6, 8, false}, {2, 3, 1, 3, 223, false}, {3, 3, 2, 4, 16, true}, {2, 3, 1, 5, 224, false},
    {5, 3, 1, 2, 5, true},  {4, 3, 1, 16, 3, false},  {3, 4, 1, 6, 2, false},  // vectors over the ends of planes
};

void test_draws() {
  for (const Shape& shape : {kShapes[0], kShapes[3], kShapes[8], kShapes[10]})
    for (const MixKind kind : {kMixup, kCutmix, kResizemix, kEither})
      for (const int64_t pairing : {kFlip, kRoll, kRandom, kGiven})
        for (const Granularity granularity : {kPerBatch, kPerPair, kPerSample})
          for (const double prob : {1.0, 0.5}) {
            if (pairing == kRandom && (prob < 1 || granularity == kPerBatch)) continue;  // slow here
            Call call{draw_of(shape, kind, granularity, prob), pairing};
            call.seed = 31 * kind + 7 * pairing + granularity - 3;
            call.labels = labels_of(shape.n);
            for (int64_t i = 0; pairing == kGiven && i < shape.n; ++i)
              call.partner.push_back(i == shape.n - 1 && shape.n % 2 ? i : i ^ 1);
            test_any<__nv_bfloat16, __nv_bfloat16>(call, shape);
            test_in_place<__nv_bfloat16>(call, shape);
          }
  // more keys than threads
  for (const int64_t n : {255, 600, 601}) {
    const Shape shape{n, 1, 1, 1, 8, false};
    const Call call{draw_of(shape, kCutmix), kRandom};
    test_mix<uint8_t, uint8_t, 1>(call, shape, 1, 0);
    test_in_place<uint8_t>(call, shape);
  }
}

template <typename T>
void test_type() {
  for (const Shape& shape : kShapes)
    for (const MixKind kind : {kMixup, kCutmix, kResizemix, kEither}) {
      const Call call{draw_of(shape, kind, kPerSample, 0.9), kFlip};
      test_any<T, T>(call, shape);
      test_in_place<T>(call, shape);
    }
}

template <typename In, typename Out>
void test_conversion() {
  for (const Shape& shape : kShapes)
    for (const MixKind kind : {kCutmix, kResizemix, kEither}) {
      const Call call{draw_of(shape, kind), kFlip};
      std::vector<double> scale, bias;
      for (int64_t c = 0; c < shape.c; ++c) scale.push_back(1 / (60.0 + 7 * c)), bias.push_back(-1.5 - 0.3 * c);
      test_any<In, Out>(call, shape, scale, bias);
      if (!std::is_same_v<In, Out>) test_any<In, Out>(call, shape);
    }
}

template <typename In>
void test_conversions() {
  test_conversion<In, __half>();
  test_conversion<In, __nv_bfloat16>();
  test_conversion<In, float>();
  test_conversion<In, double>();
}

// Boxes of any place and size, also none and all, overlapping or not with the partner's; lam 0, 1 and between.
template <typename T>
void test_given() {
  for (const Shape& shape : kShapes)
    for (int trial = 0; trial < 12; ++trial) {
      Call call{draw_of(shape, trial % 3 == 2 ? kResizemix : kCutmix), kFlip};
      for (int64_t i = 0; i < shape.n; ++i) {
        uint32_t word = 0;
        const auto number = [&](int64_t most) { return int64_t(lane_of(trial, i, ++word)) % (most + 1); };
        int64_t y0 = number(shape.h), x0 = number(shape.w);
        int64_t y1 = y0 + number(shape.h - y0), x1 = x0 + number(shape.w - x0);
        if (trial % 8 == 3) y0 = x0 = 0, y1 = shape.h, x1 = shape.w;
        if (trial % 8 == 5) x1 = x0;
        const bool without = trial % 4 == 0 && i % 2;
        for (const int64_t edge : {y0, x0, y1, x1}) call.boxes.push_back(without ? -1 : edge);
        call.lam.push_back(trial % 4 == 0 ? (i % 3) / 2.0f : 0.25f);
      }
      if (trial % 4 == 2) call.lam.clear();
      test_any<T, T>(call, shape);
      test_in_place<T>(call, shape);
      call.select_only = true;
      test_any<T, T>(call, shape);
      test_in_place<T>(call, shape);
    }
}

void test_poison() {
  const Shape shape{6, 3, 1, 6, 16, false};
  const int64_t far = int64_t(1) << 62;
  const int64_t boxes[][4] = {{-1, 0, 2, 2},    {0, -1, 2, 2},   {3, 0, 2, 2},     {0, 3, 2, 2},
                              {0, 0, 7, 2},     {0, 0, 2, 17},   {-far, 0, far, 2}, {0, 0, far, 1},
                              {-5, -5, -5, -5}, {-1, -1, -1, -1}, {0, -far, 1, 1},  {1, 1, 1, far}};
  for (const MixKind kind : {kCutmix, kResizemix})
    for (const auto& box : boxes)
      for (const bool with_lam : {false, true}) {
        Call call{draw_of(shape, kind), kFlip};
        call.labels = labels_of(shape.n);
        for (int64_t i = 0; i < shape.n; ++i) {
          const int64_t fine[4] = {1, 2, 5, 11 + i % 2};
          call.boxes.insert(call.boxes.end(), i == 1 ? box : fine, (i == 1 ? box : fine) + 4);
        }
        if (with_lam) call.lam.assign(shape.n, 0.5f);
        test_any<float, float>(call, shape);
        test_in_place<float>(call, shape);
      }
  for (const float bad : {-0.25f, 1.5f, NAN, INFINITY, -INFINITY})
    for (const MixKind kind : {kMixup, kCutmix, kEither, kResizemix}) {
      Call call{draw_of(shape, kind), kFlip};
      call.lam.assign(shape.n, 0.375f);
      call.lam[4] = bad;
      test_any<float, float>(call, shape);
      test_in_place<float>(call, shape);
    }
  const std::vector<int64_t> partners[] = {{1, 0, -1, 3, 5, 4}, {1, 0, 6, 3, 5, 4},       {1, 2, 0, 4, 3, 5},
                                           {1, 0, far, 2, 5, 4}, {-far, 2, 1, 3, 3, 3}, {5, 4, 3, 2, 1, 1}};
  for (const auto& partner : partners)
    for (const MixKind kind : {kMixup, kCutmix}) {
      Call call{draw_of(shape, kind, kPerPair), kGiven};
      call.partner = partner;
      call.labels = labels_of(shape.n);
      test_any<float, float>(call, shape);
      test_in_place<float>(call, shape);
    }
}

void test_divisors() {
  for (const int64_t d : {1, 2, 3, 5, 7, 223, 224, 641, 65535, 65536, 1 << 24})
    for (const int64_t n : {int64_t(0), int64_t(d - 1), int64_t(d), int64_t(d + 1), int64_t(1) << 31,
                            (int64_t(1) << 31) / d * d - 1, (int64_t(1) << 40) / d * d - 1, (int64_t(1) << 40) - 1})
      CHECK_EQUAL(make_divisor(d).quotient(n), n / d, "%lld / %lld", (long long)n, (long long)d);
  for (uint64_t i = 0; i < 100000; ++i) {
    const PhiloxWords words = philox(3, i, 0);
    const int64_t n = words.w[0] >> 1, d = max<int64_t>(1, words.w[1] >> (1 + i % 31));
    CHECK_EQUAL(make_divisor(d).quotient(n), n / d, "%lld / %lld", (long long)n, (long long)d);
  }
}

void test_empty() {
  for (const Shape shape : {Shape{3, 0, 1, 4, 4, false}, Shape{3, 2, 1, 0, 4, false}, Shape{3, 2, 1, 4, 0, true}}) {
    for (const MixKind kind : {kMixup, kCutmix, kResizemix}) {
      const Call call{draw_of(shape, kind), kFlip};
      test_any<float, float>(call, shape);
      test_in_place<float>(call, shape);
    }
  }
}

}  // namespace

int main() {
  test_divisors();
  test_empty();
  test_draws();
  test_type<uint8_t>();
  test_type<__half>();
  test_type<float>();
  test_type<double>();
  test_conversions<uint8_t>();
  test_conversions<__half>();
  test_conversions<__nv_bfloat16>();
  test_conversions<float>();
  test_conversions<double>();
  test_given<uint8_t>();
  test_given<__nv_bfloat16>();
  test_given<float>();
  test_given<double>();
  test_poison();
  for (const shim::Order order : {shim::Order::kBackward, shim::Order::kShuffled, shim::Order::kWarpByWarp}) {
    shim::order = order;
    test_given<__nv_bfloat16>();
    const Shape shape{301, 1, 1, 1, 8, false};
    test_in_place<uint8_t>({draw_of(shape, kEither), kRandom}, shape);
  }
  return report("batch_mix kernels");
}
