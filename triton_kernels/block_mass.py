"""The attention mass of blocks in Triton, and the share that a mask keeps: a program takes a tile of queries through
the keys that it sees."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrx import _attention
from pyrx.ops import block_mass as ops

from .attention import (
    LOG2E,
    LOWEST,
    Plan,
    exponents,
    factor_of,
    head_of,
    hide,
    kernel_logits,
    key_limits,
    load_rows,
    logits_of,
    padded,
    plain,
    precision_of,
    rows_of,
)
from .dropout import check_narrow

# By (bytes of an element, padded head size up to). Of 16-bit operands two programs fit an SM, so that the exponentials
# of one run beside the products of the other, and a tile of queries is a whole number of blocks.
PLANS = {
    (2, 64): Plan(128, 128, 8, 3),
    (2, 128): Plan(128, 128, 8, 2),
    (2, 256): Plan(128, 64, 8, 2),
    (4, 64): Plan(64, 32, 4, 2),
    (4, 128): Plan(32, 32, 4, 2),
    (4, 256): Plan(32, 16, 4, 2),
}
# 16-bit operands with a bias: its tiles take shared memory and registers too
BIASED = Plan(64, 64, 4, 2)


@triton.jit
def _steps(first, last, keys, K_TILE: tl.constexpr):
    """Of tiles of keys, key_mask aside: the first key of those that all queries see whole and their end, the first key
    of those that one sees, how many of these lie before and after the whole ones."""
    some = first < last
    start = tl.min(tl.where(some, first, keys), 0) // K_TILE * K_TILE
    end = tl.cdiv(tl.max(tl.where(some, last, 0), 0), K_TILE) * K_TILE
    end = tl.maximum(start, end)
    # a range may begin past the last key, where rounding up would overflow
    whole = tl.cdiv(tl.minimum(tl.max(first, 0), keys), K_TILE) * K_TILE
    whole_end = tl.min(last, 0) // K_TILE * K_TILE
    none = whole_end <= whole
    whole, whole_end = tl.where(none, end, whole), tl.where(none, end, whole_end)
    return whole, whole_end, start, (whole - start) // K_TILE, (end - whole_end) // K_TILE


@triton.jit
def _tiles(steps, WHOLE: tl.constexpr, K_TILE: tl.constexpr):
    """How many tiles of keys there are of a kind: whole ones, or the others."""
    if WHOLE:
        count = (steps[1] - steps[0]) // K_TILE
    else:
        count = steps[3] + steps[4]
    return count


@triton.jit
def _tile_logits(
    own, keys_of, key, logits, factor, steps, step, b, h, q, first, last, keys, size: tl.constexpr, SIZE: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    """(the logits of queries `own` and a tile of keys, minus infinity where hidden; its first key). PLAIN: products."""
    if WHOLE:
        k0 = steps[0] + step * K_TILE
    else:
        k0 = tl.where(step < steps[3], steps[2], steps[1] - steps[3] * K_TILE) + step * K_TILE
    k = k0 + tl.arange(0, K_TILE)
    there = k if WHOLE else tl.minimum(k, keys - 1)
    others = load_rows(keys_of, key, there, size, SIZE)
    score = tl.dot(own, tl.trans(others), input_precision=PRECISION)
    if not PLAIN:
        score, _ = logits_of(score, logits, factor, b, h, q[:, None], there[None, :])
    if WHOLE:
        if logits.key_mask is not None:
            shown = tl.load(logits.key_mask + b.to(tl.int64) * keys + k)
            score = tl.where((shown != 0)[None, :], score, float("-inf"))
    else:
        score = hide(score, True, logits, b, first[:, None], last[:, None], k[None, :], keys)
    return score, k0


# Bytes: q once, k a tile from L2, a number a block. Operations: 2 D a visible pair, and an exp2.
@triton.jit
def _mass_kernel(
    query, key, lse, mass, logits, heads, group, queries, keys, width,
    size: tl.constexpr, SIZE: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    """mass (B, H, tiles * Q_TILE / Q_BLOCK, width): of blocks that are no larger than a tile."""
    tiles = tl.cdiv(queries, Q_TILE)
    # late queries first, which see the most keys under a causal mask
    tile = tiles - 1 - tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    b, h = head // heads, head % heads
    asked = tile * Q_TILE + tl.arange(0, Q_TILE)
    q = tl.minimum(asked, queries - 1)
    row = head.to(tl.int64) * queries + q
    first, last = key_limits(logits, b, q, queries, keys)
    offset = tl.load(lse + row)
    seen = (asked < queries) & (offset != float("-inf"))
    first, last = tl.where(seen, first, keys), tl.where(seen, last, 0)
    offset = tl.where(seen, offset, 0.0)[:, None]
    steps = _steps(first, last, keys, K_TILE)
    factor = factor_of(logits, row)
    if PLAIN:
        factor, offset = factor * LOG2E, offset * LOG2E
    else:
        factor = (row * 0 + factor)[:, None]
    own = load_rows(head_of(query, b, h), query, q, size, SIZE)
    keys_of = head_of(key, b, h // group)

    ROWS: tl.constexpr = Q_TILE // Q_BLOCK
    COLUMNS: tl.constexpr = K_TILE // K_BLOCK
    rows = (head.to(tl.int64) * tiles + tile) * ROWS + tl.arange(0, ROWS)
    to = mass + (rows * width)[:, None] + tl.arange(0, COLUMNS)[None, :]
    for whole in tl.static_range(2):
        for step in range(_tiles(steps, whole == 1, K_TILE)):
            score, k0 = _tile_logits(
                own, keys_of, key, logits, factor, steps, step, b, h, q, first, last, keys, size, SIZE, PLAIN,
                PRECISION, whole == 1, K_TILE,
            )  # fmt: skip
            # not at most 1: the lse is the caller's
            if PLAIN:
                weight = tl.exp2(score * factor - offset)
            else:
                weight = tl.exp2((score - offset) * LOG2E)
            if COLUMNS == 1:
                sums = tl.sum(weight, 1)[:, None]
            else:
                sums = tl.sum(tl.reshape(weight, (Q_TILE, COLUMNS, K_BLOCK)), 2)
            block = tl.sum(tl.reshape(sums, (ROWS, Q_BLOCK, COLUMNS)), 1)
            column = k0 // K_BLOCK
            tl.store(to + column, block, mask=(column + tl.arange(0, COLUMNS) < width)[None, :])


# Bytes and operations as of the mass, and another exp2 a row and tile.
@triton.jit
def _recall_kernel(
    query, key, blocks, recall, logits, heads, group, queries, keys, block_batch, block_head, width,
    size: tl.constexpr, SIZE: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, Q_TILE)
    tile = tiles - 1 - tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    b, h = head // heads, head % heads
    asked = tile * Q_TILE + tl.arange(0, Q_TILE)
    q = tl.minimum(asked, queries - 1)
    row = head.to(tl.int64) * queries + q
    first, last = key_limits(logits, b, q, queries, keys)
    steps = _steps(first, last, keys, K_TILE)
    factor = factor_of(logits, row)
    unit = factor * LOG2E
    if not PLAIN:
        factor = (row * 0 + factor)[:, None]
    own = load_rows(head_of(query, b, h), query, q, size, SIZE)
    keys_of = head_of(key, b, h // group)
    chosen = blocks + b.to(tl.int64) * block_batch + h.to(tl.int64) * block_head + (q // Q_BLOCK).to(tl.int64) * width

    # blocks of keys in a tile, or the part of one
    PART: tl.constexpr = min(K_BLOCK, K_TILE)
    COLUMNS: tl.constexpr = K_TILE // PART
    most = tl.full((Q_TILE,), LOWEST, tl.float32)
    total = tl.zeros((Q_TILE,), tl.float32)
    kept = tl.zeros((Q_TILE,), tl.float32)
    for whole in tl.static_range(2):
        for step in range(_tiles(steps, whole == 1, K_TILE)):
            score, k0 = _tile_logits(
                own, keys_of, key, logits, factor, steps, step, b, h, q, first, last, keys, size, SIZE, PLAIN,
                PRECISION, whole == 1, K_TILE,
            )  # fmt: skip
            larger = tl.maximum(most, tl.max(score, 1))
            if PLAIN:
                # the maximum is taken off first, as attention does
                shrink, score = tl.exp2((most - larger) * unit), (score - larger[:, None]) * unit
            else:
                shrink, score = tl.exp2((most - larger) * LOG2E), exponents(score, larger[:, None], False)
            weight = tl.exp2(score)
            if COLUMNS == 1:
                sums = tl.sum(weight, 1)
                keep = tl.load(chosen + k0 // K_BLOCK)
                part = tl.where(keep != 0, sums, 0.0)
            else:
                by_block = tl.sum(tl.reshape(weight, (Q_TILE, COLUMNS, PART)), 2)
                column = k0 // K_BLOCK + tl.arange(0, COLUMNS)
                keep = tl.load(chosen[:, None] + tl.minimum(column, width - 1)[None, :])
                sums = tl.sum(by_block, 1)
                part = tl.sum(tl.where(keep != 0, by_block, 0.0), 1)
            total = total * shrink + sums
            kept = kept * shrink + part
            most = larger
    share = tl.where(total == 0, 1.0, kept / total)
    tl.store(recall + row, share, mask=asked < queries)


def _plan(query: Tensor, logits: _attention.Logits) -> tuple[Plan, dict[str, Any]]:
    """The plan and the options of a launch."""
    size, bytes_of = padded(query.shape[3]), query.element_size()
    plan = next(plan for (width, most), plan in PLANS.items() if width == bytes_of and size <= most)
    if bytes_of == 2 and logits.row_bias is not None:
        plan = BIASED
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    if bytes_of == 2 and logits.row_bias is None:
        options["maxnreg"] = 128
    return plan, options


def block_mass(query: Tensor, key: Tensor, lse: Tensor, q_block: int, k_block: int, *args: Any) -> Tensor:
    mass = ops._mass_fake(query, key, lse, q_block, k_block, *args)
    check_narrow("block_mass", query)
    if mass.numel() == 0:
        return mass
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    logits = _attention.Logits(*args)
    plan, options = _plan(query, logits)
    # sums of parts of blocks, where those are larger than a tile; tiles that nobody sees are passed over
    part = min(q_block, plan.q_tile), min(k_block, plan.k_tile)
    tiles = triton.cdiv(queries, plan.q_tile)
    shape = (batch, heads, tiles * (plan.q_tile // part[0]), triton.cdiv(keys, part[1]))
    parts = mass.new_zeros(shape)
    with torch.cuda.device_of(query):
        _mass_kernel[(tiles * batch * heads,)](
            rows_of(query), rows_of(key), lse.contiguous(), parts,
            kernel_logits(query, key, logits, plan.k_tile), heads, heads // key.shape[1],
            queries, keys, shape[3], size, padded(size), plain(logits), precision_of(query),
            *part, plan.q_tile, plan.k_tile, **options,
        )  # fmt: skip
    for dim, (count, own, block) in enumerate(zip(mass.shape[2:], part, (q_block, k_block), strict=True), 2):
        share = block // own
        if share > 1:
            missing = count * share - parts.shape[dim]
            padding = (0, missing) if dim == 3 else (0, 0, 0, missing)
            parts = torch.nn.functional.pad(parts, padding).unflatten(dim, (count, share)).sum(dim + 1)
        parts = parts.narrow(dim, 0, count)
    return parts.contiguous()


def block_recall(query: Tensor, key: Tensor, blocks: Tensor, q_block: int, k_block: int, *args: Any) -> Tensor:
    recall = ops._recall_fake(query, key, blocks, q_block, k_block, *args)
    check_narrow("block_recall", query)
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    if recall.numel() == 0 or keys == 0:
        return recall.fill_(1)
    logits = _attention.Logits(*args)
    plan, options = _plan(query, logits)
    own = blocks.contiguous().view(torch.uint8)
    with torch.cuda.device_of(query):
        _recall_kernel[(triton.cdiv(queries, plan.q_tile) * batch * heads,)](
            rows_of(query), rows_of(key), own, recall,
            kernel_logits(query, key, logits, plan.k_tile), heads, heads // key.shape[1],
            queries, keys, 0 if own.shape[0] == 1 else own.stride(0), 0 if own.shape[1] == 1 else own.stride(1),
            own.shape[3], size, padded(size), plain(logits), precision_of(query),
            q_block, k_block, plan.q_tile, plan.k_tile, **options,
        )  # fmt: skip
    return recall
