"""pyrx: fused regularisation and sparsity operators for PyTorch.

Functions are here, modules in `pyrx.nn`, optimizers in `pyrx.optim`, the search of attention's blocks in `pyrx.search`.
`python -m pyrx.info` tells which backend serves which op here, and why the others do not.
"""

from pyrx import _extension, nn, optim, search
from pyrx._version import __version__
from pyrx.ops.attention_edits import (
    erasing_attention,
    head_dropout_attention,
    key_zeroed_attention,
    perturbed_attention,
    reversed_attention,
    token_dropout,
    token_importance,
)
from pyrx.ops.batch_mix import cutmix, mixup, resizemix
from pyrx.ops.blend import blend
from pyrx.ops.block_mask import BlockMask
from pyrx.ops.block_sparse_attention import block_sparse_attention
from pyrx.ops.block_sparse_attention_varlen import block_sparse_attention_varlen
from pyrx.ops.dropout import dropout, dropout_mask
from pyrx.ops.fmix import fmix
from pyrx.ops.mixed_cross_entropy import mixed_cross_entropy
from pyrx.ops.multi_sample_dropout import multi_sample_dropout, multi_sample_dropout_cross_entropy
from pyrx.ops.neighbor_fill import neighbor_fill
from pyrx.ops.nm_packed import NMPacked, nm_compress, nm_linear
from pyrx.ops.nm_sparsity import nm_mask, nm_sparsify
from pyrx.ops.nm_transposable import nm_transposable_mask
from pyrx.ops.noise_mask import noise_mask
from pyrx.ops.patch_mask import patch_mask
from pyrx.ops.random_erasing import cutout, random_erasing
from pyrx.targets import MixedTarget

__all__ = [
    "BlockMask",
    "MixedTarget",
    "NMPacked",
    "__version__",
    "blend",
    "block_sparse_attention",
    "block_sparse_attention_varlen",
    "cutmix",
    "cutout",
    "dropout",
    "dropout_mask",
    "erasing_attention",
    "fmix",
    "head_dropout_attention",
    "key_zeroed_attention",
    "mixed_cross_entropy",
    "mixup",
    "multi_sample_dropout",
    "multi_sample_dropout_cross_entropy",
    "neighbor_fill",
    "nm_compress",
    "nm_linear",
    "nm_mask",
    "nm_sparsify",
    "nm_transposable_mask",
    "nn",
    "noise_mask",
    "optim",
    "patch_mask",
    "perturbed_attention",
    "random_erasing",
    "resizemix",
    "reversed_attention",
    "search",
    "token_dropout",
    "token_importance",
]
