"""Cross-entropy against the two classes a row that CutMix and mixup give, in one pass over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrx import _library
from pyrx._backends import select
from pyrx._checks import accumulation_dtype, check_device, check_float, check_integer, check_shape, fail
from pyrx._linear import is_autocast
from pyrx._losses import (
    check_class_weight,
    check_loss_dtype,
    check_options,
    check_vectors,
    saved_gradient_dtype,
    scaled,
    split_mixed,
)
from pyrx.reference import mixed_cross_entropy as reference
from pyrx.targets import MixedTarget

OP = "mixed_cross_entropy"
SCALE = OP + "_scale_"


def _check(
    input: Tensor,
    target: Tensor,
    target_b: Tensor,
    lam: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> None:
    """Everything that can be known without reading a tensor; input (N, C)."""
    check_float(OP, "input", input)
    if input.dim() != 2:
        fail(OP, "input", "of shape [N, C]", list(input.shape))
    rows, classes = input.shape
    if classes < 1:
        fail(OP, "input", "of at least one class", list(input.shape))
    accumulation, device = accumulation_dtype(input.dtype), input.device
    ids = (("target", target, torch.int64), ("target_b", target_b, torch.int64), ("lam", lam, accumulation))
    check_vectors(OP, ids, "[N]", rows, device)
    check_vectors(OP, (("weight", weight, accumulation),), "[C]", classes, device)
    check_options(OP, label_smoothing, reduction)


def _fake(
    input: Tensor,
    target: Tensor,
    target_b: Tensor,
    lam: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    needs_grad: bool,
    loss_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    _check(input, target, target_b, lam, weight, ignore_index, label_smoothing, reduction)
    check_loss_dtype(OP, "loss_dtype", loss_dtype, input.dtype)
    loss = input.new_empty(input.shape[:1] if reduction == "none" else (), dtype=loss_dtype)
    return loss, input.new_empty(input.shape if needs_grad else (0, 0), dtype=saved_gradient_dtype(input.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    gradient = output[1]
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient)
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    gradient = None
    if grad_loss is not None:
        found = scaled(ctx.ops.mixed_cross_entropy_scale_, ctx.saved_tensors, grad_loss, ctx.dtype)
        (gradient,) = _library.differentiable_once(OP, found)
    return (gradient, *[None] * 9)


def _scale_fake(gradient: Tensor, grad_loss: Tensor) -> None:
    check_float(SCALE, "gradient", gradient)
    if gradient.dim() != 2 or not gradient.is_contiguous():
        fail(SCALE, "gradient", "to be contiguous, of shape [N, C]", list(gradient.shape))
    check_loss_dtype(SCALE, "grad_loss", grad_loss.dtype, gradient.dtype)
    if grad_loss.dim() != 0:
        check_shape(SCALE, "grad_loss", grad_loss, "[N]", gradient.shape[:1])
    check_device(SCALE, "grad_loss", grad_loss, gradient.device)


_library.define(
    OP,
    OP,
    "(Tensor input, Tensor target, Tensor target_b, Tensor lam, Tensor? weight, int ignore_index, "
    "float label_smoothing, str reduction, bool needs_grad, ScalarType loss_dtype) -> (Tensor, Tensor)",
    _fake,
    _backward,
    _setup,
)
_library.define(OP, SCALE, "(Tensor(a!) gradient, Tensor grad_loss) -> ()", _scale_fake)


def _rows(input: Tensor) -> Tensor:
    """(N, C, ...) as (N * ..., C)."""
    if input.dim() == 2:
        return input
    return input.movedim(1, -1).flatten(0, -2) if input.dim() > 2 else input.unsqueeze(0)


def mixed_cross_entropy(
    input: Tensor,
    target: MixedTarget,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """The loss of CutMix and mixup: `lam * CE(input, a) + (1 - lam) * CE(input, b)` without a one-hot tensor.

    Args:
        input: logits (N, C), (C,) or (N, C, d1, ...), as F.cross_entropy takes them; float16, bfloat16, float32 or
            float64, any strides.
        target: `MixedTarget(a, b, lam)`, each (N,), () or (N, d1, ...): class ids int64, lam floating-point, the weight
            of class a, in [0, 1].
        weight: (C,) class weights, no gradient. Default ones.
        ignore_index: class id whose component counts nothing, neither in the loss nor in what "mean" divides by.
        reduction: "mean" (over the sum of the lam-weighted class weights), "sum" or "none".
        label_smoothing: in [0, 1]. Default 0.
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.

    Returns:
        A scalar, or for "none" a tensor of target.a's shape; input's dtype as F.cross_entropy's, under autocast float32
        (float64 for float64). All components ignored gives what F.cross_entropy gives: nan for "mean".

    Equivalent to::

        a, b = (F.cross_entropy(input, ids, weight, reduction="none") for ids in (target.a, target.b))
        rows = target.lam * a + (1 - target.lam) * b
        rows, rows.sum() or rows.sum() / (target.lam * weight[target.a] + (1 - target.lam) * weight[target.b]).sum()

    and without class weights to `F.cross_entropy(input, lam * one_hot(a) + (1 - lam) * one_hot(b))`, which has N * C
    probabilities to make, read and multiply.

    Cost: one read of the logits and, where they need a gradient, one write of it in the same pass. It is kept for the
    backward (float16's in float32), which spends one more pass on it only under an upstream gradient that is not one.
    Logits whose classes are not next to each other are copied first.

    Raises:
        TypeError: dtypes. ValueError: shapes, values and, on the CPU, class ids out of range (a GPU makes the loss
        nan). RuntimeError: devices, a backend that cannot serve, and a second differentiation.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV
    2019; Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
    """
    check_float(OP, "input", input)
    if input.dim() < 1:
        fail(OP, "input", "of shape [N, C, ...] or [C]", list(input.shape))
    if not isinstance(target, MixedTarget):
        fail(OP, "target", "to be a MixedTarget", type(target).__name__, TypeError)
    check_class_weight(OP, weight)
    check_options(OP, label_smoothing, reduction)
    check_integer(OP, "ignore_index", ignore_index, -(2**63), 2**63 - 1)
    lead = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    dtype, device_type = input.dtype, input.device.type
    accumulation = accumulation_dtype(dtype)
    loss_dtype = accumulation if is_autocast(device_type) else dtype
    ids_and_share = split_mixed(OP, target, accumulation, lead)
    class_weight = None if weight is None else weight.to(accumulation)
    chosen = select(OP, device_type, dtype, backend)
    arguments = (_rows(input), *ids_and_share, class_weight, ignore_index, label_smoothing, reduction)
    if chosen == "reference":
        _check(*arguments)
        loss = reference.mixed_cross_entropy(*arguments, loss_dtype)
    else:
        needs_grad = torch.is_grad_enabled() and input.requires_grad
        loss = _library.namespace(chosen).mixed_cross_entropy(*arguments, needs_grad, loss_dtype)[0]
    return loss.reshape(lead) if reduction == "none" else loss
