"""Alpha compositing: the reference against its formula, every backend against the reference, bit for bit."""

import math

import numpy as np
import pytest
import torch
from helpers import FLOATS, LOW, assert_same_bits, bits, name_of, need, threads
from torch._subclasses.fake_tensor import FakeTensorMode

import pyrx
from pyrx import _library
from pyrx.reference import blend as reference

DTYPES = (torch.uint8, *FLOATS)
ALPHAS = (torch.bool, *FLOATS)
SHAPES = [(1, 1, 1, 1), (2, 3, 7, 5), (3, 2, 1, 63), (2, 3, 100, 13), (1, 40, 3, 3), (2, 17, 4, 5), (3, 4, 2, 5, 7)]


def served(backend, device="cpu", dtype=torch.float32):
    return need(backend, device, torch.float32 if dtype == torch.uint8 else dtype, ("blend",))


def images_of(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def matte_of(shape, dtype=torch.float32, seed=1):
    """In [0, 1], a quarter of it 0 and a quarter 1."""
    generator = torch.Generator().manual_seed(seed)
    soft = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 0.5).clamp(0, 1)
    return soft > 0.5 if dtype == torch.bool else soft.to(dtype)


def formula(x, y, alpha):
    """In NumPy, of float32 steps, float64 for float64."""
    kind = np.float64 if x.dtype == torch.float64 else np.float32
    own, other, a = (each.to(torch.float64).numpy().astype(kind) for each in (x, y, alpha))
    mixed = a * own + (kind(1) - a) * other
    if x.dtype == torch.uint8:
        return torch.from_numpy(np.clip(np.rint(mixed), 0, 255).astype(np.uint8))
    return torch.from_numpy(np.where(a == 1, own, np.where(a == 0, other, mixed))).to(x.dtype)


def alpha_shapes(shape):
    """Every way alpha broadcasts over samples, channels and frames."""
    for sample in {1, shape[0]}:
        for channels in {1, shape[1]}:
            for frames in {1, shape[2]} if len(shape) == 5 else (None,):
                yield (sample, channels, *(() if frames is None else (frames,)), *shape[-2:])


def image_layouts(values):
    yield "contiguous", values.contiguous()
    last = torch.channels_last if values.dim() == 4 else torch.channels_last_3d
    yield "channels_last", values.contiguous(memory_format=last)
    yield "transposed", values.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "every_second", torch.stack([values, values], -1)[..., 0]
    yield "offset", torch.cat([values[..., :1], values], -1)[..., 1:]


def assert_blends(got, expected, what=""):
    """The same bits, but that one NaN is as good as another."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    nan = expected.isnan() if expected.is_floating_point() else torch.zeros_like(expected, dtype=torch.bool)
    different = (bits(got) != bits(expected)) & ~nan
    assert not different.any(), f"{what}: {int(different.sum())} of {different.numel()} elements differ"
    assert not got.is_floating_point() or got.isnan()[nan].all(), what


# The forward.


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", ALPHAS, ids=name_of)
def test_formula(backend, dtype, kind):
    served(backend, dtype=dtype)
    for shape in SHAPES:
        x, y = images_of(shape, dtype), images_of(shape, dtype, 2)
        for form in alpha_shapes(shape):
            alpha = matte_of(form, kind)
            got = pyrx.blend(x, y, alpha, backend=backend)
            assert_same_bits(got, formula(x, y, alpha), f"{shape} {form}")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("shape", [(3, 3, 9, 5), (2, 3, 2, 5, 8)], ids=name_of)
def test_layouts(backend, dtype, shape):
    served(backend, dtype=dtype)
    x, y = images_of(shape, dtype), images_of(shape, dtype, 2)
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    for form in alpha_shapes(shape):
        alpha = matte_of(form)
        expected = formula(x, y, alpha)
        for name, own in image_layouts(x):
            for _, other in image_layouts(y):
                for matte_name, matte in image_layouts(alpha):
                    got = pyrx.blend(own, other, matte, backend=backend)
                    assert_same_bits(got, expected, f"{name} {matte_name} {form}")
                    assert got.is_contiguous(memory_format=last if name == "channels_last" else torch.contiguous_format)


def test_expanded_operands(backend):
    image, blurred, masks = images_of((1, 3, 9, 8)), images_of((1, 3, 9, 8), seed=2), matte_of((5, 1, 9, 8), torch.bool)
    expected = torch.where(masks, image, blurred)
    got = pyrx.blend(image.expand(5, -1, -1, -1), blurred.expand(5, -1, -1, -1), masks, backend=backend)
    assert_same_bits(got, expected)
    last = [each.contiguous(memory_format=torch.channels_last).expand(5, -1, -1, -1) for each in (image, blurred)]
    got = pyrx.blend(*last, masks, backend=backend)
    assert_same_bits(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last), "the layout of a sample is kept"
    spread = masks.expand(5, 3, 9, 8)
    assert_same_bits(pyrx.blend(*last, spread, backend=backend), expected)


def planes_apart(alpha):
    """The same values, something else after each plane."""
    other = torch.full_like(alpha, torch.nan) if alpha.is_floating_point() else ~alpha
    return torch.cat([alpha, other], -2)[..., : alpha.shape[-2], :]


@pytest.mark.parametrize("kind", FLOATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_alpha_of_another_dtype_whose_planes_lie_apart(backend, dtype, kind):
    served(backend, dtype=dtype)
    x, y = images_of((4, 3, 5, 8), dtype), images_of((4, 3, 5, 8), dtype, 2)
    for form in alpha_shapes(x.shape):
        alpha = matte_of(form, kind)
        expected = pyrx.blend(x, y, alpha, backend="reference")
        assert_same_bits(pyrx.blend(x, y, planes_apart(alpha), backend=backend), expected, str(form))


def test_the_operands_of_an_expanded_image_are_not_copied(cpu):
    image, masks = torch.randn(1, 3, 64, 64), torch.rand(200, 1, 64, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        pyrx.blend(image.expand(200, -1, -1, -1), image.expand(200, -1, -1, -1), masks, backend=cpu)
    made = sum(max(each.self_cpu_memory_usage, 0) for each in profile.key_averages())
    assert 200 * 3 * 64 * 64 * 4 <= made < 1.2 * 200 * 3 * 64 * 64 * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_partner(backend, dtype):
    served(backend, dtype=dtype)
    x, y = images_of((4, 3, 5, 8), dtype), images_of((3, 3, 5, 8), dtype, 2)
    alpha = matte_of((4, 1, 5, 8))
    for partner in (torch.tensor([2, 0, 0, 1]), torch.tensor([0, 9, 1, 9, 1, 9, 2, 9])[::2]):
        got = pyrx.blend(x, y, alpha, partner=partner, backend=backend)
        assert_same_bits(got, formula(x, y[partner], alpha))
    x = images_of((4, 3, 5, 8), dtype)
    assert_same_bits(
        pyrx.blend(x, x, alpha, partner=torch.arange(3, -1, -1), backend=backend), formula(x, x.flip(0), alpha)
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_alpha_one_and_zero_copy_every_bit(backend, dtype):
    served(backend, dtype=dtype)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    made = torch.randint(torch.iinfo(kind).min, torch.iinfo(kind).max, (2, 2, 1, 32, 33), dtype=kind)
    made[:, 0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -0.0], dtype=dtype).view(kind)
    # a signalling NaN
    made[:, 1, 0, 1, 1] = torch.tensor(math.inf, dtype=dtype).view(kind) + 1
    x, y = made.view(dtype)
    alpha = matte_of((2, 1, 32, 33), torch.bool)
    for matte in (alpha, alpha.to(dtype), alpha.double()):
        assert_same_bits(pyrx.blend(x, y, matte, backend=backend), torch.where(alpha, x, y))


def test_bytes_are_rounded_to_even_and_kept_in_range(backend):
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    y = x.flip(-1).contiguous()
    half = torch.full((1, 1, 16, 16), 0.5)
    expected = ((x.double() + y.double()) / 2).round().to(torch.uint8)
    assert_same_bits(pyrx.blend(x, y, half, backend=backend), expected)
    assert_same_bits(pyrx.blend(x, x // 2, half, backend=backend), ((x.double() + x // 2) / 2).round().byte())
    # just below a half
    near = torch.full((1, 1, 1, 1), (255 / 2 + 1) / 255).nextafter(torch.tensor(0.0))
    one = pyrx.blend(x.new_full((1, 1, 1, 1), 255), x.new_zeros(1, 1, 1, 1), near, backend=backend)
    assert_same_bits(one, formula(x.new_full((1, 1, 1, 1), 255), x.new_zeros(1, 1, 1, 1), near))
    beyond = (2.5 * x.double() - 1.5 * y.double()).round().clamp(0, 255).to(torch.uint8)
    assert_same_bits(pyrx.blend(x, y, 5 * half, backend=backend), beyond)
    assert not pyrx.blend(x, y, half * math.nan, backend=backend).any()


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (2, 3, 0, 4, 5)], ids=name_of
)
def test_empty(backend, shape):
    alpha = torch.rand(shape[0], min(1, shape[1]), *shape[2:], requires_grad=True)
    x, y = (torch.rand(shape, requires_grad=True) for _ in range(2))
    got = pyrx.blend(x, y, alpha, backend=backend)
    assert got.shape == shape
    for each, found in zip((x, y, alpha), torch.autograd.grad(got.sum(), (x, y, alpha)), strict=True):
        assert found.shape == each.shape and not found.any()


def test_out(backend):
    x, y, alpha = images_of((3, 3, 9, 5)), images_of((3, 3, 9, 5), seed=2), matte_of((3, 1, 9, 5))
    expected = formula(x, y, alpha)
    for name, out in image_layouts(torch.zeros(3, 3, 9, 5)):
        strides = out.stride()
        got = pyrx.blend(x, y, alpha, out=out, backend=backend)
        assert got is out and out.stride() == strides
        assert_same_bits(out, expected, name)


def test_out_of_the_same_buffer(backend):
    made = images_of((6, 3, 9, 5))
    x, y, alpha = made[:3], images_of((3, 3, 9, 5), seed=2), matte_of((3, 1, 9, 5))
    expected = formula(x, y, alpha)
    with pytest.raises(ValueError, match="out to be other memory than the inputs, got the same"):
        pyrx.blend(x, y, alpha, out=made[2:5], backend=backend)
    assert_same_bits(pyrx.blend(x, y, alpha, out=made[3:], backend=backend), expected)
    assert_same_bits(made[3:], expected)


def test_threads_do_not_change_bits(cpu):
    x, y, alpha = images_of((7, 3, 63, 65)), images_of((7, 3, 63, 65), seed=2), matte_of((7, 1, 63, 65))
    leaves = [each.requires_grad_() for each in (x, y, alpha)]
    found = []
    for count in (1, 2, 3):
        with threads(count):
            got = pyrx.blend(*leaves, backend=cpu)
            found.append((got, *torch.autograd.grad(got, leaves, images_of((7, 3, 63, 65), seed=5))))
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert_same_bits(one, other)


# The gradients.


def gradients(x, y, alpha, upstream, backend, partner=None, needs=(True, True, True)):
    leaves = [each.detach().requires_grad_(needed) for each, needed in zip((x, y, alpha), needs, strict=True)]
    got = pyrx.blend(*leaves, partner=partner, backend=backend)
    asked = [each for each in leaves if each.requires_grad]
    return torch.autograd.grad(got, asked, upstream)


def expected_gradients(x, y, alpha, upstream, partner=None):
    """In float64, by autograd of the plain formula."""
    leaves = [each.double().requires_grad_() for each in (x, y, alpha)]
    other = leaves[1] if partner is None else leaves[1][partner]
    mixed = leaves[2] * leaves[0] + (1 - leaves[2]) * other
    return torch.autograd.grad(mixed, leaves, upstream.double())


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_gradients(backend, dtype, shape):
    served(backend, dtype=dtype)
    x, y, upstream = (images_of(shape, dtype, seed) for seed in (0, 2, 3))
    eps = torch.finfo(dtype).eps
    for form in alpha_shapes(shape):
        for kind in (dtype, torch.float32):
            alpha = matte_of(form, kind)
            found = gradients(x, y, alpha, upstream, backend)
            exact = expected_gradients(x, y, alpha, upstream)
            for name, got, truth, like in zip("xya", found, exact, (x, y, alpha), strict=True):
                assert got.dtype == like.dtype and got.shape == like.shape
                scale = truth.abs().max().item()
                # alpha's is rounded to its own dtype, after a sum in the images' arithmetic
                slack = (torch.finfo(got.dtype).eps if name == "a" else eps) + 1e-6 * (dtype != torch.float64)
                torch.testing.assert_close(got.double(), truth, rtol=2 * slack, atol=2 * slack * scale, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", [(3, 3, 9, 5), (2, 3, 2, 5, 8)], ids=name_of)
def test_gradients_in_every_layout(backend, dtype, shape):
    served(backend, dtype=dtype)
    x, y, upstream = (images_of(shape, dtype, seed) for seed in (0, 2, 3))
    for form in alpha_shapes(shape):
        alpha = matte_of(form)
        expected = gradients(x, y, alpha, upstream, "reference")
        for name, own in image_layouts(x):
            for grad_name, each in image_layouts(upstream):
                found = gradients(own, y, alpha, each, backend)
                what = f"{name} {grad_name} {form}"
                assert_same_bits(found[0], expected[0], what)
                assert_same_bits(found[1], expected[1], what)
                torch.testing.assert_close(found[2], expected[2], msg=what)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)], ids=str)
def test_only_what_needs_a_gradient(backend, needs):
    x, y, upstream = (images_of((2, 3, 5, 8), seed=seed) for seed in (0, 2, 3))
    alpha = matte_of((2, 1, 5, 8))
    every = gradients(x, y, alpha, upstream, backend)
    found = gradients(x, y, alpha, upstream, backend, needs=tuple(map(bool, needs)))
    for got, expected in zip(found, [each for each, n in zip(every, needs, strict=True) if n], strict=True):
        assert_same_bits(got, expected)


def test_images_are_saved_for_the_gradient_of_alpha_alone(cpu):
    x, y, alpha = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 3, 5, 8), torch.rand(2, 1, 5, 8)
    for matte, expected in ((alpha, 1), (alpha.clone().requires_grad_(), 3)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            pyrx.blend(x, y, matte, backend=cpu)
        assert len(saved) == expected


def test_gradients_of_partners(backend):
    x, y, upstream = images_of((5, 2, 4, 7)), images_of((3, 2, 4, 7), seed=2), images_of((5, 2, 4, 7), seed=3)
    alpha = matte_of((5, 1, 4, 7))
    for partner in (torch.tensor([0, 1, 2, 1, 1]), torch.tensor([2, 2, 2, 2, 2])):
        found = gradients(x, y, alpha, upstream, backend, partner)
        for got, truth in zip(found, expected_gradients(x, y, alpha, upstream, partner), strict=True):
            torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
    partner = torch.tensor([4, 2, 1, 0, 3])
    x.requires_grad_()
    (found,) = torch.autograd.grad(pyrx.blend(x, x, alpha, partner=partner, backend=backend), x, upstream)
    exact = alpha * upstream
    exact[partner] += (1 - alpha) * upstream
    torch.testing.assert_close(found, exact)


def test_gradients_of_partners_that_are_not_there():
    """Of a GPU, which does not check them: no sample gets what belongs to none."""
    grad, partner = torch.randn(4, 3, 5, 8), torch.tensor([1, 3, -1, 1])
    found = reference.gather_backward(grad, partner, 3)
    expected = torch.stack([torch.zeros_like(grad[0]), grad[0] + grad[3], torch.zeros_like(grad[0])])
    assert_same_bits(found, expected)


def test_nan_upstream_goes_where_the_pixel_came_from(backend):
    x, y = (torch.randn(1, 1, 2, 8, requires_grad=True) for _ in range(2))
    alpha = (torch.arange(16) % 2 == 0).reshape(1, 1, 2, 8)
    upstream = torch.full((1, 1, 2, 8), math.nan)
    grad_x, grad_y = torch.autograd.grad(pyrx.blend(x, y, alpha, backend=backend), (x, y), upstream)
    assert torch.equal(grad_x.isnan(), alpha) and torch.equal(grad_y.isnan(), ~alpha)
    assert not grad_x[~alpha].any() and not grad_y[alpha].any()


@pytest.mark.parametrize("form", [(2, 1, 3, 4), (1, 2, 3, 4), (2, 2, 3, 4), (1, 1, 3, 4)], ids=name_of)
@pytest.mark.parametrize("last", [False, True])
def test_gradcheck(backend, form, last):
    x, y = (images_of((2, 2, 3, 4), torch.float64, seed) for seed in (0, 2))
    alpha = matte_of(form).double()
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    leaves = tuple(each.requires_grad_() for each in (x, y, alpha))
    assert torch.autograd.gradcheck(lambda *given: pyrx.blend(*given, backend=backend), leaves)
    partner = torch.tensor([1, 1])
    assert torch.autograd.gradcheck(lambda *given: pyrx.blend(*given, partner=partner, backend=backend), leaves)


def test_a_second_differentiation_raises(cpu):
    x = torch.randn(1, 1, 2, 3, requires_grad=True)
    got = pyrx.blend(x, x, torch.rand(1, 1, 2, 3), backend=cpu)
    (grad,) = torch.autograd.grad((got**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="pyrx::blend: .* double backward"):
        grad.sum().backward()


def test_bytes_have_no_gradient(backend):
    x, alpha = images_of((1, 3, 4, 5), torch.uint8), torch.rand(1, 1, 4, 5, requires_grad=True)
    assert not pyrx.blend(x, x, alpha, backend=backend).requires_grad


# Registrations.


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("form", [(2, 1, 3, 4), (1, 3, 3, 4)], ids=name_of)
def test_opcheck(cpu, form, last):
    served(cpu)
    ops = _library.namespace(cpu)
    layout = torch.channels_last if last else torch.contiguous_format
    x, y, grad = (torch.randn(2, 3, 3, 4).contiguous(memory_format=layout) for _ in range(3))
    alpha, partner = torch.rand(form), torch.tensor([1, 1])
    leaves = [each.clone().requires_grad_() for each in (x, y, alpha)]
    for each in (None, partner):
        torch.library.opcheck(ops.blend.default, (*leaves, each))
        torch.library.opcheck(ops.blend.default, (*leaves[:2], alpha, each))
        torch.library.opcheck(ops.blend_out.default, (torch.empty_like(x), x, y, alpha, each))
        torch.library.opcheck(ops.blend_backward.default, (grad, x, y, alpha, each, [True, True, True]))
    torch.library.opcheck(ops.blend_backward.default, (grad, None, None, alpha, None, [False, True, False]))
    torch.library.opcheck(ops.blend.default, (x.byte(), y.byte(), alpha, partner))
    torch.library.opcheck(ops.blend.default, (x.expand(2, -1, -1, -1), y[:1].expand(2, -1, -1, -1), alpha, None))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_equals_eager(backend, dynamic):
    torch._dynamo.reset()

    def function(x, y, alpha, partner):
        return pyrx.blend(x * 2, y, alpha, backend=backend), pyrx.blend(x, y, alpha, partner=partner, backend=backend)

    fast = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((4, 3, 6, 5), (2, 3, 9, 8)):
        leaves = [images_of(shape).requires_grad_(), images_of(shape, seed=2).requires_grad_()]
        leaves.append(matte_of((shape[0], 1, *shape[2:])).requires_grad_())
        partner = torch.arange(shape[0]).flip(0)
        found, expected = fast(*leaves, partner), function(*leaves, partner)
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)
        upstream = [images_of(shape, seed=3), images_of(shape, seed=4)]
        grads = [torch.autograd.grad(each, leaves, upstream) for each in (found, expected)]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)
    torch._dynamo.reset()


def test_compiled_out(backend):
    torch._dynamo.reset()
    x, y, alpha = images_of((2, 3, 6, 5)), images_of((2, 3, 6, 5), seed=2), matte_of((2, 1, 6, 5))
    fast, out = torch.compile(pyrx.blend, fullgraph=True, backend="aot_eager"), torch.zeros(2, 3, 6, 5)
    fast(x, y, alpha, out=out, backend=backend)
    assert_same_bits(out, formula(x, y, alpha))
    torch._dynamo.reset()


def test_autocast_keeps_the_dtype(backend):
    x, alpha = images_of((1, 3, 4, 5)), matte_of((1, 1, 4, 5), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pyrx.blend(x, x, alpha, backend=backend).dtype == torch.float32


# Errors.

X, A, P = torch.rand(2, 3, 4, 5), torch.rand(2, 1, 4, 5), torch.tensor([1, 0])
IMAGES = "of dtype uint8, float16, bfloat16, float32 or float64"
FORM = "of shape [N or 1, C or 1, H, W] of images of [2, 3, 4, 5]"
ROWS = [
    (TypeError, {"x": [1.0]}, "x to be a Tensor, got list"),
    (TypeError, {"y": None}, "y to be a Tensor, got NoneType"),
    (TypeError, {"alpha": 0.5}, "alpha to be a Tensor, got float"),
    (ValueError, {"x": X[0]}, "x of shape [N, C, H, W] or [N, C, T, H, W], got [3, 4, 5]"),
    (TypeError, {"x": X.long()}, f"x {IMAGES}, got torch.int64"),
    (TypeError, {"x": X.bool()}, f"x {IMAGES}, got torch.bool"),
    (TypeError, {"y": X.double()}, "y of dtype torch.float32, got torch.float64"),
    (ValueError, {"y": X[:1]}, "y of shape [N, C, ...] = [2, 3, 4, 5], got [1, 3, 4, 5]"),
    (ValueError, {"y": X[:, :2], "partner": P}, "y of shape [M, C, ...] with [C, ...] = [3, 4, 5], got [2, 2, 4, 5]"),
    (RuntimeError, {"y": X.to("meta")}, "y on device cpu, got meta"),
    (TypeError, {"alpha": A.byte()}, "alpha of dtype bool, float16, bfloat16, float32 or float64, got torch.uint8"),
    (ValueError, {"alpha": A[:, 0]}, f"alpha {FORM}, got [2, 4, 5]"),
    (ValueError, {"alpha": A[..., :1]}, f"alpha {FORM}, got [2, 1, 4, 1]"),
    (ValueError, {"alpha": A.expand(2, 2, 4, 5)}, f"alpha {FORM}, got [2, 2, 4, 5]"),
    (
        ValueError,
        {"x": X[:, :, None], "y": X[:, :, None]},
        "alpha of shape [N or 1, C or 1, T or 1, H, W] of images of [2, 3, 1, 4, 5], got [2, 1, 4, 5]",
    ),
    (RuntimeError, {"alpha": A.to("meta")}, "alpha on device cpu, got meta"),
    (TypeError, {"partner": P.int()}, "partner of dtype torch.int64, got torch.int32"),
    (ValueError, {"partner": P[:1]}, "partner of shape [N] = [2], got [1]"),
    (RuntimeError, {"partner": P.to("meta")}, "partner on device cpu, got meta"),
]
PUBLIC_ROWS = [
    (ValueError, {"partner": P + 1}, "partner in [0, 2), got 2"),
    (ValueError, {"partner": P - 3}, "partner in [0, 2), got -2"),
    (TypeError, {"out": X.double()}, "out of dtype torch.float32, got torch.float64"),
    (ValueError, {"out": X[:1].clone()}, "out of shape [N, C, ...] = [2, 3, 4, 5], got [1, 3, 4, 5]"),
    (
        ValueError,
        {"out": torch.zeros(2, 1, 4, 5).expand(2, 3, 4, 5)},
        "out to be memory of its own for every element, got strides [20, 0, 5, 1]",
    ),
    (ValueError, {"out": X}, "out to be other memory than the inputs, got the same"),
    (
        RuntimeError,
        {"alpha": A.clone().requires_grad_(), "out": torch.zeros(2, 3, 4, 5)},
        "out for tensors that require no gradient, got one that does",
    ),
    (
        RuntimeError,
        {"out": torch.zeros(2, 3, 4, 5, requires_grad=True)},
        "out that requires no gradient, got one that does",
    ),
    (TypeError, {"out": [1.0]}, "out to be a Tensor, got list"),
]


@pytest.mark.parametrize("error, changes, text", ROWS + PUBLIC_ROWS, ids=[row[2][:80] for row in ROWS + PUBLIC_ROWS])
def test_errors(backend, error, changes, text):
    before = X.clone()
    with pytest.raises(error) as caught:
        pyrx.blend(**{"x": X, "y": X, "alpha": A, "backend": backend} | changes)
    assert type(caught.value) is error and str(caught.value) == f"pyrx::blend: expected {text}"
    assert torch.equal(X, before)


def raised(op, arguments):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        op(**arguments)
    return type(caught.value), str(caught.value)


BACKWARD_ROWS = [
    {"grad": X[0]},
    {"grad": X.byte(), "x": X.byte(), "y": X.byte()},
    {"x": X.double()},
    {"x": X[:1]},
    {"x": X.to("meta")},
    {"x": None},
    {"y": None},
    {"alpha": A[:, 0]},
    {"partner": P[:1]},
]
KERNEL_ROWS = [
    *[("blend", row[1]) for row in ROWS if "to be a Tensor" not in row[2]],
    ("blend_out", {"x": X.long()}),
    ("blend_out", {"out": X.double()}),
    ("blend_out", {"out": X[:1]}),
    ("blend_out", {"out": X.to("meta")}),
    *[("blend_backward", each) for each in BACKWARD_ROWS],
]


@pytest.mark.parametrize("name, changes", KERNEL_ROWS)
def test_kernels_and_fakes_raise_the_same(cpu, name, changes):
    served(cpu)
    arguments = {"x": X, "y": X, "alpha": A, "partner": None}
    if name == "blend_out":
        arguments["out"] = torch.zeros_like(X)
    if name == "blend_backward":
        arguments |= {"grad": X, "needs": [True] * 3}
    op, arguments = getattr(_library.namespace(cpu), name), arguments | changes
    real = raised(op, arguments)
    with FakeTensorMode() as mode:
        fake = raised(op, {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
    assert fake == real and real[1].startswith(f"pyrx::{name}: expected ")


@pytest.mark.cpu_kernels
def test_kernels_check_partners(cpu):
    ops = _library.namespace(served(cpu))
    for partner in (P + 1, P - 3):
        with pytest.raises(ValueError, match=r"pyrx::blend: expected partner in \[0, 2\), got -?2"):
            ops.blend(X, X, A, partner)
        with pytest.raises(ValueError, match=r"pyrx::blend_backward: expected partner in \[0, 2\), got -?2"):
            ops.blend_backward(X, X, X, A, partner, [True] * 3)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_gpu(kernels, dtype):
    served(kernels, "cuda", dtype)
    for shape in (*SHAPES, (4, 3, 224, 224)):
        x, y = images_of(shape, dtype), images_of(shape, dtype, 2)
        for form in alpha_shapes(shape):
            for kind in (torch.bool, torch.float32, *(LOW if dtype in LOW else ())):
                alpha = matte_of(form, kind)
                for (_, own), (_, other) in zip(image_layouts(x), image_layouts(y), strict=True):
                    for matte in (alpha.cuda(), planes_apart(alpha.cuda())):
                        got = pyrx.blend(own.cuda(), other.cuda(), matte, backend=kernels)
                        assert_blends(got.cpu(), reference.blend(x, y, alpha), f"{shape} {form}")


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_gpu_gradients(kernels, dtype):
    served(kernels, "cuda", dtype)
    for shape in SHAPES:
        x, y, upstream = (images_of(shape, dtype, seed) for seed in (0, 2, 3))
        for form in alpha_shapes(shape):
            alpha = matte_of(form)
            expected = gradients(x, y, alpha, upstream, "reference")
            for (_, own), (_, grad) in zip(image_layouts(x), image_layouts(upstream), strict=True):
                found = gradients(own.cuda(), y.cuda(), alpha.cuda(), grad.cuda(), kernels)
                for one, other in zip(found[:2], expected[:2], strict=True):
                    assert_same_bits(one.cpu(), other, f"{shape} {form}")
                torch.testing.assert_close(found[2].cpu(), expected[2], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda", "triton"])
def test_gpu_partners_that_are_not_there(kernels):
    served(kernels, "cuda")
    x, alpha = torch.rand(3, 3, 4, 8, device="cuda"), torch.full((3, 1, 4, 8), 0.5, device="cuda")
    got = pyrx.blend(x, x, alpha, partner=torch.tensor([1, 3, -1], device="cuda"), backend=kernels)
    assert_same_bits(got[0], reference.blend(x[:1], x[1:2], alpha[:1])[0])
    assert got[1:].isnan().all()
    y = x.clone().requires_grad_()
    pyrx.blend(x, y, alpha, partner=torch.tensor([1, 3, -1], device="cuda"), backend=kernels)[0].sum().backward()
    assert (y.grad[1] == 0.5).all() and not y.grad[[0, 2]].any()
