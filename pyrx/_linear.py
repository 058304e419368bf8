"""What ops that contain a linear layer share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_autocast(device_type: str) -> bool:
    """torch.is_autocast_enabled, which raises for the meta device."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast(tensors: Sequence[Tensor | None], device_type: str) -> list[Tensor | None]:
    """As F.linear's operands are cast under autocast: to its dtype, float64 left alone."""
    dtype = torch.get_autocast_dtype(device_type)
    return [each if each is None or each.dtype == torch.float64 else each.to(dtype) for each in tensors]


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Products stay in the operands' dtype; the meta device has no autocast to leave."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def rows_of(tensor: Tensor) -> Tensor:
    """(..., D) as (rows, D); reshape(-1, D) cannot where D is 0."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)
