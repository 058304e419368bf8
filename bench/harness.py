"""Times several ways of doing the same work against each other, fairly, and says how they compare.

pytest-benchmark times one function after another, so a slow minute of the machine falls on whoever runs in it. Here its
round visits every contender once, in random order, and the contenders' own times, kept per round, are the result.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2
# A short step is called several times a visit, and once before that untimed: its predecessor emptied the caches.
VISIT_SECONDS = 4e-3
SHORT_SECONDS = 20e-3
# A case of a sweep is one point of a line: short. A contender whose step takes this long is not taken to larger sizes.
SWEEP_SECONDS = 1.0
SWEEP_STEP_SECONDS = 0.2


@dataclass
class Settings:
    device: str = "cpu"
    quick: bool = False
    seconds: float = 8.0  # a case's rounds take about this long
    sink: Callable[[str, dict[str, Any]], None] | None = None  # called with the row and each case's result
    say: Callable[[str], None] = print
    # compare.py's, in place of checks and rounds: called with row, params and contenders
    driver: Callable[[str, dict[str, Any], Sequence[Contender]], None] | None = None

    def rounds(self, sweep: bool) -> tuple[int, int]:
        return (3, 3) if self.quick else (5, 30) if sweep else (9, 60)


SETTINGS = Settings()  # run.py fills it in before the cases run


@dataclass(frozen=True)
class Growth:
    """A case of a sweep, one point of the report's lines of time over size: what grows, and how far here."""

    over: str
    at: Any


def sweep(over: str, sizes: Sequence[Any], values: Callable[[Any], tuple[Any, ...]] = lambda at: ()) -> list[Any]:
    """pytest parameters: the values at each size, and the growth. A quick run has the two smallest."""
    return [
        pytest.param(*values(at), Growth(over, at), id=f"grows-{over.replace(' ', '_')}-{at:g}")
        for at in sizes[: 2 if SETTINGS.quick else None]
    ]


def is_sweep(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("growth") is not None


def size_of(growth: Growth | None, over: str, otherwise: Any) -> Any:
    """The size where `over` grows, else the one of the other cases."""
    return growth.at if growth is not None and growth.over == over else otherwise


@dataclass
class Contender:
    """`step` does the work once and returns what the checks look at. Kinds: pyrx, peer, floor, other."""

    name: str
    step: Callable[[], Any]
    kind: str = "peer"
    group: str = ""  # the best peer is the fastest of the same group
    note: str = ""
    calls: int = 1
    seconds: float = math.nan
    ms: list[float] = field(default_factory=list)


@dataclass
class Target:
    """`contender` against another contender, or "best peer", or "floor": at least, or of the floor at most, `ratio`."""

    contender: str
    against: str
    ratio: float | None


def graphed(step: Callable[[], Any]) -> Callable[[], Any]:
    """`step` as a CUDA graph, captured at the first call: its time is the device's, without that of the launches."""
    graph, results = torch.cuda.CUDAGraph(), []

    def replay() -> Any:
        if not results:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                results.append(step())
        graph.replay()
        return results[0]

    return replay


def moved_bytes(count: int) -> list[Contender]:
    """A copy that reads and writes `count` bytes together."""
    source = torch.zeros(count // 2, dtype=torch.uint8, device=SETTINGS.device)
    buffer = torch.empty_like(source)
    return [
        Contender("floor, new memory", source.clone, "floor", note="a copy into newly allocated memory"),
        Contender("floor, buffers", lambda: buffer.copy_(source), "floor", note="a copy into memory that is there"),
    ]


def bare_products(operations: float, dtype: torch.dtype) -> Callable[[], Any]:
    """As many multiplications and additions in matrix products of the size that the fastest library likes best."""
    size = 512 if SETTINGS.device == "cpu" else 4096
    weight, x = (torch.randn(size, size, device=SETTINGS.device).to(dtype) for _ in range(2))
    whole, rest = divmod(max(1, round(operations / (2 * size * size))), size)
    slices = [x] * whole + ([x[:rest]] if rest else [])
    if SETTINGS.device == "cpu" and torch.backends.mkldnn.is_available() and dtype != torch.float64:
        # oneDNN, whose float32 products are twice as fast as those of F.linear (MKL) on an AMD processor
        linear = torch.ops.mkldnn._linear_pointwise
        return lambda: [linear(each, weight, None, "none", [], "") for each in slices][-1]
    return lambda: [torch.nn.functional.linear(each, weight) for each in slices][-1]


def on_the_gpu(contenders: list[Contender]) -> list[Contender]:
    """pyrx and the floor as CUDA graphs too: the device's time."""
    if SETTINGS.device == "cpu":
        return []
    return [
        Contender(f"{each.name}, CUDA graph", graphed(each.step), each.kind, "CUDA graph", each.note)
        for each in contenders
        if each.kind in ("pyrx", "floor")
    ]


def with_graphs(contenders: list[Contender], floors: dict[str, str]) -> tuple[list[Contender], dict[str, str]]:
    graphs = on_the_gpu(contenders)
    more = {f"{a}, CUDA graph": f"{b}, CUDA graph" for a, b in floors.items() if graphs}
    return [*contenders, *graphs], floors | more


def set_threads() -> int:
    threads = min(2, os.cpu_count() or 1)
    torch.set_num_threads(threads)
    return threads


def synchronize() -> None:
    if SETTINGS.device == "cuda":
        torch.cuda.synchronize()


def _seconds(step: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def warm_up(contenders: Sequence[Contender]) -> tuple[list[Contender], list[dict[str, str]]]:
    """Those that run, with their rough step time, and why a peer does not. pyrx and the floor must run."""
    able, failed = [], []
    for each in contenders:
        try:
            _seconds(each.step)  # compiles
            each.seconds = min(_seconds(each.step) for _ in range(1 if SETTINGS.quick else 2))
        except Exception as error:
            if each.kind in ("pyrx", "floor"):
                raise
            failed.append({"name": each.name, "error": f"{type(error).__name__}: {error}"[:300]})
            SETTINGS.say(f"  {each.name} does not run here: {type(error).__name__}")
            continue
        if SETTINGS.device == "cpu":
            each.calls = min(50, max(1, math.ceil(VISIT_SECONDS / each.seconds)))
        able.append(each)
    return able, failed


def _visit_cpu(contender: Contender) -> float:
    if contender.seconds < SHORT_SECONDS:
        contender.step()
    start = time.perf_counter()
    for _ in range(contender.calls):
        contender.step()
    return (time.perf_counter() - start) / contender.calls * 1e3


class _VisitCuda:
    """As triton.testing.do_bench times: the L2 emptied, then events around the step."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def __call__(self, contender: Contender) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        contender.step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def visitor() -> Callable[[Contender], float]:
    """What times one visit of a contender, in milliseconds a call."""
    return _visit_cpu if SETTINGS.device == "cpu" else _VisitCuda()


def interleave(contenders: Sequence[Contender], benchmark: Any, sweep: bool) -> int:
    """Runs the rounds through pytest-benchmark; the times are in each contender's `ms`. Returns their number."""
    visit = visitor()
    a_round = sum(each.seconds * (each.calls + (each.seconds < SHORT_SECONDS)) for each in contenders)
    low, high = SETTINGS.rounds(sweep)
    seconds = min(SETTINGS.seconds, SWEEP_SECONDS) if sweep else SETTINGS.seconds
    rounds = min(high, max(low, int(seconds / a_round)))
    order, shuffle = list(contenders), random.Random(0).shuffle

    def one_round() -> None:
        shuffle(order)
        for each in order:
            each.ms.append(visit(each))

    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(one_round, rounds=rounds, iterations=1, warmup_rounds=0)
    finally:
        gc.enable()
    return rounds


def quantiles(values: Sequence[float]) -> dict[str, float]:
    p25, median, p75 = statistics.quantiles(values, n=4, method="inclusive")
    found = {"min": min(values), "p25": p25, "median": median, "p75": p75}
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def _compare(of: Contender, against: Contender, measure: str, target: float | None = None) -> dict[str, Any]:
    """The ratio of the medians; the quartiles are those of the ratios within one round.

    "speed": how many times as fast. "floor": how many times the time. "limit": how many times as fast the floor is.
    """
    over, under = (of, against) if measure == "floor" else (against, of)
    paired = quantiles([a / b for a, b in zip(over.ms, under.ms, strict=True)])
    ratio = float(f"{statistics.median(over.ms) / statistics.median(under.ms):.4g}")
    met = None if target is None else bool(ratio <= target if measure == "floor" else ratio >= target)
    return {
        "contender": of.name,
        "against": against.name,
        "measure": measure,
        "ratio": ratio,
        "p25": paired["p25"],
        "p75": paired["p75"],
        "target": target,
        "met": met,
    }


def compare(contenders: Sequence[Contender], floors: dict[str, str], targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Each pyrx contender against its group's best peer and its floor (`floors`: contender -> floor), and that floor
    against that peer, which is as far as any op could get; then the targets that name another contender."""
    named = {each.name: each for each in contenders}
    wanted = {(each.contender, each.against): each.ratio for each in targets}
    found = []
    for each in contenders:
        if each.kind != "pyrx":
            continue
        peers = [peer for peer in contenders if peer.kind == "peer" and peer.group == each.group]
        best = min(peers, key=lambda peer: statistics.median(peer.ms), default=None)
        floor = named.get(floors.get(each.name, ""))
        of = {"of": each.name}
        if best is not None:
            speed = _compare(each, best, "speed", wanted.get((each.name, "best peer")))
            found.append({**of, **speed, "best_peer": True})
        if floor is not None:
            found.append({**of, **_compare(each, floor, "floor", wanted.get((each.name, "floor")))})
        if best is not None and floor is not None:
            found.append({**of, **_compare(floor, best, "limit")})
        for target in targets:
            if target.contender == each.name and target.against in named:
                found.append({**of, **_compare(each, named[target.against], "speed", target.ratio)})
    return found


def sound(
    contenders: Sequence[Contender], checks: Sequence[dict[str, Any]]
) -> tuple[list[Contender], list[dict[str, str]]]:
    """A peer that failed a check is not timed; if pyrx failed one, nothing is."""
    failed: dict[str, str] = {}
    for each in checks:
        if not each["passed"]:
            text = f"{each['check']} is {each['value']:.3g}, allowed {each['limit']:.3g}"
            if each["contender"].startswith("pyrx"):
                raise AssertionError(f"{each['contender']}: {text}; nothing was timed")
            failed.setdefault(each["contender"], f"failed its check: {text}")
            SETTINGS.say(f"  {each['contender']} failed its check and is left out: {text}")
    return [each for each in contenders if each.name not in failed], [
        {"name": name, "error": text} for name, text in failed.items()
    ]


_left_out: dict[tuple[str, ...], str] = {}  # of each sweep: why a contender is not taken to larger sizes
_checked: set[tuple[str, ...]] = set()  # the sweeps whose smallest size was checked


def still_in(sweep: tuple[str, ...], contenders: Sequence[Contender]) -> tuple[list[Contender], list[dict[str, str]]]:
    """Those that no smaller size of the sweep has ruled out; pyrx and its floors always are."""
    reasons = {each.name: _left_out[(*sweep, each.name)] for each in contenders if (*sweep, each.name) in _left_out}
    able = [each for each in contenders if each.kind in ("pyrx", "floor") or each.name not in reasons]
    names = {each.name for each in able}
    return able, [{"name": name, "error": why} for name, why in reasons.items() if name not in names]


def rule_out(
    sweep: tuple[str, ...], growth: Growth, able: Sequence[Contender], failed: Sequence[dict[str, str]]
) -> None:
    for each in failed:
        _left_out.setdefault((*sweep, each["name"]), each["error"])
    for each in able:
        if each.seconds > SWEEP_STEP_SECONDS:
            why = f"left out: a step took {each.seconds:.2g} s at {growth.over} {growth.at:g}"
            _left_out.setdefault((*sweep, each.name), why)


def run_case(
    row: str,
    params: dict[str, Any],
    contenders: Sequence[Contender],
    benchmark: Any,
    *,
    check: Callable[[dict[str, Contender]], list[dict[str, Any]]],
    floors: dict[str, str] | None = None,
    targets: Sequence[Target] = (),
    growth: Growth | None = None,
) -> None:
    """Warms up, checks, times and compares; hands the result to pytest-benchmark and to run.py.

    A sweep (`growth`) is checked at its first size, has no targets, and loses what is too slow for its larger sizes.
    """
    if SETTINGS.driver is not None:
        SETTINGS.driver(row, params, contenders)
        return
    ruled_out: list[dict[str, str]] = []
    line = (row, params["op"], params.get("method", ""), growth.over) if growth else ()
    if growth:
        contenders, ruled_out = still_in(line, contenders)
    able, failed = warm_up(contenders)
    checks: list[dict[str, Any]] = []
    if not growth or line not in _checked:
        checks = check({each.name: each for each in able})
        able, unsound = sound(able, checks)
        failed += unsound
    if growth:
        _checked.add(line)
        rule_out(line, growth, able, failed)
        targets = ()
    rounds = interleave(able, benchmark, sweep=growth is not None)
    result = {
        "kind": "time",
        "params": params,
        "rounds": rounds,
        "load": round(os.getloadavg()[0], 2),
        "contenders": [
            {
                "name": each.name,
                "kind": each.kind,
                "group": each.group,
                "note": each.note,
                "calls": each.calls,
                "ms": quantiles(each.ms),
            }
            for each in able
        ],
        "failed": ruled_out + failed,
        "comparisons": compare(able, floors or {}, targets),
        "checks": checks,
    }
    if growth:
        result["grows"] = {"over": growth.over, "at": growth.at}
    benchmark.extra_info.update(result)
    finish(row, result)


def finish(row: str, result: dict[str, Any]) -> None:
    if SETTINGS.sink is not None:
        SETTINGS.sink(row, result)


def error(got: Tensor, expected: Tensor) -> float:
    """The largest error, as a share of the largest value."""
    if not torch.isfinite(got).all():
        return math.inf
    scale = expected.double().abs().max().item()
    return (got.double() - expected.double()).abs().max().item() / max(scale, 1e-30)


def expect(name: str, what: str, value: float, limit: float) -> dict[str, Any]:
    """One check, as the result file records it; `sound` is what comes of a failed one."""
    return {
        "contender": name,
        "check": what,
        "value": float(f"{value:.3g}"),
        "limit": float(f"{limit:.3g}"),
        "passed": bool(value <= limit),
    }


def same_mean(name: str, what: str, a: Sequence[float], b: Sequence[float], slack: float) -> dict[str, Any]:
    """Two random quantities have the same mean, as far as so few draws can tell (6 standard errors and `slack`)."""
    spread = math.sqrt((statistics.variance(a) + statistics.variance(b)) / len(a))
    mean_a, mean_b = statistics.fmean(a), statistics.fmean(b)
    return expect(name, what, abs(mean_a - mean_b), 6 * spread + slack * abs(mean_b))
