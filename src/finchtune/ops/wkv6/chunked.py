"""WKV6 as matrix products over chunks of tokens: exact, plain torch, differentiable.

Every factor is a product of decays over a run of tokens, so it lies in [0, 1]; nothing is divided
and nothing can overflow. Tokens of one chunk meet in a binary tree: at the level of half size h,
the later half of each block of 2h tokens reads the earlier half across their common boundary.
"""

from functools import partial

import torch
from torch import Tensor

from finchtune.ops.wkv import compute_dtype, in_plain_torch

CHUNK = 64  # tokens; a power of two


def sum_before(x: Tensor) -> Tensor:
    """Over dim -2: the sum of all rows before each row.

    A shifted sum; "cumsum - x" would leave the rounding error of a large x on small sums.
    """
    return torch.cat([torch.zeros_like(x[..., :1, :]), x[..., :-1, :].cumsum(-2)], dim=-2)


def sum_after(x: Tensor) -> Tensor:
    """Over dim -2: the sum of all rows after each row."""
    return sum_before(x.flip(-2)).flip(-2)


def within_chunks(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """What each token reads of the earlier tokens of its own chunk; all (..., L, N)."""
    y = torch.zeros_like(v)
    half = v.shape[-2] // 2
    while half >= 1:
        # (..., n_blocks, 2, half, N): index 0 of dim -3 is the earlier half of each block.
        r2, k2, v2, decay2 = (x.unflatten(-2, (-1, 2, half)) for x in (r, k, v, log_decay))
        reader = r2[..., 1, :, :] * sum_before(decay2[..., 1, :, :]).exp()
        writer = k2[..., 0, :, :] * sum_after(decay2[..., 0, :, :]).exp()
        read = (reader @ writer.mT) @ v2[..., 0, :, :]
        y = y + torch.stack([torch.zeros_like(read), read], dim=-3).reshape(y.shape)
        half //= 2
    return y


def chunks(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `wkv6_chunked`, all in one dtype."""
    T = r.shape[1]
    length = 1
    while length < min(T, CHUNK):
        length *= 2

    def split(x: Tensor) -> Tensor:
        """(B, T, H, N) -> (B, H, n_chunks, L, N), the tail zeros, which decay nothing."""
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -T % length))
        return padded.unflatten(1, (-1, length)).permute(0, 3, 1, 2, 4)

    r, k, v, log_decay = split(r), split(k), split(v), split(-torch.exp(w))
    y = within_chunks(r, k, v, log_decay) + (r * u[:, None, None] * k).sum(-1, keepdim=True) * v
    reader = r * sum_before(log_decay).exp()
    writer = k * sum_after(log_decay).exp()
    written = writer.mT @ v
    kept = log_decay.sum(-2).exp().unsqueeze(-1)
    states = []
    for c in range(r.shape[2]):
        states.append(state)
        state = kept[:, :, c] * state + written[:, :, c]
    y = y + reader @ torch.stack(states, dim=2)
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T], state


def wkv6_chunked(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`finchtune.wkv6` in plain torch, on any device, in fp32 (float64 for float64 inputs)."""
    form = partial(chunks, u=u.to(compute_dtype(r)))
    return in_plain_torch(form, (r, k, v, w), state, cu_seqlens)
