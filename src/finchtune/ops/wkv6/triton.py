"""WKV6 by flash-linear-attention's Triton kernels, for a GPU that ours cannot be compiled for."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finchtune.ops.wkv import suits_triton


@functools.cache
def chunk_rwkv6() -> Callable[..., Any] | None:
    """flash-linear-attention's operator; None where it is not installed."""
    try:
        from fla.ops.rwkv6 import chunk_rwkv6
    except ImportError:
        return None
    return chunk_rwkv6


def fits_triton(r: Tensor) -> bool:
    """Whether `wkv6_triton` takes inputs like r."""
    return suits_triton(r) and chunk_rwkv6() is not None


def wkv6_triton(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`finchtune.ops.wkv6.wkv6` by `chunk_rwkv6`, which takes the log of the decay.

    Its gradient of w subtracts large sums: beside very slow decays that of a fast one is rough.
    """
    operator = chunk_rwkv6()
    assert operator is not None
    log_decay = -torch.exp(w.float())
    return operator(
        r,
        k,
        v,
        log_decay,
        u,
        scale=1.0,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(r.device, torch.int64),
    )
