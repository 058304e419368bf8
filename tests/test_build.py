"""The build: what setup.py decides, what the built module holds, and how a module that does not fit is reported."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import pyrx
from pyrx import _backends, _extension, _library

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup():
    if not (ROOT / "setup.py").exists():
        pytest.skip("not a source tree")
    spec = importlib.util.spec_from_file_location("pyrx_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def module():
    if _extension.record is not None and not _extension.record["extension"]:
        pytest.skip(_extension.error)
    assert _extension.module is not None, _extension.error
    return _extension.module


# the built module


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_parallel_for_uses_the_threads_torch_is_told(module):
    if "clang" in _extension.record["compiler"]:
        pytest.skip("clang's OpenMP runtime is not torch's")
    before = torch.get_num_threads()
    try:
        seen = []
        for threads in (2, 1):
            torch.set_num_threads(threads)
            seen.append(module.parallel_threads_seen())
    finally:
        torch.set_num_threads(before)
    assert seen == [2, 1], f"expected 2 threads, then 1 after torch.set_num_threads(1), got {seen}"


def test_module_tells_the_build_of_its_record(module):
    info, record = module.build_info(), _extension.record
    assert record["torch"].startswith(info["torch"])
    assert info["cuda"] == record["cuda"]
    assert info["openmp"] > 0


def test_every_op_has_its_kernels(module):
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyrx::")]
    assert names
    keys = ["CPU", "CUDA"] if _extension.record["cuda"] else ["CPU"]
    missing = [
        f"{name} for {key}"
        for name in names
        for key in keys
        if (_library.ROW_OF[name.removeprefix("pyrx::")], key.lower()) not in _backends.ABSENT
        and not torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    ]
    assert not missing, f"no kernel is registered: {missing}"


def test_every_kernel_has_its_schema(module):
    # an implementation of a name that nobody defined is accepted in silence
    dangling = [name for name in torch._C._dispatch_find_dangling_impls() if "pyrx" in name]
    assert not dangling, dangling


# a module that does not fit


def write_record(folder, **changes):
    record = {"extension": True, "torch": torch.__version__, "python": "3.x", "reasons": []} | changes
    (folder / "_build_info.json").write_text(json.dumps(record))


def write_module(folder):
    (folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a module")


def test_missing_extension_is_quiet(tmp_path):
    module, error, loud = _extension.load(tmp_path, torch.__version__)
    assert module is None and not loud and "not built" in error


def test_build_without_compiler_is_quiet(tmp_path):
    write_record(tmp_path, extension=False, reasons=["no C++ compiler: tried c++"])
    write_module(tmp_path)
    module, error, loud = _extension.load(tmp_path, torch.__version__)
    assert module is None and not loud and "tried c++" in error


def test_module_of_another_torch_is_not_opened(tmp_path):
    write_record(tmp_path, torch="1.2.3")
    write_module(tmp_path)
    module, error, loud = _extension.load(tmp_path, "2.11.0+cu130")
    assert module is None and loud
    assert "built for torch 1.2.3" in error and "this is torch 2.11.0+cu130" in error and "pip install" in error
    assert "does not load" not in error


@pytest.mark.parametrize("built", ["2.11.1", "2.11.0+cpu", "2.11.0a0+git1234"])
def test_patch_versions_of_torch_are_not_compared(tmp_path, built):
    write_record(tmp_path, torch=built)
    write_module(tmp_path)
    assert "does not load" in _extension.load(tmp_path, "2.11.0+cu130")[1]


def test_module_that_does_not_load_is_loud(tmp_path):
    write_record(tmp_path)
    write_module(tmp_path)
    module, error, loud = _extension.load(tmp_path, torch.__version__)
    assert module is None and loud and "does not load" in error and torch.__version__ in error


def test_module_of_another_python_is_loud(tmp_path):
    write_record(tmp_path)
    (tmp_path / "_C.cpython-26-x86_64-linux-gnu.so").write_bytes(b"")
    module, error, loud = _extension.load(tmp_path, torch.__version__)
    assert module is None and loud and "no module file for this Python" in error


@pytest.mark.parametrize("text", [None, "", "{", "[]"])
def test_module_without_record_is_not_opened(tmp_path, text):
    write_module(tmp_path)
    if text is not None:
        (tmp_path / "_build_info.json").write_text(text)
    module, error, loud = _extension.load(tmp_path, torch.__version__)
    assert module is None and loud and "_build_info.json" in error


def run(code, folder, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)} | env,
        capture_output=True,
        text=True,
    )


USE = "import pyrx, torch; print(pyrx.__file__, pyrx.dropout(torch.ones(8), 0.5, seed=1).tolist())"


def test_mismatch_warns_and_the_reference_serves(tmp_path):
    shutil.copytree(Path(pyrx.__file__).parent, tmp_path / "pyrx", ignore=shutil.ignore_patterns("*.so", "_triton"))
    write_record(tmp_path / "pyrx", torch="1.2.3")
    write_module(tmp_path / "pyrx")
    done = run(USE, tmp_path)
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stderr
    assert "RuntimeWarning" in done.stderr and "1.2.3" in done.stderr and torch.__version__ in done.stderr


def test_compiler_without_openmp_is_not_used(tmp_path, setup):
    compiler = tmp_path / "clang++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo clang version 1\n')
    compiler.chmod(0o755)
    found, text = setup.find_compiler({"CXX": str(compiler)})
    assert found is None and str(compiler) in text and "libomp-dev" in text


def test_build_without_compiler_installs_python(tmp_path, setup):
    env = os.environ | {"CXX": "no-such-compiler"}
    env.pop("FORCE_CUDA", None)
    command = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path), "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stdout and "pure Python" in done.stderr
    built = tmp_path / "lib" / "pyrx"
    assert json.loads((built / "_build_info.json").read_text())["extension"] is False
    assert not list(built.glob("*.so")) and (built / "py.typed").exists()
    for kernels in (ROOT / "triton_kernels").glob("*.py"):
        assert (built / "_triton" / kernels.name).read_text() == kernels.read_text()
    done = run(USE, tmp_path / "lib")
    assert done.returncode == 0 and str(tmp_path) in done.stdout and not done.stderr.count("RuntimeWarning"), (
        done.stderr
    )


# what setup.py decides


@pytest.mark.parametrize("value, expected", [(None, None), ("", None), ("1", True), ("ON", True), ("0", False)])
def test_switches(setup, value, expected):
    assert setup.truth("FORCE_CUDA", value) is expected


def test_bad_switch(setup):
    with pytest.raises(setup.BuildError, match="expected FORCE_CUDA to be 0, 1 or unset, got 'maybe'"):
        setup.truth("FORCE_CUDA", "maybe")


@pytest.mark.parametrize(
    "force, torch_cuda, nvcc, sources, built, text",
    [
        (None, "13.0", "13.0", True, True, "both of CUDA 13.0"),
        (True, "13.0", "13.0", True, True, "both of CUDA 13.0"),
        (False, "13.0", "13.0", True, False, "FORCE_CUDA=0"),
        (None, "13.2", "13.0", True, True, "nvcc is of CUDA 13.0, torch of 13.2"),
        (None, "13.0", "12.8", True, False, "expected nvcc of CUDA 13.0 as torch has, got 12.8"),
        (None, "13.0", None, True, False, 'cuda-toolkit[nvcc,cccl,crt,nvvm]==13.0.*"'),
        (None, None, "13.0", True, False, "torch is built without CUDA"),
        (None, "13.0", "13.0", False, False, "no csrc/cuda/*.cu"),
    ],
)
def test_cuda_or_not(setup, force, torch_cuda, nvcc, sources, built, text):
    decided, reasons = setup.decide_cuda(force, torch_cuda, nvcc, sources)
    assert decided is built
    assert any(text in reason for reason in reasons), reasons


@pytest.mark.parametrize("torch_cuda, nvcc", [("13.0", None), ("13.0", "12.8"), (None, "13.0")])
def test_forced_cuda_that_cannot_be_built_is_an_error(setup, torch_cuda, nvcc):
    with pytest.raises(setup.BuildError, match="FORCE_CUDA=1, but"):
        setup.decide_cuda(True, torch_cuda, nvcc)


TORCH_ARCHS = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
NVCC_ARCHS = ["compute_75", "compute_80", "compute_86", "compute_90", "compute_100", "compute_103", "compute_120"]


@pytest.mark.parametrize(
    "asked, gpus, expected",
    [
        ("8.6 9.0a+PTX", [(8, 0)], ["8.6", "9.0a+PTX"]),
        ("8.6;12.0", [], ["8.6", "12.0"]),
        (None, [], ["8.0", "9.0+PTX"]),
        ("", [], ["8.0", "9.0+PTX"]),
        (None, [(9, 0)], ["9.0"]),
        (None, [(9, 0), (8, 0), (9, 0)], ["8.0", "9.0"]),
        ("native", [(8, 6)], ["8.6"]),
        (None, [(13, 0)], ["12.0+PTX"]),
    ],
)
def test_architectures(setup, asked, gpus, expected):
    assert setup.decide_archs(asked, gpus, TORCH_ARCHS, NVCC_ARCHS)[0] == expected


def test_architectures_that_nvcc_and_torch_do_not_share(setup):
    assert setup.decide_archs(None, [], ["sm_100"], ["compute_90", "compute_100"])[0] == ["10.0+PTX"]
    assert setup.decide_archs(None, [], [], ["compute_120"])[0] == ["12.0+PTX"]


def test_flags(setup):
    cxx, nvcc = setup.decide_flags(False, "-lineinfo -Xptxas -v", True)
    assert {"-O3", "-fopenmp", "-fvisibility=hidden"} <= set(cxx) and nvcc[-3:] == ["-lineinfo", "-Xptxas", "-v"]
    assert not any(flag.startswith("-march") for flag in cxx + nvcc)
    cxx, nvcc = setup.decide_flags(True, None, False)
    assert {"-O0", "-g", "-fopenmp"} <= set(cxx) and nvcc == []
    named = "-fclang-abi-compat=17"
    texts = ("clang version 17.0.6", "Debian clang version 19.1.7 (3)", "g++ (Debian 12.2.0-14) 12.2.0")
    assert [named in setup.decide_flags(False, None, False, compiler=each)[0] for each in texts] == [False, True, False]
    cxx, _ = setup.decide_flags(False, None, False, sanitize="memory")
    assert cxx.index("-O3") < cxx.index("-O1") and "-fsanitize=address,undefined" in cxx
    assert setup.sanitizer_flags("", texts[1]) == [] and "-shared-libsan" not in cxx
    assert "-shared-libsan" in setup.sanitizer_flags("threads", texts[1])


def test_sources(setup):
    cpu, cuda = setup.decide_sources(ROOT, False), setup.decide_sources(ROOT, True)
    assert "csrc/registration.cpp" in cpu and not any(s.endswith(".cu") for s in cpu)
    assert set(cpu) < set(cuda) and any(s.startswith("csrc/cuda/") for s in cuda)
    assert cuda[: len(setup.SLOWEST)] == setup.SLOWEST and len(set(cuda)) == len(cuda)


def test_cuda_sources_on_the_host(setup, tmp_path):
    """Every launch is found, and a row of CUDA's takes the place of the CPU's."""
    for row in ("csrc/cpu/dropout.cpp", "csrc/cpu/simd.cpp"):
        (tmp_path / row).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / row).touch()
    folder = tmp_path / setup.CUDA_HOST / "cuda"
    subprocess.run([sys.executable, str(ROOT / "tests/cpp/cuda_host/translate.py"), str(folder)], check=True)
    sources = setup.decide_sources(tmp_path, False, cuda_host=True)
    assert "csrc/cpu/simd.cpp" in sources and "csrc/cpu/dropout.cpp" not in sources
    for source in (ROOT / "csrc/cuda").glob("*.cu"):
        text = (folder / source.with_suffix(".cpp").name).read_text()
        assert text.count("cuda_host::configure(") == source.read_text().count("<<<") > 0
        assert text.count("(pyrx, CPU, m)") == 1 and "(pyrx, CUDA, m)" not in text


def test_candidates_for_nvcc_in_order(setup):
    env = {"CUDA_HOME": "/a", "CUDA_PATH": "/b"}
    found = setup.nvcc_candidates(env, lambda name: "/bin/nvcc", ["/site"], "13.0")
    assert found == [
        ("/a/bin/nvcc", "CUDA_HOME"),
        ("/b/bin/nvcc", "CUDA_PATH"),
        ("/bin/nvcc", "PATH"),
        ("/site/nvidia/cu13/bin/nvcc", "site-packages"),
    ]
    assert setup.nvcc_candidates({}, lambda name: None, ["/site"], None) == []


def fake_nvcc(home, version, top=None):
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"--version) echo 'Cuda compilation tools, release {version}, V{version}.88';;\n"
        f"--dryrun) echo '#$ TOP={top or home}' >&2;;\n"
        "--list-gpu-arch) echo compute_80; echo compute_90;;\nesac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


def test_nvcc_of_cuda_home_wins(setup, tmp_path, monkeypatch):
    on_path, in_home = fake_nvcc(tmp_path / "path", "12.8"), fake_nvcc(tmp_path / "home", "13.0")
    monkeypatch.setenv("PATH", str(on_path.parent), prepend=os.pathsep)
    found = setup.find_nvcc({"CUDA_HOME": str(tmp_path / "home")}, [], "13.0")
    assert (found.path, found.version, found.found_in) == (str(in_home), "13.0", "CUDA_HOME")
    assert found.archs == ["compute_80", "compute_90"]
    assert setup.find_nvcc({"CUDA_HOME": str(tmp_path / "none")}, [], "13.0").found_in == "PATH"


def test_nvcc_that_is_a_script_leads_to_its_toolkit(setup, tmp_path, monkeypatch):
    real = fake_nvcc(tmp_path / "cuda-13.0", "13.0")
    script = fake_nvcc(tmp_path / "local", "13.0", top=f"{tmp_path}/cuda-13.0/bin/..")
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    found = setup.find_nvcc({}, [], "13.0")
    assert (found.path, found.toolkit) == (str(real), str(tmp_path / "cuda-13.0"))


def test_nvcc_of_pip(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    fake_nvcc(tmp_path / "nvidia" / "cu13", "13.0")
    assert setup.find_nvcc({}, [str(tmp_path)], "13.0").found_in == "site-packages"
    assert setup.find_nvcc({}, [str(tmp_path)], "12.8") is None


def test_runtime_library_without_its_plain_name(setup, tmp_path):
    library = tmp_path / "pip" / "lib" / "libcudart.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    assert setup.cudart_of(str(tmp_path / "toolkit"), [str(tmp_path / "pip")], "13") == str(library)
    with pytest.raises(setup.BuildError, match="expected libcudart.so.12"):
        setup.cudart_of(str(tmp_path / "toolkit"), [str(tmp_path / "pip")], "12")


def test_block_says_what_was_decided_and_why(setup):
    nvcc = setup.Nvcc("/cuda/bin/nvcc", "PATH", "/cuda", "13.0", [])
    plan = setup.Plan("2.11.0", "13.0", "c++ 12", nvcc, True, True, arch_list=["8.0", "9.0+PTX"], reasons=["so it is"])
    text = setup.describe(plan, {"MAX_JOBS": "3"})
    for part in (
        "C++ and CUDA",
        "2.11.0",
        "13.0 at /cuda/bin/nvcc, found in PATH",
        "8.0;9.0+PTX",
        "so it is",
        "JOBS=3",
    ):
        assert part in text, text
    assert "NOT FOUND" in setup.describe(setup.Plan("2.11.0", None, None, None), {})
