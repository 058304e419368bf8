"""What attention's edits compute beside the attention itself, in plain PyTorch: the definition; differentiable."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyrx._checks import accumulation_dtype
from pyrx.reference.block_mask import dense_blocks
from pyrx.reference.block_sparse_attention import attention_logits, expand_blocks, softmax


def reversed_attention(
    u: Tensor,
    query: Tensor,
    key: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    q_counts: Tensor,
    q_indices: Tensor,
    q_block: int,
    k_block: int,
    *logits_of: Any,
) -> Tensor:
    """(B, Hkv, Sk, Du): A^T u, A (B, H, Sq, Sk) the attention, summed over the query heads of a key head. O(Sq Sk)
    memory."""
    logits, visible = attention_logits(query, key, *logits_of)
    queries, keys = logits.shape[-2:]
    blocks = dense_blocks(kv_counts, kv_indices, -(-keys // k_block))
    visible = visible & expand_blocks(blocks, q_block, k_block, queries, keys)
    probabilities, _, _ = softmax(logits, visible)
    received = probabilities.transpose(-1, -2) @ u.to(probabilities.dtype)
    heads = key.shape[1]
    return received.unflatten(1, (heads, query.shape[1] // max(heads, 1))).sum(2).to(query.dtype)


def with_own_key(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """The attention whose result over other keys is `out`, of log-sum-exp `lse`, when each query sees the key of its
    position too, where `visible` (B, S)."""
    kind, dtype, kv_heads = query.dtype, accumulation_dtype(query.dtype), key.shape[1]
    group = query.shape[1] // max(kv_heads, 1)
    # (B, Hkv, G, S, D) beside (B, Hkv, 1, S, D): grouped queries share their key without copies of it
    out, query, lse = (each.to(dtype).unflatten(1, (kv_heads, group)) for each in (out, query, lse))
    key, value = key.to(dtype)[:, :, None], value.to(dtype)[:, :, None]
    logit = (query * key).sum(-1) * scale
    if softcap > 0:
        logit = softcap * torch.tanh(logit / softcap)
    share = torch.sigmoid(logit - lse)
    if visible is not None:
        share = torch.where(visible[:, None, None], share, 0)
    return torch.lerp(out, value, share[..., None]).flatten(1, 2).to(kind)


def kept_tokens(importance: Tensor, keep_rate: float, keyframe: tuple[int, int]) -> Tensor:
    """int64 (B, K), ascending: the keyframe's tokens and the most important others, ceil(keep_rate N) in all (at least
    the keyframe's); of equals the first."""
    tokens, (start, stop) = importance.shape[1], keyframe
    count = max(math.ceil(keep_rate * tokens), stop - start)
    position = torch.arange(tokens, device=importance.device)
    key = (position >= start) & (position < stop)
    ranked = torch.argsort(torch.where(key, torch.inf, importance), dim=1, descending=True, stable=True)
    # a token that is as important as the keyframe's must not come before them
    ranked = ranked.gather(1, torch.argsort(~key[ranked], dim=1, stable=True))
    return ranked[:, :count].sort(dim=1).values
