"""Element-wise parts of a block: token shift, gates and norms, compiled where kernels fit."""

from finchtune.ops.elementwise.dispatch import (
    GatedNorm,
    LowRank,
    fixed_mixtures,
    low_ranks,
    mixtures,
    sigmoid_gate,
    squared_relu,
)
from finchtune.ops.elementwise.heads import BonusNorm, wkv7_inputs
from finchtune.ops.elementwise.norms import AddedNorm

__all__ = [
    "AddedNorm",
    "BonusNorm",
    "GatedNorm",
    "LowRank",
    "fixed_mixtures",
    "low_ranks",
    "mixtures",
    "sigmoid_gate",
    "squared_relu",
    "wkv7_inputs",
]
