"""The two-label loss of CutMix and mixup, forward and backward, against F.cross_entropy and moving the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import SETTINGS, Contender, Growth, Target, error, expect, graphed, run_case, set_threads, sweep
from torch import Tensor

import pyrx

ROW = "mixed_cross_entropy"
CASES = (
    (1024, 1000, torch.float32),
    (1024, 1000, torch.bfloat16),
    (256, 1000, torch.bfloat16),
    (4096, 100, torch.float32),
)
# against F.cross_entropy with the same probabilities at hand
TARGETS = {"eager probabilities": 2.0, "compiled probabilities": 1.2}


def case_list() -> list[Any]:
    cases = CASES[:1] if SETTINGS.quick else CASES
    found = [pytest.param(n, c, dtype, None, id=f"{n}x{c}-{str(dtype)[6:]}") for n, c, dtype in cases]
    found += sweep("rows", (64, 256, 1024, 4096, 16384), lambda rows: (rows, 1000, torch.float32))
    return found + sweep("classes", (10, 100, 1000, 10000), lambda classes: (1024, classes, torch.float32))


def both_ways(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(logits)
    return value.detach(), torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize(("rows", "classes", "dtype", "growth"), case_list())
def test_mixed_cross_entropy(
    rows: int, classes: int, dtype: torch.dtype, growth: Growth | None, benchmark: Any
) -> None:
    set_threads()
    torch._dynamo.reset()
    device = SETTINGS.device
    logits = (3 * torch.randn(rows, classes, device=device)).to(dtype).requires_grad_()
    a, b = (torch.randint(classes, (rows,), device=device) for _ in range(2))
    target = pyrx.MixedTarget(a=a, b=b, lam=torch.rand(rows, device=device))

    def probabilities() -> Tensor:
        lam = target.lam[:, None]
        return (lam * F.one_hot(a, classes) + (1 - lam) * F.one_hot(b, classes)).to(dtype)

    given = probabilities()

    def dense(z: Tensor) -> Tensor:
        return F.cross_entropy(z, given)

    def dense_built(z: Tensor) -> Tensor:
        return F.cross_entropy(z, probabilities())

    def two(z: Tensor) -> Tensor:
        each = [F.cross_entropy(z, ids, reduction="none") for ids in (a, b)]
        return (target.lam * each[0] + (1 - target.lam) * each[1]).mean()

    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "eager probabilities": dense,
        "eager probabilities, built": dense_built,
        "eager two losses": two,
        "compiled probabilities": torch.compile(dense, dynamic=False, fullgraph=True),
        "compiled probabilities, built": torch.compile(dense_built, dynamic=False, fullgraph=True),
        "compiled two losses": torch.compile(two, dynamic=False, fullgraph=True),
        "reference": partial(pyrx.mixed_cross_entropy, target=target, backend="reference"),
        "pyrx": partial(pyrx.mixed_cross_entropy, target=target),
    }
    if growth:  # the forms that build the probabilities are never the best ones
        forms = {name: form for name, form in forms.items() if not name.endswith("built")}
    kinds = {"reference": "other", "pyrx": "pyrx"}
    contenders = [
        Contender(name, partial(both_ways, form, logits), kinds.get(name, "peer")) for name, form in forms.items()
    ]
    source = logits.detach()
    buffer = torch.empty_like(source)
    floors = [
        Contender("floor, new memory", source.clone, "floor", note="logits read, as many bytes written to new memory"),
        Contender("floor, buffers", lambda: buffer.copy_(source), "floor", note="the same, memory there already"),
    ]
    targets = [Target("pyrx", name, ratio) for name, ratio in TARGETS.items()]
    if device == "cuda":
        contenders += [
            Contender(
                f"{each.name} (graph)", graphed(each.step), each.kind, "graph", "the device's time, as a CUDA graph"
            )
            for each in contenders
            if each.kind != "other"
        ]
        floors.append(Contender("floor (graph)", graphed(floors[1].step), "floor", note="a copy as a CUDA graph"))
        targets += [Target("pyrx (graph)", f"{name} (graph)", ratio) for name, ratio in TARGETS.items()]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        leaf = source.double().requires_grad_()
        lam = target.lam.double()
        each = [F.cross_entropy(leaf, ids, reduction="none") for ids in (a, b)]
        exact = (lam * each[0] + (1 - lam) * each[1]).mean()
        (gradient,) = torch.autograd.grad(exact, leaf)
        slack = 1e-5 if dtype == torch.float32 else 3e-2  # PyTorch multiplies and adds in bfloat16
        found = []
        for name in able:
            if not name.startswith("floor"):
                loss, own = able[name].step()
                found.append(expect(name, "loss", error(loss, exact.detach()), slack))
                found.append(expect(name, "gradient", error(own, gradient), slack))
        return found

    run_case(
        ROW,
        {"op": "mixed_cross_entropy", "N": rows, "C": classes, "dtype": str(dtype)[6:]},
        [*contenders, *floors],
        benchmark,
        check=check,
        floors={"pyrx": "floor, new memory", "pyrx (graph)": "floor (graph)"},
        targets=targets,
        growth=growth,
    )
