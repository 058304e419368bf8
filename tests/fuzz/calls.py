"""One call of a public function, made on fresh copies of its arguments, and what came of it."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from helpers import SLACK, assert_within_budget, bits
from torch import Tensor
from torch.utils import _pytree as pytree

import pyrx
from pyrx import _extension

# op or class, argument, expected, got
HOUSE_ERROR = re.compile(r"pyrx::[\w.]+( [&|~])?: expected .+, got ", re.DOTALL)
# of tensors without data torch raises what it likes
META_ERROR = re.compile(r"meta|get_autocast_dispatch_key", re.IGNORECASE)
# of indices that no kernel of the device reads, in a gradient
GATHER_ERROR = "is out of bounds for dimension"
ERRORS = (ValueError, TypeError, RuntimeError)
# make test-cuda-host: the CPU's ops are CUDA's
CUDA_ON_HOST = (_extension.record or {}).get("sanitize") == "cuda"


@dataclasses.dataclass
class Call:
    """A public function and its arguments, given by name; trees of tensors are arguments too."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    needs: tuple[str, ...] = ()  # arguments whose gradients are asked for
    writes: tuple[str, ...] = ()  # arguments that are written
    exact: bool = True  # results are equal bit for bit; else within the budget of their error against float64
    exact_gradients: bool = False
    floats: tuple[str, ...] = ()  # arguments that are float64 where the error is judged; none: close to the reference
    floor: float = 0.0  # the size of the terms that results are sums of
    fixed: tuple[str, ...] = ()  # arguments that are torch's to check
    hides: bool = False  # what is hidden may be NaN, or not, where it comes of NaN and infinity
    idle: bool = False  # may have nothing to do, or no step with the backend asked for, and then asks none
    asked: Any = None  # a backend that cannot serve, in place of those compared

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={_shown(value)}" for name, value in self.arguments.items())
        return f"{getattr(self.function, '__name__', self.function)}({shown}), gradients of {list(self.needs)}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # Hypothesis prints by it
        printer.text(repr(self))

    def replace(self, **changes: Any) -> Call:
        return dataclasses.replace(self, **changes)

    def takes_backend(self) -> bool:
        parameters = inspect.signature(self.function).parameters.values()
        return any(each.name == "backend" or each.kind is each.VAR_KEYWORD for each in parameters)

    def size_of_terms(self) -> float:
        """Gradients of attention weigh by the log-sum-exp, as exact as the largest logit, what grows with the scale."""
        scale = self.arguments.get("scale")
        return self.floor * max(1.0, scale * scale if isinstance(scale, (int, float)) else 1.0)

    def dtypes(self) -> set[torch.dtype]:
        return {each.dtype for each in _tensors([self.arguments[n] for n in self.floats]) if each.is_floating_point()}

    def in_float64(self) -> Call:
        def double(tensor: Tensor) -> Tensor:
            return tensor.double() if tensor.is_floating_point() else tensor

        changed = {name: pytree.tree_map_only(Tensor, double, self.arguments[name]) for name in self.floats}
        return self.replace(arguments={**self.arguments, **changed})


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if value.layout is not torch.strided or value.is_meta:
            return f"<{kind} {value.layout if value.layout is not torch.strided else 'meta'}>"
        values = f" = {value.tolist()}" if value.numel() <= 24 else ""
        return f"<{kind} strides {list(value.stride())} offset {value.storage_offset()}{values}>"
    if isinstance(value, (pyrx.MixedTarget, pyrx.NMPacked, pyrx.BlockMask)):
        return f"{type(value).__name__}({', '.join(_shown(each) for each in pytree.tree_leaves(value))})"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(map(_shown, value))})"
    return repr(value)


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(tree) if isinstance(each, Tensor)]


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta


def fresh(tree: Any) -> tuple[Any, dict[int, torch.UntypedStorage]]:
    """The tree with its tensors on copies of their storages, and these: strides, offsets, gaps and aliases stay."""
    storages: dict[int, torch.UntypedStorage] = {}

    def copied(tensor: Tensor) -> Tensor:
        if not _is_plain(tensor):
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage.clone()
        made = torch.empty(0, dtype=tensor.dtype)
        made.set_(storages[storage._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())
        made.requires_grad_(tensor.requires_grad)
        return torch._neg_view(made) if tensor.is_neg() else made

    return pytree.tree_map_only(Tensor, copied, tree), storages


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


@dataclasses.dataclass
class Outcome:
    """What a call gave: an error, or results, gradients by name, and the arguments that it wrote."""

    error: Exception | None
    results: list[Any]
    gradients: dict[str, Tensor | None]
    written: dict[str, Any]


def _mask_leaves(mask: pyrx.BlockMask) -> list[Any]:
    """Without what lies past the counts, which says nothing."""
    leaves: list[Any] = [mask.block_size, mask.seq_lengths, mask.key_range, mask.window]
    for counts, indices in ((mask.kv_counts, mask.kv_indices), (mask.q_counts, mask.q_indices)):
        listed = torch.arange(indices.shape[-1]) < counts[..., None]
        leaves += [counts, torch.where(listed, indices, -1)]
    return leaves


def leaves_of(result: Any) -> list[Any]:
    masks = pytree.tree_leaves(result, is_leaf=lambda each: isinstance(each, pyrx.BlockMask))
    found: list[Any] = []
    for each in masks:
        found += _mask_leaves(each) if isinstance(each, pyrx.BlockMask) else [each]
    return found


def _upstream(result: Tensor, seed: int) -> Tensor:
    """Of eighths, which every dtype represents, not uniform."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-12, 13, result.shape, generator=generator) / 8 + 1 / 16).to(result.dtype)


def run(call: Call, backend: str | None) -> Outcome:
    """Makes the call; fails where it wrote what it must not write, or raised what the house does not raise."""
    arguments, storages = fresh(call.arguments)
    leaves: dict[str, list[Tensor]] = {}
    for name in call.needs:
        found = _tensors(arguments[name])
        leaves[name] = [each.requires_grad_() for each in found if each.is_floating_point()]
    before = {key: _bytes(each).clone() for key, each in storages.items()}
    allowed = {
        each.untyped_storage()._cdata
        for name in call.writes
        for each in _tensors(call.arguments.get(name))
        if _is_plain(each)
    }
    torch.manual_seed(0)
    environment = {} if backend is None or call.takes_backend() else {"PYRX_BACKEND": backend}
    options = {"backend": backend} if call.takes_backend() else {}
    outcome = Outcome(None, [], {}, {})
    try:
        with mock.patch.dict(os.environ, environment):
            result = call.function(**arguments, **options)
            outcome.results = leaves_of(result)
            _differentiate(outcome, leaves)
    except ERRORS as error:
        outcome.error = error
        meta = any(each.is_meta for each in _tensors(call.arguments)) and META_ERROR.search(str(error))
        unread = CUDA_ON_HOST and GATHER_ERROR in str(error)
        assert meta or unread or HOUSE_ERROR.match(str(error)), (
            f"{backend}: not an error of pyrx: {type(error).__name__}: {error}"
        )
        allowed = set()
    for key, storage in storages.items():
        if key not in allowed:
            assert torch.equal(_bytes(storage), before[key]), f"{backend}: an argument was written"
    if outcome.error is None:
        outcome.written = {name: arguments[name] for name in call.writes if name in arguments}
        _check_gaps(call, storages, before)
    return outcome


def _check_gaps(call: Call, storages: dict[int, torch.UntypedStorage], before: dict[int, Tensor]) -> None:
    """Of what is written, the bytes between and around the elements must stay."""
    for name in call.writes:
        for each in _tensors(call.arguments.get(name)):
            if _is_plain(each) and each.numel() > 0:
                key = each.untyped_storage()._cdata
                inside = torch.zeros_like(before[key])
                places = torch.empty(0, dtype=each.dtype).set_(
                    inside.untyped_storage(), each.storage_offset(), each.shape, each.stride()
                )
                places.view(_INTEGERS[each.element_size()]).fill_(-1 if each.element_size() > 1 else 255)
                changed = _bytes(storages[key]) != before[key]
                assert not (changed & (inside == 0)).any(), f"{name}: bytes beside its elements were written"


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _differentiate(outcome: Outcome, leaves: dict[str, list[Tensor]]) -> None:
    inputs = [each for tensors in leaves.values() for each in tensors]
    outputs = [each for each in outcome.results if isinstance(each, Tensor) and each.requires_grad]
    if not inputs or not outputs:
        return
    upstream = [_upstream(each.detach(), i) for i, each in enumerate(outputs)]
    found = iter(torch.autograd.grad(outputs, inputs, upstream, allow_unused=True))
    for name, tensors in leaves.items():
        for i, _ in enumerate(tensors):
            outcome.gradients[f"{name}[{i}]"] = next(found)


def agree(call: Call, *backends: str | None) -> bool:
    """Compares backends with the reference; whether the call was served."""
    if call.asked is not None:
        refused = run(call, call.asked).error is not None
        assert refused or call.idle or call.asked in backends, f"backend {call.asked!r} was taken"
        return False
    plain = run(call, "reference")
    judged = call.floats and not call.exact or call.needs and not call.exact_gradients and call.floats
    exact = run(call.in_float64(), "reference") if judged and plain.error is None else plain
    for backend in backends:
        got = run(call, backend)
        if backend in _DEVICE and _beyond_device(got, plain):
            continue
        _agree(call, backend, got, plain, exact if exact.error is None else plain)
    return plain.error is None


# backends whose kernels check no values, and what the reference says of them
_DEVICE = ("triton", "cpu", None) if CUDA_ON_HOST else ("triton",)
_UNREAD = ("of class ids in", "expected indices in", *(("mask that keeps at most",) if CUDA_ON_HOST else ()))


def _beyond_device(got: Outcome, plain: Outcome) -> bool:
    """Whether Triton does not serve the call, or it has class ids or indices out of range, which only a device sees."""
    unread = any(text in str(plain.error) for text in _UNREAD)
    served = got.error is None or GATHER_ERROR in str(got.error)
    return "'triton', which cannot: " in str(got.error) or (served and unread)


def _agree(call: Call, backend: str | None, got: Outcome, plain: Outcome, exact: Outcome) -> None:
    if any(each.is_meta for each in _tensors(call.arguments)):
        return  # which only the reference serves
    assert (got.error is None) == (plain.error is None), f"{backend}: {got.error!r}, reference: {plain.error!r}"
    if got.error is not None:
        assert type(got.error) is type(plain.error) and str(got.error).lower() == str(plain.error).lower(), (
            f"{backend}: {got.error!r}, reference: {plain.error!r}"
        )
        return
    pairs = [("results", got.results, plain.results, exact.results, call.exact)]
    for name in call.writes:
        pairs.append((name, *(pytree.tree_leaves(each.written.get(name)) for each in (got, plain, exact)), call.exact))
    assert got.gradients.keys() == plain.gradients.keys()
    names = list(got.gradients)
    gradients = ([each.gradients.get(name) for name in names] for each in (got, plain, exact))
    pairs.append((f"gradients {names}", *gradients, call.exact_gradients))
    for name, *sides, is_exact in pairs:
        assert len(sides[0]) == len(sides[1]) == len(sides[2]), name
        for i, (one, two, three) in enumerate(zip(*sides, strict=True)):
            what = f"{backend}: {name}[{i}]"
            if isinstance(one, Tensor):
                compare(one, two, three, what, is_exact, call)
            else:
                assert one == two, f"{what}: {one!r}, reference {two!r}"


def _moderate(call: Call) -> bool:
    """Whether no argument is NaN or infinite, or a number whose products may be."""
    numbers = [each for each in call.arguments.values() if isinstance(each, float)]
    tensors = [each for each in _tensors(call.arguments) if _is_plain(each)]
    return all(abs(each) < 1e100 for each in numbers) and all(each.isfinite().all() for each in tensors)


def compare(got: Tensor, plain: Any, exact: Tensor, what: str, is_exact: bool, call: Call) -> None:
    assert isinstance(plain, Tensor), f"{what}: a Tensor, reference {plain!r}"
    assert got.dtype == plain.dtype and got.shape == plain.shape, (
        f"{what}: {got.dtype} {list(got.shape)}, reference {plain.dtype} {list(plain.shape)}"
    )
    got, plain, exact = (each.detach().resolve_neg() for each in (got, plain, exact))
    if is_exact or not got.is_floating_point():
        if got.is_floating_point():
            got, plain = (torch.where(each.isnan(), torch.nan, each) for each in (got, plain))
        if got.is_complex():
            got, plain = torch.view_as_real(got), torch.view_as_real(plain)
        different = bits(got) != bits(plain)
        assert not different.any(), (
            f"{what}: {int(different.sum())} of {different.numel()} differ in their bits, first "
            f"{got[different][0].item()}, reference {plain[different][0].item()}"
        )
        return
    # where float64 and the dtype itself agree that a number comes out, and where they agree that none does
    finite = plain.isfinite() & exact.isfinite()
    none = ~(plain.isfinite() | exact.isfinite())
    if call.hides and not _moderate(call):
        finite, none = finite & got.isfinite(), torch.zeros_like(none)
    # a sum that nearly overflows may do so in another order
    finite &= got.isfinite() | (exact.abs() <= torch.finfo(got.dtype).max / 64)
    assert got[finite].isfinite().all(), f"{what}: {got[finite & ~got.isfinite()][:4]}, reference {plain[finite][:4]}"
    assert not got[none].isfinite().any(), f"{what}: finite {got[none][:4]}, reference {plain[none][:4]}"
    if finite.any():
        # what comes of 16-bit tensors has their error, in whatever dtype it is
        lowest = max((got.dtype, *call.dtypes()), key=lambda each: torch.finfo(each).eps)
        slack = 4 * SLACK[lowest] * torch.finfo(lowest).eps / torch.finfo(got.dtype).eps
        assert_within_budget(got[finite], plain[finite], exact[finite], what, slack, call.size_of_terms())
