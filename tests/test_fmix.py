"""FMix: the mattes' area, spectrum and distribution, the mixing by them, replay, and bad input."""

import math

import pytest
import torch
from helpers import FLOATS, assert_same_bits, name_of, need

import pyrx
from pyrx.reference import fmix as reference

LABELS = torch.arange(100, 108)


def images_of(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def mattes_of(samples, height, width, seed=3, **options):
    images = torch.zeros(samples, 1, height, width)
    return pyrx.fmix(images, None, seed=seed, backend="reference", **options)[1]


# The mattes.


@pytest.mark.parametrize("size", [(224, 224), (32, 48), (33, 17), (1, 40), (40, 1), (1, 1), (7, 100)], ids=name_of)
def test_areas_are_the_floor_or_the_ceiling_of_lam(size):
    target = mattes_of(40, *size)
    assert target.mattes.dtype == torch.bool and target.mattes.shape == (40, 1, *size)
    exact = target.lam.double() * size[0] * size[1]
    area = target.mattes.sum((1, 2, 3))
    assert ((area == exact.floor()) | (area == exact.ceil())).all()
    assert 0.15 < (area == exact.ceil()).double().mean() < 0.85, "a coin says which"


@pytest.mark.parametrize("lam, pixels", [(0.0, (0,)), (1.0, (35,)), (0.5, (17, 18)), (1e-6, (0, 1))])
def test_given_lam(lam, pixels):
    target = mattes_of(64, 5, 7, lam=lam)
    assert set(target.mattes.sum((1, 2, 3)).tolist()) == set(pixels)
    assert torch.equal(target.lam, torch.full((64,), lam))


def test_ties_do_not_change_the_area(monkeypatch):
    monkeypatch.setattr(reference, "field", lambda spectra, width: torch.zeros(len(spectra), 6, 7))
    assert set(mattes_of(20, 6, 7, lam=0.3).mattes.sum((1, 2, 3)).tolist()) == {12, 13}


def slope(power, frequency):
    """Of log power over log frequency."""
    x, y = frequency.double().log(), power.double().log()
    return (((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()).item()


@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_spectrum_decays_with_the_frequency_in_both_axes(decay):
    """The code that came with the paper keeps two columns: nothing but frequencies 0 and 1 along W."""
    height, width, fields = 64, 96, 400
    spectra = reference.spectrum(torch.tensor(5), fields, height, width, decay)
    assert spectra.shape == (fields, height, width // 2 + 1) and spectra.dtype == torch.complex64
    power = spectra.abs().double().square().mean(0)
    y = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    x = torch.fft.rfftfreq(width, dtype=torch.float64)
    f = (y**2 + x**2).sqrt().clamp(min=1 / width)
    # of real and imaginary part a variance of one each
    ratio = power * f ** (2 * decay) / 2
    assert abs(ratio.mean() - 1) < 5 / (ratio.numel() * fields) ** 0.5
    assert ((ratio - 1).abs() < 6 / fields**0.5).all()

    noise = torch.fft.rfft2(reference.field(spectra, width).double()).abs().square().mean(0)
    k = torch.arange(2, 20)
    assert abs(slope(noise[k, 0], k) + 2 * decay) < 0.15, "along H"
    assert abs(slope(noise[0, k], k) + 2 * decay) < 0.15, "along W"
    assert abs(slope(noise[k, k], k * (height**-2 + width**-2) ** 0.5) + 2 * decay) < 0.15, "along the diagonal"


def test_normals():
    """Independent, of mean 0 and variance 1; the seed and the field say which."""
    spectra = reference.spectrum(torch.tensor(1), 8, 64, 65, 0.0)
    values = torch.view_as_real(spectra).double().reshape(8, -1)
    assert values.mean().abs() < 0.02 and abs(values.var() - 1) < 0.03
    assert abs((values**4).mean() - 3) < 0.2 and (values**3).mean().abs() < 0.1
    assert torch.corrcoef(values).fill_diagonal_(0).abs().max() < 0.08
    assert torch.corrcoef(values.reshape(-1, 2).T)[0, 1].abs() < 0.03
    more = reference.spectrum(torch.tensor(1), 9, 64, 65, 0.0)
    assert torch.equal(more[:8], spectra), "a field does not depend on how many there are"
    assert not torch.equal(reference.spectrum(torch.tensor(2), 8, 64, 65, 0.0), spectra)


def test_mattes_are_the_largest_of_the_field():
    target = mattes_of(6, 20, 31, seed=9)
    noise = reference.field(reference.spectrum(torch.tensor(9), 6, 20, 31, 3.0), 31)
    for own, value in zip(target.mattes[:, 0], noise, strict=True):
        assert value[own].min() > value[~own].max()


def test_decay_makes_larger_shapes():
    def edges(decay):
        mattes = mattes_of(20, 64, 64, lam=0.5, decay_power=decay).mattes
        return (mattes[..., 1:] != mattes[..., :-1]).sum().item()

    assert edges(1.0) > 2 * edges(2.0) > 3 * edges(4.0) > 0


@pytest.mark.parametrize("max_soft", [0.01, 0.1, 0.5])
def test_soft_mattes(max_soft):
    target = mattes_of(30, 20, 30, max_soft=max_soft)
    hard = mattes_of(30, 20, 30)
    mattes, pixels = target.mattes, 600
    assert mattes.dtype == torch.float32 and torch.equal(target.lam, hard.lam)
    assert mattes.min() >= 0 and mattes.max() <= 1
    noise = reference.field(reference.spectrum(torch.tensor(3), 30, 20, 30, 3.0), 30).reshape(30, -1)
    for matte, cut, lam, values in zip(mattes, hard.mattes, target.lam.double(), noise, strict=True):
        ramp = int(min(lam, 1 - lam, max_soft) * pixels)
        assert abs(matte.sum() - cut.sum()) < 1e-3 * max(ramp, 1), "the mean stays"
        ranked = matte.reshape(-1)[values.argsort(descending=True)]
        assert (ranked.diff() <= 0).all()
        assert ((ranked > 0) & (ranked < 1)).sum() == max(2 * ramp - 2, 0)
        steps = ranked.diff()[ranked.diff() < 0]
        torch.testing.assert_close(steps, torch.full_like(steps, -1 / max(2 * ramp - 1, 1)), rtol=0, atol=1e-6)


def test_lam_is_the_drawn_one():
    """That of mixup with the same seed, whatever the mattes' areas."""
    images = torch.zeros(400, 1, 3, 3)
    for alpha in (0.2, 1.0, 3.0):
        lam = pyrx.fmix(images, None, alpha=alpha, seed=4)[1].lam
        assert torch.equal(lam, pyrx.mixup(images, None, alpha=alpha, seed=4, backend="reference")[1].lam)
        assert abs(lam.double().mean() - 0.5) < 0.1
        assert abs(lam.double().var() - 1 / (4 * (2 * alpha + 1))) < 0.03
    lam = pyrx.fmix(images, None, seed=4)[1].lam.double().sort().values
    assert (lam - (torch.arange(400) + 0.5) / 400).abs().max() < 1.95 / 400**0.5


def test_prob_is_applied_once():
    images = torch.randn(2000, 1, 2, 2)
    mixed, target = pyrx.fmix(images, None, alpha=50.0, prob=0.3, seed=1)
    mixes = target.lam < 1
    assert abs(mixes.double().mean() - 0.3) < 6 * (0.3 * 0.7 / 2000) ** 0.5
    assert target.mattes[~mixes].all() and torch.equal(mixed[~mixes], images[~mixes])
    assert (pyrx.fmix(images, None, prob=0.0)[1].lam == 1).all()


def test_one_matte_for_the_batch(backend):
    images = images_of((6, 3, 9, 8))
    mixed, target = pyrx.fmix(images, LABELS[:6], per_sample=False, seed=2, backend=backend)
    assert target.mattes.shape == (1, 1, 9, 8) and len(set(target.lam.tolist())) == 1
    assert_same_bits(mixed, torch.where(target.mattes, images, images.flip(0)))
    lam = torch.linspace(0, 1, 6)
    target = pyrx.fmix(images, None, per_sample=False, lam=lam, seed=2, backend=backend)[1]
    assert target.mattes.shape == (6, 1, 9, 8) and torch.equal(target.lam, lam)
    assert (target.mattes[1:] >= target.mattes[:-1]).all(), "one field, cut at many levels"


# The mixing.


@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS], ids=name_of)
@pytest.mark.parametrize("shape", [(4, 3, 9, 8), (5, 3, 33, 17), (1, 1, 5, 5), (3, 2, 4, 6, 7)], ids=name_of)
@pytest.mark.parametrize("max_soft", [0.0, 0.3])
def test_mixed_pixels(backend, dtype, shape, max_soft):
    need(backend, dtype=torch.float32 if dtype == torch.uint8 else dtype, ops=("blend",))
    images, labels = images_of(shape, dtype), LABELS[: shape[0]]
    for pairing in ("flip", "roll", "random", torch.randperm(shape[0])):
        mixed, target = pyrx.fmix(images, labels, pairing=pairing, max_soft=max_soft, seed=5, backend=backend)
        matte = target.mattes if len(shape) == 4 else target.mattes.unsqueeze(2)
        assert_same_bits(mixed, pyrx.blend(images, images[target.pairing], matte, backend="reference"))
        assert torch.equal(target.a, labels) and torch.equal(target.b, labels[target.pairing])
        expected = pyrx.mixup(images, None, pairing=pairing, seed=5, backend="reference")[1]
        assert torch.equal(target.pairing, expected.pairing) and torch.equal(target.lam, expected.lam)
        again, target = pyrx.fmix(
            images, labels, lam=target.lam, mattes=target.mattes, pairing=target.pairing, backend=backend
        )
        assert_same_bits(again, mixed, "replayed from its target")


def test_channels_last_is_kept(backend):
    images = images_of((4, 3, 9, 8)).contiguous(memory_format=torch.channels_last)
    mixed, _ = pyrx.fmix(images, None, seed=1, backend=backend)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(mixed, pyrx.fmix(images.contiguous(), None, seed=1, backend=backend)[0])


def test_the_same_seed_mixes_the_same(backend):
    images = images_of((4, 3, 9, 8))
    first, target = pyrx.fmix(images, LABELS[:4], seed=torch.tensor(-7), backend=backend)
    again, other = pyrx.fmix(images, LABELS[:4], seed=-7, backend=backend)
    assert_same_bits(first, again)
    assert torch.equal(target.mattes, other.mattes) and torch.equal(target.lam, other.lam)
    assert not torch.equal(pyrx.fmix(images, None, seed=8, backend=backend)[1].mattes, target.mattes)
    drawn = [
        pyrx.fmix(images, None, generator=torch.Generator().manual_seed(3), backend=backend)[1].mattes for _ in range(2)
    ]
    assert torch.equal(*drawn)


def test_given_mattes(backend):
    images = images_of((3, 2, 4, 5))
    for mattes in (torch.rand(3, 1, 4, 5), torch.rand(3, 1, 4, 5) > 0.5, torch.rand(1, 1, 4, 5)):
        mixed, target = pyrx.fmix(images, None, mattes=mattes, pairing="roll", backend=backend)
        assert_same_bits(mixed, pyrx.blend(images, images.roll(1, 0), mattes, backend=backend))
        assert target.mattes is mattes
        torch.testing.assert_close(target.lam, mattes.float().mean((1, 2, 3)).expand(3))


def test_segmentation_maps(backend):
    images, masks = images_of((4, 3, 9, 8)), torch.randint(0, 20, (4, 9, 8))
    for max_soft in (0.0, 0.2):
        _, target = pyrx.fmix(images, None, masks=masks, max_soft=max_soft, seed=1, backend=backend)
        own = target.mattes[:, 0] >= 0.5 if max_soft else target.mattes[:, 0]
        assert torch.equal(target.masks, torch.where(own, masks, masks.flip(0)))
    video, masks = images_of((4, 3, 2, 9, 8)), torch.randint(0, 20, (4, 2, 9, 8))
    _, target = pyrx.fmix(video, None, masks=masks, seed=1, backend=backend)
    assert torch.equal(target.masks, torch.where(target.mattes, masks, masks.flip(0)))


def test_out_and_gradients(backend):
    images = images_of((4, 3, 9, 8))
    expected, target = pyrx.fmix(images, None, seed=1, backend=backend)
    out = torch.empty_like(images)
    assert pyrx.fmix(images, None, seed=1, out=out, backend=backend)[0] is out
    assert_same_bits(out, expected)
    images.requires_grad_()
    upstream = images_of((4, 3, 9, 8), seed=3)
    mixed = pyrx.fmix(images, None, seed=1, backend=backend)[0]
    (grad,) = torch.autograd.grad(mixed, images, upstream)
    assert torch.equal(grad, target.mattes * upstream + (~target.mattes * upstream).flip(0))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=name_of)
def test_empty(backend, shape):
    for max_soft in (0.0, 0.1):
        mixed, target = pyrx.fmix(torch.rand(shape), LABELS[: shape[0]], max_soft=max_soft, backend=backend)
        assert mixed.shape == shape and target.mattes.shape == (shape[0], 1, *shape[2:])
        pyrx.fmix(torch.rand(shape), None, per_sample=False, max_soft=max_soft, backend=backend)


def test_the_target_goes_into_a_loss():
    images, labels = images_of((4, 3, 8, 8)), torch.tensor([0, 1, 2, 3])
    _, target = pyrx.fmix(images, labels, seed=1)
    rows = target.to_probabilities(5)
    torch.testing.assert_close(rows.sum(1), torch.ones(4))
    torch.testing.assert_close(rows[torch.arange(4), labels], target.lam)


@pytest.mark.parametrize("max_soft, sizes", [(0.0, (4,)), (0.2, (4, 7))])
def test_compiled_equals_eager(max_soft, sizes):
    """On the default backend: backends differ in blend, whose own tests compile each."""
    torch._dynamo.reset()

    def function(images, labels, seed):
        return pyrx.fmix(images, labels, max_soft=max_soft, seed=seed)

    # the draws, most of the graph, are compiled to the end by batch_mix's tests
    fast = torch.compile(function, fullgraph=True, backend="aot_eager" if len(sizes) == 1 else "eager")
    for samples in sizes:
        images, seed = images_of((samples, 1, 5, 4)), torch.tensor(3)
        (mixed, target), (expected, other) = (f(images, LABELS[:samples], seed) for f in (fast, function))
        assert_same_bits(mixed, expected)
        for one, another in zip(target, other, strict=True):
            assert another is None if one is None else torch.equal(one, another)
    torch._dynamo.reset()


# Errors.

X = torch.rand(2, 3, 4, 5)
ROWS = [
    (TypeError, {"images": [1.0]}, "images to be a Tensor, got list"),
    (ValueError, {"images": X[0]}, "images of shape [N, C, H, W] or [N, C, T, H, W], got [3, 4, 5]"),
    (
        TypeError,
        {"images": X.long()},
        "images of dtype uint8, float16, bfloat16, float32 or float64, got torch.int64",
    ),
    (ValueError, {"labels": LABELS[:3]}, "labels of shape [N] = [2], got [3]"),
    (TypeError, {"labels": LABELS[:2].int()}, "labels of dtype torch.int64, got torch.int32"),
    (ValueError, {"alpha": 0.0}, "alpha above 0, got 0.0"),
    (ValueError, {"alpha": math.nan}, "alpha in [0, inf], got nan"),
    (TypeError, {"alpha": "1"}, "alpha to be a float, got str"),
    (ValueError, {"decay_power": -1.0}, "decay_power in [0, 8], got -1.0"),
    (TypeError, {"decay_power": None}, "decay_power to be a float, got NoneType"),
    (ValueError, {"max_soft": 0.6}, "max_soft in [0, 0.5], got 0.6"),
    (ValueError, {"lam": 1.5}, "lam in [0, 1], got 1.5"),
    (TypeError, {"lam": "1"}, "lam to be a float or a Tensor, got str"),
    (ValueError, {"lam": torch.tensor([0.5, -1.0])}, "lam in [0, 1], got [0.5, -1.0]"),
    (TypeError, {"lam": torch.rand(2).double()}, "lam of dtype torch.float32, got torch.float64"),
    (
        ValueError,
        {"lam": torch.rand(2, requires_grad=True)},
        "lam without requires_grad: there is no gradient to lam, got requires_grad=True",
    ),
    (ValueError, {"prob": 1.5}, "prob in [0, 1], got 1.5"),
    (
        ValueError,
        {"pairing": "shuffle"},
        "pairing to be one of 'flip', 'roll', 'random', got 'shuffle'",
    ),
    (ValueError, {"pairing": torch.tensor([0, 0])}, "pairing to be a permutation of the samples, got [0, 0]"),
    (
        ValueError,
        {"mattes": torch.rand(2, 4, 5)},
        "mattes of shape [N or 1, C or 1, H, W] of images of [2, 3, 4, 5], got [2, 4, 5]",
    ),
    (ValueError, {"mattes": torch.rand(2, 3, 4, 5)}, "mattes of one channel, got [2, 3, 4, 5]"),
    (
        TypeError,
        {"mattes": torch.zeros(2, 1, 4, 5).long()},
        "mattes of dtype bool, float16, bfloat16, float32 or float64, got torch.int64",
    ),
    (ValueError, {"masks": torch.zeros(2, 4, 4).long()}, "masks of shape [N, H, W] = [2, 4, 5], got [2, 4, 4]"),
    (
        TypeError,
        {"masks": torch.zeros(2, 4, 5)},
        "masks of dtype bool, uint8, int8, int16, int32 or int64, got torch.float32",
    ),
    (TypeError, {"out": [1.0]}, "out to be a Tensor, got list"),
    (TypeError, {"out": X.double()}, "out of dtype torch.float32, got torch.float64"),
    (ValueError, {"out": X[:1].clone()}, "out of shape [N, C, ...] = [2, 3, 4, 5], got [1, 3, 4, 5]"),
    (RuntimeError, {"out": X.to("meta")}, "out on device cpu, got meta"),
    (ValueError, {"out": X}, "out to be other memory than the inputs, got the same"),
    (
        RuntimeError,
        {"out": torch.zeros(2, 3, 4, 5, requires_grad=True)},
        "out that requires no gradient, got one that does",
    ),
    (TypeError, {"seed": 0.5}, "seed to be an int, got float"),
]


@pytest.mark.parametrize("error, changes, text", ROWS, ids=[row[2][:80] for row in ROWS])
def test_errors(backend, error, changes, text):
    before = X.clone()
    with pytest.raises(error) as caught:
        pyrx.fmix(**{"images": X, "labels": LABELS[:2], "backend": backend} | changes)
    assert type(caught.value) is error and str(caught.value) == f"pyrx::fmix: expected {text}"
    assert torch.equal(X, before)


@pytest.mark.gpu
def test_gpu():
    """Lam, pairs and the noise are the CPU's; the mattes nearly."""
    images = images_of((6, 3, 64, 64))
    expected, got = pyrx.fmix(images, None, seed=3)[1], pyrx.fmix(images.cuda(), None, seed=3)[1]
    assert torch.equal(got.lam.cpu(), expected.lam) and torch.equal(got.pairing.cpu(), expected.pairing)
    assert (got.mattes.cpu() != expected.mattes).double().mean() < 1e-2
    images, seed = images.cuda(), torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        pyrx.fmix(images, None, seed=seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
