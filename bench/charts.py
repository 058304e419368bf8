"""The charts of the report, as SVG on nothing, in colours that are read on white and on black."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from outcomes import Case, File, comparison, medians, milliseconds, times, title, whole

INK, FAINT = "#808080", "#80808040"
COLOURS = {"pyrx independent": "#2f8fdd", "pyrx antithetic": "#e08a1e"}
DTYPE_COLOURS = {"float32": "#2f8fdd", "bfloat16": "#e08a1e"}
MARKS = {"float32": "o", "bfloat16": "D"}
OTHERS = ("#e08a1e", "#3fa34d", "#c2528b", "#8a6fd1")
# of ops that the public function calls otherwise
NAMES = {
    "uint8 to normalised": "cutmix of uint8, normalised",
    "multi_sample_dropout_cross_entropy": "multi_sample_dropout head",
    "from_dense": "BlockMask.from_dense",
    "block_mass": "search.lse_cached, its pass",
    "block_recall": "search.recall",
    "block_pool": "search.pooled, its means",
}
PANELS = 3  # side by side
PEERS = 3  # lines of peers in a panel


def library() -> Any:
    """matplotlib.pyplot, or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no charts: matplotlib is not installed (pip install -e '.[bench]')")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
                            "ytick.color": INK, "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "pyrx",
                            "font.family": "sans-serif"})  # fmt: skip
    return pyplot


def save(pyplot: Any, figure: Any, path: Path) -> Path:
    """The same results give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    text = "\n".join(line.rstrip() for line in path.read_text().splitlines())
    path.write_text(text + "\n")
    return path


def machine(file: File) -> str:
    if file["device"] == "cuda":
        return str(file["machine"]["gpu"][0].split(",")[0])
    return f"{file['machine']['threads']} threads of {file['machine']['cpu']}"


def leading(case: Case) -> dict[str, Any] | None:
    """The case's first pyrx contender against its best peer."""
    names = [each["name"] for each in case["contenders"] if each["kind"] == "pyrx"]
    return next((found for name in names if (found := comparison(case, name, "speed")) is not None), None)


def headlines(files: Sequence[File]) -> dict[str, dict[str, list[float]]]:
    """Of each op and dtype how many times as fast as its best peer every case is."""
    found: dict[str, dict[str, list[float]]] = {}
    for case in (case for file in files for case in whole(file)):
        speed = leading(case)
        if speed is not None:
            name = case["params"]["op"].split(",")[0]
            of_op = found.setdefault(NAMES.get(name, name), {})
            of_op.setdefault(case["params"].get("dtype", "float32"), []).append(speed["ratio"])
    return found


def headline(files: Sequence[File], path: Path) -> Path | None:
    """A dot for each op and dtype: the geometric mean over its cases; a line from the worst to the best of them."""
    pyplot = library()
    found = headlines(files)
    if pyplot is None or not found:
        return None

    def mean(ratios: Sequence[float]) -> float:
        return math.exp(sum(map(math.log, ratios)) / len(ratios))

    order = sorted(found, key=lambda op: mean([mean(each) for each in found[op].values()]))
    figure, axis = pyplot.subplots(figsize=(9, 0.9 + 0.3 * len(order)), layout="constrained")
    seen = set()
    for i, op in enumerate(order):
        shown = [dtype for dtype in DTYPE_COLOURS if dtype in found[op]] + [
            dtype for dtype in found[op] if dtype not in DTYPE_COLOURS
        ]
        for j, dtype in enumerate(shown):
            ratios, y = found[op][dtype], i + 0.3 * ((len(shown) - 1) / 2 - j)
            colour = DTYPE_COLOURS.get(dtype, "#3fa34d")
            axis.plot([min(ratios), max(ratios)], [y, y], color=colour, linewidth=2, alpha=0.45, solid_capstyle="round")
            label = dtype if dtype not in seen else None
            axis.plot(mean(ratios), y, MARKS.get(dtype, "s"), color=colour, markersize=6, label=label, linestyle="")
            seen.add(dtype)
        text = ", ".join(f"{times(mean(found[op][dtype]))}×" for dtype in shown)
        axis.text(1.01, i, text, transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    axis.axvline(1, color=INK, linewidth=1, linestyle="--")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_yticks(range(len(order)), order)
    axis.set_ylim(-0.7, len(order) - 0.3)
    axis.set_xlabel(
        "times as fast as the best of PyTorch, eager and compiled, and the named libraries (dashed: as fast)"
    )
    axis.grid(axis="x", color=FAINT, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    handles = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    names = [each for each in (*DTYPE_COLOURS, *handles) if each in handles]
    axis.legend(
        [handles[each] for each in dict.fromkeys(names)], dict.fromkeys(names), loc="lower right", frameon=False
    )
    axis.set_title(f"pyrx on {machine(files[0])}: mean, worst and best case of each op", fontsize=11)
    return save(pyplot, figure, path)


def sweeps(file: File) -> dict[tuple[str, str], list[Case]]:
    """The points of each line of time over size: of an op, by what grows, ascending."""
    found: dict[tuple[str, str], list[Case]] = {}
    for case in file["cases"]:
        if "grows" in case:
            found.setdefault((title(case), case["grows"]["over"]), []).append(case)
    for points in found.values():
        points.sort(key=lambda case: case["grows"]["at"])
    return {key: points for key, points in found.items() if len(points) > 1}


def lines(points: Sequence[Case]) -> Iterator[tuple[str, str, str, list[tuple[float, float]]]]:
    """Kind, name, label and (size, milliseconds) of pyrx's first contender, of each best peer, and of the floor."""
    speeds = [leading(case) for case in points]
    first = next(each["name"] for each in points[0]["contenders"] if each["kind"] == "pyrx")
    names = [("pyrx", speed["of"] if (speed := speeds[0]) else first)]
    floor = comparison(points[0], names[0][1], "floor")
    # the peer that leads at the most sizes first
    best = [each["against"] for each in speeds if each is not None]
    names += [("peer", name) for name in sorted(dict.fromkeys(best), key=best.count, reverse=True)[:PEERS]]
    names += [("floor", floor["against"])] if floor is not None else []
    if not best:
        names += [
            (each["kind"], each["name"])
            for each in points[0]["contenders"]
            if each["kind"] in ("pyrx", "other") and each["name"] != names[0][1]
        ][: len(OTHERS)]
    for kind, name in names:
        found = [(case["grows"]["at"], medians(case)[name]) for case in points if name in medians(case)]
        yield kind, name, name if kind != "floor" or "floor" in name else f"floor: {name}", found


def growth(file: File, path: Path) -> Path | None:
    """A panel for each sweep of the row, time over size, both in logarithms."""
    found = sweeps(file)
    pyplot = library() if found else None
    if pyplot is None:
        return None
    across = 2 if len(found) == 4 else min(PANELS, len(found))
    down = math.ceil(len(found) / across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(4.1 * across, 3.5 * down), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, ((op, over), points) in zip(axes.flat, found.items(), strict=False):
        colours = iter(OTHERS)
        for i, (kind, _, label, values) in enumerate(lines(points)):
            first = i == 0
            colour = "#2f8fdd" if first else INK if kind == "floor" else next(colours)
            style = {"linestyle": ":" if kind == "floor" else "-", "marker": "" if kind == "floor" else "o"}
            axis.plot(*zip(*values, strict=True), color=colour, linewidth=2.2 if first else 1.5, markersize=4,
                      label=label, **style)  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        sizes = [case["grows"]["at"] for case in points]
        axis.set_xticks(sizes, [f"{size:,}".replace(",", " ") if size < 10**5 else f"{size:.0e}" for size in sizes])
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        if len(sizes) > 4:
            axis.tick_params(axis="x", labelsize=8)
        axis.yaxis.set_major_formatter(lambda value, _: milliseconds(value))
        axis.set(title=op, xlabel=f"{over}  ({fixed(points)})", ylabel="ms")
        axis.title.set_fontsize(10)
        axis.xaxis.label.set_fontsize(9)
        axis.grid(color=FAINT, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Time over size, {machine(file)}", fontsize=11)
    return save(pyplot, figure, path)


def fixed(points: Sequence[Case]) -> str:
    """What stays the same from size to size, in short."""
    params = [case["params"] for case in points]
    same = {k: v for k, v in params[0].items() if k not in ("op", "p", "method") and all(p.get(k) == v for p in params)}
    if "shape" in params[0] and "shape" not in same:
        sizes = zip(*(each["shape"] for each in params), strict=True)
        same = {"shape": "x".join(str(column[0]) if len(set(column)) == 1 else "·" for column in sizes), **same}
    shown = []
    for key, value in same.items():
        if value is False or (isinstance(value, str) and key not in ("dtype", "ratio", "shape", "nm", "n:m")):
            continue
        text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
        shown.append(key if value is True else text if key in ("shape", "dtype", "nm", "n:m") else f"{key} {text}")
    return ", ".join(shown)


def head(file: File, path: Path) -> Path | None:
    """How many times as fast as the best PyTorch form a training step of the head is."""
    pyplot = library()
    if pyplot is None or not whole(file):
        return None
    dtypes = list(dict.fromkeys(case["params"]["dtype"] for case in whole(file)))
    tallest = max(sum(case["params"]["dtype"] == dtype for case in whole(file)) for dtype in dtypes)
    figure, axes = pyplot.subplots(
        1, len(dtypes), figsize=(5.5 * len(dtypes), 1 + 0.95 * tallest), squeeze=False, layout="constrained"
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        cases = [case for case in whole(file) if case["params"]["dtype"] == dtype]
        labels = []
        for i, case in enumerate(cases):
            ms = medians(case)
            best = ""
            for j, (name, colour) in enumerate(COLOURS.items()):
                speed = comparison(case, name, "speed")
                if speed is None:
                    continue
                axis.barh(i + 0.36 * (j - 0.5), speed["ratio"], 0.34, color=colour, label=name if i == 0 else None)
                end = (speed["ratio"], i + 0.36 * (j - 0.5))
                text = f"{speed['ratio']:.1f}×, {milliseconds(ms[name])} ms"
                axis.annotate(text, end, (4, 0), textcoords="offset points", va="center")
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
    figure.suptitle(f"Multi-sample dropout head, forward and backward, {machine(file)}")
    return save(pyplot, figure, path)
