"""Multi-sample dropout against plain dropout on real handwritten digits, with the same small CNN.

Checks what the paper says of it (Inoue 2019): fewer steps to a training loss, lower error, little cost a step. Prints a
table and what was seen of each claim, whatever that is, and draws the curves. One more row mixes the images by CutMix
and hands both labels to the same head, without a one-hot tensor. The digits are the 1797 scans that come
with scikit-learn; nothing is downloaded.

With --sparsity 2:4 (or any N:M) it compares ways to train the network with plain dropout N:M sparse instead.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import matplotlib
    from scipy import stats
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"this example needs {error.name}: pip install -e '.[demo]', or make demo")

matplotlib.use("Agg")
from matplotlib import pyplot

import digits_sparsity
import pyrx
from pyrx import _backends

FEATURES, CLASSES = 512, 10
EVALUATE_EVERY = 5
SAMPLES = (2, 8, 32)
COLOURS = ("#888888", "#e08a1e", "#2f8fdd", "#c2428f", "#3fa36b", "#7a5fd0", "#b59b00", "#5ab8b8")
INK = "#808080"  # grey text reads on white and on black


class PlainHead(nn.Linear):
    """What one writes today: dropout, linear, cross-entropy. With M > 1, the naive loop over samples."""

    def __init__(self, p: float, num_samples: int = 1) -> None:
        super().__init__(FEATURES, CLASSES)
        self.dropout, self.num_samples = nn.Dropout(p), num_samples

    def forward(self, features: Tensor, target: Tensor | None = None) -> Tensor:
        if target is None:
            return super().forward(features)
        losses = [F.cross_entropy(super(PlainHead, self).forward(self.dropout(features)), target)
                  for _ in range(self.num_samples)]  # fmt: skip
        return torch.stack(losses).mean()


class Network(nn.Module):
    """Two convolutions, 512 features, and the head that differs."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = head

    def forward(self, images: Tensor, target: Tensor | pyrx.MixedTarget | None = None) -> Tensor:
        features = self.body(images)
        return self.head(features) if target is None else self.head(features, target)


@dataclass(frozen=True)
class Method:
    name: str
    head: Callable[[], nn.Module]
    cutmix: bool = False
    sparse: digits_sparsity.Way | None = None


@dataclass(frozen=True)
class Digits:
    train: Tensor
    train_target: Tensor
    test: Tensor
    test_target: Tensor


@dataclass
class Curve:
    """One training run: at each evaluated step, with dropout off, the loss of the training set and the test error."""

    steps: list[int]
    loss: list[float]
    error: list[float]
    density: float = 1.0  # of the layers that were made sparse, at the end

    def steps_to(self, threshold: float) -> int | None:
        return next((step for step, loss in zip(self.steps, self.loss, strict=True) if loss <= threshold), None)

    def final_error(self) -> float:
        """The mean of the last tenth of the evaluations: a single one jumps by a few images."""
        return statistics.fmean(self.error[-max(1, len(self.error) // 10) :])


def load() -> Digits:
    """Half to train on and half to test, always the same."""
    images, target = load_digits(return_X_y=True)
    parts = train_test_split(images, target, test_size=0.5, random_state=0, stratify=target)
    train, test = (torch.tensor(each, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for each in parts[:2])
    return Digits(train, torch.tensor(parts[2]), test, torch.tensor(parts[3]))


@dataclass
class Run:
    """A network in training."""

    network: Network
    optimizer: torch.optim.Optimizer
    schedule: pyrx.nn.SparsitySchedule | None
    cutmix: bool

    def step(self, images: Tensor, target: Tensor) -> None:
        self.optimizer.zero_grad()
        if self.cutmix:
            images, mixed = pyrx.cutmix(images, target, pairing="random", prob=0.5)
            self.network(images, mixed).backward()
        else:
            self.network(images, target).backward()
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()


def make(method: Method, seed: int, rate: float, steps: int) -> Run:
    """The same seed gives every method the same weights to start from."""
    torch.manual_seed(seed)
    network = Network(method.head())
    schedule = None if method.sparse is None else method.sparse.start(network, steps)
    rule = None if method.sparse is None else method.sparse.rule
    optimizer = torch.optim.Adam(network.parameters(), rate)
    if rule is not None:
        optimizer = pyrx.optim.MaskedAdamW(network.parameters(), rate, weight_decay=0, rule=rule, model=network)
    return Run(network, optimizer, schedule, method.cutmix)


@torch.no_grad()
def evaluate(network: Network, digits: Digits) -> tuple[float, float]:
    network.eval()
    loss = F.cross_entropy(network(digits.train), digits.train_target).item()
    wrong = network(digits.test).argmax(1) != digits.test_target
    network.train()
    return loss, 100 * wrong.double().mean().item()


def train(method: Method, seed: int, digits: Digits, options: argparse.Namespace, bar: tqdm) -> Curve:
    run = make(method, seed, options.rate, options.steps)
    order = torch.Generator().manual_seed(seed)  # and the same batches
    curve = Curve([], [], [])
    for done in range(options.steps + 1):
        if done % EVALUATE_EVERY == 0 or done == options.steps:
            loss, wrong = evaluate(run.network, digits)
            curve.steps.append(done)
            curve.loss.append(loss)
            curve.error.append(wrong)
        if done < options.steps:
            rows = torch.randint(len(digits.train), (options.batch,), generator=order)
            run.step(digits.train[rows], digits.train_target[rows])
            bar.update()
    curve.density = pyrx.nn.sparsity_report(run.network).density
    return curve


def time_steps(methods: Sequence[Method], digits: Digits, options: argparse.Namespace, bar: tqdm) -> dict[str, float]:
    """The median milliseconds of a training step. The methods take turns, so that they share the machine's moods."""
    rows = slice(0, options.batch)
    # of a schedule long enough that all of it is in the flow
    steps = 10 * options.timing_steps * (options.timing_rounds + 1)
    runs = {method.name: make(method, 0, options.rate, steps) for method in methods}
    for run in runs.values():
        while run.schedule is not None and run.schedule.phase == "dense":
            run.schedule.step()
    found: dict[str, list[float]] = {method.name: [] for method in methods}
    for turn in range(options.timing_rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(options.timing_steps):
                run.step(digits.train[rows], digits.train_target[rows])
            if turn:  # the first warms up
                found[name].append((time.perf_counter() - start) / options.timing_steps * 1e3)
            bar.update()
    return {name: statistics.median(each) for name, each in found.items()}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def paired(ours: Sequence[float], plain: Sequence[float]) -> tuple[float, bool]:
    """The mean change over seeds in percent, and whether its 95% confidence interval leaves out zero."""
    change = [a - b for a, b in zip(ours, plain, strict=True)]
    mean, deviation = mean_and_deviation(change)
    clear = abs(mean) > stats.t.ppf(0.975, len(change) - 1) * deviation / math.sqrt(len(change))
    return 100 * mean / max(statistics.fmean(plain), 1e-9), bool(clear)


def claim(text: str, seen: Sequence[bool], numbers: Sequence[str]) -> str:
    verdict = "seen" if all(seen) else "seen in part" if any(seen) else "not seen"
    return f"  {text + ':':<33} {verdict}: {', '.join(numbers)}"


def draw(curves: dict[str, list[Curve]], threshold: float, path: Path) -> None:
    pyplot.rcParams.update({"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
                            "ytick.color": INK, "font.size": 10})  # fmt: skip
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    titles = ("training loss, dropout off", "test error, %")
    for axis, title, field in zip(axes, titles, ("loss", "error"), strict=True):
        for (name, runs), colour in zip(curves.items(), itertools.cycle(COLOURS)):
            values = torch.tensor([getattr(run, field) for run in runs])
            steps = runs[0].steps
            axis.plot(steps, values.mean(0), color=colour, label=name, linewidth=1.6)
            axis.fill_between(steps, values.amin(0), values.amax(0), color=colour, alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="training steps", yscale="log")
        axis.grid(color=INK, alpha=0.25, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(threshold, color=INK, linewidth=0.8, linestyle="--")
    axes[1].yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes[1].legend(frameon=False, fontsize=10 if len(curves) < 6 else 8)
    seeds = len(next(iter(curves.values())))
    figure.suptitle(f"Handwritten digits: mean and range of {seeds} runs each", color=INK)
    figure.savefig(path, dpi=130, transparent=True)
    pyplot.close(figure)


def short(name: str) -> str:
    return name.removesuffix(", pyrx").replace(", PyTorch", " in PyTorch")


def steps_of(curves: dict[str, list[Curve]], options: argparse.Namespace) -> dict[str, list[float]]:
    """The steps to the loss; a run that never got there counts with those it had, which favours it: its row says so."""
    reached = {name: [run.steps_to(options.threshold) for run in runs] for name, runs in curves.items()}
    return {name: [float(options.steps if each is None else each) for each in found] for name, found in reached.items()}


def errors_of(curves: dict[str, list[Curve]]) -> dict[str, list[float]]:
    return {name: [run.final_error() for run in runs] for name, runs in curves.items()}


def table(curves: dict[str, list[Curve]], ms: dict[str, float], options: argparse.Namespace) -> None:
    steps, errors = steps_of(curves, options), errors_of(curves)
    head = f"{'':<32}  {f'steps to loss {options.threshold:g}':>20}  {'test error, %':>15}  {'ms a step':>9}"
    print("\n" + head + (f"  {'density':>7}" if options.sparsity else ""))
    for name in ms:
        if name in curves:
            mean, deviation = mean_and_deviation(steps[name])
            missing = sum(run.steps_to(options.threshold) is None for run in curves[name])
            shown = f"{mean:.0f} ± {deviation:.0f}" + (f", {missing} never" if missing else "")
            shown = "never" if missing == options.seeds else shown
            mean, deviation = mean_and_deviation(errors[name])
            row = f"{name:<32}  {shown:>20}  {f'{mean:.2f} ± {deviation:.2f}':>15}  {ms[name]:>9.2f}"
            density = statistics.fmean(run.density for run in curves[name])
            print(row + (f"  {density:>7.3f}" if options.sparsity else ""))
        else:
            print(f"{name:<32}  {'':>20}  {'':>15}  {ms[name]:>9.2f}")
    print(f"mean ± deviation of {options.seeds} runs; loss of the training set with dropout off, looked at every "
          f"{EVALUATE_EVERY} steps;\nerror over the last tenth of the run; a step is forward, backward and Adam, batch "
          f"{options.batch}, median of turns")  # fmt: skip
    if options.sparsity:
        print("schedules are timed in their flow, and reach the loss also while they still keep more than N of M;\n"
              "density: of the layers that are sparse, in the end")  # fmt: skip
    print()


def changes(values: dict[str, list[float]], names: Sequence[str]) -> tuple[list[tuple[float, bool]], list[str]]:
    """Against the first method, and as text."""
    plain = next(iter(values))
    found = [paired(values[name], values[plain]) for name in names]
    return found, [f"{short(name)} {change:+.0f}% ({'clear' if clear else 'within noise'})"
                   for name, (change, clear) in zip(names, found, strict=True)]  # fmt: skip


def claims(
    curves: dict[str, list[Curve]], ms: dict[str, float], ours: Sequence[str], options: argparse.Namespace
) -> None:
    """`ours` are the methods of the paper's claims."""
    print(f"What the paper claims, and what was seen against plain dropout over {options.seeds} seeds:")
    for text, values in (
        ("fewer steps to a training loss", steps_of(curves, options)),
        ("lower test error", errors_of(curves)),
    ):
        found, numbers = changes(values, ours)
        print(claim(text, [change < 0 and clear for change, clear in found], numbers))
    costs = {name: ms[name] / ms[next(iter(curves))] - 1 for name in ms if name in ours or name not in curves}
    print(claim("little cost a step, at most 25%", [costs[name] <= 0.25 for name in ours],
                [f"{short(name)} {100 * cost:+.0f}%" for name, cost in costs.items()]))  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "; default %(default)s"
    parser.add_argument("--seeds", type=int, default=6, help="runs of each method" + default)
    parser.add_argument("--steps", type=int, default=500, help="training steps of a run" + default)
    parser.add_argument("--batch", type=int, default=128, help="images of a step" + default)
    parser.add_argument("--rate", type=float, default=2e-3, help="Adam's learning rate" + default)
    parser.add_argument("--p", type=float, default=0.5, help="probability of dropping a feature" + default)
    parser.add_argument("--threshold", type=float, default=0.05, help="the training loss to reach" + default)
    parser.add_argument(
        "--sparsity", type=digits_sparsity.ratio, metavar="N:M", help="compare ways to keep N of each M weights"
    )
    parser.add_argument(
        "--out", type=Path, help="the picture; default digits.png or digits_sparsity.png beside this file"
    )
    parser.add_argument("--quick", action="store_true", help="2 short runs each: whether it works, not what it shows")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.steps, options.batch) < 1:
        parser.error("--seeds, --steps and --batch must be at least 1")
    if not 0 <= options.p < 1:
        parser.error("--p must be in [0, 1)")
    if options.out is None:
        options.out = Path(__file__).with_name("digits_sparsity.png" if options.sparsity else "digits.png")
    if not options.out.parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    options.timing_rounds, options.timing_steps = 40, 5
    if options.quick:
        options.seeds, options.steps, options.timing_rounds, options.timing_steps = 2, 20, 2, 1
    return options


def multi_sample_methods(options: argparse.Namespace) -> tuple[list[Method], list[Method]]:
    """Those that are trained, and those that are only timed."""

    def multi_sample(samples: int) -> Method:
        return Method(
            f"M = {samples}, pyrx", lambda: pyrx.nn.MultiSampleDropoutClassifier(FEATURES, CLASSES, samples, options.p)
        )

    mixed = Method("CutMix into M = 8, pyrx", multi_sample(8).head, cutmix=True)
    naive = Method("M = 8 as a loop, PyTorch", lambda: PlainHead(options.p, num_samples=8))
    return [*map(multi_sample, SAMPLES), mixed], [naive]


def sparse_methods(options: argparse.Namespace) -> list[Method]:
    return [
        Method(name, lambda: PlainHead(options.p), sparse=way)
        for name, way in digits_sparsity.methods(*options.sparsity).items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    digits = load()
    plain = Method("plain dropout, PyTorch", lambda: PlainHead(options.p))
    others, timed = (sparse_methods(options), []) if options.sparsity else multi_sample_methods(options)
    methods = [plain, *others]
    op = "nm_sparsity" if options.sparsity else "multi_sample_dropout"
    backend = _backends.select(op, "cpu", torch.float32, None)
    print(f"{len(digits.train)} digits to train on, {len(digits.test)} to test on; {torch.get_num_threads()} threads; "
          f"pyrx serves from its {backend} backend")  # fmt: skip
    if backend == "reference":
        print(f"  slowly: {'; '.join(_backends.reasons(op, 'cpu', 'cpu'))}")

    started = time.perf_counter()
    timed = [*methods, *timed]
    total = len(methods) * options.seeds * options.steps + len(timed) * (options.timing_rounds + 1)
    curves: dict[str, list[Curve]] = {method.name: [] for method in methods}
    with tqdm(total=total, unit="step", unit_scale=True, smoothing=0) as bar:
        for seed in range(options.seeds):
            for method in methods:
                bar.set_postfix_str(f"{method.name}, seed {seed}")
                curves[method.name].append(train(method, seed, digits, options, bar))
        bar.set_postfix_str("timing")
        ms = time_steps(timed, digits, options, bar)
    draw(curves, options.threshold, options.out)
    table(curves, ms, options)
    names = [method.name for method in others]
    if options.sparsity:
        _, numbers = changes(errors_of(curves), names)
        print(f"test error against the dense network over {options.seeds} seeds:\n  " + "\n  ".join(numbers))
        print(f"\nwhat is sparse:\n{pyrx.nn.sparsity_report(make(others[0], 0, options.rate, options.steps).network)}")
    else:
        claims(curves, ms, [name for name in names if "CutMix" not in name], options)
    print(f"curves: {options.out}\n{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
