"""What the fused head computes: against its formula in float64, PyTorch's cross_entropy, and error budgets."""

import dataclasses
import itertools
import math

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
    Head,
    assert_head_within_budget,
    assert_same_bits,
    assert_within_budget,
    expected_mask,
    formula,
    make_head,
    name_of,
    probabilities_of,
    run,
    scale_of,
    threads,
    upstream_like,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrx

WIDE = (torch.float32, torch.float64)


def largest(tensor):
    return tensor.abs().max().item() if tensor.numel() else 0.0


def assert_near(got, expected, floor, what):
    """Within 400 units in the last place of the largest element, or of `floor`, the size of the terms that cancel."""
    error = largest(got.double() - expected)
    tolerance = 400 * torch.finfo(got.dtype).eps * max(largest(expected), floor)
    assert error <= tolerance, f"{what}: error {error:.3g}, tolerance {tolerance:.3g}"


def assert_equals_formula(head, backend, **options):
    """Loss and gradients equal those that autograd finds for the formula in float64."""
    loss, gradients = run(head, backend=backend, **options)
    leaves = head.to(torch.float64).map(lambda each: each.requires_grad_())
    expected = formula(leaves, **options)
    assert loss.shape == expected.shape
    if expected.isnan().any():
        assert loss.isnan().all()
        return
    scale = max(map(scale_of, probabilities_of(options.get("p", 0.5), options.get("num_samples", 8))))
    size = {
        "input": scale * largest(head.input),
        "linear_weight": scale * largest(head.linear_weight),
        "linear_bias": 1.0,
    }
    assert_near(loss, expected.detach(), 1 + size["input"] * largest(head.linear_weight), "loss")
    names = [name for name in NAMES if getattr(head, name) is not None]
    upstream = upstream_like(expected)
    found = torch.autograd.grad(expected, [getattr(leaves, name) for name in names], upstream, allow_unused=True)
    other = {"input": "linear_weight", "linear_weight": "input", "linear_bias": "linear_bias"}
    for name, gradient in zip(names, found, strict=True):
        gradient = torch.zeros_like(gradients[name]) if gradient is None else gradient
        assert gradients[name].shape == gradient.shape
        assert_near(gradients[name], gradient, largest(upstream) * size[other[name]], f"gradient of {name}")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dtype", WIDE, ids=name_of)
def test_equals_its_formula(backend, target, reduction, combine, sampling, dtype):
    for label_smoothing, ignored, class_weight in itertools.product((0.0, 0.1, 1.0), (0.0, 0.4), (False, True)):
        if ignored and target == "probabilities":
            continue
        head = make_head(13, 21, 7, target, class_weight=class_weight, ignored=ignored, dtype=dtype)
        assert_equals_formula(
            head,
            backend,
            seed=3,
            num_samples=4,
            p=0.5,
            combine=combine,
            sampling=sampling,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 8, 9, 17])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.999999], ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sample_counts_and_probabilities(backend, num_samples, p, combine, sampling):
    for target, reduction, dtype in (("ids", "mean", torch.float32), ("mixed", "none", torch.float64)):
        head = make_head(9, 33, 10, target, dtype=dtype)
        assert_equals_formula(
            head, backend, seed=5, num_samples=num_samples, p=p, combine=combine, sampling=sampling, reduction=reduction
        )


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    "p", [[0.5, 0.5, 0.5], [0.1, 0.5, 0.9, 0.0], [0.5, 0.5, 0.5, 0.25], (0.3,)], ids=["halves", "four", "last", "one"]
)
def test_a_probability_a_sample(backend, p, sampling, combine):
    head = make_head(9, 33, 10, dtype=torch.float64)
    for reduction in REDUCTIONS:
        assert_equals_formula(
            head, backend, seed=5, num_samples=len(p), p=p, combine=combine, sampling=sampling, reduction=reduction
        )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("lead", [(), (2, 3), (2, 1, 5), (0, 3)], ids=name_of)
def test_leading_dimensions(backend, target, lead):
    head = make_head(lead, 33, 10, target, dtype=torch.float64)
    for reduction in REDUCTIONS:
        assert_equals_formula(head, backend, seed=5, num_samples=3, reduction=reduction)
    assert head(reduction="none", backend=backend).shape == lead


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3])
@pytest.mark.parametrize("target", ["ids", "mixed"])
def test_ignored_rows_count_nothing(backend, target, ignore_index):
    head = make_head(40, 8, 5, target, ignored=0.5, ignore_index=ignore_index, class_weight=True, dtype=torch.float64)
    for reduction in REDUCTIONS:
        assert_equals_formula(head, backend, seed=1, num_samples=2, ignore_index=ignore_index, reduction=reduction)
    loss = head(seed=1, reduction="none", ignore_index=ignore_index, label_smoothing=0.1, backend=backend)
    parts = head.target[:2] if target == "mixed" else (head.target,)
    nothing = torch.stack([part == ignore_index for part in parts]).all(0)
    assert nothing.any() and (loss[nothing] == 0).all() and (loss[~nothing] != 0).all()


@pytest.mark.parametrize("rows", [4, 0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("target", ["ids", "mixed"])
def test_no_row_counts_as_in_cross_entropy(backend, target, label_smoothing, rows):
    """All rows ignored, or none there: nan for the mean, 0 for the sum, as PyTorch says."""
    head = make_head(rows, 8, 5, target, ignored=1.0)
    ids = torch.full((rows,), -100)
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        loss, gradients = run(head, backend=backend, seed=1, **options)
        logits = F.linear(head.input, head.linear_weight, head.linear_bias)
        expected = F.cross_entropy(logits, ids, **options)
        torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)
        if reduction != "mean":
            assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("target", TARGETS)
def test_empty_batches_give_what_cross_entropy_gives(backend, target):
    head = make_head(0, 8, 5, target)
    for reduction in REDUCTIONS:
        loss, gradients = run(head, backend=backend, seed=1, reduction=reduction)
        goal = torch.empty(0, dtype=torch.int64) if target == "mixed" else head.target
        expected = F.cross_entropy(
            F.linear(head.input, head.linear_weight, head.linear_bias), goal, reduction=reduction
        )
        torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)
        assert [gradients[name].shape for name in NAMES] == [(0, 8), (5, 8), (5,)]
        if reduction != "mean":
            assert all((gradient == 0).all() for gradient in gradients.values())


# Against PyTorch's own functions.


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("target", ["ids", "probabilities"])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_p_0_equals_cross_entropy_of_linear(backend, dtype, target, num_samples):
    head = make_head(33, 100, 10, target, dtype=dtype, class_weight=True)
    for reduction, label_smoothing, sampling in itertools.product(REDUCTIONS, (0.0, 0.1), SAMPLINGS):
        options = {"reduction": reduction, "label_smoothing": label_smoothing}

        def plain(each, options=options):
            logits = F.linear(each.input, each.linear_weight, each.linear_bias)
            goal = each.target.to(logits.dtype) if target == "probabilities" else each.target
            return F.cross_entropy(logits, goal, each.weight, **options)

        loss = head(num_samples=num_samples, p=0.0, sampling=sampling, backend=backend, **options)
        if backend == "reference" and num_samples == 1:
            assert_same_bits(loss, plain(head))
        assert_within_budget(loss, plain(head), plain(head.to(torch.float64)), f"{options}")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("combine", COMBINES)
def test_equals_the_loop_over_dropout_masks(backend, combine, reduction):
    """The "equivalent to" of the docstring, in float32."""
    head = make_head(33, 100, 10)
    masks = [pyrx.dropout_mask(head.input.shape, 0.5, 17, m, backend=backend) for m in range(4)]
    logits = [F.linear(torch.where(m, head.input / 0.5, 0), head.linear_weight, head.linear_bias) for m in masks]
    if combine == "losses":
        expected = sum(F.cross_entropy(each, head.target, reduction=reduction) for each in logits) / 4
    else:
        expected = F.cross_entropy(sum(logits) / 4, head.target, reduction=reduction)
    loss = head(num_samples=4, seed=17, combine=combine, reduction=reduction, backend=backend)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_loss_of_the_mean_logits_is_at_most_the_mean_loss(backend):
    head = make_head(33, 100, 10)
    logits, losses = (head(seed=2, combine=c, reduction="none", backend=backend) for c in ("logits", "losses"))
    assert (logits < losses).all()


# Targets.


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_mix_of_a_class_with_itself_is_the_class(backend, reduction, label_smoothing):
    head = make_head(33, 21, 7, class_weight=True, ignored=0.3, dtype=torch.float64)
    mixed = dataclasses.replace(head, target=pyrx.MixedTarget(head.target, head.target, torch.rand(33)))
    options = {"seed": 1, "reduction": reduction, "label_smoothing": label_smoothing, "backend": backend}
    one, other = run(head, **options), run(mixed, **options)
    torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_mix_of_two_classes_is_their_probabilities(backend, reduction, label_smoothing):
    # class weights enter the denominator of "mean" by class ids only, as F.cross_entropy has it
    head = make_head(33, 21, 7, "mixed", class_weight=reduction != "mean", dtype=torch.float64)
    a, b, lam = head.target[:3]
    lam = lam.double()[:, None]
    dense = dataclasses.replace(head, target=lam * F.one_hot(a, 7) + (1 - lam) * F.one_hot(b, 7))
    options = {"seed": 1, "reduction": reduction, "label_smoothing": label_smoothing, "backend": backend}
    torch.testing.assert_close(run(head, **options), run(dense, **options), rtol=1e-12, atol=1e-14)


def test_one_hot_probabilities_are_the_class_ids(backend):
    head = make_head(33, 21, 7, dtype=torch.float64)
    dense = dataclasses.replace(head, target=F.one_hot(head.target, 7).double())
    for reduction in REDUCTIONS:
        one, other = (run(each, seed=1, reduction=reduction, backend=backend) for each in (head, dense))
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("target", TARGETS)
def test_targets_of_other_float_dtypes_and_strides(backend, target):
    head = make_head(12, 21, 7, target)
    expected = run(head, seed=1, backend=backend)
    if target == "ids":
        others = [torch.stack([head.target] * 2, 1)[:, 0]]
    elif target == "probabilities":
        others = [head.target.double(), head.target.t().contiguous().t(), torch.stack([head.target] * 2, -1)[..., 0]]
    else:
        a, b, lam = head.target[:3]
        others = [
            pyrx.MixedTarget(a, b, lam.double()),
            pyrx.MixedTarget(*(torch.stack([each] * 2, 1)[:, 0] for each in (a, b, lam))),
        ]
    for other in others:
        torch.testing.assert_close(run(dataclasses.replace(head, target=other), seed=1, backend=backend), expected)
    scalar = torch.tensor(0.25)
    if target == "mixed":  # one lam for the batch, as mixup draws it
        both = [pyrx.MixedTarget(a, b, each) for each in (scalar.expand(12), torch.full((12,), 0.25))]
        one, other = (run(dataclasses.replace(head, target=each), seed=1, backend=backend) for each in both)
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# Sizes, dtypes and their error budgets.

SIZES = [  # B, D, C
    (0, 63, 10),
    (1, 1, 1),
    (1, 512, 10),
    (3, 0, 10),
    (3, 3, 1311),
    (3, 63, 37),
    (3, 512, 1),
    (63, 1, 100),
    (63, 100, 37),
    (63, 63, 10),
    (200, 100, 100),
    (200, 512, 10),
    (200, 3, 37),
    (7, 1311, 10),
    (63, 512, 1311),
]


SIZE_IDS = [f"B{b}_D{d}_C{c}" for b, d, c in SIZES]


@pytest.mark.parametrize("rows, features, classes", SIZES, ids=SIZE_IDS)
def test_sizes_equal_the_formula(backend, rows, features, classes):
    for target, sampling, dtype in itertools.product(("ids", "mixed"), SAMPLINGS, WIDE):
        head = make_head(rows, features, classes, target, class_weight=True, dtype=dtype)
        reduction = "mean" if target == "ids" else "none"
        assert_equals_formula(head, backend, seed=9, num_samples=5, sampling=sampling, reduction=reduction)


@pytest.mark.parametrize("rows, features, classes", SIZES, ids=SIZE_IDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_sizes_and_dtypes_within_their_error_budget(cpu, dtype, rows, features, classes):
    if dtype in LOW and rows * features * classes > 10**7:
        pytest.skip("PyTorch's own low-precision loop takes long here")
    # each target with every reduction, each combine and sampling with both: all pairs, not all products
    for i, (target, reduction) in enumerate(itertools.product(TARGETS, REDUCTIONS)):
        if rows == 0 and reduction == "mean":
            continue
        head = make_head(rows, features, classes, target, bias=i % 2 == 0, class_weight=i % 2 == 1, dtype=dtype)
        options = {"sampling": SAMPLINGS[i % 2], "combine": COMBINES[i // 2 % 2], "reduction": reduction}
        assert_head_within_budget(head, cpu, seed=9, num_samples=5, label_smoothing=0.1 * (i % 3), **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_loss_has_the_inputs_dtype(backend, dtype):
    loss = make_head(3, 8, 5, dtype=dtype)(backend=backend)
    assert loss.dtype == dtype and loss.shape == ()


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("features, classes", [(16, 10), (8, 1311), (300, 3)], ids=["C10", "C1311", "C3"])
def test_many_rows_cross_chunks(backend, features, classes, sampling):
    """No seam where one chunk of rows ends: each row's loss is what it is in a shorter batch of the same masks."""
    rows = 3001 if classes < 1000 else 1501
    head = make_head(rows, features, classes, "mixed", class_weight=True, dtype=torch.float64)
    options = {"seed": 21, "num_samples": 3, "sampling": sampling}
    for reduction in ("none", "mean"):
        assert_equals_formula(head, backend, reduction=reduction, **options)
    whole = head(reduction="none", backend=backend, **options)
    for size in (1, 5, 64, 1000):
        short = dataclasses.replace(
            head, input=head.input[:size], target=pyrx.MixedTarget(*(each[:size] for each in head.target[:3]))
        )
        torch.testing.assert_close(
            short(reduction="none", backend=backend, **options), whole[:size], rtol=1e-12, atol=1e-13
        )


@given(
    lead=st.lists(st.integers(0, 9), max_size=2).map(tuple),
    features=st.integers(1, 40),
    classes=st.integers(1, 20),
    target=st.sampled_from(TARGETS),
    each_p=st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.5, 0.5, 0.9]), min_size=1, max_size=5),
    same_p=st.booleans(),
    sampling=st.sampled_from(SAMPLINGS),
    combine=st.sampled_from(COMBINES),
    reduction=st.sampled_from(REDUCTIONS),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    bias=st.booleans(),
    class_weight=st.booleans(),
    seed=st.integers(-(2**63), 2**64 - 1),
    dtype=st.sampled_from(WIDE),
)
@settings(max_examples=150)
def test_any_combination_equals_the_formula(
    backend, lead, features, classes, target, each_p, same_p, ignored, bias, class_weight, dtype, **options
):
    head = make_head(
        lead, features, classes, target, bias=bias, class_weight=class_weight, ignored=ignored, dtype=dtype
    )
    p = each_p[0] if same_p else each_p
    assert_equals_formula(head, backend, num_samples=len(each_p), p=p, **options)


# Not a number.


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_bad_row_spoils_its_own_loss_only(backend, value, sampling, combine):
    head = make_head(9, 33, 10)
    clean, _ = run(head, seed=1, reduction="none", sampling=sampling, combine=combine, backend=backend)
    head.input[4] = value
    options = {"seed": 1, "sampling": sampling, "combine": combine, "backend": backend}
    loss, gradients = run(head, reduction="none", **options)
    others = [i for i in range(9) if i != 4]
    assert loss[4].isnan()
    torch.testing.assert_close(loss[others], clean[others])
    assert gradients["input"][others].isfinite().all()
    assert head(reduction="mean", **options).isnan() and head(reduction="sum", **options).isnan()


@pytest.mark.parametrize("combine", COMBINES)
def test_a_nan_that_every_sample_drops_is_dropped(backend, combine):
    head = make_head(5, 64, 10, dtype=torch.float64)
    options = {"seed": 1, "num_samples": 3, "combine": combine, "reduction": "none"}
    kept = torch.stack([expected_mask((5, 64), 0.5, 1, m) for m in range(3)]).any(0)
    assert not kept.all()
    zeroed = dataclasses.replace(head, input=torch.where(kept, head.input, 0.0))
    poisoned = dataclasses.replace(head, input=torch.where(kept, head.input, math.nan))
    expected, found = run(zeroed, backend=backend, **options), run(poisoned, backend=backend, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("where", ["linear_weight", "linear_bias"])
def test_a_bad_parameter_spoils_the_loss(backend, where):
    head = make_head(9, 33, 10)
    getattr(head, where)[3] = math.nan
    for reduction in REDUCTIONS:
        assert head(reduction=reduction, backend=backend).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("classes", [10, 40])
@pytest.mark.parametrize("samples", [3, 4, 5, 8, 9])
def test_an_infinite_weight_spoils_what_it_spoils_in_the_reference(cpu, dtype, classes, samples):
    """The loss of class 3's rows is infinite; features that every sample drops have a gradient of 0."""
    head = make_head(16, 64, classes, dtype=dtype)
    head.linear_weight[3, 7], head.linear_weight[5, 9] = -math.inf, math.inf
    head.input[:, 7].abs_()
    head.target[::2] = 3
    options = {"seed": 3, "num_samples": samples, "reduction": "none"}
    (loss, gradients), (expected, theirs) = (run(head, backend=each, **options) for each in (cpu, "reference"))
    for got, wanted in ((loss, expected), *((gradients[name], theirs[name]) for name in gradients)):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got), kind(wanted)), kind
    assert theirs["input"].isfinite().any() and theirs["input"].isnan().any()


def test_a_bad_row_that_is_ignored_has_loss_0(backend):
    head = make_head(9, 33, 10)
    head.input[4], head.target[4] = math.nan, -100
    loss = head(seed=1, reduction="none", backend=backend)
    assert loss[4] == 0 and loss.isfinite().all()
    assert head(seed=1, reduction="mean", backend=backend).isfinite()


def test_large_logits_do_not_overflow(backend):
    for dtype, size in ((torch.float32, 1e4), (torch.float16, 20.0)):
        head = make_head(9, 33, 10, dtype=dtype).map(lambda each, size=size: each * size)
        assert_head_within_budget(head, backend, seed=1, reduction="none")
        assert run(head, seed=1, backend=backend)[0].isfinite()


# Layouts and repetition.


def test_any_strides_of_input_and_weight(backend):
    plain = make_head(24, 33, 10, dtype=torch.float64)
    expected = run(plain, seed=1, backend=backend)
    strided = {
        "transposed": lambda t: t.t().contiguous().t(),
        "every_second": lambda t: torch.stack([t, t + 1], -1)[..., 0],
        "offset": lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
    }
    for (one, on_input), (other, on_weight) in itertools.product(strided.items(), repeat=2):
        bias = torch.stack([plain.linear_bias] * 2, 1)[:, 0]
        head = Head(on_input(plain.input), on_weight(plain.linear_weight), bias, plain.target)
        found = run(head, seed=1, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14, msg=lambda t, n=(one, other): f"{n}: {t}")
    images = torch.randn(4, 6, 3, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    head = dataclasses.replace(make_head((4, 6, 3), 5, 10, dtype=torch.float64), input=images)
    assert_equals_formula(head, backend, seed=1)


def test_expanded_input(backend):
    head = make_head(6, 33, 10, dtype=torch.float64)
    row = head.input[:1]
    expanded = dataclasses.replace(head, input=row.expand(6, 33))
    copied = dataclasses.replace(head, input=row.repeat(6, 1))
    torch.testing.assert_close(run(expanded, seed=1, backend=backend), run(copied, seed=1, backend=backend))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_the_same_bits_from_run_to_run(cpu, dtype, sampling):
    head = make_head(700, 129, 37, dtype=dtype)
    for combine, reduction in itertools.product(COMBINES, REDUCTIONS):
        options = {"seed": 4, "combine": combine, "sampling": sampling, "reduction": reduction, "backend": cpu}
        loss, gradients = run(head, **options)
        for _ in range(2):
            again, found = run(head, **options)
            assert_same_bits(again, loss)
            for name in gradients:
                assert_same_bits(found[name], gradients[name], name)


@pytest.mark.parametrize("count", [1, 3])
def test_thread_counts_do_not_change_the_result(backend, count):
    for features, sampling, dtype in itertools.product((21, 600), SAMPLINGS, WIDE):
        head = make_head(150, features, 70, "mixed", dtype=dtype)
        with threads(count):
            assert_equals_formula(head, backend, seed=4, num_samples=5, sampling=sampling)


def test_seeds_are_drawn_unless_given(backend):
    head = make_head(9, 33, 10)
    drawn = [head(backend=backend) for _ in range(2)]
    assert drawn[0] != drawn[1]
    torch.manual_seed(0)
    assert torch.equal(head(backend=backend), drawn[0])
    one, other = (head(generator=torch.Generator().manual_seed(5), backend=backend) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(head(seed=torch.tensor([7]), backend=backend), head(seed=7, backend=backend))


def test_inputs_are_left_as_they_were(backend):
    head = make_head(9, 33, 10, "mixed", class_weight=True)
    tensors = [head.input, head.linear_weight, head.linear_bias, head.weight, *head.target[:3]]
    before = [each.clone() for each in tensors]
    versions = [each._version for each in tensors]
    for reduction in REDUCTIONS:
        run(head, seed=1, reduction=reduction, backend=backend)
    assert [each._version for each in tensors] == versions
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


@pytest.mark.parametrize("combine", COMBINES)
def test_many_samples(backend, combine):
    for sampling, dtype in itertools.product(SAMPLINGS, WIDE):
        head = make_head(9, 33, 10, dtype=dtype)
        options = {"seed": 1, "num_samples": 70, "combine": combine, "sampling": sampling}
        assert_equals_formula(head, backend, p=0.5, **options)
        assert_equals_formula(head, backend, p=[m / 80 for m in range(70)], **options)
