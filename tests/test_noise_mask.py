"""Standard normals and pyrx.noise_mask: the same bits on every backend, and the mask's gradient."""

import contextlib
import math

import numpy as np
import pytest
import torch
from helpers import FLOATS, assert_same_bits, layouts, name_of, need, philox, threads
from torch._subclasses.fake_tensor import FakeTensorMode

import pyrx
from pyrx import _library

SHAPE = (3, 4, 9, 7)  # planes of 63 elements, so that rows of Philox words begin anywhere


def box_muller(seed, numel, sample):
    """The definition in float64: Philox in NumPy, then the textbook's formula."""
    groups = np.arange((numel + 3) // 4, dtype=np.uint64)
    low, high = groups & np.uint64(0xFFFFFFFF), groups >> np.uint64(32)
    seed %= 2**64
    words = philox(
        (low, high, groups * 0 + np.uint64(sample), groups * 0 + np.uint64(2)), (seed & 0xFFFFFFFF, seed >> 32)
    )
    u = [((word >> np.uint64(8)).astype(np.float64) + 0.5) / 2**24 for word in words]
    radius = [np.sqrt(-2 * np.log(each)) for each in u[::2]]
    angle = [2 * np.pi * each for each in u[1::2]]
    normals = [radius[0] * np.cos(angle[0]), radius[0] * np.sin(angle[0])]
    normals += [radius[1] * np.cos(angle[1]), radius[1] * np.sin(angle[1])]
    return torch.from_numpy(np.stack(normals, 1).reshape(-1)[:numel])


def normals(numel, seed, sample=0, backend=None):
    zeros = torch.zeros(1, 1, numel)
    return pyrx.noise_mask(zeros, torch.ones_like(zeros), seed=seed, sample=sample, backend=backend).flatten()


@pytest.mark.parametrize("seed, sample", [(0, 0), (-5, 7), (0x0123456789ABCDEF, 2**32 - 1)])
def test_normals_are_box_mullers(backend, seed, sample):
    for numel in (1, 3, 64, 65, 4097, 20011):
        got = normals(numel, seed, sample, backend)
        torch.testing.assert_close(got.double(), box_muller(seed, numel, sample), rtol=0, atol=3e-6)


def test_normals_have_the_same_bits_on_every_backend(cpu):
    for seed in (1, -(2**63), 2**63 - 1):
        assert_same_bits(normals(100_003, seed, 3, cpu), normals(100_003, seed, 3, "reference"))


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_normals_have_the_same_bits_on_every_instruction_set(cpu, python, tmp_path, capability):
    script = """
import sys, torch, pyrx
zeros = torch.zeros(1, 1, 5003)
torch.save(pyrx.noise_mask(zeros, torch.ones_like(zeros), seed=9, backend="cpu"), sys.argv[1])
"""
    python(script, tmp_path / "noise", ATEN_CPU_CAPABILITY=capability)
    assert_same_bits(torch.load(tmp_path / "noise").flatten(), normals(5003, 9, backend="reference"))


def test_normals_are_standard_normals(backend):
    """Kolmogorov-Smirnov, moments, and no correlation between neighbours, samples and seeds."""
    n = 1 << 18
    x = normals(n, 42, backend=backend).double()
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    ordered = x.sort().values
    cumulative = (1 + torch.erf(ordered / math.sqrt(2))) / 2
    ranks = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cumulative - ranks[:-1]).abs(), (cumulative - ranks[1:]).abs()).max()
    assert distance * n**0.5 < 1.95, "Kolmogorov-Smirnov at 0.001"
    others = {"sample": normals(n, 42, 1, backend), "seed": normals(n, 43, 0, backend)}
    others |= {f"{shift} further": x.roll(shift) for shift in (1, 2, 3, 4)}
    for name, other in others.items():
        assert abs((x * other.double()).mean()) < 4.5 / n**0.5, name


def expected(images, mask, seed, std=1.0, mean=0.0, sample=0):
    """In float64, each operation of the definition's float32 noise made there."""
    noise = normals(images.numel(), seed, sample, "reference")
    noise = (noise * std + mean).reshape(images.shape)
    wide = torch.float64 if images.dtype == torch.float64 else torch.float32
    return (images.to(wide) + mask.to(wide) * noise.to(wide)).to(images.dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("channels", [1, 4])
def test_values_and_layouts(backend, dtype, channels):
    mask = torch.rand(SHAPE[0], channels, *SHAPE[2:]).to(dtype)
    for name, images in layouts(SHAPE, dtype):
        for each in (mask, mask.contiguous(memory_format=torch.channels_last), mask.flip(-1)):
            got = pyrx.noise_mask(images, each, seed=5, std=0.3, mean=-0.2, sample=2, backend=backend)
            assert_same_bits(got, expected(images, each, 5, 0.3, -0.2, 2), name)
            assert got.stride() == torch.empty_like(images).stride(), name


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (1, 1, 1, 1), (2, 3, 63), (2, 3, 2, 5, 7), (2, 3, 100, 131)]
)
def test_shapes(backend, shape):
    images, mask = torch.randn(shape), torch.rand(shape[0], 1, *shape[2:], requires_grad=True)
    got = pyrx.noise_mask(images, mask, seed=1, backend=backend)
    assert_same_bits(got, expected(images, mask.detach(), 1))
    upstream = torch.randn(shape)
    (grad,) = torch.autograd.grad(got, mask, upstream)
    noise = normals(images.numel(), 1, 0, "reference").reshape(shape)
    torch.testing.assert_close(grad, (upstream * noise).sum(1, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients(backend, dtype, channels, needs):
    images = torch.randn(SHAPE).to(dtype).requires_grad_(needs[0])
    mask = torch.rand(SHAPE[0], channels, *SHAPE[2:]).to(dtype).requires_grad_(needs[1])
    got = pyrx.noise_mask(images, mask, seed=3, std=0.5, mean=0.25, sample=1, backend=backend)
    for name, upstream in layouts(SHAPE, dtype):
        asked = [each for each in (images, mask) if each.requires_grad]
        found = torch.autograd.grad(got, asked, upstream, retain_graph=True)
        assert [each.shape for each in found] == [each.shape for each in asked]
        if needs[0]:
            assert_same_bits(found[0], upstream, name)
        if needs[1]:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            noise = (normals(images.numel(), 3, 1, "reference") * 0.5 + 0.25).reshape(SHAPE).to(wide)
            exact = upstream.to(wide) * noise
            if channels == 1:
                exact = exact[:, :1] + exact[:, 1:2] + exact[:, 2:3] + exact[:, 3:]
            # PyTorch's own gradient of the reference sums the channels in an order of its own
            slack = {"rtol": 1e-5, "atol": 1e-6} if backend == "reference" and dtype == torch.float32 else None
            if backend == "reference" and slack is None and channels == 1:
                slack = {"rtol": 1e-2, "atol": 1e-2}
            if slack:
                torch.testing.assert_close(found[-1], exact.to(dtype), **slack)
            else:
                assert_same_bits(found[-1], exact.to(dtype), name)


@pytest.mark.parametrize("dtype", [torch.bool, *FLOATS], ids=name_of)
@pytest.mark.parametrize("images", [torch.bfloat16, torch.float32], ids=name_of)
def test_masks_of_other_dtypes(backend, images, dtype):
    x = torch.randn(SHAPE).to(images)
    mask = (torch.rand(SHAPE[0], 1, *SHAPE[2:]) * 2).to(dtype).requires_grad_(dtype.is_floating_point)
    rounded = mask.detach().to(images).requires_grad_()
    got, same = (pyrx.noise_mask(x, each, seed=6, backend=backend) for each in (mask, rounded))
    assert_same_bits(got.detach(), same.detach())
    if mask.requires_grad:
        upstream = torch.randn(SHAPE).to(images)
        found, plain = (torch.autograd.grad(y, m, upstream)[0] for y, m in ((got, mask), (same, rounded)))
        assert_same_bits(found, plain.to(dtype))


def test_compiled_backward_equals_the_references(cpu):
    grad, seed = torch.randn(5, 3, 40, 37), torch.tensor(8)
    from pyrx.reference.noise_mask import noise_mask_backward

    for broadcast in (True, False):
        arguments = (grad, seed, broadcast, 0.7, 0.1, 4)
        assert_same_bits(_library.namespace(cpu).noise_mask_backward(*arguments), noise_mask_backward(*arguments))


def test_gradcheck_twice(backend):
    images = torch.randn(2, 3, 3, 5, dtype=torch.float64, requires_grad=True)
    for channels in (1, 3):
        mask = torch.rand(2, channels, 3, 5, dtype=torch.float64, requires_grad=True)

        def function(x, m):
            return pyrx.noise_mask(x, m, seed=1, mean=0.5, backend=backend)

        assert torch.autograd.gradcheck(function, (images, mask))
        assert torch.autograd.gradgradcheck(lambda x, m: function(x, m) ** 2, (images, mask))


def test_double_backward_weighs_the_same_noise(cpu):
    grad = torch.randn(2, 3, 4, 5, requires_grad=True)
    out = _library.namespace(cpu).noise_mask_backward(grad, torch.tensor(2), True, 1.0, 0.5, 3)
    upstream = torch.randn(2, 1, 4, 5)
    (found,) = torch.autograd.grad(out, grad, upstream)
    assert_same_bits(found, expected(torch.zeros(2, 3, 4, 5), upstream, 2, 1.0, 0.5, 3))


def test_nothing_but_the_seed_is_saved(cpu):
    saved = []
    images, mask = torch.randn(4, 3, 50, 50), torch.rand(4, 1, 50, 50, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        pyrx.noise_mask(images, mask, backend=cpu)
    assert saved == [8]


def test_thread_counts_do_not_change_bits(cpu):
    images, mask = torch.randn(5, 3, 70, 91), torch.rand(5, 1, 70, 91)
    with threads(1):
        one = pyrx.noise_mask(images, mask, seed=2, backend=cpu)
    with threads(3):
        assert_same_bits(pyrx.noise_mask(images, mask, seed=2, backend=cpu), one)


def test_seeds_come_from_the_generator(backend):
    images, mask = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    torch.manual_seed(3)
    first, second = (pyrx.noise_mask(images, mask, backend=backend) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(pyrx.noise_mask(images, mask, backend=backend), first) and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("channels", [1, 4])
def test_opcheck(dtype, channels):
    ops = _library.namespace(need("cpu", ops=("noise_mask",)))
    seed = torch.tensor(5)
    for layout in (torch.contiguous_format, torch.channels_last):
        images = torch.randn(SHAPE).to(dtype).contiguous(memory_format=layout).requires_grad_()
        mask = torch.rand(SHAPE[0], channels, *SHAPE[2:]).to(dtype).requires_grad_()
        torch.library.opcheck(ops.noise_mask.default, (images, mask, seed, 0.5, 0.1, 3))
        torch.library.opcheck(ops.noise_mask_backward.default, (images, seed, channels == 1, 0.5, 0.1, 3))


def test_compiled_equals_eager(backend):
    def step(images, mask, seed):
        return pyrx.noise_mask(images, mask, seed=seed, std=0.5, backend=backend)

    torch._dynamo.reset()
    compiled, seed = torch.compile(step, fullgraph=True, dynamic=True), torch.tensor(4)
    for size in (8, 11):
        images, mask = torch.randn(2, 3, size, size), torch.rand(2, 1, size, size, requires_grad=True)
        got, eager = compiled(images, mask, seed), step(images, mask, seed)
        torch.testing.assert_close(got, eager, rtol=1e-6, atol=1e-6)
        upstream = torch.randn(eager.shape)
        torch.testing.assert_close(
            torch.autograd.grad(got, mask, upstream)[0], torch.autograd.grad(eager, mask, upstream)[0]
        )


X, M, SEED = torch.randn(2, 3, 4, 5), torch.rand(2, 1, 4, 5), torch.tensor(1)
ROWS = [
    ({"images": X.long()}, TypeError, "images of dtype float16, bfloat16, float32 or float64, got torch.int64"),
    ({"images": X[0, 0]}, ValueError, "images of shape [N, C, ..., W], got [4, 5]"),
    ({"mask": M[:1]}, ValueError, "mask of shape [N, 1 or C, ...] with [N, C, ...] = [2, 3, 4, 5], got [1, 1, 4, 5]"),
    ({"mask": M[:, 0]}, ValueError, "mask of shape [N, 1 or C, ...] with [N, C, ...] = [2, 3, 4, 5], got [2, 4, 5]"),
    (
        {"mask": X[:, :2]},
        ValueError,
        "mask of shape [N, 1 or C, ...] with [N, C, ...] = [2, 3, 4, 5], got [2, 2, 4, 5]",
    ),
    ({"seed": SEED.int()}, TypeError, "seed of dtype torch.int64, got torch.int32"),
    ({"seed": torch.tensor([1, 2])}, ValueError, "seed of one element, got [2]"),
    ({"std": -1.0}, ValueError, "std finite and at least 0, got -1.0"),
    ({"std": math.nan}, ValueError, "std finite and at least 0, got nan"),
    ({"std": math.inf}, ValueError, "std finite and at least 0, got inf"),
    ({"mean": math.inf}, ValueError, "mean finite, got inf"),
    ({"sample": -1}, ValueError, "sample in [0, 4294967295], got -1"),
    ({"sample": 2**32}, ValueError, "sample in [0, 4294967295], got 4294967296"),
]
RAW_ROWS = [*ROWS, ({"mask": M.half()}, TypeError, "mask of dtype torch.float32, got torch.float16")]
PUBLIC_ROWS = [
    *ROWS,
    ({"images": [1.0]}, TypeError, "images to be a Tensor, got list"),
    ({"mask": 0.5}, TypeError, "mask to be a Tensor, got float"),
    ({"mask": M.int()}, TypeError, "mask of dtype bool, float16, bfloat16, float32 or float64, got torch.int32"),
    ({"mask": M.to("meta")}, RuntimeError, "mask on device cpu, got meta"),
    ({"std": "1"}, TypeError, "std to be a float, got str"),
    ({"mean": True}, TypeError, "mean to be a float, got bool"),
    ({"sample": 1.0}, TypeError, "sample to be an int, got float"),
    ({"seed": 1, "generator": torch.Generator()}, ValueError, "at most one of seed and generator, got both"),
]


@pytest.mark.parametrize("changes, error, text", PUBLIC_ROWS, ids=[text for _, _, text in PUBLIC_ROWS])
def test_errors(backend, changes, error, text):
    with pytest.raises(error) as caught:
        pyrx.noise_mask(**({"images": X, "mask": M, "backend": backend} | changes))
    assert str(caught.value) == f"pyrx::noise_mask: expected {text}"


@pytest.mark.parametrize("changes, error, text", RAW_ROWS, ids=[text for _, _, text in RAW_ROWS])
def test_kernels_and_fakes_raise_the_same(changes, error, text):
    op = _library.namespace(need("cpu", ops=("noise_mask",))).noise_mask
    arguments = {"images": X, "mask": M, "seed": SEED, "std": 1.0, "mean": 0.0, "sample": 0} | changes
    for fake in (False, True):
        with FakeTensorMode() if fake else contextlib.nullcontext() as mode, pytest.raises(error) as caught:
            op(**{k: mode.from_tensor(v) if fake and isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
        assert str(caught.value) == f"pyrx::noise_mask: expected {text}"
