"""Attention over listed blocks: forward, backward, dropout, log-sum-exp and entropy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrx import _library
from pyrx._attention import (
    LOGITS_SCHEMA,
    MOST_HEAD_SIZE,
    Logits,
    check_blocks,
    check_key,
    check_logits,
    logits_of,
    window_of,
)
from pyrx._backends import select
from pyrx._block_checks import check_lists, fail_mask_type
from pyrx._checks import (
    accumulation_dtype,
    broadcasts,
    check_bool,
    check_device,
    check_dtype,
    check_float,
    check_shape,
    check_tensor,
    fail,
)
from pyrx._linear import autocast, is_autocast, without_autocast
from pyrx._random import LEVELS, check_seed, seed_tensor, threshold
from pyrx.ops.block_mask import BlockMask
from pyrx.reference import block_sparse_attention as reference

ROW = "block_sparse_attention"
# positions of the tensors in the ops' arguments
_INPUTS, _LISTS, _LOGITS, _DROPOUT = slice(0, 3), slice(3, 9), slice(9, 18), slice(18, 20)
NEEDS = ("query", "key", "value", "query_scale", "row_bias", "column_bias")


def _like(tensor: Tensor, size: int | None = None) -> Tensor:
    """Empty (B, H, S, `size`) of the tensor's dtype, laid out (B, S, H, D) where the tensor is, else contiguous."""
    batch, heads, tokens, own = tensor.shape
    size = own if size is None else size
    if tensor.transpose(1, 2).is_contiguous() and not tensor.is_contiguous():
        return tensor.new_empty((batch, tokens, heads, size)).transpose(1, 2)
    return tensor.new_empty((batch, heads, tokens, size))


def _check(op: str, *args: Any) -> None:
    """Everything that can be known without reading a tensor."""
    query, key, value = args[_INPUTS]
    *lists, q_block, k_block = args[_LISTS]
    logits = Logits(*args[_LOGITS])
    seed, level = args[_DROPOUT]
    check_logits(op, query, key, logits)
    check_float(op, "value", value)
    if value.dim() != 4:
        fail(op, "value", "of shape [B, H, S, D]", list(value.shape))
    check_dtype(op, "value", value, query.dtype)
    check_device(op, "value", value, query.device)
    check_key(op, "value", value, query)
    check_shape(op, "value", value, "[B, Hkv, Sk, Dv]", [*key.shape[:3], value.shape[3]])
    if not 1 <= value.shape[3] <= MOST_HEAD_SIZE:
        fail(op, "value", f"of a head size in [1, {MOST_HEAD_SIZE}]", value.shape[3])
    check_blocks(op, q_block, k_block)
    check_lists(op, lists, q_block, k_block, query, key)
    if not 0 <= level < LEVELS:
        fail(op, "threshold", f"in [0, {LEVELS})", level)
    if seed is not None:
        check_seed(op, seed, query.device)
    elif level > 0:
        fail(op, "seed", "for a threshold above 0", None)


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check(ROW, *args)
    query, value, want_entropy = args[0], args[2], args[20]
    dtype = accumulation_dtype(query.dtype)
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    return _like(query, value.shape[3]), lse, torch.empty_like(lse) if want_entropy else lse.new_empty(0)


def _backward_fake(
    grad: Tensor,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
    lse: Tensor,
    entropy: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    op = f"{ROW}_backward"
    _check(op, *args)
    query, value = args[0], args[2]
    shape = [*query.shape[:3], value.shape[3]]
    for name, each in (("grad", grad), ("out", out)):
        check_dtype(op, name, each, query.dtype)
        check_shape(op, name, each, "[B, H, Sq, Dv]", shape)
        check_device(op, name, each, query.device)
    rows = [("lse", lse), ("grad_lse", grad_lse), ("grad_entropy", grad_entropy)]
    if grad_entropy is not None:
        rows.append(("entropy", entropy))
    for name, row in rows:
        if row is not None:
            check_dtype(op, name, row, accumulation_dtype(query.dtype))
            check_shape(op, name, row, "[B, H, Sq]", shape[:3])
            check_device(op, name, row, query.device)
    needs, logits = args[20], Logits(*args[_LOGITS])
    wanted = [*args[_INPUTS], logits.query_scale, logits.row_bias, logits.column_bias]
    found = []
    for name, tensor, needed in zip(NEEDS, wanted, needs, strict=True):
        if needed and tensor is None:
            fail(op, name, "for its gradient", None)
        found.append(
            query.new_empty(0) if not needed else _like(tensor) if name in NEEDS[:3] else tensor.new_empty(tensor.shape)
        )
    return tuple(found)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    logits = Logits(*inputs[_LOGITS])
    wanted = [*inputs[_INPUTS], logits.query_scale, logits.row_bias, logits.column_bias]
    ctx.needs = [each is not None and each.requires_grad for each in wanted]
    # tensors are saved, the rest is kept; None marks a tensor's place
    ctx.kept = [None if isinstance(each, Tensor) else each for each in inputs[:20]]
    ctx.places = [i for i in range(20) if isinstance(inputs[i], Tensor)]
    ctx.save_for_backward(*output, *(inputs[i] for i in ctx.places))


def _backward(
    ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, grad_entropy: Tensor | None
) -> tuple[Tensor | None, ...]:
    out, lse, entropy, *tensors = ctx.saved_tensors
    args = list(ctx.kept)
    for i, tensor in zip(ctx.places, tensors, strict=True):
        args[i] = tensor
    if grad is None:
        grad = torch.zeros_like(out)
    if entropy.numel() == 0 and lse.numel() > 0:
        grad_entropy = None  # of an output that was not asked for
    found = _library.differentiable_once(
        ROW, ctx.ops.block_sparse_attention_backward(grad, grad_lse, grad_entropy, out, lse, entropy, *args, ctx.needs)
    )
    query, key, value, query_scale, row_bias, column_bias = (
        each if needed else None for each, needed in zip(found, ctx.needs, strict=True)
    )
    # left, right, key_range, key_mask, then query_scale and the biases, scale and softcap
    logits = (None,) * 4 + (query_scale, row_bias, column_bias) + (None,) * 2
    return query, key, value, *(None,) * 6, *logits, *(None,) * 3


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor kv_counts, Tensor kv_indices, Tensor q_counts, Tensor q_indices, "
    f"int q_block, int k_block, {LOGITS_SCHEMA}, Tensor? seed, int threshold"
)
_library.define(
    ROW,
    "block_sparse_attention",
    f"({_ARGUMENTS}, bool want_entropy) -> (Tensor out, Tensor lse, Tensor entropy)",
    _fake,
    _backward,
    _setup,
    native_formula=False,
)
_library.define(
    ROW,
    "block_sparse_attention_backward",
    "(Tensor grad, Tensor? grad_lse, Tensor? grad_entropy, Tensor out, Tensor lse, Tensor entropy, "
    f"{_ARGUMENTS}, bool[6] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)


def check_mask(op: str, mask: object, query: Tensor, key: Tensor, argument: str = "block_mask") -> BlockMask:
    if not isinstance(mask, BlockMask):
        fail_mask_type(op, argument, mask)
    lengths = (query.shape[2], key.shape[2])
    if tuple(mask.seq_lengths) != lengths:
        fail(op, argument, f"for the lengths (Sq, Sk) = {list(lengths)}", list(mask.seq_lengths))
    check_device(op, argument, mask.kv_counts, query.device)
    lead = mask.kv_counts.shape[:-1]
    if len(lead) == 2 and not broadcasts(lead, query.shape[:2]):
        fail(op, argument, f"of shape [B or 1, H or 1, NQ, NK] for a query of {list(query.shape)}", list(mask.shape))
    return mask


class Call(NamedTuple):
    """What a public function's arguments come to: its tensors under autocast, mask, logits and backend."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: BlockMask
    logits: Logits
    chosen: str


def prepare(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask | None = None,
    *,
    third: str = "value",
    is_causal: bool = False,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    enable_gqa: bool = False,
    key_mask: Tensor | None = None,
    query_scale: Tensor | None = None,
    bias: Tensor | tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Call:
    """Of the arguments that public functions over attention share; `third` is the name of the value's place."""
    for name, each in (("query", query), ("key", key), (third, value)):
        check_tensor(op, name, each)
    if is_autocast(query.device.type):
        query, key, value = autocast((query, key, value), query.device.type)  # type: ignore[assignment]
        if isinstance(bias, Tensor):
            bias = bias.to(query.dtype)
        elif bias is not None:
            bias = tuple(each.to(query.dtype) for each in bias)  # type: ignore[assignment]
    check_float(op, "query", query)
    if query.dim() != 4 or key.dim() != 4:
        fail(op, "query and key", "of shape [B, H, S, D]", [list(query.shape), list(key.shape)])
    check_bool(op, is_causal=is_causal, enable_gqa=enable_gqa)
    if not enable_gqa and query.shape[1] != key.shape[1]:
        fail(op, "key", f"of the query's {query.shape[1]} heads (or enable_gqa=True)", key.shape[1])
    if block_mask is None:
        block_mask = default_mask(op, query, key, is_causal, window)
    mask = check_mask(op, block_mask, query, key)
    logits = logits_of(
        op,
        query,
        is_causal=is_causal,
        window=window,
        mask=mask,
        key_mask=key_mask,
        query_scale=query_scale,
        bias=bias,
        scale=scale,
        softcap=softcap,
    )
    return Call(query, key, value, mask, logits, select(ROW, query.device.type, query.dtype, backend))


def attention(
    chosen: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    logits: Logits,
    seed: Tensor | None = None,
    level: int = 0,
    want_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, entropy) by the chosen backend; everything but what the fake checks is checked."""
    args = (query, key, value, *block_mask.lists, *block_mask.block_size, *logits, seed, level)
    if chosen == "reference":
        _check(ROW, *args)
        with without_autocast(query.device.type):  # its products are in the accumulation dtype
            return reference.block_sparse_attention(*args, want_entropy)
    return _library.namespace(chosen).block_sparse_attention(*args, want_entropy)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask | None = None,
    *,
    is_causal: bool = False,
    window: int | tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    enable_gqa: bool = False,
    key_mask: Tensor | None = None,
    query_scale: Tensor | None = None,
    bias: Tensor | tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Scaled dot product attention over the blocks that a mask lists, exact within them.

    Args:
        query: (B, H, Sq, D), any strides; float16, bfloat16, float32, on the CPU float64 too. D from 1 to 256.
        key, value: (B, Hkv, Sk, D) and (B, Hkv, Sk, Dv) of the query's dtype. Hkv is H, or divides it (enable_gqa).
        block_mask: which blocks of queries and keys attend to each other, a `pyrx.BlockMask` for these lengths, whose
            own window and key_range hide keys within them. Default: every block, or those that is_causal and window
            reach.
        is_causal: a query sees the keys up to its own position, counted from the first as
            scaled_dot_product_attention counts. Default False. Queries at the end of longer keys, as in decoding with
            a cache, take `BlockMask.from_key_range`; a last one sees every key without it.
        window: a query sees this many keys on each side of its position, or (left, right) of them, -1 without limit.
            Default: no limit.
        dropout_p: probability of dropping an attention weight, in [0, 1), on a grid of 1/65536; kept ones are scaled.
            As functional as in scaled_dot_product_attention: pass 0 in evaluation. Default 0.
        scale: of the products. Default 1 / sqrt(D).
        softcap: c > 0: logits become c tanh(logits / c) before bias and masks (Gemma 2). Default: none.
        enable_gqa: Hkv may be less than H; query head h attends to key head h // (H / Hkv). Default False.
        key_mask: bool (B, Sk), True where the key takes part, as in a mask of scaled_dot_product_attention.
        query_scale: (B, H, Sq) floats that a query's logits are multiplied with, before softcap.
        bias: added to the logits, of the query's dtype: (B or 1, H or 1, Sq, Sk), or a pair (row, column) of
            (B or 1, H or 1, Sq, R) and (.., Sq, C) with R * C = Sk keys on a grid: row[k // C] + column[k % C].
            Any bool attn_mask of scaled_dot_product_attention goes here as 0 and minus infinity.
        return_lse: return the log-sum-exp of the logits too. Default False.
        return_entropy: return the entropy of the attention (before dropout) too. On a CPU with AVX-512 another kernel
            serves float32 and bfloat16 then: `out` has another rounding. Default False.
        seed: of the dropout: int, or int64 tensor of one element on the device. Default: drawn there from `generator`.
        generator: torch.Generator on the query's device. Default: torch's.
        backend: "reference", "cpu" or "triton". Default: the fastest that can serve.

    Returns:
        (B, H, Sq, Dv) of the query's dtype, laid out as the query where that is (B, S, H, D) transposed; a query that
        sees no key gives 0. With return_lse and return_entropy a tuple: out, then the natural log-sum-exp (B, H, Sq)
        and the entropy in nats (B, H, Sq), both float32 (float64 for float64), minus infinity and 0 where nothing is
        seen.

    Differentiable in query, key, value, query_scale and bias, through all three results; once. Deterministic: no
    atomics. The mask of the dropout is `pyrx.dropout_mask((B, H, Sq, Sk), dropout_p, seed)`, whatever the blocks. A
    hidden key's NaN or infinity may reach queries of its block, as in scaled_dot_product_attention.

    Equivalent to `F.scaled_dot_product_attention(query, key, value, attn_mask)` with the pairs of (Sq, Sk) that mask
    and arguments let see each other, where every query sees a key.

    Cost: 4 D operations a listed pair of positions and head, 2.5 times as many backward; O(Sq + Sk) memory beside the
    outputs.

    Raises:
        ValueError: shapes, a mask of other lengths, values out of range. TypeError: types and dtypes. RuntimeError:
        devices, or a backend that cannot serve. Lists that name a block out of range: that entry is passed over; each
        block is to be listed once, as every constructor of BlockMask lists it (Triton counts a repeated one again).

    Source: Dao, "FlashAttention-2" (2023), for the online softmax and the backward; Child et al., "Generating Long
    Sequences with Sparse Transformers" (2019), for block lists.
    """
    op = ROW
    level = threshold(op, dropout_p, "dropout_p")
    check_bool(op, return_lse=return_lse, return_entropy=return_entropy)
    query, key, value, mask, logits, chosen = prepare(
        op,
        query,
        key,
        value,
        block_mask,
        is_causal=is_causal,
        window=window,
        scale=scale,
        softcap=softcap,
        enable_gqa=enable_gqa,
        key_mask=key_mask,
        query_scale=query_scale,
        bias=bias,
        backend=backend,
    )
    drop = seed_tensor(op, seed, generator, query.device) if level > 0 or seed is not None else None
    out, lse, entropy = attention(chosen, query, key, value, mask, logits, drop, level, return_entropy)
    if not (return_lse or return_entropy):
        return out
    return (out, *((lse,) if return_lse else ()), *((entropy,) if return_entropy else ()))


def default_mask(
    op: str, query: Tensor, key: Tensor, is_causal: bool, window: int | tuple[int, int] | None
) -> BlockMask:
    """Every block, or those that is_causal and window reach."""
    lengths = (query.shape[2], key.shape[2])
    return BlockMask.sliding_window(lengths, window_of(op, window, is_causal), device=query.device)
