"""Targets that are neither class ids nor dense probabilities."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyrx._checks import (
    check_device,
    check_dtype,
    check_float,
    check_integer,
    check_number,
    check_shape,
    check_tensor,
    fail,
    is_read,
)


def check_class_ids(op: str, argument: str, ids: Tensor, num_classes: int) -> None:
    check_tensor(op, argument, ids)
    outside = (ids < 0) | (ids >= num_classes)
    if outside.any():
        fail(op, argument, f"of class ids in [0, {num_classes})", ids[outside][0].item())


class MixedTarget(NamedTuple):
    """Two classes a row, as CutMix and mixup give: class `a` weighs `lam`, class `b` weighs `1 - lam`.

    Args:
        a: (...) int64 class ids.
        b: (...) int64 class ids.
        lam: (...) float32, in [0, 1].
        boxes: (N, 4) int64 (y0, x0, y1, x1), the pixels [y0, y1) x [x0, x1) that came from the partner; -1 where a
            sample was mixed pixel by pixel. None where the target does not come from a mixing op.
        pairing: (N,) int64, the partner of each sample, or None.
        masks: (N, H, W) segmentation maps that were mixed with the images, or None.
        mattes: (N or 1, 1, H, W), the weight of the sample's own pixels where FMix mixed them, or None.

    Equivalent to the probabilities `lam * one_hot(a) + (1 - lam) * one_hot(b)`, without building them.

    As a named tuple it has its fields' length and no rows to slice: where a batch goes through the model in parts, as
    under gradient accumulation, mix each part by itself.

    >>> target = pyrx.MixedTarget(torch.tensor([0, 2]), torch.tensor([1, 2]), torch.tensor([0.75, 0.5]))
    >>> target.to_probabilities(3)
    tensor([[0.7500, 0.2500, 0.0000],
            [0.0000, 0.0000, 1.0000]])
    """

    a: Tensor
    b: Tensor
    lam: Tensor
    boxes: Tensor | None = None
    pairing: Tensor | None = None
    masks: Tensor | None = None
    mattes: Tensor | None = None

    def to_probabilities(self, num_classes: int, label_smoothing: float = 0.0) -> Tensor:
        """(..., num_classes) of lam's dtype: each row sums to one, `label_smoothing` of it spread over all classes.

        Class ids outside [0, num_classes) are a ValueError on the CPU; on a GPU, and in torch.compile, their rows are
        NaN.
        """
        op = "MixedTarget.to_probabilities"
        check_integer(op, "num_classes", num_classes, 1, 2**31)
        check_number(op, "label_smoothing", label_smoothing)
        if not 0 <= label_smoothing <= 1:
            fail(op, "label_smoothing", "in [0, 1]", label_smoothing)
        check_float(op, "lam", self.lam)
        for name, ids in (("a", self.a), ("b", self.b)):
            check_dtype(op, name, ids, torch.int64)
            check_shape(op, name, ids, "of lam's", self.lam.shape)
            check_device(op, name, ids, self.lam.device)
        lam = self.lam
        for name, ids in (("a", self.a), ("b", self.b)):
            if is_read(ids):
                check_class_ids(op, name, ids, num_classes)
            else:
                lam = torch.where((ids >= 0) & (ids < num_classes), lam, torch.nan)
        # compared, since scattered sums are not deterministic on a GPU
        classes = torch.arange(num_classes, device=self.a.device)
        lam, keep = lam.unsqueeze(-1), 1 - label_smoothing
        a, b = (each.unsqueeze(-1) == classes for each in (self.a, self.b))
        return keep * (lam * a + (1 - lam) * b) + label_smoothing / num_classes

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MixedTarget:
        """The target on another device, as `Tensor.to`."""
        return MixedTarget(*(None if each is None else each.to(device, non_blocking=non_blocking) for each in self))  # type: ignore[arg-type]


torch.serialization.add_safe_globals([MixedTarget])
