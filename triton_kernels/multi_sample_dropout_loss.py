"""The multi-sample dropout head's elementwise side: cross-entropy with its gradient, and the final sums."""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import scale_of
from .loss import class_target, coefficients, gradient_factor, total_of

_VARYING = ["row0", "rows", "samples", "ignore_index", "accumulate", "programs", "count"]


@triton.jit
def _logits(
    raw, bias, thresholds, scale, row, m, c, rows, classes, padded_classes, samples, gemm_rows,
    PAIRED: tl.constexpr, AVERAGED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """float32 z[row, m, c]; -inf beyond the classes."""
    k = m // 2 if PAIRED else m
    inside = (row < rows)[:, None, None] & (m < samples)[None, :, None] & (c < classes)[None, None, :]
    at = raw + (k.to(tl.int64)[None, :, None] * rows + row[:, None, None]) * padded_classes + c[None, None, :]
    whole = raw + (tl.cast(gemm_rows - 1, tl.int64) * rows + row)[:, None, None] * padded_classes + c[None, None, :]
    z = tl.zeros((row.shape[0], m.shape[0], c.shape[0]), tl.float32)
    for split in tl.static_range(SPLITS):
        share = tl.cast(split, tl.int64) * gemm_rows * rows * padded_classes
        z += tl.load(at + share, mask=inside, other=0.0)
        if PAIRED:
            # x o m' = x - x o m: the odd sample's product is the unmasked row's less the even one's
            z -= tl.load(whole + share, mask=inside & (m % 2 == 1)[None, :, None], other=0.0)
    if PAIRED:
        z = tl.where((m % 2 == 1)[None, :, None], -z, z)
    if thresholds is None:
        z *= scale
    elif not AVERAGED:
        z *= scale_of(tl.load(thresholds + m, mask=m < samples, other=0))[None, :, None]
    if bias is not None:
        z += tl.load(bias + c, mask=c < classes, other=0.0).to(tl.float32)[None, None, :]
    return tl.where((c < classes)[None, None, :], z, float("-inf"))


# Bytes: logits read twice (4 B each, then from L1 or L2), G written. Operations: ~20 and two exp a logit.
@triton.jit(do_not_specialize=_VARYING)
def cross_entropy_kernel(
    raw, bias, target, target_b, lam, weight, grad_loss, thresholds, scale,
    row_loss, partial_loss, partial_weight, partial_bias, statistics, gradient,
    row0, rows, classes, padded_classes, samples, gemm_rows, ignore_index, smoothing, accumulate,
    PAIRED: tl.constexpr, AVERAGED: tl.constexpr, PROBABILITIES: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, SAMPLES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Loss of each row over its samples, and gradient[k, row] (padded_classes,) of the GEMM rows, before any mean.

    Outputs that are None are not made. Targets are the whole batch's, raw and gradient the chunk's from row0 on.
    """
    MIXED: tl.constexpr = target_b is not None
    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    if PROBABILITIES:
        a, b, weight_a, weight_b, share = 0, 0, 0.0, 0.0, 0.0
        counts = exists
    else:
        a, b, weight_a, weight_b, share, counts = class_target(
            target, target_b, lam, weight, row0 + row, exists, classes, ignore_index, MIXED
        )
        if partial_weight is not None:
            tl.store(partial_weight + program, tl.sum(weight_a + weight_b, axis=0))

    loss = tl.zeros((ROWS,), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    for m0 in range(0, samples, SAMPLES):
        m = m0 + tl.arange(0, SAMPLES)
        top = tl.full((ROWS, SAMPLES), float("-inf"), tl.float32)
        sum_exp = tl.zeros((ROWS, SAMPLES), tl.float32)
        dotted = tl.zeros((ROWS, SAMPLES), tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        for c0 in range(0, classes, CLASSES):
            c = c0 + tl.arange(0, CLASSES)
            z = _logits(
                raw, bias, thresholds, scale, row, m, c, rows, classes, padded_classes, samples, gemm_rows,
                PAIRED, AVERAGED, SPLITS,
            )  # fmt: skip
            q = coefficients(
                a, b, weight_a, weight_b, share, target, weight, row0 + row, exists, c, classes, smoothing,
                MIXED, PROBABILITIES,
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(z, axis=2))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            z -= shift[:, :, None]
            # relative to the peak, so that nothing cancels; a class that weighs nothing may have an infinite logit
            moved = tl.where(mass == 0, 0.0, mass)[:, None] * (tl.where(top == float("-inf"), 0.0, top) - shift)
            dotted += moved + tl.sum(tl.where((q != 0)[:, None, :], q[:, None, :] * z, 0.0), axis=2)
            mass += tl.sum(q, axis=1)
            sum_exp = sum_exp * tl.exp(top - shift) + tl.sum(tl.exp(z), axis=2)
            top = new_top
        log_sum = tl.log(sum_exp)
        each = mass[:, None] * (log_sum + tl.where(top == float("-inf"), top, 0.0)) - dotted
        loss += tl.sum(tl.where(counts[:, None] & (m < samples)[None, :], each, 0.0), axis=1)
        if gradient is not None:
            kept = statistics + m[None, :].to(tl.int64) * rows + row[:, None]
            inside = exists[:, None] & (m < samples)[None, :]
            tl.store(kept, top, mask=inside)
            tl.store(kept + tl.cast(samples, tl.int64) * rows, log_sum, mask=inside)
    loss *= 1.0 / samples
    if row_loss is not None:
        tl.store(row_loss + row0 + row, loss, mask=exists)
    if partial_loss is not None:
        loss_before = tl.load(partial_loss + program, mask=accumulate != 0, other=0.0)
        tl.store(partial_loss + program, loss_before + tl.sum(loss, axis=0))

    if gradient is not None:
        # what other threads wrote to `statistics` above is read below
        tl.debug_barrier()
        upstream = tl.where(counts, 1.0, 0.0)
        if grad_loss is not None:
            upstream = tl.load(grad_loss + row0 + row, mask=exists, other=0.0).to(tl.float32) / samples
        for c0 in range(0, padded_classes, CLASSES):
            c = c0 + tl.arange(0, CLASSES)
            q = coefficients(
                a, b, weight_a, weight_b, share, target, weight, row0 + row, exists, c, classes, smoothing,
                MIXED, PROBABILITIES,
            )  # fmt: skip
            bias_sum = tl.zeros((CLASSES,), tl.float32)
            whole = tl.zeros((ROWS, CLASSES), tl.float32)
            for m0 in range(0, samples, SAMPLES):
                m = m0 + tl.arange(0, SAMPLES)
                inside = exists[:, None] & (m < samples)[None, :]
                kept = statistics + m[None, :].to(tl.int64) * rows + row[:, None]
                top = tl.load(kept, mask=inside, other=0.0)
                log_sum = tl.load(kept + tl.cast(samples, tl.int64) * rows, mask=inside, other=0.0)
                z = _logits(
                    raw, bias, thresholds, scale, row, m, c, rows, classes, padded_classes, samples, gemm_rows,
                    PAIRED, AVERAGED, SPLITS,
                )  # fmt: skip
                g = mass[:, None, None] * tl.exp((z - top[:, :, None]) - log_sum[:, :, None]) - q[:, None, :]
                # ignored rows have gradient 0 whatever their logits
                counted = (inside & counts[:, None])[:, :, None] & (c < classes)[None, None, :]
                g = tl.where(counted, g * upstream[:, None, None], 0.0)
                bias_sum += tl.sum(tl.sum(g, axis=1), axis=0)
                k = m
                last = samples
                if PAIRED:
                    # through both samples of a pair: (g_even - g_odd) under the even mask, g_odd under none
                    odd = (m % 2 == 1)[None, :, None]
                    whole += tl.sum(tl.where(odd, g, 0.0), axis=1)
                    g = tl.sum(tl.reshape(tl.where(odd, -g, g), (ROWS, SAMPLES // 2, 2, CLASSES)), axis=2)
                    k = m0 // 2 + tl.arange(0, SAMPLES // 2)
                    last = gemm_rows - 1
                elif thresholds is not None and not AVERAGED:
                    g *= scale_of(tl.load(thresholds + m, mask=m < samples, other=0))[None, :, None]
                out = (k.to(tl.int64)[None, :, None] * rows + row[:, None, None]) * padded_classes + c[None, None, :]
                written = exists[:, None, None] & (k < last)[None, :, None] & (c < padded_classes)[None, None, :]
                tl.store(gradient + out, g.to(gradient.dtype.element_ty), mask=written)
            if PAIRED:
                out = (tl.cast(gemm_rows - 1, tl.int64) * rows + row)[:, None] * padded_classes + c[None, :]
                written = exists[:, None] & (c < padded_classes)[None, :]
                tl.store(gradient + out, whole.to(gradient.dtype.element_ty), mask=written)
            if partial_bias is not None:
                at = partial_bias + program.to(tl.int64) * padded_classes + c
                before = tl.load(at, mask=c < tl.where(accumulate != 0, padded_classes, 0), other=0.0)
                tl.store(at, before + bias_sum, mask=c < padded_classes)


# Bytes: the partial sums read, loss, dW and db written. Operations: one addition a number.
@triton.jit(do_not_specialize=_VARYING)
def finish_kernel(
    partial_loss, loss, loss_scale, partial_bias, grad_bias, partial, grad_weight, weight_scale, bias_scale,
    row_weights, weight_programs, programs, numel, classes, padded_classes, weight_tiles,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, BIAS_ROWS: tl.constexpr, BIAS_CLASSES: tl.constexpr,
):  # fmt: skip
    """Adds up partial sums: dW in the first `weight_tiles` programs, then the loss, then db."""
    program = tl.program_id(0)
    if program < weight_tiles:
        if grad_weight is not None:
            i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), tl.float32)
            for split in tl.static_range(SPLITS):
                total += tl.load(partial + tl.cast(split, tl.int64) * numel + i, mask=i < numel, other=0.0)
            total *= gradient_factor(weight_scale, row_weights, weight_programs)
            tl.store(grad_weight + i, total.to(grad_weight.dtype.element_ty), mask=i < numel)
    elif program == weight_tiles:
        if loss is not None:
            value = total_of(partial_loss, programs) * loss_scale
            if row_weights is not None:
                # all rows ignored: 0 / 0, nan as from F.cross_entropy
                value /= total_of(row_weights, weight_programs)
            tl.store(loss, value)
    else:
        if grad_bias is not None:
            c = (program - weight_tiles - 1) * BIAS_CLASSES + tl.arange(0, BIAS_CLASSES)
            sums = tl.zeros((BIAS_ROWS, BIAS_CLASSES), tl.float32)
            for start in range(0, programs, BIAS_ROWS):
                i = start + tl.arange(0, BIAS_ROWS)
                inside = (i < programs)[:, None] & (c < classes)[None, :]
                sums += tl.load(partial_bias + i.to(tl.int64)[:, None] * padded_classes + c[None, :], inside, 0.0)
            total = tl.sum(sums, axis=0) * gradient_factor(bias_scale, row_weights, weight_programs)
            tl.store(grad_bias + c, total.to(grad_bias.dtype.element_ty), mask=c < classes)


# Bytes: none where the factor is one, as for a loss that backward() starts from, else every gradient read and written.
@triton.jit
def scale_kernel(grad_input, grad_weight, grad_bias, factor, inputs, weights, biases, BLOCK: tl.constexpr):
    """Gradients times *factor, in place."""
    times = tl.load(factor).to(tl.float32)
    if times != 1.0:
        for step in range(tl.cdiv(max(inputs, weights, biases), tl.num_programs(0) * BLOCK)):
            block = tl.cast(step, tl.int64) * tl.num_programs(0) + tl.program_id(0)
            i = block * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(grad_input + i, mask=i < inputs, other=0.0).to(tl.float32) * times
            tl.store(grad_input + i, value.to(grad_input.dtype.element_ty), mask=i < inputs)
            value = tl.load(grad_weight + i, mask=i < weights, other=0.0).to(tl.float32) * times
            tl.store(grad_weight + i, value.to(grad_weight.dtype.element_ty), mask=i < weights)
            value = tl.load(grad_bias + i, mask=i < biases, other=0.0).to(tl.float32) * times
            tl.store(grad_bias + i, value.to(grad_bias.dtype.element_ty), mask=i < biases)
