"""Element-wise parts of a block by the compiled CPU kernels: few memory passes.

The same functions as in `plain`, which is their oracle, in fp32 and bf16. The kernels compute in
fp32; what they store is rounded.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ops = torch.ops.finchtune


class Mixtures(torch.autograd.Function):
    """Data-dependent blends of a token with its predecessor. Keeps x and the low-rank part."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        before: Tensor | None,
        cu_seqlens: Tensor | None,
        maa_x: Tensor,
        w1: Tensor,
        w2: Tensor,
        *maa: Tensor,
    ) -> tuple[Tensor, ...]:
        """x_j = x + xx (maa_j + m_j), with m = tanh((x + xx maa_x) w1) w2.

        x (B, T, C), before (S, C) or None, cu_seqlens as in `mixtures`, maa_x (1, C),
        w1 (C, n M), w2 (n, M, C), maa n of (C) -> n of (B, T, C).
        """
        low, blends = ops.mixtures(x, before, cu_seqlens, maa_x, maa, w1, w2)
        ctx.save_for_backward(x, before, cu_seqlens, low, maa_x, w1, w2, *maa)
        return tuple(blends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, before, cu_seqlens, low, maa_x, w1, w2, *maa = ctx.saved_tensors
        _, of_before, _, of_maa_x, of_w1, of_w2, *of_each = ctx.needs_input_grad
        asked = of_before, of_maa_x, any(of_each), of_w1, of_w2
        dx, d_before, d_maa_x, d_maa, d_w1, d_w2 = ops.mixtures_backward(
            gradients, x, before, cu_seqlens, low, maa_x, maa, w1, w2, *asked
        )
        return (
            dx,
            d_before if of_before else None,
            None,
            d_maa_x if of_maa_x else None,
            d_w1 if of_w1 else None,
            d_w2 if of_w2 else None,
            *(d_maa[j] if asked else None for j, asked in enumerate(of_each)),
        )


class FixedMixtures(torch.autograd.Function):
    """Blends of a token with its predecessor by channel. Keeps x where maa is trained."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, before: Tensor | None, cu_seqlens: Tensor | None, *maa: Tensor
    ) -> tuple[Tensor, ...]:
        """x_j = x + xx maa_j: x (B, T, C), before (S, C) or None, maa n of (C) -> n like x."""
        of_maa = any(ctx.needs_input_grad[3:])
        ctx.save_for_backward(x if of_maa else None, before if of_maa else None, cu_seqlens, *maa)
        return tuple(ops.fixed_mixtures(x, before, cu_seqlens, maa))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, before, cu_seqlens, *maa = ctx.saved_tensors
        _, of_before, _, *of_each = ctx.needs_input_grad
        like = gradients[0] if x is None else x  # only its shape is read where maa is frozen
        dx, d_before, d_maa = ops.fixed_mixtures_backward(
            gradients, like, before, cu_seqlens, maa, of_before, any(of_each)
        )
        of_maa = (d_maa[j] if asked else None for j, asked in enumerate(of_each))
        return dx, d_before if of_before else None, None, *of_maa


class LowRanks(torch.autograd.Function):
    """zero + activation(x one) two of several x. Keeps the low-rank parts, and x where its `one` is
    trained.
    """

    @staticmethod
    def forward(ctx: Any, activations: list[int], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """n of each: x (T, C), one (C, M), two (M, d), zero (d) or None -> n of (T, d)."""
        n = len(activations)
        x, one, two, zero = (tensors[i * n : i * n + n] for i in range(4))
        y, low = ops.low_ranks(x, one, two, zero, activations)
        of_one = ctx.needs_input_grad[1 + n : 1 + 2 * n]
        needed = (own if asked else None for own, asked in zip(x, of_one, strict=True))
        ctx.save_for_backward(*needed, *low, *one, *two)
        ctx.activations = activations
        return tuple(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        saved, n = ctx.saved_tensors, len(dy)
        x, low, one, two = (saved[i * n : i * n + n] for i in range(4))
        asked = ctx.needs_input_grad[1 + n :]
        of_each = (asked[i * n : i * n + n] for i in range(3))
        given = [d if own is None else own for d, own in zip(dy, x, strict=True)]
        found = ops.low_ranks_backward(dy, given, low, one, two, ctx.activations, *of_each)
        rest = (d if of_it else None for d, of_it in zip(found[n:], asked, strict=True))
        return None, *found[:n], *rest


class GatedNorm(torch.autograd.Function):
    """group_norm(y) silu(gate). Keeps y and gate."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        """y, gate (tokens, C), weight, bias (C) -> (tokens, C)."""
        ctx.save_for_backward(y, gate, weight, bias)
        ctx.settings = groups, eps
        return ops.gated_norm(y, gate, weight, bias, groups, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        of_weight, of_bias = ctx.needs_input_grad[2:4]
        dy, d_gate, d_weight, d_bias = ops.gated_norm_backward(
            d_out, *saved, *ctx.settings, of_weight or of_bias
        )
        dtype = saved[0].dtype
        return (
            dy,
            d_gate,
            d_weight.to(dtype) if of_weight else None,
            d_bias.to(dtype) if of_bias else None,
            None,
            None,
        )


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2. Keeps the result, as `plain.SquaredReLU` does; its root is not rounded to bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = ops.squared_relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return ops.squared_relu_backward(dy, *ctx.saved_tensors)


class SigmoidGate(torch.autograd.Function):
    """sigmoid(gate) y. Keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y)
        return ops.sigmoid_gate(gate, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        return ops.sigmoid_gate_backward(d_out, *ctx.saved_tensors)
