"""Calls of erasing, noise, patch masks and the filling of what is missing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import pyrx
from fuzz.calls import Call
from fuzz.dropouts import sample
from fuzz.mixing import boxes_of, images_of, is_free
from fuzz.strategies import FLOATS, Draws, fuzzes

METHODS = ("random", "block", "hard")


def _erasing(draws: Draws) -> tuple[dict[str, Any], tuple[str, ...]]:
    images = images_of(draws)
    modes = ("const",) if images.dtype == torch.uint8 else ("const", "rand", "pixel")

    def value() -> Any:
        if images.dtype == torch.uint8:
            return draws.pick(0, 255.0, [draws.integer(0, 255) for _ in range(images.shape[1])])
        return draws.pick(0.0, math.nan, 1e300, [draws.number(-2.0, 2.0) for _ in range(images.shape[1])])

    arguments: dict[str, Any] = {"images": images, "seed": draws.seed(), "return_boxes": draws.chance(2)}
    arguments |= draws.some(
        mode=lambda: draws.pick(*modes),
        value=lambda: value() if images.shape[1] > 0 else 0.0,
        prob=lambda: draws.number(0.0, 1.0),
        per_sample=lambda: draws.pick(True, False),
    )
    if draws.chance(3):
        arguments["boxes"] = boxes_of(draws, (images.shape[0], draws.integer(0, 4)), images)
    if is_free(images) and draws.chance(3):
        arguments["inplace"] = True
        return arguments, ("images",)
    return arguments, ()


@fuzzes("random_erasing")
def random_erasing(draws: Draws) -> Call:
    arguments, writes = _erasing(draws)
    arguments |= draws.some(
        scale=lambda: draws.pick((0.02, 0.4), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0)),
        ratio=lambda: draws.pick((0.3, 3.3), (1e-6, 1e6), (1.0, 1.0)),
        num_splits=lambda: draws.integer(0, 4),
    )
    if draws.chance(2):
        least = draws.integer(1, 6)
        arguments |= {"min_count": least, "max_count": draws.pick(None, least, least + 3, 64)}
    needs = () if writes else draws.needs(images=arguments["images"])
    return Call(pyrx.random_erasing, arguments, needs, writes, exact_gradients=True)


@fuzzes("cutout")
def cutout(draws: Draws) -> Call:
    arguments, writes = _erasing(draws)
    arguments |= draws.some(length=lambda: draws.number(0.0, 1.0), num_holes=lambda: draws.pick(1, 2, 5, 64))
    needs = () if writes else draws.needs(images=arguments["images"])
    return Call(pyrx.cutout, arguments, needs, writes, exact_gradients=True)


@fuzzes("noise_mask")
def noise_mask(draws: Draws) -> Call:
    shape = draws.shape(draws.integer(3, 6), 5000)
    dtype = draws.float_dtype()
    channels = draws.pick(shape[1], 1)
    mask = draws.tensor((shape[0], channels, *shape[2:]), draws.pick(dtype, torch.bool, *FLOATS), draws.kind())
    arguments = {
        "images": draws.tensor(shape, dtype, draws.kind()),
        "mask": mask,
        "seed": draws.seed(),
        **draws.some(
            std=lambda: draws.number(0.0, 3.0), mean=lambda: draws.number(-3.0, 3.0), sample=lambda: sample(draws)
        ),
    }
    needs = draws.needs(images=arguments["images"], mask=mask)
    return Call(pyrx.noise_mask, arguments, needs, floats=("images", "mask"), floor=30.0)


@fuzzes("patch_mask")
def patch_mask(draws: Draws) -> Call:
    method = draws.pick(*METHODS)
    dims = 2 if method == "block" else draws.integer(1, 2)
    shape = (draws.size(5), *draws.shape(dims, 400))
    size = math.prod(shape[1:])
    arguments: dict[str, Any] = {"shape": shape, "method": method, "seed": draws.seed()}
    arguments |= draws.some(
        mask_ratio=lambda: draws.number(0.0, 1.0),
        num_masked=lambda: draws.pick(None, draws.integer(0, size)),
        hard_ratio=lambda: draws.number(0.0, 1.0),
        min_block=lambda: draws.pick(1, 4, 16, 100),
        min_aspect=lambda: draws.number(0.01, 1.0),
        return_indices=lambda: draws.pick(True, False),
    )
    if method == "hard":
        arguments["losses"] = draws.tensor(shape, draws.float_dtype(), draws.kind())
    return Call(pyrx.patch_mask, arguments)


@fuzzes("neighbor_fill")
def neighbor_fill(draws: Draws) -> Call:
    shape = (draws.size(5), draws.length(9, 130), *draws.shape(2, 400))
    dtype = draws.float_dtype()
    mask = draws.tensor((shape[0], 1, *shape[2:]), draws.pick(torch.bool, dtype), "ties")
    if draws.chance(3):
        mask = torch.where(draws.tensor(mask.shape, torch.int64, high=9) > 0, torch.zeros((), dtype=mask.dtype), mask)
    layout = "channels_last" if shape[1] > 64 else None
    arguments = {
        "input": draws.tensor(shape, dtype, draws.pick("normal", "ties", "special"), layout=layout),
        "mask": mask,
        "iterations": draws.pick(0, 1, 2, 3, 7, 40),
    }
    return Call(pyrx.neighbor_fill, arguments, draws.needs(input=arguments["input"]), exact_gradients=True)


@fuzzes("nn.LayerMasking")
def layer_masking(draws: Draws) -> Call:
    shape = (draws.size(3, least=1), 3, draws.size(17, least=8), draws.size(17, least=8))
    arguments: dict[str, Any] = {
        "images": draws.tensor(shape),
        "mask": draws.tensor((shape[0], 1, *shape[2:]), draws.pick(torch.bool, torch.float32), "ties"),
        "fill": draws.pick("neighbors", None, "renormalize"),
    }

    def LayerMasking(images: Tensor, mask: Tensor, fill: str | None, backend: str | None = None) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, stride=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 5, 5, padding=2),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ).eval()
        return pyrx.nn.LayerMasking(model, fill, backend=backend)(images, mask)

    needs = draws.needs(images=arguments["images"])
    return Call(LayerMasking, arguments, needs, exact=False, floor=1.0, fixed=("images",), idle=True)
