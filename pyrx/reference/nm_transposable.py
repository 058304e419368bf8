"""N:M masks of rows and columns at once, by their definition."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from pyrx._checks import accumulation_dtype
from pyrx.reference.dropout import pack_bits
from pyrx.reference.nm_sparsity import rank_keys

TILE = 4  # of the exact search
# the columns that a row of a 2:4 tile may keep
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
Ways = tuple[tuple[int, int], ...]  # pairs of two rows
# by dtype of the arithmetic: what infinity counts as, and NaN
BOUNDS = {torch.float32: (2.0**120, 2.0**124), torch.float64: (2.0**1000, 2.0**1004)}


def _splits() -> list[tuple[Ways, Ways]]:
    """The ways to split the columns over both halves of a tile, in the order of the search: for each the pairs that
    rows 0 and 1, and that rows 2 and 3, may keep."""
    found: list[tuple[Ways, Ways]] = [(((a, a),), ((5 - a, 5 - a),)) for a in range(6)]
    for i, j in itertools.permutations(range(TILE), 2):
        # rows 0 and 1 keep i twice, rows 2 and 3 keep j twice, and each half the other two columns once
        rest = [column for column in range(TILE) if column not in (i, j)]
        top, bottom = ([PAIRS.index((min(x, y), max(x, y))) for y in rest] for x in (i, j))
        found.append((((top[0], top[1]), (top[1], top[0])), ((bottom[0], bottom[1]), (bottom[1], bottom[0]))))
    each = tuple((a, 5 - a) for a in range(6))
    return [*found, (each, each)]


SPLITS = _splits()


def tiles_of(scores: Tensor, m: int) -> Tensor:
    """(..., R, C) as (..., R / m, C / m, m, m)."""
    rows, columns = scores.shape[-2:]
    return scores.unflatten(-1, (columns // m, m)).unflatten(-3, (rows // m, m)).transpose(-3, -2)


def tile_values(scores: Tensor, magnitude: bool) -> Tensor:
    """What the exact search adds up."""
    accumulate = accumulation_dtype(scores.dtype)
    most, nan = BOUNDS[accumulate]
    wide = scores.detach().to(accumulate)
    values = (wide.abs() if magnitude else wide).clamp(-most, most)
    return torch.where(wide.isnan(), nan, values)


def _half(sums: Tensor, row: int, ways: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """The best way of two rows: its sum, and its index in `ways`, the first of equals."""
    best = sums[..., row, ways[0][0]] + sums[..., row + 1, ways[0][1]]
    index = torch.zeros_like(best, dtype=torch.int64)
    for way, (a, b) in enumerate(ways[1:], 1):
        total = sums[..., row, a] + sums[..., row + 1, b]
        index = torch.where(total > best, way, index)
        best = torch.where(total > best, total, best)
    return best, index


def _exact(values: Tensor) -> Tensor:
    """(..., 4, 4) bool: of the 90 patterns that keep two of every row and column one of the largest sum."""
    sums = torch.stack([values[..., a] + values[..., b] for a, b in PAIRS], -1)
    rows = torch.zeros((len(PAIRS), TILE), dtype=torch.bool, device=values.device)
    for pair, (a, b) in enumerate(PAIRS):
        rows[pair, a] = rows[pair, b] = True
    best, pattern = None, None
    for ways in SPLITS:
        halves = [_half(sums, 2 * half, ways[half]) for half in range(2)]
        total = halves[0][0] + halves[1][0]
        kept = [torch.tensor(ways[half], device=values.device)[halves[half][1]] for half in range(2)]
        pairs = torch.cat(kept, -1)
        if best is None or pattern is None:
            best, pattern = total, pairs
        else:
            pattern = torch.where((total > best)[..., None], pairs, pattern)
            best = torch.where(total > best, total, best)
    return rows[pattern]


def _greedy(keys: Tensor, n: int) -> Tensor:
    """(..., m, m) bool: elements from the highest key on, where their row and their column still have room."""
    m = keys.shape[-1]
    flat = keys.reshape(-1, m * m)
    order = flat.sort(dim=-1, descending=True, stable=True).indices
    room = torch.full((2, len(flat), m), n, device=keys.device)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    for element in order.split(1, dim=-1):
        row, column = element // m, element % m
        fits = (room[0].gather(-1, row) > 0) & (room[1].gather(-1, column) > 0)
        room[0].scatter_add_(-1, row, -fits.long())
        room[1].scatter_add_(-1, column, -fits.long())
        kept.scatter_(-1, element, fits)
    return kept.reshape(keys.shape)


def nm_transposable_mask(scores: Tensor, n: int, m: int, magnitude: bool, packed: bool, exact: bool) -> Tensor:
    """True for at most N in each row and column of each M x M tile."""
    found = torch.empty_like(scores, dtype=torch.bool)
    if scores.numel():
        if exact:
            kept = _exact(tiles_of(tile_values(scores, magnitude), m))
        else:
            kept = _greedy(tiles_of(rank_keys(scores, magnitude), m), n)
        found.copy_(kept.transpose(-3, -2).reshape(scores.shape))
    return pack_bits(found) if packed else found
