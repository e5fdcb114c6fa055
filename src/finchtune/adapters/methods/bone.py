"""Bone: one trainable r x d matrix, shared by all shards of the input."""

from typing import Any

import torch
from torch import Tensor, nn

from finchtune.adapters.base import Adapter, check_at_most, check_positive_int, merge_precision
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
    add_to_each_shard,
    add_to_shards,
    compiled,
    shard_sum,
    tiled_identity,
)


class Bone(Adapter):
    """y = W x + (sum over shards of x viewed as (k/r, r)) D, with D (r, d) zero at first.

    DiSHA (arXiv 2409.15371), equation 3. Any in_features: x is padded with zeros up to a
    multiple of r. Only the shard sums (..., r) are saved for backward, not x.
    """

    name = "bone"
    help = {"r": "rows of D, the length of an input shard"}
    output_dims = {"bone": 1}

    def __init__(self, in_features: int, out_features: int, *, r: int = 64) -> None:
        super().__init__(in_features, out_features)
        check_positive_int("r", r)
        check_at_most("r", r, in_features, "the layer's in_features")
        self.r = r
        self.bone = nn.Parameter(torch.zeros(r, out_features))

    def init(self, W: Tensor) -> None:
        nn.init.zeros_(self.bone)

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        tokens, D = x.reshape(-1, self.in_features).to(dtype), self.bone.to(dtype)
        y, _ = BoneLinear.apply(tokens, D, *weight_parts(W, dtype))
        return y.view(*x.shape[:-1], self.out_features)

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        return tiled_identity(self.r, self.in_features), self.bone.detach().T, 1.0

    def merged(self, W: Tensor) -> Tensor:
        merged = W.detach().to(merge_precision(W), copy=True)
        add_to_each_shard(merged, self.bone.detach().to(merged).T.contiguous())
        return merged


class BoneLinear(torch.autograd.Function):
    """x W^T + s D with s the sums of x's shards, and gradients for x, D and W.

    s is an output too, so that autograd knows what it depends on when it differentiates twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, D: Tensor, main: Tensor, scales: Tensor | None, form: Form | None
    ) -> tuple[Tensor, Tensor]:
        """x (T, k), D (r, d) of one dtype and the parts of a W (d, k) -> (T, d), s (T, r)."""
        if compiled(x, D) and not reads_codes(x, form):
            W = dense_weight(main, scales, form, x.dtype)
            y, s = torch.ops.finchtune.bone(x, D, W)
        else:
            s = shard_sum(x, len(D))
            y = product_plus(s, D, x, main, scales, form)
        ctx.save_for_backward(s, D, x if ctx.needs_input_grad[2] else None, main, scales)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        """dx = dy W + (dy D^T + ds) on each shard, dD = s^T dy, dW = dy^T x, where asked for."""
        s, D, x, main, scales = ctx.saved_tensors
        of_x, of_D, of_W = ctx.needs_input_grad[:3]
        if dy is None:  # only when differentiating twice
            dy = s.new_zeros(len(s), D.shape[1])
        dW = dy.T @ x if of_W else None
        if compiled(dy, D) and not computes_fp8(dy, ctx.form):
            W = dense_weight(main, scales, ctx.form, dy.dtype) if of_x else D
            dx, dD = torch.ops.finchtune.bone_backward(dy, ds, s, D, W, of_x, of_D)
            return dx if of_x else None, dD if of_D else None, dW, None, None
        dx = None
        if of_x:
            dx = product_back(dy, main, scales, ctx.form)
            # Into dx itself: a gradient of s spread out and then added would take two more.
            add_to_shards(dx, dy @ D.T if ds is None else torch.addmm(ds, dy, D.T))
        return dx, s.T @ dy if of_D else None, dW, None, None
