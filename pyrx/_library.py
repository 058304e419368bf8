"""Registers an op once for its compiled kernels (namespace pyrx) and once for its Triton kernels (pyrx_triton)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyrx._backends import ABSENT, TRITON_INTERPRETED
from pyrx._checks import fail

NATIVE = torch.library.Library("pyrx", "DEF")
TRITON = torch.library.Library("pyrx_triton", "DEF")

ROW_OF: dict[str, str] = {}  # of every op


def _launcher(row: str, name: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"pyrx._triton.{row}"), name)(*args)

    return launch


def _has_tangent(args: tuple[Any, ...]) -> bool:
    """Whether forward-mode differentiation goes through one of them."""
    tensors = (each for each in args if isinstance(each, Tensor))
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(each).tangent is not None for each in tensors)


def _autograd_kernel(
    op: Any, setup_context: Callable[..., None], formula: Callable[..., tuple[Any, ...]]
) -> Callable[..., Any]:
    """What torch.library.register_autograd makes, less its filling in of default arguments, which our schemas do not
    have: that costs 5 us an argument and call, more than the kernels of a small head."""

    class Generated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            output = below_autograd(keyset, *args)
            ctx.ops = getattr(torch.ops, op.namespace)  # where the formula finds its backward op
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return None, *formula(ctx, *grads)

    Generated.__name__ = f"{op._opname}_backward"

    def below_autograd(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def kernel(keyset: Any, *args: Any) -> Any:
        if _has_tangent(args):
            fail(op._opname, "reverse-mode differentiation", "as it has no forward mode", "a tangent", RuntimeError)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Generated.apply(keyset, *args)
        return below_autograd(keyset, *args)

    return kernel


def _version_kernel(op: Any) -> Callable[..., Any]:
    """Tells autograd what was written, so that a backward that saved it raises."""
    written = [i for i, each in enumerate(op._schema.arguments) if each.is_write]

    def kernel(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        return result

    return kernel


def define(
    row: str,
    name: str,
    schema: str,
    fake: Callable[..., Any],
    backward: Callable[..., tuple[Any, ...]] | None = None,
    setup_context: Callable[..., None] | None = None,
    native_formula: bool = True,
    writes: bool = False,
) -> None:
    """Defines `name` + `schema` in both namespaces.

    The native op's kernels register themselves when the extension is loaded, with its autograd formula (csrc/autograd)
    where `native_formula`. The Triton op's kernel is the function of the same name in pyrx._triton.<row>, its formula
    is `backward`. With `writes` the arguments that the schema marks are the caller's and are written.
    """
    ROW_OF[name] = row
    libraries = (NATIVE,) if (row, "triton") in ABSENT else (NATIVE, TRITON)
    for library in libraries:
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        qualified = f"{library.ns}::{name}"
        torch.library.register_fake(qualified, fake, lib=library)
    if backward is not None and setup_context is not None:
        for library in (TRITON,) if native_formula else libraries:
            op = getattr(getattr(torch.ops, library.ns), name).default
            library.impl(name, _autograd_kernel(op, setup_context, backward), "Autograd", with_keyset=True)
    for library in libraries if writes else ():
        op = getattr(getattr(torch.ops, library.ns), name).default
        library.impl(name, _version_kernel(op), "ADInplaceOrView", with_keyset=True)
    keys = ("CUDA", "CPU") if TRITON_INTERPRETED else ("CUDA",)
    for key in keys if TRITON in libraries else ():
        TRITON.impl(name, _launcher(row, name), key)


def differentiable_once(op: str, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """A formula's results, which raise where they are differentiated again."""
    if not torch.is_grad_enabled():
        return gradients
    # create_graph=True: the gradients are constants here, so going through them once more must not pass
    message = f"pyrx::{op}: expected one differentiation, got a second: it has no double backward"
    constants = [each.detach().requires_grad_() for each in gradients]
    found = torch._C._functions.DelayedError(message.encode(), len(constants))(*constants)
    return found if isinstance(found, tuple) else (found,)


def namespace(backend: str) -> Any:
    """The ops of a compiled backend."""
    return torch.ops.pyrx_triton if backend == "triton" else torch.ops.pyrx
