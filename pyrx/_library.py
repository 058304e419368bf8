"""Registers an op once for its compiled kernels (namespace pyrx) and once for its Triton kernels (pyrx_triton)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from pyrx._backends import TRITON_INTERPRETED

NATIVE = torch.library.Library("pyrx", "DEF")
TRITON = torch.library.Library("pyrx_triton", "DEF")


def _launcher(row: str, name: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"pyrx._triton.{row}"), name)(*args)

    return launch


def define(
    row: str,
    name: str,
    schema: str,
    fake: Callable[..., Any],
    backward: Callable[[Any], Callable[..., Any]] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Defines `name` + `schema` in both namespaces. `backward(namespace)` gives the formula over that namespace's ops.

    The C++ kernels of the native op register themselves when the extension is loaded; the Triton op's kernel is the
    function of the same name in pyrx._triton.<row>.
    """
    for library in (NATIVE, TRITON):
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        qualified = f"{library.ns}::{name}"
        torch.library.register_fake(qualified, fake, lib=library)
        if backward is not None:
            formula = backward(getattr(torch.ops, library.ns))
            torch.library.register_autograd(qualified, formula, setup_context=setup_context, lib=library)
    keys = ("CUDA", "CPU") if TRITON_INTERPRETED else ("CUDA",)
    for key in keys:
        TRITON.impl(name, _launcher(row, name), key)


def namespace(backend: str) -> Any:
    """The ops of a compiled backend."""
    return torch.ops.pyrx_triton if backend == "triton" else torch.ops.pyrx
