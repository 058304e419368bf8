"""Calls of dropout, its masks, the multi-sample head and the two-label loss."""

from __future__ import annotations

from typing import Any

import torch
from helpers import COMBINES, REDUCTIONS, SAMPLINGS, TARGETS

import pyrx
from fuzz.calls import Call
from fuzz.strategies import FLOATS, Draws, drop_scale, fuzzes


@fuzzes("dropout")
def dropout(draws: Draws) -> Call:
    input = draws.tensor(draws.shape(draws.integer(0, 6)), draws.float_dtype(), draws.kind())
    options = draws.some(p=draws.p, training=lambda: draws.pick(True, False), sample=lambda: sample(draws))
    arguments = {"input": input, "seed": draws.seed(), **options}
    return Call(pyrx.dropout, arguments, draws.needs(input=input), exact_gradients=True)


def sample(draws: Draws) -> int:
    return draws.pick(0, 1, 2, 2**31, 2**32 - 1)


@fuzzes("dropout_mask")
def dropout_mask(draws: Draws) -> Call:
    packed = draws.pick(False, True)
    seed = draws.seed()
    arguments = {
        "shape": draws.shape(draws.integer(1 if packed else 0, 6)),
        "p": draws.p(),
        "seed": 0 if seed is None else seed,
        "packed": packed,
        **draws.some(sample=lambda: sample(draws), sampling=lambda: draws.pick(*SAMPLINGS)),
    }
    return Call(pyrx.dropout_mask, arguments)


def samples(draws: Draws, most: int = 9) -> dict[str, Any]:
    """num_samples, p and sampling."""
    count = draws.integer(1, most) if not draws.chance(4) else draws.pick(13, 16, 31, 33)
    p = [draws.p() for _ in range(count)] if draws.chance(3) else draws.p()
    return {"num_samples": count, "p": p, "sampling": draws.pick(*SAMPLINGS)}


@fuzzes("multi_sample_dropout")
def multi_sample_dropout(draws: Draws) -> Call:
    input = draws.tensor(draws.shape(draws.integer(0, 5), 1000), draws.float_dtype(), draws.kind())
    arguments = {"input": input, "seed": draws.seed(), **samples(draws)}
    return Call(pyrx.multi_sample_dropout, arguments, draws.needs(input=input), floats=("input",))


def target_of(draws: Draws, lead: tuple[int, ...], classes: int, dtype: torch.dtype, kind: str) -> Any:
    def ids() -> torch.Tensor:
        found = draws.tensor(lead, torch.int64, high=classes)
        return torch.where(found == 1, -100, found) if draws.chance(3) else found

    if kind == "ids":
        return ids()
    if kind == "probabilities":
        return draws.tensor((*lead, classes), dtype, "uniform")
    lam = draws.tensor(lead, draws.pick(torch.float32, *{dtype}), "uniform")
    return pyrx.MixedTarget(ids(), ids(), lam)


@fuzzes("multi_sample_dropout_cross_entropy")
def head(draws: Draws) -> Call:
    dtype = draws.pick(torch.float32, *FLOATS)
    features = draws.size(40) if draws.chance(3) else draws.pick(64, 65, 100, 131, 257)
    classes = draws.size(40, least=1) if draws.chance(2) else draws.pick(49, 64, 65, 131)
    lead = draws.shape(draws.integer(0, 3), 40)
    kind = draws.pick(*TARGETS)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = {
        "input": draws.tensor((*lead, features), dtype),
        "linear_weight": draws.tensor((classes, features), dtype),
        "linear_bias": draws.tensor((classes,), dtype) if draws.chance(2) else None,
        "target": target_of(draws, lead, classes, accumulation, kind),
        "weight": draws.tensor((classes,), accumulation, "uniform") if draws.chance(3) else None,
        "seed": draws.seed(),
        "reduction": draws.pick(*REDUCTIONS),
        **samples(draws),
        **draws.some(
            combine=lambda: draws.pick(*COMBINES),
            label_smoothing=lambda: draws.number(0.0, 1.0),
            ignore_index=lambda: -100 if kind == "probabilities" else draws.pick(-100, -1, 0, 3),
        ),
    }
    floats = ("input", "linear_weight", "linear_bias", "target", "weight")
    needs = draws.pick(floats[:2], draws.needs(**{name: arguments[name] for name in floats[:3]}))
    floor = 4.0 * drop_scale(arguments["p"]) * (classes if kind == "probabilities" else 1)  # which are uniform
    return Call(pyrx.multi_sample_dropout_cross_entropy, arguments, needs, exact=False, floats=floats, floor=floor)


@fuzzes("mixed_cross_entropy")
def mixed_cross_entropy(draws: Draws) -> Call:
    dtype, classes = draws.float_dtype(), draws.size(131, least=1)
    lead = draws.shape(draws.integer(0, 3), 100)
    shape = (*lead[:1], classes, *lead[1:])
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = {
        "input": draws.tensor(shape, dtype, draws.pick("normal", "normal", "normal", "special")),
        "target": target_of(draws, lead, classes, accumulation, "mixed"),
        "weight": draws.tensor((classes,), accumulation, "uniform") if draws.chance(3) else None,
        **draws.some(
            reduction=lambda: draws.pick(*REDUCTIONS),
            label_smoothing=lambda: draws.number(0.0, 1.0),
            ignore_index=lambda: draws.pick(-100, -1, 0, 3),
        ),
    }
    floats = ("input", "target", "weight")
    return Call(
        pyrx.mixed_cross_entropy,
        arguments,
        draws.needs(input=arguments["input"]),
        exact=False,
        floats=floats,
        floor=1.0,
    )


@fuzzes("MixedTarget")
def to_probabilities(draws: Draws) -> Call:
    classes = draws.size(20, least=1)
    lead = draws.shape(draws.integer(0, 3), 60)
    target = target_of(draws, lead, classes, torch.float32, "mixed")

    def probabilities(target: pyrx.MixedTarget, num_classes: int, label_smoothing: float) -> torch.Tensor:
        return pyrx.MixedTarget.to_probabilities(target, num_classes, label_smoothing)

    arguments = {"target": target, "num_classes": classes, "label_smoothing": draws.number(0.0, 1.0)}
    return Call(probabilities, arguments, fixed=("target", "num_classes"))  # which may ask for all memory
