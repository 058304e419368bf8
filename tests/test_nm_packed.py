"""Compressed N:M weights: every backend against loops over groups, torch's own 2:4 form, bad input."""

import io
import math

import pytest
import torch
from helpers import FLOATS, LOW, assert_same_bits, assert_within_budget, bits, layouts, name_of, need, threads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.sparse import SparseSemiStructuredTensorCUTLASS, _semi_structured_conversions
from torch.utils import _pytree as pytree

import pyrx
from pyrx import _library
from pyrx.reference import nm_packed as reference
from pyrx.reference.dropout import pack_bits
from pyrx.reference.nm_sparsity import nm_mask as reference_mask

F = torch.nn.functional
EVERY = [(n, m) for m in range(1, 17) for n in range(1, m + 1)]
LARGE = [(2, 32), (1, 32), (8, 32), (31, 64), (64, 64), (5, 65), (3, 100), (100, 100), (127, 127), (1, 128), (64, 128)]
RATIOS = [
    (2, 4),
    (1, 4),
    (1, 8),
    (2, 16),
    (4, 8),
    (1, 1),
    (8, 8),
    (16, 16),
    (16, 32),
    (3, 8),
    (5, 7),
    (1, 32),
    (64, 128),
]


def served(backend, device="cpu", dtype=torch.float32):
    return need(backend, device, dtype, ("nm_packed",))


def values_of(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mask_of(weight, n, m):
    return reference_mask(weight, n, m, weight.dim() - 1, True, False)


def thinned(mask, seed=1):
    """Of a mask's kept elements about two thirds."""
    return mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.67)


def hostile(shape, dtype, seed=0):
    """With zeros of both signs, infinities and NaN of any payload, a signalling one among them."""
    weight = values_of(shape, dtype, seed)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, math.inf], dtype=dtype).view(kind)
    special[-1] += 1
    chosen = torch.randint(0, 3 * len(special), weight.shape, generator=torch.Generator().manual_seed(seed + 1))
    bits = torch.where(chosen < len(special), special[chosen.clamp(max=len(special) - 1)], weight.view(kind))
    return bits.view(dtype)


def leaves_of(n, m, rows=5, groups=3, batch=(2, 3), dtype=torch.float64):
    weight = values_of((rows, groups * m), dtype)
    packed = pyrx.nm_compress(weight, n, m, mask=thinned(mask_of(weight, n, m)), backend="reference")
    x, bias = values_of((*batch, groups * m), dtype, 1), values_of((rows,), dtype, 2)
    return x, packed, bias


def dense_of(weight, mask):
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))


def groups_by_hand(mask, n, m):
    """The positions stored of each group, from the definition."""
    found = []
    for row in mask.reshape(-1, m).tolist():
        kept = [i for i in range(m) if row[i]]
        others = [i for i in range(m) if not row[i]]
        found.append(sorted(kept + others[: n - len(kept)]))
    return torch.tensor(found, dtype=torch.uint8).reshape(*mask.shape[:-1], -1)


# Round trips.


def check_round_trip(backend, weight, mask, n, m):
    packed = pyrx.nm_compress(weight, n, m, mask=mask, backend=backend)
    assert packed.shape == weight.shape and packed.dtype == weight.dtype and packed.device == weight.device
    assert packed.values.shape == packed.indices.shape == (*weight.shape[:-1], weight.shape[-1] // m * n)
    expected = groups_by_hand(mask, n, m)
    assert_same_bits(packed.indices, expected, f"indices of {n}:{m}")
    columns = reference.columns_of(expected, n, m)
    assert torch.equal(bits(packed.values), bits(dense_of(weight, mask)).gather(-1, columns)), f"values of {n}:{m}"
    assert_same_bits(packed.to_dense(backend=backend), dense_of(weight, mask), f"{n}:{m}")
    return packed


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_every_ratio(backend, dtype):
    served(backend, dtype=dtype)
    for n, m in EVERY + LARGE:
        weight = hostile((3, 5 * m), dtype, seed=n * 200 + m)
        mask = mask_of(weight, n, m)
        check_round_trip(backend, weight, mask, n, m)
        check_round_trip(backend, weight, thinned(mask), n, m)


def test_every_mask_of_a_group(backend):
    for n, m in [(1, 4), (2, 4), (3, 4), (4, 4), (3, 8), (5, 9)]:
        masks = (torch.arange(2**m)[:, None] >> torch.arange(m) & 1).bool()
        masks = masks[masks.sum(1) <= n]
        check_round_trip(backend, values_of(masks.shape), masks, n, m)


@pytest.mark.parametrize("shape", [(8,), (5, 24), (2, 3, 16), (2, 1, 3, 8)], ids=name_of)
def test_any_number_of_dimensions(backend, shape):
    weight = values_of(shape)
    check_round_trip(backend, weight, mask_of(weight, 2, 4), 2, 4)
    check_round_trip(backend, weight, mask_of(weight, 3, 8), 3, 8)


def test_layouts(backend):
    for name, weight in layouts((6, 24)):
        mask = mask_of(weight.contiguous(), 3, 6)
        for kept in (mask, mask.t().contiguous().t(), pack_bits(mask), torch.stack([pack_bits(mask)] * 2, -1)[..., 0]):
            packed = pyrx.nm_compress(weight, 3, 6, mask=kept, backend=backend)
            assert_same_bits(packed.to_dense(backend=backend), dense_of(weight.contiguous(), mask), name)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_the_default_mask_is_that_of_nm_sparsify(backend, dtype):
    need(backend, dtype=dtype, ops=("nm_packed", "nm_sparsity"))
    for n, m in [(2, 4), (1, 8), (3, 7), (16, 32)]:
        weight = hostile((7, 4 * m), dtype)
        packed = pyrx.nm_compress(weight, n, m, backend=backend)
        assert_same_bits(packed.to_dense(), pyrx.nm_sparsify(weight, n, m, backend=backend))
        signed = pyrx.nm_compress(weight, n, m, magnitude=False, backend=backend)
        mask = pyrx.nm_mask(weight, n, m, magnitude=False, backend="reference")
        assert_same_bits(signed.to_dense(), dense_of(weight, mask))


def test_many_rows(cpu):
    weight = values_of((300, 512))
    for count in (1, 2, 3):
        with threads(count):
            check_round_trip(served(cpu), weight, thinned(mask_of(weight, 2, 4)), 2, 4)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (7, 8), (3, 100), (64, 128)])
def test_too_many_kept(backend, n, m):
    weight, mask = values_of((3, 4 * m)), torch.zeros(3, 4 * m, dtype=torch.bool)
    mask[2, 3 * m - n - 1 : 3 * m] = True
    for kept in (mask, pack_bits(mask)):
        with pytest.raises(ValueError) as caught:
            pyrx.nm_compress(weight, n, m, mask=kept, backend=backend)
        text = f"pyrx::nm_compress: expected mask that keeps at most n = {n} of each group of {m}, got {n + 1}"
        assert str(caught.value) == text
    if backend == "cpu":
        with pytest.raises(ValueError, match=f"keeps at most n = {n} of each group of {m}, got {n + 1}"):
            torch.ops.pyrx.nm_compress(weight, pack_bits(mask), n, m)


@pytest.mark.cpu_kernels
def test_indices_that_are_not_there(cpu):
    served(cpu)
    for m, batch in ((4, 1), (4, 3), (4, 40), (7, 1)):
        packed = pyrx.nm_compress(torch.ones(70, 10 * m), 1, m, mask=torch.arange(10 * m).expand(70, -1) % m == 1)
        x = torch.randn(batch, 10 * m)
        for row in (0, 41, 69):
            wrong = packed.indices.clone()
            wrong[row, 9] = m
            for call in (
                lambda i, p=packed: torch.ops.pyrx.nm_decompress(p.values, i, 1, p.m),
                lambda i, p=packed, x=x: torch.ops.pyrx.nm_linear(x, p.values, i, None, 1, p.m),
            ):
                with pytest.raises(ValueError, match=rf"indices in \[0, {m}\), got one of at least {m}"):
                    call(wrong)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("batch", [0, 3])
def test_indices_that_are_not_there_in_the_class(backend, batch):
    served(backend)
    packed = pyrx.NMPacked(V, torch.full_like(PLACES, 4), 2, 4)
    for op, call in (
        ("nm_decompress", lambda: packed.to_dense(backend=backend)),
        ("nm_linear", lambda: pyrx.nm_linear(X[:1].expand(batch, -1), packed, backend=backend)),
    ):
        with pytest.raises(ValueError, match=rf"pyrx::{op}: expected indices in \[0, 4\), got one of at least 4"):
            call()


# The class.


def test_to(backend):
    _, packed, _ = leaves_of(2, 4, dtype=torch.float32)
    low = packed.to(torch.bfloat16)
    assert low.dtype == torch.bfloat16 and low.shape == packed.shape and (low.n, low.m) == (2, 4)
    assert_same_bits(low.to_dense(), packed.to_dense().bfloat16())
    assert packed.to("meta").device.type == packed.to("meta").indices.device.type == "meta"
    with pytest.raises(TypeError, match="values of dtype float16"):
        packed.to(torch.int32)
    assert repr(packed) == "NMPacked(shape=[5, 12], 2:4, dtype=torch.float32, device='cpu')"


def test_pytree():
    _, packed, _ = leaves_of(2, 4)
    tensors, form = pytree.tree_flatten({"w": packed, "other": 1})
    assert len(tensors) == 3
    doubled = pytree.tree_map(lambda each: each if isinstance(each, int) else each * 2, {"w": packed})["w"]
    assert isinstance(doubled, pyrx.NMPacked) and torch.equal(doubled.values, 2 * packed.values)
    again = pytree.tree_unflatten(tensors, form)["w"]
    assert torch.equal(again.to_dense(), packed.to_dense())


@pytest.mark.parametrize("weights_only", [True, False])
def test_saved_and_loaded(weights_only):
    _, packed, _ = leaves_of(2, 4)
    file = io.BytesIO()
    torch.save({"packed": packed}, file)
    file.seek(0)
    again = torch.load(file, weights_only=weights_only)["packed"]
    assert_same_bits(again.values, packed.values)
    assert_same_bits(again.indices, packed.indices)
    assert (again.n, again.m) == (2, 4)


def test_deepcopy():
    import copy

    _, packed, _ = leaves_of(2, 4)
    again = copy.deepcopy(packed)
    packed.values.zero_()
    assert again.values.any()


# torch's semi-structured tensors, whose conversions for CUTLASS run on the CPU.


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
@pytest.mark.parametrize("full", [True, False])
def test_semi_structured_on_the_cpu(dtype, full):
    weight = values_of((64, 128), dtype)
    mask = mask_of(weight, 2, 4)
    mask = mask if full else thinned(mask)
    packed = pyrx.nm_compress(weight, 2, 4, mask=mask)
    kept, meta = _semi_structured_conversions.sparse_semi_structured_from_dense_cutlass(packed.to_dense())
    if full:
        assert_same_bits(kept, packed.values)
    dense = _semi_structured_conversions.sparse_semi_structured_to_dense_cutlass(kept, meta)
    assert_same_bits(dense, packed.to_dense())
    tensor = SparseSemiStructuredTensorCUTLASS(weight.shape, kept, meta, None, None, None)
    again = pyrx.NMPacked.from_semi_structured(tensor)
    assert_same_bits(again.to_dense(), packed.to_dense())
    if full:
        assert_same_bits(again.indices, packed.indices)


def test_semi_structured_errors():
    packed = pyrx.nm_compress(torch.ones(32, 64), 2, 4, mask=torch.arange(64).expand(32, -1) % 4 < 2)
    with pytest.raises(
        TypeError, match="to_semi_structured: expected values of dtype float16 or bfloat16, got torch.f"
    ):
        packed.to_semi_structured()
    with pytest.raises(RuntimeError, match="to_semi_structured: expected values on a CUDA device, got cpu"):
        packed.to(torch.float16).to_semi_structured()
    other = pyrx.NMPacked(packed.values.half(), packed.indices, 4, 8)
    with pytest.raises(ValueError, match="to_semi_structured: expected n:m to be 2:4, got 4:8"):
        other.to_semi_structured()
    with pytest.raises(TypeError, match="from_semi_structured: expected weight to be a SparseSemi.*, got Tensor"):
        pyrx.NMPacked.from_semi_structured(torch.ones(4, 4))
    kept, meta = _semi_structured_conversions.sparse_semi_structured_from_dense_cutlass(torch.eye(32))
    tensor = SparseSemiStructuredTensorCUTLASS(torch.Size([32, 32]), kept, meta, None, None, None)
    with pytest.raises(
        TypeError, match="from_semi_structured: expected weight of dtype float16 or bfloat16, got torch.f"
    ):
        pyrx.NMPacked.from_semi_structured(tensor)


def test_the_semi_structured_form_is_made_again_when_the_weight_was_written(monkeypatch):
    packed = pyrx.nm_compress(torch.ones(4, 8), 2, 4, mask=torch.arange(8).expand(4, -1) % 4 < 2)
    made = []
    monkeypatch.setattr(pyrx.NMPacked, "to_semi_structured", lambda self: made.append(1) or self.to_dense())
    first = packed._semi_structured()
    assert packed._semi_structured() is first and len(made) == 1
    packed.values.mul_(2)
    assert torch.equal(packed._semi_structured(), 2 * first) and len(made) == 2
    packed.indices.add_(1)
    assert not torch.equal(packed._semi_structured(), 2 * first) and len(made) == 3
    packed.values = packed.values.clone()
    packed._semi_structured()
    assert len(made) == 4
    assert "_cached" not in packed.__getstate__()


# Registrations.


def test_opcheck(cpu):
    ops = _library.namespace(served(cpu))
    x, packed, bias = leaves_of(2, 4, dtype=torch.float32)
    weight = values_of((5, 12))
    torch.library.opcheck(ops.nm_compress.default, (weight, pack_bits(mask_of(weight, 2, 4)), 2, 4))
    leaf = packed.values.clone().requires_grad_()
    torch.library.opcheck(ops.nm_decompress.default, (leaf, packed.indices, 2, 4))
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        given = [each.detach().clone().requires_grad_(n) for each, n in zip((x, leaf, bias), needs, strict=True)]
        torch.library.opcheck(ops.nm_linear.default, (*given[:2], packed.indices, given[2], 2, 4))
        torch.library.opcheck(ops.nm_linear.default, (given[0][0, 0], given[1], packed.indices, None, 2, 4))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_equals_eager(backend, dynamic):
    torch._dynamo.reset()
    _, packed, bias = leaves_of(2, 4, dtype=torch.float32)
    packed.values.requires_grad_()

    def function(x, packed, bias):
        return pyrx.nm_linear(x * 2, packed, bias, backend=backend), packed.to_dense(backend=backend)

    fast = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (4, 7, 20):
        x = values_of((batch, 12), seed=batch).requires_grad_()
        leaves = (x, packed.values, bias.requires_grad_())
        found, expected = fast(x, packed, bias), function(x, packed, bias)
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)
        upstream = [values_of((batch, 5), seed=3), values_of((5, 12), seed=4)]
        for one, other in zip(
            *(torch.autograd.grad(each, leaves, upstream) for each in (found, expected)), strict=True
        ):
            torch.testing.assert_close(one, other)
    torch._dynamo.reset()


def test_compiled_compress(backend):
    torch._dynamo.reset()
    weight = values_of((5, 16))
    mask = mask_of(weight, 2, 4)
    fast = torch.compile(
        lambda w, kept: pyrx.nm_compress(w, 2, 4, mask=kept, backend=backend).to_dense(backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    assert_same_bits(fast(weight, mask), dense_of(weight, mask))
    torch._dynamo.reset()


def test_autocast(backend):
    x, packed, bias = leaves_of(2, 4, dtype=torch.float32)
    packed.values.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = pyrx.nm_linear(x, packed, bias, backend=backend)
    expected = pyrx.nm_linear(x.bfloat16(), packed.to(torch.bfloat16), bias.bfloat16(), backend=backend)
    assert_same_bits(got, expected)
    (found,) = torch.autograd.grad(got.float().sum(), packed.values)
    assert found.dtype == torch.float32


# Errors.

W, FLOAT_TEXT = torch.randn(3, 8), "of dtype float16, bfloat16, float32 or float64"
COMPRESS_ROWS = [
    (TypeError, {"weight": W.long()}, f"weight {FLOAT_TEXT}, got torch.int64"),
    (TypeError, {"weight": W.cfloat()}, f"weight {FLOAT_TEXT}, got torch.complex64"),
    (ValueError, {"n": 5}, "n in [1, 4], got 5"),
    (ValueError, {"n": 0}, "n in [1, 4], got 0"),
    (ValueError, {"m": 129}, "m in [1, 128], got 129"),
    (ValueError, {"m": 3}, "weight of a size along the last dimension that m = 3 divides, got [3, 8]"),
    (ValueError, {"weight": torch.tensor(1.0)}, "weight of a size along the last dimension that m = 4 divides, got []"),
]
PUBLIC_COMPRESS_ROWS = [
    (TypeError, {"weight": [1.0]}, "weight to be a Tensor, got list"),
    (TypeError, {"n": 2.0}, "n to be an int, got float"),
    (TypeError, {"mask": W}, "mask of dtype bool, or uint8 as packed=True gives, got torch.float32"),
    (ValueError, {"mask": W[:2] > 0}, "mask of shape of the weight = [3, 8], got [2, 8]"),
    (
        ValueError,
        {"mask": torch.zeros(3, 2, dtype=torch.uint8)},
        "mask of shape [..., ceil(D / 8)] = [3, 1], got [3, 2]",
    ),
    (RuntimeError, {"mask": (W > 9).to("meta")}, "mask on device cpu, got meta"),
]
BITS_ROWS = [
    (TypeError, {"bits": W > 0}, "bits of dtype torch.uint8, got torch.bool"),
    (
        ValueError,
        {"bits": torch.zeros(3, 2, dtype=torch.uint8)},
        "bits of shape [..., ceil(D / 8)] = [3, 1], got [3, 2]",
    ),
    (RuntimeError, {"bits": torch.zeros(3, 1, dtype=torch.uint8, device="meta")}, "bits on device cpu, got meta"),
]
V, PLACES, X, B = torch.randn(3, 4), torch.zeros(3, 4, dtype=torch.uint8), torch.randn(2, 8), torch.randn(3)
PACKED_ROWS = [
    (TypeError, {"values": V.long()}, f"values {FLOAT_TEXT}, got torch.int64"),
    (ValueError, {"n": 5}, "n in [1, 4], got 5"),
    (ValueError, {"m": 0}, "m in [1, 128], got 0"),
    (ValueError, {"n": 3}, "values of a size along the last dimension that n = 3 divides, got [3, 4]"),
    (ValueError, {"values": torch.tensor(1.0)}, "values of a size along the last dimension that n = 2 divides, got []"),
    (TypeError, {"indices": PLACES.long()}, "indices of dtype torch.uint8, got torch.int64"),
    (ValueError, {"indices": PLACES[:2]}, "indices of shape of the values = [3, 4], got [2, 4]"),
    (RuntimeError, {"indices": PLACES.to("meta")}, "indices on device cpu, got meta"),
]
LINEAR_ROWS = [
    (TypeError, {"x": X.double()}, "x of dtype torch.float32, got torch.float64"),
    (TypeError, {"x": X.long()}, "x of dtype torch.float32, got torch.int64"),
    (ValueError, {"x": X[:, :4]}, "x of shape [..., C] with C = 8, got [2, 4]"),
    (ValueError, {"x": torch.tensor(1.0)}, "x of shape [..., C] with C = 8, got []"),
    (RuntimeError, {"x": X.to("meta")}, "x on device cpu, got meta"),
    (TypeError, {"bias": B.double()}, "bias of dtype torch.float32, got torch.float64"),
    (ValueError, {"bias": B[:2]}, "bias of shape [R] = [3], got [2]"),
    (RuntimeError, {"bias": B.to("meta")}, "bias on device cpu, got meta"),
]
NOT_A_MATRIX = (
    ValueError,
    {"values": V[None], "indices": PLACES[None]},
    "values of shape [R, C / m * n], got [1, 3, 4]",
)


def ids_of(rows):
    return [text[:80] for *_, text in rows]


ROWS = COMPRESS_ROWS + PUBLIC_COMPRESS_ROWS


@pytest.mark.parametrize("error, changes, text", ROWS, ids=ids_of(ROWS))
def test_compress_errors(backend, error, changes, text):
    with pytest.raises(error) as caught:
        pyrx.nm_compress(**{"weight": W, "n": 2, "m": 4, "mask": None, "backend": backend} | changes)
    assert type(caught.value) is error and str(caught.value) == f"pyrx::nm_compress: expected {text}"


@pytest.mark.parametrize("error, changes, text", PACKED_ROWS, ids=ids_of(PACKED_ROWS))
def test_class_errors(error, changes, text):
    with pytest.raises(error) as caught:
        pyrx.NMPacked(**{"values": V, "indices": PLACES, "n": 2, "m": 4} | changes)
    assert type(caught.value) is error and str(caught.value) == f"pyrx::NMPacked: expected {text}"


PUBLIC_LINEAR_ROWS = [
    *LINEAR_ROWS,
    (TypeError, {"x": [1.0]}, "x to be a Tensor, got list"),
    (TypeError, {"packed": W}, "packed to be an NMPacked, got Tensor"),
    (ValueError, {"packed": pyrx.NMPacked(V[None], PLACES[None], 2, 4)}, NOT_A_MATRIX[2]),
]


@pytest.mark.parametrize("error, changes, text", PUBLIC_LINEAR_ROWS, ids=ids_of(PUBLIC_LINEAR_ROWS))
def test_linear_errors(backend, error, changes, text):
    with pytest.raises(error) as caught:
        pyrx.nm_linear(**{"x": X, "packed": pyrx.NMPacked(V, PLACES, 2, 4), "bias": B, "backend": backend} | changes)
    assert type(caught.value) is error and str(caught.value) == f"pyrx::nm_linear: expected {text}"


KERNEL_ROWS = [
    *[("nm_compress", *row) for row in COMPRESS_ROWS + BITS_ROWS],
    *[("nm_decompress", *row) for row in PACKED_ROWS],
    *[("nm_linear", *row) for row in [*PACKED_ROWS, NOT_A_MATRIX, *LINEAR_ROWS]],
]
ARGUMENTS = {
    "nm_compress": {"weight": W, "bits": torch.zeros(3, 1, dtype=torch.uint8)},
    "nm_decompress": {"values": V, "indices": PLACES},
    "nm_linear": {"x": X, "values": V, "indices": PLACES, "bias": None},
}


@pytest.mark.parametrize("name, error, changes, text", KERNEL_ROWS)
def test_kernels_and_fakes_raise_the_same(cpu, name, error, changes, text):
    op = getattr(_library.namespace(served(cpu)), name)
    arguments = ARGUMENTS[name] | {"n": 2, "m": 4} | changes
    expected = f"pyrx::{name}: expected {text}"
    with pytest.raises(error) as caught:
        op(**arguments)
    assert type(caught.value) is error and str(caught.value) == expected
    with FakeTensorMode() as mode, pytest.raises(error) as caught:
        op(**{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
    assert type(caught.value) is error and str(caught.value) == expected


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_gpu(kernels, dtype):
    served(kernels, "cuda", dtype)
    for n, m in EVERY + LARGE:
        weight = hostile((5, 9 * m), dtype)
        mask = thinned(mask_of(weight, n, m)).cuda()
        packed = pyrx.nm_compress(weight.cuda(), n, m, mask=mask, backend=kernels)
        expected = pyrx.nm_compress(weight, n, m, mask=mask.cpu(), backend="reference")
        assert_same_bits(packed.values.cpu(), expected.values)
        assert_same_bits(packed.indices.cpu(), expected.indices)
        assert_same_bits(packed.to_dense(backend=kernels).cpu(), expected.to_dense(backend="reference"))
        x, finite = values_of((3, 9 * m), dtype).cuda(), values_of((5, 9 * m), dtype).cuda()
        packed = pyrx.nm_compress(finite, n, m, mask=mask, backend=kernels)
        dense = packed.to_dense(backend=kernels)
        assert_same_bits(pyrx.nm_linear(x, packed, backend=kernels), F.linear(x, dense))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
@pytest.mark.parametrize("full", [True, False])
def test_gpu_semi_structured(dtype, full):
    weight = values_of((256, 512), dtype).cuda() / 16
    mask = mask_of(weight, 2, 4)
    mask = mask if full else thinned(mask.cpu()).cuda()
    packed = pyrx.nm_compress(weight, 2, 4, mask=mask)
    tensor = packed.to_semi_structured()
    assert_same_bits(pyrx.NMPacked.from_semi_structured(tensor).to_dense(), packed.to_dense())
    bias = values_of((256,), dtype, 2).cuda()
    for batch in (1, 8, 33, 200):
        x = values_of((batch, 512), dtype, 1).cuda()
        got = pyrx.nm_linear(x, packed, bias)
        exact = F.linear(x.double(), packed.to_dense().double(), bias.double())
        assert_within_budget(got, F.linear(x, packed.to_dense(), bias), exact, f"batch {batch}")
    assert "_cached" in packed.__dict__
