"""Masked optimizer steps: AdamW and SGD of weights under N:M masks, fused with making the masks anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrx import _library
from pyrx._backends import select
from pyrx._checks import (
    check_bool,
    check_choice,
    check_device,
    check_dtype,
    check_float,
    check_integer,
    check_number,
    check_own_values,
    check_shape,
    check_tensor,
    fail,
)
from pyrx.ops.nm_sparsity import check_bits, check_nm
from pyrx.reference import masked_update as reference
from pyrx.reference.masked_update import RULES

ROW = "masked_update"


def check_weight(op: str, argument: str, weight: Tensor, n: int, m: int, dim: int, pad: bool = False) -> None:
    """Of a weight that is cut into groups of m along dim, from either end."""
    check_float(op, argument, weight)
    check_nm(op, n, m)
    dims = weight.dim()
    if dims == 0:
        fail(op, argument, "of at least one dimension", list(weight.shape))
    check_integer(op, "dim", dim, -dims, dims - 1)
    if not pad and weight.shape[dim] % m != 0:
        fail(op, argument, f"of a size along dimension {dim % dims} that m = {m} divides", list(weight.shape))


def _check(
    op: str,
    weights: Sequence[Tensor],
    moving: dict[str, Sequence[Tensor]],
    masks: Sequence[Tensor],
    lr_tensor: Tensor | None,
    n: int,
    m: int,
    dim: int,
    rule: int,
    steps: Sequence[Tensor] | None = None,
) -> None:
    """Everything that can be known without reading a tensor; `moving` have the shape and dtype of their weights."""
    check_nm(op, n, m)
    check_integer(op, "rule", rule, 0, len(RULES) - 1)
    lists = {**moving, "masks": masks} if steps is None else {**moving, "masks": masks, "steps": steps}
    for name, each in lists.items():
        if len(each) != len(weights):
            fail(op, name, f"of as many tensors as weights = {len(weights)}", len(each))
    for i, weight in enumerate(weights):
        check_weight(op, f"weights[{i}]", weight, n, m, dim)
        check_dtype(op, f"weights[{i}]", weight, weights[0].dtype)
        check_device(op, f"weights[{i}]", weight, weights[0].device)
        for name, each in moving.items():
            check_dtype(op, f"{name}[{i}]", each[i], weight.dtype)
            check_shape(op, f"{name}[{i}]", each[i], "of its weight", weight.shape)
            check_device(op, f"{name}[{i}]", each[i], weight.device)
        check_bits(op, f"masks[{i}]", masks[i], weight)
        if steps is not None:
            _check_scalar(op, f"steps[{i}]", steps[i], torch.float32, weight.device)
    if lr_tensor is not None and len(weights) > 0:
        _check_scalar(op, "lr_tensor", lr_tensor, torch.float64, weights[0].device)


def _check_scalar(op: str, argument: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    check_dtype(op, argument, value, dtype)
    check_device(op, argument, value, device)
    if value.numel() != 1:
        fail(op, argument, "of one element", list(value.shape))


def _adamw_fake(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masks: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr_tensor: Tensor | None,
    n: int,
    m: int,
    dim: int,
    magnitude: bool,
    rule: int,
    *rest: Any,
) -> None:
    moving = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check("masked_adamw", weights, moving, masks, lr_tensor, n, m, dim, rule, steps)


def _sgd_fake(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    masks: Sequence[Tensor],
    lr_tensor: Tensor | None,
    n: int,
    m: int,
    dim: int,
    magnitude: bool,
    rule: int,
    strength: float,
    refresh: bool,
    lr: float,
    momentum: float,
    *rest: Any,
) -> None:
    moving = {"grads": grads}
    if momentum != 0:
        moving["momentum_buffers"] = momentum_buffers
    elif len(momentum_buffers) > 0:
        fail("masked_sgd", "momentum_buffers", "to be empty without momentum", len(momentum_buffers))
    _check("masked_sgd", weights, moving, masks, lr_tensor, n, m, dim, rule)


_library.define(
    ROW,
    "masked_adamw",
    "(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masks, "
    "Tensor[] steps, Tensor? lr_tensor, int n, int m, int dim, bool magnitude, int rule, float strength, bool refresh, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize) -> ()",
    _adamw_fake,
    writes=True,
)
_library.define(
    ROW,
    "masked_sgd",
    "(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] masks, Tensor? lr_tensor, "
    "int n, int m, int dim, bool magnitude, int rule, float strength, bool refresh, float lr, float momentum, "
    "float dampening, float weight_decay, bool nesterov, bool maximize) -> ()",
    _sgd_fake,
    writes=True,
)


def _check_lists(op: str, lists: dict[str, object], read: tuple[str, ...] = ("grads",)) -> None:
    """All but those that are `read` are written."""
    for name, each in lists.items():
        if not isinstance(each, (list, tuple)):
            fail(op, name, "to be a list of Tensors", type(each).__name__, TypeError)
        for i, tensor in enumerate(each):
            check_tensor(op, f"{name}[{i}]", tensor)
            if name not in read:
                check_own_values(op, f"{name}[{i}]", tensor)


def _check_numbers(op: str, lr: float | Tensor, **numbers: float) -> None:
    if isinstance(lr, Tensor):
        check_tensor(op, "lr", lr)
        if not lr.is_floating_point() or lr.numel() != 1:
            fail(op, "lr", "to be a float or a floating-point Tensor of one element", f"{lr.dtype} {list(lr.shape)}")
    else:
        numbers["lr"] = lr
    for name, number in numbers.items():
        check_number(op, name, number)


def _chosen(op: str, weights: Sequence[Tensor], backend: str | None) -> str:
    if len(weights) == 0:
        return "reference"
    check_float(op, "weights[0]", weights[0])
    return select(ROW, weights[0].device.type, weights[0].dtype, backend)


def _rate(lr: float | Tensor, weights: Sequence[Tensor]) -> tuple[float, Tensor | None]:
    if not isinstance(lr, Tensor):
        return lr, None
    device = weights[0].device if len(weights) > 0 else lr.device
    return 0.0, lr.detach().to(device, torch.float64, non_blocking=True)


@torch.no_grad()
def masked_adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masks: Sequence[Tensor],
    steps: Sequence[Tensor],
    n: int,
    m: int,
    *,
    dim: int = -1,
    magnitude: bool = True,
    rule: str = "hold",
    strength: float = 2e-4,
    refresh: bool = True,
    lr: float | Tensor = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    backend: str | None = None,
) -> None:
    """One step of AdamW of weights under N:M masks, in place, and the masks of the weights that come of it.

    `pyrx.optim.MaskedAdamW` is the optimizer around it.

    Args:
        weights: of one dtype (float16, bfloat16, float32 or float64) and device, any shapes and strides.
        grads, exp_avgs, exp_avg_sqs: for each weight one of its shape and dtype; the gradient is read, the moments are
            written.
        masks: for each weight bits as `pyrx.nm_mask(packed=True)` makes. Those of the forward, which the rule reads.
        steps: for each weight a float32 tensor of one element on its device: which step this is, from 1.
        n, m, dim, magnitude: of the masks, as of `pyrx.nm_mask`.
        rule: what becomes of weights that are not kept, with W the weight and g its gradient:

            ======== ==========================================================================================
            "hold"   they and their moments stay as they are, bit for bit: no decay, no momentum
            "sr-ste" g + strength * W is their gradient, and they move as the others (Zhou et al. 2021, eq. 9)
            "dense"  they move as the others
            ======== ==========================================================================================

            Default "hold".
        strength: of "sr-ste". Default 2e-4.
        refresh: rewrite the masks by the updated weights, as their dtype stores them. Default True.
        lr: a float, or a tensor of one element, which a CUDA graph reads anew in each replay. Default 1e-3.
        beta1, beta2, eps, weight_decay, maximize: as of `torch.optim.AdamW`.
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.

    Equivalent to, for a kept weight, `torch.optim.AdamW`, in float32 (float64 for float64) and rounded once.

    Cost: one read of weight, gradient and moments, one write of weight and moments, a bit an element each way: 28.25
    bytes an element in float32, 14.25 in bfloat16. Nothing is allocated, nothing waits for the device.

    Raises:
        ValueError: as nm_mask; lists of other lengths, tensors of other shapes, an unknown rule. TypeError: dtypes.
        RuntimeError: devices, a backend that cannot serve. All before anything is written.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019; Zhou et al., "Learning N:M
    Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021.
    """
    op = "masked_adamw"
    check_choice(op, "rule", rule, RULES)
    lists = {"weights": weights, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check_lists(op, {**lists, "masks": masks, "steps": steps}, read=("grads", "steps"))
    _check_numbers(op, lr, strength=strength, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    check_bool(op, magnitude=magnitude, refresh=refresh, maximize=maximize)
    check_integer(op, "dim", dim, -(2**31), 2**31)
    check_nm(op, n, m)
    chosen = _chosen(op, weights, backend)
    number, lr_tensor = _rate(lr, weights)
    arguments = (
        weights, grads, exp_avgs, exp_avg_sqs, masks, steps, lr_tensor, n, m, dim, magnitude, RULES.index(rule),
        strength, refresh, number, beta1, beta2, eps, weight_decay, maximize,
    )  # fmt: skip
    if chosen == "reference":
        _adamw_fake(*arguments)
        reference.masked_adamw(*arguments)
    else:
        _library.namespace(chosen).masked_adamw(*arguments)


@torch.no_grad()
def masked_sgd(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    masks: Sequence[Tensor],
    n: int,
    m: int,
    *,
    dim: int = -1,
    magnitude: bool = True,
    rule: str = "hold",
    strength: float = 2e-4,
    refresh: bool = True,
    lr: float | Tensor = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    backend: str | None = None,
) -> None:
    """One step of SGD of weights under N:M masks, in place, and the masks of the weights that come of it.

    `momentum_buffers` are empty without momentum; a new buffer is 0, and its first step has no dampening. lr,
    momentum, dampening, weight_decay, nesterov and maximize are those of `torch.optim.SGD`; all else, errors too, is as
    of `masked_adamw`. Weight decay is part of the gradient, so under "hold" it does not reach masked weights either.

    Equivalent to, for a kept weight, `torch.optim.SGD`, in float32 (float64 for float64) and rounded once.

    Cost: 20.25 bytes an element in float32 with momentum, 12.25 without.
    """
    op = "masked_sgd"
    check_choice(op, "rule", rule, RULES)
    _check_lists(op, {"weights": weights, "grads": grads, "momentum_buffers": momentum_buffers, "masks": masks})
    numbers = {"strength": strength, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
    _check_numbers(op, lr, **numbers)
    check_bool(op, magnitude=magnitude, refresh=refresh, nesterov=nesterov, maximize=maximize)
    check_integer(op, "dim", dim, -(2**31), 2**31)
    check_nm(op, n, m)
    chosen = _chosen(op, weights, backend)
    number, lr_tensor = _rate(lr, weights)
    arguments = (
        weights, grads, momentum_buffers, masks, lr_tensor, n, m, dim, magnitude, RULES.index(rule), strength, refresh,
        number, momentum, dampening, weight_decay, nesterov, maximize,
    )  # fmt: skip
    if chosen == "reference":
        _sgd_fake(*arguments)
        reference.masked_sgd(*arguments)
    else:
        _library.namespace(chosen).masked_sgd(*arguments)
