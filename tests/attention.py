"""What tests of attention over blocks share: random calls of every kind, the formula in dense steps, error budgets."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from helpers import FLOATS, SLACK, assert_within_budget, expected_mask, need, scale_of, threshold_of
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyrx
from pyrx._checks import accumulation_dtype

ROW = "block_sparse_attention"
NAMES = ("query", "key", "value", "query_scale", "row_bias", "column_bias")
RESULTS = ("out", "lse", "entropy")


def block_mask(blocks, block_size, lengths, *, key_range=None, order="any", extra=3, width=None, seed=0):
    """A BlockMask of bool blocks (B or 1, H or 1, NQ, NK), its lists made here, in `order` "any" or "ascending".

    The lists are `extra` entries wider than the longest row, and what lies past a row's count is junk.
    """
    generator = torch.Generator().manual_seed(seed)

    def lists(dense):
        counts = dense.sum(-1, dtype=torch.int32)
        wide = (int(counts.max()) if counts.numel() else 0) + extra if width is None else width
        indices = torch.randint(-(2**31), 2**31 - 1, (*dense.shape[:3], wide), generator=generator).to(torch.int32)
        for at in torch.cartesian_prod(*(torch.arange(size) for size in dense.shape[:3])).tolist():
            row = dense[tuple(at)].nonzero().squeeze(1).int()
            row = row[torch.randperm(len(row), generator=generator)] if order == "any" else row
            indices[tuple(at)][: len(row)] = row[:wide]
        return counts, indices

    return pyrx.BlockMask(*lists(blocks), *lists(blocks.transpose(2, 3)), block_size, lengths, key_range)


def listed(counts, indices, columns):
    """bool (..., R, columns) of what lists say, entry by entry."""
    blocks = torch.zeros(*counts.shape, columns, dtype=torch.bool)
    for at in torch.cartesian_prod(*(torch.arange(size) for size in counts.shape)).tolist():
        row = indices[tuple(at)].tolist()
        for entry in row[: max(0, int(counts[tuple(at)]))]:
            if 0 <= entry < columns:
                blocks[tuple(at)][entry] = True
    return blocks


@dataclasses.dataclass(frozen=True)
class Attention:
    """One call: its tensors, its mask and what the mask's lists say, and its numbers."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: pyrx.BlockMask
    blocks: torch.Tensor  # bool (B or 1, H or 1, NQ, NK)
    key_mask: torch.Tensor | None = None
    query_scale: torch.Tensor | None = None
    row_bias: torch.Tensor | None = None
    column_bias: torch.Tensor | None = None
    options: dict = dataclasses.field(default_factory=dict)

    def map(self, function):
        """`function` on the tensors that have gradients."""
        found = {name: getattr(self, name) for name in NAMES}
        return dataclasses.replace(self, **{name: function(each) for name, each in found.items() if each is not None})

    def to(self, dtype):
        """query_scale is of the dtype that logits are summed in."""
        scale = self.query_scale
        changed = self.map(lambda each: each.detach().to(dtype))
        if scale is None:
            return changed
        return dataclasses.replace(
            changed, query_scale=scale.to(torch.float64 if dtype == torch.float64 else torch.float32)
        )

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def leaves(self, needs=NAMES):
        """The same call of tensors that require a gradient, those of `needs`, and {name: leaf}."""
        held = self.map(lambda each: each.detach())
        found = {name: getattr(held, name) for name in needs if getattr(held, name) is not None}
        return held, {name: each.requires_grad_() for name, each in found.items()}

    def __call__(self, backend, **changes):
        """(out, lse, entropy) of a backend; out and lse are near those that come without the entropy."""
        need(backend, self.query.device.type, self.query.dtype, (ROW,))
        bias = self.row_bias if self.column_bias is None else (self.row_bias, self.column_bias)
        options = {"enable_gqa": True, "return_lse": True, "return_entropy": True, **self.options, **changes}

        def attend(**given):
            return pyrx.block_sparse_attention(
                self.query,
                self.key,
                self.value,
                self.mask,
                key_mask=self.key_mask,
                query_scale=self.query_scale,
                bias=bias,
                backend=backend,
                **options | given,
            )

        results = attend()
        repeats = not options.get("dropout_p") or options.get("seed") is not None
        if len(results) == 3 and backend == "cpu" and repeats and not torch.compiler.is_compiling():
            with torch.no_grad():  # by a kernel of its own
                assert_same_but_for_rounding(attend(return_entropy=False), results[:2])
        return results


def assert_same_but_for_rounding(got, expected):
    """Two (out, lse) of one call; weights feel the rounding of logits as large as lse."""
    lse = expected[1]
    finite = torch.where(lse.isfinite(), lse.abs(), 0)
    logits = torch.finfo(lse.dtype).eps * max(1.0, finite.max().item() if lse.numel() else 0.0)
    for one, other in zip(got, expected, strict=True):
        size = max(1.0, other.nan_to_num(0, 0, 0).abs().max().item() if other.numel() else 0.0)
        tolerance = (4 * torch.finfo(one.dtype).eps + 8 * logits) * size
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance, equal_nan=True)


def attention(
    batch=2,
    heads=2,
    queries=150,
    keys=190,
    size=16,
    *,
    kv_heads=None,
    value_size=None,
    block=(32, 32),
    lead=(1, 1),
    density=0.5,
    blocks=None,
    order="any",
    ranges=0,
    key_mask=False,
    query_scale=False,
    bias=None,
    columns=0,
    dtype=torch.float64,
    **options,
):
    """A random call. `lead` are the mask's (B or 1, H or 1); `bias` those of a bias, or with `columns` of the row's of
    a pair, where the column's are the other way round; `ranges`: 1 or B random key ranges, some empty, some beyond."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    kv_heads = heads if kv_heads is None else kv_heads
    value_size = size if value_size is None else value_size
    made = {
        "query": normal(batch, heads, queries, size),
        "key": normal(batch, kv_heads, keys, size),
        "value": normal(batch, kv_heads, keys, value_size),
    }
    if blocks is None:
        blocks = uniform(*lead, -(-queries // block[0]), -(-keys // block[1])) < density
    key_range = None
    if ranges:
        first = torch.randint(-20, keys, (ranges, queries), generator=generator)
        many = torch.randint(-5, keys, (ranges, queries), generator=generator)
        key_range = torch.stack([first, first + many], -1).int()
    if query_scale:
        made["query_scale"] = 2 * uniform(batch, heads, queries) - 0.5
    if bias is not None and columns:
        made["row_bias"] = normal(*bias, queries, keys // columns)
        other = [1 if own > 1 else full for own, full in zip(bias, (batch, heads), strict=True)]
        made["column_bias"] = normal(*other, queries, columns)
    elif bias is not None:
        made["row_bias"] = normal(*bias, queries, keys)
    call = Attention(
        **made,
        mask=block_mask(blocks, block, (queries, keys), key_range=key_range, order=order),
        blocks=blocks,
        key_mask=uniform(batch, keys) < 0.7 if key_mask else None,
        options=options,
    )
    return call.to(dtype)


def sides(window, is_causal):
    left, right = (window, window) if window is None or isinstance(window, int) else window
    return left, 0 if is_causal else right


def visible(call):
    """bool (B, H, Sq, Sk), position by position."""
    (batch, heads, queries, _), keys = call.query.shape, call.key.shape[2]
    q, k = torch.arange(queries)[:, None], torch.arange(keys)
    q_block, k_block = call.mask.block_size
    seen = call.blocks[:, :, q // q_block, k // k_block].expand(batch, heads, queries, keys)
    left, right = sides(call.options.get("window"), call.options.get("is_causal", False))
    if left is not None and left >= 0:
        seen = seen & (q - k <= left)
    if right is not None and right >= 0:
        seen = seen & (k - q <= right)
    if call.mask.key_range is not None:
        first, end = call.mask.key_range[:, None, :, None].unbind(-1)
        seen = seen & (k >= first) & (k < end)
    if call.key_mask is not None:
        seen = seen & call.key_mask[:, None, None]
    return seen


def logits(call):
    """(B, H, Sq, Sk) in float32, float64 for float64, whatever is visible."""
    dtype = accumulation_dtype(call.query.dtype)
    query, key = call.query.to(dtype), call.key.to(dtype)
    key = key.repeat_interleave(query.shape[1] // max(key.shape[1], 1), 1)
    found = torch.einsum("bhqd,bhkd->bhqk", query, key)
    scale = call.options.get("scale")
    found = found * (1 / math.sqrt(query.shape[3]) if scale is None else scale)
    if call.query_scale is not None:
        found = found * call.query_scale.unsqueeze(-1)
    cap = call.options.get("softcap")
    if cap is not None:
        found = cap * torch.tanh(found / cap)
    k = torch.arange(key.shape[2])
    if call.column_bias is not None:
        columns = call.column_bias.shape[3]
        row, column = call.row_bias.to(dtype), call.column_bias.to(dtype)
        found = found + row[..., k // columns] + column[..., k % columns]
    elif call.row_bias is not None:
        found = found + call.row_bias.to(dtype)
    return found


def formula(call):
    """(out, lse, entropy) from the definitions, of torch.softmax and torch.logsumexp, differentiable."""
    seen, scores = visible(call), logits(call)
    seen = seen & (scores != -torch.inf)
    empty = ~seen.any(-1)
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(empty[..., None], 0)
    if scores.shape[3] == 0:
        lse = scores.sum(-1)
        weights = scores
    else:
        lse = torch.logsumexp(scores, -1)
        weights = torch.softmax(scores, -1) * ~empty[..., None]
    log = torch.where(seen, scores - lse[..., None], 0)
    entropy = -(weights * log).sum(-1)
    p = call.options.get("dropout_p", 0.0)
    if p > 0:
        weights = torch.where(expected_mask(tuple(weights.shape), p, call.options["seed"]), weights * scale_of(p), 0)
    value = call.value.repeat_interleave(call.query.shape[1] // max(call.value.shape[1], 1), 1)
    out = weights @ value.to(weights.dtype)
    return out.to(call.query.dtype), lse.masked_fill(empty, -torch.inf), entropy.masked_fill(empty, 0)


def has_sdpa(call):
    """Whether F.scaled_dot_product_attention has all that the call asks for."""
    return call.query_scale is None and call.column_bias is None and not {"softcap", "dropout_p"} & set(call.options)


# a backend and a dtype: of the reference float64 and one of 16 bits tell
SERVED = [("reference", torch.bfloat16), ("reference", torch.float64), *(("cpu", dtype) for dtype in FLOATS)]


def sdpa(call):
    """The output by F.scaled_dot_product_attention in the call's dtype, 0 where nothing is seen."""
    seen = visible(call)
    bias = torch.zeros((), dtype=call.query.dtype) if call.row_bias is None else call.row_bias
    mask = torch.where(seen, bias, -torch.inf)
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            call.query, call.key, call.value, mask, scale=call.options.get("scale"), enable_gqa=True
        )
    return torch.where(seen.any(-1, keepdim=True), out, 0)


def pytorch(call):
    """(out, lse, entropy) as PyTorch computes them in the call's dtype, where it can."""
    out, lse, entropy = formula(call)
    return (sdpa(call) if has_sdpa(call) and call.key.shape[2] else out), lse, entropy


def raw(call):
    """The arguments of the raw op up to want_entropy."""
    left, right = (
        -1 if side is None else side for side in sides(call.options.get("window"), "is_causal" in call.options)
    )
    p, scale = call.options.get("dropout_p", 0.0), call.options.get("scale")
    return [
        *(call.query, call.key, call.value),
        *(*call.mask.lists, *call.mask.block_size),
        *(left, right, call.mask.key_range, call.key_mask, call.query_scale, call.row_bias, call.column_bias),
        *(call.query.shape[3] ** -0.5 if scale is None else scale, call.options.get("softcap", 0.0)),
        *(torch.tensor(call.options["seed"]) if p > 0 else None, threshold_of(p)),
    ]


def upstreams(results, seed=7):
    """A random gradient of each result, of sixteenths, which every dtype represents."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(-24, 25, each.shape, generator=generator).double() / 8 + 1 / 16 for each in results]
    return [one.to(each.device, each.dtype) for one, each in zip(made, results, strict=True)]


def gradients(call, function, needs=NAMES, through=RESULTS, scale=1.0):
    """The results of `function(call)` and {name: gradient} of random gradients, times `scale`, of `through`."""
    held, leaves = call.leaves(needs)
    results = function(held)
    grads = [each * scale if name in through else None for name, each in zip(RESULTS, upstreams(results), strict=True)]
    # plain PyTorch knows that statistics have no gradient to values
    pairs = [(each, grad) for each, grad in zip(results, grads, strict=True) if grad is not None and each.requires_grad]
    found = torch.autograd.grad(
        [each for each, _ in pairs], list(leaves.values()), [grad for _, grad in pairs], allow_unused=True
    )
    found = [
        torch.zeros_like(leaf) if each is None else each for each, leaf in zip(found, leaves.values(), strict=True)
    ]
    return [each.detach() for each in results], dict(zip(leaves, found, strict=True))


def assert_results(got, plain, exact, what="", largest=1.0):
    """Minus infinity where exact is, and within the error budget elsewhere; `largest`: the size of the logits, whose
    rounding the weights feel."""
    finite = exact[1].masked_fill(exact[1] == -torch.inf, 0)
    # the entropy is a difference of terms as large as the log-sum-exp
    floors = (1.0, 1.0, finite.abs().max().item() if finite.numel() else 0.0)
    for name, one, other, truth, floor in zip(RESULTS, got, plain, exact, floors, strict=True):
        hidden = truth == -torch.inf
        assert torch.equal(one == -torch.inf, hidden), f"{what} {name}: minus infinity elsewhere than expected"
        one, other, truth = (each.masked_fill(hidden, 0) for each in (one, other, truth))
        assert one.isfinite().all(), f"{what} {name}"
        slack = SLACK[one.dtype] + largest * torch.finfo(got[1].dtype).eps / torch.finfo(one.dtype).eps
        assert_within_budget(one, other, truth, f"{what} {name}", slack=slack, floor=floor)


def assert_attends(call, backend, what="", largest=1.0):
    """The results on a backend beside PyTorch's in the same dtype and the formula in float64."""
    need(backend, call.query.device.type, call.query.dtype, (ROW,))
    with torch.no_grad():
        assert_results(call(backend), pytorch(call), formula(call.to(torch.float64)), what, largest)


def assert_gradients(call, backend, what="", through=RESULTS):
    """The gradients on a backend, judged alike."""
    need(backend, call.query.device.type, call.query.dtype, (ROW,))
    _, exact = gradients(call.to(torch.float64), formula, through=through)
    _, plain = gradients(call, pytorch, through=through)
    results, got = gradients(call, lambda each: each(backend), through=through)
    eps = torch.finfo(call.query.dtype).eps
    for name, gradient in got.items():
        leaf = getattr(call, name)
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape, (what, name)
        assert gradient.isfinite().all(), f"{what} gradient of {name}"
        # products of gradients are of the query's dtype, whatever the leaf's
        slack = 2 * SLACK[call.query.dtype] * eps / torch.finfo(gradient.dtype).eps
        assert_within_budget(gradient, plain[name], exact[name], f"{what} gradient of {name}", slack=slack, floor=1.0)
    return results, got


# (id, arguments of attention()): every feature alone, and together.

SIZES = (1, 16, 24, 40, 64, 80, 96, 128, 192, 256)
BLOCKS = (16, 32, 64, 128)
HEADS = {f"head_{size}": {"size": size} for size in SIZES}
HEADS |= {
    f"head_{size}_values_{value}": {"size": size, "value_size": value}
    for size, value in ((16, 1), (1, 16), (24, 40), (40, 24), (64, 17), (33, 256), (256, 80), (7, 9))
}
BLOCK_SIZES = {f"blocks_{q}_{k}": {"block": (q, k)} for q in BLOCKS for k in BLOCKS}
RULES = {
    "causal": {"is_causal": True},
    "causal_full": {"is_causal": True, "density": 1.0},
    "causal_more_queries": {"is_causal": True, "queries": 200, "keys": 90},
    "window_0": {"window": 0, "density": 1.0},
    "window_7": {"window": 7},
    "window_300": {"window": 300},
    "window_pair": {"window": (5, 20)},
    "window_left": {"window": (9, -1)},
    "window_right": {"window": (-1, 3)},
    "window_none": {"window": (None, 2)},
    "window_causal": {"window": 40, "is_causal": True},
    "window_far": {"window": (0, 0), "queries": 200, "keys": 90},
    "ranges": {"ranges": 1},
    "ranges_batch": {"ranges": 2, "lead": (2, 2), "is_causal": True},
}
GROUPS = {
    f"heads_{heads}_{kv}": {"heads": heads, "kv_heads": kv, "lead": (2, heads), "block": (32, 16), "value_size": 24}
    for heads, kv in ((4, 1), (4, 2), (4, 4), (6, 2), (3, 3))
}
LEADS = {f"mask_{b}_{h}": {"lead": (b, h), "heads": 3} for b in (1, 2) for h in (1, 3)}
EDITS = {
    "ascending": {"order": "ascending"},
    "dense": {"density": 1.0},
    "key_mask": {"key_mask": True},
    "query_scale": {"query_scale": True},
    "query_scale_head_80": {"query_scale": True, "size": 80},
    "softcap": {"softcap": 0.7},
    "softcap_query_scale": {"softcap": 5.0, "query_scale": True, "scale": 2.0},
    "scale": {"scale": 1.5},
    "scale_negative": {"scale": -0.4},
    "scale_0": {"scale": 0.0},
    **{f"bias_{b}_{h}": {"bias": (b, h), "heads": 3} for b in (1, 2) for h in (1, 3)},
    **{f"columns_{c}": {"bias": (2, 1), "columns": c, "keys": 180} for c in (1, 4, 15, 45, 180)},
    "columns_of_heads": {"bias": (1, 2), "columns": 12, "keys": 180, "block": (16, 16)},
    "together": {
        "heads": 4,
        "kv_heads": 2,
        "lead": (2, 4),
        "is_causal": True,
        "window": (60, -1),
        "key_mask": True,
        "query_scale": True,
        "softcap": 3.0,
        "bias": (1, 4),
        "ranges": 2,
        "block": (64, 16),
        "value_size": 40,
    },
    "together_pair": {
        "heads": 4,
        "kv_heads": 1,
        "lead": (1, 4),
        "window": 70,
        "key_mask": True,
        "query_scale": True,
        "bias": (2, 1),
        "columns": 19,
        "block": (16, 64),
        "size": 24,
    },
}
ODD = (1, 3, 63, 100, 131)
LENGTHS = {f"lengths_{q}_{k}": {"queries": q, "keys": k, "density": 0.7} for q in ODD for k in ODD}
LENGTHS |= {
    "lengths_1311": {"queries": 1311, "keys": 1311, "batch": 1, "block": (64, 128), "density": 0.3, "is_causal": True},
    "lengths_1311_1": {"queries": 1311, "keys": 1, "block": (128, 16), "density": 0.9},
    "lengths_1_1311": {"queries": 1, "keys": 1311, "block": (16, 16), "density": 0.9},
}
# one query of every head, as in decoding, and heads that share keys
ONE = {"queries": 1, "heads": 6, "kv_heads": 2, "density": 0.9}
DECODING = {
    "decoding": ONE,
    "decoding_heads_40": ONE | {"heads": 40, "kv_heads": 1},
    "decoding_ranges": ONE | {"ranges": 1, "density": 1.0},
    "decoding_ranges_batch": ONE | {"ranges": 2, "density": 1.0, "key_mask": True},
    "decoding_causal": ONE | {"is_causal": True},
    "decoding_window": ONE | {"window": 50, "query_scale": True, "lead": (2, 1)},
    "decoding_heads_apart": ONE | {"lead": (1, 6)},
    "decoding_bias": ONE | {"bias": (1, 6)},
    "decoding_softcap": ONE | {"softcap": 2.0, "query_scale": True, "value_size": 24},
}
CASES = HEADS | BLOCK_SIZES | RULES | GROUPS | LEADS | EDITS | LENGTHS | DECODING
