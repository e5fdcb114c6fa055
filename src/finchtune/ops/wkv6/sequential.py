"""Kernels in the style of the official ones behind torch's autograd, for comparisons only.

The library is scripts/bench/sequential_wkv6.cu, compiled for a GPU, or for the CPU by the tests'
emulation. It and the kernels of cuda/gpu/wkv6.h take the same description of a problem.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Form = Callable[..., tuple[Tensor, Tensor]]


class Wkv6Problem(ctypes.Structure):
    """Wkv6Problem of cuda/gpu/wkv6.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in "BTHN"),
        ("dtype", ctypes.c_int32),
        ("n_seq", ctypes.c_int64),
        ("cu_seqlens", ctypes.c_void_p),
    )


class SequentialWkv6(torch.autograd.Function):
    """The kernels of sequential_wkv6.cu; all of r, k, v, w in fp32 or in bf16, no states."""

    @staticmethod
    def call(function: Any, tensors: list[Tensor | None]) -> None:
        r = tensors[0]
        assert r is not None
        assert r.dtype in (torch.float32, torch.bfloat16)
        problem = Wkv6Problem(*r.shape, int(r.dtype == torch.bfloat16), len(r), None)
        pointers = (ctypes.c_void_p * 14)(*(None if x is None else x.data_ptr() for x in tensors))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if r.is_cuda else None)
        assert function(ctypes.byref(problem), pointers, stream) == 0, "the launch failed"

    @staticmethod
    def forward(ctx: Any, library: ctypes.CDLL, *inputs: Tensor) -> Tensor:
        *rows, u = inputs
        y = torch.empty_like(rows[0])
        SequentialWkv6.call(library.sequential_forward, [*rows, None, u, y, *7 * [None]])
        ctx.save_for_backward(*inputs)
        ctx.library = library
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *rows, u = ctx.saved_tensors
        B, T, H, N = dy.shape
        gradients = [torch.empty_like(x) for x in rows]
        du = u.new_empty(B, H, N)
        scratch = u.new_empty(2, B, T, H, N).unbind()
        tensors = [*rows, dy.contiguous(), u, None, *gradients, du, *scratch]
        SequentialWkv6.call(ctx.library.sequential_backward, tensors)
        return None, *gradients, du.sum(0)


def sequential_form(library: ctypes.CDLL) -> Form:
    """The sequential kernels behind our signature; the state passes unused."""

    def form(
        r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        return SequentialWkv6.apply(library, r, k, v, w, u), state.view_as(state)

    return form
