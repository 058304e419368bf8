"""Alpha compositing: alpha * x + (1 - alpha) * y with an alpha a pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrx import _library
from pyrx._backends import select
from pyrx._checks import (
    FLOAT_DTYPES,
    accumulation_dtype,
    check_device,
    check_dtype,
    check_float,
    check_image_shape,
    check_shape,
    check_tensor,
    check_written,
    fail,
    is_read,
)
from pyrx.reference import blend as reference

ROW = "blend"
IMAGE_DTYPES = (torch.uint8, *FLOAT_DTYPES)


def _check_images(op: str, name: str, images: Tensor) -> None:
    check_image_shape(op, name, images)
    if images.dtype not in IMAGE_DTYPES:
        fail(op, name, "of dtype uint8, float16, bfloat16, float32 or float64", images.dtype, TypeError)


def check_alpha(op: str, name: str, alpha: Tensor, images: Tensor) -> None:
    check_tensor(op, name, alpha)
    if alpha.dtype != torch.bool and alpha.dtype not in FLOAT_DTYPES:
        fail(op, name, "of dtype bool, float16, bfloat16, float32 or float64", alpha.dtype, TypeError)
    broadcast = images.dim() - 2
    if alpha.dim() != images.dim() or any(
        alpha.shape[i] != images.shape[i] and (i >= broadcast or alpha.shape[i] != 1) for i in range(images.dim())
    ):
        names = "[N or 1, C or 1, H, W]" if broadcast == 2 else "[N or 1, C or 1, T or 1, H, W]"
        fail(op, name, f"of shape {names} of images of {list(images.shape)}", list(alpha.shape))
    check_device(op, name, alpha, images.device)


def _check_blend(
    op: str, name: str, images: Tensor, x: Tensor | None, y: Tensor | None, alpha: Tensor, partner: Tensor | None
) -> None:
    """Everything that can be known without reading a tensor."""
    _check_images(op, name, images)
    if x is not None:
        check_dtype(op, "x", x, images.dtype)
        check_shape(op, "x", x, "[N, C, ...]", images.shape)
        check_device(op, "x", x, images.device)
    if y is not None:
        check_dtype(op, "y", y, images.dtype)
        if partner is None:
            check_shape(op, "y", y, "[N, C, ...]", images.shape)
        elif y.dim() != images.dim() or y.shape[1:] != images.shape[1:]:
            fail(op, "y", f"of shape [M, C, ...] with [C, ...] = {list(images.shape[1:])}", list(y.shape))
        check_device(op, "y", y, images.device)
    check_alpha(op, "alpha", alpha, images)
    if partner is not None:
        check_dtype(op, "partner", partner, torch.int64)
        check_shape(op, "partner", partner, "[N]", images.shape[:1])
        check_device(op, "partner", partner, images.device)


def _check_out(op: str, out: Tensor, x: Tensor) -> None:
    check_dtype(op, "out", out, x.dtype)
    check_shape(op, "out", out, "[N, C, ...]", x.shape)
    check_device(op, "out", out, x.device)


def _like(images: Tensor, layout: Tensor) -> Tensor:
    return torch.empty(
        images.shape, dtype=images.dtype, device=images.device, memory_format=reference.sample_format(layout)
    )


def _blend_fake(x: Tensor, y: Tensor, alpha: Tensor, partner: Tensor | None) -> Tensor:
    _check_blend("blend", "x", x, None, y, alpha, partner)
    return _like(x, x)


def _out_fake(out: Tensor, x: Tensor, y: Tensor, alpha: Tensor, partner: Tensor | None) -> None:
    _check_blend("blend_out", "x", x, None, y, alpha, partner)
    _check_out("blend_out", out, x)


def _backward_fake(
    grad: Tensor, x: Tensor | None, y: Tensor | None, alpha: Tensor, partner: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    op = "blend_backward"
    _check_blend(op, "grad", grad, x, y, alpha, partner)
    check_float(op, "grad", grad)
    if needs[2] and (x is None or y is None):
        fail(op, "x and y", "to be given for the gradient of alpha", None)
    like = grad if x is None else x
    grad_x, grad_y = (_like(grad, like) if needed else grad.new_empty(0) for needed in needs[:2])
    accumulate = accumulation_dtype(grad.dtype)
    shape = [grad.shape[0], alpha.shape[1], *grad.shape[2:]] if needs[2] else [0]
    layout = reference.sample_format(like) if needs[2] else torch.contiguous_format
    return grad_x, grad_y, torch.empty(shape, dtype=accumulate, device=grad.device, memory_format=layout)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, alpha, partner = inputs
    ctx.needs = [x.requires_grad, y.requires_grad, alpha.requires_grad]
    ctx.samples = y.shape[0]
    ctx.save_for_backward(*(x, y) if alpha.requires_grad else (None, None), alpha, partner)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y, alpha, partner = ctx.saved_tensors
    grad_x, grad_y, grad_alpha = ctx.ops.blend_backward(grad, x, y, alpha, partner, ctx.needs)
    if ctx.needs[1] and partner is not None:
        grad_y = reference.gather_backward(grad_y, partner, ctx.samples)
    if ctx.needs[2]:
        grad_alpha = grad_alpha.sum_to_size(alpha.shape).to(alpha.dtype)
    found = _library.differentiable_once("blend", (grad_x, grad_y, grad_alpha))
    return *(each if needed else None for each, needed in zip(found, ctx.needs, strict=True)), None


_OPERANDS = "Tensor x, Tensor y, Tensor alpha, Tensor? partner"
_library.define(ROW, "blend", f"({_OPERANDS}) -> Tensor", _blend_fake, _backward, _setup, native_formula=False)
_library.define(ROW, "blend_out", f"(Tensor(a!) out, {_OPERANDS}) -> ()", _out_fake, writes=True)
_library.define(
    ROW,
    "blend_backward",
    "(Tensor grad, Tensor? x, Tensor? y, Tensor alpha, Tensor? partner, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)


def check_out(op: str, out: Tensor, images: Tensor, inputs: Sequence[Tensor]) -> None:
    """Of a public function's out=."""
    _check_out(op, out, images)
    check_written(op, "out", out, inputs)


def blend(
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    *,
    partner: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Alpha compositing: `alpha * x + (1 - alpha) * y`, in one pass, with an alpha a pixel.

    Args:
        x: (N, C, H, W), or (N, C, T, H, W); uint8, float16, bfloat16, float32 or float64; contiguous and channels_last
            layouts are read as they are, expanded samples too.
        y: of x's dtype and shape; with `partner` (M, C, ...).
        alpha: the matte, in [0, 1]: (N or 1, C or 1, H, W), for video (N or 1, C or 1, T or 1, H, W); bool, float16,
            bfloat16, float32 or float64.
        partner: (N,) int64 in [0, M): the sample of y for each of x's. Default: its own.
        out: a tensor of x's shape and dtype that takes the result.
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.

    Returns:
        A tensor of x's shape and dtype, channels_last where x is, else contiguous. Products and sum are rounded one by
        one, in float32 (float64 for float64), so that every backend gives the same bits; uint8 results are rounded to
        the nearest, halves to even, and lie in [0, 255]. Where alpha is 1 (0) the result is x (y) itself, and NaN and
        infinity of the other do not show. An alpha outside [0, 1] extrapolates.

    Gradients: of x, y and alpha, the latter summed over what it was broadcast over, the same bits from run to run. Of
    NaN in the gradient of the result, x gets nothing where alpha is 0, y where it is 1. No double backward.

    Equivalent to `torch.lerp(y[partner], x, alpha)`, up to rounding.

    Cost: one read of x, y and alpha and one write; the backward reads the gradient and alpha, x and y too where alpha
    needs a gradient, and writes the gradients that are needed, in one pass.

    Raises:
        ValueError: shapes; partners outside [0, M), where the tensors are on the CPU (on a GPU such a sample of y is
        NaN, for uint8 0). TypeError: dtypes. RuntimeError: devices, a backend that cannot serve, `out` that requires
        a gradient or is beside tensors that do.

    Example: prompting a model by blurring what lies outside of N masks of one image (Yang et al., "Fine-Grained Visual
    Prompting", NeurIPS 2023). The image is blurred once, and neither it nor its blur is copied N times:

    >>> image, masks = torch.rand(1, 3, 64, 64), torch.rand(5, 1, 64, 64) > 0.5
    >>> blurred = F.avg_pool2d(image, 15, 1, 7)
    >>> pyrx.blend(image.expand(5, -1, -1, -1), blurred.expand(5, -1, -1, -1), masks).shape
    torch.Size([5, 3, 64, 64])

    Source: Porter and Duff, "Compositing Digital Images", SIGGRAPH 1984 (the operator over, of an opaque y).
    """
    check_tensor("blend", "x", x)
    check_tensor("blend", "y", y)
    _check_blend("blend", "x", x, None, y, alpha, partner)
    accumulate = accumulation_dtype(x.dtype)
    chosen = select(ROW, x.device.type, accumulate, backend)
    if out is not None:
        check_out("blend", out, x, (x, y, alpha))
    if partner is not None and is_read(partner):
        outside = (partner < 0) | (partner >= y.shape[0])
        if bool(outside.any()):
            fail("blend", "partner", f"in [0, {y.shape[0]})", int(partner[outside][0]))
    if chosen == "reference":
        found = reference.blend(x, y, alpha, partner)
        return found if out is None else out.copy_(found)
    ops = _library.namespace(chosen)
    if out is None:
        return ops.blend(x, y, alpha, partner)
    ops.blend_out(out, x, y, alpha, partner)
    return out
