"""block_mass and block_recall by the Triton kernels: values in Triton's interpreter, and machine code."""

import importlib

import helpers
import pytest
import test_block_mass as cases
import torch
import triton_helpers
from triton_helpers import INTERPRETED, backend_of, interpreted, values_in_the_interpreter

pytest.importorskip("triton")
launcher = importlib.import_module("pyrx._triton.block_mass")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPE = (2, 2, 1, 150, 210, 16)


test_values_in_the_interpreter = values_in_the_interpreter(__file__, 90)


@interpreted
@pytest.mark.parametrize("i, name", list(enumerate(cases.FEATURES)))
def test_features(i, name):
    dtype, block_size = DTYPES[i % 3], ((64, 64), (128, 128), (32, 16))[i // 2 % 3]
    query, key = cases.operands(SHAPE, dtype)
    logits = cases.feature(name, SHAPE, dtype)
    cases.assert_mass("triton", query, key, logits, block_size, f"{name} {dtype}")
    blocks = cases.blocks_of(SHAPE, block_size, lead=(1 + i // 2 % 2, 1 + i % 2))
    cases.assert_recall("triton", query, key, logits, blocks, block_size, f"{name} {dtype}")


@interpreted
@pytest.mark.parametrize("q_block", cases.BLOCK_SIZES)
@pytest.mark.parametrize("k_block", cases.BLOCK_SIZES)
def test_block_sizes(q_block, k_block):
    block_size = (q_block, k_block)
    for dtype, size in ((torch.float32, 16), (torch.bfloat16, 16), (torch.float16, 200)):
        shape = (1, 1, 1, 140, 170, size)
        query, key = cases.operands(shape, dtype)
        logits = cases.plain(size, left=120)
        cases.assert_mass("triton", query, key, logits, block_size, block_size)
        blocks = cases.blocks_of(shape, block_size)
        cases.assert_recall("triton", query, key, logits, blocks, block_size, block_size)


@interpreted
@pytest.mark.parametrize("size", [1, 3, 16, 64, 100, 256])
def test_head_sizes(size):
    for dtype in DTYPES:
        shape = (1, 2, 1, 35, 70, size)
        query, key = cases.operands(shape, dtype)
        cases.assert_mass("triton", query, key, cases.plain(size), (16, 64), shape)
        blocks = cases.blocks_of(shape, (16, 64))
        cases.assert_recall("triton", query, key, cases.plain(size), blocks, (16, 64), shape)


if INTERPRETED:
    test_empty = cases.test_empty
    test_errors = cases.test_errors
    test_large_logits = cases.test_large_logits
    test_ranges_far_outside = cases.test_ranges_far_outside
    test_nan_stays_in_its_query = cases.test_nan_stays_in_its_query
    test_recall_of_every_block_and_of_none = cases.test_recall_of_every_block_and_of_none

    backend = backend_of("block_mass")


@interpreted
@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 130), (130, 1), (128, 128)])
def test_lengths(queries, keys):
    for dtype in DTYPES[1:]:
        shape = (1, 1, 1, queries, keys, 16)
        query, key = cases.operands(shape, dtype)
        cases.assert_mass("triton", query, key, cases.plain(16), (32, 32), shape)
        blocks = cases.blocks_of(shape, (128, 64))
        cases.assert_recall("triton", query, key, cases.plain(16), blocks, (128, 64), shape)


@interpreted
def test_layouts():
    cases.test_layouts_have_the_same_bits("triton", torch.bfloat16)


@interpreted
def test_entries_have_the_shapes_of_their_fakes():
    ops = torch.ops.pyrx_triton
    for name, arguments in cases.calls():
        torch.library.opcheck(getattr(ops, name), arguments, test_utils=("test_schema", "test_faketensor"))
        with pytest.raises(TypeError, match="float64"):
            query, key, third, *rest = arguments
            third = third.double() if third.is_floating_point() else third
            getattr(ops, name)(query.double(), key.double(), third, *rest[:2], *cases.plain(24))


def compile_ahead_of_time(architecture):
    """Prints one JSON line a compiled kernel."""
    compiled = triton_helpers.compile_launches(architecture)
    variants = [(size, block, "none") for size in (64, 128, 256) for block in (64, 128)]
    for dtype in (torch.bfloat16, torch.float32):
        for size, block, name in [*variants, (64, 64, "key_mask"), (128, 64, "everything"), (256, 128, "everything")]:
            shape = (1, 2, 2, 256, 256, size)
            query, key = (torch.zeros(1, 2, 256, size, dtype=dtype) for _ in range(2))
            logits = cases.plain(size) if name == "none" else cases.feature(name, shape, dtype)
            blocks = torch.zeros(1, 1, 256 // block, 256 // block, dtype=torch.bool)
            launcher.block_mass(query, key, torch.zeros(1, 2, 256), block, block, *logits)
            launcher.block_recall(query, key, blocks, block, block, *logits)
            triton_helpers.report(compiled, products, dtype=helpers.name_of(dtype), size=size, features=name)


def products(kernel):
    """Which instructions multiply."""
    ptx = kernel.asm["ptx"]
    return {"wgmma": "wgmma.mma_async" in ptx, "mma": "mma.sync" in ptx}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 90])
def test_ahead_of_time(architecture, python, tmp_path):
    script = f"import test_triton_block_mass as test; test.compile_ahead_of_time({architecture})"
    found = triton_helpers.ahead_of_time(python, tmp_path, script)
    assert {each["kernel"] for each in found} == triton_helpers.kernels_of("block_mass.py")
    for each in found:
        assert each["shared"] <= triton_helpers.SHARED_LIMIT[triton_helpers.SMALLEST[architecture]], each
        narrow = each["dtype"] != "float32"
        assert each["wgmma"] == (narrow and architecture == 90) and each["mma"] == (narrow and architecture == 80), each
        if narrow and each["features"] != "everything":
            # two programs of 256 threads fit an SM; for sm_80 operands take registers too
            assert each["stack"] <= (0 if architecture == 90 else 256) and each["registers"] <= 128, each
