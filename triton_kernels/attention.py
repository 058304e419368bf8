"""What the kernels over attention logits share: the logit of a tile, which keys a query sees, the mask of a dropout."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrx import _attention
from pyrx._backends import TRITON_INTERPRETED

from .dropout import element_keep, group_bits

# exp and log are taken to base 2, which the hardware has
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# where a running maximum starts: minus infinity less itself would be NaN
LOWEST = tl.constexpr(-3.4028234663852886e38)
SMALLEST = torch.finfo(torch.float32).tiny


class Logits(NamedTuple):
    """pyrx/_attention.py: Logits as the kernels take it, one argument. Strides are in elements, 0 where a dimension is
    one; what is absent is None."""

    left: int  # at most the lengths, which is no limit
    right: int
    key_range: Any  # int32 (B or 1, Sq, 2)
    range_batch: int
    key_mask: Any  # uint8 (B, Sk), not 0 where visible
    clear: Any  # uint8 (B, tiles of keys), not 0 where key_mask hides nothing of a tile
    query_scale: Any  # float32 (B, H, Sq)
    row_bias: Any  # (B or 1, H or 1, Sq, keys / columns)
    row_strides: Any  # of batch, head and query
    column_bias: Any  # (B or 1, H or 1, Sq, columns)
    column_strides: Any
    columns: int
    scale: float
    softcap: Any


def _bias_strides(bias: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    if bias is None:
        return None, (0, 0, 0)
    if bias.stride(3) != 1:
        bias = bias.contiguous()
    batch, head, query = (0 if bias.shape[i] == 1 else bias.stride(i) for i in range(3))
    return bias, (batch, head, query)


def kernel_logits(query: Tensor, key: Tensor, logits: _attention.Logits, tile: int) -> Logits:
    """The argument of kernels that walk `tile` keys at a time."""
    queries, keys = query.shape[2], key.shape[2]
    key_range = None if logits.key_range is None else logits.key_range.contiguous()
    mask, clear = None, None
    if logits.key_mask is not None:
        mask = logits.key_mask.contiguous()
        padded = torch.nn.functional.pad(mask, (0, -keys % tile), value=True)
        clear = padded.unflatten(1, (-1, tile)).all(2).view(torch.uint8)
        mask = mask.view(torch.uint8)
    row_bias, row_strides = _bias_strides(logits.row_bias)
    column_bias, column_strides = _bias_strides(logits.column_bias)
    return Logits(
        left=queries if logits.left < 0 else min(logits.left, queries),
        right=keys if logits.right < 0 else min(logits.right, keys),
        key_range=key_range,
        range_batch=0 if key_range is None or key_range.shape[0] == 1 else 2 * queries,
        key_mask=mask,
        clear=clear,
        query_scale=None if logits.query_scale is None else logits.query_scale.contiguous(),
        row_bias=row_bias,
        row_strides=row_strides,
        column_bias=column_bias,
        column_strides=column_strides,
        columns=1 if column_bias is None else column_bias.shape[3],
        # the interpreter takes smaller numbers for float64
        scale=logits.scale if abs(logits.scale) >= SMALLEST else 0.0,
        softcap=logits.softcap or None,
    )


def plain(logits: _attention.Logits) -> bool:
    """Whether logits are products times one positive number, so that the largest product is the largest logit."""
    changed = logits.softcap > 0 or logits.row_bias is not None or logits.query_scale is not None
    return not changed and 1e-30 < logits.scale < 1e30


class Plan(NamedTuple):
    """Queries and keys of a tile, warps, stages of the loads' pipeline."""

    q_tile: int
    k_tile: int
    warps: int
    stages: int


def padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


@functools.cache
def _large_memory(device: torch.device) -> bool:
    """Whether tiles have Hopper's shared memory, 227 KiB a program, and its products of 64 rows; interpreted: yes.
    `device` is the current one; those that are not have 99 KiB at least."""
    return TRITON_INTERPRETED or triton.runtime.driver.active.get_current_target().arch in (90, 100, 103)


Plans = dict[tuple[str, int], tuple[Plan, ...]]


def heavy(logits: _attention.Logits, threshold: int) -> bool:
    """Whether logits of many parts leave few registers."""
    return not plain(logits) and (threshold > 0 or logits.softcap > 0)


def plan_of(plans: Plans, query: Tensor, value: Tensor, q_block: int, k_block: int, heavy: bool = False) -> Plan:
    """The first plan whose tiles fit the blocks, or the last one cut down to them; of heavy logits tiles of 64 at most,
    in eight warps.

    Keys are "hopper", "half" (16 bits elsewhere) or "single" and the largest padded head size that a plan serves.
    """
    kind = "single" if query.dtype == torch.float32 else "hopper" if _large_memory(query.device) else "half"
    size = max(padded(query.shape[3]), padded(value.shape[3]))
    found = next(each for (name, most), each in plans.items() if name == kind and size <= most)
    if heavy:
        q_block, k_block = min(q_block, 64), min(k_block, 64)
    for plan in found:
        if plan.q_tile <= q_block and plan.k_tile <= k_block:
            break
    else:
        plan = Plan(min(plan.q_tile, q_block), min(plan.k_tile, k_block), 4, plan.stages)
    return plan._replace(warps=8) if heavy and plan.q_tile * plan.k_tile >= 2048 else plan


class Lists(NamedTuple):
    """Counts and indices of blocks, int32 (B or 1, H or 1, rows) and (.., rows, width); strides 0 where broadcast."""

    counts: Any
    indices: Any
    counts_batch: int
    counts_head: int
    indices_batch: int
    indices_head: int


def lists_of(counts: Tensor, indices: Tensor) -> Lists:
    counts, indices = counts.contiguous(), indices.contiguous()
    strides = [0 if each.shape[i] == 1 else each.stride(i) for each in (counts, indices) for i in (0, 1)]
    return Lists(counts, indices, *strides)


class Rows(NamedTuple):
    """A tensor (B, H, S, D) and its strides; the last dimension is contiguous."""

    data: Any
    batch: int
    head: int
    token: int


def rows_of(tensor: Tensor) -> Rows:
    if tensor.stride(3) != 1 and tensor.shape[3] != 1:
        tensor = tensor.contiguous()
    return Rows(tensor, *tensor.stride()[:3])


def precision_of(query: Tensor) -> str:
    return "tf32" if query.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def head_of(rows, b, h):
    """Where head h of batch entry b begins."""
    return rows.data + b.to(tl.int64) * rows.batch + h.to(tl.int64) * rows.head


@triton.jit
def load_rows(base, rows, token, size: tl.constexpr, SIZE: tl.constexpr):
    """(tokens, SIZE) of a head that begins at `base`, 0 past its size; tokens lie in the tensor."""
    d = tl.arange(0, SIZE)
    place = base + token.to(tl.int64)[:, None] * rows.token + d[None, :]
    if SIZE == size:
        found = tl.load(place)
    else:
        found = tl.load(place, mask=(d < size)[None, :], other=0.0)
    return found


@triton.jit
def list_of(lists, b, h, row, width):
    """(where a row's list of blocks begins, its length)."""
    counts = lists.counts + b.to(tl.int64) * lists.counts_batch + h.to(tl.int64) * lists.counts_head
    start = lists.indices + b.to(tl.int64) * lists.indices_batch + h.to(tl.int64) * lists.indices_head
    count = tl.load(counts + row)
    return start + row.to(tl.int64) * width, tl.maximum(tl.minimum(count, width), 0)


@triton.jit
def tile_of(start, step, blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The first token of a list's tile number `step`; after the last block where the list names none."""
    PER_BLOCK: tl.constexpr = BLOCK // TILE
    block = tl.load(start + step // PER_BLOCK)
    inside = (block >= 0) & (block < blocks)
    first = tl.where(inside, block, blocks) * BLOCK + step % PER_BLOCK * TILE
    return tl.multiple_of(first, TILE)


@triton.jit
def key_limits(logits, b, q, queries, keys):
    """(the first key that each of queries `q` may see, the one after the last); q at most the last query."""
    first = tl.maximum(q - logits.left, 0)
    last = tl.minimum(q + logits.right + 1, keys)
    if logits.key_range is not None:
        place = logits.key_range + b.to(tl.int64) * logits.range_batch + 2 * q.to(tl.int64)
        first = tl.maximum(first, tl.load(place))
        last = tl.minimum(last, tl.load(place + 1))
    return first, last


@triton.jit
def visible_keys(logits, b, first, last, k, keys):
    """Whether a query with limits `first` and `last` sees key `k`; shapes that broadcast to the tile. k may lie beyond
    the last key, which nobody sees."""
    visible = (k >= first) & (k < last)
    if logits.key_mask is not None:
        shown = tl.load(logits.key_mask + b.to(tl.int64) * keys + tl.minimum(k, keys - 1))
        visible = visible & (shown != 0)
    return visible


@triton.jit
def hide(score, partial, logits, b, first, last, k, keys):
    """Minus infinity where a query does not see a key (visible_keys), if anything of the tile is hidden: `partial`."""
    if partial:
        score = tl.where(visible_keys(logits, b, first, last, k, keys), score, float("-inf"))
    return score


@triton.jit
def factor_of(logits, row):
    """What products are multiplied with first, a number or one a row; rows are (b heads + h) queries + q."""
    factor = logits.scale
    if logits.query_scale is not None:
        factor = factor * tl.load(logits.query_scale + row)
    return factor


@triton.jit
def capped(x, softcap):
    """softcap tanh(x / softcap)."""
    y = x / softcap
    z = y * y
    # the other formula is exact to one part of 2**24 of 1, which is too little for small y
    small = y + y * z * (-0.33333333 + z * (0.13333333 + z * (-0.053968254 + z * (0.021869488 - z * 0.0088632355))))
    large = 1 - 2 / (1 + tl.exp2(y * (2 * LOG2E)))
    return softcap * tl.where(tl.abs(y) < 0.3, small, large)


@triton.jit
def bias_of(logits, b, h, q, k):
    """The bias of queries `q` and keys `k`, which broadcast to a tile and lie in the tensors."""
    q = q.to(tl.int64)
    batch, head, query = logits.row_strides
    row = logits.row_bias + b.to(tl.int64) * batch + h.to(tl.int64) * head + q * query
    if logits.column_bias is None:
        bias = tl.load(row + k).to(tl.float32)
    else:
        batch, head, query = logits.column_strides
        column = logits.column_bias + b.to(tl.int64) * batch + h.to(tl.int64) * head + q * query
        bias = tl.load(row + k // logits.columns).to(tl.float32)
        bias += tl.load(column + k % logits.columns).to(tl.float32)
    return bias


@triton.jit
def logits_of(product, logits, factor, b, h, q, k):
    """(the logits of a tile of products, those before bias where they are capped).

    `factor` (factor_of), `q` and `k` broadcast to the tile; q and k lie in the tensors, so clamp those beyond the ends.
    """
    value = product * factor
    if logits.softcap is not None:
        value = capped(value, logits.softcap)
    cap = value
    if logits.row_bias is not None:
        value += bias_of(logits, b, h, q, k)
    return value, cap


@triton.jit
def exponents(value, base, PLAIN: tl.constexpr):
    """log2 of the weights of logits over the logarithm of their sum; PLAIN: both come times log2(e).

    At most 0. Far from 0 float32 is coarse: a product that the compiler does not round before it takes `base` off would
    leave hundreds.
    """
    found = value - base
    if not PLAIN:
        found *= LOG2E
    return tl.minimum(found, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tile_keep(
    seed, threshold, row, k0, keys, KEYS: tl.constexpr, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """The dropout's mask of int64 `row`s (as factor_of's) and keys k0 .. k0 + KEYS - 1, or its transpose.

    ALIGNED: rows are whole groups of Philox, and k0 a multiple of eight.
    """
    sample = tl.cast(0, tl.int64)
    if ALIGNED:
        group = k0 // 8 + tl.arange(0, KEYS // 8)
        lane = tl.arange(0, 8)
        if TRANSPOSED:
            bits = group_bits(seed, (row * (keys // 8))[None, :] + group[:, None], sample, threshold, False)
            lanes = (bits[:, None, :] >> lane[None, :, None]) & 1
            keep = tl.reshape(lanes, (KEYS, row.shape[0])) != 0
        else:
            bits = group_bits(seed, (row * (keys // 8))[:, None] + group[None, :], sample, threshold, False)
            lanes = (bits[:, :, None] >> lane[None, None, :]) & 1
            keep = tl.reshape(lanes, (row.shape[0], KEYS)) != 0
    else:
        k = k0 + tl.arange(0, KEYS)
        if TRANSPOSED:
            index = (row * keys)[None, :] + k[:, None]
        else:
            index = (row * keys)[:, None] + k[None, :]
        keep = element_keep(seed, index, sample, threshold, False)
    return keep
