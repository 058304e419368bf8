// What the tests of CPU kernels share; included after the kernels themselves.
#pragma once

#include "cpu/isa.h"
#include "cuda_test.h"

// As float64, by plain arithmetic, whatever the set under test does.
template <typename T>
double value(T x) {
  return pyrx::cpu::plain::widen(x);
}

// TEST(set) with the namespace of every instruction set this machine has.
#ifdef PYRX_X86
#define FOR_EACH_SET(TEST)                                      \
  {                                                             \
    const pyrx::cpu::Isa best = pyrx::cpu::detect_isa();        \
    TEST(plain)                                                 \
    if (best != pyrx::cpu::Isa::plain) { TEST(avx2) }           \
    if (best == pyrx::cpu::Isa::avx512) { TEST(avx512) }        \
  }
#else
#define FOR_EACH_SET(TEST) { TEST(plain) }
#endif
