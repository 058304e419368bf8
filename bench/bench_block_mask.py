"""Block masks of the blocks of highest score and of dense blocks against FlexAttention's, and a copy of the bytes."""

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
    expect,
    moved_bytes,
    run_case,
    set_threads,
    sweep,
    with_graphs,
)
from torch import Tensor
from torch.nn.attention import flex_attention as flex

import pyrx
from pyrx.ops.block_mask import select_blocks

ROW = "block_mask"
BLOCK, DENSITY = 128, 0.2
SHAPES = ((1, 8, 32, 32), (1, 24, 512, 512))
# elements of (B, H, Sq, Sk) that create_block_mask evaluates its rule for; eager it keeps them, in 8 bytes and more
MOST_EAGER, MOST_COMPILED = 2**28, 2**29 if SETTINGS.device == "cpu" else 2**37

Shape = tuple[int, int, int, int]
each_shape = pytest.mark.parametrize(
    ("shape", "growth"),
    [pytest.param(each, None, id="x".join(map(str, each))) for each in SHAPES[: 1 if SETTINGS.quick else None]]
    + sweep("blocks a side", (16, 32, 64, 128, 256), lambda side: ((1, 8, side, side),)),
)


def lengths_of(shape: Shape) -> tuple[int, int]:
    return shape[2] * BLOCK, shape[3] * BLOCK


def top_blocks(scores: Tensor, count: int) -> Tensor:
    chosen = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def looked_up(blocks: Tensor, shape: Shape, create: Callable[..., flex.BlockMask]) -> flex.BlockMask:
    """By create_block_mask, of a rule that looks up the block of every element."""

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return blocks[batch, head, query // BLOCK, key // BLOCK]

    return create(rule, *shape[:2], *lengths_of(shape), device=SETTINGS.device, BLOCK_SIZE=BLOCK)


def listed(blocks: Tensor) -> flex.BlockMask:
    """By FlexAttention's own conversion, which create_block_mask ends with: sorts of rows and of columns."""
    return flex._create_sparse_block_from_block_mask((blocks, None), flex.noop_mask, lengths_of(blocks.shape))


def blocks_in(mask: pyrx.BlockMask | flex.BlockMask) -> Tensor:
    return (mask if isinstance(mask, pyrx.BlockMask) else pyrx.BlockMask.from_flex(mask, partial="whole")).to_dense()


def unlike(name: str, got: Tensor, expected: Tensor) -> dict[str, Any]:
    return expect(name, "blocks that differ from the reference", (got != expected).sum().item(), 0)


def bytes_of_lists(shape: Shape) -> int:
    batch, heads, rows, columns = shape
    return 4 * batch * heads * (rows + columns + 2 * rows * columns)


@each_shape
def test_top_blocks(shape: Shape, growth: Growth | None, benchmark: Any) -> None:
    """The top fifth of every row as a mask; scores (B, H, NQ, NK) to lists both ways."""
    set_threads()
    torch._dynamo.reset()
    scores = torch.softmax(3 * torch.randn(shape, device=SETTINGS.device), -1)
    count = max(1, round(DENSITY * shape[3]))
    counts = torch.full((1, 1, 1), count, dtype=torch.int32, device=SETTINGS.device)
    elements = scores.numel() * BLOCK * BLOCK
    compiled = torch.compile(flex.create_block_mask, dynamic=False)
    peers: dict[str, Callable[[], Any]] = {}
    if elements <= MOST_EAGER:
        peers["topk, create_block_mask"] = lambda: looked_up(top_blocks(scores, count), shape, flex.create_block_mask)
    if elements <= MOST_COMPILED:
        peers["topk, compiled create_block_mask"] = lambda: looked_up(top_blocks(scores, count), shape, compiled)
    peers["topk, flex lists"] = lambda: listed(top_blocks(scores, count))
    contenders = [Contender(name, step) for name, step in peers.items()]
    contenders += [
        Contender("pyrx", lambda: pyrx.BlockMask.from_dense(select_blocks(scores, counts), block_size=BLOCK), "pyrx"),
        Contender(
            "pyrx, by mass",
            lambda: pyrx.BlockMask.from_dense(select_blocks(scores, mass=0.9), block_size=BLOCK),
            "pyrx",
        ),
        # scores, the blocks written and read, the lists
        *moved_bytes(6 * scores.numel() + bytes_of_lists(shape)),
    ]
    floors = {"pyrx": "floor, new memory", "pyrx, by mass": "floor, new memory"}
    contenders, floors = with_graphs(contenders, floors)

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        by_count = select_blocks(scores, counts, backend="reference")
        by_mass = select_blocks(scores, mass=0.9, backend="reference")
        return [
            unlike(name, blocks_in(each.step()), by_mass if "mass" in name else by_count)
            for name, each in able.items()
            if each.kind != "floor"
        ]

    targets = [Target("pyrx", name, 10) for name in peers if name.endswith("create_block_mask")]
    params = {"op": "BlockMask of the top blocks", "shape": list(shape), "block_size": BLOCK, "density": DENSITY}
    run_case(ROW, params, contenders, benchmark, check=check, floors=floors, targets=targets, growth=growth)


@each_shape
def test_from_dense(shape: Shape, growth: Growth | None, benchmark: Any) -> None:
    """Lists both ways of bool blocks (B, H, NQ, NK)."""
    set_threads()
    torch._dynamo.reset()
    blocks = torch.rand(shape, device=SETTINGS.device) < DENSITY
    contenders = [
        Contender("flex lists", partial(listed, blocks)),
        Contender("compiled flex lists", partial(torch.compile(listed, dynamic=False), blocks)),
        Contender("pyrx", partial(pyrx.BlockMask.from_dense, blocks, block_size=BLOCK), "pyrx"),
        *moved_bytes(blocks.numel() + bytes_of_lists(shape)),
    ]
    contenders, floors = with_graphs(contenders, {"pyrx": "floor, new memory"})

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        return [unlike(name, blocks_in(each.step()), blocks) for name, each in able.items() if each.kind != "floor"]

    params = {"op": "from_dense", "shape": list(shape), "block_size": BLOCK, "density": DENSITY}
    run_case(ROW, params, contenders, benchmark, check=check, floors=floors, growth=growth)
