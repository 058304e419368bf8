"""Means of blocks of tokens and how alike they are: the definition against pairs of cosines, kernels against it."""

import pytest
import torch
from helpers import FLOATS, assert_same_bits, assert_within_budget, layouts, name_of, need, threads
from torch._subclasses.fake_tensor import FakeTensorMode

from pyrx.ops.block_pool import block_pool

SHAPES = [(1, 1, 1, 1), (2, 3, 100, 17), (1, 2, 64, 64), (2, 2, 130, 80), (1, 1, 1311, 3), (1, 3, 63, 256)]


def tokens_of(shape, dtype=torch.float32):
    """Tokens around a mean, a few of them zero."""
    x = torch.randn(shape, dtype=torch.float64) + 0.5
    x[:, :, ::7] = 0
    return x.to(dtype)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def by_pairs(x, block, mean=None):
    """In float64: means, and the mean of all pairs' cosines."""
    x = x.double() if mean is None else x.double() - mean.double()[:, :, None]
    directions = torch.nn.functional.normalize(x, dim=-1)
    means, similarity = [], []
    for first in range(0, x.shape[2], block):
        part = directions[:, :, first : first + block]
        means.append(x[:, :, first : first + block].mean(2))
        similarity.append((part @ part.transpose(-1, -2)).mean((-1, -2)))
    return torch.stack(means, 2), torch.stack(similarity, 2)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_means_and_similarities(backend, shape, dtype, block):
    x = tokens_of(shape, dtype)
    for mean in (None, x.to(wide(dtype)).mean(2), torch.randn(*shape[:2], shape[3]).to(wide(dtype))):
        got, plain = block_pool(x, block, mean, backend), block_pool(x, block, mean, "reference")
        for name, one, other, exact in zip(("means", "similarity"), got, plain, by_pairs(x, block, mean), strict=True):
            assert one.is_contiguous()
            assert_within_budget(one, other, exact, name, floor=1.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_layouts_have_the_same_bits(cpu, dtype):
    expected = None
    for name, x in layouts((2, 3, 70, 24), dtype, torch.Generator().manual_seed(1)):
        means, similarity = block_pool(x, 32, None, cpu)
        expected = expected or (means, similarity)
        assert_same_bits(means, expected[0], name)
        assert_same_bits(similarity, expected[1], name)
    x = torch.randn(1, 1, 70, 24).to(dtype).expand(2, 3, 70, 24)
    for one, other in zip(block_pool(x, 32, None, cpu), block_pool(x.contiguous(), 32, None, cpu), strict=True):
        assert_same_bits(one, other)


def test_means_of_any_layout(backend):
    x, mean = torch.randn(2, 3, 40, 8), torch.randn(2, 8, 3)
    found = block_pool(x, 16, mean.transpose(1, 2), backend)
    for one, other in zip(found, block_pool(x, 16, mean.transpose(1, 2).contiguous(), backend), strict=True):
        assert_same_bits(one, other)


def test_threads_have_the_same_bits(cpu):
    x = torch.randn(2, 5, 3000, 33)
    with threads(1):
        expected = block_pool(x, 64, None, cpu)
    for count in (2, 3):
        with threads(count):
            for one, other in zip(block_pool(x, 64, None, cpu), expected, strict=True):
                assert_same_bits(one, other)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_instruction_sets(cpu, python, tmp_path, capability):
    script = """
import sys, torch
from pyrx.ops.block_pool import block_pool
x, mean = torch.load(sys.argv[1])
torch.save([block_pool(x.to(t), 32, mean.to(torch.float64 if t == torch.float64 else torch.float32), "cpu")
            for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)], sys.argv[2])
"""
    x, mean = tokens_of((2, 2, 100, 40)), torch.randn(2, 2, 40)
    torch.save((x, mean), tmp_path / "x")
    python(script, tmp_path / "x", tmp_path / "pooled", ATEN_CPU_CAPABILITY=capability)
    for dtype, found in zip(FLOATS, torch.load(tmp_path / "pooled"), strict=True):
        centre = mean.to(wide(dtype))
        plain, exact = block_pool(x.to(dtype), 32, centre, "reference"), by_pairs(x.to(dtype), 32, centre)
        for one, other, truth in zip(found, plain, exact, strict=True):
            assert_within_budget(one, other, truth, capability, floor=1.0)


@pytest.mark.parametrize("shape", [(0, 2, 10, 4), (2, 0, 10, 4), (2, 2, 0, 4), (2, 2, 10, 0)], ids=name_of)
def test_empty(backend, shape):
    means, similarity = block_pool(torch.randn(shape), 16, None, backend)
    count = -(-shape[2] // 16)
    assert means.shape == (*shape[:2], count, shape[3]) and similarity.shape == (*shape[:2], count)
    assert (similarity == 0).all()


def test_alike_and_opposite(backend):
    x = torch.randn(1, 1, 1, 12).expand(1, 1, 64, 12).clone()
    x *= torch.rand(64, 1) + 0.5
    assert block_pool(x, 64, None, backend)[1].item() == pytest.approx(1, abs=1e-6)
    x[:, :, ::2] *= -1
    assert block_pool(x, 64, None, backend)[1].item() == pytest.approx(0, abs=1e-6)
    assert block_pool(torch.zeros_like(x), 64, None, backend)[1].item() == 0


def test_not_finite(backend):
    x = torch.randn(1, 1, 48, 20)
    x[0, 0, 3, 5], x[0, 0, 20, 0] = torch.nan, torch.inf
    means, similarity = block_pool(x, 16, None, backend)
    assert similarity.isnan().tolist() == [[[True, True, False]]]
    assert means[0, 0, 0].isnan().nonzero().tolist() == [[5]] and means[0, 0, 1].isinf().nonzero().tolist() == [[0]]


def test_no_gradient(backend):
    x = torch.randn(1, 1, 40, 8, requires_grad=True)
    assert not any(each.requires_grad for each in block_pool(x, 16, x.mean(2), backend))


X, MEAN = torch.randn(2, 3, 40, 8), torch.randn(2, 3, 8)
ERRORS = [
    ((X.long(), None, 16), TypeError, "x of dtype float16, bfloat16, float32 or float64, got torch.int64"),
    ((X[0], None, 16), ValueError, "x of shape [B, H, S, D], got [3, 40, 8]"),
    ((torch.ones(1, 1, 4, 257), None, 16), ValueError, "x of a head size of at most 256, got 257"),
    ((X, MEAN.double(), 16), TypeError, "mean of dtype torch.float32, got torch.float64"),
    ((X.half(), MEAN.half(), 16), TypeError, "mean of dtype torch.float32, got torch.float16"),
    ((X, MEAN[:1], 16), ValueError, "mean of shape [B, H, D] = [2, 3, 8], got [1, 3, 8]"),
    ((X, MEAN.to("meta"), 16), RuntimeError, "mean on device cpu, got meta"),
    ((X, None, 48), ValueError, "block to be one of 16, 32, 64, 128, got 48"),
]


@pytest.mark.parametrize("arguments, error, text", ERRORS, ids=[each[2] for each in ERRORS])
def test_errors(backend, arguments, error, text):
    x, mean, block = arguments
    op = torch.ops.pyrx.block_pool
    calls = [lambda: block_pool(x, block, mean, backend) if backend == "reference" else op(x, mean, block)]
    if mean is None or mean.device == x.device:
        mode = FakeTensorMode()
        fake = [each if each is None else mode.from_tensor(each) for each in (x, mean)]
        calls.append(lambda: op(*fake, block))
    for call in calls:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == f"pyrx::block_pool: expected {text}"


def test_opcheck(cpu):
    need(cpu, ops=("block_pool",))
    for x, mean in ((X, MEAN), (X.bfloat16(), None), (X[:0], None)):
        torch.library.opcheck(torch.ops.pyrx.block_pool.default, (x, mean, 16))


def test_compiled(backend):
    compiled = torch.compile(
        lambda x, mean: block_pool(x, 32, mean, backend), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for shape in ((2, 3, 40, 8), (1, 2, 129, 24)):
        x, mean = torch.randn(shape), torch.randn(*shape[:2], shape[3])
        for one, other in zip(compiled(x, mean), block_pool(x, 32, mean, backend), strict=True):
            torch.testing.assert_close(one, other)
