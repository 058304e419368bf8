"""Attention over listed blocks in Triton, forward: a program takes a tile of queries through its list of key blocks."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrx import _attention
from pyrx.ops import block_sparse_attention as ops

from .attention import (
    LN2,
    LOG2E,
    LOWEST,
    Plan,
    factor_of,
    head_of,
    heavy,
    hide,
    kernel_logits,
    key_limits,
    list_of,
    lists_of,
    load_rows,
    logits_of,
    padded,
    plain,
    plan_of,
    precision_of,
    rows_of,
    tile_keep,
    tile_of,
)
from .block_sparse_attention_backward import block_sparse_attention_backward as block_sparse_attention_backward
from .dropout import check_narrow, scale_of

# Numbers that change from call to call and must not each compile a kernel of their own.
_VARYING = ["threshold", "width"]

# See plan_of. Chosen for registers without spills, then for two programs a multiprocessor; ptxas -v tells.
FORWARD = {
    ("hopper", 64): (Plan(128, 64, 4, 3), Plan(64, 64, 4, 3)),
    ("hopper", 128): (Plan(128, 64, 8, 3), Plan(64, 64, 4, 3)),
    ("hopper", 256): (Plan(128, 32, 8, 3), Plan(64, 32, 4, 2)),
    ("half", 64): (Plan(128, 64, 8, 3), Plan(64, 64, 4, 3)),
    ("half", 128): (Plan(128, 64, 8, 2), Plan(64, 64, 4, 2)),
    ("half", 256): (Plan(64, 32, 8, 2),),
    ("single", 64): (Plan(64, 32, 4, 2),),
    ("single", 128): (Plan(64, 32, 4, 2),),
    ("single", 256): (Plan(32, 16, 4, 2),),
}


# Bytes: q, out and the rows' results once, k and v a tile from L2. Operations: 2 (D + Dv) a listed pair, and an exp2.
@triton.jit(do_not_specialize=_VARYING)
def _forward_kernel(
    query, key, value, out, lse, entropy, lists, logits, seed, threshold, width,
    heads, group, queries, keys, size: tl.constexpr, value_size: tl.constexpr,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    PLAIN: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, Q_TILE)
    # late queries first, which see the most keys under a causal mask
    q0 = (tiles - 1 - tl.program_id(0) % tiles) * Q_TILE
    head = tl.program_id(0) // tiles
    b, h = head // heads, head % heads
    q = tl.minimum(q0 + tl.arange(0, Q_TILE), queries - 1)
    row = head.to(tl.int64) * queries + q
    first, last = key_limits(logits, b, q, queries, keys)
    # between these every query of the tile sees every key
    whole_first, whole_last = tl.max(first, 0), tl.min(last, 0)
    factor = factor_of(logits, row)
    if PLAIN:
        # maxima and what is less them are of products
        unit = factor * LOG2E
    else:
        unit = LOG2E
        factor = (tl.zeros((Q_TILE,), tl.float32) + factor)[:, None]
    own = load_rows(head_of(query, b, h), query, q, size, SIZE)
    keys_of, values_of = head_of(key, b, h // group), head_of(value, b, h // group)
    start, count = list_of(lists, b, h, q0 // Q_BLOCK, width)
    blocks = tl.cdiv(keys, K_BLOCK)

    most = tl.full((Q_TILE,), LOWEST, tl.float32)
    total = tl.zeros((Q_TILE,), tl.float32)
    mean = tl.zeros((Q_TILE,), tl.float32)
    weighted = tl.zeros((Q_TILE, VALUE_SIZE), tl.float32)
    for step in range(count * (K_BLOCK // K_TILE)):
        k0 = tile_of(start, step, blocks, K_BLOCK, K_TILE)
        k = k0 + tl.arange(0, K_TILE)
        there = tl.minimum(k, keys - 1)
        others = load_rows(keys_of, key, there, size, SIZE)
        score = tl.dot(own, tl.trans(others), input_precision=PRECISION)
        partial = (k0 < whole_first) | (k0 + K_TILE > whole_last)
        if logits.key_mask is not None:
            flags = tl.cdiv(keys, K_TILE)
            partial = partial | (tl.load(logits.clear + b * flags + tl.minimum(k0 // K_TILE, flags - 1)) == 0)
        if not PLAIN:
            score, _ = logits_of(score, logits, factor, b, h, q[:, None], there[None, :])
        score = hide(score, partial, logits, b, first[:, None], last[:, None], k[None, :], keys)
        larger = tl.maximum(most, tl.max(score, 1))
        # the maximum is taken off first: a fused product less a rounded one is hundreds where both are far from 0
        score = (score - larger[:, None]) * unit
        weight = tl.exp2(score)
        step = (most - larger) * unit
        shrink = tl.exp2(step)
        if entropy is not None:
            # so far that nothing is left of the old sums, times a total, is a number still
            moved = mean + total * tl.maximum(step, -1000.0)
            mean = moved * shrink + tl.sum(tl.where(weight > 0, weight * score, 0.0), 1)
        total = total * shrink + tl.sum(weight, 1)
        if seed is not None:
            keep = tile_keep(seed, threshold, row, k0, keys, K_TILE, ALIGNED, False)
            weight = tl.where(keep, weight, 0.0)
        weighted *= shrink[:, None]
        content = load_rows(values_of, value, there, value_size, VALUE_SIZE)
        weighted = tl.dot(weight.to(content.dtype), content, weighted, input_precision=PRECISION)
        most = larger

    nothing = total == 0
    scale = 1.0 / total
    if seed is not None:
        scale *= scale_of(threshold)
    weighted = tl.where(nothing[:, None], 0.0, weighted * scale[:, None])
    inside = q0 + tl.arange(0, Q_TILE) < queries
    d = tl.arange(0, VALUE_SIZE)
    place = head_of(out, b, h) + q.to(tl.int64)[:, None] * out.token + d[None, :]
    tl.store(place, weighted.to(out.data.dtype.element_ty), mask=inside[:, None] & (d < value_size)[None, :])
    if PLAIN:
        most *= factor
    tl.store(lse + row, tl.where(nothing, float("-inf"), most + tl.log2(total) * LN2), mask=inside)
    if entropy is not None:
        tl.store(entropy + row, tl.where(nothing, 0.0, (tl.log2(total) - mean / total) * LN2), mask=inside)


def block_sparse_attention(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, entropy = ops._fake(*args)
    query, key, value = args[ops._INPUTS]
    check_narrow(ops.ROW, query)
    kv_counts, kv_indices, _, _, q_block, k_block = args[ops._LISTS]
    logits = _attention.Logits(*args[ops._LOGITS])
    seed, threshold = args[ops._DROPOUT]
    batch, heads, queries, size = query.shape
    keys, value_size = value.shape[2:]
    if lse.numel() == 0 or keys == 0:
        return out.zero_(), lse.fill_(-torch.inf), entropy.zero_()
    with torch.cuda.device_of(query):
        plan = plan_of(FORWARD, query, value, q_block, k_block, heavy(logits, threshold))
        _forward_kernel[(triton.cdiv(queries, plan.q_tile) * batch * heads,)](
            rows_of(query), rows_of(key), rows_of(value), rows_of(out), lse, entropy if args[20] else None,
            lists_of(kv_counts, kv_indices), kernel_logits(query, key, logits, plan.k_tile),
            seed if threshold > 0 else None, threshold, kv_indices.shape[3],
            heads, heads // key.shape[1], queries, keys, size, value_size, padded(size), padded(value_size),
            plain(logits), keys % 8 == 0, precision_of(query), q_block, k_block, plan.q_tile, plan.k_tile,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
    return out, lse, entropy
