"""Packed sequences against a loop over them, and the ranges of keys that say where each sequence is."""

import math

import pytest
import torch
import torch.nn.functional as F
from edits import ROWS, normal
from helpers import expected_mask, name_of, need
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import pyrx
from pyrx import BlockMask
from pyrx.ops import block_sparse_attention_varlen as varlen
from pyrx.reference.block_sparse_attention_varlen import sequence_ranges

H, HKV, D = 4, 2, 12
# sequences of queries and keys: equal lengths, one empty, one of a single token, some longer than a block
EQUAL = ([70, 0, 1, 150, 33], None)
CROSS = ([70, 40, 0, 1, 133], [20, 0, 9, 130, 35])


@pytest.fixture
def backend(backend):
    return need(backend, ops=ROWS)


def packed(lengths, heads=HKV, dtype=torch.float64, grad=False):
    """(query, key, value, cu_seqlens_q, cu_seqlens_k) of (lengths of queries, of keys or None)."""
    queries, keys = sum(lengths[0]), sum(lengths[1] or lengths[0])
    return (
        normal(queries, H, D, dtype=dtype, seed=1, grad=grad),
        normal(keys, heads, D, dtype=dtype, seed=2, grad=grad),
        normal(keys, heads, D - 2, dtype=dtype, seed=3, grad=grad),
        starts(lengths[0]),
        None if lengths[1] is None else starts(lengths[1]),
    )


def starts(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def loop(query, key, value, cu_q, cu_k=None, key_mask=None, query_scale=None, **options):
    """Each sequence by itself: out, lse, entropy."""
    found = []
    cu_k = cu_q if cu_k is None else cu_k
    for (a, b), (c, d) in zip(
        zip(cu_q[:-1], cu_q[1:], strict=True), zip(cu_k[:-1], cu_k[1:], strict=True), strict=True
    ):
        found.append(
            pyrx.block_sparse_attention(
                query[a:b].transpose(0, 1)[None],
                key[c:d].transpose(0, 1)[None],
                value[c:d].transpose(0, 1)[None],
                key_mask=None if key_mask is None else key_mask[None, c:d],
                query_scale=None if query_scale is None else query_scale[a:b].t()[None],
                enable_gqa=True,
                return_lse=True,
                return_entropy=True,
                backend="reference",
                **options,
            )
        )
    return [torch.cat([each[0].transpose(0, 1) for each in part]) for part in zip(*found, strict=True)]


def close(got, expected, tolerance=1e-10):
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": 7},
    "left window, causal": {"window": (20, -1), "is_causal": True},
    "right window": {"window": (-1, 3)},
    "softcap and scale": {"softcap": 1.5, "scale": 0.7},
}


@pytest.mark.parametrize("lengths", [EQUAL, CROSS], ids=["equal", "cross"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_loop_over_the_sequences(backend, lengths, options):
    query, key, value, cu_q, cu_k = packed(lengths, grad=True)
    got = pyrx.block_sparse_attention_varlen(
        query, key, value, cu_q, cu_k, enable_gqa=True, return_lse=True, return_entropy=True, backend=backend, **options
    )
    expected = loop(query, key, value, cu_q, cu_k, **options)
    assert got[0].shape == (len(query), H, D - 2) and got[1].shape == got[2].shape == (len(query), H)
    for a, b in zip(got, expected, strict=True):
        close(a, b)
    upstream = [normal(*each.shape, seed=8) for each in expected]
    some = expected[1].isfinite()  # the log-sum-exp of a query without keys takes no gradient
    sums = [sum((a * u)[some].sum() for a, u in zip(each, upstream, strict=True)) for each in (got, expected)]
    for a, b in zip(*(torch.autograd.grad(each, (query, key, value)) for each in sums), strict=True):
        close(a, b)


def test_key_mask_and_query_scale(backend):
    query, key, value, cu_q, cu_k = packed(CROSS)
    key_mask = torch.rand(len(key), generator=torch.Generator().manual_seed(1)) > 0.3
    scale = normal(len(query), H, grad=True)
    options = {"key_mask": key_mask, "query_scale": scale}
    got = pyrx.block_sparse_attention_varlen(query, key, value, cu_q, cu_k, enable_gqa=True, backend=backend, **options)
    expected = loop(query, key, value, cu_q, cu_k, **options)[0]
    close(got, expected)
    upstream = normal(*got.shape)
    close(*(torch.autograd.grad(each, scale, upstream)[0] for each in (got, expected)))


def test_dropout_counts_in_the_packed_batch(backend):
    query, key, value, cu, _ = packed(EQUAL, H)
    tokens = len(query)
    got = pyrx.block_sparse_attention_varlen(
        query, key, value, cu, dropout_p=0.3, seed=5, is_causal=True, backend=backend
    )
    sequence = torch.searchsorted(cu, torch.arange(tokens), right=True)
    visible = (sequence[:, None] == sequence).tril()
    weights = torch.softmax(
        (query.transpose(0, 1) @ key.permute(1, 2, 0) * D**-0.5).masked_fill(~visible, -math.inf), -1
    )
    level = round(0.3 * 65536)
    weights = weights * expected_mask((1, H, tokens, tokens), 0.3, 5)[0] * 65536 / (65536 - level)
    close(got, (weights @ value.transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("block", [16, 64, (32, 128)], ids=name_of)
def test_a_mask_counts_within_its_sequence(backend, block):
    query, key, value, cu_q, cu_k = packed(CROSS, H)
    size = (block, block) if isinstance(block, int) else block
    queries, keys = len(query), len(key)
    blocks = (
        torch.rand(H, -(-queries // size[0]), -(-keys // size[1]), generator=torch.Generator().manual_seed(2)) < 0.6
    )
    ranges = torch.stack([torch.zeros(queries), torch.arange(queries) % 90], 1).int()[None]
    full = blocks.repeat_interleave(size[0], 1)[:, :queries].repeat_interleave(size[1], 2)[..., :keys]
    sequence_q = torch.searchsorted(cu_q, torch.arange(queries), right=True)
    sequence_k = torch.searchsorted(cu_k, torch.arange(keys), right=True)
    full = full & (sequence_q[:, None] == sequence_k)
    for key_range, visible in ((None, full), (ranges, full & (torch.arange(keys) < ranges[0, :, 1:]))):
        mask = BlockMask.from_dense(blocks, (queries, keys), block, key_range=key_range)
        got = pyrx.block_sparse_attention_varlen(query, key, value, cu_q, cu_k, mask, backend=backend)
        logits = (query.transpose(0, 1) @ key.permute(1, 2, 0) * D**-0.5).masked_fill(~visible, -math.inf)
        some = visible.any(-1, keepdim=True)
        weights = torch.where(some, torch.softmax(torch.where(some, logits, 0), -1), 0)
        close(got, (weights @ value.transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name_of)
def test_low_precision(backend, dtype):
    need(backend, "cpu", dtype, ROWS)
    query, key, value, cu, _ = packed(EQUAL, dtype=dtype)
    got = pyrx.block_sparse_attention_varlen(
        query, key, value, cu.long(), is_causal=True, enable_gqa=True, backend=backend
    )
    assert got.dtype == dtype and (backend == "reference" or got.is_contiguous())
    expected = loop(query.double(), key.double(), value.double(), cu, is_causal=True)[0]
    close(got, expected, {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype])


def test_strided_and_autocast(backend):
    query, key, value, cu, _ = packed(EQUAL, H, torch.float32)
    expected = pyrx.block_sparse_attention_varlen(query, key, value, cu, backend=backend)
    fused = torch.cat([query, key, value], -1)
    parts = fused[..., :D], fused[..., D : 2 * D], fused[..., 2 * D :]
    close(pyrx.block_sparse_attention_varlen(*parts, cu, backend=backend), expected, 1e-5)
    first = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in (query, key, value)]
    close(pyrx.block_sparse_attention_varlen(*first, cu, backend=backend), expected, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        got = pyrx.block_sparse_attention_varlen(query, key, value, cu, backend=backend)
    assert got.dtype == torch.bfloat16
    close(got, expected, 3e-2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(backend, dynamic):
    torch._dynamo.reset()
    run = torch.compile(pyrx.block_sparse_attention_varlen, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in (EQUAL, ([20, 300], None)):
        query, key, value, cu, _ = packed(lengths, grad=True)
        options = {"window": (40, 2), "enable_gqa": True, "backend": backend}
        got = run(query, key, value, cu, **options)
        expected = pyrx.block_sparse_attention_varlen(query, key, value, cu, **options)
        close(got, expected)
        upstream = normal(*got.shape)
        for a, b in zip(*(torch.autograd.grad(each, (query, key), upstream) for each in (got, expected)), strict=True):
            close(a, b)


def test_nothing_reads_the_lengths_on_the_host(backend):
    """A fake tensor has no values to read."""
    with FakeTensorMode() as mode:
        query, key, value, cu_q, cu_k = (mode.from_tensor(each) for each in packed(CROSS, H))
        out, lse = pyrx.block_sparse_attention_varlen(
            query, key, value, cu_q, cu_k, window=9, return_lse=True, backend=backend
        )
        assert out.shape == (len(query), H, D - 2) and lse.shape == (len(query), H)


def test_empty(backend):
    query, key, value, cu, _ = packed(([0, 0], None), H)
    assert pyrx.block_sparse_attention_varlen(query, key, value, cu, backend=backend).shape == (0, H, D - 2)
    none = torch.zeros(1, dtype=torch.int32)
    assert pyrx.block_sparse_attention_varlen(query, key, value, none, backend=backend).shape == (0, H, D - 2)
    query = normal(5, H, D)
    out = pyrx.block_sparse_attention_varlen(query, key, value, starts([5]), starts([0]), backend=backend)
    assert out.shape == (5, H, D - 2) and (out == 0).all()


# What the device makes of the lengths.


def brute_ranges(lengths_q, lengths_k, left, right):
    found = []
    for i, queries in enumerate(lengths_q):
        start = sum(lengths_k[:i])
        for position in range(queries):
            keys = [
                k
                for k in range(lengths_k[i])
                if (left < 0 or k >= position - left) and (right < 0 or k <= position + right)
            ]
            found.append((start + keys[0], start + keys[-1] + 1) if keys else (0, 0))
    return found


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
    st.integers(-1, 5),
    st.integers(-1, 5),
)
def test_ranges(lengths, left, right):
    lengths_q, lengths_k = zip(*lengths, strict=True)
    ranges = sequence_ranges(sum(lengths_q), sum(lengths_k), starts(lengths_q), starts(lengths_k), left, right)
    assert ranges.dtype == torch.int32
    assert [tuple(each) for each in ranges[0].tolist()] == brute_ranges(lengths_q, lengths_k, left, right)


@given(st.lists(st.integers(-50, 90), min_size=1, max_size=6), st.lists(st.integers(-50, 90), min_size=1, max_size=6))
def test_no_lengths_lead_out_of_bounds(cu_q, cu_k):
    count = min(len(cu_q), len(cu_k))
    ranges = sequence_ranges(40, 30, torch.tensor(cu_q[:count]), torch.tensor(cu_k[:count]), 3, 2**31 - 1)
    assert ranges.shape == (1, 40, 2) and (ranges >= 0).all() and (ranges <= 30).all()


def test_queries_outside_of_all_sequences_see_nothing():
    """Lengths that only a GPU has: it does not raise."""
    for cu, inside in (([0, 4], range(4)), ([2, 4], range(2, 4)), ([0], ())):
        ranges = sequence_ranges(7, 9, torch.tensor(cu), torch.tensor([0, 9][: len(cu)]), -1, -1)[0]
        assert ranges.tolist() == [[0, 9] if i in inside else [0, 0] for i in range(7)]


@given(st.lists(st.integers(0, 400), min_size=1, max_size=5), st.integers(-1, 200), st.integers(-1, 200))
def test_only_blocks_with_something_to_see_are_listed(lengths, left, right):
    seen = []
    tokens = sum(lengths)
    query, cu = torch.zeros(tokens, 1, 1), starts(lengths)
    given_mask = BlockMask.from_dense(torch.ones(2 * [-(-tokens // 64)], dtype=torch.bool), (tokens, tokens), 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "block_sparse_attention", lambda q, k, v, mask, **_: seen.append(mask) or q)
        for mask in (None, given_mask):
            pyrx.block_sparse_attention_varlen(query, query, query, cu, block_mask=mask, window=(left, right))
    k = torch.arange(tokens)
    ranges = sequence_ranges(tokens, tokens, cu, cu, left, right)[0]
    visible = ((k >= ranges[:, :1]) & (k < ranges[:, 1:])).float()
    for mask, size in zip(seen, (128, 64), strict=True):
        assert mask.block_size == (size, size)
        expected = F.max_pool2d(visible[None], size, ceil_mode=True) if tokens else visible[None]
        assert torch.equal(mask.to_dense()[0], expected > 0)


# Errors.

QUERY, KEY, VALUE, CU, _ = packed(([3, 4], None), H)
BAD = [
    ({"query": QUERY[None]}, "expected query of shape [T, H, D], got [1, 7, 4, 12]"),
    ({"query": QUERY.int()}, "expected query of dtype float16, bfloat16, float32 or float64, got torch.int32"),
    ({"value": VALUE[:6]}, "expected value of shape [Tk, Hkv, Dv] = [7, 4, 10], got [6, 4, 10]"),
    ({"cu_seqlens_q": CU.float()}, "expected cu_seqlens_q of dtype int32 or int64, got torch.float32"),
    ({"cu_seqlens_q": CU[None]}, "expected cu_seqlens_q of shape [N + 1], got [1, 3]"),
    ({"cu_seqlens_q": CU[:0]}, "expected cu_seqlens_q of shape [N + 1], got [0]"),
    ({"cu_seqlens_q": CU.tolist()}, "expected cu_seqlens_q to be a Tensor, got list"),
    ({"cu_seqlens_q": CU + 1}, "expected cu_seqlens_q to rise from 0 to the 7 tokens, got [1, 4, 8]"),
    ({"cu_seqlens_q": CU[:2]}, "expected cu_seqlens_q to rise from 0 to the 7 tokens, got [0, 3]"),
    ({"cu_seqlens_q": torch.tensor([0, 5, 3, 7])},
     "expected cu_seqlens_q to rise from 0 to the 7 tokens, got [0, 5, 3, 7]"),
    ({"cu_seqlens_k": CU[[0, 2]]}, "expected cu_seqlens_k of cu_seqlens_q's shape [3], got [2]"),
    ({"cu_seqlens_k": CU.to("meta")}, "expected cu_seqlens_k on device cpu, got meta"),
    ({"key": KEY[:5], "value": VALUE[:5]}, "expected cu_seqlens_k for 5 keys beside 7 queries, got None"),
    ({"key_mask": torch.ones(6, dtype=torch.bool)}, "expected key_mask of shape [Tk] = [7], got [6]"),
    ({"query_scale": torch.ones(4, 7)}, "expected query_scale of shape [Tq, H] = [7, 4], got [4, 7]"),
    ({"window": "wide"}, "expected window to be an int or a pair (left, right), got 'wide'"),
    ({"block_mask": torch.ones(1)}, "expected block_mask to be a pyrx.BlockMask, got Tensor"),
    ({"block_mask": BlockMask.from_dense(torch.ones(1, 1, dtype=torch.bool), (8, 7))},
     "expected block_mask for the lengths (Tq, Tk) = [7, 7], got [8, 7]"),
]  # fmt: skip


@pytest.mark.parametrize("changes, text", BAD)
def test_errors(backend, changes, text):
    arguments = {"query": QUERY, "key": KEY, "value": VALUE, "cu_seqlens_q": CU, "backend": backend} | changes
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        pyrx.block_sparse_attention_varlen(**arguments)
    assert str(caught.value) == f"pyrx::block_sparse_attention_varlen: {text}"


def test_there_is_no_bias():
    with pytest.raises(TypeError, match="block_sparse_attention_varlen.*'bias'"):
        pyrx.block_sparse_attention_varlen(QUERY, KEY, VALUE, CU, bias=torch.zeros(1, 1, 7, 7))
