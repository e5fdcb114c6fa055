"""Element-wise parts of a block: by the compiled kernels where they fit, else in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finchtune.ops.elementwise import compiled, plain
from finchtune.ops.kernels import fits_cpu


def mixtures(
    x: Tensor,
    before: Tensor | None,
    cu_seqlens: Tensor | None,
    maa_x: Tensor,
    maa: Tensor,
    w1: Tensor,
    w2: Tensor,
) -> tuple[Tensor, ...]:
    """x_j = x + xx (maa_j + m_j), with m = tanh((x + xx maa_x) w1) w2 and xx the previous x less x.

    x (B, T, C), before (S, C) or None (zero) precedes its sequences, maa_x (1, C), maa (n, C),
    w1 (C, n M), w2 (n, M, C) -> n of (B, T, C). The sequences are the rows of x, or those packed
    into x (1, T, C) at the boundaries `cu_seqlens`.
    """
    before = None if before is None else before.to(x.dtype)
    # The compiled form mixes products, whose dtype autocast changes, with kernels.
    if fits_cpu(x, maa_x, maa, w1, w2) and not torch.is_autocast_enabled("cpu"):
        return compiled.Mixtures.apply(x, before, cu_seqlens, maa_x, maa, w1, w2)
    xx = plain.previous_minus_this(x, before, cu_seqlens).flatten(0, 1)
    weights = maa_x.flatten(), maa.unsqueeze(1), w1, w2
    return tuple(y.view_as(x) for y in plain.Mixtures.apply(x.flatten(0, 1), xx, *weights))


def fixed_mixtures(
    x: Tensor, before: Tensor | None, cu_seqlens: Tensor | None, maa: Tensor
) -> tuple[Tensor, ...]:
    """x_j = x + xx maa_j, the rest as in `mixtures`."""
    before = None if before is None else before.to(x.dtype)
    if fits_cpu(x, maa):
        return compiled.FixedMixtures.apply(x, before, cu_seqlens, maa)
    xx = plain.previous_minus_this(x, before, cu_seqlens)
    return tuple(torch.addcmul(x, xx, maa_j) for maa_j in maa)


class GatedNorm(nn.Module):
    """group_norm(y) silu(gate). Parameters as nn.GroupNorm's."""

    def __init__(self, groups: int, n_channels: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(n_channels))
        self.bias = nn.Parameter(torch.empty(n_channels))

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """y, gate (tokens, C) -> (tokens, C)."""
        if fits_cpu(y, gate, self.weight, self.bias):
            return compiled.GatedNorm.apply(y, gate, self.weight, self.bias, self.groups, self.eps)
        return plain.Gate.apply(
            F.group_norm(y, self.groups, self.weight, self.bias, self.eps), gate
        )


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, any shape. Keeps its result for backward."""
    return (compiled if fits_cpu(x) else plain).SquaredReLU.apply(x)


def sigmoid_gate(gate: Tensor, y: Tensor) -> Tensor:
    """sigmoid(gate) y, any shape."""
    return compiled.SigmoidGate.apply(gate, y) if fits_cpu(gate, y) else torch.sigmoid(gate) * y
