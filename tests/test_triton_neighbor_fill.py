"""The Triton kernels of neighbor_fill, see triton_helpers.py; test_triton.py compiles them."""

import helpers
import pytest
import torch
from triton_helpers import device_of, values_in_the_interpreter

import pyrx

pytest.importorskip("triton")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


device = device_of("neighbor_fill")


test_values_in_the_interpreter = values_in_the_interpreter(__file__, 14)


def places(shape, keep, device="cpu"):
    return torch.rand(shape[0], 1, *shape[2:], generator=torch.Generator().manual_seed(3)).to(device) < keep


@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.name_of)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 2, 33, 40), (2, 0, 3, 4), (2, 3, 4, 0)], ids=helpers.name_of)
def test_neighbor_fill(device, dtype, shape):
    input = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    for iterations, keep in ((0, 0.5), (3, 0.05), (40, 0.01), (3, 0.0), (3, 1.0)):
        mask = places(shape, keep, device)
        hidden = torch.where(mask, input, float("nan"))
        got, after = pyrx.neighbor_fill(hidden, mask, iterations, backend="triton")
        expected, expected_after = pyrx.neighbor_fill(input, mask, iterations, backend="reference")
        helpers.assert_same_bits(got, expected, f"{iterations} iterations, {keep}")
        assert torch.equal(after, expected_after)


@pytest.mark.parametrize("channels", [1, 70])
def test_neighbor_fill_layouts(device, channels):
    shape = (2, channels, 7, 11)
    mask = places(shape, 0.2, device)
    for layout, input in helpers.layouts(shape):
        input = input.to(device).requires_grad_()
        got, _ = pyrx.neighbor_fill(input, mask, 3, backend="triton")
        expected, _ = pyrx.neighbor_fill(input, mask, 3, backend="reference")
        helpers.assert_same_bits(got, expected, layout)
        assert got.stride() == torch.empty_like(input).stride(), layout
        upstream = torch.randn(shape, device=device)
        (grad,) = torch.autograd.grad(got, input, upstream)
        assert torch.equal(grad, torch.where(mask, upstream, 0))
