"""Which patches masked image modelling hides: random, block-wise and hard-patch masks, drawn in one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrx import _library
from pyrx._backends import select
from pyrx._checks import (
    check_bool,
    check_choice,
    check_device,
    check_float,
    check_integer,
    check_number,
    check_shape,
    check_tensor,
    fail,
)
from pyrx._random import check_seed, device_of, seed_tensor
from pyrx.reference import patch_mask as reference
from pyrx.reference.patch_mask import BLOCK, HARD, MOST_PATCHES, RANDOM, Draw

ROW = "patch_mask"
METHODS = ("random", "block", "hard")
SHAPES = ("[N, L] or [N, Hp, Wp]", "[N, Hp, Wp]", "[N, L] or [N, Hp, Wp]")


def _check(seed: Tensor, losses: Tensor | None, shape: Sequence[int], draw: Draw) -> None:
    check_seed(ROW, seed, seed.device)
    if not RANDOM <= draw.method <= HARD:
        fail(ROW, "method", f"in [{RANDOM}, {HARD}]", draw.method)
    if len(shape) not in ((3,) if draw.method == BLOCK else (2, 3)):
        fail(ROW, "shape", SHAPES[draw.method], list(shape))
    if any(size < 0 for size in shape):
        fail(ROW, "shape's sizes", "at least 0", list(shape))
    size = math.prod(shape[1:])
    if size >= MOST_PATCHES:
        fail(ROW, "shape", f"of fewer than {MOST_PATCHES} patches a sample", list(shape))
    if not 0 <= draw.masked <= size:
        fail(ROW, "num_masked", f"in [0, {size}]", draw.masked)
    if not 0 <= draw.hard <= draw.masked:
        fail(ROW, "number of hard patches", f"in [0, {draw.masked}]", draw.hard)
    if not 1 <= draw.min_block < MOST_PATCHES:
        fail(ROW, "min_block", f"in [1, {MOST_PATCHES - 1}]", draw.min_block)
    if not -700 <= draw.log_aspect <= 0:
        fail(ROW, "logarithm of min_aspect", "in [-700, 0]", draw.log_aspect)
    if (losses is not None) != (draw.method == HARD):
        fail(ROW, "losses", "for method 'hard' alone", "None" if losses is None else "a Tensor", TypeError)
    if losses is not None:
        check_float(ROW, "losses", losses)
        check_shape(ROW, "losses", losses, "[N, L]" if len(shape) == 2 else "[N, Hp, Wp]", shape)
        check_device(ROW, "losses", losses, seed.device)


def _fake(
    seed: Tensor,
    losses: Tensor | None,
    shape: Sequence[int],
    method: int,
    masked: int,
    hard: int,
    min_block: int,
    log_aspect: float,
    indices: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(seed, losses, shape, Draw(method, masked, hard, min_block, log_aspect))
    mask = seed.new_empty(tuple(shape), dtype=torch.bool)
    if not indices:
        return mask, seed.new_empty(0), seed.new_empty(0)
    size = math.prod(shape[1:])
    return mask, seed.new_empty((shape[0], size - masked)), seed.new_empty((shape[0], size))


_library.define(
    ROW,
    "patch_mask",
    "(Tensor seed, Tensor? losses, SymInt[] shape, int method, SymInt masked, SymInt hard, int min_block, "
    "float log_aspect, bool indices) -> (Tensor, Tensor, Tensor)",
    _fake,
)


def _share(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        fail(ROW, name, "to be a float", type(value).__name__, TypeError)
    if not 0 <= value <= 1:
        fail(ROW, name, "in [0, 1]", value)
    return value


def _log_aspect(min_aspect: float) -> float:
    check_number(ROW, "min_aspect", min_aspect)
    if not 1e-300 <= min_aspect <= 1:
        fail(ROW, "min_aspect", "in (0, 1]", min_aspect)
    return math.log(min_aspect)


def patch_mask(
    shape: Sequence[int],
    mask_ratio: float = 0.75,
    *,
    num_masked: int | None = None,
    method: str = "random",
    losses: Tensor | None = None,
    hard_ratio: float = 0.5,
    min_block: int = 16,
    min_aspect: float = 0.3,
    return_indices: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Masks for masked image modelling, drawn for a whole batch in one launch: True where a patch is masked (hidden).

    Every sample has exactly as many masked patches as asked for.

    Args:
        shape: (N, L), or (N, Hp, Wp) with L = Hp * Wp patches in rows; L below 2**31.
        mask_ratio: the share of masked patches, in [0, 1]: `int(L * (1 - mask_ratio))` are kept, as MAE counts.
            Default 0.75.
        num_masked: their number in its place.
        method: "random" (MAE): any set of patches is as likely as any other. "block" (BEiT): a union of rectangles,
            filled up with random patches where no further rectangle fits; shape must be (N, Hp, Wp). "hard" (hard
            patches mining): the patches of the highest `losses`, and random ones. Default "random".
        losses: of method "hard": the predicted loss of each patch, of `shape`, any strides; float16, bfloat16, float32
            or float64, compared in float32. Of equal losses that of the lower index counts as higher, NaN as the
            highest. No gradient goes through them.
        hard_ratio: of method "hard": the share, in [0, 1], of the masked patches that are those of the highest losses,
            rounded down. The easy-to-hard schedule of the paper is `0.5 * (epoch + 1) / epochs`. Default 0.5, its end.
        min_block: of method "block": a rectangle's area is uniform between this and the number of patches that are
            still to be masked. Default 16.
        min_aspect: of method "block": a rectangle's aspect is log-uniform in [min_aspect, 1 / min_aspect]. Default 0.3.
        return_indices: return `ids_keep` and `ids_restore` beside the mask.
        seed: int, or int64 tensor of one element on the device. Default: drawn there from `generator`.
        generator: torch.Generator on the device. Default: torch's.
        device: where the mask is made. Default: that of losses, of a seed tensor or of the generator, else the CPU.
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.

    Returns:
        bool mask of `shape`, or (mask, ids_keep, ids_restore), where ids_keep (N, keep) int64 are the kept patches in
        ascending order, and ids_restore (N, L) int64 tells where each patch stands among the kept patches followed by
        the masked ones: `visible = x.gather(1, ids_keep[..., None].expand(-1, -1, D))` and
        `torch.cat([visible, mask_tokens], 1).gather(1, ids_restore[..., None].expand(-1, -1, D))` are MAE's.

    Equivalent to, for "random", `torch.rand(N, L).argsort(1).argsort(1) >= keep` in distribution; "hard" replaces the
    keys of the highest losses by infinity before. A rectangle is taken if it lies in the grid and adds at least one and
    at most as many patches as are still to be masked; ten that are not, one after another, or 128 in all end the
    drawing of rectangles.

    Cost: a Philox call a four patches, and one write; one launch, nothing is copied to or from the host.

    Raises:
        ValueError: shapes, ratios and counts out of range. TypeError: dtypes; losses without method "hard" or the
        reverse. RuntimeError: losses, seed or generator on another device, a backend that cannot serve.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022; Bao et al., "BEiT", ICLR 2022,
    algorithm 1; Wang et al., "Hard Patches Mining for Masked Image Modeling", CVPR 2023.
    """
    check_choice(ROW, "method", method, METHODS)
    way = METHODS.index(method)
    if not isinstance(shape, (list, tuple)):
        fail(ROW, "shape", "to be a sequence of ints", type(shape).__name__, TypeError)
    for size in shape:
        check_integer(ROW, "shape's sizes", size, 0, 2**62)
    if len(shape) not in ((3,) if way == BLOCK else (2, 3)):
        fail(ROW, "shape", SHAPES[way], list(shape))
    size = math.prod(shape[1:])
    if num_masked is None:
        num_masked = size - math.floor(size * (1 - _share("mask_ratio", mask_ratio)))
    check_integer(ROW, "num_masked", num_masked, 0, size)
    check_integer(ROW, "min_block", min_block, 1, MOST_PATCHES - 1)
    log_aspect = _log_aspect(min_aspect)
    check_bool(ROW, return_indices=return_indices)
    hard = math.floor(num_masked * _share("hard_ratio", hard_ratio)) if way == HARD else 0
    if losses is not None:
        check_tensor(ROW, "losses", losses)
        losses = losses.detach()
    where = device_of(device, losses, seed, generator)
    chosen = select(ROW, where.type, torch.float32, backend)
    seed = seed_tensor(ROW, seed, generator, where)
    draw = Draw(way, num_masked, hard, min_block, log_aspect)
    if chosen == "reference":
        _check(seed, losses, shape, draw)
        found = reference.patch_mask(seed, losses, shape, draw, return_indices)
    else:
        found = _library.namespace(chosen).patch_mask(seed, losses, list(shape), *draw, return_indices)
    return found if return_indices else found[0]
