"""What the compiled operators return, as tensors without content: shapes and dtypes."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finchtune.ops.kernels.devices import device_type

CHECKPOINT_SPAN = 64  # tokens between the states that forward keeps for backward


@functools.cache
def has_bf16_tensor_cores(device: torch.device) -> bool:
    """Whether this GPU has compute capability 8.0; true for an imagined one."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def checkpoint_dtype(r: Tensor) -> torch.dtype:
    """bf16 where the tensor-core kernel runs, else fp32; the kernels check that they agree."""
    _, T, _, N = r.shape
    fits = device_type(r) == "cuda" and r.dtype == torch.bfloat16 and N == 64 and T > 16
    return torch.bfloat16 if fits and has_bf16_tensor_cores(r.device) else torch.float32


def forward_shapes(
    r: Tensor, cu_seqlens: Tensor | None, for_backward: bool, of_saved: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the new state, and the checkpoints for backward, in dtype `of_saved`."""
    B, T, H, N = r.shape
    n_sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # Every sequence adds at most one incomplete span.
    n_checkpoints = B * T // CHECKPOINT_SPAN + n_sequences if for_backward else 0
    checkpoints = r.new_empty(n_checkpoints, H, N, N, dtype=of_saved)
    new_state = r.new_empty(n_sequences, H, N, N, dtype=torch.float32)
    return r.new_empty(r.shape), new_state, checkpoints


def backward_shapes(inputs: tuple[Tensor, ...], state: Tensor | None) -> tuple[Tensor, ...]:
    """One gradient for each input, an empty one for a state that was not given."""
    of_state = inputs[0].new_empty(0 if state is None else state.shape, dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in inputs), of_state


def wkv6_forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Any, cu_seqlens: Any, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the new state, and the checkpoints for backward."""
    return forward_shapes(r, cu_seqlens, wanted, checkpoint_dtype(r))


def wkv6_backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Any, *_: Any
) -> tuple[Tensor, ...]:
    """The gradients of the six inputs, that of u in fp32 whatever its dtype."""
    *rest, of_u, of_state = backward_shapes((r, k, v, w, u), state)
    return *rest, of_u.new_empty(u.shape, dtype=torch.float32), of_state


def wkv7_forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y, the new state, and the checkpoints for backward."""
    *rows, _, cu_seqlens, wanted = inputs
    return forward_shapes(rows[0], cu_seqlens, wanted, torch.float32)


def wkv7_backward(*inputs: Any) -> tuple[Tensor, ...]:
    """The gradients of the seven inputs."""
    return backward_shapes(inputs[:6], inputs[6])


def cross_entropy_(logits: Tensor, labels: Tensor, l2wrap: float) -> Tensor:
    """A loss for each row."""
    return logits.new_empty(labels.shape, dtype=torch.float32)


def shard_sums(x: Tensor, r: int, dtype: torch.dtype) -> Tensor:
    """A sum for each row, (T, r)."""
    return x.new_empty(x.shape[0], r, dtype=dtype)


def add_to_shards_(x: Tensor, s: Tensor) -> None:
    """Nothing: x itself is changed."""


def bat_row_forward(x: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """The moved x, and the sums (T, r)."""
    return x.new_empty(x.shape), x.new_empty(x.shape[0], D.shape[1], dtype=torch.float32)


def bat_row_backward_(dx: Tensor, x: Tensor, D: Tensor, sums: Tensor) -> Tensor:
    """The gradient of D."""
    return D.new_empty(D.shape)


def unpack(
    codes: Tensor, scales: Any, table: Any, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The weight (rows, columns)."""
    return codes.new_empty(rows, columns, dtype=dtype)


def token_mix(x: Tensor, before: Any, cu_seqlens: Any, maa: Tensor) -> list[Tensor]:
    """One blend for each row of maa, n of (tokens, C)."""
    return [x.new_empty(x.flatten(0, 1).shape) for _ in maa]


def token_mix_(*_: Any) -> None:
    """The blends take the place of their weights."""


def token_mix_backward(
    douts: list[Tensor],
    x: Tensor,
    before: Any,
    cu_seqlens: Any,
    maa: Tensor,
    blends: Any,
    of_maa: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two sums over the blends (tokens, C), and the gradient of maa (n or none, C)."""
    sum_ = x.new_empty(x.flatten(0, 1).shape)
    of_each = maa.shape[0] if of_maa else 0
    dmaa = x.new_empty(of_each, x.shape[2], dtype=torch.float32)
    return sum_, torch.empty_like(sum_), dmaa


def shift_backward(
    sum: Tensor, blended: Tensor, more: Any, x: Tensor, cu_seqlens: Any, maa: Any, of_before: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and of the rows before its sequences (S or none, C)."""
    n_sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(n_sequences if of_before else 0, x.shape[2])


def gated_norm(y: Tensor, *_: Any) -> Tensor:
    """As y."""
    return y.new_empty(y.shape)


def gated_norm_backward(
    dout: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    of_weight: bool,
) -> tuple[Tensor, ...]:
    """The gradients of y, gate, weight and bias, the last two empty where not asked for."""
    of_each = y.new_empty(y.shape[1] if of_weight else 0, dtype=torch.float32)
    return y.new_empty(y.shape), y.new_empty(y.shape), of_each, torch.empty_like(of_each)


def added_norm(x: Tensor, y: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    """x + y, empty without y; its norm; two moments of each row."""
    rows = x.numel() // x.shape[-1]
    total = x.new_empty(0 if y is None else x.shape)
    return total, x.new_empty(x.shape), x.new_empty(rows, 2, dtype=torch.float32)


def added_norm_backward(
    dnormed: Tensor, dtotal: Any, total: Tensor, moments: Any, weight: Tensor, of_weight: bool
) -> tuple[Tensor, ...]:
    """The gradients of x, weight and bias, the last two empty where not asked for."""
    of_each = total.new_empty(weight.shape if of_weight else 0, dtype=torch.float32)
    return total.new_empty(total.shape), of_each, torch.empty_like(of_each)


def squared_relu(x: Tensor) -> Tensor:
    """As x."""
    return x.new_empty(x.shape)


def squared_relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    """As y."""
    return y.new_empty(y.shape)


def sigmoid_gate(gate: Tensor, y: Tensor) -> Tensor:
    """As y."""
    return y.new_empty(y.shape)


def sigmoid_gate_backward(dout: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and y."""
    return y.new_empty(y.shape), y.new_empty(y.shape)


def alike(*rows: Tensor) -> list[Tensor]:
    """A new tensor as each of these."""
    return [x.new_empty(x.shape) for x in rows]


def in_fp32(weights: list[Tensor], rows: Tensor, wanted: bool) -> list[Tensor]:
    """Their gradients (weights, channels), none unless wanted."""
    shape = len(weights), rows.shape[1]
    return [rows.new_empty(shape, dtype=torch.float32)] if wanted else []


def wkv7_inputs(rows: list[Tensor], values: list[Tensor], *_: Any) -> list[Tensor]:
    """k, w, a, b, and v where it is mixed."""
    return alike(*[rows[0]] * 4, *values[:1])


def wkv7_inputs_backward(
    douts: Any,
    rows: list[Tensor],
    values: list[Tensor],
    weights: list[Tensor],
    heads: int,
    eps: float,
    of_weights: bool,
) -> list[Tensor]:
    """The gradients of the rows and values, and that of the weights where asked for."""
    return [*alike(*rows, *values), *in_fp32(weights, rows[0], of_weights)]


def bonus_norm(rows: list[Tensor], *_: Any) -> Tensor:
    """As the rows."""
    return rows[0].new_empty(rows[0].shape)


def bonus_norm_backward(
    dout: Tensor,
    rows: list[Tensor],
    weights: list[Tensor],
    heads: int,
    eps: float,
    of_weights: bool,
) -> list[Tensor]:
    """The gradients of the rows, and that of the weights where asked for."""
    return [*alike(*rows), *in_fp32(weights, rows[0], of_weights)]


def products(x: list[Tensor], W: list[Tensor], activations: list[int]) -> list[Tensor]:
    """A row of each W's outputs for each row of its x."""
    return [one.new_empty(one.shape[0], own.shape[0]) for one, own in zip(x, W, strict=True)]


def coded_product(
    x: Tensor, codes: Tensor, scales: Tensor, table: Tensor | None, n_out: int, activation: int
) -> Tensor:
    """(rows, n_out)."""
    return x.new_empty(x.shape[0], n_out)


def fp8_rows(x: Tensor, factors: Any) -> tuple[Tensor, Tensor]:
    """Codes as x, and a scale for each row, (T, 1)."""
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return codes, x.new_empty(x.shape[0], 1, dtype=torch.float32)


def turn_bytes(codes: Tensor) -> Tensor:
    """(columns, rows)."""
    return codes.new_empty(codes.shape[1], codes.shape[0])


def wkv6_step_(r: Tensor, *_: Any) -> Tensor:
    """As r; the state itself is changed."""
    return r.new_empty(r.shape)


SHAPES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        wkv6_forward,
        wkv6_backward,
        wkv7_forward,
        wkv7_backward,
        cross_entropy_,
        shard_sums,
        add_to_shards_,
        bat_row_forward,
        bat_row_backward_,
        unpack,
        token_mix,
        token_mix_,
        token_mix_backward,
        shift_backward,
        gated_norm,
        gated_norm_backward,
        added_norm,
        added_norm_backward,
        squared_relu,
        squared_relu_backward,
        sigmoid_gate,
        sigmoid_gate_backward,
        wkv7_inputs,
        wkv7_inputs_backward,
        bonus_norm,
        bonus_norm_backward,
        products,
        coded_product,
        fp8_rows,
        turn_bytes,
        wkv6_step_,
    )
}
