"""Attention over packed sequences of different lengths, on the kernels of block-sparse attention."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrx._attention import window_of
from pyrx._block_checks import fail_mask_type
from pyrx._checks import check_device, check_float, check_shape, check_tensor, fail, is_read
from pyrx.ops.block_mask import BlockMask
from pyrx.ops.block_sparse_attention import block_sparse_attention
from pyrx.reference.block_sparse_attention_varlen import sequence_ranges

OP = "block_sparse_attention_varlen"


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, device: torch.device, tokens: int) -> None:
    check_tensor(OP, name, cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        fail(OP, name, "of dtype int32 or int64", cu_seqlens.dtype, TypeError)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        fail(OP, name, "of shape [N + 1]", list(cu_seqlens.shape))
    check_device(OP, name, cu_seqlens, device)
    if is_read(cu_seqlens):
        lengths = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (lengths < 0).any():
            fail(OP, name, f"to rise from 0 to the {tokens} tokens", cu_seqlens.tolist())


def block_sparse_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    block_mask: BlockMask | None = None,
    *,
    is_causal: bool = False,
    window: int | tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    enable_gqa: bool = False,
    key_mask: Tensor | None = None,
    query_scale: Tensor | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of N sequences of different lengths, packed one after the other without padding.

    Args:
        query: (Tq, H, D), the queries of all sequences, any strides; dtypes as for `pyrx.block_sparse_attention`.
        key, value: (Tk, Hkv, D) and (Tk, Hkv, Dv).
        cu_seqlens_q: int32 or int64 (N + 1,) on the device: where each sequence's queries start, from 0 to Tq.
        cu_seqlens_k: the same of the keys, to Tk. Default: cu_seqlens_q.
        block_mask: a `pyrx.BlockMask` for the packed lengths (Tq, Tk): of its blocks only the part within a sequence
            counts, and its own window counts packed positions. Default: the blocks of 128 that the sequences, is_causal
            and window reach, the fastest forward on the CPU; a backward over many short sequences, and a GPU, have less
            to do with a mask of smaller blocks, such as `pyrx.BlockMask.document(lengths, 32)`.
        is_causal, window: as for `pyrx.block_sparse_attention`; positions of queries and keys count from the start of
            their sequence.
        dropout_p, scale, softcap, enable_gqa, return_lse, return_entropy, seed, generator, backend: as there.
        key_mask: bool (Tk,), True where the key takes part.
        query_scale: (Tq, H) floats that a query's logits are multiplied with, before softcap.

    Returns:
        (Tq, H, Dv) of the query's dtype, contiguous where the query is. With return_lse and return_entropy a tuple:
        out, then both as (Tq, H) float32 (float64 for float64). A query of a sequence without keys gives 0.

    Differentiable in query, key, value and query_scale; once. No bias: it has no place in a packed batch. The mask of
    the dropout is `pyrx.dropout_mask((1, H, Tq, Tk), dropout_p, seed)`. Nothing syncs: there is no max_seqlen to give.

    Equivalent to `pyrx.block_sparse_attention` of each sequence by itself, (1, H, length, D), but for the dropout.

    Cost: of `pyrx.block_sparse_attention` over those blocks, of which one that holds several sequences counts whole;
    the packed tensors are read where they are.

    Raises:
        ValueError: shapes, a mask of other lengths, values out of range; on the CPU a cu_seqlens that does not rise
        from 0 to the tokens (on a GPU such queries see the keys inside of (0, Tk) that it names, or none; nothing is
        read out of bounds). TypeError: types and dtypes. RuntimeError: devices, or a backend that cannot serve.

    Source: Dao, "FlashAttention-2" (2023), flash_attn_varlen_func, whose causal mask ends with the last key instead.
    """
    for name, each in (("query", query), ("key", key), ("value", value)):
        check_float(OP, name, each)
        if each.dim() != 3:
            fail(OP, name, "of shape [T, H, D]", list(each.shape))
    queries, keys = query.shape[0], key.shape[0]
    check_shape(OP, "value", value, "[Tk, Hkv, Dv]", [*key.shape[:2], value.shape[2]])
    if cu_seqlens_k is None:
        if queries != keys:
            fail(OP, "cu_seqlens_k", f"for {keys} keys beside {queries} queries", None)
        cu_seqlens_k = cu_seqlens_q
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.device, queries)
    _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, query.device, keys)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        fail(OP, "cu_seqlens_k", f"of cu_seqlens_q's shape {list(cu_seqlens_q.shape)}", list(cu_seqlens_k.shape))
    if key_mask is not None:
        check_tensor(OP, "key_mask", key_mask)
        check_shape(OP, "key_mask", key_mask, "[Tk]", [keys])
        key_mask = key_mask[None]
    if query_scale is not None:
        check_tensor(OP, "query_scale", query_scale)
        check_shape(OP, "query_scale", query_scale, "[Tq, H]", query.shape[:2])
        query_scale = query_scale.t()[None]
    ranges = sequence_ranges(queries, keys, cu_seqlens_q, cu_seqlens_k, *window_of(OP, window, is_causal))
    lengths = (queries, keys)
    if block_mask is None:
        mask = BlockMask.from_key_range(ranges, lengths)
    else:
        if not isinstance(block_mask, BlockMask):
            fail_mask_type(OP, "block_mask", block_mask)
        if tuple(block_mask.seq_lengths) != lengths:
            fail(OP, "block_mask", f"for the lengths (Tq, Tk) = {list(lengths)}", list(block_mask.seq_lengths))
        mask = block_mask & BlockMask.from_key_range(ranges, lengths, block_mask.block_size)
    found = block_sparse_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        mask,
        dropout_p=dropout_p,
        scale=scale,
        softcap=softcap,
        enable_gqa=enable_gqa,
        key_mask=key_mask,
        query_scale=query_scale,
        return_lse=return_lse,
        return_entropy=return_entropy,
        seed=seed,
        generator=generator,
        backend=backend,
    )
    results = found if isinstance(found, tuple) else (found,)
    packed = tuple(each[0].transpose(0, 1) for each in results)
    return packed if isinstance(found, tuple) else packed[0]
