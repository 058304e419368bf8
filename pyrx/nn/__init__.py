"""Modules over the public functions."""

from pyrx.nn.multi_sample_dropout import MultiSampleDropout, MultiSampleDropoutClassifier

__all__ = ["MultiSampleDropout", "MultiSampleDropoutClassifier"]
