"""CutMix and mixup of whole batches against timm, torchvision and kornia, and against moving the same bytes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import SETTINGS, Contender, Growth, Target, expect, on_the_gpu, run_case, set_threads, size_of, sweep
from torch import Tensor

import pyrx

ROW = "batch_mix"
CLASSES = 1000
SHARE = "of 0.321 of the bytes, the mean share of CutMix's boxes"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


SIDES, BATCHES = (32, 64, 112, 224, 448), (8, 32, 128, 256)


def batch(growth: Growth | None) -> tuple[Tensor, Tensor]:
    """64 float32 images on the CPU, 256 of bfloat16 on a GPU, and labels."""
    device = SETTINGS.device
    samples, dtype = (64, torch.float32) if device == "cpu" else (256, torch.bfloat16)
    samples, side = size_of(growth, "batch", samples), size_of(growth, "side", 224)
    images = torch.rand(samples, 3, side, side, device=device).to(dtype)
    return images, torch.randint(0, CLASSES, (samples,), device=device)


def available(module: str) -> Any:
    """None where a peer is not installed: the case goes on without it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        SETTINGS.say(f"  {module} is not installed: left out")
        return None


def timm_contender(name: str, images: Tensor, labels: Tensor, **keywords: Any) -> list[Contender]:
    module = available("timm.data.mixup")
    if module is None:
        return []
    mix = module.Mixup(num_classes=CLASSES, **{"mixup_alpha": 0.0} | keywords)
    return [Contender(name, lambda: mix(images, labels)[0])]


def copied_bytes(images: Tensor, share: float = 1.0) -> Callable[[], Any]:
    """One read and one write of `share` of the images' bytes, into memory that is there already."""
    source = images.reshape(-1)[: int(images.numel() * share)]
    buffer = torch.empty_like(source)
    return lambda: buffer.copy_(source)


def definition(images: Tensor, target: pyrx.MixedTarget) -> Tensor:
    """CutMix by slices."""
    expected = images.clone()
    for i, ((y0, x0, y1, x1), j) in enumerate(zip(target.boxes.tolist(), target.pairing.tolist(), strict=True)):
        expected[i][..., y0:y1, x0:x1] = images[j][..., y0:y1, x0:x1]
    return expected


def differing(name: str, got: Tensor, expected: Tensor) -> dict[str, Any]:
    return expect(name, "pixels unlike the definition", float((got != expected).sum().item()), 0)


def close(name: str, got: Tensor, expected: Tensor, slack: float) -> dict[str, Any]:
    return expect(name, "largest difference from the definition", (got - expected).abs().max().item(), slack)


def run(
    op: str,
    images: Tensor,
    growth: Growth | None,
    contenders: list[Contender],
    benchmark: Any,
    check: Callable[[dict[str, Contender]], list[dict[str, Any]]],
    floors: dict[str, str],
    targets: list[Target],
) -> None:
    """One case, on a GPU with the CUDA graphs beside it; the targets are this device's."""
    graphs = on_the_gpu(contenders)
    floors = floors | {f"{a}, CUDA graph": f"{b}, CUDA graph" for a, b in floors.items() if graphs}
    params = {"op": op, "shape": list(images.shape), "dtype": str(images.dtype)[6:]}
    run_case(ROW, params, [*contenders, *graphs], benchmark, check=check, floors=floors, targets=targets, growth=growth)


IN_PLACE = [pytest.param(False, None, id="one_box"), pytest.param(True, None, id="per_sample")]
IN_PLACE += sweep("side", SIDES, lambda side: (True,)) + sweep("batch", BATCHES, lambda samples: (True,))


@pytest.mark.parametrize(("per_sample", "growth"), IN_PLACE)
def test_cutmix_in_place(per_sample: bool, growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    images, labels = batch(growth)
    whole = images.shape[-1]
    mode = "elem" if per_sample else "batch"
    own, theirs = images.clone(), images.clone()
    # a box of the mean share of CutMix's, so that every round moves the same bytes, on every side
    side = int(whole * 0.321**0.5)
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, whole - side, (len(images) if per_sample else 1, 2), generator=generator)
    boxes = torch.cat([corners, corners + side], 1).expand(len(images), 4).contiguous().to(images.device)
    lam = torch.full((len(images),), 1 - side**2 / whole**2, device=images.device)
    given = {"lam": lam, "boxes": boxes, "per_sample": per_sample}
    contenders = [
        *timm_contender(f"timm {mode}", theirs, labels, cutmix_alpha=1.0, mode=mode),
        Contender("pyrx", lambda: pyrx.cutmix(own, labels, inplace=True, per_sample=per_sample)[0], "pyrx"),
        Contender("pyrx, mean boxes", lambda: pyrx.cutmix(own, labels, inplace=True, **given)[0], "pyrx", note=SHARE),
        Contender("floor", copied_bytes(images, 0.321), "floor", note=SHARE),
    ]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        mixed, target = pyrx.cutmix(images.clone(), labels, inplace=True, per_sample=per_sample, seed=7)
        return [differing("pyrx", mixed, definition(images, target))]

    if SETTINGS.device == "cpu":
        targets = [Target("pyrx", f"timm {mode}", 5.0)]
    else:
        targets = [Target("pyrx, mean boxes, CUDA graph", "floor", 1 / 0.8)]
    floors = {"pyrx": "floor", "pyrx, mean boxes": "floor"}
    run(f"cutmix in place, {mode}", images, growth, contenders, benchmark, check, floors, targets)


@pytest.mark.parametrize("growth", [None, *sweep("side", SIDES), *sweep("batch", BATCHES)])
def test_cutmix_out_of_place(growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    images, labels = batch(growth)
    out = torch.empty_like(images)
    transforms, kornia = available("torchvision.transforms.v2"), available("kornia.augmentation")
    contenders = []
    if transforms is not None:
        cutmix = transforms.CutMix(num_classes=CLASSES)
        contenders.append(Contender("torchvision", lambda: cutmix(images, labels)[0]))
    if kornia is not None:
        theirs = kornia.RandomCutMixV2(p=1.0, data_keys=["input", "class"], use_correct_lambda=True)
        contenders.append(Contender("kornia", lambda: theirs(images, labels)[0]))
    contenders += [
        Contender("pyrx", lambda: pyrx.cutmix(images, labels)[0], "pyrx"),
        Contender("pyrx, out=", lambda: pyrx.cutmix(images, labels, out=out)[0], "pyrx", note="into a buffer"),
        Contender("floor, new memory", lambda: images.clone(), "floor", note="a clone of the images"),
        Contender("floor, buffer", copied_bytes(images), "floor", note="a copy into memory that is there already"),
    ]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        found = []
        for name, options in (("pyrx", {}), ("pyrx, out=", {"out": out})):
            mixed, target = pyrx.cutmix(images, labels, seed=7, **options)
            found.append(differing(name, mixed, definition(images, target)))
        return found

    if SETTINGS.device == "cpu":
        targets = [Target("pyrx", "torchvision", 1.5), Target("pyrx", "kornia", 5.0)]
        targets += [Target("pyrx", "floor", 1.3), Target("pyrx, out=", "floor", 1.3)]
    else:
        targets = [Target(f"{name}, CUDA graph", "floor", 1 / 0.8) for name in ("pyrx", "pyrx, out=")]
    floors = {"pyrx": "floor, new memory", "pyrx, out=": "floor, buffer"}
    run("cutmix", images, growth, contenders, benchmark, check, floors, targets)


@pytest.mark.parametrize("growth", [None, *sweep("side", SIDES)])
def test_mixup(growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    images, labels = batch(growth)
    own, theirs, out = images.clone(), images.clone(), torch.empty_like(images)
    contenders = [
        *timm_contender("timm elem", theirs, labels, mixup_alpha=1.0, mode="elem"),
        Contender("pyrx", lambda: pyrx.mixup(images, labels)[0], "pyrx"),
        Contender("pyrx, out=", lambda: pyrx.mixup(images, labels, out=out)[0], "pyrx", note="into a buffer"),
        Contender("pyrx, in place", lambda: pyrx.mixup(own, labels, inplace=True)[0], "pyrx"),
        Contender("floor, new memory", lambda: images.clone(), "floor", note="a clone of the images"),
        Contender("floor, buffer", copied_bytes(images), "floor", note="a copy into memory that is there already"),
    ]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        mixed, target = pyrx.mixup(images, labels, seed=7)
        lam = target.lam.view(-1, 1, 1, 1)
        expected = (images.float() * lam + images.flip(0).float() * (1 - lam)).to(images.dtype)
        in_place, _ = pyrx.mixup(images.clone(), labels, seed=7, inplace=True)
        return [differing("pyrx", mixed, expected), differing("pyrx, in place", in_place, expected)]

    names = ["pyrx", "pyrx, out=", "pyrx, in place"]
    if SETTINGS.device == "cpu":
        targets = [Target(name, "timm elem", 2.0) for name in names]
    else:
        targets = [Target(f"{name}, CUDA graph", "floor", 1 / 0.8) for name in names]
    floors = dict.fromkeys(names, "floor, buffer") | {"pyrx": "floor, new memory"}
    run("mixup, per sample", images, growth, contenders, benchmark, check, floors, targets)


NORMALISED = [pytest.param(True, None, id="channels_last"), pytest.param(False, None, id="contiguous")]
NORMALISED += sweep("side", SIDES, lambda side: (True,))


@pytest.mark.parametrize(("last", "growth"), NORMALISED)
def test_normalised_cutmix(last: bool, growth: Growth | None, benchmark: Any) -> None:
    """uint8 to normalised floating-point, with CutMix of per-sample boxes."""
    set_threads()
    torch._dynamo.reset()
    like, labels = batch(growth)
    layout = torch.channels_last if last else torch.contiguous_format
    images = (like.float() * 255).round().to(torch.uint8).contiguous(memory_format=layout)
    out = torch.empty_like(like).contiguous(memory_format=layout)
    mean, std = (torch.tensor(each, device=like.device).view(1, 3, 1, 1) * 255 for each in (MEAN, STD))

    def normalise(value: Tensor) -> Tensor:
        return ((value.float() - mean) / std).to(like.dtype)

    compiled = torch.compile(normalise, dynamic=False, fullgraph=True)
    timm = available("timm.data.mixup")
    options = {"mean": MEAN, "std": STD, "dtype": like.dtype}
    contenders = []
    if timm is not None:
        mix = timm.Mixup(0.0, 1.0, mode="elem", num_classes=CLASSES)
        contenders = [
            Contender("normalise + timm elem", lambda: mix(normalise(images), labels)[0]),
            Contender("compiled normalise + timm elem", lambda: mix(compiled(images), labels)[0]),
        ]
    contenders += [
        Contender("pyrx", lambda: pyrx.cutmix(images, labels, **options)[0], "pyrx"),
        Contender(
            "pyrx, out=", lambda: pyrx.cutmix(images, labels, out=out, **options)[0], "pyrx", note="into a buffer"
        ),
        Contender("floor, new memory", lambda: images.to(like.dtype), "floor", note="a conversion of the images"),
        Contender("floor, buffer", lambda: out.copy_(images), "floor", note="a conversion into memory that is there"),
    ]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        mixed, target = pyrx.cutmix(images, labels, seed=7, **options)
        into, _ = pyrx.cutmix(images, labels, seed=7, out=out, **options)
        slack = 1e-5 if like.dtype == torch.float32 else 2e-2
        return [
            close("pyrx", mixed, definition(normalise(images), target), slack),
            differing("pyrx, out=", into, mixed),
        ]

    eager, fused = "normalise + timm elem", "compiled normalise + timm elem"
    ratios = ((3.0, 1.5), (6.0, 3.0)) if SETTINGS.device == "cpu" else ((4.0, 2.0), (4.0, 2.0))
    targets = []
    if last:
        for name, (first, second) in zip(("pyrx", "pyrx, out="), ratios, strict=True):
            targets += [Target(name, eager, first), Target(name, fused, second)]
    floors = {"pyrx": "floor, new memory", "pyrx, out=": "floor, buffer"}
    op = f"uint8 to normalised, {str(layout)[6:].removesuffix('_format')}"
    run(op, like, growth, contenders, benchmark, check, floors, targets)
