// The optimizer steps of weights under N:M masks: the arithmetic of one element. No torch headers.
//
// Masks are made of the updated weights, so a weight has the same bits on every backend: each product, sum, quotient and
// root is rounded alone, in the order below, in A: float64 for float64, else float32. What a step reads of weight,
// gradient and moments is widened to A, what it writes is rounded once, at the end; a step goes on with its own moments
// before they are rounded. Scalars are float64 until they are rounded to A.
#pragma once

#include <cmath>

#include "kernels/nm_sparsity.h"
#include "kernels/random.h"

namespace pyrx {

// What becomes of the weights that the mask does not keep.
enum Rule : int64_t {
  kHold,   // they and their moments do not move
  kSrSte,  // their gradient gets strength * weight, then they move as the others
  kDense   // they move as the others
};

// base^exponent in float64, by squaring from the lowest bit.
PYRX_HOST_DEVICE double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result = mul(result, base);
    base = mul(base, base);
  }
  return result;
}

// What optimizers have in common.
struct UpdateOptions {
  Rule rule;
  bool maximize;
  double strength;  // of SR-STE
  double lr;        // unless a tensor holds it
};

struct AdamWOptions : UpdateOptions {
  double beta1, beta2, eps, weight_decay;
};

struct SGDOptions : UpdateOptions {
  double momentum, dampening, weight_decay;  // without momentum there are no buffers
  bool nesterov;
};

// The scalars of one step of one tensor.
template <typename A>
struct AdamWStep {
  A strength, decay, beta1, rest1, beta2, rest2, step_size, inverse_root, eps;
  Rule rule;
  bool maximize;
  bool near;  // whether the first moment stays nearer to itself than to the gradient
};

// `step` counts from 1, at most 2^24: it is a float32 tensor's.
template <typename A>
PYRX_HOST_DEVICE AdamWStep<A> adamw_step(const AdamWOptions& options, double lr, float step) {
  const int64_t count = static_cast<int64_t>(step);
  const double rest1 = 1 - options.beta1;
  return {static_cast<A>(options.strength),
          static_cast<A>(1 - mul(lr, options.weight_decay)),
          static_cast<A>(options.beta1),
          static_cast<A>(rest1),
          static_cast<A>(options.beta2),
          static_cast<A>(1 - options.beta2),
          static_cast<A>(lr / (1 - power(options.beta1, count))),
          static_cast<A>(1 / std::sqrt(1 - power(options.beta2, count))),
          static_cast<A>(options.eps),
          options.rule,
          options.maximize,
          rest1 < 0.5};
}

template <typename A>
struct SGDStep {
  A strength, lr, momentum, rest, weight_decay;
  Rule rule;
  bool maximize, nesterov, has_momentum, has_decay;
};

template <typename A>
PYRX_HOST_DEVICE SGDStep<A> sgd_step(const SGDOptions& options, double lr) {
  return {static_cast<A>(options.strength),
          static_cast<A>(lr),
          static_cast<A>(options.momentum),
          static_cast<A>(1 - options.dampening),
          static_cast<A>(options.weight_decay),
          options.rule,
          options.maximize,
          options.nesterov,
          options.momentum != 0,
          options.weight_decay != 0};
}

template <typename A>
struct AdamWElement {
  A weight, exp_avg, exp_avg_sq;
};

template <typename A>
struct SGDElement {
  A weight, momentum;
};

// The gradient that the rule makes of one.
template <typename A, typename Step>
PYRX_HOST_DEVICE A ruled_gradient(const Step& step, A gradient, A weight, bool kept) {
  if (step.maximize) gradient = -gradient;
  return step.rule == kSrSte && !kept ? gradient + mul(step.strength, weight) : gradient;
}

// AdamW (Loshchilov and Hutter 2019), in the order of torch.optim.AdamW: decay, lerp, addcmul, addcdiv.
template <typename A>
PYRX_HOST_DEVICE AdamWElement<A> adamw(const AdamWStep<A>& step, AdamWElement<A> old, A gradient, bool kept) {
  if (step.rule == kHold && !kept) return old;
  const A g = ruled_gradient(step, gradient, old.weight, kept);
  // old + rest1 * away or g - beta1 * away, without a branch
  const A from = step.near ? old.exp_avg : g, slope = step.near ? step.rest1 : -step.beta1;
  const A exp_avg = from + mul(slope, g - old.exp_avg);
  const A exp_avg_sq = mul(step.beta2, old.exp_avg_sq) + mul(mul(step.rest2, g), g);
  const A root = mul(std::sqrt(exp_avg_sq), step.inverse_root) + step.eps;
  return {mul(step.decay, old.weight) - mul(step.step_size, exp_avg) / root, exp_avg, exp_avg_sq};
}

// SGD, in the order of torch.optim.SGD. A new buffer is 0 and its first step has no dampening.
template <typename A>
PYRX_HOST_DEVICE SGDElement<A> sgd(const SGDStep<A>& step, SGDElement<A> old, A gradient, bool kept) {
  if (step.rule == kHold && !kept) return old;
  A g = ruled_gradient(step, gradient, old.weight, kept);
  if (step.has_decay) g = g + mul(step.weight_decay, old.weight);
  A momentum = old.momentum;
  if (step.has_momentum) {
    momentum = mul(step.momentum, old.momentum) + mul(step.rest, g);
    g = step.nesterov ? g + mul(step.momentum, momentum) : momentum;
  }
  return {old.weight - mul(step.lr, g), momentum};
}

}  // namespace pyrx
