"""What RWKV-7 does to a token's heads before and after WKV7: compiled where kernels fit.

The plain forms are torch's own operators under autograd, and the oracle of the compiled ones,
which compute in fp32, round what they store and keep their inputs only.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finchtune.ops.kernels import fits_cpu

SHORTEST = 1e-12  # of the lengths that a key is divided by, as in torch's normalize


class ValueResidual(torch.autograd.Function):
    """v + (first - v) sigmoid(gate); all (tokens, C)."""

    @staticmethod
    def forward(ctx: Any, heads: int, *rows: Tensor) -> Tensor:
        ctx.save_for_backward(*rows)
        ctx.heads = heads
        return torch.ops.finchtune.value_residual(*rows, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        backward = torch.ops.finchtune.value_residual_backward
        return None, *backward(*ctx.saved_tensors, d_out, ctx.heads)


class Removal(torch.autograd.Function):
    """The arguments k, a and b of WKV7; k, rate (tokens, C), k_k, k_a (C)."""

    @staticmethod
    def forward(ctx: Any, heads: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        ctx.heads = heads
        return tuple(torch.ops.finchtune.removal(*inputs, heads, SHORTEST))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        of_weights = any(ctx.needs_input_grad[3:])
        d_k, d_rate, *of_weight = torch.ops.finchtune.removal_backward(
            d_out, *inputs, ctx.heads, SHORTEST, of_weights
        )
        return None, d_k, d_rate, *rounded(of_weight, inputs[2:])


class BonusNormed(torch.autograd.Function):
    """(norm(y) weight + bias + v sum(r k r_k)) gate; five of (tokens, C), three of (C)."""

    @staticmethod
    def forward(ctx: Any, heads: int, eps: float, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.settings = heads, eps
        return torch.ops.finchtune.bonus_norm(inputs[:5], inputs[5:], heads, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        of_weights = any(ctx.needs_input_grad[7:])
        found = torch.ops.finchtune.bonus_norm_backward(
            d_out, inputs[:5], inputs[5:], *ctx.settings, of_weights
        )
        return None, None, *found[:5], *rounded(found[5:], inputs[5:])


def rounded(gradients: list[Tensor], weights: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Gradients of weights in their dtype; None for each where there are none."""
    if not gradients:
        return [None for _ in weights]
    return [d.to(x.dtype) for d, x in zip(gradients, weights, strict=True)]


def value_residual(v: Tensor, first: Tensor, gate: Tensor, heads: int) -> Tensor:
    """v + (first - v) sigmoid(gate), of any shape (..., C). Threads share the `heads` out."""
    if fits_cpu(v, first, gate):
        rows = (x.flatten(0, -2) for x in (v, first, gate))
        return ValueResidual.apply(heads, *rows).view(v.shape)
    return v + (first - v) * torch.sigmoid(gate)


def removal(
    k: Tensor, rate: Tensor, k_k: Tensor, k_a: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """WKV7's k, a and b: what a token writes, and what it removes for that.

    With s = sigmoid(rate) and kk = k k_k brought to length 1 in each head:
    k (1 + (s - 1) k_a), -kk and kk s, all in the dtype of k.

    Args:
        k, rate: (..., C).
        k_k, k_a: C values, of any shape that ends with C.
        heads: how many lie side by side in C.
    """
    if fits_cpu(k, rate, k_k, k_a):
        inputs = k.flatten(0, -2), rate.flatten(0, -2), k_k.flatten(), k_a.flatten()
        key, a, b = Removal.apply(heads, *inputs)
        return key.view(k.shape), a.view(k.shape), b.view(k.shape)
    s = torch.sigmoid(rate)
    unit = F.normalize((k * k_k).unflatten(-1, (heads, -1)), dim=-1, eps=SHORTEST).flatten(-2)
    found = k * (1 + (s - 1) * k_a), -unit, unit * s
    key, a, b = (x.to(k.dtype) for x in found)  # as k even where autocast leaves k_k and k_a wider
    return key, a, b


class BonusNorm(nn.Module):
    """(group_norm(y) + v sum(r k r_k)) gate, the sum over each head. Parameters as GroupNorm's."""

    def __init__(self, heads: int, n_channels: int, eps: float):
        super().__init__()
        self.heads, self.eps = heads, eps
        self.weight = nn.Parameter(torch.empty(n_channels))
        self.bias = nn.Parameter(torch.empty(n_channels))

    def forward(
        self, y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, r_k: Tensor
    ) -> Tensor:
        """y, r, k, v, gate (tokens, C), r_k (heads, C / heads) -> (tokens, C)."""
        weights = self.weight, self.bias, r_k.flatten()
        if fits_cpu(y, r, k, v, gate, *weights):
            return BonusNormed.apply(self.heads, self.eps, y, r, k, v, gate, *weights)
        by_head = (self.heads, -1)
        bonus = (r * k * weights[2]).unflatten(-1, by_head).sum(-1, keepdim=True)
        normed = F.group_norm(y, self.heads, self.weight, self.bias, self.eps)
        return (normed + (bonus * v.unflatten(-1, by_head)).flatten(-2)) * gate
