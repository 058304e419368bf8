"""Filling masked places from their neighbours (Balasubramanian and Feizi, "Towards improved input masking for
convolutional neural networks", ICCV 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrx._checks import accumulation_dtype


def _window_sum(x: Tensor) -> Tensor:
    """Sums of 3 x 3 windows, added as every backend does: each row from left to right, then the rows from top down."""
    padded = F.pad(x, (1, 1, 1, 1))
    rows = padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]
    return rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :]


def neighbor_fill(input: Tensor, mask: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    accumulate = accumulation_dtype(input.dtype)
    # in the input's layout, which the result takes from here
    kept = torch.empty_like(input, dtype=torch.bool).copy_(mask)
    # a select, not a product: a masked NaN or infinity is masked
    filled = torch.where(kept, input.detach(), torch.zeros((), dtype=input.dtype, device=input.device))
    present = mask.clone()
    for _ in range(iterations):
        count = _window_sum(present.to(accumulate))
        fills = _window_sum(filled.to(accumulate)) / (count + 1e-5)
        filled = torch.where(present, filled, fills.to(input.dtype))
        present = present | (count > 0)
    return torch.where(kept, input, filled), present
