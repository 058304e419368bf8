"""Masks for masked image modelling against what its papers' code does, and against writing the results alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from harness import SETTINGS, Contender, Growth, Target, expect, run_case, set_threads, sweep
from torch import Tensor

import pyrx

ROW = "patch_mask"
SHAPES = ((256, 14, 14), (64, 32, 32))
MASK_RATIO, HARD_RATIO = 0.75, 0.5
BEIT_RATIO, MIN_BLOCK, MIN_ASPECT = 0.4, 16, 0.3

Shape = tuple[int, int, int]
each_shape = pytest.mark.parametrize(
    ("shape", "growth"),
    [pytest.param(each, None, id="x".join(map(str, each))) for each in SHAPES[: 1 if SETTINGS.quick else None]]
    + sweep("patches", (49, 196, 784, 3136), lambda patches: ((64, math.isqrt(patches), math.isqrt(patches)),)),
)


def indices_of(keys: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """MAE's: the smallest keys are kept, in the order of the keys."""
    order = keys.argsort(dim=1)
    restore = order.argsort(dim=1)
    mask = torch.ones_like(keys)
    mask[:, :keep] = 0
    return mask.gather(1, restore), order[:, :keep], restore


def mae(samples: int, size: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    return indices_of(torch.rand(samples, size, device=SETTINGS.device), keep)


def hard_batched(losses: Tensor, keep: int, hard: int) -> tuple[Tensor, Tensor, Tensor]:
    hardest = losses.argsort(dim=1, descending=True)[:, :hard]
    return indices_of(torch.rand_like(losses).scatter(1, hardest, math.inf), keep)


def hard_loop(losses: Tensor, keep: int, hard: int) -> Tensor:
    """Sample by sample on the host."""
    samples, size = losses.shape
    mask = torch.zeros(samples, size)
    order = losses.argsort(dim=1, descending=True)
    for i in range(samples):
        hardest, rest = order[i, :hard].cpu(), order[i, hard:].cpu()
        drawn = rest[torch.randperm(size - hard)[: size - keep - hard]]
        mask[i, torch.cat([hardest, drawn])] = 1
    return mask.to(losses.device)


def block_loop(shape: Shape, masked: int) -> Tensor:
    """BEiT's generator: rectangles on the host, sample by sample."""
    samples, height, width = shape
    random = np.random.default_rng()
    masks = np.zeros(shape, dtype=bool)
    for mask in masks:
        left, tries = masked, 0
        while left > 0 and tries < 10:
            tries += 1
            area = random.uniform(min(MIN_BLOCK, left), max(MIN_BLOCK, left))
            aspect = math.exp(random.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h > height or w > width:
                continue
            y, x = random.integers(0, height - h + 1), random.integers(0, width - w + 1)
            fresh = h * w - int(mask[y : y + h, x : x + w].sum())
            if 0 < fresh <= left:
                mask[y : y + h, x : x + w] = True
                left, tries = left - fresh, 0
    return torch.from_numpy(masks).to(SETTINGS.device)


def written(*results: Tensor) -> list[Contender]:
    """The bytes of the results and nothing else."""
    buffers = [torch.empty_like(each) for each in results]

    def into_new_memory() -> list[Tensor]:
        return [torch.empty_like(each).fill_(1) for each in buffers]

    def into_buffers() -> None:
        for each in buffers:
            each.fill_(1)

    return [
        Contender("floor, new memory", into_new_memory, "floor", note="the results' bytes written"),
        Contender("floor, buffers", into_buffers, "floor", note="the results' bytes written, memory there already"),
    ]


def mask_of(result: Any) -> Tensor:
    return (result if isinstance(result, Tensor) else result[0]).flatten(1).bool()


def run(
    params: dict[str, Any],
    peers: dict[str, Callable[[], Any]],
    ours: Callable[..., Any],
    masked: int,
    exact: bool,
    growth: Growth | None,
    benchmark: Any,
) -> None:
    """`ours` takes seed and backend; without `exact` a peer may mask fewer patches than asked for."""
    contenders = [Contender(name, step) for name, step in peers.items()]
    contenders += [Contender("pyrx", ours, "pyrx")]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        found = []
        for name, each in able.items():
            if each.kind == "floor":
                continue
            counts = mask_of(each.step()).sum(1)
            far = (counts - masked).abs() if exact or each.kind == "pyrx" else (counts - masked).clamp(min=0)
            found.append(expect(name, "masked patches beside those asked for", float(far.max().item()), 0))
        truth, got = (mask_of(ours(seed=7, backend=backend)) for backend in ("reference", None))
        return [*found, expect("pyrx", "patches unlike the reference", float((truth != got).sum().item()), 0)]

    results = ours()
    run_case(
        ROW,
        params,
        [*contenders, *written(*(results if isinstance(results, tuple) else (results,)))],
        benchmark,
        check=check,
        floors={"pyrx": "floor, new memory"},
        targets=[Target("pyrx", "best peer", 1.0)] if SETTINGS.device == "cuda" else [],
        growth=growth,
    )


@each_shape
def test_random(shape: Shape, growth: Growth | None, benchmark: Any) -> None:
    """Mask, ids_keep and ids_restore, as MAE's random_masking makes them."""
    set_threads()
    torch._dynamo.reset()
    samples, size = shape[0], shape[1] * shape[2]
    keep = int(size * (1 - MASK_RATIO))
    eager = partial(mae, samples, size, keep)
    peers = {"MAE, eager": eager, "MAE, compiled": torch.compile(eager, dynamic=False, fullgraph=True)}
    ours = partial(pyrx.patch_mask, (samples, size), MASK_RATIO, return_indices=True, device=SETTINGS.device)
    params = {"op": "patch_mask", "method": "random", "shape": [samples, size], "mask_ratio": MASK_RATIO}
    run(params, peers, ours, size - keep, True, growth, benchmark)


@each_shape
def test_hard(shape: Shape, growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    torch._dynamo.reset()
    samples, size = shape[0], shape[1] * shape[2]
    keep = int(size * (1 - MASK_RATIO))
    hard = int((size - keep) * HARD_RATIO)
    losses = torch.randn(samples, size, device=SETTINGS.device)
    batched = partial(hard_batched, losses, keep, hard)
    peers = {
        "loop over samples": partial(hard_loop, losses, keep, hard),
        "batched, eager": batched,
        "batched, compiled": torch.compile(batched, dynamic=False, fullgraph=True),
    }
    ours = partial(
        pyrx.patch_mask, (samples, size), MASK_RATIO, method="hard", losses=losses, hard_ratio=HARD_RATIO,
        return_indices=True,
    )  # fmt: skip
    params = {"op": "patch_mask", "method": "hard", "shape": [samples, size], "mask_ratio": MASK_RATIO}
    run(params, peers, ours, size - keep, True, growth, benchmark)


@each_shape
def test_block(shape: Shape, growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    masked = round(shape[1] * shape[2] * BEIT_RATIO)
    peers = {"loop over samples": partial(block_loop, shape, masked)}
    ours = partial(pyrx.patch_mask, shape, num_masked=masked, method="block", device=SETTINGS.device)
    params = {"op": "patch_mask", "method": "block", "shape": list(shape), "num_masked": masked}
    run(params, peers, ours, masked, False, growth, benchmark)
