"""The Triton kernels of dropout and its heads, see triton_helpers.py."""

import dataclasses
import importlib

import helpers
import numpy as np
import pytest
import torch
import triton_helpers
from triton_helpers import INTERPRETED, device_of, values_in_the_interpreter

import pyrx

triton = pytest.importorskip("triton")
tl = triton.language
kernels = importlib.import_module("pyrx._triton.dropout")
launcher = importlib.import_module("pyrx._triton.multi_sample_dropout")
filling = importlib.import_module("pyrx._triton.neighbor_fill")
mixed_launcher = importlib.import_module("pyrx._triton.mixed_cross_entropy")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SIZES = (1, 3, 63, 100, 1311)
SEEDS = (0, -5, 0x0123456789ABCDEF, 2**63 + 11)


device = device_of("dropout", "multi_sample_dropout")


def head_on(device, *arguments, **options):
    head = helpers.make_head(*arguments, **options)
    return head.cuda() if device == "cuda" else head


test_values_in_the_interpreter = values_in_the_interpreter(__file__, 61)


@pytest.mark.skipif(INTERPRETED, reason="runs an interpreter of its own")
def test_tf32_may_be_asked_for_by_either_name(python):
    """torch raises where both names of the setting were used and one is read."""
    script = """
import sys, torch, pyrx
exec(sys.argv[1])
x, y = torch.randn(4, 16), torch.arange(4)
pyrx.multi_sample_dropout_cross_entropy(x, torch.randn(5, 16), y, seed=1, backend="triton")
q = torch.randn(1, 1, 32, 16)
pyrx.block_sparse_attention(q, q, q, backend="triton")
from pyrx._triton import attention
print(attention.precision_of(q), attention.precision_of(q.half()))
"""
    for setting, expected in (
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
        ("torch.set_float32_matmul_precision('high')", "tf32"),
        ("pass", "ieee"),
    ):
        assert python(script, setting, TRITON_INTERPRET="1").split() == [expected, "tf32"], setting


# Masks.


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 65535 / 65536])
def test_masks(device, size, p):
    for seed in SEEDS:
        for sample in (0, 1, 6, 2**32 - 1):
            for sampling in helpers.SAMPLINGS:
                expected = helpers.expected_mask((size,), p, seed, sample, sampling)
                got = pyrx.dropout_mask((size,), p, seed, sample, sampling=sampling, device=device, backend="triton")
                assert got.dtype == torch.bool and torch.equal(got.cpu(), expected), (seed, sample, sampling)


def test_thresholds_are_inclusive(device):
    """u = t is kept, u = t - 1 is dropped, in every lane and for both samples of a pair."""
    u = helpers.lanes(0, 8)
    for lane in range(8):
        for sample, value in ((0, u[lane]), (1, 65535 - u[lane])):
            for t, kept in ((value, True), (value + 1, False)):
                options = {"sampling": "antithetic", "device": device, "backend": "triton"}
                assert pyrx.dropout_mask((8,), int(t) / 65536, 0, sample, **options)[lane].item() == kept
                if sample == 0:  # a transposed tensor is drawn element by element
                    input = torch.ones(2, 4, device=device).t()
                    got = pyrx.dropout(input, int(t) / 65536, seed=0, backend="triton")
                    assert (got.reshape(-1)[lane] > 0).item() == kept


@pytest.mark.parametrize("shape", [(1,), (63,), (5, 63), (3, 1311), (4, 2, 64), (2, 0), (0, 5), (3, 1)])
def test_packed_masks(device, shape):
    for sample, sampling in ((0, "independent"), (3, "antithetic")):
        options = {"sampling": sampling, "device": device}
        got = pyrx.dropout_mask(shape, 0.4, 9, sample, True, backend="triton", **options)
        expected = pyrx.dropout_mask(shape, 0.4, 9, sample, True, backend="reference", **options)
        assert got.dtype == torch.uint8 and torch.equal(got, expected)


@triton.jit
def probe_kernel(bits, keep, seed, first, sample, threshold, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    lane = tl.arange(0, 8)[None, :]
    group = tl.cast(first, tl.int64) + at
    tl.store(bits + at, kernels.group_bits(seed, group, sample, threshold, True))
    kept = kernels.element_keep(seed, group[:, None] * 8 + lane, sample, threshold, True)
    tl.store(keep + at[:, None] * 8 + lane, kept.to(tl.int32))


@pytest.mark.parametrize("first", [0, 2**31 - 2, 2**32 - 2, 2**40 + 5])
def test_far_elements(device, first):
    """Elements around and beyond 2**32 groups, which no test can allocate: the second counter word."""
    count, seed, threshold = 8, 0x0123456789ABCDEF, 20000
    bits = torch.zeros(count, dtype=torch.int32, device=device)
    keep = torch.zeros(count, 8, dtype=torch.int32, device=device)
    probe_kernel[(1,)](bits, keep, torch.tensor(seed, device=device), first, 3, threshold, count)
    groups = np.uint64(first) + np.arange(count, dtype=np.uint64)
    counter = (groups & np.uint64(0xFFFFFFFF), groups >> np.uint64(32), np.full_like(groups, 2), np.zeros_like(groups))
    words = helpers.philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    lanes = np.stack([half for word in words for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))], 1)
    expected = torch.from_numpy(65535 - lanes.astype(np.int64) >= threshold).int()
    assert torch.equal(keep.cpu(), expected)
    assert torch.equal((bits.cpu()[:, None] >> torch.arange(8)) & 1, expected)


# The elementwise ops.


@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.name_of)
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 65535 / 65536])
def test_dropout(device, dtype, p):
    for shape in ((), (1,), (1311,), (3, 0), (5, 63), (2, 3, 4, 6), (2, 3, 2, 4, 5)):
        made = helpers.layouts(shape, dtype) if len(shape) > 1 else [("plain", torch.randn(shape).to(dtype))]
        for layout, input in made:
            input = input.to(device)
            expected = helpers.dropped(input, p, 5, 7)
            got = pyrx.dropout(input, p, sample=7, seed=5, backend="triton")
            helpers.assert_same_bits(got, expected, f"{shape} {layout}")
            assert got.stride() == torch.empty_like(input).stride(), layout


def test_dropout_drops_and_keeps_nan(device):
    bits = torch.tensor([0x7F800001, 0x7FC01234, -0x400000, -0x80000000], dtype=torch.int32, device=device)
    input = bits.view(torch.float32).repeat(16)
    helpers.assert_same_bits(pyrx.dropout(input, 0.0, seed=1, backend="triton"), input, "p = 0 touches nothing")
    mask = helpers.expected_mask((64,), 0.5, 1).to(device)
    got = pyrx.dropout(input, 0.5, seed=1, backend="triton")
    assert torch.equal(got.isnan(), mask & input.isnan()) and not helpers.bits(got)[~mask].any()


@pytest.mark.parametrize("sampling", helpers.SAMPLINGS)
@pytest.mark.parametrize("p", [0.5, 0.0, (0.1, 0.1, 0.7, 0.0, 0.5)], ids=str)
def test_copies_and_fold(device, sampling, p):
    samples = 5
    for shape in ((3, 63), (2, 3, 4, 6)):
        for layout, input in helpers.layouts(shape):
            if layout not in ("contiguous", "transposed" if len(shape) == 2 else "channels_last"):
                continue
            input = input.to(device).requires_grad_()
            output = pyrx.multi_sample_dropout(input, samples, p, sampling=sampling, seed=-3, backend="triton")
            one = torch.empty_like(input)
            assert output.stride() == (input.numel(), *one.stride())
            for m, each in enumerate(helpers.probabilities_of(p, samples)):
                helpers.assert_same_bits(output[m], helpers.dropped(input.detach(), each, -3, m, sampling), layout)
            upstream = torch.randn(output.shape, dtype=torch.float64).to(device)
            expected = sum(
                helpers.dropped(upstream[m], each, -3, m, sampling)
                for m, each in enumerate(helpers.probabilities_of(p, samples))
            )
            plain = upstream.float()
            for grad in (
                plain,
                torch.empty_like(output).copy_(plain),
                plain.movedim(0, -1).contiguous().movedim(-1, 0),
            ):
                (found,) = torch.autograd.grad(output, input, grad, retain_graph=True)
                torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_fold_of_an_expanded_gradient(device):
    input = torch.randn(4, 24, device=device, requires_grad=True)
    pyrx.multi_sample_dropout(input, 3, 0.5, seed=2, backend="triton").sum().backward()
    expected = sum(helpers.expected_mask((4, 24), 0.5, 2, m).float() * 2 for m in range(3))
    assert torch.equal(input.grad.cpu(), expected)


# The head.


@pytest.fixture(params=["fused", "library"])
def products(request, monkeypatch):
    """Whose matrix products the head takes: its own kernels', or the library's."""
    most = 0 if request.param == "library" else 2**31
    monkeypatch.setattr(launcher, "LIBRARY_CLASSES", {2: most, 4: most})


@pytest.mark.parametrize("classes", [1, 10, 37, 300])
@pytest.mark.parametrize("target", helpers.TARGETS)
@pytest.mark.parametrize("reduction", helpers.REDUCTIONS)
def test_head_targets(device, classes, target, reduction):
    head = head_on(device, 5, 24, classes, target, class_weight=True, ignored=0.3, seed=classes)
    options = {"num_samples": 3, "p": 0.3, "seed": 7, "reduction": reduction}
    helpers.assert_head_within_budget(head, "triton", **options)
    if reduction == "mean":
        helpers.assert_head_within_budget(head, "triton", label_smoothing=0.1, **options)


@pytest.mark.parametrize("combine", helpers.COMBINES)
@pytest.mark.parametrize("sampling", helpers.SAMPLINGS)
@pytest.mark.parametrize(
    "samples, p", [(1, 0.5), (2, 0.5), (3, 0.5), (8, 0.5), (4, 0.3), (2, 0.0), (3, (0.1, 0.5, 0.9))]
)
def test_head_samples(device, products, combine, sampling, samples, p):
    options = {"num_samples": samples, "p": p, "combine": combine, "sampling": sampling, "seed": -2}
    for features in (27, 40):
        head = head_on(device, 9, features, 10, ignored=0.2)
        for reduction in ("mean", "none"):
            helpers.assert_head_within_budget(head, "triton", reduction=reduction, **options)


@pytest.mark.parametrize("dtype", helpers.LOW, ids=helpers.name_of)
@pytest.mark.parametrize("combine", helpers.COMBINES)
@pytest.mark.parametrize("sampling", helpers.SAMPLINGS)
def test_head_low_precision(device, products, dtype, combine, sampling):
    head = head_on(device, 21, 64, 37, dtype=dtype)
    for options in ({"reduction": "none"}, {"p": (0.5, 0.2, 0.8, 0.5)}):
        helpers.assert_head_within_budget(
            head, "triton", num_samples=4, seed=1, combine=combine, sampling=sampling, **options
        )


def test_head_splits_sums(device):
    plan = launcher._plan(33, 272, 16, 4, 4, 4, False, False, True, True, False)
    assert plan.logit_splits > 1 and plan.gradient_splits > 1
    helpers.assert_head_within_budget(head_on(device, 33, 272, 10), "triton", seed=1, num_samples=4)


def test_head_large_blocks(device, monkeypatch):
    monkeypatch.setattr(launcher, "FILL", 4)
    monkeypatch.setattr(launcher, "LARGE", 1)
    launcher._plan.cache_clear()
    plan = launcher._plan(70, 144, 48, 4, 4, 4, False, False, False, True, False)
    assert plan.logits[0] == 64 and plan.gradients == (64, 64, 128)
    head = head_on(device, 70, 144, 37, dtype=torch.bfloat16)
    helpers.assert_head_within_budget(head, "triton", seed=1, num_samples=4)
    launcher._plan.cache_clear()


def test_head_layouts(device, products):
    head = head_on(device, 6, 40, 10)
    expected = helpers.run(head, backend="triton", seed=3, num_samples=3)
    for lead in (lambda t: t.t().contiguous().t(), lambda t: torch.cat([t[:, :1], t], 1)[:, 1:]):
        other = dataclasses.replace(head, input=lead(head.input), linear_weight=lead(head.linear_weight))
        loss, gradients = helpers.run(other, backend="triton", seed=3, num_samples=3)
        torch.testing.assert_close(loss, expected[0])
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[1][name])


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_head_computes_what_is_needed(device, products, needs, reduction):
    head = head_on(device, 5, 24, 10)
    options = {"backend": "triton", "seed": 1, "num_samples": 3, "reduction": reduction}
    loss, expected = helpers.run(head, **options)
    got, found = helpers.run(head, needs=tuple(map(bool, needs)), **options)
    helpers.assert_same_bits(got, loss)
    assert len(found) == sum(needs)
    for name, gradient in found.items():
        helpers.assert_same_bits(gradient, expected[name], name)


@pytest.mark.parametrize("sampling", helpers.SAMPLINGS)
@pytest.mark.parametrize("combine", helpers.COMBINES)
@pytest.mark.parametrize("target", ["ids", "mixed"])
def test_head_chunks(device, products, monkeypatch, sampling, combine, target):
    """Chunks of 16 rows, the last one smaller, give what one chunk gives."""
    options = {"backend": "triton", "seed": 1, "num_samples": 4, "sampling": sampling, "combine": combine}
    features = 24 if target == "ids" else 27
    head = head_on(device, 21, features, 10, target, class_weight=True, ignored=0.2)
    for reduction in ("mean", "none"):
        loss, expected = helpers.run(head, reduction=reduction, **options)
        with monkeypatch.context() as patch:
            patch.setattr(launcher, "CHUNK_MASK_BYTES", 16 * features * 4 // 8)
            launcher._plan.cache_clear()
            got, found = helpers.run(head, reduction=reduction, **options)
        launcher._plan.cache_clear()
        torch.testing.assert_close(got, loss, rtol=1e-5, atol=1e-6)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", helpers.REDUCTIONS)
def test_head_ignores_rows(device, reduction):
    """An ignored row counts nothing even where its logits are NaN; all ignored: as F.cross_entropy, gradients 0."""
    options = {"backend": "triton", "seed": 1, "num_samples": 3, "reduction": reduction, "ignore_index": 4}
    head = head_on(device, 6, 24, 10)
    head.target[::2] = 4
    expected = helpers.run(head, **options)
    head.input[::2] = float("nan")
    loss, gradients = helpers.run(head, **options)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradients["linear_bias"], expected[1]["linear_bias"])
    head = head_on(device, 6, 24, 10)
    head.target[:] = 4
    loss, gradients = helpers.run(head, **options)
    assert loss.isnan().all() if reduction == "mean" else not loss.any()
    assert not any(each.any() for each in gradients.values())


@pytest.mark.parametrize("bad", [-1, 10, -(2**62), 2**62])
@pytest.mark.parametrize("mixed", [False, True])
def test_head_poisons_invalid_classes(device, bad, mixed):
    head = head_on(device, 4, 24, 10, "mixed" if mixed else "ids", class_weight=True)
    (head.target.b if mixed else head.target)[2] = bad
    options = {"seed": 1, "num_samples": 3, "backend": "triton"}
    loss, _ = helpers.run(head, reduction="none", **options)
    assert loss.isnan().tolist() == [False, False, True, False]
    assert helpers.run(head, **options)[0].isnan()


@pytest.mark.parametrize("reduction", helpers.REDUCTIONS)
def test_head_without_rows_or_features(device, products, reduction):
    options = {"seed": 1, "num_samples": 3, "reduction": reduction}
    head = head_on(device, 0, 24, 10)
    loss, gradients = helpers.run(head, backend="triton", **options)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.isnan().all() if reduction == "mean" else not loss.any()
    assert not any(each.any() for each in gradients.values())
    helpers.assert_head_within_budget(head_on(device, 3, 0, 10), "triton", **options)


def test_head_infinite_logits(device):
    """A class that the bias rules out has probability 0; it is not NaN in the loss of other classes."""
    head = head_on(device, 4, 24, 600)
    head.linear_bias[:550] = float("-inf")
    head.target[:] = 560
    helpers.assert_head_within_budget(head, "triton", seed=1, num_samples=3)


def test_head_is_deterministic(device, products):
    head = head_on(device, 20, 24, 10)
    first, second = (helpers.run(head, backend="triton", seed=1, num_samples=4) for _ in range(2))
    helpers.assert_same_bits(first[0], second[0])
    for name, gradient in first[1].items():
        helpers.assert_same_bits(gradient, second[1][name], name)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="a GPU's graphs")
def test_graph_reads_the_seed_when_replayed():
    helpers.need("triton", "cuda")
    head, seed = head_on("cuda", 64, 128, 10), torch.tensor(1, device="cuda")
    head.linear_weight.requires_grad_()
    calls = [
        lambda: head(backend="triton", seed=seed, num_samples=3, p=(0.5, 0.3, 0.5)),
        lambda: pyrx.multi_sample_dropout(head.input, 3, (0.5, 0.3, 0.5), seed=seed, backend="triton"),
    ]
    for call in calls:
        graph, captured = helpers.capture(call)
        for value in (2, 3):
            seed.fill_(value)
            graph.replay()
            assert torch.equal(captured, call())


# The entries themselves.


def test_entries_have_the_shapes_of_their_fakes(device):
    ops, seed = torch.ops.pyrx_triton, torch.tensor(3, device=device)
    input = torch.randn(4, 3, 5, 8, device=device).to(memory_format=torch.channels_last)
    head = head_on(device, 4, 24, 10, "mixed")
    tensors = (head.input, head.linear_weight, head.linear_bias, *head.target[:3], None, seed)
    rest = ([32768] * 3, False, False, -100, 0.0)
    calls = [
        (ops.dropout_mask, (seed, [3, 5], 32768, 0, False, True)),
        (ops.dropout, (input, seed, 32768, 0)),
        (ops.neighbor_fill, (input, input[:, :1] > 0, 2)),
        (ops.multi_sample_dropout, (input, seed, [32768] * 3, False)),
        (ops.multi_sample_dropout_fold, (input, seed, [32768] * 4, True)),
        (ops.multi_sample_dropout_cross_entropy, (*tensors, *rest, "mean", [True, False, True], torch.float32)),
        (ops.multi_sample_dropout_cross_entropy, (*tensors, *rest, "none", [True] * 3, torch.float32)),
        (ops.multi_sample_dropout_cross_entropy_backward, (torch.randn(4, device=device), *tensors, *rest, [True] * 3)),
    ]
    goal = (torch.zeros(4, dtype=torch.int64, device=device), torch.ones(4, dtype=torch.int64, device=device))
    goal = (*goal, torch.rand(4, device=device), None, -100, 0.1)
    for reduction in helpers.REDUCTIONS:
        calls.append((ops.mixed_cross_entropy, (head.input, *goal, reduction, True, torch.float32)))
    calls.append((ops.mixed_cross_entropy, (head.input.half(), *goal, "mean", False, torch.float16)))
    calls.append((ops.mixed_cross_entropy_scale_, (torch.ones(4, 24, device=device), torch.ones(4, device=device) * 2)))
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_entries_check(device):
    ops, seed = torch.ops.pyrx_triton, torch.tensor(3, device=device)
    input = torch.randn(4, 24, device=device)
    with pytest.raises(TypeError, match="float64"):
        ops.dropout(input.double(), seed, 0, 0)
    with pytest.raises(TypeError, match="float64"):
        ops.neighbor_fill(input.double()[None, None], input[None, None] > 0, 1)
    with pytest.raises(ValueError, match="threshold"):
        ops.dropout(input, seed, 65536, 0)
    with pytest.raises(ValueError, match=r"of shape \[M, ...\] with M = 3"):
        ops.multi_sample_dropout_fold(input, seed, [0] * 3, False)
    with pytest.raises(ValueError, match=r"linear_weight of shape \[C, D\] with D = 24"):
        target = torch.zeros(4, dtype=torch.int64, device=device)
        rest = (None, target, None, None, None, seed, [0], False, False, -100, 0.0, "mean", [False] * 3, torch.float32)
        ops.multi_sample_dropout_cross_entropy(input, input[:, 1:], *rest)


# Ahead of time.

# what ptxas spills to reach the next level of occupancy
STACK_LIMIT = {80: 160, 90: 32}


def compile_ahead_of_time(architecture):
    """Prints one JSON line a compiled kernel: name, dtype of the call, registers, stack, shared memory."""
    compiled = triton_helpers.compile_launches(architecture)
    seed, samples = torch.tensor(3), [32768] * 8

    def call_head(rows, features, classes, dtype, target=(None, None, None), weight=None, bias=True, **options):
        target = (torch.zeros(rows, dtype=torch.int64), None, None) if target[0] is None else target
        settings = {"thresholds": samples, "antithetic": False, "averaged": False, "needs": [True] * 3} | options
        arguments = (
            torch.zeros(rows, features, dtype=dtype),
            torch.zeros(classes, features, dtype=dtype),
            torch.zeros(classes, dtype=dtype) if bias else None,
            *(*target, weight, seed, settings["thresholds"], settings["antithetic"], settings["averaged"], -100, 0.1),
        )
        if settings.get("backward"):
            launcher.multi_sample_dropout_cross_entropy_backward(torch.zeros(rows), *arguments, settings["needs"])
        else:
            launcher.multi_sample_dropout_cross_entropy(
                *arguments, settings.get("reduction", "mean"), settings["needs"], dtype
            )

    for dtype in (torch.bfloat16, torch.float32):
        for input in (torch.zeros(64, 128, dtype=dtype), torch.zeros(4, 16, 8, 8, dtype=dtype).movedim(1, -1)):
            kernels.dropout(input, seed, 32768, 0)
            copies = launcher.multi_sample_dropout(input, seed, samples, True)
            launcher.multi_sample_dropout_fold(copies, seed, [*samples[1:], 0], False)
        maps = torch.zeros(2, 64, 16, 16, dtype=dtype)
        for input in (maps, maps.to(memory_format=torch.channels_last)):
            filling.neighbor_fill(input, torch.ones(2, 1, 16, 16, dtype=torch.bool), 3)
        call_head(128, 2048, 100, dtype)
        gradients = torch.ones(8, 8, dtype=dtype), torch.ones(4, 8, dtype=dtype), torch.ones(4, dtype=dtype)
        launcher.multi_sample_dropout_cross_entropy_scale_(*gradients, torch.ones(()))
        call_head(128, 512, 10, dtype, antithetic=True)
        call_head(128, 2043, 300, dtype, averaged=True)
        report(compiled, dtype)

    def call_mixed(rows, classes, dtype, weight=None, reduction="mean", needs=True, smoothing=0.0):
        ids = torch.zeros(rows, dtype=torch.int64)
        arguments = (torch.zeros(rows, classes, dtype=dtype), ids, ids, torch.zeros(rows), weight)
        _, gradient = mixed_launcher.mixed_cross_entropy(*arguments, -100, smoothing, reduction, needs, dtype)
        if needs:
            mixed_launcher.mixed_cross_entropy_scale_(
                gradient, torch.ones(rows) if reduction == "none" else torch.ones(())
            )

    for dtype in (torch.bfloat16, torch.float32):
        call_mixed(4096, 1000, dtype)
        report(compiled, dtype)
    patches = importlib.import_module("pyrx._triton.patch_mask")
    for method, losses in enumerate((None, None, torch.zeros(4, 14, 14))):
        patches.patch_mask(seed, losses, (4, 14, 14), method, 147, 40 * (method == 2), 16, -1.2, method != 1)
    compile_noise(seed)
    for packed, width in ((False, 8), (True, 8), (True, 9)):
        kernels.dropout_mask(seed, (4, width), 32768, 0, False, packed)
    compile_blend()
    # large enough for wgmma's tiles, and for two chunks
    launcher.CHUNK_MASK_BYTES = 2**23
    call_head(8192, 2048, 100, torch.bfloat16, bias=False)
    if architecture == 90:
        call_mixed(64, 10, torch.float16, torch.ones(10), "none", smoothing=0.1)
        call_mixed(64, 9001, torch.bfloat16)
        call_mixed(1, 1, torch.float32, needs=False)
        # sizes of one are constants to the compiler, outputs that nobody asked for are None
        call_head(1, 1, 1, torch.float32, thresholds=[1])
        call_head(16, 64, 10, torch.float16, needs=[False] * 3)
        call_head(16, 64, 10, torch.float16, reduction="none")
        call_head(16, 64, 10, torch.float16, backward=True, needs=[False, True, False])
        call_head(16, 64, 10, torch.float16, target=(torch.zeros(16, 10), None, None), weight=torch.ones(10))
        mixed = (torch.zeros(16, dtype=torch.int64), torch.zeros(16, dtype=torch.int64), torch.zeros(16))
        call_head(16, 64, 10, torch.float16, target=mixed, weight=torch.ones(10), thresholds=[1, 2, 3])
        call_head(16, 64, 10, torch.float16, target=mixed, thresholds=[1, 2, 3], averaged=True, antithetic=True)
    report(compiled, None)


def compile_blend():
    blend = importlib.import_module("pyrx._triton.blend")
    for dtype in (torch.uint8, torch.bfloat16, torch.float32):
        images = torch.zeros(4, 3, 32, 32, dtype=dtype)
        for each in (images, images.contiguous(memory_format=torch.channels_last)):
            for alpha in (torch.ones(4, 1, 32, 32), torch.ones(4, 1, 32, 32, dtype=torch.bool)):
                blend.blend(each, each, alpha, torch.arange(4))
                if dtype != torch.uint8:
                    blend.blend_backward(each, each, each, alpha, None, [True] * 3)
                    blend.blend_backward(each, None, None, alpha, None, [True, False, False])


def compile_noise(seed):
    erasing = importlib.import_module("pyrx._triton.random_erasing")
    noise = importlib.import_module("pyrx._triton.noise_mask")
    for dtype in (torch.bfloat16, torch.float32):
        for images in (torch.zeros(4, 3, 16, 16, dtype=dtype), torch.zeros(4, 3, 5, 5, dtype=dtype)):
            noise.noise_mask(images, images[:, :1], seed, 1.0, 0.0, 3)
            noise.noise_mask(images, images, seed, 1.0, 0.0, 3)
            noise.noise_mask_backward(images, seed, True, 1.0, 0.0, 3)
            for kind, filling in ((0, 0), (0, 1), (1, 2)):
                draw = (None, kind, 32768, 1, 2, 0.02, 0.3, 0.3, 3.3, 0, True, filling, [0.0])
                erasing.random_erasing(images, seed, *draw)
                erasing.random_erasing_(images.contiguous(memory_format=torch.channels_last), seed, *draw)


def report(compiled, dtype):
    triton_helpers.report(
        compiled, lambda kernel: {"wgmma": "wgmma" in kernel.asm["ptx"]}, dtype=helpers.name_of(dtype)
    )


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 90])
def test_ahead_of_time(architecture, python, tmp_path):
    script = f"import test_triton; test_triton.compile_ahead_of_time({architecture})"
    found = triton_helpers.ahead_of_time(python, tmp_path, script)
    # which have their own tests
    own = ("batch_mix.py", "block_mass.py", "block_sparse_attention*.py", "masked_update.py", "nm_packed.py")
    own += ("nm_sparsity.py", "nm_transposable.py")
    entries = triton_helpers.kernels_of("*.py").difference(*map(triton_helpers.kernels_of, own))
    assert entries and {each["kernel"] for each in found} == entries
    for each in found:
        assert each["shared"] <= triton_helpers.SHARED_LIMIT[architecture] and each["registers"] <= 255, each
        assert each["stack"] <= STACK_LIMIT[architecture], each
    assert any(each["wgmma"] for each in found) == (architecture == 90)
