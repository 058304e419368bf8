"""Edits of attention against explicit dense formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from edits import (
    BLOCK,
    EYE,
    ROWS,
    B,
    D,
    H,
    S,
    assert_same_gradients,
    attend,
    blocks_of,
    close,
    gradients,
    inputs,
    normal,
    weights_of,
)
from helpers import expected_mask, name_of, need
from torch._subclasses.fake_tensor import FakeTensorMode

import pyrx
from pyrx import BlockMask

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def backend(backend):
    return need(backend, ops=ROWS)


# Perturbed attention.


@pytest.mark.parametrize("image", [(0, 50), (20, S), (10, 60), (0, S), (30, 30), (0, 0)], ids=name_of)
@pytest.mark.parametrize("options", [{}, {"scale": 0.6, "softcap": 1.5}], ids=["plain", "softcap"])
def test_perturbed_attention(backend, image, options):
    query, key, value = inputs(grad=True)
    key_mask = torch.rand(B, S, generator=torch.Generator().manual_seed(3)) > 0.3
    position = torch.arange(S)
    inside = (position >= image[0]) & (position < image[1])
    visible = ~(inside[:, None] & inside) | EYE
    for hidden in (None, key_mask):
        seen = visible if hidden is None else visible & hidden[:, None, None]
        expected = attend(query, key, value, seen, **options)
        got = pyrx.perturbed_attention(
            query, key, value, image=image, enable_gqa=True, key_mask=hidden, backend=backend, **options
        )
        close(got, expected)
        assert_same_gradients(got, expected, (query, key, value))


def test_perturbed_attention_without_text_is_the_value(backend):
    query, key, value = inputs()
    assert torch.equal(
        pyrx.perturbed_attention(query, key, value, enable_gqa=True, backend=backend), value.repeat_interleave(2, 1)
    )
    query, key, value = inputs(heads=H)
    assert pyrx.perturbed_attention(query, key, value, backend=backend) is value


def test_gradcheck_of_perturbed_attention(backend):
    tensors = [normal(1, 2, 9, 3, seed=seed, grad=True) for seed in range(3)]
    assert torch.autograd.gradcheck(
        lambda *each: pyrx.perturbed_attention(*each, image=(2, 6), backend=backend), tensors
    )


def test_perturbed_attention_in_low_precision_and_compiled(backend):
    query, key, value = inputs(torch.bfloat16, H, grad=True)
    got = torch.compile(pyrx.perturbed_attention, fullgraph=True, backend="aot_eager")(
        query, key, value, image=(0, 50), backend=backend
    )
    assert got.dtype == torch.bfloat16
    double = [each.double() for each in (query, key, value)]
    close(got, pyrx.perturbed_attention(*double, image=(0, 50), backend="reference"), dtype=torch.bfloat16)
    single = inputs(torch.float32, H)
    with torch.autocast("cpu", torch.bfloat16):
        assert pyrx.perturbed_attention(*single, image=(0, 50), backend=backend).dtype == torch.bfloat16


# Attentive Eraser.


def region_of(batch=True):
    region = torch.rand(B, S, generator=torch.Generator().manual_seed(8)) > 0.6
    return region if batch else region[0]


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("batch", [True, False])
def test_erasing_attention_is_the_papers_two_attentions(backend, factor, batch):
    query, key, value = inputs(grad=True)
    region = region_of(batch)
    object_ = region.expand(B, S)[:, None, None]
    sim = query @ key.repeat_interleave(2, 1).mT * D**-0.5
    value_of = value.repeat_interleave(2, 1)
    background = torch.softmax(sim.masked_fill(object_, -math.inf), -1) @ value_of
    foreground = torch.softmax((sim * factor).masked_fill(object_, -math.inf), -1) @ value_of
    expected = torch.where(object_.mT, foreground, background)
    got = pyrx.erasing_attention(query, key, value, region, query_factor=factor, enable_gqa=True, backend=backend)
    close(got, expected)
    assert_same_gradients(got, expected, (query, key, value))


def test_erasing_attention_on_top_of_other_masks(backend):
    query, key, value = inputs(heads=H)
    mask, full = blocks_of()
    region, key_mask = region_of(), torch.arange(S).expand(B, S) < S - 9
    scale = normal(B, H, S, grad=True)
    got, lse = pyrx.erasing_attention(
        query, key, value, region, mask, query_factor=0.5, key_mask=key_mask, query_scale=scale, return_lse=True,
        backend=backend,
    )  # fmt: skip
    factor = scale * torch.where(region, 0.5, 1.0)[:, None]
    expected = attend(query, key, value, full & (key_mask & ~region)[:, None, None], query_scale=factor)
    close(got, expected)
    assert_same_gradients(got, expected, (scale,))
    assert lse.shape == (B, H, S)
    everything = torch.ones(S, dtype=torch.bool)
    assert (pyrx.erasing_attention(query, key, value, everything, backend=backend) == 0).all()


# DesignEdit.


def test_key_zeroed_attention(backend):
    query, key, value = inputs(keys=S - 8, grad=True)
    mask, full = blocks_of(S, S - 8)
    region = region_of()[:, : S - 8]
    for given in (region, region[1]):
        zeroed = key * ~given.expand(B, S - 8)[:, None, :, None]
        expected = attend(query, zeroed, value, full)
        got = pyrx.key_zeroed_attention(query, key, value, given, mask, enable_gqa=True, backend=backend)
        close(got, expected)
        assert_same_gradients(got, expected, (query, key, value))
        logits = query @ zeroed.repeat_interleave(2, 1).mT
        assert (logits.masked_select(given.expand(B, S - 8)[:, None, None]) == 0).all()


def test_a_zeroed_keys_nan_is_gone(backend):
    query, key, value = inputs(heads=H)
    region = torch.arange(S) == 3
    key[:, :, 3] = math.nan
    assert pyrx.key_zeroed_attention(query, key, value, region, backend=backend).isfinite().all()


# DropHead.


def kept_heads(p, seed):
    return expected_mask((B, H), p, seed, sample=1)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_head_dropout_attention(backend, seed):
    query, key, value = inputs(grad=True)
    mask, full = blocks_of()
    keep = kept_heads(0.5, seed)
    factor = keep * H / keep.sum(1, keepdim=True).clamp(min=1)
    expected = attend(query, key, value, full) * factor[..., None, None]
    got = pyrx.head_dropout_attention(
        query, key, value, mask, head_dropout_p=0.5, seed=seed, enable_gqa=True, backend=backend
    )
    close(got, expected)
    assert_same_gradients(got, expected, (query, key, value))
    assert (got[~keep] == 0).all()


def test_seeds_of_the_tests_drop_none_some_and_all():
    counts = {int(kept_heads(0.5, seed).sum()) for seed in range(4)}
    assert len(counts) > 1
    assert not kept_heads(0.95, 0).any(1).all()


def test_all_heads_dropped(backend):
    query, key, value = inputs(heads=H, grad=True)
    keep = kept_heads(0.95, 0)
    got, lse, entropy = pyrx.head_dropout_attention(
        query, key, value, head_dropout_p=0.95, seed=0, return_lse=True, return_entropy=True, backend=backend
    )
    assert (got[~keep.any(1)] == 0).all() and got.isfinite().all()
    assert (lse[~keep] == -math.inf).all() and (entropy[~keep] == 0).all()
    assert all(each.isfinite().all() for each in gradients(got, (query, key, value)))


def test_head_dropout_of_nothing(backend):
    query, key, value = inputs(heads=H)
    shape = pyrx.head_dropout_attention(
        query[:0], key[:0], value[:0], head_dropout_p=0.5, seed=0, backend=backend
    ).shape
    assert shape == (0, H, S, D - 2)


def test_dropped_heads_have_no_blocks(monkeypatch):
    """Their cost is nothing: no block of theirs is listed, on either side."""
    from pyrx.ops import attention_edits

    seen = []

    def record(query, key, value, mask, **options):
        seen.append(mask)
        return query

    monkeypatch.setattr(attention_edits, "block_sparse_attention", record)
    query, key, value = inputs(heads=H)
    shared = BlockMask.from_dense(torch.ones(5, 5, dtype=torch.bool), (S, S), BLOCK)
    for given in (None, shared, blocks_of()[0]):
        pyrx.head_dropout_attention(query, key, value, given, head_dropout_p=0.5, seed=1)
        keep, mask = kept_heads(0.5, 1), seen.pop()
        assert (mask.kv_counts[~keep] == 0).all() and (mask.q_counts[~keep] == 0).all()
        assert (mask.kv_counts[keep].sum(-1) > 0).all() and (mask.q_counts[keep].sum(-1) > 0).all()
        dense = mask.to_dense()
        if given is not None:
            assert torch.equal(dense, given.to_dense() & keep[..., None, None])


def test_head_dropout_beside_dropout(backend):
    """The heads' mask is another one than the weights', of the same seed."""
    query, key, value = inputs(heads=H)
    got = pyrx.head_dropout_attention(
        query, key, value, head_dropout_p=0.5, dropout_p=0.2, seed=2, is_causal=True, backend=backend
    )
    keep = kept_heads(0.5, 2)
    weights = weights_of(query, key, EYE.new_ones(S, S).tril())
    weights = weights * expected_mask((B, H, S, S), 0.2, 2) * 65536 / (65536 - round(0.2 * 65536))
    close(got, weights @ value * (keep * H / keep.sum(1, keepdim=True))[..., None, None])


def test_head_dropout_draws(backend):
    query, key, value = inputs(heads=H)

    def run(**options):
        return pyrx.head_dropout_attention(query, key, value, backend=backend, **options)

    assert torch.equal(run(head_dropout_p=0.0), pyrx.block_sparse_attention(query, key, value, backend=backend))
    first = run(head_dropout_p=0.5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, run(head_dropout_p=0.5, generator=torch.Generator().manual_seed(1)))
    drawn = {tuple((run(head_dropout_p=0.5) == 0).all(-1).all(-1).flatten().tolist()) for _ in range(8)}
    assert len(drawn) > 4
    low = [each.bfloat16() for each in (query, key, value)]
    got = pyrx.head_dropout_attention(*low, head_dropout_p=0.5, seed=1, backend=backend)
    assert got.dtype == torch.bfloat16
    close(got, run(head_dropout_p=0.5, seed=1), dtype=torch.bfloat16)


def test_compiled_edits(backend):
    query, key, value = inputs(heads=H)
    region, mask = region_of(), blocks_of()[0]

    def run(query, key, value, region, seed):
        a = pyrx.erasing_attention(query, key, value, region, mask, query_factor=0.5, backend=backend)
        b = pyrx.key_zeroed_attention(query, key, value, region, backend=backend)
        c = pyrx.head_dropout_attention(query, key, value, mask, head_dropout_p=0.5, seed=seed, backend=backend)
        importance = pyrx.token_importance(query, key, keyframe=(0, 9), enhanced_weight=2.0, backend=backend)
        kept, indices = pyrx.token_dropout(value.flatten(0, 1), importance.repeat(H, 1), 0.5, keyframe=(0, 9))
        return a, b, c, importance, kept, indices

    arguments = (query, key, value, region, torch.tensor(5))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    for got, expected in zip(compiled, run(*arguments), strict=True):
        close(got, expected)


# Tokens.


@pytest.mark.parametrize("keyframe, weight", [(None, 1.0), ((0, 20), 4.0), ((5, 30), 0.5)])
def test_token_importance(backend, keyframe, weight):
    query, key, _ = inputs(keys=S - 8)
    mask, full = blocks_of(S, S - 8, density=0.9)
    weights = weights_of(query, key, full)
    if keyframe is not None:
        weights[:, :, slice(*keyframe)] *= weight
    got = pyrx.token_importance(
        query, key, mask, keyframe=keyframe, enhanced_weight=weight, enable_gqa=True, backend=backend
    )
    close(got, weights.mean((1, 2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name_of)
def test_importance_in_low_precision(backend, dtype):
    query, key, _ = inputs(dtype, H)
    got = pyrx.token_importance(query, key, backend=backend)
    assert got.dtype == torch.float32
    expected = weights_of(query.double(), key.double(), EYE.new_ones(S, S)).mean((1, 2))
    close(got * S, expected * S, dtype=dtype)
    close(got.sum(1), torch.ones(B), dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        close(pyrx.token_importance(query, key, backend=backend) * S, expected * S, dtype=torch.bfloat16)


@pytest.mark.parametrize("keep_rate", [0.1, 0.34, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("keyframe", [None, (0, 9), (4, 7), (20, 23), (0, 23), (3, 3)])
def test_token_dropout(keep_rate, keyframe):
    tokens = 23
    x, importance = normal(B, tokens, 5, grad=True), normal(B, tokens, seed=2)
    start, stop = keyframe or (0, 0)
    count = max(math.ceil(keep_rate * tokens), stop - start)
    kept, indices = pyrx.token_dropout(x, importance, keep_rate, keyframe=keyframe)
    assert indices.dtype == torch.int64 and indices.shape == (B, count)
    for sample in range(B):
        key = list(range(start, stop))
        others = [i for i in range(tokens) if i not in key]
        others.sort(key=lambda i: -importance[sample, i].item())
        expected = sorted(key + others[: count - len(key)])
        assert indices[sample].tolist() == expected
        assert torch.equal(kept[sample], x[sample, expected])
    (found,) = torch.autograd.grad(kept, x, torch.ones_like(kept))
    assert torch.equal(found[..., 0], torch.zeros(B, tokens, dtype=x.dtype).scatter_(1, indices, 1))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16])
def test_token_dropout_of_dtypes_that_torch_does_not_gather(dtype):
    with pytest.raises(TypeError, match="pyrx::token_dropout: expected x of a dtype that torch gathers, got"):
        pyrx.token_dropout(torch.ones(1, 4, 2).to(dtype), torch.ones(1, 4), 0.5)


def test_token_dropout_of_equals_and_of_nothing():
    x = torch.arange(12).view(1, 12, 1)
    kept, indices = pyrx.token_dropout(x, torch.ones(1, 12), 0.5, keyframe=(8, 10))
    assert indices.tolist() == [[0, 1, 2, 3, 8, 9]] and kept.dtype == torch.int64
    infinite = torch.full((1, 12), math.inf)
    assert pyrx.token_dropout(x, infinite, 0.5, keyframe=(8, 10))[1].tolist() == [[0, 1, 2, 3, 8, 9]]
    nan = torch.zeros(1, 12).index_fill_(1, torch.tensor(11), math.nan)
    assert pyrx.token_dropout(x, nan, 0.25, keyframe=(8, 10))[1].tolist() == [[8, 9, 11]]
    assert pyrx.token_dropout(x[:, :0], torch.ones(1, 0), 0.5)[0].shape == (1, 0, 1)
    assert pyrx.token_dropout(x[:0], torch.ones(0, 12), 0.5)[0].shape == (0, 6, 1)


def test_evad_step(backend):
    """One step of the paper: importance of all tokens, the keyframe's kept, the rest by rank."""
    query, key, _ = inputs(torch.float32, H)
    x, frame = normal(B, S, 6, dtype=torch.float32), (0, 14)
    attention = torch.softmax(query @ key.mT * D**-0.5, -1)
    attention[:, :, :14] *= 3
    rest = attention.mean((1, 2))[:, 14:]
    top = rest.topk(math.ceil(0.5 * S) - 14).indices + 14
    expected = torch.cat([torch.arange(14).expand(B, 14), top], 1).sort(1).values
    importance = pyrx.token_importance(query, key, keyframe=frame, enhanced_weight=3.0, backend=backend)
    kept, indices = pyrx.token_dropout(x, importance, 0.5, keyframe=frame)
    assert torch.equal(indices, expected)


# Errors.

Q32, K32, V32 = inputs(torch.float32, H)
REGION = torch.zeros(B, S, dtype=torch.bool)
BAD = [
    ("reversed_attention", {"u": V32.double()}, "expected u of dtype torch.float32, got torch.float64"),
    ("reversed_attention", {"u": V32[:, :, 1:]}, f"expected u of shape [B, H, Sq, Du] = [2, 4, 70, 'Du'], got "
     f"{[B, H, S - 1, D - 2]}"),
    ("reversed_attention", {"u": V32[..., :0]}, "expected u of a last dimension in [1, 256], got 0"),
    ("reversed_attention", {"u": 3}, "expected u to be a Tensor, got int"),
    ("reversed_attention", {"key": K32[:, :2]}, "expected key of the query's 4 heads (or enable_gqa=True), got 2"),
    ("reversed_attention", {"key": K32[..., :4]}, "expected key of the query's head size 12, got 4"),
    ("reversed_attention", {"key_mask": REGION[:1]}, "expected key_mask of shape [B, Sk] = [2, 70], got [1, 70]"),
    ("reversed_attention", {"block_mask": 3}, "expected block_mask to be a pyrx.BlockMask, got int"),
    ("perturbed_attention", {"image": (0, S + 1)}, f"expected image in [0, {S}], got {S + 1}"),
    ("perturbed_attention", {"image": (5, 4)}, "expected image with start <= stop, got [5, 4]"),
    ("perturbed_attention", {"image": 3}, "expected image to be a pair (start, stop), got 3"),
    ("perturbed_attention", {"key": K32[:, :, 1:], "value": V32[:, :, 1:]},
     "expected key of the query's length 70: self-attention, got 69"),
    ("perturbed_attention", {"value": V32[:, :, 1:]},
     f"expected value of shape [B, Hkv, S, Dv] = {[B, H, S, D - 2]}, got {[B, H, S - 1, D - 2]}"),
    ("erasing_attention", {"region": REGION.float()}, "expected region of dtype torch.bool, got torch.float32"),
    ("erasing_attention", {"region": REGION[:, 1:]}, "expected region of shape [Sk] or [B, Sk] = [2, 70], got [2, 69]"),
    ("erasing_attention", {"region": REGION[:1]}, "expected region of shape [Sk] or [B, Sk] = [2, 70], got [1, 70]"),
    ("erasing_attention", {"query_factor": "1"}, "expected query_factor to be a float, got str"),
    ("erasing_attention", {"key": K32[:, :, 1:]}, "expected key of the query's length 70: self-attention, got 69"),
    ("erasing_attention", {"key": K32[:1], "query_factor": 0.5}, "expected key of the query's batch size 2, got 1"),
    ("erasing_attention", {"query": Q32[0]}, "expected query of shape [B, H, S, D], got [4, 70, 12]"),
    ("erasing_attention", {"key_mask": REGION[0]}, "expected key_mask of shape [B, Sk] = [2, 70], got [70]"),
    ("erasing_attention", {"query_scale": 0.5, "query_factor": 0.5}, "expected query_scale to be a Tensor, got float"),
    ("key_zeroed_attention", {"region": REGION[:, 1:]},
     "expected region of shape [Sk] or [B, Sk] = [2, 70], got [2, 69]"),
    ("key_zeroed_attention", {"region": REGION.to("meta")}, "expected region on device cpu, got meta"),
    ("head_dropout_attention", {"head_dropout_p": 1.0}, "expected head_dropout_p in [0, 1), got 1.0"),
    ("head_dropout_attention", {"block_mask": "x"}, "expected block_mask to be a pyrx.BlockMask, got str"),
    ("head_dropout_attention", {"seed": 1.5}, "expected seed to be an int, got float"),
    ("token_importance", {"keyframe": (0, 71)}, "expected keyframe in [0, 70], got 71"),
    (
        "token_importance",
        {"enhanced_weight": -1e300},
        "expected enhanced_weight in [-5.44452e+39, 5.44452e+39] for torch.float32, got -1e+300",
    ),
    ("token_importance", {"enhanced_weight": None}, "expected enhanced_weight to be a float, got NoneType"),
    ("token_dropout", {"keep_rate": 0.0}, "expected keep_rate in (0, 1], got 0.0"),
    ("token_dropout", {"keep_rate": 1.1}, "expected keep_rate in (0, 1], got 1.1"),
    ("token_dropout", {"keyframe": (-1, 2)}, "expected keyframe in [0, 5], got -1"),
    ("token_dropout", {"x": torch.ones(2, 5)}, "expected x of shape [B, N, C], got [2, 5]"),
    ("token_dropout", {"importance": torch.ones(2, 4)}, "expected importance of shape [B, N] = [2, 5], got [2, 4]"),
    ("token_dropout", {"importance": torch.ones(2, 5).long()},
     "expected importance of dtype float16, bfloat16, float32 or float64, got torch.int64"),
]  # fmt: skip
ARGUMENTS = {
    "reversed_attention": {"query": Q32, "key": K32, "u": V32},
    "perturbed_attention": {"query": Q32, "key": K32, "value": V32},
    "erasing_attention": {"query": Q32, "key": K32, "value": V32, "region": REGION},
    "key_zeroed_attention": {"query": Q32, "key": K32, "value": V32, "region": REGION},
    "head_dropout_attention": {"query": Q32, "key": K32, "value": V32, "head_dropout_p": 0.5, "seed": 1},
    "token_importance": {"query": Q32, "key": K32},
    "token_dropout": {"x": torch.ones(2, 5, 3), "importance": torch.ones(2, 5), "keep_rate": 0.5},
}


@pytest.mark.parametrize("op, changes, text", BAD)
def test_errors(backend, op, changes, text):
    options = {} if op == "token_dropout" else {"backend": backend}
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        getattr(pyrx, op)(**ARGUMENTS[op] | options | changes)
    assert str(caught.value) == f"pyrx::{op}: {text}"


@pytest.mark.parametrize("op", ARGUMENTS)
def test_fakes_have_the_shapes(backend, op):
    options = {} if op == "token_dropout" else {"backend": backend}
    real = getattr(pyrx, op)(**ARGUMENTS[op] | options)
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in ARGUMENTS[op].items()}
        got = getattr(pyrx, op)(**fake | options)
    for a, b in zip(*(each if isinstance(each, tuple) else (each,) for each in (got, real)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


def test_sdpa_is_the_formula_of_these_tests():
    query, key, value = inputs()
    full = blocks_of()[1]
    expected = F.scaled_dot_product_attention(query, key, value, full.expand(B, H, S, S), enable_gqa=True)
    close(attend(query, key, value, full), torch.where(full.any(-1, keepdim=True), expected, 0))
