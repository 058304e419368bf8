"""The figures of README.md's section on speed, from the result files: what stands between `<!-- bench: NAME -->` and
`<!-- /bench -->` is written here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from goals import DTYPES, GPU_SIZES, HEAD, LAST, MODES, SIZES, TOP_BLOCKS, sized
from outcomes import Case, File, Results, milliseconds, times

PAGE = Path(__file__).resolve().parents[1] / "README.md"
REGION = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def mixing(cpu: Results) -> str:
    def against(case: Case, contender: str, peers: dict[str, str]) -> str:
        return "; ".join(f"{name}: {times(cpu.speed(case, contender, peer))}" for name, peer in peers.items())

    def row(what: str, case: Case, peers: dict[str, str], *contenders: str) -> list[str]:
        names = contenders or ("pyrx",)
        first, *rest = (against(case, name, peers) for name in names)
        short = [each.split(": ")[-1] if len(peers) == 1 else each for each in rest]
        return [what, "; ".join([first, *short]), "; ".join(milliseconds(cpu.ms(case, name)) for name in names)]

    one, each, fresh, mixup, uint8 = (
        cpu.case("batch_mix", op=op)
        for op in ("cutmix in place, batch", "cutmix in place, elem", "cutmix", "mixup, per sample", LAST)
    )
    loss = cpu.case("mixed_cross_entropy", N=1024, C=1000, dtype="float32")
    normalised = {
        "eager normalise + timm": "normalise + timm elem",
        "compiled normalise + timm": "compiled normalise + timm elem",
    }
    probabilities = {
        "`F.cross_entropy` with probabilities": "eager probabilities",
        "compiled": "compiled probabilities",
    }
    libraries = {"torchvision": "torchvision", "kornia": "kornia", "a clone of the images": "floor, new memory"}
    rows = [
        row("CutMix in place, one box", one, {"timm, batch": "timm batch"}),
        row("CutMix in place, a box each", each, {"timm, elem": "timm elem"}),
        row("CutMix out of place", fresh, libraries),
        row("CutMix into `out=`", fresh, {"a copy of the images": "floor, buffer"}, "pyrx, out="),
        row("mixup, a lam each; into `out=`; in place", mixup, {"timm, elem": "timm elem"},
            "pyrx", "pyrx, out=", "pyrx, in place"),
        row("uint8 to normalised float32 and CutMix, channels_last", uint8, normalised),
        row("the same into `out=`", uint8, normalised, "pyrx, out="),
        row("`pyrx.mixed_cross_entropy`", loss, probabilities),
    ]  # fmt: skip
    return table(["", "times as fast as", "pyrx, ms"], rows)


def by_dtype(
    find: Callable[[str], Sequence[Case]],
    cpu: Results,
    what: str,
    peer: str,
    *pairs: tuple[str, str],
    show: bool = True,
) -> list[str]:
    """A row: of each dtype how many times as fast each (contender, other) is in each case, and the first one's time."""
    ratios, ms = [], []
    for dtype in DTYPES:
        cases = find(dtype)
        ratios.append(", ".join(times(cpu.speed(case, *pair)) for case in cases for pair in pairs))
        ms += [milliseconds(cpu.ms(case, pairs[0][0])) for case in cases[:1]]
    return [what, peer, *ratios, "; ".join(ms) if show else ""]


def sparsity(cpu: Results) -> str:
    def masks(*ratios: str) -> Callable[[str], list[Case]]:
        sizes = {"op": "nm_mask", "dim": None}
        return lambda dtype: [cpu.case("nm_sparsity", ratio=each, dtype=dtype, **sizes) for each in ratios]

    def one(row: str, **params: object) -> Callable[[str], list[Case]]:
        return lambda dtype: [cpu.case(row, dtype=dtype, **params)]

    def linear(ratio: str) -> Callable[[str], list[Case]]:
        return lambda dtype: [
            cpu.case("nm_packed", op="nm_linear", ratio=ratio, batch=batch, dtype=dtype) for batch in (1, 8, 64, 512)
        ]

    step = one("masked_update", **{"op": "MaskedAdamW.step", "n:m": "2:4"})
    best = ("pyrx", "best peer")
    rows = [
        by_dtype(masks("2:4"), cpu, "2:4 mask", "`topk` and `scatter_`, the best peer", best),
        by_dtype(masks("2:4"), cpu, "", "argsort, as NM-sparsity does; `WeightNormSparsifier`",
                 ("pyrx", "argsort"), ("pyrx", "WeightNormSparsifier"), show=False),
        by_dtype(masks("2:4"), cpu, "", "a copy of its bytes", ("pyrx", "floor, buffers, bool"), show=False),
        by_dtype(masks("1:4", "2:8", "4:8", "1:16", "2:32"), cpu, "1:4, 2:8, 4:8, 1:16, 2:32 masks", "the best peer",
                 best, show=False),
        by_dtype(one("nm_sparsity", op="nm_sparsify"), cpu, "SR-STE, forward and backward",
                 "NM-sparsity's function; compiled", ("pyrx", "published, eager"), ("pyrx", "published, compiled")),
        by_dtype(step, cpu, "`MaskedAdamW` step with a new 2:4 mask", "foreach AdamW and the best peer's mask",
                 ("pyrx, hold", "best peer")),
        by_dtype(step, cpu, "", "a copy of its bytes", ("pyrx, hold", "floor, buffers"), show=False),
        by_dtype(one("nm_transposable", method="exact"), cpu, "transposable 2:4 mask", "exhaustive search", best),
        by_dtype(linear("2:4"), cpu, "`nm_linear`, 2:4, of 1, 8, 64, 512 rows", "`F.linear` over the dense weight",
                 ("pyrx", "F.linear, dense"), show=False),
        by_dtype(linear("1:8"), cpu, "1:8", "the same", ("pyrx", "F.linear, dense"), show=False),
    ]  # fmt: skip
    return table(["", "times as fast as", *DTYPES, "pyrx, ms"], rows)


def attention(cpu: Results) -> str:
    row_name = "block_sparse_attention"

    def cases(what: str, **params: object) -> Callable[[str], list[Case]]:
        return lambda dtype: [cpu.case(row_name, op=f"{row_name}, {what}", dtype=dtype, **params)]

    every, some = cases("forward", density=1.0), cases("forward", density=0.2)
    trained, scaled = cases("forward + backward"), cases("time against density", block=128)
    ours = "pyrx, blocks of 128"
    [window], search = cases("causal window")("float32"), cpu.case("block_pool", op="search")
    small, large = (cpu.case("block_mask", op=TOP_BLOCKS, shape=s) for s in ([1, 8, 32, 32], [1, 24, 512, 512]))
    passes = {"block": 128, "causal": False, "shape": [1, 8, 4096, 64]}
    densities = [("pyrx, density " + each, "pyrx, density 1") for each in ("0.5", "0.2", "0.1", "0.05")]
    searches = ("pooled", "topk_blocks", "vertical_slash")
    rows = [
        by_dtype(every, cpu, "forward, every block", "`F.scaled_dot_product_attention`", (ours, "SDPA, dense")),
        by_dtype(every, cpu, "", "its two bare products, by oneDNN", (ours, "floor"), show=False),
        by_dtype(some, cpu, "forward, 19 % of the blocks", "compiled FlexAttention; SDPA with the mask",
                 (ours, "FlexAttention, compiled"), (ours, "SDPA, mask")),
        by_dtype(some, cpu, "", "its two bare products, by oneDNN", (ours, "floor"), show=False),
        by_dtype(scaled, cpu, "forward, 50, 19, 9 and 6 % of the blocks", "its own dense forward", *densities,
                 show=False),
        by_dtype(trained, cpu, "forward and backward, 19 %", "SDPA with the mask; dense SDPA",
                 ("pyrx", "SDPA, mask"), ("pyrx", "SDPA, dense")),
        by_dtype(trained, cpu, "the same with dropout", "without", ("pyrx, dropout", "pyrx")),
        ["causal window of 1024, S = 16384", "causal SDPA; compiled FlexAttention",
         ", ".join(times(cpu.speed(window, "pyrx", each)) for each in ("SDPA, causal", "FlexAttention, compiled")), "",
         milliseconds(cpu.ms(window))],
        by_dtype(lambda dtype: [cpu.case("block_mass", op="block_mass", dtype=dtype, **passes)], cpu,
                 "search pass: mass of every block", "its own dense forward", ("pyrx", "dense forward")),
        ["`search.pooled`, `topk_blocks`, `vertical_slash`", "its own dense forward",
         ", ".join(times(cpu.speed(search, each, "dense attention, pyrx")) for each in searches), "",
         "; ".join(milliseconds(cpu.ms(search, each)) for each in searches)],
        ["mask from the scores of 32 x 32; 512 x 512 blocks", "FlexAttention's lists; `create_block_mask`, compiled",
         f"{times(cpu.speed(small, 'pyrx', 'topk, flex lists'))}, "
         f"{times(cpu.speed(small, 'pyrx', 'topk, compiled create_block_mask'))}; "
         f"{times(cpu.speed(large, 'pyrx', 'topk, flex lists'))}", "",
         f"{milliseconds(cpu.ms(small))}; {milliseconds(cpu.ms(large))}"],
    ]  # fmt: skip
    return table(["", "times as fast as", *DTYPES, "pyrx, ms"], rows)


def both(results: Results, case: Case, how: str = "", against: str = "best peer") -> str:
    return " / ".join(times(results.speed(case, f"pyrx {mode}{how}", against)) for mode in MODES)


def head(cpu: Results) -> str:
    rows = []
    for size in SIZES:
        cases = [cpu.case(HEAD, dtype=dtype, **sized(size)) for dtype in DTYPES]
        cells = [both(cpu, case) for case in cases]
        floors = [" / ".join(f"{cpu.over_floor(case, f'pyrx {mode}'):.2g}" for mode in MODES) for case in cases]
        rows.append([", ".join(map(str, size)), cells[0], floors[0], cells[1], floors[1]])
    columns = [each for dtype in DTYPES for each in (f"{dtype}: times as fast", "times its bare GEMMs")]
    return table(["B, D, C, M: independent / antithetic", *columns], rows)


def span(ratios: list[float]) -> tuple[str, str]:
    if not ratios:
        raise LookupError("no case of dropout")
    return times(min(ratios)), times(max(ratios))


def memory(cpu: Results) -> str:
    record = next((each for file in cpu.of_row(HEAD) for each in file["memory"]), None)
    if record is None:
        raise LookupError("no record of the head's memory")
    mib = {(each["name"], each["M"]): f"{each['bytes'] / 2**20:.0f}" for each in record["peaks"]}
    low, high = span([cpu.speed(case, "pyrx", "eager") for case in cpu.cases("dropout", op="dropout")])
    return (
        f"A step at 256, 512, 1000 takes {mib['pyrx independent', 1]} MiB of extra memory with one sample and "
        f"{mib['pyrx independent', 32]} MiB with 32 (the eager\nbatched form {mib['eager batched', 1]} and "
        f"{mib['eager batched', 32]}). `pyrx.dropout` is {low} to {high} times as fast as `F.dropout`."
    )


def head_gpu(gpu: Results) -> str:
    rows = []
    for size in GPU_SIZES:
        cases = [gpu.case(HEAD, dtype=dtype, **sized(size)) for dtype in DTYPES[::-1]]
        cells = [both(gpu, case, how) for case in cases for how in ("", ", CUDA graph")]
        rows.append([", ".join(map(str, size)), *cells])
    columns = [f"{dtype}, {how}" for dtype in DTYPES[::-1] for how in ("eager call", "CUDA graph")]
    return table(["B, D, C, M: independent / antithetic, times as fast", *columns], rows)


def gpu_notes(gpu: Results) -> str:
    large = gpu.case(HEAD, dtype="bfloat16", **sized(GPU_SIZES[0]))
    compiled = times(gpu.speed(large, "pyrx independent", "compiled batched"))
    share = 1 / gpu.over_floor(large, "pyrx independent, CUDA graph")
    low, high = span([1 / gpu.speed(case, "pyrx", "eager") for case in gpu.cases("dropout", op="dropout")])
    size = ", ".join(map(str, GPU_SIZES[0][:3]))
    return (
        f"Called eagerly it is {compiled} times as fast as the compiled batched form at {size} in bfloat16; the three "
        f"bare\nGEMMs take {100 * share:.0f} % of its time on the device. `pyrx.dropout` alone has nothing to fuse: "
        f"called eagerly on the GPU it\ntook {low} to {high} times the time of `F.dropout`."
    )


PARTS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "mixing": ("cpu", mixing),
    "sparsity": ("cpu", sparsity),
    "attention": ("cpu", attention),
    "head": ("cpu", head),
    "memory": ("cpu", memory),
    "head_gpu": ("cuda", head_gpu),
    "gpu_notes": ("cuda", gpu_notes),
}


def rendered(text: str, files: Sequence[File]) -> tuple[str, list[str]]:
    """The page with every region made anew, and the regions that stay as they are for want of a result."""
    results, wanting = {device: Results(files, device) for device in ("cpu", "cuda")}, []

    def region(match: re.Match[str]) -> str:
        device, part = PARTS[match[2]]
        try:
            return f"{match[1]}\n{part(results[device])}\n\n{match[3]}"
        except LookupError as reason:
            wanting.append(f"{match[2]}: {reason}")
            return match[0]

    return REGION.sub(region, text), wanting


def stale(files: Sequence[File]) -> list[str]:
    """The lines of the page that the result files do not give, and regions that are missing or have no results."""
    text = PAGE.read_text()
    lines = set(text.splitlines())
    missing = [f"no region {name}" for name in PARTS if f"<!-- bench: {name} -->" not in lines]
    fresh, wanting = rendered(text, files)
    return missing + wanting + [f"not in README.md: {line}" for line in fresh.splitlines() if line not in lines]


def write(files: Sequence[File]) -> None:
    fresh, wanting = rendered(PAGE.read_text(), files)
    PAGE.write_text(fresh)
    for each in wanting:
        print(f"README.md keeps what it says of {each}")
