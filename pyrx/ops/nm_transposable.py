"""Transposable N:M sparsity: masks that keep N of each M in the rows and in the columns of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrx import _library
from pyrx._backends import select
from pyrx._checks import check_bool, check_choice, check_float, fail
from pyrx.ops.nm_sparsity import check_nm, packed_shape
from pyrx.reference import nm_transposable as reference

ROW = "nm_transposable"
OP = "nm_transposable_mask"
METHODS = ("exact", "greedy")


def _check(scores: Tensor, n: int, m: int, exact: bool) -> None:
    check_float(OP, "scores", scores)
    check_nm(OP, n, m)
    if exact and (n, m) != (2, 4):
        fail(OP, "n:m", "2:4 for method 'exact'", f"{n}:{m}")
    if scores.dim() < 2:
        fail(OP, "scores", "of at least two dimensions", list(scores.shape))
    if scores.shape[-2] % m != 0 or scores.shape[-1] % m != 0:
        fail(OP, "scores", f"of last two sizes that m = {m} divides", list(scores.shape))


def _fake(scores: Tensor, n: int, m: int, magnitude: bool, packed: bool, exact: bool) -> Tensor:
    _check(scores, n, m, exact)
    if packed:
        return scores.new_empty(packed_shape(scores.shape), dtype=torch.uint8)
    return torch.empty_like(scores, dtype=torch.bool)


_library.define(
    ROW,
    OP,
    "(Tensor scores, int n, int m, bool magnitude, bool packed, bool exact) -> Tensor",
    _fake,
)


def nm_transposable_mask(
    scores: Tensor,
    n: int,
    m: int,
    *,
    magnitude: bool = True,
    packed: bool = False,
    method: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """A mask that is N:M along both dimensions of a matrix: in each m x m tile at most `n` of every row and of every
    column are kept, so that a weight under it and its transpose (the backward's) are both N:M sparse.

    Args:
        scores: (..., R, C), R and C multiples of m, any strides; float16, bfloat16, float32 or float64.
        n: how many elements of each m are *kept* at most, 1 to m.
        m: the size of a tile, 1 to 128.
        magnitude: score by absolute value, else by the scores as they are. Default True.
        packed: return bits. Default False.
        method: "exact", for 2:4 alone: of the 90 patterns that keep two of every row and column one whose scores have
            the largest sum. "greedy": elements by descending score, each kept if its row and its column still have
            room; it may keep fewer than n. The scores it keeps add up to at least half of what any such mask keeps,
            where none is negative. Default: "exact" for 2:4, else "greedy".
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.

    Returns:
        bool tensor of scores' shape and strides, True where kept; packed: uint8 (..., R, ceil(C / 8)), bit j of byte
        k is element 8k + j of its row, bits beyond the row 0. The same bits on every backend. No gradient goes
        through it.

        "exact" adds in float32 (float64 for float64), every sum rounded alone, and takes the first of equal sums in a
        fixed order. Scores count as at most 2**120 (float64: 2**1000) on either side, infinity too, and NaN as 2**124
        (2**1004), so that it is never hidden; beside such scores the sums cannot tell small ones apart. "greedy" ranks
        as `pyrx.nm_mask` does, NaN above infinity; of equal scores the one of the lower index, row by row, comes first.

    Equivalent to, for "exact", `patterns[(tiles.abs().flatten(1) @ patterns.flatten(1).T).argmax(1)]` with the 90
    patterns (90, 4, 4) and tiles (T, 4, 4), but for ties and rounding.

    Cost: one read of the scores and one write of a byte (packed: a bit) an element; of arithmetic about 20 operations
    an element for "exact", whatever the scores. "greedy" goes through a tile's elements once for every few it keeps, or
    sorts them (m above 16 on the CPU).

    Raises:
        ValueError: n > m, sizes that m does not divide, fewer than two dimensions, method "exact" but for 2:4.
        TypeError: integer or complex scores. RuntimeError: a backend that cannot serve.

    Source: Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable
    Masks", NeurIPS 2021 (the greedy approximation; its N counts what is dropped); Hu et al., "Accelerating Transformer
    Pre-training with 2:4 Sparsity", ICML 2024 (the 90 patterns).
    """
    check_float(OP, "scores", scores)
    check_nm(OP, n, m)
    check_choice(OP, "method", method, (None, *METHODS))
    check_bool(OP, magnitude=magnitude, packed=packed)
    exact = (n, m) == (2, 4) if method is None else method == "exact"
    _check(scores, n, m, exact)
    chosen = select(ROW, scores.device.type, scores.dtype, backend)
    if chosen == "reference":
        return reference.nm_transposable_mask(scores, n, m, magnitude, packed, exact)
    return _library.namespace(chosen).nm_transposable_mask(scores.detach(), n, m, magnitude, packed, exact)
