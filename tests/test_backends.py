"""Which backend serves a call, why another does not, and pyrx without its extension."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import assert_head_within_budget, make_head, need

import pyrx
from pyrx import _backends, _extension
from pyrx.reference import dropout as dropout_reference
from pyrx.reference import multi_sample_dropout as head_reference

X, W, Y = torch.randn(4, 8), torch.randn(5, 8), torch.tensor([0, 1, 2, 4])
CALLS = {
    "dropout": lambda **keywords: pyrx.dropout(X, 0.5, seed=1, **keywords),
    "dropout_mask": lambda **keywords: pyrx.dropout_mask((3, 5), 0.5, 1, **keywords),
    "multi_sample_dropout": lambda **keywords: pyrx.multi_sample_dropout(X, seed=1, **keywords),
    "multi_sample_dropout_cross_entropy": lambda **keywords: pyrx.multi_sample_dropout_cross_entropy(
        X, W, Y, seed=1, **keywords
    ),
}


@pytest.fixture
def by_reference(monkeypatch):
    """The names of the calls that the reference served."""
    served = []
    for module, name in (
        (dropout_reference, "dropout"),
        (dropout_reference, "dropout_mask"),
        (head_reference, "multi_sample_dropout"),
        (head_reference, "multi_sample_dropout_cross_entropy"),
    ):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=function, n=name: served.append(n) or f(*args))
    return served


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.delenv("PYRX_BACKEND", raising=False)


@pytest.mark.parametrize("call", CALLS)
def test_the_argument_chooses(by_reference, call):
    CALLS[call](backend="reference")
    assert call in by_reference
    need("cpu")
    by_reference.clear()
    CALLS[call](backend="cpu")
    assert not by_reference


@pytest.mark.parametrize("call", CALLS)
def test_the_default_is_the_fastest_that_can_serve(by_reference, monkeypatch, call):
    need("cpu")
    for backend in (None, "auto"):
        CALLS[call](backend=backend)
    monkeypatch.setenv("PYRX_BACKEND", "")
    CALLS[call]()
    assert not by_reference
    monkeypatch.setattr(_backends, "reasons", lambda op, backend, *_: [] if backend == "reference" else ["no"])
    CALLS[call]()
    assert call in by_reference


@pytest.mark.parametrize("call", CALLS)
def test_the_environment_chooses_where_the_argument_does_not(by_reference, monkeypatch, call):
    monkeypatch.setenv("PYRX_BACKEND", "reference")
    CALLS[call]()
    assert call in by_reference
    need("cpu")
    by_reference.clear()
    CALLS[call](backend="cpu")
    CALLS[call](backend="auto")
    assert not by_reference


@pytest.mark.parametrize("call", CALLS)
def test_a_backend_that_cannot_serve_tells_every_reason(monkeypatch, call):
    op = "dropout" if call.startswith("dropout") else "multi_sample_dropout"
    reasons = _backends.reasons(op, "cuda", "cpu")
    assert reasons
    expected = f"pyrx::{op}: expected backend that serves torch.float32 on cpu, got 'cuda', which cannot: "
    with pytest.raises(RuntimeError) as caught:
        CALLS[call](backend="cuda")
    assert str(caught.value) == expected + "; ".join(reasons)
    monkeypatch.setenv("PYRX_BACKEND", "cuda")
    with pytest.raises(RuntimeError) as caught:
        CALLS[call]()
    assert str(caught.value) == expected + "; ".join(reasons)


@pytest.mark.parametrize("call", CALLS)
def test_a_name_that_is_none_is_a_value_error(monkeypatch, call):
    monkeypatch.setenv("PYRX_BACKEND", "fastest")
    with pytest.raises(ValueError, match="expected backend to be one of .*, got 'fastest'"):
        CALLS[call]()


def test_reasons():
    assert _backends.reasons("dropout", "reference", "meta", torch.int8) == []
    assert _backends.reasons("dropout", "cpu", "cuda")[0] == "it serves device cpu, not cuda"
    assert "it has no torch.int32 kernel" in _backends.reasons("dropout", "cpu", "cpu", torch.int32)
    assert "it has no torch.float64 kernel" in _backends.reasons("dropout", "triton", "cuda", torch.float64)
    if not torch.cuda.is_available():
        for backend in ("cuda", "triton"):
            assert "torch sees no CUDA device" in _backends.reasons("multi_sample_dropout", backend, "cuda")


def test_reasons_of_a_missing_extension(monkeypatch):
    monkeypatch.setattr(_extension, "error", "it is not there")
    _backends._reasons.cache_clear()
    try:
        assert _backends.reasons("dropout", "cpu", "cpu") == ["it is not there"]
        assert len(_backends.reasons("dropout", "cuda", "cpu", torch.int8)) == 3
        with pytest.raises(RuntimeError, match="which cannot: it is not there$"):
            pyrx.dropout(X, backend="cpu")
        assert pyrx.dropout(X).shape == X.shape
    finally:
        monkeypatch.undo()
        _backends._reasons.cache_clear()


# Without the extension, in a fresh process.

EVERYTHING = """
import torch, pyrx
from pyrx import _backends, _extension
assert _extension.module is None and "not built" in _extension.error, _extension.error
assert _backends.reasons("dropout", "cpu", "cpu") == [_extension.error]
x = torch.randn(6, 8, requires_grad=True)
pyrx.dropout(x).sum().backward()
pyrx.multi_sample_dropout(x, 3).sum().backward()
module = pyrx.nn.MultiSampleDropoutClassifier(8, 5)
module(x, torch.arange(6) % 5).backward()
assert x.grad.isfinite().all() and module.weight.grad.isfinite().all()
print(pyrx.__file__, "".join(map(str, pyrx.dropout_mask((32,), 0.5, 0).int().tolist())))
"""


def test_without_the_extension_the_reference_serves_quietly(python, tmp_path):
    package = tmp_path / "pyrx"
    hidden = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    shutil.copytree(Path(pyrx.__file__).parent, package, ignore=hidden)
    quiet = "import sys, warnings; warnings.simplefilter('error', RuntimeWarning); "
    script = f"{quiet}sys.path.insert(0, {str(tmp_path)!r})"
    file, mask = python(script + EVERYTHING).split()
    assert file.startswith(str(tmp_path))
    assert mask == "".join(map(str, pyrx.dropout_mask((32,), 0.5, 0, backend="reference").int().tolist()))


def test_importing_loads_neither_the_compiler_nor_triton(python):
    """They take as long as torch itself."""
    script = "import sys, torch; before = set(sys.modules); import pyrx; print(*set(sys.modules) - before)"
    loaded = python(script, TRITON_INTERPRET="0").split()
    assert "pyrx.nn" in loaded
    assert [name for name in loaded if name.split(".")[0] != "pyrx"] == []


# Other processors: the same bits, from less wide instructions.

RESULTS = """
import hashlib, torch, pyrx, helpers
from helpers import FLOATS, COMBINES, SAMPLINGS, bits, make_head, assert_head_within_budget
torch.manual_seed(0)
digest = hashlib.sha256()
def add(*tensors):
    for tensor in tensors:
        digest.update(bits(tensor).numpy().tobytes())
for shape in ((1,), (63,), (5, 100), (3, 1311)):
    for p in (0.0, 0.3, 0.5):
        for packed in (False, True):
            add(pyrx.dropout_mask(shape, p, 7, 3, packed, sampling="antithetic", backend="cpu").to(torch.uint8))
        for dtype in FLOATS:
            x = ((torch.arange(torch.Size(shape).numel()) - 1000) / 1024).to(dtype).reshape(shape)
            y = x.requires_grad_()
            z = pyrx.multi_sample_dropout(y, 3, p, seed=3, backend="cpu")
            add(pyrx.dropout(x, p, seed=3, backend="cpu"), z)
            add(*torch.autograd.grad(z, y, z.detach()))
for dtype in FLOATS:
    for rows, features, classes in ((65, 100, 10), (7, 520, 100)):
        head = make_head(rows, features, classes, "mixed", class_weight=True, dtype=dtype)
        for sampling in SAMPLINGS:
            for combine in COMBINES:
                assert_head_within_budget(head, "cpu", seed=2, num_samples=4, sampling=sampling, combine=combine)
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def results_here():
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"ATEN_CPU_CAPABILITY": "avx2"},
        {"ATEN_CPU_CAPABILITY": "default"},
        {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    ],
    ids=lambda each: "+".join(each.values()),
)
def test_instruction_sets_give_the_same_bits(cpu, python, environment, results_here):
    if not results_here:
        results_here["digest"] = python(RESULTS)
    assert python(RESULTS, **environment) == results_here["digest"]


def test_the_reference_serves_other_devices():
    """On the meta device, which no kernel knows: shapes only."""
    x = torch.randn(3, 5, device="meta")
    seed = torch.zeros((), dtype=torch.int64, device="meta")
    assert pyrx.dropout(x, 0.5, seed=seed).shape == (3, 5)
    assert pyrx.multi_sample_dropout(x, 4, seed=seed).shape == (4, 3, 5)


def test_all_backends_here_agree_on_one_head(backend):
    head = make_head(20, 33, 10)
    assert_head_within_budget(head, backend, seed=1)
    assert torch.equal(
        pyrx.dropout_mask((20, 33), 0.5, 1, backend=backend), pyrx.dropout_mask((20, 33), 0.5, 1, backend="reference")
    )
