"""Multi-sample dropout on Triton: the dropped copies, their fold, and the fused head's launches.

The head works through chunks of rows, whose scratch is bounded and fits the L2 cache of a large device. With few
classes a chunk takes three launches: the logits of all samples (masks drawn on the way), cross-entropy with its
gradient, both backward products; a last one adds up what the chunks' programs left. Logits go through memory between
the launches, so that small batches fill the device by splitting D. With many classes the products are cuBLAS's, of
masked copies.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pyrx.ops import multi_sample_dropout as ops

from .dropout import GROUPS, check_narrow, expand, fold, scale, threshold_table
from .loss import weight_sum_kernel
from .multi_sample_dropout_gemm import fold_kernel, gradients_kernel, logits_kernel, mask_bits_kernel, pack_kernel
from .multi_sample_dropout_loss import cross_entropy_kernel, finish_kernel, scale_kernel

# A chunk's scratch: this many logits (float32, and their gradients in the operand dtype) and bytes of mask bits.
CHUNK_LOGITS = 2**23
CHUNK_MASK_BYTES = 2**25
# ... and this many elements of masked copies, where they are made.
CHUNK_COPIES = 2**25

# Classes above which the products are cuBLAS's, by the bytes of an element: on an H200, where float32 runs on the plain
# units, 100 classes took 47 us fused and 59 so in bfloat16, 160 and 90 in float32.
LIBRARY_CLASSES = {2: 128, 4: 32}

# Block of the masked copies and of their fold.
PACK_ROWS, PACK_COLUMNS = 4, 256

# Programs below which a product is split further: about two a multiprocessor of the larger devices.
FILL = 256

# GEMM rows from which the backward products have work for large blocks.
LARGE = 2**14


def multi_sample_dropout(input: Tensor, seed: Tensor, thresholds: Sequence[int], antithetic: bool) -> Tensor:
    output = ops._expand_fake(input, seed, thresholds, antithetic)
    check_narrow(ops.ROW, input)
    expand(input, output, seed, 0, thresholds, antithetic)
    return output


def multi_sample_dropout_fold(grad: Tensor, seed: Tensor, thresholds: Sequence[int], antithetic: bool) -> Tensor:
    output = ops._fold_fake(grad, seed, thresholds, antithetic)
    check_narrow("multi_sample_dropout_fold", grad)
    fold(grad, output, seed, thresholds, antithetic)
    return output


def _power_of_2(n: int, low: int, high: int) -> int:
    """The least power of 2 that is at least n, between low and high."""
    return max(low, min(high, triton.next_power_of_2(n)))


def _splits(tiles: int, steps: int, most: int) -> int:
    """Into how many shares the steps of each of so many tiles are split: enough programs, and enough work for each."""
    splits = 1
    while tiles * splits < FILL and splits < most and steps >= 8 * splits:
        splits *= 2
    return splits


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b; out may be float32 where a and b are of a half type."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out.dtype, out=out) if add else torch.mm(a, b, out.dtype, out=out)
    else:  # Triton's interpreter
        product = a.to(out.dtype) @ b.to(out.dtype)
        out.copy_(out + product if add else product)


def _matrix(scratch: Tensor, rows: int, columns: int, stride: int) -> Tensor:
    """The first rows of a scratch whose rows are `stride` long."""
    return scratch.view(-1)[: rows * stride].view(rows, stride)[:, :columns]


class _Plan(NamedTuple):
    """Block sizes (rows, classes, columns) of the three kernels, and how far their sums are split."""

    chunk: int
    mask_bytes: int  # of a slot
    logits: tuple[int, int, int]
    logit_splits: int
    draw: bool  # masks are drawn by the logits kernel, else before it
    loss: tuple[int, int, int]  # rows, samples, classes
    gradients: tuple[int, int, int]
    gradient_splits: int
    gradient_warps: int


@functools.lru_cache(maxsize=256)
def _plan(
    batch: int, features: int, padded: int, losses: int, gemm_rows: int, masks: int, paired: bool, averaged: bool,
    wide: bool, vectors: bool, library: bool,
) -> _Plan:  # fmt: skip
    chunk = min(batch, CHUNK_LOGITS // (gemm_rows * padded), CHUNK_MASK_BYTES * 8 // (masks * max(features, 1)))
    if library:
        chunk = min(chunk, CHUNK_COPIES // (gemm_rows * max(features, 1)))
    # a chunk starts at a group of Philox's, eight elements
    chunk = batch if chunk >= batch else max(chunk // 64 * 64, min(chunk, 63) // 8 * 8, 8)

    # Registers decide: float32 products run on the plain units, from operands in registers; what is not loaded in
    # vectors needs an address an element.
    narrow = wide or not vectors
    rows, classes, columns = 32, _power_of_2(padded, 16, 64 if narrow else 256), 32 if narrow or averaged else 64
    if averaged:
        rows, classes = 16, min(classes, 64)
    elif not narrow and triton.cdiv(chunk, 64) * gemm_rows * triton.cdiv(padded, classes) >= FILL:
        rows = 64
    class_tiles = triton.cdiv(padded, classes)
    logit_splits = _splits(triton.cdiv(chunk, rows) * gemm_rows * class_tiles, triton.cdiv(features, columns), 4)

    loss_classes = _power_of_2(padded, 16, 512)
    loss_samples = _power_of_2(losses, 2 if paired else 1, 2048 // loss_classes)
    room = 2048 // (loss_classes * loss_samples)
    # about 512 programs, whose partial sums are then added up, of at least 128 logits
    loss_rows = min(room, max(_power_of_2(triton.cdiv(chunk, 512), 1, room), 128 // (loss_classes * loss_samples)))

    large = not narrow and not averaged and chunk * gemm_rows >= LARGE
    back_rows, back_columns = (64, 128) if large else (32, 64 if vectors else 32)
    back_classes = _power_of_2(padded, 16, 32 if narrow else 128)
    tiles = triton.cdiv(features, back_columns) * triton.cdiv(padded, back_classes)
    plan = _Plan(
        chunk, triton.cdiv(chunk * features, 128) * 16,
        (rows, classes, columns), logit_splits, features % 8 == 0 and class_tiles == 1 and not averaged,
        (loss_rows, loss_samples, loss_classes),
        (back_rows, back_classes, back_columns), _splits(tiles, gemm_rows * triton.cdiv(chunk, back_rows), 16),
        8 if large else 4,
    )  # fmt: skip
    return plan._replace(logit_splits=1, gradient_splits=1, draw=False) if library else plan


def _head(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    seed: Tensor,
    thresholds: Sequence[int],
    antithetic: bool,
    averaged: bool,
    ignore_index: int,
    label_smoothing: float,
    *,
    loss: Tensor | None,
    mean: bool,
    grad_loss: Tensor | None,
    gradients: Sequence[Tensor | None],
) -> None:
    """Fills `loss` ((B,): the rows', (): their sum or mean) and the gradients that are not None.

    The gradients are of the sum or mean, or under upstream gradients grad_loss (B,) of the rows' losses.
    """
    batch, features = input.shape
    classes = linear_weight.shape[0]
    grad_input, grad_weight, grad_bias = gradients
    if batch == 0:
        if loss is not None:
            loss.fill_(float("nan") if mean else 0.0)
        for each in (grad_weight, grad_bias):
            if each is not None:
                each.zero_()
        return

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=input.device)

    samples = len(thresholds)
    threshold, table = threshold_table(thresholds, input.device)
    # as SamplePlan in csrc/kernels/multi_sample_dropout.h, which tells of paired samples
    paired = antithetic and not averaged and samples > 2 and table is None and threshold == 32768
    losses = 1 if averaged else samples
    gemm_rows = (losses + 1) // 2 + 1 if paired else losses
    masks = samples if averaged else gemm_rows
    padded = (classes + 15) // 16 * 16
    wide = input.dtype == torch.float32
    precision = "tf32" if wide and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    strides = (*input.stride(), *linear_weight.stride())
    vectors = features % 16 == 0 and strides[1] == strides[3] == 1 and strides[0] % 16 == strides[2] % 16 == 0
    library = classes > LIBRARY_CLASSES[input.element_size()]
    plan = _plan(batch, features, padded, losses, gemm_rows, masks, paired, averaged, wide, vectors, library)
    chunk, mask_bytes, aligned = plan.chunk, plan.mask_bytes, features % 8 == 0
    chunks = triton.cdiv(batch, chunk)
    programs = triton.cdiv(chunk, plan.loss[0])

    through_products = grad_input is not None or grad_weight is not None
    need = through_products or grad_bias is not None
    scalar = loss is not None and loss.dim() == 0
    raw = empty(plan.logit_splits, gemm_rows, chunk, padded)
    bits = empty(masks, mask_bytes, dtype=torch.uint8) if through_products or not plan.draw else None
    gradient = empty(gemm_rows, chunk, padded, dtype=input.dtype) if need else None
    statistics = empty(2, losses, chunk) if need else None
    partial_loss = empty(programs) if scalar else None
    partial_bias = empty(programs, padded) if grad_bias is not None else None
    partial = empty(plan.gradient_splits, classes, features) if grad_weight is not None else None
    packed = empty(gemm_rows * chunk, features, dtype=input.dtype) if library else None

    target = target.contiguous()
    bias, target_b, lam, weight = (
        None if each is None else each.contiguous() for each in (linear_bias, target_b, lam, weight)
    )
    # What a gradient still has to be multiplied by, beside the denominator of a mean by weights. The scale of kept
    # elements is among it where all samples share it: float16 gradients of logits need not hold it.
    by_weights = mean and not target.is_floating_point()
    loss_scale = 1.0 / batch if mean and not by_weights else 1.0
    bias_scale = loss_scale if grad_loss is not None else loss_scale / losses
    common_scale = 1.0 if table is not None else scale(threshold)
    weight_scale = bias_scale * common_scale

    with torch.cuda.device_of(input):
        row_weights, weight_programs = None, programs if chunks == 1 else 128
        if by_weights:
            row_weights = empty(weight_programs)
            if chunks > 1:  # the first chunk's gradients need the denominator of all
                weight_sum_kernel[(weight_programs,)](
                    target, target_b, lam, weight, row_weights, batch, classes, ignore_index, 256
                )
        for row0 in range(0, batch, chunk):
            rows = min(chunk, batch - row0)
            x = input if chunks == 1 else input[row0 : row0 + rows]
            first_group = row0 * features // 8
            if not plan.draw:
                mask_bits_kernel[(triton.cdiv(mask_bytes, GROUPS), masks)](
                    bits, seed, table, threshold, first_group, mask_bytes, paired, antithetic, GROUPS
                )
            if packed is not None:
                copies = packed[: gemm_rows * rows]
                tiles = triton.cdiv(rows, PACK_ROWS) * triton.cdiv(features, PACK_COLUMNS)
                if tiles:
                    pack_kernel[(tiles * gemm_rows,)](
                        x, packed, bits, table, mask_bytes, features // 8, rows, features, samples, gemm_rows,
                        *strides[:2], averaged, aligned, PACK_ROWS, PACK_COLUMNS,
                    )  # fmt: skip
                _multiply(copies, linear_weight.t(), _matrix(raw, gemm_rows * rows, classes, padded))
            else:
                row_block, class_block, column_block = plan.logits
                tiles = triton.cdiv(rows, row_block) * gemm_rows * triton.cdiv(padded, class_block)
                logits_kernel[(tiles * plan.logit_splits,)](
                    x, linear_weight, raw, bits, seed, table, threshold, first_group, mask_bytes, features // 8,
                    rows, features, classes, padded, samples, gemm_rows,
                    triton.cdiv(triton.cdiv(features, column_block), plan.logit_splits), *strides,
                    averaged, paired, antithetic, aligned, plan.draw, bits is not None, precision,
                    *plan.logits, plan.logit_splits, num_warps=8 if class_block > 128 else 4,
                )  # fmt: skip
            cross_entropy_kernel[(triton.cdiv(rows, plan.loss[0]),)](
                raw, bias, target, target_b, lam, weight, grad_loss, table, common_scale,
                None if scalar else loss, partial_loss, row_weights if chunks == 1 else None, partial_bias,
                statistics, gradient,
                row0, rows, classes, padded, losses, gemm_rows, ignore_index, label_smoothing, row0,
                paired, averaged, target.is_floating_point(), plan.logit_splits, *plan.loss,
            )  # fmt: skip
            if packed is not None and gradient is not None:
                logit_gradient = _matrix(gradient, gemm_rows * rows, classes, padded)
                if partial is not None:
                    _multiply(logit_gradient.t(), copies, partial[0], add=row0 > 0)
                if grad_input is not None and tiles:
                    _multiply(logit_gradient, linear_weight, copies)
                    fold_kernel[(tiles,)](
                        packed, grad_input[row0:], bits, table, mask_bytes, features // 8,
                        row_weights, weight_programs, weight_scale, rows, features, samples, gemm_rows,
                        averaged, aligned, PACK_ROWS, PACK_COLUMNS,
                    )  # fmt: skip
            elif through_products:
                row_block, class_block, column_block = plan.gradients
                row_blocks, column_tiles = triton.cdiv(rows, row_block), triton.cdiv(features, column_block)
                input_tiles = row_blocks * column_tiles if grad_input is not None else 0
                weight_tiles = column_tiles * triton.cdiv(classes, class_block) if grad_weight is not None else 0
                gradients_kernel[(input_tiles + weight_tiles * plan.gradient_splits,)](
                    gradient, x, linear_weight, bits, table, mask_bytes, features // 8,
                    None if grad_input is None else grad_input[row0:], partial,
                    row_weights, weight_programs, weight_scale, row0,
                    rows, features, classes, padded, samples, gemm_rows,
                    triton.cdiv(gemm_rows * row_blocks, plan.gradient_splits), input_tiles, *strides,
                    averaged, aligned, precision, *plan.gradients, padded <= class_block, plan.gradient_splits,
                    num_warps=plan.gradient_warps,
                )  # fmt: skip
        if scalar or grad_weight is not None or grad_bias is not None:
            sum_tiles = triton.cdiv(classes * features, 1024) if grad_weight is not None else 0
            finish_kernel[(sum_tiles + 1 + (triton.cdiv(classes, 16) if grad_bias is not None else 0),)](
                partial_loss, loss if scalar else None, loss_scale, partial_bias, grad_bias, partial, grad_weight,
                weight_scale, bias_scale, row_weights, weight_programs, programs, classes * features, classes, padded,
                sum_tiles, plan.gradient_splits, 1024, 128, 16,
            )  # fmt: skip


def _wanted(gradients: Sequence[Tensor], like: Sequence[Tensor | None], needs_grad: Sequence[bool]) -> list[Any]:
    return [g if t is not None and n else None for g, t, n in zip(gradients, like, needs_grad, strict=True)]


def multi_sample_dropout_cross_entropy(*arguments: Any) -> tuple[Tensor, ...]:
    loss, *gradients = ops._head_fake(*arguments)
    check_narrow(ops.HEAD, arguments[0])
    *inputs, reduction, needs_grad, _ = arguments
    wanted = _wanted(gradients, inputs[:3], (False,) * 3 if reduction == "none" else needs_grad)
    _head(*inputs, loss=loss, mean=reduction == "mean", grad_loss=None, gradients=wanted)
    return loss, *gradients


def multi_sample_dropout_cross_entropy_backward(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    gradients = ops._head_backward_fake(grad_loss, *arguments)
    check_narrow(ops.HEAD + "_backward", arguments[0])
    *inputs, needs_grad = arguments
    wanted = _wanted(gradients, inputs[:3], needs_grad)
    _head(*inputs, loss=None, mean=False, grad_loss=grad_loss.contiguous(), gradients=wanted)
    return gradients


def multi_sample_dropout_cross_entropy_scale_(
    grad_input: Tensor, grad_weight: Tensor, grad_bias: Tensor, grad_loss: Tensor
) -> None:
    ops._scale_fake(grad_input, grad_weight, grad_bias, grad_loss)
    numels = [each.numel() for each in (grad_input, grad_weight, grad_bias)]
    if max(numels):
        programs = min(triton.cdiv(max(numels), 1024), 1024)
        with torch.cuda.device_of(grad_loss):
            scale_kernel[(programs,)](grad_input, grad_weight, grad_bias, grad_loss, *numels, 1024)
