"""Calls of block-sparse attention, its edits and its modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyrx
from fuzz.calls import Call
from fuzz.strategies import Draws, drop_scale, fuzzes

BLOCK_SIZES = (16, 32, 64, 128)


def block_size_of(draws: Draws) -> int | tuple[int, int]:
    return draws.pick(16, 32, (16, 32), (64, 16), 128)


def window_of(draws: Draws) -> Any:
    return draws.pick(None, 0, 5, 40, (3, -1), (-1, 7), (None, 2), 2**31 - 1)


def key_range_of(draws: Draws, batch: int, queries: int, keys: int) -> Tensor:
    """int32 (batch, Sq, 2), empty and beyond the keys too."""
    return draws.tensor((batch, queries, 2), torch.int32, low=-5, high=keys + 5, layout="contiguous")


def mask_of(
    draws: Draws, batch: int, heads: int, queries: int, keys: int, size: int | tuple[int, int] | None = None
) -> pyrx.BlockMask:
    size = block_size_of(draws) if size is None else size
    rows, columns = (size, size) if isinstance(size, int) else size
    lead = (draws.pick(1, batch), draws.pick(1, heads))
    blocks = draws.tensor((*lead, -(-queries // rows), -(-keys // columns)), torch.bool)
    ranges = key_range_of(draws, draws.pick(1, max(batch, 1)), queries, keys) if draws.chance(4) else None
    if ranges is not None and lead[0] not in (1, ranges.shape[0]) and ranges.shape[0] != 1:
        ranges = None
    mask = pyrx.BlockMask.from_dense(blocks, (queries, keys), size, key_range=ranges, backend="reference")
    window = draws.pick((-1, 0), (40, -1), (3, 9), (2**31 - 1, 2**31 - 1)) if draws.chance(3) else mask.window
    return pyrx.BlockMask(*mask.lists, (rows, columns), (queries, keys), ranges, window)


def heads_of(draws: Draws) -> tuple[int, int]:
    """(H, Hkv)."""
    return (0, 0) if draws.chance(20) else draws.pick((2, 2), (1, 1), (4, 2), (3, 1), (6, 3))


def query_and_key(draws: Draws, same_length: bool = False) -> dict[str, Any]:
    """Query and key, a mask for them, and the options that say what a logit is."""
    dtype = draws.float_dtype()
    batch, (heads, kv_heads) = 0 if draws.chance(20) else draws.pick(1, 2, 3), heads_of(draws)
    queries = draws.length(100, 400)
    keys = queries if same_length else draws.pick(draws.size(100), draws.large(400))  # a tile of logits has 128
    size = draws.pick(1, 3, 8, 16, 17, 33, 64)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    arguments: dict[str, Any] = {
        "query": draws.tensor((batch, heads, queries, size), dtype),
        "key": draws.tensor((batch, kv_heads, keys, size), dtype),
    }
    arguments |= draws.some(
        is_causal=lambda: draws.pick(False, True),
        scale=lambda: draws.pick(None, draws.number(-1.0, 1.0, 0.0)),
        softcap=lambda: draws.pick(None, draws.number(0.5, 30.0)),
        window=lambda: window_of(draws),
        block_mask=lambda: draws.pick(None, mask_of(draws, batch, heads, queries, keys)),
        key_mask=lambda: draws.tensor((batch, keys), torch.bool),
        query_scale=lambda: draws.tensor((batch, heads, queries), accumulation, "uniform"),
    )
    if draws.chance(3):
        lead = [(draws.pick(1, batch), draws.pick(1, heads)) for _ in range(2)]
        columns = draws.pick(*(each for each in (1, 2, 3, 5, 7, 8, 10, 25, 65) if keys % each == 0))
        if draws.chance(2):
            arguments["bias"] = draws.tensor((*lead[0], queries, keys), dtype)
        else:
            pair = ((*lead[0], queries, keys // columns), (*lead[1], queries, columns))
            arguments["bias"] = tuple(draws.tensor(each, dtype) for each in pair)
    return arguments


def _third(draws: Draws, arguments: dict[str, Any]) -> Tensor:
    key = arguments["key"]
    return draws.tensor((*key.shape[:3], draws.pick(key.shape[3], 1, 5, 40)), key.dtype)


GRADIENTS = ("query", "key", "value", "u", "query_scale", "bias", "x")


def attention_call(draws: Draws, function: Any, arguments: dict[str, Any], exact: bool = False) -> Call:
    floats = tuple(name for name in GRADIENTS if arguments.get(name) is not None)
    needs = draws.needs(**{name: arguments[name] for name in floats})
    floor = 4.0 * drop_scale([arguments.get(name, 0.0) for name in ("dropout_p", "head_dropout_p")])
    return Call(function, arguments, needs, exact=exact, floats=floats, floor=floor, hides=True)


def _results(draws: Draws) -> dict[str, Any]:
    found: dict[str, Any] = draws.some(return_lse=lambda: draws.pick(True, False))
    found |= draws.some(return_entropy=lambda: draws.pick(True, False))
    if draws.chance(3):
        found |= {"dropout_p": draws.p(), "seed": draws.seed()}
    return found


@fuzzes("block_sparse_attention")
def block_sparse_attention(draws: Draws) -> Call:
    arguments = query_and_key(draws) | {"enable_gqa": True} | _results(draws)
    arguments["value"] = _third(draws, arguments)
    return attention_call(draws, pyrx.block_sparse_attention, arguments)


@fuzzes("block_sparse_attention_varlen")
def varlen(draws: Draws) -> Call:
    dtype, (heads, kv_heads), size = draws.float_dtype(), heads_of(draws), draws.pick(1, 8, 17, 64)
    sequences = draws.integer(1, 4)

    def starts() -> Tensor:
        lengths = torch.tensor([0, *(draws.length(40, 200) for _ in range(sequences))])
        return lengths.cumsum(0).to(draws.pick(torch.int32, torch.int64))

    cu_q = starts()
    cu_k = starts() if draws.chance(2) else cu_q
    queries, keys = int(cu_q[-1]), int(cu_k[-1])
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    arguments: dict[str, Any] = {
        "query": draws.tensor((queries, heads, size), dtype),
        "key": draws.tensor((keys, kv_heads, size), dtype),
        "value": draws.tensor((keys, kv_heads, draws.pick(size, 5)), dtype),
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "enable_gqa": True,
        **_results(draws),
        **draws.some(
            is_causal=lambda: draws.pick(False, True),
            window=lambda: window_of(draws),
            softcap=lambda: draws.pick(None, 5.0),
            key_mask=lambda: draws.tensor((keys,), torch.bool),
            query_scale=lambda: draws.tensor((queries, heads), accumulation, "uniform"),
            block_mask=lambda: mask_of(draws, 1, heads, queries, keys),
        ),
    }
    return attention_call(draws, pyrx.block_sparse_attention_varlen, arguments)


@fuzzes("reversed_attention")
def reversed_attention(draws: Draws) -> Call:
    arguments = query_and_key(draws) | {"enable_gqa": True}
    query = arguments["query"]
    arguments["u"] = draws.tensor((*query.shape[:3], draws.pick(1, 5, 40)), query.dtype)
    return attention_call(draws, pyrx.reversed_attention, arguments)


def run_of(draws: Draws, tokens: int) -> tuple[int, int] | None:
    if draws.chance(3):
        return None
    start = draws.integer(0, tokens)
    return start, draws.integer(start, tokens)


@fuzzes("perturbed_attention")
def perturbed_attention(draws: Draws) -> Call:
    arguments = query_and_key(draws, same_length=True)
    for name in ("is_causal", "window", "block_mask", "query_scale", "bias"):
        arguments.pop(name, None)
    arguments |= {"value": _third(draws, arguments), "enable_gqa": True}
    arguments["image"] = run_of(draws, arguments["query"].shape[2])
    return attention_call(draws, pyrx.perturbed_attention, arguments)


def _region(draws: Draws, key: Tensor) -> Tensor:
    return draws.tensor(draws.pick((key.shape[2],), (key.shape[0], key.shape[2])), torch.bool)


@fuzzes("erasing_attention")
def erasing_attention(draws: Draws) -> Call:
    arguments = query_and_key(draws, same_length=True) | {"enable_gqa": True} | _results(draws)
    arguments |= {"value": _third(draws, arguments), "region": _region(draws, arguments["key"])}
    arguments |= draws.some(query_factor=lambda: draws.number(-1.0, 2.0, 0.0, 1.0))
    return attention_call(draws, pyrx.erasing_attention, arguments)


@fuzzes("key_zeroed_attention")
def key_zeroed_attention(draws: Draws) -> Call:
    arguments = query_and_key(draws) | {"enable_gqa": True} | _results(draws)
    arguments |= {"value": _third(draws, arguments), "region": _region(draws, arguments["key"])}
    return attention_call(draws, pyrx.key_zeroed_attention, arguments)


@fuzzes("head_dropout_attention")
def head_dropout_attention(draws: Draws) -> Call:
    arguments = query_and_key(draws) | {"enable_gqa": True} | _results(draws)
    arguments |= {"value": _third(draws, arguments), "head_dropout_p": draws.p(), "seed": draws.seed()}
    return attention_call(draws, pyrx.head_dropout_attention, arguments)


@fuzzes("token_importance")
def token_importance(draws: Draws) -> Call:
    arguments = query_and_key(draws) | {"enable_gqa": True}
    arguments["keyframe"] = run_of(draws, arguments["query"].shape[2])
    arguments |= draws.some(enhanced_weight=lambda: draws.number(0.0, 8.0))
    return attention_call(draws, pyrx.token_importance, arguments)


@fuzzes("token_dropout")
def token_dropout(draws: Draws) -> Call:
    batch, tokens, size = draws.pick(1, 2, 0), draws.size(65), draws.size(9)
    x = draws.tensor((batch, tokens, size), draws.float_dtype())
    importance = draws.tensor((batch, tokens), draws.float_dtype(), draws.kind())
    arguments = {"x": x, "importance": importance, "keep_rate": draws.number(1e-9, 1.0, 0.5)}
    arguments["keyframe"] = run_of(draws, tokens)
    return Call(pyrx.token_dropout, arguments, draws.needs(x=x), exact_gradients=True)


@fuzzes("nn.BlockSparseAttention")
def attention_module(draws: Draws) -> Call:
    heads, kv_heads = draws.pick((2, 2), (4, 2), (3, 1))
    batch, queries, keys, size = draws.pick(1, 2, 0), draws.size(65), draws.size(65), 4 * heads
    arguments: dict[str, Any] = {
        "query": draws.tensor((batch, queries, size)),
        "key": draws.pick(None, draws.tensor((batch, keys, size))),
        "embed_dim": size,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
    }
    length = queries if arguments["key"] is None else keys
    arguments |= draws.some(
        block_mask=lambda: mask_of(draws, batch, heads, queries, length),
        dropout=draws.p,
        head_dropout=draws.p,
        bias=lambda: draws.pick(True, False),
        is_causal=lambda: draws.pick(True, False),
        window=lambda: window_of(draws),
        scale=lambda: draws.pick(None, 0.3),
        softcap=lambda: draws.pick(None, 3.0),
        key_mask=lambda: draws.tensor((batch, length), torch.bool),
    )

    def BlockSparseAttention(query: Tensor, key: Tensor | None, key_mask: Tensor | None = None, **options: Any) -> Any:
        torch.manual_seed(0)
        module = pyrx.nn.BlockSparseAttention(**options)
        return module(query, key, key_mask=key_mask)

    needs = draws.needs(query=arguments["query"], key=arguments["key"])
    return Call(BlockSparseAttention, arguments, needs, exact=False, floor=1.0, fixed=("query", "key"))


@fuzzes("nn.replace_attention")
def replace_attention(draws: Draws) -> Call:
    arguments = query_and_key(draws)
    for name in ("query_scale", "bias", "key_mask"):
        arguments.pop(name, None)
    arguments["value"] = _third(draws, arguments)
    batch, heads, queries, _ = arguments["query"].shape
    keys, dtype = arguments["key"].shape[2], arguments["query"].dtype
    masks = {
        "none": lambda: None,
        "keys": lambda: draws.tensor((draws.pick(1, batch), 1, 1, keys), torch.bool),
        "bias": lambda: draws.tensor((draws.pick(1, batch), 1, draws.pick(1, queries), keys), dtype),
    }
    arguments["attn_mask"] = masks[draws.pick(*masks)]()

    def replaced(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool = False,
        scale: float | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> Tensor:
        with pyrx.nn.replace_attention(backend=backend, **options):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=True
            )

    fixed = ("query", "key", "value", "attn_mask", "is_causal", "scale")
    return attention_call(draws, replaced, arguments).replace(fixed=fixed)
