"""FMix: two images mixed by a matte that is cut out of low-frequency noise; pyrx.blend applies it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrx._checks import (
    check_bool,
    check_image_shape,
    check_number,
    check_tensor,
    fail,
    is_read,
)
from pyrx._random import level, seed_tensor
from pyrx.ops import batch_mix
from pyrx.ops.blend import blend, check_alpha, check_out
from pyrx.reference import batch_mix as draws
from pyrx.reference import fmix as reference
from pyrx.reference.batch_mix import MIXUP, PER_BATCH, PER_SAMPLE, Draw
from pyrx.targets import MixedTarget

OP = "fmix"


def _check_range(name: str, value: float, minimum: float, maximum: float) -> None:
    check_number(OP, name, value)
    if not minimum <= value <= maximum:
        fail(OP, name, f"in [{minimum}, {maximum}]", value)


def fmix(
    images: Tensor,
    labels: Tensor | None,
    *,
    alpha: float = 1.0,
    decay_power: float = 3.0,
    max_soft: float = 0.0,
    lam: float | Tensor | None = None,
    mattes: Tensor | None = None,
    pairing: str | Tensor = "flip",
    per_sample: bool = True,
    prob: float = 1.0,
    out: Tensor | None = None,
    masks: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, MixedTarget]:
    """FMix: each image keeps the pixels where a smooth random field is largest, its partner gives the others.

    Args:
        images: (N, C, H, W), or (N, C, T, H, W) with one matte over all frames; uint8, float16, bfloat16, float32 or
            float64. Contiguous and channels_last layouts are kept.
        labels: (N,) int64 class ids, or None.
        alpha: lam is drawn from Beta(alpha, alpha). Default 1.0: uniform.
        decay_power: how fast the field's amplitude falls with the frequency f, as 1 / f ** decay_power, in [0, 8].
            Default 3.0; greater: larger, smoother shapes.
        max_soft: the share of pixels, in [0, 0.5], on each side of the cut over which the matte falls from 1 to 0; at
            most lam and 1 - lam. Default 0.0: a cut.
        lam: (N,) float32 or a float in [0, 1] to use in place of a draw; beside `mattes`, the labels' weights as they
            are.
        mattes: (N or 1, 1, H, W) to use in place of drawn ones: the weight of the sample's own pixels, bool or
            floating-point. lam defaults to their means.
        pairing: "flip" (i with N - 1 - i), "roll" (i with i - 1), "random" (pairs drawn from the seed) or an int64
            permutation (N,): the partner of each sample.
        per_sample: each sample has a field and a lam of its own; False: one for the batch.
        prob: the chance that a sample (per_sample=False: the batch) is mixed at all, on a grid of 1/65536.
        out: a tensor of images' shape and dtype that takes the result.
        masks: (N, H, W) integer segmentation maps ((N, T, H, W) for video), mixed by the mattes' cut: `target.masks`.
        seed: int, or int64 tensor of one element on the images' device. Default: drawn there from `generator`.
        generator: torch.Generator on the images' device. Default: torch's.
        backend: "reference", "cpu", "cuda" or "triton", as for `pyrx.blend`, which mixes the pixels. Default: the
            fastest that can serve.

    Returns:
        (mixed, target): images of the same shape, and MixedTarget(labels, labels[partner], lam, None, partner, masks,
        mattes), lam the weight of the sample's own label. lam=target.lam, mattes=target.mattes, pairing=target.pairing
        replay it. The floor or the ceiling (by a coin) of lam H W pixels are the sample's own; lam is not rounded to
        that. Drawn mattes are bool, with max_soft float32; (1, 1, H, W) where one serves the batch.

    Equivalent to `pyrx.blend(images, images[partner], matte)`, where matte is 1 at the lam H W largest of
    `irfft(ifft(z / max(f, 1 / max(H, W)) ** decay_power))`, z of normal real and imaginary parts. A seed gives the same
    lam, pairs and z on every device, and on one device the same mattes; between devices single pixels of them may
    differ, as their Fourier transforms do.

    Cost: PyTorch operations for the mattes, mostly a sort of H W numbers a field; then a read (the partner's too) and a
    write of the images.

    Raises:
        ValueError: shapes; numbers out of range; lam outside [0, 1] and pairings that are no permutation, where the
        images are on the CPU (on a GPU, `pyrx.blend` says what becomes of a partner that is not there; labels raise).
        TypeError: dtypes. RuntimeError: devices, a backend that cannot serve, `out` of images that require a gradient.

    Source: Harris et al., "FMix: Enhancing Mixed Sample Data Augmentation", 2020.
    """
    check_image_shape(OP, "images", images)
    if labels is not None:
        check_tensor(OP, "labels", labels)
    samples, height, width, device = images.shape[0], images.shape[-2], images.shape[-1], images.device
    _check_range("alpha", alpha, 0, float("inf"))
    if not alpha > 0:
        fail(OP, "alpha", "above 0", alpha)
    _check_range("decay_power", decay_power, 0, 8)
    _check_range("max_soft", max_soft, 0, 0.5)
    check_bool(OP, per_sample=per_sample)
    chance = level(OP, "prob", prob)
    shared_lam = not isinstance(lam, Tensor)
    lam = batch_mix.given_lam(OP, lam, samples, device)
    partner, way = batch_mix.given_pairing(OP, pairing)
    seed = seed_tensor(OP, seed, generator, device)
    draw = Draw(MIXUP, PER_SAMPLE if per_sample else PER_BATCH, chance, 0, float(alpha), 0.0, 0.0, 0.0, True)
    batch_mix.check_mix(OP, images, labels, seed, lam, None, partner, way, draw, (), (), images.dtype)
    if is_read(images):
        batch_mix.check_values(OP, lam, None, partner, images, False)
    if mattes is not None:
        check_tensor(OP, "mattes", mattes)
        check_alpha(OP, "mattes", mattes if images.dim() == 4 else mattes.unsqueeze(2), images)
        if mattes.shape[1] != 1:
            fail(OP, "mattes", "of one channel", list(mattes.shape))
    if masks is not None:
        batch_mix.check_masks(OP, masks, images)
    if out is not None:
        inputs = [each for each in (images, mattes, masks) if each is not None]
        check_out(OP, out, images, inputs)

    if mattes is not None:
        partner = draws.partners(seed, samples, way) if partner is None else partner
        if lam is None:
            lam = mattes.float().mean((1, 2, 3)).expand(samples)
    else:
        drawn = draws.draw_mixes(seed, samples, height, width, lam, None, partner, way, draw)
        partner, lam = drawn.partner, drawn.lam
        one = not per_sample and shared_lam
        fields = samples if per_sample else min(samples, 1)
        mattes = reference.mattes(seed, fields, height, width, lam[:1] if one else lam, decay_power, max_soft)
    matte = mattes if images.dim() == 4 else mattes.unsqueeze(2)
    mixed = blend(images, images, matte, partner=partner, out=out, backend=backend)
    if masks is not None:
        own = matte.squeeze(1) if matte.dtype == torch.bool else matte.squeeze(1) >= 0.5
        masks = torch.where(own, masks, masks.index_select(0, partner))
    a = partner.new_empty(0) if labels is None else labels
    b = partner.new_empty(0) if labels is None else labels.index_select(0, partner)
    return mixed, MixedTarget(a, b, lam, None, partner, masks, mattes)
