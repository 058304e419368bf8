"""Noise weighed by a mask, forward and with the mask's gradient, against PyTorch's randn and moving the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from harness import SETTINGS, Contender, Target, error, expect, run_case, set_threads
from torch import Tensor

import pyrx

ROW = "noise_mask"
SHAPE = (64, 3, 224, 224)
DTYPES = (torch.float32, torch.bfloat16)


def eager(images: Tensor, mask: Tensor) -> Tensor:
    return images + mask * torch.randn_like(images)


def both_ways(function: Callable[[Tensor, Tensor], Tensor], images: Tensor, mask: Tensor, grad: Tensor) -> Any:
    out = function(images, mask)
    return out.detach(), torch.autograd.grad(out, mask, grad)[0]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("dtype", DTYPES[: 1 if SETTINGS.quick else None], ids=lambda each: str(each)[6:])
def test_noise_mask(dtype: torch.dtype, backward: bool, benchmark: Any) -> None:
    set_threads()
    torch._dynamo.reset()
    device = SETTINGS.device
    images = torch.randn(SHAPE, device=device).to(dtype)
    mask = torch.rand(SHAPE[0], 1, *SHAPE[2:], device=device).to(dtype).requires_grad_(backward)
    grad, buffer = torch.randn(SHAPE, device=device).to(dtype), torch.empty_like(images)
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
        {"op": "noise_mask", "shape": list(SHAPE), "dtype": str(dtype)[6:], "backward": backward},
        [*contenders, floor, buffers],
        benchmark,
        check=check,
        floors={"pyrx": "floor, new memory"},
        targets=[Target("pyrx", "best peer", 1.0)],
    )
