"""What the ops over attention logits share: the arguments that say what a logit is, their checks and their schema."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyrx._checks import (
    accumulation_dtype,
    broadcasts,
    check_bool,
    check_device,
    check_dtype,
    check_float,
    check_integer,
    check_number,
    check_shape,
    check_tensor,
    fail,
)

if TYPE_CHECKING:
    from pyrx.ops.block_mask import BlockMask

BLOCK_SIZES = (16, 32, 64, 128)
MOST_HEAD_SIZE = 256
UNLIMITED = -1
NO_WINDOW = (UNLIMITED, UNLIMITED)

LOGITS_SCHEMA = (
    "int left, int right, Tensor? key_range, Tensor? key_mask, Tensor? query_scale, Tensor? row_bias, "
    "Tensor? column_bias, float scale, float softcap"
)


class Logits(NamedTuple):
    """What makes a logit of a product of query and key, as the ops take it.

    logit = softcap(scale * query_scale * product) + row_bias[k // C] + column_bias[k % C], with softcap(x) =
    c tanh(x / c) or x itself where c = 0; a query q sees the keys k with q - left <= k <= q + right (-1: no limit),
    within its key_range and not hidden by key_mask.
    """

    left: int  # -1: no limit
    right: int
    key_range: Tensor | None  # int32 (B or 1, Sq, 2): the first key and the one after the last
    key_mask: Tensor | None  # bool (B, Sk), True where visible
    query_scale: Tensor | None  # (B, H, Sq) in the accumulation dtype
    row_bias: Tensor | None  # (B or 1, H or 1, Sq, R) of the query's dtype, R = Sk / C
    column_bias: Tensor | None  # (B or 1, H or 1, Sq, C); without it C = 1
    scale: float
    softcap: float  # 0: none


def _check_bias(op: str, name: str, bias: Tensor, query: Tensor, last: int | None) -> None:
    batch, heads, queries = query.shape[:3]
    check_dtype(op, name, bias, query.dtype)
    shape = list(bias.shape)
    if len(shape) != 4 or not broadcasts(shape[:2], (batch, heads)) or shape[2] != queries:
        fail(op, name, f"of shape [B or 1, H or 1, Sq, ...] of a query {list(query.shape)}", shape)
    if last is not None and shape[3] != last:
        fail(op, name, f"of {last} keys along the last dimension", shape)
    check_device(op, name, bias, query.device)


def check_query_key(op: str, query: Tensor, key: Tensor) -> None:
    for name, each in (("query", query), ("key", key)):
        check_float(op, name, each)
        if each.dim() != 4:
            fail(op, name, "of shape [B, H, S, D]", list(each.shape))
    check_dtype(op, "key", key, query.dtype)
    check_device(op, "key", key, query.device)
    if not 1 <= query.shape[3] <= MOST_HEAD_SIZE:
        fail(op, "query", f"of a head size in [1, {MOST_HEAD_SIZE}]", query.shape[3])
    check_key(op, "key", key, query)
    if key.shape[3] != query.shape[3]:
        fail(op, "key", f"of the query's head size {query.shape[3]}", key.shape[3])


def check_key(op: str, name: str, key: Tensor, query: Tensor) -> None:
    """Of keys and values: the query's batch, and heads that divide the query's."""
    if key.shape[0] != query.shape[0]:
        fail(op, name, f"of the query's batch size {query.shape[0]}", key.shape[0])
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads != 0):
        fail(op, name, f"of a number of heads that divides the query's {heads}", kv_heads)


def check_blocks(op: str, q_block: int, k_block: int) -> None:
    for name, size in (("q_block", q_block), ("k_block", k_block)):
        if size not in BLOCK_SIZES:
            fail(op, name, "to be one of " + ", ".join(map(str, BLOCK_SIZES)), size)


def check_logits(op: str, query: Tensor, key: Tensor, logits: Logits) -> None:
    """Everything about query, key and Logits that can be known without reading a tensor."""
    check_query_key(op, query, key)
    batch, heads, queries, _ = query.shape
    keys, device = key.shape[2], query.device
    if logits.left < UNLIMITED or logits.right < UNLIMITED:
        fail(op, "left and right", "of at least 0, or -1 for no limit", [logits.left, logits.right])
    if logits.key_range is not None:
        check_dtype(op, "key_range", logits.key_range, torch.int32)
        shape = list(logits.key_range.shape)
        if len(shape) != 3 or not broadcasts(shape[:1], (batch,)) or shape[1:] != [queries, 2]:
            fail(op, "key_range", f"of shape [B or 1, Sq, 2] = [{batch} or 1, {queries}, 2]", shape)
        check_device(op, "key_range", logits.key_range, device)
    if logits.key_mask is not None:
        check_dtype(op, "key_mask", logits.key_mask, torch.bool)
        check_shape(op, "key_mask", logits.key_mask, "[B, Sk]", [batch, keys])
        check_device(op, "key_mask", logits.key_mask, device)
    if logits.query_scale is not None:
        check_dtype(op, "query_scale", logits.query_scale, accumulation_dtype(query.dtype))
        check_shape(op, "query_scale", logits.query_scale, "[B, H, Sq]", [batch, heads, queries])
        check_device(op, "query_scale", logits.query_scale, device)
    if logits.column_bias is not None:
        if logits.row_bias is None:
            fail(op, "column_bias", "with a row_bias", None)
        _check_bias(op, "column_bias", logits.column_bias, query, None)
    if logits.row_bias is not None:
        columns = 1 if logits.column_bias is None else logits.column_bias.shape[3]
        if columns == 0 or keys % columns != 0:
            fail(op, "column_bias", f"of a last dimension that divides the {keys} keys", columns)
        _check_bias(op, "row_bias", logits.row_bias, query, keys // columns)
    # comparisons: torch.compile cannot trace math.isfinite of a head size that it does not know
    if not -math.inf < logits.scale < math.inf:
        fail(op, "scale", "to be finite", logits.scale)
    if not 0 <= logits.softcap < math.inf:
        fail(op, "softcap", "to be finite and not negative", logits.softcap)


def window_of(op: str, window: object, is_causal: bool) -> tuple[int, int]:
    """(left, right) of a window, int (both sides) or pair, -1 without limit; causal: none to the right."""
    check_bool(op, is_causal=is_causal)
    pair = (window, window) if window is None or isinstance(window, int) else window
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        fail(op, "window", "to be an int or a pair (left, right)", repr(window), TypeError)
    for side in pair:
        if side is not None:
            check_integer(op, "window", side, UNLIMITED, 2**31 - 1)
    left, right = (UNLIMITED if side is None else side for side in pair)
    return left, 0 if is_causal else right


def meet(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    """The window (left, right) of what two of them let a query see."""
    left, right = (b if a < 0 else a if b < 0 else min(a, b) for a, b in zip(first, second, strict=True))
    return left, right


def logits_of(
    op: str,
    query: Tensor,
    *,
    is_causal: bool = False,
    window: int | tuple[int, int] | None = None,
    mask: BlockMask | None = None,
    key_mask: Tensor | None = None,
    query_scale: Tensor | None = None,
    bias: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Logits:
    """Logits of a public function's arguments, under a mask's rule of elements; the ops check what is in them."""
    left, right = window_of(op, window, is_causal)
    key_range = None
    if mask is not None:
        key_range = mask.key_range
        left, right = meet((left, right), mask.window)
    row_bias, column_bias = None, None
    if isinstance(bias, tuple):
        if len(bias) != 2:
            fail(op, "bias", "to be a Tensor or a pair (row, column)", f"{len(bias)} tensors")
        row_bias, column_bias = bias
        check_tensor(op, "bias[0]", row_bias)
        check_tensor(op, "bias[1]", column_bias)
    elif bias is not None:
        check_tensor(op, "bias", bias)
        row_bias = bias
    if key_mask is not None:
        check_tensor(op, "key_mask", key_mask)
    if query_scale is not None:
        check_float(op, "query_scale", query_scale)
        query_scale = query_scale.to(accumulation_dtype(query.dtype))
    for name, number in (("scale", scale), ("softcap", softcap)):
        if number is not None:
            check_number(op, name, number)
            most = torch.finfo(accumulation_dtype(query.dtype)).max  # what kernels take it as
            if most < abs(number) < math.inf:
                fail(op, name, f"of at most {most:.3g} either way", number)
    if softcap is not None and not softcap > 0:
        fail(op, "softcap", "above 0, or None", softcap)
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.dim() > 0 and query.shape[-1] > 0 else 1.0
    return Logits(
        left, right, key_range, key_mask, query_scale, row_bias, column_bias, float(scale), float(softcap or 0.0)
    )
