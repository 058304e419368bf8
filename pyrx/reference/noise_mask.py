"""Noise weighed by a mask, in plain PyTorch: images + mask * noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrx._checks import accumulation_dtype
from pyrx.reference.random import normal


def noise(seed: Tensor, shape: Sequence[int], std: float, mean: float, sample: int) -> Tensor:
    """N(mean, std) of each element in row-major order, float32."""
    return (normal(seed, math.prod(shape), sample) * std + mean).reshape(tuple(shape))


def noise_mask(images: Tensor, mask: Tensor, seed: Tensor, std: float, mean: float, sample: int) -> Tensor:
    accumulate = accumulation_dtype(images.dtype)
    # in the images' layout, which the result takes from here
    drawn = torch.empty_like(images, dtype=accumulate).copy_(noise(seed, images.shape, std, mean, sample))
    return (images.to(accumulate) + mask.to(accumulate) * drawn).to(images.dtype)


def noise_mask_backward(grad: Tensor, seed: Tensor, broadcast: bool, std: float, mean: float, sample: int) -> Tensor:
    """The mask's gradient: grad * noise, summed over the channels in order where one mask serves them all."""
    accumulate = accumulation_dtype(grad.dtype)
    weighed = grad.to(accumulate) * noise(seed, grad.shape, std, mean, sample).to(accumulate)
    if broadcast:
        total = torch.zeros_like(weighed[:, :1])
        for channel in weighed.split(1, dim=1):
            total = total + channel
        weighed = total
    return weighed.to(grad.dtype)
