"""pyrx.mixed_cross_entropy: its formula, PyTorch's own losses, gradients, and what the registrations promise."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    FLOATS,
    LOW,
    REDUCTIONS,
    assert_same_bits,
    layouts,
    name_of,
    threads,
    upstream_like,
)
from mixed import assert_right, formula, make, run

import pyrx
from pyrx import _library

CLASSES = (1, 2, 17, 63, 100, 1000, 1311, 5000)


# Values.


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("classes", CLASSES)
def test_equals_the_formula(backend, dtype, classes):
    for seed, (reduction, smoothing, weighted) in enumerate(
        itertools.product(REDUCTIONS, (0.0, 0.1, 1.0), (False, True))
    ):
        logits, target, weight = make(7, classes, weighted=weighted, ignored=0.2, dtype=dtype, seed=seed)
        assert_right(backend, logits, target, weight, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_two_cross_entropies(backend, reduction):
    logits, (a, b, lam, *_), _ = make(33, 100, dtype=torch.float64)
    lam = lam.double()
    each = [F.cross_entropy(logits, ids, reduction="none", label_smoothing=0.1) for ids in (a, b)]
    rows = lam * each[0] + (1 - lam) * each[1]
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[reduction]
    got = pyrx.mixed_cross_entropy(
        logits, pyrx.MixedTarget(a, b, lam), label_smoothing=0.1, reduction=reduction, backend=backend
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_probabilities(backend, reduction):
    """Without class weights, which F.cross_entropy leaves out of a mean over probabilities."""
    logits, target, _ = make(33, 100, dtype=torch.float64)
    lam = target.lam.double()[:, None]
    q = lam * F.one_hot(target.a, 100) + (1 - lam) * F.one_hot(target.b, 100)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    got, gradient = run(logits, target, backend=backend, **options)
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, q, **options)
    torch.testing.assert_close(got, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf, upstream_like(expected))[0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_class_is_cross_entropy(backend, weighted, reduction):
    """a equal to b, lam 0 and lam 1: F.cross_entropy with class ids, its mean by class weights too."""
    logits, target, weight = make(20, 37, weighted=weighted, dtype=torch.float64)
    a, b, lam = target.a, target.b, target.lam
    for ids, mixed in (
        (a, pyrx.MixedTarget(a, a, lam)),
        (a, pyrx.MixedTarget(a, b, torch.ones_like(lam))),
        (b, pyrx.MixedTarget(a, b, torch.zeros_like(lam))),
        (a, pyrx.MixedTarget(a, torch.full_like(b, -100), torch.ones_like(lam))),
    ):
        for ignored in (False, True):
            if ignored:
                ids = torch.where(torch.arange(20) % 3 == 0, -100, ids)
                mixed = mixed._replace(**{n: torch.where(getattr(mixed, n) < 0, -100, ids) for n in ("a", "b")})
            options = {"reduction": reduction, "label_smoothing": 0.2}
            leaf = logits.clone().requires_grad_()
            expected = F.cross_entropy(leaf, ids, weight, **options)
            got, gradient = run(logits, mixed, weight, backend=backend, **options)
            torch.testing.assert_close(got, expected.detach())
            torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf, upstream_like(expected))[0])


@pytest.mark.parametrize("which", ["a", "b", "both"])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_components(backend, which, ignore_index, reduction):
    logits, target, weight = make(12, 9, weighted=True)
    away = torch.arange(12) % 3 == 0
    for name in ("a", "b") if which == "both" else (which,):
        target = target._replace(**{name: torch.where(away, ignore_index, getattr(target, name))})
    for smoothing in (0.0, 0.3):
        options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index}
        assert_right(backend, logits, target, weight, **options)
    if which == "both":
        # whatever the logits of a row are that counts nothing
        expected = run(logits, target, weight, backend=backend, **options)
        logits[away] = math.nan
        loss, gradient = run(logits, target, weight, backend=backend, **options)
        assert_same_bits(loss, expected[0])
        assert_same_bits(gradient, expected[1])
        assert not gradient[away].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored(backend, reduction):
    logits, target, _ = make(6, 9, ignored=1.0)
    loss, gradient = run(logits, target, reduction=reduction, backend=backend)
    expected = F.cross_entropy(logits, target.a, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    if backend != "reference":
        assert not gradient.any()


def test_a_class_without_weight_may_be_ruled_out(backend):
    logits, target, _ = make(5, 20)
    target = target._replace(a=torch.zeros(5).long(), b=torch.full((5,), 3), lam=torch.zeros(5))
    logits[:, 0] = -math.inf
    swapped = pyrx.MixedTarget(target.b, target.a, 1 - target.lam)
    for each in (target, swapped):
        loss, gradient = run(logits, each, reduction="none", backend=backend)
        torch.testing.assert_close(loss, F.cross_entropy(logits, target.b, reduction="none"))
        assert gradient.isfinite().all() and not gradient[:, 0].any()


def test_large_and_nan_logits(backend):
    for scale in (1e4, 1e30):
        logits, target, _ = make(9, 50, seed=3)
        assert_right(backend, logits * scale, target, reduction="none", label_smoothing=0.1)
    logits[2, 7] = math.nan
    loss, gradient = run(logits, target, reduction="none", backend=backend)
    rows = torch.arange(9) == 2
    assert torch.equal(loss.isnan(), rows) and torch.equal(gradient.isnan().any(1), rows)


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_saved_gradients_keep_the_range_of_a_loss_scale(cpu, dtype):
    """A float16 gradient over many rows is subnormal before the upstream (loss) scale."""
    logits, target, _ = make(4096, 10, dtype=dtype)
    _, gradient = run(logits, target, upstream=lambda loss: torch.full_like(loss, 2.0**14), backend=cpu)
    leaf = logits.double().requires_grad_()
    (exact,) = torch.autograd.grad(formula(leaf, target) * 2.0**14, leaf)
    torch.testing.assert_close(gradient.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=name_of)
def test_lam_of_other_dtypes(backend, dtype):
    logits, target, weight = make(9, 20, weighted=True)
    other = target._replace(lam=target.lam.to(dtype))
    same = target._replace(lam=other.lam.float())
    for one, two in zip(
        run(logits, other, weight, backend=backend), run(logits, same, weight, backend=backend), strict=True
    ):
        assert_same_bits(one, two)
    # class weights of another dtype too
    got = pyrx.mixed_cross_entropy(logits, target, weight.double(), backend=backend)
    torch.testing.assert_close(got, pyrx.mixed_cross_entropy(logits, target, weight, backend=backend))


# Shapes and layouts.


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_no_rows(backend, reduction, dtype):
    logits, target, _ = make(0, 7, dtype=dtype)
    loss, gradient = run(logits, target, reduction=reduction, backend=backend)
    assert loss.dtype == dtype and loss.shape == ((0,) if reduction == "none" else ())
    assert loss.isnan().all() if reduction == "mean" else not loss.any()
    assert gradient.shape == (0, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_any_strides(backend, dtype):
    _, target, weight = make(13, 37, weighted=True)
    expected = None
    made = [*layouts((13, 37), dtype, torch.Generator().manual_seed(1))]
    made.append(("rows apart", torch.cat([made[0][1]] * 2, 1)[:, :37]))
    for name, logits in made:
        logits.requires_grad_()
        loss = pyrx.mixed_cross_entropy(logits, target, weight, reduction="none", backend=backend)
        found = loss.detach(), torch.autograd.grad(loss, logits, upstream_like(loss))[0]
        expected = expected or found
        for one, two in zip(found, expected, strict=True):
            assert_same_bits(one.contiguous(), two.contiguous(), name)
    row = torch.randn(1, 37, dtype=torch.float32, requires_grad=True)
    loss = pyrx.mixed_cross_entropy(row.expand(13, 37), target, backend=backend)
    loss.backward()
    torch.testing.assert_close(loss, formula(row.expand(13, 37), target).float())
    assert row.grad.shape == (1, 37)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5,), (3, 5, 4), (2, 5, 3, 4), (2, 1, 3), (0, 5, 2), (2, 5, 0)], ids=name_of)
def test_dimensions_as_cross_entropy_takes_them(backend, shape, reduction):
    classes = shape[0] if len(shape) == 1 else shape[1]
    lead = () if len(shape) == 1 else (shape[0], *shape[2:])
    a, b, lam = torch.randint(classes, lead), torch.randint(classes, lead), torch.rand(lead).double()
    made = [torch.randn(shape, dtype=torch.float64)]
    if len(shape) == 4:
        made.append(made[0].contiguous(memory_format=torch.channels_last))
    for logits in made:
        logits.requires_grad_()
        each = [F.cross_entropy(logits, ids, reduction="none") for ids in (a, b)]
        rows = lam * each[0] + (1 - lam) * each[1]
        expected = {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[reduction]
        got = pyrx.mixed_cross_entropy(logits, pyrx.MixedTarget(a, b, lam), reduction=reduction, backend=backend)
        torch.testing.assert_close(got, expected, equal_nan=True)
        upstream = upstream_like(expected)
        gradients = [torch.autograd.grad(loss, logits, upstream)[0] for loss in (got, expected)]
        torch.testing.assert_close(*gradients, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_thread_counts_do_not_change_bits(backend, dtype, reduction):
    logits, target, weight = make(401, 131, weighted=True, ignored=0.1, dtype=dtype)
    options = {"reduction": reduction, "label_smoothing": 0.1, "backend": backend}
    with threads(1):
        expected = run(logits, target, weight, **options)
    for count in (2, 3):
        with threads(count):
            for one, two in zip(run(logits, target, weight, **options), expected, strict=True):
                if backend != "reference":
                    assert_same_bits(one, two, f"{count} threads")


# Gradients.


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(backend, reduction):
    logits, target, weight = make(5, 7, weighted=True, ignored=0.2, dtype=torch.float64)
    options = {"reduction": reduction, "label_smoothing": 0.1, "backend": backend}
    for each in (None, weight):
        leaf = logits.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda z, w=each: pyrx.mixed_cross_entropy(z, target, w, **options), (leaf,))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_kept_graphs_give_the_same_gradient_again(backend, reduction, dtype):
    logits, target, _ = make(6, 11, dtype=dtype)
    logits.requires_grad_()
    loss = pyrx.mixed_cross_entropy(logits, target, reduction=reduction, backend=backend)
    upstream = upstream_like(loss)
    (first,) = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
    kept = first.clone()
    first.fill_(math.nan)  # what is done to a gradient does not come back
    (second,) = torch.autograd.grad(loss, logits, torch.ones_like(upstream), retain_graph=True)
    (third,) = torch.autograd.grad(loss, logits, upstream)
    assert_same_bits(third, kept)
    fresh = pyrx.mixed_cross_entropy(logits, target, reduction=reduction, backend=backend)
    assert_same_bits(second, torch.autograd.grad(fresh, logits, torch.ones_like(upstream))[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits, upstream)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_double_backward_raises(cpu, reduction):
    logits, target, _ = make(4, 5)
    logits.requires_grad_()
    loss = pyrx.mixed_cross_entropy(logits, target, reduction=reduction, backend=cpu)
    (gradient,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    text = "pyrx::mixed_cross_entropy: expected one differentiation, got a second: it has no double backward"
    with pytest.raises(RuntimeError, match=text):
        gradient.sum().backward()


def test_losses_add_up_with_other_losses(backend):
    logits, target, _ = make(6, 11)
    logits.requires_grad_()
    rows = pyrx.mixed_cross_entropy(logits, target, reduction="none", backend=backend)
    loss = (rows * torch.arange(6.0)).sum() + 3 * pyrx.mixed_cross_entropy(logits, target, backend=backend)
    loss = loss + logits.square().sum()
    (got,) = torch.autograd.grad(loss, logits)
    leaf = logits.detach().double().requires_grad_()
    rows = formula(leaf, target, reduction="none")
    loss = (rows * torch.arange(6.0).double()).sum() + 3 * rows.mean() + leaf.square().sum()
    torch.testing.assert_close(got, torch.autograd.grad(loss, leaf)[0].float())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_batched_upstreams(backend, reduction):
    logits, target, _ = make(4, 5)
    logits.requires_grad_()
    loss = pyrx.mixed_cross_entropy(logits, target, reduction=reduction, backend=backend)
    upstreams = torch.randn(3, *loss.shape)
    (got,) = torch.autograd.grad(loss, logits, upstreams, is_grads_batched=True, retain_graph=True)
    for one, upstream in zip(got, upstreams, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(loss, logits, upstream, retain_graph=True)[0])


def test_only_what_is_needed_is_saved(cpu):
    logits, target, _ = make(40, 30)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        pyrx.mixed_cross_entropy(logits, target, backend=cpu)
        assert saved == []
        pyrx.mixed_cross_entropy(logits.requires_grad_(), target, backend=cpu)
        assert saved == [40 * 30 * 4]
        with torch.no_grad():
            assert not pyrx.mixed_cross_entropy(logits, target, backend=cpu).requires_grad
    assert len(saved) == 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_loss_without_a_gradient_is_the_same(backend, reduction):
    for dtype in FLOATS:
        logits, target, weight = make(9, 77, weighted=True, dtype=dtype)
        options = {"reduction": reduction, "label_smoothing": 0.1, "backend": backend}
        assert_same_bits(
            pyrx.mixed_cross_entropy(logits, target, weight, **options), run(logits, target, weight, **options)[0]
        )


# What the registrations promise.


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_opcheck(cpu, reduction, dtype):
    logits, target, weight = make(5, 7, weighted=True)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    parts = (target.a, target.b, target.lam.to(accumulation))
    for needs, each in ((True, weight.to(accumulation)), (False, None)):
        leaf = logits.to(dtype).requires_grad_(needs)
        arguments = (leaf, *parts, each, -100, 0.1, reduction, needs, dtype)
        torch.library.opcheck(_library.namespace(cpu).mixed_cross_entropy.default, arguments)


@pytest.mark.parametrize("upstream", [torch.tensor(2.0), torch.tensor(1.0), torch.arange(5.0)], ids=name_of)
def test_opcheck_of_the_scale(cpu, upstream):
    op = _library.namespace(cpu).mixed_cross_entropy_scale_.default
    for gradient in (torch.randn(5, 7), torch.randn(5, 7).bfloat16(), torch.randn(5, 7).half()):
        torch.library.opcheck(op, (gradient, upstream))
        expected = (gradient.float() * (upstream[:, None] if upstream.dim() else upstream)).to(gradient.dtype)
        op(gradient, upstream)
        assert_same_bits(gradient, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_equals_eager(backend, reduction, dynamic, fresh_dynamo):
    def function(logits, a, b, lam, weight):
        target = pyrx.MixedTarget(a=a, b=b, lam=lam)
        return pyrx.mixed_cross_entropy(
            logits, target, weight, label_smoothing=0.1, reduction=reduction, backend=backend
        )

    fast = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, classes in ((5, 7), (9, 31)):
        logits, target, weight = make(rows, classes, weighted=True)
        arguments = (logits.requires_grad_(), target.a, target.b, target.lam, weight)
        found, expected = fast(*arguments), function(*arguments)
        torch.testing.assert_close(found, expected)
        upstream = upstream_like(expected)
        torch.testing.assert_close(*[torch.autograd.grad(y, logits, upstream)[0] for y in (found, expected)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=name_of)
def test_autocast(backend, dtype):
    """float32 loss, as F.cross_entropy's under autocast; the gradient stays of the logits' dtype."""
    logits, target, weight = make(9, 20, weighted=True, dtype=dtype)
    leaf = logits.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pyrx.mixed_cross_entropy(leaf, target, weight, backend=backend)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == accumulation
    (gradient,) = torch.autograd.grad(loss, leaf)
    exact_leaf = logits.double().requires_grad_()
    exact = formula(exact_leaf, target, weight)
    torch.testing.assert_close(loss, exact.detach().to(accumulation))
    (expected,) = torch.autograd.grad(exact, exact_leaf)
    torch.testing.assert_close(gradient, expected.to(dtype))
