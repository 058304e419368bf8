"""Multi-head attention over listed blocks, and a model's own calls of scaled_dot_product_attention served by it."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pyrx._attention import window_of
from pyrx._block_checks import fail_mask_type
from pyrx._checks import broadcasts, check_device, check_integer, check_tensor, fail
from pyrx._random import threshold
from pyrx.ops.attention_edits import head_dropout_attention
from pyrx.ops.block_mask import BlockMask
from pyrx.ops.block_sparse_attention import block_sparse_attention

NAME = "BlockSparseAttention"


class BlockSparseAttention(nn.Module):
    """Multi-head self- or cross-attention over the blocks that a mask lists.

    Args:
        embed_dim: C, of the queries and the result.
        num_heads: H; the size of a head is embed_dim / num_heads.
        block_mask: the `pyrx.BlockMask` of calls that give none. Default: every block.
        dropout: probability of dropping an attention weight in training, in [0, 1). Default 0.
        bias: of the projections of query, key and value, and of the result. Default True.
        num_kv_heads: heads of keys and values, which divide H: grouped queries. Default H.
        is_causal, window, scale, softcap: as of `pyrx.block_sparse_attention`.
        head_dropout: probability of dropping a head of a sample in training (DropHead), in [0, 1). Default 0.
        batch_first: tokens are (B, S, C); False: (S, B, C). Default True.
        backend: as of `pyrx.block_sparse_attention`.
        device, dtype: of the parameters.

    Shapes: query (B, Sq, C), key and value (B, Sk, C), default the query; the result (B, Sq, C). In eval nothing is
    dropped.

    Attributes:
        qkv: Linear of C to H + 2 Hkv heads; proj: Linear of H heads to C. With these names the state dict is that of
            timm's Attention. The mask is not in it; it moves with the module.

    Equivalent to `timm.layers.Attention` with `attn_mask` the pairs of (Sq, Sk) that the mask lets see each other.

    Cost: that of `pyrx.block_sparse_attention` and of the two linear layers.

    Raises: as `pyrx.block_sparse_attention`; ValueError for an embed_dim that the heads do not divide.
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_mask: BlockMask | None
    dropout: float
    head_dropout: float
    batch_first: bool
    backend: str | None
    is_causal: bool
    window: int | tuple[int, int] | None
    scale: float | None
    softcap: float | None
    qkv: nn.Linear
    proj: nn.Linear

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        block_mask: BlockMask | None = None,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        window: int | tuple[int, int] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        head_dropout: float = 0.0,
        batch_first: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer(NAME, "num_heads", num_heads, 1, 2**31 - 1)
        check_integer(NAME, "embed_dim", embed_dim, 1, 2**31 - 1)
        if embed_dim % num_heads != 0:
            fail(NAME, "embed_dim", f"to be a multiple of the {num_heads} heads", embed_dim)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_integer(NAME, "num_kv_heads", kv_heads, 1, num_heads)
        if num_heads % kv_heads != 0:
            fail(NAME, "num_kv_heads", f"to divide the {num_heads} heads", kv_heads)
        if block_mask is not None and not isinstance(block_mask, BlockMask):
            fail_mask_type(NAME, "block_mask", block_mask)
        window_of(NAME, window, is_causal)
        threshold(NAME, dropout, "dropout")
        threshold(NAME, head_dropout, "head_dropout")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, kv_heads
        self.head_dim = embed_dim // num_heads
        self.block_mask = block_mask
        self.dropout, self.head_dropout, self.batch_first, self.backend = dropout, head_dropout, batch_first, backend
        self.is_causal, self.window, self.scale, self.softcap = is_causal, window, scale, softcap
        heads = num_heads + 2 * kv_heads
        self.qkv = nn.Linear(embed_dim, heads * self.head_dim, bias, device, dtype)
        self.proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> BlockSparseAttention:
        if self.block_mask is not None:
            self.block_mask = pytree.tree_map_only(Tensor, fn, self.block_mask)
        return super()._apply(fn, recurse)

    def _project(self, x: Tensor, first: int, last: int) -> Tensor:
        """(B, S, heads, D) of the projection's heads from `first` to `last`."""
        rows = slice(first * self.head_dim, last * self.head_dim)
        bias = None if self.qkv.bias is None else self.qkv.bias[rows]
        return F.linear(x, self.qkv.weight[rows], bias).unflatten(-1, (last - first, self.head_dim))

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        block_mask: BlockMask | None = None,
        *,
        key_mask: Tensor | None = None,
        attn_bias: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`value` defaults to `key`, `key` to `query`; block_mask to the module's. key_mask bool (B, Sk) is True where
        a key takes part (the reverse of MultiheadAttention's key_padding_mask), attn_bias as `bias` of
        `pyrx.block_sparse_attention`."""
        for name, each in (("query", query), ("key", key), ("value", value)):
            if each is not None:
                check_tensor(NAME, name, each)
                if each.dim() != 3 or each.shape[2] != self.embed_dim:
                    names = "[B, S, C]" if self.batch_first else "[S, B, C]"
                    fail(NAME, name, f"of shape {names} with C = {self.embed_dim}", list(each.shape))
        heads, kv_heads = self.num_heads, self.num_kv_heads
        own = key is None or key is query
        if own and (value is None or value is query):
            q, k, v = self._project(query, 0, heads + 2 * kv_heads).split([heads, kv_heads, kv_heads], dim=2)
        else:
            key = query if key is None else key
            q = self._project(query, 0, heads)
            if value is None or value is key:
                k, v = self._project(key, heads, heads + 2 * kv_heads).chunk(2, dim=2)
            else:
                k = self._project(key, heads, heads + kv_heads)
                v = self._project(value, heads + kv_heads, heads + 2 * kv_heads)
        order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)
        out = head_dropout_attention(
            q.permute(order),
            k.permute(order),
            v.permute(order),
            self.block_mask if block_mask is None else block_mask,
            head_dropout_p=self.head_dropout if self.training else 0.0,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.is_causal,
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            enable_gqa=True,
            key_mask=key_mask,
            bias=attn_bias,
            backend=self.backend,
        )
        back = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
        return self.proj(cast(Tensor, out).permute(back).flatten(2))

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"dropout={self.dropout}, is_causal={self.is_causal}, window={self.window}"
        )


def _mask_or_bias(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(key_mask, bias) of an attn_mask of scaled_dot_product_attention."""
    if attn_mask is None:
        return None, None
    op = "replace_attention"
    check_tensor(op, "attn_mask", attn_mask)
    check_device(op, "attn_mask", attn_mask, query.device)
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    shape = [1] * (4 - attn_mask.dim()) + list(attn_mask.shape)
    full = [batch, heads, queries, keys]
    if not broadcasts(shape, full):
        fail(op, "attn_mask", f"of a shape that broadcasts to {full}", list(attn_mask.shape))
    mask = attn_mask.reshape(shape)
    if attn_mask.dtype == torch.bool:
        # one for all heads and queries
        if all(mask.shape[i] == 1 or (mask.shape[i] > 1 and mask.stride(i) == 0) for i in (1, 2)):
            return mask[:, 0, 0].expand(batch, keys), None
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
    elif not attn_mask.is_floating_point():
        fail(op, "attn_mask", "of bool or a floating-point dtype", attn_mask.dtype, TypeError)
    return None, mask.to(query.dtype).expand(-1, -1, queries, keys)


def _body(function: Any) -> Any:
    """The function without its question whether a mode overrides it: only what it calls is asked."""
    answers = dict.fromkeys(("has_torch_function", "has_torch_function_unary"), lambda *_: False)
    scope = {name: value for name, value in function.__globals__.items() if name != "__name__"} | answers
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# Python functions that a mode overrides as a whole, with attention inside: MultiheadAttention's, and a backward of what
# is checkpointed
_BODIES = {
    each: _body(each)
    for each in (F.multi_head_attention_forward, torch.autograd.grad, torch.autograd.backward, Tensor.backward)
}


class replace_attention(TorchFunctionMode):  # a context manager, as torch.no_grad
    """A context in which a model's calls of F.scaled_dot_product_attention are `pyrx.block_sparse_attention`.

    `with pyrx.nn.replace_attention(mask): model(x)`

    Args:
        block_mask: the `pyrx.BlockMask` of every call; or a function (query, key) -> BlockMask or None that gives each
            call its own, as the functions of `pyrx.search` do. Default: every block.
        only: function (query, key) -> bool that chooses the calls to serve; the others stay as they are. It may look at
            shapes and dtypes, to leave a model's cross-attention dense: `lambda query, key: query.shape == key.shape`.
            Default: all.
        window, softcap, generator, backend: as of `pyrx.block_sparse_attention`.

    A call's query, key, value, dropout_p, is_causal, scale and enable_gqa are served as they are. Of its attn_mask,
    bool (B or 1, 1, 1, Sk), expanded over heads and queries or not, becomes key_mask; any other becomes bias, and costs
    a read of (B or 1, H or 1, Sq, Sk): leave it out of the model's call where `block_mask` tells the same. A call that
    was chosen and cannot be served, such as one whose lengths are not the mask's, raises: it is never dense by itself.
    A query that sees no key gives 0.

    What is no call of scaled_dot_product_attention stays as it is: a model's own softmax (timm's attention with
    `fused_attn` off), MultiheadAttention with need_weights=True. With activation checkpointing the backward belongs
    inside the context too: it calls attention again.

    The context is its thread's own, but for the switch of MultiheadAttention's fast path in evaluation, which torch has
    once a process: other threads go without that path while it is off.

    Under torch.compile: entered around the call of a compiled model, or inside what is compiled; the model compiles
    anew when the context changes. There are no graph breaks but in nn.MultiheadAttention, whose function
    torch.compile does not trace under a mode.

    Raises: as `pyrx.block_sparse_attention`; ValueError for an attn_mask that does not broadcast.
    """

    block_mask: BlockMask | Callable[[Tensor, Tensor], BlockMask | None] | None
    only: Callable[[Tensor, Tensor], bool] | None
    window: int | tuple[int, int] | None
    softcap: float | None
    generator: torch.Generator | None
    backend: str | None

    def __init__(
        self,
        block_mask: BlockMask | Callable[[Tensor, Tensor], BlockMask | None] | None = None,
        *,
        only: Callable[[Tensor, Tensor], bool] | None = None,
        window: int | tuple[int, int] | None = None,
        softcap: float | None = None,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        op = "replace_attention"
        if block_mask is not None and not isinstance(block_mask, BlockMask) and not callable(block_mask):
            fail_mask_type(op, "block_mask", block_mask, "to be a pyrx.BlockMask or callable")
        if only is not None and not callable(only):
            fail(op, "only", "to be callable", type(only).__name__, TypeError)
        window_of(op, window, False)
        self.block_mask, self.only = block_mask, only
        self.window, self.softcap, self.generator, self.backend = window, softcap, generator, backend
        self._fast: list[bool] = []

    def __enter__(self) -> replace_attention:
        # MultiheadAttention's fast path in evaluation has an attention of its own; torch.compile takes it under modes
        self._fast.append(torch.backends.mha._is_fastpath_enabled)
        torch.backends.mha._is_fastpath_enabled = False
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.backends.mha._is_fastpath_enabled = self._fast.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._serve(*args, **kwargs)
        if func in _BODIES:
            with self:
                return _BODIES[func](*args, **kwargs)
        return func(*args, **kwargs)

    def _serve(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if self.only is not None and not self.only(query, key):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        for name, each in (("query", query), ("key", key)):
            if each.dim() != 4:
                fail("replace_attention", name, "of shape [B, H, S, D]", list(each.shape))
        key_mask, bias = _mask_or_bias(attn_mask, query, key)
        mask = self.block_mask
        if mask is not None and not isinstance(mask, BlockMask):
            mask = mask(query, key)
        return block_sparse_attention(  # type: ignore[return-value]
            query,
            key,
            value,
            mask,
            is_causal=is_causal,
            window=self.window,
            dropout_p=dropout_p,
            scale=scale,
            softcap=self.softcap,
            enable_gqa=enable_gqa,
            key_mask=key_mask,
            bias=bias,
            generator=self.generator,
            backend=self.backend,
        )
