// Dropout and its masks on the CPU.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu/elements.h"
#include "cpu/pages.h"
#include "head_checks.h"

namespace pyrx::cpu {
namespace {

at::Tensor dropout_mask(const at::Tensor& seed, at::IntArrayRef shape, int64_t threshold, int64_t sample, bool antithetic,
                        bool packed) {
  check_seed("dropout_mask", seed, seed.device());
  check_mask("dropout_mask", threshold, sample);
  check_packed("dropout_mask", shape, packed);
  const uint64_t key = seed_value(seed);
  const SampleMask mask = sample_mask(sample, threshold, antithetic);
  if (!packed) {
    const at::Tensor out = at::empty(shape, seed.options().dtype(at::kBool));
    use_huge_pages(out);
    uint8_t* bytes = static_cast<uint8_t*>(out.data_ptr());
    for_chunks(out.numel(), [&](int64_t first, int64_t n, uint8_t* bits) {
      row_bits(key, mask, static_cast<uint64_t>(first), n, nullptr, bits);
      for (int64_t i = 0; i < n; ++i) bytes[first + i] = bits[i / 8] >> i % 8 & 1;
    });
    return out;
  }
  const int64_t columns = shape.back(), row_bytes = (columns + 7) / 8;
  std::vector<int64_t> sizes = shape.vec();
  sizes.back() = row_bytes;
  const at::Tensor out = at::empty(sizes, seed.options().dtype(at::kByte));
  use_huge_pages(out);
  const int64_t rows = row_bytes == 0 ? 0 : out.numel() / row_bytes;
  at::parallel_for(0, rows, std::max<int64_t>(1, kChunk / std::max<int64_t>(columns, 1)), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> scratch(row_bytes + 2);
    for (int64_t row = begin; row < end; ++row)
      row_bits(key, mask, static_cast<uint64_t>(row * columns), columns, scratch.data(),
               out.data_ptr<uint8_t>() + row * row_bytes);
  });
  return out;
}

at::Tensor dropout(const at::Tensor& input, const at::Tensor& seed, int64_t threshold, int64_t sample) {
  check_float("dropout", "input", input);
  check_seed("dropout", seed, input.device());
  check_mask("dropout", threshold, sample);
  const at::Tensor x = input.contiguous();
  const at::Tensor out = at::empty_like(input), y = contiguous_target(out);
  use_huge_pages(y);
  const uint64_t key = seed_value(seed);
  const SampleMask mask = sample_mask(sample, threshold, false);
  dispatch_storage(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    const auto& kernels = element_kernels<T>();
    for_chunks(x.numel(), [&](int64_t first, int64_t n, uint8_t* bits) {
      row_bits(key, mask, static_cast<uint64_t>(first), n, nullptr, bits);
      kernels.dropout(from + first, bits, n, keep_scale<accumulate_t<T>>(threshold), to + first);
    });
  });
  return finish(y, out);
}

TORCH_LIBRARY_IMPL(pyrx, CPU, m) {
  m.impl("dropout_mask", &dropout_mask);
  m.impl("dropout", &dropout);
}

}  // namespace
}  // namespace pyrx::cpu
