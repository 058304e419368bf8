"""CutMix, mixup and ResizeMix in plain PyTorch: what csrc/kernels/batch_mix.h draws, and the mixing of the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from pyrx.reference.dropout import philox
from pyrx.reference.random import DRAW_DOMAIN, PAIR_DOMAIN, below, beta, happens, sqrt, uniform

FLIP, ROLL, RANDOM, GIVEN = range(4)
PER_BATCH, PER_PAIR, PER_SAMPLE = range(3)
MIXUP, CUTMIX, RESIZEMIX, EITHER = range(4)


class Draw(NamedTuple):
    """What lam and boxes are drawn from; prob and switch_prob are out of 65536, see csrc/kernels/batch_mix.h."""

    kind: int
    granularity: int
    prob: int
    switch_prob: int
    mixup_alpha: float
    cutmix_alpha: float
    minimum: float
    maximum: float
    correct_lam: bool


class Mixes(NamedTuple):
    """Of each of N samples: its partner, the weights of its own label and pixels, its box; boxes are -1 without one."""

    partner: Tensor  # (N,) int64
    lam: Tensor  # (N,) float32
    weight: Tensor  # (N,) float32
    boxes: Tensor  # (N, 4) int64: y0, x0, y1, x1


def partners(seed: Tensor, samples: int, pairing: int) -> Tensor:
    index = torch.arange(samples, device=seed.device)
    if pairing == FLIP:
        return samples - 1 - index
    if pairing == ROLL:
        return torch.where(index == 0, samples - 1, index - 1)
    words = philox(seed, index, 0, PAIR_DOMAIN)
    keys = ((words[:, 0] << 31 | words[:, 1] >> 1) & ~0xFFFFFF) | index
    order = keys.argsort()
    rank = torch.empty_like(order).scatter_(0, order, index)
    other = rank ^ 1
    return order[torch.where(other < samples, other, rank)]


def _area_lam(boxes: Tensor, height: int, width: int) -> Tensor:
    y0, x0, y1, x1 = boxes.unbind(1)
    area = ((y1 - y0) * (x1 - x0)).double()
    return torch.where(area == 0, 1.0, 1 - area / (float(height) * width)).float()


def _cutmix_boxes(lam: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    ratio = sqrt(1 - lam.double())

    def side(word: Tensor, size: int) -> tuple[Tensor, Tensor]:
        half, centre = (ratio * float(size)).long() // 2, below(word, size)
        return (centre - half).clamp(0, size), (centre + half).clamp(0, size)

    (y0, y1), (x0, x1) = side(y, height), side(x, width)
    return torch.stack([y0, x0, y1, x1], 1)


def _minmax_boxes(sides: Tensor, y: Tensor, x: Tensor, height: int, width: int, draw: Draw) -> Tensor:
    def side(length: Tensor, word: Tensor, size: int) -> tuple[Tensor, Tensor]:
        least, most = int(draw.minimum * float(size)), int(draw.maximum * float(size))
        length = least + (below(length, most - least) if most > least else torch.zeros_like(length))
        start = below(word, size - length + 1)
        return start, start + length

    (y0, y1), (x0, x1) = side(sides[:, 0], y, height), side(sides[:, 1], x, width)
    return torch.stack([y0, x0, y1, x1], 1)


def _resizemix_boxes(scale: Tensor, y: Tensor, x: Tensor, height: int, width: int, draw: Draw) -> Tensor:
    ratio = draw.minimum + (draw.maximum - draw.minimum) * uniform(scale[:, 0], scale[:, 1])

    def side(word: Tensor, size: int) -> tuple[Tensor, Tensor]:
        length = (ratio * float(size)).long().clamp(min(size, 1), size)
        start = torch.minimum((below(word, size) - length // 2).clamp(min=0), size - length)
        return start, start + length

    (y0, y1), (x0, x1) = side(y, height), side(x, width)
    return torch.stack([y0, x0, y1, x1], 1)


def draw_mixes(
    seed: Tensor,
    samples: int,
    height: int,
    width: int,
    lam: Tensor | None,
    boxes: Tensor | None,
    partner: Tensor | None,
    pairing: int,
    draw: Draw,
) -> Mixes:
    """The mixes of `samples` images of height x width; lam, boxes and partner are taken where they are given."""
    partner = partners(seed, samples, pairing) if partner is None else partner.clone()
    if boxes is not None:
        without = boxes[:, 0] < 0
        lam = _area_lam(boxes, height, width) if lam is None else lam.clone()
        return Mixes(partner, lam, torch.where(without, lam, 1.0), boxes.clone())
    index = torch.arange(samples, device=seed.device)
    if draw.granularity == PER_BATCH:
        index = torch.zeros_like(index)
    elif draw.granularity == PER_PAIR:
        index = torch.minimum(index, partner)
    words = philox(seed, index, 0, DRAW_DOMAIN)
    paste = torch.full_like(index, draw.kind != MIXUP, dtype=torch.bool)
    if draw.kind == EITHER:
        paste = happens(words[:, 3], draw.switch_prob)
    mixed_lam = pasted_lam = lam
    if lam is None:
        mixed_lam = pasted_lam = torch.ones(samples, dtype=torch.float32, device=seed.device)
        if draw.kind in (MIXUP, EITHER):
            mixed_lam = beta(seed, index, draw.mixup_alpha).float()
        if draw.kind in (CUTMIX, EITHER) and draw.maximum == 0:
            pasted_lam = beta(seed, index, draw.cutmix_alpha).float()
    assert mixed_lam is not None and pasted_lam is not None
    if draw.maximum > 0:
        sides = philox(seed, index, 1, DRAW_DOMAIN)
        make = _resizemix_boxes if draw.kind == RESIZEMIX else _minmax_boxes
        pasted = make(sides, words[:, 1], words[:, 2], height, width, draw)
    else:
        pasted = _cutmix_boxes(pasted_lam, words[:, 1], words[:, 2], height, width)
    if draw.maximum > 0 or draw.correct_lam:
        pasted_lam = _area_lam(pasted, height, width)
    apply = happens(words[:, 0], draw.prob)
    lam = torch.where(apply, torch.where(paste, pasted_lam, mixed_lam), 1.0)
    weight = torch.where(apply & ~paste, mixed_lam, 1.0)
    return Mixes(partner, lam, weight, torch.where(apply[:, None], torch.where(paste[:, None], pasted, -1), 0))


def _shaped(values: Tensor, images: Tensor) -> Tensor:
    """(N,) as (N, 1, ..., 1)."""
    return values.reshape(-1, *[1] * (images.dim() - 1))


# what torch neither gathers nor chooses from; pixels of these are only moved
MOVED_AS = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e5m2: torch.int8,
}


def _inside(boxes: Tensor, images: Tensor) -> Tensor:
    """(N, 1, .., H, W) bool; a box of -1 holds nothing."""
    y = torch.arange(images.shape[-2], device=images.device)[:, None]
    x = torch.arange(images.shape[-1], device=images.device)
    y0, x0, y1, x1 = (_shaped(each, images) for each in boxes.unbind(1))
    return (y >= y0) & (y < y1) & (x >= x0) & (x < x1)


def _source(boxes: Tensor, images: Tensor) -> Tensor:
    """(N, C, .., H W) flat index of the pixel that a box's pixel shows when the whole image is shrunk into it."""
    height, width = images.shape[-2:]
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    y0, x0, y1, x1 = (each[:, None] for each in boxes.unbind(1))
    rows = (y - y0) * height // (y1 - y0).clamp(min=1)
    columns = (x - x0) * width // (x1 - x0).clamp(min=1)
    flat = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    shape = (len(images), *[1] * (images.dim() - 3), height * width)
    return flat.reshape(shape).expand(*images.shape[:-2], -1)


def _per_channel(values: Sequence[float], images: Tensor, dtype: torch.dtype) -> Tensor:
    # filled, since a copy from the host syncs
    each = [torch.full((), value, dtype=dtype, device=images.device) for value in values]
    return torch.stack(each).reshape(-1, *[1] * (images.dim() - 2))


def mix(
    images: Tensor,
    mixes: Mixes,
    resize: bool = False,
    scale: Sequence[float] = (),
    bias: Sequence[float] = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Images (N, C, ..., H, W) under the mixes, times scale plus bias (C,) if given, each operation rounded alone."""
    dtype = images.dtype if dtype is None else dtype
    if images.dtype in MOVED_AS:
        return mix(images.view(MOVED_AS[images.dtype]), mixes, resize).view(dtype)
    partner = images.index_select(0, mixes.partner)
    inside = _inside(mixes.boxes, images)
    if resize:
        shrunk = partner.flatten(-2).gather(-1, _source(mixes.boxes, images)).view(images.shape)
        partner = torch.where(inside, shrunk, partner)
    weight = _shaped(mixes.weight, images)
    whole = inside | (weight == 0), ~inside & (weight == 1)
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        return torch.where(whole[0], partner, images).contiguous(memory_format=memory_format(images))
    accumulate = torch.float64 if torch.float64 in (images.dtype, dtype) else torch.float32
    own, other, weight = images.to(accumulate), partner.to(accumulate), weight.to(accumulate)
    mixed = torch.where(whole[0], other, torch.where(whole[1], own, own * weight + other * (1 - weight)))
    if scale:
        mixed = mixed * _per_channel(scale, images, accumulate) + _per_channel(bias, images, accumulate)
    mixed = (mixed if dtype.is_floating_point else mixed.round()).to(dtype)
    if images.dtype == dtype and not scale:
        # what is only copied keeps its bits, those of NaNs
        mixed = torch.where(whole[0], partner, torch.where(whole[1], images, mixed))
    return mixed.contiguous(memory_format=memory_format(images))


def mix_backward(grad: Tensor, mixes: Mixes, resize: bool, scale: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The gradient of images of `dtype`: mix is linear in them, and this its adjoint."""
    accumulate = torch.float64 if torch.float64 in (grad.dtype, dtype) else torch.float32
    upstream = grad.to(accumulate)
    if scale:
        upstream = upstream * _per_channel(scale, grad, accumulate)
    inside = _inside(mixes.boxes, grad)
    weight = _shaped(mixes.weight, grad).to(accumulate)
    zero = torch.zeros((), dtype=accumulate, device=grad.device)
    whole = inside | (weight == 0), ~inside & (weight == 1)
    own = torch.where(whole[0], zero, upstream * weight)
    other = torch.where(whole[0], upstream, torch.where(whole[1], zero, upstream * (1 - weight)))
    if resize:
        # no two pixels of a box show the same one; what lies outside it goes nowhere
        nowhere = grad.shape[-1] * grad.shape[-2]
        at = torch.where(inside.flatten(-2), _source(mixes.boxes, grad), nowhere)
        wide = torch.zeros((*grad.shape[:-2], nowhere + 1), dtype=accumulate, device=grad.device)
        shrunk = wide.scatter(-1, at, other.flatten(-2))[..., :-1].reshape(grad.shape)
        other = torch.where(inside, 0, other) + shrunk
    # each sample is the partner of one, so that nothing is summed in an order of its own
    return own.index_add(0, mixes.partner, other).to(dtype)


def memory_format(images: Tensor) -> torch.memory_format:
    """The layout of the result: channels last where the images' strides are such, else contiguous."""
    if images.is_contiguous():
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(images.dim())
    if last is not None and images.is_contiguous(memory_format=last):
        return last
    return suggest_memory_format(images)


def batch_mix(
    images: Tensor,
    labels: Tensor | None,
    seed: Tensor,
    lam: Tensor | None,
    boxes: Tensor | None,
    partner: Tensor | None,
    pairing: int,
    draw: Draw,
    scale: Sequence[float],
    bias: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Mixes]:
    """(mixed images, the partners' labels, the mixes)."""
    mixes = draw_mixes(seed, images.shape[0], images.shape[-2], images.shape[-1], lam, boxes, partner, pairing, draw)
    mixed = mix(images, mixes, draw.kind == RESIZEMIX, scale, bias, dtype)
    partner_labels = mixes.partner.new_empty(0) if labels is None else labels.index_select(0, mixes.partner)
    return mixed, partner_labels, mixes
