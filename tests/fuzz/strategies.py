"""What random calls are made of: shapes, values, layouts, numbers, seeds; and what is wrong in a bad call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import pyrx
from fuzz.calls import Call

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 100, 131)
# past what a thread takes at a time: 4,096 elements in some kernels, 16,384 in most
LARGE_SIZES = (130, 200, 257, 400, 1001, 4099, 16390, 40007)
SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 0x0123456789ABCDEF)
# how a tensor lies in its storage
LAYOUTS = ("contiguous", "permuted", "channels_last", "stepped", "expanded", "offset", "padded", "negated")
KINDS = ("normal", "ties", "special", "huge", "tiny")
# of every dtype of floats
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-40, 6e-8, 1e-310, 65504.0, 3e38, -1e300, 1.0)

# {name of a public function: what draws a call of it}, and every name that has one
FUZZERS: dict[str, Callable[[Draws], Call]] = {}
COVERED: set[str] = set()


def fuzzes(*names: str) -> Callable[[Callable[[Draws], Call]], Callable[[Draws], Call]]:
    """Registers what draws calls of the public functions `names`, under the first one."""

    def register(function: Callable[[Draws], Call]) -> Callable[[Draws], Call]:
        assert not COVERED & set(names), names
        COVERED.update(names)
        FUZZERS[names[0]] = function
        return function

    return register


class Draws:
    """Hypothesis' draws, by what they are for; all shrink to their first choice."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def chance(self, one_in: int = 2) -> bool:
        return self.integer(0, one_in - 1) == one_in - 1

    def integer(self, least: int, most: int) -> int:
        return self.draw(st.integers(least, most))

    def number(self, least: float, most: float, *special: float) -> float:
        """In [least, most], the ends and `special` more often; what is less than a float32 holds is 0."""
        if self.chance(2):
            return self.pick(*special, least, most)
        found = self.draw(st.floats(least, most))
        return found if abs(found) > 1e-37 else max(least, 0.0)

    def p(self) -> float:
        """A probability below 1."""
        return self.number(0.0, 0.9999, 0.5, 0.1, 0.75, 1e-9, math.nextafter(1, 0))

    def size(self, most: int = 131, least: int = 0) -> int:
        """0 at times, odd and even ones, those around powers of two."""
        if least == 0 and self.chance(30):
            return 0
        return self.pick(*(each for each in SIZES if least <= each <= most))

    def large(self, most: int) -> int:
        """A size past a limit of some kernel, at most `most`, which is at least the smallest of them."""
        sizes = [each for each in LARGE_SIZES if each <= most]
        return self.pick(*sizes, *sizes[-2:], *sizes[-2:])

    def length(self, usual: int, most: int) -> int:
        """A size up to `usual`, a large one up to `most` at times."""
        return self.large(most) if self.chance(4) else self.size(usual)

    def shape(self, dims: int, most: int = 5000) -> tuple[int, ...]:
        """Of at most `most` elements, at times of ten times as many; so too without its sizes of 0."""
        sizes: list[int] = []
        large = [self.large(10 * most)] if dims > 0 and 10 * most >= LARGE_SIZES[0] and self.chance(8) else []
        most = 10 * most // large[0] if large else most
        for _ in range(dims - len(large)):
            sizes.append(self.size(max(1, most // math.prod(max(1, each) for each in sizes))))
        for each in large:
            sizes.insert(self.integer(0, dims - 1), each)
        return tuple(sizes)

    def float_dtype(self) -> torch.dtype:
        return self.pick(*FLOATS)

    def kind(self) -> str:
        """Of values: mostly normal."""
        return self.pick("normal", "normal", "ties", *KINDS)

    def seed(self) -> int | Tensor | None:
        value = self.draw(st.one_of(st.sampled_from(SEEDS), st.integers(-(2**63), 2**64 - 1)))
        how = self.pick("int", "int", "tensor", "none")
        if how == "none":
            return None  # drawn from torch's generator, which every run of a call seeds anew
        if how == "int":
            return value
        value = value - 2**64 if value >= 2**63 else value
        return torch.full((1,) * self.integer(0, 2), value, dtype=torch.int64)

    def tensor(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        kind: str = "normal",
        high: int = 2,
        low: int = 0,
        layout: str | None = None,
    ) -> Tensor:
        """Of any layout; integers in [low, high)."""
        generator = torch.Generator().manual_seed(self.integer(0, 9999))
        values = _values(tuple(shape), dtype, kind, low, high, generator)
        layout = self.pick(*LAYOUTS) if layout is None else layout
        return laid_out(values, layout, generator)

    def needs(self, **tensors: Any) -> tuple[str, ...]:
        """Any subset of the arguments that are there and can have gradients."""
        return tuple(
            name
            for name, each in tensors.items()
            if each is not None and (not isinstance(each, Tensor) or each.is_floating_point()) and self.chance(2)
        )

    def some(self, **arguments: Any) -> dict[str, Any]:
        """Any subset of keyword arguments, so that defaults are met too; a function is called for its value."""
        return {name: value() if callable(value) else value for name, value in arguments.items() if not self.chance(3)}


def _values(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, low: int, high: int, generator: torch.Generator
) -> Tensor:
    if not dtype.is_floating_point:
        return torch.randint(low, max(high, low + 1), shape, generator=generator).to(dtype)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "uniform":
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    if kind == "ties":
        return (values * 1.5).round().to(dtype)
    if kind == "huge":
        return (values * torch.finfo(dtype).max / 8).to(dtype)
    if kind == "tiny":
        return (values * torch.finfo(dtype).tiny / 8).to(dtype)
    if kind == "special":
        chosen = torch.randint(0, len(SPECIAL), shape, generator=generator)
        mixed = torch.where(
            torch.rand(shape, generator=generator) < 0.3, torch.tensor(SPECIAL).double()[chosen], values
        )
        return mixed.to(dtype)
    return values.to(dtype)


def drop_scale(p: float | Sequence[float]) -> float:
    """What dropout at `p` multiplies by, at most: the terms of sums are as much larger."""
    most = max(p, default=0.0) if isinstance(p, Sequence) else p
    return 65536 / max(1, 65536 - round(65536 * most))


def laid_out(values: Tensor, layout: str, generator: torch.Generator) -> Tensor:
    """The values in a storage with other ones before, between and after them."""
    dims = values.dim()
    order = list(range(dims))  # from the outermost dimension to the innermost
    steps, kept = [1] * dims, [True] * dims
    if layout == "permuted" and dims > 1:
        order = torch.randperm(dims, generator=generator).tolist()
    elif layout == "channels_last" and dims > 2:
        order = [0, *range(2, dims), 1]
    elif layout in ("stepped", "expanded") and dims > 0:
        chosen = int(torch.randint(0, dims, (), generator=generator))
        if layout == "stepped":
            steps[chosen] = int(torch.randint(2, 4, (), generator=generator))
        elif values.shape[chosen] > 0:
            kept[chosen] = False
            values = values.narrow(chosen, 0, 1).expand(values.shape)
    strides, reach = [0] * dims, 1
    for i in reversed(order):
        if kept[i]:
            strides[i] = reach * steps[i]
            reach = max(strides[i] * values.shape[i], reach)
            if layout == "padded" and i == order[-1]:
                reach += int(torch.randint(1, 9, (), generator=generator))
    if reach > 2**26:  # of steps in long dimensions, or of none beside one of size 0
        return values
    before, after = (0, 0) if layout == "contiguous" else torch.randint(0, 9, (2,), generator=generator).tolist()
    if layout == "negated" and not (values.is_floating_point() or values.dtype in (torch.int32, torch.int64)):
        layout = "offset"
    if values.is_floating_point():
        noise = torch.full((before + reach + after,), torch.nan, dtype=values.dtype)
    else:
        noise = torch.randint(-3, 4, (before + reach + after,), generator=generator).to(values.dtype)
    made = noise.as_strided(values.shape, strides, before)
    if values.numel() == 0:
        return made
    if layout == "negated":
        made.copy_(-values)
        return torch._neg_view(made)
    made.as_strided(
        [size if keep else 1 for size, keep in zip(values.shape, kept, strict=True)], strides, before
    ).copy_(values[tuple(slice(None) if keep else slice(0, 1) for keep in kept)])
    return made


# Bad calls: one argument of a good one is made something else.

WRONG: tuple[Any, ...] = (
    None, "text", object(), [], {}, (), (1,), (1, 2, 3), [0.5, "x"], 1j, math.nan, math.inf, -math.inf, -1, 0, 1, 2, 3,
    0.5, 1.0, 1.5, -0.25, True, False, 2**31, 2**32, 2**62, 2**63, 2**64, 2**100, -(2**63) - 1, 10**400, 1e300, -1e300,
    b"bytes", torch.float32, torch.int64, torch.device("cpu"), np.float32(0.5), np.arange(3), (0.1, 0.2), (0.5, 0.1),
    (math.nan, 1.0), (0, 1), (1, 0), (-1, -1), [None, None], "none", "mean", lambda *_: None,
)  # fmt: skip
DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.uint16, torch.uint32,
)  # fmt: skip
TENSOR_CHANGES = (
    "values", "values", "values", "dtype", "more", "less", "longer", "shorter", "empty", "meta", "sparse", "gradient",
    "other", "scalar",
)  # fmt: skip


def spoil(draws: Draws, call: Call) -> Call:
    """The call with one argument spoiled. It may still be a good one."""
    parameters = inspect.signature(call.function).parameters.values()
    names = [each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    # a device is parsed by torch, which says itself what is wrong
    fixed = ("backend", "device", *call.fixed)
    found = [name for name in dict.fromkeys((*call.arguments, *names)) if name not in fixed]
    if call.takes_backend() and draws.chance(20):
        return call.replace(asked=draws.pick("text", "cuda", 1, "triton", b"cpu", "CPU"))
    if not found:
        return call
    name = draws.pick(*found)
    value = call.arguments.get(name)
    # the lists of a mask belong together, and its constructors alone make them
    tensors = [each for each in pytree.tree_leaves(value) if isinstance(each, Tensor)]
    tensors = [] if isinstance(value, pyrx.BlockMask) else tensors
    if tensors and not draws.chance(4):
        chosen = draws.pick(*range(len(tensors)))
        integers = tensors[chosen].dtype in (torch.int32, torch.int64)  # indices, mostly
        whole = isinstance(value, pyrx.NMPacked) or (integers and draws.chance(2))
        spoiled = _spoiled_tensor(draws, tensors[chosen], "values" if whole else draws.pick(*TENSOR_CHANGES))
        found = iter(range(len(tensors)))
        value = pytree.tree_map_only(Tensor, lambda each: spoiled if next(found) == chosen else each, value)
    else:
        value = draws.pick(*WRONG) if draws.chance(3) or not tensors else _some_tensor(draws)
    return call.replace(arguments={**call.arguments, name: value})


def _some_tensor(draws: Draws) -> Tensor:
    return draws.tensor(draws.shape(draws.integer(0, 5), 64), draws.pick(*DTYPES[:10]), draws.kind(), high=5, low=0)


def _spoiled_tensor(draws: Draws, tensor: Tensor, change: str) -> Tensor:
    dims = tensor.dim()
    if change == "dtype":
        return tensor.to(draws.pick(*DTYPES))
    if change == "more":
        return tensor.unsqueeze(draws.integer(0, dims))
    if change in ("less", "longer", "shorter", "empty") and dims > 0:
        dim = draws.integer(0, dims - 1)
        if change == "longer":
            return torch.cat([tensor, tensor.narrow(dim, 0, min(1, tensor.shape[dim]))], dim)
        if change == "empty" or tensor.shape[dim] == 0:
            return tensor.narrow(dim, 0, 0)
        return tensor.select(dim, 0) if change == "less" else tensor.narrow(dim, 0, tensor.shape[dim] - 1)
    if change == "meta":
        return tensor.to("meta")
    if change == "sparse" and dims > 0:
        return tensor.to_sparse()
    if change == "gradient" and tensor.is_floating_point():
        return tensor.detach().clone().requires_grad_()
    if change == "values":
        if tensor.is_floating_point():
            return tensor.clone().fill_(draws.pick(math.nan, math.inf, -1.0, 2.0, 0.0))
        if tensor.dtype is torch.uint8:  # bits, or positions that must differ
            return tensor.clone().fill_(255)
        if tensor.dtype is not torch.bool:
            return tensor.clone().fill_(draws.pick(-1, torch.iinfo(tensor.dtype).max, 0, 1, 2))
        return ~tensor
    return torch.zeros((), dtype=tensor.dtype) if change == "scalar" else _some_tensor(draws)
