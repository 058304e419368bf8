// The arguments of nm_transposable_mask and their checks, shared by the CPU and CUDA entries, with the texts of
// pyrx/ops/nm_transposable.py.
#pragma once

#include "kernels/nm_transposable.h"
#include "nm_checks.h"

namespace pyrx {

inline NM check_nm_transposable(const at::Tensor& scores, int64_t n, int64_t m, bool magnitude, bool exact) {
  const std::string_view op = "nm_transposable_mask";
  check_float(op, "scores", scores);
  const NM nm = check_nm(op, n, m, magnitude);
  PYRX_CHECK_VALUE(!exact || (n == 2 && m == kExactTile), op, "n:m", "2:4 for method 'exact'", text(n) + ":" + text(m));
  const int64_t dim = scores.dim();
  PYRX_CHECK_VALUE(dim >= 2, op, "scores", "of at least two dimensions", scores.sizes());
  PYRX_CHECK_VALUE(scores.size(dim - 2) % m == 0 && scores.size(dim - 1) % m == 0, op, "scores",
                   "of last two sizes that m = " + text(m) + " divides", scores.sizes());
  return nm;
}

inline at::Tensor empty_mask(const at::Tensor& scores, bool packed) {
  return packed ? empty_bits(scores) : at::empty_like(scores, scores.options().dtype(at::kBool));
}

}  // namespace pyrx
