"""Compressed N:M weights, by their definition."""

from __future__ import annotations

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


def nm_compress(weight: Tensor, bits: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    groups = weight.detach().unflatten(-1, (weight.shape[-1] // m, m))
    kept = unpack_bits(bits, weight.shape[-1]).unflatten(-1, (weight.shape[-1] // m, m))
    # kept ones first, then the others, each in order; the first n of them, by position
    found = (~kept).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :n].sort(dim=-1).values
    values = torch.where(kept, groups, torch.zeros((), dtype=weight.dtype, device=weight.device)).gather(-1, found)
    return values.flatten(-2), found.to(torch.uint8).flatten(-2)


def nm_decompress(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    dense = values.new_zeros((*values.shape[:-1], values.shape[-1] // n * m))
    return dense.scatter(-1, columns_of(indices, n, m), values)


def nm_linear(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    return torch.nn.functional.linear(x, nm_decompress(values, indices, n, m), bias)
