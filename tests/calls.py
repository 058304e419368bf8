"""A small call of every public function, for tests of what holds for all alike; row_calls.py has the kernels'."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

import pyrx

CLASSES = 5


@dataclasses.dataclass(frozen=True)
class Call:
    """`function(*tensors, **options)`, its options `backend` and, where it draws, `seed` or `generator`."""

    function: Callable[..., Any]
    shapes: tuple[str, ...]  # of the tensors, "float 2 3": kind and sizes
    draws: bool = False
    differentiable: bool = True

    def tensors(self, k=1, dtype=torch.float32, seed=0):
        """Random ones; their first sizes are multiplied by k."""
        generator = torch.Generator().manual_seed(seed)
        kinds = {
            "float": lambda shape: torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype),
            "uint8": lambda shape: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
            "ids": lambda shape: torch.randint(0, CLASSES, shape, generator=generator),
            "bool": lambda shape: torch.rand(shape, generator=generator) < 0.5,
        }
        made = []
        for each in self.shapes:
            kind, first, *rest = each.split()
            made.append(kinds[kind]([int(first) * k, *map(int, rest)]))
        return made

    def __call__(self, *tensors, seed=None, **options):
        """The tensors of the result, in order."""
        if self.draws and seed is not None:
            options["seed"] = seed
        result = self.function(*tensors, **options)
        return tuple(each for each in pytree.tree_leaves(result) if isinstance(each, torch.Tensor))


def with_gradients(tensors):
    """(all of them, the floating-point ones as new leaves)."""
    tensors = [each.detach().requires_grad_() if each.is_floating_point() else each for each in tensors]
    return tensors, [each for each in tensors if each.requires_grad]


def loss_of(results):
    """Of what has a gradient, under weights that are not uniform; infinities (of empty rows) do not count."""
    total = 0.0
    for each in results:
        if each.requires_grad:
            weights = torch.linspace(-1, 2, each.numel(), dtype=each.dtype, device=each.device).reshape(each.shape)
            total = total + (torch.where(each.isfinite(), each, 0) * weights).sum()
    return total


IMAGES = "float 4 3 9 8"
ATTENTION = ("float 2 4 40 8", "float 2 2 70 8", "float 2 2 70 8")


def _blocks(query):
    return pyrx.BlockMask.sliding_window((40, 70), 20, 16, device=query.device)


def _head(x, w, bias, a, b, lam, **options):
    target = pyrx.MixedTarget(a, b, lam.detach())
    return pyrx.multi_sample_dropout_cross_entropy(x, w, target, linear_bias=bias, num_samples=3, **options)


def _nm_linear(x, values, bias, **options):
    indices = torch.tensor([0, 2] * 4, dtype=torch.uint8, device=values.device).expand(len(values), 8)
    return pyrx.nm_linear(x, pyrx.NMPacked(values, indices, 2, 4), bias, **options)


def _varlen(q, k, v, **options):
    cu = torch.tensor([0, 7, 7, len(q)], dtype=torch.int32, device=q.device)
    return pyrx.block_sparse_attention_varlen(q, k, v, cu, is_causal=True, dropout_p=0.3, return_lse=True, **options)


def _adamw(w, grad, **options):
    w, mean, square = w.detach().clone(), torch.zeros_like(w), torch.zeros_like(w)
    mask, step = pyrx.nm_mask(w, 2, 4, packed=True), torch.ones((), dtype=torch.float32, device=w.device)
    pyrx.optim.masked_adamw([w], [grad], [mean], [square], [mask], [step], 2, 4, **options)
    return w, mean, square, mask


def _sgd(w, grad, **options):
    w, buffer, mask = w.detach().clone(), torch.zeros_like(w), pyrx.nm_mask(w, 2, 4, packed=True)
    pyrx.optim.masked_sgd([w], [grad], [buffer], [mask], 2, 4, momentum=0.9, **options)
    return w, buffer, mask


def _lse_cached(q, k, v, **options):
    lse = pyrx.block_sparse_attention(q, k, v, enable_gqa=True, return_lse=True)[1]
    return pyrx.search.lse_cached(q, k, lse, block_size=16, sparsity=0.5, **options)


_DRAWS = {"draws": True}
_CONSTANT = {"differentiable": False}

# by the name of the public function, with a suffix where there are several
CALLS = {
    "dropout": Call(lambda x, **o: pyrx.dropout(x, 0.3, **o), ("float 7 13",), **_DRAWS),
    "dropout_mask": Call(
        lambda x, seed=5, **o: (
            pyrx.dropout_mask(x.shape, 0.3, seed, device=x.device, **o),
            pyrx.dropout_mask(x.shape, 0.3, seed, packed=True, device=x.device, **o),
        ),
        ("float 7 13",),
        differentiable=False,
        draws=True,
    ),
    "multi_sample_dropout": Call(lambda x, **o: pyrx.multi_sample_dropout(x, 3, **o), ("float 7 13",), **_DRAWS),
    "multi_sample_dropout_cross_entropy": Call(
        _head, ("float 7 13", "float 5 13", "float 5", "ids 7", "ids 7", "float 7"), **_DRAWS
    ),
    "mixed_cross_entropy": Call(
        lambda x, a, b, lam, **o: pyrx.mixed_cross_entropy(x, pyrx.MixedTarget(a, b, lam.detach()), **o),
        ("float 7 5", "ids 7", "ids 7", "float 7"),
    ),
    "cutmix": Call(lambda x, y, **o: pyrx.cutmix(x, y, **o), (IMAGES, "ids 4"), **_DRAWS),
    "cutmix lam": Call(
        lambda x, y, **o: pyrx.cutmix(x, y, lam=0.3, pairing="random", per_sample=False, **o),
        (IMAGES, "ids 4"),
        **_DRAWS,
    ),
    "cutmix inplace": Call(
        lambda x, y, **o: pyrx.cutmix(x.clone(), y, inplace=True, **o),
        ("uint8 4 3 9 8", "ids 4"),
        **_DRAWS,
        **_CONSTANT,
    ),
    "mixup": Call(lambda x, y, **o: pyrx.mixup(x, y, mean=0.5, std=0.25, **o), (IMAGES, "ids 4"), **_DRAWS),
    "resizemix": Call(lambda x, y, **o: pyrx.resizemix(x, y, **o), (IMAGES, "ids 4"), **_DRAWS),
    "fmix": Call(lambda x, y, **o: pyrx.fmix(x, y, **o), (IMAGES, "ids 4"), **_DRAWS),
    "fmix lam": Call(lambda x, y, **o: pyrx.fmix(x, y, lam=0.4, max_soft=0.2, **o), (IMAGES, "ids 4"), **_DRAWS),
    "blend": Call(lambda x, y, alpha, **o: pyrx.blend(x, y, alpha, **o), (IMAGES, IMAGES, "float 4 1 9 8")),
    "random_erasing": Call(lambda x, **o: pyrx.random_erasing(x, prob=1.0, mode="pixel", **o), (IMAGES,), **_DRAWS),
    "cutout": Call(lambda x, **o: pyrx.cutout(x, **o), (IMAGES,), **_DRAWS),
    "noise_mask": Call(lambda x, m, **o: pyrx.noise_mask(x, m, **o), (IMAGES, "float 4 1 9 8"), **_DRAWS),
    "neighbor_fill": Call(lambda x, m, **o: pyrx.neighbor_fill(x, m, 2, **o), (IMAGES, "bool 4 1 9 8")),
    "patch_mask": Call(
        lambda x, **o: pyrx.patch_mask((len(x), 6, 6), method="hard", losses=x, return_indices=True, **o),
        ("float 4 6 6",),
        **_DRAWS,
        **_CONSTANT,
    ),
    "nm_mask": Call(lambda w, **o: pyrx.nm_mask(w, 2, 4, **o), ("float 6 16",), **_CONSTANT),
    "nm_sparsify": Call(lambda w, **o: pyrx.nm_sparsify(w, 2, 4, estimator="sr-ste", **o), ("float 6 16",)),
    "nm_transposable_mask": Call(lambda w, **o: pyrx.nm_transposable_mask(w, 2, 4, **o), ("float 8 16",), **_CONSTANT),
    "nm_compress": Call(lambda w, **o: pyrx.nm_compress(w, 2, 4, **o), ("float 6 16",), **_CONSTANT),
    "nm_linear": Call(_nm_linear, ("float 3 16", "float 6 8", "float 6")),
    "masked_adamw": Call(_adamw, ("float 8 16", "float 8 16"), **_CONSTANT),
    "masked_sgd": Call(_sgd, ("float 8 16", "float 8 16"), **_CONSTANT),
    "BlockMask": Call(
        lambda flags, **o: (
            pyrx.BlockMask.global_tokens(flags, block_size=16, **o)
            & pyrx.BlockMask.causal(40, 16, device=flags.device).whole().__invert__()  # as torch.compile has it
        ),
        ("bool 2 40",),
        **_CONSTANT,
    ),
    "block_sparse_attention": Call(
        lambda q, k, v, **o: pyrx.block_sparse_attention(
            q, k, v, _blocks(q), enable_gqa=True, dropout_p=0.3, return_lse=True, return_entropy=True, **o
        ),
        ATTENTION,
        **_DRAWS,
    ),
    "block_sparse_attention_varlen": Call(_varlen, ("float 30 2 8",) * 3, **_DRAWS),
    "reversed_attention": Call(
        lambda q, k, u, **o: pyrx.reversed_attention(q, k, u, _blocks(q), enable_gqa=True, **o),
        (*ATTENTION[:2], "float 2 4 40 3"),
    ),
    "perturbed_attention": Call(lambda q, k, v, **o: pyrx.perturbed_attention(q, k, v, **o), ("float 2 2 40 8",) * 3),
    "erasing_attention": Call(
        lambda q, k, v, region, **o: pyrx.erasing_attention(q, k, v, region, **o),
        (*("float 2 2 40 8",) * 3, "bool 2 40"),
    ),
    "key_zeroed_attention": Call(
        lambda q, k, v, region, **o: pyrx.key_zeroed_attention(q, k, v, region, enable_gqa=True, **o),
        (*ATTENTION, "bool 2 70"),
    ),
    "head_dropout_attention": Call(
        lambda q, k, v, **o: pyrx.head_dropout_attention(q, k, v, enable_gqa=True, head_dropout_p=0.4, **o),
        ATTENTION,
        **_DRAWS,
    ),
    "token_importance": Call(lambda q, k, **o: pyrx.token_importance(q, k, **o), ("float 2 2 40 8", "float 2 2 40 8")),
    "token_dropout": Call(lambda x, i, **o: pyrx.token_dropout(x, i.detach(), 0.5), ("float 2 40 8", "float 2 40")),
    "search.lse_cached": Call(_lse_cached, ATTENTION, **_CONSTANT),
    "search.recall": Call(lambda q, k, **o: pyrx.search.recall(q, k, _blocks(q), **o), ATTENTION[:2], **_CONSTANT),
    "search.pooled": Call(lambda q, k, **o: pyrx.search.pooled(q, k, block_size=16, **o), ATTENTION[:2], **_CONSTANT),
    "search.vertical_slash": Call(
        lambda q, k, **o: pyrx.search.vertical_slash(q, k, block_size=16, vertical=9, slash=9, **o),
        ATTENTION[:2],
        **_CONSTANT,
    ),
    "search.topk_blocks": Call(
        lambda q, k, **o: pyrx.search.topk_blocks(q, k, block_size=16, topk=3, **o), ATTENTION[:2], **_CONSTANT
    ),
}
DIFFERENTIABLE = tuple(name for name, call in CALLS.items() if call.differentiable)
MATMULS = ("nm_linear",)  # whose backward has torch's matrix products: their bits depend on the count of threads


def run(name, k=1, seed=5, tensors=None, **options):
    """Results and gradients, all of them tensors without a graph."""
    call = CALLS[name]
    tensors, leaves = with_gradients(call.tensors(k) if tensors is None else tensors)
    results = call(*tensors, seed=seed, **options)
    found = torch.autograd.grad(loss_of(results), leaves, allow_unused=True) if call.differentiable else ()
    return [each.detach() for each in (*results, *found) if each is not None]
