"""Masked optimizer steps by the Triton kernels: the reference's bits, see triton_helpers.py."""

import importlib
import re

import helpers
import pytest
import torch
import triton_helpers
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_helpers import INTERPRETED, device_of, here, values_in_the_interpreter

from pyrx.ops.masked_update import masked_adamw, masked_sgd
from pyrx.ops.nm_sparsity import nm_mask, packed_shape
from pyrx.reference.dropout import unpack_bits
from pyrx.reference.masked_update import RULES

launcher = importlib.import_module("pyrx._triton.masked_update")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# (shape, dim, n, m): groups in whole bytes, in one tile and in several; across bytes and rows; along other dimensions
FORMS = [
    ((6, 32), -1, 2, 4),
    ((3, 2048), -1, 3, 8),
    ((2, 3, 64), 2, 1, 32),
    ((256,), 0, 64, 128),
    ((40,), 0, 1, 1),
    ((5, 100), -1, 2, 4),
    ((3, 36), -1, 4, 6),
    ((8, 12, 3, 3), 1, 1, 4),
    ((12, 16), -2, 2, 4),
    ((0, 8), -1, 2, 4),
    ((4, 0), -1, 2, 4),
]
forms = pytest.mark.parametrize("shape, dim, n, m", FORMS, ids=helpers.name_of)
ADAMW = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1}
SGDS = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.25},
    {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.01, "nesterov": True},
]


device = device_of("masked_update")


test_values_in_the_interpreter = values_in_the_interpreter(__file__, 70)


def values_of(shape, dtype, device, seed):
    """Normal, with zeros of both signs, ties and numbers that underflow when squared."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    drawn = torch.randint(0, 12, shape, generator=generator)
    values = torch.where(drawn == 0, 0.0, torch.where(drawn == 1, -0.0, torch.where(drawn == 2, 0.5, values)))
    return torch.where(drawn == 3, values * 1e-6, values).to(device, dtype)


def tensors_of(shape, dtype, device, seed=0, moments=2):
    """(weight, gradient, moments, mask) with a mask that is not the weight's own; moments are None without any."""
    weight, grad, *made = (values_of(shape, dtype, device, seed + i) for i in range(2 + moments))
    if moments == 2:
        made[1] = made[1].abs()
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 256, packed_shape(shape), dtype=torch.uint8, generator=generator).to(device)
    if shape[-1] % 8 and mask.numel():
        mask[..., -1] &= 2 ** (shape[-1] % 8) - 1
    return weight, grad, made, mask


def layouts_of(weight):
    yield "contiguous", weight
    yield "every_second", torch.stack([weight, weight + 1], -1)[..., 0]
    if weight.dim() > 1:
        yield "transposed", weight.transpose(0, -1).contiguous().transpose(0, -1)


def assert_same_step(update, tensors, *form, what="", **options):
    """One step by Triton and by the reference, on copies of the same layouts: every tensor has the same bits."""
    found = []
    for backend in ("triton", "reference"):
        weight, grad, moments, mask = tensors
        written = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
                   for t in (weight, *moments, mask)]  # fmt: skip
        lists = [[each] for each in written[:-1]]
        if update is masked_adamw:
            step = torch.tensor(float(options.pop("step", 3)), device=weight.device)
            update(lists[0], [grad], *lists[1:], [written[-1]], [step], *form, backend=backend, **options)
            options["step"] = step.item()
        else:
            update(lists[0], [grad], lists[1] if moments else [], [written[-1]], *form, backend=backend, **options)
        found.append(written)
    for i, (one, other) in enumerate(zip(*found, strict=True)):
        helpers.assert_same_bits(one, other, f"{what}, tensor {i}, {options}")
    return found[0]


@forms
@pytest.mark.parametrize("rule", RULES)
def test_adamw(device, rule, shape, dim, n, m):
    for i, dtype in enumerate(here(DTYPES, n)):
        options = {**ADAMW, "dim": dim, "rule": rule, "strength": 0.3, "magnitude": i != 1, "step": 1 + 5 * i}
        weight, grad, *others = tensors_of(shape, dtype, device)
        for (name, each), (_, its) in zip(layouts_of(weight), reversed([*layouts_of(grad)]), strict=True):
            moved = assert_same_step(masked_adamw, (each, its, *others), n, m, what=name, **options)
        expected = nm_mask(moved[0], n, m, dim=dim, magnitude=i != 1, packed=True, backend="reference")
        assert torch.equal(moved[-1], expected)
        assert weight.numel() == 0 or not torch.equal(moved[0], weight)


@forms
@pytest.mark.parametrize("rule", RULES)
def test_sgd(device, rule, shape, dim, n, m):
    for i, settled in enumerate(here(SGDS, n)):
        options = {**settled, "dim": dim, "rule": rule, "strength": 0.3, "maximize": i == 1}
        tensors = tensors_of(shape, DTYPES[i % 3], device, moments=int("momentum" in settled))
        assert_same_step(masked_sgd, tensors, n, m, **options)


@pytest.mark.parametrize("changes", [
    {"beta1": 0.3}, {"beta1": 0.5}, {"beta1": 0.0, "beta2": 0.0}, {"maximize": True}, {"weight_decay": 0.0},
    {"lr": 0.0}, {"lr": 0.9, "weight_decay": 0.77}, {"eps": 0.1}, {"step": 1}, {"step": 100_001}, {"step": 2**24},
    {"refresh": False},
], ids=str)  # fmt: skip
def test_options_of_adamw(device, changes):
    for dtype in here(DTYPES, 2):
        tensors = tensors_of((7, 48), dtype, device, 5)
        for rule in RULES:
            found = assert_same_step(masked_adamw, tensors, 2, 4, **{**ADAMW, "rule": rule, **changes})
        assert torch.equal(found[-1], tensors[-1]) == ("refresh" in changes)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU compiles a kernel an example")
@settings(max_examples=60)
@given(st.data())
def test_drawn_steps(data):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    dim, m = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 12))
    shape[dim] = m * data.draw(st.integers(1, 4))
    number = st.just(0.0) | st.floats(2.0**-40, 0.99)
    options = {"dim": dim - data.draw(st.sampled_from((0, len(shape)))), "rule": data.draw(st.sampled_from(RULES))}
    options |= {"lr": data.draw(number), "weight_decay": data.draw(number), "maximize": data.draw(st.booleans())}
    adamw = data.draw(st.booleans())
    if adamw:
        options |= {"beta1": data.draw(number), "beta2": data.draw(number), "step": data.draw(st.integers(1, 9999))}
    else:
        options |= {"momentum": data.draw(number), "dampening": data.draw(number), "nesterov": data.draw(st.booleans())}
    moments = 2 if adamw else int(options["momentum"] != 0)
    tensors = tensors_of(shape, data.draw(st.sampled_from(DTYPES)), "cpu", data.draw(st.integers(0, 9)), moments)
    n = data.draw(st.integers(1, m))
    assert_same_step(masked_adamw if adamw else masked_sgd, tensors, n, m, **options)


@pytest.mark.parametrize("m", [4, 6])
def test_held_weights_keep_every_bit(device, m):
    """Even NaN of any payload, and whatever their gradients are."""
    for dtype in DTYPES:
        weight, grad, moments, mask = tensors_of((4, 96), dtype, device)
        kind = {2: torch.int16, 4: torch.int32}[weight.element_size()]
        info = torch.iinfo(kind)
        for each in (weight, *moments):
            each.view(kind).copy_(torch.randint(info.min, info.max, each.shape, device=device).to(kind))
        before = [helpers.bits(each).clone() for each in (weight, *moments)]
        kept = unpack_bits(mask, 96)
        masked_adamw([weight], [grad], *([each] for each in moments), [mask], [torch.ones((), device=device)], 2, m,
                     backend="triton", **ADAMW)  # fmt: skip
        for each, bits in zip((weight, *moments), before, strict=True):
            assert torch.equal(helpers.bits(each)[~kept], bits[~kept])


def test_many_weights(device):
    """Lists of weights, each with a step of its own; a rate that a tensor holds."""
    shapes = ((4, 32), (8, 20), (16,), (8, 4, 3, 3))
    rate = torch.tensor([0.02], dtype=torch.float64, device=device)
    for update, moments in ((masked_adamw, 2), (masked_sgd, 1)):
        found = []
        for backend in ("triton", "reference"):
            made = [tensors_of(shape, torch.float32, device, i, moments) for i, shape in enumerate(shapes)]
            weights, grads, _, masks = (list(each) for each in zip(*made, strict=True))
            lists = [list(each) for each in zip(*(made[i][2] for i in range(4)), strict=True)]
            if update is masked_adamw:
                steps = [torch.full((1,), 1.0 + i, device=device) for i in range(4)]
                update(weights, grads, *lists, masks, steps, 1, 4, dim=0, lr=rate, weight_decay=0.3, backend=backend)
            else:
                update(weights, grads, *lists, masks, 1, 4, dim=0, lr=rate, momentum=0.5, backend=backend)
            found.append([*weights, *(each for one in lists for each in one), *masks])
        for one, other in zip(*found, strict=True):
            helpers.assert_same_bits(one, other)
        empty = [[]] * (6 if update is masked_adamw else 4)
        update(*empty, 2, 4, backend="triton")


def test_one_program_goes_through_all_tiles(device, monkeypatch):
    monkeypatch.setattr(launcher, "PROGRAMS", 2)
    for shape in ((50, 64), (130, 20)):
        assert_same_step(masked_adamw, tensors_of(shape, torch.bfloat16, device), 2, 4, **ADAMW)
        assert_same_step(masked_sgd, tensors_of(shape, torch.float32, device, moments=1), 2, 4, momentum=0.5)


def test_wide_indices(device, monkeypatch):
    """The arithmetic of tensors of 2^31 elements, on few."""
    monkeypatch.setattr(launcher, "WIDE", 0)
    for shape in ((9, 64), (9, 20)):
        assert_same_step(masked_adamw, tensors_of(shape, torch.float32, device), 2, 4, **ADAMW)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="a GPU's graphs")
def test_graph_reads_step_and_rate_when_replayed():
    helpers.need("triton", "cuda", ops=("masked_update",))
    weight, grad, moments, mask = tensors_of((64, 128), torch.float32, "cuda")
    step, rate = torch.ones((), device="cuda"), torch.tensor(0.1, dtype=torch.float64, device="cuda")
    tensors = (weight, *moments, mask)
    same = [each.clone() for each in tensors]

    def update(backend, weight, exp_avg, exp_avg_sq, mask):
        masked_adamw(
            [weight], [grad], [exp_avg], [exp_avg_sq], [mask], [step], 2, 4, lr=rate, backend=backend
        )  # fmt: skip

    graph, _ = helpers.capture(lambda: update("triton", *tensors))
    update("reference", *same)  # as the run before the capture
    for value in (0.05, 0.01):
        rate.fill_(value)
        step.add_(1)
        grad.normal_()
        graph.replay()
        update("reference", *same)
        for one, other in zip(tensors, same, strict=True):
            helpers.assert_same_bits(one, other)


def test_entries_check(device):
    ops = torch.ops.pyrx_triton
    weight, grad, (first, second), mask = tensors_of((4, 32), torch.float32, device)
    step = torch.ones((), device=device)
    rest = (None, 2, 4, 1, True, 0, 0.0, True, 0.1)
    adamw, sgd = (0.9, 0.99, 1e-8, 0.0, False), (0.0, 0.0, 0.0, False, False)
    before = weight.clone()
    with pytest.raises(TypeError, match="masked_adamw.*float64"):
        doubles = [[each.double()] for each in (weight, grad, first, second)]
        ops.masked_adamw(*doubles, [mask], [step], *rest, *adamw)
    with pytest.raises(TypeError, match="masked_sgd.*float64"):
        ops.masked_sgd([weight.double()], [grad.double()], [], [mask], *rest, *sgd)
    with pytest.raises(ValueError, match=r"masked_adamw: expected grads\[1\] of shape of its weight"):
        both = [[each, each] for each in (weight, grad, first, second, mask, step)]
        both[1][1] = grad[:2]
        ops.masked_adamw(*both, *rest, *adamw)
    with pytest.raises(ValueError, match="momentum_buffers to be empty"):
        ops.masked_sgd([weight], [grad], [first], [mask], *rest, *sgd)
    helpers.assert_same_bits(weight, before)


# Ahead of time.


def compile_ahead_of_time(architecture):
    """Prints one JSON line a compiled kernel: the call, registers, stack, shared memory, its instructions."""
    compiled = triton_helpers.compile_launches(architecture)

    def instructions(kernel):
        ptx = kernel.asm["ptx"]
        return {
            "allowed": kernel.metadata.enable_fp_fusion,
            "fused": len(re.findall(r"\b(?:fma|mad)\.(?:rn|rz|rm|rp)[\w.]*f32", ptx)),
            "rounded": sorted(set(re.findall(r"\b(?:div|sqrt|rcp)\.[\w.]*f\d+", ptx))),
            "reads": sorted(set(re.findall(r"ld\.global[\w.:]*?\.((?:v\d\.)?b\d+)", ptx))),
            "writes": sorted(set(re.findall(r"st\.global[\w.:]*?\.((?:v\d\.)?b\d+)", ptx))),
        }

    def adamw(shape, dtype, n, m, dim, call, lr=1e-3, weight_decay=1e-2, rule=0, beta1=0.9, rate=None):
        weight, grad, moments, mask = tensors_of(shape, dtype, "cpu")
        launcher.masked_adamw(
            [weight], [grad], *([each] for each in moments), [mask], [torch.ones(())], rate, n, m, dim, True, rule,
            1e-4, True, lr, beta1, 0.999, 1e-8, weight_decay, False,
        )  # fmt: skip
        if call:
            report(call)

    def report(call):
        triton_helpers.report(
            {hash: found for hash, found in compiled.items() if found[0] in ("_adamw_kernel", "_sgd_kernel")},
            instructions,
            call=call,
        )
        compiled.clear()

    for dtype in (torch.bfloat16, torch.float32):
        for n, m in ((2, 4), (1, 16), (2, 32)):
            for rule in (0, 1):
                adamw((256, 256), dtype, n, m, 1, "adamw", rule=rule)
        adamw((64, 64, 3, 3), dtype, 2, 4, 1, "odd", beta1=0.4, rate=torch.ones((), dtype=torch.float64))
        adamw((1, 1), dtype, 1, 1, 0, "odd")
        adamw((1, 4), dtype, 2, 4, 1, "odd")
        for momentum in (0.0, 0.9):
            weight, grad, moments, mask = tensors_of((256, 256), dtype, "cpu", moments=int(momentum > 0))
            launcher.masked_sgd(
                [weight], [grad], moments, [mask], None, 2, 4, 1, True, 1, 1e-4, True, 0.1,
                momentum, 0.0, 0.1, momentum > 0, False,
            )  # fmt: skip
            report("sgd")
    # numbers compile nothing of their own
    for lr in (1e-3, 5e-4, 1.0):
        adamw((256, 256), torch.float32, 2, 4, 1, "", lr, 10 * lr)
    assert len(compiled) == 1
    report("adamw")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 90])
def test_ahead_of_time(architecture, python, tmp_path):
    script = f"import test_triton_masked_update as test; test.compile_ahead_of_time({architecture})"
    found = triton_helpers.ahead_of_time(python, tmp_path, script)
    assert {each["kernel"] for each in found} == triton_helpers.kernels_of("masked_update.py")
    for each in found:
        assert each["shared"] <= 8192 and each["stack"] == 0, each
        assert each["registers"] <= (168 if each["call"] == "odd" else 112), each
        assert set(each["rounded"]) <= {"div.rn.f64", "sqrt.rn.f64", "div.rn.f32", "sqrt.rn.f32"}, each
        assert not each["fused"] and not each["allowed"], each
        if each["call"] != "odd":
            assert "v4.b32" in each["reads"] and "v4.b32" in each["writes"], each
