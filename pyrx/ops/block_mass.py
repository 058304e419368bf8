"""How much attention lies in every block, and in the blocks that a mask keeps: one pass over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrx import _library
from pyrx._attention import LOGITS_SCHEMA, Logits, check_blocks, check_logits
from pyrx._backends import select
from pyrx._checks import accumulation_dtype, broadcasts, check_device, check_dtype, check_shape, fail
from pyrx._linear import without_autocast
from pyrx.reference import block_mass as reference

ROW = "block_mass"


def _check_mass(query: Tensor, key: Tensor, lse: Tensor, q_block: int, k_block: int, *logits: Any) -> None:
    op = "block_mass"
    check_logits(op, query, key, Logits(*logits))
    check_dtype(op, "lse", lse, accumulation_dtype(query.dtype))
    check_shape(op, "lse", lse, "[B, H, Sq]", query.shape[:3])
    check_device(op, "lse", lse, query.device)
    check_blocks(op, q_block, k_block)


def _block_shape(query: Tensor, key: Tensor, q_block: int, k_block: int) -> list[int]:
    return [*query.shape[:2], -(-query.shape[2] // q_block), -(-key.shape[2] // k_block)]


def _mass_fake(query: Tensor, key: Tensor, lse: Tensor, q_block: int, k_block: int, *logits: Any) -> Tensor:
    _check_mass(query, key, lse, q_block, k_block, *logits)
    return lse.new_empty(_block_shape(query, key, q_block, k_block))


def _check_recall(query: Tensor, key: Tensor, blocks: Tensor, q_block: int, k_block: int, *logits: Any) -> None:
    op = "block_recall"
    check_logits(op, query, key, Logits(*logits))
    check_blocks(op, q_block, k_block)
    check_dtype(op, "blocks", blocks, torch.bool)
    expected, shape = _block_shape(query, key, q_block, k_block), list(blocks.shape)
    if not broadcasts(shape[:2], expected[:2]) or shape[2:] != expected[2:]:
        fail(op, "blocks", f"of shape [B or 1, H or 1, NQ, NK] of {expected}", shape)
    check_device(op, "blocks", blocks, query.device)


def _recall_fake(query: Tensor, key: Tensor, blocks: Tensor, q_block: int, k_block: int, *logits: Any) -> Tensor:
    _check_recall(query, key, blocks, q_block, k_block, *logits)
    return query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))


_library.define(
    ROW,
    "block_mass",
    f"(Tensor query, Tensor key, Tensor lse, int q_block, int k_block, {LOGITS_SCHEMA}) -> Tensor",
    _mass_fake,
)
_library.define(
    ROW,
    "block_recall",
    f"(Tensor query, Tensor key, Tensor blocks, int q_block, int k_block, {LOGITS_SCHEMA}) -> Tensor",
    _recall_fake,
)


def block_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    block_size: tuple[int, int],
    logits: Logits,
    backend: str | None = None,
) -> Tensor:
    """(B, H, NQ, NK) in the lse's dtype: the sum over each block of exp(logit - lse). No gradient."""
    args = (query.detach(), key.detach(), lse.detach(), *block_size, *logits)
    chosen = select(ROW, query.device.type, query.dtype, backend)
    if chosen == "reference":
        _check_mass(*args)
        with torch.no_grad(), without_autocast(query.device.type):
            return reference.block_mass(*args)
    return _library.namespace(chosen).block_mass(*args)


def block_recall(
    query: Tensor,
    key: Tensor,
    blocks: Tensor,
    block_size: tuple[int, int],
    logits: Logits,
    backend: str | None = None,
) -> Tensor:
    """(B, H, Sq) in the accumulation dtype: the share of each query's attention that lies in `blocks`. No gradient."""
    args = (query.detach(), key.detach(), blocks, *block_size, *logits)
    chosen = select(ROW, query.device.type, query.dtype, backend)
    if chosen == "reference":
        _check_recall(*args)
        with torch.no_grad(), without_autocast(query.device.type):
            return reference.block_recall(*args)
    return _library.namespace(chosen).block_recall(*args)
