"""Calls of N:M sparsity: masks, weights under them, compressed weights, optimizer steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import pyrx
from fuzz.calls import Call
from fuzz.strategies import LARGE_SIZES, Draws, fuzzes
from pyrx.reference.dropout import pack_bits

ESTIMATORS = ("ste", "sr-ste", "mdgf", "mdgf-scaled", "hard")
RATIOS = (
    (2, 4), (1, 4), (4, 8), (1, 1), (1, 2), (3, 5), (1, 8), (7, 16), (1, 16), (2, 32), (5, 100), (128, 128), (1, 128),
)  # fmt: skip


def ratio(draws: Draws, most: int = 128) -> tuple[int, int]:
    if draws.chance(3):
        m = draws.integer(1, most)
        return draws.integer(1, m), m
    return draws.pick(*(each for each in RATIOS if each[1] <= most))


def grouped(draws: Draws, m: int, pad: bool = False, dims: int = 4) -> tuple[tuple[int, ...], int]:
    """(shape, dim) of a weight whose size along dim m divides."""
    shape = [max(1, each) if draws.chance(2) else each for each in draws.shape(draws.integer(1, dims), 40)]
    dim = draws.integer(0, len(shape) - 1)
    room = 60_000 // (m * max(1, math.prod(shape[:dim] + shape[dim + 1 :])))
    groups = draws.large(room) if room >= LARGE_SIZES[0] and draws.chance(4) else draws.integer(0, 4)
    shape[dim] = groups * m + (draws.integer(0, m - 1) if pad else 0)
    return tuple(shape), dim - (len(shape) if draws.chance(2) else 0)


def _ranked(draws: Draws) -> dict[str, Any]:
    n, m = ratio(draws)
    pad = draws.chance(3)
    shape, dim = grouped(draws, m, pad)
    return {
        "n": n,
        "m": m,
        "dim": dim,
        "pad": pad,
        "shape": shape,
        **draws.some(magnitude=lambda: draws.pick(True, False)),
    }


@fuzzes("nm_mask")
def nm_mask(draws: Draws) -> Call:
    arguments = _ranked(draws)
    arguments["scores"] = draws.tensor(arguments.pop("shape"), draws.float_dtype(), draws.pick("ties", draws.kind()))
    return Call(pyrx.nm_mask, arguments | draws.some(packed=lambda: draws.pick(True, False)))


@fuzzes("nm_sparsify")
def nm_sparsify(draws: Draws) -> Call:
    arguments = _ranked(draws)
    shape = arguments.pop("shape")
    weight = arguments["weight"] = draws.tensor(shape, draws.float_dtype(), draws.kind())
    arguments |= draws.some(
        estimator=lambda: draws.pick(*ESTIMATORS),
        decay=lambda: draws.pick(draws.number(0.0, 1.0), torch.tensor(0.3), torch.tensor([0.7], dtype=torch.float64)),
        strength=lambda: draws.number(0.0, 1.0, 2e-4),
    )
    other = draws.pick("none", "scores", "mask", "bits")
    if other == "scores":
        arguments["scores"] = draws.tensor(shape, draws.float_dtype(), draws.kind())
    elif other == "mask":
        arguments["mask"] = draws.tensor(shape, torch.bool)
    elif other == "bits":
        arguments["mask"] = draws.tensor((*shape[:-1], -(-shape[-1] // 8)), torch.uint8, high=256)
    return Call(pyrx.nm_sparsify, arguments, draws.needs(weight=weight), exact_gradients=True)


@fuzzes("nm_transposable_mask")
def nm_transposable_mask(draws: Draws) -> Call:
    n, m = ratio(draws, 32)
    lead = draws.shape(draws.integer(0, 2), 4)
    most = max(1, 64 // m)
    shape = (*lead, m * draws.integer(0, most), m * draws.integer(0, most))
    scores = draws.tensor(shape, draws.float_dtype(), draws.kind())
    arguments = {"scores": scores, "n": n, "m": m}
    arguments |= draws.some(
        magnitude=lambda: draws.pick(True, False),
        packed=lambda: draws.pick(True, False),
        method=lambda: draws.pick(None, "greedy", *(["exact"] if (n, m) == (2, 4) else [])),
    )
    return Call(pyrx.nm_transposable_mask, arguments)


@fuzzes("nm_compress")
def nm_compress(draws: Draws) -> Call:
    n, m = ratio(draws)
    shape = (*draws.shape(draws.integer(0, 3), 40), m * draws.integer(0, 4))
    weight = draws.tensor(shape, draws.float_dtype(), draws.kind())
    arguments = {"weight": weight, "n": n, "m": m, **draws.some(magnitude=lambda: draws.pick(True, False))}
    if draws.chance(2):
        kept = pyrx.nm_mask(draws.tensor(shape), n, m, backend="reference")
        mask = draws.pick(kept, kept & draws.tensor(shape, torch.bool))
        packed = pack_bits(mask) if draws.chance(2) else mask
        arguments["mask"] = packed
    return Call(pyrx.nm_compress, arguments)


def _packed(draws: Draws, lead: tuple[int, ...], dtype: torch.dtype) -> pyrx.NMPacked:
    n, m = ratio(draws)
    weight = draws.tensor((*lead, m * draws.integer(0, 3)), dtype)
    return pyrx.nm_compress(weight, n, m, backend="reference")


@fuzzes("NMPacked")
def to_dense(draws: Draws) -> Call:
    def NMPacked(values: Tensor, indices: Tensor, n: int, m: int, backend: str | None = None) -> Tensor:
        return pyrx.NMPacked(values, indices, n, m).to_dense(backend=backend)

    packed = _packed(draws, draws.shape(draws.integer(0, 3), 40), draws.float_dtype())
    arguments = {"values": packed.values, "indices": packed.indices, "n": packed.n, "m": packed.m}
    return Call(NMPacked, arguments, draws.needs(values=packed.values), exact_gradients=True)


@fuzzes("nm_linear")
def nm_linear(draws: Draws) -> Call:
    dtype, rows = draws.float_dtype(), draws.size(40)
    packed = _packed(draws, (rows,), dtype)
    arguments = {
        "x": draws.tensor((*draws.shape(draws.integer(0, 3), 70), packed.shape[1]), dtype),
        "packed": packed,
        "bias": draws.tensor((rows,), dtype) if draws.chance(2) else None,
    }
    floats = ("x", "packed", "bias")
    return Call(pyrx.nm_linear, arguments, draws.needs(**arguments), exact=False, floats=floats, floor=1.0)


def _step(draws: Draws, names: tuple[str, ...]) -> dict[str, Any]:
    n, m = ratio(draws)
    dtype, count = draws.float_dtype(), draws.integer(0, 3)
    shapes = [grouped(draws, m, dims=1)[0] for _ in range(count)]
    dim = draws.pick(-1, 0)
    if draws.chance(2):
        dim = draws.integer(0, 1)
        shapes = [tuple(reversed((*each, draws.size(9)))) if dim == 1 else (*each, draws.size(9)) for each in shapes]
    free = ("contiguous", "permuted", "channels_last", "stepped", "offset")

    def tensors(kind: str, like: tuple[torch.dtype, ...] = (dtype,)) -> list[Tensor]:
        return [draws.tensor(each, draws.pick(*like), kind, layout=draws.pick(*free)) for each in shapes]

    arguments: dict[str, Any] = {"weights": tensors(draws.pick("normal", "ties")), "grads": tensors("normal")}
    arguments |= {name: tensors("uniform") for name in names}
    arguments["masks"] = [
        draws.tensor((*each[:-1], -(-each[-1] // 8)), torch.uint8, high=256, layout="offset") for each in shapes
    ]
    arguments |= {"n": n, "m": m, "dim": dim}
    lr = draws.number(0.0, 1.0, 1e-3)
    return arguments | draws.some(
        magnitude=lambda: draws.pick(True, False),
        rule=lambda: draws.pick("hold", "sr-ste", "dense"),
        strength=lambda: draws.number(0.0, 1.0),
        refresh=lambda: draws.pick(True, False),
        lr=lambda: draws.pick(lr, torch.tensor(lr), torch.tensor([lr], dtype=torch.float64)),
        weight_decay=lambda: draws.number(0.0, 1.0),
        maximize=lambda: draws.pick(True, False),
    )


@fuzzes("optim.masked_adamw")
def masked_adamw(draws: Draws) -> Call:
    arguments = _step(draws, ("exp_avgs", "exp_avg_sqs"))
    arguments["steps"] = [torch.full((), float(draws.pick(1, 2, 10, 1000))) for _ in arguments["weights"]]
    arguments |= draws.some(
        beta1=lambda: draws.number(0.0, 0.999),
        beta2=lambda: draws.number(0.0, 0.9999),
        eps=lambda: draws.pick(1e-8, 1e-3),
    )
    return _optimizer_call(pyrx.optim.masked_adamw, arguments, ("exp_avgs", "exp_avg_sqs"))


@fuzzes("optim.masked_sgd")
def masked_sgd(draws: Draws) -> Call:
    arguments = _step(draws, ("momentum_buffers",))
    momentum = draws.pick(0.0, 0.9, draws.number(0.01, 1.0))
    arguments |= {"momentum": momentum, "nesterov": momentum > 0 and draws.chance(3)}
    arguments |= draws.some(dampening=lambda: 0.0 if arguments["nesterov"] else draws.number(0.0, 1.0))
    if momentum == 0:
        arguments["momentum_buffers"] = []
    return _optimizer_call(pyrx.optim.masked_sgd, arguments, ("momentum_buffers",))


def _optimizer_call(function: Any, arguments: dict[str, Any], moments: tuple[str, ...]) -> Call:
    floats = ("weights", "grads", *moments)
    writes = ("weights", *moments, "masks")
    return Call(function, arguments, writes=writes, exact=False, floats=floats, floor=1.0, idle=True)


# options of torch.optim, whose errors are its own
TORCHS = ("lr", "weight_decay", "maximize", "momentum", "dampening")
OPTIMIZERS = {"optim.MaskedAdamW": pyrx.optim.MaskedAdamW, "optim.MaskedSGD": pyrx.optim.MaskedSGD}


def _optimizer(draws: Draws, name: str) -> Call:
    n, m = ratio(draws, 16)
    shapes = [grouped(draws, m, dims=1)[0] for _ in range(draws.integer(1, 3))]
    count = draws.integer(1, 3)
    dtype = draws.float_dtype()
    arguments: dict[str, Any] = {
        "params": [draws.tensor(each, dtype, layout="contiguous") for each in shapes],
        "grads": [[draws.tensor(each, dtype, layout="contiguous") for each in shapes] for _ in range(count)],
        "n": draws.pick(n, None),
        "m": m,
        **draws.some(
            lr=lambda: draws.number(0.0, 1.0, 1e-3),
            weight_decay=lambda: draws.number(0.0, 1.0),
            rule=lambda: draws.pick("hold", "sr-ste", "dense"),
            strength=lambda: draws.number(0.0, 1.0),
            refresh_every=lambda: draws.integer(1, 3),
            maximize=lambda: draws.pick(True, False),
        ),
    }
    if arguments["n"] is None:
        arguments["m"] = None
    if name == "optim.MaskedSGD":
        arguments |= draws.some(momentum=lambda: draws.number(0.0, 1.0), dampening=lambda: draws.number(0.0, 1.0))

    def steps(params: list[Tensor], grads: list[list[Tensor]], backend: str | None = None, **options: Any) -> Any:
        optimizer = OPTIMIZERS[name](params, backend=backend, **options)
        for each in grads:
            for param, grad in zip(params, each, strict=True):
                param.grad = grad
            optimizer.step()
        state = [value for param in params for _, value in sorted(optimizer.state[param].items()) if value is not None]
        return [each.detach() for each in (*params, *state)]

    steps.__name__ = name.removeprefix("optim.")
    floats = ("params", "grads")
    fixed = (*floats, *TORCHS)
    return Call(steps, arguments, writes=("params",), exact=False, floats=floats, floor=1.0, fixed=fixed, idle=True)


@fuzzes("optim.MaskedAdamW")
def adamw_optimizer(draws: Draws) -> Call:
    return _optimizer(draws, "optim.MaskedAdamW")


@fuzzes("optim.MaskedSGD")
def sgd_optimizer(draws: Draws) -> Call:
    return _optimizer(draws, "optim.MaskedSGD")
