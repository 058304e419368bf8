"""Cross-entropy of two classes a row: of CutMix (Yun et al., ICCV 2019) and mixup (Zhang et al., ICLR 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_classes(op: str, target: Tensor, num_classes: int, ignore_index: int) -> None:
    """On the CPU a class id out of range is a ValueError; elsewhere F.cross_entropy asserts on the device."""
    if torch.compiler.is_compiling() or target.device.type != "cpu" or target.is_floating_point():
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= num_classes))
    if bad.any():
        raise ValueError(
            f"pyrx::{op}: expected target of class ids in "
            f"[0, {num_classes}) or ignore_index = {ignore_index}, got {target[bad][0].item()}"
        )


def two_class_loss(
    logits: Tensor,  # (N, C)
    target: Tensor,  # (N,) class ids
    target_b: Tensor,
    lam: Tensor,  # (N,)
    weight: Tensor | None,  # (C,)
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """The lam-weighted mean of the cross-entropies against both; a component at ignore_index counts nothing."""
    counts = (target != ignore_index) | (target_b != ignore_index)
    logits = torch.where(counts[:, None], logits, 0)  # gradients of the others are 0, whatever the logits
    components = ((target, lam), (target_b, 1 - lam))
    losses, weights = [], []
    for ids, share in components:
        each = F.cross_entropy(logits, ids, weight, None, ignore_index, None, "none", label_smoothing)
        kept = ids != ignore_index
        class_weight = 1.0 if weight is None else weight[torch.where(kept, ids, 0)]
        each = torch.where(share == 0, 0, each)  # which may be infinite
        losses.append(share.to(each.dtype) * each)
        weights.append(torch.where(kept, share * class_weight, 0))
    loss = losses[0] + losses[1]
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (weights[0] + weights[1]).sum()


def mixed_cross_entropy(
    input: Tensor,  # (N, C)
    target: Tensor,
    target_b: Tensor,
    lam: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    loss_dtype: torch.dtype,
) -> Tensor:
    for ids in (target, target_b):
        check_classes("mixed_cross_entropy", ids, input.shape[1], ignore_index)
    class_weight = None if weight is None else weight.to(loss_dtype)
    options = (ignore_index, label_smoothing, reduction)
    return two_class_loss(input.to(loss_dtype), target, target_b, lam, class_weight, *options).to(loss_dtype)
