"""Mixed cross-entropy on Triton: rows of logits to their losses and gradients in one pass, and the backward's scale."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrx.ops import mixed_cross_entropy as ops

from .dropout import check_narrow
from .loss import class_target, coefficients, total_of, weight_sum_kernel

# Rows up to which every program finds the denominator of "mean" by itself, which takes less than one more launch.
OWN_DENOMINATOR = 2048
# Programs that find it together where there are more.
WEIGHT_PROGRAMS = 128
# Classes that a program holds in registers.
HELD = 8192
# Logits of a program.
TILE = 1024


@triton.jit
def _own_denominator(target, target_b, lam, weight, rows, classes, ignore_index, ROWS: tl.constexpr):
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, rows, ROWS):
        row = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
        _, _, weight_a, weight_b, _, _ = class_target(
            target, target_b, lam, weight, row, row < rows, classes, ignore_index, True
        )
        total += weight_a + weight_b
    return tl.sum(total, axis=0)


# Bytes: logits read and gradient written once (beyond HELD classes read once more, from L1 or L2). Operations: an exp
# and ~10 more a logit. ALIGN: what divides the row's length and stride, so that accesses are vectors.
@triton.jit(do_not_specialize=["rows", "ignore_index", "weight_programs"])
def mixed_cross_entropy_kernel(
    logits, target, target_b, lam, weight, row_weights, weight_programs,
    row_loss, partial_loss, denominator, gradient, rows, classes, stride, ignore_index, smoothing,
    MEAN: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, ONE_BLOCK: tl.constexpr,
    OWN_ROWS: tl.constexpr,
):  # fmt: skip
    """row_loss (rows,) or partial_loss[program], and gradient (rows, classes) over the denominator of "mean"."""
    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    classes = classes // ALIGN * ALIGN
    from_row = logits + tl.multiple_of(tl.where(exists, row, 0) * stride, [ALIGN])[:, None]
    c = tl.arange(0, CLASSES)
    if ONE_BLOCK:  # before the targets, so that the two latencies overlap
        z = tl.load(from_row + c[None, :], mask=(c < classes)[None, :], other=float("-inf")).to(tl.float32)

    factor = 1.0
    if MEAN:
        if row_weights is None:
            found = _own_denominator(target, target_b, lam, weight, rows, classes, ignore_index, OWN_ROWS)
        else:
            found = total_of(row_weights, weight_programs)
        # every row ignored: loss nan, gradients 0, as F.cross_entropy has them
        factor = tl.where(found == 0, 0.0, 1.0 / found)
        if program == 0:
            tl.store(denominator, found)
    a, b, weight_a, weight_b, share, counts = class_target(
        target, target_b, lam, weight, row, exists, classes, ignore_index, True
    )

    if ONE_BLOCK:
        q = coefficients(
            a, b, weight_a, weight_b, share, target, weight, row, exists, c, classes, smoothing, True, False
        )
        top = tl.max(z, axis=1)
        z -= tl.where(top == float("-inf"), 0.0, top)[:, None]
        exps = tl.exp(z)
        sum_exp = tl.sum(exps, axis=1)
        mass = tl.sum(q, axis=1)
        # a class that weighs nothing may have an infinite logit
        dotted = tl.sum(tl.where(q != 0, q * z, 0.0), axis=1)
        loss = mass * tl.log(sum_exp) - dotted
        if gradient is not None:
            g = ((mass / sum_exp)[:, None] * exps - q) * factor
            g = tl.where(counts[:, None], g, 0.0).to(gradient.dtype.element_ty)
            to_row = gradient + tl.multiple_of(row * classes, [ALIGN])[:, None]
            tl.store(to_row + c[None, :], g, mask=exists[:, None] & (c < classes)[None, :])
    else:
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        sum_exp = tl.zeros((ROWS,), tl.float32)
        dotted = tl.zeros((ROWS,), tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        for c0 in range(0, classes, CLASSES):
            column = c0 + c
            z = tl.load(from_row + column[None, :], mask=(column < classes)[None, :], other=float("-inf"))
            z = z.to(tl.float32)
            q = coefficients(
                a, b, weight_a, weight_b, share, target, weight, row, exists, column, classes, smoothing, True, False
            )
            new_top = tl.maximum(top, tl.max(z, axis=1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            z -= shift[:, None]
            # relative to the peak, so that nothing cancels
            moved = tl.where(mass == 0, 0.0, mass) * (tl.where(top == float("-inf"), 0.0, top) - shift)
            dotted += moved + tl.sum(tl.where(q != 0, q * z, 0.0), axis=1)
            mass += tl.sum(q, axis=1)
            sum_exp = sum_exp * tl.exp(top - shift) + tl.sum(tl.exp(z), axis=1)
            top = new_top
        loss = mass * tl.log(sum_exp) - dotted
        if gradient is not None:
            shift = tl.where(top == float("-inf"), 0.0, top)
            to_row = gradient + tl.multiple_of(row * classes, [ALIGN])[:, None]
            for c0 in range(0, classes, CLASSES):
                column = c0 + c
                z = tl.load(from_row + column[None, :], mask=(column < classes)[None, :], other=float("-inf"))
                q = coefficients(
                    a, b, weight_a, weight_b, share, target, weight, row, exists, column, classes, smoothing,
                    True, False,
                )  # fmt: skip
                g = ((mass / sum_exp)[:, None] * tl.exp(z.to(tl.float32) - shift[:, None]) - q) * factor
                g = tl.where(counts[:, None], g, 0.0).to(gradient.dtype.element_ty)
                tl.store(to_row + column[None, :], g, mask=exists[:, None] & (column < classes)[None, :])

    loss = tl.where(counts, loss, 0.0)
    if row_loss is not None:
        tl.store(row_loss + row, loss.to(row_loss.dtype.element_ty), mask=exists)
    if partial_loss is not None:
        tl.store(partial_loss + program, tl.sum(loss, axis=0))


# Bytes: 4 B a program of the kernel above. One program.
@triton.jit(do_not_specialize=["programs"])
def mixed_loss_kernel(partial_loss, denominator, loss, programs):
    value = total_of(partial_loss, programs)
    if denominator is not None:
        value /= tl.load(denominator)
    tl.store(loss, value.to(loss.dtype.element_ty))


# Bytes: none where the factor is one, as for a loss that backward() starts from, else the gradient read and written.
@triton.jit(do_not_specialize=["rows"])
def mixed_scale_kernel(
    gradient, grad_loss, rows, classes,
    PER_ROW: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Rows of gradient times grad_loss (rows,), or all of them times *grad_loss, in place."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    classes = classes // ALIGN * ALIGN
    times = tl.load(grad_loss + (row if PER_ROW else row * 0), mask=exists, other=1.0).to(tl.float32)
    if tl.max((times != 1.0).to(tl.int32), axis=0) > 0:
        at = gradient + tl.multiple_of(row * classes, [ALIGN])[:, None]
        for c0 in range(0, classes, CLASSES):
            c = c0 + tl.arange(0, CLASSES)
            inside = exists[:, None] & (c < classes)[None, :]
            g = tl.load(at + c[None, :], mask=inside, other=0.0).to(tl.float32) * times[:, None]
            tl.store(at + c[None, :], g.to(gradient.dtype.element_ty), mask=inside)


def _tile(classes: int) -> tuple[int, int]:
    """(rows, classes) of a program's block."""
    width = min(triton.next_power_of_2(classes), HELD)
    return max(1, min(TILE // width, 64)), width


def mixed_cross_entropy(
    input: Tensor, target: Tensor, target_b: Tensor, lam: Tensor, weight: Tensor | None, ignore_index: int,
    label_smoothing: float, reduction: str, needs_grad: bool, loss_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = (ignore_index, label_smoothing, reduction, needs_grad, loss_dtype)
    loss, gradient = ops._fake(input, target, target_b, lam, weight, *options)
    check_narrow(ops.OP, input)
    rows, classes = input.shape
    mean, none = reduction == "mean", reduction == "none"
    if rows == 0:
        return loss if none else loss.fill_(float("nan") if mean else 0.0), gradient
    logits = input if input.stride(1) == 1 else input.contiguous()
    target, target_b, lam = target.contiguous(), target_b.contiguous(), lam.contiguous()
    weight = None if weight is None else weight.contiguous()
    row_block, class_block = _tile(classes)
    programs = triton.cdiv(rows, row_block)
    partial_loss = None if none else torch.empty(programs + 1, dtype=torch.float32, device=input.device)
    denominator = partial_loss[programs:] if mean and partial_loss is not None else None
    row_weights = None
    with torch.cuda.device_of(input):
        if mean and rows > OWN_DENOMINATOR:
            row_weights = torch.empty(WEIGHT_PROGRAMS, dtype=torch.float32, device=input.device)
            weight_sum_kernel[(WEIGHT_PROGRAMS,)](
                target, target_b, lam, weight, row_weights, rows, classes, ignore_index, 256
            )
        mixed_cross_entropy_kernel[(programs,)](
            logits, target, target_b, lam, weight, row_weights, WEIGHT_PROGRAMS,
            loss if none else None, partial_loss, denominator, gradient if needs_grad else None,
            rows, classes, logits.stride(0), ignore_index, label_smoothing,
            mean, math.gcd(16, classes, logits.stride(0)), row_block, class_block, class_block >= classes, 512,
            num_warps=8 if class_block > 2048 else 4,
        )  # fmt: skip
        if not none:
            mixed_loss_kernel[(1,)](partial_loss, denominator, loss, programs)
    return loss, gradient


def mixed_cross_entropy_scale_(gradient: Tensor, grad_loss: Tensor) -> None:
    ops._scale_fake(gradient, grad_loss)
    check_narrow(ops.SCALE, gradient)
    rows, classes = gradient.shape
    if gradient.numel() == 0:
        return
    row_block, class_block = _tile(classes)
    with torch.cuda.device_of(gradient):
        mixed_scale_kernel[(triton.cdiv(rows, row_block),)](
            gradient, grad_loss.contiguous(), rows, classes,
            grad_loss.dim() == 1, math.gcd(16, classes), row_block, min(class_block, 2048),
        )  # fmt: skip
