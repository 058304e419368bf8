"""Masks for masked image modelling: counts, the definition in NumPy, distributions, indices, registrations, errors."""

import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from helpers import FLOATS, capture, name_of, need, philox, threads

import pyrx
from pyrx import _library
from pyrx._random import seed_tensor
from pyrx.reference import patch_mask as reference

DOMAIN = 4
METHODS = ("random", "block", "hard")
SHAPES = [
    (1, 1, 1),
    (3, 1, 1),
    (0, 4, 4),
    (2, 0, 3),
    (2, 3, 0),
    (4, 7, 9),
    (5, 14, 14),
    (2, 1, 50),
    (3, 40, 33),
    (1, 5, 70),
]
RATIOS = [0.0, 0.3, 0.75, 0.999, 1.0]
SEED = 0x0123456789ABCDEF


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return need(request.param, ops=("patch_mask",))


# The definition, in NumPy and one sample at a time.


def words_of(sample, counter, seed=SEED):
    """(4, n) uint64 words at counters (sample, counter, domain)."""
    counter = np.asarray(counter, dtype=np.uint64)
    sample = np.uint64(sample)
    c0, c1 = counter * np.uint64(0) + sample % np.uint64(2**32), counter * np.uint64(0) + sample // np.uint64(2**32)
    return np.stack(philox((c0, c1, counter, np.full_like(counter, DOMAIN)), (seed % 2**32, seed >> 32)))


def random_order(sample, size):
    """Patches from the one that is masked first to the last."""
    words = words_of(sample, np.arange((size + 3) // 4)).T.reshape(-1)[:size]
    return sorted(range(size), key=lambda p: (-int(words[p]), -p))


def rectangles(sample, height, width, masked, min_block, min_aspect):
    """The rectangles (y, x, height, width) of a sample, and their union."""
    union, taken, failures = np.zeros((height, width), dtype=bool), [], 0
    for attempt in range(128):
        left = masked - int(union.sum())
        if left == 0 or failures == 10:
            break
        failures += 1
        w = [int(each[0]) for each in words_of(sample, [2**31 + attempt])]
        area = min_block + (left - min_block) * (w[0] + 0.5) / 2**32
        aspect = min_aspect ** ((w[1] % 2**31 + 0.5) / 2**31)
        sides = [math.floor(math.sqrt(area * aspect) + 0.5), math.floor(math.sqrt(area / aspect) + 0.5)]
        h, v = sides if w[1] < 2**31 else sides[::-1]
        if h > height or v > width:
            continue
        y, x = w[2] * (height - h + 1) // 2**32, w[3] * (width - v + 1) // 2**32
        fresh = h * v - int(union[y : y + h, x : x + v].sum())
        if 0 < fresh <= left:
            union[y : y + h, x : x + v] = True
            taken.append((y, x, h, v))
            failures = 0
    return taken, union


def expected_mask(shape, masked, method, *, losses=None, hard=0, min_block=16, min_aspect=0.3):
    samples, size = shape[0], math.prod(shape[1:])
    found = np.zeros((samples, size), dtype=bool)
    for n in range(samples):
        if method == "block":
            found[n] = rectangles(n, *shape[1:], masked, min_block, min_aspect)[1].reshape(-1)
        if method == "hard":
            values = [float(each) for each in losses.reshape(samples, size)[n]]
            # a NaN does not compare
            ranks = [(0, 0.0, p) if math.isnan(value) else (1, -value, p) for p, value in enumerate(values)]
            hardest = sorted(range(size), key=ranks.__getitem__)
            found[n, hardest[:hard]] = True
        rest = [p for p in random_order(n, size) if not found[n, p]]
        found[n, rest[: masked - int(found[n].sum())]] = True
    return torch.from_numpy(found).reshape(shape)


def losses_for(shape, dtype=torch.float32):
    """With ties, both zeros, infinities and NaN among them."""
    values = torch.randn(shape, dtype=torch.float64).mul(2).round()
    flat = values.view(-1)
    for start, value in enumerate((0.0, -0.0, math.inf, -math.inf, math.nan)):
        flat[start::23] = value
    return values.to(dtype)


def options_for(method, shape, dtype=torch.float32):
    return {"method": method, **({"losses": losses_for(shape, dtype)} if method == "hard" else {})}


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("method", METHODS)
def test_masks_equal_numpys(backend, method, shape):
    size = math.prod(shape[1:])
    for ratio in RATIOS:
        options = options_for(method, shape)
        masked = size - int(size * (1 - ratio))
        hard = int(masked * 0.5) if method == "hard" else 0
        expected = expected_mask(shape, masked, method, losses=options.get("losses"), hard=hard)
        got = pyrx.patch_mask(shape, ratio, seed=SEED, backend=backend, **options)
        assert got.dtype == torch.bool and got.is_contiguous() and got.shape == shape
        assert torch.equal(got.flatten(1).sum(1), torch.full((shape[0],), masked))
        assert torch.equal(got, expected), ratio
        if method != "block":
            flat = {**options, **({"losses": options["losses"].flatten(1)} if method == "hard" else {})}
            flat = pyrx.patch_mask((shape[0], size), ratio, seed=SEED, backend=backend, **flat)
            assert torch.equal(flat, got.flatten(1))


@pytest.mark.parametrize("min_block, min_aspect", [(1, 0.3), (4, 0.3), (16, 1.0), (60, 0.1), (1000, 0.5), (16, 1e-9)])
def test_block_options(backend, min_block, min_aspect):
    shape = (6, 16, 12)
    for masked in (0, 1, 5, 80, 191, 192):
        got = pyrx.patch_mask(
            shape,
            num_masked=masked,
            method="block",
            min_block=min_block,
            min_aspect=min_aspect,
            seed=SEED,
            backend=backend,
        )
        assert torch.equal(got, expected_mask(shape, masked, "block", min_block=min_block, min_aspect=min_aspect))


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_hard_masks_of_every_dtype_and_ratio(backend, dtype):
    shape = (3, 13, 11)
    for hard_ratio in (0.0, 0.005, 0.5, 0.99, 1.0):
        losses = losses_for(shape, dtype)
        got = pyrx.patch_mask(shape, method="hard", losses=losses, hard_ratio=hard_ratio, seed=SEED, backend=backend)
        masked = 143 - int(143 * 0.25)
        expected = expected_mask(shape, masked, "hard", losses=losses, hard=int(masked * hard_ratio))
        assert torch.equal(got, expected), hard_ratio


@pytest.mark.parametrize("layout", ["transposed", "every_second", "expanded"])
def test_losses_of_any_strides(backend, layout):
    losses = torch.randn(6, 20)
    losses = {
        "transposed": lambda: losses.t().contiguous().t(),
        "every_second": lambda: torch.stack([losses, -losses], -1)[..., 0],
        "expanded": lambda: losses[:1].expand(6, 20),
    }[layout]()
    options = {"method": "hard", "hard_ratio": 0.7, "seed": 3, "backend": backend}
    got = pyrx.patch_mask((6, 20), losses=losses, **options)
    assert torch.equal(got, pyrx.patch_mask((6, 20), losses=losses.contiguous(), **options))


def test_losses_far_below_one_are_ordered(backend):
    """Subnormal numbers, and float64 that float32 rounds to one value: the lower index wins."""
    tiny = torch.tensor([[1e-40, 2e-40, -1e-40, 0.0]])
    options = {"num_masked": 1, "method": "hard", "hard_ratio": 1.0, "backend": backend}
    assert pyrx.patch_mask((1, 4), losses=tiny, **options).tolist() == [[False, True, False, False]]
    close = torch.tensor([[0.0, 1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert pyrx.patch_mask((1, 3), losses=close, **options).tolist() == [[False, True, False]]


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**64 - 1], ids=hex)
def test_seeds_of_64_bits(backend, seed):
    signed = seed - 2**64 if seed >= 2**63 else seed
    expected = pyrx.patch_mask((4, 30), seed=signed, backend="reference")
    for given in (seed, torch.tensor(signed), torch.tensor([signed])):
        assert torch.equal(pyrx.patch_mask((4, 30), seed=given, backend=backend), expected)
    assert not torch.equal(pyrx.patch_mask((4, 30), seed=SEED, backend=backend), expected)


# Counts as MAE's and BEiT's users know them.


@pytest.mark.parametrize("size", [1, 2, 10, 49, 196, 197])
def test_counts_are_maes(backend, size):
    for ratio in (0.0, 0.1, 0.4, 0.6, 0.75, 0.9, 0.95, 1 - 1e-9, 1.0):
        mask, ids_keep, ids_restore = pyrx.patch_mask((2, size), ratio, return_indices=True, backend=backend)
        keep = int(size * (1 - ratio))
        assert ids_keep.shape == (2, keep) and ids_restore.shape == (2, size)
        assert (mask.sum(1) == size - keep).all()
    assert (pyrx.patch_mask((2, size), num_masked=1, backend=backend).sum(1) == 1).all()


# Distributions.


def chi_square(counts, expected):
    return float(((counts.double() - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("size, masked", [(9, 2), (16, 12), (5, 4)])
def test_every_set_of_patches_is_as_likely(backend, size, masked):
    samples = 60000
    mask = pyrx.patch_mask((samples, size), num_masked=masked, seed=1, backend=backend)
    codes = (mask.long() << torch.arange(size)).sum(1)
    sets = math.comb(size, masked)
    counts = codes.unique(return_counts=True)[1]
    assert len(counts) == sets
    freedom = sets - 1
    assert chi_square(counts, samples / sets) < freedom + 5 * math.sqrt(2 * freedom)


def test_samples_and_seeds_are_independent(backend):
    """The overlap of two masks is hypergeometric."""
    size, masked, samples = 40, 20, 4000
    mask = pyrx.patch_mask((samples, size), num_masked=masked, seed=1, backend=backend)
    other = pyrx.patch_mask((samples, size), num_masked=masked, seed=2, backend=backend)
    mean, variance = masked**2 / size, masked**2 * (size - masked) ** 2 / (size**2 * (size - 1))
    for a, b in ((mask[:-1], mask[1:]), (mask, other)):
        overlap = (a & b).sum(1).double()
        assert abs(overlap.mean() - mean) < 5 * math.sqrt(variance / len(overlap))
        assert abs(overlap.var() / variance - 1) < 0.15


def test_block_masks_cover_the_grid_as_beits(backend):
    """Symmetric under flips and transposition, and rectangles of BEiT's areas and aspects."""
    samples, side = 20000, 14
    mask = pyrx.patch_mask((samples, side, side), num_masked=75, method="block", seed=5, backend=backend)
    share = mask.double().mean(0)
    spread = 0.5 / math.sqrt(samples)
    for other in (share.flip(0), share.flip(1), share.t()):
        assert (share - other).abs().max() < 7 * spread
    assert share[6:8, 6:8].min() > 1.5 * share[0, 0], "rectangles reach the middle more often"
    first = [rectangles(n, side, side, 75, 16, 0.3)[0][0] for n in range(400)]
    areas = np.array([h * w for _, _, h, w in first])
    ratios = np.array([math.log(h / w) for _, _, h, w in first])
    assert 8 <= areas.min() and areas.max() <= 90 and abs(areas.mean() - 45) < 4
    assert abs(ratios.mean()) < 0.2 and np.abs(ratios).max() < math.log(1 / 0.3) + 0.3


def test_block_masks_are_rectangles_and_a_few_random_patches(backend):
    shape, masked = (300, 14, 14), 75
    mask = pyrx.patch_mask(shape, num_masked=masked, method="block", seed=SEED, backend=backend)
    filled = []
    for n in range(shape[0]):
        _, union = rectangles(n, 14, 14, masked, 16, 0.3)
        assert mask[n].numpy()[union].all()
        filled.append(masked - int(union.sum()))
    assert min(filled) == 0 and 0 < np.mean(filled) < 2, np.mean(filled)


def test_hard_masks_contain_the_hardest_and_draw_the_rest(backend):
    samples, size, masked, hard = 20000, 12, 8, 4
    losses = torch.rand(size).expand(samples, size)
    mask = pyrx.patch_mask((samples, size), num_masked=masked, method="hard", losses=losses, seed=2, backend=backend)
    hardest = losses[0].topk(hard).indices
    assert mask[:, hardest].all()
    rest = torch.ones(size, dtype=torch.bool).scatter(0, hardest, False)
    codes = (mask[:, rest].long() << torch.arange(size - hard)).sum(1)
    counts = codes.unique(return_counts=True)[1]
    sets = math.comb(size - hard, masked - hard)
    assert len(counts) == sets and chi_square(counts, samples / sets) < sets + 5 * math.sqrt(2 * sets)


def test_extremes_of_hard_ratio(backend):
    losses = torch.randn(5, 40)
    options = {"seed": 9, "backend": backend}
    easy = pyrx.patch_mask((5, 40), method="hard", losses=losses, hard_ratio=0.0, **options)
    assert torch.equal(easy, pyrx.patch_mask((5, 40), **options))
    hard = pyrx.patch_mask((5, 40), method="hard", losses=losses, hard_ratio=1.0, **options)
    assert torch.equal(hard, torch.zeros(5, 40, dtype=torch.bool).scatter(1, losses.topk(30).indices, True))


# Indices.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(4, 7, 9), (3, 14, 14), (2, 1, 1), (0, 3, 3), (2, 0, 3)], ids=name_of)
def test_indices_do_what_maes_do(backend, method, shape):
    samples, size, width = shape[0], math.prod(shape[1:]), 3
    for ratio in (0.0, 0.6, 1.0):
        options = {"seed": 4, "backend": backend, **options_for(method, shape)}
        mask, ids_keep, ids_restore = pyrx.patch_mask(shape, ratio, return_indices=True, **options)
        assert torch.equal(mask, pyrx.patch_mask(shape, ratio, **options))
        assert ids_keep.dtype == ids_restore.dtype == torch.int64
        keep = int(size * (1 - ratio))
        assert torch.equal(ids_keep.reshape(-1), (~mask).flatten(1).nonzero()[:, 1])
        x = torch.randn(samples, size, width)
        visible = x.gather(1, ids_keep[..., None].expand(-1, -1, width))
        whole = torch.cat([visible, torch.zeros(samples, size - keep, width)], 1)
        restored = whole.gather(1, ids_restore[..., None].expand(-1, -1, width))
        assert torch.equal(restored, x * ~mask.flatten(1)[..., None])
        assert torch.equal(ids_restore.sort(1).values, torch.arange(size).expand(samples, size))


# Randomness as everywhere in pyrx.


def test_replay_and_generators(backend):
    options = {"backend": backend}
    assert not torch.equal(pyrx.patch_mask((4, 50), **options), pyrx.patch_mask((4, 50), **options))
    masks = [pyrx.patch_mask((4, 50), generator=torch.Generator().manual_seed(3), **options) for _ in range(2)]
    assert torch.equal(*masks)
    torch.manual_seed(3)
    first = pyrx.patch_mask((4, 50), **options)
    torch.manual_seed(3)
    assert torch.equal(first, pyrx.patch_mask((4, 50), **options))
    seed = seed_tensor("patch_mask", None, torch.Generator().manual_seed(3), torch.device("cpu"))
    assert torch.equal(masks[0], pyrx.patch_mask((4, 50), seed=seed, **options))


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_is_the_same_in_every_batch_and_on_any_number_of_threads(cpu, method):
    shape = (300, 14, 14)
    options = options_for(method, shape)
    masks = []
    for count in (1, 2, 3):
        with threads(count):
            masks.append(pyrx.patch_mask(shape, seed=1, return_indices=True, backend=cpu, **options))
    for other in masks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(masks[0], other, strict=True))
    few = {**options, **({"losses": options["losses"][:7]} if method == "hard" else {})}
    assert torch.equal(pyrx.patch_mask((7, 14, 14), seed=1, backend=cpu, **few), masks[0][0][:7])


def test_losses_get_no_gradient(backend):
    losses = torch.randn(3, 20, requires_grad=True)
    found = pyrx.patch_mask((3, 20), method="hard", losses=losses, return_indices=True, backend=backend)
    assert not any(each.requires_grad for each in found)


def test_autocast_changes_nothing(backend):
    losses = torch.randn(3, 20)
    options = {"method": "hard", "losses": losses, "seed": 1, "backend": backend}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pyrx.patch_mask((3, 20), **options), pyrx.patch_mask((3, 20), **options))


def test_the_meta_device():
    seed = torch.zeros((), dtype=torch.int64, device="meta")
    found = pyrx.patch_mask((2, 4, 5), 0.5, seed=seed, return_indices=True)
    assert [tuple(each.shape) for each in found] == [(2, 4, 5), (2, 10), (2, 20)]


def test_the_loops_bounds_are_the_kernels(cpu):
    """A grid so full that both bounds are met."""
    shape, masked = (40, 64, 64), 3900
    got = pyrx.patch_mask(shape, num_masked=masked, method="block", min_block=1, min_aspect=0.05, seed=3, backend=cpu)
    draw = reference.Draw(reference.BLOCK, masked, 0, 1, math.log(0.05))
    assert torch.equal(got, reference.patch_mask(torch.tensor(3), None, shape, draw, False)[0])


# Triton, and GPUs.

SMALL = [(2, 1, 1), (0, 4, 4), (2, 0, 3), (3, 5, 7), (2, 14, 14)]


def assert_equals_the_reference(backend, device, shapes):
    for method in METHODS:
        for shape in shapes:
            for ratio in (0.0, 0.7, 1.0):
                options = {"seed": -5, "return_indices": True, "min_block": 4, **options_for(method, shape)}
                expected = pyrx.patch_mask(shape, ratio, backend="reference", **options)
                options["losses"] = options["losses"].to(device) if method == "hard" else None
                got = pyrx.patch_mask(shape, ratio, backend=backend, device=device, **options)
                for a, b in zip(got, expected, strict=True):
                    assert a.device.type == device and torch.equal(a.cpu(), b), (method, shape, ratio)


INTERPRETED = """
import test_patch_mask as tests
from pyrx._triton import patch_mask as kernels
tests.assert_equals_the_reference("triton", "cpu", tests.SMALL)
kernels.GROUPS = 4  # several tiles a sample
tests.assert_equals_the_reference("triton", "cpu", [(2, 5, 7)])
for dtype in tests.FLOATS:
    options = {"method": "hard", "losses": tests.losses_for((2, 30), dtype), "seed": 1}
    made = [tests.pyrx.patch_mask((2, 30), backend=each, **options) for each in ("triton", "reference")]
    assert made[0].equal(made[1]), dtype
"""


@pytest.mark.slow
def test_triton_in_the_interpreter(python):
    pytest.importorskip("triton")
    python(INTERPRETED, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_masks_equal_the_references(backend):
    need(backend, "cuda", ops=("patch_mask",))
    # of the last, the bits of a grid lie in the device's memory
    assert_equals_the_reference(backend, "cuda", [*SMALL, *SHAPES, (300, 14, 14), (2, 100, 130), (1, 700, 801)])
    for dtype in FLOATS:
        options = {"method": "hard", "losses": losses_for((7, 196), dtype).cuda(), "seed": 1}
        got = pyrx.patch_mask((7, 196), backend=backend, **options)
        assert torch.equal(got, pyrx.patch_mask((7, 196), backend="reference", **options)), dtype


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_graphs_read_the_seed_when_replayed(backend, method):
    need(backend, "cuda", ops=("patch_mask",))
    seed, losses = torch.tensor(1, device="cuda"), torch.randn(8, 14, 14, device="cuda") if method == "hard" else None
    options = {"method": method, "losses": losses, "seed": seed, "return_indices": True, "backend": backend}
    graph, captured = capture(lambda: pyrx.patch_mask((8, 14, 14), **options))
    for value in (2, 3):
        seed.fill_(value)
        graph.replay()
        for a, b in zip(captured, pyrx.patch_mask((8, 14, 14), **options), strict=True):
            assert torch.equal(a, b)


# Registrations.


@pytest.mark.parametrize("indices", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_opcheck(cpu, method, indices):
    for shape in ([3, 6, 7], [0, 6, 7]):
        losses = torch.randn(shape).half() if method == "hard" else None
        arguments = torch.tensor(5), losses, shape, METHODS.index(method), 20, 7 if losses is not None else 0, 4, -1.2
        torch.library.opcheck(_library.namespace(cpu).patch_mask.default, (*arguments, indices))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("method", ["random", "hard", "block"])
def test_compiled_masks_equal_eager_ones(backend, method, dynamic):
    if (backend, method) == ("reference", "block"):
        pytest.skip("128 draws of rectangles in one graph: minutes")
    torch._dynamo.reset()

    def function(x, seed):
        losses = x if method == "hard" else None
        options = {"method": method, "losses": losses, "seed": seed, "device": x.device}
        mask = pyrx.patch_mask(x.shape, 0.6, backend=backend, **options)
        return mask, *pyrx.patch_mask(x.shape, num_masked=3, return_indices=True, backend=backend, **options)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    compiled = []
    for samples in (4, 7, 9)[: 2 if backend == "reference" else 3]:
        x, seed = torch.randn(samples, 5, 6), torch.tensor(samples)
        for got, expected in zip(fast(x, seed), function(x, seed), strict=True):
            assert torch.equal(got, expected)
        compiled.append(counter.frame_count)
    assert not dynamic or compiled[0] == compiled[-1], "a batch size of its own compiles nothing"
    torch._dynamo.reset()


def test_the_seed_is_drawn_anew_in_every_compiled_call(cpu):
    fast = torch.compile(lambda: pyrx.patch_mask((4, 100), backend=cpu), fullgraph=True, backend="aot_eager")
    assert not torch.equal(fast(), fast())


# Errors.


def row(text, error=ValueError, **changes):
    return pytest.param(changes, error, text, id=f"{'+'.join(changes)}: {text}"[:100])


@pytest.mark.parametrize(
    "changes, error, text",
    [
        row("expected method to be one of 'random', 'block', 'hard', got 'grid'", method="grid"),
        row("expected shape to be a sequence of ints, got int", TypeError, shape=4),
        row("expected shape's sizes to be an int, got float", TypeError, shape=(2, 3.0)),
        row("expected shape's sizes in [0, 4611686018427387904], got -1", shape=(2, -1)),
        row("expected shape [N, L] or [N, Hp, Wp], got [4]", shape=(4,)),
        row("expected shape [N, L] or [N, Hp, Wp], got [1, 2, 3, 4]", shape=(1, 2, 3, 4)),
        row("expected shape [N, Hp, Wp], got [2, 16]", shape=(2, 16), method="block"),
        row("expected shape of fewer than 2147483648 patches a sample, got [1, 2147483648]", shape=(1, 2**31)),
        row("expected mask_ratio in [0, 1], got 1.5", mask_ratio=1.5),
        row("expected mask_ratio in [0, 1], got -0.1", mask_ratio=-0.1),
        row("expected mask_ratio in [0, 1], got nan", mask_ratio=math.nan),
        row("expected mask_ratio to be a float, got str", TypeError, mask_ratio="0.5"),
        row("expected mask_ratio to be a float, got bool", TypeError, mask_ratio=True),
        row("expected num_masked in [0, 16], got 17", num_masked=17),
        row("expected num_masked in [0, 16], got -1", num_masked=-1),
        row("expected num_masked to be an int, got float", TypeError, num_masked=3.0),
        row("expected min_block in [1, 2147483647], got 0", min_block=0),
        row("expected min_block to be an int, got float", TypeError, min_block=1.5),
        row("expected min_aspect in (0, 1], got 0.0", min_aspect=0.0),
        row("expected min_aspect in (0, 1], got 1.5", min_aspect=1.5),
        row("expected min_aspect to be a float, got str", TypeError, min_aspect="1"),
        row("expected losses for method 'hard' alone, got None", TypeError, method="hard"),
        row("expected losses for method 'hard' alone, got a Tensor", TypeError, losses=torch.zeros(2, 4, 4)),
        row("expected losses to be a Tensor, got list", TypeError, losses=[1.0], method="hard"),
        row("expected losses of shape [N, Hp, Wp] = [2, 4, 4], got [2, 16]", losses=torch.zeros(2, 16), method="hard"),
        row(
            "expected losses of shape [N, L] = [2, 16], got [3, 16]",
            shape=(2, 16),
            losses=torch.zeros(3, 16),
            method="hard",
        ),
        row(
            "expected losses of dtype float16, bfloat16, float32 or float64, got torch.int64",
            TypeError,
            losses=torch.zeros(2, 4, 4).long(),
            method="hard",
        ),
        row(
            "expected losses on device cpu, got meta",
            RuntimeError,
            losses=torch.zeros(2, 4, 4, device="meta"),
            method="hard",
            device="cpu",
        ),
        row("expected hard_ratio in [0, 1], got 1.01", hard_ratio=1.01, losses=torch.zeros(2, 4, 4), method="hard"),
        row(
            "expected hard_ratio to be a float, got NoneType",
            TypeError,
            hard_ratio=None,
            losses=torch.zeros(2, 4, 4),
            method="hard",
        ),
        row("expected seed of dtype torch.int64, got torch.int32", TypeError, seed=torch.tensor(1, dtype=torch.int32)),
        row("expected seed of one element, got [2]", seed=torch.tensor([1, 2])),
        row("expected at most one of seed and generator, got both", seed=1, generator=torch.Generator()),
    ],
)
def test_errors(backend, changes, error, text):
    with pytest.raises(error) as caught:
        pyrx.patch_mask(**({"shape": (2, 4, 4), "backend": backend} | changes))
    assert type(caught.value) is error and str(caught.value) == f"pyrx::patch_mask: {text}"


RAW = {
    "seed": torch.tensor(1),
    "losses": None,
    "shape": [2, 4, 4],
    "method": 0,
    "masked": 3,
    "hard": 0,
    "min_block": 4,
    "log_aspect": -1.0,
    "indices": True,
}
LOSSES = torch.zeros(2, 4, 4)


@pytest.mark.parametrize("entry", ["kernel", "fake"])
@pytest.mark.parametrize(
    "changes, error, text",
    [
        row("expected method in [0, 2], got 3", method=3),
        row("expected shape [N, L] or [N, Hp, Wp], got [4]", shape=[4]),
        row("expected shape [N, Hp, Wp], got [2, 16]", shape=[2, 16], method=1),
        row("expected shape's sizes at least 0, got [2, -1]", shape=[2, -1]),
        row("expected shape of fewer than 2147483648 patches a sample, got [1, 65536, 32768]", shape=[1, 65536, 32768]),
        row("expected num_masked in [0, 16], got 17", masked=17),
        row("expected number of hard patches in [0, 3], got 4", hard=4, method=2, losses=LOSSES),
        row("expected min_block in [1, 2147483647], got 0", min_block=0),
        row("expected logarithm of min_aspect in [-700, 0], got 0.5", log_aspect=0.5),
        row("expected losses for method 'hard' alone, got None", TypeError, method=2),
        row("expected losses for method 'hard' alone, got a Tensor", TypeError, losses=LOSSES),
        row("expected losses of shape [N, Hp, Wp] = [2, 4, 4], got [2, 4, 5]", losses=torch.zeros(2, 4, 5), method=2),
        row("expected losses of shape [N, L] = [2, 16], got [2, 4, 4]", shape=[2, 16], losses=LOSSES, method=2),
        row(
            "expected losses of dtype float16, bfloat16, float32 or float64, got torch.int32",
            TypeError,
            losses=LOSSES.int(),
            method=2,
        ),
        row("expected seed of dtype torch.int64, got torch.float32", TypeError, seed=torch.tensor(1.0)),
        row("expected seed of one element, got [2]", seed=torch.tensor([1, 2])),
    ],
)
def test_entries_and_fakes_raise_the_same(cpu, entry, changes, error, text):
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments = list((RAW | changes).values())
    with pytest.raises(error) as caught:
        if entry == "kernel":
            _library.namespace(cpu).patch_mask(*arguments)
        else:
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(each) if isinstance(each, torch.Tensor) else each for each in arguments]
                _library.namespace(cpu).patch_mask(*fakes)
    assert type(caught.value) is error and str(caught.value) == f"pyrx::patch_mask: {text}"
