"""N:M sparsity by the Triton kernels: the reference's bits, see triton_helpers.py."""

import importlib
import itertools
import re

import helpers
import pytest
import torch
import triton_helpers
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_helpers import INTERPRETED, device_of, here, values_in_the_interpreter

import pyrx
from pyrx.ops.nm_sparsity import ESTIMATORS
from pyrx.reference.nm_sparsity import FACTOR, REGULARIZE, ZERO

kernels = importlib.import_module("pyrx._triton.nm_sparsity")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# (shape, dim, n, m, pad): whole groups in rows, rows of several programs, groups across bytes and rows' ends, padded
# groups, other dimensions with rows of whole and of padded bytes, n found bit by bit
FORMS = [
    ((16, 32), -1, 2, 4, False),
    ((3, 728), -1, 3, 8, False),
    ((5, 4), -1, 1, 4, False),
    ((5, 100), -1, 2, 4, False),
    ((2, 2, 64), -1, 1, 32, False),
    ((3, 256), -1, 17, 64, False),
    ((2, 256), -1, 127, 128, False),
    ((64,), 0, 1, 1, False),
    ((7, 10), -1, 1, 2, False),
    ((3, 36), -1, 4, 6, False),
    ((2, 300), -1, 19, 20, False),
    ((3, 37), -1, 3, 5, True),
    ((6, 3), -1, 5, 8, True),
    ((16, 32), 0, 2, 4, False),
    ((8, 24, 3, 3), 1, 1, 4, False),
    ((9, 2, 16), 0, 3, 8, True),
    ((7, 6, 1), 1, 2, 3, False),
    ((5, 1), 0, 2, 4, True),
    ((2, 128, 5), 1, 64, 128, False),
    ((20, 300), 0, 4, 16, True),
    ((2, 3, 4, 10), 2, 2, 4, False),
    ((0, 8), 1, 2, 4, False),
    ((4, 0), 1, 2, 4, False),
    ((0, 8), 0, 2, 4, False),
]
forms = pytest.mark.parametrize("shape, dim, n, m, pad", FORMS, ids=helpers.name_of)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=helpers.name_of)


device = device_of("nm_sparsity")


test_values_in_the_interpreter = values_in_the_interpreter(__file__, 250)


def scores_of(shape, dtype, device="cpu", seed=0):
    """Few values, so that many are tied, among them zeros, infinities and NaNs of both signs, and denormals."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).round().div(4).to(dtype)
    kind = {2: torch.int16, 4: torch.int32}[values.element_size()]
    infinity = int(torch.full((), torch.inf, dtype=dtype).view(kind))
    lowest = torch.iinfo(kind).min
    special = [
        0,
        lowest,
        1,
        2,
        lowest + 1,
        infinity,
        infinity + lowest,
        infinity + 1,
        infinity + 5,
        infinity + lowest + 3,
    ]
    special = torch.tensor(special, dtype=kind).view(dtype)
    drawn = torch.randint(0, 3 * len(special), values.shape, generator=generator)
    return torch.where(drawn < len(special), special[drawn % len(special)], values).to(device)


def laid_out(values):
    """(name, tensor) of the layouts that a launcher tells apart."""
    yield "contiguous", values
    yield "every_second", torch.stack([values, values + 1], -1)[..., 0]
    if values.dim() > 1:
        yield "transposed", values.transpose(0, -1).contiguous().transpose(0, -1)
        yield "expanded", values[:1].expand(values.shape)
    if values.dim() == 4:
        yield "channels_last", values.contiguous(memory_format=torch.channels_last)


def assert_same_but_nan(got, expected, what=""):
    """The same bits, but any NaN for a NaN that has been calculated with."""
    assert got.dtype == expected.dtype and torch.equal(got.isnan(), expected.isnan()), what
    helpers.assert_same_bits(got.nan_to_num(0.0), expected.nan_to_num(0.0), what)


# Masks.


@forms
@pytest.mark.parametrize("magnitude, packed", [(True, True), (False, False), (True, False), (False, True)])
def test_masks(device, shape, dim, n, m, pad, magnitude, packed):
    options = {"dim": dim, "magnitude": magnitude, "packed": packed, "pad": pad}
    for i, dtype in enumerate(here(DTYPES, m + magnitude)):
        for name, scores in itertools.islice(laid_out(scores_of(shape, dtype, device)), 5 if i == 0 else 1):
            got, expected = (pyrx.nm_mask(scores, n, m, backend=b, **options) for b in ("triton", "reference"))
            assert got.dtype == expected.dtype and torch.equal(got, expected), (name, dtype)
            assert packed or got.stride() == torch.empty_like(scores).stride(), name


@pytest.mark.skipif(not INTERPRETED, reason="a GPU compiles three kernels an n")
@pytest.mark.parametrize("m", range(1, 17))
def test_every_n(device, m):
    scores = scores_of((3, 8 * m), torch.bfloat16, device, m)
    for n in range(1, m + 1):
        for each, dim in ((scores, 1), (scores.t().contiguous(), 0), (scores[:, : 2 * m], 1)):
            got, expected = (pyrx.nm_mask(each, n, m, dim=dim, packed=True, backend=b) for b in ("triton", "reference"))
            assert torch.equal(got, expected), (n, dim)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU compiles a kernel an example")
@settings(max_examples=100)
@given(st.data())
def test_drawn_forms(data):
    shape = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    dim = data.draw(st.integers(0, len(shape) - 1))
    m = data.draw(st.integers(1, 20))
    pad = data.draw(st.booleans())
    shape[dim] = shape[dim] if pad else m * data.draw(st.integers(1, 5))
    n, dtype = data.draw(st.integers(1, m)), data.draw(st.sampled_from(DTYPES))
    scores = scores_of(shape, dtype, seed=data.draw(st.integers(0, 9)))
    scores = scores.permute(data.draw(st.permutations(range(len(shape))))).contiguous().view(shape)
    options = {"dim": dim, "magnitude": data.draw(st.booleans()), "packed": data.draw(st.booleans()), "pad": pad}
    got, expected = (pyrx.nm_mask(scores, n, m, backend=b, **options) for b in ("triton", "reference"))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("shape, dim", [((3, 24), 1), ((3, 20), 1), ((8, 24), 0), ((8, 5, 3), 0)], ids=helpers.name_of)
def test_wide_indices(device, monkeypatch, shape, dim):
    """The arithmetic of tensors of 2^31 elements, on few."""
    monkeypatch.setattr(kernels, "WIDE", 0)
    weight = scores_of(shape, torch.float32, device)
    for n, m in ((2, 4), (1, 4)):
        found = [pyrx.nm_sparsify(weight, n, m, dim=dim, estimator="hard", backend=b) for b in ("triton", "reference")]
        helpers.assert_same_bits(*found)
        bits = pyrx.nm_mask(weight, n, m, dim=dim, packed=True, backend="triton")
        helpers.assert_same_bits(torch.ops.pyrx_triton.nm_apply(weight, bits, ZERO, None, None, 0.0), found[1])


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="a GPU's memory")
def test_far_elements():
    helpers.need("triton", "cuda", ops=("nm_sparsity",))
    rows, tail = 2**31 // 4096 + 2, torch.randn(4, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.zeros(rows, 4096, device="cuda", dtype=torch.bfloat16)
    weight[-4:] = tail
    for m in (4, 6):
        options = {"pad": True, "backend": "triton"}
        expected = pyrx.nm_mask(tail, 2, m, pad=True, packed=True, backend="reference")
        assert torch.equal(pyrx.nm_mask(weight, 2, m, packed=True, **options)[-4:], expected)
        kept = pyrx.nm_sparsify(weight, 2, m, **options)[-4:]
        helpers.assert_same_bits(kept, pyrx.nm_sparsify(tail, 2, m, pad=True, backend="reference"))
    expected = pyrx.nm_mask(tail, 2, 4, dim=0, backend="reference")
    assert torch.equal(pyrx.nm_mask(weight[2:], 2, 4, dim=0, pad=True, backend="triton")[-4:], expected)


# Weights.


def call(weight, upstream, **options):
    """(result, gradient)"""
    weight = weight.detach().requires_grad_()
    result = pyrx.nm_sparsify(weight, **options)
    return result.detach(), torch.autograd.grad(result, weight, upstream)[0]


def assert_sparse(weight, upstream, **options):
    """Result and gradient have the reference's bits, kept elements the weight's own."""
    got, expected = (call(weight, upstream, backend=b, **options) for b in ("triton", "reference"))
    for one, other in zip(got, expected, strict=True):
        assert_same_but_nan(one, other, str(options))
    plain = pyrx.nm_sparsify(weight, backend="reference", **{**options, "estimator": "hard", "decay": 1.0})
    kept = helpers.bits(plain) == helpers.bits(weight)
    assert torch.equal(helpers.bits(got[0])[kept], helpers.bits(weight)[kept])
    assert got[0].stride() == torch.empty_like(weight).stride()
    return got


@forms
@pytest.mark.parametrize("estimator", ESTIMATORS if INTERPRETED else ("sr-ste", "mdgf-scaled"))
def test_sparsify(device, shape, dim, n, m, pad, estimator):
    for i, dtype in enumerate(here(DTYPES, n)):
        upstream = scores_of(shape, dtype, device, 1)
        made = list(laid_out(scores_of(shape, dtype, device)))
        for name, weight in made[:: len(made) - 1][: 1 + (i == 0)]:
            options = {"n": n, "m": m, "dim": dim, "pad": pad, "estimator": estimator, "decay": 0.3, "strength": 0.1}
            result, gradient = assert_sparse(weight, upstream, **options)
            assert gradient.shape == result.shape, name


@dtypes
@pytest.mark.parametrize("shape, dim", [((6, 64), 1), ((8, 20), 0), ((4, 20), 1)], ids=helpers.name_of)
def test_other_scores_and_masks(device, shape, dim, dtype):
    weight, upstream = scores_of(shape, dtype, device), torch.randn(shape).to(device, dtype)
    form = {"n": 2, "m": 4, "dim": dim, "decay": 0.25, "strength": 0.5}
    for estimator in here(ESTIMATORS, 2):
        options = {**form, "estimator": estimator}
        for scores in (
            torch.randn(shape, device=device),
            scores_of(shape, torch.float16, device, 7).t().contiguous().t(),
        ):
            assert_sparse(weight, upstream, scores=scores, magnitude=False, **options)
            mask = pyrx.nm_mask(scores, 2, 4, dim=dim, backend="triton")
            bits = pyrx.nm_mask(scores, 2, 4, dim=dim, packed=True, backend="triton")
            assert_sparse(weight, upstream, mask=mask, **options)
            assert_sparse(weight, upstream, mask=torch.stack([bits, bits + 1], -1)[..., 0], **options)


@pytest.mark.parametrize(
    "shape", [(3, 64), (5, 12), (2, 3, 5, 3), (2, 3, 4, 8), (7,), (3, 2000), (0, 3)], ids=helpers.name_of
)
def test_apply(device, shape):
    ops = torch.ops.pyrx_triton
    for dtype in DTYPES:
        x, weight = scores_of(shape, dtype, device), torch.randn(shape).to(device, dtype)
        bits = pyrx.reference.dropout.pack_bits(torch.rand(shape, device=device) < 0.5)
        factor = torch.tensor([0.7], dtype=torch.float64, device=device)
        for dropped, arguments in ((ZERO, (None, None)), (FACTOR, (factor, None)), (REGULARIZE, (None, weight))):
            for name, each in laid_out(x):
                got = ops.nm_apply(each, bits, dropped, *arguments, 0.01)
                expected = pyrx.reference.nm_sparsity.nm_apply(each, bits, dropped, *arguments, 0.01)
                assert_same_but_nan(got, expected, f"{name} {dropped}")
                assert got.numel() == 0 or got.stride() == expected.stride(), name


def test_products_and_sums_are_rounded_one_by_one(device):
    """x + strength * w where a fused operation would give another float32."""
    weight = torch.full((256,), 1 + 2.0**-12, device=device)
    strength = 1 + 2.0**-12
    grad = torch.full((256,), -(1 + 2.0**-11), device=device)
    bits = torch.zeros(32, dtype=torch.uint8, device=device)
    got = torch.ops.pyrx_triton.nm_apply(grad, bits, REGULARIZE, None, weight, strength)
    assert not got.any()


def test_decay_is_read_from_memory(device):
    weight = torch.randn(4, 64, device=device)
    decay = torch.tensor([9.0, 0.5, 9.0], device=device, dtype=torch.float64)[1:2]
    for value in (0.5, 0.125, 0.0, 1.0):
        decay.fill_(value)
        got = pyrx.nm_sparsify(weight, 2, 4, estimator="mdgf", decay=decay, backend="triton")
        mask = pyrx.nm_mask(weight, 2, 4, backend="reference")
        helpers.assert_same_bits(got, torch.where(mask, weight, weight * value))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="a GPU's graphs")
def test_graph_reads_weight_and_decay_when_replayed():
    helpers.need("triton", "cuda", ops=("nm_sparsity",))
    weight, decay = torch.randn(64, 128, device="cuda"), torch.tensor(0.5, device="cuda", dtype=torch.float64)

    def sparse():
        return pyrx.nm_sparsify(weight, 2, 4, estimator="mdgf", decay=decay, backend="triton")

    graph, captured = helpers.capture(sparse)
    for value in (0.25, 0.0):
        weight.normal_()
        decay.fill_(value)
        graph.replay()
        helpers.assert_same_bits(captured, sparse())


# The entries themselves.


def test_entries_have_the_shapes_of_their_fakes(device):
    ops = torch.ops.pyrx_triton
    weight = torch.randn(8, 12, 3, 3, device=device)
    decay = torch.ones((), dtype=torch.float64, device=device)
    for each in (weight, weight.to(memory_format=torch.channels_last)):
        bits = ops.nm_mask(each, 2, 4, 1, True, True, False)
        calls = [
            (ops.nm_mask, (each, 2, 4, 1, True, False, False)),
            (ops.nm_mask, (each, 2, 4, 3, True, True, True)),
            (ops.nm_sparsify, (each, None, None, None, 2, 4, 0, True, False, 0, 0.0)),
            (ops.nm_sparsify, (each, weight.half(), None, decay, 2, 4, 3, False, True, 2, 0.0)),
            (ops.nm_sparsify, (each, None, bits, None, 2, 4, 0, True, False, 1, 0.0)),
            (ops.nm_apply, (each, bits, FACTOR, decay, None, 0.0)),
            (ops.nm_apply, (each, bits, REGULARIZE, None, weight, 0.5)),
        ]
        for op, arguments in calls:
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_entries_check(device):
    ops = torch.ops.pyrx_triton
    weight = torch.randn(4, 24, device=device)
    bits = torch.zeros(4, 3, dtype=torch.uint8, device=device)
    with pytest.raises(TypeError, match="nm_mask.*float64"):
        ops.nm_mask(weight.double(), 2, 4, 1, True, False, False)
    for arguments in ((weight.double(), None), (weight, weight.double())):
        with pytest.raises(TypeError, match="nm_sparsify.*float64"):
            ops.nm_sparsify(*arguments, None, None, 2, 4, 1, True, False, 0, 0.0)
    with pytest.raises(TypeError, match="nm_apply.*float64"):
        ops.nm_apply(weight.double(), bits, ZERO, None, None, 0.0)
    with pytest.raises(ValueError, match=r"nm_mask: expected n in \[1, 4\], got 5"):
        ops.nm_mask(weight, 5, 4, 1, True, False, False)
    with pytest.raises(ValueError, match="that m = 5 divides"):
        ops.nm_mask(weight, 2, 5, 1, True, False, False)
    with pytest.raises(ValueError, match=r"bits of shape \[..., ceil\(D / 8\)\] = \[4, 3\]"):
        ops.nm_apply(weight, bits[:, 1:], ZERO, None, None, 0.0)
    with pytest.raises(ValueError, match="decay of one element"):
        ops.nm_sparsify(weight, None, None, weight.double()[0], 2, 4, 1, True, False, 2, 0.0)


# Ahead of time.


def compile_ahead_of_time(architecture):
    """Prints one JSON line a compiled kernel: the call, registers, stack, shared memory, its instructions."""
    compiled = triton_helpers.compile_launches(architecture)

    def instructions(kernel):
        ptx = kernel.asm["ptx"]
        return {
            "narrowed": len(re.findall(r"\bcvt\.rn\.\w*f16\w*\.f32", ptx)),
            "divisions": len(re.findall(r"\b(?:div|rem)\.[su]64", ptx)),
            "allowed": kernel.metadata.enable_fp_fusion,
            "fused": len(re.findall(r"\b(?:fma|mad)\.(?:rn|rz|rm|rp)[\w.]*f\d+", ptx)),
            "reads": sorted(set(re.findall(r"ld\.global[\w.:]*?\.((?:v\d\.)?b\d+)", ptx))),
            "writes": sorted(set(re.findall(r"st\.global[\w.:]*?\.((?:v\d\.)?b\d+)", ptx))),
        }

    def report(call):
        triton_helpers.report(compiled, instructions, call=call)

    decay = torch.ones((), dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.zeros(256, 256, dtype=dtype)
        bits = torch.zeros(256, 32, dtype=torch.uint8)
        for n, m in ((2, 4), (1, 4), (4, 8), (1, 16), (2, 32), (32, 64), (1, 128)):
            kernels.nm_mask(weight, n, m, 1, True, False, False)
            report("mask")
            kernels.nm_mask(weight, n, m, 1, n > 1, True, False)
            report("bits")
            if architecture == 90:
                kernels.nm_mask(weight, n, m, 0, True, True, False)
                report("columns")
        kernels.nm_sparsify(weight, None, None, None, 2, 4, 1, True, False, 0, 0.0)
        kernels.nm_sparsify(weight, weight.half(), None, None, 2, 4, 1, True, False, 0, 0.0)
        kernels.nm_apply(weight, bits, ZERO, None, None, 0.0)
        report("selected")
        kernels.nm_sparsify(weight, None, None, decay, 2, 4, 1, True, False, 2, 0.0)
        report("times decay")
        kernels.nm_apply(weight, bits, REGULARIZE, None, weight, 0.5)
        kernels.nm_apply(weight, bits, FACTOR, decay, None, 0.0)
        report("apply")
        kernels.nm_mask(weight, 2, 6, 1, True, True, True)
        kernels.nm_mask(weight[:, :7], 2, 4, 0, False, True, True)
        # sizes of one are constants to the compiler
        for shape, dim in (((6, 1), 0), ((1, 3), 1), ((1, 1, 3, 1), 2)):
            kernels.nm_mask(weight.new_zeros(shape), 2, 3, dim, True, True, False)
        kernels.nm_mask(weight[:1, :1], 1, 1, 1, True, False, False)
        kernels.nm_mask(weight[:1, :1], 1, 1, 0, True, True, False)
        kernels.nm_apply(weight[:1, :1], bits[:1, :1], ZERO, None, None, 0.0)
        report("odd")
    # numbers compile nothing of their own
    for strength in (0.0, 1.0, 2e-4):
        kernels.nm_apply(weight, bits, REGULARIZE, None, weight, strength)
    assert len(compiled) == 1
    report("apply")
    kernels.WIDE = 0
    kernels.nm_mask(weight, 2, 6, 1, True, True, True)
    kernels.nm_mask(weight[:, :7], 2, 4, 0, False, True, True)
    kernels.nm_apply(weight[:, :7], bits[:, :1], ZERO, None, None, 0.0)
    report("wide")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 90])
def test_ahead_of_time(architecture, python, tmp_path):
    script = f"import test_triton_nm as test; test.compile_ahead_of_time({architecture})"
    found = triton_helpers.ahead_of_time(python, tmp_path, script)
    assert {each["kernel"] for each in found} == triton_helpers.kernels_of("nm_sparsity.py")
    for each in found:
        assert each["shared"] <= 8192 and each["registers"] <= 128 and each["stack"] == 0, each
        assert not each["fused"] and not each["allowed"], each
        assert (each["divisions"] > 0) == (each["call"] == "wide"), each
        assert "v4.b32" in each["reads"] or each["call"] in ("odd", "wide"), each
        if each["call"] in ("mask", "selected", "times decay", "apply"):
            assert "v4.b32" in each["writes"], each
        # what is kept goes from memory to memory; a way through float32 would quieten NaN
        assert each["call"] in ("times decay", "apply") or not each["narrowed"], each
        if each["call"] == "bits":
            assert each["writes"] == ["b16"], each
