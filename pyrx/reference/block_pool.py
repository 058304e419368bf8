"""Means of blocks of tokens and how alike a block's tokens are: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrx._checks import accumulation_dtype


def block_pool(x: Tensor, mean: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """(means (B, H, N, D), similarity (B, H, N)) in float32 (float64 for float64) of x (B, H, S, D), less `mean`
    (B, H, D), in blocks of `block` tokens, the last one as many as there are. The similarity is the mean cosine of all
    pairs of a block's tokens, each with itself too: |sum of x / |x||^2 / n^2; a zero token has no direction, 0."""
    x = x.to(accumulation_dtype(x.dtype))
    if mean is not None:
        x = x - mean[:, :, None]
    tokens = x.shape[2]
    count = -(-tokens // block)
    sizes = (tokens - block * torch.arange(count, device=x.device)).clamp(max=block).to(x.dtype)
    norm = x.norm(dim=-1, keepdim=True)
    directions = x / torch.where(norm == 0, 1, norm)

    def sums(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, 0, 0, -tokens % block)).unflatten(2, (count, block)).sum(3)

    return sums(x) / sizes[:, None], sums(directions).square().sum(-1) / sizes.square()
