"""Compressed N:M weights in Triton: a program takes a block of groups. Products are torch's, of the dense one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrx.ops import nm_packed as ops

from .dropout import check_narrow

# Elements of the dense weight that a program works on.
BLOCK = 1024


@triton.jit
def _groups(groups, m, GROUPS: tl.constexpr, M: tl.constexpr):
    """(groups of the program, places in a group, which elements are there)."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    place = tl.arange(0, M)
    return group, place[None, :], (group < groups)[:, None] & (place < m)[None, :]


# Bytes: the kept values and the bits in, values and indices out. Operations: two scans of each group.
@triton.jit
def _compress_kernel(
    weight, bits, values, indices, groups, row_groups, row_bytes, n, m, GROUPS: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    group, place, there = _groups(groups, m, GROUPS, M)
    column = (group % row_groups)[:, None] * m + place
    byte = tl.load(bits + (group // row_groups)[:, None] * row_bytes + column // 8, mask=there, other=0)
    kept = (byte.to(tl.int32) >> (column % 8).to(tl.int32)) & 1
    gaps = place - (tl.cumsum(kept, axis=1) - kept)
    missing = tl.maximum(n - tl.sum(kept, axis=1), 0)[:, None]
    stored = ((kept != 0) | (gaps < missing)).to(tl.int32)
    slot = tl.cumsum(stored, axis=1) - stored
    stored = there & (stored != 0) & (slot < n)
    own = tl.load(weight + group[:, None] * m + place, mask=stored & (kept != 0), other=0)
    at = group[:, None] * n + slot
    tl.store(values + at, own, mask=stored)
    tl.store(indices + at, (place + slot * 0).to(tl.uint8), mask=stored)


# Bytes: values, indices and the dense weight, each once. Operations: n compares an element.
@triton.jit
def _decompress_kernel(values, indices, output, groups, n, m, GROUPS: tl.constexpr, M: tl.constexpr):
    group, place, there = _groups(groups, m, GROUPS, M)
    inside = group < groups
    dense = tl.zeros((GROUPS, M), output.dtype.element_ty)
    for j in range(n):
        own = tl.load(values + group * n + j, mask=inside, other=0)
        index = tl.load(indices + group * n + j, mask=inside, other=0).to(tl.int32)
        dense = tl.where(place == index[:, None], own[:, None], dense)
    tl.store(output + group[:, None] * m + place, dense, mask=there)


def _blocks(groups: int, m: int) -> tuple[tuple[int], int, int]:
    size = triton.next_power_of_2(m)
    count = BLOCK // size
    return (triton.cdiv(groups, count),), count, size


def nm_compress(weight: Tensor, bits: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    values, indices = ops._compress_fake(weight, bits, n, m)
    check_narrow("nm_compress", weight)
    weight, bits = weight.contiguous(), bits.contiguous()
    if weight.numel() == 0:
        return values, indices
    grid, count, size = _blocks(weight.numel() // m, m)
    row_groups = weight.shape[-1] // m
    with torch.cuda.device_of(weight):
        _compress_kernel[grid](
            weight, bits, values, indices, weight.numel() // m, row_groups, bits.shape[-1], n, m, count, size
        )
    return values, indices


def _decompressed(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    values, indices = values.contiguous(), indices.contiguous()
    output = ops._decompress_fake(values, indices, n, m)
    if output.numel() == 0:
        return output
    grid, count, size = _blocks(values.numel() // n, m)
    with torch.cuda.device_of(values):
        _decompress_kernel[grid](values, indices, output, values.numel() // n, n, m, count, size)
    return output


def nm_decompress(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    ops._check_packed("nm_decompress", values, indices, n, m)
    check_narrow("nm_decompress", values)
    return _decompressed(values, indices, n, m)


def nm_linear(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    ops._check_linear(x, values, indices, bias, n, m)
    check_narrow("nm_linear", values)
    return torch.nn.functional.linear(x, _decompressed(values, indices, n, m), bias)
