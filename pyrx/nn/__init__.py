"""Modules over the public functions."""

from pyrx.nn.block_sparse_attention import BlockSparseAttention, replace_attention
from pyrx.nn.layer_masking import LayerMasking
from pyrx.nn.mixup import Mixup
from pyrx.nn.multi_sample_dropout import MultiSampleDropout, MultiSampleDropoutClassifier
from pyrx.nn.nm_sparsity import NMSparsity
from pyrx.nn.sparsify import SkippedLayer, SparseLayer, SparsityReport, desparsify_, sparsify_, sparsity_report
from pyrx.nn.sparsity_schedule import (
    DenseThenSparse,
    ExponentialMDGF,
    GeometricSDGF,
    LinearMDGF,
    SparsitySchedule,
    StepwiseSDGF,
)

__all__ = [
    "BlockSparseAttention",
    "DenseThenSparse",
    "ExponentialMDGF",
    "GeometricSDGF",
    "LayerMasking",
    "LinearMDGF",
    "Mixup",
    "MultiSampleDropout",
    "MultiSampleDropoutClassifier",
    "NMSparsity",
    "SkippedLayer",
    "SparseLayer",
    "SparsityReport",
    "SparsitySchedule",
    "StepwiseSDGF",
    "desparsify_",
    "replace_attention",
    "sparsify_",
    "sparsity_report",
]
