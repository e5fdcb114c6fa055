"""A linear layer that is never trained, keeping as little as possible for backward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer computes: autocast's where that is on, else that of x."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def frozen_linear(x: Tensor, W: Tensor) -> Tensor:
    """y = W x for x (..., k), W (d, k) -> (..., d), keeping W alone for backward.

    F.linear keeps a transposed view of W, which holds on to the gathered weight where ZeRO-3
    has partitioned it again; DeepSpeed's replacement of F.linear keeps x, trained or not.
    """
    if W.requires_grad:
        return F.linear(x, W)
    dtype = compute_dtype(x)
    return FrozenLinear.apply(x.to(dtype), W.to(dtype))


def frozen_linear_plus(x: Tensor, W: Tensor, s: Tensor, D: Tensor, scale: float = 1.0) -> Tensor:
    """W x + scale s D for x (..., k), W (d, k), s (..., r), D (r, d) -> (..., d).

    Keeps s, W and D for backward, and x only where W is trained.
    """
    dtype = compute_dtype(x)
    rows, thin = x.reshape(-1, x.shape[-1]).to(dtype), s.reshape(-1, s.shape[-1]).to(dtype)
    y = FrozenLinearPlus.apply(rows, W.to(dtype), thin * scale, D.to(dtype))
    return y.view(*x.shape[:-1], W.shape[0])


class FrozenLinear(torch.autograd.Function):
    """W x with no gradient for W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        """x (..., k), W (d, k) of one dtype -> (..., d)."""
        ctx.save_for_backward(W)
        return x @ W.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """dx = W^T dy."""
        (W,) = ctx.saved_tensors
        return dy @ W, None


class FrozenLinearPlus(torch.autograd.Function):
    """x W^T + s D, with gradients for all four."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, s: Tensor, D: Tensor) -> Tensor:
        """x (n, k), W (d, k), s (n, r), D (r, d) of one dtype -> (n, d)."""
        ctx.save_for_backward(W, s, D, x if ctx.needs_input_grad[1] else None)
        # Not in place: selective recomputation keeps the sum, and makes the thin product again.
        return torch.addmm(s @ D, x, W.T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dx = dy W, dW = dy^T x, ds = dy D^T, dD = s^T dy, each where it is asked for."""
        W, s, D, x = ctx.saved_tensors
        of_x, of_W, of_s, of_D = ctx.needs_input_grad
        return (
            dy @ W if of_x else None,
            dy.T @ x if of_W else None,
            dy @ D.T if of_s else None,
            s.T @ dy if of_D else None,
        )
