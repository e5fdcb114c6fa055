"""Bat: every r x r block of W is changed by an affine map with a trainable r x r matrix."""

from typing import Any

import torch
from torch import Tensor, nn

from finchtune.adapters.base import Adapter, check_positive_int, merge_precision
from finchtune.adapters.frozen import compute_dtype
from finchtune.errors import UserError

GROUP_ELEMENTS = {"cpu": 2**21, "cuda": 2**24}
"""Largest temporary tensor: one that a CPU's cache holds; on a GPU few but full launches."""


class Bat(Adapter):
    """y = W' x, where W' has the blocks W_ab + W_ab D + D (a over output, b over input blocks).

    DiSHA (arXiv 2409.15371). mode "row" (equation 5): D = D_b, parameter (k/r, r, r);
    mode "col" (equation 4): D = D_a, parameter (d/r, r, r). D is zero at first. W' is never
    kept: "row" keeps only x for backward, "col" only x (W and D are there anyway).

    Raises UserError unless r divides both sides of W.
    """

    name = "bat"

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
        count = (in_features if mode == "row" else out_features) // r
        self.bone = nn.Parameter(torch.zeros(count, r, r))

    def init(self, W: Tensor) -> None:
        nn.init.zeros_(self.bone)

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        change = BatRow if self.mode == "row" else BatCol
        tokens = x.reshape(-1, self.in_features).to(dtype)
        y = change.apply(tokens, W.to(dtype), self.bone.to(dtype))
        return y.view(*x.shape[:-1], self.out_features)

    def merged(self, W: Tensor) -> Tensor:
        dtype = merge_precision(W)
        W, D = W.detach().to(dtype), self.bone.detach().to(W.device, dtype)
        if self.mode == "col":
            return changed_rows(W, D)
        blocks = W.reshape(-1, self.r, self.in_features // self.r, self.r)
        return (blocks + torch.einsum("aibl,blj->aibj", blocks, D) + D.transpose(0, 1)).reshape(
            W.shape
        )


class BatRow(torch.autograd.Function):
    """W' x for Bat-row, with W frozen, without ever building W'. Keeps x, W and D.

    With u_b = D_b x_b it is W (x + u) + tile(sum_b u_b), because
    (W_ab + W_ab D_b + D_b) x_b = W_ab (x_b + D_b x_b) + D_b x_b.

    Inputs and saved tensors only, no module attribute: parameters may be gathered and released
    around forward and backward. Here and in BatCol.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, D: Tensor) -> Tensor:
        """x (T, k), W (d, k), D (k/r, r, r) of one dtype -> (T, d)."""
        assert not ctx.needs_input_grad[1], "bat has no gradient for W"
        ctx.save_for_backward(x, W, D)
        r = D.shape[-1]
        moved = torch.empty_like(x)
        sums = x.new_zeros(x.shape[0], r, dtype=torch.promote_types(x.dtype, torch.float32))
        for channels, blocks in groups(D, len(x)):
            u = torch.bmm(blocked(x[:, channels], r), D[blocks].mT)
            moved[:, channels] = x[:, channels] + unblocked(u)
            sums += u.sum(0)
        y = moved @ W.T
        y.unflatten(-1, (-1, r)).add_(sums.to(y.dtype).unsqueeze(1))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor]:
        """q_b = (W^T dy)_b + sum_a dy_a; dD_b = q_b x_b^T; dx = W^T dy + D^T q."""
        x, W, D = ctx.saved_tensors
        r = D.shape[-1]
        dx = dy @ W
        dD = torch.empty_like(D)
        sums = dy.unflatten(-1, (-1, r)).sum(1)
        for channels, blocks in groups(D, len(x)):
            # Contiguous: a bmm of the transposed view would be slow in bfloat16 on a CPU.
            q = (blocked(dx[:, channels], r) + sums).contiguous()
            dD[blocks] = torch.bmm(q.mT, blocked(x[:, channels], r))
            dx[:, channels] += unblocked(torch.bmm(q, D[blocks]))
        return dx, None, dD


def blocked(x: Tensor, r: int) -> Tensor:
    """A view of x (T, k) as blocks of r channels, (k/r, T, r)."""
    return x.unflatten(-1, (-1, r)).transpose(0, 1)


def unblocked(x: Tensor) -> Tensor:
    """The reverse of `blocked`, as a copy: (k/r, T, r) -> (T, k)."""
    return x.transpose(0, 1).flatten(1)


def changed_rows(W: Tensor, D: Tensor) -> Tensor:
    """The blocks W_ab + W_ab D_a + D_a for rows of W: (n r, k) and D (n, r, r) -> (n r, k)."""
    n, r, _ = D.shape
    blocks = W.reshape(n, -1, r)
    changed = torch.baddbmm(blocks, blocks, D).view(n, r, -1, r)
    return changed.add_(D.unsqueeze(2)).view(W.shape)


class BatCol(torch.autograd.Function):
    """W' x for Bat-col, with W frozen, W' rebuilt tile by tile. Keeps x, W and D, never W'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, D: Tensor) -> Tensor:
        """x (T, k), W (d, k), D (d/r, r, r) of one dtype -> (T, d)."""
        assert not ctx.needs_input_grad[1], "bat has no gradient for W"
        ctx.save_for_backward(x, W, D)
        y = x.new_empty(x.shape[0], W.shape[0])
        for rows, blocks in groups(D, x.shape[1]):
            torch.mm(x, changed_rows(W[rows], D[blocks]).T, out=y[:, rows])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        """dx = dy W'; dD_a = sum_b (W_ab + I)^T dW'_ab with dW' = dy^T x."""
        x, W, D = ctx.saved_tensors
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dD = torch.empty_like(D) if ctx.needs_input_grad[2] else None
        for rows, blocks in groups(D, x.shape[1]):
            if dx is not None:
                dx.addmm_(dy[:, rows], changed_rows(W[rows], D[blocks]))
            if dD is not None:
                n, r, _ = D[blocks].shape
                dW = (dy[:, rows].T @ x).view(n, r, -1, r)
                through_W = W[rows].view(n, -1, r).transpose(1, 2) @ dW.view(n, -1, r)
                dD[blocks] = through_W + dW.sum(2)
        return dx, None, dD


def groups(D: Tensor, length: int) -> list[tuple[slice, slice]]:
    """D's blocks in groups, as (rows or columns of W, blocks of D).

    A temporary tensor of one group's rows or columns by `length` stays within GROUP_ELEMENTS.
    """
    count, r, _ = D.shape
    elements = GROUP_ELEMENTS.get(D.device.type, GROUP_ELEMENTS["cuda"])
    step = max(1, elements // max(1, length) // r)
    starts = range(0, count, step)
    return [(slice(i * r, min(i + step, count) * r), slice(i, i + step)) for i in starts]
