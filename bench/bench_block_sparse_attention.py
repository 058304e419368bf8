"""Block-sparse attention against scaled_dot_product_attention, and FlexAttention with the same blocks."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
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
    finish,
    run_case,
    set_threads,
    size_of,
    sweep,
    with_graphs,
)
from peak_memory import added_peak
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import pyrx

ROW = "block_sparse_attention"
BLOCK = 128
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05)
SHAPE, GPU_SHAPE = (1, 8, 4096, 64), (1, 24, 32768, 128)
LONG, WINDOW = 16384, 1024
LENGTHS = (512, 1024, 2048, 4096, 8192)
MOST_MASKED = 2**27  # elements of (B, H, S, S) that a mask of scaled_dot_product_attention may have
# the largest error of a result, as a share of its largest value
SLACK = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def shape(growth: Growth | None = None) -> tuple[int, ...]:
    whole = (1, 2, 512, 64) if SETTINGS.quick else GPU_SHAPE if SETTINGS.device == "cuda" else SHAPE
    batch, heads, tokens, size = whole
    return batch, heads, size_of(growth, "S", tokens), size


def dtypes() -> tuple[torch.dtype, ...]:
    return (torch.bfloat16,) if SETTINGS.device == "cuda" else (torch.float32, torch.bfloat16)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


def inputs(sizes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(SETTINGS.device).manual_seed(0)
    return [torch.randn(sizes, generator=generator, device=SETTINGS.device).to(dtype) for _ in range(3)]


def random_blocks(sizes: tuple[int, ...], density: float, block: int) -> pyrx.BlockMask:
    """Of every block of queries the same number of blocks of keys, at random, a head its own."""
    _, heads, tokens, _ = sizes
    count = tokens // block
    generator = torch.Generator(SETTINGS.device).manual_seed(1)
    scores = torch.rand(heads, count, count, generator=generator, device=SETTINGS.device)
    kept = scores.argsort(-1).argsort(-1) < max(1, round(density * count))
    return pyrx.BlockMask.from_dense(kept, (tokens, tokens), block)


def masked_peer(sizes: tuple[int, ...], mask: pyrx.BlockMask, step: Callable[..., Any]) -> list[Contender]:
    """scaled_dot_product_attention, where its mask is not too large; `step` takes the form."""
    if SETTINGS.device == "cuda" or sizes[0] * sizes[1] * sizes[2] ** 2 > MOST_MASKED:
        return []
    return [Contender("SDPA, mask", partial(step, partial(F.scaled_dot_product_attention, attn_mask=expanded(mask))))]


def expanded(mask: pyrx.BlockMask) -> Tensor:
    """The blocks as the mask (1, H, S, S) that scaled_dot_product_attention takes."""
    return mask.to_dense().repeat_interleave(mask.block_size[0], 2).repeat_interleave(mask.block_size[1], 3)


@cache
def compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def operations(sizes: tuple[int, ...], mask: pyrx.BlockMask) -> float:
    """Of the forward's two products over the listed blocks."""
    batch, heads, tokens, size = sizes
    return 4.0 * batch * heads * tokens * tokens * size * mask.density().item()


def products_and_bytes(sizes: tuple[int, ...], mask: pyrx.BlockMask, dtype: torch.dtype) -> Callable[[], Any]:
    """The bare products, and a copy of the bytes of query, key, value and result."""
    products = bare_products(operations(sizes, mask), dtype)
    source = torch.zeros((2, *sizes), dtype=dtype, device=SETTINGS.device)
    buffer = torch.empty_like(source)

    def step() -> None:
        products()
        buffer.copy_(source)

    return step


def check_against(reference: Callable[[], Any], slack: float) -> Callable[[dict[str, Contender]], list[dict[str, Any]]]:
    """Each contender's tensors against those of the reference; the floor has none."""

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        expected = reference()
        found = []
        for name, each in able.items():
            if each.kind == "floor":
                continue
            got = each.step()
            for what in expected:
                if got.get(what) is not None:
                    found.append(expect(name, f"error of {what}", error(got[what], expected[what]), slack))
        return found

    return check


def forward(form: Attention, *tensors: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"out": form(*tensors)}


def both(form: Attention, upstream: Tensor, *tensors: Tensor) -> dict[str, Tensor]:
    out = form(*tensors)
    gradients = torch.autograd.grad(out, tensors, upstream)
    return {"out": out.detach(), **dict(zip(("query", "key", "value"), gradients, strict=True))}


def exact(mask: pyrx.BlockMask, step: Callable[..., dict[str, Tensor]], *tensors: Tensor) -> dict[str, Tensor]:
    """The reference's results, a head at a time (it is dense), in float32 for 16-bit inputs."""
    blocks, found = mask.to_dense(), []
    for head in range(tensors[0].shape[1]):
        own = [each[:, head : head + 1].detach().float() for each in tensors]
        *rest, query, key, value = own
        leaves = [each.requires_grad_(bool(rest)) for each in (query, key, value)]
        kept = blocks[:, min(head, blocks.shape[1] - 1)][:, None]
        part = pyrx.BlockMask.from_dense(kept, mask.seq_lengths, mask.block_size)
        found.append(step(partial(pyrx.block_sparse_attention, block_mask=part, backend="reference"), *rest, *leaves))
    return {what: torch.cat([each[what] for each in found], 1) for what in found[0]}


def params_of(op: str, sizes: tuple[int, ...], dtype: torch.dtype, **more: Any) -> dict[str, Any]:
    return {"op": op, "shape": list(sizes), **more, "dtype": name_of(dtype)}


FORWARD = [pytest.param(d, dtype, None, id=f"{d}-{name_of(dtype)}") for d in (1.0, 0.2) for dtype in dtypes()]
FORWARD += sweep("S", LENGTHS, lambda s: (0.2, dtypes()[0]))
FORWARD += sweep("density", sorted(DENSITIES), lambda density: (density, dtypes()[0]))


@pytest.mark.parametrize(("density", "dtype", "growth"), FORWARD)
def test_forward(density: float, dtype: torch.dtype, growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    torch._dynamo.reset()
    compiled_flex.cache_clear()
    sizes = shape(growth)
    tensors = inputs(sizes, dtype)
    masks = {block: random_blocks(sizes, density, block) for block in (BLOCK, 64)}
    on_gpu = SETTINGS.device == "cuda"
    flex = partial(compiled_flex(), block_mask=masks[BLOCK].to_flex())
    contenders = [
        Contender("SDPA, dense", partial(forward, F.scaled_dot_product_attention, *tensors), "other"),
        Contender("FlexAttention, compiled", partial(forward, flex, *tensors)),
        Contender("floor", bare_products(operations(sizes, masks[BLOCK]), dtype), "floor", note="the bare products"),
    ]
    for block, mask in masks.items():
        ours = partial(pyrx.block_sparse_attention, block_mask=mask)
        contenders.append(Contender(f"pyrx, blocks of {block}", partial(forward, ours, *tensors), "pyrx"))
    if density < 1:
        contenders += masked_peer(sizes, masks[BLOCK], lambda form: forward(form, *tensors))
    main = f"pyrx, blocks of {BLOCK}"
    if density == 1:
        targets = [Target(main, "SDPA, dense", 1 / 1.6 if on_gpu else 2.4)]
    else:
        targets = [Target(main, "FlexAttention, compiled", 1.1 if on_gpu else 2.7)]
        if on_gpu:
            targets.append(Target("pyrx, blocks of 64", main, 1 / 1.15))
    contenders, floors = with_graphs(contenders, {main: "floor", "pyrx, blocks of 64": "floor"})

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        found = []
        for block, mask in masks.items():
            # the others attend to the blocks of 128, but for dense attention
            names = [
                name for name in able if f"blocks of {block}" in name or (block == BLOCK and able[name].kind == "peer")
            ]
            one = check_against(partial(exact, mask, forward, *tensors), SLACK[dtype])
            found += one({name: able[name] for name in names})
        return found

    run_case(
        ROW,
        params_of("block_sparse_attention, forward", sizes, dtype, density=density),
        contenders,
        benchmark,
        check=check,
        floors=floors,
        targets=targets,
        growth=growth,
    )


@pytest.mark.parametrize("dtype", dtypes(), ids=name_of)
@pytest.mark.parametrize("block", (BLOCK, 64))
def test_density(block: int, dtype: torch.dtype, benchmark: Any) -> None:
    """Its own time against the share of blocks that attend."""
    set_threads()
    sizes = shape()
    tensors = inputs(sizes, dtype)
    masks = {density: random_blocks(sizes, density, block) for density in DENSITIES}
    contenders = []
    for density, mask in masks.items():
        ours = partial(pyrx.block_sparse_attention, block_mask=mask)
        contenders.append(Contender(f"pyrx, density {density:g}", partial(forward, ours, *tensors), "pyrx"))
        floor = products_and_bytes(sizes, mask, dtype)
        contenders.append(Contender(f"floor, density {density:g}", floor, "floor", note="bare products and a copy"))
    slack = 1.25 if SETTINGS.device == "cuda" else 1.2
    kept = {density: mask.density().item() for density, mask in masks.items()}
    targets = [
        Target(f"pyrx, density {density:g}", "pyrx, density 1", 1 / (slack * kept[density]))
        for density in DENSITIES[1:]
        if SETTINGS.device == "cpu" or density >= 0.1
    ]
    floors = {f"pyrx, density {density:g}": f"floor, density {density:g}" for density in DENSITIES}
    contenders, floors = with_graphs(contenders, floors)

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        found = []
        for density, mask in masks.items():
            names = [name for name in able if name.split(", ")[:2] == ["pyrx", f"density {density:g}"]]
            one = check_against(partial(exact, mask, forward, *tensors), SLACK[dtype])
            found += one({name: able[name] for name in names})
        return found

    params = params_of("block_sparse_attention, time against density", sizes, dtype, block=block)
    run_case(ROW, params, contenders, benchmark, check=check, floors=floors, targets=targets)


BACKWARD = [pytest.param(dtype, None, id=name_of(dtype)) for dtype in dtypes()]
BACKWARD += sweep("S", LENGTHS, lambda s: (dtypes()[0],))


@pytest.mark.parametrize(("dtype", "growth"), BACKWARD)
def test_forward_backward(dtype: torch.dtype, growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    torch._dynamo.reset()
    compiled_flex.cache_clear()
    sizes, density = shape(growth), 0.2
    tensors = [each.requires_grad_() for each in inputs(sizes, dtype)]
    upstream = torch.randn_like(tensors[0])
    mask = random_blocks(sizes, density, BLOCK)
    ours = partial(pyrx.block_sparse_attention, block_mask=mask)
    contenders = [
        Contender("SDPA, dense", partial(both, F.scaled_dot_product_attention, upstream, *tensors), "other"),
        Contender("pyrx", partial(both, ours, upstream, *tensors), "pyrx"),
        Contender("pyrx, dropout", partial(both, partial(ours, dropout_p=0.1, seed=0), upstream, *tensors), "other"),
        # two products forward and five backward
        Contender("floor", bare_products(3.5 * operations(sizes, mask), dtype), "floor", note="the bare products"),
    ]
    if SETTINGS.device == "cuda":
        flex = partial(compiled_flex(), block_mask=mask.to_flex())
        contenders.append(Contender("FlexAttention, compiled", partial(both, flex, upstream, *tensors)))
        targets = [Target("pyrx", "FlexAttention, compiled", 1.1)]
    else:
        contenders += masked_peer(sizes, mask, lambda form: both(form, upstream, *tensors))
        targets = [Target("pyrx", "SDPA, mask", 7.0), Target("pyrx", "SDPA, dense", 6.0)]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        one = check_against(partial(exact, mask, both, upstream, *tensors), SLACK[dtype] * 2)
        return one({name: each for name, each in able.items() if name not in ("SDPA, dense", "pyrx, dropout")})

    params = params_of("block_sparse_attention, forward + backward", sizes, dtype, density=density)
    run_case(ROW, params, contenders, benchmark, check=check, floors={"pyrx": "floor"}, targets=targets, growth=growth)


WINDOWED = [pytest.param(dtypes()[0], None, id=name_of(dtypes()[0]))]
WINDOWED += sweep("S", (1024, 2048, 4096, 8192, 16384), lambda s: (dtypes()[0],))


@pytest.mark.parametrize(("dtype", "growth"), WINDOWED)
def test_window(dtype: torch.dtype, growth: Growth | None, benchmark: Any) -> None:
    """A causal sliding window over a long sequence."""
    set_threads()
    torch._dynamo.reset()
    compiled_flex.cache_clear()
    batch, heads, tokens, size = shape()
    tokens = size_of(growth, "S", tokens if SETTINGS.quick else LONG)
    window = 256 if growth else min(WINDOW, tokens // 4)
    sizes = (batch, heads, tokens, size)
    tensors = inputs(sizes, dtype)
    ours = partial(pyrx.block_sparse_attention, is_causal=True, window=(window, 0))

    def inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k <= window)

    blocks = create_block_mask(inside, None, None, tokens, tokens, device=SETTINGS.device)
    pairs = (window + 1) * tokens - window * (window + 1) / 2
    contenders = [
        Contender(
            "SDPA, causal", partial(forward, partial(F.scaled_dot_product_attention, is_causal=True), *tensors), "other"
        ),
        Contender("FlexAttention, compiled", partial(forward, partial(compiled_flex(), block_mask=blocks), *tensors)),
        Contender("pyrx", partial(forward, ours, *tensors), "pyrx"),
        Contender("floor", bare_products(4.0 * batch * heads * size * pairs, dtype), "floor", note="the bare products"),
    ]
    target = (
        Target("pyrx", "FlexAttention, compiled", 1.1)
        if SETTINGS.device == "cuda"
        else Target("pyrx", "SDPA, causal", 5.0)
    )

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        # a stretch of queries against all keys: the whole mask would be dense
        first, last = tokens // 2, tokens // 2 + 256
        q = torch.arange(first, last, device=SETTINGS.device)[:, None]
        k = torch.arange(tokens, device=SETTINGS.device)
        seen = (k <= q) & (q - k <= window)
        query, key, value = (each.float() for each in tensors)
        expected = F.scaled_dot_product_attention(query[:, :, first:last], key, value, seen)
        return [
            expect(name, "error of out", error(each.step()["out"][:, :, first:last], expected), SLACK[dtype])
            for name, each in able.items()
            if each.kind not in ("other", "floor")
        ]

    params = params_of("block_sparse_attention, causal window", sizes, dtype, window=window)
    run_case(ROW, params, contenders, benchmark, check=check, floors={"pyrx": "floor"}, targets=[target], growth=growth)


MEMORY_SIZES = (4096, 16384)


def memory_step(tokens: int) -> None:
    """Forward and backward over a sliding window, 2 heads of 64."""
    tensors = [each.requires_grad_() for each in inputs((1, 2, tokens, 64), torch.float32)]
    both(partial(pyrx.block_sparse_attention, window=WINDOW), torch.ones_like(tensors[0]), *tensors)


def test_memory() -> None:
    """Peak memory that one step adds, inputs and results included, each in a process of its own."""
    found = []
    for tokens in MEMORY_SIZES:
        command = [sys.executable, str(Path(__file__)), "--memory", str(tokens), "--device", SETTINGS.device]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stderr[-2000:]}"
        found.append({"name": "pyrx", "S": tokens, "bytes": json.loads(done.stdout.splitlines()[-1])})
    # three inputs, the upstream gradient, the result and three gradients
    found += [{"name": "inputs and results", "S": tokens, "bytes": 8 * 2 * tokens * 64 * 4} for tokens in MEMORY_SIZES]
    params = {"op": "block_sparse_attention", "B": 1, "H": 2, "D": 64, "window": WINDOW, "dtype": "float32"}
    finish(ROW, {"kind": "memory", "params": params, "over": "S", "peaks": found})


def main() -> None:
    parser = argparse.ArgumentParser(description="prints the peak memory, in bytes, that one step adds")
    parser.add_argument("--memory", type=int, required=True, help="number of tokens")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    SETTINGS.device = arguments.device
    set_threads()
    memory_step(512)  # loads the libraries and starts the threads
    print(added_peak(partial(memory_step, arguments.memory), arguments.device))


if __name__ == "__main__":
    main()
