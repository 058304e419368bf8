"""CutMix, mixup and ResizeMix in Triton: every program makes its sample's draw itself, so that a call is one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrx._checks import FLOAT_DTYPES
from pyrx.ops import batch_mix as ops
from pyrx.reference.batch_mix import CUTMIX, EITHER, MIXUP, RESIZEMIX, Draw, memory_format

from .dropout import check_narrow, philox
from .random import DRAW_DOMAIN, PAIR_DOMAIN, below, beta, float64_bits, float64_of, happens, uniform

# Of a tile, in the wider of the images' and the result's dtype.
TILE_BYTES = 4096
# A program goes through several tiles once there are this many, since each makes the draw anew.
PROGRAMS = 2048
# Elements of a sample from which on they are counted in 64 bits.
WIDE = 2**31

FLIP, ROLL, RANDOM, GIVEN = (tl.constexpr(each) for each in range(4))
PER_BATCH, PER_PAIR, PER_SAMPLE = (tl.constexpr(each) for each in range(3))
# What a box's sides are drawn from: lam (CutMix), a range each (minmax), one range for both (ResizeMix).
BY_LAM, EACH, BOTH = (tl.constexpr(each) for each in range(3))
KEYS = tl.constexpr(256)
SAMPLE_BITS = tl.constexpr(2**24 - 1)
NO_KEY = tl.constexpr(2**63 - 1)
# float32 has no fraction from here on: adding it rounds to the nearest integer, halves to even
ROUNDER = tl.constexpr(2.0**23)

# Numbers that change from call to call and must not each compile a kernel of their own.
_VARYING = [
    "samples", "planes", "height", "chunks", "step", "frames", "prob", "switch_prob", "mixup_alpha", "cutmix_alpha",
    "minimum", "maximum", "correct",
]  # fmt: skip


@triton.jit
def _pairing_key(seed, sample):
    w0, w1, _, _ = philox(seed, sample, tl.cast(0, tl.int32), PAIR_DOMAIN)
    drawn = (w0.to(tl.int64) << 31) | (w1 >> 1).to(tl.int64)
    return (drawn & ~SAMPLE_BITS) | sample


@triton.jit
def _matched(seed, n, samples):
    """The partner of n in a random matching: ranks 2k and 2k + 1 among the keys of all samples are joined."""
    key = _pairing_key(seed, n)
    rank = tl.zeros((KEYS,), tl.int64)
    lesser = tl.full((KEYS,), -1, tl.int64)
    greater = tl.full((KEYS,), NO_KEY, tl.int64)
    for first in range(0, samples, KEYS):
        other = tl.cast(first, tl.int64) + tl.arange(0, KEYS)
        others = tl.where(other < samples, _pairing_key(seed, other), NO_KEY)
        rank += (others < key).to(tl.int64)
        lesser = tl.maximum(lesser, tl.where(others < key, others, -1))
        greater = tl.minimum(greater, tl.where(others > key, others, NO_KEY))
    after = tl.min(greater, 0)
    after = tl.where(after == NO_KEY, key, after)  # the last of an odd number stays alone
    return tl.where((tl.sum(rank, 0) & 1) == 1, tl.max(lesser, 0), after) & SAMPLE_BITS


@triton.jit
def _partner(partner, seed, n, samples, PAIRING: tl.constexpr, INPLACE: tl.constexpr):
    """(the partner of n, whether it can be mixed with): n itself where it cannot."""
    valid = n >= 0
    if PAIRING == FLIP:
        other = samples - 1 - n
    elif PAIRING == ROLL:
        other = tl.where(n == 0, samples, n) - 1
    elif PAIRING == RANDOM:
        other = _matched(seed, n, samples)
    else:
        other = tl.load(partner + n)
        valid = (other >= 0) & (other < samples)
        other = tl.where(valid, other, n)
        if INPLACE:
            valid = valid & (tl.load(partner + other) == n)
            other = tl.where(valid, other, n)
    return other, valid


@triton.jit
def _clip(value, low, high):
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def _lam_side(ratio, word, size):
    half = (ratio * size.to(tl.float64)).to(tl.int64) // 2
    centre = below(word, size)
    return _clip(centre - half, 0, size), _clip(centre + half, 0, size)


@triton.jit
def _range_side(minimum, maximum, length_word, word, size):
    least = (minimum * size.to(tl.float64)).to(tl.int64)
    most = (maximum * size.to(tl.float64)).to(tl.int64)
    length = least + below(length_word, most - least)
    start = below(word, size - length + 1)
    return start, start + length


@triton.jit
def _scale_side(ratio, word, size):
    length = _clip((ratio * size.to(tl.float64)).to(tl.int64), tl.minimum(size, 1), size)
    start = _clip(below(word, size) - length // 2, 0, size - length)
    return start, start + length


@triton.jit
def _area_lam(y0, x0, y1, x1, height, width):
    area = ((y1 - y0) * (x1 - x0)).to(tl.float64)
    share = 1 - area / (height.to(tl.float64) * width.to(tl.float64))
    return tl.where(area == 0, 1.0, share).to(tl.float32)


@triton.jit
def _mix(
    seed, lam, boxes, n, partner, valid, height, width, draw,
    GRANULARITY: tl.constexpr, SIDES: tl.constexpr, BETAS: tl.constexpr, BLEND: tl.constexpr,
):  # fmt: skip
    """(lam, weight of its own pixels, box) of each of a block of samples.

    Left as they are, lam NaN, where what was given is not valid.
    """
    prob, switch_prob, mixup_alpha, cutmix_alpha, minimum, maximum, correct = draw
    share = tl.full(n.shape, 1.0, tl.float32)
    if lam is not None:
        share = tl.load(lam + n)
        valid = valid & (share >= 0) & (share <= 1)
    if boxes is not None:
        y0 = tl.load(boxes + 4 * n)
        x0 = tl.load(boxes + 4 * n + 1)
        y1 = tl.load(boxes + 4 * n + 2)
        x1 = tl.load(boxes + 4 * n + 3)
        held = (y0 >= 0) & (y0 <= y1) & (y1 <= height) & (x0 >= 0) & (x0 <= x1) & (x1 <= width)
        if lam is None:
            share = _area_lam(y0, x0, y1, x1, height, width)
            valid = valid & held
        else:
            valid = valid & (held | ((y0 == -1) & (x0 == -1) & (y1 == -1) & (x1 == -1)))
        weight = tl.where(y0 < 0, share, 1.0)
    else:
        if GRANULARITY == PER_SAMPLE:
            index = n
        elif GRANULARITY == PER_PAIR:
            index = tl.minimum(n, partner)
        else:
            index = n * 0
        w0, w1, w2, w3 = philox(seed, index, tl.cast(0, tl.int32), DRAW_DOMAIN)
        apply = happens(w0, prob)
        paste = happens(w3, switch_prob)
        if BETAS > 0:
            share = beta(seed, index, mixup_alpha).to(tl.float32)
        if BETAS > 1:
            share = tl.where(paste, beta(seed, index, cutmix_alpha).to(tl.float32), share)
        if SIDES == BY_LAM:
            ratio = tl.sqrt(1 - share.to(tl.float64))
            y0, y1 = _lam_side(ratio, w1, height)
            x0, x1 = _lam_side(ratio, w2, width)
        else:
            v0, v1, _, _ = philox(seed, index, tl.cast(1, tl.int32), DRAW_DOMAIN)
            if SIDES == EACH:
                y0, y1 = _range_side(minimum, maximum, v0, w1, height)
                x0, x1 = _range_side(minimum, maximum, v1, w2, width)
            else:
                ratio = minimum + (maximum - minimum) * uniform(v0, v1)
                y0, y1 = _scale_side(ratio, w1, height)
                x0, x1 = _scale_side(ratio, w2, width)
        corrected = tl.where(paste & (correct != 0), _area_lam(y0, x0, y1, x1, height, width), share)
        weight = tl.where(apply & (paste == 0), share, 1.0)
        share = tl.where(apply, corrected, 1.0)
        unset = tl.where(apply, -1, 0).to(tl.int64)
        pasted = apply & paste
        y0 = tl.where(pasted, y0, unset)
        x0 = tl.where(pasted, x0, unset)
        y1 = tl.where(pasted, y1, unset)
        x1 = tl.where(pasted, x1, unset)
    if not BLEND:
        weight = tl.where(weight == 0, 0.0, 1.0)
    share = tl.where(valid, share, float("nan"))
    weight = tl.where(valid, weight, 1.0)
    return share, weight, tl.where(valid, y0, 0), tl.where(valid, x0, 0), tl.where(valid, y1, 0), tl.where(valid, x1, 0)


@triton.jit
def _pick(mixes, chosen):
    """One of a block of mixes."""
    share, weight, y0, x0, y1, x1 = mixes
    return (
        tl.sum(tl.where(chosen, share, 0.0), 0), tl.sum(tl.where(chosen, weight, 0.0), 0),
        tl.sum(tl.where(chosen, y0, 0), 0), tl.sum(tl.where(chosen, x0, 0), 0),
        tl.sum(tl.where(chosen, y1, 0), 0), tl.sum(tl.where(chosen, x1, 0), 0),
    )  # fmt: skip


@triton.jit
def _overlap(mix, y, column, chunk, step, VEC: tl.constexpr):
    """Of a tile: which elements lie in the box, and which chunks of VEC partly or wholly.

    Loads and stores are masked by the chunk, since a mask an element would make each access one element wide.
    """
    _, _, y0, x0, y1, x1 = mix
    rows = ((y >= y0.to(y.dtype)) & (y < y1.to(y.dtype)))[:, None]
    left = (x0 * step).to(column.dtype)
    right = (x1 * step).to(column.dtype)
    start = chunk * VEC
    inside = rows & ((column >= left) & (column < right))[None, :]
    partly = rows & ((start + VEC > left) & (start < right))[None, :]
    wholly = rows & ((start >= left) & (start + VEC <= right))[None, :]
    return inside, partly, wholly


@triton.jit
def _of_channel(values, channel):
    found = channel.to(tl.float32) * 0
    for i in tl.static_range(len(values)):
        found = tl.where(channel == i, values[i], found)
    return found


@triton.jit
def _blend(own, other, inside, weight, scale, bias, OUT: tl.constexpr, BLEND: tl.constexpr):
    """The mixed elements, of dtype OUT; what is copied is never computed with, unless it is normalised."""
    if BLEND:
        mixed = own.to(tl.float32) * weight + other.to(tl.float32) * (1 - weight)
        if OUT == tl.uint8:
            mixed = (mixed + ROUNDER) - ROUNDER
        if scale is None and own.dtype == OUT:
            mixed = mixed.to(OUT)
        else:
            own = own.to(tl.float32)
            other = other.to(tl.float32)
        own = tl.where(weight == 1, own, mixed)
    result = tl.where(inside | (weight == 0), other, own)
    if scale is not None:
        result = result.to(tl.float32) * scale + bias
    elif result.dtype != OUT:
        result = result.to(tl.float32)
    return result.to(OUT)


# Bytes: 1 read and 1 write of the images (mixup of a pairing that is no involution: 2 reads); in place: of the union of
# the partners' boxes, mixup of all. Operations: an element ~10; a program ~1000 for its draw, 80 N more to be matched.
@triton.jit(do_not_specialize=_VARYING)
def _mix_kernel(
    images, output, labels, seed, lam, boxes, partner, out_labels, out_partner, out_lam, out_boxes,
    samples, planes, height, chunks, step, frames,
    prob, switch_prob, mixup_alpha, cutmix_alpha, minimum, maximum, correct, scales, biases,
    PAIRING: tl.constexpr, GRANULARITY: tl.constexpr, SIDES: tl.constexpr, BETAS: tl.constexpr, BLEND: tl.constexpr,
    PAIRED: tl.constexpr, INPLACE: tl.constexpr, RESIZE: tl.constexpr, LAST: tl.constexpr, INDEX: tl.constexpr,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sample n of `planes` x `height` rows of `chunks` x VEC elements, `step` a pixel; LAST: they are its channels.

    PAIRED: n is its partner's partner, and the programs of both mix both, half of the tiles each: a pixel is read once.
    """
    n = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(1)
    samples = tl.cast(samples, tl.int64)
    height = tl.cast(height, tl.int64)
    step = tl.cast(step, tl.int64)
    row = tl.cast(chunks, tl.int64) * VEC
    width = row // step
    draw = (
        tl.cast(prob, tl.int64), tl.cast(switch_prob, tl.int64), float64_of(mixup_alpha), float64_of(cutmix_alpha),
        float64_of(minimum), float64_of(maximum), correct,
    )  # fmt: skip
    m, valid = _partner(partner, seed, n, samples, PAIRING, INPLACE)
    # a block, so that the draws of a pair take the time of one
    at = tl.arange(0, 2 if PAIRED else 1)
    mixes = _mix(
        seed, lam, boxes, tl.where(at == 0, n, m), tl.where(at == 0, m, n), valid, height, width, draw,
        GRANULARITY, SIDES, BETAS, BLEND,
    )  # fmt: skip
    mix = _pick(mixes, at == 0)
    share, weight, y0, x0, y1, x1 = mix
    if part == 0:
        if labels is not None:
            tl.store(out_labels + n, tl.load(labels + m))
        tl.store(out_partner + n, m)
        tl.store(out_lam + n, share)
        tl.store(out_boxes + 4 * n, y0)
        tl.store(out_boxes + 4 * n + 1, x0)
        tl.store(out_boxes + 4 * n + 2, y1)
        tl.store(out_boxes + 4 * n + 3, x1)
    if PAIRED:
        other_mix = _pick(mixes, at == 1)
        _, other_weight, other_y0, other_x0, other_y1, other_x1 = other_mix
        if m != n:
            part = 2 * part + (n > m)
            parts = 2 * parts

    top, bottom = height * 0, height
    first, last = height * 0, tl.cast(chunks, tl.int64)
    if INPLACE:
        whole = (weight != 1) | (other_weight != 1)
        some = (y0 < y1) & (x0 < x1)
        other_some = (other_y0 < other_y1) & (other_x0 < other_x1)
        top = tl.minimum(tl.where(some, y0, height), tl.where(other_some, other_y0, height))
        bottom = tl.maximum(tl.where(some, y1, 0), tl.where(other_some, other_y1, 0))
        first = tl.minimum(tl.where(some, x0, width), tl.where(other_some, other_x0, width)) * step // VEC
        last = (tl.maximum(tl.where(some, x1, 0), tl.where(other_some, other_x1, 0)) * step + VEC - 1) // VEC
        top = tl.where(whole, 0, top)
        bottom = tl.maximum(tl.where(whole, height, bottom), top)
        first = tl.where(whole, 0, first)
        last = tl.maximum(tl.where(whole, chunks, last), first)
    rows = (bottom - top).to(INDEX)
    blocks = tl.cdiv((last - first) * VEC, COLUMNS)
    tiles = tl.cdiv(planes * (bottom - top), ROWS) * blocks

    sample = planes * height * row
    own_image = images + n * sample
    other_image = images + m * sample
    for tile in range(part, tiles, parts):
        r = ((tile // blocks) * ROWS).to(INDEX) + tl.arange(0, ROWS)
        plane = r // rows
        y = top.to(INDEX) + (r - plane * rows)
        column = ((tile % blocks) * COLUMNS + first * VEC).to(INDEX) + tl.arange(0, COLUMNS)
        chunk = column // VEC
        held = (r < planes * rows)[:, None] & (chunk < chunks)[None, :]
        offset = ((plane * height.to(INDEX) + y) * row.to(INDEX))[:, None] + column[None, :]
        scale = None
        bias = None
        if len(scales) > 0:
            if LAST:
                channel = column % step.to(INDEX)
                scale = _of_channel(scales, channel)[None, :]
                bias = _of_channel(biases, channel)[None, :]
            else:
                channel = plane // frames
                scale = _of_channel(scales, channel)[:, None]
                bias = _of_channel(biases, channel)[:, None]
        inside, partly, wholly = _overlap(mix, y, column, chunk, step, VEC)
        own_read = held & (weight != 0) & (wholly == 0)
        other_read = held & (partly | (weight != 1))
        if PAIRED:
            other_inside, other_partly, other_wholly = _overlap(other_mix, y, column, chunk, step, VEC)
            own_write, other_write = held, held & (m != n)
            if INPLACE:
                own_write = other_read
                other_write = held & (other_partly | (other_weight != 1)) & (m != n)
                own_read = (own_read & own_write) | other_write
                other_read = own_write | other_write
            else:
                own_read = own_read | (held & (other_partly | (other_weight != 1)))
                other_read = other_read | (held & (other_weight != 0) & (other_wholly == 0))
            own = tl.load(own_image + offset, mask=own_read)
            other = tl.load(other_image + offset, mask=other_read)
            mixed = _blend(own, other, inside, weight, scale, bias, output.dtype.element_ty, BLEND)
            other_mixed = _blend(other, own, other_inside, other_weight, scale, bias, output.dtype.element_ty, BLEND)
            tl.store(output + n * sample + offset, mixed, mask=own_write)
            tl.store(output + m * sample + offset, other_mixed, mask=other_write)
        else:
            source = offset
            if RESIZE:
                pixel = column // step.to(INDEX)
                shown_y = ((y - y0.to(INDEX)) * height.to(INDEX)) // tl.maximum(y1 - y0, 1).to(INDEX)
                shown_x = ((pixel - x0.to(INDEX)) * width.to(INDEX)) // tl.maximum(x1 - x0, 1).to(INDEX)
                shown_x = shown_x * step.to(INDEX) + (column - pixel * step.to(INDEX))
                shown = ((plane * height.to(INDEX) + shown_y) * row.to(INDEX))[:, None] + shown_x[None, :]
                source = tl.where(inside, shown, offset)
                other_read = held & (inside | (weight != 1))
            own = tl.load(own_image + offset, mask=own_read)
            other = tl.load(other_image + source, mask=other_read)
            mixed = _blend(own, other, inside, weight, scale, bias, output.dtype.element_ty, BLEND)
            tl.store(output + n * sample + offset, mixed, mask=held)


_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _columns(row: int) -> int:
    """A power of two that splits rows into tiles with little left over."""
    columns = min(triton.next_power_of_2(max(row, 1)), 512)
    while columns > 64 and triton.cdiv(row, columns) * columns > 1.25 * row:
        columns //= 2
    return columns


def _launch(
    images: Tensor,
    output: Tensor,
    layout: torch.memory_format,
    labels: Tensor | None,
    drawn: Sequence[Any],
    scale: Sequence[float],
    bias: Sequence[float],
    results: Sequence[Tensor],
) -> None:
    """Mixes `images` into `output`, in place if it is the same; both are laid out as `layout` says."""
    seed, lam, boxes, partner, pairing, *rest = drawn
    draw = Draw(*rest)
    samples, channels, *frame_sizes, height, width = images.shape
    if samples == 0:
        return
    inplace = output is images
    frames = frame_sizes[0] if frame_sizes else 1
    last = layout != torch.contiguous_format
    planes, step = (frames, channels) if last else (frames * channels, 1)
    row = width * step
    blend = images.dtype in (*FLOAT_DTYPES, torch.uint8) and (draw.kind in (MIXUP, EITHER) or boxes is not None)
    if not blend and not scale and images.dtype == output.dtype:
        images, output = (each.view(_BYTES[each.element_size()]) for each in (images, output))
    resize = draw.kind == RESIZEMIX
    paired = inplace or (pairing in (FLIP.value, RANDOM.value) and not resize)
    bounded = draw.maximum > 0
    sides = BY_LAM if not bounded else BOTH if resize else EACH
    pasted_alpha = draw.mixup_alpha if bounded else draw.cutmix_alpha
    alpha = pasted_alpha if draw.kind in (CUTMIX, RESIZEMIX) else draw.mixup_alpha
    betas = 1 + (draw.kind == EITHER and pasted_alpha != alpha)
    if lam is not None or boxes is not None or (bounded and draw.kind in (CUTMIX, RESIZEMIX)):
        betas = 0
    switch_prob = {MIXUP: 0, EITHER: draw.switch_prob}.get(draw.kind, 65536)

    size = max(images.element_size(), output.element_size())
    vec = 1
    while vec < 16 // size and row % (2 * vec) == 0:
        vec *= 2
    columns = _columns(row)
    rows = TILE_BYTES // size // columns
    tiles = triton.cdiv(planes * height, rows) * triton.cdiv(row, columns)
    parts = max(1, min(PROGRAMS // samples, triton.cdiv(tiles, 2) if paired else tiles))
    wide = max((planes * height + rows) * (row + columns), (height + 1) ** 2, (width + 1) ** 2) >= WIDE
    labels, lam, boxes, partner = (
        None if each is None else each.contiguous() for each in (labels, lam, boxes, partner)
    )
    with torch.cuda.device_of(images):
        _mix_kernel[(samples, parts)](
            images, output, labels, seed, lam, boxes, partner, *results,
            samples, planes, height, row // vec, step, frames, draw.prob, switch_prob, float64_bits(alpha),
            float64_bits(pasted_alpha), float64_bits(draw.minimum), float64_bits(draw.maximum),
            int(draw.correct_lam or bounded),
            tuple(map(float, scale)), tuple(map(float, bias)), pairing, draw.granularity, sides, betas, blend, paired,
            inplace, resize, last, tl.int64 if wide else tl.int32, vec, rows, columns, enable_fp_fusion=False,
        )  # fmt: skip


# The ops' fakes, given real tensors, check them and make outputs of the right shape, strides and dtype.


def batch_mix(images: Tensor, labels: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    mixed, *results = ops._mix_fake(images, labels, *rest)
    check_narrow(ops.ROW, images)
    check_narrow(ops.ROW, mixed)
    *drawn, scale, bias, _ = rest
    layout = memory_format(images)
    _launch(images.contiguous(memory_format=layout), mixed, layout, labels, drawn, scale, bias, results)
    return mixed, *results


def batch_mix_out(out: Tensor, images: Tensor, labels: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    results = ops._out_fake(out, images, labels, *rest)
    check_narrow(ops.ROW, images)
    check_narrow(ops.ROW, out)
    *drawn, scale, bias = rest
    layout = memory_format(out)
    target = out if out.is_contiguous(memory_format=layout) else torch.empty_like(out, memory_format=layout)
    _launch(images.contiguous(memory_format=layout), target, layout, labels, drawn, scale, bias, results)
    if target is not out:
        out.copy_(target)
    return results


def batch_mix_(images: Tensor, labels: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    results = ops._inplace_fake(images, labels, *rest)
    check_narrow(ops.ROW, images)
    layout = memory_format(images)
    dense = images.contiguous(memory_format=layout)
    _launch(dense, dense, layout, labels, rest, (), (), results)
    if dense is not images:
        images.copy_(dense)
    return results
