"""Mixup and CutMix on batches, in the place of timm's `Mixup`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyrx._checks import check_bool, check_choice, check_integer, check_number, fail, is_read
from pyrx._random import level
from pyrx.ops.batch_mix import check_minmax, mix_batch
from pyrx.reference.batch_mix import CUTMIX, EITHER, MIXUP, PER_BATCH, PER_PAIR, PER_SAMPLE, Draw
from pyrx.targets import MixedTarget, check_class_ids

MODES = {"batch": PER_BATCH, "pair": PER_PAIR, "elem": PER_SAMPLE, "half": PER_SAMPLE}


class Mixup(nn.Module):
    """Mixes each image with its partner from the other end of the batch, by mixup or CutMix: timm's `Mixup`.

    Args:
        mixup_alpha: lam of mixup is drawn from Beta(mixup_alpha, mixup_alpha); 0: no mixup. Default 1.
        cutmix_alpha: likewise for CutMix. Default 0: no CutMix.
        cutmix_minmax: draw the box's sides between these shares of the image's; switches CutMix on.
        prob: the chance that a batch, pair or sample is mixed. Default 1.
        switch_prob: the chance of CutMix where both can be. Default 0.5.
        mode: who shares a draw: "batch" (default), "pair", "elem" (nobody), "half" ("elem", and only the first half of
            the batch is returned).
        correct_lam: lam follows the area of the clipped box. Default True.
        label_smoothing: of the probabilities. Default 0.1.
        num_classes: K. Default 1000.
        inplace: mix in the images' own memory, as timm does. Default True.
        mixed_target: return a `pyrx.MixedTarget` (for `pyrx.mixed_cross_entropy` and the multi-sample head, which take
            label_smoothing themselves) in place of probabilities. Default False.
        generator: torch.Generator on the images' device. Default: torch's.
        backend: as `pyrx.cutmix`.

    Shapes: images (N, C, H, W) or (N, C, T, H, W), target (N,) int64. N may be odd: the middle
    image is its own partner.
    Returns (images, probabilities (N, K) float32), or a MixedTarget. In eval, and while `mixup_enabled` is False, the
    images as they are.

    Equivalent to `timm.data.Mixup` with the same arguments, in distribution; draws follow torch's generator.

    Cost, errors and source are those of `pyrx.mixup` and `pyrx.cutmix`.
    """

    draw: Draw
    mode: str
    label_smoothing: float
    num_classes: int
    inplace: bool
    mixed_target: bool
    generator: torch.Generator | None
    backend: str | None

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        cutmix_minmax: tuple[float, float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        correct_lam: bool = True,
        label_smoothing: float = 0.1,
        num_classes: int = 1000,
        *,
        inplace: bool = True,
        mixed_target: bool = False,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        name = "Mixup"
        minimum, maximum = check_minmax(name, "cutmix_minmax", cutmix_minmax)
        if cutmix_minmax is not None:
            cutmix_alpha = 1.0
        for argument, value in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            check_number(name, argument, value)
        if not (mixup_alpha >= 0 and cutmix_alpha >= 0 and mixup_alpha + cutmix_alpha > 0):
            fail(name, "mixup_alpha or cutmix_alpha", "above 0", f"{mixup_alpha} and {cutmix_alpha}")
        check_bool(name, correct_lam=correct_lam, inplace=inplace, mixed_target=mixed_target)
        check_choice(name, "mode", mode, tuple(MODES))
        check_integer(name, "num_classes", num_classes, 1, 2**31)
        level(name, "label_smoothing", label_smoothing)
        kind = EITHER if mixup_alpha > 0 and cutmix_alpha > 0 else MIXUP if mixup_alpha > 0 else CUTMIX
        self.draw = Draw(
            kind, MODES[mode], level(name, "prob", prob), level(name, "switch_prob", switch_prob), float(mixup_alpha),
            float(cutmix_alpha), minimum, maximum, correct_lam,
        )  # fmt: skip
        self.mode, self.label_smoothing, self.num_classes = mode, label_smoothing, num_classes
        self.inplace, self.mixed_target = inplace, mixed_target
        self.generator, self.backend = generator, backend
        self.mixup_enabled = True

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor | MixedTarget]:
        if not self.mixed_target and isinstance(target, Tensor) and is_read(target):  # before images are written
            check_class_ids("Mixup", "target", target, self.num_classes)
        if self.training and self.mixup_enabled:
            images, mixed = mix_batch(
                "Mixup", images, target, self.draw, inplace=self.inplace, generator=self.generator, backend=self.backend
            )
        else:
            mixed = MixedTarget(target, target, torch.ones(target.shape, dtype=torch.float32, device=target.device))
        if self.mode == "half":
            half = images.shape[0] // 2
            kept = [None if each is None else each[:half] for each in mixed[3:]]
            images, mixed = images[:half], MixedTarget(mixed.a[:half], mixed.b[:half], mixed.lam[:half], *kept)
        if self.mixed_target:
            return images, mixed
        return images, mixed.to_probabilities(self.num_classes, self.label_smoothing)

    def extra_repr(self) -> str:
        shown = ", ".join(f"{name}={value}" for name, value in self.draw._asdict().items())
        return f"{shown}, mode={self.mode!r}, label_smoothing={self.label_smoothing}, num_classes={self.num_classes}"
