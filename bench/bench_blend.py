"""Alpha compositing and FMix against PyTorch's eager and compiled forms, and against moving the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from harness import (
    SETTINGS,
    Contender,
    Growth,
    expect,
    moved_bytes,
    run_case,
    set_threads,
    size_of,
    sweep,
    with_graphs,
)
from torch import Tensor

import pyrx

ROW = "blend"
SAMPLES, SIDES = 64, (32, 64, 112, 224, 448)
CASES = [(torch.float32, False), (torch.uint8, False), (torch.float32, True)]


def shape_of(growth: Growth | None) -> tuple[int, ...]:
    side = size_of(growth, "side", 224)
    return SAMPLES, 3, side, side


def images_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    device = SETTINGS.device
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, device=device)
    return torch.rand(shape, device=device).to(dtype)


def lerp(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    if x.dtype == torch.uint8:
        return torch.lerp(y.float(), x.float(), alpha).round().to(torch.uint8)
    return torch.lerp(y, x, alpha)


def formula(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    mixed = alpha * x + (1 - alpha) * y
    return mixed.round().to(torch.uint8) if x.dtype == torch.uint8 else mixed


def unlike(name: str, got: Tensor, expected: Tensor, slack: float) -> dict[str, Any]:
    difference = (got.float() - expected.float()).abs().max().item()
    return expect(name, "largest difference from the reference", difference, slack)


def blends() -> list[Any]:
    cases = CASES[: 1 if SETTINGS.quick else None]
    found = [pytest.param(dtype, backward, None, id=f"{str(dtype)[6:]}-{backward}") for dtype, backward in cases]
    return found + sweep("side", SIDES, lambda side: (torch.float32, False))


@pytest.mark.parametrize(("dtype", "backward", "growth"), blends())
def test_blend(dtype: torch.dtype, backward: bool, growth: Growth | None, benchmark: Any) -> None:
    """(N, 1, H, W) mattes; backward: all three gradients."""
    set_threads()
    torch._dynamo.reset()
    shape = shape_of(growth)
    x, y = images_of(shape, dtype), images_of(shape, dtype)
    alpha = torch.rand(shape[0], 1, *shape[2:], device=SETTINGS.device)
    leaves, upstream, buffer = (x, y, alpha), torch.rand(shape, device=SETTINGS.device), torch.empty_like(x)
    if backward:
        leaves = tuple(each.requires_grad_() for each in leaves)

    def step(form: Callable[..., Tensor]) -> Any:
        mixed = form(*leaves)
        return (mixed.detach(), *torch.autograd.grad(mixed, leaves, upstream)) if backward else (mixed,)

    forms: dict[str, Callable[..., Tensor]] = {
        "lerp": lerp,
        "formula": formula,
        "compiled lerp": torch.compile(lerp, dynamic=False, fullgraph=True),
        "compiled formula": torch.compile(formula, dynamic=False, fullgraph=True),
        "pyrx": pyrx.blend,
    }
    contenders = [
        Contender(name, partial(step, form), "pyrx" if name == "pyrx" else "peer") for name, form in forms.items()
    ]
    floors = {"pyrx": "floor, new memory"}
    if not backward:
        contenders.append(Contender("pyrx, out", lambda: (pyrx.blend(*leaves, out=buffer),), "pyrx"))
        floors["pyrx, out"] = "floor, buffers"
    # forward: x, y, alpha, the result; backward: its gradient, x, y, alpha and their gradients
    width, pixels = x.element_size(), 4 * alpha.numel()
    contenders += moved_bytes((9 if backward else 3) * x.numel() * width + (3 if backward else 1) * pixels)
    if not backward:
        contenders, floors = with_graphs(contenders, floors)

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        expected = step(partial(pyrx.blend, backend="reference"))
        slack = 1.0 if dtype == torch.uint8 else 1e-5
        found = []
        for name, each in able.items():
            if each.kind != "floor":
                exact = name.startswith("pyrx") and not backward
                for one, other in zip(each.step(), expected, strict=True):
                    found.append(unlike(name, one, other, 0.0 if exact else slack))
        return found

    params = {"op": "blend", "shape": list(shape), "dtype": str(dtype)[6:], "backward": backward}
    run_case(ROW, params, contenders, benchmark, check=check, floors=floors, growth=growth)


def host_matte(lam: float, size: tuple[int, int], decay_power: float = 3.0) -> Tensor:
    """A matte on the host, one image at a time: noise, filter, transform, sort."""
    height, width = size
    y, x = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    frequency = torch.sqrt(y**2 + x**2).clamp(min=1 / max(size))
    noise = torch.complex(torch.randn(height, width // 2 + 1), torch.randn(height, width // 2 + 1))
    field = torch.fft.irfftn(noise / frequency**decay_power, size).flatten()
    field = (field - field.min()) / (field.max() - field.min())
    count = math.ceil(lam * field.numel()) if torch.rand(()) < 0.5 else math.floor(lam * field.numel())
    matte = torch.zeros(field.numel())
    matte[field.argsort(descending=True)[:count]] = 1
    return matte.reshape(1, 1, height, width)


FMIXES = [pytest.param(False, None, id="one_matte"), pytest.param(True, None, id="per_sample")]
FMIXES += sweep("side", SIDES, lambda side: (False,))


@pytest.mark.parametrize(("per_sample", "growth"), FMIXES)
def test_fmix(per_sample: bool, growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    shape = shape_of(growth)
    images = images_of(shape, torch.float32)
    labels = torch.randint(0, 1000, shape[:1], device=SETTINGS.device)
    beta = torch.distributions.Beta(1.0, 1.0)

    def host() -> Any:
        lam = [beta.sample().item() for _ in range(shape[0] if per_sample else 1)]
        matte = torch.cat([host_matte(each, shape[2:]) for each in lam]).to(images.device)
        return matte * images + (1 - matte) * images[torch.randperm(shape[0], device=images.device)], matte, lam

    def ours(**options: Any) -> Any:
        mixed, target = pyrx.fmix(images, labels, per_sample=per_sample, **options)
        return mixed, target.mattes, target.lam

    given = pyrx.fmix(images, labels, per_sample=per_sample, seed=1)[1]
    replay = {"lam": given.lam, "mattes": given.mattes, "pairing": given.pairing}
    contenders = [
        Contender("on the host, with images[randperm]", host),
        Contender("pyrx", ours, "pyrx"),
        Contender("pyrx, mattes given", partial(ours, **replay), "pyrx", "given"),
        Contender("floor", images.clone, "floor", note="a copy of the images into newly allocated memory"),
    ]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        mixed, target = pyrx.fmix(images, labels, per_sample=per_sample, seed=7)
        expected = torch.where(target.mattes, images, images.flip(0))
        area = target.mattes.double().sum((1, 2, 3)) - target.lam[: len(target.mattes)].double() * shape[2] * shape[3]
        return [
            unlike("pyrx", mixed, expected, 0.0),
            expect("pyrx", "pixels between the mattes' areas and lam", area.abs().max().item(), 1),
        ]

    params = {"op": "fmix", "shape": list(shape), "dtype": "float32", "per_sample": per_sample}
    floors = {"pyrx": "floor", "pyrx, mattes given": "floor"}
    run_case(ROW, params, contenders, benchmark, check=check, floors=floors, growth=growth)
