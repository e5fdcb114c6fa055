"""WKV7 by flash-linear-attention's Triton kernels, for a GPU that ours cannot be compiled for."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finchtune.ops.wkv import suits_triton


@functools.cache
def chunk_dplr_delta_rule() -> Callable[..., Any] | None:
    """flash-linear-attention's operator, a case of which is WKV7; None where it is missing."""
    try:
        from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule
    except ImportError:
        return None
    return chunk_dplr_delta_rule


def fits_triton(r: Tensor) -> bool:
    """Whether `wkv7_triton` takes inputs like r."""
    return suits_triton(r) and chunk_dplr_delta_rule() is not None


def wkv7_triton(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`finchtune.wkv7` by an operator that takes the log of the decay and states by key."""
    operator = chunk_dplr_delta_rule()
    assert operator is not None
    y, new_state = operator(
        q=r,
        k=k,
        v=v,
        a=a,
        b=b,
        gk=-torch.exp(w.float()),
        scale=1.0,
        initial_state=None if state is None else state.mT.contiguous(),
        output_final_state=True,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(r.device, torch.int64),
    )
    return y, new_state.mT
