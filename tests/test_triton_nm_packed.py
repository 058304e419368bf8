"""Compressed N:M weights by the Triton kernels: values in Triton's interpreter, machine code for sm_80 and sm_90."""

import helpers
import pytest
import test_nm_packed as cases
import test_nm_packed_linear as linear
import torch
from triton_helpers import (
    INTERPRETED,
    SHARED_LIMIT,
    ahead_of_time,
    backend_of,
    interpreted,
    kernels_of,
    values_in_the_interpreter,
)

import pyrx
from pyrx.reference.dropout import pack_bits

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
RATIOS = [
    (2, 4),
    (1, 4),
    (1, 1),
    (3, 3),
    (1, 8),
    (2, 16),
    (3, 5),
    (7, 13),
    (8, 32),
    (9, 64),
    (3, 65),
    (64, 128),
    (1, 128),
]


test_values_in_the_interpreter = values_in_the_interpreter(__file__, 60)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.name_of)
@pytest.mark.parametrize("n, m", RATIOS)
def test_round_trips(dtype, n, m):
    weight = cases.hostile((3, 5 * m), dtype, seed=n * 200 + m)
    mask = cases.mask_of(weight, n, m)
    cases.check_round_trip("triton", weight, mask, n, m)
    cases.check_round_trip("triton", weight, cases.thinned(mask), n, m)


@interpreted
def test_several_blocks():
    weight = cases.values_of((7, 1032))
    cases.check_round_trip("triton", weight, cases.thinned(cases.mask_of(weight, 3, 8)), 3, 8)


@interpreted
@pytest.mark.parametrize("n, m", [(2, 4), (3, 8)])
def test_entries_pass_over_what_is_not_there(n, m):
    ops = torch.ops.pyrx_triton
    values, indices = torch.ones(3, 2 * n), torch.full((3, 2 * n), 255, dtype=torch.uint8)
    indices[0, 0], indices[1, 0] = 1, m
    expected = torch.zeros(3, 2 * m)
    expected[0, 1] = 1
    assert torch.equal(ops.nm_decompress(values, indices, n, m), expected)
    over = pack_bits(torch.ones(3, 2 * m, dtype=torch.bool))
    weight = torch.randn(3, 2 * m)
    found = ops.nm_compress(weight, over, n, m)
    assert torch.equal(found[0], weight.unflatten(-1, (2, m))[..., :n].flatten(-2))


@interpreted
def test_entries_have_the_shapes_of_their_fakes():
    ops = torch.ops.pyrx_triton
    x, packed, bias = cases.leaves_of(2, 4, dtype=torch.float32)
    weight = cases.values_of((5, 12))
    calls = [
        (ops.nm_compress, (weight, pack_bits(cases.mask_of(weight, 2, 4)), 2, 4)),
        (ops.nm_decompress, (packed.values, packed.indices, 2, 4)),
        (ops.nm_linear, (x, packed.values, packed.indices, bias, 2, 4)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(TypeError, match="float64"):
        ops.nm_decompress(packed.values.double(), packed.indices, 2, 4)


if INTERPRETED:
    test_any_number_of_dimensions = cases.test_any_number_of_dimensions
    test_class_of_masks = cases.test_every_mask_of_a_group
    test_compress_errors = cases.test_compress_errors
    test_empty = linear.test_empty
    test_layouts = cases.test_layouts
    test_linear_errors = cases.test_linear_errors
    test_too_many_kept = cases.test_too_many_kept

    backend = backend_of("nm_packed")


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.name_of)
def test_products(dtype):
    for n, m in cases.RATIOS[::3]:
        weight = cases.values_of((7, 3 * m), dtype)
        packed = pyrx.nm_compress(weight, n, m, mask=cases.mask_of(weight, n, m), backend="triton")
        for batch in (1, 5):
            x, bias = cases.values_of((batch, 3 * m), dtype, 1), cases.values_of((7,), dtype, 2)
            linear.check_product("triton", x, packed, bias)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.name_of)
def test_gradients(dtype):
    for needs in ((1, 1, 1), (1, 0, 0), (0, 1, 0)):
        linear.test_gradients("triton", dtype, needs)


COMPILE = """
import sys, torch
from triton_helpers import compile_launches, report
from pyrx._triton import nm_packed
compiled = compile_launches(int(sys.argv[1]))
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    for n, m in ((2, 4), (1, 8), (3, 100), (64, 128)):
        weight, bits = torch.zeros(8, 4 * m, dtype=dtype), torch.zeros(8, (4 * m + 7) // 8, dtype=torch.uint8)
        values, indices = nm_packed.nm_compress(weight, bits, n, m)
        nm_packed.nm_decompress(values, indices, n, m)
        report(compiled, lambda kernel: {}, n=n, m=m)
"""


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.skipif(INTERPRETED, reason="one process holds either interpreted or compiled kernels")
def test_ahead_of_time(python, tmp_path, architecture):
    found = ahead_of_time(python, tmp_path, COMPILE.replace("sys.argv[1]", str(architecture)))
    assert {each["kernel"] for each in found} == kernels_of("nm_packed.py")
    for each in found:
        assert each["stack"] == 0 and each["registers"] <= 128, each
        assert each["shared"] <= SHARED_LIMIT[architecture], each
