"""Bad input of cutmix and mixup: type and text of every error, from the public functions, the kernel and the fake."""

import math

import pytest
import torch
from errors import GENERATOR_ROWS, SEED_ROWS, check, row
from helpers import need
from torch._subclasses.fake_tensor import FakeTensorMode

import pyrx
from pyrx import _library

IMAGES, LABELS = torch.rand(4, 3, 8, 6), torch.arange(4)
BOXES = torch.tensor([[0, 0, 2, 2]] * 4)
MIX_ROWS = [
    row("images", "to be a Tensor", "list", TypeError, images=[1.0]),
    row("images", "of shape [N, C, H, W] or [N, C, T, H, W]", "[3, 8, 6]", images=IMAGES[0]),
    row("images", "of shape [N, C, H, W] or [N, C, T, H, W]", "[4, 3, 8]", images=IMAGES[..., 0]),
    row("images", "of a real dtype", "torch.complex64", TypeError, images=IMAGES.to(torch.complex64)),
    row("labels", "of shape [N] = [4]", "[3]", labels=LABELS[:3]),
    row("labels", "of dtype torch.int64", "torch.float32", TypeError, labels=torch.rand(4)),
    row("labels", "to be a Tensor", "list", TypeError, labels=[0, 1, 2, 3]),
    row("labels", "on device cpu", "meta", RuntimeError, labels=LABELS.to("meta")),
    row("lam", "of shape [N] = [4]", "[3]", lam=torch.rand(3)),
    row("lam", "of dtype torch.float32", "torch.float64", TypeError, lam=torch.rand(4, dtype=torch.float64)),
    row("lam", "in [0, 1]", "1.5", lam=1.5),
    row("lam", "in [0, 1]", "[0.0, 0.5, -0.5, 1.0]", lam=torch.tensor([0.0, 0.5, -0.5, 1.0])),
    row("lam", "in [0, 1]", "[0.0, 0.5, nan, 1.0]", lam=torch.tensor([0.0, 0.5, math.nan, 1.0])),
    row("lam", "to be a float or a Tensor", "str", TypeError, lam="0.5"),
    row("pairing", "to be one of 'flip', 'roll', 'random'", "'shuffle'", pairing="shuffle"),
    row("pairing", "to be a permutation of the samples", "[0, 1, 1, 3]", pairing=torch.tensor([0, 1, 1, 3])),
    row("pairing", "to be a permutation of the samples", "[0, 1, 2, 4]", pairing=torch.tensor([0, 1, 2, 4])),
    row("pairing", "of dtype torch.int64", "torch.int32", TypeError, pairing=torch.arange(4, dtype=torch.int32)),
    row("alpha", "above 0", "0", alpha=0),
    row("alpha", "above 0", "nan", alpha=math.nan),
    row("alpha", "to be a float", "str", TypeError, alpha="1"),
    row("prob", "in [0, 1]", "1.5", prob=1.5),
    row("mean", "of C = 3 values", "2", mean=(0.1, 0.2)),
    row("std", "of C = 3 values", "4", std=(0.1, 0.2, 0.3, 0.4)),
    row("std", "above 0", "[0.1, 0.0, 0.3]", std=(0.1, 0.0, 0.3)),
    row("mean", "to be a float or a sequence of floats", "str", TypeError, mean="imagenet"),
    row("dtype", "torch.float32 or a floating-point dtype", "torch.uint8", TypeError, dtype=torch.uint8),
    row("dtype", "a floating-point dtype for a normalised result", "torch.uint8", TypeError, mean=0.5,
        images=IMAGES.to(torch.uint8)),
    row("out", "of shape [N, C, ...] = [4, 3, 8, 6]", "[4, 3, 6, 8]", out=torch.empty(4, 3, 6, 8)),
    row("out", "of dtype torch.float64", "torch.float32", TypeError, out=torch.empty(4, 3, 8, 6), dtype=torch.float64),
    row(
        "out",
        "to be memory of its own for every element",
        "strides [0, 48, 6, 1]",
        out=torch.empty(3, 8, 6).expand(4, 3, 8, 6)),
    row("out", "to be other memory than the inputs", "the same", out=IMAGES),
    row("at most one of inplace", "and out", "both", inplace=True, out=torch.empty(4, 3, 8, 6)),
    row("inplace", "of images that keep their dtype and values", "mean, std or dtype", inplace=True, mean=0.5),
    row("inplace", "to be memory of its own for every element", "strides [2, 1, 1, 1]", inplace=True,
        images=torch.rand(9).as_strided((4, 1, 2, 2), (2, 1, 1, 1))),
    row("out", "to be a Tensor", "int", TypeError, out=3),
    row("lam", "without requires_grad: there is no gradient to lam", "requires_grad=True",
        lam=torch.rand(4, requires_grad=True)),
    row("inplace", "to be memory of its own for every element", "strides [0, 48, 6, 1]", inplace=True,
        images=torch.rand(3, 8, 6).expand(4, 3, 8, 6)),
    row("inplace", "of images that require no gradient", "images that do", RuntimeError, inplace=True,
        images=IMAGES.clone().requires_grad_()),
    row("pairing", "to be its own inverse for inplace=True", "'roll'", inplace=True, pairing="roll"),
    row("pairing", "to be its own inverse for inplace=True", "[1, 2, 3, 0]", inplace=True,
        pairing=torch.tensor([1, 2, 3, 0])),
    *SEED_ROWS,
    *GENERATOR_ROWS,
]  # fmt: skip
CUTMIX_ROWS = [
    row("boxes", "of shape [N, 4] = [4, 4]", "[3, 4]", boxes=BOXES[:3]),
    row("boxes", "of dtype torch.int64", "torch.float32", TypeError, boxes=BOXES.float()),
    row(
        "boxes", "0 <= y0 <= y1 <= 8 and 0 <= x0 <= x1 <= 6", "[2, 0, 1, 2]", boxes=BOXES + torch.tensor([2, 0, -1, 0])
    ),
    row("boxes", "0 <= y0 <= y1 <= 8 and 0 <= x0 <= x1 <= 6", "[0, 0, 9, 2]", boxes=BOXES + torch.tensor([0, 0, 7, 0])),
    row(
        "boxes", "0 <= y0 <= y1 <= 8 and 0 <= x0 <= x1 <= 6", "[0, -1, 2, 2]", boxes=BOXES - torch.tensor([0, 1, 0, 0])
    ),
    row("lam", "to be given beside boxes of -1", "None", boxes=torch.full((4, 4), -1)),
    row(
        "boxes",
        "0 <= y0 <= y1 <= 8 and 0 <= x0 <= x1 <= 6",
        "[-1, -1, -1, -1]",
        lam=0.5,
        images=IMAGES.int(),
        boxes=torch.full((4, 4), -1),
    ),
    row("minmax", "to be two floats", "0.5", TypeError, minmax=0.5),
    row("minmax", "to be a float", "str", TypeError, minmax=("a", 1)),
    row("minmax", "to be a float", "bool", TypeError, minmax=(0.1, True)),
    row("boxes", "beside lam, which does not decide the sides of these", "None", minmax=(0.1, 0.5), lam=0.5),
    row("minmax", "0 <= minimum <= maximum <= 1 and maximum > 0", "(0.5, 0.2)", minmax=(0.5, 0.2)),
    row("masks", "of shape [N, H, W] = [4, 8, 6]", "[4, 6, 8]", masks=torch.zeros(4, 6, 8, dtype=torch.int64)),
    row(
        "masks",
        "of dtype bool, uint8, int8, int16, int32 or int64",
        "torch.float32",
        TypeError,
        masks=torch.zeros(4, 8, 6),
    ),
]


@pytest.mark.parametrize("changes, error, text", MIX_ROWS + CUTMIX_ROWS)
def test_cutmix(backend, changes, error, text):
    arguments = {"images": IMAGES, "labels": LABELS, "backend": backend} | changes
    before = IMAGES.clone()
    check(pyrx.cutmix, arguments, "cutmix", error, text)
    assert torch.equal(IMAGES, before)


@pytest.mark.parametrize("changes, error, text", MIX_ROWS)
def test_mixup(backend, changes, error, text):
    check(pyrx.mixup, {"images": IMAGES, "labels": LABELS, "backend": backend} | changes, "mixup", error, text)


def test_mixup_of_integers(backend):
    images = torch.zeros(2, 3, 4, 4, dtype=torch.int32)
    text = "expected images of dtype uint8, float16, bfloat16, float32 or float64, got torch.int32"
    check(pyrx.mixup, {"images": images, "labels": None, "backend": backend}, "mixup", TypeError, text)


def mix_arguments(**changes):
    """The raw op's arguments, by name."""
    return {
        "images": IMAGES, "labels": LABELS, "seed": torch.tensor(1), "lam": None, "boxes": None, "partner": None,
        "pairing": 0, "kind": 1, "granularity": 2, "prob": 65536, "switch_prob": 0, "mixup_alpha": 1.0,
        "cutmix_alpha": 1.0, "minimum": 0.0, "maximum": 0.0, "correct_lam": True, "scale": [], "bias": [],
        "dtype": torch.float32,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    "changes, error, text",
    [
        row("images", "of shape [N, C, H, W] or [N, C, T, H, W]", "[3, 8, 6]", images=IMAGES[0]),
        row("images", "of dtype uint8, float16, bfloat16, float32 or float64", "torch.int16", TypeError, kind=0,
            images=IMAGES.to(torch.int16), dtype=torch.int16),
        row("dtype", "torch.float32 or a floating-point dtype", "torch.uint8", TypeError, dtype=torch.uint8),
        row("mean and std", "of C = 3 channels", "2 and 3", scale=[1.0] * 3, bias=[0.0] * 2),
        row("labels", "of shape [N] = [4]", "[3]", labels=LABELS[:3]),
        row("boxes", "of shape [N, 4] = [4, 4]", "[2, 4]", boxes=BOXES[:2]),
        row("lam", "of dtype torch.float32", "torch.float64", TypeError, lam=torch.ones(4, dtype=torch.float64)),
        row("seed", "of one element", "[2]", seed=torch.tensor([1, 2])),
        row("pairing", "in [0, 3], 3 where a permutation is given", "3", pairing=3),
        row("kind and granularity", "in [0, 3] and [0, 2]", "4 and 2", kind=4),
        row("prob", "in [0, 65536]", "65537", prob=65537),
        row("cutmix_alpha", "above 0", "0.0", cutmix_alpha=0.0),
        row("minmax", "0 <= minimum <= maximum <= 1", "(0.5, 0.25)", minimum=0.5, maximum=0.25),
    ],
)  # fmt: skip
def test_the_raw_op_of_batch_mix(changes, error, text):
    """Kernel and fake say the same."""
    need("cpu", ops=("batch_mix",))
    arguments = mix_arguments(**changes)
    check(_library.namespace("cpu").batch_mix, arguments, "batch_mix", error, text)
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        check(_library.namespace("cpu").batch_mix, fake, "batch_mix", error, text)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize(
    "changes, text",
    [
        ({"lam": torch.tensor([0.0, 2.0, 0.0, 0.0])}, "expected lam in [0, 1], got 2.0"),
        ({"boxes": BOXES + torch.tensor([0, 0, 7, 0])},
         "expected boxes 0 <= y0 <= y1 <= 8 and 0 <= x0 <= x1 <= 6, got [0, 0, 9, 2]"),
        ({"boxes": torch.full((4, 4), -1)}, "expected lam to be given beside boxes of -1, got None"),
        ({"boxes": torch.full((4, 4), -1), "lam": torch.ones(4), "images": IMAGES.int(), "dtype": torch.int32},
         "expected boxes 0 <= y0 <= y1 <= 8 and 0 <= x0 <= x1 <= 6, got [-1, -1, -1, -1]"),
        ({"partner": torch.tensor([0, 1, 1, 3]), "pairing": 3},
         "expected pairing to be a permutation of the samples, got [0, 1, 1, 3]"),
    ],
)  # fmt: skip
def test_values_that_the_raw_op_of_batch_mix_reads(changes, text):
    need("cpu", ops=("batch_mix",))
    check(_library.namespace("cpu").batch_mix, mix_arguments(**changes), "batch_mix", ValueError, text)
