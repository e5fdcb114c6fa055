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
