"""A linear layer that is never trained, keeping as little as possible for backward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from finchtune.adapters.fp8 import can_multiply, fp8_product, fp8_product_back, plus
from finchtune.adapters.quantise import (
    BY_ROW,
    Form,
    QuantisedWeight,
    code_table,
    dequantise,
    of_blocks,
)
from finchtune.ops.kernels import device_type, fits

Weight = Tensor | QuantisedWeight
Parts = tuple[Tensor, Tensor | None, Form | None]
"""What an autograd function takes in of a W: itself, or its codes and scales and their form."""


MOST_ROWS = 8  # that a product with codes on a GPU takes; above, rebuilding W costs little


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer computes: autocast's where that is on, else that of x."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def weight_parts(W: Weight, dtype: torch.dtype) -> Parts:
    """A W for an autograd function that computes in `dtype`."""
    if isinstance(W, QuantisedWeight):
        return W.codes, W.scales, W.form
    return W.to(dtype), None, None


def dense_weight(
    main: Tensor, scales: Tensor | None, form: Form | None, dtype: torch.dtype
) -> Tensor:
    """W (out, in) from its parts; a quantised one is rebuilt."""
    if scales is None or form is None:
        return main
    return dequantise(main, scales, form, dtype)


def computes_fp8(x: Tensor, form: Form | None) -> bool:
    """Whether products of x with a weight of this form are made in fp8."""
    narrow = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return form is not None and form[0] == BY_ROW and narrow and can_multiply(x.device)


def are_few(x: Tensor, form: Form | None) -> bool:
    """Whether x (..., k) is so few rows on a GPU that their product reads a W's codes itself."""
    if form is None or device_type(x) != "cuda" or x.numel() > MOST_ROWS * x.shape[-1]:
        return False
    return x.shape[-1] % 32 == 0 and x.numel() > 0 and fits(x)


def reads_codes(x: Tensor, form: Form | None) -> bool:
    """Whether x W^T is made of W's codes, without rebuilding W."""
    return computes_fp8(x, form) or are_few(x, form)


def coded_product(
    x: Tensor, codes: Tensor, scales: Tensor, form: Form, activation: int = 0
) -> Tensor:
    """activation(x W^T) of few rows (n, k), exact but for fp32 sums. No gradients.

    `activation` is one of the operator's, 0 for none.
    """
    kind, (n_out, _) = form
    factors = of_blocks(scales, form).view(torch.float32)
    return torch.ops.finchtune.coded_product(x, codes, factors, code_table(kind), n_out, activation)


def product(x: Tensor, main: Tensor, scales: Tensor | None, form: Form | None) -> Tensor:
    """x W^T (..., d) for x (..., k) and the parts of a W (d, k)."""
    if scales is not None and form is not None:
        if computes_fp8(x, form):
            return fp8_product(x.flatten(0, -2), main, scales).view(*x.shape[:-1], -1)
        if are_few(x, form):
            y = coded_product(x.flatten(0, -2), main, scales, form)
            return y.view(*x.shape[:-1], -1)
    return x @ dense_weight(main, scales, form, x.dtype).T


def product_back(dy: Tensor, main: Tensor, scales: Tensor | None, form: Form | None) -> Tensor:
    """dy W (..., k) for dy (..., d) and the parts of a W (d, k)."""
    if scales is None or not computes_fp8(dy, form):
        return dy @ dense_weight(main, scales, form, dy.dtype)
    return fp8_product_back(dy.flatten(0, -2), main, scales).view(*dy.shape[:-1], -1)


PRODUCT_PLUS = "finchtune::product_plus"
torch.library.define(PRODUCT_PLUS, "(Tensor s, Tensor? D, Tensor x, Tensor W) -> Tensor y")


def product_plus(
    s: Tensor, D: Tensor | None, x: Tensor, main: Tensor, scales: Tensor | None, form: Form | None
) -> Tensor:
    """x W^T + s D for s (n, r), D (r, d), x (n, k) and the parts of a W (d, k).

    Without D, s is repeated d / r times. Added in place. As one operator that is invisible to
    selective recomputation, which keeps the result and could not if it saw it written to. No
    gradients: autograd functions call it.
    """
    if scales is not None and computes_fp8(x, form):
        return fp8_product(x, main, scales, s, D)
    if scales is not None and form is not None and are_few(x, form):
        return plus(coded_product(x, main, scales, form), s, D)
    return torch.ops.finchtune.product_plus(s, D, x, dense_weight(main, scales, form, x.dtype))


# For devices and dtypes that the compiled form, which takes its place on a CPU, is not for.
@torch.library.impl(PRODUCT_PLUS, "CompositeExplicitAutograd")
def plain_product_plus(s: Tensor, D: Tensor | None, x: Tensor, W: Tensor) -> Tensor:
    return plus(x @ W.T, s, D)


@torch.library.register_fake(PRODUCT_PLUS)
def _(s: Tensor, D: Tensor | None, x: Tensor, W: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], W.shape[0])


@register_flop_formula(torch.ops.finchtune.product_plus)
def product_plus_flops(s: Any, D: Any, x: Any, W: Any, *_: Any, **__: Any) -> int:
    """Multiplications and additions, by the shapes of the inputs."""
    return 2 * x[0] * W[0] * (x[1] + (D[0] if D else 0))


def frozen_linear(x: Tensor, W: Weight) -> Tensor:
    """y = W x for x (..., k), W (d, k) -> (..., d), keeping W alone for backward.

    A quantised W is rebuilt here and again in backward, unless the product reads the codes: only
    they are saved. F.linear keeps a transposed view of W, which holds on to the gathered weight
    where ZeRO-3 has partitioned it again; DeepSpeed's replacement of F.linear keeps x, trained or
    not.
    """
    if isinstance(W, Tensor) and W.requires_grad:
        return F.linear(x, W)
    dtype = compute_dtype(x)
    return FrozenLinear.apply(x.to(dtype), *weight_parts(W, dtype))


def low_rank_linear(
    x: Tensor, W: Weight, A: Tensor, B: Tensor, scale: float, dropped: Tensor | None = None
) -> Tensor:
    """W x + scale B A x for x (..., k), W (d, k), A (r, k), B (d, r) -> (..., d).

    With `dropped`, B A is applied to that in place of x. Keeps the input of A, A x, A, W and B for
    backward, and x where W is trained.
    """
    dtype = compute_dtype(x)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    other = None if dropped is None else dropped.reshape(rows.shape).to(dtype)
    parts = weight_parts(W, dtype)
    y, _ = LowRankLinear.apply(rows, other, A.to(dtype), B.to(dtype), scale, *parts)
    return y.view(*x.shape[:-1], W.shape[0])


class FrozenLinear(torch.autograd.Function):
    """W x with no gradient for W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, main: Tensor, scales: Tensor | None, form: Form | None
    ) -> Tensor:
        """x (..., k) and the parts of a W (d, k), of one dtype -> (..., d)."""
        ctx.save_for_backward(main, scales)
        ctx.form = form
        return product(x, main, scales, form)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        """dx = W^T dy."""
        main, scales = ctx.saved_tensors
        return product_back(dy, main, scales, ctx.form), None, None, None


class LowRankLinear(torch.autograd.Function):
    """x W^T + s B^T with s = scale z A^T, and gradients for all four; z is x or another tensor.

    s is an output too, so that autograd knows what it depends on when it differentiates twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        other: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        main: Tensor,
        scales: Tensor | None,
        form: Form | None,
    ) -> tuple[Tensor, Tensor]:
        """x and other (n, k), A (r, k), B (d, r), the parts of a W (d, k) -> (n, d), s (n, r)."""
        z = x if other is None else other
        s = (z @ A.T) * scale
        x_of_W = x if ctx.needs_input_grad[5] else None
        ctx.save_for_backward(z, s, A, B, x_of_W, main, scales)
        ctx.of_x_alone, ctx.scale, ctx.form = other is None, scale, form
        return product_plus(s, B.T, x, main, scales, form), s

    @staticmethod
    def backward(ctx: Any, dy: Tensor, ds: Tensor) -> tuple[Tensor | None, ...]:
        """dz = scale (dy B + ds) A, dx = dy W, in place with dz where z is x, and so on."""
        z, s, A, B, x, main, scales = ctx.saved_tensors
        of_x, of_z, of_A, of_B, _, of_W = ctx.needs_input_grad[:6]
        ds = torch.addmm(ds, dy, B) * ctx.scale
        dx = product_back(dy, main, scales, ctx.form) if of_x else None
        if dx is not None and ctx.of_x_alone:
            dx.addmm_(ds, A)
        return (
            dx,
            ds @ A if of_z else None,
            ds.T @ z if of_A else None,
            dy.T @ s if of_B else None,
            None,
            dy.T @ x if of_W else None,
            None,
            None,
        )
