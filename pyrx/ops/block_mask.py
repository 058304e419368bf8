"""Which blocks of queries and keys attend to each other: lists, the choice of blocks by score, and BlockMask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyrx import _library
from pyrx._attention import BLOCK_SIZES
from pyrx._backends import select
from pyrx._checks import check_device, check_dtype, check_integer, check_shape, check_tensor, fail
from pyrx.reference import block_mask as reference

ROW = "block_mask"


def _check_block_lists(blocks: Tensor, kv_width: int, q_width: int) -> None:
    op = "block_lists"
    check_dtype(op, "blocks", blocks, torch.bool)
    if blocks.dim() != 4:
        fail(op, "blocks", "of shape [B or 1, H or 1, NQ, NK]", list(blocks.shape))
    check_integer(op, "kv_width", kv_width, 0, blocks.shape[3])
    check_integer(op, "q_width", q_width, 0, blocks.shape[2])


def _block_lists_fake(blocks: Tensor, kv_width: int, q_width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_block_lists(blocks, kv_width, q_width)
    batch, heads, queries, keys = blocks.shape

    def empty(*shape: int) -> Tensor:
        return blocks.new_empty((batch, heads, *shape), dtype=torch.int32)

    return empty(queries), empty(queries, kv_width), empty(keys), empty(keys, q_width)


def _check_select(scores: Tensor, count: Tensor | None, mass: float, always: Tensor | None) -> None:
    op = "select_blocks"
    check_dtype(op, "scores", scores, torch.float32)
    if scores.dim() != 4:
        fail(op, "scores", "of shape [B, H, NQ, NK]", list(scores.shape))
    if count is not None:
        check_dtype(op, "count", count, torch.int32)
        shape = list(count.shape)
        if len(shape) != 3 or any(shape[i] not in (1, scores.shape[i]) for i in range(3)):
            fail(op, "count", f"of shape [B or 1, H or 1, NQ or 1] of scores of {list(scores.shape)}", shape)
        check_device(op, "count", count, scores.device)
    elif not 0 <= mass <= 1:
        fail(op, "mass", "in [0, 1]", mass)
    if always is not None:
        check_dtype(op, "always", always, torch.bool)
        shape = list(always.shape)
        if len(shape) != 4 or any(shape[i] not in (1, scores.shape[i]) for i in range(4)):
            fail(op, "always", f"of a shape that broadcasts to the scores' {list(scores.shape)}", shape)
        check_device(op, "always", always, scores.device)


def _select_fake(scores: Tensor, count: Tensor | None, mass: float, always: Tensor | None) -> Tensor:
    _check_select(scores, count, mass, always)
    return scores.new_empty(scores.shape, dtype=torch.bool)


_library.define(
    ROW,
    "block_lists",
    "(Tensor blocks, SymInt kv_width, SymInt q_width) -> (Tensor, Tensor, Tensor, Tensor)",
    _block_lists_fake,
)
_library.define(
    ROW, "select_blocks", "(Tensor scores, Tensor? count, float mass, Tensor? always) -> Tensor", _select_fake
)


def block_lists(blocks: Tensor, kv_width: int, q_width: int, backend: str | None = None) -> tuple[Tensor, ...]:
    chosen = select(ROW, blocks.device.type, torch.float32, backend)
    if chosen == "reference":
        _check_block_lists(blocks, kv_width, q_width)
        return reference.block_lists(blocks, kv_width, q_width)
    return _library.namespace(chosen).block_lists(blocks, kv_width, q_width)


def select_blocks(
    scores: Tensor,
    count: Tensor | None = None,
    mass: float = 1.0,
    always: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    chosen = select(ROW, scores.device.type, torch.float32, backend)
    if chosen == "reference":
        _check_select(scores, count, mass, always)
        return reference.select_blocks(scores, count, mass, always)
    return _library.namespace(chosen).select_blocks(scores, count, float(mass), always)


class BlockMask:
    """Which blocks of queries and keys attend to each other, as compact lists on the device.

    Attributes:
        kv_counts: int32 (B or 1, H or 1, NQ): how many blocks of keys a block of queries attends to.
        kv_indices: int32 (B or 1, H or 1, NQ, W): which ones, in any order; what lies past the count is not read.
        q_counts, q_indices: the transpose, for the backward: (B or 1, H or 1, NK) and (B or 1, H or 1, NK, V).
        block_size: (queries, keys) of a block, each 16, 32, 64 or 128.
        seq_lengths: (Sq, Sk); the last blocks may be partly outside.
        key_range: int32 (B or 1, Sq, 2) or None: the first key that a query may see and the one after the last.
    """

    def __init__(
        self,
        kv_counts: Tensor,
        kv_indices: Tensor,
        q_counts: Tensor,
        q_indices: Tensor,
        block_size: tuple[int, int],
        seq_lengths: tuple[int, int],
        key_range: Tensor | None = None,
    ) -> None:
        self.kv_counts, self.kv_indices = kv_counts, kv_indices
        self.q_counts, self.q_indices = q_counts, q_indices
        self.block_size, self.seq_lengths, self.key_range = block_size, seq_lengths, key_range

    @property
    def lists(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(kv_counts, kv_indices, q_counts, q_indices), as the ops take them."""
        return self.kv_counts, self.kv_indices, self.q_counts, self.q_indices

    @property
    def device(self) -> torch.device:
        return self.kv_counts.device

    @staticmethod
    def from_dense(
        blocks: Tensor,
        seq_lengths: tuple[int, int] | None = None,
        block_size: int | tuple[int, int] = 128,
        *,
        key_range: Tensor | None = None,
        backend: str | None = None,
    ) -> BlockMask:
        """Of bool blocks (NQ, NK), (H, NQ, NK) or (B or 1, H or 1, NQ, NK), True where they attend.

        `seq_lengths` (Sq, Sk) default to whole blocks.
        """
        op = "BlockMask.from_dense"
        check_dtype(op, "blocks", blocks, torch.bool)
        if not 2 <= blocks.dim() <= 4:
            fail(op, "blocks", "of shape [NQ, NK], [H, NQ, NK] or [B or 1, H or 1, NQ, NK]", list(blocks.shape))
        blocks = blocks[(None,) * (4 - blocks.dim())]
        size = check_block_size(op, block_size)
        count = blocks.shape[2], blocks.shape[3]
        lengths = seq_lengths or (count[0] * size[0], count[1] * size[1])
        expected = [-(-length // each) for length, each in zip(lengths, size, strict=True)]
        check_shape(op, "blocks", blocks, "[B or 1, H or 1, NQ, NK]", [*blocks.shape[:2], *expected])
        kv_counts, kv_indices, q_counts, q_indices = block_lists(blocks, count[1], count[0], backend)
        return BlockMask(kv_counts, kv_indices, q_counts, q_indices, size, lengths, key_range)

    def to_dense(self) -> Tensor:
        """bool (B or 1, H or 1, NQ, NK)."""
        return reference.dense_blocks(self.kv_counts, self.kv_indices, self.q_counts.shape[-1])

    def density(self) -> Tensor:
        """The share of blocks that attend, a float32 scalar on the device."""
        blocks = self.kv_counts.numel() * self.q_counts.shape[-1]
        return self.kv_counts.sum(dtype=torch.int64).float() / max(blocks, 1)


def check_block_size(op: str, block_size: object) -> tuple[int, int]:
    pair = (block_size, block_size) if isinstance(block_size, int) else block_size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        fail(op, "block_size", "to be an int or a pair (queries, keys)", repr(block_size), TypeError)
    for each in pair:
        if each not in BLOCK_SIZES:
            fail(op, "block_size", "to be one of " + ", ".join(map(str, BLOCK_SIZES)), each)
    return pair[0], pair[1]


def _unflatten(tensors: Iterable[Any], context: tuple[Any, ...]) -> BlockMask:
    # no checks: trees hold anything in a tensor's place
    kv_counts, kv_indices, q_counts, q_indices, key_range = tensors
    block_size, seq_lengths = context
    return BlockMask(kv_counts, kv_indices, q_counts, q_indices, block_size, seq_lengths, key_range)


pytree.register_pytree_node(
    BlockMask,
    lambda mask: ([*mask.lists, mask.key_range], (mask.block_size, mask.seq_lengths)),
    _unflatten,
    serialized_type_name="pyrx.BlockMask",
)
torch.serialization.add_safe_globals([BlockMask])


def check_lists(op: str, lists: Iterable[Tensor], q_block: int, k_block: int, query: Tensor, key: Tensor) -> None:
    """Of the lists of a mask: shapes and dtypes; the kernels pass over indices that are out of range."""
    q_blocks, k_blocks = -(-query.shape[2] // q_block), -(-key.shape[2] // k_block)
    kv_counts, kv_indices, q_counts, q_indices = lists
    for side, counts, indices, rows in (
        ("kv", kv_counts, kv_indices, q_blocks),
        ("q", q_counts, q_indices, k_blocks),
    ):
        for name, each in ((f"{side}_counts", counts), (f"{side}_indices", indices)):
            check_tensor(op, name, each)
            check_dtype(op, name, each, torch.int32)
            check_device(op, name, each, query.device)
        shape = list(counts.shape)
        if len(shape) != 3 or any(shape[i] not in (1, query.shape[i]) for i in (0, 1)) or shape[2] != rows:
            fail(op, f"{side}_counts", f"of shape [B or 1, H or 1, {rows}] for a query of {list(query.shape)}", shape)
        if indices.dim() != 4:
            fail(op, f"{side}_indices", f"of shape {[*shape, 'W']}", list(indices.shape))
        check_shape(op, f"{side}_indices", indices, "[..., W]", [*shape, indices.shape[3]])
    if list(kv_counts.shape[:2]) != list(q_counts.shape[:2]):
        fail(
            op, "q_counts", f"of the leading dimensions of kv_counts {list(kv_counts.shape[:2])}", list(q_counts.shape)
        )
