"""The transpose of attention times a tensor against explicit dense formulas in float64."""

import pytest
import torch
from edits import (
    BLOCK,
    HKV,
    ROWS,
    B,
    D,
    H,
    S,
    assert_same_gradients,
    blocks_of,
    close,
    gradients,
    inputs,
    normal,
    weights_of,
)
from helpers import name_of, need

import pyrx
from pyrx import BlockMask

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def backend(backend):
    return need(backend, ops=ROWS)


def reversed_case(name):
    """(options of pyrx, options of the formula, visible (.., S, S - 8), tensors that take a gradient)."""
    mask, full = blocks_of(S, S - 8)
    q, k = torch.arange(S)[:, None], torch.arange(S - 8)
    every = torch.ones(1, 1, S, S - 8, dtype=torch.bool)
    key_mask = torch.rand(B, S - 8, generator=torch.Generator().manual_seed(3)) > 0.3
    scale = normal(B, H, S, seed=9, grad=True)
    bias = normal(1, H, S, S - 8, seed=10, grad=True)
    row, column = normal(B, 1, S, 2, seed=11, grad=True), normal(1, H, S, (S - 8) // 2, seed=12, grad=True)
    return {
        "dense": ({}, {}, every, ()),
        "blocks": ({"block_mask": mask}, {}, full, ()),
        "causal": ({"is_causal": True, "block_mask": mask}, {}, full & (k <= q), ()),
        "window": ({"window": (20, 3)}, {}, (k >= q - 20) & (k <= q + 3) & every, ()),
        "key_mask": ({"key_mask": key_mask, "block_mask": mask}, {}, full & key_mask[:, None, None], ()),
        "scale and softcap": ({"scale": 0.7, "softcap": 2.0}, {"scale": 0.7, "softcap": 2.0}, every, ()),
        "query_scale": ({"query_scale": scale, "block_mask": mask}, {"query_scale": scale}, full, (scale,)),
        "bias": ({"bias": bias, "block_mask": mask}, {"bias": bias}, full, (bias,)),
        "separable bias": (
            {"bias": (row, column)},
            {"bias": row.repeat_interleave((S - 8) // 2, 3) + column.repeat(1, 1, 1, 2)},
            every,
            (row, column),
        ),
    }[name]


REVERSED = ["dense", "blocks", "causal", "window", "key_mask", "scale and softcap", "query_scale", "bias",
            "separable bias"]  # fmt: skip


@pytest.mark.parametrize("case", REVERSED)
@pytest.mark.parametrize("heads", [HKV, H])
def test_reversed_attention(backend, case, heads):
    options, formula, visible, extra = reversed_case(case)
    query, key, _ = inputs(heads=heads, keys=S - 8, grad=True)
    u = normal(B, H, S, 5, seed=4, grad=True)
    weights = weights_of(query, key, visible, **formula)
    expected = (weights.mT @ u).unflatten(1, (heads, -1)).sum(2)
    got = pyrx.reversed_attention(query, key, u, enable_gqa=True, backend=backend, **options)
    close(got, expected)
    assert_same_gradients(got, expected, (query, key, u, *extra))
    assert (got.detach()[(weights.detach().mT == 0).all(-1).unflatten(1, (heads, -1)).all(2)] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name_of)
def test_reversed_attention_in_low_precision(backend, dtype):
    need(backend, "cpu", dtype, ROWS)
    mask, full = blocks_of()
    query, key, value = inputs(dtype, H, grad=True)
    got = pyrx.reversed_attention(query, key, value, mask, backend=backend)
    assert got.dtype == dtype
    expected = weights_of(query.double(), key.double(), full).mT @ value.double()
    close(got, expected, dtype=dtype)
    found = gradients(got, (query, key, value))
    for a, b in zip(found, gradients(expected, (query, key, value)), strict=True):
        assert a.dtype == dtype
        close(a / b.abs().max(), b.double() / b.abs().max(), dtype=dtype)


def test_gradcheck_of_reversed_attention(backend):
    mask = BlockMask.from_dense(torch.tensor([[True, True], [False, True]]), (20, 19), BLOCK)
    query, key, u = normal(1, 2, 20, 3, grad=True), normal(1, 1, 19, 3, grad=True), normal(1, 2, 20, 2, grad=True)
    scale = normal(1, 2, 20, grad=True)

    def run(query, key, u, scale):
        return pyrx.reversed_attention(
            query, key, u, mask, window=6, enable_gqa=True, query_scale=scale, softcap=1.5, backend=backend
        )

    assert torch.autograd.gradcheck(run, (query, key, u, scale))


def test_reversed_attention_is_the_adjoint_of_attention(backend):
    """<A v, u> = <v, A^T u>."""
    mask, _ = blocks_of()
    query, key, value = inputs()
    u = normal(B, H, S, D - 2, seed=6)
    forth = pyrx.block_sparse_attention(query, key, value, mask, enable_gqa=True, backend=backend)
    back = pyrx.reversed_attention(query, key, u, mask, enable_gqa=True, backend=backend)
    close((forth * u).sum(), (value * back).sum())


@pytest.mark.parametrize("which", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_the_gradients_of_reversed_attention_that_are_needed(backend, which):
    tensors = [each.requires_grad_(need) for each, need in zip(inputs(heads=H), which, strict=True)]
    out = pyrx.reversed_attention(*tensors, backend=backend)
    assert out.requires_grad == any(which)
    if any(which):
        out.backward(torch.ones_like(out))
    assert [each.grad is not None for each in tensors] == list(which)


def test_second_gradient_of_reversed_attention_raises():
    need("cpu", ops=ROWS)
    query, key, u = inputs(heads=H, grad=True)
    out = pyrx.reversed_attention(query, key, u, backend="cpu")
    (found,) = torch.autograd.grad(out.sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="pyrx::reversed_attention: expected one differentiation, got a second"):
        found.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_reversed_attention(backend, dynamic):
    mask, _ = blocks_of()
    query, key, u = inputs(heads=H, grad=True)
    run = torch.compile(pyrx.reversed_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got = run(query, key, u, mask, is_causal=True, backend=backend)
    expected = pyrx.reversed_attention(query, key, u, mask, is_causal=True, backend=backend)
    close(got, expected)
    assert_same_gradients(got, expected, (query, key, u))


def test_reversed_attention_under_autocast(backend):
    query, key, u = inputs(torch.float32, H, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = pyrx.reversed_attention(query, key, u, backend=backend)
    assert got.dtype == torch.bfloat16
    close(got, pyrx.reversed_attention(query, key, u, backend="reference"), dtype=torch.bfloat16)
    assert all(each.dtype == torch.float32 for each in gradients(got, (query, key, u)))
    low = [each.detach().bfloat16() for each in (query, key, u)]
    with torch.autocast("cpu", torch.bfloat16):
        got = pyrx.reversed_attention(*low, backend=backend)
    assert torch.equal(got, pyrx.reversed_attention(*low, backend=backend))


def test_empty_reversed_attention(backend):
    query, key, u = inputs(heads=H)
    out = pyrx.reversed_attention(query[:, :, :0], key, u[:, :, :0], backend=backend)
    assert out.shape == (B, H, S, D - 2) and (out == 0).all()
    assert pyrx.reversed_attention(query, key[:, :, :0], u, backend=backend).shape == (B, H, 0, D - 2)
    assert pyrx.reversed_attention(query[:0], key[:0], u[:0], backend=backend).shape == (0, H, S, D - 2)
