"""Random erasing and Cutout: one launch draws the boxes, one copies and fills."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrx.ops import random_erasing as ops
from pyrx.reference.random import log_positive
from pyrx.reference.random_erasing import CONST, CUTOUT, PIXEL, Draw

from .dropout import check_narrow, philox
from .noise import normal
from .random import DRAW_DOMAIN, below, exp_negative, float64_bits, float64_of, happens

FIRST_DRAW = tl.constexpr(256)
CHANNEL_NOISE = tl.constexpr(2**32 - 2)
PIXEL_NOISE = tl.constexpr(2**32 - 1)
ATTEMPTS = tl.constexpr(10)
BLOCK = 1024
DRAWS = 32


@triton.jit
def _uniform(word):
    return (word.to(tl.int64).to(tl.float64) + 0.5) * 2.3283064365386963e-10


@triton.jit
def _clip(value, high):
    return tl.minimum(tl.maximum(value, 0), high)


# Bytes: 32 a box. Operations: up to 10 Philox calls a box.
@triton.jit(do_not_specialize=["prob", "min_count", "first"])
def _boxes_kernel(
    boxes, seed, samples, count, height, width, prob, min_count, min_scale, max_scale, least, most, first, side,
    CUT: tl.constexpr, PER_SAMPLE: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """Doubles come as their bits; side: of Cutout's squares."""
    flat = tl.program_id(0).to(tl.int64) * DRAWS + tl.arange(0, DRAWS)
    sample = flat // count
    box = flat % count
    index = sample if PER_SAMPLE else sample * 0
    height = tl.cast(height, tl.int64)
    width = tl.cast(width, tl.int64)
    w0, w1, _, _ = philox(seed, index, tl.cast(FIRST_DRAW, tl.int64), DRAW_DOMAIN)
    own = tl.cast(min_count, tl.int64) + below(w1, tl.cast(count, tl.int64) - min_count + 1)
    own = tl.where((sample >= first) & happens(w0, tl.cast(prob, tl.int64)), own, 0)
    y0 = flat * 0
    x0 = flat * 0
    y1 = flat * 0
    x1 = flat * 0
    word2 = box * ATTEMPTS + FIRST_DRAW + 1
    if CUT:
        w0, w1, _, _ = philox(seed, index, word2, DRAW_DOMAIN)
        y = below(w0, height) - side // 2
        x = below(w1, width) - side // 2
        y0, x0, y1, x1 = _clip(y, height), _clip(x, width), _clip(y + side, height), _clip(x + side, width)
    else:
        low = float64_of(min_scale)
        span = float64_of(max_scale) - low
        low_log = float64_of(least)
        span_log = float64_of(most) - low_log
        area = height.to(tl.float64) * width.to(tl.float64) / tl.maximum(own, 1).to(tl.float64)
        done = flat < 0
        for attempt in range(ATTEMPTS):
            w0, w1, w2, w3 = philox(seed, index, word2 + attempt, DRAW_DOMAIN)
            share = low + span * _uniform(w0)
            log_ratio = low_log + span_log * _uniform(w1)
            lesser = exp_negative(-tl.abs(log_ratio))
            shorter = (tl.sqrt(share * area * lesser) + 0.5).to(tl.int64)
            longer = (tl.sqrt(share * area / lesser) + 0.5).to(tl.int64)
            h = tl.where(log_ratio < 0, shorter, longer)
            w = tl.where(log_ratio < 0, longer, shorter)
            fits = (h < height) & (w < width)
            new = fits & (done == 0)
            y = below(w2, height - h + 1)
            x = below(w3, width - w + 1)
            y0 = tl.where(new, y, y0)
            x0 = tl.where(new, x, x0)
            y1 = tl.where(new, y + h, y1)
            x1 = tl.where(new, x + w, x1)
            done = done | fits
    there = box < own
    inside = flat < samples * count
    tl.store(boxes + flat * 4, tl.where(there, y0, 0), mask=inside)
    tl.store(boxes + flat * 4 + 1, tl.where(there, x0, 0), mask=inside)
    tl.store(boxes + flat * 4 + 2, tl.where(there, y1, 0), mask=inside)
    tl.store(boxes + flat * 4 + 3, tl.where(there, x1, 0), mask=inside)


# Bytes: 4 an element. Operations: ~300 an element.
@triton.jit
def _channel_noise_kernel(output, seed, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(output + at, normal(seed, at, tl.cast(CHANNEL_NOISE, tl.int64)), mask=at < numel)


# Bytes: 1 read and 1 write; in place 1 write of the boxes. Operations: ~30 an element for its place, ~10 a box; ~300
# more for noise in blocks of elements that a box touches.
@triton.jit
def _erase_kernel(
    images, output, boxes, fills, seed, count, elements, step, row, height, frames, channels, fill_sample, fill_box,
    fill_channel, COPY: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    programs = tl.cdiv(elements, BLOCK)  # of a sample
    sample = (tl.program_id(0) // programs).to(tl.int64)
    at = (tl.program_id(0) % programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < elements
    x = at % row // step
    y = at // row % height
    plane = at // row // height
    channel = at % step
    if step == 1:
        channel = plane // frames
    values = tl.zeros((BLOCK,), output.dtype.element_ty)
    if COPY:
        values = tl.load(images + sample * elements + at, mask=here)
    touched = at < 0
    for k in range(count):
        box = boxes + (sample * count + k) * 4
        inside = (y >= tl.load(box)) & (x >= tl.load(box + 1)) & (y < tl.load(box + 2)) & (x < tl.load(box + 3))
        touched = touched | inside
        if not NOISE:
            fill = tl.load(fills + sample * fill_sample + k * fill_box + channel * fill_channel, mask=inside & here)
            values = tl.where(inside, fill.to(output.dtype.element_ty), values)
    touched = touched & here
    if NOISE:
        if tl.max(touched.to(tl.int32), 0) != 0:
            width = row // step
            element = (((sample * channels + channel) * frames + plane % frames) * height + y) * width + x
            drawn = normal(seed, element, tl.cast(PIXEL_NOISE, tl.int64))
            values = tl.where(touched, drawn.to(output.dtype.element_ty), values)
    tl.store(output + sample * elements + at, values, mask=here if COPY else touched)


def _draw(images: Tensor, boxes: Tensor, seed: Tensor, draw: Draw) -> None:
    samples, height, width = images.shape[0], images.shape[-2], images.shape[-1]
    least, most = (
        float64_bits(float(log_positive(torch.tensor(each, dtype=torch.float64, device="cpu"))))
        for each in (draw.min_ratio, draw.max_ratio)
    )
    first = samples // draw.num_splits if draw.num_splits > 1 else 0
    side = int(draw.min_scale * float(min(height, width)))
    _boxes_kernel[(triton.cdiv(samples * draw.max_count, DRAWS),)](
        boxes, seed, samples, draw.max_count, height, width, draw.prob, draw.min_count, float64_bits(draw.min_scale),
        float64_bits(draw.max_scale), least, most, first, side, draw.kind == CUTOUT, draw.per_sample, DRAWS,
        enable_fp_fusion=False,
    )  # fmt: skip


def _erase(
    images: Tensor, output: Tensor, seed: Tensor, boxes: Tensor | None, draw: Draw, filling: int, value: Sequence[float]
) -> Tensor:
    """The boxes. Images and output have one dense layout and may be the same."""
    check_narrow("random_erasing", images)
    samples, channels, device = images.shape[0], images.shape[1], images.device
    count = draw.max_count if boxes is None else boxes.shape[1]
    found = torch.empty((samples, count, 4), dtype=torch.int64, device=device)
    with torch.cuda.device_of(images):
        if boxes is not None:
            found.copy_(boxes)
        elif samples:
            _draw(images, found, seed, draw)
        if images.numel() == 0:
            return found
        strides = (0, 0, 0)
        if filling == CONST:
            fills = torch.empty(len(value), device=device)
            for c, each in enumerate(value):
                fills[c].fill_(each)  # a copy from the host would sync
            strides = (0, 0, int(len(value) > 1))
        else:
            rows = (samples if draw.per_sample else 1) if filling != PIXEL else 0
            fills = torch.empty((rows, count, channels), device=device)
            if fills.numel():
                _channel_noise_kernel[(triton.cdiv(fills.numel(), BLOCK),)](
                    fills, seed, fills.numel(), BLOCK, enable_fp_fusion=False
                )
            strides = (count * channels if draw.per_sample else 0, channels, 1)
        frames = images.shape[2] if images.dim() == 5 else 1
        step = 1 if images.is_contiguous() else channels
        elements = images.numel() // samples
        _erase_kernel[(triton.cdiv(elements, BLOCK) * samples,)](
            images, output, found, fills, seed, count, elements, step, images.shape[-1] * step, images.shape[-2],
            frames, channels, *strides, images is not output, filling == PIXEL, BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return found


def random_erasing(images: Tensor, seed: Tensor, boxes: Tensor | None, *rest: object) -> tuple[Tensor, Tensor]:
    output, _ = ops._fake(images, seed, boxes, *rest)
    *draw, filling, value = rest
    dense = images.contiguous(memory_format=ops.memory_format(images))
    return output, _erase(dense, output, seed, boxes, Draw(*draw), filling, value)  # type: ignore[arg-type]


def random_erasing_(images: Tensor, seed: Tensor, boxes: Tensor | None, *rest: object) -> Tensor:
    ops._inplace_fake(images, seed, boxes, *rest)
    *draw, filling, value = rest
    dense = images.contiguous(memory_format=ops.memory_format(images))
    found = _erase(dense, dense, seed, boxes, Draw(*draw), filling, value)  # type: ignore[arg-type]
    if dense is not images:
        images.copy_(dense)
    return found
