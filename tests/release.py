"""make dist: the source archive, the wheel made of it, and the proof that both are whole, install and work elsewhere.

The environments that they are installed in are new and empty; torch and what it needs are lent to them by links.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import instructions
import torch
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
# what a clone has and a source archive does not
CLONE_ONLY = (".gitignore", ".ci/")
OLD_PROCESSOR = "SandyBridge"  # AVX without AVX2: torch itself needs that much
USER = """
import torch
import typing_extensions

import pyrx

head = pyrx.nn.MultiSampleDropoutClassifier(8, 3, num_samples=4, p=0.5)
x, y = torch.ones(2, 8), torch.tensor([0, 2])
loss: torch.Tensor = pyrx.multi_sample_dropout_cross_entropy(x, head.weight, y, num_samples=4, p=[0.1, 0.2, 0.3, 0.4])
images, target = pyrx.cutmix(torch.ones(2, 3, 8, 8), torch.arange(2))
mixed: pyrx.MixedTarget = target
mask: pyrx.BlockMask = pyrx.BlockMask.causal(256) & pyrx.BlockMask.sliding_window(256, 64)
step = pyrx.optim.MaskedAdamW(head.parameters(), lr=1e-3)
typing_extensions.assert_type(pyrx.dropout(x, 0.5), torch.Tensor)
typing_extensions.assert_type(pyrx.nm_compress(x, 2, 4), pyrx.NMPacked)
"""


def say(text):
    print(f"\n== {text}", flush=True)


def run(*command, **environment):
    """Runs a command away from the source tree."""
    given = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYRX_BACKEND")}
    with tempfile.TemporaryDirectory() as elsewhere:
        subprocess.run([*map(str, command)], cwd=elsewhere, env=given | environment, check=True)


def output(*command):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


def check(found, expected, what):
    """Both are sets of paths."""
    missing, more = sorted(expected - found), sorted(found - expected)
    if missing or more:
        sys.exit(f"{what}: missing {missing or 'nothing'}, not expected {more or 'nothing'}")
    print(f"{what}: {len(found)} files, none missing and none too many")


def tracked():
    """The files of the tree that git knows."""
    return {name for name in output("git", "-C", ROOT, "ls-files", "-z").split("\0") if (ROOT / name).is_file()}


def check_source_archive(archive):
    with tarfile.open(archive) as opened:
        names = {member.name.split("/", 1)[1] for member in opened.getmembers() if member.isfile()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in names if name.startswith("pyrx.egg-info/"))}
    check(names - made, {name for name in tracked() if not name.startswith(CLONE_ONLY)}, archive.name)


def check_wheel(wheel):
    name, version, build, tags = parse_wheel_filename(wheel.name)
    info, module = f"{name}-{version}.dist-info/", f"pyrx/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        with tempfile.TemporaryDirectory() as folder:
            misplaced = instructions.misplaced(opened.extract(module, folder))
    package = {name for name in tracked() if name.startswith("pyrx/") and not name.startswith("pyrx/_triton/")}
    triton = {f"pyrx/_triton/{Path(name).name}" for name in tracked() if name.startswith("triton_kernels/")}
    notes = {info + each for each in ("METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE")}
    check(names, package | triton | notes | {module, "pyrx/_build_info.json"}, wheel.name)
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    expected = f"{python}-{python}-{sysconfig.get_platform().replace('-', '_')}"
    if [str(tag) for tag in tags] != [expected]:
        sys.exit(f"{wheel.name}: expected the tag {expected}")
    minor = ".".join(torch.__version__.split(".")[:2])
    if not build or not build[1].startswith(f"torch{minor}c"):
        sys.exit(f"{wheel.name}: expected a build tag of torch {minor}, got {build}")
    if misplaced:
        sys.exit(f"{wheel.name}: instructions that an old processor does not have: {misplaced[:5]} of {len(misplaced)}")
    print(f"{wheel.name}: every instruction is where it may be")


def needs_of(requirement, found):
    """Adds to `found` the distributions of this environment that a requirement needs."""
    distribution = metadata.distribution(requirement.name)
    key = (requirement.name, *sorted(requirement.extras))
    if key in found:
        return
    found[key] = distribution
    for each in map(Requirement, distribution.requires or []):
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
            needs_of(each, found)


def new_environment(folder):
    """An empty environment; its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    return folder / "bin" / "python"


def site_of(python):
    return Path(output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def lend(python, *names):
    """Links packages of this environment, and what they need, into another one."""
    site = site_of(python)
    found = {}
    for name in names:
        needs_of(Requirement(name), found)
    for distribution in found.values():
        for top in {path.parts[0] for path in distribution.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(distribution.locate_file(top)).resolve())


def check_types(python, folder):
    """A user's program under mypy --strict, and that no public name's type has to be guessed."""
    user = folder / "user.py"
    user.write_text(USER)
    run(sys.executable, "-m", "mypy", "--strict", "--python-executable", python, user)
    # told by PYTHONPATH: --verifytypes does not look where --pythonpath does
    checker = (sys.executable, "-m", "basedpyright", "--verifytypes", "pyrx", "--ignoreexternal")
    run(*checker, PYTHONPATH=str(site_of(python)))


def prove(archive, wheel):
    say("contents")
    check_source_archive(archive)
    check_wheel(wheel)
    run(sys.executable, "-m", "twine", "check", "--strict", archive, wheel)
    install = (sys.executable, "-m", "pip", "--python")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        smoke = shutil.copy(ROOT / "tests" / "smoke.py", folder)
        say("the wheel in a new environment")
        python = new_environment(folder / "wheel")
        lend(python, "torch")
        run(*install, python, "install", "-q", "--no-index", wheel)
        for capability in ("", "avx2", "default"):
            run(python, smoke, "--installed", "--need", "cpu", ATEN_CPU_CAPABILITY=capability)
        if qemu := shutil.which("qemu-x86_64"):
            say(f"the same on an emulated {OLD_PROCESSOR}")
            run(qemu, "-cpu", OLD_PROCESSOR, python, smoke, "--installed", "--need", "cpu")
        else:
            say(f"no qemu-x86_64 (apt-get install qemu-user): not run on an emulated {OLD_PROCESSOR}")
        say("Triton's kernels in its interpreter")
        lend(python, "numpy")
        run(python, smoke, "--installed", "--need", "triton", TRITON_INTERPRET="1")
        say("types of the installed wheel")
        check_types(python, folder)
        say("the source archive in a new environment, without a compiler")
        python = new_environment(folder / "source")
        lend(python, "torch", "setuptools", "wheel")
        run(*install, python, "install", "-q", "--no-index", "--no-build-isolation", archive, CXX="no-such-compiler")
        run(python, smoke, "--installed")
    say(f"whole and sound: {archive.relative_to(ROOT)}, {wheel.relative_to(ROOT)}")


def main():
    shutil.rmtree(DIST, ignore_errors=True)
    say("source archive, and the wheel that is built of it")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, ROOT)
    (archive,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    prove(archive, wheel)


if __name__ == "__main__":
    main()
