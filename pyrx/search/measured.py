"""Search by what attention is measured to be, and what a mask keeps of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pyrx import _block_patterns as patterns
from pyrx._attention import meet, window_of
from pyrx._block_checks import check_block_size, check_lists
from pyrx._checks import (
    accumulation_dtype,
    broadcasts,
    check_bool,
    check_choice,
    check_device,
    check_dtype,
    check_integer,
    check_shape,
    fail,
)
from pyrx._linear import without_autocast
from pyrx.ops.block_mask import BlockMask, select_blocks
from pyrx.ops.block_mass import block_mass, block_recall
from pyrx.ops.block_sparse_attention import block_sparse_attention, check_mask
from pyrx.search.common import (
    MOST_INT,
    backend_of,
    check_inputs,
    check_query_mask,
    check_share,
    logits_for,
    mask_of,
    reach,
)


def _check_text(op: str, text_tokens: object) -> tuple[int, int]:
    if not isinstance(text_tokens, (tuple, list)) or len(text_tokens) != 2:
        fail(op, "text_tokens", "to be a pair (start, stop)", repr(text_tokens), TypeError)
    for each in text_tokens:
        check_integer(op, "text_tokens", each, 0, MOST_INT)
    return text_tokens[0], text_tokens[1]


def _always_of(
    op: str,
    always: Tensor | None,
    text_tokens: tuple[int, int] | None,
    query: Tensor,
    key: Tensor,
    size: tuple[int, int],
) -> Tensor | None:
    """bool that broadcasts to (B, H, NQ, NK), or None."""
    lengths = query.shape[2], key.shape[2]
    if always is not None:
        check_dtype(op, "always", always, torch.bool)
        full = [*query.shape[:2], *patterns.blocks_of(lengths, size)]
        shape = [1] * (4 - always.dim()) + list(always.shape)
        if not broadcasts(shape, full):
            fail(op, "always", f"of a shape that broadcasts to the blocks' {full}", list(always.shape))
        check_device(op, "always", always, query.device)
        always = always.view(shape)
    if text_tokens is None:
        return always
    start, stop = _check_text(op, text_tokens)
    if lengths[0] != lengths[1] or not start <= stop <= lengths[1]:
        expected = f"within the tokens that are queries and keys, [0, {lengths[1]}]"
        fail(op, "text_tokens", expected, f"({start}, {stop}) of {lengths[0]} queries")
    position = torch.arange(lengths[1], device=query.device)
    rows, columns = (patterns.touched_blocks((position >= start) & (position < stop), each) for each in size)
    text = rows[:, None] | columns
    return text[None, None] if always is None else always | text


def _check_within(op: str, within: object, query: Tensor, key: Tensor, size: tuple[int, int]) -> None:
    mask = check_mask(op, within, query, key, "within")
    if tuple(mask.block_size) != size:
        fail(op, "within", f"of block_size {list(size)}", list(mask.block_size))
    check_lists(op, mask.lists, *size, query, key)


def _share(mass: Tensor, blocks: Tensor) -> Tensor:
    """(B, H): the share of the mass (B, H, NQ, NK) in the blocks, 1 where there is none."""
    total = mass.sum((-1, -2))
    return torch.where(total > 0, torch.where(blocks, mass, 0).sum((-1, -2)) / total.clamp(min=1e-30), 1)


def head_sparsities(recalls: Tensor, sparsity: float, threshold: float) -> Tensor:
    """Of each head (B, H) a sparsity of its own, their mean the given one.

    Of H heads the n with the highest recall, as many as are above the threshold but at most H // 2, get (1 + s) / 2,
    the n with the lowest (3 s - 1) / 2, the others s. Below s = 1/3 the second would be negative: 2 s and 0 then.
    """
    heads = recalls.shape[-1]
    count = (recalls > threshold).sum(-1, keepdim=True).clamp(max=heads // 2)
    # ties: the lower head ranks first
    order = torch.sort(recalls, dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(heads, device=order.device).expand_as(order))
    spread = min((1 - sparsity) / 2, sparsity)
    step = (rank < count).to(recalls.dtype) - (rank >= heads - count).to(recalls.dtype)
    return sparsity + spread * step


@torch.no_grad()
def lse_cached(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    block_size: int | tuple[int, int] = 64,
    sparsity: float = 0.8,
    always: Tensor | None = None,
    text_tokens: tuple[int, int] | None = None,
    head_adaptive: bool = True,
    recall_threshold: float = 0.8,
    is_causal: bool = False,
    window: int | tuple[int, int] | None = None,
    key_mask: Tensor | None = None,
    query_scale: Tensor | None = None,
    bias: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    within: BlockMask | None = None,
    backend: str | None = None,
) -> BlockMask:
    """AdaSpa's search: every row of blocks keeps those with the most attention, measured with a log-sum-exp at hand.

    Args:
        query: (B, H, Sq, D); float16, bfloat16, float32, on the CPU float64 too.
        key: (B, Hkv, Sk, D) of the query's dtype; Hkv is H, or divides it.
        lse: (B, H, Sq) float32 (float64 for float64), as `pyrx.block_sparse_attention(..., return_lse=True)` gave it,
            now or some denoising steps ago: a factor that is the same for a whole query does not change its choice.
        block_size: tokens of a block, 16, 32, 64 or 128, or (queries, keys). Default 64.
        sparsity: share of the blocks that are dropped, of those in reach of a row and not always kept; each row keeps
            one at least. Default 0.8.
        always: bool that broadcasts to (B, H, NQ, NK): blocks kept beside those. Default: none.
        text_tokens: (start, stop) of text tokens in a joint sequence: text-video, video-text and text-text blocks are
            always kept. Default: none.
        head_adaptive: heads whose attention is more concentrated get more of the sparsity (`recall_threshold`), at the
            same mean. Default True.
        recall_threshold: as many heads as recall more than this share of their attention at the given sparsity, but at
            most half, are made sparser, (1 + s) / 2, as many of the lowest recall denser, (3 s - 1) / 2. Default 0.8.
        is_causal, window, key_mask, query_scale, bias, scale, softcap: as in `pyrx.block_sparse_attention`.
        within: `pyrx.BlockMask` of this block_size for these lengths, such as `pyrx.BlockMask.document`: the search is
            among its blocks and under its rule of elements, and so is to be the lse. Default: none.
        backend: "reference", "cpu", "cuda" or "triton", in the steps that have it. Default: the fastest that can serve.

    Returns:
        `pyrx.BlockMask` (B, H), with the rule of elements of is_causal, window and `within`. No gradient.

    Equivalent to, with head_adaptive=False, a `topk` in each row of blocks of the sums over each block of
    `torch.exp(scale * query @ key.mT - lse[..., None])`.

    >>> query, key, value = (torch.randn(1, 2, 256, 32) for _ in range(3))
    >>> out, lse = pyrx.block_sparse_attention(query, key, value, return_lse=True)
    >>> mask = pyrx.search.lse_cached(query, key, lse, block_size=32, sparsity=0.75)
    >>> float(mask.density())
    0.25

    Cost: 2 D operations and an exponential a pair of positions and head, half of a dense forward; O(NQ NK) memory.

    Raises:
        ValueError: shapes, values out of range. TypeError: types and dtypes. RuntimeError: devices, backends.

    Source: Xia et al., "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation" (2025),
    arXiv 2502.21079.
    """
    op = "search.lse_cached"
    size = check_block_size(op, block_size)
    if within is not None:
        check_inputs(op, query, key)
        _check_within(op, within, query, key, size)
    logits = logits_for(
        op,
        query,
        key,
        is_causal=is_causal,
        window=window,
        key_mask=key_mask,
        query_scale=query_scale,
        bias=bias,
        scale=scale,
        softcap=softcap,
        mask=within,
    )
    check_dtype(op, "lse", lse, accumulation_dtype(query.dtype))
    check_shape(op, "lse", lse, "[B, H, Sq]", query.shape[:3])
    check_device(op, "lse", lse, query.device)
    check_share(op, "sparsity", sparsity)
    check_share(op, "recall_threshold", recall_threshold)
    check_bool(op, head_adaptive=head_adaptive)
    kept = _always_of(op, always, text_tokens, query, key, size)
    mass = block_mass(query, key, lse, size, logits, backend_of("block_mass", backend)).float()
    reachable, diagonal = reach(query, key, size, logits.left, logits.right, key_mask)
    if within is not None:
        listed = within.to_dense()
        if within.key_range is not None:
            listed = listed & patterns.range_blocks(within.key_range, within.seq_lengths, size)
        reachable, diagonal = reachable & listed, diagonal & listed
    kept = diagonal if kept is None else (kept | diagonal) & reachable
    candidates = reachable & ~kept
    scores = mass.masked_fill(~candidates, -torch.inf)
    room = candidates.sum(-1)

    def select(sparsities: Tensor | float) -> Tensor:
        count = ((1 - sparsities) * room).round().clamp(min=1).to(torch.int32)
        return select_blocks(scores, count, always=kept, backend=backend_of("block_mask", backend))

    blocks = select(float(sparsity))
    if head_adaptive and query.shape[1] > 1:
        blocks = select(head_sparsities(_share(mass, blocks), sparsity, recall_threshold)[..., None])
    return mask_of(blocks, query, key, size, logits, backend)


def _visible_mean(shares: Tensor, query_mask: Tensor | None, dims: tuple[int, ...]) -> Tensor:
    """Of shares (B, H, Sq) over the visible queries; 1 where there is none."""
    if query_mask is None:
        return shares.mean(dims)
    visible = query_mask[:, None].expand_as(shares)
    count = visible.sum(dims)
    return torch.where(count > 0, torch.where(visible, shares, 0).sum(dims) / count.clamp(min=1), 1)


@torch.no_grad()
def recall(
    query: Tensor,
    key: Tensor,
    block_mask: BlockMask,
    *,
    per: str = "all",
    is_causal: bool = False,
    window: int | tuple[int, int] | None = None,
    key_mask: Tensor | None = None,
    query_scale: Tensor | None = None,
    bias: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    query_mask: Tensor | None = None,
    within: BlockMask | None = None,
    backend: str | None = None,
) -> Tensor:
    """The share of the attention that a mask keeps, exactly, by its blocks and its rule of elements.

    Args:
        query, key: as in `lse_cached`.
        block_mask: `pyrx.BlockMask` for these lengths.
        per: "all": one number, the mean over queries; "head": (B, H); "query": (B, H, Sq). Default "all".
        is_causal, window, key_mask, query_scale, bias, scale, softcap: as in `pyrx.block_sparse_attention`; they say
            what the whole attention is.
        query_mask: bool (B, Sq), False where a query is padding, which means leave out. Default: none.
        within: `pyrx.BlockMask` of the same block sizes that says it too, such as `pyrx.BlockMask.document`. Default:
            every block.
        backend: as in `lse_cached`.

    Returns:
        Shares in [0, 1], float32 (float64 for float64); of a query that sees no key, or is padding, 1. No gradient.

    Cost: 2 D operations and an exponential a pair of positions and head, and as many again a pair that the mask keeps
    where its rule of elements is narrower than the arguments' or `within` is given; O(Sq + NQ NK) memory.

    Raises: as `lse_cached`.

    Equivalent to summing softmax(logits) over the pairs that the mask lets see each other.
    """
    op = "search.recall"
    check_choice(op, "per", per, ("all", "head", "query"))
    check_inputs(op, query, key)
    mask = check_mask(op, block_mask, query, key)
    check_query_mask(op, query, query_mask)
    arguments: dict[str, Any] = {
        "is_causal": is_causal,
        "window": window,
        "key_mask": key_mask,
        "query_scale": query_scale,
        "bias": bias,
        "scale": scale,
        "softcap": softcap,
    }
    logits = logits_for(op, query, key, **arguments)
    if within is not None:
        _check_within(op, within, query, key, mask.block_size)
    limits = (logits.left, logits.right)
    if within is None and mask.key_range is None and meet(limits, mask.window) == limits:
        shares = block_recall(query, key, mask.to_dense(), mask.block_size, logits, backend_of("block_mass", backend))
    else:
        chosen = backend_of("block_sparse_attention", backend)
        value = key.new_zeros((*key.shape[:3], 1))

        def lse_of(own: BlockMask | None) -> Tensor:
            with without_autocast(query.device.type):
                found = block_sparse_attention(
                    query, key, value, own, return_lse=True, enable_gqa=True, backend=chosen, **arguments
                )
            return found[1]

        whole = lse_of(within)
        # minus infinity less itself is NaN
        shares = (lse_of(mask if within is None else mask & within) - whole).exp().clamp(max=1)
        shares = torch.where(whole == -torch.inf, 1, shares)
    if per == "query":
        return shares if query_mask is None else torch.where(query_mask[:, None], shares, 1)
    return _visible_mean(shares, query_mask, (-1,) if per == "head" else (0, 1, 2))


class AdaptiveSparseAttention(nn.Module):
    """AdaSpa's attention of one layer across denoising steps: dense at first, then over blocks found now and then.

    Up to `warmup` attention is dense. The first search takes the log-sum-exp of a dense step and a pass over the logits
    (`lse_cached`); later ones take that pass with the log-sum-exp of the first; the steps between use the blocks found.
    Where no mask is there yet after the warm-up, or the shapes are new, the step searches as the first one does. A step
    below the one before begins a new run: what was found is forgotten.

    Args:
        sparsity: share of the blocks that are dropped. Default 0.8.
        block_size: tokens of a block, 16, 32, 64 or 128, or (queries, keys). Default 64.
        warmup: how many steps are dense. Default 10.
        search_steps: the steps that search, counted from 1. Default (10, 30), the paper's for 50 steps.
        text_tokens, head_adaptive, recall_threshold: as in `lse_cached`.
        is_causal, window, scale, softcap: as in `pyrx.block_sparse_attention`.
        backend: "reference", "cpu" or "triton". Default: the fastest that can serve.

    Attributes:
        block_mask: the mask in use, `pyrx.BlockMask`, or None.
        lse: (B, H, Sq), the log-sum-exp that searches use, or None. Neither is part of the state dict.

    One module for every layer: each holds its own. Guidance goes through as one batch.

    Cost: of `pyrx.block_sparse_attention`, dense or of the blocks found; of `lse_cached` in steps that search.

    Raises: as `lse_cached`; ValueError for steps below 1.

    Source: Xia et al., "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation" (2025),
    arXiv 2502.21079.
    """

    warmup: int
    search_steps: tuple[int, ...]
    step: int

    def __init__(
        self,
        *,
        sparsity: float = 0.8,
        block_size: int | tuple[int, int] = 64,
        warmup: int = 10,
        search_steps: Iterable[int] = (10, 30),
        text_tokens: tuple[int, int] | None = None,
        head_adaptive: bool = True,
        recall_threshold: float = 0.8,
        is_causal: bool = False,
        window: int | tuple[int, int] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        op = "search.AdaptiveSparseAttention"
        check_share(op, "sparsity", sparsity)
        check_share(op, "recall_threshold", recall_threshold)
        check_bool(op, head_adaptive=head_adaptive, is_causal=is_causal)
        check_block_size(op, block_size)
        check_integer(op, "warmup", warmup, 0, MOST_INT)
        if text_tokens is not None:
            _check_text(op, text_tokens)
        window_of(op, window, is_causal)
        if not isinstance(search_steps, Iterable):
            fail(op, "search_steps", "to be ints", type(search_steps).__name__, TypeError)
        self.warmup, self.search_steps = warmup, tuple(search_steps)
        for each in self.search_steps:
            check_integer(op, "search_steps", each, 1, MOST_INT)
        self.search_options: dict[str, Any] = {
            "sparsity": sparsity,
            "block_size": block_size,
            "text_tokens": text_tokens,
            "head_adaptive": head_adaptive,
            "recall_threshold": recall_threshold,
        }
        self.logits: dict[str, Any] = {
            "is_causal": is_causal,
            "window": window,
            "scale": scale,
            "softcap": softcap,
            "backend": backend,
        }
        self.reset()

    def reset(self) -> None:
        """Forgets what was found, for a new run."""
        self.lse: Tensor | None = None
        self.block_mask: BlockMask | None = None
        self.step = 0

    def extra_repr(self) -> str:
        return f"warmup={self.warmup}, search_steps={self.search_steps}, " + ", ".join(
            f"{name}={value}" for name, value in self.search_options.items()
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        step: int,
        *,
        key_mask: Tensor | None = None,
        within: BlockMask | None = None,
    ) -> Any:
        """(B, H, Sq, Dv) of query, key and value as in `pyrx.block_sparse_attention`; `step` counts from 1. `within` as
        in `lse_cached`: what dense steps attend to as well."""
        op = "search.AdaptiveSparseAttention"
        check_integer(op, "step", step, 1, MOST_INT)
        check_inputs(op, query, key)
        if step < self.step or not self._fits(query, key):
            self.reset()
        self.step = step
        arguments = {**self.logits, "key_mask": key_mask}
        search = step in self.search_steps or (step > self.warmup and self.block_mask is None)
        if step <= self.warmup or self.block_mask is None:
            found: Any = block_sparse_attention(
                query, key, value, within, enable_gqa=True, return_lse=search, **arguments
            )
            if not search:
                return found
            out, lse = found
            self.lse = lse.detach()
            self.block_mask = lse_cached(query, key, lse, within=within, **self.search_options, **arguments)
            return out
        if search and self.lse is not None:
            self.block_mask = lse_cached(query, key, self.lse, within=within, **self.search_options, **arguments)
        return block_sparse_attention(query, key, value, self.block_mask, enable_gqa=True, **arguments)

    def _fits(self, query: Tensor, key: Tensor) -> bool:
        """Whether what was found is for these shapes and this device."""
        if self.lse is None or self.block_mask is None:
            return True
        lengths = (query.shape[2], key.shape[2])
        shapes = self.lse.shape == query.shape[:3] and self.block_mask.seq_lengths == lengths
        return shapes and self.lse.device == query.device
