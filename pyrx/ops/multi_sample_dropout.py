"""Multi-sample dropout: the M dropped copies, and the whole head (dropout, linear, cross-entropy) in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrx import _library
from pyrx._backends import select
from pyrx._checks import (
    accumulation_dtype,
    check_choice,
    check_device,
    check_dtype,
    check_float,
    check_integer,
    check_shape,
    fail,
)
from pyrx._linear import autocast, is_autocast, rows_of
from pyrx._losses import (
    check_class_weight,
    check_loss_dtype,
    check_options,
    check_target,
    check_vectors,
    class_ids,
    saved_gradient_dtype,
    scaled,
    split_mixed,
)
from pyrx._random import check_seed, is_antithetic, seed_tensor, thresholds
from pyrx.reference import multi_sample_dropout as reference
from pyrx.targets import MixedTarget

ROW = "multi_sample_dropout"
HEAD = "multi_sample_dropout_cross_entropy"
COMBINES = ("losses", "logits")


def _check_thresholds(op: str, values: Sequence[int]) -> None:
    if len(values) < 1:
        fail(op, "thresholds", "of at least one sample", list(values))
    for value in values:
        if not 0 <= value < 65536:
            fail(op, "thresholds", "in [0, 65536)", value)


def _expand_fake(input: Tensor, seed: Tensor, thresholds: Sequence[int], antithetic: bool) -> Tensor:
    check_float(ROW, "input", input)
    check_seed(ROW, seed, input.device)
    _check_thresholds(ROW, thresholds)
    one = torch.empty_like(input)
    return one.new_empty_strided((len(thresholds), *input.shape), (input.numel(), *one.stride()))


def _fold_fake(grad: Tensor, seed: Tensor, thresholds: Sequence[int], antithetic: bool) -> Tensor:
    op = "multi_sample_dropout_fold"
    check_float(op, "grad", grad)
    check_seed(op, seed, grad.device)
    _check_thresholds(op, thresholds)
    if grad.dim() == 0 or grad.shape[0] != len(thresholds):
        fail(op, "grad", f"of shape [M, ...] with M = {len(thresholds)}", list(grad.shape))
    return torch.empty_like(grad[0])


def _copies_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.thresholds, ctx.antithetic = inputs
    ctx.save_for_backward(seed)


def _expand_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    folded = ctx.ops.multi_sample_dropout_fold(grad, *ctx.saved_tensors, ctx.thresholds, ctx.antithetic)
    return folded, None, None, None


def _fold_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    copies = ctx.ops.multi_sample_dropout(grad, *ctx.saved_tensors, ctx.thresholds, ctx.antithetic)
    return copies, None, None, None


_COPIES = "(Tensor {}, Tensor seed, int[] thresholds, bool antithetic) -> Tensor"
_library.define(ROW, ROW, _COPIES.format("input"), _expand_fake, _expand_backward, _copies_setup)
_library.define(ROW, "multi_sample_dropout_fold", _COPIES.format("grad"), _fold_fake, _fold_backward, _copies_setup)


def _check_head(
    op: str,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    seed: Tensor,
    thresholds: Sequence[int],
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> None:
    """Everything that can be known without reading a tensor; input (B, D), linear_weight (C, D)."""
    check_float(op, "input", input)
    accumulation, device = accumulation_dtype(input.dtype), input.device
    if input.dim() != 2:
        fail(op, "input", "of shape [B, D]", list(input.shape))
    rows, features = input.shape
    check_dtype(op, "linear_weight", linear_weight, input.dtype)
    if linear_weight.dim() != 2 or linear_weight.shape[1] != features:
        fail(op, "linear_weight", f"of shape [C, D] with D = {features}", list(linear_weight.shape))
    classes = linear_weight.shape[0]
    if classes < 1:
        fail(op, "linear_weight", "of at least one class", list(linear_weight.shape))
    check_device(op, "linear_weight", linear_weight, device)
    vectors = (("linear_bias", linear_bias, input.dtype), ("weight", weight, accumulation))
    check_vectors(op, vectors, "[C]", classes, device)
    if target.dtype == torch.int64:
        check_shape(op, "target", target, "[B]", [rows])
    else:
        check_dtype(op, "target", target, accumulation)
        check_shape(op, "target", target, "[B, C]", [rows, classes])
    check_device(op, "target", target, device)
    if (target_b is None) != (lam is None):
        fail(op, "target_b and lam", "together", "one of them")
    if target_b is not None and lam is not None:
        if target.dtype != torch.int64:
            fail(op, "target", "of dtype torch.int64 beside target_b", target.dtype, TypeError)
        check_vectors(op, (("target_b", target_b, torch.int64), ("lam", lam, accumulation)), "[B]", rows, device)
    check_seed(op, seed, device)
    _check_thresholds(op, thresholds)
    check_options(op, label_smoothing, reduction)
    if target.dtype != torch.int64 and ignore_index >= 0:
        fail(op, "ignore_index", "negative where target holds probabilities", ignore_index)


def _gradients(tensors: Sequence[Tensor | None], needs_grad: Sequence[bool], dtype: torch.dtype) -> list[Tensor]:
    """A tensor like each that needs a gradient, an empty one for each that does not."""
    return [
        like.new_empty(like.shape, dtype=dtype)
        if like is not None and needed
        else tensors[0].new_empty((0,), dtype=dtype)  # type: ignore[union-attr]
        for like, needed in zip(tensors, needs_grad, strict=True)
    ]


def _head_fake(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    seed: Tensor,
    thresholds: Sequence[int],
    antithetic: bool,
    combine_logits: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    needs_grad: Sequence[bool],
    loss_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (input, linear_weight, linear_bias)
    _check_head(
        HEAD, *tensors, target, target_b, lam, weight, seed, thresholds, ignore_index, label_smoothing, reduction
    )
    check_loss_dtype(HEAD, "loss_dtype", loss_dtype, input.dtype)
    loss = input.new_empty(input.shape[:1] if reduction == "none" else (), dtype=loss_dtype)
    if reduction == "none":
        needs_grad = (False, False, False)
    grad_input, grad_weight, grad_bias = _gradients(tensors, needs_grad, saved_gradient_dtype(input.dtype))
    return loss, grad_input, grad_weight, grad_bias


def _head_backward_fake(
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    seed: Tensor,
    thresholds: Sequence[int],
    antithetic: bool,
    combine_logits: bool,
    ignore_index: int,
    label_smoothing: float,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    op = HEAD + "_backward"
    tensors = (input, linear_weight, linear_bias)
    _check_head(op, *tensors, target, target_b, lam, weight, seed, thresholds, ignore_index, label_smoothing, "none")
    check_loss_dtype(op, "grad_loss", grad_loss.dtype, input.dtype)
    check_shape(op, "grad_loss", grad_loss, "[B]", [input.shape[0]])
    check_device(op, "grad_loss", grad_loss, input.device)
    grad_input, grad_weight, grad_bias = _gradients(tensors, needs_grad, input.dtype)
    return grad_input, grad_weight, grad_bias


def _head_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    reduction, needs_grad = inputs[13], inputs[14]
    loss, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    needs_bias = needs_grad[2] and inputs[2] is not None
    ctx.needs, ctx.recompute = (*needs_grad[:2], needs_bias), reduction == "none"
    if ctx.recompute:
        # input, linear_weight, linear_bias, target, target_b, lam, weight, seed
        ctx.save_for_backward(*inputs[:8])
        ctx.options = inputs[8:13]
    else:
        ctx.save_for_backward(*gradients)
        ctx.dtype = inputs[0].dtype


def _scale_fake(grad_input: Tensor, grad_weight: Tensor, grad_bias: Tensor, grad_loss: Tensor) -> None:
    op, dtype = HEAD + "_scale_", grad_input.dtype
    check_float(op, "grad_input", grad_input)
    for each in (grad_input, grad_weight, grad_bias):
        check_dtype(op, "gradients", each, dtype)
        check_device(op, "gradients", each, grad_loss.device)
        if not each.is_contiguous():
            fail(op, "gradients", "to be contiguous", list(each.stride()))
    check_loss_dtype(op, "grad_loss", grad_loss.dtype, dtype)
    check_shape(op, "grad_loss", grad_loss, "[]", [])


def _head_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None, None, None]
    if grad_loss is not None:
        if ctx.recompute:
            found = ctx.ops.multi_sample_dropout_cross_entropy_backward(
                grad_loss.contiguous(), *ctx.saved_tensors, *ctx.options, ctx.needs
            )
        else:
            scale_ = ctx.ops.multi_sample_dropout_cross_entropy_scale_
            found = scaled(scale_, ctx.saved_tensors, grad_loss, ctx.dtype)
        found = _library.differentiable_once(HEAD, found)
        gradients = [each if needed else None for each, needed in zip(found, ctx.needs, strict=True)]
    return (*gradients, *[None] * 13)


_TENSORS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? target_b, Tensor? lam, "
    "Tensor? weight, Tensor seed"
)
_OPTIONS = "int[] thresholds, bool antithetic, bool combine_logits, int ignore_index, float label_smoothing"
_library.define(
    ROW,
    HEAD,
    f"({_TENSORS}, {_OPTIONS}, str reduction, bool[3] needs_grad, ScalarType loss_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _head_fake,
    _head_backward,
    _head_setup,
)
_library.define(
    ROW,
    HEAD + "_backward",
    f"(Tensor grad_loss, {_TENSORS}, {_OPTIONS}, bool[3] needs_grad) -> (Tensor, Tensor, Tensor)",
    _head_backward_fake,
)
_library.define(
    ROW,
    HEAD + "_scale_",
    "(Tensor(a!) grad_input, Tensor(b!) grad_weight, Tensor(c!) grad_bias, Tensor grad_loss) -> ()",
    _scale_fake,
)


def multi_sample_dropout(
    input: Tensor,
    num_samples: int = 8,
    p: float | Sequence[float] = 0.5,
    *,
    sampling: str = "independent",
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """M differently dropped copies of the same features, for heads and losses of your own.

    Args:
        input: any shape and strides; float16, bfloat16, float32 or float64.
        num_samples: M, the number of copies. Default 8.
        p: probability of dropping an element, in [0, 1), or M of them. Default 0.5.
        sampling: "independent", or "antithetic": samples 2j and 2j + 1 are complementary (at p = 0.5 each element is
            kept by exactly one of them).
        seed: int, or int64 tensor of one element on the input's device. Default: drawn there from `generator`.
        generator: torch.Generator on the input's device. Default: torch's.
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.

    Returns:
        `(M, *input.shape)`; each sample has input's strides.

    Equivalent to `torch.stack([pyrx.dropout(input, p, sample=m, seed=seed) for m in range(M)])`.

    Cost: one read and M writes forward; the backward folds the M gradients through the same masks, drawn again: M reads
    and one write, nothing stored.

    Raises:
        TypeError: integer or complex input. ValueError: p, num_samples or sampling out of range. RuntimeError: a seed
        on another device, or a backend that cannot serve.

    Source: Inoue, "Multi-Sample Dropout for Accelerated Training and Better Generalization", 2019.
    """
    check_float(ROW, "input", input)
    t = thresholds(ROW, p, num_samples)
    antithetic = is_antithetic(ROW, sampling)
    chosen = select(ROW, input.device.type, input.dtype, backend)
    seed = seed_tensor(ROW, seed, generator, input.device)
    if chosen == "reference":
        return reference.multi_sample_dropout(input, seed, t, antithetic)
    return _library.namespace(chosen).multi_sample_dropout(input, seed, t, antithetic)


def _split_target(
    target: Tensor | MixedTarget, dtype: torch.dtype, lead: Sequence[int]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(target, target_b, lam) with the leading dimensions flattened, floats in the accumulation dtype."""
    if isinstance(target, MixedTarget):
        return split_mixed(HEAD, target, dtype, lead)
    if not check_target(HEAD, "target", target).is_floating_point():
        return class_ids(HEAD, "target", target, lead), None, None
    check_float(HEAD, "target", target)
    if target.dim() != len(lead) + 1 or list(target.shape[:-1]) != list(lead):
        fail(HEAD, "target", f"of shape [..., C] = {[*lead, 'C']}", list(target.shape))
    return rows_of(target).to(dtype), None, None


def multi_sample_dropout_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | MixedTarget,
    *,
    linear_bias: Tensor | None = None,
    num_samples: int = 8,
    p: float | Sequence[float] = 0.5,
    combine: str = "losses",
    sampling: str = "independent",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multi-sample dropout, the shared linear layer and the cross-entropy of every sample, in one op.

    Args:
        input: (..., D) features; float16, bfloat16, float32 or float64; under autocast cast as F.linear casts.
        linear_weight: (C, D), input's dtype.
        target: (...) int64 class ids; or (..., C) floating-point probabilities; or `MixedTarget(a, b, lam)`, whose
            loss is `lam * CE(a) + (1 - lam) * CE(b)` without a one-hot tensor.
        linear_bias: (C,), input's dtype. Default none.
        num_samples: M, the number of dropout samples. Default 8.
        p: probability of dropping a feature, in [0, 1), or M of them. Default 0.5.
        combine: "losses": the mean of the M losses (the paper). "logits": the loss of the mean of the M logits, which
            is never larger (cross-entropy is convex) and costs one GEMM.
        sampling: "independent", or "antithetic": samples 2j and 2j + 1 are complementary; at p = 0.5 M samples cost
            M / 2 + 1 GEMMs.
        weight: (C,) class weights, no gradient. Default ones.
        ignore_index: class id whose rows count nothing (of a MixedTarget: whose component counts nothing).
        label_smoothing: in [0, 1]. Default 0.
        reduction: "mean" (over the rows as F.cross_entropy averages: class ids by the sum of their weights,
            probabilities by the number of rows; a MixedTarget by the sum of its lam-weighted class weights), "sum" or
            "none".
        seed: int, or int64 tensor of one element on the input's device. Default: drawn there from `generator`.
        generator: torch.Generator on the input's device. Default: torch's.
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.

    Returns:
        A scalar, or for "none" a tensor of target's leading shape, each entry the mean over the M samples; input's
        dtype, float32 under autocast. All rows ignored gives what F.cross_entropy gives: nan for "mean".

    Equivalent to::

        masks = [pyrx.dropout_mask(input.shape, p, seed, m) for m in range(M)]
        logits = [F.linear(torch.where(mask, input / (1 - p), 0), linear_weight, linear_bias) for mask in masks]
        sum(F.cross_entropy(each, target) for each in logits) / M               # combine="losses"
        F.cross_entropy(sum(logits) / M, target)                                # combine="logits"

    Cost: three GEMMs of (B * M, D, C) multiply-adds forward and backward together, M / 2 + 1 in place of M for
    antithetic samples at p = 0.5, 1 for combine="logits". Memory is bounded whatever M is: no mask, dropped copy or
    logits outlive a chunk of rows (on a GPU about 64 MiB). For "mean" and "sum" the gradients are made in the forward,
    for "none" in the backward.

    Raises:
        TypeError: dtypes. ValueError: shapes, values and, on the CPU, class ids out of range (a GPU makes the loss
        nan). RuntimeError: devices, a backend that cannot serve, and a second differentiation.

    Source: Inoue, "Multi-Sample Dropout for Accelerated Training and Better Generalization", 2019. The names follow
    torch.nn.functional.linear_cross_entropy.
    """
    check_float(HEAD, "input", input)
    check_float(HEAD, "linear_weight", linear_weight)
    if input.dim() < 1:
        fail(HEAD, "input", "of shape [..., D]", list(input.shape))
    if linear_bias is not None:
        check_float(HEAD, "linear_bias", linear_bias)
    check_class_weight(HEAD, weight)
    t = thresholds(HEAD, p, num_samples)
    check_choice(HEAD, "combine", combine, COMBINES)
    check_options(HEAD, label_smoothing, reduction)
    check_integer(HEAD, "ignore_index", ignore_index, -(2**63), 2**63 - 1)
    antithetic = is_antithetic(HEAD, sampling)
    device_type = input.device.type
    under_autocast = is_autocast(device_type)
    features, classifier, bias = input, linear_weight, linear_bias
    if under_autocast:
        features, classifier, bias = autocast((input, linear_weight, linear_bias), device_type)  # type: ignore[assignment]
    accumulation = accumulation_dtype(features.dtype)
    loss_dtype = accumulation if under_autocast else features.dtype
    lead = features.shape[:-1]
    target_a, target_b, lam = _split_target(target, accumulation, lead)
    features = rows_of(features)
    class_weight = None if weight is None else weight.to(accumulation)
    chosen = select(ROW, device_type, features.dtype, backend)
    seed = seed_tensor(HEAD, seed, generator, input.device)
    arguments = (features, classifier, bias, target_a, target_b, lam, class_weight, seed, t)
    options = (antithetic, combine == "logits", ignore_index, label_smoothing, reduction)
    if chosen == "reference":
        _check_head(HEAD, *arguments, *options[2:])
        loss = reference.multi_sample_dropout_cross_entropy(*arguments, *options).to(loss_dtype)
    else:
        grad = torch.is_grad_enabled()
        needs = [grad and each is not None and each.requires_grad for each in (features, classifier, bias)]
        loss = getattr(_library.namespace(chosen), HEAD)(*arguments, *options, needs, loss_dtype)[0]
    return loss.reshape(lead) if reduction == "none" else loss
