"""The M dropped copies and their fold: pyrx.multi_sample_dropout."""

import math

import pytest
import torch
from helpers import (
    FLOATS,
    LOW,
    SAMPLINGS,
    assert_same_bits,
    assert_within_budget,
    dropped,
    expected_mask,
    layouts,
    name_of,
    probabilities_of,
    scale_of,
    threads,
)
from hypothesis import given
from hypothesis import strategies as st

import pyrx

SHAPES = [(), (0,), (1,), (3,), (100,), (1311,), (0, 64), (7, 63), (3, 0), (2, 3, 100)]
P_LISTS = [0.5, 0.3, 0.0, [0.0, 0.5, 0.3, 0.999999, 0.1]]


def copies(x, num_samples, p, seed, sampling="independent"):
    each = probabilities_of(p, num_samples)
    return torch.stack([dropped(x, each[m], seed, m, sampling) for m in range(num_samples)])


def folded(upstream, p, seed, sampling="independent"):
    """The sum over samples in float64."""
    total = torch.zeros(upstream.shape[1:], dtype=torch.float64)
    for m, each in enumerate(probabilities_of(p, len(upstream))):
        mask = expected_mask(tuple(upstream.shape[1:]), each, seed, m, sampling)
        total += torch.where(mask, upstream[m].double() * scale_of(each), 0.0)
    return total


@pytest.mark.parametrize("p", P_LISTS, ids=["half", "three_tenths", "zero", "list"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_samples_are_dropouts_of_their_number(backend, dtype, sampling, p):
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        for num_samples in (5,) if isinstance(p, list) else (1, 2, 3, 8):
            got = pyrx.multi_sample_dropout(x, num_samples, p, sampling=sampling, seed=4, backend=backend)
            assert_same_bits(got, copies(x, num_samples, p, 4, sampling), f"{shape}, M = {num_samples}")


def test_samples_equal_pyrx_dropout(backend):
    x = torch.randn(3, 100)
    got = pyrx.multi_sample_dropout(x, 4, 0.3, seed=8, backend=backend)
    for m in range(4):
        assert_same_bits(got[m], pyrx.dropout(x, 0.3, sample=m, seed=8, backend=backend))


@pytest.mark.parametrize("shape", [(5, 13), (2, 3, 7, 5), (2, 3, 4, 5, 6)], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_each_sample_has_the_inputs_strides(backend, shape, dtype):
    for name, x in layouts(shape, dtype):
        x.requires_grad_()
        got = pyrx.multi_sample_dropout(x, 3, 0.3, seed=7, backend=backend)
        assert_same_bits(got, copies(x.detach(), 3, 0.3, 7), name)
        assert got.stride() == (x.numel(), *torch.empty_like(x).stride()), name
        for grad_name, upstream in layouts((3, *shape), torch.float64):
            upstream = upstream.to(dtype)
            (grad,) = torch.autograd.grad(got, x, upstream, retain_graph=True)
            exact = folded(upstream, 0.3, 7)
            plain = sum(dropped(upstream[m], 0.3, 7, m) for m in range(3))
            assert_within_budget(grad, plain, exact, f"{name}, gradient {grad_name}", slack=3)


def test_expanded_input(backend):
    row = torch.randn(1, 37, requires_grad=True)
    got = pyrx.multi_sample_dropout(row.expand(5, 37), 2, 0.5, seed=7, backend=backend)
    assert_same_bits(got, copies(row.detach().expand(5, 37), 2, 0.5, 7))
    (grad,) = torch.autograd.grad(got.sum(), row)
    torch.testing.assert_close(grad, copies(torch.ones(5, 37), 2, 0.5, 7).sum((0, 1)).unsqueeze(0))


@pytest.mark.parametrize("p", P_LISTS, ids=["half", "three_tenths", "zero", "list"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_backward_folds_the_gradients_through_the_masks(backend, dtype, sampling, p):
    for shape in SHAPES:
        for num_samples in (5,) if isinstance(p, list) else (1, 3, 8):
            x = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
            upstream = torch.randn((num_samples, *shape), dtype=torch.float64).to(dtype)
            got = pyrx.multi_sample_dropout(x, num_samples, p, sampling=sampling, seed=6, backend=backend)
            (grad,) = torch.autograd.grad(got, x, upstream)
            each = probabilities_of(p, num_samples)
            plain = sum(dropped(upstream[m], each[m], 6, m, sampling) for m in range(num_samples))
            exact = folded(upstream, p, 6, sampling)
            # float32 sums of low precision leave one rounding, half a unit
            slack = 0.51 if dtype in LOW and backend != "reference" else num_samples
            assert_within_budget(grad, plain, exact, f"{shape}, M = {num_samples}", slack=slack)


def test_fold_accumulates_in_float32(cpu):
    """256 ones, then 63 of a half unit in the last place of bfloat16: only a float32 sum sees them."""
    x = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.ones(64, 8, dtype=torch.bfloat16)
    upstream[0] = 256.0
    (grad,) = torch.autograd.grad(pyrx.multi_sample_dropout(x, 64, 0.0, seed=1, backend=cpu), x, upstream)
    assert (grad == torch.tensor(256.0 + 63).to(torch.bfloat16)).all()


def test_dropped_nan_gradients_are_dropped(backend):
    x = torch.randn(5, 63, requires_grad=True)
    upstream = torch.ones(2, 5, 63)
    upstream[1, 2] = math.nan
    upstream[0, 3] = math.inf
    (grad,) = torch.autograd.grad(pyrx.multi_sample_dropout(x, 2, 0.5, seed=3, backend=backend), x, upstream)
    assert torch.equal(grad[2].isnan(), expected_mask((5, 63), 0.5, 3, 1)[2])
    assert torch.equal(grad[3].isinf(), expected_mask((5, 63), 0.5, 3, 0)[3])
    assert grad[[0, 1, 4]].isfinite().all()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_gradcheck_twice(backend, sampling):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def function(value):
        return pyrx.multi_sample_dropout(value, 3, [0.5, 0.3, 0.0], sampling=sampling, seed=1, backend=backend)

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


def test_thread_counts_do_not_change_bits(backend):
    x = torch.randn(101, 1311, requires_grad=True)
    upstream = torch.randn(3, 101, 1311)
    found = {}
    for count in (1, 2, 3):
        with threads(count):
            got = pyrx.multi_sample_dropout(x, 3, 0.3, seed=9, backend=backend)
            found[count] = got.detach(), *torch.autograd.grad(got, x, upstream)
    for count in (2, 3):
        for one, other in zip(found[1], found[count], strict=True):
            assert_same_bits(other, one, f"{count} threads")


def test_no_grad_and_detached_inputs_give_plain_tensors(backend):
    assert not pyrx.multi_sample_dropout(torch.randn(3), 2, backend=backend).requires_grad
    with torch.no_grad():
        assert not pyrx.multi_sample_dropout(torch.randn(3, requires_grad=True), 2, backend=backend).requires_grad


def test_the_default_draws_new_masks_each_time(backend):
    x = torch.ones(8, 64)
    first, second = (pyrx.multi_sample_dropout(x, backend=backend) for _ in range(2))
    assert first.shape == (8, 8, 64) and not torch.equal(first, second)
    assert len({tuple(each.flatten().tolist()) for each in first}) == 8


@given(
    shape=st.lists(st.integers(0, 20), max_size=3).map(tuple),
    each_p=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5),
    seed=st.integers(-(2**63), 2**64 - 1),
    sampling=st.sampled_from(SAMPLINGS),
    dtype=st.sampled_from(FLOATS),
)
def test_any_shape_and_probabilities(backend, shape, each_p, seed, sampling, dtype):
    x = torch.linspace(-2, 3, math.prod(shape), dtype=torch.float64).reshape(shape).to(dtype)
    got = pyrx.multi_sample_dropout(x, len(each_p), each_p, sampling=sampling, seed=seed, backend=backend)
    assert_same_bits(got, copies(x, len(each_p), each_p, seed, sampling))
