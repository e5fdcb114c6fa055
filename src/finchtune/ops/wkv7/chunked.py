"""WKV7 as matrix products over chunks of tokens: plain torch, differentiable.

With P_t the product of the decays of a chunk up to token t, a chunk is

    A = a P_{t-1}    B = b / P_t    K = k / P_t    R = r P_t
    (I - tril(A B^T, -1)) U = tril(A K^T, -1) V + A S^T        what each token reads by a
    Y  = R S^T + tril(R B^T) U + tril(R K^T) V
    S' = (S + U^T B + V^T K) diag(P_last)

and S' = S F + G with F and G free of S, so that only this last step goes from chunk to chunk.
"""

import torch
from torch import Tensor

from finchtune.ops.wkv import in_plain_torch

CHUNK = 16  # tokens, over which 1 / P stays below 2e4 for the model's decays


def split(x: Tensor) -> Tensor:
    """(B, T, H, N) -> (B, H, n_chunks, CHUNK, N), the tail zeros."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % CHUNK))
    return padded.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4)


def chunks(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `wkv7_chunked`, all in one dtype."""
    T, N = r.shape[1], r.shape[-1]
    r, k, v, a, b, log_decay = map(split, (r, k, v, a, b, -torch.exp(w)))
    log_product = log_decay.cumsum(-2)
    product, inverse = log_product.exp(), (-log_product).exp()
    A, B, K, R = a * (log_product - log_decay).exp(), b * inverse, k * inverse, r * product
    # Of each row of U the part without the state, and what the state is multiplied by.
    given = torch.cat([(A @ K.mT).tril(-1) @ v, A], dim=-1)
    identity = torch.eye(CHUNK, dtype=r.dtype, device=r.device)
    solved = torch.linalg.solve_triangular(
        identity - (A @ B.mT).tril(-1), given, upper=False, unitriangular=True
    )
    own, of_state = solved[..., :N], solved[..., N:]
    last = product[..., -1:, :]
    F = (torch.eye(N, dtype=r.dtype, device=r.device) + of_state.mT @ B) * last
    G = (own.mT @ B + v.mT @ K) * last
    states = []
    for c in range(r.shape[2]):
        states.append(state)
        state = state @ F[:, :, c] + G[:, :, c]
    before = torch.stack(states, dim=2)
    U = own + of_state @ before.mT
    y = R @ before.mT + (R @ B.mT).tril() @ U + (R @ K.mT).tril() @ v
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T], state


def wkv7_chunked(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`finchtune.wkv7` in plain torch, on any device, in fp32 (float64 for float64 inputs)."""
    return in_plain_torch(chunks, (r, k, v, w, a, b), state, cu_seqlens)
