"""Dropout, the copies of multi-sample dropout, and bare masks, against PyTorch's and against moving the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import SETTINGS, Contender, Growth, Target, error, expect, run_case, same_mean, set_threads, sweep
from torch import Tensor

import pyrx

ROW = "dropout"
P = 0.5
SHAPES = ((4096, 1024), (256, 3, 64, 64))
COPIES = ((128, 2048, 8), (256, 512, 32))
DTYPES = (torch.float32, torch.bfloat16)


def features(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Without a zero among them, so that a zero in the output is a dropped element."""
    return (torch.rand(shape, device=SETTINGS.device) + 0.5).to(dtype)


def case_list(sizes: Sequence[tuple[int, ...]]) -> list[Any]:
    found = [(size, dtype) for size in sizes for dtype in DTYPES]
    if SETTINGS.quick:
        found = found[:1]
    return [pytest.param(s, t, None, id=f"{'x'.join(map(str, s))}-{str(t)[6:]}") for s, t in found]


def never_slower(names: Sequence[str]) -> list[Target]:
    return [Target(name, "best peer", 1.0) for name in names] if SETTINGS.device == "cuda" else []


def both_ways(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    out = function(x)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


def moved_bytes(elements: int, dtype: torch.dtype) -> list[Contender]:
    """Two copies, forward and backward, each reading and writing `elements` values."""
    source = torch.randn(elements, device=SETTINGS.device).to(dtype)
    buffers = [torch.empty_like(source) for _ in range(2)]

    def into_buffers() -> None:
        for each in buffers:
            each.copy_(source)

    def into_new_memory() -> tuple[Tensor, Tensor]:
        return source.clone(), source.clone()

    return [
        Contender("floor, new memory", into_new_memory, "floor", note="two copies into newly allocated memory"),
        Contender("floor, buffers", into_buffers, "floor", note="two copies into memory that is there already"),
    ]


def check_dropped(name: str, x: Tensor, out: Tensor, grad_in: Tensor, grad: Tensor) -> list[dict[str, Any]]:
    """Zero, or scaled by 1 / (1 - P); the gradient through the same mask; as many kept as P says."""
    kept = out != 0
    scale = 1 / (1 - P)
    slack = 1e-6 if x.dtype == torch.float32 else 1e-2
    share = kept.double().mean().item()
    return [
        expect(name, "output against scaled input", error(out, torch.where(kept, x * scale, 0)), slack),
        expect(name, "gradient against the same mask", error(grad_in, torch.where(kept, grad * scale, 0)), slack),
        expect(name, "share of kept elements", abs(share - (1 - P)), 6 * (P * (1 - P) / out.numel()) ** 0.5),
    ]


ROWS = (16, 128, 1024, 8192)  # of 1024 elements
BY_ELEMENTS = sweep("elements", [1024 * rows for rows in ROWS], lambda n: ((n // 1024, 1024), torch.float32))


@pytest.mark.parametrize(("shape", "dtype", "growth"), [*case_list(SHAPES), *BY_ELEMENTS])
def test_dropout(shape: tuple[int, ...], dtype: torch.dtype, growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    torch._dynamo.reset()
    x = features(shape, dtype).requires_grad_()
    grad = torch.randn(shape, device=SETTINGS.device).to(dtype)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "eager": partial(F.dropout, p=P),
        "compiled": torch.compile(lambda value: F.dropout(value, P), dynamic=False, fullgraph=True),
        "pyrx": partial(pyrx.dropout, p=P),
    }
    contenders = [
        Contender(name, partial(both_ways, form, x, grad), "pyrx" if name == "pyrx" else "peer")
        for name, form in forms.items()
    ]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        found = []
        for name in forms:
            if name in able:
                found += check_dropped(name, x, *able[name].step(), grad)
        fixed = pyrx.dropout(x, P, seed=7)
        mask = pyrx.dropout_mask(shape, P, 7, device=SETTINGS.device, backend="reference")
        wrong = (fixed != 0) != mask
        return [*found, expect("pyrx", "elements masked unlike the reference", float(wrong.sum().item()), 0)]

    run_case(
        ROW,
        {"op": "dropout", "shape": list(shape), "dtype": str(dtype)[6:], "p": P},
        [*contenders, *moved_bytes(x.numel(), dtype)],
        benchmark,
        check=check,
        floors={"pyrx": "floor, new memory"},
        targets=never_slower(["pyrx"]),
        growth=growth,
    )


BY_SAMPLES = sweep("M", (1, 4, 16, 64), lambda samples: ((128, 2048, samples), torch.float32))


@pytest.mark.parametrize(("size", "dtype", "growth"), [*case_list(COPIES), *BY_SAMPLES])
def test_copies(size: tuple[int, int, int], dtype: torch.dtype, growth: Growth | None, benchmark: Any) -> None:
    """(M, B, D) dropped copies, and the fold of their gradients."""
    set_threads()
    torch._dynamo.reset()
    b, d, samples = size
    x = features((b, d), dtype).requires_grad_()
    grad = torch.randn(samples, b, d, device=SETTINGS.device).to(dtype)

    def stacked(value: Tensor) -> Tensor:
        return torch.stack([F.dropout(value, P) for _ in range(samples)])

    def expanded(value: Tensor) -> Tensor:
        return F.dropout(value.expand(samples, *value.shape), P)

    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "eager stack": stacked,
        "eager expand": expanded,
        "compiled expand": torch.compile(expanded, dynamic=False, fullgraph=True),
        "pyrx independent": partial(pyrx.multi_sample_dropout, num_samples=samples, p=P),
        "pyrx antithetic": partial(pyrx.multi_sample_dropout, num_samples=samples, p=P, sampling="antithetic"),
    }
    contenders = [
        Contender(name, partial(both_ways, form, x, grad), "pyrx" if name.startswith("pyrx") else "peer")
        for name, form in forms.items()
    ]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        found = []
        for name in forms:
            if name not in able:
                continue
            out, folded = able[name].step()
            expected = torch.where(out != 0, grad.float() / (1 - P), 0).sum(0)
            slack = 1e-5 if dtype == torch.float32 else 3e-2  # PyTorch folds bfloat16 in bfloat16
            found.append(expect(name, "folded gradient", error(folded, expected), slack))
            share = (out != 0).double().mean().item()
            found.append(expect(name, "share of kept elements", abs(share - (1 - P)), 6 * 0.5 / x.numel() ** 0.5))
        fixed = pyrx.multi_sample_dropout(x, samples, P, seed=7)
        truth = pyrx.multi_sample_dropout(x, samples, P, seed=7, backend="reference")
        wrong = float(((fixed != 0) != (truth != 0)).sum().item())
        return [*found, expect("pyrx independent", "elements masked unlike the reference", wrong, 0)]

    # forward reads 1 and writes M copies, backward the reverse: as two copies of (M + 1) / 2
    floors = moved_bytes((samples + 1) * x.numel() // 2, dtype)
    ours = [name for name in forms if name.startswith("pyrx")]
    run_case(
        ROW,
        {"op": "multi_sample_dropout", "B": b, "D": d, "M": samples, "dtype": str(dtype)[6:], "p": P},
        [*contenders, *floors],
        benchmark,
        check=check,
        floors=dict.fromkeys(ours, "floor, new memory"),
        targets=never_slower(ours),
        growth=growth,
    )


MASKS = [
    pytest.param(shape, None, id="x".join(map(str, shape))) for shape in SHAPES[: 1 if SETTINGS.quick else None]
] + sweep("elements", [1024 * rows for rows in ROWS], lambda n: ((n // 1024, 1024),))


@pytest.mark.parametrize(("shape", "growth"), MASKS)
def test_mask(shape: tuple[int, ...], growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    device = SETTINGS.device
    seed = torch.full((), 7, dtype=torch.int64, device=device)
    buffer = torch.empty(shape, dtype=torch.bool, device=device)
    contenders = [
        Contender("torch.rand >= p", lambda: torch.rand(shape, device=device) >= P),
        Contender("bernoulli_", lambda: torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - P)),
        Contender("pyrx", lambda: pyrx.dropout_mask(shape, P, seed), "pyrx"),
        Contender("pyrx packed", lambda: pyrx.dropout_mask(shape, P, seed, packed=True), "pyrx", note="bits"),
        Contender("floor, new memory", lambda: torch.empty_like(buffer).fill_(True), "floor", note="bytes written"),
        Contender("floor, buffers", lambda: buffer.fill_(True), "floor", note="bytes written, memory there already"),
    ]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        truth = pyrx.dropout_mask(shape, P, seed, backend="reference")
        packed = pyrx.dropout_mask(shape, P, seed, packed=True, backend="reference")
        wrong = float((able["pyrx"].step() != truth).sum().item())
        wrong_bytes = float((able["pyrx packed"].step() != packed).sum().item())
        kept = [[able[name].step().double().mean().item() for _ in range(4)] for name in ("torch.rand >= p", "pyrx")]
        return [
            expect("pyrx", "elements unlike the reference", wrong, 0),
            expect("pyrx packed", "bytes unlike the reference", wrong_bytes, 0),
            same_mean("torch.rand >= p", "share of kept elements minus pyrx's", *kept, slack=3e-3),
        ]

    run_case(
        ROW,
        {"op": "dropout_mask", "shape": list(shape), "p": P},
        contenders,
        benchmark,
        check=check,
        floors=dict.fromkeys(("pyrx", "pyrx packed"), "floor, new memory"),
        targets=never_slower(["pyrx", "pyrx packed"]),
        growth=growth,
    )
