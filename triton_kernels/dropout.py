"""Philox masks in Triton, and the elementwise kernels over them: masks, dropped copies, the fold of M gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrx._checks import fail
from pyrx.ops import dropout as ops

# Groups of eight elements (one Philox call each) a program works on.
GROUPS = 256

# Numbers that change from call to call and must not each compile a kernel of their own.
_VARYING = ["first", "samples", "threshold"]


@triton.jit
def philox(seed, group, sample, DOMAIN: tl.constexpr = 0):
    """The four words of Philox4x32-10 at counter (low32(group), high32(group), sample, DOMAIN), key *seed."""
    key = tl.load(seed).to(tl.uint64, bitcast=True)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    group = group.to(tl.uint64)
    c0 = group.to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32)
    c2 = (c0 & 0) | sample.to(tl.uint32)
    c3 = (c0 & 0) | DOMAIN
    for _ in tl.static_range(10):
        # one wide product (a single instruction) where tl.philox_impl takes its halves in two
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def scale_of(threshold):
    """65536 / (65536 - threshold), correctly rounded."""
    return tl.div_rn(65536.0, (65536 - threshold).to(tl.float32))


@triton.jit
def sample_mask(sample, ANTITHETIC: tl.constexpr):
    """(counter word 2, what the words are xor-ed with): 65535 - u flips every bit of a lane."""
    second = sample & 1 if ANTITHETIC else sample & 0
    return sample - second, (-second).to(tl.uint32)


@triton.jit
def group_bits(seed, group, sample, threshold, ANTITHETIC: tl.constexpr):
    """int32 per group: bit j tells that element 8 * group + j is kept."""
    counter, flip = sample_mask(sample, ANTITHETIC)
    w0, w1, w2, w3 = philox(seed, group, counter)
    # comparing in the upper half spares unpacking: the low half of a word cannot turn the comparison
    level = threshold.to(tl.uint32) << 16
    w0, w1, w2, w3 = w0 ^ flip, w1 ^ flip, w2 ^ flip, w3 ^ flip
    bits = ((w0 << 16) >= level).to(tl.int32) | ((w0 >= level).to(tl.int32) << 1)
    bits |= (((w1 << 16) >= level).to(tl.int32) << 2) | ((w1 >= level).to(tl.int32) << 3)
    bits |= (((w2 << 16) >= level).to(tl.int32) << 4) | ((w2 >= level).to(tl.int32) << 5)
    bits |= (((w3 << 16) >= level).to(tl.int32) << 6) | ((w3 >= level).to(tl.int32) << 7)
    return bits


@triton.jit
def element_keep(seed, index, sample, threshold, ANTITHETIC: tl.constexpr):
    """Whether each element is kept, for indices in any order: a Philox call an element."""
    counter, flip = sample_mask(sample, ANTITHETIC)
    w0, w1, w2, w3 = philox(seed, index >> 3, counter)
    lane = (index & 7).to(tl.int32)
    low = tl.where(lane < 2, w0, w1)
    high = tl.where(lane < 6, w2, w3)
    word = tl.where(lane < 4, low, high) ^ flip
    return tl.where((lane & 1) == 0, word << 16, word) >= (threshold.to(tl.uint32) << 16)


@triton.jit
def _locate(position, sizes, strides, logical, WIDE: tl.constexpr):
    """(offset under `strides`, logical index) of each position of a dense output; dimensions innermost first."""
    offset = position * 0
    index = position * 0
    if not WIDE:
        position = position.to(tl.int32)  # 64-bit division is a subroutine
    for i in tl.static_range(len(sizes)):
        coordinate = (position % sizes[i]).to(tl.int64)
        position = position // sizes[i]
        offset += coordinate * strides[i]
        index += coordinate * logical[i]
    return offset, index


@triton.jit
def _keep(seed, group, index, sample, threshold, FLAT: tl.constexpr, ANTITHETIC: tl.constexpr):
    if FLAT:
        bits = group_bits(seed, group, sample, threshold, ANTITHETIC)
        keep = ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0
    else:
        keep = element_keep(seed, index, sample, threshold, ANTITHETIC)
    return keep


@triton.jit
def _kept(stored, keep, threshold, scale):
    """What dropout makes of stored values: dropped 0, kept scaled, untouched where nothing can be dropped."""
    scaled = (stored.to(tl.float32) * scale).to(stored.dtype)
    # a product with one would quieten NaNs
    return tl.where(keep, tl.where(threshold == 0, stored, scaled), 0.0)


# Bytes: 1 read and M writes of the input's size. Operations: an element and sample ~10 (Philox / 8, compare, select).
@triton.jit(do_not_specialize=_VARYING)
def _copies_kernel(
    input, output, seed, thresholds, first, samples, threshold, scale, numel, sizes, strides, logical,
    FLAT: tl.constexpr, WIDE: tl.constexpr, ANTITHETIC: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    position = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = position < numel
    offset, index = position, position
    if not FLAT:
        offset, index = _locate(position, sizes, strides, logical, WIDE)
    stored = tl.load(input + offset, mask=inside)
    for m in range(samples):
        if thresholds is not None:
            threshold = tl.load(thresholds + m)
            scale = scale_of(threshold)
        keep = _keep(seed, group, index, tl.cast(first, tl.int64) + m, threshold, FLAT, ANTITHETIC)
        result = _kept(stored, keep, threshold, scale)
        tl.store(output + tl.cast(m, tl.int64) * numel + position, result, mask=inside)


# Bytes: M reads and 1 write of the output's size. Operations: as the copies.
@triton.jit(do_not_specialize=_VARYING)
def _fold_kernel(
    grad, output, seed, thresholds, samples, threshold, scale, numel, sample_stride, sizes, strides, logical,
    FLAT: tl.constexpr, WIDE: tl.constexpr, ANTITHETIC: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    position = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = position < numel
    offset, index = position, position
    if not FLAT:
        offset, index = _locate(position, sizes, strides, logical, WIDE)
    total = tl.zeros((GROUPS, 8), tl.float32)
    for m in range(samples):
        if thresholds is not None:
            threshold = tl.load(thresholds + m)
            scale = scale_of(threshold)
        keep = _keep(seed, group, index, tl.cast(m, tl.int64), threshold, FLAT, ANTITHETIC)
        value = tl.load(grad + tl.cast(m, tl.int64) * sample_stride + offset, mask=inside, other=0.0).to(tl.float32)
        total += _kept(value, keep, threshold, scale)
    tl.store(output + position, total.to(output.dtype.element_ty), mask=inside)


# Bytes: 1 write of a byte an element, or of a bit. Operations: ~80 a group of eight elements (Philox).
@triton.jit(do_not_specialize=["sample", "threshold"])
def _mask_kernel(
    output, seed, sample, threshold, count, width,
    PACKED: tl.constexpr, ALIGNED: tl.constexpr, ANTITHETIC: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """`count` bytes of output; ALIGNED: its groups of eight elements are Philox's, else rows of `width` are packed."""
    byte = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, 8)[None, :]
    sample = tl.cast(sample, tl.int64)
    if PACKED and ALIGNED:
        bits = group_bits(seed, byte, sample, threshold, ANTITHETIC)
        tl.store(output + byte, bits.to(tl.uint8), mask=byte < count)
    elif PACKED:
        row_bytes = (width + 7) // 8
        column = (byte % row_bytes)[:, None] * 8 + lane
        index = (byte // row_bytes)[:, None] * width + column
        keep = element_keep(seed, index, sample, threshold, ANTITHETIC) & (column < width)
        bits = tl.sum(keep.to(tl.int32) << lane, axis=1)
        tl.store(output + byte, bits.to(tl.uint8), mask=byte < count)
    else:
        bits = group_bits(seed, byte, sample, threshold, ANTITHETIC)
        position = byte[:, None] * 8 + lane
        tl.store(output + position, ((bits[:, None] >> lane) & 1).to(tl.uint8), mask=position < count)


def threshold_table(thresholds: Sequence[int], device: torch.device) -> tuple[int, Tensor | None]:
    """(the one threshold of every sample, None) or (0, a tensor of them): filled, since a copy from the host syncs."""
    if len(set(thresholds)) == 1:
        return thresholds[0], None
    table = torch.empty(len(thresholds), dtype=torch.int32, device=device)
    start = 0
    for end in range(1, len(thresholds) + 1):
        if end == len(thresholds) or thresholds[end] != thresholds[start]:
            table[start:end].fill_(thresholds[start])
            start = end
    return 0, table


def scale(threshold: int) -> float:
    return 65536 / (65536 - threshold)


def _walk(output: Tensor, strides: Sequence[int]) -> tuple[Any, ...]:
    """Grid, and how to go through the dense output's memory: sizes, `strides`, logical strides, FLAT, WIDE, groups.

    The dimensions come innermost first and merged where they can be; none are given if memory order is logical order.
    """
    logical = [math.prod(output.shape[i + 1 :]) for i in range(output.dim())]
    order = sorted((i for i, size in enumerate(output.shape) if size > 1), key=output.stride)
    walk: list[tuple[int, int, int]] = []
    for i in order:
        size, stride, step = output.shape[i], strides[i], logical[i]
        if walk and stride == walk[-1][1] * walk[-1][0] and step == walk[-1][2] * walk[-1][0]:
            walk[-1] = (walk[-1][0] * size, *walk[-1][1:])
        else:
            walk.append((size, stride, step))
    numel = output.numel()
    flat = not walk or (len(walk) == 1 and walk[0][1:] == (1, 1))
    # an element of its own Philox call each needs more registers
    groups = GROUPS if flat else GROUPS // 4
    sizes, steps, logical_steps = ((), (), ()) if flat else zip(*walk, strict=True)
    return (triton.cdiv(numel, 8 * groups),), (sizes, steps, logical_steps, flat, numel >= 2**31, groups)


def expand(
    input: Tensor, output: Tensor, seed: Tensor, first: int, thresholds: Sequence[int], antithetic: bool
) -> None:
    """Writes input under the masks of samples first, first + 1, ... into output, each laid out as empty_like(input)."""
    numel = input.numel()
    if numel == 0:
        return
    grid, (*walk, groups) = _walk(output[0], input.stride())
    threshold, table = threshold_table(thresholds, input.device)
    with torch.cuda.device_of(input):
        _copies_kernel[grid](
            input, output, seed, table, first, len(thresholds), threshold, scale(threshold), numel,
            *walk, antithetic, groups,
        )  # fmt: skip


def fold(grad: Tensor, output: Tensor, seed: Tensor, thresholds: Sequence[int], antithetic: bool) -> None:
    """Writes the sum over samples of the masked and scaled grad[m] into output, laid out as empty_like(grad[0])."""
    numel = output.numel()
    if numel == 0:
        return
    grid, (*walk, groups) = _walk(output, grad.stride()[1:])
    threshold, table = threshold_table(thresholds, grad.device)
    with torch.cuda.device_of(grad):
        _fold_kernel[grid](
            grad, output, seed, table, len(thresholds), threshold, scale(threshold), numel, grad.stride(0),
            *walk, antithetic, groups,
        )  # fmt: skip


def check_narrow(op: str, tensor: Tensor) -> None:
    if tensor.dtype == torch.float64:
        fail(op, "a dtype of at most 32 bits, as Triton's kernels accumulate in", "float32", tensor.dtype, TypeError)


# The ops' fakes, given real tensors, check them and make outputs of the right shape, strides and dtype.


def dropout_mask(
    seed: Tensor, shape: Sequence[int], threshold: int, sample: int, antithetic: bool, packed: bool
) -> Tensor:
    output = ops._mask_fake(seed, shape, threshold, sample, antithetic, packed)
    count = output.numel()
    if count:
        width = shape[-1] if packed else 8
        programs = triton.cdiv(count, GROUPS if packed else 8 * GROUPS)
        with torch.cuda.device_of(seed):
            _mask_kernel[(programs,)](
                output.view(torch.uint8), seed, sample, threshold, count, width,
                packed, width % 8 == 0, antithetic, GROUPS,
            )  # fmt: skip
    return output


def dropout(input: Tensor, seed: Tensor, threshold: int, sample: int) -> Tensor:
    output = ops._dropout_fake(input, seed, threshold, sample)
    check_narrow("dropout", input)
    expand(input, output.unsqueeze(0), seed, sample, [threshold], False)
    return output
