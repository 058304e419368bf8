"""Filling empty places from their neighbours in Triton: which iteration fills a place is found once an image, then a
program copies its channels' present places and fills the others ring by ring where they lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pyrx._triton.dropout import check_narrow
from torch import Tensor

from pyrx.ops import neighbor_fill as ops

# Places a program of the mask's kernels works on; places times channels of a program's step of the fill.
PLACES = 1024
STEP = 1024


# Bytes: two reads of mask a column of reach, from the first-level cache; 4 bytes a place written.
@triton.jit(do_not_specialize=["reach"])
def _distance_kernel(mask, across, numel, width, reach, PLACES: tl.constexpr):
    """Columns to the nearest present place of the row, reach + 1 where it is further."""
    place = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    inside = place < numel
    column = place % width
    found = tl.full((PLACES,), 0, tl.int32) + reach + 1
    for i in range(reach):
        distance = reach - i
        left = tl.load(mask + place - distance, mask=inside & (column >= distance), other=0)
        right = tl.load(mask + place + distance, mask=inside & (column + distance < width), other=0)
        found = tl.where((left | right) != 0, distance, found)
    found = tl.where(tl.load(mask + place, mask=inside, other=0) != 0, 0, found)
    tl.store(across + place, found, mask=inside)


# Bytes: 2 reach + 1 reads of 4 bytes a place, from the caches; 5 bytes a place written.
@triton.jit(do_not_specialize=["reach"])
def _level_kernel(across, level, after, deepest, size, width, reach, PLACES: tl.constexpr):
    """The iteration that fills a place, its distance to the nearest present one; 0: present, reach + 1: none does."""
    blocks = tl.cdiv(size, PLACES)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    inside = place < size
    start = image * size + place
    found = tl.load(across + start, mask=inside, other=0)
    for distance in range(1, reach + 1):
        step = tl.cast(distance, tl.int64) * width
        above = tl.load(across + start - step, mask=inside & (place >= step), other=reach + 1)
        below = tl.load(across + start + step, mask=inside & (place + step < size), other=reach + 1)
        found = tl.minimum(found, tl.maximum(tl.minimum(above, below), distance))
    tl.store(level + start, found, mask=inside)
    tl.store(after + start, (found <= reach).to(tl.uint8), mask=inside)
    tl.atomic_max(deepest + image, tl.max(tl.where(inside & (found <= reach), found, 0)))


# Bytes: input and output once over 4.8 TB/s; the level map once a ring and channel block, from the caches. Operations:
# about 60 a filled element.
@triton.jit
def _fill_kernel(
    input, output, level, deepest, channels, height, width,
    image_stride, channel_stride, row_stride, column_stride,
    out_image_stride, out_channel_stride, out_row_stride, out_column_stride,
    PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(channels, CHANNELS)
    image = (tl.program_id(0) // groups).to(tl.int64)
    channel = ((tl.program_id(0) % groups) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)[None, :]
    channel_mask = channel < channels
    size = height * width
    level += image * size
    input += image * image_stride
    output += image * out_image_stride
    for start in range(0, size, PLACES):
        place = start + tl.arange(0, PLACES)
        row, column = (place // width).to(tl.int64), (place % width).to(tl.int64)
        inside = place < size
        kept = tl.load(level + place, mask=inside, other=1) == 0
        from_at = (row * row_stride + column * column_stride)[:, None] + channel * channel_stride
        to_at = (row * out_row_stride + column * out_column_stride)[:, None] + channel * out_channel_stride
        value = tl.load(input + from_at, mask=kept[:, None] & channel_mask, other=0.0)
        tl.store(output + to_at, value, mask=inside[:, None] & channel_mask)
    tl.debug_barrier()
    last = tl.load(deepest + image)
    for t in range(1, last + 1):
        for start in range(0, size, PLACES):
            place = start + tl.arange(0, PLACES)
            ring = tl.load(level + place, mask=place < size, other=-1) == t
            if tl.max(ring.to(tl.int32)) != 0:
                row, column = (place // width).to(tl.int64), (place % width).to(tl.int64)
                at = (row * out_row_stride + column * out_column_stride)[:, None] + channel * out_channel_stride
                # each row from left to right, then the rows from top down: the order of every backend
                total = tl.zeros((PLACES, CHANNELS), tl.float32)
                count = tl.zeros((PLACES,), tl.int32)
                for i in tl.static_range(3):
                    line = tl.zeros((PLACES, CHANNELS), tl.float32)
                    for j in tl.static_range(3):
                        if i != 1 or j != 1:
                            there = (row + (i - 1) >= 0) & (row + (i - 1) < height)
                            there &= (column + (j - 1) >= 0) & (column + (j - 1) < width) & ring
                            # a place that is filled now sees none that is filled now
                            beside = level + place + (i - 1) * width + (j - 1)
                            there = tl.load(beside, mask=there, other=-1) == t - 1
                            near = output + at + ((i - 1) * out_row_stride + (j - 1) * out_column_stride)
                            line += tl.load(near, mask=there[:, None] & channel_mask, other=0.0).to(tl.float32)
                            count += there.to(tl.int32)
                    total += line
                fill = tl.div_rn(total, (count.to(tl.float32) + 1e-5)[:, None] + tl.zeros_like(total))
                tl.store(output + at, fill.to(output.dtype.element_ty), mask=ring[:, None] & channel_mask)
        tl.debug_barrier()


def neighbor_fill(input: Tensor, mask: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    output, after = ops._fake(input, mask, iterations)
    check_narrow(ops.OP, input)
    images, channels, height, width = input.shape
    size = height * width
    if mask.numel() == 0:
        return output, after
    # no place is further than this from another
    reach = min(iterations, max(height, width))
    present = mask.contiguous().view(torch.uint8)
    across = torch.empty(mask.shape, dtype=torch.int32, device=mask.device)
    level = torch.empty_like(across)
    deepest = torch.zeros(images, dtype=torch.int32, device=mask.device)
    with torch.cuda.device_of(input):
        _distance_kernel[(triton.cdiv(mask.numel(), PLACES),)](present, across, mask.numel(), width, reach, PLACES)
        _level_kernel[(images * triton.cdiv(size, PLACES),)](
            across, level, after.view(torch.uint8), deepest, size, width, reach, PLACES
        )
        if channels:
            # lanes run along whichever of columns and channels lie side by side
            together = min(triton.next_power_of_2(channels), 64) if output.stride(1) == 1 and channels > 1 else 1
            _fill_kernel[(images * triton.cdiv(channels, together),)](
                input, output, level, deepest, channels, height, width, *input.stride(), *output.stride(),
                STEP // together, together,
            )  # fmt: skip
    return output, after
