"""Means of blocks of tokens and how alike a block's tokens are, in one read."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrx import _library
from pyrx._attention import BLOCK_SIZES, MOST_HEAD_SIZE
from pyrx._backends import select
from pyrx._checks import accumulation_dtype, check_device, check_dtype, check_float, check_shape, fail
from pyrx.reference import block_pool as reference

ROW = "block_pool"


def _check(x: Tensor, mean: Tensor | None, block: int) -> None:
    check_float(ROW, "x", x)
    if x.dim() != 4:
        fail(ROW, "x", "of shape [B, H, S, D]", list(x.shape))
    if x.shape[3] > MOST_HEAD_SIZE:
        fail(ROW, "x", f"of a head size of at most {MOST_HEAD_SIZE}", x.shape[3])
    if mean is not None:
        check_dtype(ROW, "mean", mean, accumulation_dtype(x.dtype))
        check_shape(ROW, "mean", mean, "[B, H, D]", [*x.shape[:2], x.shape[3]])
        check_device(ROW, "mean", mean, x.device)
    if block not in BLOCK_SIZES:
        fail(ROW, "block", "to be one of " + ", ".join(map(str, BLOCK_SIZES)), block)


def _fake(x: Tensor, mean: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    _check(x, mean, block)
    batch, heads, tokens, size = x.shape
    similarity = x.new_empty((batch, heads, -(-tokens // block)), dtype=accumulation_dtype(x.dtype))
    return similarity.new_empty((*similarity.shape, size)), similarity


_library.define(ROW, "block_pool", "(Tensor x, Tensor? mean, int block) -> (Tensor, Tensor)", _fake)


def block_pool(x: Tensor, block: int, mean: Tensor | None = None, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """(means (B, H, N, D), similarity (B, H, N)) of blocks of tokens of x (B, H, S, D) less `mean`. No gradient."""
    x = x.detach()
    mean = None if mean is None else mean.detach()
    chosen = select(ROW, x.device.type, x.dtype, backend)
    if chosen == "reference":
        _check(x, mean, block)
        with torch.no_grad():
            return reference.block_pool(x, mean, block)
    return _library.namespace(chosen).block_pool(x, mean, block)
