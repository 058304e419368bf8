"""Noise weighed by a mask, forward and with the mask's gradient, against PyTorch's randn and moving the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from harness import SETTINGS, Contender, Growth, Target, error, expect, run_case, set_threads, size_of, sweep
from torch import Tensor

import pyrx

ROW = "noise_mask"
SAMPLES = 64
DTYPES = (torch.float32, torch.bfloat16)


def eager(images: Tensor, mask: Tensor) -> Tensor:
    return images + mask * torch.randn_like(images)


def both_ways(function: Callable[[Tensor, Tensor], Tensor], images: Tensor, mask: Tensor, grad: Tensor) -> Any:
    out = function(images, mask)
    return out.detach(), torch.autograd.grad(out, mask, grad)[0]


def cases() -> list[Any]:
    found = [
        pytest.param(dtype, backward, None, id=f"{str(dtype)[6:]}-forward{' and backward' if backward else ''}")
        for dtype in DTYPES[: 1 if SETTINGS.quick else None]
        for backward in (False, True)
    ]
    return found + sweep("side", (32, 64, 112, 224, 448), lambda side: (torch.float32, True))


@pytest.mark.parametrize(("dtype", "backward", "growth"), cases())
def test_noise_mask(dtype: torch.dtype, backward: bool, growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    torch._dynamo.reset()
    device = SETTINGS.device
    side = size_of(growth, "side", 224)
    images = torch.randn(SAMPLES, 3, side, side, device=device).to(dtype)
    mask = torch.rand(SAMPLES, 1, side, side, device=device).to(dtype).requires_grad_(backward)
    grad, buffer = torch.randn_like(images), torch.empty_like(images)
    forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "eager": eager,
        "compiled": torch.compile(eager, dynamic=False, fullgraph=True),
        "pyrx": pyrx.noise_mask,
    }
    contenders = [
        Contender(
            name,
            partial(both_ways, form, images, mask, grad) if backward else partial(form, images, mask),
            "pyrx" if name == "pyrx" else "peer",
        )
        for name, form in forms.items()
    ]
    floor = Contender("floor, new memory", images.clone, "floor", note="a copy into newly allocated memory")
    buffers = Contender(
        "floor, buffers", lambda: buffer.copy_(images), "floor", note="a copy into memory that is there"
    )

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        found = []
        for name in forms:
            if name not in able:
                continue
            out = able[name].step()
            noise = (out[0] if backward else out).detach().float() - images.float()
            weight = mask.detach().float().expand_as(noise)
            share = (noise.pow(2).sum() / weight.pow(2).sum()).item()
            found.append(expect(name, "variance of the noise, less 1", abs(share - 1), 1e-2))
        fixed = pyrx.noise_mask(images, mask, seed=7).detach()
        truth = pyrx.noise_mask(images, mask, seed=7, backend="reference").detach()
        return [*found, expect("pyrx", "error against the reference", error(fixed, truth), 0)]

    run_case(
        ROW,
        {"op": "noise_mask", "shape": list(images.shape), "dtype": str(dtype)[6:], "backward": backward},
        [*contenders, floor, buffers],
        benchmark,
        check=check,
        floors={"pyrx": "floor, new memory"},
        targets=[Target("pyrx", "best peer", 1.0)],
        growth=growth,
    )
