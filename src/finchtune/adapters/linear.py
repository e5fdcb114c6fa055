"""A linear layer with an adapter on it."""

from torch import Tensor, nn

from finchtune.adapters.base import Adapter


class AdaptedLinear(nn.Module):
    """adapter(x, weight) + bias: takes the place of an nn.Linear, whose weight it keeps frozen.

    `weight` and `bias` are the linear's own parameters under their own names, so that files of
    the base model load unchanged.
    """

    def __init__(self, linear: nn.Linear, adapter: Adapter) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias
        self.adapter = adapter
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        y = self.adapter(x, self.weight)
        return y if self.bias is None else y + self.bias
