"""Modules over the public functions."""

from pyrx.nn.mixup import Mixup
from pyrx.nn.multi_sample_dropout import MultiSampleDropout, MultiSampleDropoutClassifier

__all__ = ["Mixup", "MultiSampleDropout", "MultiSampleDropoutClassifier"]
