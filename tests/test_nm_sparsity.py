"""N:M masks against their definition, every backend bit for bit; weights under them and the estimators' gradients."""

import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from helpers import FLOATS, assert_same_bits, layouts, name_of, need, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import pyrx
from pyrx import _library
from pyrx.reference.dropout import pack_bits, unpack_bits

ESTIMATORS = ("ste", "sr-ste", "mdgf", "mdgf-scaled", "hard")
SMALL = [(n, m) for m in range(1, 17) for n in range(1, m + 1)]
LARGE = [(1, 17), (9, 20), (1, 32), (2, 32), (16, 32), (31, 33), (50, 100), (64, 127), (1, 128), (2, 128), (64, 128)]
SHAPES = [(4,), (3, 8), (2, 5, 12), (7, 100), (1, 1312), (63, 4), (2, 8, 3, 3), (1, 4, 1, 1)]


def served(backend, device="cpu", dtype=torch.float32):
    return need(backend, device, dtype, ("nm_sparsity",))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def scores_of(shape, dtype=torch.float32, seed=0):
    """A third of it from few values, so that there are ties, zeros of both signs, NaN, infinities and denormals."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal / 4
    few = [0.0, -0.0, 1.0, -1.0, 2.0, math.nan, -math.nan, math.inf, -math.inf, tiny, -tiny, 1.0, -2.0]
    chosen = torch.tensor(few, dtype=dtype)[torch.randint(0, len(few), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 1 / 3, chosen, plain)


def oracle(scores, n, m, dim=-1, magnitude=True):
    """The definition in NumPy: an element's rank is how many of its group come before it."""
    moved = scores.detach().double().movedim(dim, -1).numpy()
    length = moved.shape[-1]
    missing = -length % m
    values = np.abs(moved) if magnitude else moved
    values = np.concatenate([values, np.zeros((*moved.shape[:-1], missing))], -1)
    there = np.arange(length + missing) < length
    a = values.reshape(*moved.shape[:-1], -1, m)
    there = there.reshape(-1, m)
    nan = np.isnan(a)
    rank = np.zeros(a.shape, dtype=int)
    for j in range(m):
        other, other_nan = a[..., j : j + 1], nan[..., j : j + 1]
        with np.errstate(invalid="ignore"):
            above = (other_nan & ~nan) | (~other_nan & ~nan & (other > a))
            equal = (other_nan & nan) | (other == a)
        rank += (above | (equal & (j < np.arange(m)))) & there[:, j : j + 1]
    kept = (rank < n).reshape(*moved.shape[:-1], -1)[..., :length]
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(kept, -1, dim)))


def factors(mask, estimator, decay):
    """What the estimators multiply kept and dropped weights by: (forward, backward)."""
    ones = torch.ones(mask.shape, dtype=torch.float64)
    kept, decayed = mask.double(), torch.where(mask, ones, ones * decay)
    return {
        "ste": (kept, ones),
        "sr-ste": (kept, ones),
        "mdgf": (decayed, ones),
        "mdgf-scaled": (decayed, decayed),
        "hard": (kept, kept),
    }[estimator]


# Masks.


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("magnitude", [True, False])
def test_definition(backend, dtype, magnitude):
    served(backend, dtype=dtype)
    for n, m in SMALL:
        scores = scores_of((6, 7 * m), dtype, n + 17 * m)
        expected = oracle(scores, n, m, magnitude=magnitude)
        assert torch.equal(pyrx.nm_mask(scores, n, m, magnitude=magnitude, backend=backend), expected), (n, m)
        scores, expected = scores.t().contiguous(), expected.t()
        assert torch.equal(pyrx.nm_mask(scores, n, m, dim=0, magnitude=magnitude, backend=backend), expected), (n, m)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("n, m", LARGE)
def test_large_groups(backend, dtype, n, m):
    served(backend, dtype=dtype)
    for magnitude in (True, False):
        scores = scores_of((5, 3 * m), dtype, n)
        expected = oracle(scores, n, m, magnitude=magnitude)
        assert torch.equal(pyrx.nm_mask(scores, n, m, magnitude=magnitude, backend=backend), expected)
        got = pyrx.nm_mask(scores.t().contiguous(), n, m, dim=0, magnitude=magnitude, backend=backend)
        assert torch.equal(got, expected.t())


def test_every_score_of_sixteen_bits(backend):
    """All float16 and bfloat16 values, each against every other kind of neighbour."""
    every = torch.arange(-32768, 32768).to(torch.int16)
    shuffled = every[torch.randperm(65536, generator=torch.Generator().manual_seed(0))]
    for dtype in (torch.float16, torch.bfloat16):
        for magnitude in (True, False):
            scores = torch.stack([shuffled, every, -every], 1).view(dtype).reshape(-1, 4)
            got = pyrx.nm_mask(scores, 2, 4, magnitude=magnitude, backend=backend)
            assert torch.equal(got, oracle(scores, 2, 4, magnitude=magnitude))


def test_ties_go_to_the_lower_index(backend):
    for m in (4, 8, 16, 32, 100):
        for n in (1, 2, m // 2, m):
            for value in (0.0, -0.0, 1.0, math.nan, math.inf):
                mask = pyrx.nm_mask(torch.full((2, m), value), n, m, backend=backend)
                assert torch.equal(mask, (torch.arange(m) < n).expand(2, m)), (n, m, value)
    signs = torch.tensor([[-0.0, 0.0, 0.0, -0.0]])
    assert pyrx.nm_mask(signs, 2, 4, magnitude=False, backend=backend).tolist() == [[True, True, False, False]]


def test_nan_is_never_hidden(backend):
    scores = torch.tensor([[math.inf, math.inf, -math.nan, 1.0]])
    for magnitude in (True, False):
        mask = pyrx.nm_mask(scores, 1, 4, magnitude=magnitude, backend=backend)
        assert mask.tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_layouts_and_dims(backend, dtype, shape):
    served(backend, dtype=dtype)
    made = layouts(shape, dtype) if len(shape) > 1 else [("plain", scores_of(shape, dtype))]
    for layout, scores in made:
        for dim in range(-len(shape), len(shape)):
            for n, m in ((2, 4), (1, 3), (3, 8)):
                expected = oracle(scores, n, m, dim)
                got = pyrx.nm_mask(scores, n, m, dim=dim, pad=True, backend=backend)
                assert got.stride() == torch.empty_like(scores).stride(), layout
                assert got.dtype == torch.bool and torch.equal(got, expected), (layout, dim, n, m)
                bits = pyrx.nm_mask(scores, n, m, dim=dim, pad=True, packed=True, backend=backend)
                assert_same_bits(bits, pack_bits(expected), f"{layout} {dim} {n}:{m}")


@settings(max_examples=100)
@given(st.data())
def test_any_shape(backend, data):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    shape[-1] *= data.draw(st.integers(1, 30))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    m = data.draw(st.integers(1, 20))
    n = data.draw(st.integers(1, m))
    dtype = data.draw(st.sampled_from(FLOATS))
    order = data.draw(st.permutations(range(len(shape))))
    scores = scores_of(shape, dtype, data.draw(st.integers(0, 99))).permute(order).contiguous()
    scores = scores.permute([order.index(i) for i in range(len(shape))])
    magnitude, packed = data.draw(st.booleans()), data.draw(st.booleans())
    expected = oracle(scores, n, m, dim, magnitude)
    got = pyrx.nm_mask(scores, n, m, dim=dim, magnitude=magnitude, packed=packed, pad=True, backend=backend)
    assert torch.equal(got, pack_bits(expected) if packed else expected)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)], ids=name_of)
def test_empty(backend, shape):
    weight = torch.zeros(shape, requires_grad=True)
    for dim in range(len(shape)):
        assert pyrx.nm_mask(weight, 2, 4, dim=dim, pad=True, backend=backend).shape == shape
        bits = pyrx.nm_mask(weight, 2, 4, dim=dim, pad=True, packed=True, backend=backend)
        assert bits.shape == (*shape[:-1], (shape[-1] + 7) // 8)
        for estimator in ESTIMATORS:
            pyrx.nm_sparsify(weight, 2, 4, dim=dim, pad=True, estimator=estimator, backend=backend).sum().backward()
    assert weight.grad.shape == shape


def test_large_tensors_and_threads(cpu):
    """Past any chunk and buffer; the bits do not depend on the threads."""
    for dtype in FLOATS:
        for shape, dim, n, m in (((300, 2048), 1, 2, 4), ((2048, 300), 0, 2, 8), ((257, 1311), 1, 3, 19)):
            weight = torch.randn(shape).to(dtype)
            expected = oracle(weight, n, m, dim)
            for count in (1, 2, 3):
                with threads(count):
                    assert torch.equal(pyrx.nm_mask(weight, n, m, dim=dim, backend=cpu), expected)
                    got = pyrx.nm_sparsify(weight, n, m, dim=dim, backend=cpu)
                    assert_same_bits(got, torch.where(expected, weight, 0))


# Sparse weights.


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_values(backend, dtype, estimator):
    """Kept weights keep every bit, NaN's too; dropped ones are 0 whatever they were, or rounded once."""
    served(backend, dtype=dtype)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    for shape, dim, n, m in (((5, 64), 1, 2, 4), ((8, 37), 0, 3, 8), ((4, 8, 3, 3), 1, 1, 4), ((3, 1311), 1, 2, 19)):
        weight = scores_of(shape, dtype)
        mask = oracle(weight, n, m, dim)
        got = pyrx.nm_sparsify(weight, n, m, dim=dim, estimator=estimator, decay=0.3, backend=backend)
        rest = torch.zeros_like(weight)
        if estimator.startswith("mdgf"):
            rest = (weight.to(accumulate) * torch.tensor(0.3, dtype=torch.float64).to(accumulate)).to(dtype)
        same = torch.where(mask, weight, rest)
        nan = got.isnan() & ~mask  # NaN times a factor: any NaN
        assert torch.equal(nan, rest.isnan() & ~mask)
        assert_same_bits(got.masked_fill(nan, 0), same.masked_fill(nan, 0), f"{shape} {dim}")


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
def test_gradients(backend, dtype, estimator, decay):
    served(backend, dtype=dtype)
    strength = 0.125  # products and sums of eighths are exact
    for shape, dim, n, m in (((5, 64), 1, 2, 4), ((8, 13), 0, 3, 8), ((4, 8, 3, 3), 1, 1, 4), ((1, 7), 1, 2, 5)):
        for layout, weight in layouts(shape, dtype):
            weight = weight.mul(8).round().div(8).requires_grad_()
            upstream = torch.randint(-8, 9, shape).div(8).to(dtype)
            options = {"dim": dim, "estimator": estimator, "decay": decay, "strength": strength, "pad": True}
            result = pyrx.nm_sparsify(weight, n, m, **options, backend=backend)
            forward, backward = factors(oracle(weight, n, m, dim), estimator, decay)
            assert torch.equal(result.double(), forward * weight.double()), layout
            assert result.stride() == torch.empty_like(weight).stride(), layout
            (got,) = torch.autograd.grad(result, weight, upstream)
            expected = backward * upstream.double()
            if estimator == "sr-ste":
                expected += strength * torch.where(oracle(weight, n, m, dim), 0.0, weight.detach().double())
            assert got.dtype == dtype and torch.equal(got.double(), expected.to(dtype).double()), layout


def test_regularized_gradients_are_rounded_alone(backend):
    """Product, then sum: the same bits on every backend."""
    weight = torch.randn(9, 400, requires_grad=True)
    upstream = torch.randn(9, 400)
    result = pyrx.nm_sparsify(weight, 2, 4, estimator="sr-ste", strength=2e-4, backend=backend)
    (got,) = torch.autograd.grad(result, weight, upstream)
    rest = upstream + torch.tensor(2e-4) * weight.detach()
    assert_same_bits(got, torch.where(oracle(weight, 2, 4), upstream, rest))


def test_gradcheck(backend):
    """Of the estimators that are the gradients of what they compute."""
    weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    for estimator in ("hard", "mdgf-scaled"):
        for mask in (None, oracle(weight, 2, 4)):

            def function(w, estimator=estimator, mask=mask):
                return pyrx.nm_sparsify(w, 2, 4, estimator=estimator, decay=0.5, mask=mask, backend=backend)

            assert torch.autograd.gradcheck(function, (weight,))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_masks_and_scores_of_the_caller(backend, estimator):
    weight = torch.randn(6, 13, requires_grad=True)
    scores = torch.randn(6, 13, dtype=torch.float64, requires_grad=True)
    mask, upstream = oracle(scores, 2, 4), torch.randn(6, 13)
    options = {"estimator": estimator, "decay": 0.5, "pad": True, "backend": backend}
    results = [
        pyrx.nm_sparsify(weight, 2, 4, scores=scores, **options),
        pyrx.nm_sparsify(weight, 2, 4, mask=mask, **options),
        pyrx.nm_sparsify(weight, 2, 4, mask=pack_bits(mask), **options),
    ]
    forward, _ = factors(mask, estimator, 0.5)
    grads = [torch.autograd.grad(each, (weight, scores), upstream, allow_unused=True) for each in results]
    for result, (grad, none) in zip(results, grads, strict=True):
        assert_same_bits(result, (forward * weight).float().masked_fill(forward == 0, 0))
        assert_same_bits(grad, grads[0][0])
        assert none is None


def test_signed_scores(backend):
    weight = torch.tensor([[-5.0, 1.0, 2.0, -9.0]])
    got = pyrx.nm_sparsify(weight, 2, 4, magnitude=False, backend=backend)
    assert got.tolist() == [[0.0, 1.0, 2.0, 0.0]]


def test_decay_in_memory(backend):
    weight, decay = torch.randn(4, 8), torch.tensor(0.5)
    for value in (0.5, 0.0, 1.0):
        decay.fill_(value)
        got = pyrx.nm_sparsify(weight, 1, 4, estimator="mdgf", decay=decay, backend=backend)
        expected = pyrx.nm_sparsify(weight, 1, 4, estimator="mdgf", decay=value, backend=backend)
        assert_same_bits(got, expected)


def test_what_is_stored(cpu):
    weight = torch.randn(16, 64, requires_grad=True)
    sizes = {"ste": 0, "mdgf": 0, "hard": 16 * 8, "mdgf-scaled": 16 * 8 + 8, "sr-ste": 16 * 8}
    for estimator, expected in sizes.items():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            pyrx.nm_sparsify(weight, 2, 4, estimator=estimator, backend=cpu)
        assert sum(each.nbytes for each in saved if each.data_ptr() != weight.data_ptr()) == expected, estimator


def test_a_second_differentiation(backend):
    weight = torch.randn(2, 8, requires_grad=True)
    for estimator in ESTIMATORS:
        result = pyrx.nm_sparsify(weight, 2, 4, estimator=estimator, decay=0.5, backend=backend)
        (grad,) = torch.autograd.grad((result**3).sum(), weight, create_graph=True)
        if estimator in ("ste", "mdgf") or backend == "reference":  # plain PyTorch, or the identity
            grad.sum().backward()
        else:
            with pytest.raises(RuntimeError, match="pyrx::nm_sparsify: .* double backward"):
                grad.sum().backward()


def test_autocast_keeps_the_dtype(backend):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pyrx.nm_sparsify(torch.randn(2, 8), 2, 4, backend=backend).dtype == torch.float32


# Registrations.


def test_opcheck(cpu):
    ops = _library.namespace(served(cpu))
    decay = torch.tensor(0.5, dtype=torch.float64)
    for weight in (torch.randn(6, 12), torch.randn(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)):
        bits, scores = pyrx.nm_mask(weight, 2, 4, dim=1, packed=True), torch.randn_like(weight)
        for packed in (False, True):
            torch.library.opcheck(ops.nm_mask.default, (weight, 2, 4, 1, True, packed, False))
        for estimator in range(5):
            factor = decay if estimator in (2, 3) else None
            for given_scores, mask in ((None, None), (scores, None), (None, bits)):
                rest = (2, 4, 1, True, False, estimator, 0.5)
                leaf = weight.clone().requires_grad_()
                torch.library.opcheck(ops.nm_sparsify.default, (leaf, given_scores, mask, factor, *rest))
        for rest in ((0, None, None), (1, decay, None), (2, None, scores)):
            torch.library.opcheck(ops.nm_apply.default, (weight, bits, *rest, 0.5))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compiled_equals_eager(backend, dynamic, estimator):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(weight, x, decay):
        sparse = pyrx.nm_sparsify(weight * 2, 2, 4, estimator=estimator, decay=decay, backend=backend)
        return torch.nn.functional.linear(x, sparse), pyrx.nm_mask(weight, 2, 4, packed=True, backend=backend)

    fast = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    frames = 0
    for rows, features in ((8, 12), (3, 20)):
        for value in (0.5, 0.25, 0.0):
            weight, x = torch.randn(rows, features, requires_grad=True), torch.randn(5, features)
            decay = torch.tensor(value, dtype=torch.float64)
            found, expected = fast(weight, x, decay), function(weight, x, decay)
            assert_same_bits(found[1], expected[1])
            torch.testing.assert_close(found[0], expected[0])
            grads = [torch.autograd.grad(each[0].square().sum(), weight)[0] for each in (found, expected)]
            torch.testing.assert_close(*grads)
            frames = counter.frame_count if value == 0.5 else frames
            assert counter.frame_count == frames, "a decay in memory recompiles nothing"


# Errors.

W, D = torch.arange(32.0).reshape(4, 8), torch.tensor(0.5, dtype=torch.float64)
FLOAT = "of dtype float16, bfloat16, float32 or float64"
BITS = torch.zeros(4, 1, dtype=torch.uint8)
SHARED_ROWS = [
    (ValueError, {"n": 5}, "n in [1, 4], got 5"),
    (ValueError, {"n": 0}, "n in [1, 4], got 0"),
    (ValueError, {"m": 129}, "m in [1, 128], got 129"),
    (ValueError, {"m": 0}, "m in [1, 128], got 0"),
    (ValueError, {"m": 3}, None),
]
PUBLIC_ROWS = [
    (TypeError, {"n": 2.0}, "n to be an int, got float"),
    (TypeError, {"m": True}, "m to be an int, got bool"),
    (ValueError, {"dim": 2}, "dim in [-2, 1], got 2"),
    (ValueError, {"dim": -3}, "dim in [-2, 1], got -3"),
    (TypeError, {"dim": 0.0}, "dim to be an int, got float"),
    (ValueError, {"backend": "fast"}, "backend to be one of 'reference', 'cpu', 'cuda', 'triton', got 'fast'"),
]
TENSOR_ROWS = [
    (TypeError, W.long(), f"{FLOAT}, got torch.int64"),
    (TypeError, W.to(torch.complex64), f"{FLOAT}, got torch.complex64"),
    (TypeError, W > 0, f"{FLOAT}, got torch.bool"),
    (ValueError, torch.tensor(1.0), "of at least one dimension, got []"),
]
SPARSIFY_ROWS = [
    (ValueError, {"estimator": "sparse"}, f"estimator to be one of {', '.join(map(repr, ESTIMATORS))}, got 'sparse'"),
    (ValueError, {"decay": 1.5}, "decay in [0, 1], got 1.5"),
    (ValueError, {"decay": -0.1}, "decay in [0, 1], got -0.1"),
    (ValueError, {"decay": math.nan}, "decay in [0, 1], got nan"),
    (TypeError, {"decay": "1"}, "decay to be a float, got str"),
    (ValueError, {"decay": torch.ones(2)}, "decay of one element, got [2]"),
    (TypeError, {"decay": torch.ones((), dtype=torch.int32)}, None),
    (TypeError, {"decay": torch.ones(1).to_sparse()}, "decay to be a dense Tensor, got torch.sparse_coo"),
    (TypeError, {"strength": "1"}, "strength to be a float, got str"),
    (ValueError, {"mask": torch.ones(8, 4, dtype=torch.bool)}, "mask of shape of the weight = [4, 8], got [8, 4]"),
    (ValueError, {"mask": BITS[:, :0]}, None),
    (TypeError, {"mask": W}, "mask of dtype bool, or uint8 as packed=True gives, got torch.float32"),
    (TypeError, {"mask": [True]}, "mask to be a Tensor, got list"),
    (RuntimeError, {"mask": BITS.to("meta")}, "mask on device cpu, got meta"),
    (ValueError, {"scores": W[:2]}, None),
    (TypeError, {"scores": W.long()}, f"scores {FLOAT}, got torch.int64"),
    (RuntimeError, {"scores": W.to("meta")}, "scores on device cpu, got meta"),
    (ValueError, {"scores": W, "mask": BITS}, "at most one of scores and mask, got both"),
]


def expect(error, text, op, function, **arguments):
    before = W.clone()
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"pyrx::{op}: expected {text or ''}")
    assert text is None or str(caught.value) == f"pyrx::{op}: expected {text}"
    assert torch.equal(W, before)


@pytest.mark.parametrize("error, changes, text", SHARED_ROWS + PUBLIC_ROWS)
def test_errors(backend, error, changes, text):
    arguments = {"n": 2, "m": 4, "backend": backend} | changes
    expect(error, text, "nm_mask" if "backend" not in changes else "nm_sparsity", pyrx.nm_mask, scores=W, **arguments)
    op = "nm_sparsify" if "backend" not in changes else "nm_sparsity"
    expect(error, text, op, pyrx.nm_sparsify, weight=W, **arguments)


@pytest.mark.parametrize("error, tensor, text", TENSOR_ROWS)
def test_tensor_errors(backend, error, tensor, text):
    expect(error, f"scores {text}", "nm_mask", pyrx.nm_mask, scores=tensor, n=2, m=4, backend=backend)
    expect(error, f"weight {text}", "nm_sparsify", pyrx.nm_sparsify, weight=tensor, n=2, m=4, backend=backend)


@pytest.mark.parametrize("error, changes, text", SPARSIFY_ROWS)
def test_sparsify_errors(backend, error, changes, text):
    arguments = {"weight": W, "n": 2, "m": 4, "estimator": "mdgf", "backend": backend} | changes
    expect(error, text, "nm_sparsify", pyrx.nm_sparsify, **arguments)


KERNEL_ROWS = [
    *[("nm_mask", each[1]) for each in SHARED_ROWS],
    *[("nm_sparsify", each[1]) for each in SHARED_ROWS],
    *[("nm_mask", {"scores": each[1]}) for each in TENSOR_ROWS],
    *[("nm_sparsify", {"weight": each[1]}) for each in TENSOR_ROWS],
    *[("nm_sparsify", each[1]) for each in SPARSIFY_ROWS[-5:] if "mask" not in each[1] or "scores" in each[1]],
    ("nm_mask", {"dim": 2}),
    ("nm_mask", {"dim": -1}),
    ("nm_sparsify", {"estimator": 5}),
    ("nm_sparsify", {"estimator": -1}),
    ("nm_sparsify", {"decay": None}),
    ("nm_sparsify", {"estimator": 0}),
    ("nm_sparsify", {"decay": D.float()}),
    ("nm_sparsify", {"decay": torch.ones(2).double()}),
    ("nm_sparsify", {"mask": BITS[:2]}),
    ("nm_sparsify", {"mask": BITS.bool()}),
    ("nm_sparsify", {"mask": BITS.to("meta")}),
    ("nm_apply", {"x": W.long()}),
    ("nm_apply", {"x": torch.tensor(1.0)}),
    ("nm_apply", {"bits": BITS[:2]}),
    ("nm_apply", {"dropped": 3}),
    ("nm_apply", {"factor": D}),
    ("nm_apply", {"dropped": 1}),
    ("nm_apply", {"weight": None}),
    ("nm_apply", {"weight": W.double()}),
    ("nm_apply", {"weight": W[:2]}),
    ("nm_apply", {"weight": W.to("meta")}),
    ("nm_apply", {"dropped": 0}),
]


def raised(op, arguments):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        op(**arguments)
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize("name, changes", KERNEL_ROWS)
def test_kernels_and_fakes_raise_the_same(cpu, name, changes):
    ranking = {"n": 2, "m": 4, "dim": 1, "magnitude": True, "pad": False}
    arguments = {
        "nm_mask": {"scores": W, "packed": False, **ranking},
        "nm_sparsify": {
            "weight": W, "scores": None, "mask": None, "decay": D, **ranking, "estimator": 2, "strength": 0.5,
        },
        "nm_apply": {"x": W, "bits": BITS, "dropped": 2, "factor": None, "weight": W, "strength": 0.5},
    }[name]  # fmt: skip
    op, arguments = getattr(_library.namespace(served(cpu)), name), arguments | changes
    real = raised(op, arguments)
    with FakeTensorMode() as mode:
        fake = raised(op, {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
    assert fake == real and real[1].startswith(f"pyrx::{name}: expected ")


def test_bits_are_what_the_design_says():
    mask = torch.tensor([[True, False, False, True, False, False, False, False, True, False]])
    assert pack_bits(mask).tolist() == [[0b1001, 0b1]]
    assert torch.equal(unpack_bits(pack_bits(mask), 10), mask)
