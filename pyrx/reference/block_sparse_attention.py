"""Attention over listed blocks in plain PyTorch: the definition. Dense, O(Sq Sk) memory; differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrx._checks import accumulation_dtype
from pyrx.reference import dropout
from pyrx.reference.block_mask import dense_blocks


def visible_keys(
    queries: int,
    keys: int,
    left: int,
    right: int,
    key_range: Tensor | None,
    key_mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """bool (B or 1, 1, Sq, Sk): whether a query may see a key, but for the blocks."""
    q, k = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    visible = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if left >= 0:
        visible = visible & (k >= q - left)
    if right >= 0:
        visible = visible & (k <= q + right)
    if key_range is not None:
        low, high = key_range[:, None, :, :, None].unbind(3)
        visible = visible & (k >= low) & (k < high)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    return visible


def key_bias(row_bias: Tensor, column_bias: Tensor | None, keys: int) -> Tensor:
    """(B or 1, H or 1, Sq, Sk): row[k // C] + column[k % C] of key k, C the columns; without them row[k]."""
    k = torch.arange(keys, device=row_bias.device)
    if column_bias is None:
        return row_bias[..., k]
    return row_bias[..., k // column_bias.shape[-1]] + column_bias[..., k % column_bias.shape[-1]]


def attention_logits(
    query: Tensor,
    key: Tensor,
    left: int,
    right: int,
    key_range: Tensor | None,
    key_mask: Tensor | None,
    query_scale: Tensor | None,
    row_bias: Tensor | None,
    column_bias: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(logits, visible): (B, H, Sq, Sk) in float32 (float64 for float64), and bool that broadcasts to it."""
    dtype = accumulation_dtype(query.dtype)
    key = key.repeat_interleave(query.shape[1] // max(key.shape[1], 1), dim=1)
    logits = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
    if query_scale is not None:
        logits = logits * query_scale[..., None]
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if row_bias is not None:
        column = None if column_bias is None else column_bias.to(dtype)
        logits = logits + key_bias(row_bias.to(dtype), column, key.shape[2])
    visible = visible_keys(query.shape[2], key.shape[2], left, right, key_range, key_mask, query.device)
    return logits, visible


def expand_blocks(blocks: Tensor, q_block: int, k_block: int, queries: int, keys: int) -> Tensor:
    """bool (..., Sq, Sk) of bool blocks (..., NQ, NK)."""
    return blocks.repeat_interleave(q_block, -2)[..., :queries, :].repeat_interleave(k_block, -1)[..., :keys]


def softmax(logits: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(probabilities, lse, entropy) over the visible keys; a row that sees none: 0, minus infinity, 0."""
    hidden = torch.where(visible, logits, -torch.inf)
    if hidden.shape[-1] == 0:
        nothing = hidden.sum(-1)
        return hidden, nothing - torch.inf, nothing
    most = hidden.detach().amax(-1, keepdim=True)
    most = torch.where(most == -torch.inf, 0, most)
    weights = torch.exp(hidden - most)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1, total)
    probabilities = weights / total
    lse = (most + torch.log(total)).squeeze(-1)
    empty = empty.squeeze(-1)
    # a bias of minus infinity hides as well
    mean = (probabilities * torch.where(hidden == -torch.inf, 0, hidden)).sum(-1)
    return probabilities, torch.where(empty, -torch.inf, lse), torch.where(empty, 0, lse - mean)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    q_counts: Tensor,
    q_indices: Tensor,
    q_block: int,
    k_block: int,
    left: int,
    right: int,
    key_range: Tensor | None,
    key_mask: Tensor | None,
    query_scale: Tensor | None,
    row_bias: Tensor | None,
    column_bias: Tensor | None,
    scale: float,
    softcap: float,
    seed: Tensor | None,
    threshold: int,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, entropy); the entropy is empty unless wanted."""
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    logits, visible = attention_logits(
        query, key, left, right, key_range, key_mask, query_scale, row_bias, column_bias, scale, softcap
    )
    blocks = dense_blocks(kv_counts, kv_indices, -(-keys // k_block))
    visible = visible & expand_blocks(blocks, q_block, k_block, queries, keys)
    probabilities, lse, entropy = softmax(logits, visible)
    if seed is not None and threshold > 0:
        mask = dropout.dropout_mask(seed, (batch, heads, queries, keys), threshold, 0, False, False)
        probabilities = torch.where(mask, probabilities * dropout.scale(threshold), 0)
    value = value.repeat_interleave(heads // max(value.shape[1], 1), dim=1)
    out = (probabilities @ value.to(probabilities.dtype)).to(query.dtype)
    return out, lse, entropy if want_entropy else entropy.new_empty(0)
