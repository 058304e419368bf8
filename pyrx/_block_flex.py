"""Block masks to FlexAttention's and back, as blocks and rules of elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from pyrx._block_patterns import inner_blocks
from pyrx._checks import check_choice, fail
from pyrx.reference.block_mask import block_lists, dense_blocks

if TYPE_CHECKING:
    from pyrx.ops.block_mask import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def blocks_of_flex(op: str, mask: object, partial: object) -> Tensor:
    """bool (B or 1, H or 1, NQ, NK): its partial and its full blocks; `partial` is None or "whole"."""
    if not isinstance(mask, flex.BlockMask):
        fail(op, "mask", "to be a torch.nn.attention.flex_attention.BlockMask", type(mask).__name__, TypeError)
    check_choice(op, "partial", partial, (None, "whole"))
    if mask.mask_mod is not flex.noop_mask and partial is None:
        name = getattr(mask.mask_mod, "__name__", repr(mask.mask_mod))
        fail(op, "mask_mod", "to be noop_mask (or partial='whole', which drops it)", name)
    columns = -(-mask.seq_lengths[1] // mask.BLOCK_SIZE[1])
    blocks = dense_blocks(mask.kv_num_blocks, mask.kv_indices, columns)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        blocks = blocks | dense_blocks(mask.full_kv_num_blocks, mask.full_kv_indices, columns)
    return blocks


def _mask_mod(mask: BlockMask, blocks: Tensor) -> MaskMod:
    """The rule of elements, blocks included: FlexAttention in eager mode reads no lists."""
    (rows, columns), (left, right), key_range = mask.block_size, mask.window, mask.key_range
    each_batch, each_head = (int(size > 1) for size in blocks.shape[:2])
    each_range = 0 if key_range is None else int(key_range.shape[0] > 1)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = blocks[batch * each_batch, head * each_head, query // rows, key // columns]
        # differences: an end of a wide window might not fit 32 bits
        if left >= 0:
            seen = seen & (query - key <= left)
        if right >= 0:
            seen = seen & (key - query <= right)
        if key_range is not None:
            own = key_range[batch * each_range, query]
            seen = seen & (key >= own[..., 0]) & (key < own[..., 1])
        return seen

    return visible


def flex_of_mask(mask: BlockMask) -> flex.BlockMask:
    """Blocks that lie inside of the lengths and the window are full ones, where there is no key_range."""
    blocks = mask.to_dense()
    rows, columns = blocks.shape[2:]
    inner = inner_blocks(mask.seq_lengths, mask.block_size, *mask.window, blocks.device)
    full = blocks & inner if mask.key_range is None else torch.zeros_like(blocks)
    (counts, indices, *_), (full_counts, full_indices, *_) = (
        block_lists(each, columns, rows) for each in (blocks & ~full, full)
    )
    return flex.BlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=mask.block_size,
        mask_mod=_mask_mod(mask, blocks),
        seq_lengths=mask.seq_lengths,
    )
