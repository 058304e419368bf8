"""N:M sparsity in Triton: masks by the rank within each group, weights under them, and masks given as bits.

A group's elements are ranked by integers that all differ: their key, then their place. Where groups are whole in a
tile the n-th largest of these is what is compared with; groups that cross bytes and rows count who is above instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrx.ops import nm_sparsity as ops
from pyrx.reference.nm_sparsity import FACTOR, FORWARD, REGULARIZE

from .dropout import check_narrow

# Elements a program works on.
BLOCK = 2048
# n from which the n-th largest is found bit by bit, no longer as a maximum n times over.
BISECT = 12
# Elements from which indices have 64 bits: the last program may reach a block beyond them.
WIDE = 2**31 - 2 * BLOCK

_REGULARIZE: tl.constexpr = tl.constexpr(REGULARIZE)
_FACTOR: tl.constexpr = tl.constexpr(FACTOR)
_BISECT: tl.constexpr = tl.constexpr(BISECT)

_VARYING = ["strength"]


@triton.jit
def _rank_key(score, MAGNITUDE: tl.constexpr):
    """int32 that orders as scores rank: zeros equal, every NaN one value above infinity, csrc/kernels/nm_sparsity.h."""
    if score.dtype.primitive_bitwidth == 32:
        bits = score.to(tl.int32, bitcast=True)
        infinity: tl.constexpr = 0x7F800000
        largest: tl.constexpr = 0x7FFFFFFF
    else:
        bits = score.to(tl.int16, bitcast=True).to(tl.int32)
        infinity: tl.constexpr = 0x7C00 if score.dtype == tl.float16 else 0x7F80
        largest: tl.constexpr = 0x7FFF
    key = tl.minimum(bits & largest, infinity + 1)
    if not MAGNITUDE:
        key = tl.where((bits < 0) & (key <= infinity), -key, key)
    return key


@triton.jit
def rank(score, step, inside, MAGNITUDE: tl.constexpr, M2: tl.constexpr):
    """Integers >= 0 that order as the keys and of equal ones the lower step first; -1, below all, outside."""
    key = _rank_key(score, MAGNITUDE)
    if score.dtype.primitive_bitwidth == 32:
        key = key.to(tl.int64)
    if not MAGNITUDE:
        key += 1 << (score.dtype.primitive_bitwidth - 1)
    return tl.where(inside, key * M2 + (M2 - 1 - step), -1)


@triton.jit
def first(ranks, AXIS: tl.constexpr, N: tl.constexpr, M2: tl.constexpr):
    """Which are the N largest along the axis, or all that are not outside."""
    if N < _BISECT:
        least = tl.max(ranks, AXIS, keep_dims=True)
        for _ in tl.static_range(N - 1):
            least = tl.max(tl.where(ranks < least, ranks, -1), AXIS, keep_dims=True)
    else:
        # 16 or 32 bits of a key and those of a step
        BITS: tl.constexpr = ranks.dtype.primitive_bitwidth // 2 + 7
        least = tl.max(ranks & 0, AXIS, keep_dims=True)
        for i in range(BITS):
            higher = least + (tl.full((1,), 1, ranks.dtype) << (BITS - 1 - i))
            least = tl.where(tl.sum((ranks >= higher).to(tl.int32), AXIS, keep_dims=True) >= N, higher, least)
    return ranks >= least


@triton.jit
def _times(value, factor):
    return (value.to(tl.float32) * tl.load(factor).to(tl.float32)).to(value.dtype)


@triton.jit
def _write(mask, weight, factor, output, score, at, inside, keep):
    """The mask's bytes, the weight (None: the scores) under it: what the caller asked for."""
    if mask is not None:
        tl.store(mask + at, keep.to(tl.uint8), mask=inside)
    if output is not None:
        value = score
        if weight is not None:
            value = tl.load(weight + at, mask=inside)
        rest = tl.full([], 0, value.dtype)  # a plain 0 would take the value through float32, which quietens NaN
        if factor is not None:
            rest = _times(value, factor)
        tl.store(output + at, tl.where(keep, value, rest), mask=inside)


# Bytes: the scores once, a byte or a bit an element, for a product its write too. Operations: about 6 + 3 N an element.
@triton.jit
def _flat_kernel(
    scores, mask, weight, factor, output, bits, numel,
    N: tl.constexpr, M: tl.constexpr, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Groups lie one after another, M a power of two; bits without padding."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)
    at = start + place
    inside = at < numel
    score = tl.load(scores + at, mask=inside, other=0)
    ranks = rank(score, place % M, inside, MAGNITUDE, M)
    keep = first(tl.reshape(ranks, (BLOCK // M, M)), 1, N, M).to(tl.int32)
    if bits is not None:
        byte = start // 8 + tl.arange(0, BLOCK // 8)
        pack_into(bits, byte, byte < numel // 8, tl.reshape(keep, (BLOCK // 8, 8)))
    _write(mask, weight, factor, output, score, at, inside, tl.reshape(keep, (BLOCK,)) != 0)


@triton.jit
def _row_bytes(width):
    return (tl.cast(width, tl.int64) + 7) // 8


@triton.jit
def _bytes(block, width, count, WIDE: tl.constexpr, BYTES: tl.constexpr):
    """(bytes, which are there, row of each, column in it of its first element), rows of `width` elements."""
    byte = tl.cast(block, tl.int64) * BYTES + tl.arange(0, BYTES)
    row_bytes = _row_bytes(width)
    if not WIDE:
        byte, row_bytes = byte.to(tl.int32), row_bytes.to(tl.int32)  # 64-bit division is a subroutine
    return byte, byte < count, byte // row_bytes, byte % row_bytes * 8


@triton.jit
def byte_tile(block, width, count, WIDE: tl.constexpr, BYTES: tl.constexpr):
    """(bytes, which are there, (BYTES, 8) columns, offsets, which are there) of a block of bytes."""
    byte, there, row, first_column = _bytes(block, width, count, WIDE, BYTES)
    column = first_column[:, None] + tl.arange(0, 8)[None, :]
    return byte, there, column, (row.to(tl.int64) * width)[:, None] + column, there[:, None] & (column < width)


@triton.jit
def unpacked(bits, byte, there):
    """(BYTES, 8) which elements the bytes of bits keep."""
    found = tl.load(bits + byte, mask=there, other=0).to(tl.int32)
    return ((found[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def pack_into(bits, byte, there, keep):
    """Stores keep (BYTES, 8)."""
    found = tl.sum(keep.to(tl.int32) << tl.arange(0, 8)[None, :], 1)
    tl.store(bits + byte, found.to(tl.uint8), mask=there)


# Bytes and operations: as above.
@triton.jit
def _columns_kernel(
    scores, mask, weight, factor, output, bits, count, length, groups, inner, lines, width,
    N: tl.constexpr, M: tl.constexpr, M2: tl.constexpr, MAGNITUDE: tl.constexpr, WIDE: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """(outer, length, inner) with groups along length and inner of `lines` rows of bits; tiles (BYTES, 8, M2)."""
    lane = tl.arange(0, 8)[None, :, None]
    step = tl.arange(0, M2)[None, None, :]
    _, there, row, column = _bytes(tl.program_id(0), width, count, WIDE, BYTES)
    slab = row // lines
    group = slab % groups
    line = ((slab // groups).to(tl.int64) * length + group * M) * lines + row % lines
    own = there[:, None, None] & (step < tl.minimum(length - group * M, M)[:, None, None])
    inside = own & (column[:, None, None] + lane < width)
    at = (line * width + column)[:, None, None] + lane + step * tl.cast(inner, tl.int64)
    score = tl.load(scores + at, mask=inside, other=0)
    keep = first(rank(score, step, inside, MAGNITUDE, M2), 2, N, M2) & inside
    if bits is not None:
        byte = tl.sum(keep.to(tl.int32) << lane, 1, keep_dims=True)
        row_bytes = _row_bytes(width)
        byte_at = (line * row_bytes + column // 8)[:, None, None] + step * (lines * row_bytes)
        tl.store(bits + byte_at, byte.to(tl.uint8), mask=own)
    _write(mask, weight, factor, output, score, at, inside, keep)


# Bytes: as above. Operations: about 4 M an element, with M reads of what the first level of the cache holds.
@triton.jit
def _rows_kernel(
    scores, mask, weight, factor, output, bits, count, width,
    N: tl.constexpr, M: tl.constexpr, MAGNITUDE: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Groups along rows of `width` elements, any M: a group crosses bytes, the last of a row may be smaller."""
    byte, there, column, at, inside = byte_tile(tl.program_id(0), width, count, WIDE, BYTES)
    step = column % M
    score = tl.load(scores + at, mask=inside, other=0)
    key = _rank_key(score, MAGNITUDE)
    above = tl.zeros(at.shape, tl.int32)
    for j in range(M):
        beside = inside & (column - step + j < width)
        other = _rank_key(tl.load(scores + at - step + j, mask=beside, other=0), MAGNITUDE)
        above += (beside & (other > key - (j < step).to(tl.int32))).to(tl.int32)
    keep = inside & (above < N)
    if bits is not None:
        pack_into(bits, byte, there, keep)
    _write(mask, weight, factor, output, score, at, inside, keep)


# Bytes: x and the result, a bit an element, with REGULARIZE the weight. Operations: about four an element.
@triton.jit(do_not_specialize=_VARYING)
def _apply_kernel(
    x, bits, factor, weight, output, strength, count, width,
    DROPPED: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    byte, there, _, at, inside = byte_tile(tl.program_id(0), width, count, WIDE, BYTES)
    keep = unpacked(bits, byte, there)
    value = tl.load(x + at, mask=inside)
    rest = tl.full([], 0, value.dtype)
    if DROPPED == _FACTOR:
        rest = _times(value, factor)
    elif DROPPED == _REGULARIZE:
        pull = strength * tl.load(weight + at, mask=inside).to(tl.float32)
        rest = (value.to(tl.float32) + pull).to(value.dtype)
    tl.store(output + at, tl.where(keep, value, rest), mask=inside)


def groups_in_bytes(shape: Sequence[int], m: int, dim: int) -> bool:
    """Whether whole groups lie one after another in whole bytes of bits, or the other way round."""
    return dim == len(shape) - 1 and m == triton.next_power_of_2(m) and shape[dim] % math.lcm(m, 8) == 0


def bytes_and_width(shape: Sequence[int]) -> tuple[int, int]:
    """(bytes of the bits of a tensor, width of its rows): one row where none pads its last byte."""
    numel, width = math.prod(shape), shape[-1]
    return (numel // 8, numel) if width % 8 == 0 else (numel // width * triton.cdiv(width, 8), width)


def rank_into(
    scores: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    factor: Tensor | None,
    output: Tensor | None,
    bits: Tensor | None,
    n: int,
    m: int,
    dim: int,
    magnitude: bool,
) -> None:
    """Ranks contiguous scores and writes what is given of mask, output and bits, all contiguous."""
    numel = scores.numel()
    if numel == 0:
        return
    shape = scores.shape
    length, inner = shape[dim], math.prod(shape[dim + 1 :])
    power = triton.next_power_of_2(m)
    tensors = (scores, mask, weight, factor, output, bits)
    with torch.cuda.device_of(scores):
        if inner > 1 or (bits is not None and dim < scores.dim() - 1):
            width = shape[-1] if bits is not None and shape[-1] % 8 else inner
            groups, lines = triton.cdiv(length, m), inner // width
            # small groups lie in one thread's registers each, below columns of 16 bytes
            tile = 256 // scores.element_size() if power <= 8 else BLOCK // (4 * power)
            count = numel // (length * inner) * groups * lines * triton.cdiv(width, 8)
            _columns_kernel[(triton.cdiv(count, tile),)](
                *tensors, count, length, groups, inner, lines, width, n, m, power, magnitude, 8 * count >= WIDE, tile,
                enable_fp_fusion=False,
            )  # fmt: skip
        elif groups_in_bytes(shape, m, dim) or (bits is None and m == power and length % m == 0):
            _flat_kernel[(triton.cdiv(numel, BLOCK),)](
                *tensors, numel, n, m, magnitude, BLOCK, enable_fp_fusion=False
            )  # fmt: skip
        else:
            count, tile = numel // length * triton.cdiv(length, 8), BLOCK // 16
            _rows_kernel[(triton.cdiv(count, tile),)](
                *tensors, count, length, n, m, magnitude, 8 * count >= WIDE, tile, enable_fp_fusion=False
            )  # fmt: skip


def _apply_into(
    output: Tensor,
    x: Tensor,
    bits: Tensor,
    dropped: int,
    factor: Tensor | None,
    weight: Tensor | None,
    strength: float,
) -> None:
    """x under the bits into output, all contiguous."""
    if x.numel() == 0:
        return
    count, width = bytes_and_width(x.shape)
    tile = BLOCK // 8
    with torch.cuda.device_of(x):
        _apply_kernel[(triton.cdiv(count, tile),)](
            x, bits, factor, weight, output, strength, count, width, dropped, 8 * count >= WIDE, tile,
            enable_fp_fusion=False,
        )  # fmt: skip


# The ops' fakes, given real tensors, check them and make outputs of the right shape, strides and dtype.


def nm_mask(scores: Tensor, n: int, m: int, dim: int, magnitude: bool, packed: bool, pad: bool) -> Tensor:
    found = ops._mask_fake(scores, n, m, dim, magnitude, packed, pad)
    check_narrow("nm_mask", scores)
    if packed:
        rank_into(scores.contiguous(), None, None, None, None, found, n, m, dim, magnitude)
        return found
    # a byte an element goes through memory in the order that the mask has
    order = sorted(range(scores.dim()), key=found.stride, reverse=True)
    mask = found.permute(order).view(torch.uint8)
    rank_into(scores.permute(order).contiguous(), mask, None, None, None, None, n, m, order.index(dim), magnitude)
    return found


def nm_sparsify(
    weight: Tensor,
    scores: Tensor | None,
    mask: Tensor | None,
    decay: Tensor | None,
    n: int,
    m: int,
    dim: int,
    magnitude: bool,
    pad: bool,
    estimator: int,
    strength: float,
) -> tuple[Tensor, Tensor]:
    found, bits = ops._sparsify_fake(weight, scores, mask, decay, n, m, dim, magnitude, pad, estimator, strength)
    for each in (weight,) if scores is None else (weight, scores):
        check_narrow("nm_sparsify", each)
    output = found if found.is_contiguous() else torch.empty_like(found, memory_format=torch.contiguous_format)
    weight = weight.contiguous()
    if mask is not None:
        _apply_into(output, weight, mask.contiguous(), FORWARD[estimator], decay, None, 0.0)
    elif scores is None:
        rank_into(weight, None, None, decay, output, bits, n, m, dim, magnitude)
    else:
        rank_into(scores.contiguous(), None, weight, decay, output, bits, n, m, dim, magnitude)
    return found if output is found else found.copy_(output), bits


def nm_apply(
    x: Tensor, bits: Tensor, dropped: int, factor: Tensor | None, weight: Tensor | None, strength: float
) -> Tensor:
    found = ops._apply_fake(x, bits, dropped, factor, weight, strength)
    check_narrow("nm_apply", x)
    output = found if found.is_contiguous() else torch.empty_like(found, memory_format=torch.contiguous_format)
    weight = None if weight is None else weight.contiguous()
    _apply_into(output, x.contiguous(), bits.contiguous(), dropped, factor, weight, strength)
    return found if output is found else found.copy_(output)
