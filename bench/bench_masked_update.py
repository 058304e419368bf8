"""Masked AdamW with new masks at each step, against torch's AdamW and a mask by topk, and moving the same bytes."""

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
    size_of,
    sweep,
    with_graphs,
)
from torch import Tensor

import pyrx
from pyrx.optim import MaskedAdamW, MaskedSGD

ROW = "masked_update"
LR, DECAY = 1e-3, 1e-2
CASES = [(torch.float32, 2, 4), (torch.bfloat16, 2, 4), (torch.float32, 1, 16)]


def shape_of(growth: Growth | None) -> tuple[int, int]:
    whole = 512 if SETTINGS.quick else 4096 if SETTINGS.device == "cpu" else 8192
    side = size_of(growth, "side", whole)
    return side, side


def topk_mask(weight: Tensor, n: int, m: int) -> Tensor:
    groups = weight.unflatten(-1, (-1, m)).abs()
    first = groups.topk(n).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, first, True).flatten(-2)


class Training:
    """A weight, its gradient and one optimizer of them."""

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, make: Callable[[list[Tensor]], torch.optim.Optimizer]
    ) -> None:
        generator = torch.Generator(SETTINGS.device).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": SETTINGS.device}
        self.weight = torch.nn.Parameter(torch.randn(shape, **options).to(dtype))
        self.weight.grad = torch.randn(shape, **options).to(dtype)
        self.optimizer = make([self.weight])
        self.mask: Tensor | None = None

    def masked(self) -> Tensor:
        """Of ours, whose step makes it."""
        self.optimizer.step()
        return self.optimizer.state[self.weight]["mask"]

    def step_and(self, mask: Callable[[Tensor], Tensor] | None) -> Tensor | None:
        self.optimizer.step()
        self.mask = None if mask is None else mask(self.weight.detach())
        return self.mask


def steps() -> list[Any]:
    cases = CASES[: 1 if SETTINGS.quick else None]
    found = [pytest.param(dtype, n, m, None, id=f"{str(dtype)[6:]}-{n}-{m}") for dtype, n, m in cases]
    return found + sweep("side", (256, 512, 1024, 2048), lambda side: (torch.float32, 2, 4))


@pytest.mark.parametrize(("dtype", "n", "m", "growth"), steps())
def test_masked_adamw(dtype: torch.dtype, n: int, m: int, growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    torch._dynamo.reset()
    shape = shape_of(growth)
    train = partial(Training, shape, dtype)
    on_gpu = SETTINGS.device == "cuda"
    adamw = partial(torch.optim.AdamW, lr=LR, weight_decay=DECAY, capturable=on_gpu)
    eager = partial(topk_mask, n=n, m=m)
    compiled = torch.compile(eager, dynamic=False, fullgraph=True)
    foreach, fused = partial(adamw, foreach=True), partial(adamw, fused=True)
    ours = {
        f"pyrx, {rule}": train(partial(MaskedAdamW, lr=LR, weight_decay=DECAY, n=n, m=m, rule=rule))
        for rule in ("hold", "sr-ste")
    }
    kept = train(partial(MaskedAdamW, lr=LR, weight_decay=DECAY, n=n, m=m, refresh_every=2**30))
    peers = {
        "AdamW (foreach) + topk, scatter": (train(foreach), eager),
        "AdamW (foreach) + compiled topk, scatter": (train(foreach), compiled),
        "AdamW (fused) + compiled topk, scatter": (train(fused), compiled),
    }
    alone = {"AdamW (foreach)": train(foreach), "AdamW (fused)": train(fused)}
    contenders = [Contender(name, partial(each.step_and, mask)) for name, (each, mask) in peers.items()]
    contenders += [Contender(name, partial(each.step_and, None), group="no new mask") for name, each in alone.items()]
    contenders += [Contender(name, each.masked, "pyrx") for name, each in ours.items()]
    contenders.append(Contender("pyrx, mask kept", kept.masked, "pyrx", "no new mask"))
    # read weight, gradient, moments and bits, write all but the gradient
    contenders += moved_bytes(int((7 * kept.weight.element_size() + 0.25) * kept.weight.numel()))
    floors = {each.name: "floor, buffers" for each in contenders if each.kind == "pyrx"}
    contenders, floors = with_graphs(contenders, floors)

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        found = []
        for name, each in ours.items():
            mask = each.masked()
            expected = pyrx.nm_mask(each.weight, n, m, packed=True, backend="reference")
            found.append(expect(name, "bytes of the mask unlike the reference's", (mask != expected).sum().item(), 0))
        for name, (each, mask) in peers.items():
            if name in able:
                each.step_and(mask)
                assert each.mask is not None
                wrong = each.mask.unflatten(-1, (-1, m)).sum(-1) != n
                found.append(expect(name, "groups that keep another number", wrong.sum().item(), 0))
        dense = train(partial(MaskedAdamW, lr=LR, weight_decay=DECAY, n=n, m=m, rule="dense"))
        against = train(foreach)
        for _ in range(3):
            dense.masked()
            against.step_and(None)
        difference = (dense.weight.detach().float() - against.weight.detach().float()).abs().max().item()
        # torch rounds bfloat16 after every operation
        found.append(
            expect("pyrx, hold", "largest difference from AdamW", difference, 1e-5 if dtype == torch.float32 else 0.1)
        )
        return found

    params = {"op": "MaskedAdamW.step", "shape": list(shape), "dtype": str(dtype)[6:], "n:m": f"{n}:{m}"}
    against = "AdamW (foreach) + compiled topk, scatter"
    targets = [Target(name, against, 1.5 if on_gpu else 3.0) for name in ours]
    run_case(ROW, params, contenders, benchmark, check=check, floors=floors, targets=targets, growth=growth)


def test_masked_sgd(benchmark: Any) -> None:
    set_threads()
    torch._dynamo.reset()
    dtype, n, m = torch.float32, 2, 4
    sgd = partial(torch.optim.SGD, lr=LR, momentum=0.9, weight_decay=DECAY)
    mask = torch.compile(partial(topk_mask, n=n, m=m), dynamic=False, fullgraph=True)
    train = partial(Training, shape_of(None), dtype)
    ours = train(partial(MaskedSGD, lr=LR, momentum=0.9, weight_decay=DECAY, n=n, m=m))
    contenders = [
        Contender(f"SGD ({kind}) + compiled topk, scatter", partial(train(make).step_and, mask))
        for kind, make in (("foreach", partial(sgd, foreach=True)), ("fused", partial(sgd, fused=True)))
    ]
    contenders += [Contender("pyrx", ours.masked, "pyrx"), *moved_bytes(int(20.25 * ours.weight.numel()))]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        expected = pyrx.nm_mask(ours.weight, n, m, packed=True, backend="reference")
        wrong = (ours.optimizer.state[ours.weight]["mask"] != expected).sum().item()
        return [expect("pyrx", "bytes of the mask unlike the reference's", wrong, 0)]

    params = {"op": "MaskedSGD.step", "shape": list(shape_of(None)), "dtype": "float32", "n:m": f"{n}:{m}"}
    run_case(ROW, params, contenders, benchmark, check=check, floors={"pyrx": "floor, buffers"})
