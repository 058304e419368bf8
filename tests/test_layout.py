"""The house rules of the tree: the same op name in every layer, layers that know only what they may, small files."""

import importlib
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pyrx._backends import ABSENT, OPS

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    "csrc/kernels/{op}.h",
    "csrc/cpu/{op}.cpp",
    "csrc/cuda/{op}.cuh",
    "csrc/cuda/{op}.cu",
    "triton_kernels/{op}.py",
    "pyrx/ops/{op}.py",
    "pyrx/reference/{op}.py",
    "tests/test_{op}.py",
    "bench/bench_{op}.py",
)
# whose formula is so hot that it is in C++
NATIVE_FORMULAS = ("dropout", "mixed_cross_entropy", "multi_sample_dropout")
FOLDERS = ("csrc", "triton_kernels", "pyrx", "tests", "bench", "examples", "docs", ".ci")
CODE = {".py", ".cpp", ".h", ".inl", ".cu", ".cuh"}
TEXT = CODE | {".md", ".toml", ".txt", ".json", ".in", ""}
MAX_LINES = 650

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")


def files(suffixes):
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    ours = [p for p in [*ROOT.iterdir(), *inside] if "__pycache__" not in p.parts and p.name != "_build_info.json"]
    return [p for p in ours if p.is_file() and p.suffix in suffixes]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("op", OPS)
def test_op_has_its_file(op, layer):
    path = ROOT / layer.format(op=op)
    absent = (op, path.parent.name.removesuffix("_kernels")) in ABSENT
    assert path.is_file() != absent, f"op {op}: expected {'no' if absent else 'the'} file {layer.format(op=op)}"


def test_native_formulas_have_their_files():
    found = {path.stem for path in (ROOT / "csrc" / "autograd").glob("*.cpp")}
    assert found == set(NATIVE_FORMULAS) and found <= set(OPS)


@pytest.mark.parametrize("folder, pattern", [("csrc/kernels", "*.h"), ("csrc/cuda", "*.cuh")])
def test_kernels_include_no_torch(folder, pattern):
    torch_header = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|caffe2|pybind11)/')
    found = sorted((ROOT / folder).glob(pattern))
    assert found
    for path in found:
        assert not torch_header.search(path.read_text()), f"{path.relative_to(ROOT)} includes a header of torch"


def test_kernels_know_no_autograd():
    kernels = [path for folder in ("kernels", "cpu", "cuda") for path in (ROOT / "csrc" / folder).iterdir()]
    for path in [*(ROOT / "triton_kernels").glob("*.py"), *kernels]:
        assert "autograd" not in path.read_text(), f"{path.relative_to(ROOT)}: autograd belongs above the kernels"


def test_what_torch_does_not_promise_is_listed():
    listed = (ROOT / "CONTRIBUTING.md").read_text()
    sources = [path for folder in ("pyrx", "csrc", "triton_kernels") for path in (ROOT / folder).rglob("*")]
    for path in sources:
        if path.suffix in (".py", ".h", ".inl", ".cpp", ".cu", ".cuh"):
            # of torch._dynamo docstrings name a setting
            for found in re.findall(r"torch\.(_(?!dynamo)[A-Za-z][\w.]*)|at::(native::\w+)", path.read_text()):
                name = max(found)
                assert name.split(".")[-1] in listed, f"{path.relative_to(ROOT)}: {name} is not in CONTRIBUTING.md"


def test_files_are_small():
    for path in files(CODE):
        lines = len(path.read_text().splitlines())
        assert lines <= MAX_LINES, f"{path.relative_to(ROOT)}: expected at most {MAX_LINES} lines, got {lines}"


def test_no_path_of_one_machine():
    # spelled in pieces, so that this file passes
    private = re.compile(r"(?<![\w.])/(" + "|".join(["ro" + "ot", "ho" + "me", "wo" + "rk", "Us" + "ers"]) + r")/\w")
    for path in files(TEXT):
        found = private.search(path.read_text(errors="replace"))
        assert not found, f"{path.relative_to(ROOT)} names a path of one machine: {found and found.group(0)}"


def test_every_package_is_installed():
    config = (ROOT / "pyproject.toml").read_text()
    for init in (ROOT / "pyrx").rglob("__init__.py"):
        name = ".".join(init.parent.relative_to(ROOT).parts)
        assert f'"{name}"' in config, f"pyproject.toml: expected {name} in tool.setuptools.packages"


def test_triton_kernels_are_pyrx_triton():
    package = importlib.import_module("pyrx._triton")
    assert Path(package.__path__[0]).name in ("triton_kernels", "_triton")
    for op in OPS:
        if (op, "triton") in ABSENT:
            continue
        assert importlib.util.find_spec(f"pyrx._triton.{op}"), f"expected pyrx._triton.{op}"


@pytest.mark.skipif(not shutil.which("make") or not shutil.which("bash"), reason="no make or no bash")
@pytest.mark.parametrize("target", sorted(set(re.findall(r"echo 'make ([\w-]+)", (ROOT / "Makefile").read_text()))))
def test_make_target_is_valid_shell(target, tmp_path):
    # make splits the arguments of a call at commas, which may cut a quoted text in two
    arguments = [f"VENV={tmp_path / 'none'}", "BASE=HEAD", "PYTHON=false"]
    printed = subprocess.run(["make", "-n", target, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert printed.returncode == 0 and printed.stdout, printed.stderr
    parsed = subprocess.run(["bash", "-n"], input=printed.stdout, capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
