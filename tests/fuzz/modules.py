"""Calls of modules: a training step of each, its parameters made from one seed."""

from __future__ import annotations

from typing import Any

import torch
from helpers import COMBINES, REDUCTIONS, SAMPLINGS, TARGETS
from torch import Tensor, nn

import pyrx
from fuzz.calls import Call
from fuzz.dropouts import samples, target_of
from fuzz.sparsity import ESTIMATORS, ratio
from fuzz.strategies import Draws, drop_scale, fuzzes


@fuzzes("nn.MultiSampleDropoutClassifier")
def classifier(draws: Draws) -> Call:
    features, classes = draws.size(33, least=1), draws.size(33, least=1)
    lead = draws.shape(draws.integer(1, 2), 40)
    arguments: dict[str, Any] = {
        "input": draws.tensor((*lead, features)),
        "target": target_of(draws, lead, classes, torch.float32, draws.pick(*TARGETS)),
        "in_features": features,
        "num_classes": classes,
        "reduction": draws.pick(*REDUCTIONS),
        **samples(draws),
        **draws.some(
            bias=lambda: draws.pick(True, False),
            combine=lambda: draws.pick(*COMBINES),
            sampling=lambda: draws.pick(*SAMPLINGS),
            label_smoothing=lambda: draws.number(0.0, 1.0),
            weight=lambda: draws.tensor((classes,), kind="uniform"),
        ),
    }

    def MultiSampleDropoutClassifier(input: Tensor, target: Any, reduction: str, label_smoothing: float = 0.0,
                                     in_features: int = 1, num_classes: int = 1, num_samples: int = 8, p: Any = 0.5,
                                     sampling: str = "independent", bias: bool = True, combine: str = "losses",
                                     weight: Tensor | None = None) -> Tensor:  # fmt: skip
        torch.manual_seed(0)
        module = pyrx.nn.MultiSampleDropoutClassifier(
            in_features, num_classes, num_samples, p, bias=bias, combine=combine, sampling=sampling, weight=weight,
            label_smoothing=label_smoothing, reduction=reduction,
        )  # fmt: skip
        return module(input, target)

    needs = draws.needs(input=arguments["input"])
    fixed = ("in_features", "num_classes")
    floor = 4.0 * drop_scale(arguments["p"])
    return Call(MultiSampleDropoutClassifier, arguments, needs, exact=False, floor=floor, fixed=fixed)


@fuzzes("nn.MultiSampleDropout")
def wrapper(draws: Draws) -> Call:
    shape = (draws.size(17, least=1), draws.size(17, least=1))
    arguments = {"input": draws.tensor(shape), "target": draws.tensor(shape[:1], torch.int64, high=4), **samples(draws)}

    def MultiSampleDropout(input: Tensor, target: Tensor, num_samples: int, p: Any, sampling: str) -> Tensor:
        torch.manual_seed(0)
        head = nn.Linear(shape[1], 4)
        return pyrx.nn.MultiSampleDropout(head, num_samples, p, sampling=sampling)(input, target)

    needs = draws.needs(input=arguments["input"])
    floor = 4.0 * drop_scale(arguments["p"])
    return Call(MultiSampleDropout, arguments, needs, exact=False, floor=floor, fixed=("input", "target"))


def _options(draws: Draws) -> dict[str, Any]:
    return draws.some(
        estimator=lambda: draws.pick(*ESTIMATORS),
        decay=lambda: draws.number(0.0, 1.0),
        strength=lambda: draws.number(0.0, 1.0),
        magnitude=lambda: draws.pick(True, False),
        pad=lambda: draws.pick(True, False),
    )


@fuzzes("nn.NMSparsity")
def nm_sparsity(draws: Draws) -> Call:
    n, m = ratio(draws, 16)
    weight = draws.tensor((draws.size(9), m * draws.integer(0, 4)), draws.float_dtype(), draws.kind())
    arguments = {"weight": weight, "n": n, "m": m, "frozen": draws.chance(3), **_options(draws)}

    def NMSparsity(weight: Tensor, frozen: bool, **options: Any) -> Tensor:
        module = pyrx.nn.NMSparsity(**options)
        if frozen:
            module.freeze(weight)
        return module(weight)

    return Call(NMSparsity, arguments, draws.needs(weight=weight), exact_gradients=True, fixed=("frozen",))


def _model(widths: list[int]) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(nn.Sequential(*layers), nn.Unflatten(1, (widths[-1], 1)), nn.Conv1d(widths[-1], 3, 1))


@fuzzes(
    "nn.sparsify_", "nn.desparsify_", "nn.sparsity_report", "nn.SparsityReport", "nn.SparseLayer", "nn.SkippedLayer"
)
def sparsify(draws: Draws) -> Call:
    n, m = ratio(draws, 8)
    widths = [draws.pick(8, 16, 12, 5, 1) for _ in range(draws.integer(2, 4))]
    arguments: dict[str, Any] = {"x": draws.tensor((draws.size(9), widths[0])), "n": n, "m": m, **_options(draws)}
    arguments |= draws.some(
        include=lambda: draws.pick(None, nn.Linear, [nn.Linear, "2"], lambda name, _: name.endswith("0")),
        exclude=lambda: draws.pick(None, "2", nn.Conv1d),
        per_layer=lambda: draws.pick(None, {"2": None}, {"0.0": (1, 2)}, {"0.*": {"n": 1, "m": 4, "pad": True}}),
        leave_parametrized=lambda: draws.pick(True, False),
    )

    def sparsify_(x: Tensor, leave_parametrized: bool = True, **options: Any) -> list[Any]:
        model = _model(widths)
        report = pyrx.nn.sparsify_(model, **options)
        sparse = model(x)
        again = pyrx.nn.sparsity_report(model)
        assert str(again) and isinstance(again, pyrx.nn.SparsityReport) and again.rows == report.rows
        plain = pyrx.nn.desparsify_(model, leave_parametrized)
        return [
            sparse,
            plain(x),
            report.parameters,
            report.kept,
            report.density,
            [each.name for each in report.skipped],
        ]

    return Call(sparsify_, arguments, draws.needs(x=arguments["x"]), exact=False, floor=1.0, fixed=("x",), idle=True)


SCHEDULES = {
    name: getattr(pyrx.nn, name)
    for name in (
        "SparsitySchedule", "DenseThenSparse", "StepwiseSDGF", "GeometricSDGF", "LinearMDGF", "ExponentialMDGF",
    )
}  # fmt: skip


@fuzzes(*(f"nn.{name}" for name in SCHEDULES))
def schedule(draws: Draws) -> Call:
    name = draws.pick(*SCHEDULES)
    n, m = draws.pick((2, 4), (1, 4), (1, 8), (1, 1))
    flow, dense, fine_tune = draws.integer(8, 12), draws.integer(0, 3), draws.integer(0, 3)
    arguments: dict[str, Any] = {
        "x": draws.tensor((4, 16), layout="contiguous"),
        "n": n,
        "m": m,
        "total_steps": flow + dense + fine_tune,
        "dense_steps": dense,
        "fine_tune_steps": fine_tune,
        "steps": draws.integer(0, flow + dense + fine_tune + 1),
    }
    if name.endswith("MDGF"):
        arguments |= {"estimator": draws.pick("mdgf", "mdgf-scaled"), "beta": draws.pick(None, 0.1, 1e-9)}
    if name == "GeometricSDGF":
        arguments["frames"] = draws.integer(1, 5)

    def scheduled(x: Tensor, n: int, m: int, total_steps: int, steps: int, **options: Any) -> list[Any]:
        backend = options.pop("backend", None)
        model = _model([16, 8, 8])
        pyrx.nn.sparsify_(model, n, m, include=nn.Linear, backend=backend)
        made = SCHEDULES[name](model, total_steps, **options)
        phases = []
        for _ in range(steps):
            phases.append(made.phase)
            made.step()
        return [model(x), phases, made.phase, pyrx.nn.sparsity_report(model).kept]

    return Call(scheduled, arguments, exact=False, floor=1.0, fixed=("x", "steps"), idle=True)
