"""Masked places of feature maps filled from their neighbours, several rings in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrx import _library
from pyrx._backends import select
from pyrx._checks import check_device, check_dtype, check_float, check_integer, check_shape, check_tensor, fail
from pyrx.reference import neighbor_fill as reference

OP = "neighbor_fill"
MAX_ITERATIONS = 65535


def _check_input(input: Tensor) -> None:
    check_float(OP, "input", input)
    if input.dim() != 4:
        fail(OP, "input", "of shape [N, C, H, W]", list(input.shape))


def _check_mask(input: Tensor, mask: Tensor) -> None:
    check_shape(OP, "mask", mask, "[N, 1, H, W]", [input.shape[0], 1, *input.shape[2:]])
    check_device(OP, "mask", mask, input.device)


def _fake(input: Tensor, mask: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    _check_input(input)
    check_dtype(OP, "mask", mask, torch.bool)
    _check_mask(input, mask)
    check_integer(OP, "iterations", iterations, 0, MAX_ITERATIONS)
    return torch.empty_like(input), torch.empty_like(mask, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
    (mask,) = ctx.saved_tensors
    return torch.where(mask, grad, grad.new_zeros(())), None, None


_library.define(
    OP,
    OP,
    "(Tensor input, Tensor mask, int iterations) -> (Tensor, Tensor)",
    _fake,
    _backward,
    _setup,
    native_formula=False,
)


def neighbor_fill(input: Tensor, mask: Tensor, iterations: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Fills masked places with the mean of their present neighbours, ring by ring, in one pass over the maps.

    Each iteration gives every empty place that has a present one among its eight neighbours the sum of those over
    their number + 1e-5, and makes it present. What is empty after the last iteration is 0.

    Args:
        input: (N, C, H, W), any strides; float16, bfloat16, float32 or float64.
        mask: (N, 1, H, W) bool, True where present; or of input's dtype, where 0 is empty and all else present.
        iterations: how many rings of empty places are filled, 0 to 65535.
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.

    Returns:
        (filled, mask_after): filled has input's shape, dtype and strides, and input's own bits where present; what
        input holds in empty places is never used, NaN included. mask_after has mask's shape and dtype.

    Sums and quotients are made in float32 (float64 for float64) and rounded to input's dtype once for every filled
    place; the order of the nine additions is one for all backends (rows from left to right, then from top to bottom),
    so that they agree bit for bit. Fills are constants to autograd: the gradient is the upstream's where the mask is
    True and 0 elsewhere.

    Equivalent to `x = x * m`, then `iterations` times, with s a depthwise 3x3 sum padded with zeros,
    `x, m = x + (1 - m) * (s(x) / (s(m) + 1e-5)).detach(), (m + s(m)).clip(0, 1)`.

    Cost: one read and one write of input, and work for the filled places only: counts and rings are found once an
    image and shared by its channels. The backward saves the mask.

    Raises:
        TypeError: an input that is not floating point, a mask of another dtype. ValueError: shapes, iterations out of
        range, a mask that requires grad. RuntimeError: a mask on another device, or a backend that cannot serve.

    Source: Balasubramanian and Feizi, "Towards improved input masking for convolutional neural networks", ICCV 2023.
    """
    _check_input(input)
    check_tensor(OP, "mask", mask)
    if mask.dtype not in (torch.bool, input.dtype):
        fail(OP, "mask", f"of dtype torch.bool or {input.dtype}", mask.dtype, TypeError)
    _check_mask(input, mask)
    if mask.requires_grad:
        fail(OP, "mask", "without requires_grad: there is no gradient to masks", "requires_grad=True")
    check_integer(OP, "iterations", iterations, 0, MAX_ITERATIONS)
    chosen = select(OP, input.device.type, input.dtype, backend)
    present = mask if mask.dtype == torch.bool else mask != 0
    if chosen == "reference":
        filled, after = reference.neighbor_fill(input, present, iterations)
    else:
        filled, after = _library.namespace(chosen).neighbor_fill(input, present, iterations)
    return filled, after.to(mask.dtype)
