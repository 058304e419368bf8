"""Attention over listed blocks, forward: the reference against PyTorch, every backend against both, dropout, lists."""

import warnings

import pytest
import torch
from attention import (
    BLOCKS,
    CASES,
    DECODING,
    RESULTS,
    ROW,
    SERVED,
    Attention,
    assert_attends,
    assert_results,
    attention,
    block_mask,
    formula,
    has_sdpa,
    listed,
    logits,
    pytorch,
    sdpa,
    visible,
)
from helpers import FLOATS, assert_same_bits, expected_mask, name_of, need, philox, scale_of, threshold_of

import pyrx
from pyrx._checks import accumulation_dtype

CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def served(backend, dtype=torch.float32):
    return need(backend, dtype=dtype, ops=(ROW,))


def case(name, dtype=torch.float64, **changes):
    return attention(**CASES[name] | changes, dtype=dtype)


# The definition against PyTorch's own functions, in float64.


WITH_SDPA = [name for name, arguments in CASES.items() if not {"softcap", "query_scale", "columns"} & set(arguments)]


@pytest.mark.parametrize("name", WITH_SDPA)
def test_reference_is_sdpa(name):
    call = case(name)
    assert has_sdpa(call)
    torch.testing.assert_close(call("reference")[0], sdpa(call), **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_reference_is_its_formula(name):
    call = case(name)
    torch.testing.assert_close(call("reference"), formula(call), **CLOSE)


FLEX = ("softcap", "query_scale", "softcap_query_scale", "window_pair", "window_causal", "bias_2_3", "columns_15")


@pytest.mark.parametrize("name", [*FLEX, "heads_4_2", "together", "together_pair"])
def test_reference_is_flex_attention(fresh_dynamo, name):
    """FlexAttention in eager mode goes by its mask_mod alone, so the blocks are in that.

    Its Dynamo is fresh: a softcap other than the last one's becomes symbolic, which torch 2.15 refuses.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    call = case(name)
    seen, options = visible(call), call.options

    def score(product, b, h, q, k):
        if call.query_scale is not None:
            product = product * call.query_scale[b, h, q]
        if "softcap" in options:
            product = options["softcap"] * torch.tanh(product / options["softcap"])
        if call.column_bias is not None:
            row, column = (each.expand(*call.query.shape[:2], -1, -1) for each in (call.row_bias, call.column_bias))
            columns = column.shape[3]
            return product + row[b, h, q, k // columns] + column[b, h, q, k % columns]
        if call.row_bias is not None:
            product = product + call.row_bias.expand(*call.query.shape[:2], -1, -1)[b, h, q, k]
        return product

    lengths = call.query.shape[2], call.key.shape[2]
    mask = create_block_mask(lambda b, h, q, k: seen[b, h, q, k], *call.query.shape[:2], *lengths, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, lse = flex_attention(
            call.query, call.key, call.value, score, mask, options.get("scale"), enable_gqa=True, return_lse=True
        )
    out, found, _ = call("reference")
    torch.testing.assert_close(out, expected, **CLOSE)
    some = seen.any(-1)
    torch.testing.assert_close(found[some], lse[some], **CLOSE)


def test_statistics_by_hand(backend):
    """Of one query and three keys that it sees: p = softmax(logits), H = -sum p log p."""
    query, key = torch.tensor([[[[2.0]]]]), torch.tensor([[[[0.5], [-1.0], [0.25], [9.0]]]])
    out, lse, entropy = pyrx.block_sparse_attention(
        query, key, key, scale=1.0, window=(0, 2), return_lse=True, return_entropy=True, backend=served(backend)
    )
    scores = torch.tensor([1.0, -2.0, 0.5])
    p = torch.softmax(scores, 0)
    torch.testing.assert_close(out.flatten(), (p * key.flatten()[:3]).sum()[None])
    torch.testing.assert_close(lse.flatten(), torch.logsumexp(scores, 0)[None])
    torch.testing.assert_close(entropy.flatten(), -(p * p.log()).sum()[None])


# Every backend.


@pytest.mark.parametrize("backend, dtype", SERVED, ids=name_of)
@pytest.mark.parametrize("name", CASES)
def test_attends(backend, name, dtype):
    assert_attends(case(name, dtype), backend)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_attends_without_the_entropy(cpu, name, p, dtype):
    """Which kernels of their own serve."""
    call = case(name, dtype, **({"dropout_p": p, "seed": 5} if p else {}))
    exact = formula(call.to(torch.float64))
    with torch.no_grad():
        out, lse = call(cpu, return_entropy=False)
        assert_results((out, lse, exact[2].to(lse.dtype)), pytorch(call), exact)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("name", DECODING)
def test_heads_that_share_keys_decode_alike(cpu, name, dtype):
    """As with keys of their own; the same bits whatever the strides of the query."""
    call = case(name, dtype)
    expected = call(cpu, return_entropy=False)
    group = call.query.shape[1] // call.key.shape[1]
    apart = call.replace(key=call.key.repeat_interleave(group, 1), value=call.value.repeat_interleave(group, 1))
    for one, other in zip(apart(cpu, return_entropy=False), expected, strict=True):
        torch.testing.assert_close(one, other)
    for _, query in layouts(call.query):
        for one, other in zip(call.replace(query=query)(cpu, return_entropy=False), expected, strict=True):
            assert_same_bits(one.contiguous(), other)
    expanded = call.query[:, :1].expand_as(call.query)
    for one, other in zip(
        call.replace(query=expanded)(cpu, return_entropy=False),
        call.replace(query=expanded.contiguous())(cpu, return_entropy=False),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_what_is_returned(backend, dtype):
    call = case("together", dtype)
    out, lse, entropy = call(backend)
    assert out.dtype == dtype and lse.dtype == entropy.dtype == accumulation_dtype(dtype)
    alone = call(backend, return_lse=False, return_entropy=False)
    assert isinstance(alone, torch.Tensor)
    assert_same_bits(alone, out)
    for lse_too, entropy_too in ((True, False), (False, True)):
        first, second = call(backend, return_lse=lse_too, return_entropy=entropy_too)
        assert_same_bits(first, out)
        assert_same_bits(second, lse if lse_too else entropy)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_without_a_mask_everything_attends(backend, dtype):
    query, key, value = (torch.randn(2, 2, 150, 24).to(dtype) for _ in range(3))
    everything = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    mask = block_mask(everything, (128, 128), (150, 150))
    for options in ({}, {"is_causal": True}, {"window": 9}, {"window": (-1, 4), "dropout_p": 0.5, "seed": 3}):
        assert_attends(Attention(query, key, value, mask, everything, options=options), backend, str(options))
        got = pyrx.block_sparse_attention(query, key, value, backend=backend, **options)
        listed = pyrx.block_sparse_attention(query, key, value, mask, backend=backend, **options)
        assert_near(got, listed, str(options))


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0), (2, 2, 0, 0)], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_empty(backend, shape, dtype):
    batch, heads, queries, keys = shape
    for bias, columns in ((None, 0), ((batch, 1), 0), ((1, heads), 1)):
        options = {"bias": bias, "columns": columns, "key_mask": True, "query_scale": True, "ranges": 1 if keys else 0}
        out, lse, entropy = attention(*shape, 16, dtype=dtype, density=1.0, **options)(backend)
        assert out.shape == (batch, heads, queries, 16) and lse.shape == entropy.shape == (batch, heads, queries)
        assert not out.any() and (lse == -torch.inf).all() and not entropy.any()


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_queries_that_see_nothing(backend, dtype):
    """By their lists, by key_mask, key_range, a window, or a bias of minus infinity."""
    blocks = torch.ones(1, 1, 5, 6, dtype=torch.bool)
    blocks[:, :, 1] = False
    nothing = torch.zeros(2, 190, dtype=torch.bool)
    whole = attention(dtype=dtype, block=(32, 32))
    ranges = torch.tensor([0, 190], dtype=torch.int32).repeat(1, 150, 1)
    ranges[0, 3:40] = torch.tensor([50, 50])
    ranges[0, 40:50] = torch.tensor([70, 20])
    hidden = torch.zeros(1, 1, 150, 190, dtype=dtype)
    hidden[:, :, ::7] = -torch.inf
    hidden[:, :, :, 32:64] = -torch.inf
    some = block_mask(blocks, (32, 32), (150, 190))
    for what, call in {
        "lists": whole.replace(mask=some, blocks=blocks),
        "no list at all": attention(dtype=dtype, density=0.0),
        "key_mask": whole.replace(key_mask=torch.stack([nothing[0], ~nothing[1]])),
        "key_range": whole.replace(mask=block_mask(blocks, (32, 32), (150, 190), key_range=ranges), blocks=blocks),
        "window": attention(dtype=dtype, queries=300, keys=40, window=5),
        "bias": whole.replace(row_bias=hidden),
    }.items():
        seen = visible(call) & (logits(call) != -torch.inf)
        assert not seen.any(-1).all(), "some queries see nothing"
        assert_attends(call, backend, what)
        out, lse, entropy = (each[~seen.any(-1)] for each in call(backend))
        assert not out.any() and (lse == -torch.inf).all() and not entropy.any(), what


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_large_logits(backend, dtype):
    """Maxima that grow from block to block, and logits far beyond what exp can take."""
    call = attention(1, 1, 70, 200, 16, block=(16, 16), density=0.8, dtype=torch.float64)
    rising = torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None].expand(200, 16)
    for name, key in {"rising": rising, "falling": -rising, "random": call.key[0, 0]}.items():
        for size in (30.0, 3000.0):
            large = call.replace(query=call.query * 0 + size, key=key[None, None].contiguous())
            assert_attends(large.to(dtype), backend, f"{name} {size}", logits(large).abs().max().item())


@pytest.mark.parametrize("least", [-1e10, -1e30, -2e38])
def test_keys_far_below_before_others(cpu, least):
    """Masks that are added are numbers: what they hide comes first, and nothing of it stays."""
    query, key, value = (torch.randn(1, 2, 300, 16, requires_grad=True) for _ in range(3))
    bias = torch.zeros(1, 1, 300, 300)
    bias[..., :140] = least
    found, wanted = (
        pyrx.block_sparse_attention(query, key, value, bias=bias, return_lse=True, return_entropy=True, backend=backend)
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("least", [-1e9, -1e10, -1e30, -2e38])
def test_rows_far_below_and_gradients(cpu, least):
    """Of rows that an added mask hides whole nothing comes back where no gradient comes in."""
    tensors = [torch.randn(1, 2, 70, 16, requires_grad=True) for _ in range(3)]
    bias = torch.zeros(1, 1, 70, 70, requires_grad=True)
    with torch.no_grad():
        bias[:, :, 30:] = least
    found, wanted = (
        torch.autograd.grad(
            pyrx.block_sparse_attention(*tensors, bias=bias, backend=backend)[:, :, :30].square().sum(),
            [*tensors, bias],
        )
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_is_not_listed_is_not_read(cpu):
    """NaN in keys and values of blocks that nothing lists, and in what a window does not reach."""
    blocks = torch.ones(1, 1, 5, 6, dtype=torch.bool)
    blocks[..., 2] = False
    call = attention(blocks=blocks, block=(32, 32), dtype=torch.float32)
    near = attention(1, 2, 100, 300, block=(32, 32), density=1.0, window=(10, 5), dtype=torch.float32)
    for each, unread in ((call, slice(64, 96)), (near, slice(128, 300))):
        poisoned = each.replace(key=each.key.clone(), value=each.value.clone())
        poisoned.key[:, :, unread] = torch.nan
        poisoned.value[:, :, unread] = torch.nan
        for one, other in zip(poisoned(cpu), each(cpu), strict=True):
            assert_same_bits(one, other)


# Masks and lists.


def test_order_and_width_of_lists_do_not_matter(backend):
    blocks = torch.rand(2, 3, 7, 9) < 0.5
    call = attention(2, 3, 100, 131, 24, blocks=blocks, block=(16, 16))
    expected = formula(call)
    for order in ("any", "ascending"):
        for extra in (0, 1, 40):
            for seed in range(2):
                mask = block_mask(blocks, (16, 16), (100, 131), order=order, extra=extra, seed=seed)
                torch.testing.assert_close(call.replace(mask=mask)(backend), expected, **CLOSE)


def test_a_block_that_is_listed_twice_counts_once(backend):
    call = attention(2, 2, 100, 131, 24, block=(16, 32))
    twice = [each.repeat_interleave(2, -1) if each.dim() == 4 else 2 * each for each in call.mask.lists]
    mask = pyrx.BlockMask(*twice, call.mask.block_size, call.mask.seq_lengths)
    torch.testing.assert_close(call.replace(mask=mask)(backend), formula(call), **CLOSE)


def test_lists_of_no_width(backend):
    call = attention(2, 3, 100, 131, 24, lead=(2, 3))
    for counts in (0, 1, 2**31 - 1):
        mask = block_mask(call.blocks, (32, 32), (100, 131), width=0)
        for each in (mask.kv_counts, mask.q_counts):
            each.fill_(counts)
        out, lse, entropy = call.replace(mask=mask)(backend)
        assert not out.any() and (lse == -torch.inf).all() and not entropy.any()


@pytest.mark.parametrize("block", [(16, 16), (128, 16), (64, 128)], ids=name_of)
def test_lists_with_entries_out_of_range(backend, block):
    """Those are passed over; a count above the width is the width, one below zero is zero."""
    call = attention(2, 2, 300, 331, 24, block=block, lead=(2, 2))
    rows, columns = call.blocks.shape[2:]
    generator = torch.Generator().manual_seed(3)
    kv_indices, q_indices = (
        torch.stack([torch.randperm(2 * size, generator=generator) - size // 2 for _ in range(4 * other)])
        .reshape(2, 2, other, 2 * size)
        .int()
        for size, other in ((columns, rows), (rows, columns))
    )
    far = torch.tensor([2**31 - 1, -(2**31), -1, columns, rows, 2**30, 2**27], dtype=torch.int32)
    kv_indices[..., 1 :: len(far)] = far[2]
    kv_indices[0, :, :, :2], q_indices[0, :, :, :2] = far[:2], far[:2]
    q_indices[1, :, :, 3], kv_indices[1, :, :, 3] = far[4], far[3]
    kv_indices[1, 1, :, 0] = far[5]
    kv_counts = torch.randint(-2, 3 * columns, (2, 2, rows), generator=generator).int()
    kv_counts[0, 0, 0], kv_counts[0, 1, 0] = 2**31 - 1, -(2**31)
    q_counts = torch.full((2, 2, columns), 2**31 - 1, dtype=torch.int32)
    mask = pyrx.BlockMask(kv_counts, kv_indices, q_counts, q_indices, block, (300, 331))
    blocks = listed(kv_counts, kv_indices, columns)
    assert blocks.any() and not blocks.all()
    torch.testing.assert_close(call.replace(mask=mask)(backend), formula(call.replace(blocks=blocks)), **CLOSE)


def test_lists_of_any_strides(backend):
    call = attention(2, 2, 100, 131, 24, lead=(2, 2))
    expected = call(backend)
    strided = [torch.stack([each, each + 1], -1)[..., 0] for each in call.mask.lists]
    turned = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in call.mask.lists]
    for lists in (strided, turned):
        got = call.replace(mask=pyrx.BlockMask(*lists, call.mask.block_size, (100, 131)))(backend)
        for one, other in zip(got, expected, strict=True):
            assert_same_bits(one, other)


# Strides of what comes in, and of what goes out.


def assert_near(got, expected, what=""):
    """Sums in another order may be a unit in the last place apart."""
    tolerance = 4 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=4 * tolerance, msg=lambda text: f"{what}: {text}")


def layouts(tensor):
    yield "contiguous", tensor.contiguous()
    yield "tokens_first", tensor.transpose(1, 2).contiguous().transpose(1, 2)
    yield "size_first", tensor.transpose(2, 3).contiguous().transpose(2, 3)
    yield "every_second", torch.stack([tensor, tensor + 1], -1)[..., 0]
    yield "offset", torch.cat([tensor[..., :1], tensor], -1)[..., 1:]
    yield "padded_rows", torch.cat([tensor, tensor[..., :3]], -1)[..., : tensor.shape[3]]
    yield "batch_last", tensor.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("size, value_size", [(24, 24), (64, 33)])
def test_layouts(backend, dtype, size, value_size):
    call = attention(2, 4, 100, 131, size, value_size=value_size, kv_heads=2, dtype=dtype, bias=(2, 4))
    expected = call(backend)
    for name in ("query", "key", "value", "row_bias"):
        for layout, each in layouts(getattr(call, name)):
            assert torch.equal(each, getattr(call, name))
            got = call.replace(**{name: each})(backend)
            for one, other, result in zip(got, expected, RESULTS, strict=True):
                assert_near(one, other, f"{name} {layout} {result}")
    every = [dict(layouts(getattr(call, name))) for name in ("query", "key", "value")]
    for layout in every[0]:
        query, key, value = (each[layout] for each in every)
        out = call.replace(query=query, key=key, value=value)(backend)[0]
        assert_near(out, expected[0], layout)
        if backend != "reference":
            assert (out.transpose(1, 2) if layout == "tokens_first" else out).is_contiguous(), layout


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("size, value_size", [(17, 33), (24, 40), (61, 5)])
@pytest.mark.parametrize("gap", [1, 3, 7])
def test_what_lies_between_rows_is_not_read(backend, dtype, size, value_size, gap):
    """NaN there, in gaps as wide as what kernels pad rows with."""
    arguments = {"size": size, "value_size": value_size, "kv_heads": 2, "dtype": dtype}
    for name in ("query", "key", "value", "row_bias"):
        call = attention(2, 4, 100, 128, **arguments, bias=(2, 4) if name == "row_bias" else None)
        expected, given = call(backend), getattr(call, name)
        rows = torch.cat([given, given.new_full((*given.shape[:3], gap), torch.nan)], -1)[..., : given.shape[3]]
        for one, other, result in zip(call.replace(**{name: rows})(backend), expected, RESULTS, strict=True):
            assert_near(one, other, f"{name} {result}")


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("value_size", [256, 33])
def test_large_results(cpu, dtype, value_size):
    """Operands and results of more than 16 MiB: results go past the caches; the same rows, whatever their layout."""
    call = attention(32, 8, 100, 131, 256, value_size=value_size, blocks=torch.ones(1, 1, 4, 5) > 0, dtype=dtype)
    tensors = (call.query, call.key, call.value)
    assert sum(each.numel() for each in tensors) * dtype.itemsize > 2**24
    few = call.replace(**{name: getattr(call, name)[:2] for name in ("query", "key", "value")})(cpu)
    turned = {name: getattr(call, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("query", "key")}
    for one in (call, call.replace(**turned)):
        for got, expected in zip(one(cpu), few, strict=True):
            assert_same_bits(got[:2], expected)
        assert_attends(one.replace(**{name: getattr(one, name)[-2:] for name in ("query", "key", "value")}), cpu)
        torch.testing.assert_close(one(cpu)[0][-2:], call(cpu)[0][-2:], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("block", [(16, 16), (32, 64), (64, 64), (128, 128)], ids=name_of)
def test_few_and_many_blocks_that_see_a_key(cpu, dtype, block):
    """Keys and values that few see are packed by each of them, others for all; every third block of keys, and runs."""
    rows, columns = (-(-length // size) for length, size in zip((700, 900), block, strict=True))
    many = torch.ones(1, 1, rows, columns, dtype=torch.bool)
    few = torch.zeros_like(many)
    few[0, 0, 0] = few[0, 0, -1, ::3] = True
    apart = many.clone()
    apart[..., 1::3] = False
    for blocks in (few, many, apart):
        assert_attends(attention(1, 4, 700, 900, 40, kv_heads=2, blocks=blocks, block=block, dtype=dtype), cpu)
        wide = attention(1, 2, 700, 900, 40, value_size=70, blocks=blocks, block=block, dtype=dtype)
        assert_attends(wide, cpu)


def test_expanded_and_strided_operands(backend):
    call = attention(2, 3, 100, 131, 24, key_mask=True, query_scale=True, ranges=2, bias=(1, 1), dtype=torch.float32)
    spread = call.replace(
        query=call.query[:1, :1].expand(2, 3, -1, -1),
        key=call.key[:, :1].expand(-1, 3, -1, -1),
        value=call.value[:1].expand(2, -1, -1, -1),
        key_mask=call.key_mask[:1].expand(2, -1),
        query_scale=call.query_scale[:, :, :1].expand(-1, -1, 100),
        row_bias=call.row_bias.expand(2, 3, -1, -1),
    )
    dense = spread.replace(
        **{
            name: getattr(spread, name).contiguous()
            for name in ("query", "key", "value", "key_mask", "query_scale", "row_bias")
        }
    )
    assert_attends(dense, backend)
    for one, other in zip(spread(backend), dense(backend), strict=True):
        assert_near(one, other)
    apart = dense.replace(
        key_mask=torch.stack([dense.key_mask, ~dense.key_mask], -1)[..., 0],
        query_scale=dense.query_scale.transpose(0, 2).contiguous().transpose(0, 2),
        row_bias=dense.row_bias.transpose(2, 3).contiguous().transpose(2, 3),
        mask=block_mask(
            call.blocks, (32, 32), (100, 131), key_range=torch.stack([call.mask.key_range] * 2, -1)[..., 0]
        ),
    )
    for one, other in zip(apart(backend), dense(backend), strict=True):
        assert_near(one, other)


# Dropout.


def dropped_weights(backend, queries, keys, block, heads=2, dtype=torch.float32, p=0.3, seed=5, **arguments):
    """The weights after dropout, (2, heads, queries, keys): the values are one-hot."""
    call = attention(2, heads, queries, keys, 16, block=block, dtype=dtype, dropout_p=p, seed=seed, **arguments)
    value = torch.eye(keys, dtype=dtype).expand(2, call.key.shape[1], keys, keys)
    call = call.replace(value=value)
    return call, call(served(backend, dtype))[0]


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("queries, keys", [(100, 131), (33, 64), (63, 100), (1, 3), (131, 200)])
def test_dropped_weights_are_those_of_dropout_mask(backend, dtype, queries, keys):
    mask = pyrx.dropout_mask((2, 2, queries, keys), 0.3, 5)
    assert torch.equal(mask, expected_mask((2, 2, queries, keys), 0.3, 5))
    for block in ((16, 16), (128, 16), (64, 128), (32, 32)):
        for kv_heads in (1, 2):
            call, weights = dropped_weights(backend, queries, keys, block, dtype=dtype, kv_heads=kv_heads, scale=0.1)
            assert torch.equal(weights != 0, mask & visible(call)), f"{block} {kv_heads}"


def test_dropped_weights_do_not_depend_on_blocks_or_windows(backend):
    """All block sizes, and lists that start and end anywhere: the same weights are dropped."""
    mask = expected_mask((2, 3, 150, 190), 0.6, -7)
    arguments = {"heads": 3, "p": 0.6, "seed": -7}
    for block in ((q, k) for q in BLOCKS for k in BLOCKS):
        for rules in ({"density": 1.0}, {"window": (30, 11)}, {"is_causal": True, "key_mask": True}):
            call, weights = dropped_weights(backend, 150, 190, block, **arguments, **rules)
            assert torch.equal(weights != 0, mask & visible(call)), f"{block} {rules}"


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1 / 65536, 0.99999])
def test_dropout(backend, dtype, p):
    for options in ({"block": (32, 32)}, {"block": (16, 128), "kv_heads": 1, "is_causal": True, "size": 40}):
        call = attention(2, 2, 100, 131, dropout_p=p, seed=11, dtype=dtype, **options)
        assert_attends(call, backend, str(options))
        # the statistics are those before dropout
        for one, other in zip(call(backend)[1:], call(backend, dropout_p=0.0)[1:], strict=True):
            assert_same_bits(one, other)


def test_kept_share_and_mean(backend):
    call, weights = dropped_weights(backend, 200, 200, (64, 64), density=1.0, p=0.25)
    kept = (weights != 0).double().mean().item()
    assert abs(kept - 0.75) < 4 * (0.75 * 0.25 / weights.numel()) ** 0.5
    torch.testing.assert_close(weights[weights != 0], (weights / scale_of(0.25) * scale_of(0.25))[weights != 0])
    plain = call(backend, dropout_p=0.0)[0]
    torch.testing.assert_close(weights[weights != 0], plain[weights != 0] * scale_of(0.25), rtol=1e-5, atol=0)


def test_dropout_of_0_is_none(backend):
    call = case("together", torch.bfloat16)
    for seed in (None, 3):
        assert_same_bits(call(backend, dropout_p=0.0, seed=seed)[0], call(backend)[0])
    assert_same_bits(call(backend, dropout_p=2.0**-18, seed=3)[0], call(backend)[0])


def test_seeds(backend):
    call = attention(dropout_p=0.5, dtype=torch.float32)
    served(backend)
    for seed in (3, -1, 2**64 - 1, -(2**63), 2**63):
        tensor = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
        assert_same_bits(call(backend, seed=seed)[0], call(backend, seed=tensor)[0])
        assert_same_bits(call(backend, seed=seed)[0], call(backend, seed=tensor[None])[0])
    assert_same_bits(call(backend, seed=-1)[0], call(backend, seed=2**64 - 1)[0])
    assert not torch.equal(call(backend, seed=1)[0], call(backend, seed=2)[0])
    assert not torch.equal(call(backend, seed=1)[0], call(backend, seed=1 + 2**32)[0])

    def drawn(seed):
        return call(backend, generator=torch.Generator().manual_seed(seed))[0]

    assert_same_bits(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    torch.manual_seed(9)
    first, second = call(backend)[0], call(backend)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(9)
    assert_same_bits(call(backend)[0], first)
    generator = torch.Generator().manual_seed(9)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=generator)
    assert_same_bits(call(backend, seed=seed)[0], first)


def test_dropout_beyond_two_to_the_35_weights(cpu):
    """Where an index fills more than 32 bits, and so does its counter."""
    length, block = 2**18, 16
    counts = torch.zeros(1, 1, length // block, dtype=torch.int32)
    counts[..., -1] = 1
    indices = torch.full((1, 1, length // block, 1), length // block - 1, dtype=torch.int32)
    mask = pyrx.BlockMask(counts, indices, counts, indices, (block, block), (length, length))
    query = torch.zeros(1, 1, length, 1, dtype=torch.bfloat16)
    value = torch.zeros(1, 1, length, block, dtype=torch.bfloat16)
    value[0, 0, -block:] = torch.eye(block)
    out = pyrx.block_sparse_attention(query, query, value, mask, dropout_p=0.5, seed=5, backend=served(cpu))
    assert not out[:, :, :-block].any()
    index = torch.arange(length - block, length)[:, None] * length + torch.arange(length - block, length)
    group = (index // 8).numpy().astype("uint64")
    words = philox((group & 0xFFFFFFFF, group >> 32, group * 0, group * 0), (5, 0))
    lanes = torch.stack([torch.from_numpy(each.astype("int64")) for each in words], -1)
    lane = index % 8
    u = (lanes.gather(-1, (lane // 2)[..., None])[..., 0] >> (16 * (lane % 2))) & 0xFFFF
    assert torch.equal(out[0, 0, -block:] != 0, u >= threshold_of(0.5))
