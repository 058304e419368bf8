"""What the searches share: which blocks are in reach, how masks are made of blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyrx._attention import Logits, check_query_key, logits_of
from pyrx._backends import ABSENT
from pyrx._checks import check_number, check_tensor, fail
from pyrx.ops.block_mask import BlockMask

MOST_INT = 2**31 - 1


def check_share(op: str, name: str, value: float) -> None:
    check_number(op, name, value)
    if not 0 <= value <= 1:
        fail(op, name, "in [0, 1]", value)


def backend_of(row: str, backend: str | None) -> str | None:
    """The backend asked for, where the row has it."""
    return None if (row, backend) in ABSENT else backend


def block_counts(query: Tensor, key: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    return -(-query.shape[2] // size[0]), -(-key.shape[2] // size[1])


def reach(
    query: Tensor, key: Tensor, size: tuple[int, int], left: int, right: int, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(reachable, diagonal), bool (B or 1, 1, NQ, NK): where some query sees some key, and where queries lie at their
    own keys (nowhere where no window limits what is seen)."""
    q_blocks, k_blocks = block_counts(query, key, size)
    q_first = torch.arange(q_blocks, device=query.device)[:, None] * size[0]
    k_first = torch.arange(k_blocks, device=query.device) * size[1]
    q_last = (q_first + size[0]).clamp(max=query.shape[2]) - 1
    k_last = (k_first + size[1]).clamp(max=key.shape[2]) - 1
    inside = torch.ones(q_blocks, k_blocks, dtype=torch.bool, device=query.device)
    diagonal = (q_first <= k_last) & (k_first <= q_last) & (left >= 0 or right >= 0)
    if left >= 0:
        inside = inside & (k_last >= q_first - left)
    if right >= 0:
        inside = inside & (k_first <= q_last + right)
    inside, diagonal = inside[None, None], diagonal[None, None]
    if key_mask is not None:
        padded = pad(key_mask, (0, -key.shape[2] % size[1]))
        inside = inside & padded.unflatten(1, (k_blocks, size[1])).any(2)[:, None, None, :]
    return inside, diagonal & inside


def mask_of(blocks: Tensor, query: Tensor, key: Tensor, size: tuple[int, int], backend: str | None) -> BlockMask:
    return BlockMask.from_dense(blocks, (query.shape[2], key.shape[2]), size, backend=backend_of("block_mask", backend))


def by_group(query: Tensor, heads: int) -> Tensor:
    """(B, H, ...) as (B, Hkv, G, ...)."""
    return query.unflatten(1, (heads, query.shape[1] // max(heads, 1)))


def check_inputs(op: str, query: Tensor, key: Tensor) -> None:
    check_tensor(op, "query", query)
    check_tensor(op, "key", key)
    check_query_key(op, query, key)


def logits_for(op: str, query: Tensor, key: Tensor, **arguments: Any) -> Logits:
    """Logits of a search's arguments; query and key are checked."""
    check_inputs(op, query, key)
    return logits_of(op, query, **arguments)
