"""What the losses share: dtypes, checks of targets and options, and their gradients in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyrx._checks import (
    accumulation_dtype,
    check_choice,
    check_device,
    check_dtype,
    check_float,
    check_number,
    check_shape,
    fail,
)
from pyrx.targets import MixedTarget

REDUCTIONS = ("none", "mean", "sum")


def saved_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 gradients wait for the upstream (loss) scale in float32, whose range they need."""
    return torch.float32 if dtype == torch.float16 else dtype


# Checks of the ops' own arguments.


def check_vectors(
    op: str,
    vectors: Sequence[tuple[str, Tensor | None, torch.dtype]],
    names: str,
    size: int | torch.SymInt,
    device: torch.device,
) -> None:
    """(name, tensor or None, dtype) each of `size` elements; `names` is their dimension's, as "[C]"."""
    for name, value, dtype in vectors:
        if value is not None:
            check_dtype(op, name, value, dtype)
            check_shape(op, name, value, names, [size])  # type: ignore[list-item]
            check_device(op, name, value, device)


def check_options(op: str, label_smoothing: float, reduction: str) -> None:
    check_number(op, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        fail(op, "label_smoothing", "in [0, 1]", label_smoothing)
    check_choice(op, "reduction", reduction, REDUCTIONS)


def check_loss_dtype(op: str, argument: str, dtype: torch.dtype, input_dtype: torch.dtype) -> None:
    """The loss, and so its gradient, is of the input's dtype or of the one it is summed in."""
    accumulation = accumulation_dtype(input_dtype)
    if dtype not in (input_dtype, accumulation):
        expected = " or ".join(dict.fromkeys((str(input_dtype), str(accumulation))))
        fail(op, argument, expected, dtype, TypeError)


# Checks of the public functions' arguments.


def check_class_weight(op: str, weight: Tensor | None) -> None:
    if weight is None:
        return
    check_float(op, "weight", weight)
    if weight.requires_grad:
        fail(op, "weight", "without requires_grad: there is no gradient to class weights", "requires_grad=True")


def check_target(op: str, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        fail(op, name, "to be a Tensor or a MixedTarget of Tensors", type(value).__name__, TypeError)
    if value.requires_grad:
        fail(op, name, "without requires_grad: there is no gradient to targets", "requires_grad=True")
    return value


def class_ids(op: str, name: str, value: object, lead: Sequence[int]) -> Tensor:
    """Checked class ids of shape `lead`, flattened."""
    ids = check_target(op, name, value)
    check_dtype(op, name, ids, torch.int64)
    check_shape(op, name, ids, "[...]", lead)
    return ids.reshape(-1)


def split_mixed(op: str, target: MixedTarget, dtype: torch.dtype, lead: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Checked (a, b, lam) of shape `lead`, flattened, lam of `dtype`."""
    lam = check_target(op, "target.lam", target.lam)
    check_float(op, "target.lam", lam)
    check_shape(op, "target.lam", lam, "[...]", lead)
    a, b = class_ids(op, "target.a", target.a, lead), class_ids(op, "target.b", target.b, lead)
    return a, b, lam.reshape(-1).to(dtype)


# Backward formulas, as csrc/autograd/dispatch.h has them for the native backends.


def scaled(
    scale_: Callable[..., None], gradients: Sequence[Tensor], grad_loss: Tensor, dtype: torch.dtype
) -> Sequence[Tensor]:
    """The gradients times the upstream one, which mostly is one: then no pass over them is spent.

    In place, unless the graph is kept: its next backward must find them as they are, whatever was done to these. An
    upstream gradient a row scales the gradients' rows.
    """
    batched = torch._C._functorch.is_legacy_batchedtensor(grad_loss)  # grad(is_grads_batched=True)
    if type(grad_loss) is Tensor and not batched and gradients[0].dtype == dtype:
        if torch._C._autograd._get_current_graph_task_keep_graph():
            gradients = [each.clone() for each in gradients]
        scale_(*gradients, grad_loss)
        return gradients
    factor = grad_loss.unsqueeze(-1) if grad_loss.dim() == 1 else grad_loss
    return [(each * factor).to(dtype) for each in gradients]
