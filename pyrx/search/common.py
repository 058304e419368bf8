"""What the searches share: which blocks are in reach, how masks are made of blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    reachable = patterns.window_blocks(lengths, size, left, right, device)[None, None]
    if key_mask is not None:
        reachable = reachable & patterns.touched_blocks(key_mask, size[1])[:, None, None]
    if query_mask is not None:
        reachable = reachable & patterns.touched_blocks(query_mask, size[0])[:, None, :, None]
    if left < 0 and right < 0:
        return reachable, torch.zeros_like(reachable)
    return reachable, reachable & patterns.window_blocks(lengths, size, 0, 0, device)


def mask_of(blocks: Tensor, query: Tensor, key: Tensor, size: tuple[int, int], backend: str | None) -> BlockMask:
    return BlockMask.from_dense(blocks, (query.shape[2], key.shape[2]), size, backend=backend_of("block_mask", backend))


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
