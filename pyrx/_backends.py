"""Which backend serves a call: one function gives the reasons, one picks."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from pyrx import _extension
from pyrx._checks import FLOAT_DTYPES, fail

OPS = (
    "dropout",
    "multi_sample_dropout",
    "batch_mix",
    "neighbor_fill",
    "mixed_cross_entropy",
    "patch_mask",
    "blend",
    "random_erasing",
    "noise_mask",
    "nm_sparsity",
    "nm_transposable",
    "nm_packed",
    "masked_update",
    "block_mask",
    "block_pool",
    "block_mass",
    "block_sparse_attention",
)
# backends that a row does without, by design, and what serves in their place
ABSENT = {
    ("block_mask", "triton"): "its GPU kernels are CUDA C++",
    ("block_pool", "triton"): "its GPU kernels are CUDA C++",
    ("block_mass", "cuda"): "its GPU kernels are Triton's",
    ("block_sparse_attention", "cuda"): "its GPU kernels are Triton's",
}
BACKENDS = ("reference", "cpu", "cuda", "triton")
_Function = TypeVar("_Function", bound=Callable[..., Any])

# Triton's interpreter runs its kernels on CPU tensors; the variable must be set before triton is imported.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# the op that tells whether a row was built, where it does not have the row's name
_OP_OF_ROW = {
    "nm_sparsity": "nm_sparsify",
    "nm_transposable": "nm_transposable_mask",
    "nm_packed": "nm_compress",
    "masked_update": "masked_adamw",
    "block_mask": "block_lists",
}


def _has_kernel(row: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"pyrx::{_OP_OF_ROW.get(row, row)}", key)


def constant_in_compile(function: _Function) -> _Function:
    """torch.compile runs it once instead of tracing it.

    What torch.compiler.assume_constant_result sets: that imports torch._dynamo, which takes as long as torch itself.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_compile
def reasons(op: str, backend: str, device_type: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """Why `backend` cannot serve `op` on this device and dtype; an empty list says that it can."""
    return _reasons(op, backend, device_type, dtype)


@functools.cache
def _reasons(op: str, backend: str, device_type: str, dtype: torch.dtype) -> list[str]:
    if backend == "reference":
        return []
    found = []
    served = ("cpu", "cuda") if backend == "triton" and TRITON_INTERPRETED else ("cpu" if backend == "cpu" else "cuda",)
    if device_type not in served:
        found.append(f"it serves device {' and '.join(served)}, not {device_type}")
    if (op, backend) in ABSENT:
        found.append(ABSENT[op, backend])
    elif backend in ("cpu", "cuda"):
        if _extension.error is not None:
            found.append(_extension.error)
        elif not _has_kernel(op, backend.upper()):
            found.append(f"the extension was built without {backend.upper()} kernels")
    dtypes = _TRITON_DTYPES if backend == "triton" else FLOAT_DTYPES
    if dtype not in dtypes:
        found.append(f"it has no {dtype} kernel")
    if backend == "triton" and not _has_triton():
        found.append("the package triton is not installed")
    if backend in ("cuda", "triton") and device_type == "cuda" and not torch.cuda.is_available():
        found.append("torch sees no CUDA device")
    return found


def select(op: str, device_type: str, dtype: torch.dtype, backend: str | None) -> str:
    """The backend that serves this call: the one asked for (argument, then PYRX_BACKEND, unless the row does without
    it) or the first that can."""
    if backend is None:
        backend = os.environ.get("PYRX_BACKEND") or None
        if (op, backend) in ABSENT:
            backend = None
    if backend is None or backend == "auto":
        for each in ("cpu", "cuda", "triton"):
            if not reasons(op, each, device_type, dtype):
                return each
        return "reference"
    if backend not in BACKENDS:
        fail(op, "backend", "to be one of " + ", ".join(map(repr, BACKENDS)), repr(backend))
    found = reasons(op, backend, device_type, dtype)
    if found:
        fail(
            op,
            "backend",
            f"that serves {dtype} on {device_type}",
            f"{backend!r}, which cannot: " + "; ".join(found),
            RuntimeError,
        )
    return backend
