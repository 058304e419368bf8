"""Masked optimizer steps in Triton: what csrc/kernels/masked_update.h defines, operation by operation.

Where groups lie one after another and in whole bytes, a tile ranks the weights that it has just moved; elsewhere the
masks are made in a second pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrx.ops import masked_update as ops
from pyrx.reference.masked_update import HOLD, SR_STE

from .dropout import check_narrow
from .nm_sparsity import (
    WIDE,
    byte_tile,
    bytes_and_width,
    first,
    groups_in_bytes,
    pack_into,
    rank,
    rank_into,
    unpacked,
)
from .random import float64_bits, float64_of

# Bytes of a mask in a tile: no fewer elements than a program has threads, which would hold some twice and read one copy
# after the other was written.
BYTES = 128
# At most: each goes through many tiles with one step's scalars.
PROGRAMS = 2048

_HOLD: tl.constexpr = tl.constexpr(HOLD)
_SR_STE: tl.constexpr = tl.constexpr(SR_STE)

_ADAMW_VARYING = ["lr", "beta1", "beta2", "weight_decay", "eps", "strength"]
_SGD_VARYING = ["lr", "momentum", "rest", "weight_decay", "strength"]


@triton.jit
def _power(base, exponent):
    """base**exponent by squaring from the lowest bit."""
    result = base * 0 + 1
    while exponent > 0:
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def _gradient(grad, at, inside, weight, kept, strength, RULE: tl.constexpr, MAXIMIZE: tl.constexpr):
    found = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
    if MAXIMIZE:
        found = found * -1.0  # a negation of 0 would be 0 - 0
    if RULE == _SR_STE:
        found = tl.where(kept, found, found + strength * weight)
    return found


@triton.jit
def _put(target, at, inside, kept, old, value, RULE: tl.constexpr):
    """Stores the value, rounded, and returns it; the old one where it does not move."""
    value = value.to(old.dtype)
    if RULE == _HOLD:
        value = tl.where(kept, value, old)
    tl.store(target + at, value, mask=inside)
    return value


@triton.jit
def _refresh(
    bits, byte, there, weight, inside,
    N: tl.constexpr, M: tl.constexpr, MAGNITUDE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """The bits of the tile's weights, whose groups it has whole; none with N = 0."""
    if N > 0:
        step = (tl.arange(0, BYTES)[:, None] * 8 + tl.arange(0, 8)[None, :]) % M
        ranks = tl.reshape(rank(weight, step, inside, MAGNITUDE, M), (BYTES * 8 // M, M))
        pack_into(bits, byte, there, tl.reshape(first(ranks, 1, N, M).to(tl.int32), (BYTES, 8)))


# Bytes: weight, gradient and moments once, all but the gradient written, a bit an element each way. Operations: about
# 60 an element, most of them of the root and the quotient, and the ranking.
@triton.jit(do_not_specialize=_ADAMW_VARYING)
def _adamw_kernel(
    weight, grad, exp_avg, exp_avg_sq, bits, step, lr_tensor, lr, beta1, beta2, weight_decay, eps, strength, count,
    width, NEAR: tl.constexpr, RULE: tl.constexpr, MAXIMIZE: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    MAGNITUDE: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """lr, beta1, beta2 and weight_decay are the bits of float64 numbers."""
    rate = float64_of(lr)
    if lr_tensor is not None:
        rate = tl.load(lr_tensor)
    first_beta, second_beta, exponent = float64_of(beta1), float64_of(beta2), tl.load(step).to(tl.int32)
    decay = (1 - rate * float64_of(weight_decay)).to(tl.float32)
    step_size = (rate / (1 - _power(first_beta, exponent))).to(tl.float32)
    inverse_root = (1 / tl.sqrt(1 - _power(second_beta, exponent))).to(tl.float32)
    rest1, rest2 = (1 - first_beta).to(tl.float32), (1 - second_beta).to(tl.float32)
    of_beta1, of_beta2 = first_beta.to(tl.float32), second_beta.to(tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(count, BYTES), tl.num_programs(0)):
        byte, there, _, at, inside = byte_tile(block, width, count, WIDE, BYTES)
        kept = unpacked(bits, byte, there)
        old = tl.load(weight + at, mask=inside, other=0)
        moment = tl.load(exp_avg + at, mask=inside, other=0)
        square = tl.load(exp_avg_sq + at, mask=inside, other=0)
        value = old.to(tl.float32)
        g = _gradient(grad, at, inside, value, kept, strength, RULE, MAXIMIZE)
        away = g - moment.to(tl.float32)
        if NEAR:
            mean = moment.to(tl.float32) + rest1 * away
        else:
            mean = g - of_beta1 * away
        variance = of_beta2 * square.to(tl.float32) + rest2 * g * g
        root = tl.sqrt_rn(variance) * inverse_root + eps
        value = decay * value - tl.div_rn(step_size * mean, root)
        _put(exp_avg, at, inside, kept, moment, mean, RULE)
        _put(exp_avg_sq, at, inside, kept, square, variance, RULE)
        moved = _put(weight, at, inside, kept, old, value, RULE)
        _refresh(bits, byte, there, moved, inside, N, M, MAGNITUDE, BYTES)


# Bytes: as above with one moment, or none. Operations: about 10 an element, and the ranking.
@triton.jit(do_not_specialize=_SGD_VARYING)
def _sgd_kernel(
    weight, grad, buffer, bits, lr_tensor, lr, momentum, rest, weight_decay, strength, count, width,
    DECAY: tl.constexpr, NESTEROV: tl.constexpr, RULE: tl.constexpr, MAXIMIZE: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, MAGNITUDE: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    rate = lr
    if lr_tensor is not None:
        rate = tl.load(lr_tensor).to(tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(count, BYTES), tl.num_programs(0)):
        byte, there, _, at, inside = byte_tile(block, width, count, WIDE, BYTES)
        kept = unpacked(bits, byte, there)
        old = tl.load(weight + at, mask=inside, other=0)
        value = old.to(tl.float32)
        g = _gradient(grad, at, inside, value, kept, strength, RULE, MAXIMIZE)
        if DECAY:
            g = g + weight_decay * value
        if buffer is not None:
            before = tl.load(buffer + at, mask=inside, other=0)
            velocity = momentum * before.to(tl.float32) + rest * g
            _put(buffer, at, inside, kept, before, velocity, RULE)
            if NESTEROV:
                g = g + momentum * velocity
            else:
                g = velocity
        moved = _put(weight, at, inside, kept, old, value - rate * g, RULE)
        _refresh(bits, byte, there, moved, inside, N, M, MAGNITUDE, BYTES)


def _update(
    kernel: Any,
    written: Sequence[Tensor | None],
    grad: Tensor,
    mask: Tensor,
    rest: Sequence[Any],
    flags: Sequence[Any],
    n: int,
    m: int,
    dim: int,
    magnitude: bool,
    refresh: bool,
) -> None:
    """One weight, its moments and its mask by `kernel`: in place if they are contiguous, else by way of copies."""
    weight = written[0]
    assert weight is not None
    if weight.numel() == 0:
        return
    targets = (*written, mask)
    weight, *moments, bits = (None if each is None else each.contiguous() for each in targets)
    dim %= weight.dim()
    own = refresh and groups_in_bytes(weight.shape, m, dim)
    count, width = bytes_and_width(weight.shape)
    with torch.cuda.device_of(weight):
        kernel[(min(triton.cdiv(count, BYTES), PROGRAMS),)](
            weight, grad.contiguous(), *moments, bits, *rest, count, width, *flags, n if own else 0, m, magnitude,
            8 * count >= WIDE, BYTES, enable_fp_fusion=False,
        )  # fmt: skip
    if refresh and not own:
        rank_into(weight, None, None, None, None, bits, n, m, dim, magnitude)
    for target, found in zip(targets, (weight, *moments, bits), strict=True):
        if target is not None and target is not found:
            target.copy_(found)


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
    ops._adamw_fake(weights, grads, exp_avgs, exp_avg_sqs, masks, steps, lr_tensor, n, m, dim, magnitude, rule)
    for weight in weights[:1]:
        check_narrow("masked_adamw", weight)
    numbers = (*map(float64_bits, (lr, beta1, beta2, weight_decay)), eps, strength)
    for weight, grad, exp_avg, exp_avg_sq, mask, step in zip(
        weights, grads, exp_avgs, exp_avg_sqs, masks, steps, strict=True
    ):
        _update(
            _adamw_kernel, (weight, exp_avg, exp_avg_sq), grad, mask, (step, lr_tensor, *numbers),
            (1 - beta1 < 0.5, rule, maximize), n, m, dim, magnitude, refresh,
        )  # fmt: skip


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
    ops._sgd_fake(
        weights, grads, momentum_buffers, masks, lr_tensor, n, m, dim, magnitude, rule, strength, refresh, lr, momentum
    )
    for weight in weights[:1]:
        check_narrow("masked_sgd", weight)
    buffers = momentum_buffers if momentum != 0 else [None] * len(weights)
    numbers = (lr_tensor, lr, momentum, 1 - dampening, weight_decay, strength)
    for weight, grad, buffer, mask in zip(weights, grads, buffers, masks, strict=True):
        _update(
            _sgd_kernel, (weight, buffer), grad, mask, numbers, (weight_decay != 0, nesterov, rule, maximize),
            n, m, dim, magnitude, refresh,
        )  # fmt: skip
