"""Layer norm joined with the residual sum before it, on a GPU: torch's own two elsewhere."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finchtune.ops.kernels import device_type, fits

MOST_BYTES = 24000  # of a row that the kernels take


class CompiledAddedNorm(torch.autograd.Function):
    """x + y and its layer norm. Keeps the sum, and two moments of each row.

    Backward joins the gradients of both, which autograd would add in one more pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """x, y (..., C), weight, bias (C) -> two of (..., C); without y the sum is x itself."""
        total, normed, moments = torch.ops.finchtune.added_norm(x, y, weight, bias, eps)
        total = x if y is None else total
        ctx.save_for_backward(total, moments, weight)
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None) -> Any:
        total, moments, weight = ctx.saved_tensors
        _, of_y, of_weight, of_bias, _ = ctx.needs_input_grad
        if d_normed is None:
            return d_total, d_total if of_y else None, None, None, None
        dx, d_weight, d_bias = torch.ops.finchtune.added_norm_backward(
            d_normed, d_total, total, moments, weight, of_weight or of_bias
        )
        return (
            dx,
            dx if of_y else None,
            d_weight.to(weight.dtype) if of_weight else None,
            d_bias.to(weight.dtype) if of_bias else None,
            None,
        )


class AddedNorm(nn.LayerNorm):
    """The sum of two tensors and its layer norm. A module, whose parameters ZeRO-3 gathers."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        """x, y (..., C) -> x + y, which is x itself without y, and its norm over C."""
        given = [x, self.weight, self.bias, *([] if y is None else [y])]
        short = x.shape[-1] * x.element_size() <= MOST_BYTES
        if device_type(x) == "cuda" and short and x.numel() and fits(*given):
            return CompiledAddedNorm.apply(x, y, self.weight, self.bias, self.eps)
        total = x if y is None else x + y
        return total, super().forward(total)
