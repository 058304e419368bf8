"""Block-sparse attention by the Triton kernels: values in Triton's interpreter and on a GPU, machine code for sm_80 and
sm_90."""

import helpers
import pytest
import torch
from triton_helpers import (
    INTERPRETED,
    SHARED_LIMIT,
    SMALLEST,
    ahead_of_time,
    device_of,
    kernels_of,
    values_in_the_interpreter,
)

import pyrx
from pyrx import _attention
from pyrx.ops.block_mask import BlockMask
from pyrx.reference import block_sparse_attention as reference

triton = pytest.importorskip("triton")
tl = triton.language
attention = pytest.importorskip("pyrx._triton.attention")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("query", "key", "value", "query_scale", "row_bias", "column_bias")


device = device_of("block_sparse_attention")


test_values_in_the_interpreter = values_in_the_interpreter(__file__, 60)


class Case:
    """The arguments of one call of the op, from a seed, and what is to be found."""

    def __init__(
        self,
        batch=2,
        heads=2,
        kv_heads=None,
        queries=40,
        keys=56,
        size=32,
        value_size=None,
        blocks=(32, 32),
        density=0.6,
        dtype=torch.float32,
        device="cpu",
        seed=0,
        shared_lists=False,
        left=-1,
        right=-1,
        key_range=False,
        key_mask=None,
        query_scale=False,
        row_bias=None,
        columns=None,
        column_bias=(1, 1),
        scale=None,
        softcap=0.0,
        dropout_p=0.0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, dtype=dtype):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        kv_heads = heads if kv_heads is None else kv_heads
        value_size = size if value_size is None else value_size
        self.query = normal(batch, heads, queries, size)
        self.key, self.value = normal(batch, kv_heads, keys, size), normal(batch, kv_heads, keys, value_size)
        self.upstream = normal(batch, heads, queries, value_size)
        self.upstream_rows = [normal(batch, heads, queries, dtype=torch.float32) for _ in range(2)]
        rows = [-(-length // block) for length, block in zip((queries, keys), blocks, strict=True)]
        lead = (1, 1) if shared_lists else (batch, heads)
        dense = torch.rand(*lead, *rows, generator=generator) < density
        mask = BlockMask.from_dense(dense.to(device), (queries, keys), blocks, backend="reference")
        self.lists, self.blocks = list(mask.lists), blocks
        if key_range:
            first = torch.randint(0, keys, (batch, queries), generator=generator, dtype=torch.int32)
            length = torch.randint(0, keys, (batch, queries), generator=generator, dtype=torch.int32)
            key_range = torch.stack([first, first + length], -1).to(device)
        if key_mask is not None:
            key_mask = (torch.rand(batch, keys, generator=generator) < key_mask).to(device)
        column = None
        if row_bias is not None:
            count = keys if columns is None else keys // columns
            row_bias = normal(*row_bias, queries, count)
            column = None if columns is None else normal(*column_bias, queries, columns)
        self.logits = _attention.Logits(
            left,
            right,
            key_range if isinstance(key_range, torch.Tensor) else None,
            key_mask,
            normal(batch, heads, queries, dtype=torch.float32) if query_scale else None,
            row_bias,
            column,
            size**-0.5 if scale is None else scale,
            softcap,
        )
        self.threshold = helpers.threshold_of(dropout_p)
        self.seed = torch.tensor(5, device=device)

    def leaves(self, dtype):
        """The differentiable inputs, query_scale in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        given = (self.query, self.key, self.value, *self.logits[4:7])
        return [None if each is None else each.detach().to(wide if i == 3 else dtype) for i, each in enumerate(given)]

    def arguments(self, leaves):
        query, key, value, *rest = leaves
        logits = self.logits._replace(query_scale=rest[0], row_bias=rest[1], column_bias=rest[2])
        return (query, key, value, *self.lists, *self.blocks, *logits, self.seed, self.threshold)

    def found(self, call, dtype, needs=None, rows=True):
        """(out, lse, entropy) and {name: gradient} of `call` on inputs in `dtype`."""
        leaves = [
            each if each is None else each.requires_grad_(needs is None or NAMES[i] in needs)
            for i, each in enumerate(self.leaves(dtype))
        ]
        results = call(*self.arguments(leaves), True)
        finite = results[1].detach().isfinite()
        upstream = [self.upstream, *(torch.where(finite, each, 0) for each in self.upstream_rows)]
        pairs = list(zip(results, upstream, strict=True))[: 3 if rows else 1]
        asked = {
            name: each for name, each in zip(NAMES, leaves, strict=True) if each is not None and each.requires_grad
        }
        found = torch.autograd.grad(
            [each for each, _ in pairs], list(asked.values()), [along.to(each.dtype) for each, along in pairs]
        )
        return [each.detach() for each in results], dict(zip(asked, found, strict=True))


def kernels(*arguments):
    return torch.ops.pyrx_triton.block_sparse_attention(*arguments)


def check(case, rows=True, term=0.0):
    """Results and gradients are within the budget of errors, gradients of terms as large as `term` that cancel."""
    dtype = case.query.dtype
    got, gradients = case.found(kernels, dtype, rows=rows)
    plain, plain_gradients = case.found(reference.block_sparse_attention, dtype, rows=rows)
    exact, exact_gradients = case.found(reference.block_sparse_attention, torch.float64, rows=rows)
    nothing = exact[1] == -torch.inf
    assert torch.equal(got[1] == -torch.inf, nothing)
    assert not got[0][nothing].any() and not got[2][nothing].any()
    for i, name in enumerate(("out", "lse", "entropy")):
        one, other, true = (torch.where(nothing, 0, each[i]) if i else each[i] for each in (got, plain, exact))
        # an entropy is a difference of terms as large as the log-sum-exp
        floor = exact[1][~nothing].abs().max().item() if i == 2 and not nothing.all() else 0.0
        helpers.assert_within_budget(one, other, true, name, floor=floor)
    assert set(gradients) == set(exact_gradients)
    for name, gradient in gradients.items():
        true = exact_gradients[name]
        # the query scale's is a sum of products in the inputs' precision
        slack = helpers.SLACK[dtype] * torch.finfo(dtype).eps / torch.finfo(gradient.dtype).eps
        helpers.assert_within_budget(gradient, plain_gradients[name], true, f"gradient of {name}", slack, floor=term)


FEATURES = {
    "plain": {},
    "causal": {"right": 0},
    "window": {"left": 5, "right": 17},
    "left": {"left": 20},
    "range": {"key_range": True},
    "range and window": {"key_range": True, "left": 20, "right": 15},
    "mask": {"key_mask": 0.6},
    "whole mask": {"key_mask": 1.1, "right": 3},
    "query scale": {"query_scale": True},
    "softcap": {"softcap": 1.5},
    "softcap and query scale": {"softcap": 0.7, "query_scale": True},
    "bias": {"row_bias": (2, 2)},
    "bias of heads": {"row_bias": (1, 2)},
    "bias of a batch": {"row_bias": (2, 1), "right": 0},
    "one bias": {"row_bias": (1, 1), "kv_heads": 1},
    "separable": {"row_bias": (2, 1), "columns": 7, "column_bias": (1, 2)},
    "separable, few columns": {"row_bias": (1, 2), "columns": 4, "column_bias": (2, 2), "softcap": 2.0},
    "separable, many columns": {"row_bias": (1, 1), "keys": 88, "columns": 44},
    "separable, one column": {"row_bias": (1, 2), "columns": 1},
    "dropout": {"dropout_p": 0.3},
    "dropout, odd keys": {"dropout_p": 0.3, "keys": 53},
    "dropout and bias": {"dropout_p": 0.5, "row_bias": (2, 2), "left": 15},
    "groups": {"heads": 4, "kv_heads": 2},
    "one key head": {"heads": 3, "kv_heads": 1, "dropout_p": 0.2},
    "negative scale": {"scale": -0.3},
    "no scale": {"scale": 0.0},
    "large scale": {"scale": 1.0},
    "all": {
        "heads": 4, "kv_heads": 2, "right": 20, "key_range": True, "key_mask": 0.8, "query_scale": True, "softcap": 3.0,
        "row_bias": (1, 4), "columns": 8, "dropout_p": 0.25,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_features(device, name):
    check(Case(device=device, **FEATURES[name]))


@pytest.mark.parametrize(
    "dtype, name",
    [(torch.bfloat16, name) for name in ("plain", "separable", "dropout", "all")]
    + [(torch.float16, name) for name in ("plain", "separable")],
)
def test_low_precision(device, dtype, name):
    check(Case(device=device, dtype=dtype, **FEATURES[name]))


@pytest.mark.parametrize(
    "q_block, k_block", [(16, 16), (16, 128), (32, 64), (64, 32), (64, 64), (128, 16), (128, 64), (128, 128)]
)
def test_blocks(device, q_block, k_block):
    dtype = torch.bfloat16 if q_block >= 64 else torch.float32
    case = {
        "queries": q_block + 20,
        "keys": k_block + 24,
        "size": 16,
        "heads": 1,
        "blocks": (q_block, k_block),
        "batch": 1,
        "density": 0.5,
        "right": k_block // 2,
    }
    check(Case(device=device, dtype=dtype, **case))
    check(Case(device=device, dtype=dtype, dropout_p=0.1, shared_lists=True, row_bias=(1, 1), **case))


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=helpers.name_of)
@pytest.mark.parametrize("size, value_size", [(1, 1), (8, 40), (16, 16), (100, 64), (64, 130), (256, 256), (200, 8)])
def test_head_sizes(device, dtype, size, value_size):
    check(Case(device=device, dtype=dtype, size=size, value_size=value_size, batch=1, queries=40, keys=48))


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 70), (70, 1), (33, 31), (128, 128), (129, 127)])
def test_lengths(device, queries, keys):
    case = Case(device=device, batch=1, queries=queries, keys=keys, density=0.8, kv_heads=1, left=60)
    check(case, rows=False, term=4.0)


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_densities(device, density):
    check(Case(device=device, density=density))


def test_lists_in_any_order_with_what_is_no_block(device):
    """Indices out of range are passed over, counts beyond the width cut, and nothing past the count is read."""
    for seed in range(2):
        case = Case(device=device, batch=1, queries=120, keys=130, size=16, density=0.3, seed=seed, right=60)
        for side, blocks in ((0, 5), (2, 4)):
            counts, indices = case.lists[side : side + 2]
            generator = torch.Generator().manual_seed(seed)
            width = indices.shape[-1] + 4
            listed = torch.full((*counts.shape, width), 2, dtype=torch.int32)
            for at in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
                own = indices[tuple(at)][: counts[tuple(at)]].cpu()
                strange = torch.tensor([-1, blocks, 2**31 - 1, -(2**31)], dtype=torch.int32)
                mixed = torch.cat([own, strange])
                listed[tuple(at)][: len(mixed)] = mixed[torch.randperm(len(mixed), generator=generator)]
            case.lists[side + 1] = listed.to(device)
            case.lists[side] = counts + 4
        check(case)
        case.lists[1], case.lists[3] = (each[..., :3].contiguous() for each in case.lists[1::2])
        got = kernels(*case.arguments(case.leaves(torch.float32)), False)
        expected = reference.block_sparse_attention(*case.arguments(case.leaves(torch.float32)), False)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
        case.lists[0] = torch.full_like(case.lists[0], -3)
        assert not kernels(*case.arguments(case.leaves(torch.float32)), False)[0].any()


def test_rows_that_see_nothing(device):
    case = Case(device=device, right=0)
    case.logits = case.logits._replace(
        key_range=torch.tensor([3, 3], dtype=torch.int32, device=device).expand(2, 40, 2)
    )
    (out, lse, entropy), gradients = case.found(kernels, torch.float32)
    assert not out.any() and (lse == -torch.inf).all() and not entropy.any()
    assert not any(each.any() for each in gradients.values())
    case = Case(device=device, row_bias=(2, 2))
    case.logits.row_bias[:, :, ::3] = -torch.inf
    case.logits.row_bias[:, :, 1::3, ::2] = -torch.inf
    (out, lse, entropy), gradients = case.found(kernels, torch.float32)
    assert not out[:, :, ::3].any() and (lse[:, :, ::3] == -torch.inf).all()
    assert entropy.isfinite().all() and all(each.isfinite().all() for each in gradients.values())
    expected, exact = case.found(reference.block_sparse_attention, torch.float64, rows=False)
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-5, atol=1e-5)
    _, gradients = case.found(kernels, torch.float32, rows=False)
    for name in ("query", "key", "value"):
        torch.testing.assert_close(gradients[name].double(), exact[name].nan_to_num(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys", [56, 53])
def test_dropped_are_those_of_the_mask(device, keys):
    case = Case(
        device=device, heads=1, keys=keys, queries=40, value_size=keys, density=1.0, dropout_p=0.4, blocks=(64, 32)
    )
    case.value = torch.eye(keys, device=device).expand(2, 1, keys, keys)
    (out, *_), _ = case.found(kernels, torch.float32)
    assert torch.equal(out.cpu() > 0, helpers.expected_mask((2, 1, 40, keys), 0.4, 5))
    case.upstream = torch.eye(40, device=device).expand(2, 1, 40, 40)
    case.value = case.value[..., :40].contiguous()
    _, gradients = case.found(kernels, torch.float32, rows=False)
    assert torch.equal(gradients["value"].mT.cpu() > 0, helpers.expected_mask((2, 1, 40, keys), 0.4, 5))


@triton.jit
def keep_kernel(
    straight, turned, seed, threshold, first, keys, ROWS: tl.constexpr, KEYS: tl.constexpr, ALIGNED: tl.constexpr
):
    row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
    keep = attention.tile_keep(seed, threshold, row, 16, keys, KEYS, ALIGNED, False)
    place = tl.arange(0, ROWS)[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    tl.store(straight + place, keep.to(tl.int8))
    keep = attention.tile_keep(seed, threshold, row, 16, keys, KEYS, ALIGNED, True)
    tl.store(turned + tl.trans(place), keep.to(tl.int8))


@pytest.mark.parametrize("keys, aligned", [(40000, True), (40000, False), (40001, False)])
def test_far_elements(device, keys, aligned):
    """Logical indices beyond 2**40, which no test can allocate."""
    first, count, seed = 2**26 + 3, 16, -7
    straight, turned = (torch.zeros(count, count, dtype=torch.int8, device=device) for _ in range(2))
    keep_kernel[(1,)](
        straight, turned, torch.tensor(seed, device=device), 20000, first, keys, count, count, aligned
    )  # fmt: skip
    index = [(first + i) * keys + 16 + j for i in range(count) for j in range(count)]
    key = (seed % 2**32, seed % 2**64 >> 32)
    words = [helpers.philox((i // 8 % 2**32, i // 8 >> 32, 0, 0), key)[i % 8 // 2] for i in index]
    lanes = [int(word) >> 16 * (i % 2) & 0xFFFF for word, i in zip(words, index, strict=True)]
    expected = (torch.tensor(lanes) >= 20000).to(torch.int8).view(count, count)
    assert torch.equal(straight.cpu(), expected) and torch.equal(turned.cpu(), expected)


def test_layouts(device):
    case = Case(device=device, row_bias=(2, 1), columns=8, key_range=True, query_scale=True, key_mask=0.7, queries=20)
    expected, gradients = case.found(kernels, torch.float32)

    def tokens_first(each):
        return each.transpose(1, 2).contiguous().transpose(1, 2)

    def spread(each):
        return torch.stack([each, each], -1)[..., 0]

    for layout in (tokens_first, spread, lambda each: torch.cat([each, each], -1)[..., : each.shape[-1]]):
        leaves = [None if each is None else layout(each).requires_grad_() for each in case.leaves(torch.float32)]
        arguments = list(case.arguments(leaves))
        arguments[3:7] = [spread(each) for each in arguments[3:7]]
        arguments[11], arguments[12] = spread(arguments[11]), spread(arguments[12])
        results = kernels(*arguments, True)
        for got, own in zip(results, expected, strict=True):
            helpers.assert_same_bits(got.detach(), own)
        assert results[0].transpose(1, 2).is_contiguous() == (layout is tokens_first)
        finite = results[1].detach().isfinite()
        upstream = [layout(case.upstream), *(spread(torch.where(finite, each, 0)) for each in case.upstream_rows)]
        asked = [each for each in leaves if each is not None]
        for name, got in zip(NAMES, torch.autograd.grad(results, asked, upstream), strict=True):
            helpers.assert_same_bits(got, gradients[name], name)


def test_expanded_inputs(device):
    case = Case(device=device, batch=1, heads=1)
    key = case.key.expand(2, 2, -1, -1)
    query, value = (each.expand(2, 2, -1, -1) for each in (case.query, case.value))
    expected, _ = case.found(kernels, torch.float32)
    got = kernels(query, key, value, *case.arguments(case.leaves(torch.float32))[3:], False)
    for each in got[0].flatten(0, 1):
        torch.testing.assert_close(each, expected[0][0, 0], rtol=0, atol=0)


def test_only_what_needs_a_gradient(device):
    case = Case(
        device=device,
        batch=1,
        queries=20,
        keys=40,
        query_scale=True,
        row_bias=(1, 2),
        columns=8,
        dropout_p=0.2,
        kv_heads=1,
    )
    _, expected = case.found(kernels, torch.float32)
    out, lse, entropy = kernels(*case.arguments(case.leaves(torch.float32)), False)
    for needed in (*((name,) for name in NAMES), ("query", "value"), ("query_scale", "row_bias")):
        _, found = case.found(kernels, torch.float32, needs=needed)
        assert set(found) == set(needed)
        for name, gradient in found.items():
            helpers.assert_same_bits(gradient, expected[name], f"{name} of {needed}")
        arguments = (*case.arguments(case.leaves(torch.float32)), [name in needed for name in NAMES])
        raw = torch.ops.pyrx_triton.block_sparse_attention_backward(
            case.upstream, None, None, out, lse, entropy, *arguments
        )
        assert [each.numel() > 0 for each in raw] == [name in needed for name in NAMES]


@pytest.mark.parametrize("empty", [{"queries": 0}, {"keys": 0}, {"batch": 0}], ids=str)
def test_empty(device, empty):
    case = Case(device=device, query_scale=True, row_bias=(1, 1), **empty)
    (out, lse, entropy), gradients = case.found(kernels, torch.float32)
    assert not out.any() and (lse == -torch.inf).all() and not entropy.any()
    assert not any(each.any() for each in gradients.values())


def test_infinite_logits_are_nan_as_in_the_reference(device):
    case = Case(device=device, density=1.0)
    case.query[0, 0, 3] = torch.inf
    (out, lse, _), _ = case.found(kernels, torch.float32)
    expected, *_ = reference.block_sparse_attention(*case.arguments(case.leaves(torch.float32)), False)
    assert torch.equal(out.isnan(), expected.isnan()) and out[0, 0, 3].isnan().all() and lse[0, 0, 3].isnan()


@pytest.mark.parametrize("least", [-1e5, -1e10, -1e30, torch.finfo(torch.float32).min])
def test_keys_far_below_before_others(device, least):
    """Masks that are added are numbers: nothing stays of what they hide. The last row has nothing else."""
    query, key, value = (torch.randn(1, 2, 70, 16, device=device, requires_grad=True) for _ in range(3))
    bias = torch.zeros(1, 1, 70, 70, device=device)
    bias[..., :40] = bias[:, :, -1] = least
    found, wanted = (
        pyrx.block_sparse_attention(query, key, value, bias=bias, return_lse=True, return_entropy=True, backend=backend)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(found[:2], wanted[:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2][:, :, :-1], wanted[2][:, :, :-1], rtol=1e-5, atol=1e-5)
    # the last row's logits differ by less than float32 tells, all but those of -1e5
    torch.testing.assert_close(
        found[2][:, :, -1].exp(), torch.full((1, 2), 70.0, device=device), rtol=0.5 if least == -1e5 else 1e-5, atol=0
    )
    gradients, expected = (
        torch.autograd.grad(out[:, :, :-1].square().sum(), (query, key, value), retain_graph=True)
        for out, *_ in (found, wanted)
    )
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)
    # of a row whose logarithm has no room for how many there are, the weights of the backward are at most 1
    for each in torch.autograd.grad(found[0][:, :, -1].sum(), (query, key, value)):
        assert each.abs().max() < 1e3


@pytest.mark.parametrize("size", [1e6, 1e10, 1e14])
def test_products_far_from_zero(device, size):
    """One key is ahead of all others by more than exp can take."""
    query, key = torch.zeros(1, 1, 70, 16, device=device), torch.zeros(1, 1, 70, 16, device=device)
    query[..., 0] = size
    key[..., 0] = torch.linspace(-1.7, -0.3, 70, device=device).roll(40)
    value = torch.randn(1, 1, 70, 16, device=device, requires_grad=True)
    out, lse, entropy = pyrx.block_sparse_attention(
        query, key.requires_grad_(), value, return_lse=True, return_entropy=True, backend="triton"
    )
    torch.testing.assert_close(out, value[:, :, 39:40].expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, -0.3 * size / 4))
    assert not entropy.any()
    out.sum().backward()
    assert value.grad.abs().max() <= 70 and key.grad.isfinite().all()


def test_public_function(device):
    query, key, value = (torch.randn(1, 2, 70, 16, device=device) for _ in range(3))
    options = {"is_causal": True, "return_lse": True, "return_entropy": True, "seed": 1, "dropout_p": 0.1}
    mask = BlockMask.from_dense(torch.ones(2, 2, dtype=torch.bool, device=device), (70, 70), 64, backend="reference")
    got, expected = (
        pyrx.block_sparse_attention(query, key, value, mask, backend=backend, **options)
        for backend in ("triton", "reference")
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    bare = pyrx.block_sparse_attention(query, key, value, mask, backend="triton", is_causal=True)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(bare, plain, rtol=1e-5, atol=1e-5)


def test_entries_have_the_shapes_of_their_fakes(device):
    case = Case(device=device, query_scale=True, row_bias=(1, 2), columns=8, dropout_p=0.2, queries=20, keys=24)
    plain = Case(device=device, queries=20, keys=24)
    namespace = torch.ops.pyrx_triton
    for each in (case, plain):
        arguments = each.arguments(each.leaves(torch.float32))
        out, lse, entropy = kernels(*arguments, True)
        needs = [True, True, True, *(value is not None for value in each.logits[4:7])]
        calls = [
            (namespace.block_sparse_attention, (*arguments, True)),
            (
                namespace.block_sparse_attention_backward,
                (each.upstream, *each.upstream_rows, out, lse, entropy, *arguments, needs),
            ),
        ]
        for op, own in calls:
            torch.library.opcheck(op, own, test_utils=("test_schema", "test_faketensor"))


def test_errors(device):
    case = Case(device=device, queries=40, keys=40)
    arguments = case.arguments(case.leaves(torch.float32))
    with pytest.raises(TypeError, match="float64"):
        kernels(*case.arguments(case.leaves(torch.float64)), False)
    with pytest.raises(ValueError, match=r"k_block.*one of 16, 32, 64, 128.*48"):
        kernels(*arguments[:8], 48, *arguments[9:], False)
    with pytest.raises(ValueError, match="kv_indices"):
        kernels(*arguments[:4], arguments[4][..., 0], *arguments[5:], False)
    out, lse, entropy = kernels(*arguments, False)
    backward = torch.ops.pyrx_triton.block_sparse_attention_backward
    with pytest.raises(ValueError, match="query_scale"):
        backward(case.upstream, None, None, out, lse, entropy, *arguments, [False, False, False, True, False, False])
    with pytest.raises(ValueError, match="grad"):
        backward(case.upstream[:, :, :3], None, None, out, lse, entropy, *arguments, [True] * 3 + [False] * 3)


COMPILE = """
import sys, torch
from triton_helpers import compile_launches, exponents_of, report
from pyrx._triton import block_sparse_attention as kernels
compiled = compile_launches(ARCHITECTURE)

def lists(rows, columns):
    return torch.zeros(1, 2, rows, dtype=torch.int32), torch.zeros(1, 2, rows, columns, dtype=torch.int32)

def call(dtype, size, block, kind="plain", threshold=0, tokens=1024, **logits):
    query, rows = torch.zeros(1, 2, tokens, size, dtype=dtype), torch.zeros(1, 2, tokens)
    blocks = -(-tokens // block)
    given = dict.fromkeys(
        ("left", "right", "key_range", "key_mask", "query_scale", "row_bias", "column_bias", "scale", "softcap")
    )
    given.update({"left": -1, "right": 0, "scale": 0.1, "softcap": 0.0, **logits})
    seed = torch.tensor(1) if threshold else None
    arguments = (query, query, query, *lists(blocks, blocks), *lists(blocks, blocks), block, block, *given.values())
    rest = kind == "all"
    kernels.block_sparse_attention(*arguments, seed, threshold, rest)
    needs = [True] * 3 + [given[name] is not None for name in ("query_scale", "row_bias", "column_bias")]
    more = (rows, rows) if rest else (None, None)
    kernels.block_sparse_attention_backward(
        query, *more, query, rows, rows if rest else rows[:0], *arguments, seed, threshold, needs
    )
    report(
        compiled,
        lambda kernel: {"wgmma": kernel.asm["ptx"].count("wgmma.mma_async"), "mma": kernel.asm["ptx"].count("mma.sync"),
                        "async": kernel.asm["ptx"].count("cp.async.c"), "exponents": exponents_of(kernel.asm["ptx"])},
        dtype=str(dtype)[6:], size=size, block=block, kind=kind,
    )

def every(dtype, size, block):
    bias = torch.zeros(1, 2, 1024, 32, dtype=dtype)
    call(
        dtype, size, block, "all", 1000, key_range=torch.zeros(1, 1024, 2, dtype=torch.int32),
        key_mask=torch.zeros(1, 1024, dtype=torch.bool), query_scale=torch.zeros(1, 2, 1024), row_bias=bias,
        column_bias=bias, softcap=2.0,
    )

"""
PLAIN = """
for dtype in (torch.float16, torch.bfloat16):
    for size in (64, 128, 256):
        for block in (64, 128):
            call(dtype, size, block)
"""
OTHERS = """
for size in (64, 128, 256):
    call(torch.float32, size, 64)
call(torch.bfloat16, 80, 128)
call(torch.float16, 1, 16)
call(torch.float32, 20, 32, tokens=999)
every(torch.bfloat16, 128, 128)
every(torch.float32, 64, 16)
every(torch.float32, 256, 128)
bias = torch.zeros(1, 2, 1024, 1024, dtype=torch.bfloat16)
for size in (64, 128, 256):
    call(torch.bfloat16, size, 64, "bias", row_bias=bias)
"""


def assert_rounded(found):
    """No exponent is a product fused with the sum that takes a maximum off: far from 0 it would be hundreds."""
    if found["kernel"] != "_delta_kernel":
        least = "mul.f32" if found["kernel"] == "_forward_kernel" else "min.NaN.f32"
        assert least in found["exponents"] and set(found["exponents"]) <= {"mul.f32", "min.NaN.f32"}, found


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.skipif(INTERPRETED, reason="one process holds either interpreted or compiled kernels")
def test_plain_attention_ahead_of_time(python, tmp_path, architecture):
    """16 bits: pipelined copies into the tensor cores, registers alone."""
    script = COMPILE.replace("ARCHITECTURE", str(architecture)) + PLAIN
    found = ahead_of_time(python, tmp_path, script)
    assert {each["kernel"] for each in found} == kernels_of("block_sparse_attention*.py") - {"_bias_kernel"}
    for each in found:
        assert_rounded(each)
        assert each["stack"] == 0, each
        assert each["shared"] <= SHARED_LIMIT[SMALLEST[architecture]], each
        if each["kernel"] != "_delta_kernel":
            instruction = "wgmma" if architecture == 90 else "mma"
            # the largest heads leave sm_80 no memory for a second stage
            single = (architecture, each["kernel"], each["size"]) == (80, "_key_value_kernel", 256)
            assert each[instruction] >= 8 and (each["async"] > 0 or single), each


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.skipif(INTERPRETED, reason="one process holds either interpreted or compiled kernels")
def test_ahead_of_time(python, tmp_path, architecture):
    """Every feature, and head sizes that are no powers of two."""
    script = COMPILE.replace("ARCHITECTURE", str(architecture)) + OTHERS
    found = ahead_of_time(python, tmp_path, script)
    assert {each["kernel"] for each in found} == kernels_of("block_sparse_attention*.py")
    for each in found:
        assert_rounded(each)
        # the bias of the largest float32 heads leaves no registers
        largest = (each["kernel"], each["dtype"], each["size"]) == ("_bias_kernel", "float32", 256)
        assert each["stack"] <= (2560 if largest else 96), each
        assert each["shared"] <= SHARED_LIMIT[SMALLEST[architecture]], each
        if each["dtype"] != "float32" and each["kernel"] != "_delta_kernel":
            assert each["wgmma"] + each["mma"] > 0, each
