"""DiSHA in its general form: one small matrix, tiled over W."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finchtune.adapters.base import Adapter, check_at_most, check_positive_int, merge_precision
from finchtune.adapters.frozen import frozen_linear
from finchtune.adapters.shards import shard_sum, tiled_identity


class DiSHA(Adapter):
    """y = (W + expand(D)) x, with D (r1, r2), zero at first, tiled over W (d, k).

    DiSHA (arXiv 2409.15371), equation 2. Any sizes: tiles that reach over W's edges are cut.
    r1 = d gives Bone with r = r2. expand(D) is never built: x is summed over blocks of r2, and
    D times the sums is repeated over the output.
    """

    name = "disha"
    help = {"r1": "rows of D, which is tiled over W", "r2": "columns of D"}

    def __init__(self, in_features: int, out_features: int, *, r1: int = 64, r2: int = 64) -> None:
        super().__init__(in_features, out_features)
        check_positive_int("r1", r1)
        check_positive_int("r2", r2)
        check_at_most("r1", r1, out_features, "the layer's out_features")
        check_at_most("r2", r2, in_features, "the layer's in_features")
        # Not "disha": under that key other software keeps what is called Bone here.
        self.shard = nn.Parameter(torch.zeros(r1, r2))

    def init(self, W: Tensor) -> None:
        nn.init.zeros_(self.shard)

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        y = frozen_linear(x, W)
        sums = shard_sum(x, self.shard.shape[1]).to(y.dtype)
        change = F.linear(sums, self.shard.to(y.dtype))
        repeats = -(-self.out_features // self.shard.shape[0])
        return y + torch.cat([change] * repeats, dim=-1)[..., : self.out_features]

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        r1, r2 = self.shard.shape
        repeated = self.shard.detach().repeat(-(-self.out_features // r1), 1)
        return tiled_identity(r2, self.in_features), repeated[: self.out_features], 1.0

    def merged(self, W: Tensor) -> Tensor:
        dtype = merge_precision(W)
        r1, r2 = self.shard.shape
        D = self.shard.detach().to(W.device, dtype)
        expanded = D.repeat(-(-self.out_features // r1), -(-self.in_features // r2))
        return W.detach().to(dtype) + expanded[: self.out_features, : self.in_features]
