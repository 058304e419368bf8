"""The CUDA C++ backend on a GPU: parity, graphs, devices, determinism, hostile class ids, memory."""

import numpy as np
import pytest
import torch
from helpers import (
    COMBINES,
    FLOATS,
    NAMES,
    REDUCTIONS,
    SAMPLINGS,
    TARGETS,
    assert_head_within_budget,
    assert_same_bits,
    assert_within_budget,
    capture,
    expected_mask,
    layouts,
    make_head,
    name_of,
    need,
    philox,
    run,
)

import pyrx
from pyrx import _backends

pytestmark = pytest.mark.gpu

SIZES = [(1, 3, 1), (5, 1, 2), (37, 63, 100), (64, 1311, 10), (100, 100, 1311), (128, 512, 1000)]


@pytest.fixture(autouse=True)
def cuda(poison):
    return need("cuda", "cuda")


def others():
    """Backends that make masks here, beside cuda."""
    found = [("reference", "cuda"), ("reference", "cpu")]
    for backend, device in (("triton", "cuda"), ("cpu", "cpu")):
        if not _backends.reasons("dropout", backend, device):
            found.append((backend, device))
    return found


# Masks and copies.


@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (7, 63), (3, 0), (2, 3, 100), (5, 1311), (1 << 20,)], ids=name_of)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_masks_are_the_same_everywhere(shape, sampling):
    for p, sample in ((0.5, 0), (0.3, 3), (0.0, 1), (0.999999, 2**32 - 1)):
        for packed in (False, True):
            options = {"packed": packed, "sampling": sampling}
            got = pyrx.dropout_mask(shape, p, -11, sample, device="cuda", backend="cuda", **options).cpu()
            if not packed:
                assert torch.equal(got, expected_mask(shape, p, -11, sample, sampling))
            for backend, device in others():
                other = pyrx.dropout_mask(shape, p, -11, sample, device=device, backend=backend, **options)
                assert torch.equal(got, other.cpu()), (backend, device, p, packed)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("shape", [(1,), (3,), (100,), (33, 1311), (2, 3, 4, 5), (1000003,)], ids=name_of)
def test_dropout_has_the_references_bits(dtype, shape):
    x = torch.randn(shape, dtype=torch.float64, device="cuda").to(dtype)
    hostile = x.clone()
    hostile.view(-1)[::7] = torch.nan
    assert_same_bits(pyrx.dropout(hostile, 0.0, seed=9, backend="cuda"), hostile)
    for p in (0.3, 0.999999):
        options = {"sample": 5, "seed": 9}
        got = pyrx.dropout(x, p, backend="cuda", **options)
        assert_same_bits(got, pyrx.dropout(x, p, backend="reference", **options))
        got = pyrx.dropout(hostile, p, backend="cuda", **options)
        assert torch.equal(got.isnan(), hostile.isnan() & pyrx.dropout_mask(shape, p, 9, 5, device="cuda"))
    for samples, each in ((1, 0.5), (3, [0.0, 0.3, 0.7]), (8, 0.5), (70, [m / 80 for m in range(70)])):
        for sampling in SAMPLINGS:
            options = {"sampling": sampling, "seed": 9}
            got = pyrx.multi_sample_dropout(x, samples, each, backend="cuda", **options)
            assert_same_bits(got, pyrx.multi_sample_dropout(x, samples, each, backend="reference", **options))


@pytest.mark.parametrize("shape", [(5, 13), (2, 3, 7, 5), (2, 8, 4, 4, 6)], ids=name_of)
def test_copies_of_any_layout(shape):
    for name, x in layouts(shape, torch.bfloat16):
        x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x).requires_grad_()
        upstream = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)).to(x)

        def both_ways(backend, x, upstream, name=name):
            one = pyrx.dropout(x, 0.3, seed=3, backend=backend)
            many = pyrx.multi_sample_dropout(x, 3, 0.3, seed=3, backend=backend)
            assert one.stride() == torch.empty_like(x).stride(), name
            assert many.stride()[1:] == one.stride(), name
            folded, masked = torch.autograd.grad(many, x, upstream)[0], torch.autograd.grad(one, x, upstream[0])[0]
            return one.detach(), many.detach(), masked, folded

        (*got, folded), (*expected, plain) = (both_ways(each, x, upstream) for each in ("cuda", "reference"))
        for ours, theirs in zip(got, expected, strict=True):
            assert_same_bits(ours, theirs, name)
        exact = both_ways("reference", x.detach().double().requires_grad_(), upstream.double())[-1]
        assert_within_budget(folded, plain, exact, name)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_fold_within_budget(dtype):
    x = torch.randn(33, 1311, device="cuda", dtype=torch.float64)
    upstream = torch.randn(8, 33, 1311, device="cuda", dtype=torch.float64).to(dtype)

    def gradient(to, backend):
        leaf = x.to(to).requires_grad_()
        copies = pyrx.multi_sample_dropout(leaf, 8, 0.3, seed=1, backend=backend)
        return torch.autograd.grad(copies, leaf, upstream.to(to))[0]

    exact = gradient(torch.float64, "reference")
    assert_within_budget(gradient(dtype, "cuda"), gradient(dtype, "reference"), exact, "fold")


# The head's values and gradients.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_head(dtype, reduction, target):
    ignored = 0.0 if target == "probabilities" else 0.3
    head = make_head(37, 100, 12, target, class_weight=True, ignored=ignored, dtype=dtype, device="cuda")
    for sampling in SAMPLINGS:
        for combine in COMBINES:
            options = {"sampling": sampling, "combine": combine, "reduction": reduction, "label_smoothing": 0.1}
            assert_head_within_budget(head, "cuda", seed=5, num_samples=5, **options)


@pytest.mark.parametrize("size", SIZES, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_head_sizes(dtype, size):
    head = make_head(*size, dtype=dtype, device="cuda")
    for samples in (1, 2, 3, 8):
        for sampling in SAMPLINGS:
            assert_head_within_budget(head, "cuda", seed=5, num_samples=samples, sampling=sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_head_in_many_chunks_and_slices(dtype, sampling):
    rows, samples = (1500, 16) if dtype == torch.float64 else (6000, 16)
    head = make_head(rows, 511, 1001, dtype=dtype, device="cuda")
    assert_head_within_budget(head, "cuda", seed=5, num_samples=samples, sampling=sampling)
    head = make_head(40, 64, 12, dtype=dtype, device="cuda")
    assert_head_within_budget(head, "cuda", seed=5, num_samples=130, sampling=sampling)
    uneven = [m / 200 for m in range(130)]
    assert_head_within_budget(head, "cuda", seed=5, num_samples=130, sampling=sampling, p=uneven)


@pytest.mark.parametrize("needs", [(False, True, True), (True, False, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_what_is_asked_for(reduction, needs):
    head = make_head(37, 64, 12, device="cuda")
    assert_head_within_budget(head, "cuda", seed=5, num_samples=4, reduction=reduction, needs=needs)


def test_head_of_the_cpu_is_the_gpus():
    need("cpu")
    head = make_head(37, 100, 12, "mixed", ignored=0.2, class_weight=True, dtype=torch.float64)
    for sampling in SAMPLINGS:
        here, there = (
            run(each, backend=backend, seed=3, sampling=sampling, num_samples=7)
            for each, backend in ((head, "cpu"), (head.cuda(), "cuda"))
        )
        torch.testing.assert_close(there[0].cpu(), here[0])
        for name in NAMES:
            torch.testing.assert_close(there[1][name].cpu(), here[1][name])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_batch_and_all_ignored(reduction):
    for rows, ignored in ((0, 0.0), (6, 1.1)):
        head = make_head(rows, 16, 5, ignored=ignored, device="cuda")
        loss, gradients = run(head, backend="cuda", seed=1, reduction=reduction)
        expected, _ = run(head, backend="reference", seed=1, reduction=reduction)
        assert_same_bits(loss.isnan(), expected.isnan())
        assert loss.nan_to_num().eq(0).all()
        for name, gradient in gradients.items():
            assert gradient.shape == getattr(head, name).shape
            assert gradient.eq(0).all(), name


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_class_id_out_of_range_is_nan(dtype):
    head = make_head(9, 16, 5, dtype=dtype, device="cuda")
    for bad in (5, -1, 2**62, -(2**62)):
        head.target[4] = bad
        for sampling in SAMPLINGS:
            loss, gradients = run(head, backend="cuda", seed=1, num_samples=4, sampling=sampling, reduction="none")
            assert loss.isnan().nonzero().flatten().tolist() == [4]
            assert gradients["input"].isnan().any(1).nonzero().flatten().tolist() == [4]
            assert run(head, backend="cuda", seed=1, reduction="mean")[0].isnan()
    torch.cuda.synchronize()


def test_hostile_features():
    head = make_head(9, 16, 5, device="cuda")
    for hostile in (torch.nan, torch.inf):
        head.input[3] = hostile
        for sampling in SAMPLINGS:
            loss, gradients = run(head, backend="cuda", seed=1, num_samples=4, sampling=sampling, reduction="none")
            assert loss.isnan().nonzero().flatten().tolist() == [3]
            assert gradients["input"].isfinite().all(1).sum() == 8


# Where and when it runs.


def step(head, seed, backend="cuda", **options):
    options = {"num_samples": 8, "p": 0.3, "upstream": torch.ones_like, **options}
    loss, gradients = run(head, backend=backend, seed=seed, **options)
    return loss, *gradients.values()


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_same_bits_from_run_to_run(dtype, sampling):
    head = make_head(300, 512, 1000, dtype=dtype, device="cuda")
    first = step(head, 7, sampling=sampling)
    for _ in range(3):
        for got, expected in zip(step(head, 7, sampling=sampling), first, strict=True):
            assert_same_bits(got, expected)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_graph_replays_with_another_seed(dtype, sampling):
    head = make_head(64, 256, 100, dtype=dtype, device="cuda")
    seed = torch.zeros((), dtype=torch.int64, device="cuda")

    def everything():
        copies = pyrx.multi_sample_dropout(head.input, 3, 0.3, sampling=sampling, seed=seed, backend="cuda")
        return *step(head, seed, sampling=sampling), copies, pyrx.dropout(head.input, 0.3, seed=seed, backend="cuda")

    graph, captured = capture(everything)
    for value in (0, 12345, -1):
        seed.fill_(value)
        graph.replay()
        replayed = [each.clone() for each in captured]
        for got, expected in zip(replayed, everything(), strict=True):
            assert_same_bits(got, expected, f"seed {value}")


def test_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    head = make_head(64, 256, 100, device="cuda:0")
    there = make_head(64, 256, 100, device="cuda:1")
    assert torch.cuda.current_device() == 0
    for got, expected in zip(step(there, 7), step(head, 7), strict=True):
        assert got.device.index == 1
        torch.testing.assert_close(got.cpu(), expected.cpu())
    assert pyrx.dropout_mask((5, 8), 0.5, 1, device="cuda:1", backend="cuda").device.index == 1
    with pytest.raises(RuntimeError, match="expected seed on device cuda:1"):
        pyrx.dropout(there.input, seed=torch.zeros((), dtype=torch.int64, device="cuda:0"), backend="cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_autocast(dtype):
    head = make_head(64, 256, 100, device="cuda")
    with torch.autocast("cuda", dtype):
        loss, gradients = run(head, backend="cuda", seed=3)
        plain_loss, plain = run(head, backend="reference", seed=3)
    exact_loss, exact = run(head.to(torch.float64), backend="reference", seed=3)
    assert loss.dtype == torch.float32
    assert_within_budget(loss, plain_loss, exact_loss, "loss", slack=2**14)
    for name in NAMES:
        eps = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        assert_within_budget(gradients[name], plain[name], exact[name], name, slack=2 * eps)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles(reduction):
    head = make_head(64, 256, 100, device="cuda")
    seed = torch.full((), 3, device="cuda")

    def loss(x, w):
        return pyrx.multi_sample_dropout_cross_entropy(
            x, w, head.target, num_samples=4, seed=seed, reduction=reduction, backend="cuda"
        ).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        x, w = head.input.detach().requires_grad_(), head.linear_weight.detach().requires_grad_()
        value = function(x, w)
        results.append([value.detach(), *torch.autograd.grad(value, (x, w))])
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected)


def test_opcheck():
    head = make_head(12, 24, 5, device="cuda")
    seed = torch.full((), 3, device="cuda")
    x, w, b = (each.detach().requires_grad_() for each in (head.input, head.linear_weight, head.linear_bias))
    ops = torch.ops.pyrx
    for packed in (False, True):
        torch.library.opcheck(ops.dropout_mask.default, (seed, [3, 100], 19661, 3, True, packed))
    torch.library.opcheck(ops.dropout.default, (x, seed, 19661, 3))
    torch.library.opcheck(ops.multi_sample_dropout.default, (x, seed, [19661] * 3, True))
    upstream = torch.randn(3, 5, device="cuda")
    torch.library.opcheck(ops.multi_sample_dropout_fold.default, (upstream, seed, [1] * 3, True))
    tensors = (head.target, None, None, None, seed, [32768] * 4, True, False, -100, 0.1)
    for reduction in REDUCTIONS:
        torch.library.opcheck(
            ops.multi_sample_dropout_cross_entropy.default, (x, w, b, *tensors, reduction, [True] * 3, torch.float32)
        )
    upstream = torch.randn(12, device="cuda")
    torch.library.opcheck(
        ops.multi_sample_dropout_cross_entropy_backward.default,
        (upstream, head.input, head.linear_weight, head.linear_bias, *tensors, [True, True, True]),
    )


def test_errors_come_before_any_launch():
    head = make_head(6, 16, 5, device="cuda")
    x, w = head.input, head.linear_weight
    ops, seed = torch.ops.pyrx, torch.zeros((), dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="expected seed on device cuda:0"):
        ops.dropout(x, seed.cpu(), 1, 0)
    with pytest.raises(TypeError, match="expected input of dtype float16"):
        ops.dropout(x.int(), seed, 1, 0)
    rest = (None, None, None, seed, [1], False, False, -100, 0.0, "mean", [True] * 3, torch.float32)
    with pytest.raises(ValueError, match=r"expected linear_weight of shape \[C, D\] with D = 16"):
        ops.multi_sample_dropout_cross_entropy(x, w[:, :8], None, head.target, *rest)
    with pytest.raises(ValueError, match=r"expected target of shape \[B\]"):
        ops.multi_sample_dropout_cross_entropy(x, w, None, head.target[:3], *rest)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("classes", [10, 1100])
def test_slices_with_pairs_and_without(order, classes):
    p = [0.5] * 64 + [0.3] * 64
    head = make_head(7, 40, classes, device="cuda")
    assert_head_within_budget(head, "cuda", seed=5, num_samples=128, p=p[::order], sampling="antithetic")


def peak_memory(head, **options):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(head, 3, **options)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("options", [{}, {"p": 0.5, "sampling": "antithetic"}, {"combine": "logits"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_memory_does_not_grow_with_samples(dtype, options):
    head = make_head(16384, 1024, 1000, dtype=dtype, device="cuda")
    peak_memory(head, num_samples=1)  # cuBLAS takes its workspace
    one, many = (peak_memory(head, num_samples=samples, **options) for samples in (1, 32))
    assert many <= 1.1 * one + 2**20, f"M = 1: {one / 2**20:.1f} MiB, M = 32: {many / 2**20:.1f} MiB"


def test_more_than_2_to_the_31_elements():
    numel, first = 2**31 + 24, 2**28 - 2
    if torch.cuda.mem_get_info()[0] < 6 * numel:
        pytest.skip("not enough memory")
    groups = np.arange(first, first + 5, dtype=np.uint64)
    words = philox((groups, groups * 0, groups * 0, groups * 0), (3, 0))
    u = np.stack([half for word in words for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))], 1).reshape(-1)
    kept = torch.from_numpy(u >= 32768)
    x = torch.ones(numel, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(pyrx.dropout(x, 0.5, seed=3, backend="cuda")[8 * first :].cpu() != 0, kept)
    assert torch.equal(pyrx.dropout_mask((numel,), 0.5, 3, device="cuda", backend="cuda")[8 * first :].cpu(), kept)
