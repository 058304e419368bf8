"""Multi-sample dropout with its classifier head, forward and backward, against the PyTorch forms of it."""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import (
    SETTINGS,
    Contender,
    Growth,
    Target,
    error,
    expect,
    finish,
    graphed,
    run_case,
    same_mean,
    set_threads,
    sweep,
)
from peak_memory import added_peak
from torch import Tensor

import pyrx
from pyrx import _backends

ROW = "multi_sample_dropout"
P = 0.5
SIZES = ((128, 512, 10, 8), (128, 2048, 100, 8), (128, 2048, 1000, 8), (256, 512, 1000, 32))
GPU_SIZE = (256, 2048, 1000, 8)

# times as fast as the best PyTorch form, in float32 on 2 threads; bfloat16 is to be ahead by the same
TARGETS = {SIZES[0]: (15, 15), SIZES[1]: (6, 7), SIZES[2]: (3, 4.2), SIZES[3]: (3, 4.5)}
FLOOR_TARGET = 1.2  # where C = 1000, float32

Loss = Callable[..., Tensor]


def loop(x: Tensor, w: Tensor, b: Tensor, target: Tensor, samples: int, p: float) -> Tensor:
    total = F.cross_entropy(F.linear(F.dropout(x, p), w, b), target)
    for _ in range(samples - 1):
        total = total + F.cross_entropy(F.linear(F.dropout(x, p), w, b), target)
    return total / samples


def expanded(x: Tensor, samples: int, p: float) -> Tensor:
    return F.dropout(x.expand(samples, *x.shape), p).flatten(0, 1)


def batched(x: Tensor, w: Tensor, b: Tensor, target: Tensor, samples: int, p: float) -> Tensor:
    return F.cross_entropy(F.linear(expanded(x, samples, p), w, b), target.repeat(samples))


def batched_logits(x: Tensor, w: Tensor, b: Tensor, target: Tensor, samples: int, p: float) -> Tensor:
    return F.cross_entropy(F.linear(expanded(x, samples, p), w, b).unflatten(0, (samples, -1)).mean(0), target)


@functools.cache
def fused_linear_peers() -> dict[str, Loss]:
    """Fused linear + cross-entropy of others, on the expanded input; those that are not installed are left out."""
    found: dict[str, Loss] = {}
    if hasattr(F, "linear_cross_entropy"):

        def torch_fused(x: Tensor, w: Tensor, b: Tensor, target: Tensor, samples: int, p: float) -> Tensor:
            return F.linear_cross_entropy(expanded(x, samples, p), w, target.repeat(samples), linear_bias=b)

        found["F.linear_cross_entropy"] = torch_fused
    if SETTINGS.device != "cuda":
        return found  # Liger's and Apple's are Triton kernels
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger_loss = LigerFusedLinearCrossEntropyLoss()

        def liger(x: Tensor, w: Tensor, b: Tensor, target: Tensor, samples: int, p: float) -> Tensor:
            return liger_loss(w, expanded(x, samples, p), target.repeat(samples), b)

        found["Liger"] = liger
    except ImportError as reason:
        SETTINGS.say(f"  without Liger: {reason}")
    try:
        from cut_cross_entropy import linear_cross_entropy

        def apple(x: Tensor, w: Tensor, b: Tensor, target: Tensor, samples: int, p: float) -> Tensor:
            # it takes no bias: that is the weight of one more feature, which is 1, and 15 that are 0
            ones = F.pad(x.new_ones(samples * len(x), 1), (0, 15))
            weight = torch.cat([w, F.pad(b[:, None], (0, 15))], 1)
            return linear_cross_entropy(torch.cat([expanded(x, samples, p), ones], 1), weight, target.repeat(samples))

        found["Apple CCE"] = apple
    except ImportError as reason:
        SETTINGS.say(f"  without Apple's CCE: {reason}")
    return found


def pyrx_loss(x: Tensor, w: Tensor, b: Tensor, target: Tensor, samples: int, p: float, **options: Any) -> Tensor:
    return pyrx.multi_sample_dropout_cross_entropy(x, w, target, linear_bias=b, num_samples=samples, p=p, **options)


PYRX_MODES: dict[str, dict[str, str]] = {
    "independent": {},
    "antithetic": {"sampling": "antithetic"},
    "logits": {"combine": "logits"},
}


def make_inputs(b: int, d: int, c: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(b + d + c)
    x = torch.randn(b, d, generator=generator).relu()
    w = torch.randn(c, d, generator=generator) / d**0.5
    bias = 0.1 * torch.randn(c, generator=generator)
    target = torch.randint(c, (b,), generator=generator)
    leaves = [each.to(SETTINGS.device, dtype).requires_grad_() for each in (x, w, bias)]
    return leaves[0], leaves[1], leaves[2], target.to(SETTINGS.device)


def step(loss: Loss, inputs: Sequence[Tensor], *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    value = loss(*inputs, *arguments, **options)
    return (value.detach(), *torch.autograd.grad(value, inputs[:3]))


def _candidates(a: Tensor, b: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to a @ b, every layout and buffer that a library could wish for made beforehand."""
    out = a.new_empty(a.shape[0], b.shape[1])
    transposed = b.t().contiguous()
    found = {
        "at::mm": lambda: torch.mm(a, b, out=out),
        "at::mm, transposed": lambda: torch.mm(a, transposed.t(), out=out),
    }
    if a.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, transposed, None, "none", [], "")
    return found


def _fastest(candidates: dict[str, Callable[[], Tensor]]) -> tuple[str, Callable[[], Tensor]]:
    best: dict[str, float] = {}
    for _ in range(2 if SETTINGS.quick else 6):
        for name, run in candidates.items():
            if SETTINGS.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if SETTINGS.device == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best.get(name, 1e9), time.perf_counter() - start)
    name = min(best, key=best.__getitem__)
    return name, candidates[name]


def gemm_floor(name: str, rows: int, d: int, c: int, dtype: torch.dtype) -> Contender:
    """logits = X W^T, dX = G W, dW = G^T X with nothing around them, each by the library that is fastest here."""
    device = SETTINGS.device
    x, w, g = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, d), (c, d), (rows, c)))
    products = ((x, w.t().contiguous()), (g, w), (g.t().contiguous(), x))
    picked = [_fastest(_candidates(a, b)) for a, b in products]

    def run() -> None:
        for _, product in picked:
            product()

    note = ", ".join(dict.fromkeys(library for library, _ in picked))
    if device == "cuda":
        return Contender(name, graphed(run), "floor", note=f"{note}, CUDA graph")
    return Contender(name, run, "floor", note=note)


def floor_rows(b: int, samples: int) -> dict[str, int]:
    """Rows that the GEMMs of each mode need: antithetic pairs at p = 0.5 share one undropped product."""
    return {"independent": samples * b, "antithetic": (samples // 2 + 1) * b, "logits": b}


def backends(dtype: torch.dtype) -> list[str]:
    return [
        each
        for each in _backends.BACKENDS
        if each != "reference" and not _backends.reasons(ROW, each, SETTINGS.device, dtype)
    ]


def make_contenders(
    size: tuple[int, int, int, int], dtype: torch.dtype, inputs: Sequence[Tensor], grows: bool
) -> list[Contender]:
    b, d, c, samples = size
    torch._dynamo.reset()
    forms = {"loop": loop, "batched": batched}
    peers = {f"eager {name}": form for name, form in forms.items()}
    for name, form in forms.items():
        if name == "loop" and (SETTINGS.quick or grows or (SETTINGS.device == "cuda" and samples > 8)):
            continue  # unrolled, it is slow to compile, and the batched form is the faster one
        peers[f"compiled {name}"] = torch.compile(form, dynamic=False, fullgraph=True)
    peers.update(fused_linear_peers())
    found = [Contender(n, partial(step, f, inputs, samples, P), group="losses") for n, f in peers.items()]
    found += [
        Contender("eager batched, mean logits", partial(step, batched_logits, inputs, samples, P), group="logits"),
        Contender("eager, 1 sample", partial(step, loop, inputs, 1, P), "other"),
    ]
    serving = backends(dtype)
    for mode, options in PYRX_MODES.items():
        group = "logits" if mode == "logits" else "losses"
        run = partial(step, pyrx_loss, inputs, samples, P, **options)
        note = "the default backend" if serving else "reference: no compiled backend is built"
        found.append(Contender(f"pyrx {mode}", run, "pyrx", group, note))
        for backend in serving if len(serving) > 1 else ():
            found.append(Contender(f"pyrx {mode}, {backend}", partial(run, backend=backend), "pyrx", group))
    if SETTINGS.device == "cuda":  # the device's time too: launches hide it at these sizes
        for each in list(found):
            if each.kind == "pyrx" or each.name in ("eager batched", "compiled batched"):
                name, group = f"{each.name}, CUDA graph", f"{each.group}, CUDA graph"
                found.append(Contender(name, graphed(each.step), each.kind, group, each.note))
    rows = floor_rows(b, samples)
    return found + [gemm_floor(f"floor {mode}", n, d, c, dtype) for mode, n in rows.items()]


def check(
    size: tuple[int, int, int, int], dtype: torch.dtype, inputs: Sequence[Tensor], able: dict[str, Contender]
) -> list[dict[str, Any]]:
    samples = size[3]
    found = []
    slack = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    names = ("loss", "grad_input", "grad_weight", "grad_bias")
    doubles = [*(each.detach().double().requires_grad_() for each in inputs[:3]), inputs[3]]
    # the same masks: no further from float64 than twice the plain PyTorch of this dtype, and a little
    for mode, options in PYRX_MODES.items():
        fixed = {**options, "seed": 20190501}
        truth = step(pyrx_loss, doubles, samples, P, **fixed, backend="reference")
        plain = step(pyrx_loss, inputs, samples, P, **fixed, backend="reference")
        for backend in backends(dtype):
            got = step(pyrx_loss, inputs, samples, P, **fixed, backend=backend)
            for what, g, t, r in zip(names, got, truth, plain, strict=True):
                limit = 2 * error(r, t) + slack
                found.append(expect(f"pyrx {mode}, {backend}", f"{what} against float64", error(g, t), limit))
    # without dropout all of them compute the same; with it they draw other masks, but of the same law
    undropped = step(pyrx_loss, inputs, samples, 0.0)
    for name, form in (("eager loop", loop), ("eager batched", batched), *fused_linear_peers().items()):
        if name in able:
            for what, g, t in zip(names, step(form, inputs, samples, 0.0), undropped, strict=True):
                found.append(expect(name, f"{what} at p = 0 against pyrx", error(g, t), 10 * slack))

    def draws(name: str) -> list[tuple[float, float]]:
        results = (able[name].step() for _ in range(3 if SETTINGS.quick else 5))
        return [(loss.item(), weight_grad.double().norm().item()) for loss, _, weight_grad, _ in results]

    for group, ours in (("losses", "pyrx independent"), ("logits", "pyrx logits")):
        mine = draws(ours)
        for each in able.values():
            if each.kind == "peer" and each.group == group:
                theirs = draws(each.name)
                for i, what in enumerate(("mean loss", "mean norm of grad_weight")):
                    a, b = [one[i] for one in theirs], [one[i] for one in mine]
                    found.append(same_mean(each.name, f"{what} minus pyrx's", a, b, 100 * slack if i else 10 * slack))
    return found


def make_targets(size: tuple[int, int, int, int], dtype: torch.dtype) -> list[Target]:
    if SETTINGS.device == "cuda":
        modes = [f"pyrx {mode}{how}" for how in ("", ", CUDA graph") for mode in ("independent", "antithetic")]
        found = [Target(mode, "best peer", 1.0) for mode in modes]
        if size == GPU_SIZE and dtype == torch.bfloat16:
            found.append(Target("pyrx independent", "compiled batched", 2.0))
            found.append(Target("pyrx independent, CUDA graph", "compiled batched, CUDA graph", 2.0))
        return found
    if size not in TARGETS:
        return []
    independent, antithetic = TARGETS[size]
    found = [
        Target("pyrx independent", "best peer", independent),
        Target("pyrx antithetic", "best peer", antithetic),
    ]
    if size[2] == 1000 and dtype == torch.float32:
        found += [Target(f"pyrx {mode}", "floor", FLOOR_TARGET) for mode in ("independent", "antithetic")]
    if size[2] == 10:
        found.append(Target("pyrx independent", "eager, 1 sample", 1.0))
    return found


def cases() -> list[Any]:
    sizes = (GPU_SIZE, *SIZES) if SETTINGS.device == "cuda" else SIZES
    found = [(size, dtype) for dtype in (torch.bfloat16, torch.float32) for size in sizes]
    if SETTINGS.device == "cpu":
        found = [(size, dtype) for dtype in (torch.float32, torch.bfloat16) for size in sizes]
    if SETTINGS.quick:
        found = found[:1]
    whole = [pytest.param(s, t, None, id=f"{s[0]}x{s[1]}x{s[2]}-M{s[3]}-{str(t)[6:]}") for s, t in found]
    dtype = torch.float32 if SETTINGS.device == "cpu" else torch.bfloat16
    whole += sweep("B", (32, 128, 512, 2048), lambda b: ((b, 512, 100, 8), dtype))
    whole += sweep("D", (128, 512, 2048, 8192), lambda d: ((128, d, 100, 8), dtype))
    whole += sweep("C", (10, 100, 1000, 10000), lambda c: ((128, 512, c, 8), dtype))
    return whole + sweep("M", (1, 2, 8, 32, 128), lambda m: ((128, 512, 100, m), dtype))


@pytest.mark.parametrize(("size", "dtype", "growth"), cases())
def test_head(size: tuple[int, int, int, int], dtype: torch.dtype, growth: Growth | None, benchmark: Any) -> None:
    set_threads()
    inputs = make_inputs(*size[:3], dtype)
    params = dict(zip("BDCM", size, strict=True), dtype=str(dtype)[6:], p=P)
    contenders = make_contenders(size, dtype, inputs, growth is not None)
    # a backend's own contender has its mode's floor
    floors = {e.name: f"floor {mode}" for mode in PYRX_MODES for e in contenders if e.name.startswith(f"pyrx {mode}")}
    run_case(
        ROW,
        {"op": "multi_sample_dropout_cross_entropy", **params},
        contenders,
        benchmark,
        check=partial(check, size, dtype, inputs),
        floors=floors,
        targets=make_targets(size, dtype),
        growth=growth,
    )


MEMORY_SIZE = (256, 512, 1000)
MEMORY_FORMS: dict[str, Loss] = {
    "eager batched": batched,
    **{f"pyrx {mode}": partial(pyrx_loss, **options) for mode, options in PYRX_MODES.items()},
}


def test_memory() -> None:
    """Peak memory that one step adds, M = 1 against 32, each in a process of its own."""
    found = []
    for name in MEMORY_FORMS:
        for samples in (1, 32):
            command = [sys.executable, str(Path(__file__)), "--memory", name, "--samples", str(samples)]
            done = subprocess.run([*command, "--device", SETTINGS.device], capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stderr[-2000:]}"
            found.append({"name": name, "M": samples, "bytes": json.loads(done.stdout.splitlines()[-1])})
    b, d, c = MEMORY_SIZE
    params = {"op": "multi_sample_dropout_cross_entropy", "B": b, "D": d, "C": c, "dtype": "float32", "p": P}
    finish(ROW, {"kind": "memory", "params": params, "peaks": found})


def main() -> None:
    parser = argparse.ArgumentParser(description="prints the peak memory, in bytes, that one step adds")
    parser.add_argument("--memory", choices=list(MEMORY_FORMS), required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    SETTINGS.device = arguments.device
    set_threads()
    form = MEMORY_FORMS[arguments.memory]
    small, full = make_inputs(8, 64, 16, torch.float32), make_inputs(*MEMORY_SIZE, torch.float32)
    step(form, small, arguments.samples, P)  # loads the libraries and starts the threads
    print(added_peak(partial(step, form, full, arguments.samples, P), arguments.device))


if __name__ == "__main__":
    main()
