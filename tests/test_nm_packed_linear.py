"""Products with compressed N:M weights, and their gradients, against dense ones."""

import math

import pytest
import torch
from helpers import FLOATS, assert_same_bits, assert_within_budget, layouts, name_of, threads
from test_nm_packed import RATIOS, F, leaves_of, mask_of, served, thinned, values_of

import pyrx
from pyrx.reference import nm_packed as reference

# Products.


def check_product(backend, x, packed, bias):
    dense = packed.to_dense(backend="reference")
    got = pyrx.nm_linear(x, packed, bias, backend=backend)
    exact = F.linear(x.double(), dense.double(), None if bias is None else bias.double())
    assert_within_budget(got, F.linear(x, dense, bias), exact, f"{packed} {list(x.shape)}")
    return got


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 16, 17, 33, 63, 100, 128, 200])
def test_products(backend, dtype, batch):
    served(backend, dtype=dtype)
    for n, m in RATIOS:
        rows, groups = (7, 3) if batch % 2 else (37, 5)
        weight = values_of((rows, groups * m), dtype, seed=m)
        packed = pyrx.nm_compress(weight, n, m, mask=thinned(mask_of(weight, n, m)))
        x, bias = values_of((batch, groups * m), dtype, 1), values_of((rows,), dtype, 2)
        check_product(backend, x, packed, bias)
        check_product(backend, x, packed, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("n, m", [(2, 4), (1, 8), (3, 8), (128, 128)])
def test_products_of_many_blocks(backend, dtype, n, m):
    served(backend, dtype=dtype)
    weight = values_of((300, 1280), dtype)
    packed = pyrx.nm_compress(weight, n, m, mask=mask_of(weight, n, m))
    for batch in (1, 4, 16, 100, 260):
        check_product(backend, values_of((batch, 1280), dtype, 1), packed, values_of((300,), dtype, 2))


def test_each_input_meets_its_weight(backend):
    """Powers of two: every product is told from every other."""
    for n, m in RATIOS:
        weight = torch.zeros(m, m).fill_diagonal_(1.0)
        packed = pyrx.nm_compress(weight, n, m, mask=weight != 0)
        for batch in (1, 3, 20, 150):
            x = torch.arange(batch * m, dtype=torch.float32).reshape(batch, m)
            assert torch.equal(pyrx.nm_linear(x, packed, backend=backend), x), (n, m)


def test_shapes_of_x(backend):
    packed = pyrx.nm_compress(values_of((5, 24)), 2, 4, mask=mask_of(values_of((5, 24)), 2, 4))
    bias = values_of((5,))
    for shape in ((24,), (1, 24), (2, 3, 24), (2, 1, 3, 24), (0, 24), (3, 0, 24)):
        assert check_product(backend, values_of(shape, seed=3), packed, bias).shape == (*shape[:-1], 5)
    for _, x in layouts((6, 24)):
        check_product(backend, x, packed, bias.repeat_interleave(2)[::2])
    spread = pyrx.NMPacked(packed.values.t().contiguous().t(), packed.indices.t().contiguous().t(), 2, 4)
    x = values_of((6, 24))
    assert_same_bits(pyrx.nm_linear(x, spread, backend=backend), pyrx.nm_linear(x, packed, backend=backend))


def test_empty(backend):
    for shape in ((0, 8), (3, 0), (0, 0), (0,), (2, 0, 8)):
        packed = pyrx.nm_compress(torch.randn(shape), 2, 4, mask=torch.ones(shape) == 0, backend=backend)
        assert packed.to_dense(backend=backend).shape == shape
        if len(shape) == 2:
            x, bias = torch.randn(3, shape[1], requires_grad=True), torch.randn(shape[0], requires_grad=True)
            packed.values.requires_grad_()
            got = pyrx.nm_linear(x, packed, bias, backend=backend)
            assert torch.equal(got, bias.expand(3, -1))
            found = torch.autograd.grad(got.sum(), (x, packed.values, bias))
            assert not found[0].any() and found[1].shape == packed.values.shape and bool((found[2] == 3).all())


def test_threads_do_not_change_bits(cpu):
    served(cpu)
    for n, m in [(2, 4), (1, 8), (3, 8)]:
        weight = values_of((515, 384))
        packed = pyrx.nm_compress(weight, n, m, mask=mask_of(weight, n, m))
        for batch in (1, 3, 8, 70, 300):
            x = values_of((batch, 384), seed=1)
            found = []
            for count in (1, 2, 3):
                with threads(count):
                    found.append(pyrx.nm_linear(x, packed, backend=cpu))
            assert_same_bits(found[1], found[0])
            assert_same_bits(found[2], found[0])


@pytest.mark.cpu_kernels
def test_rows_do_not_change_each_other(cpu):
    """A row of the weight gives the same bits alone as among others."""
    served(cpu)
    weight = values_of((67, 256))
    packed = pyrx.nm_compress(weight, 2, 4, mask=mask_of(weight, 2, 4))
    for batch in (1, 4, 24, 200):
        x = values_of((batch, 256), seed=1)
        expected = pyrx.nm_linear(x, packed, backend=cpu)
        for first, last in ((0, 1), (3, 8), (64, 67)):
            part = pyrx.NMPacked(packed.values[first:last], packed.indices[first:last], 2, 4)
            assert_same_bits(pyrx.nm_linear(x, part, backend=cpu), expected[:, first:last].contiguous())


@pytest.mark.cpu_kernels
def test_nan_meets_stored_weights_alone(cpu):
    served(cpu)
    weight = torch.ones(3, 8)
    packed = pyrx.nm_compress(weight, 2, 4, mask=torch.tensor([True, False, True, False] * 2).expand(3, 8))
    for batch in (1, 3, 20):
        x = torch.ones(batch, 8)
        x[0, 1], x[0, 7] = math.nan, math.inf
        assert torch.equal(pyrx.nm_linear(x, packed, backend=cpu), torch.full((batch, 3), 4.0))
        x[0, 2] = math.nan
        assert pyrx.nm_linear(x, packed, backend=cpu)[0].isnan().all()


# Gradients.


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)], ids=str)
def test_gradients(backend, dtype, needs):
    served(backend, dtype=dtype)
    for n, m in [(2, 4), (1, 8), (3, 8), (16, 32)]:
        x, packed, bias = leaves_of(n, m, dtype=dtype)
        upstream = values_of((2, 3, 5), dtype, 3)

        def both_ways(given, backend, packed=packed, upstream=upstream):
            leaves = [
                each.detach().clone().requires_grad_(bool(needed)) for each, needed in zip(given, needs, strict=True)
            ]
            asked = [each for each in leaves if each.requires_grad]
            if backend is None:
                dense = reference.nm_decompress(leaves[1], packed.indices, packed.n, packed.m)
                got = F.linear(leaves[0], dense, leaves[2])
            else:
                now = pyrx.NMPacked(leaves[1], packed.indices, packed.n, packed.m)
                got = pyrx.nm_linear(leaves[0], now, leaves[2], backend=backend)
            return torch.autograd.grad(got, asked, upstream.to(got.dtype))

        given = (x, packed.values, bias)
        found, plain = both_ways(given, backend), both_ways(given, None)
        exact = both_ways([each.double() for each in given], None)
        for one, other, truth in zip(found, plain, exact, strict=True):
            assert one.shape == truth.shape and one.dtype == dtype
            assert_within_budget(one, other, truth, f"{n}:{m}")


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=name_of)
def test_gradcheck(backend, batch):
    x, packed, bias = leaves_of(2, 4, groups=2, batch=batch)

    def function(x, values, bias):
        return pyrx.nm_linear(x, pyrx.NMPacked(values, packed.indices, 2, 4), bias, backend=backend)

    leaves = [each.requires_grad_() for each in (x, packed.values, bias)]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradient_of_to_dense(backend):
    _, packed, _ = leaves_of(3, 8)
    values = packed.values.requires_grad_()
    dense = pyrx.NMPacked(values, packed.indices, 3, 8).to_dense(backend=backend)
    upstream = values_of(dense.shape, torch.float64, 5)
    (found,) = torch.autograd.grad(dense, values, upstream)
    assert_same_bits(found, upstream.gather(-1, reference.columns_of(packed.indices, 3, 8)))
    assert torch.autograd.gradcheck(lambda v: pyrx.NMPacked(v, packed.indices, 3, 8).to_dense(backend=backend), values)


def test_the_weight_has_no_gradient(backend):
    weight = values_of((3, 8)).requires_grad_()
    packed = pyrx.nm_compress(weight, 2, 4, mask=mask_of(weight, 2, 4), backend=backend)
    assert not packed.values.requires_grad


def test_what_is_saved(cpu):
    x, packed, bias = leaves_of(2, 4, dtype=torch.float32)
    for needs, kept in (((True, False), {"values", "indices"}), ((False, True), {"x", "indices"})):
        names = {id(x): "x", id(packed.values): "values", id(packed.indices): "indices"}
        x.requires_grad_(needs[0])
        packed.values.requires_grad_(needs[1])
        saved = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.data_ptr()), lambda t: t):  # noqa: B023
            pyrx.nm_linear(x, packed, bias, backend=cpu)
        assert {names[id(each)] for each in (x, packed.values, packed.indices) if each.data_ptr() in saved} == kept
