"""Online search in use: across denoising steps, compiled, without the host, in every dtype, with bad input."""

from functools import partial

import pytest
import torch
from planted import inputs, lse_of, planted, random_blocks
from torch._subclasses.fake_tensor import FakeTensorMode

import pyrx
from pyrx import search

# Across denoising steps.


def drifting(steps, heads=4):
    """query, key, value of every step, about planted blocks: 2 of 8 a row."""
    truth = random_blocks((1, heads, 8, 8), 2)
    query, key = planted(truth, (32, 32), (256, 256), strength=3.0)
    value, change = torch.randn(1, heads, 256, 16), torch.randn(2, 1, heads, 256, 64)
    for step in range(steps):
        far = 0.3 * step / steps
        yield query + far * change[0] + 0.1 * torch.randn_like(query), key + far * change[1], value


def test_adaptive_steps():
    attention = search.AdaptiveSparseAttention(
        sparsity=0.75, block_size=32, warmup=3, search_steps=(3, 6), head_adaptive=False
    )
    lse, mask = None, None
    for step, (query, key, value) in enumerate(drifting(9), 1):
        got = attention(query, key, value, step)
        dense, own = pyrx.block_sparse_attention(query, key, value, return_lse=True)
        if step == 3:
            lse = own
        if step in (3, 6):
            mask = search.lse_cached(query, key, lse, sparsity=0.75, block_size=32, head_adaptive=False)
        expected = dense if step <= 3 else pyrx.block_sparse_attention(query, key, value, mask)
        torch.testing.assert_close(got, expected)
        assert (attention.block_mask is None) == (step < 3)
        if step >= 3:
            assert torch.equal(attention.block_mask.to_dense(), mask.to_dense())
            assert torch.equal(attention.lse, lse) and not attention.lse.requires_grad
            assert search.recall(query, key, attention.block_mask) > 0.9
            assert (got - dense).abs().max() < 0.6
            fresh = search.lse_cached(query, key, own, sparsity=0.75, block_size=32, head_adaptive=False)
            kept = [search.recall(query, key, each) for each in (attention.block_mask, fresh)]
            assert kept[0] > kept[1] - 0.02
    assert not torch.equal(got, dense) and not attention.state_dict()


def test_adaptive_forgets():
    def fresh():
        return search.AdaptiveSparseAttention(block_size=16, warmup=1, search_steps=(1,))

    def draw(queries=64):
        return [torch.randn(1, 2, queries, 16) for _ in range(3)]

    attention, x = fresh(), draw()
    attention(*x, 1)
    mask = attention.block_mask
    attention(*draw(), 2)
    attention(*draw(), 2)
    assert attention.block_mask is mask
    # a new run, other shapes, a reset: each searches by itself
    y = draw()
    torch.testing.assert_close(attention(*y, 1), pyrx.block_sparse_attention(*y))
    assert attention.block_mask is not mask
    late = search.AdaptiveSparseAttention(block_size=16, warmup=2, search_steps=(2,))
    for step, found in ((1, False), (2, True), (3, True), (1, False), (2, True)):
        late(*x, step)
        assert (late.block_mask is not None) == found
    z = draw(80)
    torch.testing.assert_close(attention(*z, 3), pyrx.block_sparse_attention(*z))
    assert attention.block_mask.seq_lengths == (80, 80)
    more = [torch.randn(2, 2, 80, 16) for _ in range(3)]
    torch.testing.assert_close(attention(*more, 4), pyrx.block_sparse_attention(*more))
    attention.reset()
    assert attention.block_mask is None and attention.lse is None
    torch.testing.assert_close(attention(*x, 7), pyrx.block_sparse_attention(*x))
    assert attention.block_mask is not None
    never = search.AdaptiveSparseAttention(block_size=16, warmup=0, search_steps=())
    torch.testing.assert_close(never(*x, 1), pyrx.block_sparse_attention(*x))
    assert (never(*x, 2) - pyrx.block_sparse_attention(*x)).abs().max() > 0.1
    two = torch.nn.ModuleList([fresh(), fresh()])
    two[0](*x, 1)
    assert two[1].block_mask is None
    assert "sparsity=0.8" in repr(two[0])


def test_adaptive_options_reach_attention():
    x = [torch.randn(2, heads, 96, 16) for heads in (4, 2, 2)]
    key_mask = torch.rand(2, 96) < 0.7
    options = {"is_causal": True, "scale": 0.5, "softcap": 3.0}
    attention = search.AdaptiveSparseAttention(block_size=16, warmup=1, search_steps=(1,), sparsity=0.4, **options)
    dense, lse = pyrx.block_sparse_attention(*x, enable_gqa=True, key_mask=key_mask, return_lse=True, **options)
    torch.testing.assert_close(attention(*x, 1, key_mask=key_mask), dense)
    mask = search.lse_cached(*x[:2], lse, block_size=16, sparsity=0.4, key_mask=key_mask, **options)
    expected = pyrx.block_sparse_attention(*x, mask, enable_gqa=True, key_mask=key_mask, **options)
    torch.testing.assert_close(attention(*x, 2, key_mask=key_mask), expected)


def test_adaptive_trains():
    x = [torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3)]
    attention = search.AdaptiveSparseAttention(block_size=16, warmup=1, search_steps=(1,))
    for step in (1, 2):
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(attention(*x, step).square().sum(), x))


# All of them.


def padded(query, key):
    """The masks of samples of 150 tokens."""
    options = {}
    for name, x in (("query_mask", query), ("key_mask", key)):
        options[name] = torch.arange(x.shape[2], device=x.device).expand(x.shape[0], -1) < 150
    return options


SEARCHES = {
    "lse_cached": lambda q, k, lse: search.lse_cached(q, k, lse, block_size=32, text_tokens=(0, 10)),
    "lse_cached causal": lambda q, k, lse: search.lse_cached(q, k, lse, block_size=32, is_causal=True),
    "pooled": lambda q, k, lse: search.pooled(q, k, block_size=32, is_causal=True),
    "pooled topk": lambda q, k, lse: search.pooled(q, k, topk=0.5, similarity_threshold=-1.0),
    "vertical_slash": lambda q, k, lse: search.vertical_slash(q, k, block_size=32, vertical=40, slash=110),
    "topk_blocks": lambda q, k, lse: search.topk_blocks(q, k, block_size=32, topk=3, is_causal=True),
    "pooled, padded": lambda q, k, lse: search.pooled(q, k, block_size=32, **padded(q, k)),
    "vertical_slash, padded": lambda q, k, lse: search.vertical_slash(
        q, k, block_size=32, vertical=40, slash=110, is_causal=True, **padded(q, k)
    ),
    "topk_blocks, padded": lambda q, k, lse: search.topk_blocks(q, k, block_size=32, topk=3, **padded(q, k)),
}


def arguments(dtype=torch.float32, queries=200):
    query, key = inputs(queries=queries, keys=queries)
    return query.to(dtype), key.to(dtype), lse_of(query, key)


@pytest.mark.parametrize("name", SEARCHES)
def test_compiled(name):
    torch._dynamo.reset()
    compiled = torch.compile(SEARCHES[name], fullgraph=True)
    for queries in (200, 264):
        given = arguments(queries=queries)
        got, expected = compiled(*given), SEARCHES[name](*given)
        assert isinstance(got, pyrx.BlockMask) and got.seq_lengths == (queries, queries)
        assert got.block_size == expected.block_size
        assert torch.equal(got.to_dense(), expected.to_dense())


def test_compiled_recall_and_attention():
    def step(query, key, value, lse):
        mask = search.lse_cached(query, key, lse, block_size=32)
        out = pyrx.block_sparse_attention(query, key, value, mask, enable_gqa=True)
        return out, search.recall(query, key, mask)

    query, key, lse = arguments()
    given = (query, key, torch.randn_like(key), lse)
    for one, other in zip(torch.compile(step, fullgraph=True)(*given), step(*given), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", SEARCHES)
def test_no_value_is_read_on_the_host(name):
    given = arguments()
    mode = FakeTensorMode()  # raises where Python asks for a value
    fake = [mode.from_tensor(each) for each in given]
    with mode:
        got = SEARCHES[name](*fake)
    expected = SEARCHES[name](*given)
    assert [each.shape for each in got.lists] == [each.shape for each in expected.lists]
    assert [each.dtype for each in got.lists] == [each.dtype for each in expected.lists]


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(name, dtype):
    query, key, lse = arguments(dtype)
    got = SEARCHES[name](query, key, lse.to(torch.float64 if dtype == torch.float64 else torch.float32))
    exact = SEARCHES[name](query.float(), key.float(), lse)
    assert (got.to_dense() == exact.to_dense()).float().mean() > 0.95


@pytest.mark.parametrize("backend", ["reference", None])
def test_autocast_changes_no_search(backend):
    query, key, lse = arguments(queries=512)
    mask = pyrx.BlockMask.from_dense(torch.rand(4, 8, 8) < 0.5, 512, 64)

    def found():
        return [
            search.lse_cached(query, key, lse, block_size=16, backend=backend).to_dense(),
            search.pooled(query, key, block_size=16, similarity_threshold=-1.0, mass=0.5, backend=backend).to_dense(),
            search.topk_blocks(query, key, block_size=16, backend=backend).to_dense(),
            search.vertical_slash(query, key, block_size=16, vertical=60, slash=130, backend=backend).to_dense(),
            search.recall(query, key, mask, per="query", backend=backend),
        ]

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        got = found()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", SEARCHES)
def test_any_strides_and_no_gradient(name):
    query, key, lse = arguments()
    expected = SEARCHES[name](query, key, lse).to_dense()
    q = query.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    k = key.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
    found = SEARCHES[name](q, k, lse)
    assert torch.equal(found.to_dense(), expected)
    assert not any(each.requires_grad for each in found.lists)
    assert torch.equal(found.kv_counts.sum((0, 1)), found.to_dense().sum((0, 1, 3), dtype=torch.int32))


@pytest.mark.parametrize("shape", [(0, 4, 40), (2, 4, 0)], ids=str)
@pytest.mark.parametrize("name", [each for each in SEARCHES if "text" not in each and each != "lse_cached"])
def test_empty(name, shape):
    query = torch.randn(*shape, 16)
    found = SEARCHES[name](query, query, torch.zeros(shape))
    assert found.to_dense().shape[:2] == shape[:2] and found.seq_lengths == (shape[2], shape[2])


@pytest.mark.gpu
@pytest.mark.parametrize("name", SEARCHES)
def test_on_a_gpu_nothing_waits(name):
    given = arguments()
    on_gpu = [each.cuda() for each in given]
    SEARCHES[name](*on_gpu)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = SEARCHES[name](*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = SEARCHES[name](*given)
    assert (found.to_dense().cpu() == expected.to_dense()).float().mean() > 0.98


# Bad input.

Q, K = torch.randn(1, 4, 64, 8), torch.randn(1, 2, 64, 8)
LSE = torch.zeros(1, 4, 64)
TEXT = "text_tokens within the tokens that are queries and keys, [0, 64], got"
ERRORS = [
    ("lse_cached", {"query": [1]}, TypeError, "query to be a Tensor, got list"),
    ("lse_cached", {"key": K[:, :, :, :4]}, ValueError, "key of the query's head size 8, got 4"),
    ("lse_cached", {"sparsity": 1.5}, ValueError, "sparsity in [0, 1], got 1.5"),
    ("lse_cached", {"sparsity": None}, TypeError, "sparsity to be a float, got NoneType"),
    ("lse_cached", {"recall_threshold": -0.1}, ValueError, "recall_threshold in [0, 1], got -0.1"),
    ("lse_cached", {"block_size": 48}, ValueError, "block_size to be one of 16, 32, 64, 128, got 48"),
    ("lse_cached", {"text_tokens": (10, 65)}, ValueError, f"{TEXT} (10, 65) of 64 queries"),
    ("lse_cached", {"text_tokens": (10, 5)}, ValueError, f"{TEXT} (10, 5) of 64 queries"),
    ("lse_cached", {"text_tokens": 3}, TypeError, "text_tokens to be a pair (start, stop), got 3"),
    ("lse_cached", {"always": torch.ones(4, 4)}, TypeError, "always of dtype torch.bool, got torch.float32"),
    (
        "lse_cached",
        {"always": torch.ones(3, 1, dtype=torch.bool), "block_size": 32},
        ValueError,
        "always of a shape that broadcasts to the blocks' [1, 4, 2, 2], got [3, 1]",
    ),
    ("lse_cached", {"lse": None}, TypeError, "lse to be a Tensor, got NoneType"),
    ("lse_cached", {"lse": LSE.double()}, TypeError, "lse of dtype torch.float32, got torch.float64"),
    ("lse_cached", {"lse": LSE[:, :2]}, ValueError, "lse of shape [B, H, Sq] = [1, 4, 64], got [1, 2, 64]"),
    ("lse_cached", {"lse": LSE.to("meta")}, RuntimeError, "lse on device cpu, got meta"),
    ("lse_cached", {"key_mask": LSE[0, :1] > 0, "key": K[:, :, :9]}, ValueError,
     "key_mask of shape [B, Sk] = [1, 9], got [1, 64]"),
    ("recall", {"key_mask": LSE[0] > 0}, ValueError, "key_mask of shape [B, Sk] = [1, 64], got [4, 64]"),
    ("lse_cached", {"softcap": 0.0}, ValueError, "softcap above 0, or None, got 0.0"),
    ("pooled", {"mass": 1.1}, ValueError, "mass in [0, 1], got 1.1"),
    ("pooled", {"topk": 16}, ValueError, "topk in [0, 1], got 16"),
    ("pooled", {"similarity_threshold": "x"}, TypeError, "similarity_threshold to be a float, got str"),
    (
        "pooled",
        {"key": K[:, :1].expand(1, 3, 64, 8)},
        ValueError,
        "key of a number of heads that divides the query's 4, got 3",
    ),
    ("vertical_slash", {"last_queries": 0}, ValueError, "last_queries in [1, 2147483647], got 0"),
    ("vertical_slash", {"slash": -1}, ValueError, "slash in [0, 2147483647], got -1"),
    ("vertical_slash", {"vertical": 0.5}, TypeError, "vertical to be an int, got float"),
    ("topk_blocks", {"topk": 0}, ValueError, "topk in [1, 2147483647], got 0"),
    ("topk_blocks", {"local": -1}, ValueError, "local in [0, 2147483647], got -1"),
    ("topk_blocks", {"query": Q.half()}, TypeError, "key of dtype torch.float16, got torch.float32"),
    *(
        (name, {argument: value}, error, f"{argument} {text}")
        for name in ("pooled", "vertical_slash", "topk_blocks")
        for argument, shape in (("key_mask", "[B, Sk]"), ("query_mask", "[B, Sq]"))
        for value, error, text in (
            (LSE[0] > 0, ValueError, f"of shape {shape} = [1, 64], got [4, 64]"),
            (LSE[0, :1], TypeError, "of dtype torch.bool, got torch.float32"),
            ((LSE[0, :1] > 0).to("meta"), RuntimeError, "on device cpu, got meta"),
            ([True], TypeError, "to be a Tensor, got list"),
        )
    ),
    ("recall", {"block_mask": None}, TypeError, "block_mask to be a pyrx.BlockMask, got NoneType"),
    ("recall", {"query_mask": LSE[0] > 0}, ValueError, "query_mask of shape [B, Sq] = [1, 64], got [4, 64]"),
    ("recall", {"query_mask": LSE[0, :1]}, TypeError, "query_mask of dtype torch.bool, got torch.float32"),
    *(
        (name, {"within": value}, error, f"within {text}")
        for name in ("lse_cached", "recall")
        for value, error, text in (
            (3, TypeError, "to be a pyrx.BlockMask, got int"),
            (pyrx.BlockMask.causal((64, 65), 64), ValueError, "for the lengths (Sq, Sk) = [64, 64], got [64, 65]"),
            (pyrx.BlockMask.causal(64, 16), ValueError, "of block_size [64, 64], got [16, 16]"),
        )
    ),
    ("recall", {"per": "row"}, ValueError, "per to be one of 'all', 'head', 'query', got 'row'"),
]  # fmt: skip


@pytest.mark.parametrize("name, changes, error, text", ERRORS, ids=[f"{each[0]}: {each[3]}"[:90] for each in ERRORS])
def test_errors(name, changes, error, text):
    given = {"query": Q, "key": K}
    if name == "lse_cached":
        given["lse"] = LSE
    if name == "recall":
        given["block_mask"] = pyrx.BlockMask.from_dense(torch.ones(1, 1, dtype=torch.bool), (64, 64), 64)
    with pytest.raises(error) as caught:
        getattr(search, name)(**{**given, **changes})
    assert str(caught.value) == f"pyrx::search.{name}: expected {text}"


def test_a_search_is_for_the_attention_of_its_defaults():
    # a mask of one default must not lack blocks that the attention of the other sees
    query, key, lse = arguments(queries=512)
    for find in (search.topk_blocks, search.vertical_slash, search.pooled, partial(search.lse_cached, lse=lse)):
        blocks = find(query, key, block_size=16).to_dense()
        assert blocks.triu(1).any() and blocks.tril(-1).any()


def test_a_mask_for_other_lengths():
    other = pyrx.BlockMask.from_dense(torch.ones(2, 1, dtype=torch.bool), (100, 64), 64)
    with pytest.raises(ValueError, match=r"block_mask for the lengths \(Sq, Sk\) = \[64, 64\], got \[100, 64\]"):
        search.recall(Q, K, other)


ADAPTIVE_ERRORS = [
    ({"sparsity": 2.0}, ValueError, "sparsity in [0, 1], got 2.0"),
    ({"warmup": -1}, ValueError, "warmup in [0, 2147483647], got -1"),
    ({"search_steps": (0,)}, ValueError, "search_steps in [1, 2147483647], got 0"),
    ({"search_steps": 10}, TypeError, "search_steps to be ints, got int"),
    ({"text_tokens": 77}, TypeError, "text_tokens to be a pair (start, stop), got 77"),
    ({"window": "wide"}, TypeError, "window to be an int or a pair (left, right), got 'wide'"),
    ({"block_size": 8}, ValueError, "block_size to be one of 16, 32, 64, 128, got 8"),
]


@pytest.mark.parametrize("changes, error, text", ADAPTIVE_ERRORS, ids=[each[2] for each in ADAPTIVE_ERRORS])
def test_adaptive_errors(changes, error, text):
    with pytest.raises(error) as caught:
        search.AdaptiveSparseAttention(**changes)
    assert str(caught.value) == f"pyrx::search.AdaptiveSparseAttention: expected {text}"


def test_adaptive_step_error():
    with pytest.raises(ValueError, match=r"expected step in \[1, 2147483647\], got 0"):
        search.AdaptiveSparseAttention()(Q, K, K, 0)
