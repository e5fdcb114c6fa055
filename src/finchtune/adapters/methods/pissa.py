"""PiSSA: LoRA that trains the principal singular directions of W."""

import torch
from torch import Tensor

from finchtune.adapters.base import merge_precision
from finchtune.adapters.residual import ResidualLoRA
from finchtune.errors import UserError


class PiSSA(ResidualLoRA):
    """y = (W - B0 A0) x + B A x, starting at A = sqrt(S) V^T, B = U sqrt(S) of W's first r.

    PiSSA (arXiv 2404.02948). `svd_niter` is the number of subspace iterations of a fast
    randomised SVD; None or 0 takes the exact one.
    """

    name = "pissa"
    flags = {"r": "pissa_r", "svd_niter": "svd_niter"}
    help = {"r": "rank", "svd_niter": "iterations of the fast SVD; 0 = exact SVD"}
    training_flags = ("lora_plus_ratio",)

    def __init__(
        self, in_features: int, out_features: int, *, r: int = 32, svd_niter: int | None = 4
    ) -> None:
        super().__init__(in_features, out_features, r=r)
        self.svd_niter = check_iterations(svd_niter)

    @torch.no_grad()
    def init(self, W: Tensor) -> None:
        U, S, Vh = principal_svd(W.to(merge_precision(W)), self.r, self.svd_niter)
        root = S.sqrt()
        self.start_at(root[:, None] * Vh, U * root)


def check_iterations(svd_niter: int | None) -> int | None:
    """`svd_niter` itself; UserError unless `principal_svd` takes it."""
    if svd_niter is not None and (not isinstance(svd_niter, int) or svd_niter < 0):
        raise UserError(f"svd_niter must be a whole number or None, not {svd_niter!r}")
    return svd_niter


def principal_svd(W: Tensor, r: int, niter: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular triples of W (d, k): U (d, r), S (r), V^T (r, k).

    Exact if `niter` is None or 0; else the randomised range finder of Halko, Martinsson and
    Tropp (2011), algorithms 4.4 and 5.1, with more than twice the directions asked for. Its
    random start has a seed of its own, so that every run and rank finds the same.
    """
    if not niter:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :r], S[:r], Vh[:r]
    directions = min(2 * r + 16, *W.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(W.shape[1], directions, generator=generator, dtype=W.dtype).to(W.device)
    Q = torch.linalg.qr(W @ start).Q
    for _ in range(niter):
        Q = torch.linalg.qr(W.T @ Q).Q
        Q = torch.linalg.qr(W @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return (Q @ U)[:, :r], S[:r], Vh[:r]
