"""Measures every op against what a user would pick instead: python bench/run.py [--device cuda] [--quick] [-k dropout]

Writes one result file per row and device, after every case, so that a run that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
missing = [name for name in ("torch", "pytest", "pytest_benchmark", "tqdm") if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"bench/run.py needs {', '.join(missing)}: pip install {' '.join(missing).replace('_', '-')}")

import pytest  # noqa: E402
import torch  # noqa: E402
from harness import SETTINGS, is_sweep, set_threads  # noqa: E402
from tqdm import tqdm  # noqa: E402

from pyrx import _extension, info  # noqa: E402

SCHEMA = 1
SOURCES = ("pyrx", "csrc", "triton_kernels", "setup.py", "bench/*.py")


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(HERE.parent), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def header(device: str, quick: bool) -> dict[str, Any]:
    """What one must know to read the times."""
    found = info.collect()
    changes = git("status", "--porcelain", "--", *SOURCES)
    record = found["build"]["record"] or {}
    return {
        "schema": SCHEMA,
        "device": device,
        "quick": quick,
        "started": now(),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "machine": {
            "cpu": found["machine"]["cpu"],
            "cores": os.cpu_count(),
            "threads": set_threads(),
            "cpu_capability": found["machine"]["cpu_capability"],
            "gpu": found["machine"]["gpu"],
            "platform": platform.platform(),
        },
        "versions": found["versions"],
        "extension": {
            "loaded": found["build"]["loaded"],
            "error": found["build"]["error"],
            "flags": record.get("cxx_flags"),
            "arch_list": record.get("arch_list"),
        },
    }


class Recorder:
    """A pytest plugin: the progress bar, the failures, and the result files."""

    def __init__(self, out: Path, head: dict[str, Any], deadline: float | None = None) -> None:
        self.out, self.head, self.deadline = out, head, deadline
        self.cases, self.seconds = 0, SETTINGS.seconds
        self.files: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []
        self.bar: tqdm | None = None
        SETTINGS.sink, SETTINGS.say = self.keep, tqdm.write

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Where time is short, every row's first case, then every row's second: no row goes unmeasured. Sweeps last."""
        if self.deadline is not None:
            places: dict[Path, int] = {}
            order = {}
            for item in items:
                places[item.path] = places.get(item.path, -1) + 1
                order[item] = (is_sweep(item), places[item.path])
            items.sort(key=order.__getitem__)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.deadline is None:
            return
        left = self.deadline - time.perf_counter()
        if is_sweep(item):  # with what time is left
            if left <= 0:
                pytest.skip("no time was left")
            SETTINGS.seconds = self.seconds
            return
        if left <= 0:
            self.fail(item.nodeid, "no time was left for this case")
            pytest.skip("no time was left")
        # half of a case's time goes to compiling and checking
        SETTINGS.seconds = min(self.seconds, left / self.cases / 2)
        self.cases -= 1

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.cases = sum(not is_sweep(item) for item in session.items)
        self.bar = tqdm(total=len(session.items), unit="case", disable=not session.items, smoothing=0)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.fail(report.nodeid, str(report.longrepr))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(nodeid.split("::")[-1])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.fail(report.nodeid, report.longreprtext)
        if report.when == "teardown" and self.bar is not None:
            self.bar.update()

    def pytest_sessionfinish(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def fail(self, name: str, text: str) -> None:
        self.failed.append(name)
        tqdm.write(f"{text}\nFAILED {name}")

    def keep(self, row: str, result: dict[str, Any]) -> None:
        file = self.files.setdefault(row, {**self.head, "row": row, "cases": [], "memory": []})
        file["finished"] = now()
        file["memory" if result["kind"] == "memory" else "cases"].append(result)
        path = self.out / f"{row}-{self.head['device']}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(file, indent=1) + "\n")
        part.replace(path)
        tqdm.write(summary(result))


def summary(result: dict[str, Any]) -> str:
    name = " ".join(str(value) for value in result["params"].values())
    if "grows" in result:
        name += f" ({result['grows']['over']} grows)"
    if result["kind"] == "memory":
        over = result.get("over", "M")
        peaks = (f"{each['name']} {over}={each[over]}: {each['bytes'] / 2**20:.1f} MiB" for each in result["peaks"])
        return f"{name}: peak extra memory\n  " + "\n  ".join(peaks)
    ms = {each["name"]: each["ms"]["median"] for each in result["contenders"]}
    lines = [f"{name}: {result['rounds']} rounds"]
    for each in result["comparisons"]:
        if each["measure"] != "limit":
            goal = "" if each["target"] is None else f" (target {each['target']}: {'met' if each['met'] else 'missed'})"
            against = f"{each['against']}, {ms[each['against']]:.3g} ms"
            measure = "times as fast as" if each["measure"] == "speed" else "times the time of"
            ours = f"{each['contender']}, {ms[each['contender']]:.3g} ms"
            lines.append(f"  {ours}: {each['ratio']:.2f} {measure} {against}{goal}")
    return "\n".join(lines)


def rows_apart(rows: list[str]) -> int:
    """A process for each row: new memory would be made of what other rows left in the heap, or not, as it happens."""
    worst = 0
    for i, row in enumerate(rows, 1):
        print(f"{row}, row {i} of {len(rows)}", flush=True)
        worst = max(worst, subprocess.run([sys.executable, __file__, *sys.argv[1:], "--row", row]).returncode)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    # part of a run must not replace the files of a whole one
    parser.add_argument("--out", type=Path, help="default: bench/results, or bench/out with --quick or -k")
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds: whether it works, not how fast")
    parser.add_argument("-k", metavar="FILTER", help="only the cases whose name matches, as pytest's -k")
    parser.add_argument("--minutes", type=float, help="share this time among the cases, a case of every row first")
    parser.add_argument("--row", help="only the cases of this row")
    arguments = parser.parse_args()
    started = time.perf_counter()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device (python -m pyrx.info says more)")
    partial_run = arguments.quick or arguments.k is not None
    out = arguments.out or HERE / ("out" if partial_run else "results")
    out.mkdir(parents=True, exist_ok=True)
    SETTINGS.device, SETTINGS.quick = arguments.device, arguments.quick
    if arguments.device == "cuda":
        SETTINGS.seconds = 3.0
    if _extension.error is not None:
        print(f"pyrx is measured on its plain PyTorch reference: {_extension.error}")
    if arguments.device == "cpu" and not arguments.row and (load := os.getloadavg()[0]) > 0.5:
        print(f"other work is running (load average {load:.1f}): times will be too long and unsteady")

    # the head first, so that a run that a time limit cuts short has measured it
    found = (path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    rows = sorted(found, key=lambda row: (row != "multi_sample_dropout", row))
    if arguments.row is not None:
        if arguments.row not in rows:
            parser.error(f"--row: expected one of {', '.join(rows)}, got {arguments.row}")
        rows = [arguments.row]
    elif arguments.device == "cpu" and arguments.minutes is None and not partial_run:
        return rows_apart(rows)

    deadline = None if arguments.minutes is None else started + 60 * arguments.minutes
    recorder = Recorder(out, header(arguments.device, arguments.quick), deadline)
    options = ["-p", "no:terminal", "-p", "no:cacheprovider", "-o", "python_files=bench_*.py", "-o", "addopts="]
    options += ["--benchmark-quiet", "--capture=no", "--rootdir", str(HERE)]
    options += ["-k", arguments.k] if arguments.k else []
    status = pytest.main([*options, *(str(HERE / f"bench_{row}.py") for row in rows)], plugins=[recorder])
    print(f"{time.perf_counter() - started:.0f} s; results of {', '.join(recorder.files) or 'nothing'} in {out}")
    if recorder.failed:
        print("failed: " + ", ".join(recorder.failed))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
