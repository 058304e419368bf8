"""opcheck and torch.compile: what the registrations promise, and compiled results equal eager ones."""

import pytest
import torch
import torch._dynamo.testing
from helpers import COMBINES, NAMES, REDUCTIONS, SAMPLINGS, TARGETS, assert_same_bits, make_head, need

import pyrx
from pyrx import _library

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SEED = torch.tensor(5)


# opcheck.


def opcheck(name, *arguments, **keywords):
    torch.library.opcheck(getattr(_library.namespace(need("cpu")), name).default, arguments, keywords)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "scalar", "empty"])
def test_opcheck_of_copies(layout):
    x = {
        "contiguous": lambda: torch.randn(3, 13),
        "channels_last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "transposed": lambda: torch.randn(13, 3).t(),
        "scalar": lambda: torch.randn(()),
        "empty": lambda: torch.randn(0, 3),
    }[layout]()
    upstream = torch.stack([x, x])
    opcheck("dropout", x.clone().requires_grad_(), SEED, 32768, 3)
    opcheck("multi_sample_dropout", x.clone().requires_grad_(), SEED, [32768, 100], True)
    opcheck("multi_sample_dropout_fold", upstream.requires_grad_(), SEED, [32768, 100], True)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_of_masks(packed):
    opcheck("dropout_mask", SEED, [3, 13], 32768, 1, True, packed)


def head_arguments(target, needs=(True, True, True), dtype=torch.float32):
    """Positional arguments of the raw op up to weight and seed."""
    head = make_head(7, 13, 5, target, class_weight=True, dtype=dtype)
    leaves = [getattr(head, name).requires_grad_(needed) for name, needed in zip(NAMES, needs, strict=True)]
    parts = head.target[:3] if target == "mixed" else (head.target, None, None)
    return [*leaves, *parts, head.weight, SEED, [32768] * 3]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_opcheck_of_the_head(target, reduction):
    for i, needs in enumerate([(True, True, True), (True, False, False), (False, True, False), (False, False, False)]):
        opcheck(
            "multi_sample_dropout_cross_entropy",
            *head_arguments(target, needs),
            bool(i % 2),
            i > 1,
            -100,
            0.1,
            reduction,
            list(needs),
            torch.float32,
        )


@pytest.mark.parametrize("target", TARGETS)
def test_opcheck_of_the_heads_backward(target):
    arguments = [each.detach() if isinstance(each, torch.Tensor) else each for each in head_arguments(target)]
    needs = [True, False, True]
    opcheck("multi_sample_dropout_cross_entropy_backward", torch.randn(7), *arguments, False, False, -100, 0.1, needs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_opcheck_of_other_dtypes(dtype):
    arguments = head_arguments("ids", dtype=dtype)
    arguments[6] = arguments[6].to(torch.float64 if dtype == torch.float64 else torch.float32)
    opcheck("multi_sample_dropout_cross_entropy", *arguments, False, False, -100, 0.0, "mean", [True] * 3, dtype)
    opcheck("dropout", torch.randn(3, 13).to(dtype).requires_grad_(), SEED, 32768, 0)


# torch.compile.


def compiled(function, backend="aot_eager", dynamic=True):
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_masks_and_copies_equal_eager_ones(backend, dynamic):
    def function(x, seed):
        return (
            pyrx.dropout(x, 0.3, seed=seed, sample=2, backend=backend),
            pyrx.multi_sample_dropout(x, 3, 0.5, sampling="antithetic", seed=seed, backend=backend),
            pyrx.dropout_mask(x.shape, 0.3, seed, 2, backend=backend),
            pyrx.dropout_mask(x.shape, 0.3, seed, 2, True, backend=backend),
        )

    fast = compiled(function, dynamic=dynamic)
    for shape in ((4, 13), (7, 100)):
        x = torch.randn(shape, requires_grad=True)
        for seed in (torch.tensor(3), torch.tensor(-(2**63))):
            expected, found = function(x, seed), fast(x, seed)
            for one, other in zip(found, expected, strict=True):
                assert_same_bits(one, other)
                assert one.stride() == other.stride()
            upstream = torch.randn_like(expected[1])
            gradients = [torch.autograd.grad([y[0], y[1]], x, [upstream[0], upstream]) for y in (found, expected)]
            torch.testing.assert_close(*gradients)


def head_loss(backend, num_samples=4, **options):
    def function(x, w, bias, *parts):
        target = pyrx.MixedTarget(*parts) if len(parts) == 3 else parts[0]
        seed = torch.tensor(11)
        return pyrx.multi_sample_dropout_cross_entropy(
            x.relu(), w, target, linear_bias=bias, num_samples=num_samples, seed=seed, backend=backend, **options
        )

    return function


def loss_and_gradients(function, head):
    leaves = [getattr(head, name).detach().requires_grad_() for name in NAMES]
    parts = head.target[:3] if isinstance(head.target, tuple) else (head.target,)
    loss = function(*leaves, *parts)
    upstream = torch.linspace(-1, 2, loss.numel()).reshape(loss.shape)
    return loss, *torch.autograd.grad(loss, leaves, upstream)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiled_head_equals_the_eager_one(cpu, target, reduction):
    function = head_loss(cpu, reduction=reduction, sampling="antithetic", label_smoothing=0.1)
    fast = compiled(function)
    for rows in (6, 11, 1):
        head = make_head(rows, 13, 5, target)
        torch.testing.assert_close(loss_and_gradients(fast, head), loss_and_gradients(function, head))


@pytest.mark.parametrize("target, reduction", [("ids", "mean"), ("probabilities", "none"), ("mixed", "sum")])
def test_compiled_reference_equals_the_eager_one(target, reduction):
    function = head_loss("reference", num_samples=2, reduction=reduction)
    head = make_head(6, 13, 5, target)
    torch.testing.assert_close(loss_and_gradients(compiled(function), head), loss_and_gradients(function, head))


def test_compiled_head_with_leading_dimensions_and_no_gradients(cpu):
    function = head_loss(cpu, reduction="none", combine="logits")
    fast = compiled(function)
    head = make_head((2, 3), 13, 5)
    torch.testing.assert_close(loss_and_gradients(fast, head), loss_and_gradients(function, head))
    with torch.no_grad():
        arguments = head.input, head.linear_weight, None, head.target
        torch.testing.assert_close(fast(*arguments), function(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inductor(cpu, reduction):
    function = head_loss(cpu, reduction=reduction)
    fast = compiled(function, "inductor")
    for rows in (6, 11):
        head = make_head(rows, 13, 5)
        torch.testing.assert_close(loss_and_gradients(fast, head), loss_and_gradients(function, head))


@pytest.mark.slow
def test_inductor_dropout(cpu):
    def function(x, seed):
        return pyrx.dropout(x * 2, 0.5, seed=seed, backend=cpu).relu()

    x, seed = torch.randn(4, 100), torch.tensor(3)
    assert_same_bits(compiled(function, "inductor")(x, seed), function(x, seed))


def test_the_seed_is_drawn_anew_in_every_compiled_call(cpu):
    fast = compiled(lambda x: pyrx.dropout(x, 0.5, backend=cpu))
    x = torch.ones(256)
    assert not torch.equal(fast(x), fast(x))
    loss = compiled(lambda x, w, y: pyrx.multi_sample_dropout_cross_entropy(x, w, y, backend=cpu))
    head = make_head(9, 13, 5)
    arguments = head.input, head.linear_weight, head.target
    assert loss(*arguments) != loss(*arguments)


def test_the_default_backend_compiles():
    head = make_head(9, 13, 5)
    function = head_loss(None)
    torch.testing.assert_close(loss_and_gradients(compiled(function), head), loss_and_gradients(function, head))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_changing_the_batch_size_compiles_at_most_twice(cpu, reduction):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(head_loss(cpu, reduction=reduction), fullgraph=True, backend=counter)
    for rows in (8, 16, 24, 5, 7, 100, 33):
        head = make_head(rows, 13, 5)
        fast(head.input, head.linear_weight, head.linear_bias, head.target)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_compiled_training_step(cpu, sampling, combine):
    """Forward, backward and a module inside one compiled model."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(13, 21), torch.nn.ReLU())
    head = pyrx.nn.MultiSampleDropoutClassifier(21, 5, 4, 0.5, sampling=sampling, combine=combine)
    step = compiled(lambda x, y: head(model(x), y))
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.3)
    x, y = torch.randn(40, 13), torch.randint(0, 5, (40,))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = step(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses


def test_compiled_autocast(cpu):
    def function(x, w, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return pyrx.multi_sample_dropout_cross_entropy(x, w, y, seed=3, backend=cpu)

    head = make_head(9, 13, 5)
    arguments = head.input, head.linear_weight.requires_grad_(), head.target
    found, expected = compiled(function)(*arguments), function(*arguments)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(each, head.linear_weight) for each in (found, expected)]
    torch.testing.assert_close(*gradients)


# Batch mixing.


def mix_arguments(images, kind, dtype, scale=(), bias=()):
    """Positional arguments of the raw op."""
    labels = torch.arange(images.shape[0])
    draw = [0, kind, 2, 60000, 30000, 0.8, 1.0, 0.1 if kind == 2 else 0.0, 0.8 if kind == 2 else 0.0, True]
    return [images, labels, SEED, None, None, None, *draw, list(scale), list(bias), dtype]


@pytest.mark.parametrize("kind", range(4), ids=["mixup", "cutmix", "resizemix", "either"])
def test_opcheck_of_batch_mix(kind):
    images = torch.rand(4, 3, 9, 8)
    opcheck("batch_mix", *mix_arguments(images.clone().requires_grad_(), kind, torch.float32))
    last = (images * 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    opcheck("batch_mix", *mix_arguments(last, kind, torch.bfloat16, [1.0] * 3, [0.5] * 3))
    arguments = mix_arguments(images, kind, torch.float32)
    opcheck("batch_mix_out", torch.empty_like(images), *arguments[:-1])
    if kind != 2:
        opcheck("batch_mix_", *arguments[:-3])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_batch_mixing_equals_eager(cpu, dynamic):
    backend = cpu  # the reference's draws are a thousand operations: they take a minute to trace

    def function(images, labels, seed):
        options = {"seed": seed, "backend": backend}
        first, target = pyrx.cutmix(images, labels, **options)
        second, other = pyrx.mixup(first, labels, alpha=0.3, pairing="random", mean=0.5, std=0.5, **options)
        third, last = pyrx.resizemix(second, labels, per_sample=False, **options)
        return third, target.lam, other.boxes, last.b, last.boxes

    fast = compiled(function, dynamic=dynamic)
    for shape in ((4, 3, 9, 8), (7, 3, 16, 5)):
        images, labels = torch.rand(shape, requires_grad=True), torch.arange(shape[0])
        expected, found = function(images, labels, SEED), fast(images, labels, SEED)
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)
        upstream = torch.randn(shape)
        gradients = [torch.autograd.grad(each[0], images, upstream)[0] for each in (found, expected)]
        torch.testing.assert_close(*gradients)


def test_compiled_mixing_in_place_and_into_out(cpu):
    backend = cpu

    def function(images, out, labels, seed):
        images = images * 2
        mixed, target = pyrx.cutmix(images, labels, inplace=True, seed=seed, backend=backend)
        pyrx.mixup(mixed, labels, out=out, seed=seed, backend=backend)
        return mixed + 1, out * 1, target.boxes

    images, labels = torch.rand(5, 3, 9, 8), torch.arange(5)
    results = [each(images, torch.empty_like(images), labels, SEED) for each in (function, compiled(function))]
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)
