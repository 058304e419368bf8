"""The dense formulas that tests of attention's edits compare with, in float64, and their inputs."""

import math

import torch

from pyrx import BlockMask

ROWS = ("block_sparse_attention",)
B, H, HKV, S, D = 2, 4, 2, 70, 12
BLOCK = 16
EYE = torch.eye(S, dtype=torch.bool)


def normal(*shape, dtype=torch.float64, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed + sum(shape) * 31)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def inputs(dtype=torch.float64, heads=HKV, keys=S, grad=False):
    """Query, key, value of (B, H, S, D), (B, Hkv, Sk, D) and (B, Hkv, Sk, D - 2)."""
    return (
        normal(B, H, S, D, dtype=dtype, seed=1, grad=grad),
        normal(B, heads, keys, D, dtype=dtype, seed=2, grad=grad),
        normal(B, heads, keys, D - 2, dtype=dtype, seed=3, grad=grad),
    )


def blocks_of(queries=S, keys=S, heads=H, density=0.5, seed=5):
    """A mask with a row and a column of blocks that are empty, and its (1, H, Sq, Sk)."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(heads, -(-queries // BLOCK), -(-keys // BLOCK), generator=generator) < density
    blocks[:, 1] = False
    blocks[:, :, 2] = False
    full = blocks.repeat_interleave(BLOCK, 1)[:, :queries].repeat_interleave(BLOCK, 2)[..., :keys]
    return BlockMask.from_dense(blocks, (queries, keys), BLOCK), full[None]


def weights_of(query, key, visible, scale=None, softcap=None, query_scale=None, bias=None):
    """The attention (B, H, Sq, Sk) of the definition; rows without keys 0."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if query_scale is not None:
        logits = logits * query_scale[..., None]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~visible, -math.inf)
    some = visible.expand(logits.shape).any(-1, keepdim=True)
    return torch.where(some, torch.softmax(torch.where(some, logits, 0), -1), 0)


def attend(query, key, value, visible, **options):
    return weights_of(query, key, visible, **options) @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)


def close(got, expected, what="", dtype=None):
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}.get(dtype or got.dtype, 1e-10)
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance, msg=lambda m: what + m)


def gradients(out, tensors, seed=7):
    return torch.autograd.grad(out, tensors, normal(*out.shape, seed=seed).to(out.dtype))


def assert_same_gradients(got, expected, tensors, dtype=None):
    for a, b, each in zip(gradients(got, tensors), gradients(expected, tensors), tensors, strict=True):
        assert a.dtype == each.dtype and a.shape == each.shape
        close(a, b, f"gradient of {tuple(each.shape)}: ", dtype)
