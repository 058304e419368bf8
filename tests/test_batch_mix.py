"""CutMix, mixup and ResizeMix: pixels, labels and draws, exactly."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributions import beta_cdf, chi_square_limit, kolmogorov_limit
from helpers import FLOATS, assert_same_bits, name_of, need, philox, threads
from hypothesis import given
from hypothesis import strategies as st

import pyrx

SHAPES = [(2, 3, 8, 8), (1, 3, 5, 7), (5, 1, 1, 1), (7, 2, 63, 3), (4, 3, 2, 9, 5), (3, 20, 4, 4)]
DTYPES = (torch.uint8, *FLOATS)
PAIRINGS = ("flip", "roll", "random")


def images_of(shape, dtype=torch.float32, last=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = (torch.rand(shape, generator=generator, dtype=torch.float64) * 255).round().to(dtype)
    if last:
        images = images.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)])
    return images


def labels_of(samples):
    return torch.arange(samples) * 3 + 1


def pasted(images, target):
    """The definition in a loop of slices."""
    expected = images.clone()
    for i, ((y0, x0, y1, x1), j) in enumerate(zip(target.boxes.tolist(), target.pairing.tolist(), strict=True)):
        expected[i][..., y0:y1, x0:x1] = images[j][..., y0:y1, x0:x1]
    return expected


def assert_same_target(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same_bits(one, other)


# Pixels.


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int16, torch.int64, torch.bool], ids=name_of)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_cutmix_pastes_the_partners_box(backend, shape, dtype, last):
    images = images_of(shape, dtype, last)
    labels = labels_of(shape[0])
    for pairing in PAIRINGS:
        for options in ({}, {"per_sample": False}, {"minmax": (0.2, 0.9)}, {"alpha": 0.2}, {"prob": 0.5}):
            before = images.clone()
            mixed, target = pyrx.cutmix(images, labels, pairing=pairing, seed=3, backend=backend, **options)
            assert_same_bits(images, before)
            assert_same_bits(mixed, pasted(images, target))
            assert mixed.stride() == images.stride()
            assert torch.equal(target.a, labels) and torch.equal(target.b, labels[target.pairing])
            area = torch.tensor([(y1 - y0) * (x1 - x0) for y0, x0, y1, x1 in target.boxes.tolist()])
            assert_same_bits(target.lam, (1 - area.double() / (shape[-1] * shape[-2])).float())


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2], ids=name_of)
@pytest.mark.parametrize("mix", [pyrx.cutmix, pyrx.resizemix])
def test_pixels_are_moved_of_dtypes_that_torch_does_not_choose_from(backend, mix, dtype):
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    images = torch.randint(0, 100, (3, 2, 17, 19)).to(integer)
    expected, _ = mix(images, None, seed=3, backend=backend)
    mixed, _ = mix(images.view(dtype), None, seed=3, backend=backend)
    assert mixed.dtype == dtype and torch.equal(mixed.view(integer), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_mixup_is_the_rounded_sum(backend, shape, dtype, last):
    images = images_of(shape, dtype, last)
    for pairing in PAIRINGS:
        for options in ({}, {"per_sample": False}, {"alpha": 0.3}, {"alpha": 4.0}, {"prob": 0.5}):
            mixed, target = pyrx.mixup(images, None, pairing=pairing, seed=4, backend=backend, **options)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            lam = target.lam.to(wide).view(-1, *[1] * (len(shape) - 1))
            own, other = images.to(wide), images[target.pairing].to(wide)
            expected = torch.where(lam == 1, own, own * lam + other * (1 - lam))
            assert_same_bits(mixed, (expected.round() if dtype == torch.uint8 else expected).to(dtype))
            assert mixed.stride() == images.stride()
            assert (target.boxes == torch.where(target.lam == 1, 0, -1)[:, None]).all() or options.get("prob", 1) == 1


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_resizemix_pastes_the_whole_partner(backend, dtype, last):
    images = images_of((5, 3, 20, 31), dtype, last)
    mixed, target = pyrx.resizemix(images, None, seed=1, backend=backend)
    expected = images.clone()
    for i, ((y0, x0, y1, x1), j) in enumerate(zip(target.boxes.tolist(), target.pairing.tolist(), strict=True)):
        assert y1 > y0 and x1 > x0
        rows, columns = torch.arange(y1 - y0) * 20 // (y1 - y0), torch.arange(x1 - x0) * 31 // (x1 - x0)
        expected[i][:, y0:y1, x0:x1] = images[j][:, rows][:, :, columns]
        small = F.interpolate(images[j : j + 1].double(), (y1 - y0, x1 - x0), mode="nearest")[0]
        assert (small == expected[i][:, y0:y1, x0:x1].double()).double().mean() > 0.9  # float steps there
    assert_same_bits(mixed, expected)


def test_no_nan_leaks_from_where_nothing_is_taken(backend):
    images = images_of((4, 3, 8, 8))
    images[3] = math.nan
    images[2, :, 0, 0] = math.inf
    lam = torch.tensor([1.0, 0.0, 1.0, 0.0])
    mixed, _ = pyrx.mixup(images, None, lam=lam, backend=backend)
    assert_same_bits(mixed, torch.stack([images[0], images[2], images[2], images[0]]))
    bits = torch.full((2, 1, 4, 4), 0x7FA00001, dtype=torch.int32)
    mixed, _ = pyrx.cutmix(bits.view(torch.float32), None, seed=1, backend=backend)
    assert_same_bits(mixed.view(torch.int32), bits)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("function", [pyrx.cutmix, pyrx.mixup, pyrx.resizemix], ids=lambda each: each.__name__)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64], ids=name_of)
def test_normalised_in_the_same_pass(backend, function, dtype, last):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for shape in ((5, 3, 37, 41), (3, 3, 2, 6, 9)):
        images = images_of(shape, dtype, last)
        if dtype != torch.uint8:
            images = images / 255
        for result in (torch.float32, torch.float64, torch.bfloat16):
            got, target = function(images, None, mean=mean, std=std, dtype=result, seed=2, backend=backend)
            again = {"lam": target.lam, "boxes": target.boxes} if function is not pyrx.mixup else {"lam": target.lam}
            mixed, _ = function(images.double(), None, backend=backend, **again)
            per_channel = [
                torch.tensor(each, dtype=torch.float64).view(-1, *[1] * (len(shape) - 2)) for each in (mean, std)
            ]
            expected = (mixed / (255 if dtype == torch.uint8 else 1) - per_channel[0]) / per_channel[1]
            assert got.dtype == result and got.stride() == images.stride()
            step = 2**-8 if result == torch.bfloat16 else 2**-50 if dtype == torch.float64 == result else 2**-22
            assert ((got.double() - expected).abs() <= step * expected.abs().clamp(min=4)).all()
            reference, _ = function(images, None, mean=mean, std=std, dtype=result, seed=2, backend="reference")
            assert_same_bits(got, reference)


def test_uint8_becomes_a_float_in_0_to_1(backend):
    images = images_of((3, 3, 8, 8), torch.uint8)
    mixed, target = pyrx.cutmix(images, None, dtype=torch.float32, seed=1, backend=backend)
    torch.testing.assert_close(mixed, pasted(images, target).float() / 255, rtol=1e-6, atol=0)
    one, _ = pyrx.cutmix(images, None, mean=0.5, std=0.25, dtype=torch.float32, seed=1, backend=backend)
    torch.testing.assert_close(one, (mixed - 0.5) / 0.25)


# In place, out=, masks.


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_in_place_equals_out_of_place(backend, shape, dtype):
    involution = torch.arange(shape[0]) if shape[0] < 4 else torch.tensor([1, 0, 3, 2, *range(4, shape[0])])
    for last in (False, True):
        for pairing in ("flip", "random", involution):
            for function, options in ((pyrx.cutmix, {}), (pyrx.cutmix, {"alpha": 0.3}), (pyrx.mixup, {})):
                for per_sample in (False, True):
                    images = images_of(shape, dtype, last)
                    keywords = {"pairing": pairing, "per_sample": per_sample, "seed": 5, "backend": backend, **options}
                    expected, target = function(images, labels_of(shape[0]), **keywords)
                    mixed, same = function(images, labels_of(shape[0]), inplace=True, **keywords)
                    assert mixed is images
                    assert_same_bits(images, expected)
                    assert_same_target(same, target)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_in_place_copies_what_is_not_weighed(backend, dtype):
    """Weights of 0 and 1 beside others, in one pair: no NaN leaks, no bit changes."""
    special = torch.tensor([math.inf, -0.0, math.nan, -math.inf, 1.5, 0.0], dtype=dtype)
    images = special.repeat(6 * 2 * 101)[: 6 * 2 * 10 * 10].view(6, 2, 10, 10)
    images = images + torch.arange(6, dtype=dtype).view(6, 1, 1, 1) * (images == 1.5)
    for lam in ([1, 0.5, 0, 0.25, 1, 0], [0, 0.5, 0.5, 0.5, 0.5, 1], [0.5, 1, 0.75, 0.25, 0, 0.5]):
        expected, _ = pyrx.mixup(images, None, lam=torch.tensor(lam), backend="reference")
        mixed, _ = pyrx.mixup(images.clone(), None, lam=torch.tensor(lam), inplace=True, backend=backend)
        assert_same_bits(torch.nan_to_num(mixed, 7), torch.nan_to_num(expected, 7))
        assert torch.equal(mixed.isnan(), expected.isnan())
    for seed in range(10):
        results = []
        for inplace, each in ((False, "reference"), (True, backend)):
            generator = torch.Generator().manual_seed(seed)
            mix = pyrx.nn.Mixup(1.0, 1.0, prob=0.7, mode="elem", inplace=inplace, generator=generator, backend=each)
            results.append(mix(images.clone(), labels_of(6) % 4)[0])
        assert torch.equal(results[0].isnan(), results[1].isnan())
        assert_same_bits(*(torch.nan_to_num(each, 7) for each in results))


def test_writing_is_seen_by_autograd(backend):
    weight = torch.rand(4, 3, 8, 8, requires_grad=True)
    for write in (
        lambda images: pyrx.cutmix(images, None, inplace=True, seed=1, backend=backend),
        lambda images: pyrx.cutmix(torch.rand(4, 3, 8, 8), None, out=images, seed=1, backend=backend),
    ):
        images = torch.rand(4, 3, 8, 8)
        product = (images * weight).sum()
        write(images)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_in_place_on_other_strides(backend):
    whole = images_of((6, 3, 9, 20))
    images = whole[..., ::2]
    expected, _ = pyrx.cutmix(images, None, seed=1, backend=backend)
    untouched = whole[..., 1::2].clone()
    pyrx.cutmix(images, None, seed=1, inplace=True, backend=backend)
    assert_same_bits(images, expected)
    assert_same_bits(whole[..., 1::2], untouched)


def test_large_results_go_past_the_caches(cpu):
    images = images_of((5, 3, 543, 701), torch.uint8)[:, :, 1:]
    for function in (pyrx.cutmix, pyrx.mixup):
        expected, _ = function(images, None, dtype=torch.float32, seed=9, backend="reference")
        memory = torch.empty(expected.numel() + 3)
        for offset in (0, 3):  # of 64-byte lines
            out = memory[offset : offset + expected.numel()].view(expected.shape)
            assert_same_bits(function(images, None, out=out, seed=9, backend=cpu)[0], expected)
            copied, _ = function(expected, None, seed=9, backend="reference")
            assert_same_bits(function(expected, None, out=out, seed=9, backend=cpu)[0], copied)


def test_out_takes_the_result(backend):
    size = (4, 3, 9, 11)
    images = images_of(size, torch.uint8)
    for dtype in (torch.uint8, torch.float32):
        keywords = {"dtype": dtype, "seed": 9, "backend": backend}
        for function in (pyrx.cutmix, pyrx.mixup):
            expected, target = function(images, None, **keywords)
            for last in (False, True):
                layout = torch.channels_last if last else torch.contiguous_format
                out = torch.empty(size, dtype=dtype).contiguous(memory_format=layout)
                mixed, same = function(images, None, out=out, **keywords)
                assert mixed is out and out.is_contiguous(memory_format=layout)
                assert_same_bits(out, expected)
                assert_same_target(same, target)
    wide = torch.zeros(*size[:-1], 2 * size[-1])
    expected, _ = pyrx.cutmix(images, None, dtype=torch.float32, seed=9, backend=backend)
    pyrx.cutmix(images, None, out=wide[..., ::2], seed=9, backend=backend)
    assert_same_bits(wide[..., ::2], expected)
    assert not wide[..., 1::2].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_masks_take_the_same_boxes(backend, dtype):
    images, masks = images_of((5, 3, 9, 8)), torch.randint(0, 100, (5, 9, 8)).to(dtype)
    for function in (pyrx.cutmix, pyrx.resizemix):
        _, target = function(images, None, masks=masks, seed=2, backend=backend)
        plain = function(masks.unsqueeze(1), None, seed=2, backend=backend)[0]
        assert_same_bits(target.masks, plain.squeeze(1))
    video, frames = images_of((4, 3, 2, 9, 8)), torch.randint(0, 100, (4, 2, 9, 8))
    _, target = pyrx.cutmix(video, None, masks=frames, seed=2, backend=backend)
    assert_same_bits(target.masks, pasted(frames, target))
    _, target = pyrx.cutmix(images, None, masks=masks, inplace=True, seed=2, backend=backend)
    assert target.masks.data_ptr() == masks.data_ptr()


# Replay.


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_target_replays_its_draw(backend, pairing):
    images, labels = images_of((7, 3, 12, 9)), labels_of(7)
    for function, options in ((pyrx.cutmix, {"correct_lam": False}), (pyrx.cutmix, {}), (pyrx.resizemix, {})):
        mixed, target = (
            function(images, labels, pairing=pairing, seed=8, backend=backend, **options)
            if function is (pyrx.cutmix)
            else function(images, labels, pairing=pairing, seed=8, backend=backend)
        )
        again, same = function(
            images, labels, lam=target.lam, boxes=target.boxes, pairing=target.pairing, backend=backend
        )
        assert_same_bits(again, mixed)
        assert_same_target(same, target)
    mixed, target = pyrx.mixup(images, labels, pairing=pairing, seed=8, backend=backend)
    again, same = pyrx.mixup(images, labels, lam=target.lam, pairing=target.pairing, backend=backend)
    assert_same_bits(again, mixed)
    assert_same_target(same, target)


def test_given_lam_and_boxes(backend):
    images = images_of((4, 3, 10, 10))
    boxes = torch.tensor([[0, 0, 0, 0], [0, 0, 10, 10], [2, 3, 5, 3], [1, 2, 4, 9]])
    mixed, target = pyrx.cutmix(images, labels_of(4), boxes=boxes, backend=backend)
    assert target.lam.tolist() == pytest.approx([1, 0, 1, 0.79])
    assert_same_bits(mixed, pasted(images, target))
    _, target = pyrx.cutmix(images, None, lam=0.75, correct_lam=False, seed=1, backend=backend)
    assert target.lam.tolist() == [0.75] * 4
    assert all(y1 - y0 <= 5 and x1 - x0 <= 5 for y0, x0, y1, x1 in target.boxes.tolist())
    for lam, share in ((1.0, 1.0), (0.0, 0.0)):
        mixed, target = pyrx.cutmix(images, None, lam=lam, correct_lam=False, backend=backend)
        assert target.lam.tolist() == [share] * 4


def test_boxes_of_minus_one_mix_pixel_by_pixel(backend):
    """What nn.Mixup gives where it may do either; masks stay the sample's own there."""
    images, masks = images_of((4, 3, 10, 10)), torch.randint(0, 9, (4, 10, 10), dtype=torch.uint8)
    boxes = torch.tensor([[-1] * 4, [1, 2, 5, 9], [0] * 4, [-1] * 4])
    lam = torch.tensor([0.25, 0.72, 1.0, 0.5])
    for function in (pyrx.cutmix, pyrx.resizemix):
        mixed, target = function(images, None, lam=lam, boxes=boxes, masks=masks, backend=backend)
        weighed, _ = pyrx.mixup(images, None, lam=lam, backend=backend)
        pasted_, _ = function(images, None, boxes=boxes.clamp(min=0), backend=backend)
        assert_same_bits(mixed, torch.where((boxes[:, :1] < 0)[..., None, None], weighed, pasted_))
        assert torch.equal(target.masks[[0, 2, 3]], masks[[0, 2, 3]]) and torch.equal(target.boxes, boxes)

    def resized(value):
        return pyrx.resizemix(value, None, lam=lam, boxes=boxes, backend=backend)[0]

    assert torch.autograd.gradcheck(resized, (images[:, :1].double().requires_grad_(),))


def test_empty_batches_and_images(backend):
    for shape in ((0, 3, 8, 8), (3, 0, 8, 8), (3, 3, 0, 8), (3, 3, 8, 0)):
        for function in (pyrx.cutmix, pyrx.mixup, pyrx.resizemix):
            mixed, target = function(torch.zeros(shape), labels_of(shape[0]), seed=1, backend=backend)
            assert mixed.shape == shape and target.lam.shape == (shape[0],)
            if function is not pyrx.resizemix:
                function(torch.zeros(shape), labels_of(shape[0]), seed=1, inplace=True, backend=backend)


# Draws: the definition written once more, in NumPy and math.


def words_of(seed, index, block, domain=1):
    return [int(word) for word in philox((index, 0, block, domain), (seed & 0xFFFFFFFF, seed >> 32))]


def uniform_of(high, low):
    return ((high << 32 | low) >> 12) / 2**52 + 2**-53


def expected_box(seed, index, height, width):
    """CutMix at alpha = 1 by the paper's formula and csrc/kernels/batch_mix.h's counters."""
    high, low, _, _ = words_of(seed, index, 1)
    ratio = math.sqrt(1 - float(np.float32(uniform_of(high, low))))
    _, y, x, _ = words_of(seed, index, 0)
    cy, cx, h, w = y * height >> 32, x * width >> 32, int(height * ratio), int(width * ratio)
    return [max(cy - h // 2, 0), max(cx - w // 2, 0), min(cy + h // 2, height), min(cx + w // 2, width)]


@pytest.mark.parametrize("size", [(1, 1), (7, 224), (224, 224)], ids=name_of)
def test_boxes_are_the_papers(backend, size):
    images = torch.zeros(50, 1, *size, dtype=torch.uint8)
    for seed in (0, 1, 2**63 + 12345):
        _, target = pyrx.cutmix(images, None, seed=seed, backend=backend)
        assert target.boxes.tolist() == [expected_box(seed, i, *size) for i in range(50)]
        _, target = pyrx.cutmix(images, None, seed=seed, per_sample=False, backend=backend)
        assert target.boxes.tolist() == [expected_box(seed, 0, *size)] * 50


@given(
    st.integers(0, 2**64 - 1), st.integers(1, 40), st.integers(1, 300), st.sampled_from([0.05, 0.2, 0.5, 0.7, 1.0, 3.0])
)
def test_the_cpu_draws_what_the_reference_draws(seed, samples, side, alpha):
    need("cpu")
    images = torch.zeros(samples, 1, side, 3, dtype=torch.uint8)
    for keywords in ({}, {"minmax": (0.1, 0.7)}, {"prob": 0.5, "correct_lam": False}):
        found = [
            pyrx.cutmix(images, None, alpha=alpha, pairing="random", seed=seed, backend=each, **keywords)[1]
            for each in ("cpu", "reference")
        ]
        for one, other in zip(*(each[2:5] for each in found), strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 0.8, 1.0, 2.0, 8.0])
def test_lam_is_beta_distributed(backend, alpha):
    count = 20000
    _, target = pyrx.mixup(torch.zeros(count, 1, 1, 1), None, alpha=alpha, seed=17, backend=backend)
    lam = np.sort(target.lam.double().numpy())
    cdf = beta_cdf(alpha, lam)
    steps = np.arange(count + 1) / count
    inner = (lam > 1e-6) & (lam < 1 - 1e-6)  # float32 has no values nearer to one
    distance = max(np.abs(cdf - steps[1:])[inner].max(), np.abs(cdf - steps[:-1])[inner].max())
    assert distance < kolmogorov_limit(count)


def test_boxes_cover_the_image_as_the_papers_do(backend):
    """The share of the pasted pixels is 77 / 240 in the continuum, highest in the middle, centres are uniform."""
    images = torch.zeros(20000, 1, 32, 32, dtype=torch.uint8)
    images[10000:] = 1
    mixed, target = pyrx.cutmix(images, None, seed=23, backend=backend)
    covered = (mixed != images).double().mean((0, 1))
    assert abs(covered.mean().item() - 0.299) < 0.006
    # [centre - half, centre + half) reaches one pixel further up than down
    torch.testing.assert_close(covered, covered.flip(0), atol=0.05, rtol=0)
    torch.testing.assert_close(covered, covered.t(), atol=0.02, rtol=0)
    assert covered[16, 16] > covered[0, 16] > covered[0, 0]
    _, target = pyrx.cutmix(images, None, minmax=(0.25, 0.75), seed=23, backend=backend)
    heights = target.boxes[:, 2] - target.boxes[:, 0]
    observed = torch.bincount(heights, minlength=24)[8:24].double()
    assert heights.min() == 8 and heights.max() == 23
    assert ((observed - 20000 / 16) ** 2 / (20000 / 16)).sum() < chi_square_limit(15)
    assert target.boxes[:, 2].max() == 32  # the last row is reached


@pytest.mark.parametrize("samples", [2, 5, 6])
def test_matchings_are_uniform(cpu, samples):
    images = torch.zeros(samples, 1, 1, 1)
    counts = {}
    trials = 1500
    for seed in range(trials):
        _, target = pyrx.cutmix(images, None, pairing="random", seed=seed, backend=cpu)
        partner = target.pairing.tolist()
        assert [partner[each] for each in partner] == list(range(samples))
        assert sum(i == each for i, each in enumerate(partner)) == samples % 2
        counts[tuple(partner)] = counts.get(tuple(partner), 0) + 1
    possible = math.prod(range(1, samples + samples % 2, 2))
    expected = trials / possible
    assert sum((counts[each] - expected) ** 2 / expected for each in counts) < chi_square_limit(max(1, possible - 1))
    assert len(counts) == possible


def test_prob_is_applied_once(backend):
    count = 20000
    for function in (pyrx.cutmix, pyrx.mixup):
        _, target = function(torch.zeros(count, 1, 16, 16), None, prob=0.3, seed=5, backend=backend, alpha=50.0)
        share = (target.lam != 1).double().mean().item()
        assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / count)
    applied = [
        bool(
            (pyrx.cutmix(torch.zeros(3, 1, 8, 8), None, lam=0.5, prob=0.5, per_sample=False, seed=s)[1].lam != 1).any()
        )
        for s in range(400)
    ]
    assert abs(np.mean(applied) - 0.5) < 0.13


def test_a_seed_and_a_generator_decide(backend):
    images = images_of((6, 3, 16, 16))
    one = pyrx.cutmix(images, None, generator=torch.Generator().manual_seed(1), backend=backend)[0]
    other = pyrx.cutmix(images, None, generator=torch.Generator().manual_seed(1), backend=backend)[0]
    third = pyrx.cutmix(images, None, generator=torch.Generator().manual_seed(2), backend=backend)[0]
    assert torch.equal(one, other) and not torch.equal(one, third)
    torch.manual_seed(3)
    first = pyrx.cutmix(images, None, backend=backend)[0]
    assert not torch.equal(first, pyrx.cutmix(images, None, backend=backend)[0])


def test_thread_counts_change_nothing(backend):
    images = images_of((9, 3, 33, 65), torch.uint8)
    with threads(1):
        expected, _ = pyrx.cutmix(images, None, dtype=torch.float32, seed=1, backend=backend)
    with threads(3):
        assert_same_bits(pyrx.cutmix(images, None, dtype=torch.float32, seed=1, backend=backend)[0], expected)


# Gradients.


@pytest.mark.parametrize("function", [pyrx.cutmix, pyrx.mixup, pyrx.resizemix], ids=lambda each: each.__name__)
@pytest.mark.parametrize("pairing", [*PAIRINGS, torch.tensor([1, 2, 0, 4, 3])], ids=[*PAIRINGS, "permutation"])
def test_gradients(backend, function, pairing):
    images = torch.randn(5, 2, 7, 6, dtype=torch.float64, requires_grad=True)

    def mixed(value):
        options = {"pairing": pairing, "seed": 3, "backend": backend, "mean": (0.1, 0.2), "std": (0.5, 2.0)}
        return function(value, None, **options)[0]

    assert torch.autograd.gradcheck(mixed, (images,))


# Targets.


def test_probabilities_of_a_mixed_target():
    target = pyrx.MixedTarget(torch.tensor([0, 1, 2]), torch.tensor([1, 1, 0]), torch.tensor([0.25, 0.3, 1.0]))
    expected = torch.tensor([[0.25, 0.75, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    torch.testing.assert_close(target.to_probabilities(4), expected)
    torch.testing.assert_close(target.to_probabilities(4, 0.2), 0.8 * expected + 0.05)
    with pytest.raises(ValueError, match="expected label_smoothing in \\[0, 1\\], got 2"):
        target.to_probabilities(4, 2)


@pytest.mark.parametrize("bad, name", [((-1, 0), "a"), ((0, 4), "b"), ((-100, 0), "a")])
def test_probabilities_of_classes_that_are_not_there(fresh_dynamo, bad, name):
    a, b = (torch.tensor([1, each]) for each in bad)
    target = pyrx.MixedTarget(a, b, torch.tensor([0.25, 1.0]))
    got = next(each for each in bad if not 0 <= each < 4)
    text = rf"MixedTarget.to_probabilities: expected {name} of class ids in \[0, 4\), got {got}"
    with pytest.raises(ValueError, match=text):
        target.to_probabilities(4)
    found = torch.compile(lambda each: each.to_probabilities(4, 0.1), backend="aot_eager", fullgraph=True)(target)
    torch.testing.assert_close(found[:1], pyrx.MixedTarget(*(each[:1] for each in target[:3])).to_probabilities(4, 0.1))
    assert found[1].isnan().all()
    images = torch.rand(2, 3, 8, 8)
    kept = images.clone()
    with pytest.raises(ValueError, match=r"Mixup: expected target of class ids in \[0, 4\), got"):
        pyrx.nn.Mixup(num_classes=4, inplace=True)(images, torch.tensor(bad))
    assert torch.equal(images, kept)


def test_normalisation_beyond_the_dtype_of_results(backend):
    images = torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match="pyrx::cutmix: expected mean and std of .* at most 3.4e\\+38"):
        pyrx.cutmix(images, None, mean=1e300, seed=0, backend=backend)
    assert pyrx.cutmix(images.double(), None, mean=1e300, seed=0, backend=backend)[0].isfinite().all()
