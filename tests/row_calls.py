"""A few small calls of every row, as a table: what the kernels of every backend must keep, tests ask of these.

A call takes its tensors, a seed (int64, on the device) and a backend, and returns tensors: results and gradients. It
writes none of its tensors, allocates what it needs and does not wait for the device, so that a CUDA graph may capture
it; calls.py, whose calls need not, has those that tests transform, scale and call as a user does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pyrx
from pyrx._attention import Logits
from pyrx.ops.block_mask import block_lists, select_blocks
from pyrx.ops.block_mass import block_mass, block_recall
from pyrx.ops.block_pool import block_pool
from pyrx.ops.masked_update import masked_adamw, masked_sgd

Function = Callable[[list[Tensor], Tensor, str], tuple[Tensor, ...]]


class Call(NamedTuple):
    row: str
    name: str
    shapes: tuple[Any, ...]  # of float32 tensors, or functions of a generator that make others
    function: Function
    exact: bool = True  # the same bits on every backend

    def tensors(self, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [each(generator) if callable(each) else torch.randn(each, generator=generator) for each in self.shapes]

    def __call__(self, tensors: list[Tensor], seed: Tensor, backend: str) -> tuple[Tensor, ...]:
        return self.function(tensors, seed, backend)


TABLE: list[Call] = []


def call(row: str, name: str, *shapes: Any, exact: bool = True) -> Callable[[Function], Function]:
    def add(function: Function) -> Function:
        TABLE.append(Call(row, name, shapes, function, exact))
        return function

    return add


def and_gradients(function: Callable[..., Any], *leaves: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradients of its weighted sum."""
    leaves = tuple(each.detach().requires_grad_() for each in leaves)
    out = function(*leaves)
    weights = torch.arange(1, out.numel() + 1, dtype=torch.float32, device=out.device).remainder(7).view(out.shape)
    return out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype) - 2.5)


def ids(size: int, classes: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(classes, (size,), generator=generator)


def some(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.rand(shape, generator=generator) < 0.5


def shares(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.rand(shape, generator=generator)


def pixels(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(256, shape, generator=generator, dtype=torch.uint8)


@call("dropout", "dropout", (33, 100))
def _(tensors, seed, backend):
    return and_gradients(lambda x: pyrx.dropout(x, 0.3, seed=seed, backend=backend), *tensors)


@call("dropout", "masks", (1,))
def _(tensors, seed, backend):
    return tuple(
        pyrx.dropout_mask((33, 100), 0.3, seed, 1, packed=packed, device=seed.device, backend=backend)
        for packed in (False, True)
    )


@call("multi_sample_dropout", "copies", (33, 100), exact=False)
def _(tensors, seed, backend):
    return and_gradients(lambda x: pyrx.multi_sample_dropout(x, 5, 0.3, seed=seed, backend=backend), *tensors)


def head(options: dict[str, Any]) -> Function:
    def run(tensors: list[Tensor], seed: Tensor, backend: str) -> tuple[Tensor, ...]:
        *leaves, target = tensors
        return and_gradients(
            lambda x, w, b: pyrx.multi_sample_dropout_cross_entropy(
                x, w, target, linear_bias=b, num_samples=5, p=0.5, seed=seed, backend=backend, **options
            ),
            *leaves,
        )

    return run


for _name, _options in (
    ("head", {}),
    ("head, antithetic", {"sampling": "antithetic"}),
    ("head of mean logits", {"combine": "logits"}),
    ("head, a loss a row", {"reduction": "none"}),
):
    call("multi_sample_dropout", _name, (24, 64), (70, 64), (70,), ids(24, 70), exact=False)(head(_options))


@call("mixed_cross_entropy", "loss", (24, 70), ids(24, 70), ids(24, 70), shares(24), exact=False)
def _(tensors, seed, backend):
    logits, *target = tensors
    mixed = pyrx.MixedTarget(*target)
    return and_gradients(lambda z: pyrx.mixed_cross_entropy(z, mixed, label_smoothing=0.1, backend=backend), logits)


@call("batch_mix", "cutmix", (6, 3, 16, 20), ids(6, 10))
def _(tensors, seed, backend):
    mixed, target = pyrx.cutmix(*tensors, pairing="random", alpha=0.7, seed=seed, backend=backend)
    return mixed, target.b, target.lam, target.boxes


@call("batch_mix", "mixup in place", (6, 3, 16, 20), ids(6, 10))
def _(tensors, seed, backend):
    images, labels = tensors
    mixed, target = pyrx.mixup(images.clone(), labels, inplace=True, seed=seed, backend=backend)
    return mixed, target.lam


@call("batch_mix", "mixup into out", pixels(6, 3, 16, 20), ids(6, 10))
def _(tensors, seed, backend):
    out = torch.empty(tensors[0].shape, dtype=torch.bfloat16, device=seed.device)
    mixed, target = pyrx.mixup(*tensors, mean=0.5, std=0.25, out=out, seed=seed, backend=backend)
    return mixed, target.lam


@call("batch_mix", "resizemix", (6, 3, 16, 20), ids(6, 10))
def _(tensors, seed, backend):
    mixed, target = pyrx.resizemix(*tensors, seed=seed, backend=backend)
    return mixed, target.lam


@call("batch_mix", "bytes to normalised", pixels(6, 3, 16, 20), ids(6, 10))
def _(tensors, seed, backend):
    return (
        pyrx.cutmix(
            *tensors, mean=(0.5,) * 3, std=(0.25,) * 3, dtype=torch.float32, seed=seed, backend=backend
        )[0],
    )  # fmt: skip


@call("neighbor_fill", "fill", (3, 5, 19, 40), some(3, 1, 19, 40))
def _(tensors, seed, backend):
    return pyrx.neighbor_fill(*tensors, 9, backend=backend)


@call("patch_mask", "every method", (4, 10, 14))
def _(tensors, seed, backend):
    options = {"seed": seed, "device": seed.device, "backend": backend}
    return (
        *pyrx.patch_mask((4, 10, 14), return_indices=True, **options),
        pyrx.patch_mask((4, 10, 14), 0.4, method="block", **options),
        pyrx.patch_mask((4, 10, 14), method="hard", losses=tensors[0], **options),
    )


@call("blend", "blend", (4, 3, 9, 16), (4, 3, 9, 16), shares(4, 1, 9, 16))
def _(tensors, seed, backend):
    return and_gradients(lambda x, y, alpha: pyrx.blend(x, y, alpha, backend=backend), *tensors)


@call("random_erasing", "erasing", (6, 3, 20, 24))
def _(tensors, seed, backend):
    found = [
        pyrx.random_erasing(tensors[0], prob=0.9, mode=mode, max_count=3, seed=seed, backend=backend)
        for mode in ("const", "rand", "pixel")
    ]
    return *found, pyrx.cutout(tensors[0].clone(), length=0.4, inplace=True, seed=seed, backend=backend)


@call("noise_mask", "noise", (3, 4, 7, 9), shares(3, 1, 7, 9), shares(3, 4, 7, 9))
def _(tensors, seed, backend):
    images, *masks = tensors
    found = [
        and_gradients(lambda x, w: pyrx.noise_mask(x, w, std=0.3, seed=seed, backend=backend), images, mask)
        for mask in masks
    ]
    return found[0] + found[1]


@call("nm_sparsity", "masks", (96, 192))
def _(tensors, seed, backend):
    ratios = ((2, 4), (3, 8), (1, 16), (2, 32), (5, 16), (2, 3), (20, 48))
    return tuple(
        pyrx.nm_mask(tensors[0], n, m, dim=dim, packed=packed, backend=backend)
        for n, m in ratios
        for dim, packed in ((-1, False), (-1, True), (0, True))
    )


@call("nm_sparsity", "weights", (48, 96))
def _(tensors, seed, backend):
    found = []
    for estimator in ("ste", "sr-ste", "mdgf", "mdgf-scaled"):
        options = {"estimator": estimator, "decay": 0.5, "backend": backend}
        found += and_gradients(lambda w, options=options: pyrx.nm_sparsify(w, 2, 4, **options), *tensors)
    return tuple(found)


@call("nm_transposable", "masks", (32, 48))
def _(tensors, seed, backend):
    return tuple(
        pyrx.nm_transposable_mask(tensors[0], n, m, packed=packed, backend=backend)
        for n, m in ((2, 4), (3, 8))
        for packed in (False, True)
    )


@call("nm_packed", "compress and multiply", (40, 64), (9, 64), (40,), exact=False)
def _(tensors, seed, backend):
    weight, x, bias = tensors
    packed = pyrx.nm_compress(weight, 2, 4, backend=backend)
    return packed.values, packed.indices, packed.to_dense(), pyrx.nm_linear(x, packed, bias, backend=backend)


def stepped(function: Callable[..., None], moments: int, **options: Any) -> Function:
    def run(tensors: list[Tensor], seed: Tensor, backend: str) -> tuple[Tensor, ...]:
        weight, grad, *rest = (each.clone() for each in tensors)
        rest = [each.square() for each in rest[:moments]]
        mask = pyrx.nm_mask(weight, 2, 4, packed=True, backend=backend)
        steps = [[weight.new_full((), 3.0)]] if moments == 2 else []
        function([weight], [grad], *([each] for each in rest), [mask], *steps, 2, 4, backend=backend, **options)
        return weight, *rest, mask

    return run


for _rule in ("hold", "sr-ste"):
    call("masked_update", f"AdamW, {_rule}", *[(40, 96)] * 4)(stepped(masked_adamw, 2, rule=_rule))
    call("masked_update", f"SGD, {_rule}", *[(40, 96)] * 3)(stepped(masked_sgd, 1, rule=_rule, momentum=0.9))


@call("block_mask", "selection and lists", (1, 2, 20, 37))
def _(tensors, seed, backend):
    scores = tensors[0].softmax(-1)
    count = torch.full((1, 1, 1), 5, dtype=torch.int32, device=scores.device)
    blocks = [select_blocks(scores, count, backend=backend), select_blocks(scores, mass=0.6, backend=backend)]
    return *blocks, *(each for one in blocks for each in block_lists(one, 37, 20, backend))


@call("block_pool", "means", (1, 3, 100, 40), exact=False)
def _(tensors, seed, backend):
    return block_pool(tensors[0], 16, backend=backend)


ATTENTION = ((1, 4, 80, 32), (1, 2, 96, 32), (1, 2, 96, 32))


@call("block_mass", "mass and recall", *ATTENTION[:2], (1, 4, 80), some(1, 4, 5, 6), exact=False)
def _(tensors, seed, backend):
    query, key, lse, blocks = tensors
    logits = Logits(-1, -1, None, None, None, None, None, 32**-0.5, 0.0)
    return (
        block_mass(query, key, lse + 5, (16, 16), logits, backend),
        block_recall(query, key, blocks, (16, 16), logits, backend),
    )


def attention(**options: Any) -> Function:
    def run(tensors: list[Tensor], seed: Tensor, backend: str) -> tuple[Tensor, ...]:
        *leaves, blocks = tensors
        # the lists' own kernels are another row's
        lists = None if backend in ("triton", "cuda") else backend
        mask = pyrx.BlockMask.from_dense(blocks, (80, 96), 16, backend=lists)
        return and_gradients(
            lambda q, k, v: pyrx.block_sparse_attention(
                q, k, v, mask, enable_gqa=True, seed=seed, backend=backend, **options
            ),
            *leaves,
        )

    return run


for _name, _options in (("plain", {}), ("dropout", {"dropout_p": 0.2}), ("window", {"window": (20, 9)})):
    call("block_sparse_attention", _name, *ATTENTION, some(1, 4, 5, 6), exact=False)(attention(**_options))
