"""The directive `bench`: a chart and a table of the cases of a result file, made when the pages are built.

```{bench} batch_mix-cpu
:op: cutmix*
```
"""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import matplotlib
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

matplotlib.use("svg")
from matplotlib import pyplot

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
INK = "#808080"  # grey text reads on white and on black
FASTER, SLOWER = "#2f8fdd", "#e08a1e"


def number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def shown(value: Any) -> str:
    return " × ".join(map(str, value)) if isinstance(value, list) else str(value)


def case_name(params: dict[str, Any], constant: set[str]) -> str:
    """What tells a case from the others of its table."""
    return ", ".join(
        shown(v) if isinstance(v, (str, list)) else f"{k} {v}" for k, v in params.items() if k not in constant
    )


def matches(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatch(name, each.strip()) for each in patterns.split(";"))


def rows_of(row: str, cases: list[dict[str, Any]], contenders: str) -> list[dict[str, Any]]:
    varied = {k for case in cases for k in case["params"]}
    constant = {k for k in varied if len({json.dumps(case["params"].get(k)) for case in cases}) == 1}
    prefix = f"{row}, " if all(case["params"]["op"].startswith(row) for case in cases) else ""
    rows = []
    for case in cases:
        ms = {each["name"]: each["ms"]["median"] for each in case["contenders"]}
        floors = {each["of"]: ms[each["against"]] for each in case["comparisons"] if each["measure"] == "floor"}
        for each in case["comparisons"]:
            if each["measure"] == "speed" and each.get("best_peer") and matches(each["of"], contenders):
                rows.append(
                    {
                        "case": case_name(case["params"], constant).removeprefix(prefix),
                        "of": each["of"],
                        "ms": ms[each["of"]],
                        "peer": each["against"],
                        "peer_ms": ms[each["against"]],
                        "ratio": each["ratio"],
                        "floor": floors.get(each["of"]),
                    }
                )
    return rows


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """How many times as fast as the best peer, a bar a row."""
    settings = {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    # paths, not fonts of the reader's; nothing that changes from build to build
    settings |= {"font.size": 9, "svg.fonttype": "path", "svg.hashsalt": "pyrx"}
    with pyplot.rc_context(settings):
        figure, axis = pyplot.subplots(figsize=(9, 0.7 + 0.3 * len(rows)), layout="constrained")
        for i, row in enumerate(rows):
            ratio = row["ratio"]
            axis.barh(i, ratio - 1, 0.7, left=1, color=FASTER if ratio >= 1 else SLOWER)
            text = f" {number(ratio)}×, {number(row['ms'])} ms"
            axis.text(max(ratio, 1), i, text, va="center")
        names = [", ".join(filter(None, [row["case"], row["of"].removeprefix("pyrx").strip(" ,")])) for row in rows]
        axis.set_yticks(range(len(rows)), [name or "pyrx" for name in names])
        axis.invert_yaxis()
        axis.axvline(1, color=INK, linewidth=1, linestyle="--")
        ratios = [row["ratio"] for row in rows]
        if max(ratios) > 8:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            left = min(0.8, 0.8 * min(ratios))
            axis.set_xlim(left, max(ratios) * (max(ratios) / left) ** 0.5)
        else:
            axis.set_xlim(min(0.8, 0.8 * min(ratios)), 1.4 * max(ratios))
        axis.set_xlabel("times as fast as the best peer")
        axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        pyplot.close(figure)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| case | | ms | best peer | ms | times as fast | floor, ms |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        floor = number(row["floor"]) if row["floor"] is not None else ""
        cells = [
            row["case"],
            row["of"],
            number(row["ms"]),
            row["peer"],
            number(row["peer_ms"]),
            number(row["ratio"]),
            floor,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def conditions(file: dict[str, Any]) -> str:
    machine, versions = file["machine"], file["versions"]
    where = machine["gpu"][0] if machine["gpu"] else f"{machine['cpu']} ({machine['cpu_capability']})"
    threads = "" if machine["gpu"] else f", {machine['threads']} threads"
    commit = (file["commit"] or "unknown")[:10]
    return f"{where}{threads}, torch {versions['torch']}, {file['started'][:10]}, commit {commit}."


class Results(SphinxDirective):
    required_arguments = 1
    option_spec = dict.fromkeys(("op", "contenders", "device"), directives.unchanged)

    def files(self) -> list[dict[str, Any]]:
        paths = sorted(RESULTS.glob(f"{self.arguments[0]}-{self.options.get('device', '*')}.json"))
        for path in paths:
            self.env.note_dependency(str(path))
        found = [json.loads(path.read_text()) for path in paths]
        return [file for file in found if not file["quick"]]


class Bench(Results):
    """Of a row: the cases whose op matches `op`, the contenders that match one of `contenders` (a; b)."""

    def run(self) -> list[nodes.Node]:
        made = [node for file in self.files() for node in self.of(file)]
        if not made:
            raise self.error(f"no result of {self.arguments[0]} matches {self.options}")
        return made

    def of(self, file: dict[str, Any]) -> list[nodes.Node]:
        # cases that show growth have charts of their own in bench/README.md
        cases = [
            case
            for case in file["cases"]
            if fnmatch.fnmatch(case["params"]["op"], self.options.get("op", "*"))
            and not ("grows" in case or "grows" in case["params"])
        ]
        rows = rows_of(file["row"], cases, self.options.get("contenders", "*"))
        if not rows:
            return []
        page = self.env.docname.replace("/", "-")
        name = f"{file['row']}-{file['device']}-{page}-{self.env.new_serialno('bench')}.svg"
        (Path(self.env.srcdir) / "_figures").mkdir(exist_ok=True)
        chart(rows, Path(self.env.srcdir) / "_figures" / name)
        slower = sum(row["ratio"] < 1 for row in rows)
        told = f" Slower than the best peer: {slower} of {len(rows)} rows." if slower else ""
        return [
            *self.parse_text_to_nodes(
                f"![times as fast as the best peer](/_figures/{name})\n\n{conditions(file)}{told}"
            ),
            nodes.raw("", "<details><summary>the figures</summary>", format="html"),
            *self.parse_text_to_nodes(table(rows)),
            nodes.raw("", "</details>", format="html"),
        ]


class Memory(Results):
    """Of a row: the peak of extra memory of a step."""

    def run(self) -> list[nodes.Node]:
        tables = [(file, each) for file in self.files() for each in file["memory"]]
        if not tables:
            raise self.error(f"no memory was measured of {self.arguments[0]}")
        return [node for file, each in tables for node in self.parse_text_to_nodes(memory_table(file, each))]


def memory_table(file: dict[str, Any], memory: dict[str, Any]) -> str:
    over = memory.get("over", "M")  # what is varied
    sizes = sorted({each[over] for each in memory["peaks"]})
    peaks = {(each["name"], each[over]): each["bytes"] / 2**20 for each in memory["peaks"]}
    lines = [
        f"MiB, {case_name(memory['params'], {'op', 'p'})}, {file['device']}:",
        "",
        "| | " + " | ".join(f"{over} = {size}" for size in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for name in dict.fromkeys(each["name"] for each in memory["peaks"]):
        cells = [number(peaks[name, size]) if (name, size) in peaks else "" for size in sizes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("bench", Bench)
    app.add_directive("memory", Memory)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
