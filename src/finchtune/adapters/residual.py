"""LoRA that starts away from zero: what the first B A adds is taken off again."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finchtune.adapters.base import Adapter, check_positive_int, merge_precision
from finchtune.adapters.frozen import frozen_linear
from finchtune.errors import UserError

Linear = Callable[[Tensor, Tensor], Tensor]


class ResidualLoRA(Adapter):
    """y = W x + scale (B A - B0 A0) x, with the initial A0 (r, k), B0 (d, r) in frozen buffers.

    The common part of PiSSA, OLoRA and LoRA-GA, which differ in `init`. W itself stays
    untouched, so the base's file stays valid and resuming needs no second file; at the start
    both products are equal and the layer is exactly the base's.
    """

    output_dims: ClassVar[dict[str, int]] = {"lora_B": 0, "init_lora_B": 0}

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    init_lora_A: Tensor
    init_lora_B: Tensor

    def __init__(self, in_features: int, out_features: int, *, r: int, scale: float = 1.0) -> None:
        super().__init__(in_features, out_features)
        check_positive_int("r", r)
        if r > min(in_features, out_features):
            raise UserError(
                f"r = {r} is larger than the smaller side of a weight with in_features = "
                f"{in_features} and out_features = {out_features}; choose a smaller r"
            )
        self.r = r
        self.scale = scale
        self.lora_A = nn.Parameter(torch.zeros(r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        self.register_buffer("init_lora_A", torch.zeros(r, in_features))
        self.register_buffer("init_lora_B", torch.zeros(out_features, r))

    @torch.no_grad()
    def start_at(self, A: Tensor, B: Tensor) -> None:
        """Take A (r, k) and B (d, r) as the starting point."""
        for tensor, value in (
            (self.lora_A, A),
            (self.lora_B, B),
            (self.init_lora_A, A),
            (self.init_lora_B, B),
        ):
            tensor.copy_(value)

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        change = low_rank(F.linear, x, self.lora_A, self.lora_B, self.scale)
        start = low_rank(frozen_linear, x, self.init_lora_A, self.init_lora_B, self.scale)
        return frozen_linear(x, W) + (change - start)

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        A = torch.cat([self.lora_A.detach(), self.init_lora_A])
        return A, torch.cat([self.lora_B.detach(), -self.init_lora_B], dim=1), self.scale

    def merged(self, W: Tensor) -> Tensor:
        dtype = merge_precision(W)
        A, B, A0, B0 = (
            tensor.detach().to(W.device, dtype)
            for tensor in (self.lora_A, self.lora_B, self.init_lora_A, self.init_lora_B)
        )
        # In place, to need no more than two tensors of W's size.
        return (B @ A).sub_(B0 @ A0).mul_(self.scale).add_(W.detach())


def low_rank(linear: Linear, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """scale B A x in the dtype of x: x (..., k), A (r, k), B (d, r) -> (..., d).

    `linear` is F.linear, or frozen_linear where A and B are not trained.
    """
    return linear(linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))
