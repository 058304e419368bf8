"""What tests of block masks share."""

import torch
from torch.utils import _pytree as pytree

from pyrx.reference import block_mask as reference
from pyrx.reference.block_sparse_attention import expand_blocks, visible_keys


def covered(elements, size):
    """bool blocks of bool elements (..., Sq, Sk): those that have one."""
    queries, keys = elements.shape[-2:]
    rows, columns = -(-queries // size[0]), -(-keys // size[1])
    blocks = torch.zeros(*elements.shape[:-2], rows, columns, dtype=torch.bool)
    for i in range(rows):
        for j in range(columns):
            tile = elements[..., i * size[0] : (i + 1) * size[0], j * size[1] : (j + 1) * size[1]]
            blocks[..., i, j] = tile.flatten(-2).any(-1)
    return blocks


def elements_of(mask):
    """bool (B or 1, H or 1, Sq, Sk): which pairs the mask lets see each other."""
    blocks = expand_blocks(mask.to_dense(), *mask.block_size, *mask.seq_lengths)
    return blocks & visible_keys(*mask.seq_lengths, *mask.window, mask.key_range, None, mask.device)


def assert_lists(mask):
    """The two pairs of lists agree, within their bounds."""
    assert all(each.dtype == torch.int32 and each.is_contiguous() for each in mask.lists)
    batch, heads, rows, columns = mask.shape
    assert (rows, columns) == tuple(-(-a // b) for a, b in zip(mask.seq_lengths, mask.block_size, strict=True))
    assert mask.kv_counts.shape == (batch, heads, rows) and mask.q_counts.shape == (batch, heads, columns)
    transposed = reference.dense_blocks(mask.q_counts, mask.q_indices, rows)
    assert torch.equal(mask.to_dense(), transposed.transpose(-1, -2))


def random_blocks(*shape, density=0.4):
    return torch.rand(shape) < density


def same_mask(a, b):
    assert (a.block_size, a.seq_lengths, a.window) == (b.block_size, b.seq_lengths, b.window)
    for mine, its in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        assert mine is None and its is None or torch.equal(mine, its)
