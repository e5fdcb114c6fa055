"""Bone: one trainable r x d matrix, shared by all blocks of the input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finchtune.adapters.base import Adapter, check_positive_int, merge_precision
from finchtune.adapters.frozen import frozen_linear_plus


class Bone(Adapter):
    """y = W x + (sum over blocks of x viewed as (k/r, r)) D, with D (r, d) zero at first.

    DiSHA (arXiv 2409.15371), equation 3. Any in_features: x is padded with zeros up to a
    multiple of r. For backward only the block sums (..., r) are kept, not x.
    """

    name = "bone"

    def __init__(self, in_features: int, out_features: int, *, r: int = 64) -> None:
        super().__init__(in_features, out_features)
        check_positive_int("r", r)
        self.r = r
        self.bone = nn.Parameter(torch.zeros(r, out_features))

    def init(self, W: Tensor) -> None:
        nn.init.zeros_(self.bone)

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        return frozen_linear_plus(x, W, block_sum(x, self.r), self.bone)

    def merged(self, W: Tensor) -> Tensor:
        dtype = merge_precision(W)
        blocks = -(-self.in_features // self.r)
        tiled = self.bone.detach().to(W.device, dtype).T.repeat(1, blocks)
        return tiled[:, : self.in_features].add_(W.detach())


def block_sum(x: Tensor, r: int) -> Tensor:
    """x (..., k) -> (..., r): the sum of its blocks of r channels, the last padded with zeros."""
    padding = -x.shape[-1] % r
    if padding:
        x = F.pad(x, (0, padding))
    return x.unflatten(-1, (-1, r)).sum(-2)
