"""DoRA: LoRA for the direction of each row of W, and one trainable number for its length."""

import math
from collections.abc import Callable

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


class DoRA(Adapter):
    """y = m / ||V|| * (V x), V = W + (alpha / r) B A, with the norm of each row of V.

    DoRA (arXiv 2402.09353), equation 5; the norm counts as a constant in backward (section
    4.3). m (d) starts at the norms of W's rows. V is never built: its norms follow from thin
    products.

    What is trained is m's difference from its start, which is zero at first: in bf16 a change of
    m itself by less than 1/256 of it would be lost. The start stays in float32.
    """

    init_magnitude: Tensor

    name = "dora"
    flags = {"r": "lora_r", "alpha": "lora_alpha"}
    help = {"r": "rank", "alpha": "the update is scaled by alpha / r"}
    training_flags = ("lora_plus_ratio",)
    output_dims = {"lora_B": 0, "magnitude_change": 0, "init_magnitude": 0}
    reads_W = True

    def __init__(
        self, in_features: int, out_features: int, *, r: int = 32, alpha: float = 32
    ) -> None:
        super().__init__(in_features, out_features)
        check_positive_int("r", r)
        check_rank(r, in_features, out_features)
        check_positive("alpha", alpha)
        self.scale = alpha / r
        self.lora_A = nn.Parameter(torch.zeros(r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        self.magnitude_change = nn.Parameter(torch.zeros(out_features))
        self.register_buffer("init_magnitude", torch.zeros(out_features))

    @property
    def magnitude(self) -> Tensor:
        """m (d), in float32 (float64 if the start is)."""
        return self.init_magnitude + self.magnitude_change.to(self.init_magnitude.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DoRA":
        before = self.init_magnitude
        super()._apply(fn, recurse)
        after = self.init_magnitude
        if torch.finfo(after.dtype).bits < torch.finfo(before.dtype).bits:
            self.init_magnitude = before.to(after.device)
        return self

    @torch.no_grad()
    def init(self, W: Tensor) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        norms = self.row_norms(W)
        if W.device.type != "meta" and not norms.all():
            raise UserError("dora divides by the norm of each row of a weight, and one is zero")
        nn.init.zeros_(self.magnitude_change)
        self.init_magnitude.copy_(norms)

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        y = low_rank_linear(x, W, self.lora_A, self.lora_B, self.scale)
        norms = self.row_norms(W)
        # The factor is close to one: its distance from one is what has to survive rounding.
        return y + y * ((self.magnitude - norms) / norms).to(y.dtype)

    def merged(self, W: Tensor) -> Tensor:
        dtype = merge_precision(W)
        A, B, magnitude = (
            tensor.detach().to(W.device, dtype)
            for tensor in (self.lora_A, self.lora_B, self.magnitude)
        )
        V = torch.addmm(W.detach().to(dtype), B, A, alpha=self.scale)
        return V * (magnitude / V.norm(dim=1)).unsqueeze(1)

    def unmerged(self, W: Tensor) -> Tensor:
        raise UserError("dora cannot be unmerged: the lengths of the base's rows are lost")

    @torch.no_grad()
    def row_norms(self, W: Tensor) -> Tensor:
        """||V_o|| for each output o (d), from ||W_o||^2 + 2 s B_o A W_o + s^2 B_o A A^T B_o."""
        dtype = merge_precision(W)
        A, B = self.lora_A.to(dtype), self.lora_B.to(dtype) * self.scale
        square = torch.linalg.vector_norm(W, dim=1, dtype=dtype).square()
        cross = (F.linear(W, A.to(W.dtype)).to(dtype) * B).sum(1)
        return (square + 2 * cross + ((B @ (A @ A.T)) * B).sum(1)).sqrt()
