"""pyrx: fused regularisation and sparsity operators for PyTorch."""

from pyrx import _extension, nn
from pyrx._version import __version__
from pyrx.ops.dropout import dropout, dropout_mask
from pyrx.ops.mixed_cross_entropy import mixed_cross_entropy
from pyrx.ops.multi_sample_dropout import multi_sample_dropout, multi_sample_dropout_cross_entropy
from pyrx.targets import MixedTarget

__all__ = [
    "MixedTarget",
    "__version__",
    "dropout",
    "dropout_mask",
    "mixed_cross_entropy",
    "multi_sample_dropout",
    "multi_sample_dropout_cross_entropy",
    "nn",
]
