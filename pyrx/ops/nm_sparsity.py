"""N:M sparsity: masks that keep N of each group of M elements, and weights under them with estimators' gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrx import _library
from pyrx._backends import select
from pyrx._checks import (
    check_bool,
    check_choice,
    check_device,
    check_dtype,
    check_float,
    check_integer,
    check_number,
    check_shape,
    check_tensor,
    fail,
)
from pyrx.reference import nm_sparsity as reference
from pyrx.reference.dropout import pack_bits
from pyrx.reference.nm_sparsity import BACKWARD, FACTOR, FORWARD, REGULARIZE, ZERO

ROW = "nm_sparsity"
MAX_GROUP = 128
ESTIMATORS = tuple(reference.ESTIMATORS)


def packed_shape(shape: Sequence[int]) -> list[int]:
    """The shape of a mask's bits, eight to a byte along the last dimension."""
    return [*shape[:-1], (shape[-1] + 7) // 8]


def check_nm(op: str, n: int, m: int) -> None:
    check_integer(op, "m", m, 1, MAX_GROUP)
    check_integer(op, "n", n, 1, m)


def check_groups(op: str, argument: str, value: Tensor, m: int, dim: int, pad: bool) -> None:
    """Of a tensor that is cut into groups of m along dim."""
    if value.dim() == 0:
        fail(op, argument, "of at least one dimension", list(value.shape))
    if not 0 <= dim < value.dim():
        fail(op, "dim", f"in [0, {value.dim() - 1}]", dim)
    if not pad and value.shape[dim] % m != 0:
        fail(op, argument, f"of a size along dimension {dim} that m = {m} divides (or pad=True)", list(value.shape))


def normalized_dim(op: str, value: Tensor, dim: int) -> int:
    dims = value.dim()
    check_integer(op, "dim", dim, -dims, dims - 1)
    return dim % dims


def check_bits(op: str, argument: str, bits: Tensor, like: Tensor) -> None:
    check_dtype(op, argument, bits, torch.uint8)
    check_shape(op, argument, bits, "[..., ceil(D / 8)]", packed_shape(like.shape))
    check_device(op, argument, bits, like.device)


def mask_bits(op: str, mask: Tensor, like: Tensor) -> Tensor:
    """A caller's mask, bool or bits, as bits."""
    check_tensor(op, "mask", mask)
    if mask.dtype != torch.bool:
        if mask.dtype != torch.uint8:
            fail(op, "mask", "of dtype bool, or uint8 as packed=True gives", mask.dtype, TypeError)
        check_bits(op, "mask", mask, like)
        return mask
    check_shape(op, "mask", mask, "of the weight", like.shape)
    check_device(op, "mask", mask, like.device)
    return pack_bits(mask)


def _check_factor(op: str, factor: Tensor | None, device: torch.device) -> None:
    if factor is not None:
        check_dtype(op, "decay", factor, torch.float64)
        check_device(op, "decay", factor, device)
        if factor.numel() != 1:
            fail(op, "decay", "of one element", list(factor.shape))


def _mask_fake(scores: Tensor, n: int, m: int, dim: int, magnitude: bool, packed: bool, pad: bool) -> Tensor:
    op = "nm_mask"
    check_float(op, "scores", scores)
    check_nm(op, n, m)
    check_groups(op, "scores", scores, m, dim, pad)
    if packed:
        return scores.new_empty(packed_shape(scores.shape), dtype=torch.uint8)
    return torch.empty_like(scores, dtype=torch.bool)


def _sparsify_fake(
    weight: Tensor,
    scores: Tensor | None,
    mask: Tensor | None,
    decay: Tensor | None,
    n: int,
    m: int,
    dim: int,
    magnitude: bool,
    pad: bool,
    estimator: int,
    strength: float,
) -> tuple[Tensor, Tensor]:
    op = "nm_sparsify"
    check_float(op, "weight", weight)
    check_nm(op, n, m)
    check_integer(op, "estimator", estimator, 0, len(ESTIMATORS) - 1)
    check_groups(op, "weight", weight, m, dim, pad)
    if scores is not None:
        check_float(op, "scores", scores)
        check_shape(op, "scores", scores, "of the weight", weight.shape)
        check_device(op, "scores", scores, weight.device)
        if mask is not None:
            fail(op, "at most one of scores", "and mask", "both")
    if mask is not None:
        check_bits(op, "mask", mask, weight)
    if (decay is None) != (FORWARD[estimator] != FACTOR):
        fail(op, "decay", "for the estimators mdgf and mdgf-scaled alone", "None" if decay is None else "a Tensor")
    _check_factor(op, decay, weight.device)
    bits = [0] if mask is not None else packed_shape(weight.shape)
    return torch.empty_like(weight), weight.new_empty(bits, dtype=torch.uint8)


def _apply_fake(
    x: Tensor, bits: Tensor, dropped: int, factor: Tensor | None, weight: Tensor | None, strength: float
) -> Tensor:
    op = "nm_apply"
    check_float(op, "x", x)
    if x.dim() == 0:
        fail(op, "x", "of at least one dimension", list(x.shape))
    check_bits(op, "bits", bits, x)
    check_integer(op, "dropped", dropped, ZERO, REGULARIZE)
    if (factor is None) != (dropped != FACTOR):
        fail(op, "factor", f"for dropped = {FACTOR} alone", "None" if factor is None else "a Tensor")
    _check_factor(op, factor, x.device)
    if (weight is None) != (dropped != REGULARIZE):
        fail(op, "weight", f"for dropped = {REGULARIZE} alone", "None" if weight is None else "a Tensor")
    if weight is not None:
        check_dtype(op, "weight", weight, x.dtype)
        check_shape(op, "weight", weight, "of x", x.shape)
        check_device(op, "weight", weight, x.device)
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, _, mask, decay, *_, estimator, strength = inputs
    bits = output[1] if mask is None else mask
    ctx.dropped, ctx.strength = BACKWARD[estimator], strength
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(
        None if ctx.dropped is None else bits,
        decay if ctx.dropped == FACTOR else None,
        weight if ctx.dropped == REGULARIZE else None,
    )


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    bits, factor, weight = ctx.saved_tensors
    if ctx.dropped is not None:
        found = ctx.ops.nm_apply(grad, bits, ctx.dropped, factor, weight, ctx.strength)
        (grad,) = _library.differentiable_once("nm_sparsify", [found])
    return grad, *(None,) * 10


_library.define(
    ROW,
    "nm_mask",
    "(Tensor scores, int n, int m, int dim, bool magnitude, bool packed, bool pad) -> Tensor",
    _mask_fake,
)
_library.define(
    ROW,
    "nm_sparsify",
    "(Tensor weight, Tensor? scores, Tensor? mask, Tensor? decay, int n, int m, int dim, bool magnitude, bool pad, "
    "int estimator, float strength) -> (Tensor, Tensor)",
    _sparsify_fake,
    _backward,
    _setup,
    native_formula=False,
)
_library.define(
    ROW,
    "nm_apply",
    "(Tensor x, Tensor bits, int dropped, Tensor? factor, Tensor? weight, float strength) -> Tensor",
    _apply_fake,
)


def nm_mask(
    scores: Tensor,
    n: int,
    m: int,
    *,
    dim: int = -1,
    magnitude: bool = True,
    packed: bool = False,
    pad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The N:M mask of scores: of each `m` consecutive elements along `dim` the `n` of the highest rank are kept.

    Args:
        scores: at least one dimension, any strides; float16, bfloat16, float32 or float64.
        n: how many elements of each group are *kept*, 1 to m.
        m: the size of a group, 1 to 128.
        dim: the dimension that is cut into groups: -1 for the inputs of a linear layer, 1 for those of a convolution.
            Default -1.
        magnitude: rank by absolute value, else by the scores as they are. Default True.
        packed: return bits. Default False.
        pad: let the last group have fewer than m elements, of which min(n, their number) stay, in place of an error.
            Default False.
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.

    Returns:
        bool tensor of scores' shape and strides, True where kept; packed: uint8 `(*shape[:-1], ceil(shape[-1] / 8))`,
        bit j of byte k is element 8k + j of its row, bits beyond the row 0. Of equal scores the one of the lower index
        stays; zeros of both signs are equal; NaN ranks highest, above infinity, so that it is never hidden, and NaNs
        are equal. The same bits on every backend. No gradient goes through it.

    Equivalent to, for the last dimension,
    `zeros.scatter_(-1, scores.unflatten(-1, (-1, m)).abs().topk(n).indices, True).flatten(-2)` but for ties.

    Cost: one read of the scores and one write of a byte (packed: a bit) an element.

    Raises:
        ValueError: n > m, an m that does not divide the dimension, a dim out of range. TypeError: integer or complex
        scores. RuntimeError: a backend that cannot serve.

    >>> pyrx.nm_mask(torch.tensor([1.0, -3.0, 2.0, 0.5, 4.0, 4.0, 4.0, float("nan")]), 2, 4).int()
    tensor([0, 1, 1, 0, 1, 0, 0, 1], dtype=torch.int32)

    Source: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021.
    """
    op = "nm_mask"
    check_float(op, "scores", scores)
    check_nm(op, n, m)
    check_bool(op, magnitude=magnitude, packed=packed, pad=pad)
    dim = normalized_dim(op, scores, dim) if scores.dim() else 0
    check_groups(op, "scores", scores, m, dim, pad)
    chosen = select(ROW, scores.device.type, scores.dtype, backend)
    if chosen == "reference":
        return reference.nm_mask(scores, n, m, dim, magnitude, packed)
    return _library.namespace(chosen).nm_mask(scores.detach(), n, m, dim, magnitude, packed, pad)


def _check_decay(op: str, decay: float | Tensor, device: torch.device) -> None:
    if isinstance(decay, Tensor):
        check_tensor(op, "decay", decay)
        if not decay.is_floating_point():
            fail(op, "decay", "to be a float or a floating-point tensor", decay.dtype, TypeError)
        check_device(op, "decay", decay, device)
        if decay.numel() != 1:
            fail(op, "decay", "of one element", list(decay.shape))
    elif not isinstance(decay, torch.SymFloat):
        check_number(op, "decay", decay)
        if not 0 <= decay <= 1:
            fail(op, "decay", "in [0, 1]", decay)


def _decay_tensor(decay: float | Tensor, device: torch.device) -> Tensor:
    """What MDGF multiplies dropped weights by, where a kernel reads it."""
    if isinstance(decay, Tensor):
        return decay.detach().to(torch.float64)
    return torch.full((), decay, dtype=torch.float64, device=device)


def nm_sparsify(
    weight: Tensor,
    n: int,
    m: int,
    *,
    dim: int = -1,
    scores: Tensor | None = None,
    estimator: str = "ste",
    decay: float | Tensor = 1.0,
    strength: float = 2e-4,
    mask: Tensor | None = None,
    magnitude: bool = True,
    pad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A weight under its N:M mask, recomputed in the same pass, with the gradient of a chosen estimator.

    Args:
        weight: at least one dimension, any strides; float16, bfloat16, float32 or float64.
        n, m, dim, magnitude, pad, backend: as of `pyrx.nm_mask`.
        scores: of the weight's shape, ranked in its place; any floating-point dtype. No gradient goes to them.
            Default: the weight.
        estimator: with m the mask, W the weight, g the gradient of the result:

            ============= ===================== =============================== =========================
            name          result                gradient of W                   source
            ============= ===================== =============================== =========================
            "ste"         m * W                 g                               Bengio et al. 2013
            "sr-ste"      m * W                 g + strength * (1 - m) * W      Zhou et al. 2021, eq. 9
            "mdgf"        (m + d * (1 - m)) * W g                               Bambhaniya et al. 2024, code
            "mdgf-scaled" (m + d * (1 - m)) * W (m + d * (1 - m)) * g           the same, text
            "hard"        m * W                 m * g                           a plain product
            ============= ===================== =============================== =========================

            Default "ste".
        decay: d, in [0, 1], of both MDGF estimators; a tensor of one element on the weight's device changes from step
            to step without recompiling or recapturing anything, and is not checked. Default 1: nothing is dropped.
        strength: of "sr-ste". Default 2e-4. Every backward adds the term: of k accumulated gradients each, and what a
            GradScaler scales the loss by divides it; `pyrx.optim.MaskedAdamW(rule="sr-ste")` adds it once a step.
        mask: use this one in place of ranking: bool of the weight's shape, or bits as `nm_mask(packed=True)` makes.

    Returns:
        A tensor of the weight's shape, dtype and strides. Kept elements are the weight's, bit for bit; dropped ones are
        exactly 0 whatever they were, or d times the weight, rounded once.

    Equivalent to `weight * nm_mask(weight, n, m)` under a `torch.autograd.Function` with the gradient above.

    Cost: forward a read and a write of the weight and a bit an element; backward nothing at all ("ste", "mdgf"), or a
    pass over the gradient, the bits and, for "sr-ste", the weight. Only bits are stored for it. No double backward
    where the backward is a pass.

    Raises:
        ValueError: as nm_mask; an unknown estimator, decay outside [0, 1], a mask of another shape, both scores and
        mask. TypeError: dtypes. RuntimeError: devices, a backend that cannot serve.

    Source: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021 (SR-STE);
    Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers", 2024 (MDGF);
    Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.
    """
    op = "nm_sparsify"
    check_float(op, "weight", weight)
    check_nm(op, n, m)
    check_choice(op, "estimator", estimator, ESTIMATORS)
    check_bool(op, magnitude=magnitude, pad=pad)
    dim = normalized_dim(op, weight, dim) if weight.dim() else 0
    check_number(op, "strength", strength)
    check_groups(op, "weight", weight, m, dim, pad)
    way = ESTIMATORS.index(estimator)
    _check_decay(op, decay, weight.device)
    factor = _decay_tensor(decay, weight.device) if FORWARD[way] == FACTOR else None
    bits = None if mask is None else mask_bits(op, mask, weight)
    if scores is not None:
        check_tensor(op, "scores", scores)
        scores = scores.detach()
    arguments = (weight, scores, bits, factor, n, m, dim, magnitude, pad, way, strength)
    ranked = weight if scores is None else scores
    chosen = select(ROW, weight.device.type, torch.promote_types(weight.dtype, ranked.dtype), backend)
    if chosen == "reference":
        _sparsify_fake(*arguments)
        if bits is None:
            bits = reference.nm_mask(ranked, n, m, dim, magnitude, True)
        return reference.nm_sparsify(weight, bits, factor, way, strength)
    return _library.namespace(chosen).nm_sparsify(*arguments)[0]
