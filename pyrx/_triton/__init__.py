"""Source tree only: becomes triton_kernels/, which setup.py installs under this name."""

import importlib.util
import sys
from pathlib import Path

_folder = Path(__file__).resolve().parents[2] / "triton_kernels"
_spec = importlib.util.spec_from_file_location(
    __name__, _folder / "__init__.py", submodule_search_locations=[str(_folder)]
)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules[__name__] = _module
_spec.loader.exec_module(_module)
