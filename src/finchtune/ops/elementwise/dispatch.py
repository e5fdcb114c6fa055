"""Element-wise parts of a block: by the compiled kernels where they fit, else in plain torch."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finchtune.ops.elementwise import compiled, plain
from finchtune.ops.kernels import fits


def takes_products(*tensors: Tensor) -> bool:
    """Whether operators take these that mix products with kernels: autocast changes the dtype of
    the former alone.
    """
    return fits(*tensors) and not torch.is_autocast_enabled(tensors[0].device.type)


def mixtures(
    x: Tensor,
    before: Tensor | None,
    cu_seqlens: Tensor | None,
    maa_x: Tensor,
    maa: Iterable[Tensor],
    w1: Tensor,
    w2: Tensor,
) -> tuple[Tensor, ...]:
    """x_j = x + xx (maa_j + m_j), with m = tanh((x + xx maa_x) w1) w2 and xx the previous x less x.

    x (B, T, C), before (S, C) or None (zero) precedes its sequences, maa_x (1, C), maa n of (C),
    w1 (C, n M), w2 (n, M, C) -> n of (B, T, C). The sequences are the rows of x, or those packed
    into x (1, T, C) at the boundaries `cu_seqlens`.
    """
    before, maa = None if before is None else before.to(x.dtype), tuple(maa)
    if takes_products(x, maa_x, *maa, w1, w2):
        return compiled.Mixtures.apply(x, before, cu_seqlens, maa_x, w1, w2, *maa)
    xx = plain.previous_minus_this(x, before, cu_seqlens).flatten(0, 1)
    weights = maa_x.flatten(), torch.stack(maa).unsqueeze(1), w1, w2
    # Its backward, where autocast is off, takes the low-rank part in the dtype of the weights.
    with torch.autocast(x.device.type, enabled=False):
        return tuple(y.view_as(x) for y in plain.Mixtures.apply(x.flatten(0, 1), xx, *weights))


def fixed_mixtures(
    x: Tensor, before: Tensor | None, cu_seqlens: Tensor | None, maa: Iterable[Tensor]
) -> tuple[Tensor, ...]:
    """x_j = x + xx maa_j, the rest as in `mixtures`."""
    before, maa = None if before is None else before.to(x.dtype), tuple(maa)
    if fits(x, *maa):
        return compiled.FixedMixtures.apply(x, before, cu_seqlens, *maa)
    xx = plain.previous_minus_this(x, before, cu_seqlens)
    return tuple(torch.addcmul(x, xx, maa_j) for maa_j in maa)


class LowRank(NamedTuple):
    """zero + activation(x one) two: x (..., C), one (C, M), two (M, d), zero d values or None."""

    x: Tensor
    one: Tensor
    two: Tensor
    zero: Tensor | None = None
    activation: str = "none"


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def low_ranks(*parts: LowRank) -> tuple[Tensor, ...]:
    """The value of each part, (..., d)."""
    x = [part.x.flatten(0, -2) for part in parts]
    one, two = [part.one for part in parts], [part.two for part in parts]
    zero = [None if part.zero is None else part.zero.flatten() for part in parts]
    if takes_products(*x, *one, *two, *(own for own in zero if own is not None)):
        activations = [list(ACTIVATIONS).index(part.activation) for part in parts]
        found = compiled.LowRanks.apply(activations, *x, *one, *two, *zero)
    else:
        low = [
            ACTIVATIONS[part.activation](rows @ part.one)
            for rows, part in zip(x, parts, strict=True)
        ]
        found = [
            low_i @ two_i if zero_i is None else torch.addmm(zero_i, low_i, two_i)
            for low_i, two_i, zero_i in zip(low, two, zero, strict=True)
        ]
    return tuple(y.view(*part.x.shape[:-1], -1) for y, part in zip(found, parts, strict=True))


class GatedNorm(nn.Module):
    """group_norm(y) silu(gate). Parameters as nn.GroupNorm's."""

    def __init__(self, groups: int, n_channels: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(n_channels))
        self.bias = nn.Parameter(torch.empty(n_channels))

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """y, gate (tokens, C) -> (tokens, C)."""
        if fits(y, gate, self.weight, self.bias):
            return compiled.GatedNorm.apply(y, gate, self.weight, self.bias, self.groups, self.eps)
        return plain.Gate.apply(
            F.group_norm(y, self.groups, self.weight, self.bias, self.eps), gate
        )


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, any shape. Keeps its result for backward."""
    return (compiled if fits(x) else plain).SquaredReLU.apply(x)


def sigmoid_gate(gate: Tensor, y: Tensor) -> Tensor:
    """sigmoid(gate) y, any shape."""
    return compiled.SigmoidGate.apply(gate, y) if fits(gate, y) else torch.sigmoid(gate) * y
