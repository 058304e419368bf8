// The arguments of the compressed N:M ops and their checks, shared by the CPU and CUDA entries, with the texts of
// pyrx/ops/nm_packed.py.
#pragma once

#include "kernels/nm_packed.h"
#include "nm_checks.h"

namespace pyrx {

inline void check_nm_compress(const at::Tensor& weight, const at::Tensor& bits, int64_t n, int64_t m) {
  constexpr std::string_view op = "nm_compress";
  check_float(op, "weight", weight);
  check_nm(op, n, m, true);
  PYRX_CHECK_VALUE(weight.dim() > 0 && weight.size(-1) % m == 0, op, "weight",
                   "of a size along the last dimension that m = " + text(m) + " divides", weight.sizes());
  check_bits(op, "bits", bits, weight);
}

// A compressed weight (..., C / m * n).
inline void check_packed_weight(std::string_view op, const at::Tensor& values, const at::Tensor& indices, int64_t n,
                                int64_t m) {
  check_float(op, "values", values);
  check_nm(op, n, m, true);
  PYRX_CHECK_VALUE(values.dim() > 0 && values.size(-1) % n == 0, op, "values",
                   "of a size along the last dimension that n = " + text(n) + " divides", values.sizes());
  check_dtype(op, "indices", indices, at::kByte);
  check_shape(op, "indices", indices, "of the values", values.sizes());
  check_device(op, "indices", indices, values.device());
}

inline void check_nm_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                            const std::optional<at::Tensor>& bias, int64_t n, int64_t m) {
  constexpr std::string_view op = "nm_linear";
  check_packed_weight(op, values, indices, n, m);
  PYRX_CHECK_VALUE(values.dim() == 2, op, "values", "of shape [R, C / m * n]", values.sizes());
  const int64_t columns = values.size(1) / n * m;
  check_dtype(op, "x", x, values.scalar_type());
  PYRX_CHECK_VALUE(x.dim() > 0 && x.size(-1) == columns, op, "x", "of shape [..., C] with C = " + text(columns),
                   x.sizes());
  check_device(op, "x", x, values.device());
  check_vector(op, "bias", bias, values.scalar_type(), "[R]", values.size(0), values.device());
}

// The shape of a weight's values, or back.
inline std::vector<int64_t> regrouped(at::IntArrayRef shape, int64_t from, int64_t to) {
  std::vector<int64_t> found = shape.vec();
  found.back() = found.back() / from * to;
  return found;
}

inline std::vector<int64_t> linear_shape(const at::Tensor& x, const at::Tensor& values) {
  std::vector<int64_t> found = x.sizes().vec();
  found.back() = values.size(0);
  return found;
}

}  // namespace pyrx
