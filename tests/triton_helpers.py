"""What the files of tests of Triton kernels share.

One process holds either interpreted or compiled kernels, so the tests of values run themselves again in a process with
TRITON_INTERPRET=1 unless they are in it. Ahead of time, launchers run on CPU tensors up to the launch, which compiles
for a device that is not there.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# no device without the interpreter but a GPU
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]


def here(variants, turn):
    """All of them in the interpreter; on a GPU, which compiles kernels for each, one in turn."""
    return variants if INTERPRETED else variants[turn % len(variants) :][:1]


interpreted = pytest.mark.skipif(not INTERPRETED, reason="one process holds either interpreted or compiled kernels")


def values_in_the_interpreter(file, least):
    """A test that runs the file's tests in the interpreter: at least that many pass."""

    @pytest.mark.slow
    @pytest.mark.skipif(INTERPRETED, reason="these are the tests that it runs")
    def test():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", file]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYRX_REQUIRE": "triton"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=helpers.ROOT, timeout=900)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least, done.stdout[-2000:]

    return test


def device_of(*ops):
    """The fixture `device`, of a file whose kernels are those of `ops`."""

    @pytest.fixture(params=DEVICES)
    def device(request):
        return helpers.need("triton", request.param, ops=ops) and request.param

    return device


def backend_of(op):
    """The fixture `backend`, for an op's tests of every backend."""
    return pytest.fixture(lambda: helpers.need("triton", ops=(op,)), name="backend")


SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
# of the devices that run what is compiled for an architecture the one with the least shared memory: sm_86, sm_89
SMALLEST = {80: 86, 90: 90}
BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"


def cubin():
    """Where report() writes the machine code of a kernel."""
    return Path(os.environ["CUBIN"])


def compile_launches(architecture):
    """From here on launches compile only, into the dict returned: (kernel's name, compiled kernel) by hash."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Device:
        def get_current_target(self):
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self):
            return architecture

        def get_current_stream(self, device):
            return 0

    compiled = {}
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        assert all(size >= 0 for size in grid) and all(size <= 65535 for size in grid[1:])
        compiled[kernel.hash] = (self.fn.__name__, kernel)
        return kernel

    triton.runtime.driver.set_active(Device())
    JITFunction.run = compile_only
    return compiled


def exponents_of(ptx):
    """The instructions that make what 2 is raised to."""
    powers = set(re.findall(r"ex2\.approx\S*\s+%\w+, (%\w+);", ptx))
    made = re.findall(r"^\s*([a-z][\w.]*)\s+(%\w+),", ptx, re.M)
    return sorted({operation for operation, name in made if name in powers})


def report(compiled, of_kernel, **more):
    """Prints one JSON line a compiled kernel: name, registers, stack, shared memory and what `of_kernel` finds."""
    for name, kernel in compiled.values():
        cubin().write_bytes(kernel.asm["cubin"])
        command = [BINARIES / "cuobjdump", "-res-usage", cubin()]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        line = {"registers": registers, "stack": stack, "shared": kernel.metadata.shared}
        print(json.dumps({"kernel": name, **more, **line, **of_kernel(kernel)}))
    compiled.clear()


def ahead_of_time(python, tmp_path, script):
    """What `script`, run by the fixture `python`, reports."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "CUBIN": str(tmp_path / "cubin")}
    found = [json.loads(line) for line in python(script, **environment).splitlines()]
    for each in found:
        print(*(f"{name} {value}" for name, value in each.items()))
    return found


def kernels_of(pattern):
    """The names of the kernels in files of triton_kernels/."""
    return {
        name
        for path in (helpers.ROOT / "triton_kernels").glob(pattern)
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
