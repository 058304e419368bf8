"""Optimizer steps of weights under N:M masks, the arithmetic that csrc/kernels/masked_update.h defines.

Every product, sum, quotient and root is a tensor operation of its own, so that each is rounded alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor

from pyrx._checks import accumulation_dtype
from pyrx.reference import random
from pyrx.reference.dropout import unpack_bits
from pyrx.reference.nm_sparsity import nm_mask

HOLD, SR_STE, DENSE = range(3)
RULES = ("hold", "sr-ste", "dense")


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded, of any x: of x >= 0 PyTorch's may be a unit in the last place off on a CPU."""
    if x.dtype == torch.float32:
        # the roots of float32 numbers stay further from what lies between two of them than float64's error
        return torch.sqrt(x.double()).float()
    small = x < 2.0**-500  # where products of halves of the root underflow
    root = random.sqrt(torch.where(small, x * 2.0**512, x))
    return torch.where(small, root * 2.0**-256, root)


def power(base: float, exponent: Tensor) -> Tensor:
    """base**exponent in float64, by squaring from the lowest bit; exponent an int64 tensor below 2**31."""
    result = torch.ones((), dtype=torch.float64, device=exponent.device)
    square = torch.full_like(result, base)
    for _ in range(31):
        result = torch.where(exponent & 1 == 1, result * square, result)
        square = square * square
        exponent = exponent >> 1
    return result


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=like.device)


def _learning_rate(lr: float, lr_tensor: Tensor | None, like: Tensor) -> Tensor:
    return _scalar(lr, like) if lr_tensor is None else lr_tensor.reshape(())


def _gradient(grad: Tensor, weight: Tensor, kept: Tensor, rule: int, strength: float, maximize: bool) -> Tensor:
    """Of weight's dtype, which is that of the arithmetic."""
    g = -grad.to(weight.dtype) if maximize else grad.to(weight.dtype)
    if rule != SR_STE:
        return g
    return torch.where(kept, g, g + _scalar(strength, weight).to(weight.dtype) * weight)


def _write(target: Tensor, value: Tensor, moves: Tensor) -> None:
    target.copy_(torch.where(moves, value.to(target.dtype), target))


def masked_adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masks: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr_tensor: Tensor | None,
    n: int,
    m: int,
    dim: int,
    magnitude: bool,
    rule: int,
    strength: float,
    refresh: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    for weight, grad, exp_avg, exp_avg_sq, mask, step in zip(
        weights, grads, exp_avgs, exp_avg_sqs, masks, steps, strict=True
    ):
        accumulate = accumulation_dtype(weight.dtype)
        rate, count, one = _learning_rate(lr, lr_tensor, weight), step.reshape(()).long(), _scalar(1.0, weight)
        step_size = (rate / (one - power(beta1, count))).to(accumulate)
        inverse_root = (one / sqrt(one - power(beta2, count))).to(accumulate)
        decay = (one - rate * _scalar(weight_decay, weight)).to(accumulate)
        of_beta1, rest1, of_beta2, rest2, of_eps = (
            _scalar(each, weight).to(accumulate) for each in (beta1, 1 - beta1, beta2, 1 - beta2, eps)
        )

        old, moment, square = (each.to(accumulate) for each in (weight, exp_avg, exp_avg_sq))
        kept = unpack_bits(mask, weight.shape[-1])
        g = _gradient(grad, old, kept, rule, strength, maximize)
        away = g - moment
        moment = moment + rest1 * away if 1 - beta1 < 0.5 else g - of_beta1 * away
        square = of_beta2 * square + rest2 * g * g
        root = sqrt(square) * inverse_root + of_eps
        moves = kept if rule == HOLD else torch.ones_like(kept)
        _write(weight, decay * old - step_size * moment / root, moves)
        _write(exp_avg, moment, moves)
        _write(exp_avg_sq, square, moves)
        if refresh:
            mask.copy_(nm_mask(weight, n, m, dim % weight.dim(), magnitude, True))


def masked_sgd(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    masks: Sequence[Tensor],
    lr_tensor: Tensor | None,
    n: int,
    m: int,
    dim: int,
    magnitude: bool,
    rule: int,
    strength: float,
    refresh: bool,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    buffers = momentum_buffers if momentum != 0 else repeat(None, len(weights))
    for weight, grad, buffer, mask in zip(weights, grads, buffers, masks, strict=True):
        accumulate = accumulation_dtype(weight.dtype)
        rate = _learning_rate(lr, lr_tensor, weight).to(accumulate)
        of_momentum, rest, decay = (
            _scalar(each, weight).to(accumulate) for each in (momentum, 1 - dampening, weight_decay)
        )
        old = weight.to(accumulate)
        kept = unpack_bits(mask, weight.shape[-1])
        moves = kept if rule == HOLD else torch.ones_like(kept)
        g = _gradient(grad, old, kept, rule, strength, maximize)
        if weight_decay != 0:
            g = g + decay * old
        if buffer is not None:
            velocity = of_momentum * buffer.to(accumulate) + rest * g
            g = g + of_momentum * velocity if nesterov else velocity
            _write(buffer, velocity, moves)
        _write(weight, old - rate * g, moves)
        if refresh:
            mask.copy_(nm_mask(weight, n, m, dim % weight.dim(), magnitude, True))
