"""What the project set itself, and what came of it: one table a device, from the result files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from outcomes import Case, Results, comparison, times

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Goal:
    """`contender` in the cases of `row` with `params` (the worst counts) against another contender, or its floor.

    measure "speed": at least `asked` times as fast; "floor": at most `asked` times its time; "density": at most `asked`
    times the share of blocks of the dense time; "memory": its peak at the largest size at most `asked` times that at
    the smallest.
    """

    what: str
    rule: str
    asked: float
    row: str
    params: dict[str, Any] = field(default_factory=dict)
    contender: str = "pyrx"
    against: str = "best peer"
    measure: str = "speed"


HEAD = "multi_sample_dropout"
MODES = ("independent", "antithetic")
SIZES = {
    (128, 512, 10, 8): (15, 15),
    (128, 2048, 100, 8): (6, 7),
    (128, 2048, 1000, 8): (3, 4.2),
    (256, 512, 1000, 32): (3, 4.5),
}
GPU_SIZES = ((256, 2048, 1000, 8), *SIZES)
MIX, SPARSE, ATTENTION = "batch_mix", "nm_sparsity", "block_sparse_attention"
LAST = "uint8 to normalised, channels_last"
TOP_BLOCKS = "BlockMask of the top blocks"


def sized(size: tuple[int, ...]) -> dict[str, Any]:
    return dict(zip("BDCM", size, strict=True))


def head(size: tuple[int, ...], mode: str) -> str:
    return f"head at B {size[0]}, D {size[1]}, C {size[2]}, M {size[3]}, {mode}"


CPU = [
    *(
        Goal(head(size, mode), "best PyTorch form", asked, HEAD, sized(size), f"pyrx {mode}")
        for size, both in SIZES.items()
        for mode, asked in zip(MODES, both, strict=True)
    ),
    *(
        Goal(f"head at C 1000, {mode}", "its bare GEMMs", 1.2, HEAD, {"C": 1000}, f"pyrx {mode}", measure="floor")
        for mode in MODES
    ),
    Goal("8 samples at C 10", "1 sample, eager", 1, HEAD, {"C": 10}, "pyrx independent", "eager, 1 sample"),
    Goal("peak memory of 32 samples", "of 1 sample", 1.1, HEAD, {}, "pyrx independent", measure="memory"),
    Goal("CutMix in place, one box", "timm, batch", 5, MIX, {"op": "cutmix in place, batch"}, against="timm batch"),
    Goal("CutMix in place, a box each", "timm, elem", 5, MIX, {"op": "cutmix in place, elem"}, against="timm elem"),
    Goal("CutMix out of place", "torchvision", 1.5, MIX, {"op": "cutmix"}, against="torchvision"),
    Goal("CutMix out of place", "kornia", 5, MIX, {"op": "cutmix"}, against="kornia"),
    Goal("CutMix out of place", "a clone", 1.3, MIX, {"op": "cutmix"}, measure="floor"),
    Goal("CutMix into `out=`", "a copy", 1.3, MIX, {"op": "cutmix"}, "pyrx, out=", measure="floor"),
    Goal("mixup, a lam each", "timm, elem", 2, MIX, {"op": "mixup, per sample"}, against="timm elem"),
    *(
        Goal(what, rule, asked, MIX, {"op": LAST}, contender, against)
        for what, contender, both in (
            ("uint8 to normalised, CutMix", "pyrx", (3, 1.5)),
            ("the same into `out=`", "pyrx, out=", (6, 3)),
        )
        for rule, against, asked in (
            ("eager normalise + timm", "normalise + timm elem", both[0]),
            ("compiled normalise + timm", "compiled normalise + timm elem", both[1]),
        )
    ),
    *(
        Goal("mixed cross-entropy, 1024 x 1000", f"{how}, probabilities", asked, "mixed_cross_entropy",
             {"N": 1024, "C": 1000}, against=f"{how} probabilities")
        for how, asked in (("eager", 2), ("compiled", 1.2))
    ),
    *(
        Goal("2:4 mask", rule, asked, SPARSE, {"op": "nm_mask", "ratio": "2:4", "shape": [4096, 4096], "dim": None},
             against=against)
        for rule, against, asked in (
            ("topk, scatter", "topk", 35),
            ("argsort", "argsort", 18),
            ("WeightNormSparsifier", "WeightNormSparsifier", 18),
            ("best of them, compiled too", "best peer", 14),
        )
    ),
    *(
        Goal(f"{ratio} mask", "best peer", 10, SPARSE, {"op": "nm_mask", "ratio": ratio})
        for ratio in ("1:4", "2:8", "4:8", "1:16", "2:32")
    ),
    *(
        Goal("SR-STE, forward + backward", f"as published, {how}", asked, SPARSE, {"op": "nm_sparsify"},
             against=f"published, {how}")
        for how, asked in (("eager", 8), ("compiled", 4))
    ),
    Goal("AdamW step, new 2:4 mask", "foreach AdamW + best mask", 3, "masked_update",
         {"op": "MaskedAdamW.step", "n:m": "2:4"}, "pyrx, hold"),
    Goal("transposable 2:4 mask", "exhaustive search", 20, "nm_transposable", {"method": "exact"}),
    Goal("attention, 20 % of the blocks", "compiled FlexAttention", 2.7, ATTENTION,
         {"op": f"{ATTENTION}, forward", "density": 0.2}, "pyrx, blocks of 128", "FlexAttention, compiled"),
    Goal("attention, every block", "SDPA", 2.4, ATTENTION,
         {"op": f"{ATTENTION}, forward", "density": 1.0}, "pyrx, blocks of 128", "SDPA, dense"),
    *(
        Goal("attention, forward + backward, 20 %", rule, asked, ATTENTION,
             {"op": f"{ATTENTION}, forward + backward"}, "pyrx", against)
        for rule, against, asked in (("SDPA, mask", "SDPA, mask", 7), ("SDPA, dense", "SDPA, dense", 6))
    ),
    *(
        Goal(f"attention, {100 * density:g} % of the blocks of {block}", "share of dense time", 1.2, ATTENTION,
             {"op": f"{ATTENTION}, time against density", "block": block}, f"pyrx, density {density:g}",
             "pyrx, density 1", "density")
        for block in (128, 64)
        for density in (0.5, 0.2, 0.1, 0.05)
    ),
    *(
        Goal("mask from block scores", rule, 10, "block_mask", {"op": TOP_BLOCKS, "shape": [1, 8, 32, 32]},
             against=f"topk, {rule}")
        for rule in ("create_block_mask", "compiled create_block_mask")
    ),
    Goal("LSE-cached search pass", "own dense forward", 1 / 0.6, "block_mass",
         {"op": "block_mass", "block": 128, "causal": False, "shape": [1, 8, 4096, 64]}, against="dense forward"),
    Goal("causal window of 1024, S 16384", "SDPA, causal", 5, ATTENTION,
         {"op": f"{ATTENTION}, causal window"}, against="SDPA, causal"),
    Goal("peak memory at S 16384, window of 1024", "at S 4096", 4.1, ATTENTION, measure="memory"),
]  # fmt: skip

COPY = "a device copy"
FLEX = "FlexAttention, compiled"
GRAPH = "CUDA graph"
GPU = [
    Goal("peak memory of 32 samples", "of 1 sample", 1.1, HEAD, {}, "pyrx independent", measure="memory"),
    Goal("head at B 256, D 2048, C 1000, M 8", "compiled batched", 2, HEAD,
         sized(GPU_SIZES[0]) | {"dtype": "bfloat16"}, "pyrx independent", "compiled batched"),
    *(
        Goal(head(size, mode), f"best form{how}", 1, HEAD, sized(size), f"pyrx {mode}{how}")
        for size in GPU_SIZES
        for mode in MODES
        for how in ("", f", {GRAPH}")
    ),
    *(
        Goal(f"CutMix in place, {what}", COPY, 1.25, MIX, {"op": f"cutmix in place, {mode}"},
             f"pyrx, mean boxes, {GRAPH}", measure="floor")
        for what, mode in (("one box", "batch"), ("a box each", "elem"))
    ),
    Goal("CutMix out of place", COPY, 1.25, MIX, {"op": "cutmix"}, f"pyrx, {GRAPH}", measure="floor"),
    Goal("mixup, a lam each", COPY, 1.25, MIX, {"op": "mixup, per sample"}, f"pyrx, {GRAPH}", measure="floor"),
    *(
        Goal("uint8 to normalised, CutMix", f"{how} normalise + timm", asked, MIX, {"op": LAST}, against=against)
        for how, against, asked in (
            ("eager", "normalise + timm elem", 4),
            ("compiled", "compiled normalise + timm elem", 2),
        )
    ),
    *(
        Goal("mixed cross-entropy, 1024 x 1000", f"{how}, probabilities", asked, "mixed_cross_entropy",
             {"N": 1024, "C": 1000}, against=f"{how} probabilities")
        for how, asked in (("eager", 2), ("compiled", 1.2))
    ),
    *(
        Goal(f"{ratio} mask", COPY, asked, SPARSE, {"op": "nm_mask", "ratio": ratio, "dim": None},
             f"pyrx, {GRAPH}", measure="floor")
        for ratio, asked in (("2:4", 1 / 0.8), *((each, 1 / 0.7) for each in ("1:4", "2:8", "4:8", "1:16", "2:32")))
    ),
    *(
        Goal("SR-STE, forward + backward", f"as published, {how}", asked, SPARSE, {"op": "nm_sparsify"},
             against=f"published, {how}")
        for how, asked in (("eager", 4), ("compiled", 1.5))
    ),
    Goal("AdamW step, new 2:4 mask", "foreach AdamW + best mask", 1.5, "masked_update",
         {"op": "MaskedAdamW.step", "n:m": "2:4"}, "pyrx, hold"),
    Goal("transposable 2:4 mask", "exhaustive search", 20, "nm_transposable", {"method": "exact"}),
    Goal("attention, 20 % of the blocks", FLEX, 1.1, ATTENTION,
         {"op": f"{ATTENTION}, forward", "density": 0.2}, "pyrx, blocks of 128", FLEX),
    Goal("blocks of 64", "blocks of 128", 1 / 1.15, ATTENTION,
         {"op": f"{ATTENTION}, forward", "density": 0.2}, "pyrx, blocks of 64", "pyrx, blocks of 128"),
    Goal("attention, every block", "SDPA", 1 / 1.6, ATTENTION,
         {"op": f"{ATTENTION}, forward", "density": 1.0}, "pyrx, blocks of 128", "SDPA, dense"),
    Goal("attention, forward + backward, 20 %", FLEX, 1.1, ATTENTION,
         {"op": f"{ATTENTION}, forward + backward"}, "pyrx", FLEX),
    *(
        Goal(f"attention, {100 * density:g} % of the blocks", "share of dense time", 1.25, ATTENTION,
             {"op": f"{ATTENTION}, time against density", "block": 128}, f"pyrx, density {density:g}",
             "pyrx, density 1", "density")
        for density in (0.5, 0.2, 0.1)
    ),
    Goal("mask from block scores", "create_block_mask, compiled", 10, "block_mask",
         {"op": TOP_BLOCKS, "shape": [1, 24, 512, 512]}, against="topk, compiled create_block_mask"),
    Goal("LSE-cached search pass", "own dense forward", 1 / 0.6, "block_mass",
         {"op": "block_mass", "block": 128, "causal": False, "shape": [1, 24, 32768, 128]}, against="dense forward"),
    Goal("causal window of 1024, S 16384", FLEX, 1.1, ATTENTION, {"op": f"{ATTENTION}, causal window"}, against=FLEX),
]  # fmt: skip
GOALS = {"cpu": CPU, "cuda": GPU}


def kept(case: Case, contender: str) -> float:
    """The share of the blocks that are listed: a row of blocks has a whole number of them."""
    blocks = case["params"]["shape"][2] // case["params"]["block"]
    return max(1, round(float(contender.rsplit(" ", 1)[1]) * blocks)) / blocks


def seen_in(goal: Goal, case: Case, results: Results) -> float:
    if goal.measure == "floor":
        return results.over_floor(case, goal.contender)
    speed = results.speed(case, goal.contender, goal.against)
    return 1 / speed / kept(case, goal.contender) if goal.measure == "density" else speed


def memory(goal: Goal, results: Results) -> list[float]:
    """The peak at the largest size over that at the smallest."""
    found = []
    for record in (each for file in results.of_row(goal.row) for each in file["memory"]):
        over = record.get("over", "M")
        peaks = {each[over]: each["bytes"] for each in record["peaks"] if each["name"] == goal.contender}
        found.append(peaks[max(peaks)] / peaks[min(peaks)])
    return found


def limit_text(goal: Goal, case: Case) -> str:
    """Beside a missed target: how far its floor is from that peer, or it from its floor."""
    limit, floor = (comparison(case, goal.contender, measure) for measure in ("limit", "floor"))
    if goal.measure == "speed" and limit is not None and goal.against in ("best peer", limit["against"]):
        return f" (its floor {times(limit['ratio'])})"
    return f" ({floor['ratio']:.2f} times its floor)" if floor is not None and goal.measure != "floor" else ""


def digits(seen: float, asked: float) -> str:
    """Two, or as many as tell it from what was asked."""
    texts = [(f"{seen:.{n}g}", f"{asked:.{n}g}") for n in (2, 3, 4)]
    return times(seen) if seen >= 100 else next((one for one, other in texts if one != other), texts[-1][0])


def met(goal: Goal, seen: float) -> bool:
    return seen >= goal.asked if goal.measure == "speed" else seen <= goal.asked


def state(goal: Goal, dtype: str, results: Results) -> tuple[str, bool | None]:
    """The cell, and whether the target is met; None where there is nothing to tell."""
    if goal.measure == "memory":
        found, cases = (memory(goal, results), [None]) if dtype == DTYPES[0] else ([], [])
    else:
        cases = [
            case for case in results.cases(goal.row, **goal.params) if case["params"].get("dtype", DTYPES[0]) == dtype
        ]
        found = [seen_in(goal, case, results) for case in cases]
    if not found:
        return "", None
    worst = min(found) if goal.measure == "speed" else max(found)
    if met(goal, worst):
        return digits(worst, goal.asked), True
    case = cases[found.index(worst)]
    return f"**{digits(worst, goal.asked)}**" + (limit_text(goal, case) if case is not None else ""), False


def rows(results: Results) -> tuple[list[list[str]], list[bool | None]]:
    """The lines of the table, and whether each is met (None: not measured)."""
    lines, states = [], []
    for goal in GOALS[results.device]:
        cells = [state(goal, dtype, results) for dtype in DTYPES]
        known = [ok for _, ok in cells if ok is not None]
        at = "at least" if goal.measure == "speed" else "at most"
        texts = [text for text, _ in cells] if known else ["not measured", ""]
        lines.append([goal.what, goal.rule, f"{at} {goal.asked:.3g}", *texts])
        states.append(all(known) if known else None)
    return lines, states
