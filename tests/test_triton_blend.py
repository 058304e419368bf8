"""Alpha compositing by the Triton kernels in Triton's interpreter; test_blend.py has them on a GPU."""

import helpers
import pytest
import test_blend as cases
import torch
from triton_helpers import INTERPRETED, backend_of, interpreted, values_in_the_interpreter

import pyrx

pytest.importorskip("triton")

DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
# (images, alpha): alpha over channels, of a channel, of the batch, of frames; rows of several blocks
FORMS = [
    ((2, 3, 7, 5), (2, 1, 7, 5)),
    ((2, 3, 7, 5), (1, 3, 7, 5)),
    ((1, 3, 40, 60), (1, 1, 40, 60)),
    ((2, 9, 1, 3), (2, 1, 1, 3)),
    ((2, 3, 2, 5, 7), (2, 1, 1, 5, 7)),
    ((2, 3, 2, 5, 7), (1, 3, 1, 5, 7)),
    ((2, 3, 2, 5, 7), (2, 3, 2, 5, 7)),
]


def layouts_of(values):
    return [each for name, each in cases.image_layouts(values) if name in ("contiguous", "channels_last", "transposed")]


test_values_in_the_interpreter = values_in_the_interpreter(__file__, 31)


@interpreted
@pytest.mark.parametrize("shape, form", FORMS, ids=helpers.name_of)
def test_values(shape, form):
    for i, dtype in enumerate(DTYPES):
        x, y = cases.images_of(shape, dtype), cases.images_of(shape, dtype, 2)
        alpha = cases.matte_of(form, (torch.float32, torch.bool, torch.bfloat16, torch.float64)[i])
        expected = cases.formula(x, y, alpha)
        for own, matte in zip(layouts_of(x), layouts_of(alpha)[:: (-1) ** i], strict=True):
            got = pyrx.blend(own, y, matte, backend="triton")
            helpers.assert_same_bits(got, expected)
            assert got.stride() == pyrx.blend(own, y, matte, backend="reference").stride()


@interpreted
@pytest.mark.parametrize("shape, form", FORMS, ids=helpers.name_of)
def test_gradients(shape, form):
    for dtype in DTYPES[1:]:
        x, y, upstream = (cases.images_of(shape, dtype, seed) for seed in (0, 2, 3))
        alpha = cases.matte_of(form)
        expected = cases.gradients(x, y, alpha, upstream, "reference")
        for own, grad in zip(layouts_of(x), reversed(layouts_of(upstream)), strict=True):
            found = cases.gradients(own, y, alpha, grad, "triton")
            for one, other in zip(found[:2], expected[:2], strict=True):
                helpers.assert_same_bits(one, other)
            torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4)


@interpreted
def test_pixels_wider_than_a_block():
    x, y, upstream = (cases.images_of((1, 1100, 1, 3), torch.float32, seed) for seed in (0, 2, 3))
    last, alpha = x.contiguous(memory_format=torch.channels_last), cases.matte_of((1, 1, 1, 3))
    helpers.assert_same_bits(pyrx.blend(last, y, alpha, backend="triton"), cases.formula(x, y, alpha))
    found, expected = (cases.gradients(last, y, alpha, upstream, each) for each in ("triton", "reference"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


if INTERPRETED:
    test_bytes = cases.test_bytes_are_rounded_to_even_and_kept_in_range
    test_empty = cases.test_empty
    test_errors = cases.test_errors
    test_expanded_operands = cases.test_expanded_operands
    test_gradients_of_partners = cases.test_gradients_of_partners
    test_nan_upstream = cases.test_nan_upstream_goes_where_the_pixel_came_from
    test_only_what_needs_a_gradient = cases.test_only_what_needs_a_gradient
    test_out = cases.test_out

    backend = backend_of("blend")


@interpreted
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=helpers.name_of)
def test_copies_keep_every_bit(dtype):
    cases.test_alpha_one_and_zero_copy_every_bit("triton", dtype)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES[::3], ids=helpers.name_of)
def test_partners(dtype):
    cases.test_partner("triton", dtype)
    x, alpha = cases.images_of((3, 1, 1, 4), dtype), torch.full((3, 1, 1, 4), 0.5)
    ops = torch.ops.pyrx_triton
    got = ops.blend(x, x, alpha, torch.tensor([1, 3, -1]))
    helpers.assert_same_bits(got[:1], cases.formula(x[:1], x[1:2], alpha[:1]))
    expected = x[1:] if dtype.is_floating_point else cases.formula(x[1:], torch.zeros_like(x[1:]), alpha[1:])
    assert got[1:].isnan().all() if dtype.is_floating_point else torch.equal(got[1:], expected)


@interpreted
def test_entries_have_the_shapes_of_their_fakes():
    ops = torch.ops.pyrx_triton
    x, alpha, partner = torch.randn(2, 3, 4, 5), torch.rand(2, 1, 4, 5), torch.tensor([1, 1])
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        calls = [
            (ops.blend, (x, x, alpha, partner)),
            (ops.blend_out, (torch.empty_like(x), x, x, alpha, None)),
            (ops.blend_backward, (x, x, x, alpha, partner, [True, True, True])),
            (ops.blend_backward, (x, None, None, alpha, partner, [False, True, False])),
        ]
        for op, arguments in calls:
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(TypeError, match="float64"):
        ops.blend(x.double(), x.double(), alpha, None)
