"""Dropout whose masks are a pure function of a seed, and those masks themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrx import _library
from pyrx._backends import select
from pyrx._checks import check_bool, check_float, check_integer, fail
from pyrx._random import LEVELS, MAX_SAMPLE, check_seed, device_of, is_antithetic, seed_tensor, threshold
from pyrx.reference import dropout as reference


def _check_mask(op: str, threshold: int, sample: int) -> None:
    if not 0 <= threshold < LEVELS:
        fail(op, "threshold", f"in [0, {LEVELS})", threshold)
    check_integer(op, "sample", sample, 0, MAX_SAMPLE)


def _check_packed(op: str, shape: Sequence[int], packed: bool) -> None:
    if packed and len(shape) == 0:
        fail(op, "shape of a packed mask", "of at least one dimension", list(shape))


def _mask_fake(
    seed: Tensor, shape: Sequence[int], threshold: int, sample: int, antithetic: bool, packed: bool
) -> Tensor:
    op = "dropout_mask"
    check_seed(op, seed, seed.device)
    _check_mask(op, threshold, sample)
    _check_packed(op, shape, packed)
    if packed:
        return seed.new_empty((*shape[:-1], (shape[-1] + 7) // 8), dtype=torch.uint8)
    return seed.new_empty(tuple(shape), dtype=torch.bool)


def _dropout_fake(input: Tensor, seed: Tensor, threshold: int, sample: int) -> Tensor:
    check_float("dropout", "input", input)
    check_seed("dropout", seed, input.device)
    _check_mask("dropout", threshold, sample)
    return torch.empty_like(input)


def _dropout_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.threshold, ctx.sample = inputs
    ctx.save_for_backward(seed)


def _dropout_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return ctx.ops.dropout(grad, *ctx.saved_tensors, ctx.threshold, ctx.sample), None, None, None


_library.define(
    "dropout",
    "dropout_mask",
    "(Tensor seed, SymInt[] shape, int threshold, int sample, bool antithetic, bool packed) -> Tensor",
    _mask_fake,
)
_library.define(
    "dropout",
    "dropout",
    "(Tensor input, Tensor seed, int threshold, int sample) -> Tensor",
    _dropout_fake,
    _dropout_backward,
    _dropout_setup,
)


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    sample: int = 0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Dropout whose mask is a function of the seed alone: the same on every backend, device, layout and thread count.

    Args:
        input: any shape and strides; float16, bfloat16, float32 or float64.
        p: probability of dropping an element, in [0, 1), on a grid of 1/65536. Default 0.5.
        training: False returns `input` itself.
        sample: which of the seed's masks, 0 to 2**32 - 1. Default 0.
        seed: int, or int64 tensor of one element on the input's device. Default: drawn there from `generator`.
        generator: torch.Generator on the input's device. Default: torch's.
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.

    Returns:
        A tensor of input's shape, dtype and strides: `input * mask / (1 - p)`, dropped elements exactly 0 (a dropped
        NaN too), all-kept masks (p = 0) exactly `input`.

    Equivalent to `torch.nn.functional.dropout(input, p)` in distribution; here
    `torch.where(pyrx.dropout_mask(input.shape, p, seed, sample), input / (1 - p), 0)`.

    Cost: one read and one write; the backward draws the mask again, so nothing is stored.

    Raises:
        TypeError: integer or complex input. ValueError: p or sample out of range. RuntimeError: a seed on another
        device, or a backend that cannot serve.

    Source: Srivastava et al., "Dropout", JMLR 2014; counter-based generator of Salmon et al., SC 2011.
    """
    check_float("dropout", "input", input)
    t = threshold("dropout", p)
    check_integer("dropout", "sample", sample, 0, MAX_SAMPLE)
    check_bool("dropout", training=training)
    chosen = select("dropout", input.device.type, input.dtype, backend)
    if not training:
        return input
    seed = seed_tensor("dropout", seed, generator, input.device)
    if chosen == "reference":
        return reference.dropout(input, seed, t, sample)
    return _library.namespace(chosen).dropout(input, seed, t, sample)


def dropout_mask(
    shape: Sequence[int],
    p: float,
    seed: int | Tensor,
    sample: int = 0,
    packed: bool = False,
    *,
    sampling: str = "independent",
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """The mask that every pyrx op uses for this logical shape, probability, seed and sample.

    Args:
        shape: the logical shape of the masked tensor.
        p: probability of dropping an element, in [0, 1).
        seed: int, or int64 tensor of one element.
        sample: the sample number, 0 to 2**32 - 1.
        packed: return bits.
        sampling: "independent", or "antithetic": odd samples read 65535 - u of the sample before.
        device: where the mask is made. Default: the seed's device if it is a tensor, else the CPU.
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.

    Returns:
        bool tensor of `shape`, True where kept; packed: uint8 `(*shape[:-1], ceil(shape[-1] / 8))`, bit j of byte k
        is element 8k + j of its row, bits beyond the row 0.

    Equivalent to `u >= round(65536 * p)`, where u is 16-bit lane i mod 8 of Philox4x32-10 under key `seed` at counter
    (low32(i div 8), high32(i div 8), sample, 0) and i is the element's row-major index.

    Cost: one Philox call per eight elements and one write.

    Raises:
        ValueError: p, sample or sampling out of range. RuntimeError: a seed on another device than `device`, or a
        backend that cannot serve.

    >>> x = torch.randn(2, 8)
    >>> mask = pyrx.dropout_mask(x.shape, 0.5, seed=1)
    >>> torch.equal(pyrx.dropout(x, 0.5, seed=1), 2 * x * mask)
    True

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    """
    op = "dropout_mask"
    t = threshold(op, p)
    check_integer(op, "sample", sample, 0, MAX_SAMPLE)
    antithetic = is_antithetic(op, sampling)
    check_bool(op, packed=packed)
    if not isinstance(shape, (list, tuple)):
        fail(op, "shape", "to be a sequence of ints", type(shape).__name__, TypeError)
    for size in shape:
        check_integer(op, "shape's sizes", size, 0, 2**62)
    _check_packed(op, shape, packed)
    if seed is None:
        fail(op, "seed", "to be an int or an int64 tensor", None, TypeError)
    where = device_of(device, seed)
    seed = seed_tensor(op, seed, None, where)
    chosen = select("dropout", where.type, torch.float32, backend)
    if chosen == "reference":
        return reference.dropout_mask(seed, shape, t, sample, antithetic, packed)
    return _library.namespace(chosen).dropout_mask(seed, list(shape), t, sample, antithetic, packed)
