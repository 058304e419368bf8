"""Batch mixing by CUDA C++ on a GPU: the CPU's bits, layouts, values only the GPU sees."""

import pytest
import torch
from helpers import FLOATS, assert_same_bits, name_of, need

import pyrx
from pyrx.ops.batch_mix import Draw
from pyrx.reference.batch_mix import CUTMIX, EITHER, FLIP, GIVEN, PER_BATCH, PER_PAIR, PER_SAMPLE, RANDOM
from pyrx.reference.batch_mix import batch_mix as reference

pytestmark = pytest.mark.gpu

DTYPES = (torch.uint8, *FLOATS)
OTHERS = (torch.bool, torch.int8, torch.int16, torch.int32, torch.int64)
SHAPES = [(1, 3, 5, 7), (2, 1, 4, 3), (5, 3, 1, 1), (5, 3, 8, 16), (3, 3, 2, 9, 16), (4, 3, 223, 223), (5, 3, 224, 224)]
SHAPES += [(301, 1, 4, 8), (0, 3, 4, 4), (3, 0, 4, 4), (3, 2, 0, 4)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(autouse=True)
def cuda(poison):
    return need("cuda", "cuda", ops=("batch_mix",))


def images_of(shape, dtype=torch.float32, seed=0):
    """Numbers of [0, 255] on the CPU."""
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 255
    return (values > 127) if dtype == torch.bool else (values / 2).round().to(dtype)


def layouts_of(images):
    """Contiguous, channels last, and strides of neither."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}[images.dim()]
    yield images.contiguous()
    yield images.contiguous(memory_format=last)
    yield images.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield torch.cat([images, images], -1)[..., 1 : images.shape[-1] + 1]


def both(function, images, *, inplace=False, **options):
    """(mixed, target) of the GPU, and the reference's of the CPU, from tensors on the CPU."""
    labels = torch.arange(images.shape[0]) * 3 + 1
    there = {name: each.cuda() if isinstance(each, torch.Tensor) else each for name, each in options.items()}
    on_gpu = torch.empty_strided(images.shape, images.stride(), dtype=images.dtype, device="cuda").copy_(images)
    before = on_gpu.clone()
    if inplace:
        there["inplace"] = True
    got = function(on_gpu, labels.cuda(), backend="cuda", **there)
    if inplace:
        assert got[0] is on_gpu
    else:
        assert_same_bits(on_gpu, before)
    return got, function(images, labels, backend="reference", **options)


def assert_same(got, expected, what=""):
    assert_same_bits(got[0].cpu(), expected[0], what)
    for one, other in zip(got[1], expected[1], strict=True):
        if other is not None:
            assert_same_bits(one.cpu(), other, what)


# The CPU's bits.


@pytest.mark.parametrize("function", [pyrx.cutmix, pyrx.mixup, pyrx.resizemix], ids=lambda each: each.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_draws_and_pixels(function, shape):
    rows = [{}, {"per_sample": False}, {"prob": 0.5}]
    if function is pyrx.cutmix:
        rows += [{"alpha": 0.2}, {"alpha": 3.0, "correct_lam": False}, {"minmax": (0.2, 0.9)}]
    if function is pyrx.mixup:
        rows += [{"alpha": 0.2}, {"alpha": 0.6}, {"alpha": 3.0}]
    for images in layouts_of(images_of(shape)):
        for pairing in ("flip", "roll", "random"):
            for seed, options in enumerate(rows):
                got, expected = both(function, images, pairing=pairing, seed=seed - 1, **options)
                assert_same(got, expected, f"{pairing} {options}")
                assert got[0].stride() == expected[0].stride() or images.numel() == 0
                if pairing != "roll" and function is not pyrx.resizemix:
                    got, _ = both(function, images, pairing=pairing, seed=seed - 1, inplace=True, **options)
                    assert_same(got, expected, f"in place {pairing} {options}")


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 0.500001, 0.7, 1.0, 2.0, 50.0])
def test_many_draws(alpha):
    images = torch.zeros(20000, 1, 1, 1)
    for function in (pyrx.cutmix, pyrx.mixup):
        assert_same(*both(function, images, alpha=alpha, seed=11))
    assert_same(*both(pyrx.cutmix, torch.zeros(3000, 1, 1, 31), alpha=alpha, pairing="random", seed=12))


@pytest.mark.parametrize("dtype", [*DTYPES, *OTHERS], ids=name_of)
@pytest.mark.parametrize("shape", [(5, 3, 9, 7), (5, 3, 32, 32), (2, 20, 3, 4, 16)], ids=name_of)
def test_dtypes(dtype, shape):
    functions = [pyrx.cutmix, pyrx.resizemix] + ([pyrx.mixup] if dtype in DTYPES else [])
    for images in layouts_of(images_of(shape, dtype)):
        for function in functions:
            assert_same(*both(function, images, seed=2))
            if function is not pyrx.resizemix:
                assert_same(*both(function, images, seed=2, inplace=True))


@pytest.mark.parametrize("to", FLOATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_normalised_and_converted(dtype, to):
    for shape in ((5, 3, 9, 7), (5, 3, 32, 32), (3, 3, 2, 6, 16)):
        for images in layouts_of(images_of(shape, dtype)):
            for function in (pyrx.cutmix, pyrx.mixup, pyrx.resizemix):
                assert_same(*both(function, images, seed=4, dtype=to, mean=MEAN, std=STD))
                assert_same(*both(function, images, seed=4, dtype=to))
    images = images_of((4, 64, 5, 6), dtype)
    assert_same(*both(pyrx.cutmix, images, seed=4, dtype=to, mean=[c / 8 for c in range(64)], std=2.5))


def test_copies_keep_the_payload_of_nan():
    bits = torch.full((4, 3, 8, 16), 0x7FA00001, dtype=torch.int32)
    for options in ({}, {"lam": torch.tensor([0.0, 1.0, 0.0, 1.0])}):
        function = pyrx.mixup if options else pyrx.cutmix
        for inplace in (False, True):
            images = bits.clone().view(torch.float32).cuda()
            given = {name: each.cuda() for name, each in options.items()}
            mixed, _ = function(images, None, seed=1, backend="cuda", inplace=inplace, **given)
            assert torch.equal(mixed.view(torch.int32).cpu(), bits)


@pytest.mark.parametrize("offset", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_pointers_of_any_alignment(dtype, offset):
    shape = (4, 3, 16, 16)
    flat = torch.empty(4 * 3 * 256 + offset, dtype=dtype, device="cuda")
    images = images_of(shape, dtype)
    moved = flat[offset:].view(shape)
    for function in (pyrx.cutmix, pyrx.mixup):
        expected = function(images, None, seed=1, backend="reference")
        moved.copy_(images)
        assert_same(function(moved, None, seed=1, backend="cuda"), expected)
        out = torch.empty_like(flat)[offset:].view(shape)
        assert_same(function(images.cuda(), None, seed=1, out=out, backend="cuda"), expected)
        assert_same(function(moved, None, seed=1, inplace=True, backend="cuda"), expected)


def test_out_of_any_layout():
    for images in layouts_of(images_of((4, 3, 8, 16), torch.uint8)):
        for out in layouts_of(torch.zeros(4, 3, 8, 16, dtype=torch.bfloat16)):
            out = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="cuda")
            strides = out.stride()
            mixed, target = pyrx.cutmix(images.cuda(), None, seed=3, mean=MEAN, std=STD, out=out, backend="cuda")
            assert mixed is out and out.stride() == strides
            expected = pyrx.cutmix(images, None, seed=3, mean=MEAN, std=STD, dtype=torch.bfloat16, backend="reference")
            assert_same((mixed, target), expected)


@pytest.mark.parametrize("granularity", [PER_BATCH, PER_PAIR, PER_SAMPLE])
def test_either(granularity):
    draw = Draw(EITHER, granularity, 60000, 32768, 0.8, 1.0, 0.0, 0.0, True)
    images, seed = images_of((16, 3, 32, 32)), torch.tensor(5)
    expected, _, mixes = reference(images, None, seed, None, None, None, RANDOM, draw, (), (), torch.float32)
    rest = (None, seed.cuda(), None, None, None, RANDOM, *draw)
    mixed, _, partner, lam, boxes = torch.ops.pyrx.batch_mix(images.cuda(), *rest, [], [], torch.float32)
    swapped = images.cuda()
    torch.ops.pyrx.batch_mix_(swapped, *rest)
    for got, right in ((mixed, expected), (swapped, expected), (partner, mixes.partner), (lam, mixes.lam)):
        assert_same_bits(got.cpu(), right)
    assert_same_bits(boxes.cpu(), mixes.boxes)


def test_replay_and_masks():
    images, masks = images_of((6, 3, 16, 24)), torch.arange(6 * 16 * 24).view(6, 16, 24)
    for pairing in ("flip", "random", torch.tensor([3, 1, 4, 0, 2, 5])):
        got, expected = both(pyrx.cutmix, images, pairing=pairing, masks=masks, seed=8)
        assert_same(got, expected)
        target = got[1]
        again = {"lam": target.lam, "boxes": target.boxes, "pairing": target.pairing}
        assert_same(
            pyrx.cutmix(images.cuda(), target.a, backend="cuda", **again), (got[0], target._replace(masks=None))
        )


def test_gradients():
    images = images_of((4, 3, 8, 16), torch.float64)
    for function in (pyrx.cutmix, pyrx.mixup, pyrx.resizemix):
        found = []
        for device, backend in (("cuda", "cuda"), ("cpu", "reference")):
            leaf = images.to(device, copy=True).requires_grad_()
            mixed, _ = function(leaf, None, seed=3, pairing="random", backend=backend)
            upstream = images_of((4, 3, 8, 16), torch.float64, seed=1).to(device)
            found.append(torch.autograd.grad(mixed, leaf, upstream)[0].cpu())
        torch.testing.assert_close(*found)


# What only the GPU sees: the sample stays as it is, its lam is NaN.


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "name, bad",
    [("lam", torch.nan), ("lam", -0.1), ("lam", 1.1), ("lam", torch.inf)]
    + [("boxes", each) for each in ([0, 0, 9, 4], [0, 0, 4, 17], [-1, 0, 4, 4], [5, 0, 4, 4], [0, -(2**62), 4, 2**62])]
    + [("pairing", each) for each in (-1, 6, 2**62, -(2**62))],
    ids=str,
)
def test_bad_values_poison_their_sample(name, bad, inplace):
    images = images_of((6, 3, 8, 16), torch.bfloat16)
    good = {
        "lam": torch.full((6,), 0.5),
        "boxes": torch.tensor([[1, 2, 7, 11]] * 6),
        "pairing": torch.arange(6).flip(0),
    }
    expected, right = pyrx.cutmix(images, None, backend="reference", **good)
    given = {key: value.clone() for key, value in good.items()}
    given[name][1] = torch.tensor(bad)
    hurt = [1, 4] if name == "pairing" and inplace else [1]
    given = {key: value.cuda() for key, value in given.items()}
    mixed, target = pyrx.cutmix(images.cuda(), torch.arange(6).cuda(), backend="cuda", inplace=inplace, **given)
    assert target.lam.isnan().nonzero().flatten().tolist() == hurt
    expected = expected.clone()
    expected[hurt] = images[hurt]
    assert_same_bits(mixed.cpu(), expected)
    assert target.b.cpu().tolist() == [i if i in hurt and name == "pairing" else 5 - i for i in range(6)]
    kept = [i for i in range(6) if i not in hurt]
    assert_same_bits(target.lam.cpu()[kept], right.lam[kept])
    torch.cuda.synchronize()


def test_boxes_of_minus_one_need_lam():
    images, boxes = images_of((2, 3, 8, 8)).cuda(), torch.full((2, 4), -1, device="cuda")
    mixed, target = pyrx.cutmix(images, None, boxes=boxes, backend="cuda")
    assert target.lam.isnan().all()
    assert_same_bits(mixed, images)


# Where and when it runs.


def test_one_launch():
    images, seed = images_of((8, 3, 32, 32)).cuda(), torch.zeros((), dtype=torch.int64, device="cuda")
    for function, options in (
        (pyrx.cutmix, {"inplace": True}),
        (pyrx.mixup, {}),
        (pyrx.resizemix, {"pairing": "random"}),
    ):
        function(images, None, seed=seed, backend="cuda", **options)
        torch.utils.deterministic.fill_uninitialized_memory = False
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function(images, None, seed=seed, backend="cuda", **options)
            torch.cuda.synchronize()
        kernels = [each for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
        assert len(kernels) == 1, [each.name for each in kernels]


def test_errors_come_before_any_launch():
    images, seed = images_of((4, 3, 8, 16)).cuda(), torch.zeros((), dtype=torch.int64, device="cuda")
    draw = Draw(CUTMIX, PER_SAMPLE, 65536, 0, 0.0, 1.0, 0.0, 0.0, True)
    ops, before = torch.ops.pyrx, images.clone()
    with pytest.raises(RuntimeError, match="expected seed on device cuda:0"):
        ops.batch_mix_(images, None, seed.cpu(), None, None, None, FLIP, *draw)
    with pytest.raises(TypeError, match="expected lam of dtype torch.float32"):
        ops.batch_mix_(images, None, seed, torch.ones(4, device="cuda").double(), None, None, FLIP, *draw)
    with pytest.raises(ValueError, match="expected pairing"):
        ops.batch_mix_(images, None, seed, None, None, None, GIVEN, *draw)
    with pytest.raises(ValueError, match="expected out of shape"):
        ops.batch_mix_out(images[:2].clone(), images, None, seed, None, None, None, FLIP, *draw, [], [])
    assert_same_bits(images, before)


def test_opcheck():
    images, seed = images_of((4, 3, 8, 16)).cuda(), torch.full((), 3, device="cuda")
    labels, draw = torch.arange(4, device="cuda"), Draw(CUTMIX, PER_SAMPLE, 65536, 0, 0.0, 1.0, 0.0, 0.0, True)
    rest = (labels, seed, None, None, None, RANDOM, *draw)
    ops = torch.ops.pyrx
    torch.library.opcheck(ops.batch_mix.default, (images.requires_grad_(), *rest, [1.0] * 3, [0.0] * 3, torch.bfloat16))
    images = images.detach()
    torch.library.opcheck(ops.batch_mix_out.default, (torch.empty_like(images), images, *rest, [], []))
    torch.library.opcheck(ops.batch_mix_.default, (images.clone(), *rest))


def test_compiles():
    images, seed = images_of((4, 3, 8, 16)).cuda(), torch.full((), 3, device="cuda")

    def mixed(images):
        out, target = pyrx.cutmix(images, None, seed=seed, pairing="random", backend="cuda")
        return out * 2, target.lam, target.boxes

    for got, expected in zip(torch.compile(mixed, fullgraph=True)(images), mixed(images), strict=True):
        assert_same_bits(got, expected)


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 2**33:
        pytest.skip("not enough memory")
    shape = (2**9 + 1, 4, 2**10, 2**10)
    images = torch.zeros(shape, dtype=torch.uint8, device="cuda")
    images[-1] = 7
    for inplace in (False, True):
        boxes = torch.tensor([[0, 5, 2**10, 2**10]] * shape[0], device="cuda")
        mixed, _ = pyrx.cutmix(images, None, boxes=boxes, inplace=inplace, backend="cuda")
        assert mixed[0, ..., 5:].eq(7).all() and mixed[-1, ..., 5:].eq(0).all() and mixed[-1, ..., :5].eq(7).all()
        assert mixed[1:-1].eq(0).all()
