// Tiles of library GEMMs (oneDNN's brgemm through ATen) over packed operands.
#pragma once

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/simd.h"

namespace pyrx::cpu {

constexpr int64_t kPanel = 64;    // columns of a packed panel: (depth, 64) fits the first-level cache in slices
constexpr int64_t kDepth = 512;   // depth of one multiplication
constexpr int64_t kRound = 16;    // panels, rows and leading dimensions are padded to this

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
// The size of as few parts of n as are of at most `most`, all but the last the same.
inline int64_t even_share(int64_t n, int64_t most) {
  const int64_t parts = std::max<int64_t>(1, (n + most - 1) / most);
  return std::max<int64_t>(1, (n + parts - 1) / parts);
}

// 16-bit operands: depth in pairs, (depth / 2, columns, 2).
template <typename G>
constexpr int64_t pairing = sizeof(G) == 2 ? 2 : 1;

// Whether this processor has matrix units (tiles) for operands of a 16-bit type.
inline bool native_half(at::ScalarType dtype) { return at::native::cpublas::could_pack(dtype); }

// c (m, n) = a (m, k) b (k, n), or += where `add`; b in the layout of its type, k even for 16-bit types.
inline void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                     int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
}
inline void multiply(int64_t m, int64_t n, int64_t k, const bfloat16* a, int64_t lda, const bfloat16* b, int64_t ldb,
                     float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c, true);
}
inline void multiply(int64_t m, int64_t n, int64_t k, const float16* a, int64_t lda, const float16* b, int64_t ldb,
                     float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const at::Half*>(a),
                              reinterpret_cast<const at::Half*>(b), c, true);
}
inline void multiply(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb,
                     double* c, int64_t ldc, bool add) {
  const auto view = [](const double* p, int64_t rows, int64_t columns, int64_t stride) {
    return at::from_blob(const_cast<double*>(p), {rows, columns}, {stride, 1}, at::kDouble);
  };
  at::Tensor out = view(c, m, n, ldc);
  at::addmm_out(out, out, view(a, m, k, lda), view(b, k, n, ldb), add ? 1 : 0, 1);
}

// Whether brgemm multiplies operands of a 16-bit type faster than float32: on matrix units (native_half), and bfloat16 by
// AVX-512's dot products too, which ATen has no question for.
inline bool multiplies_half(at::ScalarType dtype) {
  static const bool dot_products = [] {
#ifdef PYRX_X86
    if (isa() != Isa::avx512 || !__builtin_cpu_supports("avx512bf16")) return false;
    const bfloat16 zeros[2 * kRound] = {};
    float out[kRound];
    try {
      multiply(1, kRound, 2, zeros, 2, zeros, kRound, out, kRound, false);
      return true;
    } catch (const c10::Error&) {  // oneDNN is switched off or held to less
    }
#endif
    return false;
  }();
  return native_half(dtype) || (dtype == at::kBFloat16 && dot_products);
}

// f(a value of the type that GEMMs take T's operands in): T itself, or float32 for a 16-bit type that they do not take.
template <typename T, typename F>
void dispatch_operand(at::ScalarType dtype, F f) {
  if constexpr (sizeof(T) == 2) {
    if (multiplies_half(dtype)) return f(T());
  }
  f(accumulate_t<T>());
}

// A (depth, columns) operand in panels of 64 columns (the last one narrower, a multiple of 16), each (depth, width)
// and contiguous, the depth padded to even for 16-bit types.
template <typename G>
struct Panels {
  G* data;
  int64_t depth, columns;  // padded

  Panels(G* data, int64_t depth, int64_t columns)
      : data(data), depth(round_up(depth, pairing<G>)), columns(round_up(columns, kRound)) {}
  int64_t count() const { return (columns + kPanel - 1) / kPanel; }
  int64_t width(int64_t panel) const { return std::min(kPanel, columns - panel * kPanel); }
  G* panel(int64_t index) const { return data + index * kPanel * depth; }

  static int64_t elements(int64_t depth, int64_t columns) {
    return round_up(depth, pairing<G>) * round_up(columns, kRound);
  }
};

// c (rows, panels first .. last) (+)= a (rows, depth `from` .. `from + k`) * the panels' same depth.
template <typename G>
void multiply_panels(int64_t rows, const G* a, int64_t lda, const Panels<G>& b, int64_t first, int64_t last, int64_t from,
                     int64_t k, accumulate_t<G>* c, int64_t ldc, bool add) {
  for (int64_t p = first; p < last; ++p) {
    const int64_t width = b.width(p);
    multiply(rows, width, k, a, lda, b.panel(p) + from * width, width, c + (p - first) * kPanel, ldc, add);
  }
}

}  // namespace pyrx::cpu
