"""How examples/digits.py --sparsity trains its network N:M sparse: from the start, and with each schedule."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from pyrx.nn import (
    DenseThenSparse,
    ExponentialMDGF,
    GeometricSDGF,
    LinearMDGF,
    SparsitySchedule,
    StepwiseSDGF,
    sparsify_,
)
from pyrx.ops.nm_sparsity import MAX_GROUP

# shares of the steps
DENSE, FINE_TUNE = 0.2, 0.2

# makes a network sparse and gives the schedule, if there is one, of that many steps
Start = Callable[[nn.Module, int], SparsitySchedule | None]


class Way(NamedTuple):
    start: Start
    rule: str | None = None  # of pyrx.optim.MaskedAdamW, else Adam trains it


def ratio(text: str) -> tuple[int, int]:
    """N:M, of the command line."""
    n, colon, m = text.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 1 <= int(n) <= int(m) <= MAX_GROUP):
        raise argparse.ArgumentTypeError(f"expected N:M with 1 <= N <= M <= {MAX_GROUP}, as 2:4, got {text!r}")
    return int(n), int(m)


def methods(n: int, m: int) -> dict[str, Way]:
    """Every way to N:M, by its name."""

    def install(network: nn.Module, estimator: str) -> None:
        # padded: early frames of a schedule have larger groups than a layer has inputs
        sparsify_(network, n, m, estimator=estimator, pad=True)

    def from_the_start(estimator: str = "ste", rule: str | None = None) -> Way:
        return Way(lambda network, steps: install(network, estimator), rule)

    def scheduled(kind: type[SparsitySchedule], estimator: str = "ste", **options: int) -> Way:
        def start(network: nn.Module, steps: int) -> SparsitySchedule:
            install(network, estimator)
            phases = {"dense_steps": int(DENSE * steps), "fine_tune_steps": int(FINE_TUNE * steps)}
            return kind(network, steps, **phases, **options)

        return Way(start)

    return {
        f"{n}:{m} from the start, STE": from_the_start(),
        f"{n}:{m} from the start, SR-STE": from_the_start("sr-ste"),
        "MaskedAdamW, hold": from_the_start(rule="hold"),
        "MaskedAdamW, SR-STE": from_the_start(rule="sr-ste"),
        "dense, then sparse": scheduled(DenseThenSparse),
        "SDGF, stepwise": scheduled(StepwiseSDGF),
        "SDGF, geometric": scheduled(GeometricSDGF, frames=min(4, (MAX_GROUP // m).bit_length())),
        "MDGF, linear": scheduled(LinearMDGF, "mdgf"),
        "MDGF, exponential": scheduled(ExponentialMDGF, "mdgf"),
    }
