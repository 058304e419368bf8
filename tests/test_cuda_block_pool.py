"""Means of blocks of tokens by CUDA C++ on a GPU: the reference's answers, layouts, alignments."""

import pytest
import torch
from helpers import FLOATS, assert_same_bits, assert_within_budget, layouts, name_of, need

from pyrx.ops.block_pool import block_pool

pytestmark = pytest.mark.gpu

SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 100, 17),
    (1, 2, 64, 64),
    (2, 2, 130, 80),
    (1, 1, 1311, 3),
    (1, 3, 63, 256),
    (3, 5, 999, 128),
]


@pytest.fixture(autouse=True)
def cuda(poison):
    return need("cuda", "cuda", ops=("block_pool",))


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_pooled(x, block, mean=None):
    """`x` and `mean` on the GPU."""
    got = block_pool(x, block, mean, "cuda")
    plain = block_pool(x, block, mean, "reference")
    exact = block_pool(x.double(), block, None if mean is None else mean.double(), "reference")
    for name, one, other, truth in zip(("means", "similarity"), got, plain, exact, strict=True):
        assert_within_budget(one, other, truth, name, floor=1.0)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_means_and_similarities(shape, dtype, block):
    x = (torch.randn(shape, dtype=torch.float64) + 0.5).to(dtype).cuda()
    x[:, :, ::7] = 0
    for mean in (None, x.to(wide(dtype)).mean(2)):
        assert_pooled(x, block, mean)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_layouts_and_alignments(dtype):
    expected = None
    for name, x in layouts((2, 3, 70, 24), dtype, torch.Generator().manual_seed(1)):
        strided = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="cuda").copy_(x)
        found = block_pool(strided, 32, None, "cuda")
        expected = expected or found
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other, name)
        flat = torch.empty(x.numel() + 1, dtype=dtype, device="cuda")[1:].view(x.shape).copy_(x)
        for one, other in zip(block_pool(flat, 32, None, "cuda"), expected, strict=True):
            assert_same_bits(one, other, f"{name}, one element off")
    heads = torch.randn(2, 70, 3, 24, device="cuda").to(dtype).transpose(1, 2)
    assert_pooled(heads, 32)
    assert_pooled(heads[:, :1].expand(2, 3, 70, 24), 32)


@pytest.mark.parametrize("shape", [(0, 2, 10, 4), (2, 2, 0, 4), (2, 2, 10, 0)], ids=name_of)
def test_empty(shape):
    means, similarity = block_pool(torch.randn(shape, device="cuda"), 16, None, "cuda")
    assert means.shape == (*shape[:2], -(-shape[2] // 16), shape[3]) and (similarity == 0).all()


def test_not_finite():
    x = torch.randn(1, 1, 48, 20, device="cuda")
    x[0, 0, 3, 5], x[0, 0, 20, 0] = torch.nan, torch.inf
    means, similarity = block_pool(x, 16, None, "cuda")
    assert similarity.isnan().tolist() == [[[True, True, False]]]
    assert means[0, 0, 0].isnan().nonzero().tolist() == [[5]] and means[0, 0, 1].isinf().nonzero().tolist() == [[0]]


def test_many_blocks():
    x = torch.randn(1, 1, 1 << 20, 8, device="cuda", dtype=torch.float16)
    assert_pooled(x, 16)
