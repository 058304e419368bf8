"""Products with compressed N:M weights against the dense layer, and compression against sorting each group."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness import SETTINGS, Contender, Growth, Target, error, expect, run_case, set_threads, size_of, sweep
from torch import Tensor

import pyrx
from pyrx.reference.dropout import pack_bits, unpack_bits
from pyrx.reference.nm_sparsity import nm_mask

ROW = "nm_packed"
F = torch.nn.functional
RATIOS = [(2, 4), (1, 4), (1, 8), (2, 16)]
BATCHES = [1, 8, 64, 512]
DTYPES = [torch.float32, torch.bfloat16]


def name_of(value: Any) -> str:
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def weight_of(dtype: torch.dtype, growth: Growth | None) -> Tensor:
    side = size_of(growth, "side", 2048 if growth else 4096 if SETTINGS.device == "cpu" else 8192)
    return torch.randn(side, side, device=SETTINGS.device).to(dtype)


def mask_of(weight: Tensor, n: int, m: int) -> Tensor:
    return nm_mask(weight, n, m, 1, True, False)


def csr_contender(dense: Tensor, x: Tensor) -> list[Contender]:
    """MKL's sparse product, which has float32 alone."""
    if dense.dtype != torch.float32 or SETTINGS.device != "cpu":
        return []
    sparse, turned = dense.to_sparse_csr(), x.t()
    return [Contender("torch.sparse, CSR", lambda: torch.sparse.mm(sparse, turned).t(), note="of (C, B), untransposed")]


def semi_structured_contender(dense: Tensor, x: Tensor, n: int, m: int) -> list[Contender]:
    if SETTINGS.device == "cpu" or (n, m) != (2, 4) or dense.dtype == torch.float32:
        return []
    sparse = torch.sparse.to_sparse_semi_structured(dense)
    return [Contender("torch's semi-structured", lambda: F.linear(x, sparse))]


SIDES = (512, 1024, 2048, 4096)  # of the sweeps


def products() -> list[Any]:
    few = 1 if SETTINGS.quick else None
    found = [
        pytest.param(dtype, ratio, batch, None, id=f"{name_of(dtype)}-{name_of(ratio)}-{batch}")
        for dtype in DTYPES[:few]
        for ratio in RATIOS[:few]
        for batch in BATCHES[:few]
    ]
    found += sweep("side", SIDES, lambda side: (torch.float32, (2, 4), 64))
    return found + sweep("rows", (1, 4, 16, 64, 256, 1024), lambda rows: (torch.float32, (2, 4), rows))


@pytest.mark.parametrize(("dtype", "ratio", "batch", "growth"), products())
@torch.no_grad()
def test_linear(dtype: torch.dtype, ratio: tuple[int, int], batch: int, growth: Growth | None, benchmark: Any) -> None:
    """(batch, C) by a weight (C, C)."""
    set_threads()
    n, m = ratio
    weight = weight_of(dtype, growth)
    size = len(weight)
    packed = pyrx.nm_compress(weight, n, m, mask=mask_of(weight, n, m))
    dense, x = packed.to_dense(), torch.randn(batch, size, device=SETTINGS.device).to(dtype)
    part = x[:, : packed.values.shape[1]].contiguous()
    contenders = [
        Contender("pyrx", lambda: pyrx.nm_linear(x, packed), "pyrx"),
        Contender("F.linear, dense", lambda: F.linear(x, dense)),
        *csr_contender(dense, x),
        *semi_structured_contender(dense, x, n, m),
        Contender("floor", lambda: F.linear(part, packed.values), "floor", note="a dense product with as many weights"),
    ]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        exact = F.linear(x.double(), dense.double())
        slack = 1e-5 if dtype == torch.float32 else 0.01
        return [
            expect(name, "error against float64", error(each.step(), exact), slack)
            for name, each in able.items()
            if each.kind != "floor"
        ]

    # a processor that multiplies 16-bit floats itself is as fast at them as at twice as many weights
    wins = dtype == torch.float32 or batch == 1
    params = {"op": "nm_linear", "ratio": f"{n}:{m}", "batch": batch, "size": size, "dtype": name_of(dtype)}
    run_case(
        ROW,
        params,
        contenders,
        benchmark,
        check=check,
        floors={"pyrx": "floor"},
        targets=[Target("pyrx", "best peer", 1.0)] if wins and SETTINGS.device == "cpu" else [],
        growth=growth,
    )


def sorted_groups(weight: Tensor, mask: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Kept positions of each group by a sort, values by a gather: of full groups."""
    size = (weight.shape[-1] // m, m)
    indices = mask.unflatten(-1, size).to(torch.uint8).topk(n, dim=-1).indices.sort(dim=-1).values
    return weight.unflatten(-1, size).gather(-1, indices).flatten(-2), indices.to(torch.uint8).flatten(-2)


TRIPS = [pytest.param(each, None, id=name_of(each)) for each in RATIOS[: 1 if SETTINGS.quick else None]]
TRIPS += sweep("side", SIDES, lambda side: ((2, 4),))


@pytest.mark.parametrize(("ratio", "growth"), TRIPS)
def test_round_trip(ratio: tuple[int, int], growth: Growth | None, benchmark: Any) -> None:
    """A (C, C) weight compressed under its mask's bits, and back."""
    set_threads()
    n, m = ratio
    weight = weight_of(torch.float32, growth)
    bits = pack_bits(mask_of(weight, n, m))
    mask = unpack_bits(bits, weight.shape[-1])
    packed = pyrx.nm_compress(weight, n, m, mask=bits)
    backend = SETTINGS.device
    kernels = torch.ops.pyrx
    columns = torch.arange(packed.indices.shape[1], device=backend) // n * m + packed.indices.long()

    def scattered() -> tuple[Tensor, ...]:
        return (torch.zeros_like(weight).scatter_(-1, columns, packed.values),)

    contenders = [
        Contender("pyrx, compress", lambda: kernels.nm_compress(weight, bits, n, m), "pyrx", "compress"),
        Contender("topk, sort, gather", partial(sorted_groups, weight, mask, n, m), group="compress"),
        Contender("pyrx, to_dense", lambda: (packed.to_dense(),), "pyrx", "to_dense"),
        Contender("zeros, scatter", scattered, group="to_dense", note="positions of the row given, as int64"),
        Contender("floor", weight.clone, "floor", note="a copy of the weight into newly allocated memory"),
    ]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        expected = {"compress": (packed.values, packed.indices), "to_dense": (torch.where(mask, weight, 0),)}
        return [
            expect(name, "elements that differ", (one != other).sum().item(), 0)
            for name, each in able.items()
            if each.kind != "floor"
            for one, other in zip(each.step(), expected[each.group], strict=True)
        ]

    params = {"op": "nm_compress", "ratio": f"{n}:{m}", "size": len(weight), "dtype": "float32"}
    floors = {"pyrx, compress": "floor", "pyrx, to_dense": "floor"}
    run_case(ROW, params, contenders, benchmark, check=check, floors=floors, growth=growth)
