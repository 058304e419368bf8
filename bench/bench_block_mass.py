"""The search pass (attention mass of blocks from a cached log-sum-exp) and recall, against the dense forward that they
are to cost little beside, and against what users write in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import (
    SETTINGS,
    Contender,
    Growth,
    Target,
    bare_products,
    error,
    expect,
    run_case,
    set_threads,
    sweep,
    with_graphs,
)
from torch import Tensor

import pyrx
from pyrx._attention import Logits
from pyrx.ops.block_mass import block_mass, block_recall

ROW = "block_mass"
CHECKED = 512  # queries of one head that are compared with the reference


def cases() -> list[Any]:
    """(B, H, S, D), dtype, block, causal."""
    if SETTINGS.device == "cuda":
        shape, dtypes, sizes = (1, 24, 32768, 128), (torch.bfloat16,), ((32768, 128), (32768, 64))
    else:
        shape, dtypes, sizes = (1, 8, 4096, 64), (torch.float32, torch.bfloat16), ((4096, 64), (4096, 128))
    found = [((*shape[:2], *size), dtype, 128, False) for dtype in dtypes for size in sizes]
    found += [(shape, dtypes[0], 64, False), (shape, dtypes[0], 128, True)]
    if SETTINGS.quick:
        found = [((*shape[:2], shape[2] // 4, shape[3]), dtypes[0], 128, False)]
    ids = [f"{s[2]}_{s[3]}-{str(dtype)[6:]}-{block}{'-causal' if causal else ''}" for s, dtype, block, causal in found]
    whole = [pytest.param(*case, None, id=name) for case, name in zip(found, ids, strict=True)]
    batch, heads, tokens, size = found[0][0]
    lengths = [tokens // part for part in (8, 4, 2, 1)] + [tokens * 2] * (not SETTINGS.quick)
    return whole + sweep("S", lengths, lambda s: ((batch, heads, s, size), dtypes[0], 128, False))


def a_head_at_a_time(step: Callable[..., Tensor], query: Tensor, key: Tensor, *rows: Tensor) -> Tensor:
    """A head's logits in memory, not those of all."""
    heads = [step(query[:, h], key[:, h], *(each[:, h] for each in rows)) for h in range(query.shape[1])]
    return torch.stack(heads, 1)


def hidden(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if causal:
        logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -torch.inf)
    return logits


def eager_mass(query: Tensor, key: Tensor, lse: Tensor, block: int, causal: bool) -> Tensor:
    weights = torch.exp(hidden(query, key, causal) - lse[..., None])
    return weights.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).sum((-1, -3), dtype=torch.float32)


def eager_recall(query: Tensor, key: Tensor, blocks: Tensor, block: int, causal: bool) -> Tensor:
    probabilities = (
        torch.softmax(hidden(query, key, causal), -1).unflatten(-1, (-1, block)).sum(-1, dtype=torch.float32)
    )
    return (probabilities * blocks.repeat_interleave(block, -2)).sum(-1)


@pytest.mark.parametrize(("shape", "dtype", "block", "causal", "growth"), cases())
@pytest.mark.parametrize("op", ["mass", "recall"])
def test_pass(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    block: int,
    causal: bool,
    growth: Growth | None,
    benchmark: Any,
) -> None:
    set_threads()
    torch._dynamo.reset()
    query, key, value = (torch.randn(shape, device=SETTINGS.device).to(dtype) for _ in range(3))
    logits = Logits(-1, 0 if causal else -1, None, None, None, None, None, shape[3] ** -0.5, 0.0)
    dense = partial(pyrx.block_sparse_attention, query, key, value, is_causal=causal)
    count = shape[2] // block
    blocks = torch.rand(1, shape[1], count, count, device=SETTINGS.device) < 0.2
    if op == "mass":
        rows, function, eager = dense(return_lse=True)[1], block_mass, eager_mass
    else:
        rows, function, eager = blocks, block_recall, eager_recall
    ours = partial(function, query, key, rows, (block, block), logits)
    by_heads = partial(a_head_at_a_time, partial(eager, block=block, causal=causal), query, key)
    compiled = partial(
        a_head_at_a_time,
        torch.compile(partial(eager, block=block, causal=causal), dynamic=False, fullgraph=True),
        query,
        key,
    )
    operations = shape[0] * shape[1] * float(shape[2]) ** 2 * shape[3] * (0.5 if causal else 1)
    contenders = [
        Contender("eager, a head at a time", partial(by_heads, rows)),
        Contender("compiled, a head at a time", partial(compiled, rows)),
        Contender("dense forward", dense, "other", note="pyrx.block_sparse_attention of every block"),
        Contender("SDPA", partial(F.scaled_dot_product_attention, query, key, value, is_causal=causal), "other"),
        Contender("pyrx", ours, "pyrx"),
        Contender("floor", bare_products(2 * operations, dtype), "floor", note="the bare products"),
    ]
    contenders, floors = with_graphs(contenders, {"pyrx": "floor"})

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        own, last = rows[:, :1, :CHECKED], CHECKED // block
        if op == "recall":
            own = rows[:, :1, :last]
        expected = function(query[:, :1, :CHECKED], key[:, :1], own, (block, block), logits, "reference")
        found = []
        for name, each in able.items():
            if each.kind not in ("pyrx", "peer"):
                continue
            got = each.step()[:, :1, : expected.shape[2]]
            # PyTorch's logits are of the operands' dtype
            limit = 2e-5 if each.kind == "pyrx" or dtype == torch.float32 else 5e-2
            found.append(expect(name, "error beside the reference", error(got, expected), limit))
        return found

    params = {"op": f"block_{op}", "shape": list(shape), "dtype": str(dtype)[6:], "block": block, "causal": causal}
    targets = [Target("pyrx", "dense forward", 1 / 0.6)] if op == "mass" else []
    run_case(ROW, params, contenders, benchmark, check=check, floors=floors, targets=targets, growth=growth)
