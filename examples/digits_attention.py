"""A small transformer on real handwritten digits whose attention is dense, a sliding window, or searched online.

The 8 x 8 scans that come with scikit-learn are enlarged to 16 x 16; each pixel is a token and each row of the image a
block of 16. Dense attention is PyTorch's; the window sees the pixels up to a row and a half away; the search picks, in
every step, layer and head and for every image, the blocks that compressed attention finds heaviest (NSA's selection).
Prints test error, density and time of each, and draws the learning curves and what was attended to. Nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import matplotlib
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"this example needs {error.name}: pip install -e '.[demo]', or make demo")

matplotlib.use("Agg")
from matplotlib import pyplot

import pyrx

SIDE, CLASSES, BLOCK = 16, 10, 16
TOKENS = SIDE * SIDE
DIM, HEADS, LAYERS = 64, 4, 2
WINDOW, KEPT = 24, 4  # tokens on each side; blocks of a row of blocks
METHODS = ("dense, PyTorch", "sliding window, pyrx", "searched, pyrx")
COLOURS = ("#888888", "#e08a1e", "#2f8fdd")
INK = "#808080"  # grey text reads on white and on black


class Attention(nn.Module):
    """Self-attention of (B, S, C) tokens."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.qkv, self.out, self.method = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), method
        self.block_mask: pyrx.BlockMask | None = None  # what was attended to last
        if method.startswith("sliding"):
            self.block_mask = pyrx.BlockMask.sliding_window(TOKENS, WINDOW, BLOCK)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.method.startswith("dense"):
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            if self.method.startswith("searched"):
                self.block_mask = pyrx.search.topk_blocks(query, key, block_size=BLOCK, topk=KEPT)
            mixed = pyrx.block_sparse_attention(query, key, value, self.block_mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, method: str) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(DIM), Attention(method))
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens)
        return tokens + self.mlp(tokens)


class Transformer(nn.Module):
    def __init__(self, method: str) -> None:
        super().__init__()
        self.embed = nn.Linear(9, DIM)  # of a pixel's neighbourhood
        self.position = nn.Parameter(0.02 * torch.randn(1, TOKENS, DIM))
        self.layers = nn.Sequential(*(Layer(method) for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        tokens = F.unfold(images, 3, padding=1).transpose(1, 2)
        return self.head(self.layers(self.embed(tokens) + self.position).mean(1))

    def masks(self) -> list[pyrx.BlockMask]:
        found = [each.block_mask for each in self.modules() if isinstance(each, Attention)]
        return [each for each in found if each is not None]


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(images to train on, to test on, and their targets): half each, always the same."""
    images, target = load_digits(return_X_y=True)
    parts = train_test_split(images, target, test_size=0.5, random_state=0, stratify=target)
    small = (torch.tensor(each, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for each in parts[:2])
    train, test = (F.interpolate(each, SIDE, mode="bilinear") for each in small)
    return train, test, torch.tensor(parts[2]), torch.tensor(parts[3])


@torch.no_grad()
def evaluate(network: Transformer, images: Tensor, target: Tensor) -> float:
    """The share that it gets wrong, in percent."""
    wrong = torch.cat([network(part).argmax(1) for part in images.split(128)]) != target
    return 100 * wrong.double().mean().item()


class Run:
    """One network in training."""

    def __init__(self, method: str, seed: int, options: argparse.Namespace) -> None:
        torch.manual_seed(seed)  # the same weights to start from for every method
        self.network = Transformer(method)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), options.rate)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, options.rate, total_steps=options.steps)
        self.order = torch.Generator().manual_seed(seed)  # and the same batches
        self.steps: list[int] = []
        self.errors: list[float] = []
        self.ms: list[float] = []

    def step(self, images: Tensor, target: Tensor, batch: int) -> None:
        rows = torch.randint(len(images), (batch,), generator=self.order)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.network(images[rows]), target[rows]).backward()
        self.optimizer.step()
        self.schedule.step()
        self.ms.append((time.perf_counter() - start) * 1e3)


def train(options: argparse.Namespace) -> dict[str, list[Run]]:
    """Every method takes a step in turn, so that they share the machine's moods."""
    train_images, test_images, train_target, test_target = load()
    if options.quick:
        test_images, test_target = test_images[:100], test_target[:100]
    found: dict[str, list[Run]] = {method: [] for method in METHODS}
    every = max(1, options.steps // 12)
    with tqdm(total=options.seeds * options.steps, unit="step") as bar:
        for seed in range(options.seeds):
            runs = {method: Run(method, seed, options) for method in METHODS}
            for done in range(1, options.steps + 1):
                for run in runs.values():
                    run.step(train_images, train_target, options.batch)
                    if done % every == 0 or done == options.steps:
                        run.steps.append(done)
                        run.errors.append(evaluate(run.network, test_images, test_target))
                bar.update()
            for method, run in runs.items():
                found[method].append(run)
    return found


def density(run: Run) -> float:
    masks = run.network.masks()
    return statistics.fmean(each.density().item() for each in masks) if masks else 1.0


def table(runs: dict[str, list[Run]]) -> None:
    print(f"\n{'':<22}  {'test error, %':>15}  {'density':>7}  {'ms a step':>9}")
    for method, each in runs.items():
        errors = [run.errors[-1] for run in each]
        spread = statistics.stdev(errors) if len(errors) > 1 else float("nan")
        shown = f"{statistics.fmean(errors):.2f} ± {spread:.2f}"
        ms = statistics.median(value for run in each for value in run.ms)
        print(f"{method:<22}  {shown:>15}  {density(each[-1]):>7.3f}  {ms:>9.1f}")
    seeds = len(next(iter(runs.values())))
    print(f"mean ± deviation of {seeds} runs; density: the share of blocks that attend;\n"
          "a step is forward, backward and AdamW, the median")  # fmt: skip


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    pyplot.rcParams.update({"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
                            "ytick.color": INK, "font.size": 10})  # fmt: skip
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained", width_ratios=(1.4, 1, 1))
    for (method, each), colour in zip(runs.items(), COLOURS, strict=True):
        errors = torch.tensor([run.errors for run in each])
        axes[0].plot(each[0].steps, errors.mean(0), color=colour, label=method, linewidth=1.6)
        axes[0].fill_between(each[0].steps, errors.amin(0), errors.amax(0), color=colour, alpha=0.2, linewidth=0)
    axes[0].set(title="test error, %", xlabel="training steps", yscale="log")
    axes[0].grid(color=INK, alpha=0.25, linewidth=0.5)
    axes[0].spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    for axis, method in zip(axes[1:], METHODS[1:], strict=True):
        blocks = runs[method][-1].network.masks()[0].to_dense().float().mean((0, 1))
        axis.imshow(blocks, cmap="magma", vmin=0, vmax=1)
        axis.set(
            title=f"{method.removesuffix(', pyrx')}, layer 1", xlabel="rows attended to", ylabel="rows of the image"
        )
    figure.savefig(path, dpi=130, transparent=True)
    pyplot.close(figure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "; default %(default)s"
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method" + default)
    parser.add_argument("--steps", type=int, default=300, help="training steps of a run" + default)
    parser.add_argument("--batch", type=int, default=64, help="images of a step" + default)
    parser.add_argument("--rate", type=float, default=3e-3, help="AdamW's highest learning rate" + default)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"), help="the picture" + default)
    parser.add_argument("--quick", action="store_true", help="2 short runs each: whether it works, not what it shows")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.steps, options.batch = 2, 4, 16
    if min(options.seeds, options.steps, options.batch) < 1:
        parser.error("--seeds, --steps and --batch must be at least 1")
    if not options.out.parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    started = time.perf_counter()
    runs = train(options)
    table(runs)
    draw(runs, options.out)
    print(f"curves and masks: {options.out}\n{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
