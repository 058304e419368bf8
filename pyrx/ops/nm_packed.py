"""Compressed N:M weights: N values of each group of M and their positions, and the linear layer over them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyrx import _library
from pyrx._backends import select
from pyrx._checks import check_bool, check_device, check_dtype, check_float, check_shape, check_tensor, fail, is_read
from pyrx._linear import autocast, is_autocast, rows_of
from pyrx.ops.nm_sparsity import check_bits, check_nm, mask_bits, nm_mask
from pyrx.reference import nm_packed as reference

ROW = "nm_packed"
SEMI_STRUCTURED_DTYPES = (torch.float16, torch.bfloat16)


def _check_compress(weight: Tensor, bits: Tensor | None, n: int, m: int) -> None:
    op = "nm_compress"
    check_float(op, "weight", weight)
    check_nm(op, n, m)
    if weight.dim() == 0 or weight.shape[-1] % m != 0:
        fail(op, "weight", f"of a size along the last dimension that m = {m} divides", list(weight.shape))
    if bits is not None:
        check_bits(op, "bits", bits, weight)


def _check_packed(op: str, values: Tensor, indices: Tensor, n: int, m: int) -> None:
    check_float(op, "values", values)
    check_nm(op, n, m)
    if values.dim() == 0 or values.shape[-1] % n != 0:
        fail(op, "values", f"of a size along the last dimension that n = {n} divides", list(values.shape))
    check_dtype(op, "indices", indices, torch.uint8)
    check_shape(op, "indices", indices, "of the values", values.shape)
    check_device(op, "indices", indices, values.device)


def _dense_shape(values: Tensor, n: int, m: int) -> list[int]:
    return [*values.shape[:-1], values.shape[-1] // n * m]


def _compress_fake(weight: Tensor, bits: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    _check_compress(weight, bits, n, m)
    values = weight.new_empty([*weight.shape[:-1], weight.shape[-1] // m * n])
    return values, torch.empty_like(values, dtype=torch.uint8)


def _decompress_fake(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    _check_packed("nm_decompress", values, indices, n, m)
    return values.new_empty(_dense_shape(values, n, m))


def _check_linear(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int) -> None:
    op = "nm_linear"
    _check_packed(op, values, indices, n, m)
    if values.dim() != 2:
        fail(op, "values", "of shape [R, C / m * n]", list(values.shape))
    rows, columns = _dense_shape(values, n, m)
    check_dtype(op, "x", x, values.dtype)
    if x.dim() == 0 or x.shape[-1] != columns:
        fail(op, "x", f"of shape [..., C] with C = {columns}", list(x.shape))
    check_device(op, "x", x, values.device)
    if bias is not None:
        check_dtype(op, "bias", bias, values.dtype)
        check_shape(op, "bias", bias, "[R]", [rows])
        check_device(op, "bias", bias, values.device)


def _linear_fake(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    _check_linear(x, values, indices, bias, n, m)
    return x.new_empty([*x.shape[:-1], values.shape[0]])


# Both formulas are of differentiable ops, so that they can be differentiated again.


def _setup_decompress(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indices, ctx.n, ctx.m = inputs
    ctx.save_for_backward(indices)


def _decompress_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return grad.gather(-1, reference.columns_of(indices, ctx.n, ctx.m)), None, None, None


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, bias, ctx.n, ctx.m = inputs
    ctx.needs = [x.requires_grad, values.requires_grad, bias is not None and bias.requires_grad]
    ctx.save_for_backward(x if ctx.needs[1] else None, values if ctx.needs[0] else None, indices)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, indices = ctx.saved_tensors
    grad_x = grad_values = grad_bias = None
    if ctx.needs[0]:
        grad_x = grad @ ctx.ops.nm_decompress(values, indices, ctx.n, ctx.m)
    if ctx.needs[1]:
        grad_values = (rows_of(grad).t() @ rows_of(x)).gather(-1, reference.columns_of(indices, ctx.n, ctx.m))
    if ctx.needs[2]:
        grad_bias = rows_of(grad).sum(0)
    return grad_x, grad_values, None, grad_bias, None, None


_PACKED = "Tensor values, Tensor indices"
_library.define(ROW, "nm_compress", "(Tensor weight, Tensor bits, int n, int m) -> (Tensor, Tensor)", _compress_fake)
_library.define(
    ROW,
    "nm_decompress",
    f"({_PACKED}, int n, int m) -> Tensor",
    _decompress_fake,
    _decompress_backward,
    _setup_decompress,
    native_formula=False,
)
_library.define(
    ROW,
    "nm_linear",
    f"(Tensor x, {_PACKED}, Tensor? bias, int n, int m) -> Tensor",
    _linear_fake,
    _linear_backward,
    _setup_linear,
    native_formula=False,
)


class NMPacked:
    """A compressed N:M weight: of each group of `m` consecutive elements of the last dimension `n` are stored.

    Args:
        values: (..., C / m * n) float16, bfloat16, float32 or float64.
        indices: uint8 of the same shape: the position of each in its group, ascending and distinct within a group.
            `nm_compress` makes them so; the CPU raises for one of m or more, and no other reads what is not there.
        n: how many elements of each group are stored, 1 to m.
        m: the size of a group, 1 to 128.

    A pytree of values and indices; saved by torch.save and loaded by torch.load. `values` may require a gradient and
    be updated in place. Size: 1 + 1 / itemsize times n / m of the dense weight's.
    """

    values: Tensor
    indices: Tensor
    n: int
    m: int

    def __init__(self, values: Tensor, indices: Tensor, n: int, m: int) -> None:
        _check_packed("NMPacked", values, indices, n, m)
        self.values, self.indices, self.n, self.m = values, indices, n, m

    @property
    def shape(self) -> torch.Size:
        """Of the dense weight."""
        return torch.Size(_dense_shape(self.values, self.n, self.m))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __repr__(self) -> str:
        kind = f"shape={list(self.shape)}, {self.n}:{self.m}, dtype={self.dtype}, device={str(self.device)!r}"
        return f"NMPacked({kind})"

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self.values, "indices": self.indices, "n": self.n, "m": self.m}

    def to(self, *args: Any, **keywords: Any) -> NMPacked:
        """The weight in another dtype or on another device, as `Tensor.to` of its values."""
        values = self.values.to(*args, **keywords)
        return NMPacked(values, self.indices.to(values.device), self.n, self.m)

    def to_dense(self, *, backend: str | None = None) -> Tensor:
        """(..., C) of the values, bit for bit, and 0 elsewhere. Differentiable; the gradient of values is gathered."""
        chosen = select(ROW, self.device.type, self.dtype, backend)
        arguments = (self.values, self.indices, self.n, self.m)
        if chosen == "reference":
            _check_positions("nm_decompress", self)
            return reference.nm_decompress(*arguments)
        return _library.namespace(chosen).nm_decompress(*arguments)

    def to_semi_structured(self) -> Tensor:
        """The weight as a `torch.sparse.SparseSemiStructuredTensor`, compressed by cuSPARSELt (its metadata's layout is
        its own) or, without it, for CUTLASS.

        Of 2:4 weights (R, C) of float16 or bfloat16 on a CUDA device, R and C multiples of what torch asks for. Raises
        ValueError, TypeError or RuntimeError for others. The result is a copy and has no gradient.
        """
        obstacle = self._obstacle()
        if obstacle is not None:
            fail("to_semi_structured", *obstacle)
        with torch.no_grad():
            return _semi_structured_kind(self.device).from_dense(self.to_dense())

    def _obstacle(self) -> tuple[str, str, object, type[Exception]] | None:
        """Why torch has no semi-structured form of the weight here: argument, expected, got and the error's type."""
        if (self.n, self.m) != (2, 4):
            return "n:m", "to be 2:4", f"{self.n}:{self.m}", ValueError
        if self.dtype not in SEMI_STRUCTURED_DTYPES:
            return "values", "of dtype float16 or bfloat16", self.dtype, TypeError
        if self.device.type != "cuda":
            return "values", "on a CUDA device", self.device, RuntimeError
        kind = _semi_structured_kind(self.device)
        if kind is None:
            return "cuSPARSELt", "or a GPU of compute capability 8.x", "neither", RuntimeError
        asked = kind._DTYPE_SHAPE_CONSTRAINTS[self.dtype]
        steps, shape = (asked.sparse_min_rows, asked.sparse_min_cols), list(self.shape)
        if len(shape) != 2 or any(size == 0 or size % step for size, step in zip(shape, steps, strict=True)):
            return "values", f"of a weight [R, C] of multiples of {list(steps)}", shape, ValueError
        return None

    @staticmethod
    def from_semi_structured(weight: Tensor) -> NMPacked:
        """What a `torch.sparse.SparseSemiStructuredTensor` of float16 or bfloat16 holds. Its zeros are not kept."""
        op = "from_semi_structured"
        if not isinstance(weight, torch.sparse.SparseSemiStructuredTensor):
            fail(op, "weight", "to be a SparseSemiStructuredTensor", type(weight).__name__, TypeError)
        if weight.dtype not in SEMI_STRUCTURED_DTYPES:
            fail(op, "weight", "of dtype float16 or bfloat16", weight.dtype, TypeError)
        with torch.no_grad():
            dense = weight.to_dense()
            return nm_compress(dense, 2, 4, mask=dense != 0)

    def _semi_structured(self) -> Tensor:
        """to_semi_structured(), kept until values or indices are others or are written."""
        tensors = (self.values, self.indices)
        if any(each.is_inference() for each in tensors):  # which do not tell that they were written
            return self.to_semi_structured()
        versions = [each._version for each in tensors]
        found = self.__dict__.get("_cached")
        if found is None or found[0] is not tensors[0] or found[1] is not tensors[1] or found[2] != versions:
            found = self.__dict__["_cached"] = (*tensors, versions, self.to_semi_structured())
        return found[3]


def _semi_structured_kind(device: torch.device) -> Any:
    if torch.backends.cusparselt.is_available():
        return torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    # torch's CUTLASS kernels refuse others
    if torch.cuda.get_device_capability(device)[0] == 8:
        return torch.sparse.SparseSemiStructuredTensorCUTLASS
    return None


def _check_positions(op: str, packed: NMPacked) -> None:
    """What only the values tell, of CPU tensors."""
    if is_read(packed.indices) and (packed.indices >= packed.m).any():
        fail(op, "indices", f"in [0, {packed.m})", f"one of at least {packed.m}")


def _unflatten(tensors: Iterable[Any], context: tuple[int, int]) -> NMPacked:
    # no checks: trees hold anything in a tensor's place
    packed = object.__new__(NMPacked)
    packed.values, packed.indices = tensors
    packed.n, packed.m = context
    return packed


pytree.register_pytree_node(
    NMPacked,
    lambda packed: ([packed.values, packed.indices], (packed.n, packed.m)),
    _unflatten,
    serialized_type_name="pyrx.NMPacked",
)
torch.serialization.add_safe_globals([NMPacked])


def _is_semi_structured(packed: NMPacked, x: Tensor, values: Tensor, bias: Tensor | None) -> bool:
    """Whether torch's semi-structured product serves the call: its result is not differentiated."""
    if torch.compiler.is_compiling() or values is not packed.values or x.numel() == 0:
        return False
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, values, bias)):
        return False
    return packed._obstacle() is None


def nm_compress(
    weight: Tensor,
    n: int,
    m: int,
    mask: Tensor | None = None,
    *,
    magnitude: bool = True,
    backend: str | None = None,
) -> NMPacked:
    """A weight under an N:M mask, compressed: `n` values of each `m` consecutive elements and their positions.

    An offline op: with a mask it looks at the data, and so waits for a GPU.

    Args:
        weight: (..., C), any strides; float16, bfloat16, float32 or float64.
        n: how many elements of each group along the last dimension are stored, 1 to m.
        m: the size of a group, 1 to 128, which divides C.
        mask: of what is kept: bool of the weight's shape, or bits as `nm_mask(packed=True)` makes. A group may keep
            fewer than n; its lowest other positions are stored beside them, as 0. Default: `nm_mask`'s.
        magnitude: the default mask ranks by absolute value, else by the weights as they are. Default True.
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.

    Returns:
        NMPacked without a gradient: kept values bit for bit, the same on every backend; to_dense() gives them back.
        `nm_compress(weight, n, m).to_dense()` equals `nm_sparsify(weight, n, m)`.

    Cost: one read of the weight, one bit an element, n / m as many values and bytes written.

    Raises:
        ValueError: n > m, an m that does not divide, a mask of another shape or one that keeps more than n of a group.
        TypeError: dtypes. RuntimeError: devices, a backend that cannot serve.

    >>> packed = pyrx.nm_compress(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), 2, 4)
    >>> packed.values, packed.indices
    (tensor([[-3.,  2.]]), tensor([[1, 2]], dtype=torch.uint8))

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021.
    """
    op = "nm_compress"
    _check_compress(weight, None, n, m)
    check_bool(op, magnitude=magnitude)
    chosen = select(ROW, weight.device.type, weight.dtype, backend)
    weight = weight.detach()
    if mask is None:
        bits = nm_mask(weight, n, m, magnitude=magnitude, packed=True, backend=chosen)
    else:
        bits = mask_bits(op, mask, weight)
        if chosen != "cpu" and not torch.compiler.is_compiling():  # the CPU's kernel counts for itself
            most = int(reference.most_kept(bits, weight.shape[-1], m))
            if most > n:
                fail(op, "mask", f"that keeps at most n = {n} of each group of {m}", most)
    compress = reference.nm_compress if chosen == "reference" else _library.namespace(chosen).nm_compress
    values, indices = compress(weight, bits, n, m)
    return NMPacked(values, indices, n, m)


def nm_linear(x: Tensor, packed: NMPacked, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """A linear layer over a compressed weight: `x @ packed.to_dense().T + bias`.

    Args:
        x: (..., C), any strides, of the weight's dtype; under autocast cast as F.linear casts.
        packed: the weight (R, C), as `nm_compress` makes it.
        bias: (R,) of the weight's dtype. Default: none.
        backend: "reference", "cpu", "cuda" or "triton". Default: the fastest that can serve.

    Returns:
        (..., R) of x's dtype, summed in float32 (float64 for float64). The same bits from run to run and whatever the
        number of threads; a row's last bits depend on how many rows there are, as F.linear's do. On the CPU NaN and
        infinity of x meet stored weights alone, elsewhere NaN comes of a dropped one too.

    Gradients: of x, packed.values and bias, through dense matrix products; the gradient of values is gathered from
    that of the dense weight. Differentiable twice.

    Equivalent to `torch.nn.functional.linear(x, packed.to_dense(), bias)`, up to rounding.

    Cost: on the CPU n / m of the dense layer's multiplications; of its bytes n / m times 1 + 1 / itemsize, which is
    what a few rows of x wait for. Against F.linear over the dense weight of 4096 columns (bench/bench_nm_packed.py):
    float32, with AVX-512 or AVX2: faster at 2:4 and every sparser ratio, for any number of rows.
    float64, with AVX-512: likewise, but for one row at 2:4.
    bfloat16, of which a processor with AVX-512 BF16 does two products in the time of one: faster for up to eight rows,
    and at 1:8 and sparser for any number; with hundreds of rows about even at 1:4, and at 2:4 up to 1.6 times the dense
    time: there multiply with `to_dense()`, made once.
    Where the processor has neither AVX-512 nor AVX2 the dense weight is faster.
    On a GPU: without a gradient to record, 2:4 weights of float16 and bfloat16 whose sizes torch serves go through
    its semi-structured product (`to_semi_structured`, kept beside the weight until that is written); all else, and
    whatever runs on a backend asked for by name or under torch.compile, decompresses the weight and multiplies with
    cuBLAS, which is never faster than the dense weight would be.

    Raises:
        ValueError: shapes; indices of m or more, on the CPU. TypeError: dtypes. RuntimeError: devices, a backend that
        cannot serve.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (2:4 values and metadata).
    """
    op = "nm_linear"
    check_tensor(op, "x", x)
    if not isinstance(packed, NMPacked):
        fail(op, "packed", "to be an NMPacked", type(packed).__name__, TypeError)
    device_type = packed.device.type
    values = packed.values
    if is_autocast(device_type):
        x, values, bias = autocast((x, values, bias), device_type)  # type: ignore[assignment]
    arguments = (x, values, packed.indices, bias, packed.n, packed.m)
    _check_linear(*arguments)
    if backend is None and not os.environ.get("PYRX_BACKEND") and _is_semi_structured(packed, x, values, bias):
        return torch.nn.functional.linear(x.contiguous(), packed._semi_structured(), bias)
    chosen = select(ROW, device_type, values.dtype, backend)
    if chosen == "reference" or x.numel() == 0:  # which lets a kernel read no position
        _check_positions(op, packed)
    if chosen == "reference":
        return reference.nm_linear(*arguments)
    return _library.namespace(chosen).nm_linear(*arguments)
