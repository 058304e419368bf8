"""Turns the result files into bench/README.md and the chart: python bench/report.py. Reads nothing but the files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SCHEMA = 1
INK = "#808080"  # grey text reads on white and on black
COLOURS = {"pyrx independent": "#2f8fdd", "pyrx antithetic": "#e08a1e"}
STEADY = 1.5
CHARTED = "multi_sample_dropout"

INTRO = """# Benchmarks

Written by `make bench` (`bench/run.py`, then `bench/report.py`) from the files in `bench/results`; do not edit.

The contenders of a case take turns in one process, in a new random order each round; times are medians over the rounds,
of forward and backward together. Before they are timed they are checked: pyrx against the plain PyTorch reference with
the same masks (a head in float64), the others by their statistics and, a head, without dropout by its values.

- *best peer*: the fastest of the PyTorch forms (eager and compiled; compile time is left out) and other libraries.
- *times as fast*: best peer's time over pyrx's, with the quartiles of that ratio within one round.
- *floor*: measured in the same rounds: the three bare matrix products of the same size by the fastest library for a
  head, a copy of the bytes that must move for the others. The float32 head on the CPU makes its gradients without two
  of the products, so it can be below it.
- *limit*: best peer over floor: as many times as fast as an op of bare products without any other cost would be.
- *target*: what the project set itself, on another machine; **met** or missed here.
"""


def load(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("*.json")):
        file = json.loads(path.read_text())
        if file.get("schema") == SCHEMA:
            found.append(file)
        else:
            print(f"{path.name} has schema {file.get('schema')}, not {SCHEMA}: left out", file=sys.stderr)
    return found


def case_name(params: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return "x".join(map(str, value)) if isinstance(value, list) else str(value)

    sizes = [f"{k} {shown(v)}" if len(k) == 1 else shown(v) for k, v in params.items() if k not in ("op", "p", "dtype")]
    return ", ".join([*sizes, params["dtype"]] if "dtype" in params else sizes)


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def target_text(comparison: dict[str, Any]) -> str:
    if comparison["target"] is None:
        return ""
    return f"{comparison['target']:g} {'**met**' if comparison['met'] else 'missed'}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of(case: dict[str, Any], contender: str, measure: str) -> dict[str, Any] | None:
    """The comparison of a pyrx contender with the best peer ("speed"), or with its floor."""
    for each in case["comparisons"]:
        if each["of"] == contender and each["measure"] == measure and (measure != "speed" or each.get("best_peer")):
            return each
    return None


def case_rows(case: dict[str, Any]) -> Iterator[list[str]]:
    ms = {each["name"]: each["ms"]["median"] for each in case["contenders"]}
    for each in case["contenders"]:
        if each["kind"] != "pyrx":
            continue
        row = [case_name(case["params"]), each["name"], milliseconds(ms[each["name"]])]
        speed, floor, limit = (of(case, each["name"], measure) for measure in ("speed", "floor", "limit"))
        if speed is None:
            row += ["", "", ""]
        else:
            row.append(f"{speed['against']}, {milliseconds(ms[speed['against']])}")
            row.append(f"**{speed['ratio']:.3g}** ({speed['p25']:.3g} to {speed['p75']:.3g})")
            row.append(target_text(speed))
        row.append("" if limit is None else f"{limit['ratio']:.3g}")
        if floor is None:
            row += ["", "", ""]
        else:
            row += [milliseconds(ms[floor["against"]]), f"{floor['ratio']:.2f}", target_text(floor)]
        yield row


COLUMNS = ["case", "pyrx", "ms", "best peer, ms", "times as fast", "target", "limit"]
COLUMNS += ["floor, ms", "times the floor", "target"]


def other_lines(case: dict[str, Any]) -> Iterator[str]:
    ms = {each["name"]: each["ms"]["median"] for each in case["contenders"]}
    for each in case["comparisons"]:
        if each["measure"] == "speed" and not each.get("best_peer"):
            left, right = (f"{each[k]} ({milliseconds(ms[each[k]])} ms)" for k in ("contender", "against"))
            yield f"- {case_name(case['params'])}: {left} is {each['ratio']:.2f} times as fast as {right}, " + (
                f"target {target_text(each)}"
            )
    for each in case["failed"]:
        yield f"- {case_name(case['params'])}: {each['name']} did not run: {each['error']}"


def all_times(cases: list[dict[str, Any]]) -> str:
    rows = []
    for case in cases:
        for each in case["contenders"]:
            ms = [milliseconds(each["ms"][k]) for k in ("median", "p25", "p75", "min")]
            rows.append([case_name(case["params"]), each["name"], *ms, each["note"]])
    inner = table(["case", "contender", "median ms", "p25", "p75", "min", ""], rows)
    return f"<details><summary>every contender</summary>\n\n{inner}\n\n</details>"


def memory_table(memory: dict[str, Any]) -> str:
    over = memory.get("over", "M")  # what is varied
    sizes = sorted({each[over] for each in memory["peaks"]})
    peaks = {(each["name"], each[over]): each["bytes"] / 2**20 for each in memory["peaks"]}
    names = dict.fromkeys(each["name"] for each in memory["peaks"])
    rows = [[name, *(f"{peaks[name, size]:.1f}" for size in sizes)] for name in names]
    head = [f"peak extra memory of a step, MiB ({case_name(memory['params'])})", *(f"{over} = {n}" for n in sizes)]
    return table(head, rows)


def steady(case: dict[str, Any]) -> bool:
    """Whether the machine had nothing else to do: on shared cores threads wait for each other, and times multiply."""
    times = [each["ms"] for each in case["contenders"] if each["kind"] in ("pyrx", "floor")]
    return all(ms["median"] <= STEADY * ms["min"] for ms in times)


def conditions(file: dict[str, Any]) -> str:
    machine, versions = file["machine"], file["versions"]
    gpu = "; ".join(machine["gpu"]) if isinstance(machine["gpu"], list) else machine["gpu"]
    load = max((case["load"] for case in file["cases"]), default=0.0)
    changes = ", with uncommitted changes" if file["uncommitted_changes"] else ""
    lines = [
        f"{machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} of {machine['cores']} cores"
        + (f"; {gpu}" if gpu else ""),
        f"torch {versions['torch']}, Triton {versions['triton']}, Python {versions['python']}, {machine['platform']}",
        f"{file['finished'][:10]}, commit {(file['commit'] or 'unknown')[:10]}{changes}; "
        f"highest load average before a case's end {load:g}",
    ]
    unsteady = [case for case in file["cases"] if not steady(case)]
    if unsteady and not file["quick"]:
        lines.append(
            f"**Unsteady: in {len(unsteady)} of {len(file['cases'])} cases pyrx or the floor had a median over "
            f"{STEADY:g} times its minimum, so other work was running; measure again.**"
        )
    if file["quick"]:
        lines.append("**A quick run: it shows that the benchmarks work, not how fast anything is.**")
    if not file["extension"]["loaded"]:
        lines.append(f"**Without the extension, so pyrx is its plain PyTorch reference**: {file['extension']['error']}")
    return "  \n".join(lines)


def section(file: dict[str, Any]) -> str:
    parts = [f"## {file['row']}, {file['device']}", conditions(file)]
    for op in dict.fromkeys(case["params"]["op"] for case in file["cases"]):
        cases = [case for case in file["cases"] if case["params"]["op"] == op]
        parts.append(f"### `pyrx.{op}`")
        parts.append(table(COLUMNS, [row for case in cases for row in case_rows(case)]))
        lines = [line for case in cases for line in other_lines(case)]
        parts += ["\n".join(lines)] if lines else []
        parts.append(all_times(cases))
    parts += [memory_table(each) for each in file["memory"]]
    return "\n\n".join(parts)


def chart(file: dict[str, Any], path: Path) -> bool:
    """How many times as fast as the best PyTorch form a training step of the head is; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no chart: matplotlib is not installed (pip install -e '.[bench]')")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
                            "ytick.color": INK, "font.size": 10})  # fmt: skip
    dtypes = list(dict.fromkeys(case["params"]["dtype"] for case in file["cases"]))
    tallest = max(sum(case["params"]["dtype"] == dtype for case in file["cases"]) for dtype in dtypes)
    figure, axes = pyplot.subplots(
        1, len(dtypes), figsize=(5.5 * len(dtypes), 1 + 0.95 * tallest), squeeze=False, layout="constrained"
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        cases = [case for case in file["cases"] if case["params"]["dtype"] == dtype]
        labels = []
        for i, case in enumerate(cases):
            ms = {each["name"]: each["ms"]["median"] for each in case["contenders"]}
            best = ""
            for j, (name, colour) in enumerate(COLOURS.items()):
                speed = of(case, name, "speed")
                if speed is None:
                    continue
                axis.barh(i + 0.36 * (j - 0.5), speed["ratio"], 0.34, color=colour, label=name if i == 0 else None)
                text = f" {speed['ratio']:.1f}×, {milliseconds(ms[name])} ms"
                axis.text(speed["ratio"], i + 0.36 * (j - 0.5), text, va="center")
                best = f"\n{speed['against']}, {milliseconds(ms[speed['against']])} ms"
            b, d, c, m = (case["params"][k] for k in "BDCM")
            labels.append(f"B {b}, D {d}, C {c}, M {m}{best}")
        axis.axvline(1, color=INK, linewidth=1, linestyle="--")
        axis.set_yticks(range(len(cases)), labels)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.35 * axis.get_xlim()[1] / 1.05)
        axis.set(title=dtype, xlabel="times as fast as the best PyTorch form (dashed)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    where = f"{file['machine']['threads']} CPU threads"
    if file["device"] == "cuda":
        where = file["machine"]["gpu"][0].split(",")[0]
    figure.suptitle(f"Multi-sample dropout head, forward and backward, {where}")
    figure.savefig(path, dpi=120, transparent=True)
    pyplot.close(figure)
    return True


def short_table(files: list[dict[str, Any]]) -> str:
    lines = [f"{'':<52} {'pyrx ms':>8} {'peer ms':>8} {'ratio':>6} {'target':>12} {'floor':>6} {'target':>11}"]
    for file in files:
        unsteady = not file["quick"] and not all(map(steady, file["cases"]))
        mark = " (quick)" if file["quick"] else " (unsteady: other work was running)" if unsteady else ""
        lines.append(f"{file['row']}, {file['device']}{mark}")
        for case in file["cases"]:
            ms = {each["name"]: each["ms"]["median"] for each in case["contenders"]}
            for each in case["contenders"]:
                speed, floor = of(case, each["name"], "speed"), of(case, each["name"], "floor")
                if each["kind"] != "pyrx" or speed is None:
                    continue
                name = f"  {case_name(case['params'])}: {each['name'][4:].strip() or case['params']['op']}"
                goals = [target_text(one).replace("*", "") if one else "" for one in (speed, floor)]
                over = f"{floor['ratio']:.2f}" if floor else ""
                lines.append(
                    f"{name:<52} {milliseconds(ms[each['name']]):>8} {milliseconds(ms[speed['against']]):>8} "
                    f"{speed['ratio']:>6.2f} {goals[0]:>12} {over:>6} {goals[1]:>11}"
                )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--out", type=Path, default=HERE / "README.md", help="the page; charts lie beside the results")
    arguments = parser.parse_args()
    files = load(arguments.results)
    if not files:
        parser.error(f"no result files in {arguments.results}: make bench writes them")
    parts = [INTRO.strip()]
    for file in files:
        if file["row"] == CHARTED and file["cases"]:
            suffix = "" if file["device"] == "cpu" else f"-{file['device']}"
            path = arguments.results / f"{CHARTED}{suffix}.png"
            if chart(file, path):
                parts.append(f"![times as fast as the best PyTorch form, {file['device']}](results/{path.name})")
    page = "\n\n".join([*parts, *map(section, files)]) + "\n"
    arguments.out.write_text(page)
    print(short_table(files))
    print(f"page: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
