"""OLoRA: LoRA that starts from the QR decomposition of W."""

import torch
from torch import Tensor

from finchtune.adapters.base import check_positive, check_positive_int, merge_precision
from finchtune.adapters.residual import ResidualLoRA


class OLoRA(ResidualLoRA):
    """y = (W - s B0 A0) x + s B A x, s = alpha / r, starting at B = Q and A = R of W = Q R.

    OLoRA (arXiv 2406.01775): the first r columns of Q and the first r rows of R.
    """

    name = "olora"
    flags = {"r": "lora_r", "alpha": "lora_alpha"}
    help = {"r": "rank", "alpha": "the update is scaled by alpha / r"}
    training_flags = ("lora_plus_ratio",)

    def __init__(
        self, in_features: int, out_features: int, *, r: int = 32, alpha: float = 32
    ) -> None:
        check_positive_int("r", r)
        check_positive("alpha", alpha)
        super().__init__(in_features, out_features, r=r, scale=alpha / r)

    @torch.no_grad()
    def init(self, W: Tensor) -> None:
        W = W.to(merge_precision(W))
        # Q's first r columns depend on W's first r columns only; R = Q^T W follows from W = Q R.
        Q = torch.linalg.qr(W[:, : self.r]).Q
        self.start_at(Q.T @ W, Q)
