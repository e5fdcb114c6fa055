"""Element-wise parts of a block: token shift, gates and norms, compiled where kernels fit."""

from finchtune.ops.elementwise.dispatch import (
    GatedNorm,
    fixed_mixtures,
    low_rank_decay,
    mixtures,
    sigmoid_gate,
    squared_relu,
)

__all__ = [
    "GatedNorm",
    "fixed_mixtures",
    "low_rank_decay",
    "mixtures",
    "sigmoid_gate",
    "squared_relu",
]
