"""Predicts the time of every GPU kernel, without a GPU: python bench/gpu_model.py (make gpu-model)

Bytes and operations are those of gpu_cases.py and gpu_cases_sparse.py; registers, local memory, shared memory and
instructions are read from the machine code: of the CUDA kernels in the built extension, which must have code for
sm_80 and sm_90, and of the Triton kernels as their launchers compile them. Writes bench/gpu_model.md.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "tests")]
ARCHITECTURES = (80, 90)


class Device(NamedTuple):
    """Rates a second of a whole device. `launch`: what a kernel takes beside its work, in a graph."""

    name: str
    architecture: int
    memory: float  # bytes, as a large copy reaches it
    alu: float
    fma: float
    mufu: float
    tensor: float  # 16 bits, as a large product reaches it
    plain: float
    launch: float
    shared: int  # bytes a multiprocessor


def device(
    name: str, architecture: int, units: int, clock: float, memory: float, tensor: float, plain: float, shared: int
) -> Device:
    lanes = units * clock
    return Device(name, architecture, memory, 64 * lanes, 128 * lanes, 16 * lanes, tensor, plain, 3.4e-6, shared * 1024)


# The H200's copy and product were measured on one, its launch is what the smallest floors of
# results/dropout-cuda.json take beyond their bytes. The A100's are 85 % of its data sheet.
DEVICES = (
    device("H200", 90, 132, 1.755e9, 4.3e12, 788e12, 50e12, 228),
    device("A100 80 GB", 80, 108, 1.41e9, 1.73e12, 265e12, 16.5e12, 164),
)


class Usage(NamedTuple):
    """Of one compiled kernel. `local`: loads and stores of local memory among the instructions, None: not looked."""

    registers: int
    stack: int
    shared: int
    threads: int
    programs: int = 0
    instructions: int = 0
    local: int | None = None
    loops: int = 0
    widest: int = 0  # bits of a load from global memory
    products: str = ""  # the matrix instructions


def binaries() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin"


def run(*command: Any) -> str:
    return subprocess.run([str(each) for each in command], capture_output=True, text=True, check=True).stdout


INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")


class Code:
    """What a disassembly tells, a line at a time."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.loops, self.widest, self.total = 0, 0, 0

    def read(self, line: str) -> None:
        found = INSTRUCTION.match(line)
        if found is None or found[2] == "NOP":
            return
        self.total += 1
        name, *parts = found[2].split(".")
        self.counts[name] += 1
        if name == "LDG":
            width = next((int(each) for each in parts if each in ("64", "128")), 32)
            self.widest = max(self.widest, 8 if "U8" in parts else 16 if "U16" in parts else width)
        # the last branch of all is to itself
        target = re.search(r"0x([0-9a-f]+)", found[3]) if name == "BRA" else None
        if target is not None and int(target[1], 16) < int(found[1], 16):
            self.loops += 1

    def of(self, usage: Usage) -> Usage:
        products = [name for name in ("HGMMA", "HMMA") if self.counts[name]]
        return usage._replace(
            instructions=self.total, local=self.counts["LDL"] + self.counts["STL"], loops=self.loops,
            widest=self.widest, products=", ".join(products),
        )  # fmt: skip


# The CUDA kernels.


def resource_usage(text: str) -> Iterator[tuple[int, str, tuple[int, int, int]]]:
    """(architecture, mangled name, (registers, stack, shared memory)) of cuobjdump -res-usage."""
    architecture, name = 0, ""
    for line in text.splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.match(r" Function (\S+):", line):
            name = found[1]
        elif found := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            yield architecture, name, (int(found[1]), int(found[2]), int(found[3]))


def cuda_usage(extension: Path, kernels: list[Any]) -> dict[tuple[str, int], Usage]:
    """By instance and architecture."""
    text = run(binaries() / "cuobjdump", "-res-usage", extension)
    # of sm_90 the usage that is reported has the system's 1 KiB in it, where a kernel has any
    found = [
        (architecture, name, (registers, stack, shared - 1024 if architecture == 90 and shared >= 1024 else shared))
        for architecture, name, (registers, stack, shared) in resource_usage(text)
    ]
    missing = [each for each in ARCHITECTURES if not any(one[0] == each for one in found)]
    if missing:
        sys.exit(f"{extension.name} has no code for sm_{missing[0]}: make gpu-model builds it")
    names = sorted({name for _, name, _ in found})
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    clear = dict(zip(names, plain.splitlines(), strict=True))
    usages, of_name = {}, {}
    for kernel in kernels:
        matches = [name for name, text in clear.items() if kernel.instance in text]
        if len(matches) != 1:
            sys.exit(f"{kernel.instance}: {len(matches)} kernels have that in their names")
        of_name[matches[0]] = kernel
        for architecture, name, (registers, stack, shared) in found:
            if name == matches[0]:
                usages[kernel.instance, architecture] = Usage(registers, stack, shared + kernel.dynamic, kernel.threads)
    for name, code in disassembled(extension, set(of_name)):
        key = of_name[name].instance, 90
        usages[key] = code.of(usages[key])
    return usages


def disassembled(extension: Path, names: set[str]) -> Iterator[tuple[str, Code]]:
    command = [str(binaries() / "cuobjdump"), "-sass", "-arch", "sm_90", str(extension)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        name, code = "", Code()
        assert process.stdout is not None
        for line in process.stdout:
            if "Function :" in line:
                if name in names:
                    yield name, code
                name, code = line.split()[-1], Code()
            elif name in names:
                code.read(line)
        if name in names:
            yield name, code


# The Triton kernels.


def print_triton_usage(architecture: int) -> None:
    """In a process of its own: one JSON line a case, of what its call launches, in order."""
    import torch
    import triton_helpers
    from triton.runtime.jit import JITFunction

    from pyrx import _backends, _library

    compiled = triton_helpers.compile_launches(architecture)
    # the launchers take tensors of the CPU, as nothing is run
    _backends.reasons = lambda *arguments: []
    for name, row in _library.ROW_OF.items():
        if (row, "triton") not in _backends.ABSENT:
            _library.TRITON.impl(name, _library._launcher(row, name), "CPU")
    launches: list[tuple[str, Any, int]] = []
    compile_only = JITFunction.run

    def recorded(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = compile_only(self, *arguments, grid=grid, warmup=warmup, **options)
        launches.append((f"{Path(self.fn.__code__.co_filename).stem}:{self.fn.__name__}", kernel, math.prod(grid)))
        return kernel

    JITFunction.run = recorded
    cubin = Path(os.environ["CUBIN"])
    torch.set_num_threads(2)
    for case in all_cases():
        if case.call is None:
            continue
        launches.clear()
        compiled.clear()
        rest = case.call()
        if callable(rest):
            launches.clear()
            rest()
        found = []
        for name, kernel, programs in launches:
            cubin.write_bytes(kernel.asm["cubin"])
            ((_, _, (registers, stack, shared)),) = resource_usage(run(binaries() / "cuobjdump", "-res-usage", cubin))
            metadata = kernel.metadata
            usage = Usage(registers, stack, max(shared, metadata.shared), 32 * metadata.num_warps, programs)
            code = Code()
            for line in run(binaries() / "cuobjdump", "-sass", cubin).splitlines():
                code.read(line)
            found.append([name, code.of(usage)])
        print(json.dumps([case.name, found]), flush=True)


def triton_usage(architecture: int) -> dict[str, list[tuple[str, Usage]]]:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "CUBIN": f"{folder}/cubin", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, __file__, "--triton", str(architecture)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: [(kernel, Usage(*usage)) for kernel, usage in found] for name, found in lines}


# Occupancy and time.


def occupancy(usage: Usage, shared_memory: int) -> float:
    """The share of a multiprocessor's 64 warps that its registers and shared memory hold. A block's shared memory has
    1 KiB of the system's beside its own."""
    warps = math.ceil(usage.threads / 32)
    registers = math.ceil(usage.registers * 32 / 256) * 256 * warps
    shared = math.ceil((usage.shared + 1024) / 128) * 128
    blocks = min(64 // warps, 32, 65536 // registers, shared_memory // shared)
    return blocks * warps / 64


class Time(NamedTuple):
    """In seconds. `best`: all units work at once; `serial`: none while another does. Launches are in both."""

    best: float
    serial: float
    bound: str


def time_of(cost: Any, on: Device, usage: Usage | None = None) -> Time:
    parts = {
        "memory": cost.bytes / on.memory,
        "integers": cost.alu / on.alu,
        "float32": cost.fma / on.fma,
        "exponentials": cost.mufu / on.mufu,
        "matrix": cost.tensor / on.tensor,
        "float32 products": cost.plain / on.plain,
    }
    if usage is not None and usage.programs and not usage.loops and on.architecture == 90:
        # without a loop all that is issued is known: one instruction a clock and scheduler, of 32 lanes
        parts["instructions"] = usage.instructions * usage.threads * usage.programs / on.fma
    bound = max(parts, key=parts.__getitem__)
    launch = cost.launches * on.launch
    work = ("integers", "float32", "exponentials", "matrix", "float32 products")
    serial = max(parts["memory"], parts.get("instructions", 0.0), sum(parts[each] for each in work))
    return Time(parts[bound] + launch, serial + launch, bound if parts[bound] > launch else f"launch ({bound})")


def all_cases() -> list[Any]:
    import gpu_cases
    import gpu_cases_sparse as sparse

    return [*gpu_cases.cases(), *sparse.sparsity_cases(), *sparse.optimizer_cases(), *sparse.attention_cases()]


def modelled() -> set[str]:
    """Every kernel that has a cost, CUDA's by name and Triton's as file:name."""
    return {kernel.kernel for case in all_cases() for kernel in (*case.cuda, *case.triton)}


def in_the_tree() -> set[str]:
    found = set()
    for path in (ROOT / "csrc/cuda").glob("*.cuh"):
        found |= set(
            re.findall(r"__global__ void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?(\w+)\(", path.read_text())
        )
    for path in (ROOT / "triton_kernels").glob("*.py"):
        found |= {f"{path.stem}:{name}" for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)}
    return found


class Row(NamedTuple):
    """A kernel of a case on one backend, and its usage by architecture."""

    case: str
    backend: str
    kernel: str
    cost: Any
    usage: dict[int, Usage]


def rows_of(extension: Path) -> list[Row]:
    cases = all_cases()
    cuda = cuda_usage(extension, list({kernel.instance: kernel for case in cases for kernel in case.cuda}.values()))
    triton = {each: triton_usage(each) for each in ARCHITECTURES}
    rows = []
    for case in cases:
        for kernel in case.cuda:
            usage = {each: cuda[kernel.instance, each] for each in ARCHITECTURES}
            rows.append(Row(case.name, "cuda", shown(kernel.instance), kernel.cost, usage))
        launched = {each: triton[each].get(case.name, []) for each in ARCHITECTURES}
        if {name for name, _ in launched[90]} != {kernel.kernel for kernel in case.triton}:
            sys.exit(f"{case.name} launches {[name for name, _ in launched[90]]}: its case has others")
        for kernel in case.triton:
            usage = {a: next(usage for name, usage in launched[a] if name == kernel.kernel) for a in ARCHITECTURES}
            count = sum(name == kernel.kernel for name, _ in launched[90])
            rows.append(Row(case.name, "triton", kernel.kernel, kernel.cost._replace(launches=count), usage))
    return rows


def shown(instance: str) -> str:
    text = instance.replace("__nv_bfloat16", "bfloat16").replace("pyrx::cuda::", "").replace("cuda::", "")
    return text.removesuffix("(")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extension", type=Path, help="the built extension (default: the tree's)")
    parser.add_argument("--triton", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.triton is not None:
        return print_triton_usage(arguments.triton)
    built = [arguments.extension] if arguments.extension else sorted((ROOT / "pyrx").glob("_C*.so"))
    if not built:
        parser.error("no extension is built here: make gpu-model builds it")
    import gpu_report

    page = HERE / "gpu_model.md"
    page.write_text(gpu_report.page(rows_of(built[0])))
    print(f"page: {page}")


if __name__ == "__main__":
    main()
