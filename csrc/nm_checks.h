// The arguments of the N:M ops and their checks, shared by the CPU and CUDA entries, with the texts of pyrx/ops.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <optional>
#include <tuple>
#include <vector>

#include "kernels/nm_sparsity.h"
#include "layout.h"
#include "tensor_checks.h"

namespace pyrx {

inline NM check_nm(std::string_view op, int64_t n, int64_t m, bool magnitude) {
  PYRX_CHECK_VALUE(m >= 1 && m <= kMostGroup, op, "m", "in [1, 128]", m);
  PYRX_CHECK_VALUE(n >= 1 && n <= m, op, "n", "in [1, " + text(m) + "]", n);
  return {static_cast<int>(n), static_cast<int>(m), magnitude};
}

inline void check_groups(std::string_view op, std::string_view argument, const at::Tensor& value, int64_t m, int64_t dim,
                         bool pad) {
  PYRX_CHECK_VALUE(value.dim() > 0, op, argument, "of at least one dimension", value.sizes());
  PYRX_CHECK_VALUE(dim >= 0 && dim < value.dim(), op, "dim", "in [0, " + text(value.dim() - 1) + "]", dim);
  PYRX_CHECK_VALUE(pad || value.size(dim) % m == 0, op, argument,
                   "of a size along dimension " + text(dim) + " that m = " + text(m) + " divides (or pad=True)",
                   value.sizes());
}

inline int64_t bytes_of(int64_t bits) { return (bits + 7) / 8; }

// The shape of a mask's bits, eight to a byte along the last dimension.
inline std::vector<int64_t> packed_shape(at::IntArrayRef shape) {
  std::vector<int64_t> packed = shape.vec();
  packed.back() = bytes_of(packed.back());
  return packed;
}

inline at::Tensor empty_bits(const at::Tensor& like) {
  return at::empty(packed_shape(like.sizes()), like.options().dtype(at::kByte));
}

inline void check_bits(std::string_view op, std::string_view argument, const at::Tensor& bits, const at::Tensor& like) {
  check_dtype(op, argument, bits, at::kByte);
  check_shape(op, argument, bits, "[..., ceil(D / 8)]", packed_shape(like.sizes()));
  check_device(op, argument, bits, like.device());
}

inline void check_factor(std::string_view op, std::string_view argument, const std::optional<at::Tensor>& factor,
                         at::Device device) {
  if (!factor) return;
  check_dtype(op, argument, *factor, at::kDouble);
  check_device(op, argument, *factor, device);
  PYRX_CHECK_VALUE(factor->numel() == 1, op, argument, "of one element", factor->sizes());
}

// A dense tensor as its groups lie in it: (outer, length, inner), groups along `length`.
struct GroupLayout {
  int64_t outer = 1, length = 1, inner = 1;
};

inline GroupLayout group_layout(at::IntArrayRef shape, int64_t dim) {
  GroupLayout found;
  for (int64_t i = 0; i < static_cast<int64_t>(shape.size()); ++i)
    (i < dim ? found.outer : i == dim ? found.length : found.inner) *= shape[i];
  return found;
}

inline NM check_nm_mask(const at::Tensor& scores, int64_t n, int64_t m, int64_t dim, bool magnitude, bool pad) {
  check_float("nm_mask", "scores", scores);
  const NM nm = check_nm("nm_mask", n, m, magnitude);
  check_groups("nm_mask", "scores", scores, m, dim, pad);
  return nm;
}

// What the forward makes of dropped elements, by estimator: ste, sr-ste, mdgf, mdgf-scaled, hard.
constexpr Dropped kForward[] = {kZero, kZero, kFactor, kFactor, kZero};

inline NM check_nm_sparsify(const at::Tensor& weight, const std::optional<at::Tensor>& scores,
                            const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& decay, int64_t n,
                            int64_t m, int64_t dim, bool magnitude, bool pad, int64_t estimator) {
  const std::string_view op = "nm_sparsify";
  check_float(op, "weight", weight);
  const NM nm = check_nm(op, n, m, magnitude);
  PYRX_CHECK_VALUE(estimator >= 0 && estimator < 5, op, "estimator", "in [0, 4]", estimator);
  check_groups(op, "weight", weight, m, dim, pad);
  if (scores) {
    check_float(op, "scores", *scores);
    check_shape(op, "scores", *scores, "of the weight", weight.sizes());
    check_device(op, "scores", *scores, weight.device());
    PYRX_CHECK_VALUE(!mask, op, "at most one of scores", "and mask", "both");
  }
  if (mask) check_bits(op, "mask", *mask, weight);
  PYRX_CHECK_VALUE(decay.has_value() == (kForward[estimator] == kFactor), op, "decay",
                   "for the estimators mdgf and mdgf-scaled alone", decay ? "a Tensor" : "None");
  check_factor(op, "decay", decay, weight.device());
  return nm;
}

inline void check_nm_apply(const at::Tensor& x, const at::Tensor& bits, int64_t dropped,
                           const std::optional<at::Tensor>& factor, const std::optional<at::Tensor>& weight) {
  const std::string_view op = "nm_apply";
  check_float(op, "x", x);
  PYRX_CHECK_VALUE(x.dim() > 0, op, "x", "of at least one dimension", x.sizes());
  check_bits(op, "bits", bits, x);
  PYRX_CHECK_VALUE(dropped >= kZero && dropped <= kRegularize, op, "dropped", "in [0, 2]", dropped);
  PYRX_CHECK_VALUE(factor.has_value() == (dropped == kFactor), op, "factor", "for dropped = 1 alone",
                   factor ? "a Tensor" : "None");
  check_factor(op, "factor", factor, x.device());
  PYRX_CHECK_VALUE(weight.has_value() == (dropped == kRegularize), op, "weight", "for dropped = 2 alone",
                   weight ? "a Tensor" : "None");
  if (!weight) return;
  check_dtype(op, "weight", *weight, x.scalar_type());
  check_shape(op, "weight", *weight, "of x", x.sizes());
  check_device(op, "weight", *weight, x.device());
}

}  // namespace pyrx
