"""What the plain torch forms share: their precision, and packed sequences one at a time."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def compute_dtype(r: Tensor) -> torch.dtype:
    """fp32, or float64 for float64 inputs: the dtype of all sums and of the state."""
    return torch.float64 if r.dtype == torch.float64 else torch.float32


def zero_state(r: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The state before the first token of every sequence, (B or n, H, N, N)."""
    B, _, H, N = r.shape
    n_sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
    return r.new_zeros(n_sequences, H, N, N, dtype=compute_dtype(r))


def for_each_sequence(
    form: Callable[..., tuple[Tensor, Tensor]],
    inputs: list[Tensor],
    u: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Apply `form(r, k, v, w, u, state)` to a batch, or to each packed sequence with its state.

    `inputs` are r, k, v, w (B, T, H, N), already in the dtype to compute in.
    """
    r = inputs[0]
    state = zero_state(r, cu_seqlens) if state is None else state.to(r.dtype)
    if cu_seqlens is None:
        return form(*inputs, u, state)
    outputs, states = [], []
    bounds = cu_seqlens.tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        own = state[i : i + 1]
        if end > start:
            y, own = form(*(x[:, start:end] for x in inputs), u, own)
            outputs.append(y)
        states.append(own)
    return torch.cat(outputs, dim=1), torch.cat(states)
