"""The page bench/gpu_model.md: targets, the model beside what was measured, and a table of every kernel."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from gpu_cases import HALF, SINGLE, Cost
from gpu_model import DEVICES, HERE, Device, Row, Time, all_cases, occupancy, time_of
from report import table

H200 = DEVICES[0]
INTRO = """
# The GPU kernels, predicted

Written by `bench/gpu_model.py` (`make gpu-model`), which needs no GPU: nothing on this page was timed but what says so.
Every kernel of `csrc/cuda` and of `triton_kernels` stands below at a size of the benchmarks, with

- the fewest **bytes** that it must move and the **operations** that it must do, as the formulas of `bench/gpu_cases.py`
  and `bench/gpu_cases_sparse.py` count them (integers and logic; float32; exponentials, roots and reciprocals; matrix
  products), in millions, of the whole call;
- **registers, stack** (bytes a thread; more than 0 are spills, or arrays with an index that is not constant),
  **shared memory** (KiB a block) and the **occupancy** that follows (the share of the warps that a multiprocessor can
  hold), from the machine code for sm_80 / sm_90;
- of sm_90's code the number of instructions, those that touch **local** memory, the widest **load** in bits, and the
  matrix instructions (HGMMA: Hopper's own; HMMA: as on sm_80);
- a **time**, of an H200 and an A100: the longest of what its units take, each at its rate, and 3.4 us a launch. It is a
  range: at best all units work at once, at worst the arithmetic ones wait for each other. A Triton kernel without a
  loop has its instructions counted exactly, one a clock and scheduler.

What the model leaves out: latency that too few warps do not hide, bank conflicts, uneven work, the host. Kernels of
some microseconds are all latency; there the launch stands for it.
"""
RATES = """
Memory and products of the H200 were measured on one, the launch is what the smallest copies took beyond their bytes;
the rest is units times clock (1.755 and 1.41 GHz), the A100's 85 % of its data sheet.
"""
VERDICTS = """
"Reachable": even if no unit overlaps with another; "not reachable": not even if all do; "open": between.

FlexAttention on the GPU (forward, backward, windows) does the same products on the same units as ours, so the model has
nothing to tell the two apart; its targets wait for a GPU.
"""
CALIBRATED = """
Single kernels and large calls are within a third of the model. Small heads take up to twice as long: their products are
a few tiles each, and each of the chain waits for the one before. So a verdict on a target holds where a call takes tens
of microseconds or more, and "reachable" at 1.0 of a copy's rate means 0.75 or better.

Measured eagerly, so that the host sets the time and tells nothing of the kernels: """


class Target(NamedTuple):
    """`ours` and `theirs` give times; theirs at the peer's best. The larger the ratio theirs / ours the better."""

    what: str
    asked: float
    ours: Callable[[], Time]
    theirs: Callable[[], float | Time]  # a time of ours is compared best with best, worst with worst
    how: str


def in_us(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def span(time: Time) -> str:
    best, serial = in_us(time.best), in_us(time.serial)
    return best if best == serial else f"{best} to {serial}"


class Model:
    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.library = {case.name: case.library for case in all_cases()}

    def of(self, case: str, backend: str, on: Device = H200, only: str = "") -> Time:
        """All launches of a case; `only`: those of the kernels with that in their names."""
        found = [row for row in self.rows if row.case == case and row.backend == backend and only in row.kernel]
        assert found, (case, backend)
        times = [time_of(row.cost, on, row.usage[on.architecture]) for row in found]
        if not only and not any(row.cost.tensor for row in found):
            times += [time_of(each, on) for each in self.library[case]]
        bound = max(times, key=lambda each: each.best).bound
        return Time(sum(each.best for each in times), sum(each.serial for each in times), bound)


def copy_of(count: float, on: Device = H200) -> float:
    return count / on.memory + on.launch


def passes(count: float, launches: int, on: Device = H200) -> float:
    """A peer that does nothing but move bytes."""
    return count / on.memory + launches * on.launch


def targets(model: Model) -> list[Target]:
    images, weights, pairs = 256 * 3 * 224 * 224.0, 8192.0 * 8192, 24 * 32768.0 * 32768
    attention = "(1, 24, 32768, 128), bfloat16"

    def case(name: str, backend: str = "cuda", only: str = "") -> Callable[[], Time]:
        return lambda: model.of(name, backend, H200, only)

    def mask(n: int, m: int) -> Target:
        share = 0.8 if (n, m) == (2, 4) else 0.7
        return Target(
            f"{n}:{m} mask: {share:.0%} of the rate of a copy of its bytes", share,
            case(f"nm_mask {n}:{m}, 8192 x 8192, bfloat16"), lambda: copy_of(3 * weights), "the copy's time over ours",
        )  # fmt: skip

    def mixed(name: str, count: float) -> Target:
        size = "256 x 3 x 224 x 224, bfloat16"
        return Target(
            f"{name}: 80% of the rate of a copy of its bytes", 0.8, case(f"{name}, {size}"), lambda: copy_of(count),
            "the copy's time over ours",
        )  # fmt: skip

    normalised = case("uint8 to normalised float32 + cutmix, 256 x 3 x 224 x 224, channels_last")
    loss = case("mixed_cross_entropy, 1024 x 1000, bfloat16")
    head = case("multi-sample dropout head, B, D, C, M = 256, 2048, 1000, 8, bfloat16")
    sparsify = case("nm_sparsify 2:4 by SR-STE, forward and backward, 8192 x 8192, bfloat16")
    forward, part = (case(f"attention forward, density {each}, {attention}", "triton") for each in ("1", "0.2"))

    def fifth() -> Time:
        dense = forward()
        return Time(dense.best / 5, dense.serial / 5, "")

    return [
        Target(
            "head, 256 x 2048 x 1000, M = 8, bfloat16: 2 times the compiled batched form", 2.0, head,
            lambda: measured("multi_sample_dropout", HEADS[0][0], "compiled batched, CUDA graph"),
            "the peer as measured, as a CUDA graph",
        ),
        mixed("cutmix in place", 4 * 0.321 * images),
        mixed("cutmix", 4 * images),
        mixed("mixup", 4 * images),
        Target(
            "uint8 to normalised float32 + cutmix: 4 times eager", 4.0, normalised,
            lambda: passes(21 * images + 8 * 0.321 * images, 3 + 2 * 256),
            "the peer: convert, subtract, divide, and two copies a sample as timm's elem mode makes them",
        ),
        Target(
            "the same, 2 times compiled", 2.0, normalised,
            lambda: passes(5 * images + 8 * 0.321 * images, 1 + 2 * 256), "the peer: one pass, and timm's copies",
        ),
        Target(
            "mixed_cross_entropy 1024 x 1000: 2 times eager", 2.0, loss,
            lambda: passes(20 * 1024e3, 8), "the peer: ten passes in eight launches at the least",
        ),
        Target(
            "the same, 1.2 times compiled", 1.2, loss,
            lambda: passes(12 * 1024e3, 4), "the peer: six passes in four launches at the least",
        ),
        *(mask(*ratio) for ratio in ((2, 4), (4, 8), (1, 16), (2, 32))),
        Target(
            "SR-STE forward + backward: 4 times eager", 4.0, sparsify,
            lambda: passes(70 * weights, 14), "the peer: abs, sort, scatter, products: 70 bytes an element",
        ),
        Target(
            "the same, 1.5 times compiled", 1.5, sparsify,
            lambda: passes(30 * weights, 5), "the peer: the sort stays apart, the rest is fused: 30 bytes an element",
        ),
        Target(
            "masked AdamW with mask refresh, bfloat16: 1.5 times foreach AdamW and the best peer's mask", 1.5,
            case("MaskedAdamW 2:4, 8192 x 8192, bfloat16"),
            lambda: passes((40 + 14) * weights, 12), "the peer: 40 bytes an element for the step, 14 for the mask",
        ),
        Target(
            "transposable 2:4: 20 times the exhaustive search", 20.0,
            case("nm_transposable_mask 2:4, 8192 x 8192, bfloat16"),
            lambda: passes(35 * weights, 6),
            "the peer: 90 products a tile written and read, argmax, gather: 35 bytes an element",
        ),
        Target(
            "attention forward, density 1: within 1.6 of SDPA's time", 1 / 1.6, forward,
            lambda: 4 * 128 * pairs / 600e12, "the peer at 600 TFLOP/s",
        ),
        Target(
            "attention forward, density 0.2: within 1.25 of dense time x density", 0.8, part, fifth,
            "its own dense time, times 0.2",
        ),
        Target(
            "a mask from block scores: 10 times create_block_mask", 10.0,
            case("a mask from block scores, 1 x 24 x 512 x 512"),
            lambda: passes(pairs / 8, 4), "the peer looks at every element of the mask; a bit of each is counted",
        ),
        Target(
            "LSE-cached search: at most 0.6 of the dense forward", 1 / 0.6,
            case(f"LSE-cached search, {attention}", "triton"),
            forward, "its own dense forward",
        ),
    ]  # fmt: skip


def verdict(low: float, high: float, asked: float) -> str:
    if low >= asked:
        return "reachable"
    return "not reachable" if high < asked else "open"


def target_table(model: Model) -> str:
    lines = []
    for each in targets(model):
        ours, theirs = each.ours(), each.theirs()
        most, least = (theirs.serial, theirs.best) if isinstance(theirs, Time) else (theirs, theirs)
        low, high = sorted((most / ours.serial, least / ours.best))
        ratio = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
        found = verdict(low, high, each.asked)
        lines.append([each.what, f"{each.asked:.3g}", ratio, f"**{found}**", span(ours), each.how])
    return table(["target", "asked", "predicted", "the model says", "ours, us", "against"], lines)


# The model beside an H200.

MASK = {"op": "dropout_mask", "shape": [4096, 1024]}
DROPOUT = {"op": "dropout", "shape": [4096, 1024]}
COPIES = {"op": "multi_sample_dropout", "B": 128, "D": 2048, "M": 8, "dtype": "bfloat16"}
HEADS = [
    ({"B": b, "D": d, "C": c, "M": 8, "dtype": "bfloat16"}, f"B, D, C, M = {b}, {d}, {c}, 8, bfloat16")
    for b, d, c in ((256, 2048, 1000), (128, 2048, 100))
]
MEASURED = [
    ("dropout", MASK, "pyrx", "dropout_mask, 4096 x 1024", "cuda"),
    ("dropout", MASK, "pyrx packed", "dropout_mask, packed, 4096 x 1024", "cuda"),
]
MEASURED += [
    (
        "multi_sample_dropout", params, f"pyrx independent, {backend}, CUDA graph",
        f"multi-sample dropout head, {name}", backend,
    )
    for params, name in HEADS
    for backend in ("cuda", "triton")
]  # fmt: skip
FLOORS = [
    ("dropout", {**DROPOUT, "dtype": "float32"}, "floor, buffers", 2, 4 * 4096 * 1024 * SINGLE),
    ("dropout", {**DROPOUT, "dtype": "bfloat16"}, "floor, buffers", 2, 4 * 4096 * 1024 * HALF),
    ("dropout", MASK, "floor, buffers", 1, 4096 * 1024.0),
]
HOST = [
    ("dropout", {**DROPOUT, "dtype": "bfloat16"}, "pyrx", "dropout, 4096 x 1024, bfloat16", 2),
    (
        "dropout", COPIES, "pyrx independent", "multi_sample_dropout and its fold, 128 x 2048, M = 8, bfloat16", 1,
    ),
]  # fmt: skip


def measured(row: str, params: dict[str, Any], contender: str) -> float:
    """Seconds, of the result file of an H200."""
    file = json.loads((HERE / "results" / f"{row}-cuda.json").read_text())
    for case in file["cases"]:
        if all(case["params"].get(name) == value for name, value in params.items()):
            for each in case["contenders"]:
                if each["name"] == contender:
                    return each["ms"]["median"] * 1e-3
    raise LookupError((row, params, contender))


def calibration(model: Model) -> str:
    lines = []
    for row, params, contender, name, backend in MEASURED:
        time, real = model.of(name, backend), measured(row, params, contender)
        lines.append([name, backend, span(time), in_us(real), f"{real / time.serial:.2f}"])
    for row, params, contender, launches, count in FLOORS:
        time, real = passes(count, launches), measured(row, params, contender)
        what = f"{launches} {'copies' if launches > 1 else 'copy'} of {count / 1e6 / launches:.1f} MB, read and written"
        lines.append([what, "PyTorch", in_us(time), in_us(real), f"{real / time:.2f}"])
    host = []
    for row, params, contender, name, calls in HOST:  # forward and backward are so many of the case's
        time, real = model.of(name, "cuda"), measured(row, params, contender)
        host.append(
            f"{name}: forward and backward {in_us(real)} us, predicted {in_us(calls * time.best)} of the device"
        )
    head = ["what", "backend", "predicted, us", "measured, us", "measured / predicted"]
    return table(head, lines) + "\n" + CALIBRATED + "; ".join(host) + "."


# Every kernel.


def millions(value: float) -> str:
    return f"{value / 1e6:,.1f}" if value >= 1e5 else "<0.1"


def work(cost: Cost) -> str:
    parts = [
        ("integer", cost.alu), ("float32", cost.fma), ("special", cost.mufu), ("matrix", cost.tensor),
        ("float32 products", cost.plain),
    ]  # fmt: skip
    return "; ".join(f"{millions(value)} {name}" for name, value in parts if value) or "-"


def kernel_line(row: Row) -> list[str]:
    old, new = row.usage[80], row.usage[90]
    full = [occupancy(each, on.shared) for each, on in ((old, DEVICES[1]), (new, H200))]
    times = [time_of(row.cost, on, row.usage[on.architecture]) for on in DEVICES]
    return [
        f"`{row.kernel}`", row.backend, str(row.cost.launches), millions(row.cost.bytes), work(row.cost),
        f"{old.registers} / {new.registers}", f"{old.stack} / {new.stack}",
        f"{old.shared / 1024:.3g} / {new.shared / 1024:.3g}", f"{full[0]:.0%} / {full[1]:.0%}",
        f"{new.instructions:,}", str(new.local), str(new.widest or "-"), new.products or "-",
        span(times[0]), times[0].bound, span(times[1]),
    ]  # fmt: skip


KERNELS = [
    "kernel", "backend", "launches", "MB", "operations, millions", "registers", "stack", "shared KiB", "occupancy",
    "instructions", "local", "load", "matrix", "H200, us", "bound by", "A100, us",
]  # fmt: skip


def suspects(rows: list[Row]) -> str:
    """What the machine code gives away, of each kernel once."""
    found: dict[str, str] = {}
    for row in rows:
        usage, reasons = row.usage[90], []
        stacks = [row.usage[each].stack for each in (80, 90)]
        if any(stacks):
            local = f", {usage.local} instructions of sm_90 touch local memory" if usage.local else ""
            reasons.append(f"a stack of {stacks[0]} / {stacks[1]} bytes{local}")
        if occupancy(usage, H200.shared) < 0.25 and not usage.products:
            reasons.append(f"{occupancy(usage, H200.shared):.0%} of the warps")
        if usage.widest < 64 and row.cost.bytes > 2**26:
            reasons.append(f"loads of {usage.widest} bits")
        if reasons:
            found.setdefault(row.kernel, f"- `{row.kernel}` ({row.case}): {'; '.join(reasons)}")
    return "\n".join(found.values())


def page(rows: list[Row]) -> str:
    model = Model(rows)
    units = ("memory, TB/s", "integers, T/s", "float32, T/s", "exponentials, T/s", "16-bit products, TFLOP/s")
    rates = [
        [on.name, *(f"{each / 1e12:.3g}" for each in (on.memory, on.alu, on.fma, on.mufu, on.tensor)), in_us(on.launch)]
        for on in DEVICES
    ]
    parts = [
        INTRO, "## Rates", table(["", *units, "launch, us"], rates), RATES, "## Targets", target_table(model), VERDICTS,
        "## The model beside an H200", calibration(model), "## What the machine code gives away", suspects(rows),
        "## Every kernel",
    ]  # fmt: skip
    for name in dict.fromkeys(row.case for row in rows):
        own = [row for row in rows if row.case == name]
        totals = []
        for backend in dict.fromkeys(row.backend for row in own):
            a, b = (span(model.of(name, backend, on)) for on in DEVICES)
            totals.append(f"{backend} {a} us on an H200, {b} on an A100")
        products = " with cuBLAS's products" if model.library[name] else ""
        parts += [
            f"### {name}",
            f"In all{products}: {'; '.join(totals)}.",
            table(KERNELS, [kernel_line(row) for row in own]),
        ]
    return "\n\n".join(parts) + "\n"
