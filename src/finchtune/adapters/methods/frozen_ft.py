"""Frozen FT: a full trainable matrix beside W, to study gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finchtune.adapters.base import Adapter, merge_precision
from finchtune.adapters.frozen import frozen_linear


class FrozenFT(Adapter):
    """y = W x + D x, with D (d, k) as large as W and zero at first.

    DiSHA (arXiv 2409.15371), section 9.1: it separates the effect of starting at zero from that
    of a low rank. As many parameters as full fine-tuning; meant for measurements.
    """

    name = "frozen_ft"
    output_dims = {"delta": 0}

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.delta = nn.Parameter(torch.zeros(out_features, in_features))

    def init(self, W: Tensor) -> None:
        nn.init.zeros_(self.delta)

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        return frozen_linear(x, W) + F.linear(x, self.delta.to(x.dtype))

    def merged(self, W: Tensor) -> Tensor:
        dtype = merge_precision(W)
        return W.detach().to(dtype) + self.delta.detach().to(W.device, dtype)
