// The random erasing and noise mask kernels on the host shim against loops written from their definitions.
#include "cuda_shim.h"

#include "cuda/noise_mask.cuh"
#include "cuda/random_erasing.cuh"
#include "cuda_test.h"

using namespace pyrx;
using namespace pyrx::cuda;

namespace {

// Box-Muller of the paper, in float64.
void test_normals() {
  for (const uint64_t group : {0ull, 5ull, (1ull << 33) + 1}) {
    const PhiloxWords words = philox(9, group, 3, kNoiseDomain);
    const Normals got = pyrx::normals(9, group, 3);
    for (int pair = 0; pair < 2; ++pair) {
      const double u = ((words.w[2 * pair] >> 8) + 0.5) / 16777216, v = ((words.w[2 * pair + 1] >> 8) + 0.5) / 16777216;
      const double radius = std::sqrt(-2 * std::log(u)), angle = 6.283185307179586 * v;
      CHECK(std::abs(got.v[2 * pair] - radius * std::cos(angle)) < 3e-6, "normal %d", 2 * pair);
      CHECK(std::abs(got.v[2 * pair + 1] - radius * std::sin(angle)) < 3e-6, "normal %d", 2 * pair + 1);
    }
  }
}

template <typename T>
void test_noise_mask(int64_t samples, int64_t channels, int64_t pixels, bool broadcast, bool aligned) {
  const int64_t numel = samples * channels * pixels, seed = -77, masks = broadcast ? numel / channels : numel;
  const Noise noise{0.5f, 0.25f, 6};
  Buffer<T> images(numel, !aligned), mask(masks, !aligned), output(numel, !aligned), sums(masks, !aligned);
  for (int64_t i = 0; i < numel; ++i) images[i] = narrow<T>(Acc<T>(::normal(i)));
  for (int64_t i = 0; i < masks; ++i) mask[i] = narrow<T>(Acc<T>(::normal(i + 1000)));
  shim::launch(noise_mask_kernel<T>, {2}, {kNoiseThreads}, 0, images.data(), mask.data(), output.data(), &seed, numel, channels,
               pixels, broadcast, noise, aligned);
  const int64_t summed = broadcast ? channels : 1;
  shim::launch(noise_mask_backward_kernel<T>, {2}, {kNoiseThreads}, 0, images.data(), sums.data(), &seed, masks / pixels, summed,
               pixels, noise, aligned);
  const auto drawn = [&](int64_t i) { return Acc<T>(0.5f * pyrx::normal(static_cast<uint64_t>(seed), i, 6) + 0.25f); };
  for (int64_t i = 0; i < numel; ++i) {
    const T weight = mask[broadcast ? i / (channels * pixels) * pixels + i % pixels : i];
    const T expected = narrow<T>(widen(images[i]) + widen(weight) * drawn(i));
    CHECK(same_bits(output[i], expected), "noise mask, element %lld of %lld", (long long)i, (long long)numel);
  }
  for (int64_t i = 0; i < masks; ++i) {
    Acc<T> sum = 0;
    for (int64_t c = 0; c < summed; ++c) {
      const int64_t at = (i / pixels * summed + c) * pixels + i % pixels;
      sum += widen(images[at]) * drawn(at);
    }
    CHECK(same_bits(sums[i], narrow<T>(sum)), "gradient of the mask, element %lld", (long long)i);
  }
}

EraseDraw draw_of(int64_t kind, int64_t samples, int64_t height, int64_t width, bool per_sample) {
  return {samples, height, width, kind, 60000, 1, 3, kind == kCutout ? 0.5 : 0.02, kind == kCutout ? 0.5 : 0.6, 0.3, 3.3, 0, per_sample};
}

template <typename T, int K>
void test_erase(int64_t kind, int64_t mode, int64_t channels, int64_t height, int64_t width, bool last, bool given, bool per_sample) {
  const int64_t samples = 4, count = 3, numel = samples * channels * height * width, seed = 1234567;
  const EraseLayout layout = last ? EraseLayout{1, height, width * channels, channels, channels, 1}
                                  : EraseLayout{channels, height, width, 1, channels, 1};
  Buffer<T> images(numel), output(numel);
  for (int64_t i = 0; i < numel; ++i) images[i] = constant<T>(std::fmod(std::abs(::normal(i)) * 40, 200));
  Buffer<int64_t> in(samples * count * 4), boxes(samples * count * 4);
  for (int64_t i = 0; i < samples * count; ++i) {
    // beyond the edges, empty and upside down ones too
    const int64_t y = i % 5 - 2, x = i % 7 - 3;
    in[4 * i] = y;
    in[4 * i + 1] = x;
    in[4 * i + 2] = i % 4 == 0 ? y - 1 : y + i;
    in[4 * i + 3] = x + 6;
  }
  EraseCall call{draw_of(kind, samples, height, width, per_sample), &seed, given ? in.data() : nullptr, boxes.data(), int(count), mode, 1, {}};
  for (int64_t c = 0; c < channels; ++c) call.value[c] = double(c + 3);
  shim::launch(erase_kernel<T, K>, {unsigned(2 * samples)}, {kEraseThreads}, 0, images.data(), output.data(), call, layout, 2);
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t k = 0; k < count; ++k) {
      const Box box = given ? Box{in[(n * count + k) * 4], in[(n * count + k) * 4 + 1], in[(n * count + k) * 4 + 2], in[(n * count + k) * 4 + 3]}
                            : draw_box(seed, n, k, call.draw);
      const int64_t* told = &boxes[(n * count + k) * 4];
      CHECK(told[0] == box.y0 && told[1] == box.x0 && told[2] == box.y1 && told[3] == box.x1, "box %lld", (long long)k);
    }
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t y = 0; y < height; ++y)
        for (int64_t x = 0; x < width; ++x) {
          const int64_t element = ((n * channels + c) * height + y) * width + x;
          const int64_t at = last ? ((n * height + y) * width + x) * channels + c : element;
          T expected = images[at];
          for (int64_t k = 0; k < count; ++k) {
            const int64_t* box = &boxes[(n * count + k) * 4];
            if (y < box[0] || y >= box[2] || x < box[1] || x >= box[3]) continue;
            const int64_t row = ((per_sample ? n : 0) * count + k) * channels + c;
            expected = mode == kConst  ? constant<T>(double(c + 3))
                       : mode == kRand ? noise_value<T>(pyrx::normal(seed, row, kChannelNoise))
                                       : noise_value<T>(pyrx::normal(seed, element, kPixelNoise));
          }
          CHECK(same_bits(output[at], expected), "erased, sample %lld, channel %lld, row %lld, column %lld", (long long)n,
                (long long)c, (long long)y, (long long)x);
        }
  }
  shim::launch(erase_in_place_kernel<T>, {unsigned(2 * samples)}, {kEraseThreads}, 0, images.data(), call, layout, 2);
  for (int64_t i = 0; i < numel; ++i) CHECK(same_bits(images[i], output[i]), "in place, element %lld", (long long)i);
}

template <typename T, int K>
void test_erasing() {
  for (const int64_t mode : {kConst, kRand, kPixel}) {
    if (std::is_same_v<T, uint8_t> && mode != kConst) continue;
    for (const bool last : {false, true})
      for (const bool given : {false, true}) {
        test_erase<T, K>(kRandomErasing, mode, 3, 9, 16, last, given, true);
        test_erase<T, K>(kCutout, mode, 2, 7, 32, last, given, false);
        if (K == 1) test_erase<T, K>(kRandomErasing, mode, 3, 11, 7, last, given, true);
      }
  }
}

}  // namespace

int main() {
  test_normals();
  for (const bool broadcast : {false, true})
    for (const bool aligned : {false, true}) {
      test_noise_mask<float>(3, 4, 60, broadcast, aligned);
      test_noise_mask<float>(2, 3, 63, broadcast, aligned);
      test_noise_mask<double>(2, 3, 65, broadcast, aligned);
      test_noise_mask<__half>(1, 5, 1311, broadcast, aligned);
      test_noise_mask<__nv_bfloat16>(2, 2, 100, broadcast, aligned);
      test_noise_mask<float>(2, 1, 1, broadcast, aligned);
    }
  test_erasing<float, 4>();
  test_erasing<float, 1>();
  test_erasing<double, 2>();
  test_erasing<__half, 8>();
  test_erasing<__nv_bfloat16, 1>();
  test_erasing<uint8_t, 16>();
  return report("random erasing and noise mask kernels");
}
