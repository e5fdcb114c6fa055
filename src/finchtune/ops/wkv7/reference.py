"""The WKV7 recurrence, token by token: slow, differentiable, the oracle of every test."""

import torch
from torch import Tensor

from finchtune.ops.wkv import in_plain_torch


def recurrence(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step per token; arguments and results as in `wkv7_reference`, all in one dtype."""
    decay = torch.exp(-torch.exp(w))
    outputs = []
    for t in range(r.shape[1]):
        removed = (state @ a[:, t].unsqueeze(-1)) * b[:, t].unsqueeze(-2)
        written = v[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        state = state * decay[:, t].unsqueeze(-2) + removed + written
        outputs.append((state @ r[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1), state


def wkv7_reference(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`finchtune.wkv7`, token by token, in fp32 (in float64 for float64 inputs).

    S_t = S_{t-1} diag(exp(-exp(w_t))) + (S_{t-1} a_t) b_t^T + v_t k_t^T, y_t = S_t r_t.
    Source: "RWKV-7 Goose", arXiv 2503.14456, section 4.
    """
    return in_plain_torch(recurrence, (r, k, v, w, a, b), state, cu_seqlens)
