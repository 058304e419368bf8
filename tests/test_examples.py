"""The example, in its short mode: it runs, and its table has what it promises."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT, need

pytestmark = pytest.mark.skipif(not (ROOT / "examples").exists(), reason="not a source tree")

SPARSE = [
    "STE",
    "SR-STE",
    "MaskedAdamW, hold",
    "MaskedAdamW, SR-STE",
    "dense, then sparse",
    "SDGF, stepwise",
    "SDGF, geometric",
    "MDGF, linear",
    "MDGF, exponential",
]


def digits(*arguments, fails=False, script="digits.py"):
    for package in ("sklearn", "matplotlib", "scipy", "tqdm"):
        pytest.importorskip(package)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode != 0) == fails, f"{done.stdout}\n{done.stderr}"
    return done.stderr if fails else done.stdout


def rows(text):
    """{method: its numbers} of the table."""
    lines = text.split("ms a step", 1)[1].split("mean ± deviation")[0].splitlines()[1:]
    return {line[:32].strip(): re.findall(r"\d+\.\d+", line[32:]) for line in lines if line.strip()}


@pytest.mark.slow
@pytest.mark.parametrize("ratio, density", [("2:4", "0.500"), ("1:8", "0.125"), ("1:32", None)])
def test_sparse_digits(tmp_path, ratio, density):
    text = digits("--quick", "--sparsity", ratio, "--out", tmp_path / "digits.png")
    found = rows(text)
    assert len(found) == len(SPARSE) + 1
    for name, ending in zip(found, ["plain dropout, PyTorch", *SPARSE], strict=True):
        assert name.endswith(ending)
    densities = [numbers[-1] for numbers in found.values()]
    assert densities[0] == "1.000" and len(set(densities[1:])) == 1 and densities[1] < "0.7"
    assert density is None or densities[1] == density
    for numbers in found.values():
        assert len(numbers) == 4 and 0 < float(numbers[0]) < 100  # error and its deviation, ms, density
    assert len(re.findall(r"(clear|within noise)\)", text)) == len(SPARSE)
    assert "body.2" in text and "PlainHead" in text and (tmp_path / "digits.png").stat().st_size > 10_000


@pytest.mark.slow
def test_digits(tmp_path):
    need("cpu")  # the reference takes minutes
    text = digits("--quick", "--out", tmp_path / "digits.png")
    names = ["plain dropout, PyTorch", *(f"M = {m}, pyrx" for m in (2, 8, 32)), "CutMix into M = 8, pyrx"]
    assert list(rows(text)) == [*names, "M = 8 as a loop, PyTorch"]
    assert all(len(numbers) == 3 for numbers in list(rows(text).values())[:-1])
    for claim in ("fewer steps to a training loss", "lower test error", "little cost a step"):
        assert f"  {claim}" in text
    assert "density" not in text and (tmp_path / "digits.png").stat().st_size > 10_000


@pytest.mark.parametrize("ratio", ["4:2", "2", "2:4:8", "0:4", "1:129", "a:b"])
def test_bad_ratios(ratio):
    assert "expected N:M with 1 <= N <= M <= 128, as 2:4" in digits("--sparsity", ratio, fails=True)


@pytest.mark.slow
def test_attention_on_digits(tmp_path):
    text = digits("--quick", "--out", tmp_path / "attention.png", script="digits_attention.py")
    found = re.findall(r"^(\S.*?)  +(\d+\.\d+) ± (\d+\.\d+) +(\d\.\d+) +(\d+\.\d+)$", text, re.M)
    assert [each[0] for each in found] == ["dense, PyTorch", "sliding window, pyrx", "searched, pyrx"]
    dense, window, searched = (float(each[3]) for each in found)
    assert dense == 1 and 0.1 < window < 0.4 and 0.2 < searched < 0.4
    assert (tmp_path / "attention.png").stat().st_size > 10_000
