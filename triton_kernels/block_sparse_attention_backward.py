"""The gradients of attention over listed blocks in Triton, without atomics.

Programs own what they write: a tile of keys walks the lists of queries for dK and dV, a tile of queries the lists of
keys for dQ and the query scale's, a tile of a bias all heads and batch entries that share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrx import _attention
from pyrx.ops import block_sparse_attention as ops

from .attention import (
    LN2,
    LOG2E,
    Logits,
    Plan,
    Rows,
    exponents,
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
from .dropout import check_narrow, scale_of

# Numbers that change from call to call and must not each compile a kernel of their own.
_VARYING = ["threshold", "width"]
# rows of a program that makes deltas
ROWS = 64

# See plan_of and FORWARD of block_sparse_attention.py.
KEY_VALUE = {
    ("hopper", 64): (Plan(64, 128, 8, 3), Plan(64, 64, 4, 3)),
    ("hopper", 128): (Plan(64, 128, 8, 3), Plan(32, 64, 4, 3)),
    ("hopper", 256): (Plan(32, 64, 8, 2),),
    ("half", 64): (Plan(32, 128, 8, 2), Plan(32, 64, 4, 2)),
    ("half", 128): (Plan(32, 64, 4, 2),),
    ("half", 256): (Plan(32, 32, 8, 1),),
    ("single", 64): (Plan(64, 32, 4, 2), Plan(32, 16, 4, 2)),
    ("single", 128): (Plan(32, 16, 4, 2),),
    ("single", 256): (Plan(32, 16, 4, 1),),
}
QUERY = {
    ("hopper", 64): (Plan(128, 64, 8, 3), Plan(64, 64, 4, 3)),
    ("hopper", 128): (Plan(128, 64, 8, 3), Plan(64, 64, 4, 2)),
    ("hopper", 256): (Plan(128, 32, 8, 2), Plan(64, 32, 4, 2)),
    ("half", 64): (Plan(128, 32, 4, 2), Plan(64, 32, 4, 2)),
    ("half", 128): (Plan(64, 64, 4, 2),),
    ("half", 256): (Plan(32, 32, 4, 2),),
    ("single", 64): (Plan(32, 32, 4, 2),),
    ("single", 128): (Plan(32, 32, 4, 2),),
    ("single", 256): (Plan(16, 16, 4, 2),),
}
BIAS = {
    ("hopper", 64): (Plan(64, 32, 4, 1),),
    ("hopper", 128): (Plan(64, 32, 8, 1),),
    ("hopper", 256): (Plan(64, 32, 8, 1),),
    ("half", 64): (Plan(64, 32, 4, 1),),
    ("half", 128): (Plan(64, 32, 8, 1),),
    ("half", 256): (Plan(32, 32, 8, 1),),
    ("single", 64): (Plan(32, 32, 4, 1),),
    ("single", 128): (Plan(32, 32, 4, 1),),
    ("single", 256): (Plan(16, 32, 4, 1),),
}


class Problem(NamedTuple):
    """What every gradient is made of."""

    query: Rows
    key: Rows
    value: Rows
    grad: Rows
    delta: Tensor  # float32 (B H, `padded`), see _delta_kernel
    base: Tensor
    grad_entropy: Tensor | None
    padded: int
    logits: Logits
    seed: Tensor | None
    batch: int
    heads: int
    group: int
    queries: int
    keys: int


# Bytes: the result and its gradient once. Operations: 2 an element.
@triton.jit
def _delta_kernel(
    grad, out, lse, entropy, grad_lse, grad_entropy, delta, base, padded_grad_entropy, heads, queries, padded_queries,
    value_size: tl.constexpr, VALUE_SIZE: tl.constexpr, PLAIN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Per row delta = grad . out - grad_lse + grad_entropy * entropy, and base: lse as of exponents(), plus infinity
    where nothing is seen and past the last query, so that those weights are 0."""
    tiles = padded_queries // ROWS
    head = tl.program_id(0) // tiles
    b, h = head // heads, head % heads
    token = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    inside = token < queries
    q = tl.minimum(token, queries - 1)
    row = head.to(tl.int64) * queries + q
    upstream = load_rows(head_of(grad, b, h), grad, q, value_size, VALUE_SIZE).to(tl.float32)
    result = load_rows(head_of(out, b, h), out, q, value_size, VALUE_SIZE).to(tl.float32)
    found = tl.sum(upstream * result, 1)
    place = head.to(tl.int64) * padded_queries + token
    if grad_lse is not None:
        found -= tl.load(grad_lse + row)
    if grad_entropy is not None:
        along = tl.load(grad_entropy + row)
        found += along * tl.load(entropy + row)
        tl.store(padded_grad_entropy + place, tl.where(inside, along, 0.0))
    own = tl.load(lse + row)
    tl.store(delta + place, tl.where(inside, found, 0.0))
    logarithm = own
    if PLAIN:
        logarithm *= LOG2E
    tl.store(base + place, tl.where(inside & (own != float("-inf")), logarithm, float("inf")))


@triton.jit
def _hide_from_queries(score, partial, p, b, token, k):
    """`hide` for a tile (keys, queries) whose queries' limits are not known yet."""
    if partial:
        first, last = key_limits(p.logits, b, token, p.queries, p.keys)
        score = hide(score, True, p.logits, b, first[None, :], last[None, :], k[:, None], p.keys)
    return score


@triton.jit
def _logit_gradient(p, weight, exponent, along, delta, grad_entropy):
    """The gradient of logits; `along` are those of their weights exp2(exponent), grad_entropy anything if there is
    none."""
    along = along - delta
    if p.grad_entropy is not None:
        # where a weight is 0 the exponent may be minus infinity
        along -= tl.where(weight > 0, grad_entropy * (exponent * LN2), 0.0)
    return weight * along


@triton.jit
def _product_gradient(gradient, cap, p):
    """The gradient of products, over scale and query scale, of that of logits."""
    if p.logits.softcap is not None:
        share = cap / p.logits.softcap
        gradient *= 1 - share * share
    return gradient


# Bytes: k, v, dk and dv once, q, dout and rows a tile from L2. Operations: 4 (D + Dv) a listed pair, and an exp2.
@triton.jit(do_not_specialize=_VARYING)
def _key_value_kernel(
    p, grad_key, grad_value, lists, threshold, width,
    size: tl.constexpr, value_size: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    PLAIN: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(p.keys, K_TILE)
    k0 = tl.program_id(0) % tiles * K_TILE
    head = tl.program_id(0) // tiles
    kv_heads = p.heads // p.group
    b, kv_head = head // kv_heads, head % kv_heads
    k = k0 + tl.arange(0, K_TILE)
    there = tl.minimum(k, p.keys - 1)
    own = load_rows(head_of(p.key, b, kv_head), p.key, there, size, SIZE)
    blocks = tl.cdiv(p.queries, Q_BLOCK)
    hidden = k0 + K_TILE > p.keys
    if p.logits.key_mask is not None:
        hidden = hidden | (tl.load(p.logits.clear + b * tiles + k0 // K_TILE) == 0)
    if grad_key is not None:
        content = load_rows(head_of(p.value, b, kv_head), p.value, there, value_size, VALUE_SIZE)
        found_key = tl.zeros((K_TILE, SIZE), tl.float32)
    if grad_value is not None:
        found_value = tl.zeros((K_TILE, VALUE_SIZE), tl.float32)
    dropped = 1.0
    if p.seed is not None:
        dropped = scale_of(threshold)

    for member in range(p.group):
        h = kv_head * p.group + member
        start, count = list_of(lists, b, h, k0 // K_BLOCK, width)
        queries_of, upstream_of = head_of(p.query, b, h), head_of(p.grad, b, h)
        first_row = (b.to(tl.int64) * p.heads + h) * p.queries
        for step in range(count * (Q_BLOCK // Q_TILE)):
            q0 = tile_of(start, step, blocks, Q_BLOCK, Q_TILE)
            rows = (b * p.heads + h).to(tl.int64) * p.padded + q0
            lane = tl.arange(0, Q_TILE)
            token = tl.minimum(q0 + lane, p.queries - 1)
            others = load_rows(queries_of, p.query, token, size, SIZE)
            score = tl.dot(own, tl.trans(others), input_precision=PRECISION)
            base = tl.load(p.base + rows + lane)[None, :]
            if p.logits.key_range is not None:
                partial: tl.constexpr = True
            else:
                # the last query's first key, and the first query's last
                partial = hidden | (q0 + Q_TILE - 1 - p.logits.left > k0) | (q0 + p.logits.right + 1 < k0 + K_TILE)
            if PLAIN:
                score = _hide_from_queries(score, partial, p, b, token, k)
                cap = score
                value = score * (factor_of(p.logits, first_row) * LOG2E)
            else:
                factor = (tl.zeros((Q_TILE,), tl.float32) + factor_of(p.logits, first_row + token))[None, :]
                value, cap = logits_of(score, p.logits, factor, b, h, token[None, :], there[:, None])
                value = _hide_from_queries(value, partial, p, b, token, k)
            exponent = exponents(value, base, PLAIN)
            weight = tl.exp2(exponent)
            upstream = load_rows(upstream_of, p.grad, token, value_size, VALUE_SIZE)
            kept = weight
            if p.seed is not None:
                keep = tile_keep(p.seed, threshold, first_row + token, k0, p.keys, K_TILE, ALIGNED, True)
                kept = tl.where(keep, weight, 0.0)
            if grad_value is not None:
                found_value = tl.dot(kept.to(upstream.dtype), upstream, found_value, input_precision=PRECISION)
            if grad_key is not None:
                along = tl.dot(content, tl.trans(upstream), input_precision=PRECISION)
                if p.seed is not None:
                    along = tl.where(keep, along * dropped, 0.0)
                delta = tl.load(p.delta + rows + lane)[None, :]
                grad_entropy = delta
                if p.grad_entropy is not None:
                    grad_entropy = tl.load(p.grad_entropy + rows + lane)[None, :]
                gradient = _logit_gradient(p, weight, exponent, along, delta, grad_entropy)
                gradient = _product_gradient(gradient, cap, p)
                if p.logits.query_scale is not None:
                    gradient *= tl.load(p.logits.query_scale + first_row + token)[None, :]
                found_key = tl.dot(gradient.to(others.dtype), others, found_key, input_precision=PRECISION)

    inside = (k < p.keys)[:, None]
    if grad_key is not None:
        d = tl.arange(0, SIZE)
        place = head_of(grad_key, b, kv_head) + there.to(tl.int64)[:, None] * grad_key.token + d[None, :]
        found_key *= p.logits.scale
        tl.store(place, found_key.to(grad_key.data.dtype.element_ty), mask=inside & (d < size)[None, :])
    if grad_value is not None:
        d = tl.arange(0, VALUE_SIZE)
        place = head_of(grad_value, b, kv_head) + there.to(tl.int64)[:, None] * grad_value.token + d[None, :]
        found_value *= dropped
        tl.store(place, found_value.to(grad_value.data.dtype.element_ty), mask=inside & (d < value_size)[None, :])


@triton.jit
def _pair(
    p, own, upstream, rows, limits, factor, b, h, token, row, k0, threshold, dropped,
    size: tl.constexpr, value_size: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    PLAIN: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    """(gradient of the logits, the logits before bias, keys) of a tile of queries against one of keys."""
    delta, base, grad_entropy = rows
    first, last, whole_first, whole_last = limits
    k = k0 + tl.arange(0, K_TILE)
    there = tl.minimum(k, p.keys - 1)
    others = load_rows(head_of(p.key, b, h // p.group), p.key, there, size, SIZE)
    score = tl.dot(own, tl.trans(others), input_precision=PRECISION)
    partial = (k0 < whole_first) | (k0 + K_TILE > whole_last)
    if p.logits.key_mask is not None:
        flags = tl.cdiv(p.keys, K_TILE)
        partial = partial | (tl.load(p.logits.clear + b * flags + tl.minimum(k0 // K_TILE, flags - 1)) == 0)
    if PLAIN:
        score = hide(score, partial, p.logits, b, first[:, None], last[:, None], k[None, :], p.keys)
        cap = score
        value = score * (factor * LOG2E)
    else:
        value, cap = logits_of(score, p.logits, factor, b, h, token[:, None], there[None, :])
        value = hide(value, partial, p.logits, b, first[:, None], last[:, None], k[None, :], p.keys)
    exponent = exponents(value, base, PLAIN)
    weight = tl.exp2(exponent)
    content = load_rows(head_of(p.value, b, h // p.group), p.value, there, value_size, VALUE_SIZE)
    along = tl.dot(upstream, tl.trans(content), input_precision=PRECISION)
    if p.seed is not None:
        keep = tile_keep(p.seed, threshold, row, k0, p.keys, K_TILE, ALIGNED, False)
        along = tl.where(keep, along * dropped, 0.0)
    return _logit_gradient(p, weight, exponent, along, delta, grad_entropy), cap, others


@triton.jit
def _query_tile(
    p, b, h, q0, size: tl.constexpr, value_size: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    PLAIN: tl.constexpr, Q_TILE: tl.constexpr,
):  # fmt: skip
    """What a tile of queries brings to all its pairs: (queries, upstream, rows, limits, factor, token, row)."""
    token = tl.minimum(q0 + tl.arange(0, Q_TILE), p.queries - 1)
    row = (b.to(tl.int64) * p.heads + h) * p.queries + token
    own = load_rows(head_of(p.query, b, h), p.query, token, size, SIZE)
    upstream = load_rows(head_of(p.grad, b, h), p.grad, token, value_size, VALUE_SIZE)
    place = (b * p.heads + h).to(tl.int64) * p.padded + q0 + tl.arange(0, Q_TILE)
    delta = tl.load(p.delta + place)[:, None]
    grad_entropy = delta
    if p.grad_entropy is not None:
        grad_entropy = tl.load(p.grad_entropy + place)[:, None]
    rows = (delta, tl.load(p.base + place)[:, None], grad_entropy)
    first, last = key_limits(p.logits, b, token, p.queries, p.keys)
    factor = factor_of(p.logits, row)
    if not PLAIN:
        factor = (tl.zeros((Q_TILE,), tl.float32) + factor)[:, None]
    return own, upstream, rows, (first, last, tl.max(first, 0), tl.min(last, 0)), factor, token, row


# Bytes: q, dout, dq and rows once, k and v a tile from L2. Operations: 4 D + 2 Dv a listed pair, and an exp2.
@triton.jit(do_not_specialize=_VARYING)
def _query_kernel(
    p, grad_query, grad_scale, lists, threshold, width,
    size: tl.constexpr, value_size: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    PLAIN: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(p.queries, Q_TILE)
    # late queries first, which see the most keys under a causal mask
    q0 = (tiles - 1 - tl.program_id(0) % tiles) * Q_TILE
    head = tl.program_id(0) // tiles
    b, h = head // p.heads, head % p.heads
    own, upstream, rows, limits, factor, token, row = _query_tile(
        p, b, h, q0, size, value_size, SIZE, VALUE_SIZE, PLAIN, Q_TILE
    )
    start, count = list_of(lists, b, h, q0 // Q_BLOCK, width)
    blocks = tl.cdiv(p.keys, K_BLOCK)
    dropped = 1.0
    if p.seed is not None:
        dropped = scale_of(threshold)
    found = tl.zeros((Q_TILE, SIZE), tl.float32)
    for step in range(count * (K_BLOCK // K_TILE)):
        k0 = tile_of(start, step, blocks, K_BLOCK, K_TILE)
        gradient, cap, others = _pair(
            p, own, upstream, rows, limits, factor, b, h, token, row, k0, threshold, dropped,
            size, value_size, SIZE, VALUE_SIZE, PLAIN, ALIGNED, PRECISION, K_TILE,
        )  # fmt: skip
        gradient = _product_gradient(gradient, cap, p)
        found = tl.dot(gradient.to(others.dtype), others, found, input_precision=PRECISION)

    found *= p.logits.scale
    inside = q0 + tl.arange(0, Q_TILE) < p.queries
    if grad_scale is not None:
        # the sum over keys of gradient times product
        tl.store(grad_scale + row, tl.sum(found * own.to(tl.float32), 1), mask=inside)
    if grad_query is not None:
        if p.logits.query_scale is not None:
            found *= tl.load(p.logits.query_scale + row)[:, None]
        d = tl.arange(0, SIZE)
        place = head_of(grad_query, b, h) + token.to(tl.int64)[:, None] * grad_query.token + d[None, :]
        tl.store(place, found.to(grad_query.data.dtype.element_ty), mask=inside[:, None] & (d < size)[None, :])


# Bytes: the bias's gradient once, all else from L2. Operations: 2 (D + Dv) a listed pair, and a product with ones.
@triton.jit(do_not_specialize=_VARYING)
def _bias_kernel(
    p, output, lists, threshold, width, bias_batch, bias_heads, entries,
    size: tl.constexpr, value_size: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    """output (bias_batch, bias_heads, Sq, entries): sums of the gradients of logits over what shares an entry.

    A key's entry is the key itself (KIND "key"), key // columns ("row") or key % columns ("column")."""
    entry_tiles = tl.cdiv(entries, K_TILE)
    e0 = tl.program_id(0) % entry_tiles * K_TILE
    rest = tl.program_id(0) // entry_tiles
    tiles = tl.cdiv(p.queries, Q_TILE)
    q0 = rest % tiles * Q_TILE
    head = rest // tiles
    bias_b, bias_h = head // bias_heads, head % bias_heads
    e = e0 + tl.arange(0, K_TILE)
    shared_batch = p.batch // bias_batch
    shared_heads = p.heads // bias_heads
    blocks = tl.cdiv(p.keys, K_BLOCK)
    dropped = 1.0
    if p.seed is not None:
        dropped = scale_of(threshold)
    found = tl.zeros((Q_TILE, K_TILE), tl.float32)
    for member in range(shared_batch * shared_heads):
        b, h = bias_b + member // shared_heads, bias_h + member % shared_heads
        own, upstream, rows, limits, factor, token, row = _query_tile(
            p, b, h, q0, size, value_size, SIZE, VALUE_SIZE, False, Q_TILE
        )
        start, count = list_of(lists, b, h, q0 // Q_BLOCK, width)
        for step in range(count * (K_BLOCK // K_TILE)):
            k0 = tile_of(start, step, blocks, K_BLOCK, K_TILE)
            if KIND == "key":
                meets = k0 == e0
            else:
                if KIND == "row":
                    meets = (k0 // p.logits.columns < e0 + K_TILE) & ((k0 + K_TILE - 1) // p.logits.columns >= e0)
                else:
                    meets = k0 < p.keys
            if meets:
                gradient, _, _ = _pair(
                    p, own, upstream, rows, limits, factor, b, h, token, row, k0, threshold, dropped,
                    size, value_size, SIZE, VALUE_SIZE, False, ALIGNED, PRECISION, K_TILE,
                )  # fmt: skip
                if KIND == "key":
                    found += gradient
                else:
                    k = k0 + tl.arange(0, K_TILE)
                    if KIND == "row":
                        entry = k // p.logits.columns
                    else:
                        entry = k % p.logits.columns
                    ones = (entry[:, None] == e[None, :]).to(tl.float32)
                    found = tl.dot(gradient, ones, found, input_precision=PRECISION)
    token = q0 + tl.arange(0, Q_TILE)
    place = output + (head.to(tl.int64) * p.queries + token)[:, None] * entries + e[None, :]
    inside = (token < p.queries)[:, None] & (e < entries)[None, :]
    tl.store(place, found.to(output.dtype.element_ty), mask=inside)


def block_sparse_attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
    lse: Tensor,
    entropy: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    found = ops._backward_fake(grad, grad_lse, grad_entropy, out, lse, entropy, *args)
    query, key, value = args[ops._INPUTS]
    check_narrow(f"{ops.ROW}_backward", query)
    kv_counts, kv_indices, q_counts, q_indices, q_block, k_block = args[ops._LISTS]
    given = _attention.Logits(*args[ops._LOGITS])
    seed, threshold = args[ops._DROPOUT]
    needs: Sequence[bool] = args[20]
    batch, heads, queries, size = query.shape
    kv_heads, keys, value_size = value.shape[1:]
    if lse.numel() == 0 or keys == 0:
        return tuple(each.zero_() for each in found)
    asked = [each if needed else None for each, needed in zip(found, needs, strict=True)]
    grad_query, grad_key, grad_value = (None if each is None else rows_of(each) for each in asked[:3])
    sizes = (size, value_size, padded(size), padded(value_size))
    # whole blocks, and one more for what a list names that is no block
    rows = (triton.cdiv(queries, q_block) + 1) * q_block
    rows = triton.cdiv(rows, ROWS) * ROWS
    delta, base = lse.new_empty((batch * heads, rows)), lse.new_empty((batch * heads, rows))
    padded_grad_entropy = None if grad_entropy is None else torch.empty_like(delta)
    precision, aligned, blocks = precision_of(query), keys % 8 == 0, (q_block, k_block)
    upstream = rows_of(grad)

    def problem(tile: int) -> Problem:
        return Problem(
            rows_of(query), rows_of(key), rows_of(value), upstream, delta, base, padded_grad_entropy, rows,
            kernel_logits(query, key, given, tile), seed if threshold > 0 else None,
            batch, heads, heads // kv_heads, queries, keys,
        )  # fmt: skip

    def contiguous(row: Tensor | None) -> Tensor | None:
        return None if row is None else row.contiguous()

    with torch.cuda.device_of(query):
        _delta_kernel[(rows // ROWS * batch * heads,)](
            upstream, rows_of(out), lse.contiguous(), None if grad_entropy is None else entropy.contiguous(),
            contiguous(grad_lse), contiguous(grad_entropy), delta, base, padded_grad_entropy, heads, queries, rows,
            value_size, padded(value_size), plain(given), ROWS,
        )  # fmt: skip
        if grad_key is not None or grad_value is not None:
            # logits of many parts, and masks, leave no registers for a tile of 128 keys
            light = plain(given) and threshold == 0
            most = (each if light else min(each, 64) for each in blocks)
            plan = plan_of(KEY_VALUE, query, value, *most, heavy(given, threshold))
            _key_value_kernel[(triton.cdiv(keys, plan.k_tile) * batch * kv_heads,)](
                problem(plan.k_tile), grad_key, grad_value, lists_of(q_counts, q_indices), threshold,
                q_indices.shape[3], *sizes, plain(given), aligned, precision, *blocks, plan.q_tile, plan.k_tile,
                num_warps=plan.warps, num_stages=plan.stages,
            )  # fmt: skip
        lists, width = lists_of(kv_counts, kv_indices), kv_indices.shape[3]
        if grad_query is not None or asked[3] is not None:
            plan = plan_of(QUERY, query, value, *blocks, heavy(given, threshold))
            _query_kernel[(triton.cdiv(queries, plan.q_tile) * batch * heads,)](
                problem(plan.k_tile), grad_query, asked[3], lists, threshold, width,
                *sizes, plain(given), aligned, precision, *blocks, plan.q_tile, plan.k_tile,
                num_warps=plan.warps, num_stages=plan.stages,
            )  # fmt: skip
        plan = plan_of(BIAS, query, value, *blocks)
        kinds = ("key" if given.column_bias is None else "row", "column")
        for kind, output in zip(kinds, asked[4:], strict=True):
            if output is None:
                continue
            bias_batch, bias_heads, _, entries = output.shape
            tiles = triton.cdiv(entries, plan.k_tile) * triton.cdiv(queries, plan.q_tile)
            _bias_kernel[(tiles * bias_batch * bias_heads,)](
                problem(plan.k_tile), output, lists, threshold, width, bias_batch, bias_heads, entries,
                *sizes, kind, aligned, precision, *blocks, plan.q_tile, plan.k_tile,
                num_warps=plan.warps, num_stages=plan.stages,
            )  # fmt: skip
    return found
