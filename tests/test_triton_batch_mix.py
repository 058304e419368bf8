"""The Triton kernels of batch mixing against the reference, bit for bit, see triton_helpers.py."""

import importlib
import itertools
import re
import subprocess

import helpers
import numpy as np
import pytest
import torch
import triton_helpers
from triton_helpers import INTERPRETED, device_of, values_in_the_interpreter

import pyrx
from pyrx.reference import batch_mix as reference
from pyrx.reference import random as reference_random
from pyrx.reference.batch_mix import (
    CUTMIX,
    EITHER,
    FLIP,
    GIVEN,
    MIXUP,
    PER_BATCH,
    PER_PAIR,
    PER_SAMPLE,
    RANDOM,
    RESIZEMIX,
    ROLL,
    Draw,
)

triton = pytest.importorskip("triton")
tl = triton.language
draws = importlib.import_module("pyrx._triton.random")
launcher = importlib.import_module("pyrx._triton.batch_mix")

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = (torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
ALPHAS = (1e-3, 0.1, 0.2, 0.5, 0.500001, 0.8, 1.0, 1.5, 40.0, 1e6)
NAMES = ("mixed", "partner_labels", "partner", "lam", "boxes")


device = device_of("batch_mix")


test_values_in_the_interpreter = values_in_the_interpreter(__file__, 60)


def draw_of(kind, **changes):
    settings = {"granularity": PER_SAMPLE, "prob": 65536, "switch_prob": 30000, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    return Draw(kind, **{**settings, "minimum": 0.0, "maximum": 0.0, "correct_lam": True, **changes})


SCALED = {"minimum": 0.1, "maximum": 0.8}


def images_of(shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(device, dtype)
    high = 2 if dtype == torch.bool else 127 if dtype == torch.int8 else 256
    return torch.randint(0, high, shape, generator=generator).to(device, dtype)


def results_of(images, draw, backend, *, seed=3, labels=True, pairing=FLIP, scale=(), bias=(), dtype=None, **given):
    """{name: result} of the reference, the op or its launcher, on images' device."""
    seed = torch.tensor(seed, device=images.device)
    labels = torch.arange(100, 100 + len(images), device=images.device) if labels else None
    lam, boxes, partner = (given.get(name) for name in ("lam", "boxes", "partner"))
    pairing = pairing if partner is None else GIVEN
    dtype = images.dtype if dtype is None else dtype
    if backend == "reference":
        mixed, partner_labels, mixes = reference.batch_mix(
            images, labels, seed, lam, boxes, partner, pairing, draw, scale, bias, dtype
        )
        return dict(zip(NAMES, (mixed, partner_labels, mixes.partner, mixes.lam, mixes.boxes), strict=True))
    ops = torch.ops.pyrx_triton if backend == "triton" else launcher
    drawn = (labels, seed, lam, boxes, partner, pairing, *draw)
    if given.get("out") is not None:
        found = given["out"], *ops.batch_mix_out(given["out"], images, *drawn, scale, bias)
    elif given.get("inplace"):
        found = images, *ops.batch_mix_(images, *drawn)
    else:
        found = ops.batch_mix(images, *drawn, scale, bias, dtype)
    return dict(zip(NAMES, found, strict=True))


def assert_as_reference(images, draw, what="", *, inplace=False, out=None, **options):
    expected = results_of(images, draw, "reference", **options)
    got = results_of(images, draw, "triton", inplace=inplace, out=out, **options)
    for name in NAMES:
        helpers.assert_same_bits(got[name], expected[name], f"{what} {name}")
    return got


# Draws.


def _probe(out, inputs, seed, first, alpha, KIND: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    if KIND == "beta":
        value = draws.beta(seed, tl.cast(first, tl.int64) + at, draws.float64_of(alpha))
    else:
        x = tl.load(inputs + at)
        if KIND == "log_positive":
            value = draws.log_positive(x)
        elif KIND == "exp_negative":
            value = draws.exp_negative(x)
        elif KIND == "uniform":
            words = x.to(tl.int64, bitcast=True)
            value = draws.uniform((words >> 32).to(tl.uint32), words.to(tl.uint32))
        else:
            value, sine = draws.turn(x)
            tl.store(out + COUNT + at, sine)
    tl.store(out + at, value)


probe_kernel = triton.jit(_probe)


def probe(kind, inputs=None, seed=0, first=0, alpha=0.0, count=256, device="cpu"):
    out = torch.zeros(2, count, dtype=torch.float64, device=device)
    inputs = out if inputs is None else inputs
    seed = torch.tensor(seed, device=device)
    probe_kernel[(1,)](out, inputs, seed, first, launcher.float64_bits(alpha), kind, count, enable_fp_fusion=False)
    return out


@pytest.mark.parametrize("alpha", ALPHAS)
def test_beta(device, alpha):
    for seed, first in ((3, 0), (-7, 2**32 - 128)):
        index = torch.arange(first, first + 256, device=device)
        expected = reference_random.beta(torch.tensor(seed, device=device), index, alpha)
        helpers.assert_same_bits(probe("beta", None, seed, first, alpha, device=device)[0], expected)


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels keep their constants")
def test_beta_takes_the_last_attempt(device, monkeypatch):
    monkeypatch.setattr(draws, "BETA_ATTEMPTS", tl.constexpr(2))
    monkeypatch.setattr(reference_random, "BETA_ATTEMPTS", 2)
    expected = reference_random.beta(torch.tensor(3), torch.arange(256), 0.4)
    helpers.assert_same_bits(probe("beta", None, 3, 0, 0.4)[0], expected)


def test_functions(device):
    generator = torch.Generator().manual_seed(1)
    some = torch.rand(252, generator=generator, dtype=torch.float64)
    ends = torch.tensor([2.0**-53, 1 - 2.0**-53, 0.70710678118654752, 0.5], dtype=torch.float64)
    unit = torch.cat([some, ends]).to(device)
    helpers.assert_same_bits(probe("log_positive", unit, device=device)[0], reference_random.log_positive(unit))
    ends = torch.tensor([0.0, -700.0, -700.0000001, -float("inf")], dtype=torch.float64)
    negative = torch.cat([some.log() * 60, ends]).to(device)
    helpers.assert_same_bits(probe("exp_negative", negative, device=device)[0], reference_random.exp_negative(negative))
    ends = torch.tensor([0.0, 0.125, 0.625, 0.875], dtype=torch.float64)
    angles = torch.cat([some, ends]).to(device)
    for got, expected in zip(probe("turn", angles, device=device), reference_random.turn(angles), strict=True):
        helpers.assert_same_bits(got, expected)
    words = torch.randint(-(2**63), 2**63 - 1, (256,), generator=generator)
    words[:3] = torch.tensor([0, -1, 2**32 - 1])
    expected = reference_random.uniform(words >> 32 & 0xFFFFFFFF, words & 0xFFFFFFFF)
    got = probe("uniform", words.view(torch.float64).to(device), device=device)[0]
    helpers.assert_same_bits(got.cpu(), expected)


# Mixes that are drawn.


@pytest.mark.parametrize("kind", [MIXUP, CUTMIX, RESIZEMIX, EITHER])
@pytest.mark.parametrize("granularity", [PER_BATCH, PER_PAIR, PER_SAMPLE])
@pytest.mark.parametrize("pairing", [FLIP, ROLL, RANDOM])
def test_mixes(device, kind, granularity, pairing):
    images = images_of((3, 2, 7, 8), device=device)
    bounds = SCALED if kind == RESIZEMIX else {}
    for seed, changes in ((1, bounds), (-2, {**SCALED, "prob": 30000})):
        draw = draw_of(kind, granularity=granularity, **changes)
        assert_as_reference(images, draw, f"{changes}", seed=seed, pairing=pairing)
        if pairing != ROLL and kind != RESIZEMIX:
            assert_as_reference(images.clone(), draw, f"in place {changes}", seed=seed, pairing=pairing, inplace=True)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 40.0])
def test_boxes(device, alpha):
    images = images_of((5, 1, 33, 20), device=device)
    for changes in ({}, {"correct_lam": False}, {"minimum": 0.3, "maximum": 0.3}, {"maximum": 1.0}):
        for kind in (CUTMIX, EITHER):
            draw = draw_of(kind, cutmix_alpha=alpha, mixup_alpha=2.0, **changes)
            got = assert_as_reference(images, draw, f"{kind} {changes}", seed=11)
            y0, x0, y1, x1 = got["boxes"].unbind(1)
            assert ((0 <= y0) & (y0 <= y1) & (y1 <= 33) & (0 <= x0) & (x0 <= x1) & (x1 <= 20) | (y0 == -1)).all()


@pytest.mark.parametrize("samples", [1, 2, 3, 257])
def test_matchings(device, samples):
    images = images_of((samples, 1, 1, 2), device=device)
    got = assert_as_reference(images, draw_of(CUTMIX, minimum=1.0, maximum=1.0), pairing=RANDOM, seed=samples)
    partner, index = got["partner"], torch.arange(samples, device=device)
    assert torch.equal(partner[partner], index) and int((partner == index).sum()) == samples % 2
    assert torch.equal(got["mixed"], images[partner]) and torch.equal(got["partner_labels"], partner + 100)


# Pixels.


@pytest.mark.parametrize("source", [torch.uint8, *FLOATS], ids=helpers.name_of)
@pytest.mark.parametrize("kind", [MIXUP, CUTMIX, RESIZEMIX, EITHER])
def test_dtypes(device, source, kind):
    draw = draw_of(kind, **(SCALED if kind == RESIZEMIX else {}))
    shape = (2, 3, 6, 16)
    for last in (False, True):
        images = images_of(shape, source, device)
        images = images.contiguous(memory_format=torch.channels_last) if last else images
        for dtype in (source, *FLOATS):
            for scale, bias in (((), ()), ((0.3, 1 / 255, 1.7), (0.1, -1.3, 0.0))):
                if scale and not dtype.is_floating_point:
                    continue
                options = {"dtype": dtype, "scale": scale, "bias": bias, "pairing": ROLL if last else FLIP}
                got = assert_as_reference(images, draw, f"{last} {options}", **options)
                assert got["mixed"].is_contiguous(memory_format=[torch.contiguous_format, torch.channels_last][last])


@pytest.mark.parametrize("dtype", INTEGERS, ids=helpers.name_of)
def test_integers(device, dtype):
    boxes = torch.tensor([[0, 1, 3, 4], [-1, -1, -1, -1], [2, 0, 2, 5], [-1, -1, -1, -1]], device=device)
    lam = torch.tensor([0.3, 0.0, 1.0, 0.7], device=device)
    for images in (images_of((4, 1, 5, 6), dtype, device), images_of((4, 2, 3, 5, 8), dtype, device)):
        assert_as_reference(images, draw_of(CUTMIX), "drawn")
        assert_as_reference(images.clone(), draw_of(CUTMIX), "in place", inplace=True)
        assert_as_reference(images, draw_of(RESIZEMIX, **SCALED), "shrunk")
        assert_as_reference(images, draw_of(CUTMIX), "given", lam=lam, boxes=boxes)
        assert_as_reference(images.clone(), draw_of(CUTMIX), "given, in place", lam=lam, boxes=boxes, inplace=True)


def test_rounding(device):
    """All pairs of bytes: halves to even, and a weight whose products are not exact."""
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    images = torch.stack([byte[:, None].expand(256, 256), byte.expand(256, 256)])[:, None].contiguous()
    lam = torch.tensor([0.5, 0.3], device=device)
    got = results_of(images, draw_of(MIXUP), "triton", lam=lam)["mixed"].float()
    x, y = images.float()
    assert torch.equal(got[0], torch.round((x + y) / 2))
    weight = np.float32(0.3)
    first = torch.from_numpy(x.cpu().numpy() * (np.float32(1) - weight))
    second = torch.from_numpy(y.cpu().numpy() * weight)
    assert torch.equal(got[1].cpu(), torch.round(second + first))


def test_products_are_not_fused(device):
    images = images_of((2, 1, 32, 64), device=device)
    options = {"lam": torch.tensor([0.3, 0.7], device=device), "scale": (1.1,), "bias": (-0.3,)}
    assert_as_reference(images, draw_of(MIXUP), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=helpers.name_of)
def test_copies_keep_nan(device, dtype):
    """Signalling NaNs and infinities of what is copied and of what is not seen."""
    number = {torch.float16: (torch.int16, 0x7C01), torch.float32: (torch.int32, 0x7F800001)}[dtype]
    images = images_of((4, 2, 6, 8), dtype, device)
    images.view(number[0])[::2, ..., ::3] = number[1]
    images[1::2] = float("inf")
    boxes = torch.tensor([[1, 2, 4, 7], [0, 0, 6, 8], [-1] * 4, [-1] * 4], device=device)
    for partner in (None, torch.tensor([1, 0, 3, 2], device=device)):
        lam = torch.tensor([0.2, 0.9, 1.0, 0.0], device=device)
        for inplace in (False, True):
            got = results_of(images.clone(), draw_of(EITHER), "triton", lam=lam, boxes=boxes, partner=partner,
                             inplace=inplace)  # fmt: skip
            expected = images.clone()
            other = images[got["partner"]]
            expected[0, :, 1:4, 2:7] = other[0, :, 1:4, 2:7]
            expected[1], expected[3] = other[1], other[3]
            helpers.assert_same_bits(got["mixed"], expected)
        drawn = results_of(images, draw_of(CUTMIX), "triton", partner=partner)
        inside = reference._inside(drawn["boxes"], images)
        helpers.assert_same_bits(drawn["mixed"], torch.where(inside, images[drawn["partner"]], images))


@pytest.mark.parametrize("channels", [1, 5, 64])
def test_channels(device, channels):
    scale, bias = [1 / (i + 3) for i in range(channels)], [i / 7 for i in range(channels)]
    for shape in ((3, channels, 2, 3), (2, channels, 3, 2, 2)):
        for name, images in helpers.layouts(shape):
            if name not in ("contiguous", "channels_last", "channels_last_3d"):
                continue
            images = images.to(device)
            assert_as_reference(images, draw_of(EITHER), f"{images.stride()}", scale=scale, bias=bias)
            assert_as_reference(images, draw_of(RESIZEMIX, **SCALED), f"{images.stride()}", scale=scale, bias=bias)


# Layouts.


@pytest.mark.parametrize("shape", [(3, 2, 5, 6), (2, 3, 2, 5, 7), (2, 1, 9, 1), (1, 2, 4, 8), (2, 3, 1, 1)], ids=str)
def test_layouts(device, shape):
    draw = draw_of(EITHER)
    outs = [(name, out.to(device)) for name, out in helpers.layouts(shape, torch.bfloat16)]
    for (name, images), (other, out) in zip(helpers.layouts(shape), reversed(outs), strict=True):
        images = images.to(device)
        got = assert_as_reference(images, draw, name)["mixed"]
        assert got.stride() == results_of(images, draw, "reference")["mixed"].stride()
        assert_as_reference(images, draw_of(RESIZEMIX, **SCALED), name)
        assert_as_reference(images, draw, f"{name} to {other}", out=out, dtype=torch.bfloat16)
        kept = torch.empty_strided(images.shape, images.stride(), device=device).copy_(images)
        assert_as_reference(kept, draw, f"{name} in place", inplace=True)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3, 0, 4, 4), (3, 2, 0, 4), (3, 2, 4, 0), (2, 3, 0, 4, 4)], ids=str)
def test_empty(device, shape):
    images = images_of(shape, device=device)
    for draw in (draw_of(CUTMIX), draw_of(MIXUP), draw_of(RESIZEMIX, **SCALED), draw_of(CUTMIX, **SCALED)):
        for pairing in (FLIP, RANDOM):
            expected = results_of(images, draw, "reference", pairing=pairing)
            got = results_of(images, draw, "triton", pairing=pairing)
            assert all(got[name].shape == expected[name].shape for name in NAMES)
            if 0 not in shape[-2:]:
                assert torch.equal(got["boxes"], expected["boxes"]) and torch.equal(got["lam"], expected["lam"])
            assert torch.equal(got["partner_labels"], expected["partner_labels"])
    assert results_of(images, draw_of(CUTMIX), "triton", labels=False)["partner_labels"].shape == (0,)


@pytest.mark.parametrize("width", [2, 16, 600])
def test_tiles(device, monkeypatch, width):
    """Rows of several tiles, programs of several tiles, 64-bit indices."""
    height = 4 if width > 100 else 150
    for last in (False, True):
        images = images_of((3, 3, height, width), torch.bfloat16, device)
        images = images.contiguous(memory_format=torch.channels_last) if last else images
        for programs, wide in ((1, 2**31), (9, 0)):
            monkeypatch.setattr(launcher, "PROGRAMS", programs)
            monkeypatch.setattr(launcher, "WIDE", wide)
            for draw in (draw_of(CUTMIX), draw_of(EITHER, granularity=PER_PAIR), draw_of(RESIZEMIX, **SCALED)):
                assert_as_reference(images, draw, f"{last} {draw}", seed=4)
            assert_as_reference(images.clone(), draw_of(CUTMIX), f"{last}", seed=4, inplace=True)


# What is given.


@pytest.mark.parametrize("kind", [MIXUP, CUTMIX, RESIZEMIX, EITHER])
def test_given(device, kind):
    images = images_of((6, 2, 8, 9), torch.uint8, device)
    lam = torch.tensor([[0.0, 1.0], [0.25, 0.1], [0.6, 0.9]], device=device).t().reshape(-1)
    partner = torch.tensor([5, 3, 2, 1, 4, 0], device=device)
    cycle = torch.tensor([2, 3, 5, 4, 1, 0], device=device)
    bounds = SCALED if kind == RESIZEMIX else {}
    draw = draw_of(kind, prob=50000, **bounds)
    for given in ({"lam": lam}, {"partner": partner}, {"partner": cycle}, {"lam": lam, "partner": cycle}):
        for granularity in (PER_PAIR, PER_SAMPLE):
            assert_as_reference(images, draw._replace(granularity=granularity), f"{given}", **given)
            if kind != RESIZEMIX and given.get("partner") is not cycle:
                assert_as_reference(images.clone(), draw, f"{given}", inplace=True, **given)
    boxes = [[0, 0, 8, 9], [3, 4, 3, 9], [7, 8, 8, 9], [2, 1, 6, 4], [0, 0, 0, 0], [1, 0, 8, 8]]
    boxes = torch.tensor(boxes, device=device).t().contiguous().t()
    for given in ({"boxes": boxes}, {"boxes": boxes, "lam": lam}, {"boxes": boxes, "partner": cycle}):
        assert_as_reference(images, draw, f"{given}", **given)
        if kind != RESIZEMIX and given.get("partner") is not cycle:
            assert_as_reference(images.clone(), draw, f"{given}", inplace=True, **given)
    if kind != RESIZEMIX:
        boxes[1:4] = -1
        assert_as_reference(images, draw, "pixel by pixel", boxes=boxes, lam=lam)
        assert_as_reference(images.clone(), draw, "pixel by pixel", boxes=boxes, lam=lam, inplace=True)


def _left_as_they_are(images, bad, got, expected):
    """Samples `bad` keep their pixels and have lam NaN; the others are those of a call without them."""
    for n in range(len(images)):
        if n in bad:
            helpers.assert_same_bits(got["mixed"][n], images[n], f"sample {n}")
            assert got["lam"][n].isnan() and not got["boxes"][n].any()
        else:
            for name in NAMES:
                helpers.assert_same_bits(got[name][n], expected[name][n], f"sample {n} {name}")


@pytest.mark.parametrize("inplace", [False, True])
def test_bad_lam_and_boxes(device, inplace):
    images = images_of((6, 2, 8, 9), device=device)
    lam = torch.tensor([0.3, 0.5, 1.0, 0.2, 0.9, 0.4], device=device)
    good = torch.tensor([[1, 2, 4, 7]] * 6, device=device)
    for kind in (MIXUP, CUTMIX):
        expected = results_of(images, draw_of(kind), "reference", lam=lam)
        bad = lam.clone()
        bad[1], bad[2], bad[4] = float("nan"), 1.0001, -0.5
        got = results_of(images.clone(), draw_of(kind), "triton", lam=bad, inplace=inplace)
        _left_as_they_are(images, (1, 2, 4), got, expected)
    expected = results_of(images, draw_of(CUTMIX), "reference", boxes=good)
    for box in ([-1, 2, 4, 7], [1, 2, 9, 7], [1, 2, 4, 10], [5, 2, 4, 7], [1, 8, 4, 7], [-(2**40), 0, 2**40, 9],
                [2**62, 0, 2**62, 9], [-1, -1, -1, -1], [-1, -1, -1, 3]):  # fmt: skip
        bad = good.clone()
        bad[4] = torch.tensor(box, device=device)
        for given in ({}, {"lam": lam}):
            if given and box == [-1] * 4:
                continue
            expected = results_of(images, draw_of(CUTMIX), "reference", boxes=good, **given)
            got = results_of(images.clone(), draw_of(CUTMIX), "triton", boxes=bad, inplace=inplace, **given)
            _left_as_they_are(images, (4,), got, expected)


def test_bad_partners(device):
    images, draw = images_of((6, 2, 4, 5), device=device), draw_of(CUTMIX)
    good = torch.tensor([1, 0, 3, 2, 5, 4], device=device)
    for value in (-1, 6, 2**62, -(2**63)):
        partner = good.clone()
        partner[2] = value
        for inplace, bad in ((False, (2,)), (True, (2, 3))):
            expected = results_of(images, draw, "reference", partner=good)
            got = results_of(images.clone(), draw, "triton", partner=partner, inplace=inplace)
            _left_as_they_are(images, bad, got, expected)
            assert (got["partner"][list(bad)].cpu() == torch.tensor(bad)).all()
            assert (got["partner_labels"][list(bad)].cpu() == torch.tensor(bad) + 100).all()
    partner = torch.tensor([1, 2, 0, 4, 3, 5], device=device)  # no involution
    got = results_of(images.clone(), draw, "triton", partner=partner, inplace=True)
    expected = results_of(images, draw, "reference", partner=torch.tensor([0, 1, 2, 4, 3, 5], device=device))
    _left_as_they_are(images, (0, 1, 2), got, expected)


# The public functions and the entries.


def test_public_functions(device):
    images, labels = images_of((5, 3, 8, 8), torch.uint8, device), torch.arange(5, device=device)
    masks = images_of((5, 8, 8), torch.int64, device)
    normal = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "dtype": torch.float16}
    calls = [
        (pyrx.cutmix, {"masks": masks, "pairing": "random", **normal}),
        (pyrx.cutmix, {"minmax": (0.2, 0.8), "per_sample": False, "prob": 0.5}),
        (pyrx.mixup, {"alpha": 0.2, "lam": 0.3, **normal}),
        (pyrx.mixup, {"alpha": 0.2, "per_sample": False}),
        (pyrx.resizemix, {"masks": masks, "pairing": "roll"}),
    ]
    for function, options in calls:
        got, expected = (function(images, labels, seed=5, backend=each, **options) for each in ("triton", "reference"))
        helpers.assert_same_bits(got[0], expected[0], f"{function} {options}")
        for name in ("a", "b", "lam", "boxes", "pairing", "masks"):
            one, other = getattr(got[1], name), getattr(expected[1], name)
            assert one is None if other is None else torch.equal(one, other), (function, name)
    with pytest.raises(RuntimeError, match="no torch.float64 kernel"):
        pyrx.cutmix(images.double(), labels, backend="triton")


def test_gradient(device):
    images = images_of((4, 2, 6, 6), device=device).requires_grad_()
    upstream = images_of(images.shape, device=device, seed=1)
    for function in (pyrx.cutmix, pyrx.mixup, pyrx.resizemix):
        found = [
            torch.autograd.grad(function(images, None, seed=2, backend=each)[0], images, upstream)[0]
            for each in ("triton", "reference")
        ]
        torch.testing.assert_close(*found)


def test_one_launch(device, monkeypatch):
    launches = []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    kernel = launcher._mix_kernel
    monkeypatch.setattr(launcher, "_mix_kernel", Counted())
    images = images_of((3, 2, 5, 6), device=device)
    for pairing in (FLIP, RANDOM):
        results_of(images, draw_of(EITHER), "triton", pairing=pairing)
        results_of(images, draw_of(EITHER), "triton", pairing=pairing, out=torch.empty_like(images))
        results_of(images, draw_of(EITHER), "triton", pairing=pairing, inplace=True)
    assert len(launches) == 6


def test_entries_have_the_shapes_of_their_fakes(device):
    ops, seed = torch.ops.pyrx_triton, torch.tensor(3, device=device)
    images = images_of((4, 3, 5, 8), torch.uint8, device).contiguous(memory_format=torch.channels_last)
    labels, out = torch.arange(4, device=device), torch.zeros(4, 3, 5, 8, device=device)
    drawn = (labels, seed, None, None, None, FLIP, *draw_of(EITHER))
    calls = [
        (ops.batch_mix, (images, *drawn, [], [], torch.uint8)),
        (ops.batch_mix, (images, *drawn, [1.0] * 3, [0.0] * 3, torch.bfloat16)),
        (ops.batch_mix_out, (out, images, *drawn, [], [])),
        (ops.batch_mix_, (images.clone(), *drawn)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_entries_check(device):
    images = images_of((4, 3, 5, 8), device=device)
    with pytest.raises(TypeError, match="float64"):
        results_of(images.double(), draw_of(CUTMIX), "triton")
    with pytest.raises(TypeError, match="float64"):
        results_of(images, draw_of(CUTMIX), "triton", dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        results_of(images, draw_of(CUTMIX), "triton", out=images.double())
    with pytest.raises(ValueError, match="to be its own inverse"):
        results_of(images, draw_of(CUTMIX), "triton", pairing=ROLL, inplace=True)
    with pytest.raises(ValueError, match="keep their size"):
        results_of(images, draw_of(RESIZEMIX, **SCALED), "triton", inplace=True)
    with pytest.raises(ValueError, match=r"of C = 3 channels"):
        results_of(images, draw_of(CUTMIX), "triton", scale=(1.0,), bias=(1.0,))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="a GPU's graphs")
def test_graph_reads_the_seed_when_replayed():
    helpers.need("triton", "cuda", ops=("batch_mix",))
    images = images_of((16, 3, 32, 32), torch.uint8, "cuda")
    options = {"mean": 0.5, "std": 0.2, "dtype": torch.float16, "backend": "triton"}
    seed = torch.tensor(1, device="cuda")
    for function, pairing in itertools.product((pyrx.cutmix, pyrx.mixup, pyrx.resizemix), ("flip", "random")):

        def call(function=function, pairing=pairing):
            return function(images, None, seed=seed, pairing=pairing, **options)

        graph, (mixed, target) = helpers.capture(call)
        for value in (2, 3):
            seed.fill_(value)
            graph.replay()
            expected = call()
            assert torch.equal(mixed, expected[0]) and torch.equal(target.boxes, expected[1].boxes)


# Ahead of time.


def compile_ahead_of_time(architecture):
    """Prints one JSON line a compiled kernel: the call, registers, stack, shared memory, its instructions."""
    compiled = triton_helpers.compile_launches(architecture)
    disassembler = triton_helpers.BINARIES / "cuobjdump"

    def instructions(kernel):
        # -sass reads the cubin that report() has written
        sass = subprocess.run(
            [disassembler, "-sass", triton_helpers.cubin()], capture_output=True, text=True, check=True
        ).stdout
        ptx = kernel.asm["ptx"]
        return {
            "fused": re.findall(r"\b(?:fma|mad)\.(?:rn|rz|rm|rp)[\w.]*f\d+", ptx),
            "allowed": kernel.metadata.enable_fp_fusion,
            "machine": len(re.findall(r"\b[DF]FMA\b", sass)),
            "rounded": sorted(set(re.findall(r"\b(?:div|sqrt|rcp|ex2|lg2)\.[\w.]*f\d+", ptx))),
            "wide": len(re.findall(r"st\.global[\w.:]*\.v4\.b32", ptx)),
        }

    def report(call, *arguments, **options):
        results_of(*arguments, "launcher", **options)
        triton_helpers.report(compiled, instructions, call=call)

    images = torch.zeros(8, 3, 224, 224, dtype=torch.bfloat16)
    bytes = torch.zeros(8, 3, 224, 224, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    normal = {"scale": (1.0, 2.0, 3.0), "bias": (1.0, 2.0, 3.0), "dtype": torch.float32}
    report("cutmix", images, draw_of(CUTMIX))
    report("mixup", images, draw_of(MIXUP), pairing=RANDOM)
    report("mixup normalised", bytes, draw_of(MIXUP), **normal)
    report("swap", images.clone(), draw_of(CUTMIX), pairing=RANDOM, inplace=True)
    report("resizemix", bytes, draw_of(RESIZEMIX, **SCALED), pairing=ROLL, labels=False)
    lam, partner = torch.ones(8), torch.arange(8)
    boxes = torch.zeros(8, 4, dtype=torch.int64)
    report("given", images, draw_of(EITHER), lam=lam, boxes=boxes, partner=partner)
    if architecture == 90:
        report("either", images.float(), draw_of(EITHER, granularity=PER_PAIR))
        report("normalised", images.contiguous(memory_format=torch.channels_last), draw_of(CUTMIX), **normal)
        report("either in place", images.clone(), draw_of(EITHER, granularity=PER_BATCH), inplace=True)
        report("odd", torch.zeros(1, 1, 1, 1), draw_of(MIXUP, **SCALED))
        report("video", torch.zeros(2, 3, 4, 7, 9, dtype=torch.int64), draw_of(CUTMIX, **SCALED))
    # numbers compile nothing of their own
    launcher.PROGRAMS = 1
    for size, alpha, seed in ((8, 0.25, 3), (5, 1.0, 7), (1, 3.0, 0)):
        draw = draw_of(CUTMIX, cutmix_alpha=alpha, prob=size, correct_lam=size == 5)
        results_of(torch.zeros(size, size, size + 40, 224, dtype=torch.bfloat16), draw, "launcher", seed=seed)
    assert len(compiled) == 1
    triton_helpers.report(compiled, instructions, call="numbers")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 90])
def test_ahead_of_time(architecture, python, tmp_path):
    script = f"import test_triton_batch_mix as test; test.compile_ahead_of_time({architecture})"
    found = triton_helpers.ahead_of_time(python, tmp_path, script)
    assert {each["kernel"] for each in found} == triton_helpers.kernels_of("batch_mix.py")
    assert any(not each["rounded"] for each in found)
    assert len(found) == (12 if architecture == 90 else 7)
    for each in found:
        assert each["shared"] <= triton_helpers.SHARED_LIMIT[architecture] and each["registers"] <= 255, each
        assert each["stack"] <= 16, each
        # quotients of float64 are made of fused operations: what is seen where there is none holds for all
        assert not each["fused"] and not each["allowed"] and (each["rounded"] or not each["machine"]), each
        assert set(each["rounded"]) <= {"div.rn.f64", "sqrt.rn.f64"}, each
        assert each["wide"] or each["call"] in ("odd", "video"), each
