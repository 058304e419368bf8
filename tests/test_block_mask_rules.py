"""The rule of elements that masks bring into attention: exact against scaled_dot_product_attention of every pair."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from edits import ROWS
from helpers import CPU_BACKENDS, assert_within_budget, name_of, need
from masks import assert_lists, covered, elements_of, random_blocks, same_mask
from triton_helpers import INTERPRETED, values_in_the_interpreter

import pyrx
from pyrx import BlockMask

SIZE = (32, 16)
# (Sq, Sk): that blocks divide and do not, fewer and more queries than keys
LENGTHS = ((64, 64), (101, 101), (1, 77), (150, 97), (70, 133))
WINDOWS = ((-1, 0), (0, 0), (40, 0), (13, 5), (-1, 20), (30, -1), (0, 1000))
each_lengths = pytest.mark.parametrize("lengths", LENGTHS, ids=name_of)


@pytest.fixture(params=["triton"] if INTERPRETED else CPU_BACKENDS)
def backend(request):
    return need(request.param, ops=ROWS)


test_values_in_the_interpreter = values_in_the_interpreter(__file__, 60)


def near(lengths, left, right):
    """bool (Sq, Sk): the keys of a window, counted from the first of both."""
    q, k = torch.arange(lengths[0])[:, None], torch.arange(lengths[1])
    return ((left < 0) | (q - k <= left)) & ((right < 0) | (k - q <= right))


def same_document(lengths):
    """bool (S, S)."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return document[:, None] == document


def windows(lengths, size=SIZE):
    """(name, mask, bool (Sq, Sk) of what it lets be seen)."""
    yield "causal", BlockMask.causal(lengths, size), near(lengths, -1, 0)
    for window in WINDOWS:
        yield f"window {window}", BlockMask.sliding_window(lengths, window, size), near(lengths, *window)
    mask = BlockMask.sliding_window(lengths, 21, size, is_causal=True)
    yield "causal window", mask, near(lengths, 21, 0)


NAMES = [name for name, *_ in windows((64, 64))]


def expected_of(query, key, value, seen, upstream):
    """out and gradients of float64 copies; 0 for a query that sees nothing."""
    leaves = [each.detach().double().requires_grad_() for each in (query, key, value)]
    blind = ~seen.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(*leaves, attn_mask=seen | blind) * ~blind
    return out.detach(), torch.autograd.grad(out, leaves, upstream.double())


def assert_attends(mask, seen, backend, dtype=torch.float32, heads=2, batch=2, **options):
    """Attention under the mask, forward and backward, is that of the pairs `seen`, which broadcast to (.., Sq, Sk)."""
    lengths = mask.seq_lengths
    query, key, value = (torch.randn(batch, heads, each, 16, dtype=dtype) for each in (lengths[0], *2 * lengths[1:]))
    upstream = torch.randn_like(query)
    seen = seen.expand(batch, heads, *lengths)
    leaves = [each.requires_grad_() for each in (query, key, value)]
    out = pyrx.block_sparse_attention(*leaves, mask, backend=backend, **options)
    found = torch.autograd.grad(out, leaves, upstream)
    exact, gradients = expected_of(query, key, value, seen, upstream)
    blind = ~seen.any(-1, keepdim=True)
    own = [each.detach().requires_grad_() for each in (query, key, value)]
    plain = F.scaled_dot_product_attention(*own, attn_mask=seen | blind) * ~blind
    plain_gradients = torch.autograd.grad(plain, own, upstream)
    for name, got, pytorch, right in zip(
        ("out", "query", "key", "value"),
        (out.detach(), *found),
        (plain.detach(), *plain_gradients),
        (exact, *gradients),
        strict=True,
    ):
        assert_within_budget(got, pytorch, right, name, floor=1.0)


# What the masks list, and what they let be seen.


@each_lengths
@pytest.mark.parametrize("size", [(16, 16), (64, 16), (16, 128)], ids=name_of)
def test_lists_and_elements(lengths, size):
    for name, mask, seen in windows(lengths, size):
        assert_lists(mask)
        assert torch.equal(elements_of(mask)[0, 0], seen), name
        assert torch.equal(mask.to_dense()[0, 0], covered(seen, size)), name
        assert mask.key_range is None


@each_lengths
@pytest.mark.parametrize("name", NAMES)
def test_attention_is_exact(backend, name, lengths):
    _, mask, seen = next(each for each in windows(lengths) if each[0] == name)
    assert_attends(mask, seen, backend)


@pytest.mark.parametrize("name", ["causal", "window (13, 5)", "causal window"])
@pytest.mark.parametrize("size", [(16, 32), (64, 64), (128, 128)], ids=name_of)
def test_other_blocks_and_float64(backend, name, size):
    _, mask, seen = next(each for each in windows((190, 190), size) if each[0] == name)
    assert_attends(mask, seen, backend, batch=1, dtype=torch.float32 if backend == "triton" else torch.float64)


def test_no_query_hears_of_later_keys(backend):
    """A later token changes no bit of what came before it."""
    query, key, value = (torch.randn(1, 2, 150, 16) for _ in range(3))
    mask = BlockMask.causal(150, SIZE)
    before = pyrx.block_sparse_attention(query, key, value, mask, backend=backend)
    for token in (0, 1, 31, 32, 100, 149):
        changed = [each.index_add(2, torch.tensor([token]), torch.ones(1, 2, 1, 16)) for each in (key, value)]
        after = pyrx.block_sparse_attention(query, *changed, mask, backend=backend)
        assert torch.equal(after[:, :, :token], before[:, :, :token])
        assert not torch.equal(after[:, :, token], before[:, :, token])


@pytest.mark.parametrize("is_causal, window", [(True, None), (False, (40, 7)), (True, 25), (False, None)], ids=str)
def test_it_is_the_rule_of_the_arguments(backend, is_causal, window):
    """The same bits as is_causal= and window= over whole blocks, and as both together."""
    query, key, value = (torch.randn(2, 2, 150, 16) for _ in range(3))
    mask = BlockMask.sliding_window(150, window, SIZE, is_causal=is_causal)
    options = {"is_causal": is_causal, "window": window, "dropout_p": 0.2, "seed": 3, "backend": backend}
    options |= {"return_lse": True, "return_entropy": True}
    expected = pyrx.block_sparse_attention(query, key, value, mask.whole(), **options)
    for more in ({}, {"is_causal": False, "window": None}):
        got = pyrx.block_sparse_attention(query, key, value, mask, **options | more)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_mask_and_arguments_meet(backend):
    mask = BlockMask.sliding_window(150, (60, 9), SIZE)
    assert_attends(mask, near((150, 150), 60, 0), backend, is_causal=True)
    assert_attends(mask, near((150, 150), 20, 9), backend, window=(20, 30))
    assert_attends(mask, near((150, 150), 60, 4), backend, window=(-1, 4))


# Combinations.


def combinations():
    """(name, mask, bool elements that broadcast to (B, H, S, S))."""
    length = 170
    causal, lengths = BlockMask.causal(length, SIZE), [40, 1, 100, 29]
    own = same_document(lengths)
    documents = BlockMask.document(lengths, SIZE)
    each = torch.tensor([[40, 130], [101, 69]])
    batch = torch.stack([same_document(row.tolist()) for row in each])[:, None]
    blocks = random_blocks(2, 2, *causal.shape[2:])
    dense = BlockMask.from_dense(blocks, length, SIZE)
    elements = elements_of(dense)
    past = near((length, length), -1, 0)
    window = BlockMask.sliding_window(length, (30, 4), SIZE)
    tokens = BlockMask.global_tokens(5, length, SIZE)
    long = window.whole() | tokens
    yield "causal and documents", causal & documents, past & own
    yield "documents and causal", documents & causal, past & own
    yield "causal, documents of a batch", causal & BlockMask.document(each, SIZE), past & batch
    yield "causal and blocks", dense & causal, past & elements
    yield "window and causal", window & causal, near((length, length), 30, 0)
    other = BlockMask.sliding_window(length, (9, 50), SIZE)
    yield "windows", window & other, near((length, length), 9, 4)
    yield "everything", documents & window & dense & causal, own & near((length, length), 30, 0) & elements
    yield "by blocks", long, elements_of(window.whole()) | elements_of(tokens)
    yield "by blocks, then causal", long & causal, past & (elements_of(window.whole()) | elements_of(tokens))
    yield (
        "strided, causal",
        BlockMask.strided(length, 2, SIZE) & causal,
        past & elements_of(BlockMask.strided(length, 2, SIZE)),
    )
    no = BlockMask.from_dense(random_blocks(2, 1, *causal.shape[2:]), length, SIZE)
    yield "or of one window", (dense & causal) | (no & causal), past & (elements | elements_of(no))
    yield "not", ~dense & causal, past & ~elements
    yield "heads", causal.keep_heads(torch.tensor([True, False])), past & torch.tensor([True, False])[:, None, None]


COMBINED = [name for name, *_ in combinations()]


@pytest.mark.parametrize("name", COMBINED)
def test_combinations_are_exact(backend, name):
    mask, seen = next(each[1:] for each in combinations() if each[0] == name)
    assert_lists(mask)
    assert (elements_of(mask) == seen).all()
    assert_attends(mask, seen, backend)


def test_what_no_range_expresses_is_refused():
    causal, window = BlockMask.causal(100, 16), BlockMask.sliding_window(100, 20, 16)
    tokens, documents = BlockMask.global_tokens(3, 100, 16), BlockMask.document([40, 60], 16)
    for a, b in ((causal, window), (window, tokens), (tokens, window), (causal, causal & window)):
        with pytest.raises(ValueError, match=r"BlockMask \|: expected other of the same window .*whole\(\).*, got \("):
            a | b
    for combine in (lambda: causal | documents, lambda: documents | causal, lambda: ~(documents & causal)):
        with pytest.raises(ValueError, match=r"expected masks without a key_range .*whole\(\)"):
            combine()
    with pytest.raises(ValueError, match=r"BlockMask ~: expected mask without a window .*whole\(\).*, got \(-1, 0\)"):
        causal.__invert__()
    same_mask(window | window, window)
    whole = documents.whole() | causal.whole()
    assert whole.window == (-1, -1) and whole.key_range is None
    assert torch.equal((~causal.whole()).to_dense(), ~causal.to_dense())
    # a window without limits is no rule
    every = BlockMask.sliding_window(100, -1, 16)
    assert (every | tokens).density() == 1 and (~every).density() == 0


def test_whole_keeps_the_blocks_alone(backend):
    for _, mask, _ in combinations():
        whole = mask.whole()
        assert torch.equal(whole.to_dense(), mask.to_dense()) and whole.density() == mask.density()
        assert whole.shape == mask.shape and (whole.window, whole.key_range) == ((-1, -1), None)
    assert_attends(BlockMask.causal(90, SIZE).whole(), elements_of(BlockMask.causal(90, SIZE).whole()), backend)


# Where masks go.


@pytest.mark.parametrize("name", COMBINED)
def test_copies_and_flex(name):
    mask, seen = next(each[1:] for each in combinations() if each[0] == name)
    for other in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), mask.to("cpu")):
        same_mask(other, mask)
    assert mask.to("meta").window == mask.window
    assert (f"window={mask.window}" in repr(mask)) == (mask.window != (-1, -1))
    flex = mask.to_flex()
    full = BlockMask.from_lists(flex.full_kv_num_blocks, flex.full_kv_indices, mask.seq_lengths, mask.block_size)
    seen = seen.expand(*torch.broadcast_shapes(seen.shape[:-2], mask.shape[:2]), *seen.shape[-2:])
    inside = torch.tensor([[i * 32 + 32 <= 170 and j * 16 + 16 <= 170 for j in range(11)] for i in range(6)])
    every = inside & ~covered(~seen, SIZE)  # blocks without a hidden pair
    expected = every if mask.key_range is None else torch.zeros_like(every)
    assert torch.equal(full.to_dense(), expected.expand(full.shape))


@pytest.mark.parametrize("size", [(16, 16), (64, 16), (16, 32)], ids=name_of)
@pytest.mark.parametrize("window", [(-1, 0), (15, 15), (31, 47), (79, 16), (80, 14), (30, -1), (-1, -1)], ids=str)
def test_full_blocks_of_flex_are_those_that_hide_nothing(window, size):
    """Edges of windows on edges of blocks, and beside them."""
    mask = BlockMask.sliding_window((192, 128), window, size)
    flex = mask.to_flex()
    full = BlockMask.from_lists(flex.full_kv_num_blocks, flex.full_kv_indices, mask.seq_lengths, size)
    assert torch.equal(full.to_dense()[0, 0], ~covered(~near((192, 128), *window), size))


def test_flex_of_windows_that_fit_no_int32():
    mask = BlockMask.sliding_window(70, (2**31 - 1, 2**31 - 1), 16)
    rule = mask.to_flex().mask_mod
    one = torch.tensor(0, dtype=torch.int32)
    assert all(rule(one, one, one + q, one + k) for q in (0, 69) for k in (0, 69))


def test_other_attentions_keep_to_it(backend):
    """reversed_attention, head_dropout_attention, packed sequences, the module and replace_attention."""
    query, key, value = (torch.randn(2, 2, 90, 16) for _ in range(3))
    mask, seen = BlockMask.causal(90, SIZE), near((90, 90), -1, 0)
    weights = torch.softmax((query @ key.mT / 4).masked_fill(~seen, -torch.inf), -1)
    close = {"rtol": 1e-4, "atol": 1e-5}
    got = pyrx.reversed_attention(query, key, value, mask, backend=backend)
    torch.testing.assert_close(got, weights.mT @ value, **close)
    got = pyrx.token_importance(query, key, mask, backend=backend)
    torch.testing.assert_close(got, weights.mean((1, 2)), **close)
    got = pyrx.head_dropout_attention(query, key, value, mask, head_dropout_p=0.5, seed=1, backend=backend)
    kept = pyrx.dropout_mask((2, 2), 0.5, 1, sample=1)
    factor = torch.where(kept, 2 / kept.sum(1, keepdim=True).clamp(min=1), 0)[..., None, None]
    torch.testing.assert_close(got, weights @ value * factor, **close)
    with pyrx.nn.replace_attention(mask, backend=backend):
        got = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(got, weights @ value, **close)
    packed = [each[0].transpose(0, 1) for each in (query, key, value)]
    starts = torch.tensor([0, 50, 90])
    got = pyrx.block_sparse_attention_varlen(*packed, starts, None, mask, backend=backend)
    expected = pyrx.block_sparse_attention_varlen(*packed, starts, is_causal=True, backend=backend)
    torch.testing.assert_close(got, expected, **close)
    module, x = pyrx.nn.BlockSparseAttention(32, 2, mask, backend=backend), torch.randn(1, 90, 32)
    own = pyrx.nn.BlockSparseAttention(32, 2, is_causal=True, backend=backend)
    own.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), own(x), **close)
    assert module.to(torch.float64).block_mask.window == (-1, 0)


@pytest.mark.skipif(INTERPRETED, reason="nothing of Triton's")
def test_compiled(fresh_dynamo):
    def attend(query, documents):
        mask = BlockMask.causal(query.shape[2], 32) & documents
        out = pyrx.block_sparse_attention(query, query, query, mask, backend="reference")
        return out, mask, pyrx.block_sparse_attention(query, query, query, documents.whole(), backend="reference")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for tokens in (100, 150, 200):  # the second and third with dynamic shapes
        query = torch.randn(1, 2, tokens, 16)
        documents = BlockMask.document([tokens - 30, 30], 32) & BlockMask.sliding_window(tokens, 50, 32)
        (got, got_mask, whole), (expected, mask, expected_whole) = (f(query, documents) for f in (compiled, attend))
        same_mask(got_mask, mask)
        assert mask.window == (50, 0)
        torch.testing.assert_close((got, whole), (expected, expected_whole))
    with pytest.raises(Exception, match="of the same window"):
        torch.compile(lambda: BlockMask.causal(64) | BlockMask.global_tokens(1, 64), backend="aot_eager")()
