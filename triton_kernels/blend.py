"""Alpha compositing in Triton: a program takes a block of alphas through all the elements that share each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrx.ops import blend as ops
from pyrx.reference.batch_mix import memory_format
from pyrx.reference.blend import sample_format

from .dropout import check_narrow

# Elements a program works on.
BLOCK = 1024

_VARYING = ["others"]


@triton.jit
def _rows(
    pixels, channels, frames, group, plane, alpha_sample, alpha_channel, alpha_frame, PIXELS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """(sample, offsets in it and which are there, offsets in alpha and in alpha's gradient and which are there)."""
    blocks = tl.cdiv(pixels, PIXELS)
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    pixel = (program % blocks) * PIXELS + tl.arange(0, PIXELS)
    lane = tl.arange(0, GROUP)
    sample, channel, frame = row // (frames * channels), row // frames % channels, row % frames
    there = pixel < pixels
    inside = channel * plane + frame * pixels * group + pixel[:, None] * group + lane[None, :]
    alphas = sample * alpha_sample + channel * alpha_channel + frame * alpha_frame + pixel
    return sample, inside, there[:, None] & (lane < group)[None, :], alphas, row * pixels + pixel, there


@triton.jit
def _partner(partner, sample, others):
    """(the sample of y, whether there is one)."""
    other = sample
    if partner is not None:
        other = tl.load(partner + sample)
    return other, (other >= 0) & (other < others)


# Bytes: x, y and the result, and alpha once a pixel. Operations: five an element.
@triton.jit(do_not_specialize=_VARYING)
def _blend_kernel(
    x, y, alpha, partner, output, others, pixels, channels, frames, group, repeat, plane,
    x_sample, y_sample, out_sample, alpha_sample, alpha_channel, alpha_frame, PIXELS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    sample, inside, mask, alphas, _, there = _rows(
        pixels, channels, frames, group, plane, alpha_sample, alpha_channel, alpha_frame, PIXELS, GROUP
    )
    other, found = _partner(partner, sample, others)
    weight = tl.load(alpha + alphas, mask=there, other=0).to(tl.float32)[:, None]
    for k in range(repeat):
        at = inside + k * tl.cast(plane, tl.int64)
        own = tl.load(x + sample * x_sample + at, mask=mask)
        if output.dtype.element_ty == tl.uint8:
            against = tl.load(y + other * y_sample + at, mask=mask & found, other=0)
        else:
            against = tl.load(y + other * y_sample + at, mask=mask & found, other=float("nan"))
        mixed = weight * own.to(tl.float32) + (1 - weight) * against.to(tl.float32)
        if output.dtype.element_ty == tl.uint8:
            # what is added has no bits below one, so that the sum is rounded to the nearest, halves to even
            mixed = (tl.where(mixed > 0, tl.where(mixed < 255, mixed, 255.0), 0.0) + 8388608.0) - 8388608.0
        result = tl.where(weight == 1, own, tl.where(weight == 0, against, mixed.to(output.dtype.element_ty)))
        tl.store(output + sample * out_sample + at, result, mask=mask)


# Bytes: the result's gradient, alpha, the gradients that are asked for, and x and y for alpha's.
@triton.jit(do_not_specialize=_VARYING)
def _blend_gradients_kernel(
    grad, x, y, alpha, partner, grad_x, grad_y, grad_alpha, others, pixels, channels, frames, group, repeat, plane,
    grad_sample, x_sample, y_sample, out_sample, alpha_sample, alpha_channel, alpha_frame, PIXELS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    sample, inside, mask, alphas, rows, there = _rows(
        pixels, channels, frames, group, plane, alpha_sample, alpha_channel, alpha_frame, PIXELS, GROUP
    )
    other, found = sample, True
    if grad_alpha is not None:
        other, found = _partner(partner, sample, others)
    weight = tl.load(alpha + alphas, mask=there, other=0).to(tl.float32)[:, None]
    rest = 1 - weight
    total = tl.zeros((PIXELS, GROUP), tl.float32)
    for k in range(repeat):
        at = inside + k * tl.cast(plane, tl.int64)
        upstream = tl.load(grad + sample * grad_sample + at, mask=mask, other=0).to(tl.float32)
        if grad_x is not None:
            own = tl.where(weight == 0, 0.0, weight * upstream)
            tl.store(grad_x + sample * out_sample + at, own.to(grad_x.dtype.element_ty), mask=mask)
        if grad_y is not None:
            against = tl.where(rest == 0, 0.0, rest * upstream)
            tl.store(grad_y + sample * out_sample + at, against.to(grad_y.dtype.element_ty), mask=mask)
        if grad_alpha is not None:
            own = tl.load(x + sample * x_sample + at, mask=mask, other=0).to(tl.float32)
            against = tl.load(y + other * y_sample + at, mask=mask & found, other=float("nan")).to(tl.float32)
            total += tl.where(mask, upstream * (own - against), 0.0)
    if grad_alpha is not None:
        tl.store(grad_alpha + rows, tl.sum(total, axis=1), mask=there)


def _dense(images: Tensor, layout: torch.memory_format) -> Tensor:
    """Each sample in the layout, whatever the strides between them."""
    return images if images[:1].is_contiguous(memory_format=layout) else images.contiguous(memory_format=layout)


def _walk(images: Tensor, alpha: Tensor, layout: torch.memory_format) -> tuple[Tensor, tuple[int, ...], list[int], int]:
    """Alpha as the kernels read it, the number of its rows, [their pixels, channels, frames, group, repeat, the
    distance of channels], strides of alpha]: as csrc/blend_checks.h says."""
    samples, channels, height, width = images.shape[0], images.shape[1], images.shape[-2], images.shape[-1]
    frames = images.shape[2] if images.dim() == 5 else 1
    last, full = layout != torch.contiguous_format, channels > 1 and alpha.shape[1] == channels
    pixel = channels if last and full else 1
    if alpha.dtype == torch.bool:
        alpha = alpha.view(torch.uint8)
    sizes, strides = alpha.shape, alpha.stride()
    if not (
        (pixel == 1 or strides[1] == 1)
        and (width == 1 or strides[-1] == pixel)
        and (height == 1 or strides[-2] == width * pixel)
    ):
        alpha = alpha.contiguous(memory_format=layout if pixel > 1 else torch.contiguous_format)
        strides = alpha.stride()
    pixels, planes = height * width * pixel, channels if full and not last else 1
    alpha_sample = 0 if sizes[0] == 1 else strides[0]
    alpha_channel = strides[1] if planes > 1 else 0
    alpha_frame = 0 if images.dim() == 4 or sizes[2] == 1 else strides[2]
    if frames == 1 or alpha_frame == pixels:
        pixels, frames = pixels * frames, 1
    if frames == 1 and alpha_channel == pixels:
        pixels, planes = pixels * planes, 1
    group, repeat = channels if last and not full else 1, 1 if last or full else channels
    plane = frames * pixels * group
    rows = samples * planes * frames
    walk = (pixels, planes, frames, group, repeat, plane)
    return alpha, walk, [alpha_sample, alpha_channel, alpha_frame], rows


def _blocks(walk: tuple[int, ...], rows: int) -> tuple[tuple[int], int, int]:
    group = triton.next_power_of_2(walk[3])
    pixels = max(1, BLOCK // group)
    return (rows * triton.cdiv(walk[0], pixels),), pixels, group


def _blend_into(output: Tensor, x: Tensor, y: Tensor, alpha: Tensor, partner: Tensor | None, layout: Any) -> None:
    if output.numel() == 0:
        return
    x, y = _dense(x, layout), _dense(y, layout)
    alpha, walk, strides, rows = _walk(x, alpha, layout)
    grid, pixels, group = _blocks(walk, rows)
    partner = None if partner is None else partner.contiguous()
    with torch.cuda.device_of(x):
        _blend_kernel[grid](
            x, y, alpha, partner, output, y.shape[0], *walk, x.stride(0), y.stride(0), output.stride(0), *strides,
            pixels, group, enable_fp_fusion=False,
        )  # fmt: skip


def blend(x: Tensor, y: Tensor, alpha: Tensor, partner: Tensor | None) -> Tensor:
    output = ops._blend_fake(x, y, alpha, partner)
    check_narrow("blend", x)
    _blend_into(output, x, y, alpha, partner, sample_format(x))
    return output


def blend_out(out: Tensor, x: Tensor, y: Tensor, alpha: Tensor, partner: Tensor | None) -> None:
    ops._out_fake(out, x, y, alpha, partner)
    check_narrow("blend_out", x)
    layout = memory_format(out)
    target = out if out.is_contiguous(memory_format=layout) else torch.empty_like(out, memory_format=layout)
    _blend_into(target, x, y, alpha, partner, layout)
    if target is not out:
        out.copy_(target)


def blend_backward(
    grad: Tensor, x: Tensor | None, y: Tensor | None, alpha: Tensor, partner: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    found = ops._backward_fake(grad, x, y, alpha, partner, needs)
    check_narrow("blend_backward", grad)
    if grad.numel() == 0:
        return found[0], found[1], found[2].zero_()
    layout = sample_format(grad if x is None else x)
    grad = _dense(grad, layout)
    if needs[2]:
        assert x is not None and y is not None
        x, y = _dense(x, layout), _dense(y, layout)
    own, other = (x, y) if needs[2] else (None, None)
    alpha, walk, strides, rows = _walk(grad, alpha, layout)
    grid, pixels, group = _blocks(walk, rows)
    partner = None if partner is None or not needs[2] else partner.contiguous()
    asked = [each if needed else None for each, needed in zip(found, needs, strict=True)]
    with torch.cuda.device_of(grad):
        _blend_gradients_kernel[grid](
            grad, own, other, alpha, partner, *asked, 0 if other is None else other.shape[0], *walk, grad.stride(0),
            0 if own is None else own.stride(0), 0 if other is None else other.stride(0), grad[0].numel(), *strides,
            pixels, group, enable_fp_fusion=False,
        )  # fmt: skip
    return found
