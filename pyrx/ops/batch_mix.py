"""Batch mixing: CutMix, mixup and ResizeMix, drawn and applied in one op, normalised in the same pass if asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrx import _library
from pyrx._backends import select
from pyrx._checks import (
    FLOAT_DTYPES,
    accumulation_dtype,
    check_bool,
    check_choice,
    check_device,
    check_dtype,
    check_image_shape,
    check_number,
    check_own_memory,
    check_shape,
    check_tensor,
    check_written,
    fail,
    float_pair,
    is_read,
)
from pyrx._random import LEVELS, check_seed, level, seed_tensor
from pyrx.reference import batch_mix as reference
from pyrx.reference.batch_mix import CUTMIX, EITHER, GIVEN, MIXUP, PER_BATCH, PER_SAMPLE, RESIZEMIX, ROLL, Draw, Mixes
from pyrx.targets import MixedTarget

ROW = "batch_mix"
PAIRINGS = ("flip", "roll", "random")
MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MAX_SAMPLES = 2**24
MAX_CHANNELS = 64  # that mean and std may have: they travel as kernel arguments


def check_mix(
    op: str,
    images: Tensor,
    labels: Tensor | None,
    seed: Tensor,
    lam: Tensor | None,
    boxes: Tensor | None,
    partner: Tensor | None,
    pairing: int,
    draw: Draw,
    scale: Sequence[float],
    bias: Sequence[float],
    dtype: torch.dtype,
) -> None:
    """Everything that can be known without reading a tensor."""
    check_image_shape(op, "images", images)
    if images.is_complex():
        fail(op, "images", "of a real dtype", images.dtype, TypeError)
    samples, channels, device = images.shape[0], images.shape[1], images.device
    if samples >= MAX_SAMPLES:
        fail(op, "images", f"of fewer than {MAX_SAMPLES} samples", samples)
    arithmetic = draw.kind in (MIXUP, EITHER) or len(scale) > 0 or dtype != images.dtype
    if arithmetic and images.dtype != torch.uint8 and images.dtype not in FLOAT_DTYPES:
        fail(op, "images", "of dtype uint8, float16, bfloat16, float32 or float64", images.dtype, TypeError)
    if dtype != images.dtype and dtype not in FLOAT_DTYPES:
        fail(op, "dtype", f"{images.dtype} or a floating-point dtype", dtype, TypeError)
    if len(scale) > 0 and dtype not in FLOAT_DTYPES:
        fail(op, "dtype", "a floating-point dtype for a normalised result", dtype, TypeError)
    if len(scale) != len(bias) or (len(scale) > 0 and len(scale) != channels):
        fail(op, "mean and std", f"of C = {channels} channels", f"{len(bias)} and {len(scale)}")
    if len(scale) > MAX_CHANNELS:
        fail(op, "mean and std", f"of at most {MAX_CHANNELS} channels", len(scale))
    rows = (
        ("labels", labels, torch.int64, "[N]", [samples]),
        ("lam", lam, torch.float32, "[N]", [samples]),
        ("boxes", boxes, torch.int64, "[N, 4]", [samples, 4]),
        ("pairing", partner, torch.int64, "[N]", [samples]),
    )
    for name, value, expected, names, shape in rows:
        if value is not None:
            check_dtype(op, name, value, expected)
            check_shape(op, name, value, names, shape)
            check_device(op, name, value, device)
    check_seed(op, seed, device)
    if (pairing == GIVEN) != (partner is not None) or not 0 <= pairing <= GIVEN:
        fail(op, "pairing", f"in [0, {GIVEN}], {GIVEN} where a permutation is given", pairing)
    if not (MIXUP <= draw.kind <= EITHER and PER_BATCH <= draw.granularity <= PER_SAMPLE):
        fail(op, "kind and granularity", "in [0, 3] and [0, 2]", f"{draw.kind} and {draw.granularity}")
    for name, chance in (("prob", draw.prob), ("switch_prob", draw.switch_prob)):
        if not 0 <= chance <= LEVELS:
            fail(op, name, f"in [0, {LEVELS}]", chance)
    for name, alpha, kinds in (
        ("mixup_alpha", draw.mixup_alpha, (MIXUP, EITHER)),
        ("cutmix_alpha", draw.cutmix_alpha, (CUTMIX, EITHER)),
    ):
        if draw.kind in kinds and lam is None and boxes is None and not alpha > 0:
            fail(op, name, "above 0", alpha)
    if not 0 <= draw.minimum <= draw.maximum <= 1:
        fail(op, "minmax", "0 <= minimum <= maximum <= 1", f"({draw.minimum}, {draw.maximum})")


def _check_swap(op: str, pairing: int, kind: int) -> None:
    if pairing == ROLL:
        fail(op, "pairing", "to be its own inverse for inplace=True", "'roll'")
    if kind == RESIZEMIX:
        fail(op, "inplace", "of patches that keep their size", "resizemix's")


def _results(images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    samples = images.shape[0]
    ids = images.new_empty(samples, dtype=torch.int64)
    return (
        images.new_empty(0 if labels is None else samples, dtype=torch.int64),
        ids,
        images.new_empty(samples, dtype=torch.float32),
        images.new_empty((samples, 4), dtype=torch.int64),
    )


def _mix_fake(
    images: Tensor,
    labels: Tensor | None,
    seed: Tensor,
    lam: Tensor | None,
    boxes: Tensor | None,
    partner: Tensor | None,
    pairing: int,
    kind: int,
    granularity: int,
    prob: int,
    switch_prob: int,
    mixup_alpha: float,
    cutmix_alpha: float,
    minimum: float,
    maximum: float,
    correct_lam: bool,
    scale: Sequence[float],
    bias: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    draw = Draw(kind, granularity, prob, switch_prob, mixup_alpha, cutmix_alpha, minimum, maximum, correct_lam)
    check_mix(ROW, images, labels, seed, lam, boxes, partner, pairing, draw, scale, bias, dtype)
    mixed = torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=reference.memory_format(images))
    return mixed, *_results(images, labels)


def _out_fake(out: Tensor, images: Tensor, labels: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    seed, lam, boxes, partner, pairing, *draw, scale, bias = rest
    check_tensor(ROW, "out", out)
    check_mix(ROW, images, labels, seed, lam, boxes, partner, pairing, Draw(*draw), scale, bias, out.dtype)
    check_shape(ROW, "out", out, "[N, C, ...]", images.shape)
    check_device(ROW, "out", out, images.device)
    return _results(images, labels)


def _inplace_fake(images: Tensor, labels: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    seed, lam, boxes, partner, pairing, *draw = rest
    check_mix(ROW, images, labels, seed, lam, boxes, partner, pairing, Draw(*draw), (), (), images.dtype)
    _check_swap(ROW, pairing, draw[0])
    return _results(images, labels)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, partner, lam, boxes = output
    ctx.resize, ctx.scale, ctx.dtype = inputs[7] == RESIZEMIX, inputs[16], inputs[0].dtype
    ctx.save_for_backward(partner, lam, boxes)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 19
    partner, lam, boxes = ctx.saved_tensors
    mixes = Mixes(partner, lam, torch.where(boxes[:, 0] < 0, lam, 1.0), boxes)
    return reference.mix_backward(grad, mixes, ctx.resize, ctx.scale, ctx.dtype), *(None,) * 18


_DRAW = (
    "Tensor? labels, Tensor seed, Tensor? lam, Tensor? boxes, Tensor? partner, int pairing, int kind, int granularity, "
    "int prob, int switch_prob, float mixup_alpha, float cutmix_alpha, float minimum, float maximum, bool correct_lam"
)
_MIXES = "Tensor partner_labels, Tensor partner, Tensor lam, Tensor boxes"
_library.define(
    ROW,
    "batch_mix",
    f"(Tensor images, {_DRAW}, float[] scale, float[] bias, ScalarType dtype) -> (Tensor mixed, {_MIXES})",
    _mix_fake,
    _backward,
    _setup,
    native_formula=False,
)
_library.define(
    ROW,
    "batch_mix_out",
    f"(Tensor(a!) out, Tensor images, {_DRAW}, float[] scale, float[] bias) -> ({_MIXES})",
    _out_fake,
    writes=True,
)
_library.define(ROW, "batch_mix_", f"(Tensor(a!) images, {_DRAW}) -> ({_MIXES})", _inplace_fake, writes=True)


def check_values(
    op: str, lam: Tensor | None, boxes: Tensor | None, partner: Tensor | None, images: Tensor, swap: bool
) -> None:
    """What only the values tell, of CPU tensors."""
    height, width = images.shape[-2:]
    weighable = images.dtype == torch.uint8 or images.dtype in FLOAT_DTYPES  # others have boxes only
    if lam is not None and not bool(((lam >= 0) & (lam <= 1)).all()):
        fail(op, "lam", "in [0, 1]", lam.tolist())
    if boxes is not None:
        y0, x0, y1, x1 = boxes.unbind(1)
        inside = (y0 >= 0) & (y0 <= y1) & (y1 <= height) & (x0 >= 0) & (x0 <= x1) & (x1 <= width)
        without = (boxes == -1).all(1) & weighable
        if not bool((inside | without).all()):
            bad = boxes[~(inside | without)][0].tolist()
            fail(op, "boxes", f"0 <= y0 <= y1 <= {height} and 0 <= x0 <= x1 <= {width}", bad)
        if lam is None and bool(without.any()):
            fail(op, "lam", "to be given beside boxes of -1", None)
    if partner is not None:
        index = torch.arange(len(partner), device=partner.device)
        if not torch.equal(partner.sort().values, index):
            fail(op, "pairing", "to be a permutation of the samples", partner.tolist())
        if swap and not torch.equal(partner[partner], index):
            fail(op, "pairing", "to be its own inverse for inplace=True", partner.tolist())


def _apply(
    images: Tensor,
    labels: Tensor | None,
    seed: Tensor,
    lam: Tensor | None,
    boxes: Tensor | None,
    partner: Tensor | None,
    pairing: int,
    draw: Draw,
    scale: Sequence[float],
    bias: Sequence[float],
    dtype: torch.dtype,
    inplace: bool,
    out: Tensor | None,
    chosen: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mixed images, the partners' labels, partner, lam, boxes) by one backend."""
    drawn = (labels, seed, lam, boxes, partner, pairing, *draw)
    if chosen == "reference":
        mixed, partner_labels, mixes = reference.batch_mix(
            images, labels, seed, lam, boxes, partner, pairing, draw, scale, bias, dtype
        )
        if inplace or out is not None:
            mixed = (images if out is None else out).copy_(mixed)
        return mixed, partner_labels, mixes.partner, mixes.lam, mixes.boxes
    ops = _library.namespace(chosen)
    if inplace:
        mixed, found = images, ops.batch_mix_(images, *drawn)
    elif out is not None:
        mixed, found = out, ops.batch_mix_out(out, images, *drawn, scale, bias)
    else:
        mixed, *found = ops.batch_mix(images, *drawn, scale, bias, dtype)
    return mixed, *found


def _normalisation(
    op: str, images: Tensor, mean: object, std: object, dtype: torch.dtype
) -> tuple[list[float], list[float]]:
    """(scale, bias) a channel: uint8 images count as [0, 1] once they become floating-point."""
    unit = 1 / 255 if images.dtype == torch.uint8 and dtype.is_floating_point else 1.0
    if mean is None and std is None and unit == 1:
        return [], []
    channels = images.shape[1]
    found = []
    for name, value, default in (("mean", mean, 0.0), ("std", std, 1.0)):
        if value is None:
            value = default
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = [value] * channels
        elif hasattr(value, "tolist") and getattr(value, "device", None) in (None, torch.device("cpu"), "cpu"):
            value = value.tolist()  # NumPy's arrays and CPU tensors
        if not isinstance(value, (list, tuple)) or not all(isinstance(each, (int, float)) for each in value):
            fail(op, name, "to be a float or a sequence of floats", type(value).__name__, TypeError)
        if len(value) != channels:
            fail(op, name, f"of C = {channels} values", len(value))
        for each in value:
            check_number(op, name, each)
        found.append([float(each) for each in value])
    means, stds = found
    if not all(each > 0 for each in stds):
        fail(op, "std", "above 0", stds)
    if not dtype.is_floating_point:
        fail(op, "dtype", "a floating-point dtype for a normalised result", dtype, TypeError)
    factors = [unit / each for each in stds], [-m / each for m, each in zip(means, stds, strict=True)]
    most = torch.finfo(accumulation_dtype(dtype)).max  # what kernels take them as
    for each in (*factors[0], *factors[1]):
        if most < abs(each) < math.inf:
            fail(op, "mean and std", f"of 1 / std and mean / std of at most {most:.3g} either way", each)
    return factors


def given_lam(op: str, lam: float | Tensor | None, samples: int, device: torch.device) -> Tensor | None:
    """(N,) of a caller's lam; the values of a tensor are not looked at."""
    if lam is None or isinstance(lam, Tensor):
        if lam is not None and lam.requires_grad:
            fail(op, "lam", "without requires_grad: there is no gradient to lam", "requires_grad=True")
        return lam
    if isinstance(lam, bool) or not isinstance(lam, (int, float)):
        fail(op, "lam", "to be a float or a Tensor", type(lam).__name__, TypeError)
    if not 0 <= lam <= 1:
        fail(op, "lam", "in [0, 1]", lam)
    return torch.full((samples,), float(lam), dtype=torch.float32, device=device)


def given_pairing(op: str, pairing: str | Tensor) -> tuple[Tensor | None, int]:
    """(partners or None, the way to draw them)."""
    if isinstance(pairing, Tensor):
        return pairing, GIVEN
    check_choice(op, "pairing", pairing, PAIRINGS)
    return None, PAIRINGS.index(pairing)


def check_masks(op: str, masks: Tensor, images: Tensor) -> None:
    check_tensor(op, "masks", masks)
    names = "[N, H, W]" if images.dim() == 4 else "[N, T, H, W]"
    check_shape(op, "masks", masks, names, [images.shape[0], *images.shape[2:]])
    if masks.dtype not in MASK_DTYPES:
        fail(op, "masks", "of dtype bool, uint8, int8, int16, int32 or int64", masks.dtype, TypeError)
    check_device(op, "masks", masks, images.device)


def mix_batch(
    op: str,
    images: Tensor,
    labels: Tensor | None,
    draw: Draw,
    *,
    lam: float | Tensor | None = None,
    boxes: Tensor | None = None,
    pairing: str | Tensor = "flip",
    inplace: bool = False,
    out: Tensor | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    masks: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, MixedTarget]:
    """The family's common part: checks what the caller says, draws, mixes, and makes the target."""
    check_image_shape(op, "images", images)
    for name, value in (("labels", labels), ("out", out)):
        if value is not None:
            check_tensor(op, name, value)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        fail(op, "dtype", "to be a torch.dtype", type(dtype).__name__, TypeError)
    check_bool(op, inplace=inplace)
    samples, device = images.shape[0], images.device
    dtype = dtype if dtype is not None else out.dtype if out is not None else images.dtype
    scale, bias = _normalisation(op, images, mean, std, dtype)
    lam = given_lam(op, lam, samples, device)
    if lam is not None and boxes is None and draw.maximum > 0:
        fail(op, "boxes", "beside lam, which does not decide the sides of these", None)
    partner, way = given_pairing(op, pairing)
    if inplace:
        if out is not None:
            fail(op, "at most one of inplace", "and out", "both")
        if scale or dtype != images.dtype:
            fail(op, "inplace", "of images that keep their dtype and values", "mean, std or dtype")
        if torch.is_grad_enabled() and images.requires_grad:
            fail(op, "inplace", "of images that require no gradient", "images that do", RuntimeError)
        if not torch.compiler.is_compiling():
            check_own_memory(op, "inplace", images)
    if out is not None:
        check_shape(op, "out", out, "[N, C, ...]", images.shape)
        check_device(op, "out", out, device)
        if out.dtype != dtype:
            fail(op, "out", f"of dtype {dtype}", out.dtype, TypeError)
        check_written(op, "out", out, [images])
    if masks is not None:
        check_masks(op, masks, images)
        if inplace and not torch.compiler.is_compiling():
            check_own_memory(op, "masks", masks)
    computed = torch.float64 if torch.float64 in (images.dtype, dtype) else torch.float32
    chosen = select(ROW, device.type, computed, backend)
    seed = seed_tensor(op, seed, generator, device)
    check_mix(op, images, labels, seed, lam, boxes, partner, way, draw, scale, bias, dtype)
    if inplace:
        _check_swap(op, way, draw.kind)
    if is_read(images):
        check_values(op, lam, boxes, partner, images, inplace)
    mixed, b, partner, lam, boxes = _apply(
        images, labels, seed, lam, boxes, partner, way, draw, scale, bias, dtype, inplace, out, chosen
    )
    if masks is not None:
        again = draw._replace(kind=RESIZEMIX if draw.kind == RESIZEMIX else CUTMIX)
        pasted = boxes.clamp(min=0)  # ids are not weighed: where pixels were, they stay
        masks = _apply(
            masks.unsqueeze(1), None, seed, lam, pasted, partner, GIVEN, again, (), (), masks.dtype, inplace, None,
            chosen,
        )[0].squeeze(1)  # fmt: skip
    return mixed, MixedTarget(b if labels is None else labels, b, lam, boxes, partner, masks)


def cutmix(
    images: Tensor,
    labels: Tensor | None,
    *,
    alpha: float = 1.0,
    lam: float | Tensor | None = None,
    boxes: Tensor | None = None,
    pairing: str | Tensor = "flip",
    per_sample: bool = True,
    prob: float = 1.0,
    correct_lam: bool = True,
    minmax: tuple[float, float] | None = None,
    inplace: bool = False,
    out: Tensor | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    masks: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, MixedTarget]:
    """CutMix: a box of each image is replaced by its partner's, drawn and pasted in one pass.

    Args:
        images: (N, C, H, W), or (N, C, T, H, W) with one box over all frames (videos (N, T, C, H, W), as torchvision's,
            go by `.transpose(1, 2)`); uint8, float16, bfloat16, float32 or float64 (without `dtype`, any integer dtype
            too). Contiguous and channels_last layouts are kept.
        labels: (N,) int64 class ids, or None.
        alpha: lam is drawn from Beta(alpha, alpha). Default 1.0: uniform.
        lam: (N,) float32 or a float in [0, 1] to use in its place; beside `boxes`, the labels' weights as they are.
        boxes: (N, 4) int64 (y0, x0, y1, x1) to use in place of drawn ones: pixels [y0, y1) x [x0, x1).
        pairing: "flip" (i with N - 1 - i), "roll" (i with i - 1), "random" (pairs drawn from the seed) or an int64
            permutation (N,): the partner of each sample.
        per_sample: each sample has a box of its own; False: one draw for the batch.
        prob: the chance that a sample (per_sample=False: the batch) is mixed at all, on a grid of 1/65536.
        correct_lam: lam becomes 1 - box area / image area. False: the drawn lam stays.
        minmax: draw the box's sides uniformly between these shares of the image's instead, wholly inside the image.
        inplace: partners swap their patches in `images` (and `masks`), and only the patches' bytes move; pairing must
            be its own inverse. Images of other layouts than contiguous and channels_last are copied there and back.
        out: a tensor of images' shape that takes the result, of `dtype`.
        mean, std: normalise in the same pass: (x - mean) / std a channel, where uint8 images count as [0, 1].
        dtype: of the result. Default: out's or the images'. uint8 images that become floating-point lie in [0, 1].
        masks: (N, H, W) integer segmentation maps ((N, T, H, W) for video), mixed with the same boxes: `target.masks`.
        seed: int, or int64 tensor of one element on the images' device. Default: drawn there from `generator`.
        generator: torch.Generator on the images' device. Default: torch's.
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.

    Returns:
        (mixed, target): images of the same shape, and MixedTarget(labels, labels[partner], lam, boxes, partner, masks),
        lam the weight of the sample's own label. lam=target.lam, boxes=target.boxes, pairing=target.pairing replay it.

    Equivalent to, for each sample i with partner j, `mixed[i] = images[i]; mixed[i][..., y0:y1, x0:x1] = images[j][...,
    y0:y1, x0:x1]`.

    Cost: one read and one write of the images, in place of the patches alone; one launch. Layouts other than
    contiguous and channels_last, and an `out` of another one than the images', cost a copy first. The gradient of the
    images takes some PyTorch operations.

    Raises:
        ValueError: shapes; lam outside [0, 1], boxes outside the image and pairings that are no permutation, where the
        images are on the CPU. On a GPU a sample whose lam, box or partner is out of range (in place: whose partner has
        another) is left as it is and its lam is NaN. TypeError: dtypes.
        RuntimeError: devices, a backend that cannot serve, inplace or out of images that require a gradient.

    >>> images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    >>> mixed, target = pyrx.cutmix(images, labels, seed=1)
    >>> target.b  # partners from the other end of the batch
    tensor([3, 2, 1, 0])
    >>> again, _ = pyrx.cutmix(images, labels, lam=target.lam, boxes=target.boxes, pairing=target.pairing)
    >>> torch.equal(again, mixed)
    True

    Source: Yun et al., "CutMix", ICCV 2019, equations 1 and 2.
    """
    _check_alpha("cutmix", alpha)
    check_bool("cutmix", per_sample=per_sample, correct_lam=correct_lam)
    minimum, maximum = check_minmax("cutmix", "minmax", minmax)
    granularity = PER_SAMPLE if per_sample else PER_BATCH
    draw = Draw(CUTMIX, granularity, level("cutmix", "prob", prob), 0, 0.0, alpha, minimum, maximum, correct_lam)
    return mix_batch(
        "cutmix", images, labels, draw, lam=lam, boxes=boxes, pairing=pairing, inplace=inplace, out=out, mean=mean,
        std=std, dtype=dtype, masks=masks, seed=seed, generator=generator, backend=backend,
    )  # fmt: skip


def mixup(
    images: Tensor,
    labels: Tensor | None,
    *,
    alpha: float = 1.0,
    lam: float | Tensor | None = None,
    pairing: str | Tensor = "flip",
    per_sample: bool = True,
    prob: float = 1.0,
    inplace: bool = False,
    out: Tensor | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, MixedTarget]:
    """Mixup: each image becomes `lam * image + (1 - lam) * partner`, summed in float32 and rounded once.

    The arguments are those of `pyrx.cutmix` but boxes, correct_lam, minmax and masks; `target.boxes` is -1. A tensor
    `lam` is taken as it is, whatever `prob`, so that it replays a draw. lam 1 and 0 copy, whatever the other image
    holds; uint8 results are rounded to the nearest, halves to even.

    Returns:
        (mixed, MixedTarget(labels, labels[partner], lam, boxes, partner)).

    Equivalent to `lam.view(-1, 1, 1, 1) * images + (1 - lam).view(-1, 1, 1, 1) * images[partner]`.

    Cost: one read (the partner's too, out of place) and one write of the images, one launch.

    Raises: as `pyrx.cutmix`.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
    """
    _check_alpha("mixup", alpha)
    check_bool("mixup", per_sample=per_sample)
    granularity = PER_SAMPLE if per_sample else PER_BATCH
    chance = level("mixup", "prob", prob)
    draw = Draw(MIXUP, granularity, LEVELS if isinstance(lam, Tensor) else chance, 0, alpha, 0.0, 0.0, 0.0, True)
    return mix_batch(
        "mixup", images, labels, draw, lam=lam, pairing=pairing, inplace=inplace, out=out, mean=mean, std=std,
        dtype=dtype, seed=seed, generator=generator, backend=backend,
    )  # fmt: skip


def resizemix(
    images: Tensor,
    labels: Tensor | None,
    *,
    scale: tuple[float, float] = (0.1, 0.8),
    lam: float | Tensor | None = None,
    boxes: Tensor | None = None,
    pairing: str | Tensor = "flip",
    per_sample: bool = True,
    prob: float = 1.0,
    out: Tensor | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    masks: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, MixedTarget]:
    """ResizeMix: the whole partner, made smaller, is pasted into a box of each image.

    The arguments are those of `pyrx.cutmix` but alpha, correct_lam, minmax and inplace; `scale` is the range of the
    box's sides as a share of the image's, one uniform draw a sample. The box lies wholly inside the image and lam is
    1 - box area / image area; `lam` is given beside `boxes` only.

    Returns: as `pyrx.cutmix`.

    Equivalent to, for each sample i with partner j, `mixed[i] = images[i]` and, in the box, `mixed[i][..., y, x] =
    images[j][..., (y - y0) * H // (y1 - y0), (x - x0) * W // (x1 - x0)]`: nearest-neighbour interpolation.

    Cost: one read and one write of the images, one launch.

    Raises: as `pyrx.cutmix`.

    Source: Qin et al., "ResizeMix: Mixing Data with Preserved Object Information and True Labels", 2020.
    """
    minimum, maximum = check_minmax("resizemix", "scale", scale)
    check_bool("resizemix", per_sample=per_sample)
    granularity = PER_SAMPLE if per_sample else PER_BATCH
    draw = Draw(RESIZEMIX, granularity, level("resizemix", "prob", prob), 0, 0.0, 0.0, minimum, maximum, True)
    return mix_batch(
        "resizemix", images, labels, draw, lam=lam, boxes=boxes, pairing=pairing, out=out, mean=mean, std=std,
        dtype=dtype, masks=masks, seed=seed, generator=generator, backend=backend,
    )  # fmt: skip


def _check_alpha(op: str, alpha: float) -> None:
    check_number(op, "alpha", alpha)
    if not alpha > 0:
        fail(op, "alpha", "above 0", alpha)


def check_minmax(op: str, name: str, value: tuple[float, float] | None) -> tuple[float, float]:
    if value is None:
        return 0.0, 0.0
    minimum, maximum = float_pair(op, name, value)
    if not (0 <= minimum <= maximum <= 1 and maximum > 0):
        fail(op, name, "0 <= minimum <= maximum <= 1 and maximum > 0", value)
    return minimum, maximum
