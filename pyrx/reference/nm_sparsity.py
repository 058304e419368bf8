"""N:M masks and sparse weights, by their definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrx._checks import accumulation_dtype
from pyrx.reference.dropout import pack_bits, unpack_bits

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# as integers of the same size: torch.compile does not look into tensors
_INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000, torch.float64: 0x7FF << 52}

# What becomes of the elements that are not kept.
ZERO, FACTOR, REGULARIZE = range(3)
# forward and backward of each estimator, in the order of the op's argument
ESTIMATORS: dict[str, tuple[int, int | None]] = {
    "ste": (ZERO, None),
    "sr-ste": (ZERO, REGULARIZE),
    "mdgf": (FACTOR, None),
    "mdgf-scaled": (FACTOR, FACTOR),
    "hard": (ZERO, ZERO),
}
FORWARD = tuple(forward for forward, _ in ESTIMATORS.values())
BACKWARD = tuple(backward for _, backward in ESTIMATORS.values())


def rank_keys(scores: Tensor, magnitude: bool) -> Tensor:
    """int64 keys that order as scores rank: zeros equal, every NaN one value above infinity."""
    bits = scores.detach().contiguous().resolve_neg().view(_INTEGERS[scores.element_size()]).long()
    absolute = bits & (2 ** (8 * scores.element_size() - 1) - 1)
    infinity = _INFINITY[scores.dtype]
    nan = absolute > infinity
    absolute = absolute.clamp(max=infinity + 1)
    return absolute if magnitude else torch.where((bits < 0) & ~nan, -absolute, absolute)


def nm_mask(scores: Tensor, n: int, m: int, dim: int, magnitude: bool, packed: bool) -> Tensor:
    """True for the N of the highest rank in each group of M along `dim`; the last group may have fewer elements."""
    length = scores.shape[dim]
    # what pads the last group ranks below all else
    pad = torch.iinfo(torch.int64).min
    keys = torch.nn.functional.pad(rank_keys(scores, magnitude).movedim(dim, -1), (0, -length % m), value=pad)
    groups = keys.unflatten(-1, (keys.shape[-1] // m, m))
    first = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, first, True)
    found = torch.empty_like(scores, dtype=torch.bool).copy_(kept.flatten(-2)[..., :length].movedim(-1, dim))
    return pack_bits(found) if packed else found


def nm_apply(
    x: Tensor, bits: Tensor, dropped: int, factor: Tensor | None, weight: Tensor | None, strength: float
) -> Tensor:
    """x where kept, else what `dropped` says, in the accumulation type and rounded once."""
    accumulate = accumulation_dtype(x.dtype)
    # in x's layout, which the result has then; a copy of the result itself would lose its gradient in torch.compile
    mask = torch.empty_like(x, dtype=torch.bool).copy_(unpack_bits(bits, x.shape[-1]))
    if dropped == ZERO:
        rest = torch.zeros((), dtype=x.dtype, device=x.device)
    elif dropped == FACTOR:
        assert factor is not None
        rest = (x.to(accumulate) * factor.to(accumulate)).to(x.dtype)
    else:
        assert weight is not None
        strength_of = torch.full((), strength, dtype=accumulate, device=x.device)
        rest = (x.to(accumulate) + strength_of * weight.to(accumulate)).to(x.dtype)
    return torch.where(mask, x, rest)


class _Sparsify(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bits: Tensor, factor: Tensor | None, estimator: int, strength: float
    ) -> Tensor:
        ctx.estimator, ctx.strength = estimator, strength
        ctx.save_for_backward(bits, factor, weight if BACKWARD[estimator] == REGULARIZE else None)
        return nm_apply(weight, bits, FORWARD[estimator], factor, None, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bits, factor, weight = ctx.saved_tensors
        dropped = BACKWARD[ctx.estimator]
        if dropped is not None:
            grad = nm_apply(grad, bits, dropped, factor, weight, ctx.strength)
        return grad, None, None, None, None


def nm_sparsify(weight: Tensor, bits: Tensor, factor: Tensor | None, estimator: int, strength: float) -> Tensor:
    return _Sparsify.apply(weight, bits, factor, estimator, strength)
