"""The WKV6 recurrence as the paper writes it: slow, differentiable, the oracle of every test."""

from functools import partial

import torch
from torch import Tensor

from finchtune.ops.wkv import compute_dtype, in_plain_torch


def recurrence(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step per token; arguments and results as in `wkv6_reference`, all in one dtype."""
    decay = torch.exp(-torch.exp(w))
    outputs = []
    for t in range(r.shape[1]):
        kv = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append((r[:, t].unsqueeze(-2) @ (state + u.unsqueeze(-1) * kv)).squeeze(-2))
        state = decay[:, t].unsqueeze(-1) * state + kv
    return torch.stack(outputs, dim=1), state


def wkv6_reference(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`finchtune.ops.wkv6.wkv6`, token by token, in fp32 (in float64 for float64 inputs).

    y_t = r_t (S_t + diag(u) k_t^T v_t), S_{t+1} = diag(exp(-exp(w_t))) S_t + k_t^T v_t.
    Source: "Eagle and Finch", arXiv 2404.05892, equations 19 and 20.
    """
    form = partial(recurrence, u=u.to(compute_dtype(r)))
    return in_plain_torch(form, (r, k, v, w), state, cu_seqlens)
