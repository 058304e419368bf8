"""Edits of attention on the kernels of block-sparse attention: its transpose, what queries see, what heads and tokens
take part."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from pyrx import _library
from pyrx._attention import MOST_HEAD_SIZE, check_logits
from pyrx._block_checks import check_lists, fail_mask_type
from pyrx._checks import (
    accumulation_dtype,
    check_device,
    check_dtype,
    check_float,
    check_integer,
    check_number,
    check_shape,
    check_tensor,
    fail,
)
from pyrx._linear import autocast, is_autocast, without_autocast
from pyrx._random import LEVELS, seed_tensor, threshold
from pyrx.ops.block_mask import BlockMask
from pyrx.ops.block_sparse_attention import NEEDS, _like, block_sparse_attention, default_mask, prepare
from pyrx.ops.dropout import dropout_mask
from pyrx.reference import attention_edits as reference

# which of a seed's masks drops heads: weights take sample 0
HEAD_SAMPLE = 1
_UNIT = 1 / 16  # of attention that a token receives
_NO_DROPOUT = (None, 0)


class _Reversed(torch.autograd.Function):
    """A^T u by the ops of attention: the gradient of the values for an upstream u. Arguments: backend, u, query, key,
    lists, block sizes, logits."""

    @staticmethod
    def forward(ctx: Any, chosen: str, u: Tensor, query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        ops = _library.namespace(chosen)
        _, lse, none = ops.block_sparse_attention(query, key, key[..., :1], *rest, *_NO_DROPOUT, False)
        value = _like(key, u.shape[3])  # of which only the shape and the layout are read
        needs = [name == "value" for name in NEEDS]
        found = ops.block_sparse_attention_backward(
            u, None, None, u, lse, none, query, key, value, *rest, *_NO_DROPOUT, needs
        )
        args = (u, query, key, *rest)
        ctx.chosen = chosen
        ctx.kept = [None if isinstance(each, Tensor) else each for each in args]
        ctx.places = [i for i, each in enumerate(args) if isinstance(each, Tensor)]
        ctx.save_for_backward(lse, *(args[i] for i in ctx.places))
        return found[NEEDS.index("value")]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lse, *tensors = ctx.saved_tensors
        args = list(ctx.kept)
        for i, tensor in zip(ctx.places, tensors, strict=True):
            args[i] = tensor
        u, query, key, *rest = args
        ops = _library.namespace(ctx.chosen)
        with torch.no_grad():
            out, _, none = ops.block_sparse_attention(query, key, grad, *rest, *_NO_DROPOUT, False)
            # backend, u, query, key, 4 lists, 2 block sizes, left, right, key_range, key_mask, query_scale and 2 biases
            needed = dict(zip(NEEDS, (*ctx.needs_input_grad[2:4], False, *ctx.needs_input_grad[14:17]), strict=True))
            found: list[Tensor | None] = [None] * len(NEEDS)
            if any(needed.values()):
                made = ops.block_sparse_attention_backward(
                    u, None, None, out, lse, none, query, key, grad, *rest, *_NO_DROPOUT, list(needed.values())
                )
                found = [each if need else None for each, need in zip(made, needed.values(), strict=True)]
        gradients = [out if ctx.needs_input_grad[1] else None, *found[:2], *found[3:]]
        once = iter(
            _library.differentiable_once("reversed_attention", [each for each in gradients if each is not None])
        )
        gradients = [None if each is None else next(once) for each in gradients]
        return None, *gradients[:3], *(None,) * 10, *gradients[3:], *(None,) * 2


def reversed_attention(
    query: Tensor,
    key: Tensor,
    u: Tensor,
    block_mask: BlockMask | None = None,
    *,
    is_causal: bool = False,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    enable_gqa: bool = False,
    key_mask: Tensor | None = None,
    query_scale: Tensor | None = None,
    bias: Tensor | tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """What every key receives: the transpose of the attention times u, A^T u, A = softmax of the logits over the keys.

    Args:
        query: (B, H, Sq, D); key: (B, Hkv, Sk, D), as for `pyrx.block_sparse_attention`.
        u: (B, H, Sq, Du) of the query's dtype, Du from 1 to 256: what each query hands on.
        block_mask, is_causal, window, scale, softcap, enable_gqa, key_mask, query_scale, bias, backend: as for
            `pyrx.block_sparse_attention`.

    Returns:
        (B, Hkv, Sk, Du) of the query's dtype; with grouped queries the sum over the query heads of a key head. A key
        that no query sees gives 0.

    Differentiable in query, key, u, query_scale and bias; once. Deterministic.

    Equivalent to `torch.softmax(scale * query @ key.transpose(-1, -2), -1).transpose(-1, -2) @ u` over the listed
    blocks, without the (Sq, Sk) matrix.

    Cost: forward, the log-sum-exp (2 D operations a listed pair of positions and head) and the pass of attention's
    backward that makes the values' gradient (2 D + 2 Du); backward, as attention's forward and backward.

    Raises: as `pyrx.block_sparse_attention`; ValueError for a u of another shape.

    Source: the pass of Dao, "FlashAttention-2" (2023), that makes the values' gradient; here a forward, with a gradient
    of its own.
    """
    op = "reversed_attention"
    call = prepare(
        op,
        query,
        key,
        u,
        block_mask,
        third="u",
        is_causal=is_causal,
        window=window,
        scale=scale,
        softcap=softcap,
        enable_gqa=enable_gqa,
        key_mask=key_mask,
        query_scale=query_scale,
        bias=bias,
        backend=backend,
    )
    query, key, u, mask, logits, chosen = call
    check_logits(op, query, key, logits)
    check_lists(op, mask.lists, *mask.block_size, query, key)
    check_dtype(op, "u", u, query.dtype)
    if u.dim() != 4 or u.shape[:3] != query.shape[:3]:
        fail(op, "u", f"of shape [B, H, Sq, Du] = {[*query.shape[:3], 'Du']}", list(u.shape))
    check_device(op, "u", u, query.device)
    if not 1 <= u.shape[3] <= MOST_HEAD_SIZE:
        fail(op, "u", f"of a last dimension in [1, {MOST_HEAD_SIZE}]", u.shape[3])
    args = (query, key, *mask.lists, *mask.block_size, *logits)
    if chosen == "reference":
        with without_autocast(query.device.type):  # its products are in the accumulation dtype
            return reference.reversed_attention(u, *args)
    return _Reversed.apply(chosen, u, *args)


def _run(op: str, name: str, run: object, tokens: int) -> tuple[int, int]:
    """(start, stop) of a run of tokens."""
    if not isinstance(run, (tuple, list)) or len(run) != 2:
        fail(op, name, "to be a pair (start, stop)", repr(run), TypeError)
    for each in run:
        check_integer(op, name, each, 0, tokens)
    start, stop = run
    if start > stop:
        fail(op, name, "with start <= stop", [start, stop])
    return start, stop


def perturbed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    image: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    enable_gqa: bool = False,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The perturbed branch of perturbed-attention guidance: image tokens attend to no other image token.

    Args:
        query: (B, H, S, D); key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv): self-attention, as for
            `pyrx.block_sparse_attention`.
        image: (start, stop) of the image's tokens in a joint sequence of text and image. An image token then sees the
            text and itself, a text token everything. Default: all tokens are the image's: the result is `value`.
        scale, softcap, enable_gqa, key_mask, backend: as for `pyrx.block_sparse_attention`; without `image` they change
            nothing.

    Returns:
        (B, H, S, Dv) of the query's dtype; without `image` the value itself, not a copy.

    Differentiable in query, key and value; once. Exact: the image tokens attend to the text alone, and their own key
    enters through its share of the softmax, sigmoid(own logit - log-sum-exp).

    Equivalent to `F.scaled_dot_product_attention(query, key, value, attn_mask)`, attn_mask False between image tokens
    but on the diagonal. Guidance itself is `prediction + s * (prediction - perturbed prediction)`.

    Cost: attention of the text's queries to S keys, and of the image's to the text's keys: for T text tokens of S about
    2 T / S of the whole; keys and values of text on both sides of the image are copied.

    Raises: as `pyrx.block_sparse_attention`; ValueError for keys of another length, or an image outside of them.

    Source: Ahn et al., "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance" (2024); for joint
    sequences the PAG processors of diffusers.
    """
    op = "perturbed_attention"
    options = {"scale": scale, "softcap": softcap, "enable_gqa": enable_gqa, "backend": backend}
    call = prepare(op, query, key, value, key_mask=key_mask, **options)  # type: ignore[arg-type]
    query, key, value = call.query, call.key, call.value
    check_logits(op, query, key, call.logits)
    check_float(op, "value", value)
    check_dtype(op, "value", value, query.dtype)
    if value.dim() != 4:
        fail(op, "value", "of shape [B, H, S, D]", list(value.shape))
    check_shape(op, "value", value, "[B, Hkv, S, Dv]", [*key.shape[:3], value.shape[3]])
    check_device(op, "value", value, query.device)
    _check_self(op, query, key)
    tokens, heads = query.shape[2], query.shape[1]
    if image is None:
        return value if value.shape[1] == heads else value.repeat_interleave(heads // value.shape[1], dim=1)
    start, stop = _run(op, "image", image, tokens)

    def outside(x: Tensor) -> Tensor:
        """The text's part along dimension 2."""
        if start == 0 or stop == tokens:
            return x[:, :, stop:] if start == 0 else x[:, :, :start]
        return torch.cat([x[:, :, :start], x[:, :, stop:]], dim=2)

    def hidden_from(x: Tensor | None) -> Tensor | None:
        return None if x is None else outside(x[:, None, :, None])[:, 0, :, 0]

    text = block_sparse_attention(outside(query), key, value, key_mask=key_mask, **options)  # type: ignore[arg-type]
    queries = query[:, :, start:stop]
    out, lse = block_sparse_attention(
        queries,
        outside(key),
        outside(value),
        key_mask=hidden_from(key_mask),
        return_lse=True,
        **options,  # type: ignore[arg-type]
    )
    own = key_mask[:, start:stop] if key_mask is not None else None
    merged = reference.with_own_key(
        out, lse, queries, key[:, :, start:stop], value[:, :, start:stop], own, call.logits.scale, call.logits.softcap
    )
    text = cast(Tensor, text)
    return torch.cat([text[:, :, :start], merged, text[:, :, start:]], dim=2)


def _check_self(op: str, query: Tensor, key: Tensor) -> None:
    if key.shape[0] != query.shape[0]:
        fail(op, "key", f"of the query's batch size {query.shape[0]}", key.shape[0])
    if key.shape[2] != query.shape[2]:
        fail(op, "key", f"of the query's length {query.shape[2]}: self-attention", key.shape[2])


def _region(op: str, region: Tensor, key: Tensor) -> Tensor:
    """bool (B, Sk) of a region (Sk,) or (B, Sk) of keys."""
    check_dtype(op, "region", region, torch.bool)
    batch, keys = key.shape[0], key.shape[2]
    shape = list(region.shape)
    if shape != [keys] and shape != [batch, keys]:
        fail(op, "region", f"of shape [Sk] or [B, Sk] = [{batch}, {keys}]", shape)
    check_device(op, "region", region, key.device)
    return region.expand(batch, keys)


def _check_four(op: str, **tensors: Tensor) -> None:
    for name, each in tensors.items():
        check_float(op, name, each)
        if each.dim() != 4:
            fail(op, name, "of shape [B, H, S, D]", list(each.shape))


def erasing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region: Tensor,
    block_mask: BlockMask | None = None,
    *,
    query_factor: float = 1.0,
    key_mask: Tensor | None = None,
    query_scale: Tensor | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Self-attention that erases an object: no query sees its region, whose own queries look around less sharply.

    Args:
        query, key, value, block_mask: as for `pyrx.block_sparse_attention`, of one length S.
        region: bool (B, S) or (S,), True at the tokens of what is erased.
        query_factor: what the logits of the region's queries are multiplied with: below 1 their attention spreads over
            the background ("similarity suppression"). Default 1.0.
        key_mask, query_scale: as there; the region and the factor come on top.
        **options: the other arguments of `pyrx.block_sparse_attention`, its extra results among them.

    Returns: as `pyrx.block_sparse_attention`. Where the region is everything: 0.

    Equivalent to `pyrx.block_sparse_attention(query, key, value, key_mask=~region, query_scale=torch.where(region,
    query_factor, 1))`; to the paper's two attentions, over softmax(S) and softmax(query_factor S), of which each query
    takes one.

    Cost: one attention.

    Raises: as `pyrx.block_sparse_attention`.

    Source: Sun et al., "Attentive Eraser: Unleashing Diffusion Model's Object Removal Potential via Self-Attention
    Redirection Guidance" (AAAI 2025).
    """
    op = "erasing_attention"
    _check_four(op, query=query, key=key)
    _check_self(op, query, key)
    region = _region(op, region, key)
    check_number(op, "query_factor", query_factor)
    if key_mask is not None:
        check_dtype(op, "key_mask", key_mask, torch.bool)
        check_shape(op, "key_mask", key_mask, "[B, Sk]", region.shape)
    visible = ~region if key_mask is None else key_mask & ~region
    if query_factor != 1:
        one = torch.ones((), dtype=accumulation_dtype(query.dtype), device=query.device)
        factor = torch.where(region, one * query_factor, one)[:, None].expand(query.shape[:3])
        if query_scale is not None:
            check_float(op, "query_scale", query_scale)
            check_shape(op, "query_scale", query_scale, "[B, H, Sq]", query.shape[:3])
            factor = factor * query_scale
        query_scale = factor
    return block_sparse_attention(query, key, value, block_mask, key_mask=visible, query_scale=query_scale, **options)


def key_zeroed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region: Tensor,
    block_mask: BlockMask | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Attention in which a region's keys are 0: their logits are 0, not minus infinity; their values still count.

    Args:
        query, key, value, block_mask: as for `pyrx.block_sparse_attention`.
        region: bool (B, Sk) or (Sk,), True at the keys to zero.
        **options: the other arguments of `pyrx.block_sparse_attention`, its extra results among them.

    Returns: as `pyrx.block_sparse_attention`; no gradient reaches the region's keys.

    Equivalent to `pyrx.block_sparse_attention(query, torch.where(region[..., None], 0, key), value)`.

    Cost: one attention, and a read and a write of the keys.

    Raises: as `pyrx.block_sparse_attention`.

    Source: Jia et al., "DesignEdit: Multi-Layered Latent Decomposition and Fusion for Unified & Accurate Image Editing"
    (2024), key masking self-attention, which masks the input of the projection to keys.
    """
    op = "key_zeroed_attention"
    _check_four(op, query=query, key=key)
    region = _region(op, region, key)
    zero = torch.zeros((), dtype=key.dtype, device=key.device)
    return block_sparse_attention(query, torch.where(region[:, None, :, None], zero, key), value, block_mask, **options)


def head_dropout_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask | None = None,
    *,
    head_dropout_p: float,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Attention that drops whole heads of samples, DropHead: those cost nothing and give 0, the others are scaled.

    Args:
        query, key, value, block_mask: as for `pyrx.block_sparse_attention`.
        head_dropout_p: probability of dropping a head of a sample, in [0, 1), on a grid of 1/65536. As functional as
            dropout_p: pass 0 in evaluation.
        seed, generator: of the heads and of dropout_p: int, or int64 tensor of one element on the device; by default
            drawn there from `generator`.
        backend: "reference", "cpu" or "triton". Default: the fastest that can serve.
        **options: the other arguments of `pyrx.block_sparse_attention`, its extra results among them: a dropped head's
            log-sum-exp is minus infinity, its entropy 0.

    Returns: as `pyrx.block_sparse_attention`, a sample's kept heads times H / (number of kept heads); all dropped: 0.

    The heads that stay are `pyrx.dropout_mask((B, H), head_dropout_p, seed, sample=1)`.

    Equivalent to `out * keep * H / keep.sum(1)`, over the (B, H) heads.

    Cost: the attention of the heads that stay, and a pass over the result; lists of a mask that is shared over samples
    or heads are written once for each (b, h).

    Raises: as `pyrx.block_sparse_attention`.

    Source: Zhou et al., "Scheduled DropHead: A Regularization Method for Transformer Models" (EMNLP Findings 2020).
    """
    op = "head_dropout_attention"
    level = threshold(op, head_dropout_p, "head_dropout_p")
    _check_four(op, query=query, key=key)
    if level == 0:
        return block_sparse_attention(
            query, key, value, block_mask, seed=seed, generator=generator, backend=backend, **options
        )
    batch, heads = query.shape[:2]
    seed = seed_tensor(op, seed, generator, query.device)
    if block_mask is None:
        block_mask = default_mask(op, query, key, options.get("is_causal", False), options.get("window"))
    elif not isinstance(block_mask, BlockMask):
        fail_mask_type(op, "block_mask", block_mask)
    keep = dropout_mask((batch, heads), level / LEVELS, seed, HEAD_SAMPLE)
    found = block_sparse_attention(
        query, key, value, block_mask.keep_heads(keep), seed=seed, backend=backend, **options
    )
    kept = keep.sum(1, keepdim=True)
    factor = torch.where(kept > 0, heads / kept.clamp(min=1), 0)[..., None, None]
    if isinstance(found, tuple):
        return (found[0] * factor.to(accumulation_dtype(found[0].dtype))).to(found[0].dtype), *found[1:]
    return (found * factor.to(accumulation_dtype(found.dtype))).to(found.dtype)


def token_importance(
    query: Tensor,
    key: Tensor,
    block_mask: BlockMask | None = None,
    *,
    keyframe: tuple[int, int] | None = None,
    enhanced_weight: float = 1.0,
    **options: Any,
) -> Tensor:
    """How much attention each token receives, averaged over the queries and heads.

    Args:
        query: (B, H, Sq, D); key: (B, Hkv, Sk, D); block_mask: as for `pyrx.reversed_attention`.
        keyframe: (start, stop) of the keyframe's queries. Default: none.
        enhanced_weight: what the attention of the keyframe's queries counts, in place of 1. Default 1.0. For them alone
            pass `query[:, :, start:stop]`.
        **options: the other arguments of `pyrx.reversed_attention`.

    Returns:
        (B, Sk) float32 (float64 for float64). With enhanced_weight 1 they sum to 1, where every query sees a key.

    Differentiable as `pyrx.reversed_attention`; for a choice of tokens, `pyrx.token_dropout`, it needs none: detach.

    Equivalent to `attention.mean((1, 2))` of the weights (B, H, Sq, Sk), the keyframe's rows times enhanced_weight.

    Cost: of `pyrx.reversed_attention` with one number a query.

    Raises: as `pyrx.reversed_attention`; ValueError for a keyframe outside of the queries.

    Source: Chen et al., "Efficient Video Action Detection with Token Dropout and Context Refinement" (EVAD, ICCV 2023).
    """
    op = "token_importance"
    _check_four(op, query=query, key=key)
    check_number(op, "enhanced_weight", enhanced_weight)
    batch, heads, queries, _ = query.shape
    start, stop = (0, 0) if keyframe is None else _run(op, "keyframe", keyframe, queries)
    if is_autocast(query.device.type):
        query, key = cast(list[Tensor], autocast((query, key), query.device.type))
    most = torch.finfo(query.dtype).max / _UNIT
    if most < abs(enhanced_weight) < math.inf:
        fail(op, "enhanced_weight", f"in [-{most:g}, {most:g}] for {query.dtype}", enhanced_weight)
    # 1 / (Sq H) and its sums would not fit 16 bits: a weight between, and the rest afterwards
    weight = query.new_full((queries,), _UNIT)
    weight[start:stop] = _UNIT * enhanced_weight
    u = weight[:, None].expand(batch, heads, queries, 1)
    received = reversed_attention(query, key, u, block_mask, **options)
    total = received.squeeze(3).sum(1, dtype=accumulation_dtype(received.dtype))
    return total / (_UNIT * max(queries * heads, 1))


def token_dropout(
    x: Tensor,
    importance: Tensor,
    keep_rate: float,
    *,
    keyframe: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Keeps a keyframe's tokens and the most important others, in their order.

    Args:
        x: (B, N, C) tokens, any dtype that torch gathers: no float of 8 bits, no uint16 to uint64.
        importance: (B, N) floats, as `pyrx.token_importance` gives.
        keep_rate: the share of all N tokens that stays, the keyframe's among them, in (0, 1].
        keyframe: (start, stop) of the tokens that always stay. Default: none.

    Returns:
        (kept, indices): (B, K, C), and int64 (B, K) ascending, K = ceil(keep_rate N) or the keyframe's tokens where
        they are more: it does not depend on the values, so that nothing syncs or compiles anew. Of equally important
        tokens the first stay; NaN ranks first. `indices` takes further tokens, such as positions, along; a later
        dropout's are indices into these.

    Differentiable in x: what was dropped gets 0.

    Equivalent to `torch.take_along_dim(x, indices[..., None], 1)`, indices of `torch.topk`, sorted.

    Cost: two sorts of N numbers a sample and a copy of what stays.

    Raises: ValueError: shapes, keep_rate out of range, a keyframe outside of the tokens. TypeError: an importance of no
    floating-point dtype, an x that torch does not gather. RuntimeError: devices.

    Source: Chen et al., "Efficient Video Action Detection with Token Dropout and Context Refinement" (EVAD, ICCV 2023):
    keyframe-centric token pruning.
    """
    op = "token_dropout"
    check_float(op, "importance", importance)
    check_tensor(op, "x", x)
    few = x.is_floating_point() and x.element_size() == 1
    if few or x.dtype in (torch.uint16, torch.uint32, torch.uint64):
        fail(op, "x", "of a dtype that torch gathers", x.dtype, TypeError)
    if x.dim() != 3:
        fail(op, "x", "of shape [B, N, C]", list(x.shape))
    check_shape(op, "importance", importance, "[B, N]", x.shape[:2])
    check_device(op, "importance", importance, x.device)
    check_number(op, "keep_rate", keep_rate)
    if not 0 < keep_rate <= 1:
        fail(op, "keep_rate", "in (0, 1]", keep_rate)
    run = (0, 0) if keyframe is None else _run(op, "keyframe", keyframe, x.shape[1])
    indices = reference.kept_tokens(importance.detach(), float(keep_rate), run)
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[2])), indices
