"""N:M masks and sparse weights by CUDA C++ on a GPU: the reference's bits, layouts, graphs, moving decays."""

import math

import pytest
import torch
from helpers import FLOATS, assert_same_bits, capture, layouts, name_of, need

import pyrx
from pyrx.reference.dropout import pack_bits
from pyrx.reference.nm_sparsity import FACTOR, REGULARIZE, ZERO
from pyrx.reference.nm_sparsity import nm_apply as reference_apply

pytestmark = pytest.mark.gpu

DEVICE, BACKEND = "cuda", "cuda"
ESTIMATORS = ("ste", "sr-ste", "mdgf", "mdgf-scaled", "hard")
NAMED = [(1, 2), (1, 4), (2, 4), (3, 4), (1, 8), (2, 8), (4, 8), (5, 8), (1, 16), (2, 16), (8, 16), (15, 16), (1, 32)]
NAMED += [(2, 32), (16, 32), (31, 32), (1, 64), (2, 64), (63, 64), (1, 128), (2, 128), (64, 128), (127, 128)]
OTHERS = [(1, 1), (4, 4), (8, 8), (1, 3), (2, 3), (3, 5), (5, 12), (2, 24), (7, 100), (1, 127), (128, 128)]
LARGE = (96, 4096)  # whole tiles of every kernel


@pytest.fixture(autouse=True)
def gpu(poison):
    return need(BACKEND, DEVICE, ops=("nm_sparsity",))


def scores_of(shape, dtype=torch.float32, seed=0):
    """A third of it from few values: ties, zeros of both signs, NaN, infinities and subnormal numbers."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal / 4
    few = [0.0, -0.0, 1.0, -1.0, 2.0, math.nan, -math.nan, math.inf, -math.inf, tiny, -tiny]
    chosen = torch.tensor(few, dtype=dtype)[torch.randint(0, len(few), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 1 / 3, chosen, plain)


def moved(tensor):
    """The tensor on the GPU, with its strides."""
    there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
    return there.copy_(tensor)


def assert_masks(scores, n, m, what="", **options):
    """Bool and bits are the reference's; scores on the GPU."""
    expected = pyrx.nm_mask(scores, n, m, backend="reference", **options)
    got = pyrx.nm_mask(scores, n, m, backend=BACKEND, **options)
    assert got.stride() == torch.empty_like(scores).stride(), what
    assert_same_bits(got, expected, f"{n}:{m} {options} {what}")
    bits = pyrx.nm_mask(scores, n, m, backend=BACKEND, packed=True, **options)
    assert_same_bits(bits, pack_bits(expected), f"{n}:{m} packed {options} {what}")


def assert_equal(got, expected, what=""):
    """The same bits, but that NaN is NaN."""
    assert got.dtype == expected.dtype and got.stride() == expected.stride(), what
    nan = expected.isnan()
    assert torch.equal(nan, got.isnan()), what
    zero = torch.zeros((), dtype=got.dtype, device=got.device)
    assert_same_bits(torch.where(nan, zero, got), torch.where(nan, zero, expected), what)


def sparse_and_gradient(weight, n, m, upstream, backend, **options):
    leaf = weight.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    found = pyrx.nm_sparsify(leaf, n, m, backend=backend, **options)
    return found.detach(), torch.autograd.grad(found, leaf, upstream)[0]


# Masks.


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("magnitude", [True, False])
def test_every_ratio(dtype, magnitude):
    scores = scores_of(LARGE, dtype).to(DEVICE)
    for n, m in [*NAMED, *OTHERS]:
        for dim in (0, 1):
            assert_masks(scores, n, m, dim=dim, magnitude=magnitude, pad=True)


@pytest.mark.parametrize(
    "shape", [(1,), (63,), (3, 7), (5, 100), (3, 1311), (1312, 9), (4, 8, 3, 3), (2, 6, 1, 1)], ids=name_of
)
def test_odd_shapes(shape):
    for dtype in (torch.bfloat16, torch.float32):
        scores = scores_of(shape, dtype, 1).to(DEVICE)
        for dim in range(len(shape)):
            for n, m in [*NAMED, *OTHERS]:
                assert_masks(scores, n, m, dim=dim, pad=True)


@pytest.mark.parametrize("shape", [(6, 24), (3, 5, 40), (4, 16, 3, 3), (2, 8, 4, 8), (2, 8, 2, 3, 8)], ids=name_of)
def test_layouts(shape):
    for layout, values in layouts(shape, torch.bfloat16):
        scores = moved(values)
        for dim in range(-len(shape), 0):
            for n, m in ((2, 4), (2, 8), (1, 16), (2, 3)):
                assert_masks(scores, n, m, layout, dim=dim, pad=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_pointers_of_any_alignment(dtype):
    flat = scores_of((8 * 1024 * 3 + 8,), dtype).to(DEVICE)
    for offset in (1, 3, 4, 8):
        scores = flat[offset : offset + 8 * 1024 * 3].view(24, 1024)
        for dim in (0, 1):
            for n, m in ((2, 4), (2, 8), (1, 32)):
                assert_masks(scores, n, m, dim=dim, pad=True)


def test_every_score_of_sixteen_bits():
    every = torch.arange(-32768, 32768).to(torch.int16)
    shuffled = every[torch.randperm(65536, generator=torch.Generator().manual_seed(0))]
    for dtype in (torch.float16, torch.bfloat16):
        scores = torch.stack([shuffled, every, -every, shuffled.flip(0)], 1).view(dtype).view(256, -1).to(DEVICE)
        for magnitude in (True, False):
            for n, m in ((1, 4), (2, 4), (4, 8), (2, 16)):
                for dim in (0, 1):
                    assert_masks(scores, n, m, dim=dim, magnitude=magnitude)


def test_ties_go_to_the_lower_index():
    for n, m in NAMED:
        for value in (0.0, -1.0, math.nan, math.inf):
            for dim in (0, 1):
                scores = torch.full((8 * m, 8 * m), value, dtype=torch.bfloat16, device=DEVICE)
                got = pyrx.nm_mask(scores, n, m, dim=dim, backend=BACKEND)
                expected = (torch.arange(8 * m, device=DEVICE) % m < n).expand(8 * m, -1)
                assert torch.equal(got if dim else got.t(), expected), (n, m, value, dim)


def test_empty():
    for shape in ((0,), (0, 8), (3, 0), (2, 0, 4)):
        scores = torch.empty(shape, device=DEVICE)
        assert_masks(scores, 2, 4, pad=True)
        assert pyrx.nm_sparsify(scores, 2, 4, pad=True, backend=BACKEND).shape == shape


# Weights.


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators(estimator, dtype):
    for shape in ((3, 8192), (5, 100), (8, 16, 3, 3)):
        weight = scores_of(shape, dtype).to(DEVICE)
        upstream = scores_of(shape, dtype, 1).to(DEVICE)
        mask = pyrx.nm_mask(scores_of(shape, dtype, 3).to(DEVICE), 1, 4, pad=True, backend="reference")
        rows = [{}, {"dim": 0}, {"scores": scores_of(shape, torch.float32, 2).to(DEVICE)}, {"mask": mask}]
        for options in rows:
            for n, m in ((2, 4), (4, 8), (1, 16), (2, 32), (2, 3)):
                options = {"estimator": estimator, "decay": 0.3, "strength": 0.01, "pad": True, **options}
                got = sparse_and_gradient(weight, n, m, upstream, BACKEND, **options)
                expected = sparse_and_gradient(weight, n, m, upstream, "reference", **options)
                for one, other in zip(got, expected, strict=True):
                    assert_equal(one, other, f"{shape} {n}:{m} {list(options)}")


def test_layouts_of_weights():
    for layout, values in layouts((4, 16, 3, 8), torch.bfloat16):
        weight = moved(values)
        upstream = moved(values.flip(0))
        for dim in range(4):
            for estimator in ("mdgf-scaled", "sr-ste"):
                options = {"dim": dim, "pad": True, "estimator": estimator, "decay": 0.5}
                got = sparse_and_gradient(weight, 2, 4, upstream, BACKEND, **options)
                expected = sparse_and_gradient(weight, 2, 4, upstream, "reference", **options)
                for one, other in zip(got, expected, strict=True):
                    assert_equal(one, other, f"{layout} {dim} {estimator}")


def test_kept_weights_keep_their_bits():
    bits = torch.arange(-32768, 32768).to(torch.int16).view(-1, 64)
    for dtype in (torch.float16, torch.bfloat16):
        weight = bits.view(dtype).to(DEVICE)
        for options in ({}, {"estimator": "mdgf", "decay": 0.5}):
            mask = pyrx.nm_mask(weight, 2, 4, backend="reference")
            got = pyrx.nm_sparsify(weight, 2, 4, backend=BACKEND, **options)
            assert_same_bits(got[mask], weight[mask])


@pytest.mark.parametrize("width", [1, 8, 100, 8192])
def test_apply(width):
    x, weight = scores_of((9, width), torch.bfloat16).to(DEVICE), scores_of((9, width), torch.bfloat16, 1).to(DEVICE)
    bits = pack_bits(torch.rand(9, width, device=DEVICE) < 0.5)
    factor = torch.full((), 0.7, dtype=torch.float64, device=DEVICE)
    for dropped, given, other in ((ZERO, None, None), (FACTOR, factor, None), (REGULARIZE, None, weight)):
        got = torch.ops.pyrx.nm_apply(x, bits, dropped, given, other, 0.01)
        assert_equal(got, reference_apply(x, bits, dropped, given, other, 0.01))


# Where and when it runs.


def everything(weight, decay):
    leaf = weight.detach().requires_grad_()
    mask = pyrx.nm_mask(leaf, 2, 4, dim=0, backend=BACKEND)
    bits = pyrx.nm_mask(leaf, 2, 32, packed=True, backend=BACKEND)
    sparse = pyrx.nm_sparsify(leaf, 2, 4, estimator="mdgf-scaled", decay=decay, backend=BACKEND)
    regularized = pyrx.nm_sparsify(leaf, 4, 8, estimator="sr-ste", backend=BACKEND)
    (gradient,) = torch.autograd.grad((sparse + regularized).sum(), leaf)
    return mask, bits, sparse.detach(), regularized.detach(), gradient


def decay_of(value):
    return torch.full((), value, dtype=torch.float64, device=DEVICE)


def test_graph_replays_with_another_decay():
    weight, decay = torch.randn(64, 256, device=DEVICE), decay_of(0.5)
    graph, captured = capture(lambda: everything(weight, decay))
    seen = []
    for value in (0.9, 0.25, 0.0):
        decay.fill_(value)
        weight.normal_()
        graph.replay()
        replayed = [each.clone() for each in captured]
        for got, expected in zip(replayed, everything(weight, decay), strict=True):
            assert_same_bits(got, expected, f"decay {value}")
        seen.append(replayed[2])
    assert not torch.equal(seen[0], seen[1]) and (seen[2] == 0).sum() >= weight.numel() // 2


def test_one_launch():
    weight = torch.randn(64, 256, device=DEVICE)
    calls = [
        lambda: pyrx.nm_mask(weight, 2, 4, backend=BACKEND),
        lambda: pyrx.nm_sparsify(weight, 2, 4, backend=BACKEND),
    ]
    calls += [lambda: pyrx.nm_mask(weight.t(), 1, 16, dim=0, backend=BACKEND)]
    for call in calls:
        call()
        torch.utils.deterministic.fill_uninitialized_memory = False
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        kernels = [each.name for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
        assert len(kernels) == 1, kernels


def test_errors_come_before_any_launch():
    weight, ops = torch.randn(8, 64, device=DEVICE), torch.ops.pyrx
    with pytest.raises(ValueError, match="expected n in "):
        ops.nm_mask(weight, 5, 4, 1, True, False, False)
    with pytest.raises(ValueError, match="that m = 5 divides"):
        ops.nm_mask(weight, 2, 5, 1, True, False, False)
    with pytest.raises(TypeError, match="expected weight of dtype float16"):
        ops.nm_sparsify(weight.int(), None, None, None, 2, 4, 1, True, False, 0, 0.0)
    with pytest.raises(RuntimeError, match="expected mask on device"):
        ops.nm_sparsify(weight, None, torch.zeros(8, 8, dtype=torch.uint8), None, 2, 4, 1, True, False, 0, 0.0)
    with pytest.raises(RuntimeError, match="expected factor on device"):
        bits = torch.zeros(8, 8, dtype=torch.uint8, device=DEVICE)
        ops.nm_apply(weight, bits, FACTOR, torch.ones((), dtype=torch.float64), None, 0.0)


def test_opcheck():
    weight, decay = torch.randn(8, 64, device=DEVICE, requires_grad=True), decay_of(0.5)
    ops = torch.ops.pyrx
    torch.library.opcheck(ops.nm_mask.default, (weight.detach(), 2, 4, 1, True, True, False))
    torch.library.opcheck(ops.nm_mask.default, (weight.detach().t(), 1, 16, 0, False, False, False))
    torch.library.opcheck(ops.nm_sparsify.default, (weight, None, None, decay, 2, 4, 1, True, False, 3, 0.0))
    bits = pyrx.nm_mask(weight, 2, 4, packed=True)
    torch.library.opcheck(ops.nm_apply.default, (weight.detach(), bits, REGULARIZE, None, weight.detach(), 0.01))


def test_compiles():
    weight, decay = torch.randn(64, 256, device=DEVICE, requires_grad=True), decay_of(0.5)

    def loss(weight, decay):
        sparse = pyrx.nm_sparsify(weight, 2, 4, estimator="mdgf-scaled", decay=decay, backend=BACKEND)
        return (sparse * 2).sum(), pyrx.nm_mask(weight, 1, 8, packed=True, backend=BACKEND)

    compiled = torch.compile(loss, fullgraph=True)
    for value in (0.5, 0.25):
        decay.fill_(value)
        found = [
            (*each, torch.autograd.grad(each[0], weight)[0]) for each in (compiled(weight, decay), loss(weight, decay))
        ]
        torch.testing.assert_close(found[0][0], found[1][0])
        assert_same_bits(found[0][1], found[1][1])
        assert_same_bits(found[0][2], found[1][2])


@pytest.mark.parametrize("dim", [0, 1])
def test_more_than_2_to_the_31_elements(dim):
    if torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("not enough memory")
    scores = torch.zeros(2**11 + 4, 2**20, dtype=torch.bfloat16, device=DEVICE)
    scores[-1] = -1
    bits = pyrx.nm_mask(scores, 2, 4, dim=dim, packed=True, backend=BACKEND)
    assert bits[:-4].eq(0x33 if dim else torch.tensor([[255], [255], [0], [0]] * 2**9, device=DEVICE)).all()
    last = [0x33] * 4 if dim else [255, 0, 0, 255]
    assert bits[-4:].eq(torch.tensor(last, device=DEVICE)[:, None]).all()
    mask = pyrx.nm_mask(scores, 2, 3, dim=dim, pad=True, backend=BACKEND)
    kept = torch.arange(mask.shape[dim], device=DEVICE) % 3 < 2
    assert mask[:-4].eq(kept if dim else kept[:-4, None]).all()
