"""The head's backward: what is asked for, upstream gradients, repetition, precision, memory."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    COMBINES,
    FLOATS,
    LOW,
    NAMES,
    REDUCTIONS,
    SAMPLINGS,
    TARGETS,
    assert_head_within_budget,
    assert_same_bits,
    assert_within_budget,
    make_head,
    name_of,
    run,
    upstream_like,
)

import pyrx
from pyrx import _library

SUBSETS = list(itertools.product((True, False), repeat=3))


def subset_name(needs):
    return "+".join(name for name, needed in zip(NAMES, needs, strict=True) if needed) or "nothing"


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("needs", SUBSETS, ids=subset_name)
def test_every_subset_of_requires_grad(backend, needs, reduction):
    for sampling, combine in itertools.product(SAMPLINGS, COMBINES):
        head = make_head(33, 21, 10, dtype=torch.float64)
        options = {"seed": 3, "num_samples": 4, "sampling": sampling, "combine": combine, "reduction": reduction}
        loss, gradients = run(head, needs=needs, backend=backend, **options)
        whole_loss, whole = run(head, backend="reference", **options)
        torch.testing.assert_close(loss, whole_loss, rtol=1e-12, atol=1e-13)
        assert list(gradients) == [name for name, needed in zip(NAMES, needs, strict=True) if needed]
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("needs", SUBSETS, ids=subset_name)
def test_only_what_is_asked_is_returned_by_the_ops(cpu, needs, reduction):
    head = make_head(33, 21, 10)
    op = _library.namespace(cpu).multi_sample_dropout_cross_entropy
    tensors = (head.input, head.linear_weight, head.linear_bias, head.target, None, None, None, torch.tensor(3))
    options = ([32768] * 4, False, False, -100, 0.0)
    loss, *gradients = op(*tensors, *options, reduction, needs, torch.float32)
    if reduction == "none":
        assert [each.numel() for each in gradients] == [0, 0, 0]
        backward = _library.namespace(cpu).multi_sample_dropout_cross_entropy_backward
        gradients = backward(torch.ones(33), *tensors, *options, needs)
    expected = [
        getattr(head, name).shape if needed else torch.Size([0]) for name, needed in zip(NAMES, needs, strict=True)
    ]
    assert [each.shape for each in gradients] == expected
    assert all(each.isfinite().all() for each in (loss, *gradients))


def test_without_grad_mode_no_gradient_is_made(cpu):
    saved = []
    head = make_head(33, 21, 10).map(lambda each: each.requires_grad_())
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, hooks:
            assert not head(backend=cpu).requires_grad
    assert not saved


def test_saved_tensors_are_the_gradients_or_the_inputs(cpu):
    """Nothing of M's size: for mean and sum the gradients asked for, for none what came in."""
    head = make_head(33, 21, 10).map(lambda each: each.requires_grad_())
    for reduction, features in (("mean", 33 * 21), ("none", 33 * 21)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            head(num_samples=32, reduction=reduction, backend=cpu)
        assert sum(saved) <= features + 21 * 10 + 10 + 33 + 1, saved


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_gradcheck(backend, target, reduction, combine, sampling):
    head = make_head(4, 5, 3, target, class_weight=True, ignored=0.2, dtype=torch.float64)

    def function(*tensors):
        return dataclasses.replace(head, **dict(zip(NAMES, tensors, strict=True)))(
            seed=1,
            num_samples=3,
            combine=combine,
            sampling=sampling,
            reduction=reduction,
            label_smoothing=0.1,
            backend=backend,
        )

    assert torch.autograd.gradcheck(function, [getattr(head, name).requires_grad_() for name in NAMES])


# Upstream gradients.


def head_of_leaves(**options):
    head = make_head(33, 21, 10, **options)
    return head.map(lambda each: each.requires_grad_())


def test_upstream_gradients_of_any_kind(backend):
    head = head_of_leaves(dtype=torch.float64)
    loss = head(seed=1, reduction="none", backend=backend)
    rows = [torch.autograd.grad(loss, head.input, torch.eye(33)[i].double(), retain_graph=True)[0] for i in range(33)]
    every_second = torch.stack([upstream_like(loss)] * 2, 1)[:, 0]
    upstreams = [
        torch.ones((), dtype=torch.float64).expand(33),
        every_second,
        torch.zeros(33, dtype=torch.float64),
        upstream_like(loss).flip(0),
    ]
    assert not every_second.is_contiguous()
    for upstream in upstreams:
        (found,) = torch.autograd.grad(loss, head.input, upstream, retain_graph=True)
        expected = sum(each * row for each, row in zip(upstream, rows, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    for i, row in enumerate(rows):
        assert (row[[j for j in range(33) if j != i]] == 0).all() and (row[i] != 0).any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_backward_again_and_again_gives_the_same(backend, dtype, reduction):
    """.grad may alias nothing that a later backward reads, and no upstream gradient may stay behind."""
    head = head_of_leaves(dtype=dtype)
    leaves = [getattr(head, name) for name in NAMES]
    loss = head(seed=1, reduction=reduction, backend=backend)
    for upstream in (torch.ones_like(loss), upstream_like(loss)):
        first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
        kept = [each.clone() for each in first]
        for each in first:
            each.fill_(7.0)  # what clip_grad_norm_ or an optimizer may do to it
        for one, other in zip(torch.autograd.grad(loss, leaves, upstream, retain_graph=True), kept, strict=True):
            assert_same_bits(one, other)
        for leaf in leaves:
            leaf.grad = None
        for count in (1, 2, 3):
            loss.backward(upstream, retain_graph=True)
            for leaf, each in zip(leaves, kept, strict=True):
                torch.testing.assert_close(leaf.grad, count * each, rtol=0.02, atol=1e-4)


def test_a_freed_graph_says_so(backend):
    head = head_of_leaves()
    loss = head(seed=1, backend=backend)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_differentiation_is_refused(cpu, reduction):
    head = head_of_leaves()
    loss = head(seed=1, reduction=reduction, backend=cpu)
    (grad,) = torch.autograd.grad(loss.sum(), head.input, create_graph=True)
    with pytest.raises(RuntimeError, match="pyrx::multi_sample_dropout_cross_entropy: .* double backward"):
        (grad**2).sum().backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_create_graph_itself_is_served(cpu, reduction):
    head = head_of_leaves()
    loss = head(seed=1, reduction=reduction, backend=cpu)
    plain = torch.autograd.grad(loss.sum(), head.input, retain_graph=True)
    recorded = torch.autograd.grad(loss.sum(), head.input, create_graph=True)
    assert_same_bits(recorded[0].detach(), plain[0])


def test_losses_add_up_with_other_losses(backend):
    """The op is one part of a model: gradients flow on to what came before and stop nowhere."""
    torch.manual_seed(3)
    body = torch.nn.Linear(12, 21).double()
    head, x = head_of_leaves(dtype=torch.float64), torch.randn(33, 12, dtype=torch.float64)

    def total(backend):
        features = body(x).relu()
        loss = dataclasses.replace(head, input=features)(seed=1, num_samples=3, backend=backend)
        return loss * 3 + features.square().mean()

    parameters = [*body.parameters(), head.linear_weight, head.linear_bias]
    found, expected = (torch.autograd.grad(total(each), parameters) for each in (backend, "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


# Low precision.


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_weight_gradients_over_many_rows_keep_their_precision(cpu, dtype, reduction):
    """Summed over chunks in float32: beside float64, no worse than one matrix product's rounding."""
    head = make_head(2500, 16, 10, dtype=dtype)
    options = {"seed": 1, "num_samples": 4, "reduction": reduction}
    _, found = run(head, backend=cpu, **options)
    _, exact = run(head.to(torch.float64), backend="reference", **options)
    _, plain = run(head, backend="reference", **options)
    for name in NAMES:
        assert_within_budget(found[name], plain[name], exact[name], name)


def scaled_gradients(head, scale, backend, autocast):
    leaves = head.map(lambda each: each.detach().requires_grad_())
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        loss = leaves(seed=1, backend=backend)
    upstream = torch.tensor(scale, dtype=loss.dtype)
    assert upstream.isfinite()
    return torch.autograd.grad(loss, [getattr(leaves, name) for name in NAMES], upstream)


@pytest.mark.parametrize("classes", [10, 1311])
@pytest.mark.parametrize("autocast, scale", [(True, 65536.0), (False, 32768.0)], ids=["autocast", "float16"])
def test_a_loss_scale_reaches_float16_gradients(backend, autocast, scale, classes):
    """Gradients far below float16's smallest number appear once they are scaled; none overflows on the way."""
    head = make_head(200, 21, classes, dtype=torch.float16)
    if autocast:
        head = head.to(torch.float32)
    _, exact = run(head.to(torch.float64), backend="reference", seed=1, upstream=torch.ones_like)
    for name, gradient in zip(NAMES, scaled_gradients(head, scale, backend, autocast), strict=True):
        assert gradient.isfinite().all(), name
        error = (gradient.double() / scale - exact[name]).abs().max() / exact[name].abs().max()
        assert error < 0.01, f"{name}: {error:.3g}"


def test_float16_gradients_survive_small_upstreams_and_large_batches(cpu):
    """A mean over 4000 rows has logit gradients near float16's smallest: kept until the loss scale has come."""
    head = make_head(4000, 8, 10, dtype=torch.float16)
    _, exact = run(head.to(torch.float64), backend="reference", seed=1, num_samples=2, upstream=torch.ones_like)
    leaves = head.map(lambda each: each.detach().requires_grad_())
    loss = leaves(seed=1, num_samples=2, backend=cpu)
    (found,) = torch.autograd.grad(loss, leaves.input, torch.tensor(32768.0, dtype=torch.float16))
    wrong = (found.double() / 32768 - exact["input"]).abs() / exact["input"].abs().max()
    assert wrong.max() < 0.01


# Autocast.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_bfloat16(backend, dtype, reduction):
    head = head_of_leaves(dtype=dtype)
    leaves = [getattr(head, name) for name in NAMES]

    def under_autocast(function):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function()

    loss = under_autocast(lambda: head(seed=1, reduction=reduction, backend=backend))
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, leaves, upstream_like(loss))
    assert [each.dtype for each in found] == [dtype] * 3

    def eager():
        masks = [pyrx.dropout_mask((33, 21), 0.5, 1, m) for m in range(8)]
        logits = [F.linear(torch.where(m, head.input * 2, 0), head.linear_weight, head.linear_bias) for m in masks]
        return sum(F.cross_entropy(each, head.target, reduction=reduction) for each in logits) / 8

    plain = under_autocast(eager)
    assert plain.dtype == torch.float32
    expected = torch.autograd.grad(plain, leaves, upstream_like(plain))
    exact_loss, exact = run(head.to(torch.float64), backend="reference", seed=1, reduction=reduction)
    eps = torch.finfo(torch.bfloat16).eps / torch.finfo(dtype).eps
    assert_within_budget(loss, plain, exact_loss, "loss", slack=2 * torch.finfo(torch.bfloat16).eps * 2**23)
    for name, one, other in zip(NAMES, found, expected, strict=True):
        assert_within_budget(one, other, exact[name], name, slack=2 * eps)


def test_autocast_leaves_float64_alone(backend):
    head = make_head(9, 21, 10, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(seed=1, backend=backend)
    assert_same_bits(loss, head(seed=1, backend=backend))


def test_autocast_mixes_dtypes_as_linear_does(backend):
    head = make_head(9, 21, 10)
    mixed = dataclasses.replace(head, input=head.input.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(mixed(seed=1, backend=backend), head(seed=1, backend=backend))
    with torch.autocast("cpu", enabled=False):
        assert head(seed=1, backend=backend).dtype == torch.float32


# Memory.

PEAK = """
import sys, torch, pyrx
backend, samples, reduction, combine = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.manual_seed(0)
x = torch.randn(24000, 128, requires_grad=True)
w = torch.randn(50, 128, requires_grad=True)
y = torch.randint(0, 50, (24000,))

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

def step(rows):
    loss = pyrx.multi_sample_dropout_cross_entropy(
        x[:rows], w, y[:rows], num_samples=samples, combine=combine, reduction=reduction, backend=backend)
    loss.backward(torch.ones_like(loss))

step(64)
x.grad = w.grad = None
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
step(24000)
print(status("VmHWM") - before)
"""


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_memory_does_not_grow_with_the_number_of_samples(cpu, python, reduction, combine):
    one, many = (int(python(PEAK, cpu, samples, reduction, combine)) for samples in (1, 32))
    # 24000 x 128 float32 are 12 MB: the gradient of input alone
    assert one > 10_000, "the measurement sees the gradient of input"
    assert many <= 1.1 * one + 2048, f"{many} kB for 32 samples, {one} kB for one"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_upstream_gradients_kept_batched_and_freed_are_the_same(backend, dtype):
    """In place where the graph is freed, on copies where it is kept, by products where upstreams are batched."""
    head = make_head(9, 24, 10, dtype=dtype)
    leaves = [getattr(head, name).requires_grad_() for name in NAMES]

    def loss():
        return pyrx.multi_sample_dropout_cross_entropy(
            *leaves[:2], head.target, linear_bias=leaves[2], seed=3, num_samples=4, backend=backend
        )

    upstream = torch.tensor(1 / 3).to(dtype)
    kept = loss()
    first = torch.autograd.grad(kept, leaves, upstream, retain_graph=True)
    for each in first:
        each.zero_()
    again, freed = torch.autograd.grad(kept, leaves, upstream), torch.autograd.grad(loss(), leaves, upstream)
    batched = torch.autograd.grad(loss(), leaves, torch.stack([upstream, 2 * upstream]), is_grads_batched=True)
    for one, other, many in zip(again, freed, batched, strict=True):
        assert_same_bits(one, other)
        torch.testing.assert_close(many, torch.stack([one, 2 * one]), rtol=2e-2, atol=1e-6)


def test_features_through_vmap(backend):
    x = torch.randn(3, 40)
    expected = pyrx.dropout(x[1], 0.5, seed=1, backend=backend)
    assert_same_bits(torch.vmap(lambda row: pyrx.dropout(row, 0.5, seed=1, backend=backend))(x)[1], expected)


@pytest.mark.parametrize("num_samples, sampling", [(1, "independent"), (2, "independent"), (2, "antithetic")])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_few_samples_within_their_error_budget(cpu, dtype, num_samples, sampling):
    """Their gradients are products of masked rows, of 16-bit types packed in pairs: of two samples or of two rows."""
    for rows in (1, 6, 151):
        head = make_head(rows, 102, 37, dtype=dtype)
        for combine in COMBINES:
            options = {"sampling": sampling, "combine": combine, "seed": 3, "p": 0.6}
            assert_head_within_budget(head, cpu, num_samples=num_samples, **options)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_few_classes_over_chunks_and_tasks(cpu, threads, sampling):
    """More rows than a chunk, more features than a task, and a part of a register at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        head = make_head(300, 531, 7, class_weight=True, ignored=0.2)
        assert_head_within_budget(head, cpu, seed=2, num_samples=8, sampling=sampling)
    finally:
        torch.set_num_threads(before)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_threads_change_no_bits(cpu, sampling, dtype):
    """More rows than a chunk, whose size follows from the threads."""
    before = torch.get_num_threads()
    leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((400, 70), (50, 70), (50,))]
    target, found = torch.randint(0, 50, (400,)), []
    try:
        for threads in (1, 3, 5, 8):
            torch.set_num_threads(threads)
            loss = pyrx.multi_sample_dropout_cross_entropy(
                *leaves[:2], target, linear_bias=leaves[2], num_samples=4, sampling=sampling, seed=1, backend=cpu
            )
            found.append([loss, *torch.autograd.grad(loss, leaves)])
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        for one, other in zip(found[0], each, strict=True):
            assert_same_bits(one, other)
