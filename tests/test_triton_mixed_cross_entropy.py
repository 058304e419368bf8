"""The Triton kernels of mixed_cross_entropy, see triton_helpers.py; test_triton.py compiles them."""

import importlib

import helpers
import mixed
import pytest
import torch
from triton_helpers import device_of, values_in_the_interpreter

import pyrx

pytest.importorskip("triton")
launcher = importlib.import_module("pyrx._triton.mixed_cross_entropy")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


device = device_of("mixed_cross_entropy")


test_values_in_the_interpreter = values_in_the_interpreter(__file__, 42)


def mixed_on(device, *arguments, **options):
    logits, target, weight = mixed.make(*arguments, **options)
    target = pyrx.MixedTarget(**{name: getattr(target, name).to(device) for name in ("a", "b", "lam")})
    return logits.to(device), target, None if weight is None else weight.to(device)


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of more classes than a block, and a denominator that programs find together."""
    monkeypatch.setattr(launcher, "HELD", 32)
    monkeypatch.setattr(launcher, "OWN_DENOMINATOR", 0)


@pytest.mark.parametrize("classes, dtype", [(n, torch.float32) for n in (1, 10, 64, 300)] + [(37, t) for t in DTYPES])
@pytest.mark.parametrize("reduction", helpers.REDUCTIONS)
def test_mixed(device, reduction, dtype, classes):
    for smoothing, weighted in ((0.0, False), (0.1, True)):
        made = mixed_on(device, 9, classes, weighted=weighted, ignored=0.2, dtype=dtype, seed=classes)
        mixed.assert_right("triton", *made, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("classes", [37, 64])
@pytest.mark.parametrize("reduction", helpers.REDUCTIONS)
def test_mixed_small_blocks(device, small_blocks, reduction, classes):
    for smoothing, weighted in ((0.0, False), (0.1, True)):
        made = mixed_on(device, 70, classes, weighted=weighted, ignored=0.2, seed=classes)
        mixed.assert_right("triton", *made, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("reduction", helpers.REDUCTIONS)
@pytest.mark.parametrize("classes", [20, 100])
def test_mixed_edges(device, small_blocks, reduction, classes):
    """Ignored rows count nothing whatever their logits; class ids out of range are NaN; no rows; other strides."""
    options = {"reduction": reduction, "backend": "triton"}
    logits, target, _ = mixed_on(device, 12, classes)
    away = torch.arange(12, device=device) % 3 == 0
    ignored = target._replace(a=torch.where(away, -100, target.a), b=torch.where(away, -100, target.b))
    expected = mixed.run(logits, ignored, **options)
    spoilt = torch.where(away[:, None], float("nan"), logits)
    for one, two in zip(mixed.run(spoilt, ignored, **options), expected, strict=True):
        helpers.assert_same_bits(one, two)
    none = target._replace(a=torch.full_like(target.a, -100), b=torch.full_like(target.b, -100))
    loss, gradient = mixed.run(logits, none, **options)
    assert (loss.isnan().all() if reduction == "mean" else not loss.any()) and not gradient.any()
    for bad in (-1, classes, 2**62):
        for name in ("a", "b"):
            ids = getattr(target, name).clone()
            ids[2] = bad
            loss, gradient = mixed.run(logits, target._replace(**{name: ids}), **options)
            assert loss.isnan().any() and gradient[2].isnan().all()
            if reduction == "none":
                assert loss.isnan().sum() == 1 and gradient.isnan().any(1).sum() == 1
    empty = target._replace(a=target.a[:0], b=target.b[:0], lam=target.lam[:0])
    loss, gradient = mixed.run(logits[:0], empty, **options)
    assert gradient.shape == (0, classes) and (loss.isnan().all() if reduction == "mean" else not loss.any())
    for other in (logits.t().contiguous().t(), torch.cat([logits[:, :3], logits], 1)[:, 3:]):
        for one, two in zip(mixed.run(other, ignored, **options), expected, strict=True):
            helpers.assert_same_bits(one, two)


@pytest.mark.parametrize("reduction", helpers.REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.name_of)
def test_mixed_backwards(device, reduction, dtype):
    logits, target, _ = mixed_on(device, 6, 24, dtype=dtype)
    logits.requires_grad_()
    loss = pyrx.mixed_cross_entropy(logits, target, reduction=reduction, backend="triton")
    upstream = helpers.upstream_like(loss)
    (first,) = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
    kept = first.clone()
    first.fill_(float("nan"))
    helpers.assert_same_bits(torch.autograd.grad(loss, logits, upstream, retain_graph=True)[0], kept)
    (gradient,) = torch.autograd.grad(loss, logits, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="expected one differentiation, got a second"):
        gradient.sum().backward()
