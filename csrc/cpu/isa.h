// Which instruction sets this processor has. A file of kernels is compiled once for each and picked from at run time.
#pragma once

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__) && defined(__GNUC__)
#define PYRX_X86 1
#include <cpuid.h>
#include <immintrin.h>

// Of AVX-512's bfloat16 dot products, beside the target of a set's namespace, which clang replaces and gcc adds to.
#ifdef __clang__
#define PYRX_BF16 __attribute__((target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#else
#define PYRX_BF16 __attribute__((target("avx512bf16")))
#endif
#endif

namespace pyrx::cpu {

enum class Isa { plain, avx2, avx512 };

#ifdef PYRX_X86
// Half precision: a name that __builtin_cpu_supports of older clang does not know.
inline bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

inline Isa detect_isa() {
#ifdef PYRX_X86
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view allowed = limit ? limit : "";
  if (allowed == "default") return Isa::plain;
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        has_f16c() && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && allowed != "avx2") return Isa::avx512;
  if (has_avx2) return Isa::avx2;
#endif
  return Isa::plain;
}

// This processor's, less what ATEN_CPU_CAPABILITY forbids.
inline Isa isa() {
  static const Isa found = detect_isa();
  return found;
}

}  // namespace pyrx::cpu

#ifdef PYRX_X86
#define PYRX_PICK(...)                                     \
  switch (isa()) {                                         \
    case Isa::avx512: { static constexpr auto table = avx512::__VA_ARGS__; return table; } \
    case Isa::avx2: { static constexpr auto table = avx2::__VA_ARGS__; return table; }     \
    default: { static constexpr auto table = plain::__VA_ARGS__; return table; }           \
  }
#else
#define PYRX_PICK(...) \
  static constexpr auto table = plain::__VA_ARGS__; \
  return table;
#endif
