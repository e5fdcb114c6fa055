"""Shapes and work of the operators that are made of others: see cuda/operators/composite.h."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from finchtune.ops.kernels.fakes import shift_backward


def wanted(asked: bool, like: Tensor, of: Tensor) -> Tensor:
    """A gradient like one tensor, of the dtype of another; empty where not asked for."""
    return of.new_empty(like.shape if asked else 0)


def bone(x: Tensor, D: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """y (T, d), and the sums of x's shards (T, r)."""
    return x.new_empty(x.shape[0], W.shape[0]), x.new_empty(x.shape[0], D.shape[0])


def bone_backward(
    dy: Tensor, dsums: Any, sums: Tensor, D: Tensor, W: Tensor, of_x: bool, of_D: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x (T, k) and D."""
    return dy.new_empty((dy.shape[0], W.shape[1]) if of_x else 0), wanted(of_D, D, dy)


def bat_row(x: Tensor, D: Tensor, W: Tensor) -> Tensor:
    """y (T, d)."""
    return x.new_empty(x.shape[0], W.shape[0])


def bat_row_backward(dy: Tensor, x: Tensor, D: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and D."""
    return x.new_empty(x.shape), D.new_empty(D.shape)


def fixed_mixtures(x: Tensor, before: Any, cu_seqlens: Any, maa: list[Tensor]) -> list[Tensor]:
    """One blend (B, T, C) for each of maa."""
    return [x.new_empty(x.shape) for _ in maa]


def fixed_mixtures_backward(
    douts: Any,
    x: Tensor,
    before: Any,
    cu_seqlens: Any,
    maa: list[Tensor],
    of_before: bool,
    of_maa: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the rows before its sequences, and of maa (n, C)."""
    dx, before = shift_backward(x, x, None, x, cu_seqlens, None, of_before)
    return dx, before, x.new_empty((len(maa), x.shape[2]) if of_maa else 0)


def mixtures(
    x: Tensor,
    before: Any,
    cu_seqlens: Any,
    maa_x: Any,
    maa: list[Tensor],
    w1: Tensor,
    w2: Any,
) -> tuple[Tensor, list[Tensor]]:
    """The low-rank part (tokens, n M), and the blends (B, T, C)."""
    low = x.new_empty(x.shape[0] * x.shape[1], w1.shape[1])
    return low, fixed_mixtures(x, before, cu_seqlens, maa)


def mixtures_backward(
    douts: Any,
    x: Tensor,
    before: Any,
    cu_seqlens: Any,
    low: Tensor,
    maa_x: Tensor,
    maa: list[Tensor],
    w1: Tensor,
    w2: Tensor,
    of_before: bool,
    of_maa_x: bool,
    of_maa: bool,
    of_w1: bool,
    of_w2: bool,
) -> tuple[Tensor, ...]:
    """The gradients of x, before, maa_x, maa (n, C), w1 and w2."""
    dx, d_before, d_maa = fixed_mixtures_backward(
        douts, x, before, cu_seqlens, maa, of_before, of_maa
    )
    of_matrices = wanted(of_w1, w1, x), wanted(of_w2, w2, x)
    return dx, d_before, wanted(of_maa_x, maa_x, x), d_maa, *of_matrices


def low_ranks(
    x: list[Tensor], one: list[Tensor], two: list[Tensor], *_: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """y (T, d) of each, and its low-rank part (T, M)."""
    y = [own.new_empty(own.shape[0], last.shape[1]) for own, last in zip(x, two, strict=True)]
    return y, [own.new_empty(own.shape[0], W.shape[1]) for own, W in zip(x, one, strict=True)]


def low_ranks_backward(
    dy: list[Tensor],
    x: Any,
    low: Any,
    one: list[Tensor],
    two: list[Tensor],
    activations: Any,
    of_one: list[bool],
    of_two: list[bool],
    of_zero: list[bool],
) -> list[Tensor]:
    """The gradients of all x, one, two and zero."""
    of_x = [d.new_empty(d.shape[0], W.shape[0]) for d, W in zip(dy, one, strict=True)]
    zeros = [W[0] for W in two]
    others = (one, of_one), (two, of_two), (zeros, of_zero)
    made = (wanted(asked, W, W) for all, of in others for W, asked in zip(all, of, strict=True))
    return [*of_x, *made]


SHAPES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        bone,
        bone_backward,
        bat_row,
        bat_row_backward,
        fixed_mixtures,
        fixed_mixtures_backward,
        mixtures,
        mixtures_backward,
        low_ranks,
        low_ranks_backward,
    )
}


Size = Sequence[int]


def bone_flops(x: Size, D: Size, W: Size, *_: Any, **__: Any) -> int:
    """The products with W and D."""
    return 2 * x[0] * W[0] * (W[1] + D[0])


def bone_backward_flops(
    dy: Size, dsums: Any, sums: Any, D: Size, W: Size, of_x: bool, of_D: bool, **_: Any
) -> int:
    """Those of dx, and of dD."""
    return 2 * dy[0] * dy[1] * ((W[1] + D[0] if of_x else 0) + (D[0] if of_D else 0))


def bat_row_flops(x: Size, D: Size, W: Size, *_: Any, **__: Any) -> int:
    """The products with W, and within each shard."""
    return 2 * x[0] * (W[0] * W[1] + math.prod(D))


def bat_row_backward_flops(dy: Size, x: Size, D: Size, W: Size, *_: Any, **__: Any) -> int:
    """The product with W, and two within each shard."""
    return 2 * dy[0] * (W[0] * W[1] + 2 * math.prod(D))


def mixtures_flops(
    x: Size, before: Any, cu_seqlens: Any, maa_x: Any, maa: Any, w1: Size, w2: Any, **_: Any
) -> int:
    """The low-rank products: into w1's width, and out of a share of it for each blend."""
    return 4 * x[0] * x[1] * math.prod(w1)


def mixtures_backward_flops(douts: Any, x: Size, *rest: Any, **_: Any) -> int:
    """Back through both products, the blends made again, and the gradients of w1 and w2."""
    w1, of_w1, of_w2 = rest[5], rest[-2], rest[-1]
    return 2 * x[0] * x[1] * math.prod(w1) * (3 + of_w1 + of_w2)


def low_ranks_flops(x: list[Size], one: list[Size], two: list[Size], *_: Any, **__: Any) -> int:
    """Two products each."""
    return sum(
        2 * rows[0] * (math.prod(W) + math.prod(last))
        for rows, W, last in zip(x, one, two, strict=True)
    )


def low_ranks_backward_flops(
    dy: list[Size],
    x: Any,
    low: Any,
    one: list[Size],
    two: list[Size],
    activations: Any,
    of_one: list[bool],
    of_two: list[bool],
    *_: Any,
    **__: Any,
) -> int:
    """Back through both, and the gradients of one and two."""
    parts = zip(dy, one, two, of_one, of_two, strict=True)
    return sum(
        2 * d[0] * (math.prod(W) * (1 + first) + math.prod(last) * (1 + second))
        for d, W, last, first, second in parts
    )


FLOPS: dict[str, Callable[..., int]] = {
    "bone": bone_flops,
    "bone_backward": bone_backward_flops,
    "bat_row": bat_row_flops,
    "bat_row_backward": bat_row_backward_flops,
    "mixtures": mixtures_flops,
    "mixtures_backward": mixtures_backward_flops,
    "low_ranks": low_ranks_flops,
    "low_ranks_backward": low_ranks_backward_flops,
}
"""Multiplications and additions, by the shapes of the inputs."""


def register() -> None:
    """Tell torch the shapes that the operators return, and their work; once, when there are any."""
    for name, shapes in SHAPES.items():
        torch.library.register_fake(f"finchtune::{name}", shapes)
    for name, flops in FLOPS.items():
        register_flop_formula(getattr(torch.ops.finchtune, name))(flops)
