"""Search by a guess at attention from a part of it: means of blocks, or the last queries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyrx import _block_patterns as patterns
from pyrx._attention import Logits
from pyrx._block_checks import check_block_size
from pyrx._checks import check_integer, check_number
from pyrx.ops.block_mask import BlockMask, select_blocks
from pyrx.ops.block_pool import block_pool
from pyrx.search.common import MOST_INT, backend_of, by_group, check_share, logits_for, mask_of, products, reach

# of MInference: how many of the first keys and of the nearest diagonals take part whatever their scores
FIRST_KEYS, NEAR_DIAGONALS = 30, 100


@torch.no_grad()
def pooled(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int | tuple[int, int] = (128, 64),
    similarity_threshold: float = 0.6,
    mass: float = 0.98,
    topk: float | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> BlockMask:
    """SpargeAttn's prediction: the softmax of the products of block means says which blocks matter.

    Where a block's tokens are not alike their mean says little: such blocks of queries and of keys are kept whole.

    Args:
        query, key: as in `lse_cached`. Keys are taken less their mean over the sequence.
        block_size: tokens of a block, 16, 32, 64 or 128, or (queries, keys). Default (128, 64).
        similarity_threshold: a block is alike whose mean cosine over all pairs of tokens is above this. Default 0.6.
        mass: a row keeps the longest run of its most probable blocks whose probabilities sum to at most this share, one
            at least. Default 0.98.
        topk: instead of `mass`, the share of the blocks in reach that a row keeps, one at least. Default: none.
        is_causal: as in `pyrx.block_sparse_attention`, and to be passed to both. Default False.
        scale: of the products. Default 1 / sqrt(D).
        backend: as in `lse_cached`.

    Returns:
        `pyrx.BlockMask` (B, H). No gradient.

    Cost: two reads of key, one of query; O(NQ NK) operations and memory.

    Raises: as `lse_cached`.

    Source: Zhang et al., "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference" (2025),
    arXiv 2502.18137.
    """
    op = "search.pooled"
    logits = logits_for(op, query, key, is_causal=is_causal, scale=scale)
    size = check_block_size(op, block_size)
    check_number(op, "similarity_threshold", similarity_threshold)
    check_share(op, "mass", mass)
    if topk is not None:
        check_share(op, "topk", topk)
    heads, pool = key.shape[1], backend_of("block_pool", backend)
    q_mean, q_similarity = block_pool(query, size[0], backend=pool)
    k_mean, k_similarity = block_pool(key, size[1], key.mean(2, dtype=q_mean.dtype), pool)
    group = query.shape[1] // max(heads, 1)
    k_mean, k_similarity = k_mean.repeat_interleave(group, 1), k_similarity.repeat_interleave(group, 1)
    q_alike = (q_similarity > similarity_threshold)[..., None]
    k_alike = (k_similarity > similarity_threshold)[:, :, None]
    predicted = products(q_mean, k_mean) * logits.scale
    reachable, diagonal = reach(query, key, size, logits.left, logits.right)
    candidates = reachable & k_alike
    # a row without candidates is all NaN until the second line
    scores = torch.softmax(torch.where(candidates, predicted, -torch.inf), -1)
    scores = torch.where(candidates, scores, -torch.inf).float()
    count = None if topk is None else (topk * reachable.sum(-1)).round().clamp(min=1).to(torch.int32)
    kept = torch.where(q_alike & k_alike, diagonal, reachable)
    blocks = select_blocks(scores, count, mass, kept, backend_of("block_mask", backend))
    return mask_of(blocks, query, key, size, backend)


def _last_probabilities(query: Tensor, key: Tensor, last: int, logits: Logits) -> Tensor:
    """(B, H, L, Sk) float32: the attention of the last L queries."""
    queries = query.shape[2]
    rows = by_group(query[:, :, queries - last :], key.shape[1])
    found = products(rows, key[:, :, None]).flatten(1, 2).float() * logits.scale
    if logits.right >= 0:
        position = torch.arange(queries - last, queries, device=query.device)[:, None]
        found = found.masked_fill(torch.arange(key.shape[2], device=query.device) > position, -torch.inf)
    return torch.softmax(found, -1)


def _diagonal_sums(values: Tensor) -> Tensor:
    """(..., L + K - 1) of (..., L, K): the sums of the diagonals, from the upper right corner to the lower left."""
    rows, columns = values.shape[-2:]
    # rows in reverse, each one place to the right of the one before: diagonals are columns
    skewed = pad(values.flip(-2), (0, rows)).flatten(-2)[..., : rows * (columns + rows - 1)]
    return skewed.unflatten(-1, (rows, columns + rows - 1)).sum(-2).flip(-1)


def _largest(scores: Tensor, count: int) -> Tensor:
    """bool of the scores' shape: the `count` largest of a row, minus infinity never."""
    values, places = torch.topk(scores, min(count, scores.shape[-1]), dim=-1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, values > -torch.inf)


@torch.no_grad()
def vertical_slash(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int | tuple[int, int] = 64,
    last_queries: int = 64,
    vertical: int = 1000,
    slash: int = 6096,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> BlockMask:
    """MInference's pattern: keys that everyone attends to, and distances, both as the last queries show them.

    The mask has every block that one of the chosen keys (vertical lines) or distances (diagonals, slashes) crosses.

    Args:
        query, key: as in `lse_cached`.
        block_size: tokens of a block, 16, 32, 64 or 128, or (queries, keys). Default 64.
        last_queries: how many queries, the last ones, are asked. Default 64.
        vertical: how many keys are chosen, the first 30 among them. Default 1000.
        slash: how many distances from query to key are chosen, the nearest 100 among them. Default 6096. The defaults
            are MInference's, for sequences of 100 000 tokens; scattered keys cost a whole column of blocks each here.
        is_causal: as in `pyrx.block_sparse_attention`, and to be passed to both. Default False.
        scale: of the products. Default 1 / sqrt(D).
        backend: as in `lse_cached`.

    Returns:
        `pyrx.BlockMask` (B, H). No gradient.

    Cost: last_queries Sk D operations a head and O(last_queries Sk) memory.

    Raises: as `lse_cached`.

    Source: Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention"
    (2024), arXiv 2407.02490.
    """
    op = "search.vertical_slash"
    logits = logits_for(op, query, key, is_causal=is_causal, scale=scale)
    size = check_block_size(op, block_size)
    check_integer(op, "last_queries", last_queries, 1, MOST_INT)
    check_integer(op, "vertical", vertical, 0, MOST_INT)
    check_integer(op, "slash", slash, 0, MOST_INT)
    (queries, keys), device = (query.shape[2], key.shape[2]), query.device
    reachable, diagonal = reach(query, key, size, logits.left, logits.right)
    if queries == 0 or keys == 0:
        return mask_of(reachable.expand(*query.shape[:2], -1, -1), query, key, size, backend)
    last = min(last_queries, queries)
    probabilities = _last_probabilities(query, key, last, logits)
    # sums are at most `last`: the ones that always take part are above, the first and nearest most
    first = FIRST_KEYS - torch.arange(keys, device=device)
    columns = torch.where(first > 0, first + last, probabilities.sum(-2))
    blocks = patterns.touched_blocks(_largest(columns, vertical), size[1])[:, :, None]

    # distance q - k of diagonal i: i + nearest
    nearest = queries - last - keys + 1
    distance = torch.arange(keys + last - 1, device=device) + nearest
    near = NEAR_DIAGONALS - distance.abs()
    diagonals = torch.where(near > 0, near + last, _diagonal_sums(probabilities))
    if is_causal:
        diagonals = diagonals.masked_fill(distance < 0, -torch.inf)
    before = pad(_largest(diagonals, slash).cumsum(-1), (1, 0))
    q_first, k_first = patterns.first_tokens((queries, keys), size, device)
    low = q_first - (k_first + size[1]).clamp(max=keys) + 1 - nearest
    high = (q_first + size[0]).clamp(max=queries) - k_first - nearest
    low, high = low.clamp(0, keys + last - 1), high.clamp(0, keys + last - 1)
    blocks = blocks | (before[..., high] > before[..., low])
    return mask_of(blocks & reachable | diagonal, query, key, size, backend)


@torch.no_grad()
def topk_blocks(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int | tuple[int, int] = 64,
    topk: int = 16,
    local: int = 1,
    initial: int = 1,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> BlockMask:
    """NSA's selection: the blocks of keys whose means the queries of a block attend to most.

    The scores are the softmax over the means of blocks of keys, summed over the queries of a block and over the query
    heads that share keys, which so read the same blocks. A causal query attends to the means of whole blocks before it.

    Args:
        query, key: as in `lse_cached`.
        block_size: tokens of a block, 16, 32, 64 or 128, or (queries, keys). Default 64.
        topk: how many blocks a row keeps, local and initial ones among them. Default 16.
        local: how many blocks up to the queries' own are always kept (not causal: on both sides). Default 1.
        initial: how many of the first blocks are always kept. Default 1.
        is_causal: as in `pyrx.block_sparse_attention`, and to be passed to both. Default False.
        scale: of the products. Default 1 / sqrt(D).
        backend: as in `lse_cached`.

    Returns:
        `pyrx.BlockMask` (B, H), the same for the query heads of a key head. No gradient.

    Cost: 2 Sq NK D operations a head, and O(B (H / Hkv) Sq NK) memory.

    Raises: as `lse_cached`.

    Source: Yuan et al., "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention" (2025),
    arXiv 2502.11089.
    """
    op = "search.topk_blocks"
    logits = logits_for(op, query, key, is_causal=is_causal, scale=scale)
    size = check_block_size(op, block_size)
    for name, least, value in (("topk", 1, topk), ("local", 0, local), ("initial", 0, initial)):
        check_integer(op, name, value, least, MOST_INT)
    (queries, keys), heads, device = (query.shape[2], key.shape[2]), key.shape[1], query.device
    q_blocks, k_blocks = patterns.blocks_of((queries, keys), size)
    means, _ = block_pool(key, size[1], backend=backend_of("block_pool", backend))
    q_first, k_first = patterns.first_tokens((queries, keys), size, device)
    means, groups = means.to(query.dtype), by_group(query, heads)
    visible = torch.ones(queries, k_blocks, dtype=torch.bool, device=device)
    if is_causal:
        visible = (k_first + size[1]).clamp(max=keys) - 1 <= torch.arange(queries, device=device)[:, None]

    def summed(head: int) -> Tensor:
        """(B, NQ, NK) of one head of keys."""
        found = products(groups[:, head], means[:, head, None]).float() * logits.scale
        probabilities = torch.softmax(found.masked_fill(~visible, -torch.inf), -1)
        # a query that sees no block is all NaN
        each = torch.where(visible, probabilities, 0).sum(1)
        return pad(each, (0, 0, 0, -queries % size[0])).unflatten(1, (q_blocks, size[0])).sum(2)

    # one head at a time: its probabilities are all that is in memory
    scores = (
        torch.stack([summed(head) for head in range(heads)], 1)
        if heads
        else means.new_zeros((query.shape[0], 0, q_blocks, k_blocks), dtype=torch.float32)
    )
    reachable, diagonal = reach(query, key, size, logits.left, logits.right)
    around = (local - 1) * size[1]
    near = (k_first < q_first + size[0] + around) & (k_first + size[1] > q_first - around)
    forced = ((k_first < initial * size[1]) | near & (local > 0)) & reachable | diagonal
    scores = scores.masked_fill(~reachable, -torch.inf).masked_fill(forced, torch.inf)
    count = torch.full((1, 1, 1), topk, dtype=torch.int32, device=device)
    blocks = select_blocks(scores, count, always=forced, backend=backend_of("block_mask", backend))
    return mask_of(blocks.repeat_interleave(query.shape[1] // max(heads, 1), 1), query, key, size, backend)
