"""Optimizers of weights under N:M masks."""

from pyrx.ops.masked_update import masked_adamw, masked_sgd
from pyrx.optim.masked import MaskedAdamW, MaskedSGD

__all__ = ["MaskedAdamW", "MaskedSGD", "masked_adamw", "masked_sgd"]
