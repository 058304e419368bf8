"""Masks for masked image modelling in Triton: a program a sample, any number of patches in tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrx.ops import patch_mask as ops
from pyrx.reference.patch_mask import BLOCK, BLOCK_COUNTER, BLOCK_DRAWS, BLOCK_TRIES, HARD, MOST_PATCHES
from pyrx.reference.random import PATCH_DOMAIN

from .dropout import philox
from .random import float64_bits

GROUPS = 512  # at most, of the four patches of a Philox call, in a tile

_DOMAIN: tl.constexpr = tl.constexpr(PATCH_DOMAIN)
_BLOCK: tl.constexpr = tl.constexpr(BLOCK)
_HARD: tl.constexpr = tl.constexpr(HARD)
_TRIES: tl.constexpr = tl.constexpr(BLOCK_TRIES)
_DRAWS: tl.constexpr = tl.constexpr(BLOCK_DRAWS)
_COUNTER: tl.constexpr = tl.constexpr(BLOCK_COUNTER)
_ORDER: tl.constexpr = tl.constexpr(HARD + 1)  # the keys of the losses themselves
_LAST: tl.constexpr = tl.constexpr(MOST_PATCHES - 1)
_NONE: tl.constexpr = tl.constexpr(2**64 - 1)  # above every key
_FIRST: tl.constexpr = tl.constexpr(2**63)

_VARYING = ["height", "width", "masked", "hard", "min_block", "log_aspect"]


@triton.jit
def _exp_negative(x):
    """exp(x) for -700 <= x <= 0, as csrc/kernels/random.h; x float64."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    total = x * 0 + 1
    for i in tl.static_range(13):
        total = 1 + total * r / (13 - i)
    return total * ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _keys(
    seed, losses, mask, sample, size, start, least_order, KIND: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """(keys, patches) from patch `start`: csrc/kernels/patch_mask.h. `mask` has the rectangles where KIND is _BLOCK."""
    patch = start + tl.arange(0, 4 * GROUPS)
    inside = patch < size
    if KIND == _HARD or KIND == _ORDER:
        loss = tl.load(losses + sample * size + patch, mask=inside, other=0.0).to(tl.float32)
        bits = loss.to(tl.uint32, bitcast=True)
        bits = tl.where(bits == 0x80000000, 0, bits)
        order = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
        order = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0xFFFFFFFF, order)
        keys = (order.to(tl.uint64) << 31) | (patch ^ _LAST).to(tl.uint64)
    if KIND != _ORDER:
        group = start // 4 + tl.arange(0, GROUPS)
        w0, w1, w2, w3 = philox(seed, (group & 0) + sample, group, _DOMAIN)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (4 * GROUPS,))
        drawn = (words.to(tl.uint64) << 31) | patch.to(tl.uint64)
        if KIND == _HARD:
            drawn = tl.where(keys >= least_order, drawn | _FIRST, drawn)
        elif KIND == _BLOCK:
            union = tl.load(mask + sample * size + patch, mask=inside, other=0)
            drawn = tl.where(union != 0, drawn | _FIRST, drawn)
        keys = drawn
    return keys, patch


@triton.jit
def _nth_largest(
    count, seed, losses, mask, sample, size, least_order, KIND: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """The count-th largest key of the sample, by a radix select; above every key where count is 0."""
    digits = tl.arange(0, 256)
    prefix = (sample * 0).to(tl.uint64)
    known = prefix
    left = count
    shift = tl.cast(56, tl.int64)
    while shift >= 0:
        bins = tl.zeros((256,), tl.int32)
        for start in range(0, size, 4 * GROUPS):
            keys, patch = _keys(seed, losses, mask, sample, size, start, least_order, KIND, GROUPS)
            counted = (patch < size) & (((keys ^ prefix) & known) == 0)
            digit = ((keys >> shift.to(tl.uint64)) & 255).to(tl.int32)
            bins += tl.histogram(digit, 256, mask=counted)
        from_here = tl.cumsum(bins, 0, reverse=True)
        digit = tl.sum((from_here >= left).to(tl.int32)) - 1  # the highest with as many keys from it upwards
        own = tl.sum(tl.where(digits == digit, bins, 0))
        left -= tl.sum(tl.where(digits > digit, bins, 0))
        prefix |= digit.to(tl.uint64) << shift.to(tl.uint64)
        known |= tl.cast(255, tl.uint64) << shift.to(tl.uint64)
        # every key of this prefix is among the largest: lower digits do not matter
        shift = tl.where(own == left, -1, shift - 8)
    return tl.where(count == 0, _NONE, prefix)


@triton.jit
def _draw_blocks(
    seed, mask, sample, height, width, masked, min_block, log_aspect,
    CELLS: tl.constexpr,
):  # fmt: skip
    """Writes the union of the sample's rectangles into mask (Hp, Wp)."""
    cells = tl.arange(0, CELLS)
    for start in range(0, height * width, CELLS):
        tl.store(mask + start + cells, tl.zeros((CELLS,), tl.uint8), mask=start + cells < height * width)
    left = masked
    tries = sample * 0
    index = sample * 0
    while (left > 0) & (tries < _TRIES) & (index < _DRAWS):
        tl.debug_barrier()  # the threads of the program read what others wrote
        w0, w1, w2, w3 = philox(seed, sample, index + _COUNTER, _DOMAIN)
        u = (w0.to(tl.float64) + 0.5) * 0.00000000023283064365386962890625
        v = ((w1 & 0x7FFFFFFF).to(tl.float64) + 0.5) * 0.0000000004656612873077392578125
        area = min_block.to(tl.float64) + (left - min_block).to(tl.float64) * u
        aspect = _exp_negative(log_aspect * v)
        shorter = (tl.sqrt(area * aspect) + 0.5).to(tl.int64)
        longer = (tl.sqrt(area / aspect) + 0.5).to(tl.int64)
        tall = (w1 >> 31) != 0
        rows = tl.where(tall, longer, shorter)
        columns = tl.where(tall, shorter, longer)
        fits = (rows <= height) & (columns <= width)
        number = tl.where(fits, rows * columns, 0)
        y0 = (w2.to(tl.uint64) * (height - rows + 1).to(tl.uint64) >> 32).to(tl.int64)
        x0 = (w3.to(tl.uint64) * (width - columns + 1).to(tl.uint64) >> 32).to(tl.int64)
        fresh = sample * 0
        for start in range(0, number, CELLS):
            cell = start + cells
            at = (y0 + cell // columns) * width + x0 + cell % columns
            fresh += tl.sum((tl.load(mask + at, mask=cell < number, other=1) == 0).to(tl.int32))
        taken = (fresh > 0) & (fresh <= left)
        tl.debug_barrier()
        for start in range(0, tl.where(taken, number, 0), CELLS):
            cell = start + cells
            at = (y0 + cell // columns) * width + x0 + cell % columns
            tl.store(mask + at, tl.full((CELLS,), 1, tl.uint8), mask=cell < number)
        left = tl.where(taken, left - fresh, left)
        tries = tl.where(taken, 0, tries + 1)
        index += 1
    tl.debug_barrier()


# Bytes: N L, with losses N L times their size more, with indices 16 N L more. Operations: about 100 a patch and digit.
@triton.jit(do_not_specialize=_VARYING)
def _patch_mask_kernel(
    mask, ids_keep, ids_restore, seed, losses, height, width, masked, hard, min_block, log_aspect,
    METHOD: tl.constexpr, INDICES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    height, width = tl.cast(height, tl.int64), tl.cast(width, tl.int64)
    masked, hard = tl.cast(masked, tl.int64), tl.cast(hard, tl.int64)
    size = height * width
    if METHOD == _BLOCK:
        aspect = tl.cast(log_aspect, tl.int64).to(tl.float64, bitcast=True)
        _draw_blocks(
            seed, mask + sample * size, sample, height, width, masked, tl.cast(min_block, tl.int64), aspect,
            4 * GROUPS,
        )  # fmt: skip
    least_order = (sample * 0).to(tl.uint64)
    if METHOD == _HARD:
        least_order = _nth_largest(hard, seed, losses, mask, sample, size, least_order, _ORDER, GROUPS)
    least = _nth_largest(masked, seed, losses, mask, sample, size, least_order, METHOD, GROUPS)
    keep = size - masked
    before = sample * 0
    for start in range(0, size, 4 * GROUPS):
        keys, patch = _keys(seed, losses, mask, sample, size, start, least_order, METHOD, GROUPS)
        chosen = keys >= least
        inside = patch < size
        if METHOD == _BLOCK:
            tl.debug_barrier()  # the rectangles have been read
        tl.store(mask + sample * size + patch, chosen.to(tl.uint8), mask=inside)
        if INDICES:
            kept = (inside & ~chosen).to(tl.int32)
            rank = before + tl.cumsum(kept, 0) - kept
            tl.store(ids_keep + sample * keep + rank, patch, mask=kept != 0)
            tl.store(ids_restore + sample * size + patch, tl.where(chosen, keep + patch - rank, rank), mask=inside)
            before += tl.sum(kept)


def patch_mask(
    seed: Tensor,
    losses: Tensor | None,
    shape: Sequence[int],
    method: int,
    masked: int,
    hard: int,
    min_block: int,
    log_aspect: float,
    indices: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    mask, ids_keep, ids_restore = ops._fake(seed, losses, shape, method, masked, hard, min_block, log_aspect, indices)
    if mask.numel():
        height, width = (1, shape[1]) if len(shape) == 2 else shape[1:]
        groups = min(GROUPS, triton.next_power_of_2(triton.cdiv(math.prod(shape[1:]), 4)))
        with torch.cuda.device_of(seed):
            # products fused with sums would draw other rectangles than the other backends
            _patch_mask_kernel[(shape[0],)](
                mask.view(torch.uint8), ids_keep, ids_restore, seed, None if losses is None else losses.contiguous(),
                height, width, masked, hard, min_block, float64_bits(log_aspect),
                method, indices, groups, enable_fp_fusion=False,
            )  # fmt: skip
    return mask, ids_keep, ids_restore
