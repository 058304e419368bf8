"""What ops that contain a linear layer share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def autocast(tensors: Sequence[Tensor | None], device_type: str) -> list[Tensor | None]:
    """As F.linear's operands are cast under autocast: to its dtype, float64 left alone."""
    dtype = torch.get_autocast_dtype(device_type)
    return [each if each is None or each.dtype == torch.float64 else each.to(dtype) for each in tensors]


def rows_of(tensor: Tensor) -> Tensor:
    """(..., D) as (rows, D); reshape(-1, D) cannot where D is 0."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)
