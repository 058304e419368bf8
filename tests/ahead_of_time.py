"""Compiles the Triton kernels that launchers launch for a GPU that is not there: in a process of its own."""

import json
import os
import re
import subprocess
from pathlib import Path

import helpers

FOLDER = helpers.ROOT / "triton_kernels"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


def compile_launches(architecture):
    """From here on launches compile only, into the dict returned: (kernel's name, compiled kernel) by hash."""
    import triton
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
        assert all(size >= 0 for size in grid)
        compiled[kernel.hash] = (self.fn.__name__, kernel)
        return kernel

    triton.runtime.driver.set_active(Device())
    JITFunction.run = compile_only
    return compiled


def report(compiled, of_kernel, **more):
    """Prints one JSON line a compiled kernel: name, registers, stack, shared memory and what `of_kernel` finds."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for name, kernel in compiled.values():
        path = Path(os.environ["CUBIN"])
        path.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([cuobjdump, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        line = {"registers": registers, "stack": stack, "shared": kernel.metadata.shared}
        print(json.dumps({"kernel": name, **more, **line, **of_kernel(kernel)}))
    compiled.clear()


def run(python, tmp_path, script):
    """The lines that `script` reports, run by the fixture `python`."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "CUBIN": str(tmp_path / "cubin")}
    found = [json.loads(line) for line in python(script, **environment).splitlines()]
    for each in found:
        print(*(f"{name} {value}" for name, value in each.items()))
    return found


def kernels_of(pattern):
    """The names of the kernels in files of triton_kernels/."""
    return {
        name for path in FOLDER.glob(pattern) for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
