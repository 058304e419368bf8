"""Every example of the docs runs, those of docstrings too, and every public name is in the reference."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re

import pytest
import torch
from helpers import REQUIRED, ROOT

import pyrx

DOCS = ROOT / "docs"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md"]) if DOCS.exists() else []
PAGES = [page for page in PAGES if not {"_build", "generated"} & set(page.parts)]
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODULES = [each.name for each in pkgutil.walk_packages(pyrx.__path__, "pyrx.") if "_triton" not in each.name]


@pytest.fixture(autouse=True)
def plain_defaults(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # of what an example starts
    torch.manual_seed(0)


# what the README's examples take for granted
GIVEN = """
import torch
import torch.nn.functional as F
from torch import nn

features, target, labels = torch.randn(128, 512), torch.randint(10, (128,)), torch.randint(10, (8,))
weight, bias = torch.randn(10, 512, requires_grad=True), torch.zeros(10)
images, MEAN, STD = torch.randint(256, (8, 2, 16, 16), dtype=torch.uint8), (0.5, 0.5), (0.25, 0.25)
body = nn.Flatten()
model = nn.Sequential()
model.add_module("body", nn.Sequential(nn.Flatten(), nn.Linear(512, 32), nn.ReLU()))
model.add_module("head", nn.Linear(32, 10))
total_steps, tokens, x = 3000, 256, torch.randn(4, 512)
query, key, value = (torch.randn(1, 4, tokens, 32) for _ in range(3))
"""


def blocks(page):
    """(line, code) of the page's Python blocks."""
    text = page.read_text()
    for found in FENCE.finditer(text):
        if found[1] == "python":
            yield text.count("\n", 0, found.start(2)), found[2]


def run_doctest(test):
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    told = []
    failed, _ = runner.run(test, out=told.append, clear_globs=False)
    assert not failed, "".join(told)


def need_imports(page, codes):
    """Skips a page whose packages are not here: a failure where PYRX_REQUIRE names docs."""
    text = "\n".join(re.sub(r"^(>>>|\.\.\.) ?", "", line) for code in codes for line in code.splitlines())
    names = set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE))
    missing = sorted(name for name in names if importlib.util.find_spec(name) is None)
    if missing:
        told = f"{page.name} needs {', '.join(missing)}"
        pytest.fail(told) if "docs" in REQUIRED else pytest.skip(told)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page(page, tmp_path, monkeypatch):
    """The blocks of a page run one after another, in one namespace; a block with >>> shows what it prints."""
    found = list(blocks(page))
    need_imports(page, [code for _, code in found])
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    if page.name == "README.md":
        exec(GIVEN, names)
    for line, code in found:
        if ">>>" in code:
            test = doctest.DocTestParser().get_doctest(code, {}, page.name, str(page), line)
            test.globs = names  # not a copy
            run_doctest(test)
        else:
            # at its own line, for tracebacks
            exec(compile(ast.parse("\n" * line + code), str(page), "exec"), names)


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module):
    for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module)):
        if test.examples:
            test.globs = {"pyrx": pyrx, "torch": torch, "F": torch.nn.functional}
            run_doctest(test)


@pytest.mark.skipif(not DOCS.exists(), reason="not a source tree")
def test_every_public_name_is_in_the_reference():
    text = (DOCS / "reference" / "index.md").read_text()
    for package in (pyrx, pyrx.nn, pyrx.optim, pyrx.search):
        listed = text.split(f"\n## {package.__name__}\n")[1].split("\n## ")[0]
        listed = set(re.findall(r"^   (\w+)$", listed, re.MULTILINE))
        public = {n for n in package.__all__ if not inspect.ismodule(getattr(package, n)) and not n.startswith("__")}
        assert listed == public, f"docs/reference/index.md, {package.__name__}: {sorted(listed ^ public)}"


@pytest.mark.skipif(not DOCS.exists(), reason="not a source tree")
def test_every_op_is_at_the_head_of_a_page():
    heads = [page.read_text().split("\n## ")[0] for page in (DOCS / "ops").glob("*.md")]
    named = set(re.findall(r"`(pyrx[\w.]+)`", "\n".join(heads)))
    packages = (pyrx, pyrx.nn, pyrx.optim, pyrx.search)
    public = {f"{each.__name__}.{name}" for each in packages for name in each.__all__ if callable(getattr(each, name))}
    # the schedules' base, and what sparsify_ returns
    public -= {f"pyrx.nn.{name}" for name in ("SparsitySchedule", "SparsityReport", "SparseLayer", "SkippedLayer")}
    assert named == public, sorted(named ^ public)


@pytest.mark.skipif(not DOCS.exists(), reason="not a source tree")
def test_every_page_of_an_op_has_its_parts():
    for page in sorted((DOCS / "ops").glob("*.md")):
        headings = re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)
        assert headings == ["Idea", "Equivalent to", "When it pays", "Cost", "Source"], f"{page.name}: got {headings}"
        assert any(">>>" in code or "assert" in code for _, code in blocks(page)), f"{page.name} has no example"
