// Compressed N:M weights on the CPU, and products with them.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "cpu/elements.h"
#include "cpu/nm_simd.h"
#include "cpu/pages.h"
#include "nm_packed_checks.h"

namespace pyrx::cpu {
namespace {

constexpr int64_t kTask = 32768;       // elements of a weight that are worth a thread
constexpr int64_t kTileBytes = 32768;  // of x, so that it stays in the first-level cache while all rows pass
constexpr int64_t kRows = 256;         // most rows of a task: their sums stay in the second-level cache
constexpr int64_t kDotRows = 32;       // fewest; of a few rows of x, since they are read once for every four of those

void check_indices(std::string_view op, bool below, int64_t m) {
  PYRX_CHECK_VALUE(below, op, "indices", "in [0, " + text(m) + ")", "one of at least " + text(m));
}

std::tuple<at::Tensor, at::Tensor> nm_compress(const at::Tensor& weight, const at::Tensor& bits, int64_t n, int64_t m) {
  check_nm_compress(weight, bits, n, m);
  const at::Tensor w = weight.contiguous(), mask = bits.contiguous();
  const at::Tensor values = at::empty(regrouped(w.sizes(), m, n), w.options());
  const at::Tensor indices = at::empty(values.sizes(), w.options().dtype(at::kByte));
  if (w.numel() == 0) return {values, indices};
  const int64_t columns = w.size(-1), groups = columns / m, row_bytes = mask.size(-1);
  const uint8_t* kept = mask.const_data_ptr<uint8_t>();
  uint8_t* places = indices.mutable_data_ptr<uint8_t>();
  std::atomic<int64_t> most = 0;
  dispatch_storage(w.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(w.const_data_ptr());
    T* to = static_cast<T*>(values.mutable_data_ptr());
    at::parallel_for(0, w.numel() / m, std::max<int64_t>(1, kTask / m), [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        GroupMask left = group_mask(kept + g / groups * row_bytes, g % groups * m, static_cast<int>(m));
        const GroupMask own = left;
        const int64_t count = count_ones(left);
        for (int64_t i = 0, missing = n - count; missing > 0; ++i) {
          if (own.keeps(static_cast<int>(i))) continue;
          (i < 64 ? left.low : left.high) |= 1ull << i % 64;
          --missing;
        }
        if (count > n) {
          for (int64_t seen = most; seen < count && !most.compare_exchange_weak(seen, count);) {}
          continue;
        }
        for (int64_t j = 0; j < n; ++j) {
          uint64_t& word = left.low ? left.low : left.high;
          const int place = __builtin_ctzll(word) + (left.low ? 0 : 64);
          word &= word - 1;
          places[g * n + j] = static_cast<uint8_t>(place);
          to[g * n + j] = own.keeps(place) ? from[g * m + place] : T{};
        }
      }
    });
  });
  PYRX_CHECK_VALUE(most == 0, "nm_compress", "mask", "that keeps at most n = " + text(n) + " of each group of " + text(m),
                   most.load());
  return {values, indices};
}

at::Tensor nm_decompress(const at::Tensor& values, const at::Tensor& indices, int64_t n, int64_t m) {
  check_packed_weight("nm_decompress", values, indices, n, m);
  const at::Tensor v = values.contiguous(), places = indices.contiguous();
  const at::Tensor out = at::empty(regrouped(v.sizes(), n, m), v.options());
  use_huge_pages(out);
  const uint8_t* at_places = places.const_data_ptr<uint8_t>();
  std::atomic<bool> below = true;
  dispatch_storage(v.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(v.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    at::parallel_for(0, v.numel() / n, std::max<int64_t>(1, kTask / m), [&](int64_t begin, int64_t end) {
      std::fill_n(to + begin * m, (end - begin) * m, T{});
      for (int64_t g = begin; g < end; ++g)
        for (int64_t k = g * n; k < (g + 1) * n; ++k) {
          if (at_places[k] < m) to[g * m + at_places[k]] = from[k];
          else below = false;
        }
    });
  });
  check_indices("nm_decompress", below, m);
  return out;
}

// out[c][r] = in[r][c]
template <typename Acc>
void transpose(const Acc* in, int64_t in_stride, int64_t rows, int64_t columns, Acc* out, int64_t out_stride) {
  if constexpr (sizeof(Acc) == 4) {
    mask_kernels().transpose32(reinterpret_cast<const uint32_t*>(in), in_stride, rows, columns,
                               reinterpret_cast<uint32_t*>(out), out_stride);
  } else {
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = 0; r < rows; ++r) out[c * out_stride + r] = in[r * in_stride + c];
  }
}

// y = x weight^T + bias of dense operands, x (batch, columns).
template <typename T>
struct Product {
  using Acc = accumulate_t<T>;
  PackedRows<T> weight;
  int64_t batch, columns;
  const T* x;
  const T* bias;  // or null
  T* y;

  const NMPackedKernels<T>& kernels = nm_packed_kernels<T>();

  PackedRows<T> rows(int64_t first, int64_t count) const {
    PackedRows<T> found = weight;
    found.values += first * weight.stride;
    found.indices += first * weight.stride;
    found.rows = count;
    return found;
  }

  // bias in every column of sums (rows, width)
  void start(int64_t first, int64_t rows, int64_t width, Acc* sums) const {
    for (int64_t r = 0; r < rows; ++r) {
      Acc value = 0;
      if (bias) kernels.widen(bias + first + r, 1, &value);
      std::fill_n(sums + r * width, width, value);
    }
  }

  // sums (rows, width), of which `count` columns are rows of y from `sample` on
  void finish(const Acc* sums, int64_t first, int64_t rows, int64_t width, int64_t sample, int64_t count,
              Acc* turned) const {
    T* to = y + sample * weight.rows + first;
    if constexpr (std::is_same_v<T, Acc>) {
      transpose(sums, width, rows, count, to, weight.rows);
    } else {
      transpose(sums, width, rows, count, turned, rows);
      for (int64_t b = 0; b < count; ++b) kernels.narrow(turned + b * rows, rows, to + b * weight.rows);
    }
  }

  static int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

  // Each row of the weight on its own against a few rows of x at a time.
  bool dot() const {
    std::vector<Acc> wide;
    const Acc* from;
    if constexpr (std::is_same_v<T, Acc>) {
      from = x;
    } else {
      wide.resize(batch * columns);
      kernels.widen(x, batch * columns, wide.data());
      from = wide.data();
    }
    std::atomic<bool> below = true;
    const int64_t grain = std::max<int64_t>(1, kTask / (kDotRows * std::max<int64_t>(1, columns)));
    at::parallel_for(0, blocks(weight.rows, kDotRows), grain, [&](int64_t begin, int64_t end) {
      std::vector<Acc> sums(kDotRows * kDotBatch), turned(kDotRows * kDotBatch);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * kDotRows, count = std::min(kDotRows, weight.rows - first);
        for (int64_t sample = 0; sample < batch; sample += kDotBatch) {
          const int width = static_cast<int>(std::min(kDotBatch, batch - sample));
          start(first, count, width, sums.data());
          if (!kernels.dot(rows(first, count), from + sample * columns, columns, width, sums.data())) below = false;
          finish(sums.data(), first, count, width, sample, width, turned.data());
        }
      }
    });
    return below;
  }

  // Tiles of x, transposed: a value of the weight meets a vector of samples.
  bool multiply() const {
    const int64_t tile = kernels.most_vectors * kPackedLanes, tiles = blocks(batch, tile);
    const auto tile_width = [&](int64_t i) {
      return blocks(std::min(tile, batch - i * tile), kPackedLanes) * kPackedLanes;
    };
    const at::Tensor memory = at::empty({blocks(batch, kPackedLanes) * kPackedLanes * columns},
                                        at::device(at::kCPU).dtype(c10::CppTypeToScalarType<Acc>::value));
    use_huge_pages(memory);
    Acc* turned = memory.mutable_data_ptr<Acc>();
    const int64_t strip = std::max<int64_t>(1, std::min<int64_t>(columns, 256)), strips = blocks(columns, strip);
    at::parallel_for(0, tiles * strips, std::max<int64_t>(1, kTask / (tile * strip)), [&](int64_t begin, int64_t end) {
      std::vector<Acc> wide(std::is_same_v<T, Acc> ? 0 : tile * strip);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / strips * tile, width = tile_width(i / strips), first = i % strips * strip;
        const int64_t count = std::min(tile, batch - sample), depth = std::min(strip, columns - first);
        Acc* to = turned + sample * columns + first * width;
        if (count < width)
          for (int64_t c = 0; c < depth; ++c) std::fill_n(to + c * width + count, width - count, Acc(0));
        const T* from = x + sample * columns + first;
        if constexpr (std::is_same_v<T, Acc>) {
          transpose(from, columns, count, depth, to, width);
        } else {
          for (int64_t b = 0; b < count; ++b) kernels.widen(from + b * columns, depth, wide.data() + b * depth);
          transpose(wide.data(), depth, count, depth, to, width);
        }
      }
    });

    const int64_t size = std::clamp<int64_t>(weight.rows / (4 * at::get_num_threads()), kDotRows, kRows);
    const int64_t grain = std::max<int64_t>(1, kTask / (size * std::max<int64_t>(1, columns)));
    std::atomic<bool> below = true;
    at::parallel_for(0, blocks(weight.rows, size) * tiles, grain, [&](int64_t begin, int64_t end) {
      std::vector<Acc> sums(size * tile), scratch(std::is_same_v<T, Acc> ? 0 : size * tile);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i / tiles * size, count = std::min(size, weight.rows - first);
        const int64_t sample = i % tiles * tile, width = tile_width(i % tiles);
        const int64_t held = kTileBytes / (width * static_cast<int64_t>(sizeof(Acc)) * weight.m);
        const int64_t step = std::clamp<int64_t>(held, 1, kPackedSegment / weight.n);
        start(first, count, width, sums.data());
        PackedRows<T> part = rows(first, count);
        const Acc* from = turned + sample * columns;
        for (int64_t g = 0; g < weight.groups; g += step) {
          part.groups = std::min(step, weight.groups - g);
          if (!kernels.multiply(part, from, static_cast<int>(width / kPackedLanes), sums.data())) below = false;
          part.values += part.groups * weight.n;
          part.indices += part.groups * weight.n;
          from += part.groups * weight.m * width;
        }
        finish(sums.data(), first, count, width, sample, std::min(tile, batch - sample), scratch.data());
      }
    });
    return below;
  }
};

at::Tensor nm_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                     const std::optional<at::Tensor>& bias, int64_t n, int64_t m) {
  check_nm_linear(x, values, indices, bias, n, m);
  const at::Tensor out = at::empty(linear_shape(x, values), x.options());
  if (out.numel() == 0) return out;
  use_huge_pages(out);
  const at::Tensor from = x.contiguous(), v = values.contiguous(), places = indices.contiguous();
  const at::Tensor shift = bias ? bias->contiguous() : at::Tensor();
  dispatch_storage(v.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const int64_t stride = v.size(1), rows = v.size(0);
    const PackedRows<T> weight{static_cast<const T*>(v.const_data_ptr()), places.const_data_ptr<uint8_t>(), stride, rows,
                               stride / n, static_cast<int>(n), static_cast<int>(m)};
    const Product<T> product{weight, out.numel() / rows, stride / n * m, static_cast<const T*>(from.const_data_ptr()),
                             shift.defined() ? static_cast<const T*>(shift.const_data_ptr()) : nullptr,
                             static_cast<T*>(out.mutable_data_ptr())};
    const int dots = product.kernels.most_dots ? product.kernels.most_dots(weight.n, weight.m) : 0;
    check_indices("nm_linear", product.batch <= dots ? product.dot() : product.multiply(), m);
  });
  return out;
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) {
  m.impl("nm_compress", &nm_compress);
  m.impl("nm_decompress", &nm_decompress);
  m.impl("nm_linear", &nm_linear);
}

}  // namespace
}  // namespace pyrx::cpu
