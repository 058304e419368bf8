// The CPU row kernels of every instruction set this machine has, against scalar loops from their definitions.
#include <vector>

#include "cpu/simd.cpp"
#include "cpu_pixels.h"
#include "cpu_test.h"

namespace {

using namespace pyrx;
using namespace pyrx::cpu;

const int64_t kSizes[] = {1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 100, 1311};

template <typename T>
Buffer<T> features(int64_t n, uint64_t first = 0) {
  Buffer<T> out(n, 1);
  for (int64_t i = 0; i < n; ++i) out[i] = plain::narrow<T>(static_cast<accumulate_t<T>>(normal(first + i)));
  return out;
}

Buffer<uint8_t> random_bits(int64_t n, uint32_t sample) {
  Buffer<uint8_t> out((n + 7) / 8);
  row_bits(5, sample_mask(sample, 32768, false), 0, n, nullptr, out.data());
  return out;
}

bool bit(const uint8_t* bits, int64_t i) { return !bits || bits[i / 8] >> i % 8 & 1; }

bool near(double got, double expected, double tolerance) {
  return std::abs(got - expected) <= tolerance * (1 + std::abs(expected)) || (got != got && expected != expected);
}

// A plane of exactly its size whose every second place is empty: the blocks at its ends must not read beyond them.
template <typename T>
void test_fill(const char* set, const ElementKernels<T>& kernels) {
  for (const int64_t width : {1, 5, 16, 37}) {
    for (const int64_t channels : {1, 19}) {
      const int64_t size = 3 * width;
      const auto present = [&](int64_t i) { return i >= 0 && i < size && i % 2 == 1; };
      Buffer<T> planes(channels * size, 1), image(size * channels, 1);
      std::vector<FillBlock> plan;
      for (int64_t y = 0; y < 3; ++y)
        for (int64_t x = 0; x < width; x += kFillLanes) {
          FillBlock block{y * width + x, 0, {}, {}};
          for (int64_t i = 0; i < kFillLanes && x + i < width; ++i) {
            if (present(block.first + i)) continue;
            block.fill |= 1 << i;
            int j = 0;
            for (int64_t dy = -1; dy <= 1; ++dy)
              for (int64_t dx = -1; dx <= 1; ++dx) {
                if (dy == 0 && dx == 0) continue;
                const bool inside = x + i + dx >= 0 && x + i + dx < width;
                const bool there = inside && present((y + dy) * width + x + i + dx);
                block.neighbors[j++] |= there << i;
                block.counts[i] += there;
              }
          }
          plan.push_back(block);
        }
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t i = 0; i < size; ++i)
          planes[c * size + i] = image[i * channels + c] =
              plain::narrow<T>(present(i) ? static_cast<accumulate_t<T>>(normal(c * size + i)) : 0);
      const Buffer<T> zeros = Buffer<T>(channels);
      std::memset(zeros.data(), 0, channels * sizeof(T));
      const int64_t blocks = static_cast<int64_t>(plan.size());
      for (int64_t c = 0; c < channels; ++c) kernels.neighbor_fill(plan.data(), blocks, width, planes.data() + c * size);
      kernels.neighbor_fill_channels(plan.data(), blocks, width, channels, channels, zeros.data(), image.data());
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t i = 0; i < size; ++i) {
          double sum = 0, count = 0;
          for (int64_t dy = -1; dy <= 1; ++dy)
            for (int64_t dx = -1; dx <= 1; ++dx)
              if (i % width + dx >= 0 && i % width + dx < width && present(i + dy * width + dx)) {
                sum += value(planes[c * size + i + dy * width + dx]);
                ++count;
              }
          const double expected = present(i) ? value(planes[c * size + i]) : sum / (count + 1e-5);
          CHECK(near(value(planes[c * size + i]), expected, sizeof(T) == 2 ? 4e-3 : 1e-6), "%s: fill of width %ld, place %ld",
                set, width, i);
          CHECK(same_bits(planes[c * size + i], image[i * channels + c]), "%s: channels of width %ld, place %ld", set, width,
                i);
        }
    }
  }
}

void test_masks(const char* set, const MaskKernels& kernels) {
  for (const uint64_t seed : {0ull, 0x0123456789abcdefull, ~0ull})
    for (const int64_t threshold : {0, 1, 19661, 32768, 65535})
      for (const uint64_t first : {0ull, 5ull, (1ull << 32) - 9, (1ull << 40) + 3})
        for (const bool antithetic : {false, true})
          for (const int64_t groups : {1, 4, 5, 31, 32, 77}) {
            const SampleMask mask = sample_mask(3, threshold, antithetic);
            Buffer<uint8_t> out(groups);
            kernels.group_bits(seed, mask, first, groups, out.data());
            for (int64_t g = 0; g < groups; ++g) {
              uint8_t expected = 0;
              for (int j = 0; j < 8; ++j) {
                const uint32_t u = lane(philox(seed, first + g, antithetic ? 2 : 3), j);
                expected |= ((antithetic ? 65535 - u : u) >= threshold) << j;
              }
              CHECK_EQUAL(out[g], expected, "%s: group %ld of %ld at %lu", set, g, groups, first);
            }
          }
  for (const int64_t rows : {1, 2, 7})
    for (const int64_t groups : {1, 7, 8, 16, 17, 45}) {
      const SampleMask mask = sample_mask(1, 6554, true);
      const int64_t stride = groups + 3;
      const uint64_t seed = 0xfedcba9876543210ull, first = (1ull << 32) - 20, step = 1000;
      Buffer<uint8_t> out(rows * stride), expected(groups);
      for (int64_t i = 0; i < out.size(); ++i) out[i] = 0xA5;
      kernels.tile_bits(seed, mask, first, step, rows, groups, out.data(), stride);
      for (int64_t r = 0; r < rows; ++r) {
        kernels.group_bits(seed, mask, first + r * step, groups, expected.data());
        for (int64_t g = 0; g < stride; ++g)
          CHECK_EQUAL(out[r * stride + g], g < groups ? expected[g] : 0xA5, "%s: tile_bits %ld, %ld", set, r, g);
      }
    }
  for (const int64_t rows : {1, 15, 16, 40})
    for (const int64_t columns : {1, 16, 33}) {
      Buffer<uint32_t> in(rows * columns), out(rows * columns);
      for (int64_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint32_t>(i * 2654435761u);
      kernels.transpose32(in.data(), columns, rows, columns, out.data(), rows);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c)
          CHECK_EQUAL(out[c * rows + r], in[r * columns + c], "%s: transpose32 %ld, %ld", set, r, c);
    }
}

void test_normals(const char* set, const NormalKernels& kernels) {
  for (const uint64_t first : {0ull, 5ull, (1ull << 32) - 9, (1ull << 40) + 3})
    for (const int64_t groups : {1, 15, 16, 40}) {
      Buffer<float> out((groups + 15) / 16 * kNormalBlock);
      kernels.normals(0x0123456789abcdefull, 7, first, groups, out.data());
      for (int64_t i = 0; i < 4 * groups; ++i)
        CHECK(same_bits(out[i], pyrx::normal(0x0123456789abcdefull, 4 * first + static_cast<uint64_t>(i), 7)), "%s: normal %ld", set, i);
    }
}

// One row of bits at any element, by the kernels this machine picks.
void test_row_bits() {
  for (const int64_t n : kSizes)
    for (const uint64_t first : {0ull, 1ull, 7ull, 100ull, (1ull << 35) + 3}) {
      Buffer<uint8_t> out((n + 7) / 8), scratch((n + 7) / 8 + 2);
      row_bits(9, sample_mask(4, 19661, false), first, n, scratch.data(), out.data());
      for (int64_t i = 0; i < (n + 7) / 8 * 8; ++i)
        CHECK_EQUAL(bit(out.data(), i), i < n && lane_of(9, first + i, 4) >= 19661, "row_bits: %ld of %ld", i, n);
    }
}

template <typename T>
void test_elements(const char* set, const ElementKernels<T>& kernels, double tolerance) {
  using Acc = accumulate_t<T>;
  for (const int64_t n : kSizes)
    for (const bool all : {false, true})
      for (const Acc scale : {Acc(1), Acc(1.25)}) {
        Buffer<T> x = features<T>(n), out(n, 1);
        if (n > 2) x[2] = plain::narrow<T>(std::numeric_limits<Acc>::quiet_NaN());
        const Buffer<uint8_t> memory = random_bits(n, 1);
        const uint8_t* bits = all ? nullptr : memory.data();
        kernels.dropout(x.data(), bits, n, scale, out.data());
        Buffer<Acc> sum(n);
        for (int64_t i = 0; i < n; ++i) sum[i] = Acc(i);
        kernels.accumulate(x.data(), bits, n, scale, sum.data());
        for (int64_t i = 0; i < n; ++i) {
          const double kept = bit(bits, i) ? value(x[i]) * scale : 0;
          CHECK(near(value(out[i]), kept, tolerance), "%s: dropout %ld of %ld: %g, not %g", set, i, n, value(out[i]), kept);
          if (bit(bits, i) && scale == 1 && kept == kept) CHECK(same_bits(out[i], x[i]), "%s: untouched %ld", set, i);
          CHECK(near(sum[i], i + kept, 1e-6), "%s: accumulate %ld of %ld", set, i, n);
        }
        kernels.store(sum.data(), n, scale, out.data());
        for (int64_t i = 0; i < n; ++i) CHECK(near(value(out[i]), double(sum[i]) * scale, tolerance), "%s: store %ld", set, i);

        const int64_t rows = 3, stride = n + 5, bits_stride = (n + 7) / 8 + 1;
        const Buffer<Acc> tile = features<Acc>(rows * stride, 50);
        Buffer<uint8_t> row_masks(rows * bits_stride);
        for (int64_t k = 0; k < rows; ++k) row_bits(6, sample_mask(k, 32768, false), 0, n, nullptr, &row_masks[k * bits_stride]);
        kernels.fold(tile.data(), stride, row_masks.data(), bits_stride, rows, n, scale, out.data());
        for (int64_t i = 0; i < n; ++i) {
          double expected = 0;
          for (int64_t k = 0; k < rows; ++k) expected += bit(&row_masks[k * bits_stride], i) ? tile[k * stride + i] * scale : 0;
          CHECK(near(value(out[i]), expected, tolerance), "%s: fold %ld of %ld", set, i, n);
        }
        kernels.fold_level(tile.data(), tile.data() + stride, n, scale, out.data());
        for (int64_t i = 0; i < n; ++i)
          CHECK(near(value(out[i]), double(tile[i]) * tile[stride + i] * scale, tolerance), "%s: fold_level %ld", set, i);
      }
}

template <typename T, typename G>
void test_head(const char* set, const HeadKernels<T, G>& kernels, double tolerance) {
  using Acc = accumulate_t<T>;
  for (const int64_t n : kSizes) {
    const Buffer<T> x0 = features<T>(n), x1 = features<T>(n, 9999);
    const Buffer<uint8_t> bits0 = random_bits(n, 1), bits1 = random_bits(n, 2);
    const Buffer<Acc> level = features<Acc>(n, 333);
    Buffer<G> out(n, 1), pairs(2 * n, 1);
    kernels.select(x0.data(), bits0.data(), n, out.data());
    for (int64_t i = 0; i < n; ++i)
      CHECK_EQUAL(value(out[i]), bit(bits0.data(), i) ? value(x0[i]) : 0, "%s: select %ld of %ld", set, i, n);
    level[n - 1] = 0;
    x0[n - 1] = plain::narrow<T>(std::numeric_limits<Acc>::quiet_NaN());
    kernels.multiply(x0.data(), level.data(), n, out.data());
    for (int64_t i = 0; i < n; ++i)
      CHECK(near(value(out[i]), i == n - 1 ? 0 : value(x0[i]) * level[i], tolerance), "%s: multiply %ld of %ld", set, i, n);
    x0[n - 1] = plain::narrow<T>(Acc(1.5));
    kernels.convert(level.data(), n, out.data());
    for (int64_t i = 0; i < n; ++i)
      CHECK(same_bits(out[i], plain::narrow<G>(level[i])), "%s: convert %ld of %ld", set, i, n);
    if (kernels.select_pair)
      for (const bool second : {true, false}) {
        kernels.select_pair(x0.data(), bits0.data(), second ? x1.data() : nullptr, bits1.data(), n, pairs.data());
        for (int64_t i = 0; i < n; ++i) {
          CHECK_EQUAL(value(pairs[2 * i]), bit(bits0.data(), i) ? value(x0[i]) : 0, "%s: pair %ld", set, i);
          CHECK_EQUAL(value(pairs[2 * i + 1]), second && bit(bits1.data(), i) ? value(x1[i]) : 0, "%s: pair %ld", set, i);
        }
      }
    const int64_t rows = 19, stride = n + 3, out_stride = rows + 2;
    const Buffer<Acc> in = features<Acc>(rows * stride, 4444);
    Buffer<G> turned((n - 1) * out_stride + rows);
    kernels.transpose(in.data(), stride, rows, n, turned.data(), out_stride);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < n; ++c)
        CHECK(same_bits(turned[c * out_stride + r], plain::narrow<G>(in[r * stride + c])), "%s: transpose %ld %ld", set, r, c);
  }
}

template <typename Acc>
void test_accumulators(const char* set, const AccumulatorKernels<Acc>& kernels, double tolerance) {
  for (const int64_t n : kSizes) {
    const Buffer<uint8_t> bits = random_bits(n, 3);
    const Buffer<Acc> x = features<Acc>(n), start = features<Acc>(n, 77);
    Buffer<Acc> y(n);
    for (int64_t i = 0; i < n; ++i) y[i] = start[i];
    kernels.add_level(bits.data(), n, Acc(0.5), y.data());
    kernels.axpy(Acc(-2), x.data(), n, y.data());
    for (int64_t i = 0; i < n; ++i)
      CHECK(near(y[i], start[i] + (bit(bits.data(), i) ? 0.5 : 0) - 2.0 * x[i], tolerance), "%s: level, axpy %ld", set, i);

    const Buffer<Acc> raw = features<Acc>(n, 10), base = features<Acc>(n, 20), bias = features<Acc>(n, 30);
    Buffer<Acc> class_weight(n), probabilities(n), gradient(n);
    Acc weight_sum = 0;
    for (int64_t c = 0; c < n; ++c) {
      class_weight[c] = Acc(0.5 + c % 3);
      weight_sum += class_weight[c];
      probabilities[c] = Acc(1.0 / double(n));
    }
    for (int options = 0; options < 32; ++options) {
      const bool dense = options & 1, weighted = options & 2, smoothed = options & 4, paired = options & 8, bad = options & 16;
      const Acc smoothing = smoothed ? Acc(0.1) : Acc(0);
      const int64_t a = n - 1, b = n / 2;
      CrossEntropyRow<Acc> row{};
      row.raw = raw.data();
      row.base = paired ? base.data() : nullptr;
      row.bias = bias.data();
      row.class_weight = weighted ? class_weight.data() : nullptr;
      row.probabilities = dense ? probabilities.data() : nullptr;
      row.target = class_target<Acc>(a, bad ? -100 : b, Acc(0.75), row.class_weight, weighted ? weight_sum : Acc(n), n, -100, smoothing);
      row.label_smoothing = smoothing;
      row.scale = Acc(2);
      row.gradient_factor = Acc(0.25);
      row.classes = n;
      row.gradient = gradient.data();
      const double loss = kernels.cross_entropy(row, true);

      std::vector<double> z(n), q(n, 0.0);
      double greatest = -1e300, sum = 0, total = 0, expected = 0;
      for (int64_t c = 0; c < n; ++c) {
        z[c] = 2.0 * (paired ? double(base[c]) - raw[c] : double(raw[c])) + bias[c];
        greatest = std::max(greatest, z[c]);
        const double share = dense ? probabilities[c] : (c == a ? 0.75 : 0) + (!bad && c == b ? 0.25 : 0);
        const double counted = dense || !bad ? 1.0 : 0.75;
        q[c] = ((1 - smoothing) * share + smoothing * counted / double(n)) * (weighted ? double(class_weight[c]) : 1);
        total += q[c];
      }
      for (const double each : z) sum += std::exp(each - greatest);
      for (int64_t c = 0; c < n; ++c) expected += q[c] * (greatest + std::log(sum) - z[c]);
      CHECK(near(loss, expected, tolerance), "%s: loss %g, not %g, of %ld classes, options %d", set, loss, expected, n, options);
      for (int64_t c = 0; c < n; ++c) {
        const double g = 0.25 * (total * std::exp(z[c] - greatest) / sum - q[c]);
        CHECK(near(gradient[c], g, tolerance), "%s: gradient %ld of %ld: %g, not %g, options %d", set, c, n, double(gradient[c]), g, options);
      }
      // an ignored row is 0 whatever its logits, and a NaN logit makes any other row NaN
      Buffer<Acc> nan(n);
      row.raw = nan.data();
      CHECK(std::isnan(kernels.cross_entropy(row, true)), "%s: NaN, options %d", set, options);
      if (dense) continue;
      row.target = class_target<Acc>(-100, -100, Acc(1), nullptr, Acc(n), n, -100, smoothing);
      CHECK_EQUAL(kernels.cross_entropy(row, true), Acc(0), "%s: ignored, options %d", set, options);
      for (int64_t c = 0; c < n; ++c) CHECK_EQUAL(gradient[c], Acc(0), "%s: ignored gradient, options %d", set, options);
    }
  }
}

// Gradients by partial sums against the two sums they stand for.
template <typename Acc>
void test_subset(const char* set, const AccumulatorKernels<Acc>& kernels, double tolerance) {
  for (const int64_t width : {16, 32, 48, 64})
    for (const int64_t masks : {1, 3, 4, 5, 8, 11, 16, 30, 32})
      for (const int64_t n : {1, 15, 16, 37})
        for (int wanted = 1; wanted < 4; ++wanted) {
          const int64_t rows = 3, groups = (masks + 3) / 4, code_rows = (masks + 7) / 8, padded = (n + 7) / 8 * 8;
          const bool base = masks == 4;
          const Buffer<Acc> gradients = features<Acc>(rows * (masks + 1) * width, 5), weight = features<Acc>(n * width, 6), x = features<Acc>(rows * n, 7), start_weight = features<Acc>(n * width, 8), start_input = features<Acc>(rows * n, 9);
          Buffer<uint8_t> bits(rows * masks * (padded / 8)), codes(rows * code_rows * padded);
          Buffer<Acc> tables(rows * groups * 16 * width), weight_gradient(n * width), input_gradient(rows * n);
          for (int64_t i = 0; i < n * width; ++i) weight_gradient[i] = start_weight[i];
          for (int64_t i = 0; i < rows * n; ++i) input_gradient[i] = start_input[i];
          for (int64_t b = 0; b < rows; ++b) {
            uint8_t* own = &bits[b * masks * (padded / 8)];
            for (int64_t m = 0; m < masks; ++m) row_bits(3, sample_mask(b * masks + m, 32768, false), 0, n, nullptr, own + m * (padded / 8));
            for (int64_t q = 0; q < code_rows; ++q)
              subset_codes(own + 8 * q * (padded / 8), padded / 8, std::min<int64_t>(8, masks - 8 * q), n, &codes[b * padded * code_rows + q], code_rows);
            const Acc* own_rows = gradients.data() + b * (masks + 1) * width;
            for (int64_t g = 0; g < groups; ++g)
              kernels.subset_table(base && g == 0 ? own_rows + masks * width : nullptr, own_rows + 4 * g * width, width,
                                   std::min<int64_t>(4, masks - 4 * g), width, &tables[(b * groups + g) * 16 * width]);
          }
          kernels.subset_gradients({.rows = rows, .features = n, .width = width, .groups = groups, .tables = tables.data(),
                                 .codes = codes.data(), .codes_stride = code_rows * padded, .x = x.data(), .x_stride = n,
                                 .weight = weight.data(), .weight_gradient = wanted & 1 ? weight_gradient.data() : nullptr,
                                 .input_gradient = wanted & 2 ? input_gradient.data() : nullptr, .input_stride = n});
          for (int64_t d = 0; d < n; ++d) {
            std::vector<double> expected_input(rows, 0.0);
            for (int64_t c = 0; c < width; ++c) {
              double expected = 0;
              for (int64_t b = 0; b < rows; ++b) {
                const Acc* own = gradients.data() + b * (masks + 1) * width + c;
                double sum = base ? own[masks * width] : 0;
                for (int64_t m = 0; m < masks; ++m) sum += bit(&bits[(b * masks + m) * (padded / 8)], d) ? own[m * width] : 0;
                expected += sum * x[b * n + d];
                expected_input[b] += sum * weight[d * width + c];
              }
              const double got = weight_gradient[d * width + c], before = start_weight[d * width + c];
              CHECK(near(got, before + (wanted & 1 ? expected : 0), tolerance), "%s: subset weight %ld, %ld of %ld masks", set, d, c, masks);
            }
            for (int64_t b = 0; b < rows; ++b)
              CHECK(near(input_gradient[b * n + d], start_input[b * n + d] + (wanted & 2 ? expected_input[b] : 0), 10 * tolerance),
                    "%s: subset input %ld, %ld of %ld masks, width %ld", set, b, d, masks, width);
          }
        }
}

// The same sums by lookups in registers.
template <typename Acc>
void test_lookup(const char* set, const AccumulatorKernels<Acc>& kernels, double tolerance) {
  if (!kernels.lookup_gradients) return;
  for (const int64_t classes : {1, 10, 32})
    for (const int64_t masks : {1, 3, 4, 5, 8})
      for (const int64_t n : {1, 16, 37, 64, 150})
        for (int wanted = 1; wanted < 4; ++wanted) {
          const int64_t padded = (n + 15) / 16 * 16;
          const bool base = masks != 3;
          const Buffer<Acc> gradients = features<Acc>((masks + 1) * classes, 5), weight = features<Acc>(classes * padded, 6);
          const Buffer<Acc> x = features<Acc>(padded, 7), before = features<Acc>(classes * padded, 8);
          Buffer<uint8_t> bits(masks * (padded / 8)), codes(padded);
          Buffer<Acc> weight_gradient(classes * padded), input_gradient(padded);
          for (int64_t i = 0; i < classes * padded; ++i) weight_gradient[i] = before[i];
          for (int64_t m = 0; m < masks; ++m) row_bits(3, sample_mask(m, 32768, false), 0, padded, nullptr, &bits[m * (padded / 8)]);
          subset_codes(bits.data(), padded / 8, masks, padded, codes.data());
          kernels.lookup_gradients({.features = n, .classes = classes, .masks = masks,
                                    .base = base ? gradients.data() + masks * classes : nullptr, .rows = gradients.data(),
                                    .rows_stride = classes, .codes = codes.data(), .x = x.data(), .weight = weight.data(),
                                    .weight_stride = padded, .weight_gradient = wanted & 1 ? weight_gradient.data() : nullptr,
                                    .gradient_stride = padded, .input_gradient = wanted & 2 ? input_gradient.data() : nullptr});
          for (int64_t d = 0; d < n; ++d) {
            double input = 0;
            for (int64_t c = 0; c < classes; ++c) {
              double sum = base ? gradients[masks * classes + c] : 0;
              for (int64_t m = 0; m < masks; ++m) sum += bit(&bits[m * (padded / 8)], d) ? gradients[m * classes + c] : 0;
              input += sum * weight[c * padded + d];
              CHECK(near(weight_gradient[c * padded + d], before[c * padded + d] + (wanted & 1 ? sum * x[d] : 0), tolerance),
                    "%s: lookup weight %ld, %ld of %ld masks", set, d, c, masks);
            }
            if (wanted & 2) CHECK(near(input_gradient[d], input, 10 * tolerance), "%s: lookup input %ld of %ld masks", set, d, masks);
          }
        }
}

// Both gradients of two rows by pairs of sums, to what rounding the sums and the result to bfloat16 leaves.
void test_pair_sums(const char* set, const SumKernels& kernels) {
  if (!kernels.tables || !__builtin_cpu_supports("avx512bf16")) return;
  constexpr double kRounded = 1.0 / 128;
  for (const int64_t masks : {3, 4, 6, 8, 11})
    for (const int64_t classes : {1, 10, 21})
      for (const int64_t n : {1, 16, 37, 64, 130})
        for (const int64_t rows : {1, 2})
          for (const bool base : {false, true}) {
            const int64_t gemm_rows = masks + base, groups = (masks + 3) / 4, code_rows = (groups + 1) / 2, stride = (classes + 15) / 16 * 16;
            const int64_t padded = (n + 63) / 64 * 64, vectors = padded / 16, class_pairs = (classes + 1) / 2;
            Buffer<float> gradients = features<float>(rows * gemm_rows * stride, 5);
            for (int64_t r = 0; r < rows * gemm_rows; ++r)
              for (int64_t c = classes; c < stride; ++c) gradients[r * stride + c] = 0;
            const Buffer<bfloat16> weight = features<bfloat16>(2 * class_pairs * padded, 6), x = features<bfloat16>(2 * padded, 7);
            const Buffer<bfloat16> zeros(padded);
            std::fill_n(zeros.data(), padded, bfloat16{});
            Buffer<uint8_t> bits(rows * masks * (padded / 8)), codes(rows * code_rows * padded);
            Buffer<uint32_t> index(vectors * code_rows * 16), values(vectors * 16), panel(class_pairs * padded), tables(16 * (classes + 8) * 4 * groups);
            for (int64_t r = 0; r < rows; ++r) {
              uint8_t* own = &bits[r * masks * (padded / 8)];
              for (int64_t m = 0; m < masks; ++m) row_bits(3, sample_mask(r * masks + m, 32768, false), 0, padded, nullptr, own + m * (padded / 8));
              for (int64_t q = 0; q < code_rows; ++q)
                subset_codes(own + 8 * q * (padded / 8), padded / 8, std::min<int64_t>(8, masks - 8 * q), padded, &codes[(r * code_rows + q) * padded]);
            }
            const bool second = rows == 2;
            kernels.features(x.data(), second ? &x[padded] : zeros.data(), n, values.data(), 16);
            for (int64_t q = 0; q < code_rows; ++q)
              kernels.index(&codes[q * padded], &codes[((second ? code_rows : 0) + q) * padded], n, &index[q * 16], code_rows * 16);
            std::fill_n(panel.data(), panel.size(), 0u);
            for (int64_t c = 0; c < classes; ++c)
              for (int64_t d = 0; d < padded; ++d) {
                const uint32_t bits16 = weight[c * padded + d].bits;
                panel[c / 2 * padded + d] |= bits16 << 16 * (c % 2);
              }
            const float* first = gradients.data();
            const auto tables_of = [&](int64_t group, int64_t count, int64_t from, int64_t number) {
              return PairTables{{first + from, first + (second ? gemm_rows * stride : 0) + from}, stride, masks, base, second, group, count, number};
            };
            const auto sum = [&](int64_t r, int64_t d, int64_t c, double* magnitude) {
              const float* own = first + r * gemm_rows * stride + c;
              double total = base ? own[masks * stride] : 0;
              for (int64_t m = 0; m < masks; ++m) total += bit(&bits[(r * masks + m) * (padded / 8)], d) ? own[m * stride] : 0;
              for (int64_t m = 0; m < gemm_rows; ++m) *magnitude += std::fabs(own[m * stride]);
              return total;
            };
            for (const int64_t each : {2, 4}) {
              const int64_t width = 16 / each;
              for (const bool add : {false, true}) {
                Buffer<float> sums = features<float>(classes * padded, 8);
                const Buffer<float> before = features<float>(classes * padded, 8);
                Buffer<bfloat16> out(classes * n);
                for (int64_t c = 0; c < classes; c += width) {
                  Buffer<float> padded_rows(rows * gemm_rows * stride + 16);  // the last classes are past the row's end
                  std::copy(first, first + rows * gemm_rows * stride, padded_rows.data());
                  PairTables of = tables_of(0, groups, 0, width);
                  for (int r = 0; r < 2; ++r) of.rows[r] = padded_rows.data() + (of.rows[r] - first) + c;
                  kernels.tables(of, false, tables.data());
                  for (int64_t d = 0; d < n; d += 16 * each)
                    kernels.weight({.pairs = 1, .groups = groups, .index = &index[d * code_rows], .index_stride = code_rows * 16, .x = &values[d],
                                    .x_stride = 16, .tables = tables.data(), .vectors = each, .classes = classes - c, .features = n - d,
                                    .sum = add ? &sums[c * padded + d] : nullptr, .sum_stride = padded, .add = add, .out = &out[c * n + d], .out_stride = n});
                }
                for (int64_t c = 0; c < classes; ++c)
                  for (int64_t d = 0; d < n; ++d) {
                    double expected = add ? before[c * padded + d] : 0, magnitude = std::fabs(expected);
                    for (int64_t r = 0; r < rows; ++r) {
                      double own = 0;
                      expected += value(x[r * padded + d]) * sum(r, d, c, &own);
                      magnitude += std::fabs(value(x[r * padded + d])) * own;
                    }
                    CHECK(std::fabs(value(out[c * n + d]) - expected) <= kRounded * magnitude, "%s: pair weight %ld, %ld of %ld masks: %g, not %g", set, d, c,
                          masks, value(out[c * n + d]), expected);
                  }
              }
            }
            Buffer<float> input = features<float>(rows * padded, 9);
            const Buffer<float> before = features<float>(rows * padded, 9);
            for (int64_t g = 0; g < groups; g += 2) {
              const int64_t count = std::min<int64_t>(2, groups - g);
              kernels.tables(tables_of(g, count, 0, 2 * class_pairs), true, tables.data());
              for (int64_t d = 0; d < n; d += count == 2 ? 32 : 64)
                kernels.input({.groups = count, .index = &index[d * code_rows + g / 2 * 16], .index_stride = code_rows * 16, .class_pairs = class_pairs,
                               .tables = tables.data(), .weight = &panel[d], .weight_stride = padded,
                               .input_gradient = {&input[d], second ? &input[padded + d] : nullptr}});
            }
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t d = 0; d < n; ++d) {
                double expected = before[r * padded + d], magnitude = std::fabs(expected);
                for (int64_t c = 0; c < classes; ++c) {
                  double own = 0;
                  expected += value(weight[c * padded + d]) * sum(r, d, c, &own);
                  magnitude += std::fabs(value(weight[c * padded + d])) * own;
                }
                CHECK(std::fabs(input[r * padded + d] - expected) <= kRounded * magnitude, "%s: pair input %ld of %ld masks: %g, not %g", set, d, masks,
                      double(input[r * padded + d]), expected);
              }
          }
}

#define TEST_SET(name)                                                                      \
  test_masks(#name, name::mask_table());                                                    \
  test_normals(#name, name::normal_table());                                                  \
  test_elements<float>(#name, name::element_table<float>(), 1e-6);                          \
  test_elements<double>(#name, name::element_table<double>(), 1e-14);                       \
  test_elements<bfloat16>(#name, name::element_table<bfloat16>(), 0.004);                   \
  test_elements<float16>(#name, name::element_table<float16>(), 0.0005);                    \
  test_fill<float>(#name, name::element_table<float>());                                    \
  test_fill<double>(#name, name::element_table<double>());                                  \
  test_fill<bfloat16>(#name, name::element_table<bfloat16>());                              \
  test_fill<float16>(#name, name::element_table<float16>());                                \
  test_head<float, float>(#name, name::head_table<float, float>(), 1e-6);                   \
  test_head<double, double>(#name, name::head_table<double, double>(), 1e-14);              \
  test_head<bfloat16, bfloat16>(#name, name::head_table<bfloat16, bfloat16>(), 0.004);      \
  test_head<bfloat16, float>(#name, name::head_table<bfloat16, float>(), 1e-6);             \
  test_head<float16, float16>(#name, name::head_table<float16, float16>(), 0.0005);         \
  test_head<float16, float>(#name, name::head_table<float16, float>(), 1e-6);               \
  test_accumulators<float>(#name, name::accumulator_table<float>(), 2e-6);                  \
  test_accumulators<double>(#name, name::accumulator_table<double>(), 1e-13);               \
  test_subset<float>(#name, name::accumulator_table<float>(), 1e-5);                        \
  test_subset<double>(#name, name::accumulator_table<double>(), 1e-13);                     \
  test_pair_sums(#name, name::sum_table());                                                 \
  test_lookup<float>(#name, name::accumulator_table<float>(), 1e-5);                        \
  TEST_PIXELS(name)

}  // namespace

int main() {
  test_row_bits();
  FOR_EACH_SET(TEST_SET)
  return report("cpu_simd");
}
