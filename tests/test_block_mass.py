"""block_mass and block_recall: the reference against loops and softmax, every backend against the reference."""

import math

import pytest
import torch
from helpers import FLOATS, assert_same_bits, assert_within_budget, layouts, name_of, need, threads
from torch._subclasses.fake_tensor import FakeTensorMode

from pyrx import _library
from pyrx._attention import Logits
from pyrx._checks import accumulation_dtype
from pyrx.ops.block_mass import block_mass, block_recall

ROW = "block_mass"
BLOCK_SIZES = (16, 32, 64, 128)
# of (B, H, Hkv, Sq, Sk, D): several blocks, none of them whole
SHAPE = (2, 4, 2, 150, 210, 24)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return need(request.param, ops=(ROW,))


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain(size, **changes):
    return Logits(-1, -1, None, None, None, None, None, size**-0.5, 0.0)._replace(**changes)


def ranges(batch, queries, keys, seed=3):
    """Some empty, some past the ends."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(-3, keys + 1, (batch, queries), generator=generator)
    length = torch.randint(-2, keys, (batch, queries), generator=generator)
    return torch.stack([first, first + length], -1).int()


def feature(name, shape=SHAPE, dtype=torch.float64):
    batch, heads, _, queries, keys, size = shape
    wide, narrow = (7, 30) if keys == 210 else (1, keys)
    high = accumulation_dtype(dtype)
    visible = torch.rand(batch, keys, generator=torch.Generator().manual_seed(5)) < 0.7
    stripes = (torch.arange(keys) // 70 % 2 == 0).expand(batch, keys)
    bias = normal(batch, heads, queries, keys, seed=8, dtype=dtype)
    row, column = normal(batch, 1, queries, keys // wide, seed=9), normal(1, heads, queries, wide, seed=10)
    few = normal(1, 1, queries, keys // narrow, seed=11), normal(batch, heads, queries, narrow, seed=12)
    changes = {
        "none": {},
        "causal": {"right": 0},
        "window": {"left": 20, "right": 40},
        "window of itself": {"left": 0, "right": 0},
        "negative scale": {"scale": -0.3},
        "zero scale": {"scale": 0.0},
        "key_range": {"key_range": ranges(batch, queries, keys)},
        "shared key_range": {"key_range": ranges(1, queries, keys), "left": 60},
        "key_mask": {"key_mask": visible},
        "key_mask of blocks": {"key_mask": stripes, "right": 5},
        "nothing visible": {"key_mask": torch.zeros(batch, keys, dtype=torch.bool)},
        "query_scale": {"query_scale": normal(batch, heads, queries, seed=7, dtype=high)},
        "softcap": {"softcap": 0.8},
        "softcap and bias": {"softcap": 1.5, "row_bias": bias, "right": 0},
        "bias": {"row_bias": bias},
        "bias of -inf": {"row_bias": torch.where(bias > 0.5, -math.inf, bias)},
        "shared bias": {"row_bias": bias[:1, :1], "left": 100},
        "bias of heads": {"row_bias": bias[:1]},
        "separable bias": {"row_bias": row.to(dtype), "column_bias": column.to(dtype), "key_mask": visible},
        "separable bias, few rows": {"row_bias": few[0].to(dtype), "column_bias": few[1].to(dtype)},
        "everything": {
            "left": 90,
            "right": 30,
            "key_range": ranges(batch, queries, keys),
            "key_mask": visible,
            "query_scale": normal(batch, heads, queries, seed=7, dtype=high),
            "row_bias": row.to(dtype),
            "column_bias": column.to(dtype),
            "softcap": 2.0,
        },
    }
    return plain(size, **changes[name])


FEATURES = (
    "none",
    "causal",
    "window",
    "window of itself",
    "negative scale",
    "zero scale",
    "key_range",
    "shared key_range",
    "key_mask",
    "key_mask of blocks",
    "nothing visible",
    "query_scale",
    "softcap",
    "softcap and bias",
    "bias",
    "bias of -inf",
    "shared bias",
    "bias of heads",
    "separable bias",
    "separable bias, few rows",
    "everything",
)


def operands(shape=SHAPE, dtype=torch.float64, spread=1.0):
    batch, heads, kv_heads, queries, keys, size = shape
    query, key = normal(batch, heads, queries, size, seed=1), normal(batch, kv_heads, keys, size, seed=2)
    return (query * spread).to(dtype), key.to(dtype)


def blocks_of(shape, block_size, kept=0.4, lead=(1, 1), seed=4):
    count = [-(-length // size) for length, size in zip(shape[3:5], block_size, strict=True)]
    return torch.rand(*lead, *count, generator=torch.Generator().manual_seed(seed)) < kept


def explicit(query, key, logits):
    """(B, H, Sq, Sk) logits in float64, minus infinity where hidden, one feature after another and without pyrx."""
    query, key = query.double(), key.double()
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    group = heads // key.shape[1]
    found = torch.empty(batch, heads, queries, keys, dtype=torch.float64)
    for h in range(heads):
        found[:, h] = logits.scale * torch.einsum("bqd,bkd->bqk", query[:, h], key[:, h // group])
    if logits.query_scale is not None:
        found *= logits.query_scale.double().unsqueeze(3)
    if logits.softcap:
        found = logits.softcap * torch.tanh(found / logits.softcap)
    if logits.row_bias is not None:
        row, columns = logits.row_bias.double(), 1
        if logits.column_bias is not None:
            columns = logits.column_bias.shape[3]
            found += logits.column_bias.double().repeat(1, 1, 1, keys // columns)
        found += row.repeat_interleave(columns, 3)
    for q in range(queries):
        for b in range(batch):
            low, high = 0, keys
            if logits.left >= 0:
                low = max(low, q - logits.left)
            if logits.right >= 0:
                high = min(high, q + logits.right + 1)
            if logits.key_range is not None:
                first, last = logits.key_range[min(b, len(logits.key_range) - 1), q].tolist()
                low, high = max(low, first), min(high, last)
            found[b, :, q, : max(low, 0)] = -math.inf
            found[b, :, q, max(high, 0) :] = -math.inf
    if logits.key_mask is not None:
        found.masked_fill_(~logits.key_mask[:, None, None, :], -math.inf)
    return found


def sums(weights, q_block, k_block):
    """The sums over blocks, one block after another."""
    rows = [each.sum(-2) for each in weights.split(q_block, -2)]
    return torch.stack([torch.stack([each.sum(-1) for each in row.split(k_block, -1)], -1) for row in rows], -2)


def lse_of(query, key, logits):
    """In the dtype that block_mass takes."""
    return explicit(query, key, logits).logsumexp(-1).to(accumulation_dtype(query.dtype))


def double(logits):
    return Logits(
        *(each.double() if isinstance(each, torch.Tensor) and each.is_floating_point() else each for each in logits)
    )


def assert_mass(backend, query, key, logits, block_size, what="", device="cpu"):
    """W within the budget, against the definition in float64 and PyTorch in the operands' dtype."""
    lse = lse_of(query, key, logits)
    exact = block_mass(query.double(), key.double(), lse.double(), block_size, double(logits), "reference")
    plainly = block_mass(query, key, lse, block_size, logits, "reference")
    moved = [each.to(device) if isinstance(each, torch.Tensor) else each for each in (query, key, lse, *logits)]
    got = block_mass(*moved[:3], block_size, Logits(*moved[3:]), backend).cpu()
    assert_within_budget(got, plainly, exact, f"mass {what}")
    seen = (lse != -math.inf).double()
    seen = torch.nn.functional.pad(seen, (0, -seen.shape[-1] % block_size[0])).unflatten(-1, (-1, block_size[0]))
    torch.testing.assert_close(got.double().sum(-1), seen.sum(-1), rtol=3e-5, atol=3e-5)


def assert_recall(backend, query, key, logits, blocks, block_size, what="", device="cpu"):
    exact = block_recall(query.double(), key.double(), blocks, block_size, double(logits), "reference")
    plainly = block_recall(query, key, blocks, block_size, logits, "reference")
    moved = [each.to(device) if isinstance(each, torch.Tensor) else each for each in (query, key, blocks, *logits)]
    got = block_recall(*moved[:3], block_size, Logits(*moved[3:]), backend).cpu()
    assert_within_budget(got, plainly, exact, f"recall {what}")


# Values.


@pytest.mark.parametrize("name", FEATURES)
def test_equals_loops_and_softmax(backend, name):
    logits, block_size = feature(name), (32, 64)
    query, key = operands()
    plainly = explicit(query, key, logits)
    lse = plainly.logsumexp(-1)
    weights = torch.where(plainly == -math.inf, 0, torch.exp(plainly - lse[..., None]))
    got = block_mass(query, key, lse, block_size, logits, backend)
    torch.testing.assert_close(got, sums(weights, *block_size), rtol=1e-11, atol=1e-13)
    seen = (lse != -math.inf).double()
    torch.testing.assert_close(got.sum(-1), sums(seen[..., None], 32, 1)[..., 0], rtol=1e-11, atol=1e-13)

    for lead in ((1, 1), (2, 1), (1, 4), (2, 4)):
        blocks = blocks_of(SHAPE, block_size, lead=lead)
        kept = blocks.repeat_interleave(32, 2)[:, :, :150].repeat_interleave(64, 3)[..., :210]
        expected = torch.where(lse == -math.inf, 1, torch.where(kept, weights, 0).sum(-1))
        got = block_recall(query, key, blocks, block_size, logits, backend)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_features_within_budget(backend, name, dtype):
    query, key = operands(dtype=dtype)
    logits = feature(name, dtype=dtype)
    for block_size in ((64, 64), (16, 128)):
        assert_mass(backend, query, key, logits, block_size, f"{name} {block_size}")
        blocks = blocks_of(SHAPE, block_size, lead=(2, 4))
        assert_recall(backend, query, key, logits, blocks, block_size, f"{name} {block_size}")


@pytest.mark.parametrize("q_block", BLOCK_SIZES)
@pytest.mark.parametrize("k_block", BLOCK_SIZES)
def test_block_sizes(backend, q_block, k_block):
    block_size = (q_block, k_block)
    for dtype in (torch.float32, torch.bfloat16):
        for queries, keys in ((257, 300), (256, 384)):
            shape = (1, 2, 1, queries, keys, 32)
            query, key = operands(shape, dtype)
            for logits in (plain(32), plain(32, right=0)):
                assert_mass(backend, query, key, logits, block_size, block_size)
                assert_recall(backend, query, key, logits, blocks_of(shape, block_size), block_size, block_size)


@pytest.mark.parametrize(
    "queries, keys", [(1, 1), (1, 63), (3, 100), (63, 3), (16, 80), (100, 1311), (1311, 17), (128, 128)]
)
def test_lengths(backend, queries, keys):
    for size, dtype in ((16, torch.float32), (33, torch.bfloat16), (64, torch.float16), (8, torch.float64)):
        shape = (1, 2, 2, queries, keys, size)
        query, key = operands(shape, dtype)
        for logits in (plain(size), plain(size, left=50, right=10)):
            for block_size in ((32, 32), (16, 64)):
                assert_mass(backend, query, key, logits, block_size, shape)
            assert_recall(backend, query, key, logits, blocks_of(shape, (128, 64)), (128, 64), shape)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 63, 80, 100, 128, 255, 256])
def test_head_sizes(backend, size):
    for dtype in FLOATS:
        shape = (1, 3, 1, 70, 133, size)
        query, key = operands(shape, dtype)
        assert_mass(backend, query, key, plain(size, softcap=3.0), (64, 64), shape)
        assert_mass(backend, query, key, plain(size), (64, 64), shape)
        assert_recall(backend, query, key, plain(size), blocks_of(shape, (64, 64)), (64, 64), shape)


def test_recall_of_every_block_and_of_none(backend):
    query, key = operands(dtype=torch.float32)
    blocks = blocks_of(SHAPE, (64, 64), 1.1)
    for name in ("none", "key_range", "nothing visible"):
        logits = feature(name, dtype=torch.float32)
        empty = lse_of(query, key, logits) == -math.inf
        got = block_recall(query, key, blocks, (64, 64), logits, backend)
        torch.testing.assert_close(got, torch.ones(2, 4, 150), rtol=0, atol=1e-6)
        got = block_recall(query, key, ~blocks, (64, 64), logits, backend)
        assert torch.equal(got, empty.float())


def test_recall_is_the_share_of_mass(backend):
    """One query a block: W is the attention of a query over the blocks."""
    shape = (2, 2, 2, 5, 400, 16)
    query, key = operands(shape, torch.float32, spread=3.0)
    logits, blocks = plain(16, right=390), blocks_of(shape, (16, 16), lead=(2, 2))
    for q in range(5):
        one = query[:, :, q : q + 1]
        own = logits._replace(right=390 + q)
        mass = block_mass(one, key, lse_of(one, key, own), (16, 16), own, backend)
        expected = (mass * blocks).sum(-1)
        got = block_recall(query, key, blocks, (16, 16), logits, backend)[:, :, q : q + 1]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_log_sum_exp_of_another_step(backend):
    """W is of exp(logit - lse) whatever the lse is of: each row is scaled by what it changed."""
    query, key = operands(dtype=torch.float32)
    logits = feature("causal", dtype=torch.float32)
    lse = lse_of(query, key, logits)
    expected = block_mass(query, key, lse, (16, 32), logits, backend)
    for shift in (-3.0, 5.0):
        got = block_mass(query, key, lse + shift, (16, 32), logits, backend)
        torch.testing.assert_close(got, expected * math.exp(-shift), rtol=1e-5, atol=1e-6)
    # rows that it holds for unseen count nothing, whatever they see now
    lse[:, :, 16:32] = -math.inf
    got = block_mass(query, key, lse, (16, 32), logits, backend)
    assert not got[:, :, 1].any()
    expected[:, :, 1] = 0
    assert_same_bits(got, expected)


def test_ranges_far_outside(backend):
    """Of the largest and least int32, whose sums and roundings overflow."""
    query, key = operands((1, 2, 2, 20, 200, 16), torch.float32)
    blocks, large = torch.ones(1, 1, 1, 4, dtype=torch.bool), 2**31 - 1
    for first, last in ((large, large), (large, -large - 1), (large - 60, large), (-large - 1, large)):
        key_range = torch.tensor([first, last], dtype=torch.int32).expand(1, 20, 2)
        mass = block_mass(query, key, torch.zeros(1, 2, 20), (64, 64), plain(16, key_range=key_range), backend)
        recall = block_recall(query, key, blocks, (64, 64), plain(16, key_range=key_range), backend)
        assert (mass > 0).all() if first < 0 else not mass.any()
        torch.testing.assert_close(recall, torch.ones_like(recall))


def test_large_logits(backend):
    query, key = operands(dtype=torch.float32, spread=3000.0)
    for sign in (1, -1):
        logits = plain(24, scale=sign * 0.2, right=20)
        lse = lse_of(query, key, logits)
        for each in (
            block_mass(query, key, lse, (64, 64), logits, backend),
            block_recall(query, key, blocks_of(SHAPE, (64, 64)), (64, 64), logits, backend),
        ):
            assert each.isfinite().all()
        assert_recall(backend, query, key, logits, blocks_of(SHAPE, (64, 64)), (64, 64))
    # an lse far off overflows to infinity, or counts nothing; never NaN
    got = block_mass(query, key, torch.full((2, 4, 150), -1e30), (64, 64), plain(24), backend)
    assert (got[..., :-1] == math.inf).all()
    got = block_mass(query, key, torch.full((2, 4, 150), math.inf), (64, 64), plain(24), backend)
    assert (got == 0).all()


def test_recall_of_logits_far_below_zero(backend):
    query, key = operands()
    blocks, below = blocks_of(SHAPE, (64, 64)), torch.full((1, 1, 150, 210), -5000.0, dtype=torch.float64)
    found, expected = (
        block_recall(query, key, blocks, (64, 64), logits, backend) for logits in (plain(24, row_bias=below), plain(24))
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_nan_stays_in_its_query(backend):
    query, key = operands(dtype=torch.float32)
    lse = lse_of(query, key, plain(24))
    expected = block_mass(query, key, lse, (16, 16), plain(24), backend)
    recall = block_recall(query, key, blocks_of(SHAPE, (16, 16)), (16, 16), plain(24), backend)
    query[1, 2, 40] = math.nan
    got = block_mass(query, key, lse, (16, 16), plain(24), backend)
    assert got[1, 2, 2].isnan().all()
    got[1, 2, 2] = expected[1, 2, 2]
    assert_same_bits(got, expected)
    got = block_recall(query, key, blocks_of(SHAPE, (16, 16)), (16, 16), plain(24), backend)
    assert got[1, 2, 40].isnan()
    got[1, 2, 40] = recall[1, 2, 40]
    assert_same_bits(got, recall)


@pytest.mark.parametrize(
    "shape",
    [(0, 2, 2, 5, 6, 4), (2, 0, 0, 5, 6, 4), (2, 4, 2, 0, 6, 4), (2, 4, 2, 5, 0, 4), (1, 1, 1, 0, 0, 4)],
    ids=name_of,
)
def test_empty(backend, shape):
    batch, heads, _, queries, keys, size = shape
    for dtype in (torch.float32, torch.bfloat16):
        query, key = operands(shape, dtype)
        lse = torch.full((batch, heads, queries), -math.inf)
        got = block_mass(query, key, lse, (16, 32), plain(size), backend)
        assert got.shape == (batch, heads, -(-queries // 16), -(-keys // 32)) and not got.any()
        got = block_recall(query, key, blocks_of(shape, (16, 32)), (16, 32), plain(size), backend)
        assert torch.equal(got, torch.ones(batch, heads, queries))


# Layouts, threads, memory.


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=name_of)
def test_layouts_have_the_same_bits(backend, dtype):
    shape = (2, 4, 2, 70, 90, 20)
    query, key = operands(shape, dtype)
    logits = feature("separable bias", shape, dtype)._replace(query_scale=normal(2, 4, 70, seed=7, dtype=torch.float32))
    logits = logits._replace(key_range=ranges(2, 70, 90))
    lse, blocks = lse_of(query, key, logits), blocks_of(shape, (32, 16), lead=(2, 4))
    mass = block_mass(query, key, lse, (32, 16), logits, backend)
    recall = block_recall(query, key, blocks, (32, 16), logits, backend)
    for name, _ in layouts((2, 4, 3, 5)):

        def moved(tensor, name=name):
            if tensor is None or tensor.dim() < 2:
                return tensor
            found = dict(layouts(tensor.shape, tensor.dtype) if tensor.is_floating_point() else ())
            like = found.get(name)
            return tensor.clone() if like is None else like.copy_(tensor)

        own = Logits(*(moved(each) if isinstance(each, torch.Tensor) else each for each in logits))
        got = block_mass(moved(query), moved(key), moved(lse), (32, 16), own, backend)
        assert_same_bits(got, mass, name) if backend != "reference" else torch.testing.assert_close(got, mass)
        turned = blocks.transpose(2, 3).contiguous().transpose(2, 3)
        got = block_recall(moved(query), moved(key), turned, (32, 16), own, backend)
        assert_same_bits(got, recall, name) if backend != "reference" else torch.testing.assert_close(got, recall)


def test_expanded_operands(backend):
    query, key = operands((1, 1, 1, 70, 90, 20), torch.float32)
    query, key = query.expand(2, 4, -1, -1), key.expand(2, 2, -1, -1)
    mask = (torch.arange(90) % 3 > 0).expand(2, -1)
    bias = normal(1, 1, 70, 1, dtype=torch.float32).expand(2, 4, 70, 90)
    logits = plain(20, key_mask=mask, row_bias=bias)
    assert_mass(backend, query, key, logits, (16, 16))
    assert_recall(backend, query, key, logits, blocks_of((2, 4, 2, 70, 90), (16, 16)).expand(2, 4, -1, -1), (16, 16))


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_threads(dtype):
    backend = need("cpu", ops=(ROW,))
    shape = (2, 6, 2, 700, 500, 40)
    query, key = operands(shape, dtype)
    for name in ("none", "everything"):
        logits = plain(40) if name == "none" else plain(40, right=0, softcap=2.0)
        lse, blocks = lse_of(query, key, logits), blocks_of(shape, (64, 32), lead=(2, 6))
        found = []
        for count in (1, 2, 3):
            with threads(count):
                found.append(block_mass(query, key, lse, (64, 32), logits, backend))
                found.append(block_recall(query, key, blocks, (64, 32), logits, backend))
        for i in range(2, 6):
            assert_same_bits(found[i], found[i % 2])


def test_a_head_has_the_bits_it_has_alone():
    backend = need("cpu", ops=(ROW,))
    query, key = operands(dtype=torch.float32)
    logits = feature("window", dtype=torch.float32)
    lse, blocks = lse_of(query, key, logits), blocks_of(SHAPE, (64, 32), lead=(2, 4))
    mass = block_mass(query, key, lse, (64, 32), logits, backend)
    recall = block_recall(query, key, blocks, (64, 32), logits, backend)
    for b in range(2):
        for h in range(4):
            one, kv = (slice(b, b + 1), slice(h, h + 1)), (slice(b, b + 1), slice(h // 2, h // 2 + 1))
            assert_same_bits(block_mass(query[one], key[kv], lse[one], (64, 32), logits, backend), mass[one])
            assert_same_bits(block_recall(query[one], key[kv], blocks[one], (64, 32), logits, backend), recall[one])


def test_no_gradient(backend):
    query, key = (each.requires_grad_() for each in operands(dtype=torch.float32))
    lse = lse_of(query.detach(), key.detach(), plain(24)).requires_grad_()
    assert not block_mass(query, key, lse, (64, 64), plain(24), backend).requires_grad
    assert not block_recall(query, key, blocks_of(SHAPE, (64, 64)), (64, 64), plain(24), backend).requires_grad


# Registrations.


def calls(dtype=torch.float32, shape=SHAPE):
    """(op's name, its arguments) with and without what is optional."""
    query, key = operands(shape, dtype)
    for name in ("none", "everything"):
        logits = plain(shape[5]) if name == "none" else feature(name, shape, dtype)
        lse, blocks = lse_of(query, key, logits), blocks_of(shape, (32, 64), lead=(1, shape[1]))
        yield "block_mass", (query, key, lse, 32, 64, *logits)
        yield "block_recall", (query.transpose(1, 2).contiguous().transpose(1, 2), key, blocks, 32, 64, *logits)


def test_opcheck():
    ops = _library.namespace(need("cpu", ops=(ROW,)))
    for dtype in (torch.float32, torch.bfloat16):
        for name, arguments in calls(dtype):
            torch.library.opcheck(getattr(ops, name).default, arguments)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_equals_eager(backend, dynamic):
    torch._dynamo.reset()

    def function(query, key, lse, blocks):
        logits = plain(24, right=0)
        mass = block_mass(query * 2, key, lse, (64, 64), logits, backend)
        return mass * 2, block_recall(query, key, blocks, (64, 64), logits, backend)

    fast = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for queries in (150, 190):
        shape = (2, 4, 2, queries, 210, 24)
        query, key = operands(shape, torch.float32)
        arguments = query, key, lse_of(query, key, plain(24, right=0)), blocks_of(shape, (64, 64))
        for got, expected in zip(fast(*arguments), function(*arguments), strict=True):
            torch.testing.assert_close(got, expected)
    torch._dynamo.reset()


def test_the_meta_device():
    query, key = (torch.empty(2, 4, length, 24, device="meta") for length in (150, 210))
    logits = plain(24)
    assert block_mass(query, key, query[..., 0], (64, 32), logits).shape == (2, 4, 3, 7)
    blocks = torch.empty(1, 1, 3, 7, dtype=torch.bool, device="meta")
    assert block_recall(query, key, blocks, (64, 32), logits).shape == (2, 4, 150)


# Errors.

Q, K = torch.randn(2, 4, 30, 8), torch.randn(2, 2, 50, 8)
LSE, BLOCKS = torch.zeros(2, 4, 30), torch.ones(1, 1, 2, 4, dtype=torch.bool)
FLOATING = "of dtype float16, bfloat16, float32 or float64"
SHARED = [
    (TypeError, {"key": K.half()}, "key of dtype torch.float32, got torch.float16"),
    (ValueError, {"query": Q[0]}, "query of shape [B, H, S, D], got [4, 30, 8]"),
    (ValueError, {"key": K[0]}, "key of shape [B, H, S, D], got [2, 50, 8]"),
    (ValueError, {"query": Q[..., :0], "key": K[..., :0]}, "query of a head size in [1, 256], got 0"),
    (ValueError, {"key": K[:1]}, "key of the query's batch size 2, got 1"),
    (ValueError, {"key": K[:, [0, 1, 1]]}, "key of a number of heads that divides the query's 4, got 3"),
    (ValueError, {"key": K[..., :7]}, "key of the query's head size 8, got 7"),
    (ValueError, {"q_block": 48}, "q_block to be one of 16, 32, 64, 128, got 48"),
    (ValueError, {"k_block": 0}, "k_block to be one of 16, 32, 64, 128, got 0"),
    (ValueError, {"left": -2}, "left and right of at least 0, or -1 for no limit, got [-2, -1]"),
    (TypeError, {"key_range": torch.zeros(1, 30, 2)}, "key_range of dtype torch.int32, got torch.float32"),
    (
        ValueError,
        {"key_range": torch.zeros(1, 29, 2).int()},
        "key_range of shape [B or 1, Sq, 2] = [2 or 1, 30, 2], got [1, 29, 2]",
    ),
    (TypeError, {"key_mask": torch.zeros(2, 50)}, "key_mask of dtype torch.bool, got torch.float32"),
    (ValueError, {"key_mask": torch.zeros(2, 30) > 0}, "key_mask of shape [B, Sk] = [2, 50], got [2, 30]"),
    (ValueError, {"query_scale": LSE[:1]}, "query_scale of shape [B, H, Sq] = [2, 4, 30], got [1, 4, 30]"),
    (
        ValueError,
        {"row_bias": torch.zeros(2, 4, 30, 49)},
        "row_bias of 50 keys along the last dimension, got [2, 4, 30, 49]",
    ),
    (ValueError, {"column_bias": torch.zeros(2, 4, 30, 5)}, "column_bias with a row_bias, got None"),
    (ValueError, {"scale": math.inf}, "scale to be finite, got inf"),
    (ValueError, {"softcap": -1.0}, "softcap to be finite and not negative, got -1.0"),
]
OWN = {
    "block_mass": [
        (TypeError, {"lse": LSE.double()}, "lse of dtype torch.float32, got torch.float64"),
        (ValueError, {"lse": LSE[:, :2]}, "lse of shape [B, H, Sq] = [2, 4, 30], got [2, 2, 30]"),
    ],
    "block_recall": [
        (TypeError, {"blocks": BLOCKS.int()}, "blocks of dtype torch.bool, got torch.int32"),
        (
            ValueError,
            {"blocks": BLOCKS[..., :3]},
            "blocks of shape [B or 1, H or 1, NQ, NK] of [2, 4, 2, 4], got [1, 1, 2, 3]",
        ),
        (
            ValueError,
            {"blocks": BLOCKS.expand(3, 1, 2, 4)},
            "blocks of shape [B or 1, H or 1, NQ, NK] of [2, 4, 2, 4], got [3, 1, 2, 4]",
        ),
        (
            ValueError,
            {"blocks": BLOCKS[0]},
            "blocks of shape [B or 1, H or 1, NQ, NK] of [2, 4, 2, 4], got [1, 2, 4]",
        ),
    ],
}
# a backend is picked by the dtype before its entry checks it
ENTRY_ROWS = [(TypeError, {"query": Q.int()}, f"query {FLOATING}, got torch.int32")]
CASES = [(op, *row) for op, rows in OWN.items() for row in SHARED + rows]
ENTRY_CASES = CASES + [(op, *row) for op in OWN for row in ENTRY_ROWS]


def erroneous(op, changes):
    third = {"lse": LSE} if op == "block_mass" else {"blocks": BLOCKS}
    return {"query": Q, "key": K, **third, "q_block": 16, "k_block": 16, **plain(8)._asdict()} | changes


@pytest.mark.parametrize("op, error, changes, text", CASES, ids=[f"{row[0]}-{row[3][:70]}" for row in CASES])
def test_errors(backend, op, error, changes, text):
    query, key, third, q_block, k_block, *logits = erroneous(op, changes).values()
    function = block_mass if op == "block_mass" else block_recall
    with pytest.raises(error) as caught:
        function(query, key, third, (q_block, k_block), Logits(*logits), backend)
    assert type(caught.value) is error and str(caught.value) == f"pyrx::{op}: expected {text}"


@pytest.mark.parametrize(
    "op, error, changes, text", ENTRY_CASES, ids=[f"{row[0]}-{row[3][:70]}" for row in ENTRY_CASES]
)
def test_kernels_and_fakes_raise_the_same(op, error, changes, text):
    entry = getattr(_library.namespace(need("cpu", ops=(ROW,))), op)
    arguments = erroneous(op, changes)
    with pytest.raises(error) as caught:
        entry(**arguments)
    assert type(caught.value) is error and str(caught.value) == f"pyrx::{op}: expected {text}"
    with FakeTensorMode() as mode, pytest.raises(error) as faked:
        entry(**{n: mode.from_tensor(e) if isinstance(e, torch.Tensor) else e for n, e in arguments.items()})
    assert str(faked.value) == str(caught.value)
