"""What the caller says about randomness (p, seed, generator) as kernels read it (thresholds, a seed tensor)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrx._checks import check_choice, check_device, check_dtype, check_integer, check_number, fail

LEVELS = 65536
MAX_SAMPLE = 2**32 - 1
SAMPLINGS = ("independent", "antithetic")


def threshold(op: str, p: float, argument: str = "p") -> int:
    """round(65536 p), at most 65535: an element is kept iff its 16-bit lane is at least this."""
    check_number(op, argument, p)
    if not 0 <= p < 1:
        fail(op, argument, "in [0, 1)", p)
    return min(round(LEVELS * p), LEVELS - 1)


def level(op: str, name: str, prob: float) -> int:
    """round(65536 prob), prob in [0, 1]: what happens with that chance does if a 16-bit lane is below this."""
    check_number(op, name, prob)
    if not 0 <= prob <= 1:
        fail(op, name, "in [0, 1]", prob)
    return round(LEVELS * prob)


def thresholds(op: str, p: float | Sequence[float], num_samples: int) -> list[int]:
    check_integer(op, "num_samples", num_samples, 1, 65535)
    if isinstance(p, (list, tuple)):
        if len(p) != num_samples:
            fail(op, "p", f"to be a float or num_samples = {num_samples} floats", f"{len(p)} floats")
        return [threshold(op, each) for each in p]
    return [threshold(op, p)] * num_samples  # type: ignore[arg-type]  # threshold() rejects what is not a number


def is_antithetic(op: str, sampling: str) -> bool:
    check_choice(op, "sampling", sampling, SAMPLINGS)
    return sampling == "antithetic"


def device_of(device: torch.device | str | None, *found: Tensor | torch.Generator | int | None) -> torch.device:
    """`device`, with the current index of "cuda"; without it that of the first that has one, else the CPU."""
    if device is None:
        for each in found:
            if isinstance(each, (Tensor, torch.Generator)):
                return each.device
        return torch.device("cpu")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_seed(op: str, seed: Tensor, device: torch.device) -> None:
    check_dtype(op, "seed", seed, torch.int64)
    check_device(op, "seed", seed, device)
    if seed.numel() != 1:
        fail(op, "seed", "of one element", list(seed.shape))


def seed_tensor(op: str, seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """The op's seed, an int64 scalar on `device`: drawn there unless given, so that nothing syncs."""
    if seed is not None and generator is not None:
        fail(op, "at most one of seed", "and generator", "both")
    if generator is not None and not isinstance(generator, torch.Generator):
        fail(op, "generator", "to be a torch.Generator", type(generator).__name__, TypeError)
    if seed is None:
        if generator is not None and generator.device.type != device.type:
            fail(op, "generator", f"on device {device}", generator.device, RuntimeError)
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    if isinstance(seed, Tensor):
        check_seed(op, seed, device)
        return seed
    check_integer(op, "seed", seed, -(2**63), 2**64 - 1)
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
