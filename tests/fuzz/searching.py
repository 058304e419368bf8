"""Calls of block masks' constructors and of the searches that find one."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import pyrx
from fuzz.attending import BLOCK_SIZES, attention_call, block_size_of, key_range_of, mask_of, query_and_key, window_of
from fuzz.calls import Call
from fuzz.strategies import Draws, fuzzes
from pyrx import BlockMask


def lengths_of(draws: Draws) -> int | tuple[int, int]:
    return draws.pick(draws.size(300), (draws.size(300), draws.size(300)))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _blocks(lengths: int | tuple[int, int], size: int | tuple[int, int]) -> tuple[int, ...]:
    return tuple(-(-length // block) for length, block in zip(_pair(lengths), _pair(size), strict=True))


def _geometry(draws: Draws) -> dict[str, Any]:
    return {"seq_lengths": lengths_of(draws), "block_size": block_size_of(draws)}


@fuzzes("BlockMask.from_dense")
def from_dense(draws: Draws) -> Call:
    arguments = _geometry(draws)
    lead = draws.pick((), (2,), (1, 3), (2, 1), (2, 3), (0, 1))
    arguments["blocks"] = draws.tensor((*lead, *_blocks(**_renamed(arguments))), torch.bool)
    if draws.chance(3):
        batch = lead[0] if len(lead) == 2 else 1
        arguments["key_range"] = key_range_of(draws, batch, *_pair(arguments["seq_lengths"]))
    return Call(BlockMask.from_dense, arguments)


def _renamed(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"lengths": arguments["seq_lengths"], "size": arguments["block_size"]}


@fuzzes("BlockMask.from_lists")
def from_lists(draws: Draws) -> Call:
    arguments = _geometry(draws)
    rows, columns = _blocks(**_renamed(arguments))
    lead = draws.pick((), (2,), (2, 3), (0, 1))
    width = draws.integer(0, 9) if columns > 0 else 0
    arguments["kv_counts"] = draws.tensor((*lead, rows), torch.int32, high=width + 1)
    arguments["kv_indices"] = draws.tensor((*lead, rows, width), torch.int32, high=columns)
    return Call(BlockMask.from_lists, arguments)


@fuzzes("BlockMask.from_key_range")
def from_key_range(draws: Draws) -> Call:
    arguments = _geometry(draws)
    arguments["key_range"] = key_range_of(draws, draws.integer(0, 3), *_pair(arguments["seq_lengths"]))
    return Call(BlockMask.from_key_range, arguments)


@fuzzes("BlockMask.causal")
def causal(draws: Draws) -> Call:
    return Call(BlockMask.causal, _geometry(draws))


@fuzzes("BlockMask.sliding_window")
def sliding_window(draws: Draws) -> Call:
    return Call(
        BlockMask.sliding_window, {**_geometry(draws), "window": window_of(draws), "is_causal": draws.chance(2)}
    )


@fuzzes("BlockMask.global_tokens")
def global_tokens(draws: Draws) -> Call:
    arguments = _geometry(draws)
    if draws.chance(2):
        tokens = draws.size(200)
        arguments |= {"seq_lengths": tokens, "tokens": draws.tensor(draws.pick((tokens,), (2, tokens)), torch.bool)}
    else:
        arguments["tokens"] = draws.pick(0, 1, 16, 33, 2**31 - 1)
    return Call(BlockMask.global_tokens, arguments)


@fuzzes("BlockMask.strided")
def strided(draws: Draws) -> Call:
    stride = draws.pick(1, 2, 3, 7, 2**31 - 1)
    arguments = {**_geometry(draws), "stride": stride}
    arguments |= draws.some(local=lambda: draws.pick(0, 1, 2, 9), summary=lambda: draws.integer(0, min(stride, 5)))
    return Call(BlockMask.strided, arguments)


@fuzzes("BlockMask.document")
def document(draws: Draws) -> Call:
    lengths = [draws.size(65) for _ in range(draws.integer(0, 5))]
    arguments: dict[str, Any] = {"block_size": block_size_of(draws)}
    arguments["lengths"] = draws.pick(lengths, torch.tensor(lengths, dtype=torch.int64), tuple(lengths))
    if draws.chance(3):
        arguments["key_lengths"] = [draws.size(65) for _ in lengths]
    return Call(BlockMask.document, arguments)


@fuzzes("BlockMask.key_blocks")
def key_blocks(draws: Draws) -> Call:
    keys = draws.size(200)
    arguments = {
        "regions": draws.tensor(draws.pick((keys,), (2, keys)), torch.bool),
        "seq_lengths": draws.pick(None, (draws.size(200), keys)),
        "block_size": block_size_of(draws),
    }
    return Call(BlockMask.key_blocks, arguments)


@fuzzes("BlockMask.from_flex", "BlockMask.to_flex")
def flex(draws: Draws) -> Call:
    def through_flex(mask: BlockMask, backend: str | None = None) -> BlockMask:
        return BlockMask.from_flex(mask.to_flex(), partial="whole", backend=backend)

    mask = mask_of(draws, 2, 3, draws.size(200, least=1), draws.size(200, least=1))
    return Call(through_flex, {"mask": mask}, fixed=("mask",))


@fuzzes("BlockMask", "BlockMask.to_dense", "BlockMask.density", "BlockMask.to", "BlockMask.plot")
def reading(draws: Draws) -> Call:
    def read(mask: BlockMask) -> list[Any]:
        moved = mask.to("cpu")
        if min(moved.shape) > 0:
            moved.plot()
        return [moved.to_dense(), moved.density(), moved.shape, repr(moved), moved]

    return Call(read, {"mask": mask_of(draws, 2, 3, draws.size(200), draws.size(200))}, fixed=("mask",))


@fuzzes("BlockMask.keep_heads")
def keep_heads(draws: Draws) -> Call:
    batch, heads = draws.integer(1, 3), draws.integer(1, 4)
    mask = mask_of(draws, batch, heads, draws.size(100), draws.size(100))
    keep = draws.tensor(draws.pick((heads,), (batch, heads), (1, heads)), torch.bool)
    return Call(lambda mask, keep: mask.keep_heads(keep), {"mask": mask, "keep": keep}, fixed=("mask",))


@fuzzes("BlockMask.__and__", "BlockMask.__or__", "BlockMask.__invert__", "BlockMask.whole")
def algebra(draws: Draws) -> Call:
    lengths, size = (draws.size(200), draws.size(200)), block_size_of(draws)
    how = draws.pick("&", "|", "~")

    def combined(first: BlockMask, second: BlockMask) -> list[Any]:
        wholes = first.whole(), second.whole()
        if how == "&":
            return [first & second, wholes[0] & second, wholes[0] & wholes[1]]
        return [wholes[0] | wholes[1] if how == "|" else ~wholes[0]]

    masks = {name: mask_of(draws, 2, 3, *lengths, size=size) for name in ("first", "second")}
    return Call(combined, masks, fixed=("first", "second"))


# The searches. Scores that are sums differ in their last bits between backends, and blocks of nearly the same score
# then change places, so query and key are small whole numbers where the choice itself is compared.


def _searched(draws: Draws, *kept: str, same_length: bool = False) -> dict[str, Any]:
    arguments = query_and_key(draws, same_length)
    return {name: value for name, value in arguments.items() if name in ("query", "key", *kept)}


def _masked(draws: Draws) -> dict[str, Any]:
    arguments = _searched(draws, "is_causal", "key_mask", "scale")
    batch, _, queries, _ = arguments["query"].shape
    return arguments | draws.some(query_mask=lambda: draws.tensor((batch, queries), torch.bool))


def _sizes(mask: BlockMask) -> list[Any]:
    """What of a search's result does not hang on the last bits of scores."""
    return [mask.shape, mask.block_size, mask.seq_lengths, mask.to_dense().any(-1)]


@fuzzes("search.lse_cached")
def lse_cached(draws: Draws) -> Call:
    arguments = _searched(draws, "is_causal", "window", "key_mask", "query_scale", "bias", "scale", "softcap")
    query, key = arguments["query"], arguments["key"]
    accumulation = torch.float64 if query.dtype == torch.float64 else torch.float32
    arguments["lse"] = draws.tensor(query.shape[:3], accumulation)
    size = arguments["block_size"] = block_size_of(draws)
    lengths = (query.shape[2], key.shape[2])
    full = (*query.shape[:2], *_blocks(lengths, size))
    arguments |= draws.some(
        sparsity=lambda: draws.number(0.0, 1.0, 0.8),
        head_adaptive=lambda: draws.pick(True, False),
        recall_threshold=lambda: draws.number(0.0, 1.0, 0.8),
        always=lambda: draws.tensor(draws.pick(full, full[2:], (1, 1, 1, full[3])), torch.bool),
        within=lambda: draws.pick(None, mask_of(draws, *query.shape[:2], *lengths, size=size)),
    )

    @functools.wraps(pyrx.search.lse_cached)
    def sizes(*args: Any, **options: Any) -> list[Any]:
        return _sizes(pyrx.search.lse_cached(*args, **options))

    return Call(sizes, arguments)


@fuzzes("search.recall")
def recall(draws: Draws) -> Call:
    arguments = _searched(draws, "is_causal", "window", "key_mask", "query_scale", "bias", "scale", "softcap")
    batch, heads, queries, _ = arguments["query"].shape
    lengths, size = (queries, arguments["key"].shape[2]), block_size_of(draws)
    arguments["block_mask"] = mask_of(draws, batch, heads, *lengths, size=size)
    arguments |= draws.some(
        query_mask=lambda: draws.tensor((batch, queries), torch.bool),
        within=lambda: draws.pick(None, mask_of(draws, batch, heads, *lengths, size=size)),
    )
    arguments["per"] = draws.pick("all", "head", "query")
    call = attention_call(draws, pyrx.search.recall, arguments)
    return call.replace(needs=(), floor=1.0, idle=True)


def _whole(draws: Draws, arguments: dict[str, Any]) -> dict[str, Any]:
    """Query and key of whole numbers in place of these."""
    numbers = {
        name: draws.tensor(arguments[name].shape, torch.float32, "ties").nan_to_num() for name in ("query", "key")
    }
    return arguments | {name: each.to(arguments[name].dtype) for name, each in numbers.items()}


@fuzzes("search.pooled")
def pooled(draws: Draws) -> Call:
    arguments = _masked(draws) | {"block_size": block_size_of(draws)}
    arguments |= draws.some(
        similarity_threshold=lambda: draws.number(-1.0, 1.0),
        mass=lambda: draws.number(0.0, 1.0),
        topk=lambda: draws.pick(None, draws.number(0.0, 1.0)),
    )

    @functools.wraps(pyrx.search.pooled)
    def sizes(*args: Any, **options: Any) -> list[Any]:
        mask = pyrx.search.pooled(*args, **options)
        return _sizes(mask)[:3]

    return Call(sizes, arguments, idle=True)


@fuzzes("search.vertical_slash")
def vertical_slash(draws: Draws) -> Call:
    arguments = _whole(draws, _masked(draws)) | {"block_size": block_size_of(draws)}
    arguments |= draws.some(
        last_queries=lambda: draws.pick(1, 5, 64, 2**31 - 1),
        vertical=lambda: draws.pick(0, 1, 20, 2**31 - 1),
        slash=lambda: draws.pick(0, 1, 20, 2**31 - 1),
    )
    return Call(pyrx.search.vertical_slash, arguments, idle=True)


@fuzzes("search.topk_blocks")
def topk_blocks(draws: Draws) -> Call:
    arguments = _whole(draws, _masked(draws)) | {"block_size": draws.pick(*BLOCK_SIZES)}
    arguments |= draws.some(
        topk=lambda: draws.pick(1, 2, 16, 2**31 - 1),
        local=lambda: draws.pick(0, 1, 2),
        initial=lambda: draws.pick(0, 1, 2),
    )
    return Call(pyrx.search.topk_blocks, arguments, idle=True)


@fuzzes("search.AdaptiveSparseAttention")
def adaptive(draws: Draws) -> Call:
    arguments = _searched(draws, "is_causal", "window", "key_mask", "scale", "softcap")
    arguments["value"] = draws.tensor((*arguments["key"].shape[:3], 5), arguments["key"].dtype)
    arguments |= {"sparsity": draws.pick(0.0, 1.0), "block_size": block_size_of(draws), "warmup": draws.pick(0, 1)}
    arguments |= {"steps": draws.pick([1], [1, 2], [1, 2, 3], [2, 1]), "search_steps": draws.pick((2,), (1, 3), ())}

    def AdaptiveSparseAttention(
        query: Tensor, key: Tensor, value: Tensor, steps: list[int], key_mask: Tensor | None = None, **options: Any
    ) -> list[Any]:
        module = pyrx.search.AdaptiveSparseAttention(**options)
        if options["sparsity"] > 0:  # which blocks are kept hangs on the last bits
            return [list(module(query, key, value, step, key_mask=key_mask).shape) for step in steps]
        return [module(query, key, value, step, key_mask=key_mask) for step in steps]

    call = attention_call(draws, AdaptiveSparseAttention, arguments)
    return call.replace(needs=(), floor=1.0, fixed=("steps",))
