"""Multi-sample dropout as modules: a classifier head in one op, and a wrapper around any head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrx._checks import check_choice, check_tensor
from pyrx._losses import check_options
from pyrx._random import is_antithetic, thresholds
from pyrx.ops.multi_sample_dropout import COMBINES, multi_sample_dropout, multi_sample_dropout_cross_entropy
from pyrx.targets import MixedTarget


class MultiSampleDropoutClassifier(nn.Linear):
    """The last layer of a classifier with its loss: dropout, linear and cross-entropy of M samples in one op.

    Args:
        in_features: D.
        num_classes: C.
        num_samples: M. Default 8.
        p: probability of dropping a feature, in [0, 1), or M of them. Default 0.5.
        bias: whether the linear layer has one. Default True.
        combine, sampling, weight, ignore_index, label_smoothing, reduction: as
            `pyrx.multi_sample_dropout_cross_entropy` takes them; `weight` becomes a buffer.
        backend: as of `pyrx.multi_sample_dropout_cross_entropy`.
        device, dtype: of the parameters.

    Shapes: input (..., D); target (...) class ids, (..., C) probabilities or a MixedTarget. In training,
    `forward(input, target)` is the loss. Without a target, or in eval, the logits (..., C) of one undropped pass.

    Equivalent to `CrossEntropyLoss()(Linear(D, C)(Dropout(p)(input)), target)`, averaged over M dropout masks. State
    dicts are those of `nn.Linear` (and `class_weight` where given).

    Cost, errors and source are those of `pyrx.multi_sample_dropout_cross_entropy`.
    """

    num_samples: int
    p: float | Sequence[float]
    combine: str
    sampling: str
    ignore_index: int
    label_smoothing: float
    reduction: str
    backend: str | None
    class_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_samples: int = 8,
        p: float | Sequence[float] = 0.5,
        *,
        bias: bool = True,
        combine: str = "losses",
        sampling: str = "independent",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = "MultiSampleDropoutClassifier"
        thresholds(name, p, num_samples)
        check_choice(name, "combine", combine, COMBINES)
        is_antithetic(name, sampling)
        check_options(name, label_smoothing, reduction)
        if weight is not None:
            check_tensor(name, "weight", weight)
        super().__init__(in_features, num_classes, bias, device, dtype)
        self.num_samples, self.p, self.combine, self.sampling = num_samples, p, combine, sampling
        self.ignore_index, self.label_smoothing, self.reduction = ignore_index, label_smoothing, reduction
        self.backend = backend
        self.register_buffer("class_weight", weight)

    def forward(self, input: Tensor, target: Tensor | MixedTarget | None = None) -> Tensor:
        if target is None or not self.training:
            return F.linear(input, self.weight, self.bias)
        return multi_sample_dropout_cross_entropy(
            input,
            self.weight,
            target,
            linear_bias=self.bias,
            num_samples=self.num_samples,
            p=self.p,
            combine=self.combine,
            sampling=self.sampling,
            weight=self.class_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, num_samples={self.num_samples}, p={self.p}, combine={self.combine!r}, "
            f"sampling={self.sampling!r}"
        )


class MultiSampleDropout(nn.Module):
    """Multi-sample dropout around any head, with any loss: the head runs once, on M dropped copies of its input.

    Args:
        head: module from (N, ...) features to (N, ...) outputs, each row by itself.
        num_samples: M. Default 8.
        p: probability of dropping a feature, in [0, 1), or M of them. Default 0.5.
        loss: callable (output, target) -> Tensor, called once a sample. Default `F.cross_entropy`.
        sampling: "independent" or "antithetic".
        backend: as of `pyrx.multi_sample_dropout`.

    Shapes: input (B, ...). In training, `forward(input, target)` is the mean of the M losses, and `forward(input)` the
    M outputs, (M, B, ...). In eval one undropped pass: `head(input)`, or with a target its loss.

    Equivalent to `sum(loss(head(F.dropout(input, p)), target) for _ in range(M)) / M`.

    Cost: that of `pyrx.multi_sample_dropout`, and the head on M times as many rows. Errors and source are its too.
    """

    head: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    num_samples: int
    p: float | Sequence[float]
    sampling: str
    backend: str | None

    def __init__(
        self,
        head: nn.Module,
        num_samples: int = 8,
        p: float | Sequence[float] = 0.5,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        *,
        sampling: str = "independent",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        thresholds("MultiSampleDropout", p, num_samples)
        is_antithetic("MultiSampleDropout", sampling)
        self.head, self.loss = head, loss
        self.num_samples, self.p, self.sampling, self.backend = num_samples, p, sampling, backend

    def forward(self, input: Tensor, target: Tensor | None = None) -> Tensor:
        if not self.training:
            output = self.head(input)
            return output if target is None else self.loss(output, target)
        copies = multi_sample_dropout(input, self.num_samples, self.p, sampling=self.sampling, backend=self.backend)
        outputs = self.head(copies.flatten(0, 1)).unflatten(0, (self.num_samples, -1))
        if target is None:
            return outputs
        return torch.stack([self.loss(output, target) for output in outputs.unbind(0)]).mean(0)

    def extra_repr(self) -> str:
        return f"num_samples={self.num_samples}, p={self.p}, sampling={self.sampling!r}"
