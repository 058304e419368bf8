// Targets of cross-entropy as every compiled backend reads them: a class a row, two and their shares, probabilities.
#pragma once

#include <cstdint>

#include "kernels/dropout.h"

namespace pyrx {

// A row's loss is total * lse(z) - a_coefficient * z[a] - b_coefficient * z[b] - uniform * sum_c class_weight[c] * z[c],
// its gradient total * softmax(z)[c] less the same coefficients.
template <typename T>
struct ClassTarget {
  int64_t a, b;                    // class ids; 0 with a coefficient of 0 where a component counts nothing
  T a_coefficient, b_coefficient;  // (1 - label_smoothing) * share * class weight
  T uniform;                       // label_smoothing / C * the shares that count
  T total;
  T weight;    // what the row adds to the denominator of "mean"
  bool valid;  // class ids in range; where not, every coefficient is NaN
  bool counts;  // not ignored; a row that is has loss and gradient 0, whatever its logits
};

// `lam` is class a's share, 1 where there is one class; class_weight (C,) may be null; class_weight_sum is C then.
template <typename T>
PYRX_HOST_DEVICE ClassTarget<T> class_target(int64_t a, int64_t b, T lam, const T* class_weight, T class_weight_sum,
                                             int64_t num_classes, int64_t ignore_index, T label_smoothing) {
  const bool counts_a = a != ignore_index, counts_b = b != ignore_index;
  const bool valid = (!counts_a || (a >= 0 && a < num_classes)) && (!counts_b || (b >= 0 && b < num_classes));
  if (!valid) {
    const T nan = T(0) / T(0);
    return {0, 0, nan, nan, nan, nan, nan, false, true};
  }
  const T share_a = counts_a ? lam : T(0), share_b = counts_b ? T(1) - lam : T(0);
  if (!counts_a) a = 0;
  if (!counts_b) b = 0;
  const T weight_a = class_weight ? share_a * class_weight[a] : share_a;
  const T weight_b = class_weight ? share_b * class_weight[b] : share_b;
  const T uniform = label_smoothing / T(num_classes) * (share_a + share_b);
  ClassTarget<T> target{a, b, (T(1) - label_smoothing) * weight_a, (T(1) - label_smoothing) * weight_b, uniform,
                        T(0), weight_a + weight_b, true, counts_a || counts_b};
  target.total = target.a_coefficient + target.b_coefficient + uniform * class_weight_sum;
  return target;
}

// Probability c of a dense target row with smoothing and class weight: the coefficient of (lse(z) - z[c]).
template <typename T>
PYRX_HOST_DEVICE T probability_coefficient(T probability, const T* class_weight, int64_t c, int64_t num_classes,
                                           T label_smoothing) {
  const T smoothed = (T(1) - label_smoothing) * probability + label_smoothing / T(num_classes);
  return class_weight ? smoothed * class_weight[c] : smoothed;
}

}  // namespace pyrx
