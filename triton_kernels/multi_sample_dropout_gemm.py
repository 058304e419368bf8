"""The multi-sample dropout head's matrix products: logits of masked features, and the gradients through the same masks.

Few classes: both in kernels here. Many: masked copies and the fold of their gradients, around products of cuBLAS.

Masks are drawn once and kept as bits in a chunk-sized scratch. Drawing takes ~80 operations a group of eight elements,
as much time as the group's share of a product with 100 classes on the tensor cores; reading takes one byte.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import group_bits, scale_of
from .loss import gradient_factor

# Numbers that change from call to call and must not each compile a kernel of their own.
_VARYING = ["samples", "threshold", "rows", "first_group", "accumulate", "programs", "steps"]


@triton.jit
def _slot(k, last, thresholds, threshold, PAIRED: tl.constexpr):
    """(sample, threshold) of mask slot k. Paired: slots are the even samples, the last one keeps all (threshold 0)."""
    sample = 2 * k if PAIRED else k
    if thresholds is not None:
        threshold = tl.load(thresholds + sample)
    if PAIRED:
        threshold = tl.where(k == last, 0, threshold)
    return tl.cast(sample, tl.int64), threshold


# Bytes: 1 bit written an element and slot. Operations: ~80 a group of eight.
@triton.jit(do_not_specialize=_VARYING)
def mask_bits_kernel(
    bits, seed, thresholds, threshold, first_group, mask_bytes,
    PAIRED: tl.constexpr, ANTITHETIC: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """bits[k] (mask_bytes,): the mask of slot k over the chunk's elements in row-major order."""
    k = tl.program_id(1)
    byte = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    sample, threshold = _slot(k, tl.num_programs(1) - 1, thresholds, threshold, PAIRED)
    packed = group_bits(seed, first_group + byte, sample, threshold, ANTITHETIC)
    tl.store(bits + k.to(tl.int64) * mask_bytes + byte, packed.to(tl.uint8), mask=byte < mask_bytes)


@triton.jit
def _keep(
    masks, k, row, d0, rows, features,
    COLUMNS: tl.constexpr, DRAW: tl.constexpr, STORE: tl.constexpr, ALIGNED: tl.constexpr,
    PAIRED: tl.constexpr, ANTITHETIC: tl.constexpr,
):  # fmt: skip
    """Slot k's mask of these rows and columns d0 .. d0 + COLUMNS - 1: its bits read, or drawn (STORE: and kept)."""
    bits, mask_bytes, row_bytes, last, seed, thresholds, threshold, first_group = masks
    if STORE or not DRAW:
        bits += tl.cast(k, tl.int64) * mask_bytes
    row = row.to(tl.int64)[:, None]
    if ALIGNED:
        column = (d0 // 8 + tl.arange(0, COLUMNS // 8))[None, :]
        byte = row * row_bytes + column
        exists = (row < rows) & (column < row_bytes)
        if DRAW:
            sample, level = _slot(k, last, thresholds, threshold, PAIRED)
            packed = group_bits(seed, first_group + byte, sample, level, ANTITHETIC)
            if STORE:
                tl.store(bits + byte, packed.to(tl.uint8), mask=exists)
        else:
            packed = tl.load(bits + byte, mask=exists, other=0).to(tl.int32)
        lanes = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        keep = tl.reshape(lanes, (packed.shape[0], COLUMNS)) != 0
    else:
        d = (d0 + tl.arange(0, COLUMNS))[None, :]
        index = row * features + d
        packed = tl.load(bits + (index >> 3), mask=(row < rows) & (d < features), other=0).to(tl.int32)
        keep = ((packed >> (index & 7).to(tl.int32)) & 1) != 0
    return keep


@triton.jit
def _masked(
    value, masks, k, row, d0, rows, features, samples,
    AVERAGED: tl.constexpr, DRAW: tl.constexpr, STORE: tl.constexpr, ALIGNED: tl.constexpr,
    PAIRED: tl.constexpr, ANTITHETIC: tl.constexpr,
):  # fmt: skip
    """value under slot k's mask, or times the mean of all masks; what no mask keeps is exactly 0.

    The scale of kept elements is left to the caller where all samples share it.
    """
    COLUMNS: tl.constexpr = value.shape[1]
    if AVERAGED:
        multiplier = tl.zeros(value.shape, tl.float32)
        for m in range(samples):
            keep = _keep(masks, m, row, d0, rows, features, COLUMNS, DRAW, STORE, ALIGNED, PAIRED, ANTITHETIC)
            scale = 1.0
            if masks[5] is not None:
                scale = scale_of(tl.load(masks[5] + m))
            multiplier += tl.where(keep, scale, 0.0)
        multiplier *= 1.0 / samples
        result = tl.where(multiplier != 0, value.to(tl.float32) * multiplier, 0.0).to(value.dtype)
    else:
        keep = _keep(masks, k, row, d0, rows, features, COLUMNS, DRAW, STORE, ALIGNED, PAIRED, ANTITHETIC)
        result = tl.where(keep, value, 0.0)
    return result


# Bytes: x and W once a tile from L2, masks (1 bit) and logits (4 B) written. Operations: 2 M B D C, Philox 10 M B D.
@triton.jit(do_not_specialize=_VARYING)
def logits_kernel(
    input, weight, raw, bits, seed, thresholds, threshold, first_group, mask_bytes, row_bytes,
    rows, features, classes, padded_classes, samples, gemm_rows, steps,
    input_row, input_column, weight_row, weight_column,
    AVERAGED: tl.constexpr, PAIRED: tl.constexpr, ANTITHETIC: tl.constexpr, ALIGNED: tl.constexpr,
    DRAW: tl.constexpr, STORE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """raw[split, k, row] (padded_classes,): x under mask k times W^T, neither scaled nor biased, over a share of D.

    `steps` blocks of columns are one split's share.
    """
    program = tl.program_id(0)
    split = program % SPLITS
    class_tiles = tl.cdiv(padded_classes, CLASSES)
    class_tile = program // SPLITS % class_tiles
    k = program // (SPLITS * class_tiles) % gemm_rows
    row = program // (SPLITS * class_tiles * gemm_rows) * ROWS + tl.arange(0, ROWS)
    c = class_tile * CLASSES + tl.arange(0, CLASSES)
    inputs = input + row.to(tl.int64)[:, None] * input_row
    weights = weight + c.to(tl.int64)[None, :] * weight_row
    masks = (bits, mask_bytes, row_bytes, gemm_rows - 1, seed, thresholds, threshold, first_group)
    total = tl.zeros((ROWS, CLASSES), tl.float32)
    start = split * steps * COLUMNS
    for d0 in range(start, tl.minimum(start + steps * COLUMNS, features), COLUMNS):
        d = d0 + tl.arange(0, COLUMNS)
        inside = d < features
        d = d.to(tl.int64)
        x = tl.load(inputs + d[None, :] * input_column, (row < rows)[:, None] & inside[None, :], 0.0)
        w = tl.load(weights + d[:, None] * weight_column, inside[:, None] & (c < classes)[None, :], 0.0)
        x = _masked(x, masks, k, row, d0, rows, features, samples, AVERAGED, DRAW, STORE, ALIGNED, PAIRED, ANTITHETIC)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    out = raw + (tl.cast(split * gemm_rows + k, tl.int64) * rows + row)[:, None] * padded_classes + c[None, :]
    tl.store(out, total, mask=(row < rows)[:, None] & (c < padded_classes)[None, :])


# Bytes: x read and M masked copies written. Operations: few, the masks are bits already.
@triton.jit(do_not_specialize=_VARYING)
def pack_kernel(
    input, packed, bits, thresholds, mask_bytes, row_bytes, rows, features, samples, gemm_rows, input_row, input_column,
    AVERAGED: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """packed[k, row] (features,): x under mask k, not scaled."""
    tiles = tl.cdiv(features, COLUMNS)
    program = tl.program_id(0)
    k = program // tiles % gemm_rows
    row = program // (tiles * gemm_rows) * ROWS + tl.arange(0, ROWS)
    d0 = program % tiles * COLUMNS
    d = d0 + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (d < features)[None, :]
    masks = (bits, mask_bytes, row_bytes, 0, None, thresholds, 0, 0)
    x = tl.load(
        input + row.to(tl.int64)[:, None] * input_row + d.to(tl.int64)[None, :] * input_column, mask=inside, other=0.0
    )
    x = _masked(x, masks, k, row, d0, rows, features, samples, AVERAGED, False, False, ALIGNED, False, False)
    out = packed + (tl.cast(k, tl.int64) * rows + row)[:, None] * features + d[None, :]
    tl.store(out, x, mask=inside)


# Bytes: M gradients read and one written. Operations: few.
@triton.jit(do_not_specialize=_VARYING)
def fold_kernel(
    product, grad_input, bits, thresholds, mask_bytes, row_bytes, row_weights, programs, scale,
    rows, features, samples, gemm_rows,
    AVERAGED: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_input: sum_k mask_k o product[k], times what the gradients of logits did not hold."""
    tiles = tl.cdiv(features, COLUMNS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    d0 = tl.program_id(0) % tiles * COLUMNS
    d = d0 + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (d < features)[None, :]
    masks = (bits, mask_bytes, row_bytes, 0, None, thresholds, 0, 0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(gemm_rows):
        place = product + (tl.cast(k, tl.int64) * rows + row)[:, None] * features + d[None, :]
        value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        total += _masked(
            value, masks, k, row, d0, rows, features, samples, AVERAGED, False, False, ALIGNED, False, False
        )
    total *= gradient_factor(scale, row_weights, programs)
    out = grad_input + row.to(tl.int64)[:, None] * features + d[None, :]
    tl.store(out, total.to(grad_input.dtype.element_ty), mask=inside)


@triton.jit
def _input_gradient(
    program, gradient, weight, masks, grad_input, factor,
    rows, features, classes, padded_classes, samples, gemm_rows, weight_row, weight_column,
    AVERAGED: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of sum_k mask_k o (G_k W)."""
    tiles = tl.cdiv(features, COLUMNS)
    row = program // tiles * ROWS + tl.arange(0, ROWS)
    d0 = program % tiles * COLUMNS
    d = d0 + tl.arange(0, COLUMNS)
    c = tl.arange(0, CLASSES)
    inside = (d < features)[None, :]
    weights = weight + d.to(tl.int64)[None, :] * weight_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if ONE_BLOCK:
        w = tl.load(weights + c.to(tl.int64)[:, None] * weight_row, (c < classes)[:, None] & inside, 0.0)
    for k in range(gemm_rows):
        gradients = gradient + (tl.cast(k, tl.int64) * rows + row)[:, None] * padded_classes + c[None, :]
        if ONE_BLOCK:
            g = tl.load(gradients, (row < rows)[:, None] & (c < padded_classes)[None, :], 0.0)
            product = tl.dot(g, w, input_precision=PRECISION)
        else:
            product = tl.zeros((ROWS, COLUMNS), tl.float32)
            for c0 in range(0, padded_classes, CLASSES):
                g = tl.load(gradients + c0, (row < rows)[:, None] & (c0 + c < padded_classes)[None, :], 0.0)
                rest = weights + (c0 + c).to(tl.int64)[:, None] * weight_row
                w = tl.load(rest, (c0 + c < classes)[:, None] & inside, 0.0)
                product = tl.dot(g, w, product, input_precision=PRECISION)
        total += _masked(
            product, masks, k, row, d0, rows, features, samples, AVERAGED, False, False, ALIGNED, False, False
        )
    out = grad_input + row.to(tl.int64)[:, None] * features + d[None, :]
    tl.store(out, (total * factor).to(grad_input.dtype.element_ty), (row < rows)[:, None] & inside)


@triton.jit
def _weight_gradient(
    program, gradient, input, masks, partial, accumulate,
    rows, features, classes, padded_classes, samples, gemm_rows, steps, input_row, input_column,
    AVERAGED: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """partial[split]: a tile of sum_k G_k^T (x o mask_k) over `steps` blocks of (k, rows)."""
    split = program % SPLITS
    tiles = tl.cdiv(features, COLUMNS)
    d0 = program // SPLITS % tiles * COLUMNS
    d = d0 + tl.arange(0, COLUMNS)
    c = program // (SPLITS * tiles) * CLASSES + tl.arange(0, CLASSES)
    row_blocks = tl.cdiv(rows, ROWS)
    out = partial + (split.to(tl.int64) * classes + c)[:, None] * features + d[None, :]
    inside = (c < classes)[:, None] & (d < features)[None, :]
    total = tl.load(out, inside & (c < tl.where(accumulate != 0, classes, 0))[:, None], 0.0)
    for step in range(split * steps, tl.minimum((split + 1) * steps, gemm_rows * row_blocks)):
        k = step // row_blocks
        row = step % row_blocks * ROWS + tl.arange(0, ROWS)
        exists = (row < rows)[:, None]
        g = tl.load(
            gradient + (tl.cast(k, tl.int64) * rows + row)[:, None] * padded_classes + c[None, :],
            exists & (c < padded_classes)[None, :], 0.0,
        )  # fmt: skip
        x = tl.load(
            input + row.to(tl.int64)[:, None] * input_row + d.to(tl.int64)[None, :] * input_column,
            exists & (d < features)[None, :], 0.0,
        )  # fmt: skip
        x = _masked(x, masks, k, row, d0, rows, features, samples, AVERAGED, False, False, ALIGNED, False, False)
        total = tl.dot(tl.trans(g), x, total, input_precision=PRECISION)
    tl.store(out, total, inside)


# Bytes: G, bits and x or W once a tile from L2, dX and dW's partial sums written. Operations: 4 M B D C.
@triton.jit(do_not_specialize=_VARYING)
def gradients_kernel(
    gradient, input, weight, bits, thresholds, mask_bytes, row_bytes, grad_input, partial,
    row_weights, programs, scale, accumulate,
    rows, features, classes, padded_classes, samples, gemm_rows, steps, input_tiles,
    input_row, input_column, weight_row, weight_column,
    AVERAGED: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr, ONE_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The first `input_tiles` programs make dX, the others dW's partial sums: one launch fills the device."""
    program = tl.program_id(0)
    masks = (bits, mask_bytes, row_bytes, 0, None, thresholds, 0, 0)
    if program < input_tiles:
        if grad_input is not None:
            factor = gradient_factor(scale, row_weights, programs)
            _input_gradient(
                program, gradient, weight, masks, grad_input, factor,
                rows, features, classes, padded_classes, samples, gemm_rows, weight_row, weight_column,
                AVERAGED, ALIGNED, PRECISION, ROWS, CLASSES, COLUMNS, ONE_BLOCK,
            )  # fmt: skip
    else:
        if partial is not None:
            _weight_gradient(
                program - input_tiles, gradient, input, masks, partial, accumulate,
                rows, features, classes, padded_classes, samples, gemm_rows, steps, input_row, input_column,
                AVERAGED, ALIGNED, PRECISION, ROWS, CLASSES, COLUMNS, SPLITS,
            )  # fmt: skip
