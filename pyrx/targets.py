"""Targets that are neither class ids nor dense probabilities."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MixedTarget(NamedTuple):
    """Two classes a row, as CutMix and mixup give: class `a` weighs `lam`, class `b` weighs `1 - lam`.

    Args:
        a: (...) int64 class ids.
        b: (...) int64 class ids.
        lam: (...) float32, in [0, 1].

    Equivalent to the probabilities `lam * one_hot(a) + (1 - lam) * one_hot(b)`, without building them.
    """

    a: Tensor
    b: Tensor
    lam: Tensor
