"""Element-wise parts of a block: token shift, gates and norms, compiled where kernels fit."""

from finchtune.ops.elementwise.dispatch import (
    GatedNorm,
    fixed_mixtures,
    low_rank_decay,
    mixtures,
    sigmoid_gate,
    squared_relu,
)
from finchtune.ops.elementwise.heads import BonusNorm, removal, value_residual

__all__ = [
    "BonusNorm",
    "GatedNorm",
    "fixed_mixtures",
    "low_rank_decay",
    "mixtures",
    "removal",
    "sigmoid_gate",
    "squared_relu",
    "value_residual",
]
