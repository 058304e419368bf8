"""pyrx.neighbor_fill: the reference against the formula and against loops, every backend against the reference."""

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOATS, assert_same_bits, assert_within_budget, capture, layouts, name_of, need, threads
from torch._subclasses.fake_tensor import FakeTensorMode

import pyrx
from pyrx import _library

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 1, 63), (2, 2, 63, 1), (2, 3, 17, 64), (1, 2, 9, 65), (1, 1, 3, 1311)]
EMPTY = [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)]
ITERATIONS = [0, 1, 2, 3, 7, 40]


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return need(request.param, ops=("neighbor_fill",))


def random_mask(shape, keep, seed=0):
    """(N, 1, H, W): images of single places, of blocks, of nothing and of all."""
    n, _, h, w = shape
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, 1, h, w, generator=generator) < keep
    coarse = torch.rand(n, 1, -(-h // 4), -(-w // 4), generator=generator) < keep
    blocks = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., :h, :w]
    return torch.where((torch.arange(n) % 2 == 0)[:, None, None, None], mask, blocks)


def loops(input, mask, iterations):
    """By the definition, one place at a time, in float64."""
    x, m = torch.where(mask, input.double(), 0).tolist(), mask[:, 0].tolist()
    n, c, h, w = input.shape
    for image in range(n):
        for _ in range(iterations):
            before, changed = [row[:] for row in m[image]], []
            for y in range(h):
                for i in range(w):
                    near = [
                        (p, q)
                        for p in range(max(y - 1, 0), min(y + 2, h))
                        for q in range(max(i - 1, 0), min(i + 2, w))
                        if before[p][q]
                    ]
                    if not before[y][i] and near:
                        changed.append((y, i, near))
            for y, i, near in changed:
                m[image][y][i] = True
                for k in range(c):
                    x[image][k][y][i] = sum(x[image][k][p][q] for p, q in near) / (len(near) + 1e-5)
    return torch.tensor(x, dtype=torch.float64).reshape(input.shape), torch.tensor(m).reshape(mask.shape)


def notes(input, mask, iterations):
    """The formula as the paper's code spells it: products, two convolutions, a clip."""
    ones = torch.ones(1, 1, 3, 3, dtype=input.dtype, device=input.device)
    m = mask.to(input.dtype)
    x = input * m
    for _ in range(iterations):
        n = F.conv2d(x, ones.expand(x.shape[1], -1, -1, -1), padding=1, groups=x.shape[1])
        d = F.conv2d(m, ones, padding=1)
        x = x + ((1 - m) * n / (d + 1e-5)).detach()
        m = (m + d).clip(0, 1)
    return x, m


def random_input(shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Values.


@pytest.mark.parametrize("shape", [each for each in SHAPES if each[-1] < 100], ids=name_of)
@pytest.mark.parametrize("keep", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("iterations", [0, 1, 3, 8])
def test_equals_loops(backend, shape, keep, iterations):
    x, mask = random_input(shape, torch.float64), random_mask(shape, keep)
    got, after = pyrx.neighbor_fill(x, mask, iterations, backend=backend)
    expected, expected_after = loops(x, mask, iterations)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(after, expected_after)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("iterations", [1, 3, 7])
def test_equals_the_notes_formula(backend, dtype, iterations):
    shape = (4, 3, 33, 47)
    x, mask = random_input(shape, dtype), random_mask(shape, 0.2)
    got, after = pyrx.neighbor_fill(x, mask, iterations, backend=backend)
    plain, plain_after = notes(x, mask, iterations)
    assert_within_budget(got, plain, notes(x.double(), mask, iterations)[0], "filled")
    assert torch.equal(after, plain_after != 0)


@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=name_of)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_backends_have_the_references_bits(backend, shape, dtype):
    x = random_input(shape, dtype)
    for iterations in ITERATIONS:
        for keep in (0.0, 0.02, 0.3, 0.9, 1.0):
            mask = random_mask(shape, keep)
            got, after = pyrx.neighbor_fill(x, mask, iterations, backend=backend)
            expected, expected_after = pyrx.neighbor_fill(x, mask, iterations, backend="reference")
            assert_same_bits(got, expected, f"{iterations} iterations, {keep}")
            assert after.dtype == torch.bool and torch.equal(after, expected_after)


def test_all_present_is_the_input_bit_for_bit(backend):
    bits = torch.randint(-(2**31), 2**31, (2, 3, 16, 16)).to(torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        x = bits.view(torch.float32) if dtype == torch.float32 else bits.to(torch.int16).view(dtype)
        got, after = pyrx.neighbor_fill(x, torch.ones(2, 1, 16, 16, dtype=torch.bool), 3, backend=backend)
        assert_same_bits(got, x)
        assert after.all()


def test_what_is_empty_is_never_used(backend):
    shape = (2, 3, 20, 33)
    x, mask = random_input(shape), random_mask(shape, 0.3)
    expected = pyrx.neighbor_fill(x, mask, 3, backend=backend)
    for value in (float("nan"), float("inf"), -1e30):
        got = pyrx.neighbor_fill(torch.where(mask, x, value), mask, 3, backend=backend)
        assert_same_bits(got[0], expected[0], str(value))


def test_places_out_of_reach_stay_zero(backend):
    x, mask = torch.ones(1, 2, 9, 9), torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    mask[0, 0, 4, 4] = True
    for iterations in range(6):
        got, after = pyrx.neighbor_fill(x, mask, iterations, backend=backend)
        inside = torch.zeros(9, 9, dtype=torch.bool)
        inside[4 - min(iterations, 4) : 5 + iterations, 4 - min(iterations, 4) : 5 + iterations] = True
        assert torch.equal(after[0, 0], inside)
        assert torch.equal(got[0, 0] != 0, inside) and torch.equal(got[0, 0], got[0, 1])


def test_filling_twice_is_filling_on(backend):
    shape = (2, 3, 30, 70)
    x, mask = random_input(shape), random_mask(shape, 0.01)
    got = pyrx.neighbor_fill(*pyrx.neighbor_fill(x, mask, 3, backend=backend), 4, backend=backend)
    expected = pyrx.neighbor_fill(x, mask, 7, backend=backend)
    assert_same_bits(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_special_neighbors(backend):
    x = torch.tensor([[-0.0, 5.0, -0.0, float("inf"), 5.0, float("nan"), 5.0, 1e38, 5.0, 1e38]]).reshape(1, 1, 1, -1)
    mask = torch.tensor([True, False] * 5).reshape(1, 1, 1, -1)
    mask[..., -1] = True
    got = pyrx.neighbor_fill(x, mask, 1, backend=backend)[0]
    expected = pyrx.neighbor_fill(x, mask, 1, backend="reference")[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert got[..., :1].signbit().all(), "a present -0 stays one"


def test_masks_of_the_inputs_dtype(backend):
    shape = (2, 3, 12, 13)
    for dtype in FLOATS:
        x, mask = random_input(shape, dtype), random_mask(shape, 0.3)
        got, after = pyrx.neighbor_fill(x, mask.to(dtype), 2, backend=backend)
        expected, expected_after = pyrx.neighbor_fill(x, mask, 2, backend=backend)
        assert_same_bits(got, expected)
        assert after.dtype == dtype and torch.equal(after, expected_after.to(dtype))


# Layouts, gradients, threads.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("channels", [1, 5, 100])
def test_any_strides_in_the_same_strides_out(backend, dtype, channels):
    shape = (2, channels, 9, 11)
    mask = random_mask(shape, 0.2)
    masks = [mask, mask.transpose(2, 3).contiguous().transpose(2, 3), torch.stack([mask, ~mask], -1)[..., 0]]
    for name, x in layouts(shape, dtype):
        expected, expected_after = pyrx.neighbor_fill(x.contiguous(), mask, 3, backend="reference")
        for each in masks:
            got, after = pyrx.neighbor_fill(x, each, 3, backend=backend)
            assert_same_bits(got, expected, name)
            assert got.stride() == torch.empty_like(x).stride(), name
            assert torch.equal(after, expected_after)
    one = torch.randn(1, 1, 9, 11).to(dtype).expand(shape)
    got, _ = pyrx.neighbor_fill(one, mask[:1].expand(2, 1, 9, 11), 3, backend=backend)
    assert_same_bits(got, got[:1, :1].expand(shape).contiguous())


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_gradient_is_the_masked_upstream(backend, dtype):
    shape = (2, 3, 9, 11)
    mask = random_mask(shape, 0.4)
    for name, x in layouts(shape, dtype):
        x.requires_grad_()
        got, after = pyrx.neighbor_fill(x, mask, 3, backend=backend)
        assert not after.requires_grad
        upstream = random_input(shape, dtype, 5).masked_fill(~mask, float("inf"))
        (grad,) = torch.autograd.grad(got, x, upstream)
        assert_same_bits(grad, torch.where(mask, upstream, 0), name)


def test_gradient_is_the_notes_formulas(backend):
    shape = (2, 3, 9, 11)
    mask = random_mask(shape, 0.4)
    x = random_input(shape, torch.float64).requires_grad_()
    upstream = random_input(shape, torch.float64, 5)
    (grad,) = torch.autograd.grad(pyrx.neighbor_fill(x, mask, 3, backend=backend)[0], x, upstream)
    assert torch.equal(grad, torch.autograd.grad(notes(x, mask, 3)[0], x, upstream)[0])


def test_double_backward_is_linear(backend):
    mask = random_mask((2, 3, 9, 11), 0.4)
    x = random_input((2, 3, 9, 11), torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad((pyrx.neighbor_fill(x, mask, 2, backend=backend)[0] ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.equal(second, torch.where(mask, 2.0, 0.0).double().expand(x.shape))


def test_the_mask_is_all_that_is_saved(cpu):
    saved = []
    x, mask = random_input((2, 8, 20, 20)).requires_grad_(), random_mask((2, 8, 20, 20), 0.5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pyrx.neighbor_fill(x, mask, 2, backend=cpu)
    assert [each.data_ptr() for each in saved] == [mask.data_ptr()]


def test_arguments_are_left_alone(backend):
    x, mask = random_input((2, 3, 9, 11)), random_mask((2, 3, 9, 11), 0.4)
    before = x.clone(), mask.clone()
    for iterations in (0, 3):
        got, after = pyrx.neighbor_fill(x, mask, iterations, backend=backend)
        assert torch.equal(x, before[0]) and torch.equal(mask, before[1])
        assert got.data_ptr() != x.data_ptr() and after.data_ptr() != mask.data_ptr()


def test_thread_counts_do_not_change_bits(backend):
    shape = (3, 70, 31, 45)
    mask = random_mask(shape, 0.1)
    for x in (random_input(shape), random_input(shape).to(memory_format=torch.channels_last)):
        with threads(1):
            expected = pyrx.neighbor_fill(x, mask, 3, backend=backend)[0]
        for count in (2, 3):
            with threads(count):
                assert_same_bits(pyrx.neighbor_fill(x, mask, 3, backend=backend)[0], expected)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_instruction_sets_agree(cpu, python, capability, tmp_path):
    shape = (4, 3, 33, 47)
    torch.save([(random_input(shape, dtype), random_mask(shape, 0.2)) for dtype in FLOATS], tmp_path / "in.pt")
    script = """
import sys, torch, pyrx
from pathlib import Path
folder = Path(sys.argv[1])
found = []
for x, mask in torch.load(folder / "in.pt"):
    for each in (x, x.to(memory_format=torch.channels_last)):
        found.append(pyrx.neighbor_fill(each, mask, 5, backend="cpu")[0])
torch.save(found, folder / "out.pt")
"""
    python(script, tmp_path, ATEN_CPU_CAPABILITY=capability)
    found = iter(torch.load(tmp_path / "out.pt"))
    for x, mask in torch.load(tmp_path / "in.pt"):
        expected = pyrx.neighbor_fill(x, mask, 5, backend="reference")[0]
        for layout in ("contiguous", "channels_last"):
            assert_same_bits(next(found), expected, f"{x.dtype} {layout}")


# Errors.


X, MASK = torch.randn(2, 3, 4, 5), torch.ones(2, 1, 4, 5, dtype=torch.bool)
FLOAT_DTYPES = "of dtype float16, bfloat16, float32 or float64"
ROWS = [
    ({"input": [1.0]}, TypeError, "input to be a Tensor, got list"),
    ({"input": X.long()}, TypeError, f"input {FLOAT_DTYPES}, got torch.int64"),
    ({"input": X[0]}, ValueError, "input of shape [N, C, H, W], got [3, 4, 5]"),
    ({"mask": MASK[:, 0]}, ValueError, "mask of shape [N, 1, H, W] = [2, 1, 4, 5], got [2, 4, 5]"),
    ({"mask": MASK[:1]}, ValueError, "mask of shape [N, 1, H, W] = [2, 1, 4, 5], got [1, 1, 4, 5]"),
    ({"mask": MASK.expand(2, 3, 4, 5)}, ValueError, "mask of shape [N, 1, H, W] = [2, 1, 4, 5], got [2, 3, 4, 5]"),
    ({"mask": MASK.to("meta")}, RuntimeError, "mask on device cpu, got meta"),
    ({"iterations": -1}, ValueError, "iterations in [0, 65535], got -1"),
    ({"iterations": 65536}, ValueError, "iterations in [0, 65535], got 65536"),
]
PUBLIC_ROWS = [
    *ROWS,
    ({"mask": 1}, TypeError, "mask to be a Tensor, got int"),
    ({"mask": MASK.int()}, TypeError, "mask of dtype torch.bool or torch.float32, got torch.int32"),
    ({"mask": MASK.double()}, TypeError, "mask of dtype torch.bool or torch.float32, got torch.float64"),
    (
        {"mask": MASK.float().requires_grad_()},
        ValueError,
        "mask without requires_grad: there is no gradient to masks, got requires_grad=True",
    ),
    ({"iterations": 1.0}, TypeError, "iterations to be an int, got float"),
    ({"iterations": True}, TypeError, "iterations to be an int, got bool"),
]
OP_ROWS = [
    *ROWS[1:],
    ({"mask": MASK.float()}, TypeError, "mask of dtype torch.bool, got torch.float32"),
]


def check(function, arguments, error, text):
    with pytest.raises(error) as caught:
        function(**({"input": X, "mask": MASK, "iterations": 2} | arguments))
    assert type(caught.value) is error and str(caught.value) == f"pyrx::neighbor_fill: expected {text}"


@pytest.mark.parametrize("changes, error, text", PUBLIC_ROWS, ids=[text for _, _, text in PUBLIC_ROWS])
def test_errors(backend, changes, error, text):
    check(pyrx.neighbor_fill, changes | {"backend": backend}, error, text)


@pytest.mark.parametrize("changes, error, text", OP_ROWS, ids=[text for _, _, text in OP_ROWS])
def test_kernel_and_fake_raise_the_same(cpu, changes, error, text):
    op = _library.namespace(cpu).neighbor_fill
    check(op, changes, error, text)
    with FakeTensorMode() as mode:

        def fake(**arguments):
            return op(**{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})

        check(fake, changes, error, text)


def test_backend_names():
    with pytest.raises(ValueError, match="expected backend to be one of"):
        pyrx.neighbor_fill(X, MASK, 1, backend="gpu")


# Compilers and checks of the registration.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_opcheck(cpu, dtype):
    op = torch.ops.pyrx.neighbor_fill.default
    for x in (random_input((2, 3, 5, 7), dtype), random_input((2, 3, 5, 7), dtype).movedim(1, 3)):
        mask = random_mask(x.shape, 0.4)
        torch.library.opcheck(op, (x, mask, 3))
        torch.library.opcheck(op, (x.detach().requires_grad_(), mask, 3))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(backend, dynamic):
    torch._dynamo.reset()

    def function(x, mask):
        filled, after = pyrx.neighbor_fill(x * 2, mask, 3, backend=backend)
        return filled + 1, after

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3, 9, 11), (3, 2, 12, 7)):
        x, mask = random_input(shape).requires_grad_(), random_mask(shape, 0.3)
        got, expected = compiled(x, mask), function(x, mask)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        upstream = random_input(shape, seed=4)
        gradients = [torch.autograd.grad(each[0], x, upstream)[0] for each in (got, expected)]
        assert torch.equal(*gradients)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY, (3, 70, 112, 100), (2, 1, 300, 5)], ids=name_of)
def test_gpu_has_the_references_bits(name, dtype, shape):
    backend = need(name, "cuda", dtype, ops=("neighbor_fill",))
    for iterations in ITERATIONS:
        for keep in (0.0, 0.02, 0.3, 1.0):
            mask = random_mask(shape, keep)
            x = random_input(shape, dtype)
            expected, expected_after = pyrx.neighbor_fill(x, mask, iterations, backend="reference")
            hidden = torch.where(mask, x, float("nan")).cuda()
            for each in (hidden, hidden.to(memory_format=torch.channels_last)):
                got, after = pyrx.neighbor_fill(each, mask.cuda(), iterations, backend=backend)
                assert_same_bits(got.cpu(), expected, f"{iterations} iterations, {keep}")
                assert got.stride() == torch.empty_like(each).stride() and torch.equal(after.cpu(), expected_after)


@pytest.mark.gpu
def test_gpu_graphs_gradients_and_streams():
    backend = need("cuda", "cuda", ops=("neighbor_fill",))
    shape = (2, 8, 40, 70)
    x, mask = random_input(shape).cuda(), random_mask(shape, 0.1).cuda()
    expected = pyrx.neighbor_fill(x, mask, 20, backend=backend)
    graph, captured = capture(lambda: pyrx.neighbor_fill(x, mask, 20, backend=backend))
    graph.replay()
    assert torch.equal(captured[0], expected[0]) and torch.equal(captured[1], expected[1])
    leaf, upstream = x.clone().requires_grad_(), torch.randn_like(x)
    (grad,) = torch.autograd.grad(pyrx.neighbor_fill(leaf, mask, 3, backend=backend)[0], leaf, upstream)
    assert torch.equal(grad, torch.where(mask, upstream, 0))
