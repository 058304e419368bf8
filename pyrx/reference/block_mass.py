"""The attention mass of every block, and the share that a mask keeps: the definition. Dense, O(Sq Sk) memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrx.reference.block_sparse_attention import attention_logits, expand_blocks, softmax


def block_mass(query: Tensor, key: Tensor, lse: Tensor, q_block: int, k_block: int, *logits_of: Any) -> Tensor:
    """(B, H, NQ, NK) float32 (float64 for float64): the sum over a block of exp(logit - lse) of what is visible."""
    logits, visible = attention_logits(query, key, *logits_of)
    weights = torch.where(visible & (lse != -torch.inf)[..., None], torch.exp(logits - lse[..., None]), 0)
    queries, keys = weights.shape[-2:]
    padded = torch.nn.functional.pad(weights, (0, -keys % k_block, 0, -queries % q_block))
    return padded.unflatten(-1, (-(-keys // k_block), k_block)).unflatten(-3, (-1, q_block)).sum((-1, -3))


def block_recall(query: Tensor, key: Tensor, blocks: Tensor, q_block: int, k_block: int, *logits_of: Any) -> Tensor:
    """(B, H, Sq): the share of a query's attention that lies in `blocks`, bool (B or 1, H or 1, NQ, NK); 1 where it
    sees no key."""
    logits, visible = attention_logits(query, key, *logits_of)
    probabilities, lse, _ = softmax(logits, visible)
    kept = expand_blocks(blocks, q_block, k_block, *logits.shape[-2:])
    return torch.where(lse == -torch.inf, 1, torch.where(kept, probabilities, 0).sum(-1))
