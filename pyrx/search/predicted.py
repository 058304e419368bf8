"""Search by a guess at attention from a part of it: means of blocks, or the last queries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyrx import _block_patterns as patterns
from pyrx._attention import Logits
from pyrx._block_checks import check_block_size
from pyrx._checks import accumulation_dtype, check_integer, check_number
from pyrx.ops.block_mask import BlockMask, select_blocks
from pyrx.ops.block_pool import block_pool
from pyrx.search.common import (
    MOST_INT,
    backend_of,
    by_group,
    check_query_mask,
    check_share,
    logits_for,
    mask_of,
    products,
    reach,
    visible_ends,
)

# of MInference: how many of the first keys and of the nearest diagonals take part whatever their scores
FIRST_KEYS, NEAR_DIAGONALS = 30, 100


def _pooled(
    x: Tensor, block: int, mask: Tensor | None, backend: str | None, centred: bool = False
) -> tuple[Tensor, Tensor]:
    """block_pool of the visible tokens, mask bool (B, S), 0 where a block has none; `centred`: less their mean."""
    chosen = backend_of("block_pool", backend)
    dtype = accumulation_dtype(x.dtype)
    if mask is None:
        return block_pool(x, block, x.mean(2, dtype=dtype) if centred else None, chosen)
    # a token of zeros adds nothing to either: only what is divided by is another
    visible = mask[:, None, :, None]
    x = torch.where(visible, x, 0)
    if centred:
        x = x.to(dtype)
        x = torch.where(visible, x - x.sum(2, keepdim=True) / visible.sum(2, keepdim=True).clamp(min=1), 0)
    means, similarity = block_pool(x, block, backend=chosen)
    tokens, count = x.shape[2], means.shape[2]
    seen = pad(mask, (0, count * block - tokens)).unflatten(-1, (count, block)).sum(-1)
    sizes = (tokens - block * torch.arange(count, device=x.device)).clamp(max=block)
    share = (sizes / seen.clamp(min=1)).to(dtype)[:, None]
    return means * share[..., None], similarity * share.square()


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
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
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
        is_causal: as in `pyrx.block_sparse_attention`; the mask brings it there. Default False.
        key_mask: bool (B, Sk), False where a key is hidden: it takes no part in means, scores or places, and blocks
            without another are dropped. To be passed to both. Default: none.
        query_mask: bool (B, Sq), False where a query is padding: the same, for queries. Default: none.
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
    logits = logits_for(op, query, key, is_causal=is_causal, key_mask=key_mask, scale=scale)
    check_query_mask(op, query, query_mask)
    size = check_block_size(op, block_size)
    check_number(op, "similarity_threshold", similarity_threshold)
    check_share(op, "mass", mass)
    if topk is not None:
        check_share(op, "topk", topk)
    q_mean, q_similarity = _pooled(query, size[0], query_mask, backend)
    k_mean, k_similarity = _pooled(key, size[1], key_mask, backend, centred=True)
    group = query.shape[1] // max(key.shape[1], 1)
    k_mean, k_similarity = k_mean.repeat_interleave(group, 1), k_similarity.repeat_interleave(group, 1)
    q_alike = (q_similarity > similarity_threshold)[..., None]
    k_alike = (k_similarity > similarity_threshold)[:, :, None]
    predicted = products(q_mean, k_mean) * logits.scale
    reachable, diagonal = reach(query, key, size, logits.left, logits.right, key_mask, query_mask)
    candidates = reachable & k_alike
    # a row without candidates is all NaN until the second line
    scores = torch.softmax(torch.where(candidates, predicted, -torch.inf), -1)
    scores = torch.where(candidates, scores, -torch.inf).float()
    count = None if topk is None else (topk * reachable.sum(-1)).round().clamp(min=1).to(torch.int32)
    kept = torch.where(q_alike & k_alike, diagonal, reachable)
    blocks = select_blocks(scores, count, mass, kept, backend_of("block_mask", backend))
    return mask_of(blocks, query, key, size, logits, backend)


def _last_probabilities(
    query: Tensor, key: Tensor, last: int, logits: Logits, query_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, L, Sk) float32: the attention of the last L queries, or of L up to the last visible one of each sample, 0
    where hidden; bool (B or 1, L, Sk): where visible; (B or 1, 1): the position of the first of them."""
    (queries, keys), device = (query.shape[2], key.shape[2]), query.device
    row = torch.arange(last, device=device)
    if query_mask is None:
        first = torch.full((1, 1), queries - last, device=device)
        asked, visible = query[:, :, queries - last :], torch.ones(1, last, keys, dtype=torch.bool, device=device)
    else:
        end = torch.where(query_mask, torch.arange(1, queries + 1, device=device), 0).amax(-1, keepdim=True)
        first = (end - last).clamp(min=0)
        place = first + row
        asked = query.gather(2, place[:, None, :, None].expand(*query.shape[:2], last, query.shape[3]))
        visible = query_mask.gather(1, place)[..., None].expand(-1, -1, keys)
    if logits.key_mask is not None:
        visible = visible & logits.key_mask[:, None]
    if logits.right >= 0:
        visible = visible & (torch.arange(keys, device=device) <= (first + row)[..., None])
    found = products(by_group(asked, key.shape[1]), key[:, :, None]).flatten(1, 2).float() * logits.scale
    probabilities = torch.softmax(found.masked_fill(~visible[:, None], -torch.inf), -1)
    # a query that sees no key is all NaN
    return torch.where(visible[:, None], probabilities, 0), visible, first


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
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
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
        is_causal: as in `pyrx.block_sparse_attention`; the mask brings it there. Default False.
        key_mask: bool (B, Sk), False where a key is hidden: it takes no part in means, scores or places, and blocks
            without another are dropped. To be passed to both. Default: none.
        query_mask: bool (B, Sq), False where a query is padding: the same, for queries. Default: none.
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
    logits = logits_for(op, query, key, is_causal=is_causal, key_mask=key_mask, scale=scale)
    check_query_mask(op, query, query_mask)
    size = check_block_size(op, block_size)
    check_integer(op, "last_queries", last_queries, 1, MOST_INT)
    check_integer(op, "vertical", vertical, 0, MOST_INT)
    check_integer(op, "slash", slash, 0, MOST_INT)
    (queries, keys), device = (query.shape[2], key.shape[2]), query.device
    reachable, diagonal = reach(query, key, size, logits.left, logits.right, key_mask, query_mask)
    if queries == 0 or keys == 0:
        return mask_of(reachable.expand(*query.shape[:2], -1, -1), query, key, size, logits, backend)
    last = min(last_queries, queries)
    probabilities, visible, first_query = _last_probabilities(query, key, last, logits, query_mask)
    # sums are at most `last`: the ones that always take part are above, the first and nearest most
    shown = torch.ones(1, keys, dtype=torch.bool, device=device) if key_mask is None else key_mask
    first = (FIRST_KEYS + 1 - shown.cumsum(-1))[:, None]
    columns = torch.where(first > 0, first + last, probabilities.sum(-2)).masked_fill(~shown[:, None], -torch.inf)
    blocks = patterns.touched_blocks(_largest(columns, vertical), size[1])[:, :, None]

    # distance q - k of diagonal i: i + nearest
    nearest = first_query - keys + 1  # (B or 1, 1)
    distance = (torch.arange(keys + last - 1, device=device) + nearest)[:, None]
    near = NEAR_DIAGONALS - distance.abs()
    diagonals = torch.where(near > 0, near + last, _diagonal_sums(probabilities))
    diagonals = diagonals.masked_fill(_diagonal_sums(visible.float())[:, None] == 0, -torch.inf)
    before = pad(_largest(diagonals, slash).cumsum(-1), (1, 0))
    q_first, q_stop = visible_ends(query, size[0], query_mask)
    k_first, k_stop = visible_ends(key, size[1], key_mask)
    low = q_first[..., None] - k_stop[:, None] + 1 - nearest[..., None]
    high = q_stop[..., None] - k_first[:, None] - nearest[..., None]

    def chosen_before(end: Tensor) -> Tensor:
        """(B, H, NQ, NK): how many diagonals are chosen of those before the one of (B or 1, NQ, NK)."""
        places = end.clamp(0, keys + last - 1).flatten(1)[:, None].expand(*query.shape[:2], -1)
        return before.gather(-1, places).unflatten(-1, end.shape[1:])

    blocks = blocks | (chosen_before(high) > chosen_before(low))
    return mask_of(blocks & reachable | diagonal, query, key, size, logits, backend)


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
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
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
        is_causal: as in `pyrx.block_sparse_attention`; the mask brings it there. Default False.
        key_mask: bool (B, Sk), False where a key is hidden: it takes no part in means, scores or places, and blocks
            without another are dropped. To be passed to both. Default: none.
        query_mask: bool (B, Sq), False where a query is padding: the same, for queries. Default: none.
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
    logits = logits_for(op, query, key, is_causal=is_causal, key_mask=key_mask, scale=scale)
    check_query_mask(op, query, query_mask)
    size = check_block_size(op, block_size)
    for name, least, value in (("topk", 1, topk), ("local", 0, local), ("initial", 0, initial)):
        check_integer(op, name, value, least, MOST_INT)
    (queries, keys), heads, device = (query.shape[2], key.shape[2]), key.shape[1], query.device
    q_blocks, k_blocks = patterns.blocks_of((queries, keys), size)
    means, _ = _pooled(key, size[1], key_mask, backend)
    q_first, k_first = patterns.first_tokens((queries, keys), size, device)
    means, groups = means.to(query.dtype), by_group(query, heads)
    stop = visible_ends(key, size[1], key_mask)[1]
    visible = (stop > 0)[:, None]
    if is_causal:
        visible = visible & (stop[:, None] <= torch.arange(1, queries + 1, device=device)[:, None])
    if query_mask is not None:
        visible = visible & query_mask[..., None]

    def summed(head: int) -> Tensor:
        """(B, NQ, NK) of one head of keys."""
        found = products(groups[:, head], means[:, head, None]).float() * logits.scale
        probabilities = torch.softmax(found.masked_fill(~visible[:, None], -torch.inf), -1)
        # a query that sees no block is all NaN
        each = torch.where(visible[:, None], probabilities, 0).sum(1)
        return pad(each, (0, 0, 0, -queries % size[0])).unflatten(1, (q_blocks, size[0])).sum(2)

    # one head at a time: its probabilities are all that is in memory
    scores = (
        torch.stack([summed(head) for head in range(heads)], 1)
        if heads
        else means.new_zeros((query.shape[0], 0, q_blocks, k_blocks), dtype=torch.float32)
    )
    reachable, diagonal = reach(query, key, size, logits.left, logits.right, key_mask, query_mask)
    early = (stop > 0).cumsum(-1)[:, None, None] <= initial
    around = (local - 1) * size[1]
    near = (k_first < q_first + size[0] + around) & (k_first + size[1] > q_first - around)
    forced = (early | near & (local > 0)) & reachable | diagonal
    scores = scores.masked_fill(~reachable, -torch.inf).masked_fill(forced, torch.inf)
    count = torch.full((1, 1, 1), topk, dtype=torch.int32, device=device)
    blocks = select_blocks(scores, count, always=forced, backend=backend_of("block_mask", backend))
    return mask_of(blocks.repeat_interleave(query.shape[1] // max(heads, 1), 1), query, key, size, logits, backend)
