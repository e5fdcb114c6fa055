"""Products with a frozen weight computed in fp8: both factors e4m3, each row with a scale.

GPUs of compute capability 8.9 and later multiply e4m3 numbers at twice bf16's speed. A row of x or
of the gradient is divided by its largest magnitude over 448 and rounded; the sums are exact to fp32
on a CPU, and of fewer bits inside a GPU's tensor cores.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.flop_counter import register_flop_formula

from finchtune.errors import UserError
from finchtune.ops.kernels import device_type, fits

LARGEST_E4M3 = 448.0
E4M3 = torch.float8_e4m3fn

PRODUCT, PRODUCT_BACK = "finchtune::fp8_product", "finchtune::fp8_product_back"
torch.library.define(
    PRODUCT, "(Tensor x, Tensor codes, Tensor scales, Tensor? s, Tensor? D) -> Tensor y"
)
torch.library.define(PRODUCT_BACK, "(Tensor dy, Tensor codes, Tensor scales) -> Tensor dx")


@functools.cache
def can_multiply(device: torch.device) -> bool:
    """Whether a device multiplies e4m3 matrices; a CPU does slowly, for tests.

    A GPU is tried: which ones can depends on its libraries too.
    """
    if device.type != "cuda" or not torch.cuda.is_available():  # an imagined one can
        return True
    with unset_fake_temporarily():
        ones = torch.ones(16, 1, device=device)
        rows = ones.expand(16, 64).to(E4M3).contiguous()
        try:
            multiplied(rows, ones, rows, ones, ones, fast=True)
        except RuntimeError:
            return False
    return True


def check_fp8(shape: torch.Size, device: torch.device) -> None:
    """Raise UserError where a weight (out, in) cannot be multiplied with in fp8."""
    if shape[0] % 16 or shape[1] % 64:
        raise UserError(
            f"`quant` fp8_compute needs layers whose outputs are a multiple of 16 and inputs of "
            f"64, and one is {shape[0]} x {shape[1]}; give `quant` fp8"
        )
    check_fp8_device(device)


def check_fp8_device(device: torch.device) -> None:
    """Raise UserError for a device without products in fp8."""
    if not can_multiply(device):
        raise UserError(
            f"`quant` fp8_compute: {torch.cuda.get_device_name(device)} has no products in fp8 "
            f"with torch {torch.__version__}; give `quant` fp8"
        )


def over_scales(values: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Rows (n, k) fp32, each over its scale, and the scales (n, 1): largest magnitudes / `largest`.

    Rows of zeros, whose scale is 0, stay.
    """
    # By a tensor of this device: by a number, a GPU multiplies with the reciprocal, and scales that
    # differ from a CPU's in the last bit make another base.
    scales = values.abs().amax(1, keepdim=True) / values.new_full((), largest)
    return values / torch.where(scales == 0, 1, scales), scales


def to_e4m3(scaled: Tensor) -> Tensor:
    """The nearest of e4m3's numbers, also of what a rounded scale leaves beyond the largest."""
    return scaled.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(E4M3)


def rounded_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (T, k), its columns times `factors` (k) -> e4m3 (T, k) and scales (T, 1) fp32."""
    if device_type(x) == "cuda" and fits(x):
        return torch.ops.finchtune.fp8_rows(x, factors)
    values = x.float() if factors is None else x.float() * factors
    scaled, scales = over_scales(values, LARGEST_E4M3)
    return to_e4m3(scaled), scales


def turned(codes: Tensor) -> Tensor:
    """Bytes (d, k) -> (k, d), dense: tensor cores take fp8 factors in one layout alone."""
    if device_type(codes) == "cuda" and fits(codes.new_empty(0, dtype=torch.float32)):
        return torch.ops.finchtune.turn_bytes(codes)
    return codes.T.contiguous()


def multiplied(
    x: Tensor, of_x: Tensor, W: Tensor, of_W: Tensor, like: Tensor, fast: bool
) -> Tensor:
    """x W^T for e4m3 x (T, k) and W (d, k) and scales of their rows, in the dtype of `like`.

    `fast` lets a GPU sum up in fewer bits, as Hopper does.
    """
    dtype = like.dtype if x.device.type == "cpu" else torch.bfloat16  # what every GPU has
    scales = of_x, of_W.view(1, -1)
    y = torch._scaled_mm(x, W.T, *scales, out_dtype=dtype, use_fast_accum=fast)
    return y.to(like.dtype)


def plus(y: Tensor, s: Tensor, D: Tensor | None) -> Tensor:
    """y + s D, in place; without D, s is repeated beside itself as often as y is wider."""
    if D is not None:
        return y.addmm_(s, D)
    y.unflatten(1, (-1, s.shape[1])).add_(s.unsqueeze(1))
    return y


def fp8_product(
    x: Tensor, codes: Tensor, scales: Tensor, s: Tensor | None = None, D: Tensor | None = None
) -> Tensor:
    """x W^T + s D for x (T, k), and W's codes and scales (d), the bits of fp32; s (T, r), D (r, d).

    Without D, s is repeated d / r times. No gradients: autograd functions call it.
    """
    return torch.ops.finchtune.fp8_product(x, codes, scales, s, D)


def fp8_product_back(dy: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """dy W (T, k) of dy (T, d), with the codes of `fp8_product`.

    The scale of each row of W, over which the sum runs, is multiplied into dy before that is
    rounded; so the codes serve both directions.
    """
    return torch.ops.finchtune.fp8_product_back(dy, codes, scales)


@torch.library.impl(PRODUCT, "CompositeExplicitAutograd")
def _(x: Tensor, codes: Tensor, scales: Tensor, s: Tensor | None, D: Tensor | None) -> Tensor:
    rows, of_rows = rounded_rows(x)
    W = codes.view(len(scales), -1).view(E4M3)
    y = multiplied(rows, of_rows, W, scales.view(torch.float32), x, fast=True)
    return y if s is None else plus(y, s, D)


@torch.library.impl(PRODUCT_BACK, "CompositeExplicitAutograd")
def _(dy: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    rows, of_rows = rounded_rows(dy, scales.view(torch.float32))
    W = turned(codes.view(len(scales), -1)).view(E4M3)
    return multiplied(rows, of_rows, W, of_rows.new_ones(len(W)), dy, fast=False)


@torch.library.register_fake(PRODUCT)
def _(x: Tensor, codes: Tensor, scales: Tensor, s: Any, D: Any) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[0])


@torch.library.register_fake(PRODUCT_BACK)
def _(dy: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[0], codes.numel() // scales.shape[0])


@register_flop_formula(torch.ops.finchtune.fp8_product)
def _(x: Any, codes: Any, scales: Any, s: Any = None, D: Any = None, **_: Any) -> int:
    return 2 * x[0] * scales[0] * (x[1] + (D[0] if D else 0))


@register_flop_formula(torch.ops.finchtune.fp8_product_back)
def _(dy: Any, codes: Any, scales: Any, **_: Any) -> int:
    return 2 * dy[0] * codes[0] * codes[1]
