"""What several test files share: an independent Philox, head inputs, the head's formula, error budgets."""

import contextlib
import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import pyrx
from pyrx import _backends

ROOT = Path(__file__).resolve().parents[1]
CPU_BACKENDS = ("reference", "cpu")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LOW = (torch.float16, torch.bfloat16)
TARGETS = ("ids", "probabilities", "mixed")
REDUCTIONS = ("none", "mean", "sum")
SAMPLINGS = ("independent", "antithetic")
COMBINES = ("losses", "logits")
REQUIRED = frozenset(filter(None, os.environ.get("PYRX_REQUIRE", "").split(",")))


def name_of(value):
    """Readable test ids for dtypes and shapes."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (tuple, list)):
        return "x".join(map(str, value)) or "scalar"
    return None


def need(backend, device="cpu", dtype=torch.float32, ops=("dropout", "multi_sample_dropout")):
    """`backend`, or a skip with the reasons why it cannot serve: a failure where PYRX_REQUIRE names it."""
    found = [each for op in ops for each in _backends.reasons(op, backend, device, dtype)]
    if found:
        text = f"backend {backend!r} cannot serve: {'; '.join(dict.fromkeys(found))}"
        if backend in REQUIRED:
            pytest.fail(f"PYRX_REQUIRE: {text}")
        pytest.skip(text)
    return backend


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def capture(call, first=None):
    """A CUDA graph of `call` and its results, after a run of it, or of `first`, which compiles and finds its memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        (first or call)()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


# Philox4x32-10 in NumPy, written from the paper and checked against Random123's own known answers (test_dropout.py).


def philox(counter, key):
    """Four uint32 words for counter words (c0, c1, c2, c3), arrays or ints, and key words (k0, k1)."""
    c0, c1, c2, c3 = (np.asarray(each, dtype=np.uint64) for each in counter)
    k0, k1 = (np.uint64(each) for each in key)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (second >> shift) ^ c1 ^ k0, second & low, (first >> shift) ^ c3 ^ k1, first & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return c0, c1, c2, c3


def lanes(seed, numel, sample=0):
    """u of elements 0 .. numel - 1, int64."""
    groups = np.arange((numel + 7) // 8, dtype=np.uint64)
    seed %= 2**64
    counter = (groups & np.uint64(0xFFFFFFFF), groups >> np.uint64(32), np.full_like(groups, sample), groups * 0)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    halves = [half for word in words for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))]
    return np.stack(halves, axis=1).reshape(-1)[:numel].astype(np.int64)


def expected_mask(shape, p, seed, sample=0, sampling="independent"):
    """The definition of a mask (docs/randomness.md), in NumPy."""
    numel = int(np.prod(shape, dtype=np.int64))
    second = sampling == "antithetic" and sample % 2 == 1
    u = lanes(seed, numel, sample - second)
    return torch.from_numpy(((65535 - u if second else u) >= threshold_of(p)).reshape(shape))


def threshold_of(p):
    return min(round(65536 * p), 65535)


def scale_of(p):
    return 65536 / (65536 - threshold_of(p))


def probabilities_of(p, num_samples):
    return list(p) if isinstance(p, (list, tuple)) else [p] * num_samples


def dropped(input, p, seed, sample=0, sampling="independent"):
    """where(mask, input * scale, 0), each kept element rounded once."""
    mask = expected_mask(tuple(input.shape), p, seed, sample, sampling).to(input.device)
    kept = input if threshold_of(p) == 0 else input * scale_of(p)
    return torch.where(mask, kept, torch.zeros((), dtype=input.dtype, device=input.device))


def bits(tensor):
    """The tensor's bits as integers, so that NaN equals itself and -0 is not 0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])


def assert_same_bits(got, expected, what=""):
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    different = bits(got) != bits(expected)
    assert not different.any(), f"{what}: {int(different.sum())} of {different.numel()} elements differ in their bits"


# A tensor of `shape` in every layout that a caller may hand over.


def layouts(shape, dtype=torch.float32, generator=None):
    """(name, tensor) pairs of one shape of at least two dimensions, all with the same values."""
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    yield "contiguous", values.clone()
    yield "transposed", values.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "first_last", values.movedim(0, -1).contiguous().movedim(-1, 0)
    yield "every_second", torch.stack([values, values + 1], -1)[..., 0]
    yield "offset", torch.cat([values[..., :1], values], -1)[..., 1:]
    if len(shape) == 4:
        yield "channels_last", values.contiguous(memory_format=torch.channels_last)
    if len(shape) == 5:
        yield "channels_last_3d", values.contiguous(memory_format=torch.channels_last_3d)


# The head.


@dataclasses.dataclass(frozen=True)
class Head:
    """The tensors of one call of multi_sample_dropout_cross_entropy."""

    input: torch.Tensor
    linear_weight: torch.Tensor
    linear_bias: torch.Tensor | None
    target: torch.Tensor | pyrx.MixedTarget
    weight: torch.Tensor | None = None

    def map(self, function):
        """`function` on input, linear_weight, linear_bias and weight; targets keep their own dtypes."""

        def on(value):
            return None if value is None else function(value)

        return dataclasses.replace(
            self,
            input=on(self.input),
            linear_weight=on(self.linear_weight),
            linear_bias=on(self.linear_bias),
            weight=on(self.weight),
        )

    def to(self, dtype):
        return self.map(lambda each: each.detach().to(dtype))

    def cuda(self):
        target = self.target
        target = pyrx.MixedTarget(*(each.cuda() for each in target[:3])) if isinstance(target, tuple) else target.cuda()
        return dataclasses.replace(self.map(lambda each: each.detach().cuda()), target=target)

    def __call__(self, **options):
        return pyrx.multi_sample_dropout_cross_entropy(
            self.input, self.linear_weight, self.target, linear_bias=self.linear_bias, weight=self.weight, **options
        )


def make_head(
    lead,
    features,
    classes,
    target="ids",
    *,
    bias=True,
    class_weight=False,
    ignored=0.0,
    ignore_index=-100,
    dtype=torch.float32,
    device="cpu",
    seed=0,
):
    """Random tensors of a head; `lead` is B or the leading dimensions, `ignored` the share of rows at ignore_index."""
    generator = torch.Generator().manual_seed(seed)
    lead = (lead,) if isinstance(lead, int) else tuple(lead)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def ids():
        found = torch.randint(0, classes, lead, generator=generator)
        return torch.where(torch.rand(lead, generator=generator) < ignored, ignore_index, found)

    if target == "ids":
        goal = ids().to(device)
    elif target == "probabilities":
        goal = torch.softmax(normal(*lead, classes), -1).to(dtype).to(device)
    else:
        goal = pyrx.MixedTarget(ids().to(device), ids().to(device), torch.rand(lead, generator=generator).to(device))
    made = Head(
        normal(*lead, features),
        normal(classes, features) / max(features, 1) ** 0.5,
        normal(classes) if bias else None,
        goal,
        torch.rand(classes, generator=generator, dtype=torch.float64) + 0.25 if class_weight else None,
    )
    return made.map(lambda each: each.to(device, dtype))


NAMES = ("input", "linear_weight", "linear_bias")


def upstream_like(loss, seed=1):
    """A random upstream gradient, not uniform over rows, of sixteenths, which every dtype represents."""
    generator = torch.Generator().manual_seed(seed)
    sixteenths = torch.randint(-24, 25, loss.shape, generator=generator).double() / 8 + 1 / 16
    return sixteenths.to(loss.device, loss.dtype)


def run(head, *, needs=(True, True, True), upstream=upstream_like, **options):
    """The loss and {name: gradient} of the tensors asked for; None in place of a function gives no gradients."""
    leaves = dataclasses.replace(
        head,
        **{
            name: None if getattr(head, name) is None else getattr(head, name).detach().requires_grad_(needed)
            for name, needed in zip(NAMES, needs, strict=True)
        },
    )
    loss = leaves(**options)
    asked = [n for n, needed in zip(NAMES, needs, strict=True) if needed and getattr(leaves, n) is not None]
    if upstream is None or not asked:
        return loss.detach(), {}
    found = torch.autograd.grad(loss, [getattr(leaves, name) for name in asked], upstream(loss))
    return loss.detach(), dict(zip(asked, found, strict=True))


def formula(
    head,
    *,
    seed,
    num_samples=8,
    p=0.5,
    combine="losses",
    sampling="independent",
    ignore_index=-100,
    label_smoothing=0.0,
    reduction="mean",
):
    """The head's loss from its definition, in float64 and dense probabilities: no F.cross_entropy, no pyrx."""
    features = head.input.double().reshape(math.prod(head.input.shape[:-1]), head.input.shape[-1])
    classifier = head.linear_weight.double()
    classes = classifier.shape[0]
    weight = torch.ones(classes).double() if head.weight is None else head.weight.double()
    each_p = probabilities_of(p, num_samples)
    shape = tuple(head.input.shape)

    logits = []
    for sample in range(num_samples):
        mask = expected_mask(shape, each_p[sample], seed, sample, sampling).reshape(features.shape)
        z = (features * mask * scale_of(each_p[sample])) @ classifier.T
        logits.append(z if head.linear_bias is None else z + head.linear_bias.double())
    if combine == "logits":
        logits = [torch.stack(logits).mean(0)]

    def one_hot(ids):
        ids = ids.reshape(-1)
        kept = ids != ignore_index
        return torch.nn.functional.one_hot(torch.where(kept, ids, 0), classes).double() * kept[:, None]

    if isinstance(head.target, tuple):
        share = head.target.lam.double().reshape(-1, 1)
        q = share * one_hot(head.target.a) + (1 - share) * one_hot(head.target.b)
    elif head.target.is_floating_point():
        q = head.target.double().reshape(-1, classes)
    else:
        q = one_hot(head.target)
    dense = not isinstance(head.target, tuple) and head.target.is_floating_point()
    counted = torch.ones(len(q), 1).double() if dense else q.sum(1, keepdim=True)
    smoothed = (1 - label_smoothing) * q + label_smoothing / classes * counted
    rows = torch.stack([-(smoothed * weight * torch.log_softmax(z, 1)).sum(1) for z in logits]).mean(0)
    if reduction == "none":
        return rows.reshape(head.input.shape[:-1])
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / (len(q) if dense else (q * weight).sum())


# Error budgets.

# units in the last place of the largest element, beside PyTorch's own error (what is exact is float64 itself)
SLACK = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 16, torch.float64: 32}


def assert_within_budget(got, pytorch, exact, what, slack=None, floor=0.0):
    """The error against float64 is at most that of PyTorch in the same dtype plus a small tolerance.

    The tolerance is `slack` units in the last place of exact's largest element, or of `floor`: the size of the terms
    where they cancel.
    """
    assert got.dtype == pytorch.dtype and got.shape == exact.shape, (what, got.dtype, got.shape)
    if got.numel() == 0:
        return
    exact = exact.double()
    ours, theirs = ((each.double() - exact).abs().max().item() for each in (got, pytorch))
    slack = SLACK[got.dtype] if slack is None else slack
    tolerance = slack * torch.finfo(got.dtype).eps * max(exact.abs().max().item(), floor)
    assert ours <= theirs + tolerance, (
        f"{what}: error {ours:.3g} against float64, PyTorch's own {theirs:.3g}, tolerance {tolerance:.3g}"
    )


def assert_head_within_budget(head, backend, *, needs=(True, True, True), **options):
    """Loss and gradients of one head on `backend`, judged against float64 and PyTorch's eager loop in head's dtype."""
    loss, gradients = run(head, backend=backend, needs=needs, **options)
    plain_loss, plain = run(head, backend="reference", needs=needs, **options)
    exact_loss, exact = run(head.to(torch.float64), backend="reference", needs=needs, **options)
    assert set(gradients) == set(exact)
    assert_within_budget(loss, plain_loss, exact_loss, "loss")
    # a logit's gradient is a difference of terms as large as this, 0 where there is one class
    rows = head.input.shape[0] if options.get("reduction", "mean") == "mean" else 1
    logit = upstream_like(exact_loss).abs().max().item() / max(rows, 1) if exact_loss.numel() else 0.0
    other = {"input": head.linear_weight, "linear_weight": head.input, "linear_bias": torch.ones(1)}
    for name, gradient in gradients.items():
        assert gradient.shape == getattr(head, name).shape
        floor = logit * other[name].abs().max().item() if other[name].numel() else 0.0
        assert_within_budget(gradient, plain[name], exact[name], f"gradient of {name}", floor=floor)
