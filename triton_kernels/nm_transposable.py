"""Transposable N:M masks in Triton: the exact search with tiles along the lanes, greedy tiles whole."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrx.ops import nm_transposable as ops
from pyrx.reference.nm_transposable import BOUNDS, PAIRS, SPLITS

from .dropout import check_narrow

TILES = 256  # of a program of the exact search
ELEMENTS = 1024  # of a program of greedy tiles, at least one tile
PACKED_BYTES = 256  # of a program that packs

_MOST: tl.constexpr = tl.constexpr(BOUNDS[torch.float32][0])
_NAN: tl.constexpr = tl.constexpr(BOUNDS[torch.float32][1])
# The ways of rows 0 and 1, and of rows 2 and 3, of each split, one after another: pair of the first row, pair of the
# second, their bits; where those of a half begin; and how many it has. The compiler reads flat tuples alone.
_BITS = tuple(1 << a | 1 << b for a, b in PAIRS)
_HALVES = [half for split in SPLITS for half in split]
_WAYS: tl.constexpr = tl.constexpr(
    tuple(value for half in _HALVES for a, b in half for value in (a, b, _BITS[a] | _BITS[b] << 4))
)
_STARTS: tl.constexpr = tl.constexpr(tuple(3 * sum(map(len, _HALVES[:i])) for i in range(len(_HALVES))))
_COUNTS: tl.constexpr = tl.constexpr(tuple(map(len, _HALVES)))
_SPLITS: tl.constexpr = tl.constexpr(len(SPLITS))


@triton.jit
def _row_sums(at, inside, MAGNITUDE: tl.constexpr, TILES: tl.constexpr):
    """The sums of the six pairs of columns of a row, (TILES,) each; `at` is the row's first element in every tile."""
    scores = tl.load(at[:, None] + tl.arange(0, 4)[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    values = tl.abs(scores) if MAGNITUDE else scores
    values = tl.where(values > _MOST, _MOST, values)
    values = tl.where(values < -_MOST, -_MOST, values)
    values = tl.where(scores != scores, _NAN, values)
    even, odd = tl.split(tl.reshape(values, (TILES, 2, 2)))  # columns 0 and 2, 1 and 3
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0 + x1, x0 + x2, x0 + x3, x1 + x2, x1 + x3, x2 + x3


@triton.jit
def _half(first, second, HALF: tl.constexpr):
    """The best way of two rows with these sums: its sum, and the bits that it keeps, the first of equals."""
    START: tl.constexpr = _STARTS[HALF]
    COUNT: tl.constexpr = _COUNTS[HALF]
    best = first[_WAYS[START]] + second[_WAYS[START + 1]]
    bits = tl.full(best.shape, _WAYS[START + 2], tl.int32)
    for i in tl.static_range(1, COUNT):
        total = first[_WAYS[START + 3 * i]] + second[_WAYS[START + 3 * i + 1]]
        bits = tl.where(total > best, _WAYS[START + 3 * i + 2], bits)
        best = tl.where(total > best, total, best)
    return best, bits


@triton.jit
def _search(row0, row1, row2, row3):
    """Of the 90 patterns one of the largest sum: int32, bit 4 r + c for row r and column c."""
    best, pattern = _half(row0, row1, 0)
    below, bits = _half(row2, row3, 1)
    best += below
    pattern |= bits << 8
    for i in tl.static_range(1, _SPLITS):
        above, kept = _half(row0, row1, 2 * i)
        below, bits = _half(row2, row3, 2 * i + 1)
        total = above + below
        pattern = tl.where(total > best, kept | (bits << 8), pattern)
        best = tl.where(total > best, total, best)
    return pattern


# Bytes: the scores and the mask once. Operations: about 300 a tile.
@triton.jit(do_not_specialize=["pairs"])
def _exact_kernel(
    scores, mask, columns, pairs, count,
    MAGNITUDE: tl.constexpr, PACKED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`pairs` of tiles side by side in a row of tiles, the last of which may be one tile; `count` pairs in all.
    The mask is bytes of bits where PACKED, else int32, each four elements."""
    index = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    pair = index // 2
    column = (pair % pairs * 2 + index % 2) * 4
    row = pair // pairs * 4
    inside = (pair < count) & (column < columns)
    at = scores + row * columns + column
    pattern = _search(
        _row_sums(at, inside, MAGNITUDE, TILES),
        _row_sums(at + columns, inside, MAGNITUDE, TILES),
        _row_sums(at + 2 * columns, inside, MAGNITUDE, TILES),
        _row_sums(at + 3 * columns, inside, MAGNITUDE, TILES),
    )
    if PACKED:
        pattern = tl.where(inside, pattern, 0)
        left, right = tl.split(tl.reshape(pattern, (TILES // 2, 2)))
        pair = tl.program_id(0).to(tl.int64) * (TILES // 2) + tl.arange(0, TILES // 2)
        for r in tl.static_range(4):
            bits = ((left >> 4 * r) & 15) | (((right >> 4 * r) & 15) << 4)
            tl.store(mask + (pair // pairs * 4 + r) * pairs + pair % pairs, bits.to(tl.uint8), mask=pair < count)
    else:
        for r in tl.static_range(4):
            kept = (((pattern >> 4 * r) & 15) * 0x00204081) & 0x01010101  # four bits as four bytes
            tl.store(mask + ((row + r) * columns + column) // 4, kept, mask=inside)


@triton.jit
def _rank_keys(scores, MAGNITUDE: tl.constexpr):
    """int64 keys that order as scores rank, at least 1: csrc/kernels/nm_sparsity.h."""
    if scores.dtype == tl.float32:
        bits = scores.to(tl.int32, bitcast=True).to(tl.int64)
        infinity = 0x7F800000
        sign = 0x7FFFFFFF
    else:
        bits = scores.to(tl.int16, bitcast=True).to(tl.int64)
        infinity = 0x7C00 if scores.dtype == tl.float16 else 0x7F80
        sign = 0x7FFF
    key = bits & sign
    nan = key > infinity
    key = tl.where(nan, infinity + 1, key)
    if not MAGNITUDE:
        key = tl.where((bits < 0) & ~nan, -key, key) + infinity
    return key + 1


# In each round every element is kept that is the first of what is left in its row and in its column, see
# csrc/cuda/nm_transposable.cuh. Bytes: the scores and the mask once. Operations: about 10 an element and round.
@triton.jit(do_not_specialize=["columns", "across", "count", "n", "m"])
def _greedy_kernel(
    scores, mask, columns, across, count, n, m,
    MAGNITUDE: tl.constexpr, TILES: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    tile = (tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES))[:, None, None]
    row = tl.arange(0, SIDE)[None, :, None]
    column = tl.arange(0, SIDE)[None, None, :]
    inside = (tile < count) & (row < m) & (column < m)
    offset = (tile // across * m + row) * columns + tile % across * m + column
    key = _rank_keys(tl.load(scores + offset, mask=inside, other=0.0), MAGNITUDE)
    # no two of a tile are the same
    key = tl.where(inside, key * (SIDE * SIDE) + (SIDE * SIDE - 1 - row * SIDE - column), 0)
    kept = inside & (tile < 0)
    left = tl.max(key)
    while left > 0:
        keep = (key > 0) & (key == tl.max(key, 2, keep_dims=True)) & (key == tl.max(key, 1, keep_dims=True))
        kept = kept | keep
        full = (tl.sum(kept.to(tl.int32), 2, keep_dims=True) >= n) | (tl.sum(kept.to(tl.int32), 1, keep_dims=True) >= n)
        key = tl.where(kept | full, 0, key)
        left = tl.max(key)
    tl.store(mask + offset, kept.to(tl.uint8), mask=inside)


# Bytes: one read of a byte an element and one write of a bit.
@triton.jit(do_not_specialize=["columns", "across"])
def _pack_kernel(source, bits, columns, across, count, BYTES: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    lane = tl.arange(0, 8)[None, :]
    column = (index % across * 8)[:, None] + lane
    inside = (index < count)[:, None] & (column < columns)
    found = tl.load(source + (index // across * columns)[:, None] + column, mask=inside, other=0).to(tl.int32)
    tl.store(bits + index, tl.sum(found << lane, 1).to(tl.uint8), mask=index < count)


def _exact(scores: Tensor, target: Tensor, magnitude: bool, packed: bool) -> None:
    columns = scores.shape[-1]
    pairs = triton.cdiv(columns, 8)
    count = scores.numel() // columns // 4 * pairs
    _exact_kernel[(triton.cdiv(2 * count, TILES),)](
        scores, target if packed else target.view(torch.int32), columns, pairs, count, magnitude, packed, TILES,
        enable_fp_fusion=False,
    )  # fmt: skip


def _greedy(scores: Tensor, target: Tensor, n: int, m: int, magnitude: bool, packed: bool) -> None:
    columns = scores.shape[-1]
    side = triton.next_power_of_2(m)
    tiles = max(1, ELEMENTS // side**2)
    count = scores.numel() // m**2
    kept = torch.empty_like(scores, dtype=torch.uint8) if packed else target
    _greedy_kernel[(triton.cdiv(count, tiles),)](
        scores, kept, columns, columns // m, count, n, m, magnitude, tiles, side,
        num_warps=min(32, max(4, side * side // 256)),
    )  # fmt: skip
    if packed:
        size = target.numel()
        grid = (triton.cdiv(size, PACKED_BYTES),)
        _pack_kernel[grid](kept, target, columns, target.shape[-1], size, PACKED_BYTES)


def nm_transposable_mask(scores: Tensor, n: int, m: int, magnitude: bool, packed: bool, exact: bool) -> Tensor:
    output = ops._fake(scores, n, m, magnitude, packed, exact)
    check_narrow(ops.OP, scores)
    if output.numel() == 0:
        return output
    target = output if output.is_contiguous() else torch.empty(output.shape, dtype=output.dtype, device=output.device)
    dense, bytes_of = scores.contiguous(), target.view(torch.uint8)
    with torch.cuda.device_of(scores):
        if exact:
            _exact(dense, bytes_of, magnitude, packed)
        else:
            _greedy(dense, bytes_of, n, m, magnitude, packed)
    return output if target is output else output.copy_(target)
