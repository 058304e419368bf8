"""What make dist rests on: the smoke test that goes with a wheel, the name of a wheel, the heading of a release."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import smoke

import pyrx
from pyrx import _backends

ROOT = Path(__file__).resolve().parents[1]


def test_smoke_has_a_case_for_every_row():
    assert set(smoke.CASES) == set(_backends.OPS)


def test_smoke_runs_away_from_the_tree(tmp_path):
    script = Path(smoke.__file__)
    (tmp_path / "smoke.py").write_text(script.read_text())
    environment = os.environ | {"PYTHONPATH": str(Path(pyrx.__file__).parents[1])}
    done = subprocess.run([sys.executable, "smoke.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("sound\n"), done.stdout + done.stderr


@pytest.mark.parametrize("row", _backends.OPS)
def test_smoke_notices_a_wrong_result(monkeypatch, row):
    real = smoke.run

    def wrong(row, backend):
        *results, last = real(row, "reference")
        if backend == "cpu":
            last = last.clone()
            last.view(-1)[-1:] = last.view(-1)[-1:] + 0.01 if last.is_floating_point() else ~last.view(-1)[-1:]
        return [*results, last]

    monkeypatch.setattr(smoke, "run", wrong)
    with pytest.raises(AssertionError):
        smoke.check_row(row, "cpu")


def test_changelog_has_the_version():
    if not (ROOT / "CHANGELOG.md").exists():
        pytest.skip("not a source tree")
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    released = [line for line in headings if "Unreleased" not in line]
    assert released[0].startswith(f"## [{pyrx.__version__}]"), released
