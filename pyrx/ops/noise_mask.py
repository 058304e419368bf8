"""Additive noise weighed by a mask, drawn again for the mask's gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyrx import _library
from pyrx._backends import select
from pyrx._checks import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_float,
    check_integer,
    check_number,
    check_tensor,
    fail,
)
from pyrx._random import MAX_SAMPLE, check_seed, seed_tensor
from pyrx.reference import noise_mask as reference

ROW = "noise_mask"


def _check_noise(op: str, name: str, images: Tensor, seed: Tensor, std: float, mean: float, sample: int) -> None:
    check_float(op, name, images)
    if images.dim() < 3:
        fail(op, name, "of shape [N, C, ..., W]", list(images.shape))
    check_seed(op, seed, images.device)
    if not 0 <= std < math.inf:
        fail(op, "std", "finite and at least 0", std)
    if not -math.inf < mean < math.inf:
        fail(op, "mean", "finite", mean)
    check_integer(op, "sample", sample, 0, MAX_SAMPLE)


def _check_mask(images: Tensor, mask: Tensor) -> None:
    check_dtype(ROW, "mask", mask, images.dtype)
    shape, own = list(images.shape), list(mask.shape)
    if own != shape and own != [shape[0], 1, *shape[2:]]:
        fail(ROW, "mask", f"of shape [N, 1 or C, ...] with [N, C, ...] = {shape}", own)
    check_device(ROW, "mask", mask, images.device)


def _fake(images: Tensor, mask: Tensor, seed: Tensor, std: float, mean: float, sample: int) -> Tensor:
    _check_noise(ROW, "images", images, seed, std, mean, sample)
    _check_mask(images, mask)
    return torch.empty_like(images)


def _backward_fake(grad: Tensor, seed: Tensor, broadcast: bool, std: float, mean: float, sample: int) -> Tensor:
    _check_noise("noise_mask_backward", "grad", grad, seed, std, mean, sample)
    return grad.new_empty((grad.shape[0], 1, *grad.shape[2:]) if broadcast else grad.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, mask, seed, *ctx.noise = inputs
    ctx.broadcast = mask.shape[1] == 1
    ctx.needs = images.requires_grad, mask.requires_grad
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    mask_grad = None
    if ctx.needs[1]:
        (seed,) = ctx.saved_tensors
        mask_grad = ctx.ops.noise_mask_backward(grad, seed, ctx.broadcast, *ctx.noise)
    return grad if ctx.needs[0] else None, mask_grad, None, None, None, None


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, seed, _, *ctx.noise = inputs
    ctx.save_for_backward(seed)
    ctx.shape = grad.shape


def _backward_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    # linear in the gradient, so its adjoint is the noise that `upstream` weighs
    (seed,) = ctx.saved_tensors
    return ctx.ops.noise_mask(upstream.new_zeros(ctx.shape), upstream, seed, *ctx.noise), None, None, None, None, None


_NOISE = "float std, float mean, int sample"
_library.define(
    ROW, "noise_mask", f"(Tensor images, Tensor mask, Tensor seed, {_NOISE}) -> Tensor",
    _fake, _backward, _setup, native_formula=False,
)  # fmt: skip
_library.define(
    ROW, "noise_mask_backward", f"(Tensor grad, Tensor seed, bool broadcast, {_NOISE}) -> Tensor",
    _backward_fake, _backward_backward, _backward_setup, native_formula=False,
)  # fmt: skip


def _number(name: str, value: float) -> float:
    check_number(ROW, name, value)
    return float(value)


def noise_mask(
    images: Tensor,
    mask: Tensor,
    *,
    std: float = 1.0,
    mean: float = 0.0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    sample: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Adds Gaussian noise, weighed by a mask, to images: the noise is a function of the seed and never stored.

    Args:
        images: (N, C, H, W), or any (N, C, ...) of at least three dimensions and any strides; float16, bfloat16,
            float32 or float64.
        mask: (N, 1, H, W), one weight for all channels, or (N, C, H, W); bool, float16, bfloat16, float32 or float64,
            rounded to images' dtype.
        std, mean: of the noise. Default 1.0 and 0.0.
        seed: int, or int64 tensor of one element on the images' device. Default: drawn there from `generator`.
        generator: torch.Generator on the images' device. Default: torch's.
        sample: which of the seed's noises, 0 to 2**32 - 1. Default 0.
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.

    Returns:
        A tensor of images' shape, dtype and strides: `images + mask * noise`. The noise is float32 (Box-Muller on
        uniforms of 24 bits, so at most 5.9 standard deviations), the sum float32 (float64 for float64), rounded once.

    Gradients: to images the identity; to the mask `grad * noise`, summed over the channels that it serves, in order.

    Equivalent to `images + mask * (mean + std * torch.randn_like(images))` in distribution.

    Cost: one read of images and mask and one write; the mask's gradient one read and one write of its own.
    Images that are not contiguous (channels_last ones too) cost two more passes, a mask of another dtype one.

    Raises:
        TypeError: dtypes. ValueError: shapes, std below 0, sample out of range. RuntimeError: a mask or seed on another
        device, or a backend that cannot serve.

    Source: Box and Muller, "A note on the generation of random normal deviates", 1958; counter-based generator of
    Salmon et al., SC 2011.
    """
    check_tensor(ROW, "images", images)
    check_tensor(ROW, "mask", mask)
    std, mean = _number("std", std), _number("mean", mean)
    check_float(ROW, "images", images)
    chosen = select(ROW, images.device.type, images.dtype, backend)
    seed = seed_tensor(ROW, seed, generator, images.device)
    _check_noise(ROW, "images", images, seed, std, mean, sample)
    if mask.dtype != torch.bool and mask.dtype not in FLOAT_DTYPES:
        fail(ROW, "mask", "of dtype bool, float16, bfloat16, float32 or float64", mask.dtype, TypeError)
    mask = mask.to(images.dtype)
    _check_mask(images, mask)
    function = reference if chosen == "reference" else _library.namespace(chosen)
    return function.noise_mask(images, mask, seed, std, mean, sample)
