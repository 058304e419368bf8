"""Multi-sample dropout (Inoue, "Multi-Sample Dropout for Accelerated Training and Better Generalization", 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrx.reference.dropout import dropout
from pyrx.reference.mixed_cross_entropy import check_classes, two_class_loss


def multi_sample_dropout(input: Tensor, seed: Tensor, thresholds: Sequence[int], antithetic: bool) -> Tensor:
    """(M, *input.shape): sample m is input under the mask of sample m, in input's layout."""
    samples = torch.stack([dropout(input, seed, t, m, antithetic) for m, t in enumerate(thresholds)])
    one = torch.empty_like(input)
    return one.new_empty_strided(samples.shape, (input.numel(), *one.stride())).copy_(samples)


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
            check_classes("multi_sample_dropout_cross_entropy", each, linear_weight.shape[0], ignore_index)

    def sample_logits(m: int, threshold: int) -> Tensor:
        return F.linear(dropout(input, seed, threshold, m, antithetic), linear_weight, linear_bias)

    def loss(logits: Tensor) -> Tensor:
        class_weight = None if weight is None else weight.to(logits.dtype)
        if target_b is not None:
            assert lam is not None
            return two_class_loss(logits, target, target_b, lam, class_weight, ignore_index, label_smoothing, reduction)
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
