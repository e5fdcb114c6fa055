"""LoRA: the product of two thin trainable matrices beside W."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finchtune.adapters.base import (
    Adapter,
    check_positive,
    check_positive_int,
    check_rank,
    merge_precision,
)
from finchtune.adapters.frozen import low_rank_linear
from finchtune.errors import UserError


class LoRA(Adapter):
    """y = W x + scale B A dropout(x), with A (r, k) Kaiming uniform and B (d, r) zero at first.

    LoRA (arXiv 2106.09685): scale = alpha / r; with `rslora` alpha / sqrt(r) (arXiv 2312.03732).
    """

    name = "lora"
    flags = {
        "r": "lora_r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "rslora": "rslora",
    }
    help = {
        "r": "rank",
        "alpha": "the update is scaled by alpha / r",
        "dropout": "dropout on the adapter's input",
        "rslora": "scale by alpha / sqrt(r) instead (rsLoRA)",
    }
    training_flags = ("lora_plus_ratio",)
    output_dims = {"lora_B": 0}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int = 32,
        alpha: float = 32,
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> None:
        super().__init__(in_features, out_features)
        check_positive_int("r", r)
        check_rank(r, in_features, out_features)
        check_positive("alpha", alpha)
        if not 0 <= dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, not {dropout!r}")
        self.scale = alpha / (math.sqrt(r) if rslora else r)
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.zeros(r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))

    def init(self, W: Tensor) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        drops = self.training and self.dropout > 0
        dropped = F.dropout(x, self.dropout) if drops else None
        return low_rank_linear(x, W, self.lora_A, self.lora_B, self.scale, dropped)

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_A.detach(), self.lora_B.detach(), self.scale

    def merged(self, W: Tensor) -> Tensor:
        dtype = merge_precision(W)
        A, B = self.lora_A.detach().to(W.device, dtype), self.lora_B.detach().to(W.device, dtype)
        return torch.addmm(W.detach().to(dtype), B, A, alpha=self.scale)
