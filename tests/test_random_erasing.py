"""pyrx.random_erasing and pyrx.cutout: boxes and fills, the same on every backend, against loops and timm."""

import contextlib
import math

import numpy as np
import pytest
import torch
from helpers import FLOATS, assert_same_bits, layouts, name_of, need, philox, threads
from torch._subclasses.fake_tensor import FakeTensorMode

import pyrx
from pyrx import _library

SHAPES = [(6, 3, 33, 29), (5, 2, 3, 16, 20)]
MODES = ("const", "rand", "pixel")
DRAWS = [
    {},
    {"prob": 1.0, "min_count": 1, "max_count": 4},
    {"prob": 1.0, "min_count": 3, "scale": (0.3, 1.0), "ratio": (0.1, 10.0)},
    {"prob": 1.0, "num_splits": 2},
    {"prob": 0.8, "per_sample": False, "max_count": 2},
]


def erased(images, boxes, fill):
    """A loop over images and boxes; fill(n, k, slices) is what box k of image n takes."""
    expected = images.clone()
    for n, row in enumerate(boxes.tolist()):
        for k, (y0, x0, y1, x1) in enumerate(row):
            at = (..., slice(y0, y1), slice(x0, x1))
            expected[n][at] = fill(n, k, at)
    return expected


def normals(seed, numel, sample):
    """Standard normals of pixels are those of noise_mask."""
    ones = torch.ones(1, 1, max(numel, 1))
    return pyrx.noise_mask(ones * 0, ones, seed=seed, sample=sample, backend="reference").flatten()[:numel]


@pytest.mark.parametrize("draw", DRAWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("mode", MODES)
def test_boxes_are_filled_and_nothing_else(backend, shape, mode, draw):
    channels, tail = shape[1], [1] * (len(shape) - 2)
    value = [0.5 * c - 1 for c in range(channels)]
    for name, images in layouts(shape):
        got, boxes = pyrx.random_erasing(
            images, mode=mode, value=value, seed=11, backend=backend, return_boxes=True, **draw
        )
        if mode == "const":
            expected = erased(images, boxes, lambda n, k, at: torch.tensor(value).reshape(-1, *tail))
        elif mode == "pixel":
            noise = normals(11, math.prod(shape), 2**32 - 1).reshape(shape)
            expected = erased(images, boxes, lambda n, k, at, noise=noise: noise[n][at])
        else:
            rows = shape[0] if draw.get("per_sample", True) else 1
            noise = normals(11, rows * boxes.shape[1] * channels, 2**32 - 2).reshape(rows, -1, channels, *tail)
            expected = erased(images, boxes, lambda n, k, at, noise=noise: noise[n % len(noise)][k])
        assert_same_bits(got, expected, name)
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        kept = images.is_contiguous(memory_format=last) and not images.is_contiguous()
        assert got.is_contiguous(memory_format=last if kept else torch.contiguous_format), name


def formula_boxes(seed, samples, height, width, prob, scale, ratio, counts, num_splits=0):
    """timm's loop over images, with Python's arithmetic on Philox words from NumPy."""

    def words(index, word2):
        key = seed % 2**64
        return [int(each) for each in philox((index, 0, word2, 1), (key & 0xFFFFFFFF, key >> 32))]

    found = np.zeros((samples, counts[1], 4), dtype=np.int64)
    for n in range(samples):
        w = words(n, 256)
        if (num_splits > 1 and n < samples // num_splits) or (w[0] >> 16) >= round(65536 * prob):
            continue
        count = counts[0] + (w[1] * (counts[1] - counts[0] + 1) >> 32)
        for k in range(count):
            for attempt in range(10):
                w = words(n, 257 + 10 * k + attempt)
                u = [(each + 0.5) / 2**32 for each in w]
                area = (scale[0] + (scale[1] - scale[0]) * u[0]) * height * width / count
                aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[1])
                h, w_ = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if h < height and w_ < width:
                    y0, x0 = w[2] * (height - h + 1) >> 32, w[3] * (width - w_ + 1) >> 32
                    found[n, k] = y0, x0, y0 + h, x0 + w_
                    break
    return torch.from_numpy(found)


@pytest.mark.parametrize("seed", [0, -7, 2**63 - 1])
@pytest.mark.parametrize("counts", [(1, 1), (1, 5)])
def test_boxes_are_timms(backend, seed, counts):
    for height, width, scale, ratio, splits in (
        (224, 224, (0.02, 1 / 3), (0.3, 3.3), 0),
        (17, 90, (0.1, 1.0), (0.05, 20.0), 3),
    ):
        images = torch.zeros(300, 1, height, width)
        _, boxes = pyrx.random_erasing(
            images, prob=0.7, scale=scale, ratio=ratio, min_count=counts[0], max_count=counts[1], num_splits=splits,
            seed=seed, backend=backend, return_boxes=True,
        )  # fmt: skip
        assert torch.equal(boxes, formula_boxes(seed, 300, height, width, 0.7, scale, ratio, counts, splits))


def test_boxes_are_distributed_as_timms(backend):
    timm = pytest.importorskip("timm.data.random_erasing")
    import random

    random.seed(0)
    n, size = 3000, 32
    images = torch.ones(n, 1, size, size)
    theirs = timm.RandomErasing(0.5, max_count=3, device="cpu")(images.clone())
    ours = pyrx.random_erasing(images, ratio=(0.3, 1 / 0.3), max_count=3, seed=1, backend=backend)
    for name, of in {
        "erased images": lambda x: (x == 0).flatten(1).any(1).double(),
        "erased share": lambda x: (x == 0).double().flatten(1).mean(1),
        "centre": lambda x: (x[:, 0, 16, 16] == 0).double(),
        "corner": lambda x: (x[:, 0, 0, 0] == 0).double(),
        "last row": lambda x: (x[:, 0, -1] == 0).any(1).double(),
    }.items():
        a, b = of(ours), of(theirs)
        assert abs(a.mean() - b.mean()) < 4.5 * ((a.var() + b.var()) / n) ** 0.5, name


def test_cutout_boxes(backend):
    images = torch.ones(4000, 1, 12, 9)
    for length, side in ((0.5, 4), (0.62, 5), (1.0, 9), (0.0, 0), (0.1, 0)):
        out, boxes = pyrx.cutout(images, length=length, num_holes=1, seed=3, backend=backend, return_boxes=True)
        y0, x0, y1, x1 = boxes[:, 0].unbind(1)
        assert torch.equal((out == 0).flatten(1).sum(1), (y1 - y0) * (x1 - x0))
        whole = (y0 > 0) & (y1 < 12)
        assert ((y1 - y0)[whole] == side).all() and (y1 - y0).max() <= side and (x1 - x0).max() <= side
        if side == 4:
            # centres are uniform: each row's hits, and the clipped edges'
            starts = torch.bincount(y0[y0 > 0], minlength=12)[1:10].double() / 4000
            assert (starts - 1 / 12).abs().max() < 5 * (1 / 12 / 4000) ** 0.5
            assert abs((y0 == 0).double().mean() - 3 / 12) < 5 * (3 / 16 / 4000) ** 0.5
    _, boxes = pyrx.cutout(images, num_holes=3, prob=0.25, seed=3, backend=backend, return_boxes=True)
    cut = boxes.flatten(1).any(1)
    assert boxes.shape == (4000, 3, 4) and abs(cut.double().mean() - 0.25) < 5 * (0.1875 / 4000) ** 0.5
    assert not torch.equal(boxes[cut, 0], boxes[cut, 1])


def test_backends_draw_the_same(cpu):
    for mode in MODES:
        for shape in ((64, 3, 60, 77), (0, 3, 4, 4), (2, 3, 0, 5), (2, 1, 1, 1), (2, 0, 8, 8)):
            images = torch.randn(shape)
            options = {"prob": 0.9, "max_count": 5, "mode": mode, "seed": -3, "return_boxes": True}
            one, two = (pyrx.random_erasing(images, backend=each, **options) for each in (cpu, "reference"))
            assert_same_bits(one[0], two[0])
            assert torch.equal(one[1], two[1])
            one, two = (
                pyrx.cutout(images, num_holes=4, mode=mode, seed=5, backend=each, return_boxes=True)
                for each in (cpu, "reference")
            )
            assert_same_bits(one[0], two[0])
            assert torch.equal(one[1], two[1])


def test_draws_are_not_those_of_batch_mixing(backend):
    """One seed for both: the boxes' events are independent."""
    images = torch.zeros(4000, 1, 8, 8)
    _, target = pyrx.cutmix(images, None, prob=0.5, seed=9, backend="reference")
    _, boxes = pyrx.random_erasing(images, prob=0.5, seed=9, backend=backend, return_boxes=True)
    mixed, cut = target.lam < 1, boxes[:, 0, 2] > 0
    both = (mixed & cut).double().mean() - mixed.double().mean() * cut.double().mean()
    assert abs(both) < 4.5 * 0.25 / 4000**0.5


@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS], ids=name_of)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_in_place_is_out_of_place(backend, dtype, layout, mode):
    images = (torch.rand(9, 3, 40, 37) * 255).to(dtype).contiguous(memory_format=layout)
    options = {"mode": mode, "prob": 0.8, "max_count": 3, "seed": 4, "value": 7, "backend": backend}
    if dtype == torch.uint8 and mode != "const":
        with pytest.raises(
            TypeError, match="expected images of a floating-point dtype to be filled with noise, got torch.uint8"
        ):
            pyrx.random_erasing(images, **options)
        return
    out, boxes = pyrx.random_erasing(images, return_boxes=True, **options)
    assert not torch.equal(out, images)
    if mode == "const":
        assert_same_bits(out, erased(images, boxes, lambda n, k, at: torch.tensor(7, dtype=dtype)))
    same = images.clone(memory_format=torch.preserve_format)
    got, again = pyrx.random_erasing(same, inplace=True, return_boxes=True, **options)
    assert got is same and torch.equal(again, boxes)
    assert_same_bits(same, out)
    strided = torch.stack([images, images], -1)[..., 0]
    pyrx.random_erasing(strided, inplace=True, **options)
    assert_same_bits(strided, out)
    replayed = pyrx.random_erasing(images, **(options | {"boxes": boxes, "prob": 0.0}))
    assert_same_bits(replayed, out)


def test_given_boxes(backend):
    images = torch.randn(2, 3, 6, 8)
    boxes = torch.tensor([[[0, 0, 6, 8], [2, 3, 2, 7]], [[1, 2, 4, 5], [3, 4, 6, 8]]])
    out, same = pyrx.random_erasing(images, boxes=boxes, value=2.0, backend=backend, return_boxes=True)
    assert torch.equal(same, boxes) and same.data_ptr() != boxes.data_ptr()
    assert_same_bits(out, erased(images, boxes, lambda n, k, at: torch.tensor(2.0)))
    assert_same_bits(pyrx.random_erasing(images, boxes=boxes[:, :0], backend=backend), images)


def test_untouched_pixels_keep_their_bits(backend):
    images = torch.full((4, 3, 9, 9), math.nan)
    out, boxes = pyrx.random_erasing(images, prob=1.0, seed=1, backend=backend, return_boxes=True)
    assert_same_bits(out, erased(images, boxes, lambda n, k, at: torch.tensor(0.0)))


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_gradient_is_zero_inside(backend, dtype):
    for mode in MODES:
        images = torch.randn(6, 3, 20, 17).to(dtype).requires_grad_()
        out, boxes = pyrx.random_erasing(
            images, prob=1.0, max_count=3, mode=mode, seed=2, value=3.0, backend=backend, return_boxes=True
        )
        for name, upstream in layouts((6, 3, 20, 17), dtype):
            upstream[0, 0] = math.inf
            (grad,) = torch.autograd.grad(out, images, upstream, retain_graph=True)
            assert_same_bits(grad, erased(upstream, boxes, lambda n, k, at: torch.zeros((), dtype=dtype)), name)


def test_gradcheck_twice(backend):
    images = torch.randn(3, 2, 5, 6, dtype=torch.float64, requires_grad=True)

    def function(x):
        return pyrx.random_erasing(x, prob=1.0, seed=1, backend=backend)

    assert torch.autograd.gradcheck(function, (images,))
    assert torch.autograd.gradgradcheck(lambda x: function(x) ** 2, (images,))


def test_prob_and_counts(backend):
    images = torch.zeros(4000, 1, 64, 64)
    _, boxes = pyrx.random_erasing(
        images, prob=0.3, min_count=2, max_count=4, seed=5, backend=backend, return_boxes=True
    )
    counts = (boxes[..., 2] > 0).sum(1)
    assert abs((counts > 0).double().mean() - 0.3) < 5 * (0.21 / 4000) ** 0.5
    for count in (2, 3, 4):
        assert abs((counts == count).double().mean() - 0.1) < 5 * (0.09 / 4000) ** 0.5
    assert not (counts == 1).any()
    assert_same_bits(pyrx.random_erasing(images, prob=0.0, value=1.0, backend=backend), images)


def test_thread_counts_do_not_change_bits(cpu):
    images = torch.randn(40, 3, 128, 128)
    options = {"prob": 1.0, "mode": "pixel", "max_count": 3, "seed": 2, "backend": cpu}
    with threads(1):
        one = pyrx.random_erasing(images, **options)
    with threads(3):
        assert_same_bits(pyrx.random_erasing(images, **options), one)
        assert_same_bits(pyrx.random_erasing(images.clone(), inplace=True, **options), one)


ARGUMENTS = {
    "boxes": None, "kind": 0, "prob": 60000, "min_count": 1, "max_count": 2, "min_scale": 0.02, "max_scale": 0.3,
    "min_ratio": 0.3, "max_ratio": 3.3, "num_splits": 0, "per_sample": True, "filling": 0, "value": [0.0],
}  # fmt: skip
X, SEED = torch.randn(4, 3, 8, 9), torch.tensor(1)


@pytest.mark.parametrize(
    "changes", [{}, {"filling": 1}, {"filling": 2, "kind": 1}, {"boxes": torch.zeros(4, 3, 4).long()}], ids=str
)
def test_opcheck(changes):
    ops = _library.namespace(need("cpu", ops=("random_erasing",)))
    arguments = tuple((ARGUMENTS | changes).values())
    for layout in (torch.contiguous_format, torch.channels_last):
        images = X.contiguous(memory_format=layout)
        torch.library.opcheck(ops.random_erasing.default, (images.clone().requires_grad_(), SEED, *arguments))
        torch.library.opcheck(ops.random_erasing_.default, (images.clone(), SEED, *arguments))


@pytest.mark.parametrize("mode", MODES)
def test_compiled_equals_eager(mode):
    cpu = need("cpu", ops=("random_erasing",))  # the reference's draws take minutes to trace

    def step(images, seed):
        return pyrx.random_erasing(images, prob=1.0, max_count=2, mode=mode, seed=seed, backend=cpu)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for size in (8, 11):
        images = torch.randn(3, 2, size, size, requires_grad=True)
        got, eager = compiled(images, SEED), step(images, SEED)
        torch.testing.assert_close(got, eager, rtol=1e-6, atol=1e-6)
        upstream = torch.randn(eager.shape)
        grads = [torch.autograd.grad(each, images, upstream)[0] for each in (got, eager)]
        assert torch.equal(*grads)


BOXES = torch.tensor([[[0, 0, 4, 4]]] * 4)
OP_ROWS = [
    ({"images": X[0]}, ValueError, "images of shape [N, C, H, W] or [N, C, T, H, W], got [3, 8, 9]"),
    ({"images": X.long()}, TypeError, "images of dtype uint8, float16, bfloat16, float32 or float64, got torch.int64"),
    ({"boxes": BOXES.int()}, TypeError, "boxes of dtype torch.int64, got torch.int32"),
    ({"boxes": BOXES[:3]}, ValueError, "boxes of shape [N, K, 4] with N = 4, got [3, 1, 4]"),
    ({"boxes": BOXES[:, 0]}, ValueError, "boxes of shape [N, K, 4] with N = 4, got [4, 4]"),
    ({"boxes": BOXES.repeat(1, 65, 1)}, ValueError, "boxes of at most 64 an image, got 65"),
    ({"seed": SEED.int()}, TypeError, "seed of dtype torch.int64, got torch.int32"),
    ({"value": [1.0, 2.0]}, ValueError, "value of 1 or C = 3 channels, got 2"),
    ({"num_splits": -1}, ValueError, "num_splits at least 0, got -1"),
    ({"images": X.byte(), "value": [0.5]}, ValueError, "value a whole number in [0, 255] for uint8 images, got 0.5"),
    (
        {"images": X.byte(), "value": [256.0]},
        ValueError,
        "value a whole number in [0, 255] for uint8 images, got 256.0",
    ),
]
RAW_ROWS = [
    *OP_ROWS,
    ({"prob": 65537}, ValueError, "prob in [0, 65536], got 65537"),
    ({"min_count": 0}, ValueError, "min_count and max_count 1 <= min_count <= max_count <= 64, got 0 and 2"),
    ({"max_count": 65}, ValueError, "min_count and max_count 1 <= min_count <= max_count <= 64, got 1 and 65"),
    ({"min_scale": 0.5}, ValueError, "scale 0 <= minimum <= maximum <= 1, got (0.5, 0.3)"),
    ({"max_scale": math.nan}, ValueError, "scale 0 <= minimum <= maximum <= 1, got (0.02, nan)"),
    ({"min_ratio": 0.0}, ValueError, "ratio 1e-6 <= minimum <= maximum <= 1e6, got (0.0, 3.3)"),
    ({"filling": 3}, ValueError, "kind and mode in [0, 1] and [0, 2], got 0 and 3"),
    (
        {"images": X.byte(), "filling": 1},
        TypeError,
        "images of a floating-point dtype to be filled with noise, got torch.uint8",
    ),
]
VALUE = 'to be a float or a sequence of C floats (mode="rand" or "pixel" for noise)'
PUBLIC_ROWS = [
    *[row for row in OP_ROWS if row[0].keys() != {"num_splits"}],
    ({"images": [1.0]}, TypeError, "images to be a Tensor, got list"),
    ({"prob": 1.5}, ValueError, "prob in [0, 1], got 1.5"),
    ({"prob": "x"}, TypeError, "prob to be a float, got str"),
    ({"mode": "noise"}, ValueError, "mode to be one of 'const', 'rand', 'pixel', got 'noise'"),
    ({"value": ["a"]}, TypeError, f"value {VALUE}, got str"),
    ({"value": "random"}, TypeError, f"value {VALUE}, got str"),
    ({"value": 10**400}, ValueError, "value to be a float, got an int of more than 64 bits"),
    ({"scale": 0.5}, TypeError, "scale to be two floats, got 0.5"),
    ({"scale": ("a", 1)}, TypeError, "scale to be a float, got str"),
    ({"ratio": (2.0, 1.0)}, ValueError, "ratio 1e-6 <= minimum <= maximum <= 1e6, got (2.0, 1.0)"),
    ({"min_count": 1.0}, TypeError, "min_count to be an int, got float"),
    (
        {"min_count": 3, "max_count": 2},
        ValueError,
        "min_count and max_count 1 <= min_count <= max_count <= 64, got 3 and 2",
    ),
    ({"boxes": [0]}, TypeError, "boxes to be a Tensor, got list"),
    ({"boxes": BOXES + 5}, ValueError, "boxes 0 <= y0 <= y1 <= 8 and 0 <= x0 <= x1 <= 9, got [5, 5, 9, 9]"),
    ({"boxes": -BOXES}, ValueError, "boxes 0 <= y0 <= y1 <= 8 and 0 <= x0 <= x1 <= 9, got [0, 0, -4, -4]"),
    (
        {"images": X[:1].expand(4, 3, 8, 9), "inplace": True},
        ValueError,
        "inplace to be memory of its own for every element, got strides [0, 72, 9, 1]",
    ),
    (
        {"images": X.clone().requires_grad_(), "inplace": True},
        RuntimeError,
        "inplace of images that require no gradient, got images that do",
    ),
]


@pytest.mark.parametrize("changes, error, text", PUBLIC_ROWS, ids=[text for _, _, text in PUBLIC_ROWS])
def test_errors(backend, changes, error, text):
    arguments = {"images": X.clone(), "backend": backend} | changes
    before = arguments["images"].clone() if isinstance(arguments["images"], torch.Tensor) else None
    with pytest.raises(error) as caught:
        pyrx.random_erasing(**arguments)
    assert str(caught.value) == f"pyrx::random_erasing: expected {text}"
    assert before is None or torch.equal(arguments["images"], before)


@pytest.mark.parametrize("changes, error, text", RAW_ROWS, ids=[text for _, _, text in RAW_ROWS])
def test_kernels_and_fakes_raise_the_same(changes, error, text):
    ops = _library.namespace(need("cpu", ops=("random_erasing",)))
    arguments = {"images": X, "seed": SEED} | ARGUMENTS | changes
    for op in (ops.random_erasing, ops.random_erasing_):
        for fake in (False, True):
            with FakeTensorMode() if fake else contextlib.nullcontext() as mode, pytest.raises(error) as caught:
                op(
                    **{
                        k: mode.from_tensor(v) if fake and isinstance(v, torch.Tensor) else v
                        for k, v in arguments.items()
                    }
                )
            assert str(caught.value) == f"pyrx::random_erasing: expected {text}"


@pytest.mark.cpu_kernels
def test_boxes_outside_are_found_by_the_kernels(cpu):
    ops = _library.namespace(cpu)
    for bad in ([0, 0, 9, 4], [-1, 0, 4, 4], [3, 0, 2, 4], [0, 5, 4, 4], [0, 0, 4, 10]):
        with pytest.raises(ValueError, match="expected boxes 0 <= y0 <= y1 <= 8 and 0 <= x0 <= x1 <= 9, got "):
            ops.random_erasing(X, SEED, **(ARGUMENTS | {"boxes": torch.tensor([[bad]] * 4)}))


@pytest.mark.parametrize(
    "changes, text",
    [({"length": 1.5}, "length in [0, 1], got 1.5"), ({"num_holes": 0}, "num_holes in [1, 64], got 0")],
    ids=str,
)
def test_cutout_errors(backend, changes, text):
    with pytest.raises(ValueError) as caught:
        pyrx.cutout(X, backend=backend, **changes)
    assert str(caught.value) == f"pyrx::cutout: expected {text}"
