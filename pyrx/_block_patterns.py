"""The blocks that patterns of attention cover: bool, on their device, without a tensor of (Sq, Sk) or a host sync."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def blocks_of(lengths: Pair, size: Pair) -> Pair:
    """(NQ, NK)."""
    return -(-lengths[0] // size[0]), -(-lengths[1] // size[1])


def first_tokens(lengths: Pair, size: Pair, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """The first token of every block of queries (NQ, 1), and of keys (NK,)."""
    rows, columns = blocks_of(lengths, size)
    return torch.arange(rows, device=device)[:, None] * size[0], torch.arange(columns, device=device) * size[1]


def window_blocks(lengths: Pair, size: Pair, left: int, right: int, device: torch.device | str | None) -> Tensor:
    """(NQ, NK): blocks with a query q and a key k of q - left <= k <= q + right, -1 without limit."""
    query, key = first_tokens(lengths, size, device)
    blocks = torch.ones(blocks_of(lengths, size), dtype=torch.bool, device=device)
    if left >= 0:
        blocks &= (key + size[1]).clamp(max=lengths[1]) > query - left
    if right >= 0:
        blocks &= key < (query + size[0]).clamp(max=lengths[0]) + right
    return blocks


def inner_blocks(lengths: Pair, size: Pair, left: int, right: int, device: torch.device | str | None) -> Tensor:
    """(NQ, NK): blocks that lie inside, of queries q that all see all their keys k, q - left <= k <= q + right."""
    query, key = first_tokens(lengths, size, device)
    blocks = (query + size[0] <= lengths[0]) & (key + size[1] <= lengths[1])
    if left >= 0:
        blocks &= key >= query + size[0] - 1 - left
    if right >= 0:
        blocks &= key + size[1] - 1 <= query + right
    return blocks


def strided_blocks(
    lengths: Pair, size: Pair, stride: int, local: int, summary: int, device: torch.device | str | None
) -> Tensor:
    """(NQ, NK), counted in blocks of the larger size both ways; `summary` 0: at every distance that stride divides."""
    unit = max(size)
    query, key = (each // unit for each in first_tokens(lengths, size, device))
    if summary > 0:
        far = (key % stride >= stride - summary).expand(blocks_of(lengths, size))
    else:
        far = (query - key) % stride == 0
    return far | ((query - key).abs() < local)


def touched_blocks(tokens: Tensor, block: int) -> Tensor:
    """bool (..., N) of bool tokens (..., S): the blocks that have one."""
    length = tokens.shape[-1]
    count = -(-length // block)
    return F.pad(tokens, (0, count * block - length)).unflatten(-1, (count, block)).any(-1)


def range_blocks(key_range: Tensor, lengths: Pair, size: Pair) -> Tensor:
    """(B or 1, 1, NQ, NK): blocks with a query whose range of keys, int32 (B or 1, Sq, 2), has a key there."""
    rows, columns = blocks_of(lengths, size)
    first, last = key_range.clamp(0, lengths[1]).long().unbind(-1)
    seen = (first < last).to(torch.int32)
    # how many queries' ranges begin less how many have ended, summed along the blocks of keys
    row = torch.arange(lengths[0], device=key_range.device) // size[0] * (columns + 1)
    edges = torch.zeros(key_range.shape[0], rows * (columns + 1), dtype=torch.int32, device=key_range.device)
    edges.scatter_add_(1, row + first // size[1], seen)
    edges.scatter_add_(1, row + -(-last // size[1]), -seen)
    covered = edges.unflatten(1, (rows, columns + 1)).cumsum(-1, dtype=torch.int32)[..., :columns] > 0
    return covered[:, None]


def document_ranges(lengths: Tensor, key_lengths: Tensor, queries: int) -> Tensor:
    """int32 (B or 1, Sq, 2): the keys of each query's own document, of int64 lengths (B or 1, N), N at least 1."""
    position = torch.arange(queries, device=lengths.device).expand(lengths.shape[0], queries).contiguous()
    document = torch.searchsorted(lengths.cumsum(-1), position, right=True).clamp(max=lengths.shape[1] - 1)
    last = key_lengths.cumsum(-1).gather(-1, document)
    return torch.stack([last - key_lengths.gather(-1, document), last], -1).to(torch.int32)
