"""Noise weighed by a mask, and the mask's gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrx.ops import noise_mask as ops

from .dropout import check_narrow
from .noise import four_normals, normal

GROUPS = 256  # of four elements, a program


# Bytes: 1 read of images and mask, 1 write. Operations: ~75 an element (Philox, roots, divisions, polynomials).
@triton.jit(do_not_specialize=["sample"])
def _noise_mask_kernel(
    images,
    mask,
    output,
    seed,
    std,
    mean,
    sample,
    numel,
    channels,
    pixels,
    BROADCAST: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    inside = at < numel
    weight_at = at
    if BROADCAST:
        weight_at = at // (channels * pixels) * pixels + at % pixels
    noise = four_normals(seed, group, tl.cast(sample, tl.int64), GROUPS) * std + mean
    image = tl.load(images + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(mask + weight_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + at, (image + weight * noise).to(output.dtype.element_ty), mask=inside)


# Bytes: 1 read of the gradient, 1 write of the mask's size. Operations: as above, four times as many where rows of
# pixels begin inside a four.
@triton.jit(do_not_specialize=["sample"])
def _noise_mask_backward_kernel(
    grad, output, seed, std, mean, sample, summed, pixels, ALIGNED: tl.constexpr, GROUPS: tl.constexpr
):
    programs = tl.cdiv(pixels, 4 * GROUPS)  # of a plane
    plane = (tl.program_id(0) // programs).to(tl.int64)
    group = (tl.program_id(0) % programs).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    pixel = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    inside = pixel < pixels
    sample = tl.cast(sample, tl.int64)
    total = tl.zeros((GROUPS, 4), tl.float32)
    for c in range(summed):
        first = (plane * summed + c) * pixels
        if ALIGNED:
            drawn = four_normals(seed, first // 4 + group, sample, GROUPS)
        else:
            drawn = normal(seed, first + pixel, sample)
        total += tl.load(grad + first + pixel, mask=inside, other=0.0).to(tl.float32) * (drawn * std + mean)
    tl.store(output + plane * pixels + pixel, total.to(output.dtype.element_ty), mask=inside)


def noise_mask(images: Tensor, mask: Tensor, seed: Tensor, std: float, mean: float, sample: int) -> Tensor:
    output = ops._fake(images, mask, seed, std, mean, sample)
    check_narrow("noise_mask", images)
    numel, channels = output.numel(), images.shape[1]
    if numel == 0:
        return output
    pixels = numel // (images.shape[0] * channels)
    target = output if output.is_contiguous() else torch.empty_like(output, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(images):
        _noise_mask_kernel[(triton.cdiv(numel, 4 * GROUPS),)](
            images.contiguous(), mask.contiguous(), target, seed, std, mean, sample, numel, channels, pixels,
            mask.shape[1] != channels, GROUPS, enable_fp_fusion=False,
        )  # fmt: skip
    return output if target is output else output.copy_(target)


def noise_mask_backward(grad: Tensor, seed: Tensor, broadcast: bool, std: float, mean: float, sample: int) -> Tensor:
    output = ops._backward_fake(grad, seed, broadcast, std, mean, sample)
    check_narrow("noise_mask_backward", grad)
    output = output if output.is_contiguous() else torch.empty_like(output, memory_format=torch.contiguous_format)
    if output.numel() == 0:
        return output
    planes = output.shape[0] * output.shape[1]
    pixels, summed = output.numel() // planes, grad.shape[1] if broadcast else 1
    with torch.cuda.device_of(grad):
        _noise_mask_backward_kernel[(triton.cdiv(pixels, 4 * GROUPS) * planes,)](
            grad.contiguous(), output, seed, std, mean, sample, summed, pixels, pixels % 4 == 0, GROUPS,
            enable_fp_fusion=False,
        )  # fmt: skip
    return output
