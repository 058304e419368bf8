"""Alpha compositing in plain PyTorch, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrx._checks import accumulation_dtype
from pyrx.reference.batch_mix import memory_format


def sample_format(images: Tensor) -> torch.memory_format:
    """The layout of a sample, whatever the strides from one to the next (an expanded image has none)."""
    return memory_format(images[:1])


def _blended(x: Tensor, y: Tensor, alpha: Tensor, partner: Tensor | None) -> Tensor:
    accumulate = accumulation_dtype(x.dtype)
    weight, other = alpha.to(accumulate), y if partner is None else y.index_select(0, partner)
    mixed = weight * x.to(accumulate) + (1 - weight) * other.to(accumulate)
    if x.dtype == torch.uint8:
        mixed = torch.where(mixed > 0, mixed.round().clamp(max=255), 0)
    # what is copied keeps its bits, beside NaN and infinity too
    return torch.where(weight == 1, x, torch.where(weight == 0, other, mixed.to(x.dtype)))


def gather_backward(grad: Tensor, partner: Tensor, samples: int) -> Tensor:
    """The gradient of y from that of y[partner]; samples that are gathered often are summed in a fixed order.

    A partner that is not there, which a GPU does not check, gives its gradient to none.
    """
    wide = grad.new_zeros((samples + 1, *grad.shape[1:]))
    to = torch.where((partner >= 0) & (partner < samples), partner, samples)
    # each is deterministic on its device alone
    found = wide.index_add(0, to, grad) if grad.device.type == "cpu" else wide.index_put((to,), grad, True)
    return found[:samples]


def blend_backward(
    grad: Tensor, x: Tensor, y: Tensor, alpha: Tensor, partner: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, y and alpha."""
    accumulate = accumulation_dtype(grad.dtype)
    weight, upstream = alpha.to(accumulate), grad.to(accumulate)
    grad_x = torch.where(weight == 0, 0, weight * upstream).to(grad.dtype)
    grad_y = torch.where(weight == 1, 0, (1 - weight) * upstream).to(grad.dtype)
    other = y if partner is None else y.index_select(0, partner)
    terms = upstream * (x.to(accumulate) - other.to(accumulate))
    grad_alpha = terms.sum_to_size(alpha.shape).to(alpha.dtype)
    return grad_x, grad_y if partner is None else gather_backward(grad_y, partner, y.shape[0]), grad_alpha


class _Blend(torch.autograd.Function):
    # autograd's own formula of a select knows no alpha where it is 0 or 1

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, alpha: Tensor, partner: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, y, alpha, partner)
        return _blended(x, y, alpha, partner)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *blend_backward(grad, *ctx.saved_tensors), None


def blend(x: Tensor, y: Tensor, alpha: Tensor, partner: Tensor | None = None) -> Tensor:
    """alpha * x + (1 - alpha) * y[partner], each operation rounded alone."""
    mixed = _Blend.apply(x, y, alpha, partner)
    # not in the function: torch.compile loses the gradient of a result that contiguous() gives back as it is
    return mixed.contiguous(memory_format=sample_format(x))
