"""Means of blocks of tokens against eager and compiled PyTorch and one read; searches against attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from harness import (
    SETTINGS,
    Contender,
    Growth,
    Target,
    error,
    expect,
    run_case,
    set_threads,
    size_of,
    sweep,
    with_graphs,
)
from torch import Tensor

import pyrx
from pyrx import search
from pyrx.ops.block_pool import block_pool

ROW = "block_pool"
BLOCK = 64
DTYPES = (torch.float32, torch.bfloat16)


LENGTHS = (512, 1024, 2048, 4096, 8192) if SETTINGS.device == "cpu" else (2048, 4096, 8192, 16384, 32768)


def shape(growth: Growth | None) -> tuple[int, int, int, int]:
    batch, heads, tokens, size = (1, 8, 4096, 64) if SETTINGS.device == "cpu" else (1, 24, 32768, 128)
    return batch, heads, size_of(growth, "S", tokens), size


def eager(x: Tensor) -> tuple[Tensor, Tensor]:
    """As a user writes it, for lengths that blocks divide."""
    blocks = x.float().unflatten(2, (-1, BLOCK))
    directions = torch.nn.functional.normalize(blocks, dim=-1)
    return blocks.mean(3), directions.mean(3).square().sum(-1)


def pools() -> list[Any]:
    found = [(dtype, layout) for dtype in DTYPES[: 1 if SETTINGS.quick else None] for layout in ("BHSD", "BSHD")]
    whole = [pytest.param(dtype, layout, None, id=f"{str(dtype)[6:]}-{layout}") for dtype, layout in found]
    return whole + sweep("S", LENGTHS, lambda s: (DTYPES[0], "BHSD"))


@pytest.mark.parametrize(("dtype", "layout", "growth"), pools())
def test_block_pool(dtype: torch.dtype, layout: str, growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    torch._dynamo.reset()
    batch, heads, tokens, size = shape(growth)
    device = SETTINGS.device
    if layout == "BHSD":
        x = torch.randn(batch, heads, tokens, size, device=device).to(dtype)
    else:
        x = torch.randn(batch, tokens, heads, size, device=device).to(dtype).transpose(1, 2)
    contenders = [
        Contender("eager", partial(eager, x)),
        Contender("compiled", partial(torch.compile(eager, dynamic=False, fullgraph=True), x)),
        Contender("pyrx", partial(block_pool, x, BLOCK), "pyrx"),
        Contender("one read", x.sum, "floor", note="the sum of the tokens"),
    ]
    contenders, floors = with_graphs(contenders, {"pyrx": "one read"})

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        truth = block_pool(x, BLOCK, backend="reference")
        return [
            expect(name, f"error of {part}", error(one, other), 1e-5)
            for name in ("eager", "compiled", "pyrx")
            if name in able
            for part, one, other in zip(("means", "similarity"), able[name].step(), truth, strict=True)
        ]

    run_case(
        ROW,
        {"op": "block_pool", "shape": list(x.shape), "dtype": str(dtype)[6:], "layout": layout},
        contenders,
        benchmark,
        check=check,
        floors=floors,
        targets=[Target("pyrx", "best peer", 1.0), Target("pyrx", "floor", 2.0)],
        growth=growth,
    )


@pytest.mark.parametrize("growth", [None, *sweep("S", LENGTHS)])
def test_searches(growth: Growth | None, benchmark: Any) -> None:
    """Each search beside the dense attention that its mask is to save."""
    set_threads()
    dtype = torch.float32 if SETTINGS.device == "cpu" else torch.bfloat16
    query, key, value = (torch.randn(shape(growth), device=SETTINGS.device).to(dtype) for _ in range(3))
    _, lse = pyrx.block_sparse_attention(query, key, value, return_lse=True)
    searches: dict[str, Callable[[], pyrx.BlockMask]] = {
        "lse_cached": lambda: search.lse_cached(query, key, lse),
        "pooled": lambda: search.pooled(query, key, similarity_threshold=-0.1),
        "vertical_slash": lambda: search.vertical_slash(query, key, vertical=64, slash=512),
        "topk_blocks": lambda: search.topk_blocks(query, key),
    }
    contenders = [Contender(name, step, "pyrx") for name, step in searches.items()]
    dense = partial(torch.nn.functional.scaled_dot_product_attention, query, key, value)
    contenders.append(Contender("dense attention", dense, "other"))
    contenders.append(
        Contender("dense attention, pyrx", partial(pyrx.block_sparse_attention, query, key, value), "other")
    )

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        found = []
        for name in searches:
            mask = able[name].step()
            counted = mask.kv_counts.sum().item() / mask.kv_counts.numel() / mask.q_counts.shape[-1]
            found.append(expect(name, "density, less its own count", abs(mask.density().item() - counted), 1e-6))
        return found

    run_case(
        ROW,
        {"op": "search", "shape": list(query.shape), "dtype": str(dtype)[6:]},
        contenders,
        benchmark,
        check=check,
        targets=[Target("lse_cached", "dense attention, pyrx", 1.67)],
        growth=growth,
    )
