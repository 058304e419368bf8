"""Whether the working tree is slower than a commit: python bench/compare.py BASE [-k dropout] [--device cuda] [--quick]

BASE is built in a git worktree of its own, which is kept. Two processes, one with BASE's pyrx and one with this tree's,
set up the same case with the same seed and take turns, visit by visit, in random order. Both run this tree's benchmark
files: a case that BASE cannot run is named. A case is slower where both quartiles of the ratios of its rounds say so,
in three pairs of processes; then the exit status is 1. Only pyrx is timed; checks and peers belong to `make bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

SLOWER = 1.05  # time over BASE's from which on it counts
# a process can be slow by how its memory happens to lie: of one tree against itself every tenth result was "slower"
CONFIRMATIONS = 2
TREES = ("base", "new")
# what a pyrx built from another commit can share: nothing of these has changed
COMPILED = ("csrc", "setup.py")


# The parent: builds, pairs, judges.


def git(*arguments: str, at: Path = ROOT) -> str:
    done = subprocess.run(["git", "-C", str(at), *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def built(tree: Path) -> bool:
    """To the end: with the module that the record tells of."""
    record = tree / "pyrx" / "_build_info.json"
    if not record.exists():
        return False
    return not json.loads(record.read_text()).get("extension") or any((tree / "pyrx").glob("_C*.so"))


def same_sources(sha: str) -> bool:
    """Whether the extension that is built here is BASE's too."""
    same = subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", sha, "--", *COMPILED]).returncode == 0
    return same and not git("status", "--porcelain", "--untracked-files=all", "--", *COMPILED)


def tree_of(base: str) -> tuple[str, Path]:
    """BASE's commit, and the folder where it is checked out and built."""
    sha = git("rev-parse", "--verify", f"{base}^{{commit}}")
    tree = ROOT / "build" / "compare" / sha[:12]
    git("worktree", "prune")
    if not (tree / "setup.py").exists():
        tree.parent.mkdir(parents=True, exist_ok=True)
        git("worktree", "add", "--force", "--detach", str(tree), sha)
    if built(tree):
        return sha, tree
    if built(ROOT) and same_sources(sha):
        for file in [*(ROOT / "pyrx").glob("_C*.so"), ROOT / "pyrx" / "_build_info.json"]:
            shutil.copy2(file, tree / "pyrx")
    else:
        print(f"building {base} ({sha[:12]}) in {tree} (minutes)", flush=True)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        if subprocess.run(command, cwd=tree, env=environment(tree), stdout=sys.stderr).returncode:
            sys.exit(f"{base} does not build")
    return sha, tree


def environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree)}


class Worker:
    """A process with one tree's pyrx, which sets up the cases and times its contenders when asked."""

    def __init__(self, tree: Path, options: Sequence[str]) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(tree), *options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(tree), cwd=tree
        )

    def send(self, **message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, **message: Any) -> dict[str, Any]:
        self.send(**message)
        return self.receive()


@contextmanager
def workers(trees: dict[str, Path], options: Sequence[str]) -> Iterator[dict[str, Worker]]:
    pair = {name: Worker(tree, options) for name, tree in trees.items()}
    try:
        yield pair
    finally:
        for each in pair.values():
            each.process.kill()
            each.process.wait()


def quartiles(values: Sequence[float]) -> dict[str, float]:
    from harness import quantiles

    return {name: value for name, value in quantiles(values).items() if name != "min"}


def judge(contender: str, ms: dict[str, list[float]]) -> dict[str, Any]:
    """Of one contender: both trees' times, round by round, as a ratio with its quartiles, and what that says."""
    ratio = quartiles([new / base for base, new in zip(ms["base"], ms["new"], strict=True)])
    verdict = "slower" if ratio["p25"] > SLOWER else "faster" if ratio["p75"] < 1 / SLOWER else "same"
    times = {tree: quartiles(ms[tree])["median"] for tree in TREES}
    return {"contender": contender, "ms": times, "ratio": ratio, "rounds": len(ms["base"]), "verdict": verdict}


Warm = dict[str, dict[str, dict[str, Any]]]  # tree, contender: its rough seconds and calls a visit, or the error


def pair(
    both: dict[str, Worker], warm: Warm, names: Sequence[str], seconds: float, limits: tuple[int, int]
) -> list[dict[str, Any]]:
    """The contenders that run in both trees, in turns."""
    if not names:
        return []
    calls = {name: max(warm[tree][name]["calls"] for tree in TREES) for name in names}
    a_round = sum((calls[name] + 1) * warm[tree][name]["seconds"] for name in names for tree in TREES)
    rounds = min(limits[1], max(limits[0], int(seconds / a_round)))
    ms: dict[str, dict[str, list[float]]] = {name: {tree: [] for tree in TREES} for name in names}
    order, turns, shuffle = list(names), list(TREES), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            shuffle(turns)
            for tree in turns:
                time.sleep(2e-3)  # until the other's threads have stopped spinning
                ms[name][tree].append(both[tree].ask(do="visit", name=name, calls=calls[name])["ms"])
    return [judge(name, ms[name]) for name in names]


def measure(
    trees: dict[str, Path], options: Sequence[str], seconds: float, limits: tuple[int, int], only: Sequence[str] | None
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[str]]]:
    """Of every case what came of its contenders, and what could not be compared: by tree, the reasons."""
    found: dict[str, list[dict[str, Any]]] = {}
    alone: dict[str, list[str]] = {"base": [], "new": []}  # what fails or is absent there
    with workers(trees, options) as both:
        listed = {tree: worker.receive() for tree, worker in both.items()}
        for tree in TREES:
            alone[tree] += [f"{each} does not load" for each in listed[tree]["broken"]]
            other = set(listed["new" if tree == "base" else "base"]["cases"])
            alone[tree] += [f"{each} is absent" for each in sorted(other - set(listed[tree]["cases"]))]
        shared = [each for each in listed["new"]["cases"] if each in set(listed["base"]["cases"])]
        shared = [each for each in shared if only is None or each in only]
        for worker in both.values():
            worker.send(run=shared)
        for case in shared:
            states = {tree: worker.receive() for tree, worker in both.items()}
            for tree, state in states.items():
                assert state["case"] == case, f"{tree} is at {state['case']}, expected {case}"
                if "error" in state:
                    alone[tree].append(f"{case} fails: {state['error']}")
            ready = {tree: both[tree] for tree in TREES if states[tree].get("contenders")}
            if len(ready) == len(TREES):
                warm = {tree: worker.ask(do="warm")["contenders"] for tree, worker in both.items()}
                names = list(warm["new"] | warm["base"])
                for tree in TREES:
                    why = {each: warm[tree].get(each, {"error": "is absent"}).get("error") for each in names}
                    alone[tree] += [f"{case}: {each}: {error}" for each, error in why.items() if error]
                    names = [each for each in names if not why[each]]
                results = pair(both, warm, names, seconds, limits)
                found |= {case: results} if results else {}
                for each in results:
                    print(line(case, each), flush=True)
            for worker in ready.values():
                worker.send(do="end")
    return found, alone


def line(case: str, result: dict[str, Any]) -> str:
    ratio, ms = result["ratio"], result["ms"]
    mark = "" if result["verdict"] == "same" else f"  {result['verdict']}"
    return (
        f"{ratio['median']:.3f} ({ratio['p25']:.3f} to {ratio['p75']:.3f})  "
        f"{ms['base']:.4g} -> {ms['new']:.4g} ms  {case.split('/')[-1]}: {result['contender']}{mark}"
    )


def confirmed(
    first: dict[str, list[dict[str, Any]]], again: dict[str, list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """What is slower is slower again: else the second result is what counts."""
    second = {(case, each["contender"]): each for case, results in again.items() for each in results}
    return {
        case: [second.get((case, each["contender"]), each) if each["verdict"] == "slower" else each for each in results]
        for case, results in first.items()
    }


def verdicts(found: dict[str, list[dict[str, Any]]], verdict: str) -> list[tuple[str, dict[str, Any]]]:
    return [(case, each) for case, results in found.items() for each in results if each["verdict"] == verdict]


def status(found: dict[str, list[dict[str, Any]]], alone: dict[str, list[str]]) -> int:
    """Slower, or failing here where BASE runs, or nothing compared."""
    return int(bool(verdicts(found, "slower") or alone["new"] or not found))


def compare(arguments: argparse.Namespace) -> int:
    sha, tree = tree_of(arguments.base)
    trees = {"base": tree, "new": ROOT}
    options = ["--device", arguments.device]
    options += ["-k", arguments.k] if arguments.k else []
    options += ["--quick"] if arguments.quick else []
    limits = (5, 5) if arguments.quick else (9, 60)
    print(f"time over that of {arguments.base} ({sha[:12]}), with its quartiles")
    found, alone = measure(trees, options, arguments.seconds, limits, None)
    for _ in range(CONFIRMATIONS):
        doubtful = sorted({case for case, _ in verdicts(found, "slower")})
        if not doubtful:
            break
        print(f"once more, in new processes: {len(doubtful)} cases that seem slower")
        again, _ = measure(trees, options, 2 * arguments.seconds, limits, doubtful)
        found = confirmed(found, again)
    for name, missing in (("BASE", alone["base"]), ("this tree", alone["new"])):
        for each in missing:
            print(f"not compared, in {name}: {each}")
    slower, faster = verdicts(found, "slower"), verdicts(found, "faster")
    count = sum(map(len, found.values()))
    print(f"{count} compared: {len(slower)} slower, {len(faster)} faster, {count - len(slower) - len(faster)} the same")
    for case, each in slower:
        print(f"SLOWER {line(case, each)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.device}.json"
    commit = {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": bool(git("status", "--porcelain"))}
    record = {"base": sha, **commit, "device": arguments.device, "quick": arguments.quick, "slower_from": SLOWER}
    path.write_text(json.dumps({**record, "cases": found, "not_compared": alone}, indent=1) + "\n")
    print(f"results: {path}")
    return status(found, alone)


# The worker: pytest collects the cases, harness.run_case hands them over instead of timing them.


def work(tree: Path, arguments: argparse.Namespace) -> int:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no message

    def send(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    def receive() -> dict[str, Any]:
        message = sys.stdin.readline()
        if not message:
            sys.exit("the other side has ended")
        return json.loads(message)

    import pytest
    import torch
    from harness import SETTINGS, Contender, is_sweep, visitor, warm_up

    import pyrx

    assert Path(pyrx.__file__).is_relative_to(tree), f"expected pyrx of {tree}, got {pyrx.__file__}"
    SETTINGS.device, SETTINGS.quick = arguments.device, arguments.quick
    SETTINGS.say = lambda text: print(text, file=sys.stderr)
    current = {"case": "", "told": False}

    def warmed(one: Contender) -> dict[str, Any]:
        try:
            warm_up([one])
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {"seconds": one.seconds, "calls": one.calls}

    def drive(row: str, params: dict[str, Any], contenders: Sequence[Contender]) -> None:
        """Answers until the parent is done with the case."""
        ours = {each.name: each for each in contenders if each.kind == "pyrx"}
        current["told"] = True
        send(case=current["case"], contenders=list(ours))
        visit = visitor()
        while (message := receive())["do"] != "end":
            if message["do"] == "warm":
                send(contenders={name: warmed(each) for name, each in ours.items()})
            else:
                one = ours[message["name"]]
                one.calls = message["calls"]
                send(ms=visit(one))

    class Plugin:
        def __init__(self) -> None:
            self.broken: list[str] = []

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed:
                self.broken.append(f"{report.nodeid}: {str(report.longrepr).splitlines()[-1]}")

        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            timed = [each for each in items if "benchmark" in getattr(each, "fixturenames", ())]
            timed = [each for each in timed if not is_sweep(each)]
            send(cases=[each.nodeid for each in timed], broken=self.broken)
            run = set(receive()["run"])
            items[:] = [each for each in timed if each.nodeid in run]

        def pytest_runtest_setup(self, item: pytest.Item) -> None:
            current.update(case=item.nodeid, told=False)
            random.seed(0)
            torch.manual_seed(0)

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed or report.skipped or report.when == "teardown":
                if not current["told"]:
                    text = report.longreprtext.splitlines() or ["it times nothing"]
                    send(case=current["case"], error=text[-1])
                    current["told"] = True

    SETTINGS.driver = drive
    options = ["-p", "no:terminal", "-p", "no:cacheprovider", "-o", "python_files=bench_*.py", "-o", "addopts="]
    options += ["--continue-on-collection-errors", "--capture=no", "--rootdir", str(HERE)]
    options += ["-k", arguments.k] if arguments.k else []
    return int(pytest.main([*options, *map(str, sorted(HERE.glob("bench_*.py")))], plugins=[Plugin()]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", metavar="BASE", help="a commit, branch or tag")
    parser.add_argument("-k", metavar="FILTER", help="only the cases whose name matches, as pytest's -k")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds: whether it works")
    parser.add_argument("--seconds", type=float, default=4.0, help="a case's rounds take about this long")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "compare")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        return work(arguments.worker, arguments)
    if not arguments.base:
        parser.error("BASE is wanted: the commit to compare with")
    return compare(arguments)


if __name__ == "__main__":
    sys.exit(main())
