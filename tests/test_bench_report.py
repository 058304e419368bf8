"""The report says what the result files say: targets, charts, README.md's figures; and sweeps lose their slow peers."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
if not (BENCH / "harness.py").exists():
    pytest.skip("not a source tree", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import goals  # noqa: E402
import harness  # noqa: E402
import readme  # noqa: E402
import report  # noqa: E402
from outcomes import Results, load  # noqa: E402

needs_results = pytest.mark.skipif(not (BENCH / "results").is_dir(), reason="result files are not in an sdist")


@pytest.fixture(scope="module")
def files():
    return load(BENCH / "results")


@needs_results
def test_readme_has_the_figures_of_the_result_files(files):
    assert not readme.stale(files), "python bench/report.py writes them"


@needs_results
def test_a_wrong_figure_of_the_readme_is_found(files, tmp_path, monkeypatch):
    text = readme.PAGE.read_text()
    inside = readme.REGION.search(text)
    wrong = re.sub(r"\d+", lambda match: str(int(match[0]) + 1), inside[0].replace(inside[1], ""), count=1)
    page = tmp_path / "README.md"
    page.write_text(text.replace(inside[0], inside[1] + wrong))
    monkeypatch.setattr(readme, "PAGE", page)
    assert len(readme.stale(files)) == 1
    page.write_text(text.replace("<!-- bench: head -->", ""))
    assert "no region head" in readme.stale(files)
    page.write_text(text)
    only = [file for file in files if file["row"] != "batch_mix"]
    assert [each.split(":")[0] for each in readme.stale(only)] == ["mixing"]


def test_figures_of_the_readme_are_written_by_the_report():
    """Outside the regions of the section on speed no ratio, time or share is stated by hand."""
    section = readme.PAGE.read_text().split("## Speed\n")[1].split("\n## ")[0]
    by_hand = re.findall(r"\d[\d.]* (?:times|ms|%)|\d[\d.]*×", readme.REGION.sub("", section))
    assert not by_hand


@needs_results
@pytest.mark.parametrize("goal", goals.CPU, ids=lambda goal: f"{goal.what}-{goal.rule}")
def test_target_has_its_result(goal, files):
    """Every target of the CPU is measured, and asks what the benchmark itself asks."""
    results = Results(files, "cpu")
    cells = [goals.state(goal, dtype, results) for dtype in goals.DTYPES]
    assert any(ok is not None for _, ok in cells), f"no result file tells of {goal}"
    if goal.measure in ("speed", "floor") and goal.against != "best peer":
        for case in results.cases(goal.row, **goal.params):
            for each in case["comparisons"]:
                same = each["of"] == goal.contender and each["measure"] == goal.measure
                against = goal.measure == "floor" or each["against"] == goal.against
                if same and against and each["target"] is not None and not each.get("best_peer"):
                    assert each["target"] == pytest.approx(goal.asked), case["params"]


@needs_results
def test_page_is_that_of_the_result_files(files, tmp_path):
    pytest.importorskip("matplotlib")
    report.write_page(files, tmp_path / "results", tmp_path / "README.md")
    same = (tmp_path / "README.md").read_text() == (BENCH / "README.md").read_text()
    assert same, "python bench/report.py writes bench/README.md"


def contender(name, kind, ms, group=""):
    quartiles = {"min": ms * 0.9, "p25": ms, "median": ms, "p75": ms}
    return {"name": name, "kind": kind, "group": group, "note": "", "calls": 1, "ms": quartiles}


def case(ours, peers, floor, params, grows=None):
    contenders = [contender("pyrx", "pyrx", ours), contender("floor", "floor", floor)]
    contenders += [contender(name, "peer", ms) for name, ms in peers.items()]
    best = min(peers, key=peers.get)
    common = {"of": "pyrx", "p25": 1.0, "p75": 1.0, "target": None, "met": None}
    comparisons = [
        {**common, "contender": "pyrx", "against": best, "measure": "speed", "ratio": peers[best] / ours,
         "best_peer": True},
        {**common, "contender": "pyrx", "against": "floor", "measure": "floor", "ratio": ours / floor},
        {**common, "contender": "floor", "against": best, "measure": "limit", "ratio": peers[best] / floor},
    ]  # fmt: skip
    found = {"kind": "time", "params": params, "rounds": 9, "load": 0.1, "contenders": contenders, "failed": [],
             "comparisons": comparisons, "checks": []}  # fmt: skip
    return found | ({"grows": grows} if grows else {})


def file(row, cases, device="cpu"):
    machine = {"cpu": "a CPU", "cores": 2, "threads": 2, "cpu_capability": "AVX2", "gpu": None, "platform": "Linux"}
    versions = {"torch": "2.11.0", "triton": "3.6.0", "python": "3.11"}
    extension = {"loaded": True, "error": None, "flags": [], "arch_list": []}
    return {"schema": 1, "device": device, "quick": False, "started": "2026-01-01", "finished": "2026-01-01",
            "commit": "0" * 40, "uncommitted_changes": False, "machine": machine, "versions": versions,
            "extension": extension, "row": row, "cases": cases, "memory": []}  # fmt: skip


def growing(sides=(32, 64, 128)):
    """A peer that is the best at small sides and left out at the largest, and one that is the best there."""
    found = []
    for side in sides:
        peers = {"small": side / 16, "large": 4.0 + side / 32}
        if side == max(sides):
            del peers["small"]
        params = {"op": "mixup", "shape": [8, side, side], "dtype": "float32"}
        found.append(case(side / 64, peers, side / 128, params, {"over": "side", "at": side}))
    return found


def test_growth_is_drawn_from_the_files(tmp_path):
    charts = pytest.importorskip("charts")
    pytest.importorskip("matplotlib")
    one = file("batch_mix", [case(1.0, {"timm": 3.0}, 0.5, {"op": "mixup", "dtype": "float32"}), *growing()[::-1]])
    ((key, points),) = charts.sweeps(one).items()
    assert key == ("mixup", "side") and [each["grows"]["at"] for each in points] == [32, 64, 128]
    drawn = {name: values for _, name, _, values in charts.lines(points)}
    assert drawn == {
        "pyrx": [(32, 0.5), (64, 1.0), (128, 2.0)],
        "small": [(32, 2.0), (64, 4.0)],
        "large": [(32, 5.0), (64, 6.0), (128, 8.0)],
        "floor": [(32, 0.25), (64, 0.5), (128, 1.0)],
    }
    first = charts.growth(one, tmp_path / "a.svg").read_bytes()
    assert first == charts.growth(one, tmp_path / "b.svg").read_bytes() and b"<svg" in first
    assert charts.growth(file("batch_mix", [one["cases"][0]]), tmp_path / "c.svg") is None


def test_page_tells_of_every_case_and_every_miss(tmp_path):
    pytest.importorskip("matplotlib")
    fast = case(1.0, {"timm batch": 30.0}, 0.5, {"op": "cutmix in place, batch", "dtype": "float32"})
    slow = case(1.0, {"timm elem": 4.0}, 0.5, {"op": "cutmix in place, elem", "dtype": "float32"})
    (tmp_path / "batch_mix-cpu.json").write_text(json.dumps(file("batch_mix", [fast, slow, *growing()])))
    report.write_page(load(tmp_path), tmp_path, tmp_path / "README.md")
    page = (tmp_path / "README.md").read_text()
    assert "1 of the 2 targets measured on the CPU are met" in page
    assert "| CutMix in place, a box each | timm, elem | at least 5 | **4** (its floor 8) |  | missed |" in page
    assert "| CutMix in place, one box | timm, batch | at least 5 | 30 |  | met |" in page
    assert "growth/batch_mix-cpu.svg" in page and (tmp_path / "growth" / "batch_mix-cpu.svg").exists()
    assert page.count("8x64x64") == 1 and page.count("<details>") == page.count("</details>")


def test_a_missed_target_shows_as_many_digits_as_it_takes():
    assert (
        goals.digits(14.97, 15) == "14.97" and goals.digits(2.61, 3) == "2.6" and goals.digits(23184.2, 10) == "23184"
    )


def test_sweep_leaves_out_what_is_slow_at_smaller_sizes(monkeypatch):
    monkeypatch.setattr(harness, "_left_out", {})
    line = ("row", "op", "", "side")
    slow, ours = (harness.Contender(name, lambda: None, kind) for name, kind in (("slow", "peer"), ("pyrx", "pyrx")))
    quick = harness.Contender("quick", lambda: None)
    slow.seconds = ours.seconds = 2 * harness.SWEEP_STEP_SECONDS
    quick.seconds = harness.SWEEP_STEP_SECONDS / 2
    every = [slow, quick, ours]
    assert harness.still_in(line, every) == (every, [])
    harness.rule_out(line, harness.Growth("side", 64), every, [{"name": "broken", "error": "no"}])
    able, why = harness.still_in(line, [*every, harness.Contender("broken", lambda: None)])
    assert able == [quick, ours]
    assert why == [
        {"name": "slow", "error": "left out: a step took 0.4 s at side 64"},
        {"name": "broken", "error": "no"},
    ]
    assert harness.still_in(("row", "op", "", "batch"), every) == (every, [])
