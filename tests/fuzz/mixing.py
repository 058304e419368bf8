"""Calls of CutMix and its kin, of blending, and of the module in the place of timm's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pyrx
from fuzz.calls import Call
from fuzz.strategies import FLOATS, Draws, fuzzes

IMAGES = (torch.float32, torch.uint8, torch.bfloat16, torch.float16, torch.float64)
MASKS = (torch.int64, torch.uint8, torch.bool, torch.int32)


def images_of(draws: Draws, dtypes: tuple[torch.dtype, ...] = IMAGES, most: int = 3000) -> Tensor:
    """(N, C, H, W), at times (N, C, T, H, W)."""
    dims = draws.pick(4, 4, 5)
    if draws.chance(8):  # planes of more than a thread takes at a time
        shape = (
            draws.integer(1, 2),
            draws.integer(1, 2),
            *(2,) * (dims - 4),
            draws.pick(100, 257),
            draws.pick(131, 400),
        )
    else:
        shape = (draws.size(9), draws.size(5), *draws.shape(dims - 2, most // 45))
    return draws.tensor(shape, draws.pick(*dtypes), draws.kind(), high=256)


def is_free(images: Tensor) -> bool:
    """Whether every element has memory of its own."""
    return all(stride > 0 or size <= 1 for stride, size in zip(images.stride(), images.shape, strict=True))


def pairing_of(draws: Draws, samples: int) -> str | Tensor:
    pairing = draws.pick("flip", "roll", "random", "given", "own inverse")
    generator = torch.Generator().manual_seed(draws.integer(0, 99))
    if pairing == "given":
        return torch.randperm(samples, generator=generator)
    if pairing == "own inverse":
        order = torch.randperm(samples, generator=generator)
        return torch.empty(samples, dtype=torch.int64).index_put_((order,), order.flip(0))
    return pairing


def boxes_of(draws: Draws, lead: tuple[int, ...], images: Tensor) -> Tensor:
    """int64 (*lead, 4): (y0, x0, y1, x1) inside of the images."""
    height, width = images.shape[-2:]
    ends = [
        draws.tensor((*lead, 2), torch.int64, high=size + 1, layout="offset").sort(-1).values
        for size in (height, width)
    ]
    return torch.stack(ends, -1).flatten(-2)


def _mix(draws: Draws, name: str) -> dict[str, Any]:
    """What the ops of the family share."""
    boxed = name != "mixup"
    images = images_of(draws, (*IMAGES, torch.int32, torch.int64) if boxed else IMAGES)
    samples, channels = images.shape[:2]
    arguments: dict[str, Any] = {
        "images": images,
        "labels": draws.tensor((samples,), torch.int64, high=1000) if draws.chance(2) else None,
        "pairing": pairing_of(draws, samples),
        "seed": draws.seed(),
        **draws.some(per_sample=lambda: draws.pick(True, False), prob=lambda: draws.number(0.0, 1.0, 0.5)),
    }
    if boxed and draws.chance(3):
        arguments["boxes"] = boxes_of(draws, (samples,), images)
    if (name in ("cutmix", "mixup") or "boxes" in arguments) and draws.chance(3):
        lam = draws.tensor((samples,), torch.float32, "uniform")
        arguments["lam"] = draws.pick(lam, draws.number(0.0, 1.0))
    if boxed and draws.chance(4):
        arguments["masks"] = draws.tensor((samples, *images.shape[2:]), draws.pick(*MASKS), high=2)
    mixable = images.dtype == torch.uint8 or images.is_floating_point()
    if mixable and draws.chance(3):
        arguments["dtype"] = draws.pick(*FLOATS)
    floating = images.is_floating_point() or "dtype" in arguments
    if mixable and floating and draws.chance(3):
        arguments["mean"] = draws.pick(0.5, [draws.number(-2.0, 2.0) for _ in range(channels)])
        arguments["std"] = draws.pick(0.25, [draws.number(0.1, 2.0) for _ in range(channels)])
    return arguments


def _written(draws: Draws, arguments: dict[str, Any], swaps: bool = True) -> tuple[str, ...]:
    """Asks for out= or inplace=, where the call has a place for it."""
    images, pairing = arguments["images"], arguments["pairing"]
    dtype = arguments.get("dtype", images.dtype)
    if draws.chance(4):
        layout = draws.pick("contiguous", "channels_last", "permuted", "stepped", "offset")
        arguments["out"] = draws.tensor(images.shape, dtype, layout=layout)
        return ("out",)
    plain = not {"dtype", "mean", "std"} & arguments.keys() and is_free(images)
    inverse = pairing in ("flip", "random") if isinstance(pairing, str) else bool((pairing[pairing].diff() == 1).all())
    if swaps and plain and inverse and draws.chance(3):
        arguments["inplace"] = True
        if "masks" in arguments and not is_free(arguments["masks"]):
            del arguments["masks"]
        return ("images", "masks")
    return ()


def _call(draws: Draws, function: Any, arguments: dict[str, Any], writes: tuple[str, ...]) -> Call:
    needs = () if writes else draws.needs(images=arguments["images"])
    return Call(function, arguments, needs, writes, floats=("images",))


@fuzzes("cutmix")
def cutmix(draws: Draws) -> Call:
    arguments = _mix(draws, "cutmix")
    arguments |= draws.some(alpha=lambda: alpha_of(draws), correct_lam=lambda: draws.pick(True, False))
    if "lam" not in arguments and draws.chance(4):
        arguments["minmax"] = draws.pick((0.2, 0.8), (0.0, 1.0), (0.5, 0.5), (0.0, 1e-9))
    return _call(draws, pyrx.cutmix, arguments, _written(draws, arguments))


def alpha_of(draws: Draws) -> float:
    return draws.number(0.05, 8.0, 1.0, 0.2, 1e-3, 1e3)


@fuzzes("mixup")
def mixup(draws: Draws) -> Call:
    arguments = _mix(draws, "mixup") | draws.some(alpha=lambda: alpha_of(draws))
    return _call(draws, pyrx.mixup, arguments, _written(draws, arguments))


@fuzzes("resizemix")
def resizemix(draws: Draws) -> Call:
    arguments = _mix(draws, "resizemix")
    arguments |= draws.some(scale=lambda: draws.pick((0.1, 0.8), (0.0, 1.0), (0.3, 0.3)))
    return _call(draws, pyrx.resizemix, arguments, _written(draws, arguments, swaps=False))


@fuzzes("fmix")
def fmix(draws: Draws) -> Call:
    arguments = _mix(draws, "mixup")
    for name in ("dtype", "mean", "std"):
        arguments.pop(name, None)
    images = arguments["images"]
    arguments |= draws.some(
        alpha=lambda: alpha_of(draws),
        decay_power=lambda: draws.number(0.0, 8.0, 3.0),
        max_soft=lambda: draws.number(0.0, 0.5),
    )
    if draws.chance(3):
        shape = (draws.pick(1, images.shape[0]), 1, *images.shape[-2:])
        kind = draws.pick("uniform", "normal")
        arguments["mattes"] = draws.tensor(shape, draws.pick(torch.bool, *FLOATS), kind)
    if draws.chance(4):
        arguments["masks"] = draws.tensor((images.shape[0], *images.shape[2:]), draws.pick(*MASKS), high=2)
    return _call(draws, pyrx.fmix, arguments, _written(draws, arguments, swaps=False))


@fuzzes("blend")
def blend(draws: Draws) -> Call:
    x = images_of(draws)
    lead = [size if draws.chance(2) else 1 for size in x.shape[: x.dim() - 2]]
    alpha_dtype = draws.pick(torch.float32, torch.bool, *FLOATS)
    others = draws.size(9, least=1)
    arguments: dict[str, Any] = {
        "x": x,
        "alpha": draws.tensor((*lead, *x.shape[-2:]), alpha_dtype, draws.pick("uniform", "ties", "special")),
    }
    if draws.chance(2):
        arguments["partner"] = draws.tensor((x.shape[0],), torch.int64, high=others)
        arguments["y"] = draws.tensor((others, *x.shape[1:]), x.dtype, draws.kind(), high=256)
    else:
        arguments["y"] = draws.tensor(x.shape, x.dtype, draws.kind(), high=256)
    if draws.chance(4):
        layout = draws.pick("contiguous", "channels_last", "permuted", "stepped", "offset")
        arguments["out"] = draws.tensor(x.shape, x.dtype, layout=layout)
        return Call(pyrx.blend, arguments, writes=("out",))
    needs = draws.needs(**{name: arguments[name] for name in ("x", "y", "alpha")})
    return Call(pyrx.blend, arguments, needs, floats=("x", "y", "alpha"), floor=4.0)


@fuzzes("nn.Mixup")
def mixup_module(draws: Draws) -> Call:
    images = images_of(draws)
    arguments: dict[str, Any] = {
        "images": images,
        "target": draws.tensor((images.shape[0],), torch.int64, high=5),
        "inplace": is_free(images) and draws.chance(2),
        "num_classes": 5,
        **draws.some(
            mixup_alpha=lambda: alpha_of(draws),
            cutmix_alpha=lambda: alpha_of(draws),
            cutmix_minmax=lambda: draws.pick(None, (0.2, 0.8)),
            prob=lambda: draws.number(0.0, 1.0),
            switch_prob=lambda: draws.number(0.0, 1.0),
            mode=lambda: draws.pick("batch", "pair", "elem", "half"),
            correct_lam=lambda: draws.pick(True, False),
            label_smoothing=lambda: draws.number(0.0, 1.0),
            mixed_target=lambda: draws.pick(True, False),
        ),
    }

    def Mixup(images: Tensor, target: Tensor, **options: Any) -> Any:
        return pyrx.nn.Mixup(**options)(images, target)

    writes = ("images",) if arguments["inplace"] else ()
    needs = () if writes else draws.needs(images=images)
    return Call(Mixup, arguments, needs, writes, floats=("images",), fixed=("inplace", "num_classes"))
