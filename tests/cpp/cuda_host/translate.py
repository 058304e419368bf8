"""csrc/cuda for a host compiler: translate.py FOLDER writes the .cu files there as .cpp, and launch.h.

Launches become calls of cuda_host.h, which stands for CUDA's headers; ops are registered as the CPU's.
"""

import re
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[3] / "csrc" / "cuda"
LAUNCH = re.compile(r"([\w:]+(?:<[\w\s,]*>)?)\s*<<<(.*?)>>>", re.DOTALL)
HEADERS = re.compile(r"#include <(?:c10/cuda/\w+|cuda_bf16|cuda_fp16|ATen/ops/\w+_cuda_dispatch)\.h>")


def translate(text: str) -> str:
    text = HEADERS.sub("", text)
    # the arguments in parentheses that follow stay as they are
    text = LAUNCH.sub(r'cuda_host::configure("\1", \2, [&](auto&&... each) { \1(each...); })', text)
    text = text.replace("TORCH_LIBRARY_IMPL(pyrx, CUDA, m)", "TORCH_LIBRARY_IMPL(pyrx, CPU, m)")
    assert "<<<" not in text, "a launch that is not understood"
    return '#include "cuda_host.h"\n#line 1\n' + text


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    written = {folder / source.with_suffix(".cpp").name: source for source in SOURCES.glob("*.cu")}
    written[folder / "launch.h"] = SOURCES / "launch.h"
    for stale in set(folder.iterdir()) - set(written):
        stale.unlink()
    for target, source in written.items():
        text = translate(source.read_text())
        if not target.exists() or target.read_text() != text:  # what did not change is not compiled again
            target.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
