"""What the searches share: which blocks are in reach, how masks are made of blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyrx import _block_patterns as patterns
from pyrx._attention import Logits, check_logits, check_query_key, logits_of
from pyrx._backends import ABSENT
from pyrx._checks import check_device, check_dtype, check_number, check_shape, check_tensor, fail
from pyrx._linear import without_autocast
from pyrx.ops.block_mask import BlockMask

MOST_INT = 2**31 - 1


def check_share(op: str, name: str, value: float) -> None:
    check_number(op, name, value)
    if not 0 <= value <= 1:
        fail(op, name, "in [0, 1]", value)


def backend_of(row: str, backend: str | None) -> str | None:
    """The backend asked for, where the row has it."""
    return None if (row, backend) in ABSENT else backend


def check_query_mask(op: str, query: Tensor, query_mask: Tensor | None) -> None:
    if query_mask is not None:
        check_dtype(op, "query_mask", query_mask, torch.bool)
        check_shape(op, "query_mask", query_mask, "[B, Sq]", [query.shape[0], query.shape[2]])
        check_device(op, "query_mask", query_mask, query.device)


def visible_ends(x: Tensor, block: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B or 1, N): the first visible token of every block of x (B, H, S, D) and the one after the last; S and 0 where
    none is."""
    tokens = x.shape[2]
    position, count = torch.arange(tokens, device=x.device)[None], -(-tokens // block)
    first = position if mask is None else torch.where(mask, position, tokens)
    stop = position + 1 if mask is None else torch.where(mask, position + 1, 0)
    padding = (0, count * block - tokens)
    return (
        pad(first, padding, value=tokens).unflatten(-1, (count, block)).amin(-1),
        pad(stop, padding).unflatten(-1, (count, block)).amax(-1),
    )


def reach(
    query: Tensor,
    key: Tensor,
    size: tuple[int, int],
    left: int,
    right: int,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(reachable, diagonal), bool (B or 1, 1, NQ, NK): where some query sees some key, and where queries lie at their
    own keys (nowhere where no window limits what is seen)."""
    lengths, device = (query.shape[2], key.shape[2]), query.device

    def within(left: int, right: int) -> Tensor:
        blocks = patterns.window_blocks(lengths, size, left, right, device)[None]
        if key_mask is not None:
            blocks = blocks & patterns.touched_blocks(key_mask, size[1])[:, None]
        if query_mask is not None:
            # padding sees nothing: a block reaches as far as its visible tokens
            q_first, q_stop = (each[..., None] for each in visible_ends(query, size[0], query_mask))
            k_first, k_stop = (each[:, None] for each in visible_ends(key, size[1], key_mask))
            blocks = blocks & (q_stop > 0)
            blocks = blocks & (k_first < q_stop + right) if right >= 0 else blocks
            blocks = blocks & (k_stop > q_first - left) if left >= 0 else blocks
        return blocks[:, None]

    reachable = within(left, right)
    if left < 0 and right < 0:
        return reachable, torch.zeros_like(reachable)
    return reachable, reachable & within(0, 0)


def mask_of(
    blocks: Tensor, query: Tensor, key: Tensor, size: tuple[int, int], logits: Logits, backend: str | None
) -> BlockMask:
    """The blocks that were found, with the window and key_range of the logits."""
    lengths, lists = (query.shape[2], key.shape[2]), backend_of("block_mask", backend)
    found = BlockMask.from_dense(blocks, lengths, size, key_range=logits.key_range, backend=lists)
    return BlockMask(*found.lists, size, lengths, found.key_range, (logits.left, logits.right))


def products(query: Tensor, key: Tensor) -> Tensor:
    """Of all pairs (..., Sq, Sk), in their own dtype under autocast too."""
    with without_autocast(query.device.type):
        return query @ key.transpose(-1, -2)


def by_group(query: Tensor, heads: int) -> Tensor:
    """(B, H, ...) as (B, Hkv, G, ...)."""
    return query.unflatten(1, (heads, query.shape[1] // max(heads, 1)))


def check_inputs(op: str, query: Tensor, key: Tensor) -> None:
    check_tensor(op, "query", query)
    check_tensor(op, "key", key)
    check_query_key(op, query, key)


def logits_for(op: str, query: Tensor, key: Tensor, **arguments: Any) -> Logits:
    """Logits of a search's arguments; all of them are checked."""
    check_inputs(op, query, key)
    logits = logits_of(op, query, **arguments)
    check_logits(op, query, key, logits)
    return logits
