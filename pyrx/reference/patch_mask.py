"""Masks for masked image modelling in plain PyTorch: what csrc/kernels/patch_mask.h defines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyrx.reference.dropout import philox
from pyrx.reference.random import PATCH_DOMAIN, below, exp_negative, sqrt

RANDOM, BLOCK, HARD = range(3)
MOST_PATCHES = 2**31
GROUP = 4
BLOCK_TRIES, BLOCK_DRAWS = 10, 128
BLOCK_COUNTER = 2**31
INT64_MIN = -(2**63)


class Draw(NamedTuple):
    """What is masked: see csrc/kernels/patch_mask.h."""

    method: int
    masked: int
    hard: int
    min_block: int
    log_aspect: float


def _random_keys(seed: Tensor, samples: int, size: int) -> Tensor:
    """(N, L) int64 in [0, 2**63), all of a row different: bits 62 .. 31 a Philox word, below them the patch."""
    index = torch.arange(samples, device=seed.device)[:, None]
    groups = torch.arange((size + GROUP - 1) // GROUP, device=seed.device)
    words = philox(seed, index.expand(samples, groups.numel()), groups, PATCH_DOMAIN).flatten(1)[:, :size]
    return words << 31 | torch.arange(size, device=seed.device)


def _loss_keys(losses: Tensor) -> Tensor:
    """(N, L) int64: the larger the loss the larger, NaN above all; of equal losses the lower patch's is the larger."""
    bits = losses.float().resolve_neg().view(torch.int32).long() & 0xFFFFFFFF
    bits = torch.where(bits == 0x80000000, 0, bits)  # -0 equals 0
    order = torch.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    order = torch.where(bits & 0x7FFFFFFF > 0x7F800000, 0xFFFFFFFF, order)
    return order << 31 | (MOST_PATCHES - 1 - torch.arange(losses.shape[1], device=losses.device))


def _largest(keys: Tensor, count: int) -> Tensor:
    """(N, L) bool: the `count` largest of each row, whose values differ."""
    chosen = torch.zeros_like(keys, dtype=torch.bool)
    return chosen.scatter(1, keys.argsort(dim=1, descending=True)[:, :count], True)


def _blocks(seed: Tensor, samples: int, height: int, width: int, draw: Draw) -> Tensor:
    """(N, Hp, Wp) bool: the union of each sample's rectangles."""
    device = seed.device
    index = torch.arange(samples, device=device)
    y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    union = torch.zeros(samples, height, width, dtype=torch.bool, device=device)
    left, tries = torch.full_like(index, draw.masked), torch.zeros_like(index)
    for attempt in range(BLOCK_DRAWS):
        drawing = (left > 0) & (tries < BLOCK_TRIES)
        # elsewhere this would wait for the device, or be a branch that no graph holds
        if device.type == "cpu" and not torch.compiler.is_compiling() and not drawing.any():
            break
        words = philox(seed, index, BLOCK_COUNTER + attempt, PATCH_DOMAIN)
        u = (words[:, 0].double() + 0.5) * 2.0**-32
        v = ((words[:, 1] & 0x7FFFFFFF).double() + 0.5) * 2.0**-31
        area = draw.min_block + (left - draw.min_block).double() * u
        aspect = exp_negative(draw.log_aspect * v)
        shorter, longer = (sqrt(area * aspect) + 0.5).long(), (sqrt(area / aspect) + 0.5).long()
        tall = words[:, 1] >> 31 == 1
        rows, columns = torch.where(tall, longer, shorter), torch.where(tall, shorter, longer)
        fits = (rows <= height) & (columns <= width)
        y0 = below(words[:, 2], (height - rows + 1).clamp(min=1))[:, None, None]
        x0 = below(words[:, 3], (width - columns + 1).clamp(min=1))[:, None, None]
        inside = (y >= y0) & (y < y0 + rows[:, None, None]) & (x >= x0) & (x < x0 + columns[:, None, None])
        fresh = (inside & ~union).sum((1, 2))
        taken = drawing & fits & (fresh > 0) & (fresh <= left)
        union = union | (inside & taken[:, None, None])
        left, tries = torch.where(taken, left - fresh, left), torch.where(taken, 0, tries + 1)
    return union


def patch_mask(
    seed: Tensor, losses: Tensor | None, shape: Sequence[int], draw: Draw, indices: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(mask, ids_keep, ids_restore): bool of `shape`, True where masked, and int64 (N, keep), (N, L) or empty."""
    samples, size = shape[0], math.prod(shape[1:])
    keys = _random_keys(seed, samples, size)
    if draw.method != RANDOM:
        if losses is not None:
            first = _largest(_loss_keys(losses.reshape(samples, size)), draw.hard)
        else:
            first = _blocks(seed, samples, shape[1], shape[2], draw).flatten(1)
        keys = torch.where(first, keys, keys | INT64_MIN)
    mask = _largest(keys, draw.masked)
    if not indices:
        return mask.reshape(tuple(shape)), keys.new_empty(0), keys.new_empty(0)
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return mask.reshape(tuple(shape)), order[:, : size - draw.masked].contiguous(), order.argsort(dim=1)
