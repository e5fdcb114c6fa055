"""Bat: every r x r shard of W is changed by an affine map with a trainable r x r matrix."""

from typing import Any

import torch
from torch import Tensor, nn

from finchtune.adapters.base import Adapter, check_positive_int, merge_precision
from finchtune.adapters.frozen import (
    compute_dtype,
    computes_fp8,
    dense_weight,
    product_back,
    product_plus,
    reads_codes,
    weight_parts,
)
from finchtune.adapters.quantise import Form
from finchtune.adapters.shards import (
    groups,
    move_shards,
    move_shards_backward,
    moves_shards,
    shard_sum,
)
from finchtune.errors import UserError

GROUP_ELEMENTS = {"cpu": 2**22, "cuda": 2**24}
"""Most elements of W' at once in mode "col": as many as its product needs to be fast."""


class Bat(Adapter):
    """y = W' x, where W' has the shards W_ab + W_ab D + D (a over output, b over input shards).

    DiSHA (arXiv 2409.15371). mode "row" (equation 5): D = D_b, parameter (k/r, r, r);
    mode "col" (equation 4): D = D_a, parameter (d/r, r, r). D is zero at first. W' is never
    kept: "row" keeps only x for backward, "col" only x (W and D are there anyway).

    Raises UserError unless r divides both sides of W.
    """

    name = "bat"
    help = {
        "r": "side of a shard; must divide both sides of every layer",
        "mode": "a D per shard of the input (row) or output (col)",
    }
    choices = {"mode": ("row", "col")}
    freezes_W = True

    def __init__(
        self, in_features: int, out_features: int, *, r: int = 64, mode: str = "row"
    ) -> None:
        super().__init__(in_features, out_features)
        check_positive_int("r", r)
        if mode not in ("row", "col"):
            raise UserError(f'bat has the modes "row" and "col", not {mode!r}')
        if in_features % r or out_features % r:
            raise UserError(
                f"bat needs an r that divides both sides of a weight, but r = {r} does not divide "
                f"in_features = {in_features} and out_features = {out_features}; choose another r"
            )
        self.r = r
        self.mode = mode
        self.reads_W = mode == "col"
        count = (in_features if mode == "row" else out_features) // r
        self.bone = nn.Parameter(torch.zeros(count, r, r))

    def init(self, W: Tensor) -> None:
        nn.init.zeros_(self.bone)

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        tokens, D = x.reshape(-1, self.in_features).to(dtype), self.bone.to(dtype)
        if self.mode == "row":
            y = BatRow.apply(tokens, D, *weight_parts(W, dtype))
        else:
            y = BatCol.apply(tokens, W.to(dtype), D)
        return y.view(*x.shape[:-1], self.out_features)

    def merged(self, W: Tensor) -> Tensor:
        dtype = merge_precision(W)
        W, D = W.detach().to(dtype), self.bone.detach().to(W.device, dtype)
        if self.mode == "col":
            return changed(W, D)
        shards = W.reshape(-1, self.r, self.in_features // self.r, self.r)
        moved = torch.einsum("aibl,blj->aibj", shards, D)
        return moved.add_(shards).add_(D.transpose(0, 1)).reshape(W.shape)

    def shard_map(self) -> Tensor | None:
        return self.bone if self.mode == "row" else None

    def unmerged(self, W: Tensor) -> Tensor:
        """Solves W'_ab = W_ab (1 + D) + D for W_ab."""
        dtype = merge_precision(W)
        W, D = W.detach().to(dtype), self.bone.detach().to(W.device, dtype)
        shards = (W - self.merged(torch.zeros_like(W))).reshape(
            -1, self.r, self.in_features // self.r, self.r
        )
        # One shard row or column of shards to each D, its rows one below the other.
        shared, each = (2, 0) if self.mode == "row" else (0, 2)
        stacked = shards.movedim((shared, each), (0, 1)).flatten(1, 2)
        solved = torch.linalg.solve(torch.eye(self.r, dtype=dtype, device=W.device) + D, stacked,
                                    left=False)  # fmt: skip
        back = solved.unflatten(1, (-1, self.r)).movedim((0, 1), (shared, each))
        return back.reshape(W.shape)


class BatRow(torch.autograd.Function):
    """W' x for Bat-row, with W frozen, without ever building W'. Keeps x, W and D.

    With u_b = D_b x_b it is W (x + u) + tile(sum_b u_b), because
    (W_ab + W_ab D_b + D_b) x_b = W_ab (x_b + D_b x_b) + D_b x_b.

    Inputs and saved tensors only, no module attribute: parameters may be gathered and released
    around forward and backward. Here and in BatCol.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, D: Tensor, main: Tensor, scales: Tensor | None, form: Form | None
    ) -> Tensor:
        """x (T, k), D (k/r, r, r) of one dtype and the parts of a W (d, k) -> (T, d)."""
        assert not ctx.needs_input_grad[2], "bat has no gradient for W"
        ctx.save_for_backward(x, D, main, scales)
        ctx.form = form
        if moves_shards(x, D) and not reads_codes(x, form):
            W = dense_weight(main, scales, form, D.dtype)
            return torch.ops.finchtune.bat_row(x, D, W)
        moved, sums = move_shards(x, D)
        return product_plus(sums.to(x.dtype), None, moved, main, scales, form)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """q_b = (W^T dy)_b + sum_a dy_a; dD_b = q_b x_b^T; dx = W^T dy + D^T q."""
        x, D, main, scales = ctx.saved_tensors
        if moves_shards(dy, D) and not computes_fp8(dy, ctx.form):
            W = dense_weight(main, scales, ctx.form, dy.dtype)
            return *torch.ops.finchtune.bat_row_backward(dy, x, D, W), None, None, None
        dx = product_back(dy, main, scales, ctx.form)
        sums = shard_sum(dy, D.shape[1], merge_precision(dy))
        dD = move_shards_backward(dx, x, D, sums)
        return dx, dD, None, None, None


class BatCol(torch.autograd.Function):
    """W' x for Bat-col, with W frozen, W' rebuilt part by part. Keeps x, W and D, never W'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, D: Tensor) -> Tensor:
        """x (T, k), W (d, k), D (d/r, r, r) of one dtype -> (T, d)."""
        assert not ctx.needs_input_grad[1], "bat has no gradient for W"
        ctx.save_for_backward(x, W, D)
        W = W.unflatten(0, D.shape[:2])
        y = x.new_empty(len(x), *D.shape[:2])
        for part in groups(D, x.shape[1], GROUP_ELEMENTS):
            y[:, part] = (x @ changed(W[part], D[part]).T).unflatten(1, D[part].shape[:2])
        return y.flatten(1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor]:
        """dx = dy W'; dD_a = sum_b (W_ab + I)^T dW'_ab with dW' = dy^T x."""
        x, W, D = ctx.saved_tensors
        W, dy = W.unflatten(0, D.shape[:2]), dy.unflatten(1, D.shape[:2])
        dx, dD = torch.zeros_like(x), torch.empty_like(D)
        for part in groups(D, x.shape[1], GROUP_ELEMENTS):
            dy_part = dy[:, part].flatten(1)
            dx.addmm_(dy_part, changed(W[part], D[part]))
            dW = blocks_of(dy_part.T @ x, D[part])
            through_W = torch.bmm(blocks_of(W[part], D[part]).mT, dW)
            dD[part] = through_W + dW.unflatten(1, (D.shape[1], -1)).sum(2)
        return dx, None, dD


def changed(W: Tensor, D: Tensor) -> Tensor:
    """The shards W_ab + W_ab D_a + D_a for n shard rows of W, D (n, r, r) -> (n r, k)."""
    shards = blocks_of(W, D)
    moved = torch.baddbmm(shards, shards, D).unflatten(1, (D.shape[1], -1))
    return moved.add_(D.unsqueeze(2)).view(D.shape[0] * D.shape[1], -1)


def blocks_of(W: Tensor, D: Tensor) -> Tensor:
    """n shard rows of W, with n r k elements, as (n, k, r): one row for each row of a shard."""
    return W.reshape(D.shape[0], -1, D.shape[2])
