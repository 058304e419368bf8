"""Transposable N:M masks by the Triton kernels, see triton_helpers.py; test_nm_transposable.py has them on a GPU."""

import importlib

import helpers
import pytest
import test_nm_transposable as cases
import torch
import triton_helpers
from triton_helpers import INTERPRETED, backend_of, interpreted, values_in_the_interpreter

pytest.importorskip("triton")
launcher = importlib.import_module("pyrx._triton.nm_transposable")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


test_values_in_the_interpreter = values_in_the_interpreter(__file__, 50)


@interpreted
@pytest.mark.parametrize("form", [*cases.DEVICE_FORMS[:-1], ("greedy", 5, 17)], ids=helpers.name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.name_of)
def test_values(dtype, form):
    helpers.need("triton", ops=("nm_transposable",))
    cases.assert_equals_the_reference("triton", "cpu", [(1, 1), (2, 5)], [dtype], [form])


@interpreted
@pytest.mark.parametrize("form", cases.FORMS[:3], ids=helpers.name_of)
def test_batches_and_layouts(form):
    cases.test_batches_and_layouts("triton", *form, 2, 3)


@interpreted
def test_several_programs(monkeypatch):
    monkeypatch.setattr(launcher, "TILES", 8)
    monkeypatch.setattr(launcher, "ELEMENTS", 64)
    forms = [("exact", 2, 4), ("greedy", 2, 4), ("greedy", 3, 5)]
    cases.assert_equals_the_reference("triton", "cpu", [(2, 9)], DTYPES[2:], forms)


if INTERPRETED:
    test_empty = cases.test_empty
    test_errors = cases.test_errors
    test_exact_finds_every_pattern = cases.test_exact_finds_every_pattern
    test_exact_of_equal_sums_is_the_first = cases.test_exact_of_equal_sums_is_the_first
    test_greedy_may_keep_fewer = cases.test_greedy_may_keep_fewer

    backend = backend_of("nm_transposable")


@interpreted
def test_entries_have_the_shapes_of_their_fakes():
    op = torch.ops.pyrx_triton.nm_transposable_mask
    for scores in (torch.randn(8, 12), torch.randn(12, 8).t()):
        for packed in (False, True):
            for exact in (False, True):
                arguments = (scores, 2, 4, True, packed, exact)
                torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(TypeError, match="float64"):
        op(torch.randn(8, 8).double(), 2, 4, True, False, True)


def compile_ahead_of_time(architecture):
    """Prints one JSON line a compiled kernel."""
    compiled = triton_helpers.compile_launches(architecture)
    for dtype in DTYPES:
        for packed in (False, True):
            for n, m in ((2, 4), (4, 8), (5, 33), (64, 128)):
                scores = torch.zeros(3 * m, 5 * m, dtype=dtype)
                launcher.nm_transposable_mask(scores, n, m, not packed, packed, m == 4)
    triton_helpers.report(compiled, lambda kernel: {"fused": "fma.rn" in kernel.asm["ptx"]})


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 90])
def test_ahead_of_time(architecture, python, tmp_path):
    script = f"import test_triton_nm_transposable as test; test.compile_ahead_of_time({architecture})"
    found = triton_helpers.ahead_of_time(python, tmp_path, script)
    assert {each["kernel"] for each in found} == triton_helpers.kernels_of("nm_transposable.py")
    for each in found:
        assert each["shared"] <= triton_helpers.SHARED_LIMIT[architecture] and each["registers"] <= 255, each
        # of tiles of 128 x 128 a little is spilled
        assert each["stack"] <= (512 if each["kernel"] == "_greedy_kernel" else 0) and not each["fused"], each
