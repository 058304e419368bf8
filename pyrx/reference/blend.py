"""Alpha compositing in plain PyTorch, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrx.reference.batch_mix import memory_format


def sample_format(images: Tensor) -> torch.memory_format:
    """The layout of a sample, whatever the strides from one to the next (an expanded image has none)."""
    return memory_format(images[:1])


def _blended(x: Tensor, y: Tensor, alpha: Tensor, partner: Tensor | None) -> Tensor:
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, other = alpha.to(accumulate), y if partner is None else y.index_select(0, partner)
    mixed = weight * x.to(accumulate) + (1 - weight) * other.to(accumulate)
    if x.dtype == torch.uint8:
        mixed = torch.where(mixed > 0, mixed.round().clamp(max=255), 0)
    # what is copied keeps its bits, beside NaN and infinity too
    result = torch.where(weight == 1, x, torch.where(weight == 0, other, mixed.to(x.dtype)))
    return result.contiguous(memory_format=sample_format(x))


def gather_backward(grad: Tensor, partner: Tensor, samples: int) -> Tensor:
    """The gradient of y from that of y[partner]; samples that are gathered often are summed in a fixed order."""
    wide = grad.new_zeros((samples, *grad.shape[1:]))
    # each is deterministic on its device alone
    return wide.index_add(0, partner, grad) if grad.device.type == "cpu" else wide.index_put((partner,), grad, True)


def blend_backward(
    grad: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    alpha: Tensor,
    partner: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, y (with a partner: of y[partner]) and alpha that are needed."""
    accumulate = torch.float64 if grad.dtype == torch.float64 else torch.float32
    weight, upstream = alpha.to(accumulate), grad.to(accumulate)
    grad_x = grad_y = grad_alpha = None
    if needs[0]:
        grad_x = torch.where(weight == 0, 0, weight * upstream).to(grad.dtype)
    if needs[1]:
        grad_y = torch.where(weight == 1, 0, (1 - weight) * upstream).to(grad.dtype)
    if needs[2]:
        assert x is not None and y is not None
        other = y if partner is None else y.index_select(0, partner)
        terms = upstream * (x.to(accumulate) - other.to(accumulate))
        grad_alpha = terms.sum_to_size(alpha.shape).to(alpha.dtype)
    return grad_x, grad_y, grad_alpha


class _Blend(torch.autograd.Function):
    # autograd's own formula of a select knows no alpha where it is 0 or 1

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, alpha: Tensor, partner: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, y, alpha, partner)
        return _blended(x, y, alpha, partner)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, alpha, partner = ctx.saved_tensors
        grad_x, grad_y, grad_alpha = blend_backward(grad, x, y, alpha, partner, ctx.needs_input_grad)
        if grad_y is not None and partner is not None:
            grad_y = gather_backward(grad_y, partner, y.shape[0])
        return grad_x, grad_y, grad_alpha, None


def blend(x: Tensor, y: Tensor, alpha: Tensor, partner: Tensor | None = None) -> Tensor:
    """alpha * x + (1 - alpha) * y[partner], each operation rounded alone."""
    return _Blend.apply(x, y, alpha, partner)
