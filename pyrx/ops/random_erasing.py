"""Random erasing and Cutout of whole batches: boxes drawn and filled in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrx import _library
from pyrx._backends import select
from pyrx._checks import (
    FLOAT_DTYPES,
    check_bool,
    check_choice,
    check_device,
    check_dtype,
    check_image_shape,
    check_integer,
    check_number,
    check_own_memory,
    check_tensor,
    fail,
    float_pair,
    is_read,
)
from pyrx._random import LEVELS, check_seed, level, seed_tensor
from pyrx.reference import random_erasing as reference
from pyrx.reference.batch_mix import memory_format
from pyrx.reference.random_erasing import CONST, CUTOUT, PIXEL, RANDOM_ERASING, Draw

ROW = "random_erasing"
MODES = ("const", "rand", "pixel")
MAX_BOXES = 64
MAX_CHANNELS = 64  # that value may have: it travels as a kernel argument


def _check_images(op: str, images: Tensor) -> None:
    check_image_shape(op, "images", images)
    if images.dtype != torch.uint8 and images.dtype not in FLOAT_DTYPES:
        fail(op, "images", "of dtype uint8, float16, bfloat16, float32 or float64", images.dtype, TypeError)


def _check(
    op: str, images: Tensor, seed: Tensor, boxes: Tensor | None, draw: Draw, mode: int, value: Sequence[float]
) -> None:
    """Everything that can be known without reading a tensor."""
    _check_images(op, images)
    is_bytes = images.dtype == torch.uint8
    if not (RANDOM_ERASING <= draw.kind <= CUTOUT and CONST <= mode <= PIXEL):
        fail(op, "kind and mode", "in [0, 1] and [0, 2]", f"{draw.kind} and {mode}")
    if is_bytes and mode != CONST:
        fail(op, "images", "of a floating-point dtype to be filled with noise", images.dtype, TypeError)
    samples, channels = images.shape[:2]
    if boxes is not None:
        check_dtype(op, "boxes", boxes, torch.int64)
        if boxes.dim() != 3 or boxes.shape[0] != samples or boxes.shape[2] != 4:
            fail(op, "boxes", f"of shape [N, K, 4] with N = {samples}", list(boxes.shape))
        if boxes.shape[1] > MAX_BOXES:
            fail(op, "boxes", f"of at most {MAX_BOXES} an image", boxes.shape[1])
        check_device(op, "boxes", boxes, images.device)
    check_seed(op, seed, images.device)
    if not 0 <= draw.prob <= LEVELS:
        fail(op, "prob", f"in [0, {LEVELS}]", draw.prob)
    if not 1 <= draw.min_count <= draw.max_count <= MAX_BOXES:
        got = f"{draw.min_count} and {draw.max_count}"
        fail(op, "min_count and max_count", f"1 <= min_count <= max_count <= {MAX_BOXES}", got)
    if not 0 <= draw.min_scale <= draw.max_scale <= 1:
        fail(op, "scale", "0 <= minimum <= maximum <= 1", (draw.min_scale, draw.max_scale))
    if not 1e-6 <= draw.min_ratio <= draw.max_ratio <= 1e6:
        fail(op, "ratio", "1e-6 <= minimum <= maximum <= 1e6", (draw.min_ratio, draw.max_ratio))
    if draw.num_splits < 0:
        fail(op, "num_splits", "at least 0", draw.num_splits)
    if len(value) != 1 and len(value) != channels:  # dynamo finds no symbolic size in a tuple
        fail(op, "value", f"of 1 or C = {channels} channels", len(value))
    if len(value) > MAX_CHANNELS:
        fail(op, "value", f"of at most {MAX_CHANNELS} channels", len(value))
    for each in value:
        if is_bytes and not (0 <= each <= 255 and each == int(each)):
            fail(op, "value", "a whole number in [0, 255] for uint8 images", each)


def _fake(images: Tensor, seed: Tensor, boxes: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *draw, mode, value = rest
    _check(ROW, images, seed, boxes, Draw(*draw), mode, value)
    count = Draw(*draw).max_count if boxes is None else boxes.shape[1]
    erased = torch.empty(images.shape, dtype=images.dtype, device=images.device, memory_format=memory_format(images))
    return erased, images.new_empty((images.shape[0], count, 4), dtype=torch.int64)


def _inplace_fake(images: Tensor, seed: Tensor, boxes: Tensor | None, *rest: Any) -> Tensor:
    *draw, mode, value = rest
    _check(ROW, images, seed, boxes, Draw(*draw), mode, value)
    count = Draw(*draw).max_count if boxes is None else boxes.shape[1]
    return images.new_empty((images.shape[0], count, 4), dtype=torch.int64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, boxes = output
    ctx.save_for_backward(inputs[1], boxes)
    ctx.mark_non_differentiable(boxes)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 15
    seed, boxes = ctx.saved_tensors
    return ctx.ops.random_erasing(grad, seed, boxes, *REPLAY, CONST, [0.0])[0], *(None,) * 14


_DRAW = (
    "Tensor seed, Tensor? boxes, int kind, int prob, int min_count, int max_count, float min_scale, float max_scale, "
    "float min_ratio, float max_ratio, int num_splits, bool per_sample, int filling, float[] value"
)
# of boxes that are given
REPLAY = Draw(RANDOM_ERASING, LEVELS, 1, 1, 0.0, 0.0, 1.0, 1.0, 0, True)
_library.define(
    ROW, "random_erasing", f"(Tensor images, {_DRAW}) -> (Tensor erased, Tensor boxes)",
    _fake, _backward, _setup, native_formula=False,
)  # fmt: skip
_library.define(ROW, "random_erasing_", f"(Tensor(a!) images, {_DRAW}) -> Tensor", _inplace_fake, writes=True)


def _erase(
    images: Tensor, seed: Tensor, boxes: Tensor | None, draw: Draw, mode: int, value: list[float], backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return reference.random_erasing(images, seed, boxes, draw, mode, value)
    return _library.namespace(backend).random_erasing(images, seed, boxes, *draw, mode, value)


def _check_boxes(op: str, boxes: Tensor, height: int, width: int) -> None:
    """What only the values tell, of CPU tensors."""
    y0, x0, y1, x1 = boxes.unbind(2)
    inside = (y0 >= 0) & (y0 <= y1) & (y1 <= height) & (x0 >= 0) & (x0 <= x1) & (x1 <= width)
    if not bool(inside.all()):
        fail(op, "boxes", f"0 <= y0 <= y1 <= {height} and 0 <= x0 <= x1 <= {width}", boxes[~inside][0].tolist())


def _erase_batch(
    op: str,
    images: Tensor,
    draw: Draw,
    mode: str,
    value: float | Sequence[float],
    inplace: bool,
    boxes: Tensor | None,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    backend: str | None,
    return_boxes: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    check_tensor(op, "images", images)
    _check_images(op, images)
    check_choice(op, "mode", mode, MODES)
    check_bool(op, inplace=inplace, return_boxes=return_boxes)
    expected = 'to be a float or a sequence of C floats (mode="rand" or "pixel" for noise)'
    values = []
    for each in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(each, bool) or not isinstance(each, (int, float)):
            fail(op, "value", expected, type(each).__name__, TypeError)
        check_number(op, "value", each)
        values.append(float(each))
    for name, count in (("min_count", draw.min_count), ("max_count", draw.max_count), ("num_splits", draw.num_splits)):
        check_integer(op, name, count, 0, 2**31 - 1)
    if boxes is not None:
        check_tensor(op, "boxes", boxes)
    if inplace:
        if torch.is_grad_enabled() and images.requires_grad:
            fail(op, "inplace", "of images that require no gradient", "images that do", RuntimeError)
        if not torch.compiler.is_compiling():
            check_own_memory(op, "inplace", images)
    device = images.device
    chosen = select(ROW, device.type, torch.float32 if images.dtype == torch.uint8 else images.dtype, backend)
    seed = seed_tensor(op, seed, generator, device)
    _check(op, images, seed, boxes, draw, MODES.index(mode), values)
    if boxes is not None and is_read(boxes):
        _check_boxes(op, boxes, images.shape[-2], images.shape[-1])
    arguments = (seed, boxes, draw, MODES.index(mode), values)
    if not inplace:
        erased, found = _erase(images, *arguments, chosen)
    elif chosen == "reference":
        erased, found = _erase(images, *arguments, chosen)
        erased = images.copy_(erased)
    else:
        erased = images
        found = _library.namespace(chosen).random_erasing_(images, seed, boxes, *draw, MODES.index(mode), values)
    return (erased, found) if return_boxes else erased


def random_erasing(
    images: Tensor,
    *,
    prob: float = 0.5,
    scale: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 3.3),
    value: float | Sequence[float] = 0.0,
    mode: str = "const",
    min_count: int = 1,
    max_count: int | None = None,
    num_splits: int = 0,
    inplace: bool = False,
    boxes: Tensor | None = None,
    per_sample: bool = True,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
    return_boxes: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Random erasing: boxes of random size, shape and place are filled, with boxes of its own for each image.

    Args:
        images: (N, C, H, W), or (N, C, T, H, W) with the same boxes in all frames (videos (N, T, C, H, W), as
            torchvision's, go by `.transpose(1, 2)`); uint8 (mode "const"), float16, bfloat16, float32 or float64.
            Contiguous and channels_last layouts are kept.
        prob: the chance that an image is erased, on a grid of 1/65536. Default 0.5.
        scale: a box's area as a share of the image's, uniform; divided by the image's number of boxes.
        ratio: a box's height over its width, log-uniform. A box that is not smaller than the image either way is drawn
            again, up to ten times, and is left out then.
        value: what mode "const" fills with: a float, or one for each channel. Default 0.0.
        mode: "const", "rand" (a standard normal for each box and channel) or "pixel" (one for each element).
        min_count, max_count: boxes of an erased image, a uniform number between the two, at most 64; max_count None
            means min_count. Later boxes lie over earlier ones.
        num_splits: above 1, the first N // num_splits images are left alone.
        inplace: only the boxes' bytes of `images` are written.
        boxes: (N, K, 4) int64 (y0, x0, y1, x1) to use in place of drawn ones: pixels [y0, y1) x [x0, x1).
        per_sample: False: one draw for the batch, the same boxes (and the same "rand" fills) in every image.
        seed: int, or int64 tensor of one element on the images' device. Default: drawn there from `generator`.
        generator: torch.Generator on the images' device. Default: torch's.
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.
        return_boxes: return (erased, boxes); boxes (N, K, 4) and the seed replay the call. Absent boxes are 0.

    Returns:
        Images of the same shape, dtype and layout; `images` itself for inplace=True. The gradient is 0 inside boxes.

    Equivalent to, for each box in order, `images[n, ..., y0:y1, x0:x1] = value`.

    Cost: one read and one write, in place one write of the boxes; one launch. In place, images that are not dense cost
    two copies more.

    Raises:
        ValueError: shapes, ranges; boxes outside the image where the images are on the CPU (on a GPU they are clipped).
        TypeError: dtypes, noise in uint8 images. RuntimeError: devices, a backend that cannot serve, inplace of images
        that require a gradient.

    Source: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020.
    """
    op = "random_erasing"
    check_bool(op, per_sample=per_sample)
    most = min_count if max_count is None else max_count
    draw = Draw(
        RANDOM_ERASING, level(op, "prob", prob), min_count, most, *float_pair(op, "scale", scale),
        *float_pair(op, "ratio", ratio), num_splits, per_sample,
    )  # fmt: skip
    return _erase_batch(op, images, draw, mode, value, inplace, boxes, seed, generator, backend, return_boxes)


def cutout(
    images: Tensor,
    *,
    length: float = 0.5,
    num_holes: int = 1,
    value: float | Sequence[float] = 0.0,
    mode: str = "const",
    prob: float = 1.0,
    inplace: bool = False,
    boxes: Tensor | None = None,
    per_sample: bool = True,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
    return_boxes: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cutout: `num_holes` squares of side floor(length * min(H, W)), uniform centres, clipped at the edges.

    `length` is in [0, 1], `num_holes` in 1 to 64, `prob` the chance that an image has holes at all; the other
    arguments, the result, its cost and its errors are those of `pyrx.random_erasing`.

    Equivalent to, for each hole, `images[n, ..., cy - s // 2 : cy - s // 2 + s, cx - s // 2 : cx - s // 2 + s] = value`
    within the image, s the side.

    Source: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
    """
    op = "cutout"
    check_bool(op, per_sample=per_sample)
    check_number(op, "length", length)
    share = float(length)
    if not 0 <= share <= 1:
        fail(op, "length", "in [0, 1]", length)
    check_integer(op, "num_holes", num_holes, 1, MAX_BOXES)
    draw = Draw(CUTOUT, level(op, "prob", prob), num_holes, num_holes, share, share, 1.0, 1.0, 0, per_sample)
    return _erase_batch(op, images, draw, mode, value, inplace, boxes, seed, generator, backend, return_boxes)
