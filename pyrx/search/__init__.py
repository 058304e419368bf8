"""Online search of block masks: which blocks an attention needs, found on the device beside it, without gradient.

Every function takes query (B, H, Sq, D) and key (B, Hkv, Sk, D), Hkv a divisor of H, and returns a `pyrx.BlockMask` for
`pyrx.block_sparse_attention`. Nothing waits for the device, nothing is of size Sq x Sk. Where a query sees only keys
near its position (is_causal, window) the blocks on the diagonal are always kept, so that no query is left without one.
"""

from pyrx.search.measured import AdaptiveSparseAttention, lse_cached, recall
from pyrx.search.predicted import pooled, topk_blocks, vertical_slash

__all__ = ["AdaptiveSparseAttention", "lse_cached", "pooled", "recall", "topk_blocks", "vertical_slash"]
