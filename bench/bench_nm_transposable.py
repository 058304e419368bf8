"""Transposable N:M masks against an exhaustive search, a sorted greedy one, and a copy of the bytes that must move."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from harness import SETTINGS, Contender, Growth, Target, expect, moved_bytes, run_case, set_threads, size_of, sweep
from torch import Tensor

import pyrx

ROW = "nm_transposable"
SIDE = {"cpu": 1024, "cuda": 2048} if SETTINGS.quick else {"cpu": 4096, "cuda": 8192}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RATIOS = ((2, 4), (4, 8), (2, 16))  # of the greedy mask


def tiles_of(scores: Tensor, m: int) -> Tensor:
    """(T, m * m)."""
    rows, columns = scores.shape
    return scores.reshape(rows // m, m, columns // m, m).transpose(1, 2).reshape(-1, m * m)


def matrix_of(tiles: Tensor, rows: int, m: int) -> Tensor:
    return tiles.reshape(rows // m, -1, m, m).transpose(1, 2).reshape(rows, -1)


def patterns() -> Tensor:
    """(90, 16): the 4 x 4 masks with two in every row and column."""
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=16))).reshape(-1, 4, 4)
    fits = ((every.sum(1) == 2) & (every.sum(2) == 2)).all(1)
    return every[fits].reshape(-1, 16)


def exhaustive(scores: Tensor, every: Tensor, kept: Tensor) -> Tensor:
    """2by4-pretrain's: one product with every pattern, the largest, its pattern."""
    best = (tiles_of(scores.abs(), 4) @ every.t()).argmax(1)
    return matrix_of(kept[best], len(scores), 4)


def exhaustive_gathered(scores: Tensor, every: Tensor, kept: Tensor, rows: int = 256) -> Tensor:
    """The same, some rows at a time, so that the products stay in the caches."""
    return torch.cat([exhaustive(part, every, kept) for part in scores.split(rows)])


def sorted_greedy(scores: Tensor, n: int, m: int) -> Tensor:
    """All tiles in step: the elements of each in descending order, one after another."""
    tiles = tiles_of(scores.abs(), m)
    order = tiles.argsort(1, descending=True)
    taken_rows, taken_columns = (torch.zeros(len(tiles), m, dtype=torch.int8, device=scores.device) for _ in range(2))
    kept = torch.zeros_like(tiles, dtype=torch.bool)
    for place in order.split(1, dim=1):
        row, column = place // m, place % m
        fits = (taken_rows.gather(1, row) < n) & (taken_columns.gather(1, column) < n)
        taken_rows.scatter_add_(1, row, fits.to(torch.int8))
        taken_columns.scatter_add_(1, column, fits.to(torch.int8))
        kept.scatter_(1, place, fits)
    return matrix_of(kept, len(scores), m)


def mass(scores: Tensor, mask: Tensor) -> float:
    return float((scores.double().abs() * mask).sum())


def over(mask: Tensor, n: int, m: int) -> float:
    """By how much a row or a column of a tile has more than n."""
    kept = tiles_of(mask, m).reshape(-1, m, m)
    return float(max(int(kept.sum(1).max()), int(kept.sum(2).max())) - n)


def run(
    params: dict[str, Any],
    scores: Tensor,
    n: int,
    m: int,
    contenders: list[Contender],
    target: float,
    growth: Growth | None,
    benchmark: Any,
) -> None:
    method = params["method"]
    ours = partial(pyrx.nm_transposable_mask, scores, n, m, method=method)
    bits = partial(ours, packed=True)
    first = scores[:512]
    expected = pyrx.nm_transposable_mask(first, n, m, method=method, backend="reference")

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        found, most = [], mass(scores, ours())
        for name, each in able.items():
            if each.kind == "peer":
                mask = each.step()
                found.append(expect(name, "more than n kept", over(mask, n, m), 0))
                # the same mask but for ties and rounding
                found.append(expect(name, "kept mass beside pyrx", abs(mass(scores, mask) / most - 1), 1e-3))
        wrong = (ours()[:512] != expected).sum() + (bits()[:512] != packed(expected)).sum()
        return [*found, expect("pyrx", "elements unlike the reference", float(wrong), 0)]

    floors = moved_bytes(scores.nbytes + ours().nbytes)  # the scores read, the mask written
    run_case(
        ROW,
        params,
        [*contenders, Contender("pyrx", ours, "pyrx"), Contender("pyrx, bits", bits, "pyrx"), *floors],
        benchmark,
        check=check,
        floors={"pyrx": "floor, new memory", "pyrx, bits": "floor, new memory"},
        targets=[Target("pyrx", "best peer", target)],
        growth=growth,
    )


def packed(mask: Tensor) -> Tensor:
    return (mask.unflatten(1, (-1, 8)).to(torch.uint8) << torch.arange(8, device=mask.device)).sum(2).to(torch.uint8)


SIDES = (256, 512, 1024, 2048)  # of the sweeps


def scores_of(dtype: str, growth: Growth | None) -> Tensor:
    side = size_of(growth, "side", SIDE[SETTINGS.device])
    return torch.randn(side, side, device=SETTINGS.device).to(DTYPES[dtype])


EXACT = [pytest.param(dtype, None, id=dtype) for dtype in list(DTYPES)[: 1 if SETTINGS.quick else None]]
EXACT += sweep("side", SIDES, lambda side: ("float32",))


@pytest.mark.parametrize(("dtype", "growth"), EXACT)
def test_exact(dtype: str, growth: Growth | None, benchmark: Any) -> None:
    """2:4, the best of 90 patterns."""
    set_threads()
    torch._dynamo.reset()
    scores = scores_of(dtype, growth)
    every = patterns().to(scores)
    search = partial(exhaustive, scores, every, every.bool())
    parts = partial(exhaustive_gathered, scores, every, every.bool())
    contenders = [
        Contender("exhaustive, eager", search),
        Contender("exhaustive, by rows, eager", parts),
        Contender("exhaustive, compiled", torch.compile(search, dynamic=False, fullgraph=True)),
    ]
    params = {"op": "nm_transposable_mask", "method": "exact", "shape": list(scores.shape), "dtype": dtype, "nm": "2:4"}
    run(params, scores, 2, 4, contenders, 20.0, growth, benchmark)


GREEDY = [pytest.param(n, m, None, id=f"{n}-{m}") for n, m in RATIOS[: 1 if SETTINGS.quick else None]]
GREEDY += sweep("side", SIDES, lambda side: (2, 4))


@pytest.mark.parametrize(("n", "m", "growth"), GREEDY)
def test_greedy(n: int, m: int, growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    scores = scores_of("float32", growth)
    contenders = [Contender("sorted, eager", partial(sorted_greedy, scores, n, m))]
    params = {
        "op": "nm_transposable_mask", "method": "greedy", "shape": list(scores.shape), "dtype": "float32",
        "nm": f"{n}:{m}",
    }  # fmt: skip
    run(params, scores, n, m, contenders, 20.0, growth, benchmark)
