"""Block masks to FlexAttention's and back, as blocks and rules of elements."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from pyrx._checks import check_choice, fail
from pyrx.reference.block_mask import block_lists, dense_blocks

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


def _mask_mod(blocks: Tensor, block_size: tuple[int, int], key_range: Tensor | None) -> MaskMod:
    """The rule of elements, blocks included: FlexAttention in eager mode reads no lists."""
    each_batch, each_head = (int(size > 1) for size in blocks.shape[:2])
    each_range = 0 if key_range is None else int(key_range.shape[0] > 1)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        listed = blocks[batch * each_batch, head * each_head, query // block_size[0], key // block_size[1]]
        if key_range is None:
            return listed
        own = key_range[batch * each_range, query]
        return listed & (key >= own[..., 0]) & (key < own[..., 1])

    return visible


def flex_of_blocks(
    blocks: Tensor, block_size: tuple[int, int], lengths: tuple[int, int], key_range: Tensor | None
) -> flex.BlockMask:
    """Blocks that lie inside and have no rule of elements are full ones."""
    rows, columns = blocks.shape[2:]
    inside = torch.ones(rows, columns, dtype=torch.bool, device=blocks.device)
    if lengths[0] % block_size[0] != 0:
        inside[-1] = False
    if lengths[1] % block_size[1] != 0:
        inside[:, -1] = False
    full = blocks & inside if key_range is None else torch.zeros_like(blocks)
    (counts, indices, *_), (full_counts, full_indices, *_) = (
        block_lists(each, columns, rows) for each in (blocks & ~full, full)
    )
    return flex.BlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=block_size,
        mask_mod=_mask_mod(blocks, block_size, key_range),
        seq_lengths=lengths,
    )
