"""What the losses share: a row's target, its coefficients of the logits, the denominator of "mean"."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def class_target(target, target_b, lam, weight, row, exists, classes, ignore_index, MIXED: tl.constexpr):
    """Per row: classes a and b, their weights (share x class weight; 0: ignored, NaN: out of range), share, counts."""
    a = tl.load(target + row, mask=exists, other=0)
    counts = exists & (a != ignore_index)
    valid = (a >= 0) & (a < classes)
    share = tl.where(counts, 1.0, 0.0)
    if MIXED:
        share = tl.where(counts, tl.load(lam + row, mask=exists, other=0.0), 0.0)
    weight_a = share
    if weight is not None:
        weight_a *= tl.load(weight + a, mask=counts & valid, other=0.0)
    weight_a = tl.where(counts & ~valid, float("nan"), weight_a)
    a = tl.where(counts & valid, a, 0)
    b = a
    weight_b = tl.where(counts, 0.0, 0.0)
    if MIXED:
        b = tl.load(target_b + row, mask=exists, other=0)
        counts_b = exists & (b != ignore_index)
        valid = (b >= 0) & (b < classes)
        share_b = tl.where(counts_b, 1.0 - tl.load(lam + row, mask=exists, other=0.0), 0.0)
        weight_b = share_b
        if weight is not None:
            weight_b *= tl.load(weight + b, mask=counts_b & valid, other=0.0)
        weight_b = tl.where(counts_b & ~valid, float("nan"), weight_b)
        b = tl.where(counts_b & valid, b, 0)
        share += share_b
        counts |= counts_b
    return a, b, weight_a, weight_b, share, counts


@triton.jit
def coefficients(
    a, b, weight_a, weight_b, share, target, weight, row, exists, c, classes, smoothing,
    MIXED: tl.constexpr, PROBABILITIES: tl.constexpr,
):  # fmt: skip
    """q[row, c] of any kind of target: the loss is sum_c q_c (lse(z) - z_c), its gradient sum(q) softmax(z) - q."""
    present = c < classes
    class_weight = tl.where(present, 1.0, 0.0)
    if weight is not None:
        class_weight = tl.load(weight + c, mask=present, other=0.0)
    if PROBABILITIES:
        p = tl.load(target + row[:, None] * classes + c[None, :], exists[:, None] & present[None, :], 0.0)
        q = ((1.0 - smoothing) * p + smoothing / classes) * class_weight[None, :]
    else:
        q = (smoothing / classes * share)[:, None] * class_weight[None, :]
        q += tl.where(c[None, :] == a[:, None], ((1.0 - smoothing) * weight_a)[:, None], 0.0)
        if MIXED:
            q += tl.where(c[None, :] == b[:, None], ((1.0 - smoothing) * weight_b)[:, None], 0.0)
    return q


@triton.jit
def total_of(partial, programs):
    """Sum of `programs` numbers, in an order that never changes."""
    total = tl.zeros((1024,), tl.float32)
    for start in range(0, programs, 1024):
        i = start + tl.arange(0, 1024)
        total += tl.load(partial + i, mask=i < programs, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def gradient_factor(scale, weights, programs):
    """scale / sum(weights): 0 where nothing counts, whose gradients are 0; just scale without weights."""
    if weights is not None:
        denominator = total_of(weights, programs)
        scale = tl.where(denominator == 0, 0.0, scale / denominator)
    return scale


# Bytes: 8 B or 20 B a row. Operations: few.
@triton.jit(do_not_specialize=["count", "ignore_index"])
def weight_sum_kernel(target, target_b, lam, weight, partial_weight, count, classes, ignore_index, ROWS: tl.constexpr):
    """partial_weight[program]: what a share of the rows adds to the denominator of "mean"."""
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        row = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
        _, _, weight_a, weight_b, _, _ = class_target(
            target, target_b, lam, weight, row, row < count, classes, ignore_index, target_b is not None
        )
        total += weight_a + weight_b
    tl.store(partial_weight + tl.program_id(0), tl.sum(total, axis=0))
