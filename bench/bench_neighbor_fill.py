"""The neighbour fill of layer masking against the paper's multi-pass sweeps, and against moving the same bytes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import SETTINGS, Contender, Growth, Target, error, expect, run_case, set_threads, sweep
from torch import Tensor

import pyrx

ROW = "neighbor_fill"
# a ResNet's stem, its first blocks and one of the middle; images, channels, side, iterations
CASES = ((64, 3, 224, 7), (64, 64, 112, 3), (64, 64, 112, 7), (64, 64, 56, 3), (64, 256, 14, 3))
MASKS = ("patches", "places")


def sweeps(input: Tensor, mask: Tensor, ones: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The formula as published: two convolutions and four passes an iteration."""
    x, channels = input * mask, input.shape[1]
    with torch.no_grad():
        for _ in range(iterations):
            sums = F.conv2d(x, ones.expand(channels, -1, -1, -1), padding=1, groups=channels)
            counts = F.conv2d(mask, ones, padding=1)
            x = x + (1 - mask) * (sums / (counts + 1e-5))
            mask = (mask + counts).clip(0, 1)
    return x, mask


def shifts(input: Tensor, mask: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The same with additions of shifted maps, which a compiler can fuse."""

    def window(x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1))
        rows = padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]
        return rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :]

    x = input * mask
    for _ in range(iterations):
        counts = window(mask)
        x = x + (1 - mask) * (window(x) / (counts + 1e-5))
        mask = (mask + counts).clip(0, 1)
    return x, mask


def make_mask(images: int, side: int, kind: str) -> Tensor:
    """Half of an image: a 7x7 grid of patches, as occlusion studies use, or single places."""
    generator = torch.Generator().manual_seed(0)
    if kind == "places":
        return torch.rand(images, 1, side, side, generator=generator) < 0.5
    coarse = torch.rand(images, 1, 7, 7, generator=generator) < 0.5
    return coarse.repeat_interleave(side // 7, 2).repeat_interleave(side // 7, 3)


def case_list() -> list[Any]:
    dtypes = (torch.float32,) if SETTINGS.device == "cpu" else (torch.float32, torch.bfloat16)
    found = [(case, kind, dtype) for case in CASES for kind in MASKS for dtype in dtypes]
    if SETTINGS.quick:
        found = [((8, 64, 56, 3), "patches", dtypes[0])]
    elif SETTINGS.device == "cpu":  # an eighth of the images: the sweeps take seconds
        found = [((n // 8, *rest), kind, dtype) for (n, *rest), kind, dtype in found]
    whole = [
        pytest.param(*each, None, id=f"{'x'.join(map(str, each[0]))}-{each[1]}-{str(each[2])[6:]}") for each in found
    ]
    whole += sweep("side", (14, 28, 56, 112, 224), lambda side: ((8, 64, side, 3), "patches", dtypes[0]))
    return whole + sweep("k", (1, 2, 4, 8), lambda k: ((8, 64, 56, k), "patches", dtypes[0]))


@pytest.mark.parametrize(("case", "kind", "dtype", "growth"), case_list())
def test_neighbor_fill(
    case: tuple[int, int, int, int], kind: str, dtype: torch.dtype, growth: Growth | None, benchmark: Any
) -> None:
    set_threads()
    torch._dynamo.reset()
    images, channels, side, iterations = case
    device = SETTINGS.device
    x = torch.randn(images, channels, side, side, device=device).to(dtype)
    last = x.to(memory_format=torch.channels_last)
    mask = make_mask(images, side, kind).to(device)
    weights, ones = mask.to(dtype), torch.ones(1, 1, 3, 3, dtype=dtype, device=device)
    compiled = torch.compile(shifts, dynamic=False, fullgraph=True)
    buffer = torch.empty_like(x)
    contenders = [
        Contender("eager sweeps", partial(sweeps, x, weights, ones, iterations), note="two convolutions an iteration"),
        Contender("compiled sweeps", partial(compiled, x, weights, iterations), note="shifted sums, fused"),
        Contender("pyrx", partial(pyrx.neighbor_fill, x, mask, iterations), "pyrx"),
        Contender("pyrx channels_last", partial(pyrx.neighbor_fill, last, mask, iterations), "pyrx"),
        Contender("floor, new memory", x.clone, "floor", note="one copy into newly allocated memory"),
        Contender(
            "floor, buffers", lambda: buffer.copy_(x), "floor", note="one copy into memory that is there already"
        ),
    ]
    if device == "cuda":
        triton = partial(pyrx.neighbor_fill, x, mask, iterations, backend="triton")
        contenders.append(Contender("pyrx triton", triton, "pyrx"))
    ours = [each.name for each in contenders if each.kind == "pyrx"]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        exact, grown = shifts(x.double(), mask.double(), iterations)
        slack = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
        found = []
        for name, each in able.items():
            if each.kind != "floor":
                filled, after = each.step()
                found.append(expect(name, "filled maps", error(filled, exact), slack))
                found.append(expect(name, "places unlike the formula", float((after != grown).sum().item()), 0))
        return found

    run_case(
        ROW,
        {"op": "neighbor_fill", "N": images, "C": channels, "side": side, "k": iterations, "mask": kind}
        | {"dtype": str(dtype)[6:]},
        contenders,
        benchmark,
        check=check,
        floors=dict.fromkeys(ours, "floor, new memory"),
        targets=[Target("pyrx", "best peer", 2.0)],
        growth=growth,
    )
