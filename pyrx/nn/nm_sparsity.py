"""A weight's N:M sparsity as a parametrization: a layer goes on having a weight, which is sparse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyrx._checks import check_bool, check_choice, check_dtype, check_integer, check_number, check_tensor, fail
from pyrx.ops.nm_sparsity import ESTIMATORS, check_nm, nm_mask, nm_sparsify, packed_shape

NAME = "NMSparsity"
# what a state dict carries beside the buffers, encoded as a tensor
STATE = ("n", "m", "target", "dim", "estimator", "strength", "magnitude", "pad", "enabled", "frozen", "shared")


def _fields(state: Tensor) -> dict[str, Any]:
    """STATE by name of `NMSparsity.get_extra_state`."""
    n, m, *target, dim, estimator, _, magnitude, pad, enabled, frozen, shared = state.tolist()
    strength = state.cpu()[6].view(torch.float64).item()
    flags = map(bool, (magnitude, pad, enabled, frozen, shared))
    values = (n, m, tuple(target), dim, ESTIMATORS[estimator], strength, *flags)
    return dict(zip(STATE, values, strict=True))


class NMSparsity(nn.Module):
    """N:M sparsity as a parametrization, for `torch.nn.utils.parametrize.register_parametrization(layer, "weight", _)`.

    `layer.weight` is then `pyrx.nm_sparsify(original, n, m, ...)` and the optimizer trains `original`, which stays
    dense. `pyrx.nn.sparsify_` installs it on the layers of a model.

    Args:
        n: how many elements of each group are *kept*, 1 to m.
        m: the size of a group, 1 to 128.
        dim, estimator, decay, strength, magnitude, pad, backend: as of `pyrx.nm_sparsify`.

    Attributes:
        n, m: what masks are made of; a schedule changes them (a compiled model compiles anew).
        target: (n, m) as they were given: where a schedule ends.
        enabled: False gives the weight itself, dense. Default True.
        frozen: whether the mask stays as it is: set by `freeze`.
        decay: float64 tensor of no dimension, the d of "mdgf" and "mdgf-scaled": it changes in place and nothing is
            compiled anew. float64 it stays through `.half()` and the like.
        mask: uint8 bits (see `pyrx.nm_mask`) that stand in for ranking while frozen or shared; else None, and each
            forward ranks.
        bits: uint8, the mask's place, there from the registration on, so that copies have the same buffers at any time.
        shared: whether the mask is one that an optimizer handed over. Loaded without that optimizer it no longer
            changes: `use_mask(None)` then ranks again. A deep copy has no owner, and ranks.

    All but `backend` is in the state dict, as tensors (for safetensors, distributed checkpoints, averages), and comes
    back exactly. As torch has it, a parametrized layer can be copied and has a state dict, but cannot be pickled.

    `torch.optim.swa_utils.AveragedModel` and timm's ModelEmaV3 average weights and `decay`; n, m, enabled and frozen of
    the copy stay as they are, unless a schedule of its own steps it. What averages integer buffers too (moving averages
    with `use_buffers=True`, ModelEmaV2) rounds the bits of a frozen copy: its mask is not N:M then.
    DistributedDataParallel writes buffers at each forward: two forwards before their backward need
    `broadcast_buffers=False`, as with batch normalization.

    Cost: of `pyrx.nm_sparsify`, at every reading of `layer.weight`; under `parametrize.cached()` once. (torch's cache
    takes a layer and its deep copy for the same: do not run both under one.)

    Raises: as `pyrx.nm_sparsify`.
    """

    n: int
    m: int
    target: tuple[int, int]
    dim: int
    estimator: str
    strength: float
    magnitude: bool
    pad: bool
    enabled: bool
    frozen: bool
    shared: bool
    decay: Tensor
    bits: Tensor | None

    def __init__(
        self,
        n: int,
        m: int,
        *,
        dim: int = -1,
        estimator: str = "ste",
        decay: float = 1.0,
        strength: float = 2e-4,
        magnitude: bool = True,
        pad: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_nm(NAME, n, m)
        check_integer(NAME, "dim", dim, -(2**31), 2**31)
        check_choice(NAME, "estimator", estimator, ESTIMATORS)
        check_number(NAME, "decay", decay)
        if not 0 <= decay <= 1:
            fail(NAME, "decay", "in [0, 1]", decay)
        check_number(NAME, "strength", strength)
        check_bool(NAME, magnitude=magnitude, pad=pad)
        self.n, self.m, self.target = n, m, (n, m)
        self.dim, self.estimator, self.strength, self.magnitude, self.pad = dim, estimator, strength, magnitude, pad
        self.backend = backend
        self.enabled, self.frozen, self.shared = True, False, False
        self.register_buffer("decay", torch.full((), decay, dtype=torch.float64))
        self.register_buffer("bits", None)

    @property
    def mask(self) -> Tensor | None:
        return self.bits if self.frozen or self.shared else None

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        return nm_sparsify(
            weight,
            self.n,
            self.m,
            dim=self.dim,
            estimator=self.estimator,
            decay=self.decay,
            strength=self.strength,
            mask=self.mask,
            magnitude=self.magnitude,
            pad=self.pad,
            backend=self.backend,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NMSparsity:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        copied.shared = False  # nobody refreshes its mask; an optimizer copied with it hands its own over
        return copied

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight itself, so that it can be assigned; the buffers follow it to its device."""
        if self.decay.device != weight.device:
            self.to(weight.device)
        if self.bits is None and weight.dim() > 0:
            # of FSDP's shards the whole, too
            self.bits = torch.zeros(packed_shape(weight.shape), dtype=torch.uint8, device=weight.device)
        return weight

    def use_mask(self, mask: Tensor | None) -> None:
        """Uses `mask` in place of ranking: bits that its owner, an optimizer, refreshes in place; shared, not copied.

        While frozen the mask that is kept is written to it. None: ranks again.
        """
        if mask is not None:
            check_tensor(NAME, "mask", mask)
            check_dtype(NAME, "mask", mask, torch.uint8)
            if self.frozen and self.mask is not None:
                mask.copy_(self.mask)
        elif self.frozen:
            fail(NAME, "mask", "to be a Tensor while frozen (or unfreeze() first)", None)
        if mask is not None:
            self.bits = mask
        elif self.shared and self.bits is not None:
            self.bits = torch.zeros_like(self.bits)  # the other is its owner's
        self.shared = mask is not None

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Ranks a mask that is shared anew, in place, as after a change of n and m; without one forward ranks."""
        if self.mask is not None:
            self.mask.copy_(self._ranked(weight))

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """From now on keeps the mask of `weight`; one that is shared becomes it."""
        if self.mask is None:
            self.bits = self._ranked(weight)
        else:
            self.refresh(weight)
        self.frozen = True

    def unfreeze(self) -> None:
        """Ranks again, or uses a mask that is shared as its owner refreshes it."""
        self.frozen = False

    def _ranked(self, weight: Tensor) -> Tensor:
        if hasattr(weight, "full_tensor"):  # FSDP's shards: forward has all of the weight
            weight = weight.full_tensor()
        options = {"dim": self.dim, "magnitude": self.magnitude, "pad": self.pad, "backend": self.backend}
        return nm_mask(weight, self.n, self.m, packed=True, **options)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NMSparsity:
        before = self.decay
        super()._apply(fn, recurse)
        # .half() and the like are meant for the weight
        if self.decay.dtype != torch.float64:
            self.decay = before.to(self.decay.device)
        return self

    def get_extra_state(self) -> Tensor:
        """STATE as int64, on the CPU and always of the same length: target as two, strength by its bits."""
        strength = torch.tensor(self.strength, dtype=torch.float64, device="cpu").view(torch.int64).item()
        flags = (self.magnitude, self.pad, self.enabled, self.frozen, self.shared)
        fields = (self.n, self.m, *self.target, self.dim, ESTIMATORS.index(self.estimator), strength, *flags)
        return torch.tensor(fields, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        for name, value in _fields(state).items():
            setattr(self, name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state = state_dict.get(f"{prefix}_extra_state")
        if state is not None:
            fields, found = _fields(state), state_dict.get(f"{prefix}bits")
            if found is not None:  # else it is missing, which torch tells
                stays = self.bits is not None and self.bits.shape == found.shape
                # what is no mask is not written to an owner's
                if not stays or (self.shared and not (fields["frozen"] or fields["shared"])):
                    self.bits = torch.zeros_like(found, device=self.decay.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        state = "frozen" if self.frozen else "enabled" if self.enabled else "dense"
        return f"{self.n}:{self.m}, dim={self.dim}, estimator={self.estimator!r}, {state}"
