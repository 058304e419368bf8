"""Schedules of N:M sparsity: dense warm-up, a gradient flow that narrows, fine-tuning with a frozen mask."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pyrx._checks import check_choice, check_integer, check_number, fail
from pyrx.nn.sparsify import Installed, installed
from pyrx.ops.nm_sparsity import MAX_GROUP

MDGF = ("mdgf", "mdgf-scaled")


class SparsitySchedule:
    """What the schedules have in common; of itself `DenseThenSparse`.

    Of `total_steps` training steps the first `dense_steps` are dense and the last `fine_tune_steps` have a frozen mask:
    that of the weights at their beginning. Between them the flow: what a subclass says. Call `step()` after each step
    of the optimizer, as of a learning rate's schedule. After the last one every mask is frozen (and a decay is 0), so
    that what is left is N:M, whatever the schedule.

    It works on every `pyrx.nn.NMSparsity` that `model` has when it is made, towards their `target`, and sets `enabled`,
    `n`, `m`, `decay` and `frozen`. A step does not wait for a GPU. A model under torch.compile compiles anew where
    `enabled`, `n` or `m` change or a mask is frozen, not where a decay does; a CUDA graph must be captured anew there.
    Where that is more often than `torch._dynamo.config.recompile_limit` (8; training and evaluation both count) torch
    goes on without compiling, or raises under fullgraph=True: raise the limit.

    `state_dict` has the steps done and the masks that are frozen or an optimizer's; with the model's and the
    optimizer's, in any order of loading, training goes on with the same bits.

    Raises:
        ValueError: a model without NMSparsity or with one chained to other parametrizations, steps below 0, phases
        longer than total_steps, an estimator that does not belong to the schedule. TypeError: types. All of it before
        anything is changed.
    """

    name: str
    total_steps: int
    dense_steps: int
    fine_tune_steps: int
    flow_steps: int
    steps_done: int

    decays = False

    def __init__(self, model: nn.Module, total_steps: int, *, dense_steps: int = 0, fine_tune_steps: int = 0) -> None:
        self.name = type(self).__name__
        self._layers = installed(self.name, model)
        if not self._layers:
            fail(self.name, "model", "with pyrx.nn.NMSparsity on its layers (pyrx.nn.sparsify_)", "one without")
        check_integer(self.name, "total_steps", total_steps, 1, 2**62)
        check_integer(self.name, "dense_steps", dense_steps, 0, 2**62)
        check_integer(self.name, "fine_tune_steps", fine_tune_steps, 0, 2**62)
        self.total_steps, self.dense_steps, self.fine_tune_steps = total_steps, dense_steps, fine_tune_steps
        self.flow_steps = total_steps - dense_steps - fine_tune_steps
        self._frames = [self._frames_of(each) for each in self._layers]
        least = self._least_flow()
        if self.flow_steps < least:
            phases = f"dense_steps + fine_tune_steps + {least} of the flow = {dense_steps + fine_tune_steps + least}"
            fail(self.name, "total_steps", f"of at least {phases}", total_steps)
        for each in self._layers:
            if each.sparsity.estimator in MDGF and not self.decays:
                fail(self.name, f"layer {each.name!r}", "of an estimator that has no decay", each.sparsity.estimator)
        self.steps_done = 0
        self._set()

    def _frames_of(self, each: Installed) -> list[tuple[int, int]]:
        """(n, m) of the flow's frames, which have equal shares of its steps."""
        return [each.sparsity.target]

    def _least_flow(self) -> int:
        return 0

    def _decay(self, t: int) -> float:
        """d in step t of the flow."""
        raise NotImplementedError

    @property
    def phase(self) -> str:
        """The coming step's, "dense", "flow" or "fine-tune"; after the last step "fine-tune"."""
        if self.steps_done >= self.total_steps - self.fine_tune_steps:
            return "fine-tune"
        return "dense" if self.steps_done < self.dense_steps else "flow"

    def step(self) -> None:
        """To be called after each step of the optimizer."""
        self.steps_done += 1
        self._set()

    def _set(self) -> None:
        """Makes the model what the coming step needs."""
        phase, t = self.phase, self.steps_done - self.dense_steps
        for each, frames in zip(self._layers, self._frames, strict=True):
            sparsity = each.sparsity
            if phase == "fine-tune":
                ratio = sparsity.target
            else:
                ratio = frames[t * len(frames) // self.flow_steps if phase == "flow" else 0]
            thawed = sparsity.frozen and phase != "fine-tune"
            if thawed:
                sparsity.unfreeze()
            wanted = (phase != "dense", *ratio)
            if thawed or wanted != (sparsity.enabled, sparsity.n, sparsity.m):
                sparsity.enabled, sparsity.n, sparsity.m = wanted
                if not sparsity.frozen:  # an optimizer's mask is older than this
                    sparsity.refresh(each.original())
            if phase == "fine-tune" and not sparsity.frozen:
                sparsity.freeze(each.original())
        if self.decays:
            decay = {"dense": 1.0, "fine-tune": 0.0}.get(phase)
            decays = [each.sparsity.decay for each in self._layers]
            torch._foreach_zero_(decays)
            torch._foreach_add_(decays, self._decay(t) if decay is None else decay)

    def _settings(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "total_steps": self.total_steps,
            "dense_steps": self.dense_steps,
            "fine_tune_steps": self.fine_tune_steps,
            "frames": self._frames,
        }

    def state_dict(self) -> dict[str, Any]:
        masks = [each.sparsity.mask for each in self._layers]
        return {**self._settings(), "steps_done": self.steps_done, "masks": masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, in a schedule that was made with the same arguments.

        Raises: ValueError where it was not.
        """
        for name, own in self._settings().items():
            if state.get(name) != own:
                fail(self.name, f"a state of {name}", own, state.get(name))
        self.steps_done = state["steps_done"]
        self._set()
        for each, mask in zip(self._layers, state["masks"], strict=True):
            if mask is not None and each.sparsity.mask is not None:
                each.sparsity.mask.copy_(mask)


class DenseThenSparse(SparsitySchedule):
    """N:M at once after the dense warm-up; with `fine_tune_steps` the mask is frozen for the last steps.

    Args:
        model: with `pyrx.nn.NMSparsity` on its layers.
        total_steps: of the training.
        dense_steps, fine_tune_steps: the first and the last of them; together at most all. Default 0.

    `dense_steps + fine_tune_steps = total_steps` prunes once and fine-tunes. The rest is as of `SparsitySchedule`.

    >>> model = torch.nn.Linear(8, 2)
    >>> report = pyrx.nn.sparsify_(model, 1, 4)
    >>> schedule = pyrx.nn.DenseThenSparse(model, total_steps=4, dense_steps=1, fine_tune_steps=1)
    >>> for _ in range(4):  # the training steps
    ...     print(schedule.phase, float(model.weight.ne(0).float().mean()))
    ...     schedule.step()
    dense 1.0
    flow 0.25
    flow 0.25
    fine-tune 0.25

    Source: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021 (a mask
    that follows the weights); Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (once, then fine-tuning).
    """


class StepwiseSDGF(SparsitySchedule):
    """Structure decay, stepwise: (M-1):M, then floor(M / 2^i):M for i = 1, 2, ... down to N:M.

    Args:
        model, total_steps, dense_steps, fine_tune_steps: as of `DenseThenSparse`; the flow must have a step for each
            frame.

    A layer of N:M has F = floor(log2(M / N)) + 1 frames of equal shares of the flow: of 1:16 15, 8, 4, 2 and 1 of 16
    are kept. Where M / N is no power of two a last frame of N:M follows. The rest is as of `SparsitySchedule`.

    Source: Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers", 2024,
    SDGF.
    """

    def _frames_of(self, each: Installed) -> list[tuple[int, int]]:
        n, m = each.sparsity.target
        if n == m:
            return [(m, m)]
        halvings = (m // n).bit_length() - 1  # floor(log2(m / n))
        kept = [m - 1, *(m >> i for i in range(1, halvings + 1))]
        return [(each, m) for each in (kept if kept[-1] == n else [*kept, n])]

    def _least_flow(self) -> int:
        return max(map(len, self._frames))


class GeometricSDGF(SparsitySchedule):
    """Structure decay, geometric: N:M from large groups to small ones, N 2^(F-1-i) : M 2^(F-1-i) for i = 0 .. F-1.

    Args:
        model, total_steps, dense_steps, fine_tune_steps: as of `DenseThenSparse`, the flow with a step for each frame.
        frames: their number F. Default 4: 1:8 goes through 8:64, 4:32, 2:16 and 1:8.

    Raises ValueError where the largest group, M 2^(F-1), is above 128 or does not divide the layer's dimension (without
    `pad`). The rest is as of `SparsitySchedule`.

    Source: Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers", 2024,
    SDGF.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        dense_steps: int = 0,
        fine_tune_steps: int = 0,
        frames: int = 4,
    ) -> None:
        check_integer("GeometricSDGF", "frames", frames, 1, MAX_GROUP.bit_length())
        self.frames = frames
        super().__init__(model, total_steps, dense_steps=dense_steps, fine_tune_steps=fine_tune_steps)

    def _frames_of(self, each: Installed) -> list[tuple[int, int]]:
        n, m = each.sparsity.target
        largest = m << self.frames - 1
        layer = f"layer {each.name!r}"
        if largest > MAX_GROUP:
            fail(self.name, layer, f"with m * 2^(frames - 1) at most {MAX_GROUP}", f"{m} * {largest // m} = {largest}")
        shape, dim = list(each.original().shape), each.sparsity.dim
        if not each.sparsity.pad and shape[dim] % largest != 0:
            expected = f"of a size along dimension {dim} that its first group of {largest} divides (or pad=True)"
            fail(self.name, layer, expected, shape)
        return [(n << i, m << i) for i in reversed(range(self.frames))]

    def _least_flow(self) -> int:
        return self.frames


class _MaskDecay(SparsitySchedule):
    decays = True

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        dense_steps: int = 0,
        fine_tune_steps: int = 0,
        beta: float | None = None,
        estimator: str | None = None,
    ) -> None:
        name = type(self).__name__
        if beta is not None:
            check_number(name, "beta", beta)
            if not 0 < beta < math.inf:
                fail(name, "beta", "in (0, inf)", beta)
        check_choice(name, "estimator", estimator, (None, *MDGF))
        self._beta = beta
        for each in installed(name, model):
            if estimator is None and each.sparsity.estimator not in MDGF:
                expected = "of the estimator mdgf or mdgf-scaled (or estimator= here, which sets it)"
                fail(name, f"layer {each.name!r}", expected, each.sparsity.estimator)
        super().__init__(model, total_steps, dense_steps=dense_steps, fine_tune_steps=fine_tune_steps)
        if estimator is not None:
            for each in self._layers:
                each.sparsity.estimator = estimator

    def _least_flow(self) -> int:
        return 1

    @property
    def beta(self) -> float:
        """What d falls by."""
        raise NotImplementedError

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "beta": self.beta}


class LinearMDGF(_MaskDecay):
    """Mask decay, linear: the forward multiplies what the mask drops by d = max(1 - beta t, 0), t the flow's step.

    Args:
        model, total_steps, dense_steps, fine_tune_steps: as of `DenseThenSparse`, the flow with a step at least.
        beta: above 0. Default: 1 / the flow's steps, so that d is 0 when fine-tuning begins.
        estimator: "mdgf" or "mdgf-scaled", which every layer is set to. Default: the layers have one of them already,
            anything else is a ValueError.

    d is 0 in fine-tuning. The rest is as of `SparsitySchedule`.

    Source: Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers", 2024,
    MDGF.
    """

    @property
    def beta(self) -> float:
        return 1 / self.flow_steps if self._beta is None else self._beta

    def _decay(self, t: int) -> float:
        return max(1 - self.beta * t, 0.0)


class ExponentialMDGF(_MaskDecay):
    """Mask decay, exponential: the forward multiplies what the mask drops by d = exp(-beta t), t the flow's step.

    Args:
        model, total_steps, dense_steps, fine_tune_steps, estimator: as of `LinearMDGF`.
        beta: above 0. Default: log(100) / the flow's steps, so that d is 0.01 when fine-tuning begins and makes it 0.

    The rest is as of `SparsitySchedule`.

    Source: Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers", 2024,
    MDGF.
    """

    @property
    def beta(self) -> float:
        return math.log(100) / self.flow_steps if self._beta is None else self._beta

    def _decay(self, t: int) -> float:
        return math.exp(-self.beta * t)
