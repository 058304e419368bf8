"""The small calls of every row (row_calls.py): the CPU's kernels and Triton's, interpreted, against the reference, and
that the table is whole."""

import pytest
import row_calls
import torch
from helpers import assert_same_bits, bits, need
from triton_helpers import INTERPRETED, interpreted, values_in_the_interpreter

from pyrx._backends import ABSENT, OPS

TABLE = [pytest.param(each, id=f"{each.row}, {each.name}") for each in row_calls.TABLE]


def assert_agree(call, got, expected):
    """The same bits, or of sums and products nearly the same values."""
    assert len(got) == len(expected) > 0
    for i, (one, other) in enumerate(zip(got, expected, strict=True)):
        if call.exact or not other.is_floating_point():
            assert_same_bits(one, other, f"{call.name}: result {i}")
        else:
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4, msg=lambda text, i=i: f"result {i}: {text}")


def test_every_row_has_calls():
    assert {each.row for each in row_calls.TABLE} == set(OPS)


@pytest.mark.skipif(INTERPRETED, reason="done in the other process")
@pytest.mark.parametrize("call", TABLE)
def test_cpu(call):
    need("cpu", ops=(call.row,))
    tensors, seed = call.tensors(), torch.tensor(7)
    before = [each.clone() for each in tensors]
    got = call(tensors, seed, "cpu")
    assert_agree(call, got, call(tensors, seed, "reference"))
    for one, other in zip(tensors, before, strict=True):
        assert torch.equal(one, other), "a call's own tensors are not to be written"
    # what the tests of streams and graphs rest on: other tensors, other results
    other = call(call.tensors(1), torch.tensor(8), "cpu")
    assert any((bits(a) != bits(b)).any() for a, b in zip(got, other, strict=True))


@interpreted
@pytest.mark.parametrize("call", TABLE)
def test_triton(call):
    if (call.row, "triton") in ABSENT:
        pytest.skip(ABSENT[call.row, "triton"])
    need("triton", ops=(call.row,))
    tensors, seed = call.tensors(), torch.tensor(7)
    assert_agree(call, call(tensors, seed, "triton"), call(tensors, seed, "reference"))


test_triton_in_the_interpreter = values_in_the_interpreter(__file__, 29)
