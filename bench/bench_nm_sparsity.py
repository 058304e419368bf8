"""N:M masks against the ways they are computed elsewhere, and SR-STE against NM-sparsity's autograd function."""

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

ROW = "nm_sparsity"
RATIOS = ((2, 4), (1, 4), (2, 8), (4, 8), (1, 16), (2, 32))
STRENGTH = 2e-4


SIDES = (256, 512, 1024, 2048)  # of the sweeps


def shape_of(growth: Growth | None) -> tuple[int, int]:
    side = size_of(growth, "side", 1024 if growth else 8192 if SETTINGS.device == "cuda" else 4096)
    return side, side


def dtypes() -> tuple[torch.dtype, ...]:
    return (torch.bfloat16,) if SETTINGS.device == "cuda" else (torch.float32, torch.bfloat16)


# The ways masks are made elsewhere, along the last dimension.


def by_topk(weight: Tensor, n: int, m: int) -> Tensor:
    kept = weight.abs().view(-1, m).topk(n, dim=1, sorted=False).indices
    groups = torch.zeros(weight.numel() // m, m, dtype=torch.bool, device=weight.device)
    return groups.scatter_(1, kept, True).view_as(weight)


def by_argsort(weight: Tensor, n: int, m: int) -> Tensor:
    """As NM-sparsity does: the m - n smallest are cleared in a mask of the weight's dtype."""
    groups = weight.abs().view(-1, m)
    dropped = groups.argsort(dim=1)[:, : m - n]
    return torch.ones_like(groups).scatter_(1, dropped, 0).view_as(weight)


def by_ranks(weight: Tensor, n: int, m: int) -> Tensor:
    """Each element compared with each other of its group, which a compiler fuses into one pass."""
    groups = weight.abs().view(-1, m)
    lower = torch.arange(m, device=weight.device)
    above = groups[:, None, :] > groups[:, :, None]
    tied = (groups[:, None, :] == groups[:, :, None]) & (lower[None, :] < lower[:, None])
    return ((above | tied).sum(2) < n).view_as(weight)


def weight_norm_sparsifier(weight: Tensor, n: int, m: int) -> Callable[[], Tensor]:
    from torch.ao.pruning import WeightNormSparsifier

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    model = torch.nn.Sequential(layer)
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, m), zeros_per_block=m - n)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])

    def step() -> Tensor:
        sparsifier.step()
        return model[0].parametrizations.weight[0].mask

    return step


def kept_mass(weight: Tensor, mask: Tensor, n: int, m: int) -> tuple[float, float]:
    """How many groups keep another number than n, and the magnitude that is kept."""
    kept = mask.bool()
    wrong = (kept.view(-1, m).sum(1) != n).sum().item()
    return wrong, torch.where(kept, weight, 0).double().abs().sum().item()


def ratio_cases() -> list[Any]:
    ratios = RATIOS[:1] if SETTINGS.quick else RATIOS
    found = [pytest.param(n, m, dtype, None, id=f"{n}_{m}-{str(dtype)[6:]}") for dtype in dtypes() for n, m in ratios]
    found += sweep("side", SIDES, lambda side: (2, 4, dtypes()[0]))
    return found + sweep("M half kept", (2, 8, 32, 128), lambda m: (m // 2, m, dtypes()[0]))


@pytest.mark.parametrize(("n", "m", "dtype", "growth"), ratio_cases())
def test_mask(n: int, m: int, dtype: torch.dtype, growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    torch._dynamo.reset()
    weight = torch.randn(shape_of(growth), device=SETTINGS.device).to(dtype)
    compiled = {f.__name__: torch.compile(f, dynamic=False, fullgraph=True) for f in (by_topk, by_argsort, by_ranks)}
    contenders = [
        Contender("topk", partial(by_topk, weight, n, m)),
        Contender("argsort", partial(by_argsort, weight, n, m), note="NM-sparsity's way"),
        Contender("compiled topk", partial(compiled["by_topk"], weight, n, m)),
        Contender("compiled argsort", partial(compiled["by_argsort"], weight, n, m)),
        Contender("compiled ranks", partial(compiled["by_ranks"], weight, n, m), "other"),
        Contender("WeightNormSparsifier", weight_norm_sparsifier(weight, n, m)),
        Contender("pyrx", partial(pyrx.nm_mask, weight, n, m), "pyrx"),
        Contender("pyrx, packed", partial(pyrx.nm_mask, weight, n, m, packed=True), "pyrx"),
    ]
    count, width = weight.numel(), weight.element_size()
    for name, bytes_moved in (("bool", count * (width + 1)), ("bits", count * width + count // 8)):
        for each in moved_bytes(bytes_moved):
            each.name = f"{each.name}, {name}"
            contenders.append(each)
    floors = {"pyrx": "floor, new memory, bool", "pyrx, packed": "floor, new memory, bits"}
    targets = [Target("pyrx", "best peer", 14.0 if (n, m) == (2, 4) else 10.0)]
    if (n, m) == (2, 4):
        targets += [Target("pyrx", "topk", 35.0), Target("pyrx", "argsort", 18.0)]
        targets.append(Target("pyrx", "WeightNormSparsifier", 18.0))
    contenders, floors = with_graphs(contenders, floors)
    if SETTINGS.device == "cuda":
        targets = [Target("pyrx, CUDA graph", "floor", 1.25 if (n, m) == (2, 4) else 1 / 0.7)]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        _, best = kept_mass(weight, pyrx.nm_mask(weight, n, m, backend="reference"), n, m)
        found = []
        for name, each in able.items():
            if each.kind == "floor":
                continue
            mask = each.step()
            if mask.dtype == torch.uint8:
                expected = pyrx.nm_mask(weight, n, m, packed=True, backend="reference")
                found.append(expect(name, "bytes unlike the reference", (mask != expected).sum().item(), 0))
                continue
            wrong, mass = kept_mass(weight, mask, n, m)
            found.append(expect(name, f"groups that do not keep {n}", wrong, 0))
            # of ties any may stay: the magnitude tells whether the largest did
            found.append(expect(name, "kept magnitude below the largest", 1 - mass / best, 1e-12))
        return found

    params = {"op": "nm_mask", "ratio": f"{n}:{m}", "shape": list(weight.shape), "dtype": str(dtype)[6:]}
    run_case(ROW, params, contenders, benchmark, check=check, floors=floors, targets=targets, growth=growth)


LAYERS = {"columns": ((4096, 4096), 0), "convolution": ((512, 512, 3, 3), 1)}


@pytest.mark.parametrize("layer", [] if SETTINGS.quick else LAYERS)
def test_mask_of_other_dimensions(layer: str, benchmark: Any) -> None:
    """Groups whose elements are not side by side: 2:4."""
    set_threads()
    torch._dynamo.reset()
    sizes, dim = LAYERS[layer]
    weight = torch.randn(sizes, device=SETTINGS.device)

    def moved(form: Callable[..., Tensor]) -> Tensor:
        last = weight.movedim(dim, -1).contiguous()
        return form(last.reshape(-1, last.shape[-1]), 2, 4).view(last.shape).movedim(-1, dim)

    contenders = [
        Contender("topk", partial(moved, by_topk)),
        Contender("argsort", partial(moved, by_argsort)),
        Contender("compiled topk", partial(torch.compile(moved, dynamic=False, fullgraph=True), by_topk)),
        Contender("pyrx", partial(pyrx.nm_mask, weight, 2, 4, dim=dim), "pyrx"),
        *moved_bytes(5 * weight.numel()),
    ]
    contenders, floors = with_graphs(contenders, {"pyrx": "floor, new memory"})

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        expected = pyrx.nm_mask(weight, 2, 4, dim=dim, backend="reference")
        return [
            expect(
                name,
                "share of elements unlike the reference",
                (each.step().bool() != expected).double().mean().item(),
                0.0 if each.kind == "pyrx" else 1e-5,  # of ties any may stay
            )
            for name, each in able.items()
            if each.kind != "floor"
        ]

    params = {"op": "nm_mask", "ratio": "2:4", "dim": dim, "shape": list(sizes), "dtype": "float32"}
    run_case(ROW, params, contenders, benchmark, check=check, floors=floors)


class PublishedSRSTE(torch.autograd.Function):
    """NM-sparsity's function, from its formula: a dense float mask is made by argsort and kept for the backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, n: int, m: int) -> Tensor:
        mask = by_argsort(weight.detach(), n, m)
        ctx.save_for_backward(weight, mask)
        return weight.clone() * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return grad + STRENGTH * (1 - mask) * weight, None, None


ESTIMATORS = [pytest.param(dtype, None, id=str(dtype)[6:]) for dtype in dtypes()]
ESTIMATORS += sweep("side", SIDES, lambda side: (dtypes()[0],))


@pytest.mark.parametrize(("dtype", "growth"), ESTIMATORS)
def test_sr_ste(dtype: torch.dtype, growth: Growth | None, benchmark: Any) -> None:
    """2:4, forward and backward."""
    set_threads()
    torch._dynamo.reset()
    weight = torch.randn(shape_of(growth), device=SETTINGS.device).to(dtype).requires_grad_()
    upstream = torch.randn(weight.shape, device=SETTINGS.device).to(dtype)

    def published(w: Tensor) -> Tensor:
        return PublishedSRSTE.apply(w, 2, 4)

    def step(form: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        sparse = form(weight)
        return sparse.detach(), torch.autograd.grad(sparse, weight, upstream)[0]

    ours = partial(pyrx.nm_sparsify, n=2, m=4, estimator="sr-ste", strength=STRENGTH)
    contenders = [
        Contender("published, eager", partial(step, published)),
        Contender("published, compiled", partial(step, torch.compile(published, dynamic=False, fullgraph=True))),
        Contender("pyrx", partial(step, ours), "pyrx"),
    ]
    # the weight twice, its result, the gradient and its result; the bits written and read
    contenders += moved_bytes(weight.numel() * 5 * weight.element_size() + weight.numel() // 4)
    contenders, floors = with_graphs(contenders, {"pyrx": "floor, new memory"})
    eager, compiled = (4.0, 1.5) if SETTINGS.device == "cuda" else (8.0, 4.0)
    targets = [Target("pyrx", "published, eager", eager), Target("pyrx", "published, compiled", compiled)]

    def check(able: dict[str, Contender]) -> list[dict[str, Any]]:
        expected = step(partial(ours, backend="reference"))
        found = []
        for name, each in able.items():
            if each.kind == "floor":
                continue
            for what, one, other in zip(("result", "gradient"), each.step(), expected, strict=True):
                # ties may fall elsewhere in a peer's mask
                unlike = (one.double() - other.double()).abs() > 1e-2 * other.double().abs() + 1e-6
                limit = 0.0 if name.startswith("pyrx") else 2e-2
                found.append(
                    expect(name, f"share of the {what} unlike the reference", unlike.double().mean().item(), limit)
                )
        return found

    params = {
        "op": "nm_sparsify",
        "estimator": "sr-ste",
        "ratio": "2:4",
        "shape": list(weight.shape),
        "dtype": str(dtype)[6:],
    }
    run_case(ROW, params, contenders, benchmark, check=check, floors=floors, targets=targets, growth=growth)
