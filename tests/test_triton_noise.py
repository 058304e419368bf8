"""Random erasing and noise masks in Triton: the reference's bits, interpreted on the CPU or on a GPU."""

import helpers
import pytest
import torch
from triton_helpers import device_of, values_in_the_interpreter

import pyrx
from pyrx.reference.noise_mask import noise_mask_backward

pytest.importorskip("triton")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DRAWS = [
    {"prob": 0.9, "max_count": 3},
    {"prob": 1.0, "per_sample": False},
    {"prob": 1.0, "num_splits": 2},
    {"prob": 1.0, "scale": (0.5, 1.0), "ratio": (0.1, 10.0)},
]


device = device_of("random_erasing", "noise_mask")


test_values_in_the_interpreter = values_in_the_interpreter(__file__, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.name_of)
@pytest.mark.parametrize("shape", [(2, 3, 9, 7), (2, 3, 8, 4), (1, 1, 3, 5), (0, 2, 3, 3)], ids=helpers.name_of)
def test_noise_mask(device, dtype, shape):
    ops = torch.ops.pyrx_triton
    for channels in {1, shape[1]}:
        for name, images in helpers.layouts(shape, dtype):
            images, mask = images.to(device), torch.rand(shape[0], channels, *shape[2:]).to(device, dtype)
            options = {"seed": -3, "std": 0.5, "mean": 0.1, "sample": 2**32 - 1}
            got, expected = (pyrx.noise_mask(images, mask, backend=b, **options) for b in ("triton", "reference"))
            helpers.assert_same_bits(got, expected, name)
            assert got.stride() == torch.empty_like(images).stride()
            arguments = (images, torch.tensor(5, device=device), channels == 1, 0.5, 0.1, 3)
            expected = noise_mask_backward(*arguments)
            helpers.assert_same_bits(ops.noise_mask_backward(*arguments), expected, name)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("draw", DRAWS, ids=str)
def test_random_erasing(device, mode, draw):
    options = {"mode": mode, "value": (1.0, 2.0, 3.0), "seed": 6, "return_boxes": True, **draw}
    for shape in ((5, 3, 17, 21), (3, 3, 2, 8, 9)):
        for name, images in helpers.layouts(shape):
            images = images.to(device)
            got, expected = (pyrx.random_erasing(images, backend=b, **options) for b in ("triton", "reference"))
            assert torch.equal(got[1], expected[1])
            helpers.assert_same_bits(got[0], expected[0], name)
            assert got[0].stride() == expected[0].stride(), name
            same = images.clone()
            pyrx.random_erasing(same, backend="triton", inplace=True, **options)
            helpers.assert_same_bits(same, expected[0], name)


def test_cutout_and_bytes(device):
    images = (torch.rand(3, 2, 4, 8, 9) * 255).byte().to(device)
    options = {"num_holes": 2, "length": 0.6, "value": 9, "seed": 6, "return_boxes": True}
    got, expected = (pyrx.cutout(images, backend=b, **options) for b in ("triton", "reference"))
    assert torch.equal(got[1], expected[1]) and torch.equal(got[0], expected[0])
    empty = torch.zeros(0, 3, 4, 4, device=device)
    assert pyrx.random_erasing(empty, backend="triton").shape == empty.shape
