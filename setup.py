"""Builds pyrx._C: the C++ sources always, the CUDA sources when nvcc and a CUDA torch are there.

Environment:
  FORCE_CUDA            1: CUDA or an error; 0: no CUDA; unset: CUDA if it can be built
  TORCH_CUDA_ARCH_LIST  "8.0;9.0+PTX"; default: the visible GPU's, without one 8.0 and 9.0, the last as PTX too
  MAX_JOBS              compiler processes at a time
  DEBUG                 1: -O0 -g
  SANITIZE              memory: under AddressSanitizer and UndefinedBehaviorSanitizer (make fuzz-sanitize);
                        threads: under ThreadSanitizer (make test-threads);
                        cuda: as memory, with the CUDA kernels on the host in the CPU's place (make test-cuda-host)
  NVCC_FLAGS            more flags for nvcc
  CUDA_HOME, CXX        the toolkit and the C++ compiler to use

Nothing is downloaded. What was decided, and why, is printed and kept in pyrx/_build_info.json.
The decisions only look at their arguments, so that tests/test_build.py can call them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
STANDARD = "c++20"
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZERS = {"": [], "memory": MEMORY, "threads": ["-fsanitize=thread"], "cuda": MEMORY}
OPENMP = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


class BuildError(SystemExit):
    """What was asked for cannot be built; the text says why."""


@dataclass
class Nvcc:
    path: str
    found_in: str
    toolkit: str
    version: str
    archs: list[str]


@dataclass
class Plan:
    torch: str
    torch_cuda: str | None
    compiler: str | None
    nvcc: Nvcc | None
    extension: bool = False
    cuda: bool = False
    debug: bool = False
    sanitize: str = ""
    arch_list: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    cxx_flags: list[str] = field(default_factory=list)
    nvcc_flags: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    python: str = platform.python_version()


def truth(name: str, value: str | None) -> bool | None:
    """The three states of a switch: on, off, not set."""
    states = {"": None, "1": True, "true": True, "on": True, "yes": True}
    states |= {"0": False, "false": False, "off": False, "no": False}
    key = (value or "").strip().lower()
    if key not in states:
        raise BuildError(f"pyrx build: expected {name} to be 0, 1 or unset, got {value!r}")
    return states[key]


def nvcc_candidates(
    env: Mapping[str, str], which: Callable[[str], str | None], site_dirs: Iterable[str], torch_cuda: str | None
) -> list[tuple[str, str]]:
    """Where nvcc may be, best first: (path, how it was found)."""
    out = []
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(name):
            out.append((os.path.join(env[name], "bin", "nvcc"), name))
    if on_path := which("nvcc"):
        out.append((on_path, "PATH"))
    for home in nvidia_dirs(site_dirs, torch_cuda):
        out.append((os.path.join(home, "bin", "nvcc"), "site-packages"))
    return out


def nvidia_dirs(site_dirs: Iterable[str], torch_cuda: str | None) -> list[str]:
    """Where pip puts NVIDIA's packages of torch's CUDA major version."""
    if torch_cuda is None:
        return []
    return [os.path.join(site, "nvidia", f"cu{torch_cuda.split('.')[0]}") for site in site_dirs]


def nvcc_release(text: str) -> str | None:
    """The version, such as 13.0, in the output of nvcc --version."""
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else None


def decide_cuda(
    force: bool | None, torch_cuda: str | None, nvcc_version: str | None, has_sources: bool = True
) -> tuple[bool, list[str]]:
    """Whether the CUDA sources are built, and why."""
    if force is False:
        return False, ["no CUDA: FORCE_CUDA=0"]
    obstacles, notes = [], []
    if not has_sources:
        obstacles.append("no CUDA: there is no csrc/cuda/*.cu")
    if torch_cuda is None:
        obstacles.append("no CUDA: this torch is built without CUDA")
    if nvcc_version is None:
        package = f'pip install "cuda-toolkit[nvcc,cccl,crt,nvvm]=={torch_cuda or "<CUDA version of torch>"}.*"'
        obstacles.append(f"no CUDA: nvcc was not found in CUDA_HOME, on the PATH or in site-packages ({package})")
    elif torch_cuda is not None and nvcc_version != torch_cuda:
        if nvcc_version.split(".")[0] != torch_cuda.split(".")[0]:
            obstacles.append(f"no CUDA: expected nvcc of CUDA {torch_cuda} as torch has, got {nvcc_version}")
        else:
            notes.append(f"nvcc is of CUDA {nvcc_version}, torch of {torch_cuda}: minor versions may differ, going on")
    if obstacles and force:
        raise BuildError("pyrx build: FORCE_CUDA=1, but\n  " + "\n  ".join(obstacles))
    if obstacles:
        return False, obstacles
    return True, notes or [f"CUDA: nvcc and torch are both of CUDA {torch_cuda}"]


def decide_archs(
    asked: str | None, gpus: Iterable[tuple[int, int]], torch_archs: Iterable[str], nvcc_archs: Iterable[str]
) -> tuple[list[str], str]:
    """The CUDA architectures, in TORCH_CUDA_ARCH_LIST's notation, and why these."""
    if asked and asked != "native":
        return asked.replace(" ", ";").split(";"), "TORCH_CUDA_ARCH_LIST"
    known = sorted({arch_number(a) for a in nvcc_archs})
    gpus = sorted(set(gpus))
    if gpus:
        # a GPU newer than nvcc runs the newest PTX that nvcc can write
        usable = sorted({max((k for k in known if k <= gpu), default=gpu) for gpu in gpus})
        newer = any(gpu not in usable for gpu in gpus)
        archs = [f"{major}.{minor}" for major, minor in usable]
        if newer:
            archs[-1] += "+PTX"
        return archs, "the GPUs of this machine"
    shared = {arch_number(a) for a in torch_archs} & set(known)
    usable = sorted({(8, 0), (9, 0)} & shared) or sorted(shared)[-1:] or known[-1:]
    archs = [f"{major}.{minor}" for major, minor in usable]
    if archs:
        archs[-1] += "+PTX"
    return archs, "default, no GPU is visible; newer GPUs compile the PTX when they first load it"


def arch_number(name: str) -> tuple[int, int]:
    """(9, 0) from sm_90, compute_90 or sm_90a."""
    digits = re.sub(r"\D", "", name.split("_")[-1])
    return int(digits[:-1]), int(digits[-1])


def sanitizer_flags(sanitize: str, compiler: str) -> list[str]:
    # clang's runtime is in the program unless it is told otherwise, and Python is the program
    return SANITIZERS[sanitize] + ["-shared-libsan"] * (sanitize != "" and "clang" in compiler)


def decide_flags(
    debug: bool, nvcc_extra: str | None, cuda: bool, sanitize: str = "", compiler: str = ""
) -> tuple[list[str], list[str]]:
    """Flags for the C++ compiler and for nvcc. No -march: the sources pick their SIMD at run time."""
    level = ["-O0", "-g"] if debug else ["-O3", "-g0"]
    # at::parallel_for is a serial loop in a file that is compiled without OpenMP, products fused with sums would give
    # draws and mixed pixels other bits than the reference, and gcc 12 warns of its own AVX-512 headers
    cxx = [
        f"-std={STANDARD}",
        *level,
        "-fopenmp",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
        "-Wno-unknown-warning-option",
    ]
    clang = re.search(r"clang version (\d+)", compiler)
    if clang and int(clang.group(1)) >= 18:  # which names torch's templates otherwise than gcc, which torch is built by
        cxx.append("-fclang-abi-compat=17")
    if debug:
        cxx.append("-UNDEBUG")
    if sanitize:
        cxx += ["-O1", "-g1", "-fno-omit-frame-pointer", "-Wno-unknown-pragmas", *sanitizer_flags(sanitize, compiler)]
    if not cuda:
        return cxx, []
    nvcc = [f"-std={STANDARD}", level[0], "-Xcompiler", "-fopenmp,-fvisibility=hidden"]
    nvcc += ["-g", "-lineinfo"] if debug else []
    return [*cxx, "-DPYRX_CUDA"], [*nvcc, "-DPYRX_CUDA", *shlex.split(nvcc_extra or "")]


# what compiles for longest, first: alone at the end it would be waited for
SLOWEST = ["csrc/cuda/nm_sparsity.cu", "csrc/cuda/masked_update.cu", "csrc/cpu/simd.cpp", "csrc/cpu/nm_simd.cpp"]


CUDA_HOST = "build/cuda-host"  # where tests/cpp/cuda_host/translate.py was told to write


def decide_sources(root: Path, cuda: bool, cuda_host: bool = False) -> list[str]:
    patterns = ["csrc/*.cpp", "csrc/autograd/*.cpp", "csrc/cpu/*.cpp"] + (["csrc/cuda/*.cu"] if cuda else [])
    found = sorted(str(p.relative_to(root)) for pattern in patterns for p in root.glob(pattern))
    if cuda_host:
        rows = {p.name for p in root.glob(f"{CUDA_HOST}/cuda/*.cpp")}
        found = [each for each in found if not (each.startswith("csrc/cpu/") and Path(each).name in rows)]
        found += [f"{CUDA_HOST}/cuda/{row}" for row in sorted(rows)]
    return [each for each in SLOWEST if each in found] + [each for each in found if each not in SLOWEST]


def build_tag(plan: Plan) -> str:
    """What a wheel's name tells of its module, which fits one minor version of torch. It begins with a digit."""
    if not plan.extension:
        return "0reference"
    cuda = f"cu{plan.torch_cuda.replace('.', '')}" if plan.cuda and plan.torch_cuda else "cpu"
    return f"0torch{'.'.join(plan.torch.split('.')[:2])}{cuda}"


def describe(plan: Plan, env: Mapping[str, str]) -> str:
    """The block that a build prints."""
    nvcc = f"{plan.nvcc.version} at {plan.nvcc.path}, found in {plan.nvcc.found_in}" if plan.nvcc else "not found"
    backends = "C++ and CUDA" if plan.cuda else "C++ only" if plan.extension else "none: pure Python, reference only"
    rows = [
        ("builds", backends),
        ("torch", f"{plan.torch} ({f'CUDA {plan.torch_cuda}' if plan.torch_cuda else 'without CUDA'})"),
        ("compiler", plan.compiler or "NOT FOUND"),
        ("nvcc", nvcc),
        ("archs", ";".join(plan.arch_list) or "-"),
        ("C++ flags", " ".join(plan.cxx_flags) or "-"),
        ("nvcc flags", " ".join(plan.nvcc_flags) or "-"),
        ("sources", f"{len(plan.sources)} files, MAX_JOBS={env.get('MAX_JOBS') or 'not set'}"),
        *(("because", reason) for reason in plan.reasons),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(["", "pyrx build", *(f"  {name:<{width}}  {value}" for name, value in rows), ""])


# What follows asks the machine.


def output_of(command: list[str], given: str | None = None) -> str | None:
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None


def find_compiler(env: Mapping[str, str]) -> tuple[str | None, str]:
    """The C++ compiler's command and the first line of its --version, or None and what was tried."""
    names = [env["CXX"]] if env.get("CXX") else ["c++", "g++", "clang++"]
    tried = []
    for name in names:
        command = shlex.split(name)
        if not (text := output_of([*command, "--version"])):
            tried.append(name)
        elif output_of([*command, "-fopenmp", "-x", "c++", "-", "-o", os.devnull], OPENMP) is None:
            tried.append(f"{name} (which has no OpenMP: clang++ needs libomp-dev)")
        else:
            return name, text.splitlines()[0]
    return None, f"no C++ compiler: tried {', '.join(tried)}"


def find_nvcc(env: Mapping[str, str], site_dirs: list[str], torch_cuda: str | None) -> Nvcc | None:
    for path, found_in in nvcc_candidates(env, shutil.which, site_dirs, torch_cuda):
        version = nvcc_release(output_of([path, "--version"]) or "")
        if version is None:
            continue
        # nvcc may be a script elsewhere that calls the real one: ask it for its toolkit
        top = re.search(r"^#\$ TOP=(.*)$", output_of([path, "--dryrun", "-E", "-x", "cu", os.devnull]) or "", re.M)
        toolkit = os.path.realpath(top.group(1).strip() if top else Path(path).parent.parent)
        real = os.path.join(toolkit, "bin", "nvcc")
        archs = (output_of([path, "--list-gpu-arch"]) or "").split()
        return Nvcc(real if os.path.exists(real) else path, found_in, toolkit, version, archs)
    return None


def cudart_of(toolkit: str, nvidia: list[str], cuda_major: str) -> str:
    """The CUDA runtime to link: torch's own first. Named by its file, since pip's has no plain libcudart.so."""
    places = [os.path.join(home, "lib") for home in nvidia]
    places += [os.path.join(toolkit, lib) for lib in ("lib64", "lib", "targets/x86_64-linux/lib")]
    for place in places:
        for name in (f"libcudart.so.{cuda_major}", "libcudart.so"):
            if os.path.exists(path := os.path.join(place, name)):
                return path
    raise BuildError(f"pyrx build: expected libcudart.so.{cuda_major} in one of {places}, got none")


def make_plan(env: Mapping[str, str], torch) -> Plan:
    compiler, compiler_text = find_compiler(env)
    site_dirs = [str(Path(torch.__file__).parent.parent), *(p for p in sys.path if p.endswith("-packages"))]
    site_dirs = list(dict.fromkeys(site_dirs))
    force = truth("FORCE_CUDA", env.get("FORCE_CUDA"))
    torch_cuda = torch.version.cuda
    nvcc = find_nvcc(env, site_dirs, torch_cuda)
    made = Plan(torch.__version__, torch_cuda, compiler and compiler_text, nvcc)
    if compiler is None:
        if force:
            raise BuildError(f"pyrx build: FORCE_CUDA=1, but {compiler_text}")
        made.reasons = [compiler_text, "ops run on the plain PyTorch reference; install g++ and build again for speed"]
        return made
    made.extension = True
    made.debug = bool(truth("DEBUG", env.get("DEBUG")))
    has_sources = any((ROOT / "csrc/cuda").glob("*.cu"))
    made.cuda, made.reasons = decide_cuda(force, torch_cuda, nvcc and nvcc.version, has_sources)
    if "clang" in compiler_text:
        made.reasons.append(
            "clang has OpenMP threads of its own: OMP_NUM_THREADS counts, torch.set_num_threads does not"
        )
    if made.cuda:
        assert nvcc is not None
        gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        torch_archs = [a for a in torch._C._cuda_getArchFlags().split() if a.startswith("sm_")]
        made.arch_list, why = decide_archs(env.get("TORCH_CUDA_ARCH_LIST"), gpus, torch_archs, nvcc.archs)
        made.reasons.append(f"archs: {why}")
    made.sanitize = env.get("SANITIZE", "")
    if made.sanitize not in SANITIZERS:
        raise BuildError(f"pyrx build: expected SANITIZE of memory, threads or cuda, got {made.sanitize}")
    made.cxx_flags, made.nvcc_flags = decide_flags(
        made.debug, env.get("NVCC_FLAGS"), made.cuda, made.sanitize, compiler_text
    )
    made.sources = decide_sources(ROOT, made.cuda, made.sanitize == "cuda")
    return made


def extension_of(plan: Plan, torch) -> Extension:
    from torch.utils import cpp_extension

    os.environ["CXX"] = find_compiler(os.environ)[0]  # one compiler for the compile and the link step
    site = Path(torch.__file__).parent
    include_dirs = [str(ROOT / "csrc"), *cpp_extension.include_paths()]
    if plan.sanitize == "threads":  # which reports OpenMP's own waiting as races
        include_dirs.insert(0, str(ROOT / "tests" / "cpp" / "threads"))
    if plan.sanitize == "cuda":
        include_dirs[:0] = [str(ROOT / path) for path in (CUDA_HOST, "tests/cpp/cuda_host", "tests/cpp")]
    libraries = ["c10", "torch", "torch_cpu", "torch_python"]
    # torch's own OpenMP runtime: a second one would not follow torch.set_num_threads
    gomp = sorted(site.glob("lib/libgomp*.so*")) if "clang" not in (plan.compiler or "") else []
    link = [str(gomp[0])] if gomp else ["-fopenmp"]
    link += sanitizer_flags(plan.sanitize, plan.compiler or "")
    if plan.cuda:
        assert plan.nvcc is not None
        nvidia = nvidia_dirs([str(site.parent)], plan.torch_cuda)
        # the toolkit's headers, then pip's: torch's headers name cuBLAS and others that nvcc alone does not bring
        homes = [plan.nvcc.toolkit, *nvidia]
        include_dirs += [path for home in homes if os.path.isdir(path := os.path.join(home, "include"))]
        libraries += ["c10_cuda", "torch_cuda"]
        link.append(cudart_of(plan.nvcc.toolkit, nvidia, plan.nvcc.version.split(".")[0]))
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(plan.arch_list)
        os.environ["PYTORCH_NVCC"] = plan.nvcc.path
        cpp_extension.CUDA_HOME = plan.nvcc.toolkit
    return Extension(
        "pyrx._C",
        plan.sources,
        language="c++",
        include_dirs=include_dirs,
        library_dirs=cpp_extension.library_paths(),
        libraries=libraries,
        extra_compile_args={"cxx": plan.cxx_flags, "nvcc": plan.nvcc_flags},
        extra_link_args=link,
    )


def build_command(torch) -> type[build_ext]:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            self.plan = make_plan(os.environ, torch)
            self.distribution.ext_modules = [extension_of(self.plan, torch)] if self.plan.extension else []
            super().finalize_options()
            # one object folder for each torch, wherever the result goes: a second build compiles only what changed
            kind = f"sanitize-{self.plan.sanitize}" if self.plan.sanitize else "temp"
            self.build_temp = str(ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}-torch-{torch.__version__}")

        def run(self) -> None:
            print(describe(self.plan, os.environ), flush=True)
            if not self.plan.extension:
                print("pyrx build: WARNING: no C++ compiler, installing pure Python", file=sys.stderr, flush=True)
            super().run()
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None:
                wheel.build_number = build_tag(self.plan)
            package = ROOT / "pyrx" if self.inplace else Path(self.build_lib) / "pyrx"
            package.mkdir(parents=True, exist_ok=True)
            record = json.dumps(asdict(self.plan), indent=1, sort_keys=True)
            (package / "_build_info.json").write_text(record + "\n")

    return Build


class NeedsTorch(build_ext):
    def run(self) -> None:
        raise BuildError(
            "pyrx build: expected torch >= 2.11 to be importable, got none. "
            "Install torch first, or let pip do it: pip install . without --no-build-isolation"
        )


def main() -> None:
    try:
        import torch

        command = build_command(torch)
    except ImportError:
        command = NeedsTorch
    # the sources are listed when the command runs: making a source archive asks nothing of the machine
    # pyproject.toml cannot tell the licence in words that the setuptools of every system understands
    setup(license="MIT", ext_modules=[Extension("pyrx._C", [])], cmdclass={"build_ext": command})


if __name__ == "__main__":
    main()
