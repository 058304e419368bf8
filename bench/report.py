"""Turns the result files into bench/README.md, its charts, and the tables of README.md: python bench/report.py

Reads nothing but the files. --check writes nothing and fails where README.md's tables are not those of the files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import charts  # noqa: E402
import goals  # noqa: E402
import readme  # noqa: E402
from outcomes import (  # noqa: E402
    STEADY,
    Case,
    File,
    Results,
    case_name,
    comparison,
    load,
    medians,
    milliseconds,
    steady,
    times,
    title,
    whole,
)

DEVICES = {"cpu": "CPU", "cuda": "GPU"}
INTRO = """# Benchmarks

Written by `make bench` (`bench/run.py`, then `bench/report.py`) from the files in `bench/results`; do not edit.

The contenders of a case take turns in one process, in a new random order each round; times are medians over the rounds,
compile time left out. Before they are timed they are checked: pyrx against the plain PyTorch reference with the same
masks, the others by their values or their statistics. `make bench-compare BASE=<commit>` pairs two versions likewise.

- *best peer*: the fastest of the PyTorch forms (eager and compiled) and other libraries.
- *times as fast*: best peer's time over pyrx's, with the quartiles of that ratio within one round.
- *floor*: what no op could avoid, measured in the same rounds: the bare matrix products of the same size by the fastest
  library, or a copy of the bytes that must move. The head on the CPU makes its gradients without two of its
  three products, so it can be below its floor.
- *limit*: best peer over floor: as many times as fast as an op that does nothing else would be.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def image(text: str, path: Path, page: Path) -> str:
    return f"![{text}]({path.relative_to(page.parent).as_posix()})"


def targets(results: Results) -> tuple[str, str]:
    """How many of the measured targets of this device are met; all of them, the missed first, what is missed bold."""
    lines, states = goals.rows(results)
    order = sorted(range(len(lines)), key=lambda i: (states[i] is None, states[i] is not False))
    marks = {True: "met", False: "missed", None: ""}
    rows = [[*lines[i], marks[states[i]]] for i in order]
    known = [each for each in states if each is not None]
    counts = f"{sum(known)} of the {len(known)} targets measured on the {DEVICES[results.device]} are met"
    counts += f", {len(states) - len(known)} more are not measured" if len(known) < len(states) else ""
    return counts, table(["", "against", "asked", *goals.DTYPES, ""], rows)


def case_rows(case: Case) -> Iterator[list[str]]:
    ms = medians(case)
    names = [each["name"] for each in case["contenders"] if each["kind"] == "pyrx"]
    for name in names:
        row = [case_name(case["params"]) if name == names[0] else "", name, milliseconds(ms[name])]
        speed, floor, limit = (comparison(case, name, measure) for measure in ("speed", "floor", "limit"))
        if speed is None:
            row += ["", ""]
        else:
            row.append(f"{speed['against']}, {milliseconds(ms[speed['against']])}")
            row.append(f"**{times(speed['ratio'])}** ({times(speed['p25'])} to {times(speed['p75'])})")
        row.append("" if limit is None else times(limit["ratio"]))
        row.append("" if floor is None else f"{floor['ratio']:.2f}")
        yield row


COLUMNS = ["case", "pyrx", "ms", "best peer, ms", "times as fast", "limit", "times the floor"]


def all_times(cases: list[Case]) -> str:
    """The median of every contender, a line a case."""
    names = list(dict.fromkeys(each["name"] for case in cases for each in case["contenders"]))
    rows = [
        [case_name(case["params"]), *(milliseconds(medians(case)[n]) if n in medians(case) else "" for n in names)]
        for case in cases
    ]
    failed = dict.fromkeys(
        f"- {each['name']}: {each['error'].splitlines()[0]}" for case in cases for each in case["failed"]
    )
    return "\n\n".join([table(["median, ms", *names], rows), *(["\n".join(failed)] if failed else [])])


def memory_table(memory: dict[str, Any]) -> str:
    over = memory.get("over", "M")  # what is varied
    sizes = sorted({each[over] for each in memory["peaks"]})
    peaks = {(each["name"], each[over]): each["bytes"] / 2**20 for each in memory["peaks"]}
    names = dict.fromkeys(each["name"] for each in memory["peaks"])
    rows = [[name, *(f"{peaks[name, size]:.1f}" for size in sizes)] for name in names]
    head = [f"peak extra memory of a step, MiB ({case_name(memory['params'])})", *(f"{over} = {n}" for n in sizes)]
    return table(head, rows)


def conditions(file: File) -> str:
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
    return "  \n".join(lines)


def warnings(file: File) -> list[str]:
    found = []
    unsteady = [case for case in whole(file) if not steady(case)]
    if unsteady and not file["quick"]:
        found.append(
            f"**Unsteady: in {len(unsteady)} of {len(whole(file))} cases pyrx or the floor had a median over "
            f"{STEADY:g} times its minimum, so other work was running; measure again.**"
        )
    if file["quick"]:
        found.append("**A quick run: it shows that the benchmarks work, not how fast anything is.**")
    if not file["extension"]["loaded"]:
        found.append(f"**Without the extension, so pyrx is its plain PyTorch reference**: {file['extension']['error']}")
    return found


def section(file: File, figures: list[str]) -> str:
    parts = [f"## {file['row']}, {DEVICES[file['device']]}", *warnings(file), *figures]
    details = [conditions(file)]
    for op in dict.fromkeys(title(case) for case in file["cases"]):
        cases = [case for case in whole(file) if title(case) == op]
        points = [case for case in file["cases"] if title(case) == op and "grows" in case]
        if cases:
            parts += [f"### {op}", table(COLUMNS, [row for case in cases for row in case_rows(case)])]
        details += [f"**{op}**\n\n{all_times(each)}" for each in (cases, points) if each]
    parts += [memory_table(each) for each in file["memory"]]
    return "\n\n".join([*parts, folded("conditions, and every contender", "\n\n".join(details))])


def write_page(files: list[File], folder: Path, page: Path) -> None:
    parts = [INTRO.strip()]
    for device, name in DEVICES.items():
        own = [file for file in files if file["device"] == device]
        path = charts.headline(own, folder / f"headline-{device}.svg") if own else None
        parts += [f"## At a glance, {name}"] if own else []
        parts += [image(f"times as fast as the best peer, every op, {name}", path, page)] if path else []
        if own:
            counts, lines = targets(Results(files, device))
            parts += [f"**{counts}**", lines] if device == "cpu" else [folded(counts, lines)]
    for file in files:
        name, figures = f"{file['row']}-{file['device']}.svg", []
        if file["row"] == goals.HEAD and (path := charts.head(file, folder / f"head-{file['device']}.svg")):
            figures.append(image("times as fast as the best PyTorch form", path, page))
        if path := charts.growth(file, folder / "growth" / name):
            figures.append(image(f"time over size, {file['row']}", path, page))
        parts.append(section(file, figures))
    page.write_text("\n\n".join(parts) + "\n")


def short_table(files: list[File]) -> str:
    lines = [f"{'':<52} {'pyrx ms':>8} {'peer ms':>8} {'ratio':>6} {'floor':>6}"]
    for file in files:
        unsteady = not file["quick"] and not all(map(steady, whole(file)))
        mark = " (quick)" if file["quick"] else " (unsteady: other work was running)" if unsteady else ""
        lines.append(f"{file['row']}, {file['device']}{mark}")
        for case in whole(file):
            ms = medians(case)
            for each in case["contenders"]:
                speed, floor = (comparison(case, each["name"], measure) for measure in ("speed", "floor"))
                if each["kind"] != "pyrx" or speed is None:
                    continue
                name = f"  {case_name(case['params'])}: {each['name'][4:].strip() or case['params']['op']}"
                over = f"{floor['ratio']:.2f}" if floor else ""
                lines.append(
                    f"{name:<52} {milliseconds(ms[each['name']]):>8} {milliseconds(ms[speed['against']]):>8} "
                    f"{speed['ratio']:>6.2f} {over:>6}"
                )
    for device in DEVICES:
        if any(file["device"] == device for file in files):
            found, states = goals.rows(Results(files, device))
            missed = [" ".join(line).replace("*", "") for line, ok in zip(found, states, strict=True) if ok is False]
            lines.append(f"{device}: {states.count(True)} targets met, {len(missed)} missed")
            lines += [f"  {each}" for each in missed]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--out", type=Path, help="the page; default: README.md of bench, or of the folder given")
    parser.add_argument("--check", action="store_true", help="only compare README.md's tables with the files")
    arguments = parser.parse_args()
    files = load(arguments.results)
    if not files:
        parser.error(f"no result files in {arguments.results}: make bench writes them")
    whole_run = arguments.results.resolve() == HERE / "results"
    if arguments.check:
        stale = readme.stale(files)
        print("\n".join(stale) or "README.md's tables are those of the result files")
        return bool(stale)
    page = arguments.out or (HERE if whole_run else arguments.results) / "README.md"
    write_page(files, arguments.results, page)
    if whole_run:
        readme.write(files)
    print(short_table(files))
    print(f"page: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
