"""Loads pyrx._C once: `module` is it or None, `error` says why it is not there.

A missing extension is quiet, since the reference serves every op; one that is there but cannot be used warns.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_REBUILD = "Build it again with this torch: pip install -v . --no-build-isolation"


def read_record(package: Path) -> dict[str, Any] | None:
    """What setup.py wrote about the build, or None."""
    try:
        record = json.loads((package / "_build_info.json").read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def load(package: Path, torch_version: str) -> tuple[ModuleType | None, str | None, bool]:
    """The extension in a folder: the module or None, the error or None, and whether the error is worth a warning."""
    record = read_record(package)
    files = [package / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    file = next((f for f in files if f.exists()), None)
    if record is not None and not record.get("extension"):
        return None, "pyrx was built without its C++ extension: " + "; ".join(record.get("reasons", [])), False
    if record is None and file is None:
        return None, "pyrx._C is not built: pip install -v . --no-build-isolation", False
    if record is None:
        return None, f"{file} has no readable _build_info.json beside it, so its torch is not known. {_REBUILD}", True
    versions = f"pyrx._C was built for torch {record.get('torch')} and Python {record.get('python')}; "
    versions += f"this is torch {torch_version} and Python {sys.version.split()[0]}"
    if file is None:
        return None, f"{versions}; no module file for this Python is in {package}. {_REBUILD}", True
    # a module of another torch can crash while it is loaded, so look at the record first
    if _minor(str(record.get("torch"))) != _minor(torch_version):
        return None, f"{versions}. {_REBUILD}", True
    try:
        spec = importlib.util.spec_from_file_location("pyrx._C", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        return None, f"{versions}; it does not load: {error}. {_REBUILD}", True
    return module, None, False


module, error, _loud = load(Path(__file__).parent, torch.__version__)
record = read_record(Path(__file__).parent)
if module is not None:
    sys.modules["pyrx._C"] = module
elif _loud:
    warnings.warn(f"pyrx runs without its C++ and CUDA backends: {error}", RuntimeWarning, stacklevel=2)
