"""Which blocks of queries and keys attend to each other: lists, the choice of blocks by score, and BlockMask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyrx import _block_patterns as patterns
from pyrx import _library
from pyrx._attention import NO_WINDOW, UNLIMITED, meet, window_of
from pyrx._backends import select
from pyrx._block_checks import (
    MOST_TOKENS,
    check_block_lists,
    check_block_size,
    check_documents,
    check_key_range,
    check_lengths,
    check_select,
    check_tokens,
    check_values,
)
from pyrx._checks import broadcasts, check_device, check_dtype, check_integer, check_shape, fail, is_read
from pyrx.reference import block_mask as reference

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

ROW = "block_mask"
_OR_WHOLE = "mask.whole() drops the rule of elements"


def _block_lists_fake(blocks: Tensor, kv_width: int, q_width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_block_lists(blocks, kv_width, q_width)
    batch, heads, queries, keys = blocks.shape

    def empty(*shape: int) -> Tensor:
        return blocks.new_empty((batch, heads, *shape), dtype=torch.int32)

    return empty(queries), empty(queries, kv_width), empty(keys), empty(keys, q_width)


def _select_fake(scores: Tensor, count: Tensor | None, mass: float, always: Tensor | None) -> Tensor:
    check_select(scores, count, mass, always)
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


def block_lists(
    blocks: Tensor, kv_width: int, q_width: int, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(kv_counts, kv_indices, q_counts, q_indices) of bool blocks (B or 1, H or 1, NQ, NK): at most `kv_width` of a row
    and `q_width` of a column are listed, the first ones, in ascending order, then zeros."""
    chosen = select(ROW, blocks.device.type, torch.float32, backend)
    if chosen == "reference":
        check_block_lists(blocks, kv_width, q_width)
        return reference.block_lists(blocks, kv_width, q_width)
    return _library.namespace(chosen).block_lists(blocks, kv_width, q_width)


def select_blocks(
    scores: Tensor,
    count: Tensor | None = None,
    mass: float = 1.0,
    always: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """bool of the scores' shape (B, H, NQ, NK): what each row keeps of its blocks, ranked by float32 score.

    The `count` first ones, int32 (B or 1, H or 1, NQ or 1); or, without it, the longest run of first ones whose scores,
    each taken as in [0, 1024] and in units of 2**-36, sum to at most `mass` of the row's, at least one. NaN ranks
    first, equal scores by index. Minus infinity is kept only by `always`, bool that broadcasts to the scores.
    """
    chosen = select(ROW, scores.device.type, torch.float32, backend)
    if chosen == "reference":
        check_select(scores, count, mass, always)
        return reference.select_blocks(scores, count, mass, always)
    return _library.namespace(chosen).select_blocks(scores, count, float(mass), always)


class BlockMask:
    """Which blocks of queries and keys attend to each other, as compact lists on the device.

    Attributes:
        kv_counts: int32 (B or 1, H or 1, NQ): how many blocks of keys a block of queries attends to.
        kv_indices: int32 (B or 1, H or 1, NQ, W): which ones, each once, in any order; what lies past the count is
            not read.
        q_counts, q_indices: the transpose, for the backward: (B or 1, H or 1, NK) and (B or 1, H or 1, NK, V).
        block_size: (queries, keys) of a block, each 16, 32, 64 or 128.
        seq_lengths: (Sq, Sk); the last blocks may be partly outside.
        key_range: int32 (B or 1, Sq, 2) or None: the first key that a query may see and the one after the last.
        window: (left, right): how many keys before its own position a query may see, and after; -1 without limit.

    Its static methods build it on the device, without a tensor of (Sq, Sk) and without waiting for a GPU. They take
    `seq_lengths` as (Sq, Sk), or an int for both, and `block_size` as (queries, keys), or an int for both, default
    128.

    key_range and window are the mask's rule of elements: attention keeps to it within the blocks, as to is_causal= and
    window= of its own, and counts positions alike. `causal`, `sliding_window`, `document` and `from_key_range` bring
    theirs and are exact; the other patterns are of whole blocks, those with a pair of positions that they allow.

    Masks combine by &, | and ~, of the same seq_lengths and block_size, broadcast over batch and heads, and what they
    give is exact or an error: & meets both rules; | takes masks of one and the same window, ~ those without one, and
    neither a key_range. `whole()` drops the rule: `sliding_window(...).whole() | global_tokens(...)` is of whole
    blocks, and `(...) & causal(...)` causal again. Masks are pytrees, and go through torch.compile (which needs ~mask
    spelled mask.__invert__()), pickle, deepcopy and torch.save.

    Raises:
        ValueError: from every method, shapes, block sizes, values out of range. TypeError: types and dtypes.
        RuntimeError: devices, or a backend that cannot serve.
    """

    kv_counts: Tensor
    kv_indices: Tensor
    q_counts: Tensor
    q_indices: Tensor
    block_size: tuple[int, int]
    seq_lengths: tuple[int, int]
    key_range: Tensor | None
    window: tuple[int, int]

    def __init__(
        self,
        kv_counts: Tensor,
        kv_indices: Tensor,
        q_counts: Tensor,
        q_indices: Tensor,
        block_size: tuple[int, int],
        seq_lengths: tuple[int, int],
        key_range: Tensor | None = None,
        window: tuple[int, int] = NO_WINDOW,
    ) -> None:
        self.kv_counts, self.kv_indices = kv_counts, kv_indices
        self.q_counts, self.q_indices = q_counts, q_indices
        self.block_size, self.seq_lengths = block_size, seq_lengths
        self.key_range, self.window = key_range, window

    @property
    def lists(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(kv_counts, kv_indices, q_counts, q_indices), as the ops take them."""
        return self.kv_counts, self.kv_indices, self.q_counts, self.q_indices

    @property
    def device(self) -> torch.device:
        return self.kv_counts.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B or 1, H or 1, NQ, NK), in blocks."""
        batch, heads, rows = self.kv_counts.shape
        return batch, heads, rows, self.q_counts.shape[-1]

    def __repr__(self) -> str:
        rule = "" if self.window == NO_WINDOW else f", window={self.window}"
        rule += "" if self.key_range is None else ", key_range"
        return (
            f"BlockMask({list(self.shape)} blocks of {self.block_size[0]} x {self.block_size[1]}, "
            f"seq_lengths={self.seq_lengths}{rule}, device={self.device})"
        )

    @staticmethod
    def from_dense(
        blocks: Tensor,
        seq_lengths: int | tuple[int, int] | None = None,
        block_size: int | tuple[int, int] = 128,
        *,
        key_range: Tensor | None = None,
        backend: str | None = None,
    ) -> BlockMask:
        """Of bool blocks (NQ, NK), (H, NQ, NK) or (B or 1, H or 1, NQ, NK), True where they attend.

        `seq_lengths` default to whole blocks. `key_range`: int32 (B or 1, Sq, 2), the first key that a query may see
        and the one after the last.
        """
        op = "BlockMask.from_dense"
        check_dtype(op, "blocks", blocks, torch.bool)
        if not 2 <= blocks.dim() <= 4:
            fail(op, "blocks", "of shape [NQ, NK], [H, NQ, NK] or [B or 1, H or 1, NQ, NK]", list(blocks.shape))
        blocks = blocks[(None,) * (4 - blocks.dim())]
        size = check_block_size(op, block_size)
        if seq_lengths is None:
            seq_lengths = blocks.shape[2] * size[0], blocks.shape[3] * size[1]
        lengths = check_lengths(op, seq_lengths)
        expected = [*blocks.shape[:2], *patterns.blocks_of(lengths, size)]
        check_shape(op, "blocks", blocks, "[B or 1, H or 1, NQ, NK]", expected)
        if key_range is not None:
            check_key_range(op, key_range, lengths[0])
            check_device(op, "key_range", key_range, blocks.device)
            if 1 not in (key_range.shape[0], blocks.shape[0]):
                check_shape(op, "key_range", key_range, "[B or 1, Sq, 2]", [blocks.shape[0], lengths[0], 2])
        return _of(blocks, lengths, size, key_range, backend=backend)

    @staticmethod
    def from_lists(
        kv_counts: Tensor,
        kv_indices: Tensor,
        seq_lengths: int | tuple[int, int],
        block_size: int | tuple[int, int] = 128,
        *,
        key_range: Tensor | None = None,
        backend: str | None = None,
    ) -> BlockMask:
        """Of int32 counts ([[B,] H,] NQ) and indices of blocks of keys ([[B,] H,] NQ, W), in any order.

        A block that a row lists twice counts once; what lies past a row's count is not read. Counts above W and
        listed indices outside [0, NK) raise ValueError on the CPU; on a GPU, and in torch.compile, they fail an
        assertion when the device sees them.
        """
        op = "BlockMask.from_lists"
        size, lengths = check_block_size(op, block_size), check_lengths(op, seq_lengths)
        rows, columns = patterns.blocks_of(lengths, size)
        check_dtype(op, "kv_counts", kv_counts, torch.int32)
        if not 1 <= kv_counts.dim() <= 3 or kv_counts.shape[-1] != rows:
            fail(op, "kv_counts", f"of shape [..., NQ] = [..., {rows}] and 1 to 3 dimensions", list(kv_counts.shape))
        check_dtype(op, "kv_indices", kv_indices, torch.int32)
        check_device(op, "kv_indices", kv_indices, kv_counts.device)
        if kv_indices.dim() != kv_counts.dim() + 1:
            fail(op, "kv_indices", f"of shape {[*kv_counts.shape, 'W']}", list(kv_indices.shape))
        width = kv_indices.shape[-1]
        check_shape(op, "kv_indices", kv_indices, "[..., NQ, W]", [*kv_counts.shape, width])
        check_values(op, "kv_counts", f"in [0, {width}]", ((kv_counts >= 0) & (kv_counts <= width)).all(), kv_counts)
        listed = torch.arange(width, device=kv_indices.device) < kv_counts[..., None]
        inside = (((kv_indices >= 0) & (kv_indices < columns)) | ~listed).all()
        check_values(op, "kv_indices", f"in [0, {columns}) where they are listed", inside, kv_indices)
        blocks = reference.dense_blocks(kv_counts, kv_indices, columns)
        return BlockMask.from_dense(blocks, lengths, size, key_range=key_range, backend=backend)

    @staticmethod
    def from_key_range(
        key_range: Tensor,
        seq_lengths: int | tuple[int, int],
        block_size: int | tuple[int, int] = 128,
        *,
        backend: str | None = None,
    ) -> BlockMask:
        """Of int32 (B or 1, Sq, 2): the first key that each query sees and the one after its last. Exact.

        The blocks are those with a pair of positions that see each other, and the range goes with them into the
        attention. An empty range (first >= last) sees nothing.
        """
        op = "BlockMask.from_key_range"
        size, lengths = check_block_size(op, block_size), check_lengths(op, seq_lengths)
        check_key_range(op, key_range, lengths[0])
        return _of(patterns.range_blocks(key_range, lengths, size), lengths, size, key_range, backend=backend)

    @staticmethod
    def causal(
        seq_lengths: int | tuple[int, int],
        block_size: int | tuple[int, int] = 128,
        *,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> BlockMask:
        """Of the keys at or before each query's position, counted from the first key as is_causal=True counts. Exact.

        `causal(...).whole()` lets a query see the later keys of its own block.
        """
        size, lengths = check_block_size("BlockMask.causal", block_size), check_lengths("BlockMask.causal", seq_lengths)
        return _of_window(lengths, size, (UNLIMITED, 0), device, backend)

    @staticmethod
    def sliding_window(
        seq_lengths: int | tuple[int, int],
        window: int | tuple[int, int],
        block_size: int | tuple[int, int] = 128,
        *,
        is_causal: bool = False,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> BlockMask:
        """Of the keys near each query's position, as the attention's window= (and is_causal=) counts them. Exact.

        `window`: this many keys on each side of a query's position, or (left, right) of them, -1 without limit.
        """
        op = "BlockMask.sliding_window"
        size, lengths = check_block_size(op, block_size), check_lengths(op, seq_lengths)
        return _of_window(lengths, size, window_of(op, window, is_causal), device, backend)

    @staticmethod
    def global_tokens(
        tokens: int | Tensor,
        seq_lengths: int | tuple[int, int] | None = None,
        block_size: int | tuple[int, int] = 128,
        *,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> BlockMask:
        """The blocks with a global token among their queries or their keys, whole (Longformer).

        `tokens`: how many of the first tokens are global, or bool (S,) or (B, S), True where global, of queries and
        keys of the same length, which `seq_lengths` default to.

        Source: Beltagy et al., "Longformer: The Long-Document Transformer" (2020).
        """
        op = "BlockMask.global_tokens"
        size = check_block_size(op, block_size)
        if isinstance(tokens, Tensor):
            flags = check_tokens(op, "tokens", tokens)
            lengths = check_lengths(op, tokens.shape[-1] if seq_lengths is None else seq_lengths)
            if lengths != (flags.shape[-1], flags.shape[-1]):
                fail(op, "seq_lengths", f"of tokens of shape {list(tokens.shape)}, the same twice", list(lengths))
            rows, columns = (patterns.touched_blocks(flags, each) for each in size)
            return _of((rows[:, :, None] | columns[:, None])[:, None], lengths, size, backend=backend)
        check_integer(op, "tokens", tokens, 0, MOST_TOKENS)
        lengths = check_lengths(op, seq_lengths)
        query, key = patterns.first_tokens(lengths, size, device)
        return _of(((query < tokens) | (key < tokens))[None, None], lengths, size, backend=backend)

    @staticmethod
    def strided(
        seq_lengths: int | tuple[int, int],
        stride: int,
        block_size: int | tuple[int, int] = 128,
        *,
        local: int = 1,
        summary: int = 0,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> BlockMask:
        """The patterns of Sparse Transformers, in blocks of the larger of the two sizes.

        A block of queries i attends to the blocks of keys j with `abs(i - j) < local`, and to those at every
        `stride`-th distance, (i - j) % stride == 0; or, with `summary` c > 0, to the last c of every `stride` blocks
        of keys, j % stride >= stride - c ("fixed"). Whole blocks in both directions: causal models take
        `& BlockMask.causal(...)`.

        Source: Child et al., "Generating Long Sequences with Sparse Transformers" (2019).
        """
        op = "BlockMask.strided"
        size, lengths = check_block_size(op, block_size), check_lengths(op, seq_lengths)
        check_integer(op, "stride", stride, 1, MOST_TOKENS)
        check_integer(op, "local", local, 0, MOST_TOKENS)
        check_integer(op, "summary", summary, 0, stride)
        blocks = patterns.strided_blocks(lengths, size, stride, local, summary, device)
        return _of(blocks, lengths, size, backend=backend)

    @staticmethod
    def document(
        lengths: Sequence[int] | Tensor,
        block_size: int | tuple[int, int] = 128,
        *,
        key_lengths: Sequence[int] | Tensor | None = None,
        seq_lengths: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> BlockMask:
        """Documents packed one after another, each attending to itself alone. Exact: by key_range.

        Args:
            lengths: of the documents in tokens, ints or an integer tensor (N,), or (B, N) where sequences are packed
                each in its own way (length 0: none). Of cu_seqlens: `cu_seqlens.diff()`; of an id a token, (S,):
                `ids.unique_consecutive(return_counts=True)[1]`.
            key_lengths: of the documents' keys, where they are others (cross-attention). Default: `lengths`.
            seq_lengths: the lengths' sums. Default: the sums, which a tensor on a GPU does not tell without waiting
                for it: there, and in torch.compile, they must be given, and an assertion on the device checks them.
            device: of ints, which a GPU is given by a copy that waits; a tensor's own is kept. Default: torch's.
        """
        op = "BlockMask.document"
        size = check_block_size(op, block_size)
        packed = check_documents(op, "lengths", lengths, device)
        keys = packed if key_lengths is None else check_documents(op, "key_lengths", key_lengths, packed.device)
        check_device(op, "key_lengths", keys, packed.device)
        check_shape(op, "key_lengths", keys, "[B or 1, N]", packed.shape)
        for name, each in (("lengths", packed), ("key_lengths", keys)):
            check_values(op, name, "of at least 0", (each >= 0).all(), each)
        sums = packed.sum(-1), keys.sum(-1)
        if seq_lengths is None:
            given = lengths, lengths if key_lengths is None else key_lengths
            if any(isinstance(each, Tensor) and not is_read(each) for each in given):
                fail(op, "seq_lengths", "of lengths that are on a GPU or compiled", None)
            most = [int(each.sum(-1).amax()) if isinstance(each, Tensor) else sum(each) for each in given]
            seq_lengths = most[0], most[1]
        both = check_lengths(op, seq_lengths)
        for name, total, expected in zip(("lengths", "key_lengths"), sums, both, strict=True):
            check_values(op, name, f"that sum to {expected}", (total == expected).all(), total)
        if packed.shape[1] == 0:
            packed = keys = packed.new_zeros(packed.shape[0], 1)
        key_range = patterns.document_ranges(packed, keys, both[0])
        return _of(patterns.range_blocks(key_range, both, size), both, size, key_range, backend=backend)

    @staticmethod
    def key_blocks(
        regions: Tensor,
        seq_lengths: int | tuple[int, int] | None = None,
        block_size: int | tuple[int, int] = 128,
        *,
        backend: str | None = None,
    ) -> BlockMask:
        """Every query attends to the blocks of keys that a region touches.

        `regions`: bool (Sk,) or (B, Sk), True inside; key_mask= hides the other keys of those blocks. `seq_lengths`
        default to as many queries as keys.
        """
        op = "BlockMask.key_blocks"
        size = check_block_size(op, block_size)
        flags = check_tokens(op, "regions", regions)
        lengths = check_lengths(op, regions.shape[-1] if seq_lengths is None else seq_lengths)
        if lengths[1] != flags.shape[-1]:
            fail(op, "seq_lengths", f"of regions of {flags.shape[-1]} keys", list(lengths))
        rows, columns = patterns.blocks_of(lengths, size)
        blocks = patterns.touched_blocks(flags, size[1])[:, None, None].expand(flags.shape[0], 1, rows, columns)
        return _of(blocks, lengths, size, backend=backend)

    @staticmethod
    def from_flex(mask: FlexBlockMask, *, partial: str | None = None, backend: str | None = None) -> BlockMask:
        """Of FlexAttention's, its partial and full blocks.

        What its mask_mod does inside partial blocks does not come along. A mask that has one other than noop_mask is
        refused unless `partial="whole"`: its partial blocks then become whole ones, and `& BlockMask.causal(...)`,
        `& BlockMask.from_key_range(...)` or key_mask= bring the rule back.
        """
        from pyrx import _block_flex  # here, as it loads FlexAttention

        blocks = _block_flex.blocks_of_flex("BlockMask.from_flex", mask, partial)
        lengths, size = tuple(mask.seq_lengths), tuple(mask.BLOCK_SIZE)
        return BlockMask.from_dense(blocks, lengths, size, backend=backend)  # type: ignore[arg-type]

    def to_flex(self) -> FlexBlockMask:
        """FlexAttention's, with a mask_mod that knows blocks, window, key_range and lengths, in eager mode too."""
        from pyrx import _block_flex

        return _block_flex.flex_of_mask(self)

    def plot(self, batch: int = 0, most_heads: int = 16) -> Figure:
        """A matplotlib Figure: a panel a head, dark where blocks are listed. Waits for the GPU."""
        from matplotlib.figure import Figure

        check_integer("BlockMask.plot", "batch", batch, 0, self.shape[0] - 1)
        check_integer("BlockMask.plot", "most_heads", most_heads, 1, MOST_TOKENS)
        heads = self.to_dense()[batch, :most_heads].cpu()
        across = min(4, max(1, len(heads)))
        down = -(-len(heads) // across)
        figure = Figure(figsize=(3 * across, 3 * max(1, down)), layout="constrained")
        for i, blocks in enumerate(heads):
            axes = figure.add_subplot(down, across, i + 1)
            extent = (0, self.shape[3] * self.block_size[1], self.shape[2] * self.block_size[0], 0)
            axes.imshow(
                blocks.numpy(), cmap="Greys", vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest"
            )
            axes.set(title=f"head {i}: {blocks.float().mean():.0%}", xlabel="key", ylabel="query")
        return figure

    def to_dense(self) -> Tensor:
        """bool (B or 1, H or 1, NQ, NK)."""
        return reference.dense_blocks(self.kv_counts, self.kv_indices, self.shape[3])

    def density(self) -> Tensor:
        """The share of blocks that are listed, a float32 scalar on the device; one that a rule cuts counts whole."""
        blocks = self.kv_counts.numel() * self.shape[3]
        return self.kv_counts.sum(dtype=torch.int64).float() / max(blocks, 1)

    def to(self, device: torch.device | str) -> BlockMask:
        """On another device."""
        return pytree.tree_map_only(Tensor, lambda each: each.to(device), self)

    def keep_heads(self, keep: Tensor) -> BlockMask:
        """Of bool (H,) or (B or 1, H): heads that are not kept have no blocks."""
        op = "BlockMask.keep_heads"
        check_dtype(op, "keep", keep, torch.bool)
        check_device(op, "keep", keep, self.device)
        batch, heads, rows, columns = self.shape
        shape = [1, *keep.shape] if keep.dim() == 1 else list(keep.shape)
        if len(shape) != 2 or batch != 1 and not broadcasts(shape[:1], (batch,)) or shape[1] != heads and heads != 1:
            fail(op, "keep", f"of shape [B or 1, H] of a mask of {[batch, heads]}", list(keep.shape))
        keep = keep.reshape(shape)[..., None]
        lead = torch.broadcast_shapes((batch, heads), tuple(shape))

        def listed(counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
            counts = torch.where(keep, counts, 0)
            return counts, indices.expand(*lead, *indices.shape[2:]).contiguous()

        kv, q = listed(self.kv_counts, self.kv_indices), listed(self.q_counts, self.q_indices)
        return BlockMask(*kv, *q, self.block_size, self.seq_lengths, self.key_range, self.window)

    def whole(self) -> BlockMask:
        """Its blocks without a rule of elements: queries see all keys of the blocks listed."""
        return BlockMask(*self.lists, self.block_size, self.seq_lengths)

    def __and__(self, other: BlockMask) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        self._check_like("BlockMask &", other)
        first, second = self.key_range, other.key_range
        both = second if first is None else first
        if first is not None and second is not None:
            first, second = torch.broadcast_tensors(first, second)
            both = torch.stack([torch.maximum(first, second)[..., 0], torch.minimum(first, second)[..., 1]], -1)
        return _of(self.to_dense() & other.to_dense(), *self._geometry, both, meet(self.window, other.window))

    def __or__(self, other: BlockMask) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        op = "BlockMask |"
        self._check_like(op, other)
        self._check_no_range(op)
        other._check_no_range(op)
        if self.window != other.window:
            fail(op, "other", f"of the same window {self.window} ({_OR_WHOLE})", other.window)
        return _of(self.to_dense() | other.to_dense(), *self._geometry, window=self.window)

    def __invert__(self) -> BlockMask:
        op = "BlockMask ~"
        self._check_no_range(op)
        if self.window != NO_WINDOW:
            fail(op, "mask", f"without a window ({_OR_WHOLE})", self.window)
        return _of(~self.to_dense(), *self._geometry)

    @property
    def _geometry(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.seq_lengths, self.block_size

    def _check_like(self, op: str, other: BlockMask) -> None:
        check_device(op, "other", other.kv_counts, self.device)
        for name in ("seq_lengths", "block_size"):
            own, its = tuple(getattr(self, name)), tuple(getattr(other, name))
            if own != its:
                fail(op, "other", f"of {name} {list(own)}", list(its))
        own_range, its_range = (None if each.key_range is None else each.key_range.shape[0] for each in (self, other))
        batches = {self.shape[0], other.shape[0], own_range, its_range} - {1, None}
        heads = {self.shape[1], other.shape[1]} - {1}
        if len(batches) > 1 or len(heads) > 1:
            fail(op, "other", f"of a batch and heads that broadcast to {list(self.shape[:2])}", list(other.shape[:2]))

    def _check_no_range(self, op: str) -> None:
        if self.key_range is not None:
            fail(op, "masks", f"without a key_range ({_OR_WHOLE})", "one that has it")


def _of(
    blocks: Tensor,
    lengths: tuple[int, int],
    size: tuple[int, int],
    key_range: Tensor | None = None,
    window: tuple[int, int] = NO_WINDOW,
    backend: str | None = None,
) -> BlockMask:
    """Of checked bool blocks ([B or 1, H or 1,] NQ, NK)."""
    blocks = blocks[(None,) * (4 - blocks.dim())]
    lists = block_lists(blocks, blocks.shape[3], blocks.shape[2], backend)
    return BlockMask(*lists, size, lengths, key_range, window)


def _of_window(
    lengths: tuple[int, int],
    size: tuple[int, int],
    window: tuple[int, int],
    device: torch.device | str | None,
    backend: str | None,
) -> BlockMask:
    blocks = patterns.window_blocks(lengths, size, *window, device)
    return _of(blocks, lengths, size, window=window, backend=backend)


_TENSORS = ("kv_counts", "kv_indices", "q_counts", "q_indices", "key_range")


def _flatten(mask: BlockMask) -> tuple[list[Any], tuple[Any, ...]]:
    ranges = [] if mask.key_range is None else [mask.key_range]
    return [*mask.lists, *ranges], (mask.block_size, mask.seq_lengths, mask.window)


def _flatten_with_keys(mask: BlockMask) -> tuple[list[Any], tuple[Any, ...]]:
    tensors, context = _flatten(mask)
    return [(pytree.GetAttrKey(name), each) for name, each in zip(_TENSORS, tensors, strict=False)], context


def _unflatten(tensors: Iterable[Any], context: tuple[Any, ...]) -> BlockMask:
    # no checks: trees hold anything in a tensor's place
    kv_counts, kv_indices, q_counts, q_indices, *ranges = tensors
    block_size, seq_lengths, window = context
    key_range = ranges[0] if ranges else None
    return BlockMask(kv_counts, kv_indices, q_counts, q_indices, block_size, seq_lengths, key_range, window)


pytree.register_pytree_node(
    BlockMask,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="pyrx.BlockMask",
    to_dumpable_context=list,
    from_dumpable_context=lambda context: tuple(map(tuple, context)),
)
torch.serialization.add_safe_globals([BlockMask])
