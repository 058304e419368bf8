"""pyrx: fused regularisation and sparsity operators for PyTorch."""

from pyrx import _extension, nn
from pyrx._version import __version__
from pyrx.ops.batch_mix import cutmix, mixup, resizemix
from pyrx.ops.blend import blend
from pyrx.ops.dropout import dropout, dropout_mask
from pyrx.ops.fmix import fmix
from pyrx.ops.multi_sample_dropout import multi_sample_dropout, multi_sample_dropout_cross_entropy
from pyrx.targets import MixedTarget

__all__ = [
    "MixedTarget",
    "__version__",
    "blend",
    "cutmix",
    "dropout",
    "dropout_mask",
    "fmix",
    "mixup",
    "multi_sample_dropout",
    "multi_sample_dropout_cross_entropy",
    "nn",
    "resizemix",
]
