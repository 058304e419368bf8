"""pyrx: fused regularisation and sparsity operators for PyTorch."""

from pyrx import _extension, nn
from pyrx._version import __version__
from pyrx.ops.batch_mix import cutmix, mixup, resizemix
from pyrx.ops.dropout import dropout, dropout_mask
from pyrx.ops.multi_sample_dropout import multi_sample_dropout, multi_sample_dropout_cross_entropy
from pyrx.ops.noise_mask import noise_mask
from pyrx.ops.random_erasing import cutout, random_erasing
from pyrx.targets import MixedTarget

__all__ = [
    "MixedTarget",
    "__version__",
    "cutmix",
    "cutout",
    "dropout",
    "dropout_mask",
    "mixup",
    "multi_sample_dropout",
    "multi_sample_dropout_cross_entropy",
    "nn",
    "noise_mask",
    "random_erasing",
    "resizemix",
]
