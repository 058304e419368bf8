"""Attention over listed blocks, backward: the formula's own gradients, gradcheck, what is asked for, repetition."""

import itertools

import pytest
import torch
from attention import (
    BLOCKS,
    CASES,
    NAMES,
    RESULTS,
    ROW,
    SERVED,
    assert_attends,
    assert_gradients,
    attention,
    block_mask,
    formula,
    gradients,
    listed,
    pytorch,
    raw,
    visible,
)
from helpers import FLOATS, assert_same_bits, name_of, need
from hypothesis import given
from hypothesis import strategies as st

import pyrx
from pyrx import _library

SMALL = {"queries": 33, "keys": 40, "block": (16, 16), "size": 8}
EVERY = {"query_scale": True, "bias": (2, 2), "columns": 8}  # every tensor that has a gradient


def case(name, dtype=torch.float64, **changes):
    return attention(**CASES[name] | changes, dtype=dtype)


def assert_exact(call, backend, what="", **options):
    """In float64, to rounding."""
    need(backend, ops=(ROW,))
    results, found = gradients(call, lambda each: each(backend), **options)
    expected_results, expected = gradients(call, formula, **options)
    assert set(found) == set(expected)
    for one, other, name in zip(results, expected_results, RESULTS, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11, msg=lambda text: f"{what} {name}: {text}")  # noqa: B023
    for name in found:
        torch.testing.assert_close(
            found[name],
            expected[name],
            rtol=1e-9,
            atol=1e-10,
            msg=lambda text: f"{what} {name}: {text}",  # noqa: B023
        )


# Against the gradients of the formula.


@pytest.mark.parametrize("backend, dtype", SERVED, ids=name_of)
@pytest.mark.parametrize("name", CASES)
def test_gradients(backend, name, dtype):
    call = case(name, dtype)
    if dtype == torch.float64:
        assert_exact(call, backend, name)
    else:
        assert_gradients(call, backend, name)


@st.composite
def calls(draw):
    """Arguments of attention(): any of its features beside any other."""
    batch, heads = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 4, 6)))
    columns = draw(st.sampled_from((0, 0, 1, 3, 20)))
    keys = columns * draw(st.integers(1, 9)) if columns else draw(st.integers(1, 180))
    found = {
        "batch": batch,
        "heads": heads,
        "kv_heads": draw(st.sampled_from([each for each in (1, 2, 3, 6) if heads % each == 0])),
        "queries": draw(st.integers(1, 180)),
        "keys": keys,
        "size": draw(st.integers(1, 40)),
        "value_size": draw(st.integers(1, 40)),
        "block": (draw(st.sampled_from(BLOCKS)), draw(st.sampled_from(BLOCKS))),
        "lead": (draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, heads)))),
        "density": draw(st.sampled_from((0.2, 0.6, 1.0))),
        "ranges": draw(st.sampled_from((0, 0, 1, batch))),
        "key_mask": draw(st.booleans()),
        "query_scale": draw(st.booleans()),
        "is_causal": draw(st.booleans()),
    }
    if columns or draw(st.booleans()):
        found |= {"bias": (draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, heads)))), "columns": columns}
    if draw(st.booleans()):
        found["window"] = (draw(st.integers(-1, 60)), draw(st.integers(-1, 60)))
    if draw(st.booleans()):
        found["softcap"] = draw(st.sampled_from((0.5, 4.0)))
    if draw(st.booleans()):
        found |= {"dropout_p": draw(st.sampled_from((0.1, 0.7))), "seed": draw(st.integers(0, 2**63 - 1))}
    return found


@given(arguments=calls())
def test_any_call(backend, arguments):
    assert_exact(attention(**arguments), backend, str(arguments))


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("name", ["dense", "causal", "bias_2_3", "heads_4_2", "head_64", "head_128", "lengths_1311"])
def test_gradients_of_the_output_alone(backend, name, dtype):
    """Beside those of scaled_dot_product_attention in the same dtype."""
    assert_gradients(case(name, dtype), backend, name, through=("out",))


@pytest.mark.parametrize("through", [each for n in (1, 2) for each in itertools.combinations(RESULTS, n)], ids=name_of)
@pytest.mark.parametrize("name", ["together", "together_pair"])
def test_gradients_through_some_results(backend, name, through):
    assert_exact(case(name), backend, through=through)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_gradients_with_dropout(backend, p, dtype):
    for name in ("blocks_32_32", "blocks_128_16", "together", "together_pair", "lengths_63_131"):
        call = case(name, dtype, dropout_p=p, seed=13)
        if dtype == torch.float64:
            assert_exact(call, backend, name)
        else:
            assert_gradients(call, backend, name)


@pytest.mark.parametrize("name", ["dense", "causal", "head_64", "heads_4_2", "together"])
def test_a_loss_scale_reaches_float16_gradients(backend, name):
    """Gradients near float16's largest number, and those that only their scale lifts above its smallest."""
    call = case(name, torch.float16)
    need(backend, dtype=torch.float16, ops=(ROW,))
    tiny = call.replace(query=call.query / 64, value=call.value / 64)
    for each, scale in ((call, 4096.0), (tiny, 2.0**-14)):
        _, exact = gradients(each.to(torch.float64), formula, scale=scale)
        _, plain = gradients(each, pytorch, scale=scale)
        _, found = gradients(each, lambda on: on(backend), scale=scale)
        for leaf, gradient in found.items():
            # what is below the smallest number is lost by PyTorch too
            largest = max(exact[leaf].abs().max().item(), torch.finfo(torch.float16).tiny)
            wrong, own = ((one[leaf].double() - exact[leaf]).abs().max().item() for one in (found, plain))
            assert gradient.isfinite().all() and wrong <= own + 8 * 2.0**-10 * largest, (leaf, scale, wrong, own)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "value_size": 3},
        {"dropout_p": 0.4, "seed": 3},
        {"softcap": 0.8, "query_scale": True, "bias": (1, 2)},
        {"bias": (2, 1), "dropout_p": 0.3, "seed": 1},
        {"bias": (1, 1), "query_scale": True, "kv_heads": 1},
        {"bias": (1, 2), "columns": 4, "window": (9, 3), "dropout_p": 0.25, "seed": 2},
        {"bias": (2, 1), "columns": 10, "key_mask": True, "query_scale": True, "kv_heads": 1, "softcap": 2.0},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_gradcheck(backend, options):
    call = attention(**{"batch": 2, "queries": 18, "keys": 20, "block": (16, 16), "size": 2, "lead": (1, 2)} | options)
    seen = visible(call).any(-1)
    assert seen.any()
    names = [name for name in NAMES if getattr(call, name) is not None]

    def function(*tensors):
        out, lse, entropy = call.replace(**dict(zip(names, tensors, strict=True)))(backend)
        return out, lse[seen], entropy

    leaves = [getattr(call, name).clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=call.row_bias is not None)


# Nothing seen, nothing listed, nothing there.


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_queries_that_see_nothing_give_no_gradient(backend, dtype):
    blocks = torch.ones(1, 1, 5, 6, dtype=torch.bool)
    blocks[:, :, 1], blocks[..., 3] = False, False
    call = attention(blocks=blocks, block=(32, 32), key_mask=True, dtype=dtype, query_scale=True, bias=(2, 2))
    call.row_bias[:, :, ::9] = -torch.inf
    assert_attends(call, backend)
    _, found = assert_gradients(call, backend)
    seen = visible(call)
    seen[:, :, ::9] = False
    rows, columns = ~seen.any(-1), ~seen.any(-2)
    assert rows.any() and columns.any()
    for name, hidden in (("query", rows), ("query_scale", rows), ("key", columns), ("value", columns)):
        assert not found[name][hidden].any(), name
    assert not found["row_bias"][~seen].any()


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize(
    "shape", [(0, 2, 5, 16), (2, 0, 5, 16), (2, 2, 0, 16), (2, 2, 5, 0), (2, 2, 5, 16)], ids=name_of
)
def test_empty(backend, shape, density):
    call = attention(*shape, 16, density=density, dtype=torch.float32, query_scale=True, bias=(shape[0], 1), columns=8)
    results, found = gradients(call, lambda each: each(backend))
    for name, gradient in found.items():
        assert gradient.shape == getattr(call, name).shape
        assert gradient.any() == (density > 0 and 0 not in shape), name


def test_lists_with_entries_out_of_range_and_repeated(backend):
    """In the transpose too, which the backward walks."""
    call = attention(2, 2, 100, 131, 24, lead=(2, 2), block=(32, 16))
    mask = call.mask
    junk = torch.tensor([2**31 - 1, -(2**31), -1, 2**27, 2**30], dtype=torch.int32)

    def with_junk(counts, indices, columns):
        far = torch.cat([junk, torch.tensor([columns], dtype=torch.int32)]).expand(*indices.shape[:3], -1)
        wide = torch.cat([far, indices], -1)
        return counts + far.shape[-1], wide

    kv = with_junk(mask.kv_counts, mask.kv_indices, call.blocks.shape[3])
    q = with_junk(mask.q_counts, mask.q_indices, call.blocks.shape[2])
    assert torch.equal(listed(*kv, call.blocks.shape[3]), call.blocks)
    assert_exact(call.replace(mask=pyrx.BlockMask(*kv, *q, mask.block_size, mask.seq_lengths)), backend)
    twice = [each.repeat_interleave(2, -1) if each.dim() == 4 else 2 * each for each in mask.lists]
    assert_exact(call.replace(mask=pyrx.BlockMask(*twice, mask.block_size, mask.seq_lengths)), backend, "listed twice")
    narrow = pyrx.BlockMask(*(each[..., :0] if each.dim() == 4 else each for each in mask.lists), (32, 16), (100, 131))
    _, found = gradients(call.replace(mask=narrow), lambda each: each(backend))
    assert not any(each.any() for each in found.values())


def test_what_is_not_listed_is_not_read(cpu):
    """NaN in tokens that no list names, or that no window reaches, reaches no gradient."""
    blocks = torch.ones(1, 1, 5, 6, dtype=torch.bool)
    blocks[..., 2], blocks[:, :, 3] = False, False
    call = attention(blocks=blocks, block=(32, 32), dtype=torch.float32, bias=(1, 1))
    near = attention(
        queries=100, keys=300, block=(32, 32), density=1.0, window=(10, 5), dtype=torch.float32, bias=(1, 1)
    )
    for each, unread, queries in ((call, slice(64, 96), slice(96, 128)), (near, slice(128, 300), slice(0, 0))):
        poisoned = each.map(lambda tensor: tensor.clone())
        poisoned.key[:, :, unread], poisoned.value[:, :, unread] = torch.nan, torch.nan
        poisoned.query[:, :, queries], poisoned.row_bias[..., unread] = torch.nan, torch.nan
        found, expected = (gradients(one, lambda on: on(cpu))[1].values() for one in (poisoned, each))
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)


# What is asked for.


def needs_name(needs):
    return "+".join(needs) or "nothing"


SUBSETS = [each for count in (1, 2, 3, 5) for each in itertools.combinations(NAMES, count)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name_of)
def test_every_subset_of_requires_grad(backend, dtype):
    call = attention(**SMALL, **EVERY, dropout_p=0.2, seed=1, dtype=dtype)
    _, whole = gradients(call, lambda each: each(backend))
    assert set(whole) == set(NAMES) and all(each.any() for each in whole.values())
    for needs in SUBSETS:
        _, found = gradients(call, lambda each: each(backend), needs)
        assert set(found) == set(needs)
        for name, gradient in found.items():
            if backend == "cpu":
                assert_same_bits(gradient, whole[name], f"{name} of {needs}")
            else:
                torch.testing.assert_close(gradient, whole[name])


def test_only_what_is_asked_is_returned_by_the_op(cpu):
    ops = _library.namespace(need(cpu, ops=(ROW,)))
    call = attention(**SMALL, **EVERY, dtype=torch.float32)
    arguments = raw(call)
    out, lse, entropy = ops.block_sparse_attention(*arguments, False)
    assert entropy.shape == (0,)
    for needs in itertools.product((True, False), repeat=6):
        found = ops.block_sparse_attention_backward(
            torch.ones_like(out), None, None, out, lse, entropy, *arguments, needs
        )
        for name, needed, gradient in zip(NAMES, needs, found, strict=True):
            assert gradient.shape == (getattr(call, name).shape if needed else (0,)), (name, needs)
            assert gradient.isfinite().all() and gradient.any() == needed


def test_without_grad_mode_nothing_is_saved(cpu):
    call = attention(**SMALL, dtype=torch.float32)
    held, _ = call.leaves()
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, hooks:
            assert not held(cpu)[0].requires_grad
    with hooks:
        assert not call(cpu)[0].requires_grad
    assert not saved


def test_nothing_of_the_weights_size_is_saved(cpu):
    call = attention(2, 2, 640, 640, 16, dropout_p=0.5, seed=1, dtype=torch.float32)
    held, _ = call.leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        held(cpu)
    assert sum(saved) < 10 * call.query.numel()


def test_a_second_differentiation_raises(cpu):
    call = attention(**SMALL, **EVERY, dtype=torch.float32)
    held, leaves = call.leaves()
    out, lse, entropy = held(cpu)
    plain = torch.autograd.grad(out.sum(), list(leaves.values()), retain_graph=True)
    for result in (out, lse[lse.isfinite()], entropy):
        for name, leaf in leaves.items():
            if result is not out and name == "value":
                continue
            (found,) = torch.autograd.grad(result.sum(), leaf, create_graph=True)
            with pytest.raises(RuntimeError, match=f"pyrx::{ROW}: .* double backward"):
                found.square().sum().backward(retain_graph=True)
    recorded = torch.autograd.grad(out.sum(), list(leaves.values()), create_graph=True)
    for one, other in zip(recorded, plain, strict=True):
        assert_same_bits(one.detach(), other)


# Upstream gradients and layouts.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_upstream_gradients_of_any_strides(backend, dtype):
    call = attention(2, 2, 100, 131, 24, dtype=dtype)
    held, leaves = call.leaves()
    out, lse, entropy = held(backend)
    rows = torch.where(lse.isfinite(), torch.randn_like(lse), 0)
    grad = torch.randn(out.shape).to(dtype)
    ones = torch.ones((), dtype=dtype)

    def found(*grads):
        return torch.autograd.grad((out, lse, entropy), list(leaves.values()), grads, retain_graph=True)

    for first, other in (
        (grad.transpose(1, 2).contiguous().transpose(1, 2), rows.transpose(1, 2).contiguous().transpose(1, 2)),
        (grad.transpose(2, 3).contiguous().transpose(2, 3), torch.stack([rows, rows], -1)[..., 0]),
        (torch.stack([grad, grad], -1)[..., 0], rows.transpose(0, 2).contiguous().transpose(0, 2)),
        (ones.expand(out.shape), torch.ones(()).expand(rows.shape)),
    ):
        same = found(first.contiguous(), other.contiguous(), other.contiguous())
        for one, expected in zip(found(first, other, other), same, strict=True):
            tolerance = 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(one, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_gradients_are_laid_out_as_their_tensors(backend, dtype):
    call = attention(2, 4, 100, 131, 24, kv_heads=2, value_size=40, dtype=dtype, bias=(1, 4), query_scale=True)
    _, expected = gradients(call, lambda each: each(backend))

    def tokens_first(tensor):
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    turned = call.replace(**{name: tokens_first(getattr(call, name)) for name in NAMES[:3]})
    turned = turned.replace(row_bias=call.row_bias.transpose(2, 3).contiguous().transpose(2, 3))
    _, found = gradients(turned, lambda each: each(backend))
    for name, gradient in found.items():
        tolerance = 8 * torch.finfo(gradient.dtype).eps
        torch.testing.assert_close(gradient, expected[name], rtol=tolerance, atol=tolerance)
        if name in NAMES[:3] and backend == "cpu":
            assert gradient.stride() == getattr(turned, name).stride(), name


def test_expanded_tensors_sum_their_gradients(backend):
    """Of tensors that stand in for several batch entries, heads or tokens."""
    call = attention(2, 3, 33, 40, 8, block=(16, 16), bias=(1, 1))
    held, leaves = call.leaves(("key", "value", "row_bias"))

    def spread(each):
        return each.replace(
            key=each.key[:1].expand(2, -1, -1, -1),
            value=each.value[:, :1].expand(-1, 3, -1, -1),
            row_bias=each.row_bias.expand(2, 3, -1, -1),
        )

    results = [
        gradients(call, function)[1]
        for function in (lambda each: spread(each)(backend), lambda each: formula(spread(each)))
    ]
    for name in leaves:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-9, atol=1e-10)


# Again and again.


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_backward_again_and_again_gives_the_same(backend, dtype):
    call = attention(**SMALL, **EVERY, dropout_p=0.3, seed=2, dtype=dtype)
    held, leaves = call.leaves()
    out, lse, entropy = held(backend)
    kept = [each.detach().clone() for each in (out, lse, entropy)]

    def found(retain_graph):
        return torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out), retain_graph=retain_graph)

    first = found(True)
    copies = [each.clone() for each in first]
    for each in first:
        each.fill_(7.0)
    for one, other in zip(found(False), copies, strict=True):
        assert_same_bits(one, other)
    for one, other in zip((out, lse, entropy), kept, strict=True):
        assert_same_bits(one.detach(), other)
    with pytest.raises(RuntimeError, match="second time"):
        found(False)


def test_a_changed_input_is_noticed(cpu):
    call = attention(**SMALL, dtype=torch.float32)
    held, leaves = call.leaves()
    key = leaves["key"] * 1
    out = held.replace(key=key)(cpu)[0]
    key.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_batched_upstream_gradients(backend):
    call = attention(**SMALL)
    held, leaves = call.leaves()
    out = held(backend)[0]
    upstream = torch.randn(3, *out.shape, dtype=out.dtype)
    try:
        many = torch.autograd.grad(out, list(leaves.values()), upstream, is_grads_batched=True, retain_graph=True)
    except RuntimeError as error:
        pytest.fail(f"expected gradients of batched upstream gradients: {error}")
    for i in range(3):
        single = torch.autograd.grad(out, list(leaves.values()), upstream[i], retain_graph=True)
        for one, each in zip(many, single, strict=True):
            torch.testing.assert_close(one[i], each)


@pytest.mark.parametrize("block", [(16, 16), (64, 128), (128, 16)], ids=name_of)
def test_a_mask_of_other_blocks_has_the_same_gradients(backend, block):
    """The same visible pairs by causality alone, whatever the blocks."""
    call = attention(2, 2, 200, 200, 24, density=1.0, is_causal=True, block=block)
    mask = block_mask(torch.ones(1, 1, 7, 7, dtype=torch.bool), (32, 32), (200, 200))
    _, expected = gradients(call.replace(mask=mask, blocks=torch.ones(1, 1, 7, 7, dtype=torch.bool)), formula)
    _, found = gradients(call, lambda each: each(backend))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-10)
