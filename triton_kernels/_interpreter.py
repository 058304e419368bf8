"""Repairs of Triton's interpreter, which runs the kernels on the CPU: what is wrong in 3.6 and, loops aside, 3.9."""

import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Handle = interpreter.TensorHandle
_Builder = interpreter.InterpreterBuilder


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return _Handle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded_to_bfloat16(data: Any) -> Any:
    bits = data.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), (bits >> 16) | 0x40, rounded).astype(np.uint16)


@functools.cache
def _languages(fn: Any) -> frozenset[Any]:
    """The modules of Triton's language that a function sees."""
    return frozenset(each for each in (tl, tl.core) if any(each is value for value in fn.__globals__.values()))


def _patch_once() -> None:
    """Calls of device functions patch the whole language again, a third of the interpreter's time."""
    patch, patched = interpreter._patch_lang, set[Any]()

    def patch_lang(fn: Any) -> Any:
        before, seen = frozenset(patched), _languages(fn)
        if seen <= before:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        patched.update(seen)
        undo = scope.restore

        def restore() -> None:
            patched.intersection_update(before)
            undo()

        scope.restore = restore
        return scope

    interpreter._patch_lang = patch_lang


def repair() -> None:
    _patch_once()
    patch, dot, cast = interpreter._patch_lang_tensor, _Builder.create_dot, _Builder.cast_impl

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # a loop bound is read as int(array of one element), which numpy 2.4 refuses
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        # bfloat16 lives in uint16 arrays, which are multiplied as the integers they look like
        return dot(self, _widened(a), _widened(b), *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        # float32 is cut off, not rounded
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return _Handle(_rounded_to_bfloat16(np.ascontiguousarray(source.data)), tl.bfloat16)
        # denormals become zero
        if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
            return _widened(source)
        return cast(self, source, target)

    def create_splat(self: Any, type: Any, arg: Any) -> Any:
        # a comparison's handle has the dtype of what was compared: a splat one would be floats
        return _Handle(np.full(type.shape, arg.data.item(), dtype=arg.data.dtype), arg.dtype.scalar)

    interpreter._patch_lang_tensor = patch_lang_tensor
    _Builder.create_dot, _Builder.cast_impl, _Builder.create_splat = create_dot, cast_impl, create_splat
