"""Dropout by Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
LOW32 = 0xFFFFFFFF


def philox(seed: Tensor, group: Tensor, sample: Tensor | int, domain: int = 0) -> Tensor:
    """The four words, int64 in [0, 2**32), of counters (group, sample, domain): (*group.shape, 4)."""
    key0, key1 = seed.reshape(()) & LOW32, (seed.reshape(()) >> 32) & LOW32
    c0, c1 = group & LOW32, group >> 32
    c2, c3 = torch.zeros_like(group) + sample, torch.full_like(group, domain)
    for _ in range(10):
        # int64 products wrap, which leaves all 64 bits right; the mask undoes the arithmetic shift's sign
        product0, product1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = (
            ((product1 >> 32) & LOW32) ^ c1 ^ key0,
            product1 & LOW32,
            ((product0 >> 32) & LOW32) ^ c3 ^ key1,
            product0 & LOW32,
        )
        key0, key1 = (key0 + W0) & LOW32, (key1 + W1) & LOW32
    return torch.stack([c0, c1, c2, c3], dim=-1)


def lanes(seed: Tensor, numel: int, sample: int) -> Tensor:
    """The 16-bit lanes u of elements 0 .. numel - 1, int64: counter (i div 8, sample), lane i mod 8."""
    words = philox(seed, torch.arange((numel + 7) // 8, device=seed.device), sample)
    return torch.stack([words & 0xFFFF, words >> 16], dim=2).reshape(-1)[:numel]


def pack_bits(mask: Tensor) -> Tensor:
    """uint8 (..., ceil(D / 8)) of a bool (..., D): bit j of byte k is element 8k + j, bits beyond the row are 0."""
    size = mask.shape[-1]
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -size % 8)).unflatten(-1, ((size + 7) // 8, 8))
    return (bits << torch.arange(8, device=mask.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, size: int) -> Tensor:
    """bool (..., size) of what `pack_bits` made."""
    lanes = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits[..., None] >> lanes & 1).bool().flatten(-2)[..., :size]


def dropout_mask(
    seed: Tensor, shape: Sequence[int], threshold: int, sample: int, antithetic: bool, packed: bool
) -> Tensor:
    """Bool mask of `shape`, True where kept; packed: uint8 (..., ceil(D / 8)), bit j of byte k is element 8k + j."""
    second = antithetic and sample % 2 == 1
    u = lanes(seed, math.prod(shape), sample - 1 if second else sample)
    mask = ((65535 - u if second else u) >= threshold).reshape(tuple(shape))
    return pack_bits(mask) if packed else mask


def scale(threshold: int) -> float:
    """What a kept element is multiplied by, so that the expectation is exact."""
    return 65536 / (65536 - threshold)


def dropout(input: Tensor, seed: Tensor, threshold: int, sample: int = 0, antithetic: bool = False) -> Tensor:
    # in the input's layout, which the result takes from here
    mask = torch.empty_like(input, dtype=torch.bool).copy_(
        dropout_mask(seed, input.shape, threshold, sample, antithetic, False)
    )
    kept = input if threshold == 0 else input * scale(threshold)
    # a select, not a product: a dropped NaN or infinity is dropped
    return torch.where(mask, kept, torch.zeros((), dtype=input.dtype, device=input.device))
