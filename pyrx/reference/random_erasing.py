"""Random erasing and Cutout in plain PyTorch: what csrc/kernels/random_erasing.h draws, and the boxes filled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyrx.reference.batch_mix import memory_format
from pyrx.reference.dropout import philox
from pyrx.reference.random import DRAW_DOMAIN, below, exp_negative, happens, log_positive, normal, sqrt

RANDOM_ERASING, CUTOUT = range(2)
CONST, RAND, PIXEL = range(3)
ATTEMPTS = 10
FIRST_DRAW, CHANNEL_NOISE, PIXEL_NOISE = 256, 2**32 - 2, 2**32 - 1


class Draw(NamedTuple):
    """What boxes are drawn from; prob is out of 65536, see csrc/kernels/random_erasing.h."""

    kind: int
    prob: int
    min_count: int
    max_count: int
    min_scale: float
    max_scale: float
    min_ratio: float
    max_ratio: float
    num_splits: int
    per_sample: bool


def _uniform(word: Tensor) -> Tensor:
    return (word.double() + 0.5) * 2.0**-32


def _log(x: float, device: torch.device) -> Tensor:
    return log_positive(torch.full((), x, dtype=torch.float64, device=device))


def _random_erasing_box(
    seed: Tensor, index: Tensor, box: int, count: Tensor, height: int, width: int, draw: Draw
) -> Tensor:
    """(N, 4): box `box` of images that have `count` (N,)."""
    result = torch.zeros((len(index), 4), dtype=torch.int64, device=index.device)
    done = torch.zeros_like(index, dtype=torch.bool)
    least, most = _log(draw.min_ratio, index.device), _log(draw.max_ratio, index.device)
    area = float(height) * float(width) / count.clamp(min=1).double()
    for attempt in range(ATTEMPTS):
        words = philox(seed, index, FIRST_DRAW + 1 + box * ATTEMPTS + attempt, DRAW_DOMAIN)
        share = draw.min_scale + (draw.max_scale - draw.min_scale) * _uniform(words[:, 0])
        log_ratio = least + (most - least) * _uniform(words[:, 1])
        lesser = exp_negative(-log_ratio.abs())
        shorter = (sqrt(share * area * lesser) + 0.5).long()
        longer = (sqrt(share * area / lesser) + 0.5).long()
        wide = log_ratio < 0
        box_height, box_width = torch.where(wide, shorter, longer), torch.where(wide, longer, shorter)
        fits = (box_height < height) & (box_width < width)
        y0, x0 = below(words[:, 2], height - box_height + 1), below(words[:, 3], width - box_width + 1)
        found = torch.stack([y0, x0, y0 + box_height, x0 + box_width], 1)
        result = torch.where((fits & ~done)[:, None], found, result)
        done = done | fits
    return result


def _cutout_box(seed: Tensor, index: Tensor, box: int, height: int, width: int, draw: Draw) -> Tensor:
    words = philox(seed, index, FIRST_DRAW + 1 + box * ATTEMPTS, DRAW_DOMAIN)
    side = int(draw.min_scale * float(min(height, width)))
    y, x = below(words[:, 0], height) - side // 2, below(words[:, 1], width) - side // 2
    return torch.stack(
        [y.clamp(0, height), x.clamp(0, width), (y + side).clamp(0, height), (x + side).clamp(0, width)], 1
    )


def draw_boxes(seed: Tensor, samples: int, height: int, width: int, draw: Draw) -> Tensor:
    """(N, max_count, 4) int64: y0, x0, y1, x1; boxes that an image does not have are 0."""
    sample = torch.arange(samples, device=seed.device)
    index = sample if draw.per_sample else torch.zeros_like(sample)
    words = philox(seed, index, FIRST_DRAW, DRAW_DOMAIN)
    erased = happens(words[:, 0], draw.prob)
    if draw.num_splits > 1:
        erased = erased & (sample >= samples // draw.num_splits)
    count = torch.where(erased, draw.min_count + below(words[:, 1], draw.max_count - draw.min_count + 1), 0)
    boxes = []
    for box in range(draw.max_count):
        if draw.kind == CUTOUT:
            found = _cutout_box(seed, index, box, height, width, draw)
        else:
            found = _random_erasing_box(seed, index, box, count, height, width, draw)
        boxes.append(torch.where((box < count)[:, None], found, 0))
    return torch.stack(boxes, 1)


def fill(images: Tensor, boxes: Tensor, seed: Tensor, mode: int, value: Sequence[float], per_sample: bool) -> Tensor:
    """Images (N, C, [T,] H, W) with boxes (N, K, 4) filled, later ones over earlier ones."""
    samples, channels = images.shape[:2]
    count = boxes.shape[1]
    tail = [1] * (images.dim() - 2)
    y = torch.arange(images.shape[-2], device=images.device)[:, None]
    x = torch.arange(images.shape[-1], device=images.device)
    if mode == CONST:
        # filled on the device, where a list would be copied to; no value at all is that of no channels
        each = [torch.full((), v, dtype=torch.float64, device=images.device) for v in value or [0.0]]
        fills = [torch.stack(each).to(images.dtype).reshape(1, -1, *tail)] * count
    elif mode == PIXEL:
        fills = [normal(seed, images.numel(), PIXEL_NOISE).reshape(images.shape).to(images.dtype)] * count
    else:
        draws = samples if per_sample else 1
        drawn = normal(seed, draws * count * channels, CHANNEL_NOISE).reshape(draws, count, channels, *tail)
        fills = list(drawn.to(images.dtype).unbind(1))
    result = images
    for box, filling in zip(boxes.unbind(1), fills, strict=True):
        y0, x0, y1, x1 = (each.reshape(-1, 1, *tail) for each in box.unbind(1))
        result = torch.where((y >= y0) & (y < y1) & (x >= x0) & (x < x1), filling, result)
    return result.clone(memory_format=memory_format(images))


def random_erasing(
    images: Tensor, seed: Tensor, boxes: Tensor | None, draw: Draw, mode: int, value: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """(erased images, boxes)."""
    if boxes is None:
        boxes = draw_boxes(seed, images.shape[0], images.shape[-2], images.shape[-1], draw)
    else:
        boxes = boxes.clone(memory_format=torch.contiguous_format)
    return fill(images, boxes, seed, mode, value, draw.per_sample), boxes
