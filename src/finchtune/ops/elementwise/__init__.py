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
from finchtune.ops.elementwise.norms import added_norm

__all__ = [
    "BonusNorm",
    "GatedNorm",
    "LowRank",
    "added_norm",
    "fixed_mixtures",
    "low_ranks",
    "mixtures",
    "sigmoid_gate",
    "squared_relu",
    "wkv7_inputs",
]
