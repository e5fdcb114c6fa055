"""LoRA-GA: LoRA that starts along the gradient of W."""

import math

import torch
from torch import Tensor

from finchtune.adapters.base import check_positive, check_positive_int, merge_precision
from finchtune.adapters.methods.pissa import check_iterations, principal_svd
from finchtune.adapters.residual import ResidualLoRA
from finchtune.errors import UserError


class LoRAGA(ResidualLoRA):
    """y = (W - s B0 A0) x + s B A x, s = alpha / sqrt(r), starting from the SVD of dL/dW.

    LoRA-GA (arXiv 2407.05000, algorithm 1): with dL/dW = U S V^T, A0 = c V^T[:r] and
    B0 = c U[:, r:2r], c = d^(1/4) / sqrt(gamma). The first steps then change W about as full
    fine-tuning would. `weight_gradients` collects the gradients; `svd_niter` is as for PiSSA.
    """

    name = "lora_ga"
    flags = {
        "r": "lora_r",
        "alpha": "lora_alpha",
        "gamma": "lora_ga_gamma",
        "svd_niter": "svd_niter",
    }
    help = {
        "r": "rank",
        "alpha": "the update is scaled by alpha / r",
        "gamma": "the larger, the smaller A and B start",
        "svd_niter": "iterations of the fast SVD; 0 = exact SVD",
    }
    training_flags = ("lora_plus_ratio", "lora_ga_batches")
    reads_W = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int = 32,
        alpha: float = 32,
        gamma: float = 16,
        svd_niter: int | None = 4,
    ) -> None:
        check_positive_int("r", r)
        check_positive("alpha", alpha)
        check_positive("gamma", gamma)
        super().__init__(in_features, out_features, r=r, scale=alpha / math.sqrt(r))
        if 2 * r > min(in_features, out_features):
            raise UserError(
                f"lora_ga takes 2 r = {2 * r} directions of a gradient of {out_features} x "
                f"{in_features}, which has fewer; choose a smaller r"
            )
        self.gamma = gamma
        self.svd_niter = check_iterations(svd_niter)

    def init(self, W: Tensor) -> None:
        raise UserError("lora_ga starts from the gradients of the weights; attach with gradients=")

    @torch.no_grad()
    def init_from_gradient(self, W: Tensor, gradient: Tensor) -> None:
        gradient = gradient.to(W.device, merge_precision(W))
        if not gradient.is_meta and not gradient.isfinite().all():
            raise UserError("the gradient to start from holds NaN or infinity")
        U, _, Vh = principal_svd(gradient, 2 * self.r, self.svd_niter)
        scale = self.out_features**0.25 / math.sqrt(self.gamma)
        self.start_at(scale * Vh[: self.r], scale * U[:, self.r :])
