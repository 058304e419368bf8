"""Lists of the blocks that a mask keeps, and the choice of blocks by their scores: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores are summed in units of 2**-36, in integers: sums that have the same bits in any order.
UNITS = 2.0**36
MOST_SCORE = 1024.0


def _rows(blocks: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Per row of bool (..., R, C) the count and the ascending indices of what is kept, 0 past the count."""
    rank = blocks.cumsum(-1) - 1
    inside = blocks & (rank < width)
    indices = torch.zeros((*blocks.shape[:-1], width + 1), dtype=torch.int32, device=blocks.device)
    columns = torch.arange(blocks.shape[-1], dtype=torch.int32, device=blocks.device).expand(blocks.shape)
    # what is not kept goes to a column that is cut off
    indices.scatter_(-1, torch.where(inside, rank, width), torch.where(inside, columns, 0))
    return blocks.sum(-1).clamp(max=width).to(torch.int32), indices[..., :width].contiguous()


def block_lists(blocks: Tensor, kv_width: int, q_width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(kv_counts, kv_indices, q_counts, q_indices) of bool blocks (B, H, NQ, NK)."""
    return *_rows(blocks, kv_width), *_rows(blocks.transpose(-1, -2), q_width)


def dense_blocks(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """bool (..., R, columns) of a row's lists, in any order; an index out of range is passed over."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    listed = listed & (indices >= 0) & (indices < columns)
    blocks = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.bool, device=indices.device)
    return blocks.scatter_(-1, torch.where(listed, indices, columns).long(), True)[..., :columns].contiguous()


def select_blocks(scores: Tensor, count: Tensor | None, mass: float, always: Tensor | None) -> Tensor:
    """bool of the scores' shape (B, H, NQ, NK): what a row keeps of its blocks, ranked by score, lowest index first.

    The `count` first ones (int32, broadcast to (B, H, NQ)), or the longest run of first ones whose scores sum to at
    most `mass` of the row's, at least one. Negative infinity is never kept, except by `always` (bool, broadcast).
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    finite = scores != -torch.inf
    if count is not None:
        kept = torch.arange(scores.shape[-1], device=scores.device) < count[..., None]
    else:
        units = (scores.nan_to_num(MOST_SCORE).clamp(0, MOST_SCORE) * UNITS).long()
        limit = (units.sum(-1, keepdim=True).double() * mass).floor().long()
        kept = units.gather(-1, order).cumsum(-1) <= limit
        kept[..., :1] = True
    blocks = torch.zeros_like(finite).scatter_(-1, order, kept.expand(scores.shape)) & finite
    return blocks if always is None else blocks | always
