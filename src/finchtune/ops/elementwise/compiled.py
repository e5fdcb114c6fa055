"""Element-wise parts of a block by the compiled CPU kernels: few memory passes.

The same functions as in `plain`, which is their oracle, in fp32 and bf16. The kernels compute in
fp32; what they store is rounded.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finchtune.ops.elementwise.plain import by_mixture, low_rank_backward, previous_minus_this

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
        maa: Tensor,
        w1: Tensor,
        w2: Tensor,
    ) -> tuple[Tensor, ...]:
        """x_j = x + xx (maa_j + m_j), with m = tanh((x + xx maa_x) w1) w2.

        x (B, T, C), before (S, C) or None, cu_seqlens as in `mixtures`, maa_x (1, C),
        maa (n, C), w1 (C, n M), w2 (n, M, C) -> n of (B, T, C).
        """
        (blended,) = ops.token_mix(x, before, cu_seqlens, maa_x)
        low = torch.tanh(blended @ w1)
        ctx.save_for_backward(x, before, cu_seqlens, low, maa_x, maa, w1, w2)
        # Separate tensors, so that each is freed by itself; written to below, so that selective
        # recomputation, which keeps results of `@`, must not see one.
        blends = [torch.empty_like(blended) for _ in maa]
        for low_j, w2_j, blend in zip(by_mixture(low, len(maa)), w2, blends, strict=True):
            torch.mm(low_j, w2_j, out=blend)
        ops.token_mix_(blends, x, before, cu_seqlens, maa)
        return tuple(y.view(x.shape) for y in blends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, before, cu_seqlens, low, maa_x, maa, w1, w2 = ctx.saved_tensors
        of_before, _, of_maa_x, of_maa, of_w1, of_w2 = ctx.needs_input_grad[1:]
        rows = [dy.flatten(0, 1) for dy in gradients]
        d_blends = torch.bmm(by_mixture(low, len(maa)), w2)  # until the kernel has read them
        total, blended, d_maa = ops.token_mix_backward(
            rows, x, before, cu_seqlens, maa, d_blends.unbind(), of_maa
        )
        d_low, d_input = low_rank_backward(d_blends, low, w1, w2)
        dx, d_before = ops.shift_backward(total, blended, d_input, x, cu_seqlens, maa_x, of_before)
        xx = previous_minus_this(x, before, cu_seqlens).flatten(0, 1) if of_maa_x or of_w1 else x
        return (
            dx,
            d_before if of_before else None,
            None,
            (d_input * xx).sum(0, keepdim=True) if of_maa_x else None,
            d_maa.to(maa.dtype) if of_maa else None,
            torch.addcmul(x.flatten(0, 1), xx, maa_x).T @ d_low if of_w1 else None,
            by_mixture(low, len(maa)).mT @ d_blends if of_w2 else None,
        )


class FixedMixtures(torch.autograd.Function):
    """Blends of a token with its predecessor by channel. Keeps x where maa is trained."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, before: Tensor | None, cu_seqlens: Tensor | None, maa: Tensor
    ) -> tuple[Tensor, ...]:
        """x_j = x + xx maa_j. x (B, T, C), before (S, C) or None, maa (n, C) -> n of (B, T, C)."""
        of_maa = ctx.needs_input_grad[3]
        ctx.save_for_backward(x if of_maa else None, before if of_maa else None, cu_seqlens, maa)
        return tuple(y.view(x.shape) for y in ops.token_mix(x, before, cu_seqlens, maa))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, before, cu_seqlens, maa = ctx.saved_tensors
        _, of_before, _, of_maa = ctx.needs_input_grad
        rows = [dy.flatten(0, 1) for dy in gradients]
        like = gradients[0] if x is None else x  # only its shape is read where maa is frozen
        total, blended, d_maa = ops.token_mix_backward(
            rows, like, before, cu_seqlens, maa, [], of_maa
        )
        dx, d_before = ops.shift_backward(total, blended, None, like, cu_seqlens, maa, of_before)
        return (
            dx,
            d_before if of_before else None,
            None,
            d_maa.to(maa.dtype) if of_maa else None,
        )


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
