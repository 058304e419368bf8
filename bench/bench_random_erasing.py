"""Random erasing of a batch, out of place and in place, against timm's loop over images and moving the same bytes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness import SETTINGS, Contender, Growth, Target, expect, run_case, same_mean, set_threads, size_of, sweep
from torch import Tensor

import pyrx

ROW = "random_erasing"
SAMPLES = 64
MODES = ("const", "rand", "pixel")


def cases() -> list[Any]:
    found = [
        pytest.param(mode, inplace, None, id=f"{mode}-{'in' if inplace else 'out of'} place")
        for mode in MODES[: 1 if SETTINGS.quick else None]
        for inplace in (False, True)
    ]
    return found + sweep("side", (32, 64, 112, 224, 448), lambda side: ("pixel", False))


@pytest.mark.parametrize(("mode", "inplace", "growth"), cases())
def test_random_erasing(mode: str, inplace: bool, growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    timm = pytest.importorskip("timm.data.random_erasing")
    device = SETTINGS.device
    side = size_of(growth, "side", 224)
    images = torch.randn(SAMPLES, 3, side, side, device=device)
    buffer = torch.empty_like(images)
    peer = timm.RandomErasing(0.5, min_aspect=0.3, max_aspect=3.3, mode=mode, device=device)

    def timms(x: Tensor) -> Tensor:
        return peer(x if inplace else x.clone())

    ours = partial(pyrx.random_erasing, mode=mode, inplace=inplace)
    contenders = [Contender("timm", partial(timms, images)), Contender("pyrx", partial(ours, images), "pyrx")]
    if inplace:
        # as many bytes as an image in two loses to a box of the mean size
        erased = images.numel() * 0.5 * (0.02 + 1 / 3) / 2
        source = torch.zeros(int(erased), device=device)
        floor = Contender(
            "floor", lambda: buffer.view(-1)[: len(source)].copy_(source), "floor", note="the boxes' bytes"
        )
    else:
        floor = Contender("floor", images.clone, "floor", note="a copy into newly allocated memory")

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        ones = torch.ones_like(images)
        share = {
            name: [(run(ones.clone()) != 1).double().mean().item() for _ in range(12)]
            for name, run in (("timm", timms), ("pyrx", ours))
        }
        fixed = pyrx.random_erasing(images, mode=mode, seed=7)
        wrong = (fixed != pyrx.random_erasing(images, mode=mode, seed=7, backend="reference")).sum().item()
        return [
            expect("pyrx", "elements unlike the reference", float(wrong), 0),
            same_mean("timm", "erased share minus pyrx's", share["timm"], share["pyrx"], slack=0.05),
        ]

    run_case(
        ROW,
        {"op": "random_erasing", "shape": list(images.shape), "dtype": "float32", "mode": mode, "inplace": inplace},
        [*contenders, floor],
        benchmark,
        check=check,
        floors={"pyrx": "floor"},
        targets=[Target("pyrx", "best peer", 1.0)],
        growth=growth,
    )
