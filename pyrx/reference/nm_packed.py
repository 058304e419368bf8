"""Compressed N:M weights, by their definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrx.reference.dropout import unpack_bits


def columns_of(indices: Tensor, n: int, m: int) -> Tensor:
    """int64 columns of the dense weight (..., C) that positions in groups (..., C / m * n) are."""
    group = torch.arange(indices.shape[-1], device=indices.device) // n
    return indices.long() + group * m


def most_kept(bits: Tensor, size: int, m: int) -> Tensor:
    """The most elements that a mask (..., size) keeps of any group, a scalar."""
    kept = unpack_bits(bits, size).unflatten(-1, (size // m, m)).sum(-1)
    return torch.cat([kept.flatten(), kept.new_zeros(1)]).amax()


def _integers(values: Tensor) -> Tensor:
    """Their bits: gather and scatter of floats touch NaN's."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def nm_compress(weight: Tensor, bits: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    groups = _integers(weight.detach().contiguous().resolve_neg()).unflatten(-1, (weight.shape[-1] // m, m))
    kept = unpack_bits(bits, weight.shape[-1]).unflatten(-1, (weight.shape[-1] // m, m))
    # kept ones first, then the others, each in order; the first n of them, by position
    found = (~kept).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :n].sort(dim=-1).values
    values = torch.where(kept, groups, 0).gather(-1, found).flatten(-2)
    return values.view(weight.dtype), found.to(torch.uint8).flatten(-2)


class _Decompress(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, columns: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(columns)
        dense = values.new_zeros((*values.shape[:-1], size))
        _integers(dense).scatter_(-1, columns, _integers(values.contiguous().resolve_neg()))
        return dense

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (columns,) = ctx.saved_tensors
        return grad.gather(-1, columns), None, None


def nm_decompress(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    return _Decompress.apply(values, columns_of(indices, n, m), values.shape[-1] // n * m)


def nm_linear(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    return torch.nn.functional.linear(x, nm_decompress(values, indices, n, m), bias)
