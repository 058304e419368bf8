"""Transposable N:M masks: optimal and greedy by their definitions, the greedy bound, layouts, registrations, errors."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import FLOATS, capture, layouts, name_of, need, threads
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import pyrx
from pyrx import _library
from pyrx.reference.dropout import pack_bits
from pyrx.reference.nm_transposable import tiles_of

PATTERNS = torch.tensor(
    [
        bits
        for bits in itertools.product([False, True], repeat=16)
        if all(sum(bits[4 * i : 4 * i + 4]) == 2 and sum(bits[i::4]) == 2 for i in range(4))
    ]
)
RATIOS = [(n, m) for m in range(1, 9) for n in range(1, m + 1)]
LARGE = [(4, 16), (16, 16), (2, 17), (9, 32), (1, 40)]


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return need(request.param, ops=("nm_transposable",))


def served(backend, device="cpu", dtype=torch.float32):
    return need(backend, device, dtype, ops=("nm_transposable",))


def hard_scores(shape, dtype=torch.float32):
    """With ties, both zeros, infinities, NaN, subnormal numbers and the largest finite ones among them."""
    values = torch.randn(shape, dtype=torch.float64).mul(2).round()
    flat, most = values.view(-1), torch.finfo(dtype).max
    for start, value in enumerate((0.0, -0.0, math.inf, -math.inf, math.nan, 1e-7, most, -most)):
        flat[start::37] = value
    return values.to(dtype)


def assert_transposable(mask, n, m):
    kept = tiles_of(mask, m)
    assert int(kept.sum(-1).max()) <= n and int(kept.sum(-2).max()) <= n


# The exact search.


def values_of(scores, magnitude):
    """float64, what the exact search adds up."""
    most, nan = (2.0**1000, 2.0**1004) if scores.dtype == torch.float64 else (2.0**120, 2.0**124)
    wide = scores.double()
    values = (wide.abs() if magnitude else wide).clamp(-most, most)
    return torch.where(wide.isnan(), nan, values)


def pattern_sums(tiles):
    """(T, 90) sums of tiles (T, 4, 4), in their dtype: those of each row, of two rows, of both halves."""
    pairs = PATTERNS.unflatten(1, (4, 4)).nonzero()[:, 2].reshape(90, 4, 2)  # the columns that each row keeps
    rows = [tiles[:, r][:, pairs[:, r, 0]] + tiles[:, r][:, pairs[:, r, 1]] for r in range(4)]
    return (rows[0] + rows[1]) + (rows[2] + rows[3])


def assert_best(mask, scores, magnitude=True):
    accumulate = torch.float64 if scores.dtype == torch.float64 else torch.float32
    tiles = tiles_of(values_of(scores, magnitude).to(accumulate), 4).reshape(-1, 4, 4)
    kept = tiles_of(mask, 4).reshape(-1, 1, 16)
    chosen = (kept == PATTERNS).all(2)
    assert (chosen.sum(1) == 1).all(), "one of the 90 patterns"
    sums = pattern_sums(tiles)
    assert torch.equal(sums[chosen], sums.max(1).values)


def test_there_are_90_patterns():
    assert PATTERNS.shape == (90, 16)


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_exact_is_the_best_of_90_patterns(backend, dtype, magnitude):
    served(backend, dtype=dtype)
    for scores in (
        torch.randint(-9, 10, (60, 52)).to(dtype),  # sums are exact, and often equal
        torch.randn(60, 52, dtype=torch.float64).to(dtype),
        torch.randn(60, 52, dtype=torch.float64).exp().to(dtype),
        hard_scores((60, 52), dtype),
        # tiles that cannot keep or drop all of a kind
        torch.tensor([-math.inf, math.inf, math.nan, -3.0, 1.0])[torch.randint(0, 5, (60, 52))].to(dtype),
    ):
        mask = pyrx.nm_transposable_mask(scores, 2, 4, magnitude=magnitude, method="exact", backend=backend)
        assert mask.dtype == torch.bool and mask.shape == scores.shape
        assert_best(mask, scores, magnitude)


def test_exact_finds_every_pattern(backend):
    """A tile that is one of the 90 patterns, and its negative."""
    tiles = PATTERNS.reshape(90, 4, 4)
    for scores, magnitude in ((tiles.float(), True), (tiles.float() - 2, False), ((~tiles).float().neg(), False)):
        found = pyrx.nm_transposable_mask(scores, 2, 4, magnitude=magnitude, backend=backend)
        assert torch.equal(found, tiles)


def test_exact_of_equal_sums_is_the_first(backend):
    first = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    for value in (0.0, -0.0, 3.0, math.inf, math.nan):
        got = pyrx.nm_transposable_mask(torch.full((4, 4), value), 2, 4, backend=backend)
        assert torch.equal(got, first), value


@pytest.mark.parametrize("method", ["exact", "greedy"])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_nan_is_kept_before_infinity(backend, dtype, method):
    served(backend, dtype=dtype)
    options = {"method": method, "backend": backend}
    for row, column in itertools.product(range(4), range(4)):
        scores = torch.randn(4, 4).to(dtype)
        scores[row, column] = math.inf
        assert pyrx.nm_transposable_mask(scores, 2, 4, **options)[row, column]
        scores = torch.full((4, 4), math.inf, dtype=dtype)
        scores[row, column] = -math.nan
        assert pyrx.nm_transposable_mask(scores, 2, 4, magnitude=False, **options)[row, column]
        scores = torch.full((4, 4), -math.inf, dtype=dtype)
        scores[row, column] = torch.finfo(dtype).min / 2
        assert pyrx.nm_transposable_mask(scores, 2, 4, magnitude=False, **options)[row, column] or method == "exact"


# Greedy masks.


def ranks_of(scores, magnitude):
    keys = scores.double().abs() if magnitude else scores.double()
    return torch.where(scores.isnan(), math.inf, keys), scores.isnan()


def expected_greedy(scores, n, m, magnitude):
    """In plain Python, tile by tile."""
    values, nans = (tiles_of(each, m).reshape(-1, m * m).tolist() for each in ranks_of(scores, magnitude))
    found = np.zeros((len(values), m, m), dtype=bool)
    for kept, value, nan in zip(found, values, nans, strict=True):
        for i in sorted(range(m * m), key=lambda i: (not nan[i], -value[i], i)):
            if kept[i // m].sum() < n and kept[:, i % m].sum() < n:
                kept[i // m, i % m] = True
    rows, columns = scores.shape[-2] // m, scores.shape[-1] // m
    tiles = torch.from_numpy(found).reshape(*scores.shape[:-2], rows, columns, m, m)
    return tiles.transpose(-3, -2).reshape(scores.shape)


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("n, m", RATIOS + LARGE)
def test_greedy_is_pythons(backend, n, m, magnitude):
    shape = (2 * m, 21 * m) if m < 9 else (m, 3 * m)
    for dtype in FLOATS:
        served(backend, dtype=dtype)
        for scores in (hard_scores(shape, dtype), torch.randn(shape).to(dtype)):
            expected = expected_greedy(scores, n, m, magnitude)
            options = {"magnitude": magnitude, "method": "greedy", "backend": backend}
            got = pyrx.nm_transposable_mask(scores, n, m, **options)
            assert torch.equal(got, expected), dtype
            assert_transposable(got, n, m)
            packed = pyrx.nm_transposable_mask(scores, n, m, packed=True, **options)
            assert torch.equal(packed, pack_bits(expected)), dtype


@pytest.mark.parametrize("n, m", [(1, 128), (64, 128), (128, 128), (50, 100)])
def test_large_tiles(n, m):
    backend = served("cpu")
    for dtype in FLOATS:
        scores = hard_scores((m, 2 * m), dtype)
        assert torch.equal(
            pyrx.nm_transposable_mask(scores, n, m, backend=backend), expected_greedy(scores, n, m, True)
        )


def optimum(tile, n):
    """The largest sum of an m x m tile's elements of which no row and no column has more than n."""
    m = len(tile)
    chosen = [c for k in range(n + 1) for c in itertools.combinations(range(m), k)]
    best = {(0,) * m: 0.0}
    for row in tile:
        found: dict[tuple[int, ...], float] = {}
        for counts, total in best.items():
            for columns in chosen:
                after = tuple(count + (c in columns) for c, count in enumerate(counts))
                if max(after) <= n:
                    found[after] = max(found.get(after, 0.0), total + sum(row[c] for c in columns))
        best = found
    return max(best.values())


@pytest.mark.parametrize("n, m", [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4), (2, 5)])
def test_greedy_keeps_half_of_the_optimum(backend, n, m):
    count = 12 if m == 5 else 40
    scores = torch.cat(
        [
            torch.rand(m, count * m, dtype=torch.float64),
            # nearly equal ones, of which the largest stands in the way of two others
            1 - 1e-3 * torch.rand(m, count * m, dtype=torch.float64),
            torch.rand(m, count * m, dtype=torch.float64).log().neg(),
            torch.randint(0, 3, (m, count * m)).double(),
        ],
        -1,
    )
    mask = pyrx.nm_transposable_mask(scores, n, m, method="greedy", backend=backend)
    kept = tiles_of(scores * mask, m).sum((-1, -2)).reshape(-1)
    tiles = tiles_of(scores, m).reshape(-1, m, m)
    best = torch.tensor([optimum(tile, n) for tile in tiles.tolist()], dtype=torch.float64)
    assert (kept >= best / 2 - 1e-12).all() and (kept <= best + 1e-12).all()
    assert (kept < best - 1e-9).any(), "greedy is not optimal"


def test_the_bound_is_met(backend):
    """1, the largest, keeps the 0.999 beside it and below it out."""
    scores = torch.tensor([[1.0, 0.999], [0.999, 0.0]])
    mask = pyrx.nm_transposable_mask(scores, 1, 2, backend=backend)
    assert torch.equal(mask, torch.eye(2).bool()) and optimum(scores.tolist(), 1) == pytest.approx(1.998)


def test_greedy_may_keep_fewer(backend):
    """Row 1 has room for one more, and so has column 1, but they meet in an element that is kept already."""
    scores = torch.tensor([[14.0, 5, 6, 7], [9, 12, 3, 4], [2, 8, 10, 13], [15, 1, 11, 16]])
    mask = pyrx.nm_transposable_mask(scores, 2, 4, method="greedy", backend=backend)
    assert mask.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1]]


def test_default_methods(backend):
    scores = torch.randn(64, 64)
    for n, m, method in ((2, 4, "exact"), (1, 4, "greedy"), (2, 8, "greedy"), (4, 8, "greedy")):
        got = pyrx.nm_transposable_mask(scores, n, m, backend=backend)
        assert torch.equal(got, pyrx.nm_transposable_mask(scores, n, m, method=method, backend=backend))
        assert_transposable(got, n, m)
    other = pyrx.nm_transposable_mask(scores, 2, 4, method="greedy", backend=backend)
    assert not torch.equal(other, pyrx.nm_transposable_mask(scores, 2, 4, backend=backend))


@pytest.mark.parametrize("method", ["exact", "greedy"])
def test_a_weight_and_its_transpose_are_sparse(backend, method):
    weight = torch.randn(32, 48)
    mask = pyrx.nm_transposable_mask(weight, 2, 4, method=method, backend=backend)
    for each in (mask, mask.t()):
        assert int(each.unflatten(-1, (each.shape[-1] // 4, 4)).sum(-1).max()) == 2


# Shapes, layouts, threads.

FORMS = [("exact", 2, 4), ("greedy", 2, 4), ("greedy", 3, 5), ("greedy", 4, 20)]


@pytest.mark.parametrize("method, n, m", FORMS)
@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 2), (2, 7), (3, 33)])
def test_batches_and_layouts(backend, method, n, m, rows, columns):
    for batch in ((), (3,), (2, 2), (1, 2, 2)):
        for name, scores in layouts((*batch, rows * m, columns * m)):
            options = {"method": method, "backend": backend}
            got = pyrx.nm_transposable_mask(scores, n, m, **options)
            assert got.stride() == torch.empty_like(scores).stride(), name
            expected = pyrx.nm_transposable_mask(scores.contiguous(), n, m, method=method, backend="reference")
            assert torch.equal(got, expected), (name, batch)
            packed = pyrx.nm_transposable_mask(scores, n, m, packed=True, **options)
            assert packed.is_contiguous() and torch.equal(packed, pack_bits(expected)), (name, batch)
    row = torch.randn(1, columns * m).expand(rows * m, -1)
    got = pyrx.nm_transposable_mask(row, n, m, method=method, backend=backend)
    assert torch.equal(got, pyrx.nm_transposable_mask(row.contiguous(), n, m, method=method, backend="reference"))


@given(
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(FLOATS),
    batch=st.lists(st.integers(0, 3), max_size=2),
    rows=st.integers(0, 3),
    columns=st.integers(0, 70),
    magnitude=st.booleans(),
    packed=st.booleans(),
)
def test_cpu_masks_are_the_references(form, dtype, batch, rows, columns, magnitude, packed):
    served("cpu", dtype=dtype)
    method, n, m = form
    scores = hard_scores((*batch, rows * m, columns * m), dtype)
    options = {"magnitude": magnitude, "packed": packed, "method": method}
    got, expected = (pyrx.nm_transposable_mask(scores, n, m, backend=each, **options) for each in ("cpu", "reference"))
    assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize("method, n, m", FORMS)
@pytest.mark.parametrize("shape", [(0, 1), (1, 0), (0, 0)])
def test_empty(backend, method, n, m, shape):
    scores = torch.empty(2, shape[0] * m, shape[1] * m)
    options = {"method": method, "backend": backend}
    assert pyrx.nm_transposable_mask(scores, n, m, **options).shape == scores.shape
    packed = pyrx.nm_transposable_mask(scores, n, m, packed=True, **options)
    assert packed.shape == (*scores.shape[:-1], (scores.shape[-1] + 7) // 8) and packed.dtype == torch.uint8


@pytest.mark.parametrize("method, n, m", FORMS)
def test_threads_and_rows_of_many_runs(method, n, m):
    backend = served("cpu")
    for shape in ((2 * m, 2200 * m // 4 * 4 // m * m), (600 // m * m, 4 * m)):
        scores = torch.randn(shape)
        found = []
        for count in (1, 2, 3):
            with threads(count):
                options = {"method": method, "backend": backend}
                found.append(pyrx.nm_transposable_mask(scores, n, m, **options))
                bits = pyrx.nm_transposable_mask(scores, n, m, packed=True, **options)
                assert torch.equal(bits, pack_bits(found[0]))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        half = shape[1] // 2 // m * m
        part = pyrx.nm_transposable_mask(scores[:, half:], n, m, method=method, backend=backend)
        assert torch.equal(part, found[0][:, half:])


def test_no_gradient_and_no_autocast(backend):
    scores = torch.randn(8, 8, requires_grad=True)
    mask = pyrx.nm_transposable_mask(scores, 2, 4, backend=backend)
    assert not mask.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pyrx.nm_transposable_mask(scores, 2, 4, backend=backend), mask)


# Registrations.


@pytest.mark.parametrize("method, n, m", FORMS)
def test_opcheck(cpu, method, n, m):
    served(cpu)
    op = _library.namespace(cpu).nm_transposable_mask.default
    for scores in (
        torch.randn(2 * m, 3 * m),
        torch.randn(m, 3, 2 * m).half().transpose(0, 1),
    ):
        for packed in (False, True):
            torch.library.opcheck(op, (scores, n, m, True, packed, method == "exact"))
    torch.library.opcheck(op, (torch.randn(0, m), n, m, False, False, method == "exact"))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_equals_eager(backend, dynamic):
    torch._dynamo.reset()

    def function(scores):
        first = pyrx.nm_transposable_mask(scores * 2, 2, 4, backend=backend)
        return first, pyrx.nm_transposable_mask(scores, 1, 4, packed=True, backend=backend)

    fast = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((8, 12), (16, 20)):
        scores = torch.randn(shape)
        for got, expected in zip(fast(scores), function(scores), strict=True):
            assert torch.equal(got, expected)
    torch._dynamo.reset()


def test_the_meta_device():
    scores = torch.empty(2, 8, 12, device="meta")
    assert pyrx.nm_transposable_mask(scores, 2, 4).shape == (2, 8, 12)


# Errors.

X = torch.randn(8, 8)
FLOATING = "scores of dtype float16, bfloat16, float32 or float64"
ROWS = [
    (TypeError, {"scores": X.long()}, f"{FLOATING}, got torch.int64"),
    (TypeError, {"scores": X.bool()}, f"{FLOATING}, got torch.bool"),
    (TypeError, {"scores": X.to(torch.complex64)}, f"{FLOATING}, got torch.complex64"),
    (ValueError, {"n": 0}, "n in [1, 4], got 0"),
    (ValueError, {"n": 5}, "n in [1, 4], got 5"),
    (ValueError, {"n": -1}, "n in [1, 4], got -1"),
    (ValueError, {"m": 0}, "m in [1, 128], got 0"),
    (ValueError, {"m": 129}, "m in [1, 128], got 129"),
    (ValueError, {"scores": X[0]}, "scores of at least two dimensions, got [8]"),
    (ValueError, {"scores": X[0, 0]}, "scores of at least two dimensions, got []"),
    (ValueError, {"scores": X[:6]}, "scores of last two sizes that m = 4 divides, got [6, 8]"),
    (ValueError, {"scores": X[None, :, :7]}, "scores of last two sizes that m = 4 divides, got [1, 8, 7]"),
    (ValueError, {"m": 3, "scores": X[:6]}, "scores of last two sizes that m = 3 divides, got [6, 8]"),
    (ValueError, {"n": 1, "method": "exact"}, "n:m 2:4 for method 'exact', got 1:4"),
    (ValueError, {"m": 8, "method": "exact"}, "n:m 2:4 for method 'exact', got 2:8"),
]
PUBLIC_ROWS = [
    (TypeError, {"scores": [1.0]}, "scores to be a Tensor, got list"),
    (TypeError, {"n": 2.0}, "n to be an int, got float"),
    (TypeError, {"m": True}, "m to be an int, got bool"),
    (ValueError, {"method": "best"}, "method to be one of None, 'exact', 'greedy', got 'best'"),
]


@pytest.mark.parametrize("error, changes, text", ROWS + PUBLIC_ROWS, ids=[row[2][:80] for row in ROWS + PUBLIC_ROWS])
def test_errors(backend, error, changes, text):
    with pytest.raises(error) as caught:
        pyrx.nm_transposable_mask(**{"scores": X, "n": 2, "m": 4, "backend": backend} | changes)
    assert type(caught.value) is error and str(caught.value) == f"pyrx::nm_transposable_mask: expected {text}"


@pytest.mark.parametrize("error, changes, text", ROWS, ids=[row[2][:80] for row in ROWS])
def test_kernels_and_fakes_raise_the_same(cpu, error, changes, text):
    served(cpu)
    changes = dict(changes)
    exact = changes.pop("method", "greedy") == "exact"
    arguments = {"scores": X, "n": 2, "m": 4, "magnitude": True, "packed": False, "exact": exact} | changes
    op = _library.namespace(cpu).nm_transposable_mask
    with pytest.raises(error) as caught:
        op(**arguments)
    assert type(caught.value) is error and str(caught.value) == f"pyrx::nm_transposable_mask: expected {text}"
    with FakeTensorMode() as mode, pytest.raises(error) as faked:
        op(**arguments | {"scores": mode.from_tensor(arguments["scores"])})
    assert str(faked.value) == str(caught.value)


# Triton, and GPUs.

DEVICE_FORMS = [*FORMS, ("greedy", 1, 1), ("greedy", 8, 16), ("greedy", 5, 33)]


def assert_equals_the_reference(backend, device, shapes, dtypes, forms=DEVICE_FORMS):
    for (method, n, m), (rows, columns), dtype in itertools.product(forms, shapes, dtypes):
        for scores in (hard_scores((2, rows * m, columns * m), dtype), torch.randn(rows * m, columns * m).to(dtype)):
            for magnitude, packed in itertools.product((True, False), repeat=2):
                options = {"magnitude": magnitude, "packed": packed, "method": method}
                expected = pyrx.nm_transposable_mask(scores, n, m, backend="reference", **options)
                got = pyrx.nm_transposable_mask(scores.to(device), n, m, backend=backend, **options)
                assert got.device.type == device
                assert torch.equal(got.cpu(), expected), (method, n, m, rows, columns, dtype, magnitude, packed)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_masks_equal_the_references(backend):
    dtypes = FLOATS if backend == "cuda" else FLOATS[:3]
    served(backend, "cuda")
    assert_equals_the_reference(backend, "cuda", [(1, 1), (3, 2), (2, 37)], dtypes)
    assert_equals_the_reference(backend, "cuda", [(40, 520)], dtypes, DEVICE_FORMS[:2])
    assert_equals_the_reference(backend, "cuda", [(1, 3)], dtypes, [("greedy", 64, 128), ("greedy", 10, 100)])
    for name, scores in layouts((3, 16, 24)):
        expected = pyrx.nm_transposable_mask(scores, 2, 4, backend="reference")
        placed = torch.empty_strided(scores.shape, scores.stride(), device="cuda").copy_(scores)
        got = pyrx.nm_transposable_mask(placed, 2, 4, backend=backend)
        assert torch.equal(got.cpu(), expected) and got.stride() == torch.empty_like(placed).stride(), name
    for shift in (1, 2, 4):  # memory that is not aligned
        scores = torch.randn(16 * 24 + shift, device="cuda").bfloat16()[shift:].reshape(16, 24)
        expected = pyrx.nm_transposable_mask(scores.cpu(), 2, 4, backend="reference")
        assert torch.equal(pyrx.nm_transposable_mask(scores, 2, 4, backend=backend).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["exact", "greedy"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_graphs_follow_the_scores(backend, method):
    served(backend, "cuda")
    scores = torch.randn(64, 64, device="cuda")
    graph, captured = capture(lambda: pyrx.nm_transposable_mask(scores, 2, 4, method=method, backend=backend))
    for _ in range(2):
        scores.normal_()
        graph.replay()
        assert torch.equal(captured, pyrx.nm_transposable_mask(scores, 2, 4, method=method, backend="reference"))
