"""Checks of what block masks are made of; each error names op, argument, expected and got."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor

from pyrx._attention import BLOCK_SIZES
from pyrx._checks import broadcasts, check_device, check_dtype, check_integer, check_shape, check_tensor, fail, is_read

MOST_TOKENS = 2**31 - 1
MOST_SHOWN = 64  # values in an error


def fail_mask_type(op: str, argument: str, value: object, expected: str = "to be a pyrx.BlockMask") -> NoReturn:
    """FlexAttention has a BlockMask too."""
    kind = type(value)
    if kind.__name__ == "BlockMask":
        fail(op, argument, f"{expected} (BlockMask.from_flex makes one)", f"{kind.__module__}.BlockMask", TypeError)
    fail(op, argument, expected, kind.__name__, TypeError)


def check_block_size(op: str, block_size: object) -> tuple[int, int]:
    pair = (block_size, block_size) if isinstance(block_size, int) else block_size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        fail(op, "block_size", "to be an int or a pair (queries, keys)", repr(block_size), TypeError)
    for each in pair:
        if each not in BLOCK_SIZES:
            fail(op, "block_size", "to be one of " + ", ".join(map(str, BLOCK_SIZES)), each)
    return pair[0], pair[1]


def _summary(values: Tensor) -> str:
    return f"{values.numel()} values from {values.min()} to {values.max()}"


def check_values(op: str, argument: str, expected: str, passed: Tensor, values: Tensor) -> None:
    """Of a bool scalar that tells of values: an error on the CPU, on the device an assertion."""
    if not is_read(passed):
        torch._assert_async(passed, f"pyrx::{op}: expected {argument} {expected}")
    elif not passed:
        fail(op, argument, expected, values.tolist() if values.numel() <= MOST_SHOWN else _summary(values))


def check_tokens(op: str, name: str, tokens: Tensor) -> Tensor:
    """bool (B or 1, S) of bool (S,) or (B, S)."""
    check_dtype(op, name, tokens, torch.bool)
    if not 1 <= tokens.dim() <= 2:
        fail(op, name, "of shape [S] or [B, S]", list(tokens.shape))
    return tokens[None] if tokens.dim() == 1 else tokens


def check_documents(op: str, name: str, lengths: object, device: torch.device | str | None) -> Tensor:
    """int64 (B or 1, N) of ints, or of an integer tensor (N,) or (B, N)."""
    if isinstance(lengths, Tensor):
        check_tensor(op, name, lengths)
        if lengths.dtype not in (torch.int32, torch.int64):
            fail(op, name, "of dtype torch.int32 or torch.int64", lengths.dtype, TypeError)
        if not 1 <= lengths.dim() <= 2:
            fail(op, name, "of shape [N] or [B, N]", list(lengths.shape))
        return lengths.long() if lengths.dim() == 2 else lengths.long()[None]
    if not isinstance(lengths, (list, tuple)):
        fail(op, name, "to be a list of ints or a Tensor", type(lengths).__name__, TypeError)
    for each in lengths:
        check_integer(op, name, each, 0, MOST_TOKENS)
    return torch.tensor([lengths], dtype=torch.int64, device=device)


def check_lengths(op: str, seq_lengths: object) -> tuple[int, int]:
    """(Sq, Sk) of an int for both, or a pair."""
    pair = (seq_lengths, seq_lengths) if isinstance(seq_lengths, (int, torch.SymInt)) else seq_lengths
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        fail(op, "seq_lengths", "to be an int or a pair (queries, keys)", repr(seq_lengths), TypeError)
    for each in pair:
        check_integer(op, "seq_lengths", each, 0, MOST_TOKENS)
    return pair[0], pair[1]


def check_key_range(op: str, key_range: Tensor, queries: int) -> None:
    check_dtype(op, "key_range", key_range, torch.int32)
    shape = list(key_range.shape)
    if len(shape) != 3 or shape[1:] != [queries, 2]:
        fail(op, "key_range", f"of shape [B or 1, Sq, 2] = [B or 1, {queries}, 2]", shape)


def check_block_lists(blocks: Tensor, kv_width: int, q_width: int) -> None:
    op = "block_lists"
    check_dtype(op, "blocks", blocks, torch.bool)
    if blocks.dim() != 4:
        fail(op, "blocks", "of shape [B or 1, H or 1, NQ, NK]", list(blocks.shape))
    check_integer(op, "kv_width", kv_width, 0, blocks.shape[3])
    check_integer(op, "q_width", q_width, 0, blocks.shape[2])


def check_select(scores: Tensor, count: Tensor | None, mass: float, always: Tensor | None) -> None:
    op = "select_blocks"
    check_dtype(op, "scores", scores, torch.float32)
    if scores.dim() != 4:
        fail(op, "scores", "of shape [B, H, NQ, NK]", list(scores.shape))
    if count is not None:
        check_dtype(op, "count", count, torch.int32)
        shape = list(count.shape)
        if not broadcasts(shape, scores.shape[:3]):
            fail(op, "count", f"of shape [B or 1, H or 1, NQ or 1] of scores of {list(scores.shape)}", shape)
        check_device(op, "count", count, scores.device)
    elif not 0 <= mass <= 1:
        fail(op, "mass", "in [0, 1]", mass)
    if always is not None:
        check_dtype(op, "always", always, torch.bool)
        shape = list(always.shape)
        if not broadcasts(shape, scores.shape):
            fail(op, "always", f"of a shape that broadcasts to the scores' {list(scores.shape)}", shape)
        check_device(op, "always", always, scores.device)


def check_lists(op: str, lists: Iterable[Tensor], q_block: int, k_block: int, query: Tensor, key: Tensor) -> None:
    """Of the lists of a mask: shapes and dtypes; the kernels pass over indices that are out of range."""
    q_blocks, k_blocks = -(-query.shape[2] // q_block), -(-key.shape[2] // k_block)
    kv_counts, kv_indices, q_counts, q_indices = lists
    for side, counts, indices, rows in (
        ("kv", kv_counts, kv_indices, q_blocks),
        ("q", q_counts, q_indices, k_blocks),
    ):
        for name, each in ((f"{side}_counts", counts), (f"{side}_indices", indices)):
            check_tensor(op, name, each)
            check_dtype(op, name, each, torch.int32)
            check_device(op, name, each, query.device)
        shape = list(counts.shape)
        if not broadcasts(shape[:2], query.shape[:2]) or shape[2:] != [rows]:
            fail(op, f"{side}_counts", f"of shape [B or 1, H or 1, {rows}] for a query of {list(query.shape)}", shape)
        if indices.dim() != 4:
            fail(op, f"{side}_indices", f"of shape {[*shape, 'W']}", list(indices.shape))
        check_shape(op, f"{side}_indices", indices, "[..., W]", [*shape, indices.shape[3]])
    if list(kv_counts.shape[:2]) != list(q_counts.shape[:2]):
        fail(
            op, "q_counts", f"of the leading dimensions of kv_counts {list(kv_counts.shape[:2])}", list(q_counts.shape)
        )
