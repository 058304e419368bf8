"""Argument checks shared by public functions and fakes: each error names op, argument, expected and got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fail(op: str, argument: str, expected: object, got: object, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"pyrx::{op}: expected {argument} {expected}, got {got}")


def check_tensor(op: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        fail(op, argument, "to be a Tensor", type(value).__name__, TypeError)


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


def check_choice(op: str, argument: str, value: object, choices: Sequence[str | None]) -> None:
    if value not in choices:
        fail(op, argument, "to be one of " + ", ".join(map(repr, choices)), repr(value))


def check_integer(op: str, argument: str, value: object, minimum: int, maximum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        fail(op, argument, "to be an int", type(value).__name__, TypeError)
    if not minimum <= value <= maximum:
        fail(op, argument, f"in [{minimum}, {maximum}]", value)
