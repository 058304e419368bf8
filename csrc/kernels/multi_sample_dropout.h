// The multi-sample dropout head's arithmetic that every compiled backend shares.
#pragma once

#include <cstdint>

#include "kernels/dropout.h"
#include "kernels/mixed_cross_entropy.h"

namespace pyrx {

// Which masked copies of an input row go through the GEMMs, its "GEMM rows".
//
// Independent: one a sample. combine = "logits": one, the input under the mean of the masks (M + 1 levels).
// Antithetic pairs with every threshold at 32768 (p = 0.5) are complementary, x o m' = x - x o m, so sample 2j + 1 needs
// no GEMM of its own: rows 0 .. ceil(M/2) - 1 are the even samples' and the last row is x itself, unmasked.
struct SamplePlan {
  int64_t samples;    // M
  int64_t gemm_rows;  // per input row
  bool paired;        // odd samples come from the unmasked row
  bool averaged;      // combine = "logits"

  // Sample whose mask GEMM row k has, or -1: unmasked.
  PYRX_HOST_DEVICE int64_t mask_of(int64_t k) const { return !paired ? k : k == gemm_rows - 1 ? -1 : 2 * k; }
};

PYRX_HOST_DEVICE SamplePlan sample_plan(const int64_t* thresholds, int64_t samples, bool antithetic, bool combine_logits) {
  if (combine_logits) return {samples, 1, false, true};
  bool halves = antithetic && samples > 2;  // two samples cost two GEMM rows either way
  for (int64_t m = 0; m < samples; ++m) halves = halves && thresholds[m] == 32768;
  return {samples, halves ? (samples + 1) / 2 + 1 : samples, halves, false};
}

}  // namespace pyrx
