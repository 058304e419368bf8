"""Which keys a packed query may see: the definition, on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_ranges(
    queries: int, keys: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, left: int, right: int
) -> Tensor:
    """int32 (1, Tq, 2): the first key of a query and the one after its last: those of its sequence, within `left` and
    `right` (-1: no limit) of its position, both counted from the sequence's start; (0, 0) outside of all sequences."""
    starts_q, starts_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    token = torch.arange(queries, device=starts_q.device)
    # an empty sequence ends where it starts: the last of those that start here is the one that holds the token
    sequence = torch.searchsorted(starts_q, token, right=True) - 1
    last = starts_q.shape[0] - 1
    inside = (sequence >= 0) & (sequence < last)
    sequence = sequence.clamp(0, max(last - 1, 0))
    start, stop = starts_k[sequence], starts_k[(sequence + 1).clamp(max=last)]
    position = start + token - starts_q[sequence]
    low = start if left < 0 else torch.maximum(start, position - left)
    high = stop if right < 0 else torch.minimum(stop, position + right + 1)
    low, high = low.clamp(0, keys), high.clamp(0, keys)
    seen = inside & (low < high)
    return torch.where(seen[:, None], torch.stack([low, high], 1), 0).to(torch.int32)[None]
