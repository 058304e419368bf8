// Transposable N:M masks on the CPU: threads take tiles side by side.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/elements.h"
#include "cpu/nm_simd.h"
#include "cpu/pages.h"
#include "nm_transposable_checks.h"

namespace pyrx::cpu {
namespace {

constexpr int64_t kExactRun = 1024;  // tiles side by side that a thread takes at a time
constexpr int64_t kGreedyRun = 16;   // likewise: a multiple of 8, so that the bits of a run are whole bytes
constexpr int64_t kTask = 32768;     // elements

// The scores as one matrix, tiles one row of tiles after another.
struct Tiles {
  int64_t m, rows, columns;

  explicit Tiles(const at::Tensor& scores, int64_t group)
      : m(group), rows(scores.numel() / scores.size(-1) / group), columns(scores.size(-1)) {}
  int64_t across() const { return columns / m; }
};

// f(row of tiles, first tile, tiles) for runs of tiles side by side, `scratch` bytes a thread.
template <typename F>
void for_runs(const Tiles& tiles, int64_t run, int64_t scratch, F f) {
  const int64_t runs = (tiles.across() + run - 1) / run;
  const int64_t elements = std::min(run, tiles.across()) * tiles.m * tiles.m;
  at::parallel_for(0, tiles.rows * runs, std::max<int64_t>(1, kTask / elements), [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> memory(scratch / int64_t(sizeof(uint64_t)) + 1);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % runs * run;
      f(i / runs, first, std::min(run, tiles.across() - first), memory.data());
    }
  });
}

void pack(const uint8_t* bytes, int64_t n, uint8_t* bits) {
  for (int64_t i = 0; i < n; i += 8) {
    uint32_t found = 0;
    for (int64_t j = 0; j < std::min<int64_t>(8, n - i); ++j) found |= static_cast<uint32_t>(bytes[i + j]) << j;
    bits[i / 8] = static_cast<uint8_t>(found);
  }
}

template <typename T>
void exact(const T* scores, const Tiles& tiles, bool magnitude, bool packed, uint8_t* out) {
  const auto& kernels = nm_transposable_kernels<T>();
  const int64_t out_stride = packed ? bytes_of(tiles.columns) : tiles.columns;
  for_runs(tiles, kExactRun, 0, [&](int64_t row, int64_t first, int64_t count, void*) {
    uint8_t* to = out + row * tiles.m * out_stride + first * tiles.m / (packed ? 8 : 1);
    kernels.exact(scores + row * tiles.m * tiles.columns + first * tiles.m, tiles.columns, count, magnitude, packed, to,
                  out_stride);
  });
}

template <typename T>
void greedy(const T* scores, const Tiles& tiles, const NM& nm, bool packed, uint8_t* out) {
  const auto& kernels = nm_transposable_kernels<T>();
  const int64_t m = tiles.m, sorted = m > kLaneGroup ? 2 * m * m * int64_t(sizeof(T) + sizeof(uint16_t)) : 0;
  const int64_t scratch = sorted + (packed ? kGreedyRun * m * m : 0), bits_stride = bytes_of(tiles.columns);
  for_runs(tiles, kGreedyRun, scratch, [&](int64_t row, int64_t first, int64_t count, void* memory) {
    const int64_t at = row * m * tiles.columns + first * m, width = count * m;
    const T* from = scores + at;
    if (!packed) return kernels.greedy(from, tiles.columns, count, nm, memory, out + at, tiles.columns);
    uint8_t* bytes = static_cast<uint8_t*>(memory) + sorted;
    kernels.greedy(from, tiles.columns, count, nm, memory, bytes, width);
    for (int64_t i = 0; i < m; ++i) pack(bytes + i * width, width, out + (row * m + i) * bits_stride + first * m / 8);
  });
}

at::Tensor nm_transposable_mask(const at::Tensor& scores, int64_t n, int64_t m, bool magnitude, bool packed,
                                bool is_exact) {
  const NM nm = check_nm_transposable(scores, n, m, magnitude, is_exact);
  const at::Tensor out = empty_mask(scores, packed), target = contiguous_target(out);
  if (out.numel() == 0) return out;
  const at::Tensor dense = scores.contiguous();
  const Tiles tiles(dense, m);
  use_huge_pages(target);
  uint8_t* to = static_cast<uint8_t*>(target.mutable_data_ptr());
  dispatch_storage(scores.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(dense.const_data_ptr());
    is_exact ? exact(from, tiles, magnitude, packed, to) : greedy(from, tiles, nm, packed, to);
  });
  return finish(target, out);
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) { m.impl("nm_transposable_mask", &nm_transposable_mask); }

}  // namespace
}  // namespace pyrx::cpu
