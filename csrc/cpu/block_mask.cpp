// Lists of a mask's blocks, and the choice of blocks by score, on the CPU.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "block_mask_checks.h"
#include "cpu/isa.h"
#include "cpu/pages.h"

namespace pyrx::cpu {

struct KeyBounds {
  uint32_t low, high;
  uint64_t total;  // of the units
};

struct SelectKernels {
  // One row of n > 0 scores, by *count or, where that is null, by mass; keys and units have room for n.
  void (*row)(const float* scores, int64_t n, const int32_t* count, double mass, uint32_t* keys, uint64_t* units,
              uint8_t* out);
};

}  // namespace pyrx::cpu

#define PYRX_KERNELS "cpu/block_mask.inl"
#include "cpu/each_isa.inl"

namespace pyrx::cpu {
namespace {

const SelectKernels& select_kernels() { PYRX_PICK(select_table()) }

constexpr int64_t kPanel = 64;    // columns, a byte each, that are looked at together
constexpr int64_t kTask = 32768;  // blocks

// Bit i of the result: whether byte i of the first n <= 64 is set.
inline uint64_t bits_of_bytes(const uint8_t* bytes, int64_t n) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t word = 0;
    n - i >= 8 ? std::memcpy(&word, bytes + i, 8) : std::memcpy(&word, bytes + i, static_cast<size_t>(n - i));
    bits |= ((word & 0x0101010101010101u) * 0x0102040810204080u >> 56) << i;
  }
  return bits;
}

// f(i) for the bytes i of n that are set, in ascending order.
template <typename F>
inline void each_set(const uint8_t* bytes, int64_t n, F f) {
  for (int64_t i = 0; i < n; i += kPanel)
    for (uint64_t bits = bits_of_bytes(bytes + i, std::min(kPanel, n - i)); bits != 0; bits &= bits - 1)
      f(i + std::countr_zero(bits));
}

void list_row(const uint8_t* blocks, int64_t columns, int64_t width, int32_t* count, int32_t* indices) {
  int64_t found = 0;
  each_set(blocks, columns, [&](int64_t column) {
    if (found < width) indices[found++] = static_cast<int32_t>(column);
  });
  *count = static_cast<int32_t>(found);
  std::fill(indices + found, indices + width, 0);
}

// Columns first .. first + n - 1, n <= kPanel, of blocks (rows, columns).
void list_columns(const uint8_t* blocks, const BlockGrid& grid, int64_t first, int64_t n, int32_t* counts,
                  int32_t* indices) {
  int64_t found[kPanel] = {};
  int32_t* lists = indices + first * grid.q_width;
  for (int64_t row = 0; row < grid.rows; ++row)
    each_set(blocks + row * grid.columns + first, n, [&](int64_t column) {
      if (found[column] < grid.q_width) lists[column * grid.q_width + found[column]++] = static_cast<int32_t>(row);
    });
  for (int64_t column = 0; column < n; ++column) {
    counts[first + column] = static_cast<int32_t>(found[column]);
    std::fill(lists + column * grid.q_width + found[column], lists + (column + 1) * grid.q_width, 0);
  }
}

ListResults block_lists(const at::Tensor& blocks, int64_t kv_width, int64_t q_width) {
  const BlockGrid grid = check_block_lists(blocks, kv_width, q_width);
  const auto results = list_results(blocks, grid);
  const auto& [kv_counts, kv_indices, q_counts, q_indices] = results;
  use_huge_pages(kv_indices);
  use_huge_pages(q_indices);
  const at::Tensor dense = blocks.contiguous();
  const uint8_t* from = static_cast<const uint8_t*>(dense.const_data_ptr());
  int32_t *row_counts = kv_counts.mutable_data_ptr<int32_t>(), *row_lists = kv_indices.mutable_data_ptr<int32_t>();
  int32_t *column_counts = q_counts.mutable_data_ptr<int32_t>(), *column_lists = q_indices.mutable_data_ptr<int32_t>();
  const int64_t all_rows = grid.masks * grid.rows, panels = (grid.columns + kPanel - 1) / kPanel;
  at::parallel_for(0, all_rows, std::max<int64_t>(1, kTask / std::max<int64_t>(1, grid.columns)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row)
                       list_row(from + row * grid.columns, grid.columns, grid.kv_width, row_counts + row,
                                row_lists + row * grid.kv_width);
                   });
  at::parallel_for(0, grid.masks * panels, std::max<int64_t>(1, kTask / std::max<int64_t>(1, grid.rows * kPanel)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t task = begin; task < end; ++task) {
                       const int64_t mask = task / panels, first = task % panels * kPanel;
                       list_columns(from + mask * grid.rows * grid.columns, grid, first,
                                    std::min(kPanel, grid.columns - first), column_counts + mask * grid.columns,
                                    column_lists + mask * grid.columns * grid.q_width);
                     }
                   });
  return results;
}

at::Tensor select_blocks(const at::Tensor& scores, const std::optional<at::Tensor>& count, double mass,
                         const std::optional<at::Tensor>& always) {
  check_select_blocks(scores, count, mass, always);
  const at::Tensor out = at::empty(scores.sizes(), scores.options().dtype(at::kBool));
  if (out.numel() == 0) return out;
  const int64_t heads = scores.size(1), rows = scores.size(2), columns = scores.size(3);
  const at::Tensor dense = scores.contiguous();
  const at::Tensor counts = count ? count->expand({scores.size(0), heads, rows}) : at::Tensor();
  const at::Tensor kept = always ? always->expand(scores.sizes()) : at::Tensor();
  const float* from = dense.const_data_ptr<float>();
  uint8_t* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const auto& kernels = select_kernels();
  const int64_t grain = std::max<int64_t>(1, kTask / 16 / columns);
  at::parallel_for(0, out.numel() / columns, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> keys(columns);
    std::vector<uint64_t> units(count ? 0 : columns);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / rows / heads, h = row / rows % heads, i = row % rows;
      const int32_t* wanted = nullptr;
      if (count)
        wanted = counts.const_data_ptr<int32_t>() + b * counts.stride(0) + h * counts.stride(1) + i * counts.stride(2);
      uint8_t* own = to + row * columns;
      kernels.row(from + row * columns, columns, wanted, mass, keys.data(), units.data(), own);
      if (!always) continue;
      const uint8_t* forced = static_cast<const uint8_t*>(kept.const_data_ptr()) + b * kept.stride(0) +
                              h * kept.stride(1) + i * kept.stride(2);
      for (int64_t j = 0; j < columns; ++j) own[j] |= forced[j * kept.stride(3)] != 0;
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) {
  m.impl("block_lists", &block_lists);
  m.impl("select_blocks", &select_blocks);
}

}  // namespace
}  // namespace pyrx::cpu
