"""Multi-sample dropout (Inoue, "Multi-Sample Dropout for Accelerated Training and Better Generalization", 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrx.reference.dropout import dropout


def multi_sample_dropout(input: Tensor, seed: Tensor, thresholds: Sequence[int], antithetic: bool) -> Tensor:
    """(M, *input.shape): sample m is input under the mask of sample m, in input's layout."""
    samples = torch.stack([dropout(input, seed, t, m, antithetic) for m, t in enumerate(thresholds)])
    one = torch.empty_like(input)
    return one.new_empty_strided(samples.shape, (input.numel(), *one.stride())).copy_(samples)


def mixed_cross_entropy(
    logits: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """The lam-weighted mean of the cross-entropies against a and b; a component at ignore_index counts nothing."""
    components = ((target_a, lam), (target_b, 1 - lam))
    losses, weights = [], []
    for target, share in components:
        each = F.cross_entropy(logits, target, weight, None, ignore_index, None, "none", label_smoothing)
        kept = target != ignore_index
        class_weight = 1.0 if weight is None else weight[torch.where(kept, target, 0)]
        losses.append(share.to(each.dtype) * each)
        weights.append(torch.where(kept, share * class_weight, 0))
    loss = losses[0] + losses[1]
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (weights[0] + weights[1]).sum()


def _check_classes(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """On the CPU a class id out of range is a ValueError; elsewhere F.cross_entropy asserts on the device."""
    if torch.compiler.is_compiling() or target.device.type != "cpu" or target.is_floating_point():
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= num_classes))
    if bad.any():
        raise ValueError(
            "pyrx::multi_sample_dropout_cross_entropy: expected target of class ids in "
            f"[0, {num_classes}) or ignore_index = {ignore_index}, got {target[bad][0].item()}"
        )


def multi_sample_dropout_cross_entropy(
    input: Tensor,  # (B, D)
    linear_weight: Tensor,  # (C, D)
    linear_bias: Tensor | None,  # (C,)
    target: Tensor,  # (B,) class ids or (B, C) probabilities
    target_b: Tensor | None,  # (B,) class ids, with lam (B,)
    lam: Tensor | None,
    weight: Tensor | None,  # (C,)
    seed: Tensor,
    thresholds: Sequence[int],
    antithetic: bool,
    combine_logits: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """The eager loop over samples that the fused op replaces."""
    for each in (target, target_b):
        if each is not None:
            _check_classes(each, linear_weight.shape[0], ignore_index)

    def sample_logits(m: int, threshold: int) -> Tensor:
        return F.linear(dropout(input, seed, threshold, m, antithetic), linear_weight, linear_bias)

    def loss(logits: Tensor) -> Tensor:
        class_weight = None if weight is None else weight.to(logits.dtype)
        if target_b is not None:
            assert lam is not None
            return mixed_cross_entropy(
                logits, target, target_b, lam, class_weight, ignore_index, label_smoothing, reduction
            )
        probabilities_or_ids = target.to(logits.dtype) if target.is_floating_point() else target
        return F.cross_entropy(
            logits, probabilities_or_ids, class_weight, None, ignore_index, None, reduction, label_smoothing
        )

    if combine_logits:
        return loss(torch.stack([sample_logits(m, t) for m, t in enumerate(thresholds)]).mean(0))
    total = loss(sample_logits(0, thresholds[0]))
    for m, t in enumerate(thresholds[1:], 1):
        total = total + loss(sample_logits(m, t))
    return total / len(thresholds)
