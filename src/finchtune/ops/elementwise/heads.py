"""What RWKV-7 does to a token's heads before and after WKV7: compiled where kernels fit.

The plain forms are torch's own operators under autograd, and the oracle of the compiled ones,
which compute in fp32, round what they store and keep their inputs only.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finchtune.ops.kernels import fits

SHORTEST = 1e-12  # of the lengths that a key is divided by, as in torch's normalize


class Wkv7Inputs(torch.autograd.Function):
    """What WKV7 takes; k, rate, decay and, where v is mixed, v, first, mix (tokens, C)."""

    @staticmethod
    def forward(
        ctx: Any, heads: int, k_k: Tensor, k_a: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(k_k, k_a, *inputs)
        ctx.heads = heads
        rows, values = inputs[:3], inputs[3:]
        found = torch.ops.finchtune.wkv7_inputs(rows, values, (k_k, k_a), heads, SHORTEST)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        weights, rows, values = saved[:2], saved[2:5], saved[5:]
        of_weights = any(ctx.needs_input_grad[1:3])
        found = torch.ops.finchtune.wkv7_inputs_backward(
            d_out, rows, values, weights, ctx.heads, SHORTEST, of_weights
        )
        n = len(rows) + len(values)
        return None, *rounded(found[n:], weights), *found[:n]


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


def rounded(gradients: list[Tensor], weights: Sequence[Tensor]) -> list[Tensor | None]:
    """A gradient (weights, C) as one of each, in its dtype; None for each where there is none."""
    if not gradients:
        return [None for _ in weights]
    return [d.to(x.dtype) for d, x in zip(gradients[0], weights, strict=True)]


def wkv7_inputs(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    rate: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    heads: int,
    values: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """WKV7's k, v, w, a and b, of linear and low-rank parts without their activations.

    With s = sigmoid(rate) and kk = k k_k brought to length 1 in each head: k (1 + (s - 1) k_a);
    v + (first - v) sigmoid(mix), or v itself; log sigmoid(decay) - 1/2; -kk and kk s. All are in
    the dtype of k.

    Args:
        k, v, decay, rate: (..., C).
        k_k, k_a: C values, of any shape that ends with C.
        heads: how many lie side by side in C.
        values: first and mix (..., C), where v is mixed; else empty.
    """
    mixed = [v, *values] if values else []
    weights = k_k.flatten(), k_a.flatten()
    if fits(k, rate, decay, *mixed, *weights):
        rows = (x.flatten(0, -2) for x in (k, rate, decay, *mixed))
        found = Wkv7Inputs.apply(heads, *weights, *rows)
        key, w, a, b, *mixed = (x.view(k.shape) for x in found)
        return key, *(mixed or [v]), w, a, b
    if values:
        first, mix = values
        v = v + (first - v) * torch.sigmoid(mix)
    s = torch.sigmoid(rate)
    unit = F.normalize((k * k_k).unflatten(-1, (heads, -1)), dim=-1, eps=SHORTEST).flatten(-2)
    found = k * (1 + (s - 1) * k_a), v, F.logsigmoid(decay) - 0.5, -unit, unit * s
    return tuple(x.to(k.dtype) for x in found)  # also where autocast leaves k_k and k_a wider


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
        if fits(y, r, k, v, gate, *weights):
            return BonusNormed.apply(self.heads, self.eps, y, r, k, v, gate, *weights)
        by_head = (self.heads, -1)
        bonus = (r * k * weights[2]).unflatten(-1, by_head).sum(-1, keepdim=True)
        normed = F.group_norm(y, self.heads, self.weight, self.bias, self.eps)
        return (normed + (bonus * v.unflatten(-1, by_head)).flatten(-2)) * gate
