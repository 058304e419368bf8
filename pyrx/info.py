"""python -m pyrx.info [--json]: versions, the build, this machine, and which backend serves which op here."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch

from pyrx import _backends, _extension
from pyrx._version import __version__


def _probe(question: Callable[[], Any]) -> Any:
    """The answer, or what went wrong: one broken part must not hide the others."""
    try:
        return question()
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def _package(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    with open("/proc/cpuinfo") as lines:
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))


def _gpu() -> list[str]:
    found = []
    for i in range(torch.cuda.device_count()):
        each = torch.cuda.get_device_properties(i)
        memory = each.total_memory / 2**30
        found.append(
            f"{each.name}, sm_{each.major}{each.minor}, {memory:.0f} GiB, {each.multi_processor_count} multiprocessors"
        )
    return found


def _device_of(backend: str) -> str:
    """The device that a backend is judged on."""
    interpreted = backend == "triton" and _backends.TRITON_INTERPRETED
    return "cuda" if backend in ("cuda", "triton") and not interpreted else "cpu"


def _ops() -> dict[str, Any]:
    return {
        op: {
            backend: {"serves": not why, "device": _device_of(backend), "reasons": why}
            for backend in _backends.BACKENDS
            for why in [_backends.reasons(op, backend, _device_of(backend))]
        }
        for op in _backends.OPS
    }


def collect() -> dict[str, Any]:
    """Everything that the command tells, as plain data."""
    compiled = _extension.module
    return {
        "versions": {
            "pyrx": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _probe(lambda: _package("triton")),
            "compiler": _probe(lambda: compiled.build_info()["compiler"]) if compiled else None,
        },
        "build": {"loaded": compiled is not None, "error": _extension.error, "record": _extension.record},
        "machine": {
            "platform": _probe(platform.platform),
            "cpu": _probe(_processor),
            "cpu_capability": _probe(torch.backends.cpu.get_cpu_capability),
            "cpu_kernels": _probe(compiled.cpu_kernels) if compiled else None,
            "threads": _probe(torch.get_num_threads),
            "parallel_threads": _probe(compiled.parallel_threads_seen) if compiled else None,
            "gpu": _probe(_gpu),
        },
        "environment": {
            name: os.environ[name]
            for name in ("PYRX_BACKEND", "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_HOME")
            if name in os.environ
        },
        "ops": _probe(_ops),
    }


def _rows(title: str, values: dict[str, Any]) -> list[str]:
    lines = [title]
    for name, value in values.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        lines.append(f"  {name:<16} {'-' if shown is None or shown == '' else shown}")
    return lines


def _table(ops: dict[str, Any]) -> list[str]:
    width = max(map(len, ops))
    lines = [f"{'op':<{width}}  " + "  ".join(f"{backend:<9}" for backend in _backends.BACKENDS).rstrip()]
    missing: dict[tuple[str, str], list[str]] = {}
    for op, backends in ops.items():
        marks = ("yes" if found["serves"] else "no" for found in backends.values())
        lines.append(f"{op:<{width}}  " + "  ".join(f"{mark:<9}" for mark in marks).rstrip())
        for backend, found in backends.items():
            for reason in found["reasons"]:
                missing.setdefault((backend, reason), []).append(op)
    for (backend, reason), without in missing.items():
        which = "" if len(without) == len(ops) else f" ({', '.join(without)})"
        lines.append(f"  {backend}: {reason}{which}")
    return lines


def render(found: dict[str, Any]) -> str:
    build = found["build"]
    record = build["record"] or {}
    nvcc = record.get("nvcc") or {}
    built = {
        "extension": "loaded" if build["loaded"] else f"not loaded: {build['error']}",
        "built for": f"torch {record['torch']}, Python {record['python']}" if record else None,
        "compiler": record.get("compiler"),
        "nvcc": f"{nvcc['version']} at {nvcc['path']}" if nvcc else None,
        "CUDA kernels": (";".join(record["arch_list"]) if record.get("cuda") else "no") if record else None,
        "flags": " ".join(record.get("cxx_flags", [])),
        "because": "; ".join(record.get("reasons", [])),
    }
    blocks = [
        _rows("versions", found["versions"]),
        _rows("build", built),
        _rows("machine", found["machine"]),
        _rows("environment", found["environment"]) if found["environment"] else [],
        _table(found["ops"]) if isinstance(found["ops"], dict) else _rows("ops", {"error": found["ops"]}),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyrx.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    found = collect()
    print(json.dumps(found, indent=2, default=str) if parser.parse_args(argv).json else render(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
