"""A linear layer with an adapter on it."""

from typing import Any

import torch
from torch import Tensor, nn

from finchtune.adapters.base import Adapter
from finchtune.adapters.frozen import frozen_linear
from finchtune.adapters.quantise import QuantisedWeight


class AdaptedLinear(nn.Module):
    """adapter(x, weight) + bias: takes the place of an nn.Linear, whose weight it keeps frozen.

    `weight` and `bias` are the linear's own parameters under their own names, so that files of
    the base model load unchanged. With `quant` the weight is kept in that form, and in no file:
    it follows from the base's.
    """

    weight: Any  # nn.Parameter or QuantisedWeight

    def __init__(
        self,
        linear: nn.Linear,
        adapter: Adapter,
        quant: str | None = None,
        quant_device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        linear.weight.requires_grad_(False)
        if quant:
            self.weight = QuantisedWeight(linear.weight, quant, quant_device)
        else:
            self.weight = linear.weight
        self.bias = linear.bias
        self.adapter = adapter
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        y = self.adapter(x, self.weight)
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> Tensor:
        """The frozen weight (out, in) that the layer computes with: in float32 if quantised."""
        if isinstance(self.weight, QuantisedWeight):
            return self.weight.dense(torch.float32)
        return self.weight


class QuantisedLinear(nn.Module):
    """W x + bias with a frozen W in few bits, as an AdaptedLinear has it, but no adapter."""

    def __init__(
        self, linear: nn.Linear, quant: str, quant_device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.weight = QuantisedWeight(linear.weight, quant, quant_device)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        y = frozen_linear(x, self.weight)
        return y if self.bias is None else y + self.bias
