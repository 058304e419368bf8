"""Calls give back what they take: the bytes of malloc, Python's blocks and the tensors alive are as many as before."""

import ctypes
import gc
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import CALLS, run
from helpers import threads


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


_mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
if _mallinfo2 is not None:
    _mallinfo2.restype = _Mallinfo

counts = pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.large)])


def in_use():
    """(bytes, blocks, tensors)."""
    gc.collect()
    info = _mallinfo2()
    tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    return info.uordblks + info.hblkhd, sys.getallocatedblocks(), tensors


def assert_constant(function, count):
    """A leak takes some in every call; less than half of the least of that is noise, in the quietest of some rounds:
    the first ones fill caches."""
    if _mallinfo2 is None:
        pytest.skip("no mallinfo2 in this C library")
    most = (16 * count, count / 2, count / 2)
    with threads(1):
        for _ in range(20):
            function()
        gc.collect()
        gc.freeze()  # what is there already: counting is quick then
        least = [math.inf] * 3
        for _ in range(8 if count < 1000 else 1):
            before = in_use()
            for _ in range(count):
                function()
            least = [min(one, after - was) for one, after, was in zip(least, in_use(), before, strict=True)]
            if constant := all(one < limit for one, limit in zip(least, most, strict=True)):
                break
        gc.unfreeze()
    assert constant, f"expected no growth over {count} calls, got at least {least} bytes, blocks and tensors"


@counts
@pytest.mark.parametrize("name", CALLS)
def test_calls_leave_nothing(cpu, name, count):
    tensors = CALLS[name].tensors()
    assert_constant(lambda: run(name, tensors=tensors), count)


@counts
@pytest.mark.parametrize("name", [name for name in CALLS if name != "token_dropout"])  # which takes any dtype
def test_errors_leave_nothing(cpu, name, count):
    """Of a dtype that no op takes, and of a backend that cannot serve."""
    call, tensors = CALLS[name], CALLS[name].tensors()
    wrong = [tensors[0].to(torch.complex64), *tensors[1:]]

    def function():
        for each, options in ((wrong, {}), (tensors, {"backend": "cuda"})):
            try:
                call(*each, seed=5, **options)
            except (TypeError, ValueError, RuntimeError):
                seen.append(1)

    seen = []
    function()
    assert seen, "expected an error"
    assert_constant(lambda: (function(), seen.clear()), count)


def test_a_leak_is_seen():
    kept = []
    with pytest.raises(AssertionError, match="expected no growth"):
        assert_constant(lambda: kept.append(torch.ones(3)), 200)
    lent = []
    malloc = ctypes.CDLL(None).malloc
    malloc.restype = ctypes.c_void_p
    with pytest.raises(AssertionError, match="expected no growth"):
        assert_constant(lambda: lent.append(malloc(100)) or lent.clear(), 200)


@pytest.mark.cpu_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("mode", ["independent", "antithetic"])
def test_many_samples_take_no_more_than_one(cpu, mode):
    """The peak that a step of the fused head adds, 32 samples against 1, each in a process of its own."""
    script = Path(__file__).parents[1] / "bench" / "bench_multi_sample_dropout.py"

    def peak(samples):
        command = [sys.executable, str(script), "--memory", f"pyrx {mode}", "--samples", str(samples)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return int(done.stdout.splitlines()[-1])

    for _ in range(3):  # on a busy machine a thread may find no task, and its scratch is not touched
        one, many = peak(1), peak(32)
        if many <= 1.1 * one:
            return
    pytest.fail(f"expected at most 1.1 times {one} bytes, got {many}")
