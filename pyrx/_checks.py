"""Argument checks shared by public functions and fakes: each error names op, argument, expected and got. And the
dtypes that ops take and compute in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def fail(op: str, argument: str, expected: object, got: object, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"pyrx::{op}: expected {argument} {expected}, got {got}")


def check_tensor(op: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        fail(op, argument, "to be a Tensor", type(value).__name__, TypeError)
    if value.layout is not torch.strided:
        fail(op, argument, "to be a dense Tensor", value.layout, TypeError)


def check_float(op: str, argument: str, value: Tensor) -> None:
    check_tensor(op, argument, value)
    if value.dtype not in FLOAT_DTYPES:
        fail(op, argument, "of dtype float16, bfloat16, float32 or float64", value.dtype, TypeError)


def check_dtype(op: str, argument: str, value: Tensor, dtype: torch.dtype) -> None:
    check_tensor(op, argument, value)
    if value.dtype != dtype:
        fail(op, argument, f"of dtype {dtype}", value.dtype, TypeError)


def check_device(op: str, argument: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        fail(op, argument, f"on device {device}", value.device, RuntimeError)


def check_shape(op: str, argument: str, value: Tensor, names: str, shape: Sequence[int]) -> None:
    """`names` are the dimensions' names, as "[C, D]"."""
    if list(value.shape) != list(shape):
        fail(op, argument, f"of shape {names} = {list(shape)}", list(value.shape))


def broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Whether each size is 1 or the full one: by ==, since torch.compile finds no size `in` others it does not know."""
    return len(shape) == len(full) and all(one == 1 or one == size for one, size in zip(shape, full, strict=True))


def check_choice(op: str, argument: str, value: object, choices: Sequence[str | None]) -> None:
    if not (value is None or isinstance(value, str)) or value not in choices:
        fail(op, argument, "to be one of " + ", ".join(map(repr, choices)), repr(value))


def check_integer(op: str, argument: str, value: object, minimum: int, maximum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        fail(op, argument, "to be an int", type(value).__name__, TypeError)
    if not minimum <= value <= maximum:
        fail(op, argument, f"in [{minimum}, {maximum}]", value)


def check_number(op: str, argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(op, argument, "to be a float", type(value).__name__, TypeError)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:  # which may be beyond any float
        fail(op, argument, "to be a float", "an int of more than 64 bits")


def float_pair(op: str, argument: str, value: object) -> tuple[float, float]:
    """A checked (minimum, maximum) or the like."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        fail(op, argument, "to be two floats", repr(value), TypeError)
    for each in value:
        check_number(op, argument, each)
    return float(value[0]), float(value[1])


def check_bool(op: str, **flags: object) -> None:
    for argument, value in flags.items():
        if not isinstance(value, bool):
            fail(op, argument, "to be a bool", type(value).__name__, TypeError)


def check_image_shape(op: str, argument: str, value: Tensor) -> None:
    check_tensor(op, argument, value)
    if value.dim() not in (4, 5):
        fail(op, argument, "of shape [N, C, H, W] or [N, C, T, H, W]", list(value.shape))


def check_own_values(op: str, argument: str, value: Tensor) -> None:
    # torch copies a negative view for the kernel and cannot write it back; dynamo cannot trace the question
    if not torch.compiler.is_compiling() and value.is_neg():
        fail(op, argument, "to hold its own values", "a negative view (see Tensor.resolve_neg)")


def check_own_memory(op: str, argument: str, value: Tensor) -> None:
    """Of a tensor that is written: no two of its elements lie in one place, and it holds them as they are."""
    check_own_values(op, argument, value)
    if value.numel() == 0:
        return
    reach = 0  # of the dimensions of smaller strides
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True), key=lambda each: int(each[0])):
        if size > 1 and stride <= reach:
            fail(op, argument, "to be memory of its own for every element", f"strides {list(value.stride())}")
        reach += stride * (size - 1)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage from its first element to its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset())
    return first * tensor.itemsize, (first + int(reach) + 1) * tensor.itemsize


def _meet(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0 or not torch._C._overlaps(a, b):  # which tells storages apart, no more
        return False
    (begin, end), (other_begin, other_end) = _span(a), _span(b)
    return begin < other_end and other_begin < end


def is_read(tensor: Tensor) -> bool:
    """Whether its values can be looked at: on the CPU, and not while a graph is made of it."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


def check_written(op: str, argument: str, value: Tensor, inputs: Sequence[Tensor]) -> None:
    """Of an out= tensor: its own memory, none of the inputs', and no gradient to record."""
    if torch.is_grad_enabled():
        if any(each.requires_grad for each in inputs):
            fail(op, argument, "for tensors that require no gradient", "one that does", RuntimeError)
        if value.requires_grad:
            fail(op, argument, "that requires no gradient", "one that does", RuntimeError)
    if torch.compiler.is_compiling():
        return
    check_own_memory(op, argument, value)
    if any(_meet(value, each) for each in inputs):
        fail(op, argument, "to be other memory than the inputs", "the same")
