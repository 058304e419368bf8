"""Triton kernels and their launchers, one file a row; installed as pyrx._triton."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from ._interpreter import repair

    repair()
