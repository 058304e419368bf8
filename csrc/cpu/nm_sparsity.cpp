// N:M masks, weights under them and their gradients on the CPU.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <c10/util/FunctionRef.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/elements.h"
#include "cpu/nm_simd.h"
#include "cpu/pages.h"
#include "nm_checks.h"

namespace pyrx::cpu {
namespace {

constexpr int64_t kTile = 16384;     // elements that are ranked before any is used: inside the first caches
constexpr int64_t kTilesOfTask = 2;
constexpr int64_t kFewColumns = 64;  // fewer columns than this are ranked beside those of other groups
constexpr int64_t kColumns = 1024;   // the most columns of a tile
constexpr int64_t kByteAligned = 8;  // a width of bits' rows that lets runs begin at any byte

// f(first, n, bits): elements first .. first + n - 1 as they lie in memory, and their bits from bit 0 on.
using Sink = c10::function_ref<void(int64_t, int64_t, const uint8_t*)>;

int64_t pieces_of(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// f(first, n, bits) over rows of `length` elements: runs of whole rows, or pieces of one that begin at a multiple of
// 8 * m; `bits` are the thread's own.
template <typename F>
void for_row_runs(int64_t rows, int64_t length, int64_t m, F f) {
  const bool whole = length <= kTile;
  const int64_t size = whole ? std::max<int64_t>(1, kTile / length) * length : kTile / (8 * m) * 8 * m;
  const int64_t pieces = whole ? 1 : pieces_of(length, size);
  const int64_t tiles = whole ? pieces_of(rows * length, size) : rows * pieces;
  at::parallel_for(0, tiles, kTilesOfTask, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> bits(bytes_of(size));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = tile / pieces * length, first = whole ? tile * size : row + tile % pieces * size;
      f(first, std::min(size, (whole ? rows * length : row + length) - first), bits.data());
    }
  });
}

// Groups that lie one after another in rows.
template <typename T>
void rank_rows(const T* scores, const GroupLayout& layout, const NM& nm, Sink sink) {
  const auto& kernels = nm_kernels<T>();
  for_row_runs(layout.outer, layout.length, nm.m, [&](int64_t first, int64_t n, uint8_t* bits) {
    if (layout.length % nm.m == 0) {
      kernels.rank_groups(scores + first, n / nm.m, nm, bits);
    } else {
      const int64_t row = std::min(n, layout.length), rest = row % nm.m;
      const NM last{static_cast<int>(std::min<int64_t>(nm.n, rest)), static_cast<int>(rest), nm.magnitude};
      std::vector<uint8_t> ranked(bytes_of(row));
      BitWriter writer(bits);
      for (int64_t i = 0; i < n; i += row) {
        kernels.rank_groups(scores + first + i, row / nm.m, nm, ranked.data());
        writer.put(ranked.data(), 0, row - rest);
        if (rest == 0) continue;
        kernels.rank_groups(scores + first + i + row - rest, 1, last, ranked.data());
        writer.put(ranked.data(), 0, rest);
      }
    }
    sink(first, n, bits);
  });
}

// Groups across few columns: those of several blocks of (m, inner) are ranked side by side.
template <typename T>
void rank_few_columns(const T* scores, const GroupLayout& layout, const NM& nm, Sink sink) {
  const auto& kernels = nm_kernels<T>();
  const int64_t inner = layout.inner, rest = layout.length % nm.m, slab = layout.length * inner;
  // without a rest all blocks lie one behind another
  const int64_t slabs = rest == 0 ? 1 : layout.outer;
  const int64_t blocks = layout.length / nm.m * (rest == 0 ? layout.outer : 1);
  const int64_t most = std::max<int64_t>(1, std::min(kTile / (nm.m * inner), kColumns / inner));
  const int64_t full = pieces_of(blocks, most), tiles = full + (rest != 0);
  at::parallel_for(0, slabs * tiles, kTilesOfTask, [&](int64_t begin, int64_t end) {
    std::vector<T> side(most * nm.m * inner);
    std::vector<uint8_t> ranked(bytes_of(most * inner) * nm.m + 4), bits(bytes_of(most * nm.m * inner));
    for (int64_t tile = begin; tile < end; ++tile) {
      const bool last = tile % tiles == full;
      const int64_t before = last ? blocks : tile % tiles * most, first = tile / tiles * slab + before * nm.m * inner;
      const int64_t here = last ? 1 : std::min(most, blocks - before), rows = last ? rest : nm.m;
      const int64_t columns = here * inner, row_bytes = bytes_of(columns);
      for (int64_t block = 0; block < here; ++block)
        for (int64_t i = 0; i < rows; ++i)
          std::copy_n(scores + first + (block * rows + i) * inner, inner, side.data() + i * columns + block * inner);
      kernels.rank_columns(side.data(), columns, rows, columns, nm, ranked.data(), row_bytes);
      {
        BitWriter writer(bits.data());
        for (int64_t block = 0; block < here; ++block) {
          const int64_t bit = block * inner;
          for (int64_t i = 0; i < rows; ++i) {
            const uint8_t* row = ranked.data() + i * row_bytes;
            if (inner <= 25) {  // within four bytes, wherever they begin
              uint32_t window;
              std::memcpy(&window, row + bit / 8, 4);
              writer.put(window >> bit % 8 & ((1u << inner) - 1), static_cast<int>(inner));
            } else {
              writer.put(row, bit, inner);
            }
          }
        }
      }
      sink(first, here * rows * inner, bits.data());
    }
  });
}

// Groups across many columns. Runs are of whole rows of `width` bits, or pieces of one that begin at a whole byte.
template <typename T>
void rank_many_columns(const T* scores, const GroupLayout& layout, const NM& nm, int64_t width, Sink sink) {
  const auto& kernels = nm_kernels<T>();
  const int64_t most = std::clamp<int64_t>(kTile / nm.m, kFewColumns, kColumns) / 64 * 64;
  const int64_t unit = width % 8 != 0 && width > most ? width : layout.inner;
  const int64_t size = width % 8 == 0 || width > most ? most : most / width * width;
  const int64_t pieces = pieces_of(unit, size), units = layout.inner / unit, blocks = pieces_of(layout.length, nm.m);
  const int64_t tiles = layout.outer * blocks * units * pieces;
  const int64_t grain = std::max<int64_t>(1, kTilesOfTask * kTile / (std::min(size, unit) * nm.m));
  at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    const int64_t row_bytes = bytes_of(size);
    std::vector<uint8_t> bits(row_bytes * nm.m);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t column = tile % pieces * size, start = tile / pieces % units * unit + column;
      const int64_t block = tile / (pieces * units) % blocks, outer = tile / (pieces * units * blocks);
      const int64_t rows = std::min<int64_t>(nm.m, layout.length - block * nm.m), n = std::min(size, unit - column);
      const int64_t first = (outer * layout.length + block * nm.m) * layout.inner + start;
      kernels.rank_columns(scores + first, layout.inner, rows, n, nm, bits.data(), row_bytes);
      for (int64_t i = 0; i < rows; ++i) sink(first + i * layout.inner, n, bits.data() + i * row_bytes);
    }
  });
}

// Ranks a tensor that is dense in the order of its dimensions. Rows of bits are of `width` elements.
void rank(const at::Tensor& scores, at::IntArrayRef shape, int64_t dim, const NM& nm, int64_t width, Sink sink) {
  const GroupLayout layout = group_layout(shape, dim);
  dispatch_storage(scores.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(scores.const_data_ptr());
    if (layout.inner == 1) rank_rows(from, layout, nm, sink);
    else if (layout.inner < kFewColumns) rank_few_columns(from, layout, nm, sink);
    else rank_many_columns(from, layout, nm, width, sink);
  });
}

// Where bits of runs go: rows of `width` elements, each padded to bytes.
struct BitRows {
  uint8_t* bits;
  int64_t width;

  void operator()(int64_t first, int64_t n, const uint8_t* run) const {
    const int64_t row = first / width, column = first % width, row_bytes = bytes_of(width);
    uint8_t* to = bits + row * row_bytes + column / 8;
    if (width % 8 == 0 || n <= width) {
      std::copy_n(run, bytes_of(n), to);
    } else if (width < 8) {
      nm_byte_kernels().spread(run, n / width, static_cast<int>(width), to);
    } else {
      for (int64_t i = 0; i < n; i += width, to += row_bytes) BitWriter(to).put(run, i, width);
    }
  }
};

// The dimensions from the largest stride to the smallest.
std::vector<int64_t> memory_order(const at::Tensor& dense) {
  std::vector<int64_t> order(dense.dim());
  std::iota(order.begin(), order.end(), 0);
  // a dimension of one element has any stride, and may stand anywhere
  const auto stride = [&](int64_t i) {
    return dense.size(i) == 1 ? std::numeric_limits<int64_t>::max() : dense.stride(i);
  };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return stride(a) > stride(b); });
  return order;
}

at::Tensor nm_mask(const at::Tensor& scores, int64_t n, int64_t m, int64_t dim, bool magnitude, bool packed, bool pad) {
  const NM nm = check_nm_mask(scores, n, m, dim, magnitude, pad);
  if (packed) {
    const at::Tensor out = empty_bits(scores);
    if (out.numel() == 0) return out;
    const BitRows rows{out.mutable_data_ptr<uint8_t>(), scores.sizes().back()};
    rank(scores.contiguous(), scores.sizes(), dim, nm, rows.width, rows);
    return out;
  }
  const at::Tensor out = at::empty_like(scores, scores.options().dtype(at::kBool));
  if (out.numel() == 0) return out;
  use_huge_pages(out);
  const at::Tensor dense = scores.strides() == out.strides()
                               ? scores
                               : at::empty_strided(out.sizes(), out.strides(), scores.options()).copy_(scores);
  const std::vector<int64_t> order = memory_order(out);
  std::vector<int64_t> shape(order.size());
  std::transform(order.begin(), order.end(), shape.begin(), [&](int64_t i) { return out.size(i); });
  const int64_t place = std::find(order.begin(), order.end(), dim) - order.begin();
  uint8_t* bytes = static_cast<uint8_t*>(out.mutable_data_ptr());
  const auto& kernels = nm_byte_kernels();
  rank(dense, shape, place, nm, kByteAligned,
       [&](int64_t first, int64_t count, const uint8_t* bits) { kernels.unpack(bits, count, bytes + first); });
  return out;
}

// f(x's storage type, run) of what dropped elements become.
template <typename F>
void dispatch_apply(const at::Tensor& x, Dropped dropped, const std::optional<at::Tensor>& factor,
                    const at::Tensor& weight, double strength, F f) {
  dispatch_storage(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using Acc = accumulate_t<T>;
    f(type, ApplyRun<T>{dropped, factor ? static_cast<Acc>(*factor->const_data_ptr<double>()) : Acc(0),
                        static_cast<Acc>(strength),
                        weight.defined() ? static_cast<const T*>(weight.const_data_ptr()) : nullptr});
  });
}

// A dense result of x under bits.
void apply(const at::Tensor& x, const at::Tensor& bits, Dropped dropped, const std::optional<at::Tensor>& factor,
           const at::Tensor& weight, double strength, const at::Tensor& out) {
  if (out.numel() == 0) return;
  const int64_t width = x.sizes().back(), row_bytes = bytes_of(width);
  const uint8_t* given = bits.const_data_ptr<uint8_t>();
  dispatch_apply(x, dropped, factor, weight, strength, [&](auto type, const auto& run) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    for_row_runs(x.numel() / width, width, 1, [&](int64_t first, int64_t n, uint8_t* scratch) {
      const uint8_t* own = given + first / width * row_bytes + first % width / 8;
      if (width % 8 != 0 && n > width) {
        if (width < 8) {
          nm_byte_kernels().gather(own, n / width, static_cast<int>(width), scratch);
        } else {
          BitWriter writer(scratch);
          for (int64_t i = 0; i < n; i += width, own += row_bytes) writer.put(own, 0, width);
        }
        own = scratch;
      }
      ApplyRun<T> here = run;
      if (here.weight) here.weight += first;
      nm_kernels<T>().apply(here, from + first, own, n, to + first);
    });
  });
}

std::tuple<at::Tensor, at::Tensor> nm_sparsify(const at::Tensor& weight, const std::optional<at::Tensor>& scores,
                                               const std::optional<at::Tensor>& mask,
                                               const std::optional<at::Tensor>& decay, int64_t n, int64_t m,
                                               int64_t dim, bool magnitude, bool pad, int64_t estimator, double) {
  const NM nm = check_nm_sparsify(weight, scores, mask, decay, n, m, dim, magnitude, pad, estimator);
  const Dropped dropped = kForward[estimator];
  const at::Tensor x = weight.contiguous(), out = at::empty_like(weight), y = contiguous_target(out);
  use_huge_pages(y);
  if (mask) {
    apply(x, mask->contiguous(), dropped, decay, {}, 0, y);
    return {finish(y, out), at::empty({0}, mask->options())};
  }
  const at::Tensor bits = empty_bits(weight);
  if (out.numel() == 0) return {out, bits};
  const BitRows rows{bits.mutable_data_ptr<uint8_t>(), weight.sizes().back()};
  dispatch_apply(x, dropped, decay, {}, 0, [&](auto type, const auto& run) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    rank(scores ? scores->contiguous() : x, weight.sizes(), dim, nm, rows.width,
         [&](int64_t first, int64_t count, const uint8_t* found) {
           nm_kernels<T>().apply(run, from + first, found, count, to + first);
           rows(first, count, found);
         });
  });
  return {finish(y, out), bits};
}

at::Tensor nm_apply(const at::Tensor& x, const at::Tensor& bits, int64_t dropped,
                    const std::optional<at::Tensor>& factor, const std::optional<at::Tensor>& weight, double strength) {
  check_nm_apply(x, bits, dropped, factor, weight);
  const at::Tensor out = at::empty_like(x), y = contiguous_target(out);
  use_huge_pages(y);
  apply(x.contiguous(), bits.contiguous(), static_cast<Dropped>(dropped), factor,
        weight ? weight->contiguous() : at::Tensor(), strength, y);
  return finish(y, out);
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) {
  m.impl("nm_mask", &nm_mask);
  m.impl("nm_sparsify", &nm_sparsify);
  m.impl("nm_apply", &nm_apply);
}

}  // namespace
}  // namespace pyrx::cpu
