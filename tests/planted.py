"""What the tests of searches share: tensors whose attention lies in planted blocks, and dense attention in float64."""

import math

import torch


def planted(blocks, size, lengths, group=1, strength=4.0, noise=0.05, dim=64):
    """query and key of which every block of queries attends to `blocks` (B, Hkv * group, NQ, NK) alone: each block of
    keys has a direction of its own."""
    batch, heads, q_blocks, k_blocks = blocks.shape
    directions = torch.eye(dim)[:k_blocks] * strength * dim**0.25
    query = (blocks.float() @ directions).repeat_interleave(size[0], 2)[:, :, : lengths[0]]
    key = directions.repeat_interleave(size[1], 0)[: lengths[1]].expand(batch, heads // group, -1, -1)
    return query + noise * torch.randn_like(query), key + noise * torch.randn(key.shape)


def random_blocks(shape, count, generator=None, allowed=None):
    """bool (B, H, NQ, NK), `count` (an int, or one for each row) of a row's allowed ones."""
    scores = torch.rand(shape, generator=generator)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -1)
    rank = scores.argsort(-1, descending=True).argsort(-1)
    return rank < torch.as_tensor(count)[..., None]


def inputs(heads=4, kv_heads=2, queries=300, keys=300, dim=24, batch=2):
    return torch.randn(batch, heads, queries, dim), torch.randn(batch, kv_heads, keys, dim)


def dense_logits(query, key, is_causal=False, window=None, scale=None, key_mask=None):
    """float64 (B, H, Sq, Sk), minus infinity where a key is hidden."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.double() @ key.double().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    q, k = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    hidden = (k > q) & is_causal
    if window is not None:
        hidden = hidden | ((q - k).abs() > window)
    if key_mask is not None:
        hidden = hidden | ~key_mask[:, None, None, :]
    return logits.masked_fill(hidden, -math.inf)


def lse_of(query, key, **options):
    return torch.logsumexp(dense_logits(query, key, **options), -1).float()


def by_blocks(values, size):
    """Sums of (..., Sq, Sk) over blocks."""
    queries, keys = values.shape[-2:]
    padded = torch.nn.functional.pad(values, (0, -keys % size[1], 0, -queries % size[0]))
    return padded.unflatten(-1, (-1, size[1])).unflatten(-3, (-1, size[0])).sum((-1, -3))


def touched(tokens, size):
    return by_blocks(tokens.float(), size) > 0


def near_diagonal(lengths, size):
    """Blocks (NQ, NK) that hold a query and the key of its position."""
    positions = torch.arange(lengths[0])[:, None] == torch.arange(lengths[1])
    return touched(positions, size)
