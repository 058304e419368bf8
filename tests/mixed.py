"""What the tests of mixed_cross_entropy share: inputs, the formula, the comparison with both."""

import torch
import torch.nn.functional as F
from helpers import SLACK, assert_within_budget, upstream_like

import pyrx


def make(rows, classes, *, ignored=0.0, ignore_index=-100, weighted=False, dtype=torch.float32, seed=0):
    """Logits (rows, classes), a target and class weights or None."""
    generator = torch.Generator().manual_seed(seed)

    def ids():
        found = torch.randint(0, classes, (rows,), generator=generator)
        return torch.where(torch.rand(rows, generator=generator) < ignored, ignore_index, found)

    logits = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    weight = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.25 if weighted else None
    target = pyrx.MixedTarget(a=ids(), b=ids(), lam=torch.rand(rows, generator=generator))
    return logits, target, None if weight is None else weight.to(dtype)


def run(logits, target, weight=None, upstream=upstream_like, **options):
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = pyrx.mixed_cross_entropy(leaf, target, weight, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream(loss))[0]


def formula(logits, target, weight=None, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """The loss from its definition in float64, over dense probabilities: no F.cross_entropy, no pyrx."""
    z, lam = logits.double(), target.lam.double()[:, None]
    classes = z.shape[1]
    weight = torch.ones(classes).double() if weight is None else weight.double()

    def one_hot(ids):
        kept = ids != ignore_index
        return F.one_hot(torch.where(kept, ids, 0), classes).double() * kept[:, None]

    q = lam * one_hot(target.a) + (1 - lam) * one_hot(target.b)
    smoothed = (1 - label_smoothing) * q + label_smoothing / classes * q.sum(1, keepdim=True)
    rows = -(smoothed * weight * torch.log_softmax(z, 1)).sum(1)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / (q * weight).sum()


def assert_right(backend, logits, target, weight=None, upstream=upstream_like, **options):
    """Loss and gradient against the formula in float64, judged by the reference's own error in the same dtype."""
    leaf = logits.double().requires_grad_()
    exact = formula(leaf, target, weight, **options)
    (exact_gradient,) = torch.autograd.grad(exact, leaf, upstream(exact.to(logits.dtype)).double())
    loss, gradient = run(logits, target, weight, upstream, backend=backend, **options)
    plain, plain_gradient = run(logits, target, weight, upstream, backend="reference", **options)
    assert loss.dtype == gradient.dtype == logits.dtype
    assert_within_budget(loss, plain, exact.detach(), f"loss {options}")
    mean = options.get("reduction", "mean") == "mean"
    floor = upstream(exact.to(logits.dtype)).abs().max().item() / (len(logits) if mean else 1)
    # in float64 the formula itself errs, by its sums over the classes
    slack = SLACK[logits.dtype] + (logits.shape[1] // 8 if logits.dtype == torch.float64 else 0)
    assert_within_budget(gradient, plain_gradient, exact_gradient, f"gradient {options}", slack, floor)
