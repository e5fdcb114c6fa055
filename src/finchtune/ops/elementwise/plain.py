"""Element-wise parts of a block in torch's operators, for any device and dtype.

Their backward is written out: autograd would keep every intermediate result and pass over
memory once for each operation; these keep what backward cannot cheaply make again, and work in
place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def previous_minus_this(x: Tensor, before: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """x (B, T, C); `before` (S, C) precedes its sequences, zero if None.

    The sequences are the rows of x or, with `cu_seqlens`, lie packed in x (1, T, C).
    """
    starts = None if cu_seqlens is None else cu_seqlens[:-1].long()
    if before is None:
        before = x.new_zeros(len(x) if starts is None else len(starts), x.shape[-1])
    return ShiftDifference.apply(x, before, starts)


class ShiftDifference(torch.autograd.Function):
    """The token before, minus the token. Keeps where sequences start."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, last: Tensor, starts: Tensor | None) -> Tensor:
        """x (B, T, C), `last` (S, C) before the sequences that begin at `starts` (S) or, if None,
        are the rows -> (B, T, C).
        """
        ctx.save_for_backward(starts)
        xx = torch.empty_like(x)
        torch.sub(x[:, :-1], x[:, 1:], out=xx[:, 1:])
        if starts is None:
            torch.sub(last, x[:, 0], out=xx[:, 0])
        else:
            xx.index_copy_(1, starts, last - x.index_select(1, starts))
        return xx

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (starts,) = ctx.saved_tensors
        (dxx,) = gradients
        dx = -dxx
        d_last = dxx[:, 0]
        if starts is not None:
            d_last = dxx[0, starts]
            dxx = dxx.index_fill(1, starts, 0)
        dx[:, :-1] += dxx[:, 1:]
        return dx, d_last, None


class Mixtures(torch.autograd.Function):
    """Data-dependent blends of a token with its predecessor. Keeps xx and the low-rank part."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, xx: Tensor, maa_x: Tensor, maa: Tensor, w1: Tensor, w2: Tensor
    ) -> tuple[Tensor, ...]:
        """x_j = x + xx (maa_j + m_j), with m = tanh((x + xx maa_x) w1) w2.

        x, xx (tokens, C), maa_x (C), maa (n, 1, C), w1 (C, n M), w2 (n, M, C) -> n of (tokens, C).
        """
        low = torch.tanh(torch.addcmul(x, xx, maa_x) @ w1)
        ctx.save_for_backward(xx, low, maa_x, maa, w1, w2, x if ctx.needs_input_grad[4] else None)
        return tuple(torch.addcmul(x, xx, blend) for blend in blends(low, maa, w2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        xx, low, maa_x, maa, w1, w2, x = ctx.saved_tensors
        of_maa_x, of_maa, of_w1, of_w2 = ctx.needs_input_grad[2:]
        d_blend = blends(low, maa, w2)
        dx, dxx = gradients[0].clone(), gradients[0] * d_blend[0]
        for j, dy in enumerate(gradients):
            if j > 0:
                dx += dy
                dxx.addcmul_(dy, d_blend[j])
            torch.mul(dy, xx, out=d_blend[j])  # the blend itself is not needed any more
        d_low, d_input = low_rank_backward(d_blend, low, w1, w2)
        dx += d_input
        dxx.addcmul_(d_input, maa_x)
        return (
            dx,
            dxx,
            (d_input * xx).sum(0) if of_maa_x else None,
            d_blend.sum(1, keepdim=True) if of_maa else None,
            torch.addcmul(x, xx, maa_x).T @ d_low if of_w1 else None,
            by_mixture(low, len(maa)).mT @ d_blend if of_w2 else None,
        )


def by_mixture(low: Tensor, count: int) -> Tensor:
    """(tokens, count M) as a view (count, tokens, M)."""
    return low.unflatten(-1, (count, -1)).transpose(0, 1)


def low_rank_backward(
    d_blend: Tensor, low: Tensor, w1: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor]:
    """Through m = tanh(z w1) w2: from dm (n, tokens, C) the gradients of z w1 and z (tokens, C)."""
    d_low = torch.empty_like(low)
    torch.bmm(d_blend, w2.mT, out=by_mixture(d_low, len(w2)))
    d_low = torch.ops.aten.tanh_backward(d_low, low)
    return d_low, d_low @ w1.T


def blends(low: Tensor, maa: Tensor, w2: Tensor) -> Tensor:
    """maa_j + low_j w2_j, (n, tokens, C)."""
    # baddbmm would first write maa out over all tokens.
    return torch.bmm(by_mixture(low, len(maa)), w2).add_(maa)


class Gate(torch.autograd.Function):
    """y silu(gate). Keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(y, gate)
        return F.silu(gate).mul_(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        y, gate = ctx.saved_tensors
        (dy,) = gradients
        return F.silu(gate).mul_(dy), torch.ops.aten.silu_backward(dy * y, gate)


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2. Keeps the result, which the linear after it may keep too.

    Its root is relu(x) to the last bit: in binary the rounded root of a rounded square always is,
    unless the square underflows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        y.mul_(y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        tiny = torch.finfo(y.dtype).tiny
        # On a CPU torch leaves the root to MKL, which is twenty times slower at zeros, and whose
        # fp32 root is not always the nearest number: on AMD it is one off for some squares.
        precise = torch.float64 if y.device.type == "cpu" else y.dtype
        root = y.clamp_min(tiny).to(precise).sqrt_().to(y.dtype)
        return torch.threshold_(root, tiny**0.5, 0.0).mul_(gradients[0]).mul_(2)
